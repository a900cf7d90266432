//! `disk = ["path=...,readonly=on"]`: the options of a disk.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::lock;
use crate::devices::files::{OpenError, Opened, open_at_once};
use crate::devices::identity::Identity;
use crate::devices::rate_limit::{self, RateLimits};
use crate::options::Options;
use crate::state::{Node, Reader, Schema, StateError};

/// The role of the open image.
pub(super) const IMAGE: &str = "image";
/// The role of the image opened with O_DIRECT, if the disk has `direct=on`.
pub(super) const DIRECT: &str = "direct-image";
/// What to do if an image cannot be opened with O_DIRECT.
const NO_DIRECT: &str = ": its file system does not support direct=on, so remove that option";

/// Keys that only Cloud Hypervisor has, with what to do instead.
pub(super) const FOREIGN: &[(&str, &str)] = &[
    ("backing_files", "an image must be raw and complete"),
    ("disable_aio", ""),
    ("_disable_aio", ""),
    ("disable_io_uring", "write `_disable_io_uring`"),
    ("lock_granularity", "a disk is always locked as a whole"),
    ("queue_affinity", ""),
    ("queue_size", "a queue has 256 entries"),
    ("serial", "the guest finds the disk by the UUID or the label of its file system"),
    ("socket", "name an image or a block device with path="),
    ("sparse", "what the guest discards is always given back"),
    ("vhost_user", "name an image or a block device with path="),
];

/// Values of them that change nothing. Queues that are larger than asked for do no harm.
pub(super) const HARMLESS: &[(&str, &[&str])] = &[
    ("backing_files", &["off"]),
    ("_disable_aio", &["on", "off"]),
    ("queue_size", &["16", "32", "64", "128", "256"]),
    ("sparse", &["on"]),
    ("vhost_user", &["off"]),
];

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
    /// `direct=on`: reads and writes bypass the host's page cache (O_DIRECT).
    pub direct: bool,
    /// Limits on bytes and requests.
    pub rate_limits: RateLimits,
}

/// Most queues of a disk.
const QUEUES_MAX: u16 = 16;

/// The keys of a disk's options, without those of its limits.
const KEYS: [&str; 6] =
    ["path", "readonly", "direct", "image_type", "num_queues", "_disable_io_uring"];

impl BlockOptions {
    /// Parses the options of a disk. Unless they say another number, it has one queue for each of `vcpus`
    /// vCPUs, so that no vCPU waits for another one to offer its requests.
    pub(super) fn parse(text: &str, vcpus: u32) -> Result<Self, String> {
        let options = Options::parse(text, &[&KEYS[..], &rate_limit::KEYS].concat())?;
        let raw = match options.get("image_type") {
            None => false,
            Some("raw") => true,
            Some(other) => {
                return Err(format!("image_type is raw, the only format there is, not `{other}`"));
            }
        };
        let queues = match options.get("num_queues").map(|text| (text, text.parse())) {
            None => u16::try_from(vcpus).unwrap_or(QUEUES_MAX).clamp(1, QUEUES_MAX),
            Some((_, Ok(count @ 1..=QUEUES_MAX))) => count,
            Some((text, _)) => {
                return Err(format!("num_queues is 1 to {QUEUES_MAX}, not `{text}`"));
            }
        };
        Ok(Self {
            path: options.path("path")?.into(),
            readonly: options.switch("readonly")?,
            raw,
            no_uring: options.switch("_disable_io_uring")?,
            more_queues: queues - 1,
            direct: options.switch("direct")?,
            rate_limits: RateLimits::parse(&options)?,
        })
    }

    /// Number of the disk's queues.
    pub(super) fn queues(&self) -> u16 {
        // A document may have a larger number than the configuration allows.
        self.more_queues.min(QUEUES_MAX - 1) + 1
    }

    /// Opens and locks the image, and with `direct=on` opens it once more with O_DIRECT.
    pub(super) fn open(&self) -> Result<Vec<Opened>, OpenError> {
        let mut opened = vec![self.open_image(IMAGE, false)?];
        if self.direct {
            opened.push(self.open_image(DIRECT, true)?);
            if opened[0].identity != opened[1].identity {
                let source =
                    io::Error::other("it was replaced by another file while it was opened");
                return Err(OpenError {
                    what: "disk",
                    path: self.path.clone(),
                    remedy: "",
                    source,
                });
            }
        }
        Ok(opened)
    }

    fn open_image(&self, role: &'static str, direct: bool) -> Result<Opened, OpenError> {
        // The VM's process checks the format, because the guest controls the contents of the image.
        let path = &self.path;
        let error = |remedy, source| OpenError { what: "disk", path: path.clone(), remedy, source };
        let mut options = OpenOptions::new();
        options.read(true).write(!self.readonly);
        if direct {
            options.custom_flags(libc::O_DIRECT);
        }
        let file = match direct {
            true => options.open(path),
            false => {
                // Of a block device, that it is this program's alone. Nothing if it is a file.
                let exclusive = if self.readonly { 0 } else { libc::O_EXCL };
                options.custom_flags(exclusive);
                lock::open_locked(self.readonly, || open_at_once(path, &options))
            }
        };
        let file = file.map_err(|source| match source.kind() {
            io::ErrorKind::InvalidInput if direct => error(NO_DIRECT, source),
            _ => error("", source),
        })?;
        let identity = Identity::of(&file).map_err(|source| error("", source))?;
        Ok(Opened { role, fd: file.into(), identity: Some(identity) })
    }

