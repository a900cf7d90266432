//! virtio-rng (5.4): entropy for the guest, from a character device of the host.
//!
//! The device takes a request only when the source has entropy. So no request is in flight while the
//! device waits for entropy, and a pause never waits for entropy.

mod options;
mod state;
#[cfg(test)]
mod tests;

pub use options::RngOptions;
pub use state::VirtioRngStateV1;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, ReadVolatile};

use super::{Chain, Rings, VirtioDevice, VirtioPci, VirtioState, VirtioWorker, features};
use crate::devices::DeviceError;
use crate::devices::claims::Claim;
use crate::devices::files::{OpenError, Opened};
use crate::devices::kind::{Built, CommandLine, DeviceCalls, Kind, Place, Site};

/// Number of entries of the only queue.
const QUEUE_SIZE: u16 = 64;
/// Maximum number of bytes for one request, so that a guest cannot keep the device's thread reading
/// for long. A driver that needs more sends another request (5.4.6.1: the device may return less than
/// requested).
const REQUEST_MAX: usize = 64 << 10;

/// The device.
#[derive(Debug)]
pub struct Rng {
    source: Arc<File>,
}

impl Rng {
    /// Creates a device that passes on the bytes of `source`, a file that is read without blocking.
    pub fn new(source: File) -> Self {
        Self { source: Arc::new(source) }
    }
}

impl VirtioDevice for Rng {
    const NAME: &'static str = "virtio-rng";
    const ID: u16 = 4;
    /// A class that PCI does not define.
    const CLASS: [u8; 3] = [0xff, 0x00, 0x00];
    const FEATURES: features::Names = &[];

    type Worker = RngWorker;

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    /// There is no device configuration (5.4.4).
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn negotiated(&mut self, _features: u64) {}

    fn worker(&self) -> RngWorker {
        RngWorker { source: self.source.clone(), reported: false }
    }
}

/// Fills the guest's buffers.
#[derive(Debug)]
pub struct RngWorker {
    source: Arc<File>,
    /// Whether a failure of the source was already reported.
    reported: bool,
}

impl VirtioWorker for RngWorker {
    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.source.as_fd()]
    }

    fn on_doorbell(&mut self, queue: usize, rings: &Rings) {
        while self.has_entropy() {
            let Some(request) = rings.take(queue) else { return };
            let written = self.fill(rings.memory(), request.chain());
            rings.complete(request, written);
        }
    }

    fn on_source(&mut self, _source: usize, rings: &Rings) {
        self.on_doorbell(0, rings);
    }
}

impl RngWorker {
    /// Returns whether a read would return bytes or an error at once.
    fn has_entropy(&self) -> bool {
        let mut fds = [PollFd::new(&*self.source, PollFlags::IN)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&at_once)).is_ok_and(|ready| ready > 0)
    }

    /// Fills the buffers of a chain that the device may write to. Returns how many bytes it wrote.
    fn fill(&mut self, memory: &GuestMemoryMmap, chain: Chain) -> u32 {
        let mut written = 0;
        // No chain is longer than the queue (2.7.5.3.1). An indirect table could have 65535 descriptors of a byte each,
        // and a pause would wait for all of their reads.
        let descriptors = chain.take(QUEUE_SIZE.into());
        for descriptor in descriptors.filter(|descriptor| descriptor.is_write_only()) {
            let len = (descriptor.len() as usize).min(REQUEST_MAX - written);
            // The buffer is not in RAM: the guest gets the bytes written so far.
            let Ok(mut buffer) = memory.get_slice(descriptor.addr(), len) else { break };
            if len == 0 {
                continue;
            }
            let count = match (&*self.source).read_volatile(&mut buffer) {
                Ok(0) => self.report("it is at its end"),
                Ok(count) => count,
                Err(error) => self.report(&error.to_string()),
            };
            written += count;
            if count < len {
                break;
            }
        }
        // At most REQUEST_MAX.
        written as u32
    }

    /// Logs a failure of the source, but only the first. Returns 0, the number of bytes read.
    fn report(&mut self, problem: &str) -> usize {
        if !std::mem::replace(&mut self.reported, true) {
            tracing::warn!("virtio-rng: cannot read the entropy source: {problem}");
        }
        0
    }
}

impl Kind for Rng {
    const KEY: &'static str = "rng";
    const COMMAND_LINE: Option<CommandLine> = Some(CommandLine {
        usage: "A source of entropy: src=DEVICE",
        default: Some("src=/dev/urandom"),
        is_path: false,
        foreign: &[],
        harmless: &[],
    });
    const NAME: &'static str = <Self as VirtioDevice>::NAME;
    const MOST: usize = 1;
    const PLACE: Place = Place::Slot;
    /// Its thread only reads.
    const CALLS: DeviceCalls = DeviceCalls { build: &[], thread: &[], registers: &[] };

    type Options = RngOptions;
    type State = VirtioState<VirtioRngStateV1>;

    fn parse(text: &str, _vcpus: u32) -> Result<RngOptions, String> {
        RngOptions::parse(text)
    }

    fn unasked() -> Option<RngOptions> {
        None
    }

    /// Any number of devices can read the source.
    fn claims(_options: &RngOptions) -> Vec<Claim> {
        Vec::new()
    }

    fn open(options: &RngOptions) -> Result<Vec<Opened>, OpenError> {
        options.open()
    }

    fn build(
        _options: &RngOptions,
        site: &mut Site,
        state: Option<Self::State>,
    ) -> Result<Built<Self::State>, DeviceError> {
        let source = site.files.take(options::SOURCE).map_err(|error| site.files_error(error))?;
        VirtioPci::build(site, state, source.into(), |source| Ok(Self::new(source)))
    }
}
