//! The options of an entropy device: `rng = "src=/dev/urandom"` names the source.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::devices::files::{OpenError, Opened, open};
use crate::options::Options;
use crate::state::{Node, Reader, Schema, StateError};

/// The role of the open source.
pub(super) const SOURCE: &str = "source";

/// An entropy device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngOptions {
    /// A character device of the host that gives random bytes.
    pub source: PathBuf,
}

impl RngOptions {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let options = Options::parse(text, &["src"])?;
        Ok(Self { source: options.path("src")?.into() })
    }

    pub(super) fn open(&self) -> Result<Vec<Opened>, OpenError> {
        let Self { source: path } = self;
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_NONBLOCK);
        let error = |source| OpenError {
            what: "entropy source",
            path: path.clone(),
            remedy: ": it must be a character device that never ends, such as /dev/urandom",
            source,
        };
        let file = open("entropy source", path, &options)?;
        let kind = file.metadata().map_err(error)?.file_type();
        if !kind.is_char_device() {
            return Err(error(io::Error::other("it is not a character device")));
        }
        Ok(vec![Opened { role: SOURCE, fd: file.into(), identity: None }])
    }
}

/// `perennial,virtio-rng-options-v1`.
impl Schema for RngOptions {
    const COMPATIBLE: &'static [&'static str] = &["perennial,virtio-rng-options-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { source } = self;
        node.put_str("source", &source.to_string_lossy());
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        Ok(Self { source: reader.str("source")?.into() })
    }
}

#[cfg(any(test, fuzzing))]
mod sample {
    #![expect(clippy::unwrap_used, reason = "a test or fuzz target that cannot go on has failed")]

    use super::*;
    use crate::devices::kind::{Sample, SampleFiles};
    use crate::devices::virtio::VirtioState;
    use crate::devices::virtio::rng::{Rng, VirtioRngStateV1};

    impl Sample for Rng {
        fn options() -> RngOptions {
            RngOptions { source: "/dev/zero".into() }
        }

        /// Returns a source with constant output, so that fuzz inputs are reproducible.
        fn files(_state: Option<&VirtioState<VirtioRngStateV1>>) -> Option<SampleFiles> {
            Some(SampleFiles { opened: Self::options().open().unwrap(), peer: None })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::contract::contract_tests;

    contract_tests! {
        RngOptions,
        sample: || RngOptions { source: "/dev/hwrng".into() },
        changes: [|s| s.source = "/dev/urandom".into()],
        golden: "virtio-rng-options-v1",
    }

    #[test]
    fn a_source_is_a_character_device_at_a_path() {
        let source = RngOptions { source: "/dev/urandom".into() };
        assert_eq!(RngOptions::parse("src=/dev/urandom"), Ok(source));
        for wrong in ["", "/dev/urandom", "src=", "path=/dev/urandom", "src=/a,src=/b"] {
            RngOptions::parse(wrong).expect_err(wrong);
        }
        let refused = |path: &str| {
            let options = RngOptions { source: path.into() };
            crate::causes::chain(&options.open().expect_err(path)).join(": ")
        };
        assert!(refused("/nowhere").starts_with("cannot open entropy source /nowhere"));
        let file = tempfile::NamedTempFile::new().unwrap();
        let said = refused(file.path().to_str().unwrap());
        assert!(said.contains("such as /dev/urandom: it is not a character device"), "{said}");
        assert_eq!(RngOptions { source: "/dev/urandom".into() }.open().unwrap().len(), 1);
    }
}
