//! virtio-net (5.1): a network device that is connected to a tap of the host.
//!
//! ```text
//!   queue 2n      receive    tap --read--> a buffer of the device --> the guest's buffers
//!   queue 2n + 1  transmit   the guest's buffers --> tap
//!   last queue    control    commands of the driver: filter, address, pairs of queues
//! ```
//!
//! The device reads a frame from the tap only when the guest has a buffer for it; until then the frame waits
//! in the tap's queue. A pause finishes the current frame. So a frame is delivered at most once, and the
//! frames in the tap's queue are lost when another host opens the tap.
//!
//! All settings of the tap are computed from the device's state and the negotiated features. A restore makes
//! them again.

mod announce;
mod buffers;
mod control;
mod filter;
mod header;
mod host;
mod lent;
mod options;
mod receive;
mod state;
mod tap;
#[cfg(test)]
mod tests;
mod transmit;
mod worker;

pub use filter::{Filter, MacTable};
pub use options::NetOptions;
pub use state::{NetError, VirtioNetStateV1};
pub use worker::NetWorker;

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use self::tap::Tap;
use super::{Rings, VirtioDevice, VirtioPci, VirtioState, features};
use crate::confine::Call;
use crate::devices::DeviceError;
use crate::devices::claims::Claim;
use crate::devices::files::{OpenError, Opened};
use crate::devices::interface::Mac;
use crate::devices::kind::{Built, CommandLine, DeviceCalls, Kind, Place, Site};
use crate::devices::needs::HostNeed;
use crate::devices::network::{Link, NetworkPort, OnLink};
use crate::mutex::lock;

/// The settings that the driver's features, its number of queues and the state of the link need: TUNSETQUEUE
/// detaches a queue from the tap that the host has opened, or attaches it again. The other settings of a tap need
/// TUNSETIFF.
const SETTINGS: &[Call] =
    &[Call::ioctl(&[libc::TUNSETOFFLOAD as u32, libc::TUNSETQUEUE as u32, tap::TUNSETCARRIER])];
/// The question whether a macvtap is still there.
const LOOK: &[Call] = &[Call::ioctl(&[libc::TUNGETIFF as u32])];
/// Most pairs of queues.
pub const PAIRS_MAX: usize = 8;
/// Least and most bytes of a packet that can be configured: what the specification allows (5.1.4.2),
/// and what a tap takes (65,535 less the Ethernet header; Linux drivers/net/tun.c).
const MTU_MIN: u16 = 68;
const MTU_MAX: u16 = 65_521;
/// Most addresses in each of the driver's two tables.
pub const MACS_MAX: usize = 64;

/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;
/// Least bytes of a frame: an Ethernet header.
const FRAME_MIN: usize = 14;
/// Most bytes of a frame: the largest packet, an Ethernet header and a VLAN tag.
const FRAME_MAX: usize = 65_535 + 14 + 4;
/// A frame of more bytes than these is large: a part of a stream, which is divided into packets only where they leave.
const LARGE: usize = 8 << 10;

const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
const F_CTRL_VQ: u64 = 1 << 17;
const F_CTRL_RX: u64 = 1 << 18;
const F_GUEST_ANNOUNCE: u64 = 1 << 21;
const F_MQ: u64 = 1 << 22;
const F_CTRL_MAC_ADDR: u64 = 1 << 23;

/// Bits of the configuration's `status` (5.1.4).
const S_LINK_UP: u16 = 1;
const S_ANNOUNCE: u16 = 2;

/// The device.
#[derive(Debug)]
pub struct Net {
    shared: Arc<Shared>,
    queue_sizes: Vec<u16>,
    /// Whether it was restored and has not run since.
    restored: bool,
}

/// Shared by the registers and the workers of the device.
struct Shared {
    /// The tap's name, for messages.
    name: String,
    /// The tap's queues, one for each pair of queues.
    taps: Vec<Tap>,
    /// The address that the driver finds after reset.
    mac: Mac,
    /// The largest packet in bytes, if the device offers MTU.
    mtu: Option<u16>,
    /// The negotiated features; 0 without a driver.
    features: AtomicU64,
    driver: Mutex<Driver>,
    on_link: OnLink,
    /// For each [`Setting`], whether the log says that the kernel has refused it.
    reported: [AtomicBool; 2],
}

