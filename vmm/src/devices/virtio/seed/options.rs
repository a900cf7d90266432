//! `cloud-init = "DIR"`: the options of a seed.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use serde::{Deserialize, Serialize};

use super::image;
use crate::devices::files::{OpenError, Opened};
use crate::devices::identity::Identity;
use crate::state::{Node, Reader, Schema, StateError};

/// The role of the disk.
pub(super) const DISK: &str = "seed";

/// A seed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeedOptions {
    /// A directory of the host with the files of the seed.
    pub directory: PathBuf,
}

impl SeedOptions {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        match text.starts_with('/') {
            true => Ok(Self { directory: text.into() }),
            false => Err("it must be the absolute path of a directory".to_owned()),
        }
    }

    /// Makes the disk.
    pub(super) fn open(&self) -> Result<Vec<Opened>, OpenError> {
        let Self { directory } = self;
        let opened = || {
            let disk = image::of(directory)?;
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
            let mut memfd = File::from(memfd_create("perennial-seed", flags)?);
            memfd.write_all(&disk)?;
            let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
            fcntl_add_seals(&memfd, seals)?;
            let identity = Some(Identity::of(&memfd)?);
            Ok(vec![Opened { role: DISK, fd: memfd.into(), identity }])
        };
        opened().map_err(|source: io::Error| OpenError {
            what: "cloud-init",
            path: directory.clone(),
            remedy: "",
            source,
        })
    }
}

/// `perennial,cloud-init-options-v1`.
impl Schema for SeedOptions {
    const COMPATIBLE: &'static [&'static str] = &["perennial,cloud-init-options-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { directory } = self;
        node.put_str("directory", &directory.to_string_lossy());
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        Ok(Self { directory: reader.str("directory")?.into() })
    }
}

#[cfg(any(test, fuzzing))]
mod sample {
    #![expect(clippy::unwrap_used, reason = "a test or fuzz target that cannot go on has failed")]

    use super::*;
    use crate::devices::kind::{Sample, SampleFiles};
    use crate::devices::virtio::VirtioState;
    use crate::devices::virtio::seed::{Seed, SeedStateV1};

    /// Size of a sample disk.
    const BYTES: u64 = 64 << 10;

    impl Sample for Seed {
        fn options() -> SeedOptions {
            SeedOptions { directory: "/data/seed".into() }
        }

        /// A disk of zeroes; only a state with its digest can be restored with it.
        fn files(state: Option<&VirtioState<SeedStateV1>>) -> Option<SampleFiles> {
            let zeroes = vec![0; BYTES as usize];
            let digest = crc32fast::hash(&zeroes);
            if state.is_some_and(|state| state.device.digest != digest) {
                return None;
            }
            let memfd = File::from(memfd_create("seed", MemfdFlags::CLOEXEC).unwrap());
            memfd.set_len(BYTES).unwrap();
            let identity = Some(Identity::of(&memfd).unwrap());
            let opened = vec![Opened { role: DISK, fd: memfd.into(), identity }];
            Some(SampleFiles { opened, peer: None })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::contract::contract_tests;

    contract_tests! {
        SeedOptions,
        sample: || SeedOptions { directory: "/data/seed".into() },
        changes: [|s| s.directory.push("x")],
        golden: "cloud-init-options-v1",
    }

    #[test]
    fn a_seed_is_a_directory() {
        let seed = SeedOptions { directory: "/data/seed".into() };
        assert_eq!(SeedOptions::parse("/data/seed"), Ok(seed));
        for wrong in ["", "seed", "path=/data/seed"] {
            assert!(SeedOptions::parse(wrong).unwrap_err().contains("absolute path"), "{wrong}");
        }
        let refused = SeedOptions { directory: "/nowhere".into() }.open().unwrap_err();
        let refused = crate::causes::chain(&refused).join(": ");
        assert!(refused.starts_with("cannot open cloud-init /nowhere: No such file"), "{refused}");
    }
}