    /// Whether the options have nothing that the bindings before v3 lack.
    fn is_v2(&self) -> bool {
        !self.direct && self.rate_limits == RateLimits::default()
    }

    /// Whether the options have nothing that the first binding lacks.
    fn is_v1(&self) -> bool {
        self.is_v2() && !self.raw && !self.no_uring && self.more_queues == 0
    }
}

/// `perennial,virtio-blk-options-v3`. Options are written in the oldest binding that can say all of them, so
/// that programs which know only that binding can read them.
impl Schema for BlockOptions {
    const COMPATIBLE: &'static [&'static str] = &[
        "perennial,virtio-blk-options-v3",
        "perennial,virtio-blk-options-v2",
        "perennial,virtio-blk-options-v1",
    ];

    fn bindings(&self) -> &'static [&'static str] {
        match (self.is_v1(), self.is_v2()) {
            (true, _) => &Self::COMPATIBLE[2..],
            (false, true) => &Self::COMPATIBLE[1..2],
            (false, false) => &Self::COMPATIBLE[..1],
        }
    }

    fn encode(&self, node: &mut Node) {
        let Self { path, readonly, raw, no_uring, more_queues: _, direct, rate_limits } = self;
        node.put_str("path", &path.to_string_lossy());
        node.put_bool("read-only", *readonly);
        if !self.is_v1() {
            node.put_bool("raw", *raw);
            node.put_bool("no-io-uring", *no_uring);
            node.put_u32("queues", self.queues().into());
        }
        if !self.is_v2() {
            node.put_bool("direct", *direct);
            rate_limits.encode(node);
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let [v3, v2, _] = Self::COMPATIBLE else { unreachable!("three bindings") };
        let (path, readonly) = (reader.str("path")?.into(), reader.bool("read-only")?);
        let mut options = Self { path, readonly, ..Self::default() };
        let v3 = reader.is_compatible(v3);
        if v3 || reader.is_compatible(v2) {
            options.raw = reader.bool("raw")?;
            options.no_uring = reader.bool("no-io-uring")?;
            options.more_queues = match reader.narrow("queues")? {
                count @ 1..=QUEUES_MAX => count - 1,
                other => {
                    let problem = format!("{other} queues, there are 1 to {QUEUES_MAX}");
                    return Err(reader.invalid("queues", problem));
                }
            };
        }
        if v3 {
            options.direct = reader.bool("direct")?;
            options.rate_limits = RateLimits::decode(reader)?;
        }
        Ok(options)
    }
}

#[cfg(any(test, fuzzing))]
mod sample {
    #![expect(clippy::unwrap_used, reason = "a test or fuzz target that cannot go on has failed")]

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;
    use crate::devices::kind::{Sample, SampleFiles};
    use crate::devices::virtio::VirtioState;
    use crate::devices::virtio::block::{Block, SECTOR, VirtioBlkStateV4};

    impl Sample for Block {
        fn options() -> BlockOptions {
            BlockOptions { path: "/data/a.img".into(), ..BlockOptions::default() }
        }