/// A setting of the tap that the guest makes the device change, and that the kernel may refuse.
#[derive(Debug, Clone, Copy)]
enum Setting {
    Queues,
    Offloads,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Settings that the driver made by commands, and the state that it reads.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Driver {
    /// The address in use.
    mac: Mac,
    filter: Filter,
    /// Pairs of queues in use.
    pairs: u16,
    /// Whether the driver is asked to announce itself to the network and has not confirmed it.
    announce: bool,
    /// How often the device has yet to announce the guest to the network.
    announcements: u8,
    /// Whether the operator has taken the link down.
    link_down: bool,
    /// Whether the tap is gone.
    tap_gone: bool,
}

impl Driver {
    fn after_reset(mac: Mac) -> Self {
        Self {
            mac,
            filter: Filter::default(),
            pairs: 1,
            announce: false,
            announcements: 0,
            link_down: false,
            tap_gone: false,
        }
    }

    fn link(&self) -> Link {
        match self {
            Self { tap_gone: true, .. } => Link::Gone,
            Self { link_down: true, .. } => Link::Down,
            _ => Link::Up,
        }
    }

    /// Whether frames of a pair of queues pass.
    fn carries(&self, pair: usize) -> bool {
        pair < usize::from(self.pairs) && self.link() == Link::Up
    }
}

impl Shared {
    fn features(&self) -> u64 {
        self.features.load(Ordering::Relaxed)
    }

    fn driver(&self) -> MutexGuard<'_, Driver> {
        lock(&self.driver)
    }

    /// Sets the number of pairs of queues in use. Returns `None` if the device has fewer pairs, or the kernel
    /// refuses.
    fn use_pairs(&self, pairs: u16) -> Option<()> {
        if pairs == 0 || usize::from(pairs) > self.taps.len() {
            return None;
        }
        let mut driver = self.driver();
        self.switch_queues(driver.pairs, pairs)
            .inspect_err(|error| {
                self.refused(Setting::Queues, format_args!("use {pairs} of its queues"), error);
            })
            .ok()?;
        driver.pairs = pairs;
        Some(())
    }

    /// Makes the kernel use the first `after` queues of the tap instead of the first `before`.
    fn switch_queues(&self, before: u16, after: u16) -> io::Result<()> {
        let (least, most) = (usize::from(before.min(after)), usize::from(before.max(after)));
        self.taps[least..most].iter().try_for_each(|tap| tap.set_queue(after > before))
    }

    /// Sets the tap's offloads for a driver with these features. The kernel takes its lock
    /// for changes of interfaces, which it holds for moments only.
    fn apply_offloads(&self, features: u64) {
        let bits = [
            (F_GUEST_CSUM, libc::TUN_F_CSUM),
            (F_GUEST_TSO4, libc::TUN_F_TSO4),
            (F_GUEST_TSO6, libc::TUN_F_TSO6),
        ];
        // Segments need checksums (5.1.3.1).
        let offload = match features & F_GUEST_CSUM {
            0 => 0,
            _ => bits.iter().filter(|(bit, _)| features & bit != 0).map(|(_, flag)| flag).sum(),
        };
        // One call sets the offloads of all queues of a tap.
        if let Some(tap) = self.taps.first()
            && let Err(error) = tap.set_offload(offload)
        {
            let what = format_args!("set its offloads to {offload:#x}");
            self.refused(Setting::Offloads, what, &error);
        }
    }

    /// Reports that the kernel refuses a setting of the tap. Only the first of each is a warning: a guest makes the device
    /// set its tap as often as it likes, and could fill the host's log.
    fn refused(&self, setting: Setting, what: fmt::Arguments<'_>, error: &io::Error) {
        match self.reported[setting as usize].swap(true, Ordering::Relaxed) {
            false => tracing::warn!("tap {}: cannot {what}: {error}", self.name),
            true => tracing::debug!("tap {}: cannot {what}: {error}", self.name),
        }
    }

    /// Reports that a frame of a pair could not be read or written. If the tap is gone, sets the link down and
    /// tells the driver and the host.
    fn tap_failed(&self, pair: usize, attempt: &str, error: &io::Error, rings: &Rings) {
        if error.raw_os_error() != Some(libc::EBADFD) {
            tracing::debug!("tap {}: cannot {attempt} a frame: {error}", self.name);
            return;
        }
        {
            let mut driver = self.driver();
            // A vCPU or another worker may have taken this queue of the tap out of use meanwhile.
            if pair >= usize::from(driver.pairs) || driver.tap_gone {
                return;
            }
            driver.tap_gone = true;
        }
        tracing::warn!("tap {}: it is gone, the guest's link is down: {error}", self.name);
        rings.config_changed();
        (self.on_link)(Link::Gone);
    }

    fn set_carrier(&self, on: bool) {
        // A macvtap and an old kernel have no such switch. The device drops the frames by itself.
        if let Some(tap) = self.taps.first()
            && let Err(error) = tap.set_carrier(on)
        {
            tracing::debug!("tap {}: cannot switch its carrier: {error}", self.name);
        }
    }
}

