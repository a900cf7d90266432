//! The interface that each kind of device implements. All code of a kind is in its folder. Only
//! [`catalog`](super::catalog) names the kinds; the rest of the program uses this interface.
//!
//! ```text
//!   configuration --parse--> Options --open--> files        in the host
//!   Options, Site (with the files), State? --build--> Built  in the VM's process
//! ```

use std::fmt::Debug;
use std::path::Path;
use std::sync::{Arc, Mutex};

use event_manager::MutEventSubscriber;
use serde::Serialize;
use serde::de::DeserializeOwned;
use vm_memory::GuestMemoryMmap;

use super::claims::Claim;
use super::files::{DeviceFiles, FilesError, OpenError, Opened};
use super::needs::HostNeed;
use super::network::{NetworkPort, OnLink};
use super::pci::PciFunction;
use super::power::{OnPower, PowerButton};
use super::storage::Storage;
use super::{Device, DeviceError};
use crate::bus::BusDevice;
use crate::confine::Call;
use crate::kvm::clock::GuestClock;
use crate::kvm::interrupts::{Doorbells, Interrupts};
use crate::mutex::lock;
use crate::state::{Persist, Schema};

/// A kind of device.
pub trait Kind: Sized + 'static {
    /// The key in a VM's configuration that adds a device of this kind, such as `disk`.
    const KEY: &'static str;
    /// The option of `perennial run` that adds a device of this kind.
    const COMMAND_LINE: Option<CommandLine>;
    /// The name of its nodes in the state document without the unit address, such as `virtio-blk`.
    const NAME: &'static str;
    /// Maximum number of devices of this kind in one machine.
    const MOST: usize;
    /// Where the guest finds such a device.
    const PLACE: Place;
    /// The system calls that its devices make.
    const CALLS: DeviceCalls;
    /// The role of the file from which a machine can boot, for kinds of disks.
    const BOOTS_FROM: Option<&'static str> = None;

    /// The options of one device in the configuration. Part of the machine's description.
    type Options: Clone + Debug + Eq + Serialize + DeserializeOwned + Schema;
    /// The saved state of one device. Part of the state document.
    type State: Clone + Debug + PartialEq + Schema;

    /// Parses the configuration's text for one device of a machine with `vcpus` vCPUs, on which defaults may
    /// depend. The error text says what is wrong and what is accepted.
    fn parse(text: &str, vcpus: u32) -> Result<Self::Options, String>;

    /// Returns the value of an option of `perennial run` with what a person may leave out of it there. What this makes
    /// on the host ends with `perennial run`.
    fn complete(text: &str) -> Result<String, String> {
        Ok(text.to_owned())
    }

    /// Returns the options of the device that a machine gets by default if its configuration does not
    /// have [`KEY`](Self::KEY), or `None` if there is no default device.
    fn unasked() -> Option<Self::Options>;

    /// Sets at random what would follow from the name of the VM, for a VM whose name others have as well.
    fn make_unique(_options: &mut Self::Options) {}

    /// Returns the path of the file or block device in which the device keeps its data, for kinds whose devices
    /// have a [`Storage`].
    fn stored_at(_options: &Self::Options) -> Option<&Path> {
        None
    }

    /// Returns what the device takes for itself of its host.
    fn claims(options: &Self::Options) -> Vec<Claim>;

    /// Returns what a host must have before it can open the device.
    fn needs(_options: &Self::Options) -> Vec<HostNeed> {
        Vec::new()
    }

    /// Errors if the machine should not boot with these options on this host as it is now. Not asked before a restore,
    /// which a mistake in the options must not keep from going on.
    fn check_before_boot(_options: &Self::Options) -> Result<(), OpenError> {
        Ok(())
    }

    /// Opens the files that the device needs by path. Called in the host's process.
    fn open(options: &Self::Options) -> Result<Vec<Opened>, OpenError>;

    /// Builds the device in the VM's process. Without a state the device is in its reset state and
    /// runs; with a state it is restored and paused.
    fn build(
        options: &Self::Options,
        site: &mut Site,
        state: Option<Self::State>,
    ) -> Result<Built<Self::State>, DeviceError>;
}

/// The system calls that the devices of a kind make, beyond those that every thread may make
/// ([`EVERY_THREAD`](crate::confine::calls::EVERY_THREAD)).
#[derive(Debug, Clone, Copy)]
pub struct DeviceCalls {
    /// On the main thread, while it builds the machine.
    pub build: &'static [Call],
    /// On each thread of the device, beyond those of its event loop
    /// ([`EVENT_LOOP`](crate::confine::calls::EVENT_LOOP)).
    pub thread: &'static [&'static [Call]],
    /// On the threads that call the device: of a vCPU, when the guest accesses a register; the main thread,
    /// when it pauses, saves, syncs or resumes the device.
    pub registers: &'static [Call],
}

/// The option of `perennial run` that adds a device of a kind. It has the name of the kind's key, and the values
/// of the configuration.
#[derive(Debug, Clone, Copy)]
pub struct CommandLine {
    /// What the help says of the values.
    pub usage: &'static str,
    /// The value if the option is not given. `None`: no device then.
    pub default: Option<&'static str>,
    /// Whether a value is a path, which may be relative to the working directory.
    pub is_path: bool,
    /// Keys that Cloud Hypervisor has in the values and this kind has not, each with what to do instead or an
    /// empty text.
    pub foreign: &'static [(&'static str, &'static str)],
    /// Keys with those of their values in Cloud Hypervisor that change nothing here. They are accepted.
    pub harmless: &'static [(&'static str, &'static [&'static str])],
}