        /// A disk that takes no room, as large as the state says, if there can be one.
        fn files(state: Option<&VirtioState<VirtioBlkStateV4>>) -> Option<SampleFiles> {
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
    use crate::devices::kind::Kind;
    use crate::devices::rate_limit::RateLimit;
    use crate::devices::virtio::Block;
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

    mod v2 {
        use super::*;

        contract_tests! {
            BlockOptions,
            sample: || BlockOptions {
                path: "/dev/vdb".into(),
                readonly: true,
                raw: true,
                no_uring: true,
                more_queues: 3,
                ..Default::default()
            },
            changes: [|d| d.path.push("x"), |d| d.readonly = false, |d| d.raw = false, |d| d.no_uring = false, |d| d.more_queues = 0, |d| d.direct = true],
            golden: "virtio-blk-options-v2",
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
            direct: true,
            rate_limits: RateLimits {
                bandwidth: Some(RateLimit { size: 1 << 20, one_time_burst: 3, refill_ms: 100 }),
                operations: Some(RateLimit { size: 500, one_time_burst: 0, refill_ms: 1000 }),
            },
        },
        changes: [|d| d.path.push("x"), |d| d.readonly = false, |d| d.raw = false, |d| d.no_uring = false, |d| d.more_queues = 0, |d| d.direct = false, |d| d.rate_limits.bandwidth = None, |d| d.rate_limits.operations = None],
        optional: ["/:bandwidth-limit", "/:operations-limit"],
        golden: "virtio-blk-options-v3",
    }

    #[test]
    fn a_disk_is_an_image_at_a_path() {
        let plain = BlockOptions { path: "/a".into(), ..BlockOptions::default() };
        let disk = |readonly| Ok(BlockOptions { readonly, ..plain.clone() });
        assert_eq!(BlockOptions::parse("path=/a", 1), disk(false));
        assert_eq!(BlockOptions::parse("readonly=on,path=/a", 1), disk(true));
        let raw = BlockOptions { raw: true, ..plain.clone() };
        assert_eq!(BlockOptions::parse("path=/a,image_type=raw", 1), Ok(raw));
        let more = BlockOptions { no_uring: true, more_queues: 3, ..plain.clone() };
        assert_eq!(BlockOptions::parse("path=/a,num_queues=4,_disable_io_uring=on", 1), Ok(more));
        assert_eq!(BlockOptions::parse("path=/a,num_queues=1", 1), disk(false));
        for wrong in ["0", "17", "", "x", "65537"] {
            let refused =
                BlockOptions::parse(&format!("path=/a,num_queues={wrong}"), 1).unwrap_err();
            assert!(refused.contains("num_queues is 1 to 16"), "{refused}");
        }
        let direct = BlockOptions { direct: true, ..plain.clone() };
        assert_eq!(BlockOptions::parse("path=/a,direct=on", 1), Ok(direct));
        let limited = BlockOptions::parse("path=/a,ops_size=5,ops_refill_time=9", 1).unwrap();
        let limit = RateLimit { size: 5, one_time_burst: 0, refill_ms: 9 };
        assert_eq!(limited.rate_limits.operations, Some(limit));
        let refused = BlockOptions::parse("path=/a,image_type=qcow2", 1).unwrap_err();
        assert!(refused.contains("not `qcow2`"), "{refused}");
        assert!(BlockOptions::parse("readonly=on", 1).unwrap_err().contains("path=FILE"));
        assert!(BlockOptions::parse("path=/a,path=/b", 1).unwrap_err().contains("twice"));
        assert!(BlockOptions::parse("path=/a,colour=red", 1).unwrap_err().contains("`colour`"));
    }

    #[test]
    fn a_disk_has_a_queue_for_each_vcpu_up_to_16_unless_it_says_how_many() {
        let queues = |text, vcpus| BlockOptions::parse(text, vcpus).unwrap().queues();
        for (vcpus, expected) in [(0, 1), (1, 1), (2, 2), (16, 16), (17, 16), (u32::MAX, 16)] {
            assert_eq!(queues("path=/a", vcpus), expected, "{vcpus} vCPUs");
            assert_eq!(queues("path=/a,num_queues=3", vcpus), 3);
        }
        let [one, four] = [1, 4].map(|vcpus| <Block as Kind>::parse("path=/a", vcpus).unwrap());
        assert_eq!((one.queues(), four.queues()), (1, 4));
    }

    #[test]
    fn every_mistake_in_the_options_is_refused_with_what_was_meant() {
        for (mistake, told) in [
            ("", "`` is not of the form key=value"),
            ("path", "`path` is not of the form key=value"),
            ("path=", "it must name a path: path=FILE"),
            ("path=/a,", "`` is not of the form key=value"),
            (",path=/a", "`` is not of the form key=value"),
            ("path=/a,,direct=on", "`` is not of the form key=value"),
            ("Path=/a", "did you mean `path`?"),
            ("path=/a,read_only=on", "did you mean `readonly`?"),
            ("path=/a,dircet=on", "did you mean `direct`?"),
            ("path=/a,num_queue=2", "did you mean `num_queues`?"),
            ("path=/a,bw_refil_time=2", "did you mean `bw_refill_time`?"),
            ("path=/a, direct=on", "` direct` is not known here: did you mean `direct`?"),
            ("path=/a,direct=on,direct=on", "`direct` is given twice"),
            ("path=/a,direct=", "direct is on or off, not ``"),
            ("path=/a,direct=yes", "direct is on or off, not `yes`"),
            ("path=/a,readonly=of", "readonly is on or off, not `of`"),
            ("path=/a,_disable_io_uring=1", "_disable_io_uring is on or off, not `1`"),
            ("path=/a,image_type=", "not ``"),
            ("path=/a,image_type=Raw", "not `Raw`"),
            ("path=/a,num_queues=-1", "num_queues is 1 to 16, not `-1`"),
            ("path=/a,num_queues=99999999999999999999", "num_queues is 1 to 16, not `99"),
            ("path=/a,bw_size=", "`` is not a size"),
            ("path=/a,bw_size=1X,bw_refill_time=1", "`1X` is not a size"),
            ("path=/a,bw_size=99999999T,bw_refill_time=1", "more than can be counted"),
            ("path=/a,ops_size=-5,ops_refill_time=1", "`-5`"),
            ("path=/a,ops_size=5,ops_refill_time=99999999999999999999", "99999999999999999999"),
            ("path=/a,ops_size=5", "ops_refill_time"),
            ("path=/a,bw_refill_time=5", "bw_size"),
            ("path=/a,bw_one_time_burst=5", "bw_size"),
        ] {
            let refused = BlockOptions::parse(mistake, 1).expect_err(mistake);
            assert!(refused.contains(told), "{mistake}: {refused}");
        }
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
