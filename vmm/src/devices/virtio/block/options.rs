//! `disk = ["path=...,readonly=on"]`: the options of a disk.

use std::fs::OpenOptions;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::devices::files::{OpenError, Opened, open};
use crate::devices::identity::Identity;
use crate::options::Options;
use crate::state::{Node, Reader, Schema, StateError};

/// The role of the open image.
pub(super) const IMAGE: &str = "image";

const V2: &str = BlockOptions::COMPATIBLE[0];

/// One disk: a raw file or a block device of the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockOptions {
    /// Path on the host.
    pub path: PathBuf,
    /// Whether the guest may only read.
    pub readonly: bool,
    /// `image_type=raw`: the image is raw even if it has the magic number of another format.
    pub raw: bool,
    /// `_disable_io_uring=on`: threads read and write, even if the host has io_uring.
    pub no_uring: bool,
    /// Number of queues besides the first: `num_queues` minus 1.
    pub more_queues: u16,
}

/// Most queues of a disk.
const QUEUES_MAX: u16 = 16;

impl BlockOptions {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let options = Options::parse(
            text,
            &["path", "readonly", "image_type", "_disable_io_uring", "num_queues"],
        )?;
        let raw = match options.get("image_type") {
            None => false,
            Some("raw") => true,
            Some(other) => {
                return Err(format!("image_type is raw, the only format there is, not `{other}`"));
            }
        };
        let (path, readonly) = (options.path("path")?.into(), options.switch("readonly")?);
        let no_uring = options.switch("_disable_io_uring")?;
        let queues = options.get("num_queues").unwrap_or("1");
        let more_queues = match queues.parse::<u16>() {
            Ok(count @ 1..=QUEUES_MAX) => count - 1,
            _ => return Err(format!("num_queues is 1 to {QUEUES_MAX}, not `{queues}`")),
        };
        Ok(Self { path, readonly, raw, no_uring, more_queues })
    }

    /// Number of the disk's queues.
    pub(super) fn queues(&self) -> u16 {
        // A document may have a larger number than the configuration allows.
        self.more_queues.min(QUEUES_MAX - 1) + 1
    }

    pub(super) fn open(&self) -> Result<Vec<Opened>, OpenError> {
        // The VM's process checks the format, because the guest controls the contents of the image.
        let Self { path, readonly, raw: _, no_uring: _, more_queues: _ } = self;
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

/// `perennial,virtio-blk-options-v2`. A disk without options that `-v1` lacks is written as `-v1`, so that
/// programs which know only that binding can read it.
impl Schema for BlockOptions {
    const COMPATIBLE: &'static [&'static str] =
        &["perennial,virtio-blk-options-v2", "perennial,virtio-blk-options-v1"];

    fn bindings(&self) -> &'static [&'static str] {
        let Self { path, readonly, raw: _, no_uring: _, more_queues: _ } = self;
        let plain = Self { path: path.clone(), readonly: *readonly, ..Self::default() };
        match *self == plain {
            true => &Self::COMPATIBLE[1..],
            false => &Self::COMPATIBLE[..1],
        }
    }

    fn encode(&self, node: &mut Node) {
        let Self { path, readonly, raw, no_uring, more_queues: _ } = self;
        node.put_str("path", &path.to_string_lossy());
        node.put_bool("read-only", *readonly);
        if self.bindings() == [V2] {
            node.put_bool("raw", *raw);
            node.put_bool("no-io-uring", *no_uring);
            node.put_u32("queues", self.queues().into());
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let (path, readonly) = (reader.str("path")?.into(), reader.bool("read-only")?);
        let plain = Self { path, readonly, ..Self::default() };
        match reader.is_compatible(V2) {
            false => Ok(plain),
            true => Ok(Self {
                raw: reader.bool("raw")?,
                no_uring: reader.bool("no-io-uring")?,
                more_queues: match reader.narrow("queues")? {
                    count @ 1..=QUEUES_MAX => count - 1,
                    other => {
                        let problem = format!("{other} queues, there are 1 to {QUEUES_MAX}");
                        return Err(reader.invalid("queues", problem));
                    }
                },
                ..plain
            }),
        }
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
            BlockOptions { path: "/data/a.img".into(), ..BlockOptions::default() }
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

    mod v1 {
        use super::*;

        contract_tests! {
            BlockOptions,
            sample: || BlockOptions { path: "/dev/vdb".into(), readonly: true, ..Default::default() },
            changes: [|d| d.path.push("x"), |d| d.readonly = false, |d| d.raw = true, |d| d.no_uring = true, |d| d.more_queues = 15],
            golden: "virtio-blk-options-v1",
        }
    }

    contract_tests! {
        BlockOptions,
        sample: || BlockOptions {
            path: "/dev/vdb".into(),
            readonly: true,
            raw: true,
            no_uring: true,
            more_queues: 3,
        },
        changes: [|d| d.path.push("x"), |d| d.readonly = false, |d| d.raw = false, |d| d.no_uring = false, |d| d.more_queues = 0],
        golden: "virtio-blk-options-v2",
    }

    #[test]
    fn a_disk_is_an_image_at_a_path() {
        let plain = BlockOptions { path: "/a".into(), ..BlockOptions::default() };
        let disk = |readonly| Ok(BlockOptions { readonly, ..plain.clone() });
        assert_eq!(BlockOptions::parse("path=/a"), disk(false));
        assert_eq!(BlockOptions::parse("readonly=on,path=/a"), disk(true));
        let raw = BlockOptions { raw: true, ..plain.clone() };
        assert_eq!(BlockOptions::parse("path=/a,image_type=raw"), Ok(raw));
        let more = BlockOptions { no_uring: true, more_queues: 3, ..plain.clone() };
        assert_eq!(BlockOptions::parse("path=/a,num_queues=4,_disable_io_uring=on"), Ok(more));
        assert_eq!(BlockOptions::parse("path=/a,num_queues=1"), disk(false));
        for wrong in ["0", "17", "", "x", "65537"] {
            let refused = BlockOptions::parse(&format!("path=/a,num_queues={wrong}")).unwrap_err();
            assert!(refused.contains("num_queues is 1 to 16"), "{refused}");
        }
        let refused = BlockOptions::parse("path=/a,image_type=qcow2").unwrap_err();
        assert!(refused.contains("not `qcow2`"), "{refused}");
        assert!(BlockOptions::parse("readonly=on").unwrap_err().contains("path=FILE"));
        assert!(BlockOptions::parse("path=/a,path=/b").unwrap_err().contains("twice"));
        assert!(BlockOptions::parse("path=/a,colour=red").unwrap_err().contains("`colour`"));
    }

    #[test]
    fn what_is_no_disk_is_not_opened() {
        let refused = |path: &str| {
            let options = BlockOptions { path: path.into(), readonly: true, ..Default::default() };
            crate::causes::chain(&options.open().expect_err(path)).join(": ")
        };
        assert!(refused("/nowhere").starts_with("cannot open disk /nowhere"));
        assert!(refused("/dev/null").contains("neither a regular file nor a block device"));
    }
}