impl Net {
    /// A device with the address `mac` on the taps of `wire`.
    fn new(wire: Wire, mac: Mac, mtu: Option<u16>) -> Result<Self, NetError> {
        Self::with(wire, mac, mtu, Driver::after_reset(mac), false)
    }

    fn with(
        wire: Wire,
        mac: Mac,
        mtu: Option<u16>,
        driver: Driver,
        restored: bool,
    ) -> Result<Self, NetError> {
        let Wire { name, taps, on_link } = wire;
        let pairs = taps.len() as u16;
        let queue_sizes = vec![QUEUE_SIZE; 2 * taps.len() + 1];
        let (in_use, link_down) = (driver.pairs, driver.link_down);
        let (features, driver) = (AtomicU64::new(0), Mutex::new(driver));
        let reported = Default::default();
        let shared = Shared { name, taps, mac, mtu, features, driver, on_link, reported };
        // The kernel uses every queue that the host has opened, so the unused ones are detached.
        shared
            .switch_queues(pairs, in_use)
            .map_err(|source| NetError::Queues { tap: shared.name.clone(), source })?;
        shared.apply_offloads(0);
        shared.set_carrier(!link_down);
        Ok(Self { shared: Arc::new(shared), queue_sizes, restored })
    }

    /// The configuration structure (5.1.4): mac, status, max_virtqueue_pairs, mtu.
    fn config(&self) -> [u8; 12] {
        let driver = self.shared.driver();
        let up = if driver.link() == Link::Up { S_LINK_UP } else { 0 };
        let status = up | if driver.announce { S_ANNOUNCE } else { 0 };
        let mut bytes = [0; 12];
        bytes[0..6].copy_from_slice(&driver.mac.0);
        bytes[6..8].copy_from_slice(&status.to_le_bytes());
        bytes[8..10].copy_from_slice(&(self.shared.taps.len() as u16).to_le_bytes());
        bytes[10..12].copy_from_slice(&self.shared.mtu.unwrap_or(0).to_le_bytes());
        bytes
    }
}

impl VirtioDevice for Net {
    const NAME: &'static str = "virtio-net";
    const ID: u16 = 1;
    /// Network controller, Ethernet.
    const CLASS: [u8; 3] = [0x02, 0x00, 0x00];
    const FEATURES: features::Names = &[
        (0, "CSUM"),
        (1, "GUEST_CSUM"),
        (2, "CTRL_GUEST_OFFLOADS"),
        (3, "MTU"),
        (5, "MAC"),
        (7, "GUEST_TSO4"),
        (8, "GUEST_TSO6"),
        (9, "GUEST_ECN"),
        (10, "GUEST_UFO"),
        (11, "HOST_TSO4"),
        (12, "HOST_TSO6"),
        (13, "HOST_ECN"),
        (14, "HOST_UFO"),
        (15, "MRG_RXBUF"),
        (16, "STATUS"),
        (17, "CTRL_VQ"),
        (18, "CTRL_RX"),
        (19, "CTRL_VLAN"),
        (21, "GUEST_ANNOUNCE"),
        (22, "MQ"),
        (23, "CTRL_MAC_ADDR"),
    ];

    type Worker = NetWorker;

    fn features(&self) -> u64 {
        let always = F_CSUM
            | F_GUEST_CSUM
            | F_MAC
            | F_GUEST_TSO4
            | F_GUEST_TSO6
            | F_HOST_TSO4
            | F_HOST_TSO6
            | F_MRG_RXBUF
            | F_STATUS
            | F_CTRL_VQ
            | F_CTRL_RX
            | F_GUEST_ANNOUNCE
            | F_CTRL_MAC_ADDR;
        let mtu = if self.shared.mtu.is_some() { F_MTU } else { 0 };
        let several = if self.shared.taps.len() > 1 { F_MQ } else { 0 };
        always | mtu | several
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = usize::try_from(at).ok().and_then(|at| config.get(at)).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // Only a legacy driver may write its address here (5.1.4.3).
    }

    fn negotiated(&mut self, features: u64) {
        self.shared.features.store(features, Ordering::Relaxed);
        self.shared.apply_offloads(features);
        if features == 0 {
            let mut driver = self.shared.driver();
            let (link_down, tap_gone) = (driver.link_down, driver.tap_gone);
            if let Err(error) = self.shared.switch_queues(driver.pairs, 1) {
                let what = format_args!("use only one of its queues");
                self.shared.refused(Setting::Queues, what, &error);
            }
            *driver = Driver { link_down, tap_gone, ..Driver::after_reset(self.shared.mac) };
        }
    }

