//! `disk = ["path=...,readonly=on"]`: the image of a disk.

use std::fs::OpenOptions;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::devices::files::{OpenError, Opened, open};
use crate::devices::identity::Identity;
use crate::options::Options;
use crate::state::{Node, Reader, Schema, StateError};

/// The role of the open image.
pub(super) const IMAGE: &str = "image";

/// One disk: a raw file or a block device of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockOptions {
    /// Its path on the host.
    pub path: PathBuf,
    /// Whether the guest may only read.
    pub readonly: bool,
}

impl BlockOptions {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let options = Options::parse(text, &["path", "readonly"])?;
        Ok(Self { path: options.path("path")?.into(), readonly: options.switch("readonly")? })
    }

    pub(super) fn open(&self) -> Result<Vec<Opened>, OpenError> {
        let Self { path, readonly } = self;
        let mut options = OpenOptions::new();
        options.read(true).write(!readonly);
        let file = open("disk", path, &options)?;
        let identity = Identity::of(&file).map_err(|source| OpenError {
            what: "disk",
            path: path.clone(),
            remedy: "",
            source,
        })?;
        Ok(vec![Opened { role: IMAGE, fd: file.into(), identity: Some(identity) }])
    }
}

/// `perennial,virtio-blk-options-v1`.
impl Schema for BlockOptions {
    const COMPATIBLE: &'static [&'static str] = &["perennial,virtio-blk-options-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { path, readonly } = self;
        node.put_str("path", &path.to_string_lossy());
        node.put_bool("read-only", *readonly);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        Ok(Self { path: reader.str("path")?.into(), readonly: reader.bool("read-only")? })
    }
}

#[cfg(any(test, fuzzing))]
mod sample {
    #![expect(clippy::unwrap_used, reason = "a test or fuzz target that cannot go on has failed")]

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;
    use crate::devices::kind::{Sample, SampleFiles};
    use crate::devices::virtio::VirtioState;
    use crate::devices::virtio::block::{Block, SECTOR, VirtioBlkStateV1};

    impl Sample for Block {
        fn options() -> BlockOptions {
            BlockOptions { path: "/data/a.img".into(), readonly: false }
        }

        /// A disk that takes no room, as large as the state says, if there can be one.
        fn files(state: Option<&VirtioState<VirtioBlkStateV1>>) -> Option<SampleFiles> {
            let state = state.map(|state| &state.device);
            let fd = memfd_create("image", MemfdFlags::CLOEXEC).unwrap();
            let sectors = state.map_or(64, |state| state.capacity_sectors);
            ftruncate(&fd, sectors.checked_mul(SECTOR)?).ok()?;
            let identity = match state {
                Some(state) => state.identity.clone(),
                None => Identity::of(&fd).unwrap(),
            };
            let opened = vec![Opened { role: IMAGE, fd, identity: Some(identity) }];
            Some(SampleFiles { opened, peer: None })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::contract::contract_tests;

    contract_tests! {
        BlockOptions,
        sample: || BlockOptions { path: "/dev/vdb".into(), readonly: true },
        changes: [|d| d.path.push("x"), |d| d.readonly = false],
        golden: "virtio-blk-options-v1",
    }

    #[test]
    fn a_disk_is_an_image_at_a_path() {
        let disk = |readonly| Ok(BlockOptions { path: "/a".into(), readonly });
        assert_eq!(BlockOptions::parse("path=/a"), disk(false));
        assert_eq!(BlockOptions::parse("readonly=on,path=/a"), disk(true));
        assert!(BlockOptions::parse("readonly=on").unwrap_err().contains("path=FILE"));
        assert!(BlockOptions::parse("path=/a,path=/b").unwrap_err().contains("twice"));
        assert!(BlockOptions::parse("path=/a,colour=red").unwrap_err().contains("`colour`"));
    }

    #[test]
    fn what_is_no_disk_is_not_opened() {
        let refused = |path: &str| {
            let options = BlockOptions { path: path.into(), readonly: true };
            crate::causes::chain(&options.open().expect_err(path)).join(": ")
        };
        assert!(refused("/nowhere").starts_with("cannot open disk /nowhere"));
        assert!(refused("/dev/null").contains("neither a regular file nor a block device"));
    }
}