/// Where the guest finds the devices of a kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// At this fixed I/O port.
    Port(u16),
    /// In a slot of the PCI bus.
    Slot,
    /// As tables in guest RAM, in this real-mode segment.
    Tables(u16),
}

/// The place of one device in a machine, and the resources that the machine gives to it.
pub struct Site {
    /// The device's node in the state document, for errors: `virtio-blk@1`.
    pub node: String,
    /// A label that is unique among the devices of this kind in all VMs of a host, such as `web-0`.
    pub label: String,
    /// The name of the VM.
    pub machine: String,
    /// PCI device number, for a device in a slot.
    pub slot: u8,
    /// Guest physical address of the device's BAR, for a device in a slot.
    pub bar: u32,
    /// Guest RAM.
    pub memory: GuestMemoryMmap,
    /// Interrupt lines.
    pub interrupts: Arc<dyn Interrupts>,
    /// Doorbells.
    pub doorbells: Arc<dyn Doorbells>,
    /// The guest's clock.
    pub clock: Arc<dyn GuestClock>,
    /// The machine's handler for a power-off or a reset by the guest.
    pub on_power: OnPower,
    /// The machine's handler for a change of the device's link to a network.
    pub on_link: OnLink,
    /// The files that the host has opened for the device.
    pub files: DeviceFiles,
}

impl Site {
    /// Returns an error that names this device.
    pub fn error(
        &self,
        attempt: &'static str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> DeviceError {
        DeviceError { device: self.node.clone(), attempt, source: source.into() }
    }

    /// Returns an error about the files that the device was given.
    pub fn files_error(&self, source: FilesError) -> DeviceError {
        self.error("take the files that the host has opened for it", source)
    }
}

/// A range of a bus and the device that handles accesses to it: first address, length, device.
pub type Range = (u64, u64, Arc<Mutex<dyn BusDevice>>);

/// Saves one device as a state value.
pub type Save<S> = Box<dyn Fn() -> Result<S, DeviceError> + Send + Sync>;

/// A built device, ready for a machine that does not know its kind.
pub struct Built<S> {
    /// Saves the device. Called while the device is paused.
    pub save: Save<S>,
    /// All else of the device.
    pub parts: Parts,
}

/// What a machine places and uses of a built device.
pub struct Parts {
    /// The device's life cycle.
    pub device: Arc<Mutex<dyn Device>>,
    /// The I/O ports that the device handles.
    pub ports: Option<Range>,
    /// The guest physical addresses that the device handles.
    pub mmio: Option<Range>,
    /// Its configuration space on the PCI bus.
    pub function: Option<Arc<Mutex<dyn PciFunction>>>,
    /// The event subscribers of the device's threads, one for each thread.
    pub workers: Vec<Box<dyn MutEventSubscriber + Send>>,
    /// The machine's power button, if it is part of this device.
    pub power_button: Option<PowerButton>,
    /// The device's connection to a network.
    pub network_port: Option<Arc<dyn NetworkPort>>,
    /// The storage of the device, if it keeps data on the host.
    pub storage: Option<Arc<dyn Storage>>,
}

impl<S: 'static> Built<S> {
    /// Wraps a device that handles no ports or addresses yet. `node` is the name of its node in the
    /// state document.
    pub fn new<T>(
        node: &str,
        device: Arc<Mutex<T>>,
        worker: Box<dyn MutEventSubscriber + Send>,
    ) -> Self
    where
        T: Device + Persist<State = S, Error: Send + Sync> + 'static,
    {
        let mut built = Self::without_thread(node, device);
        built.parts.workers.push(worker);
        built
    }

    /// Wraps a device that only answers accesses of the guest.
    pub fn without_thread<T>(node: &str, device: Arc<Mutex<T>>) -> Self
    where
        T: Device + Persist<State = S, Error: Send + Sync> + 'static,
    {
        let (node, saved) = (node.to_owned(), device.clone());
        let save = move || {
            let device = lock(&saved);
            device.save().map_err(|error| DeviceError {
                device: node.clone(),
                attempt: "save its state",
                source: error.into(),
            })
        };
        let parts = Parts {
            device,
            ports: None,
            mmio: None,
            function: None,
            workers: Vec::new(),
            power_button: None,
            network_port: None,
            storage: None,
        };
        Self { save: Box::new(save), parts }
    }

    /// Returns the same device with its state type converted by `wrap`.
    pub fn map<T: 'static>(self, wrap: impl Fn(S) -> T + Send + Sync + 'static) -> Built<T> {
        let Self { save, parts } = self;
        Built { save: Box::new(move || save().map(&wrap)), parts }
    }
}

/// Sample options and files of a kind for tests and fuzz targets, which have no KVM and no files of a
/// real host.
#[cfg(any(test, fuzzing))]
pub trait Sample: Kind {
    /// Returns options of a working device.
    fn options() -> Self::Options;

    /// Returns files as [`Kind::open`] would have opened them, matching `state` if given. `None` if
    /// no files can match.
    fn files(state: Option<&Self::State>) -> Option<SampleFiles>;
}

/// Files of a device in a test.
#[cfg(any(test, fuzzing))]
#[derive(Debug)]
pub struct SampleFiles {
    /// The files that the device is given.
    pub opened: Vec<Opened>,
    /// The other end of the socket that the device uses, if it has one.
    pub peer: Option<std::os::unix::net::UnixStream>,
}