    fn resumed(&mut self) -> bool {
        let features = self.shared.features();
        if !std::mem::take(&mut self.restored) || features == 0 {
            return false;
        }
        let mut driver = self.shared.driver();
        driver.announcements = announce::ROUNDS;
        let can_announce = F_GUEST_ANNOUNCE | F_STATUS | F_CTRL_VQ;
        driver.announce |= features & can_announce == can_announce;
        // The link may be up again, too.
        features & F_STATUS != 0
    }

    fn worker(&self) -> NetWorker {
        NetWorker::new(self.shared.clone(), 0)
    }

    fn more_workers(&self) -> Vec<NetWorker> {
        let pairs = 1..self.shared.taps.len();
        pairs.map(|pair| NetWorker::new(self.shared.clone(), pair)).collect()
    }

    fn network_port(&self, rings: Rings) -> Option<Arc<dyn NetworkPort>> {
        Some(Arc::new(Port { shared: self.shared.clone(), rings }))
    }
}

/// The link of the device, as the machine sets it.
struct Port {
    shared: Arc<Shared>,
    rings: Rings,
}

impl NetworkPort for Port {
    fn link(&self) -> Link {
        self.shared.driver().link()
    }

    fn set_link(&self, up: bool) {
        let link = {
            let mut driver = self.shared.driver();
            driver.link_down = !up;
            driver.link()
        };
        self.shared.set_carrier(up);
        self.rings.config_changed();
        // The workers look again at what they left alone.
        (0..self.rings.count()).for_each(|queue| self.rings.look_again(queue));
        (self.shared.on_link)(link);
    }
}

/// The tap that the device gets.
pub struct Wire {
    /// Its name, for messages.
    name: String,
    /// One for each pair of queues, 1 to [`PAIRS_MAX`].
    taps: Vec<Tap>,
    /// The machine's handler for a change of the link.
    on_link: OnLink,
}

impl Kind for Net {
    const KEY: &'static str = "net";
    const COMMAND_LINE: Option<CommandLine> = Some(CommandLine {
        usage: "Network devices: tap=NAME[,bridge=NAME][,mac=MAC][,mtu=BYTES][,queues=PAIRS], or fd=[FD,...] of a tap instead of its name; tap= makes one",
        default: None,
        is_path: false,
        foreign: options::FOREIGN,
        harmless: options::HARMLESS,
    });
    const NAME: &'static str = <Self as VirtioDevice>::NAME;
    const MOST: usize = 8;
    const PLACE: Place = Place::Slot;
    const CALLS: DeviceCalls = DeviceCalls {
        build: &[Call::ioctl(&[libc::TUNGETIFF as u32, libc::TUNSETVNETHDRSZ as u32])],
        thread: &[SETTINGS, LOOK],
        registers: SETTINGS,
    };

    type Options = NetOptions;
    type State = VirtioState<VirtioNetStateV1>;

    fn parse(text: &str, _vcpus: u32) -> Result<NetOptions, String> {
        NetOptions::parse(text)
    }

    fn complete(text: &str) -> Result<String, String> {
        NetOptions::complete(text)
    }

    fn unasked() -> Option<NetOptions> {
        None
    }

    fn make_unique(options: &mut NetOptions) {
        options.mac.get_or_insert_with(Mac::random);
    }

    fn claims(options: &NetOptions) -> Vec<Claim> {
        options.claims()
    }

    fn needs(options: &NetOptions) -> Vec<HostNeed> {
        options.needs()
    }

    fn open(options: &NetOptions) -> Result<Vec<Opened>, OpenError> {
        options.open()
    }

    fn build(
        options: &NetOptions,
        site: &mut Site,
        state: Option<Self::State>,
    ) -> Result<Built<Self::State>, DeviceError> {
        let NetOptions { tap: name, mac, mtu, queues, bridge: _ } = options;
        let roles = options::TAPS.iter().take((*queues).into());
        let fds = roles.map(|role| site.files.take(role)).collect::<Result<Vec<_>, _>>();
        let fds = fds.map_err(|error| site.files_error(error))?;
        let taps = fds.into_iter().map(Tap::new).collect::<io::Result<_>>();
        let taps = taps.map_err(|error| site.error("use its tap", error))?;
        let wire = Wire { name: name.clone(), taps, on_link: site.on_link.clone() };
        let mac = mac.unwrap_or_else(|| Mac::derived(&site.label));
        VirtioPci::build(site, state, wire, |wire| Self::new(wire, mac, *mtu))
    }
}
