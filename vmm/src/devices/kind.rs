//! What a kind of device owes to the rest of the program. Everything about the kind is in its folder;
//! [`catalog`](super::catalog) lists the kinds, and nobody else knows one.
//!
//! ```text
//!   configuration --parse--> Options --open--> files        in the host
//!   Options, Site (with the files), State? --build--> Built  in the VM's process
//! ```

use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use event_manager::MutEventSubscriber;
use serde::Serialize;
use serde::de::DeserializeOwned;
use vm_memory::GuestMemoryMmap;

use super::files::{DeviceFiles, FilesError, OpenError, Opened};
use super::pci::PciFunction;
use super::{Device, DeviceError};
use crate::bus::BusDevice;
use crate::kvm::interrupts::{Doorbells, Interrupts};
use crate::mutex::lock;
use crate::state::{Persist, Schema};

/// A kind of device.
pub trait Kind: Sized + 'static {
    /// The key of a VM's configuration that asks for such devices: `disk`.
    const KEY: &'static str;
    /// The name of its nodes in the state document, before the unit address: `virtio-blk`.
    const NAME: &'static str;
    /// Most devices of this kind in one machine.
    const MOST: usize;
    /// Where the guest finds such a device.
    const PLACE: Place;

    /// What the configuration says of one device. Travels in the machine's description.
    type Options: Clone + Debug + Eq + Serialize + DeserializeOwned + Schema;
    /// The state of one device. Travels in the state document.
    type State: Clone + Debug + PartialEq + Schema;

    /// Reads the text of the configuration for one device. The error says what is wrong with it, and
    /// what would be right.
    fn parse(text: &str) -> Result<Self::Options, String>;

    /// What a machine has if its configuration has no such key.
    fn unasked() -> Option<Self::Options>;

    /// Opens what the device needs by name. Called in the host.
    fn open(options: &Self::Options) -> Result<Vec<Opened>, OpenError>;

    /// Builds the device in the VM's process: running after reset, or, with a state, paused.
    fn build(
        options: &Self::Options,
        site: &mut Site,
        state: Option<Self::State>,
    ) -> Result<Built<Self::State>, DeviceError>;
}

/// Where the guest finds the devices of a kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// At one port, always the same.
    Port(u16),
    /// In a slot of the PCI bus.
    Slot,
}

/// The place of one device in a machine, with what the machine has for it there.
pub struct Site {
    /// The device's node in the state document, for errors: `virtio-blk@1`.
    pub node: String,
    /// Names the device among those of its kind in all VMs of a host: `web-0`.
    pub label: String,
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
    /// What the host has opened for the device.
    pub files: DeviceFiles,
}

impl Site {
    /// An error of the device that is to be here.
    pub fn error(
        &self,
        attempt: &'static str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> DeviceError {
        DeviceError { device: self.node.clone(), attempt, source: source.into() }
    }

    /// An error about the files that came for the device.
    pub fn files_error(&self, source: FilesError) -> DeviceError {
        self.error("take the files that the host has opened for it", source)
    }
}

/// A range of a bus, and what answers there: first address, length, device.
pub type Range = (u64, u64, Arc<Mutex<dyn BusDevice>>);

/// Reads the state of one device, whatever it is.
pub type Save<S> = Box<dyn Fn() -> Result<S, DeviceError> + Send + Sync>;

/// A device, ready to be put into a machine that does not know what it is.
pub struct Built<S> {
    /// Its life.
    pub device: Arc<Mutex<dyn Device>>,
    /// Reads its state. The device is paused.
    pub save: Save<S>,
    /// The ports that it answers.
    pub ports: Option<Range>,
    /// The guest physical addresses that it answers.
    pub mmio: Option<Range>,
    /// Its configuration space on the PCI bus.
    pub function: Option<Arc<Mutex<dyn PciFunction>>>,
    /// What its thread is to run.
    pub worker: Box<dyn MutEventSubscriber + Send>,
}

impl<S: 'static> Built<S> {
    /// A device that answers nowhere yet. `node` is its node in the state document.
    pub fn new<T>(
        node: &str,
        device: Arc<Mutex<T>>,
        worker: Box<dyn MutEventSubscriber + Send>,
    ) -> Self
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
        Self { device, save: Box::new(save), ports: None, mmio: None, function: None, worker }
    }

    /// The same device, with its state as a value of another type.
    pub fn map<T: 'static>(self, wrap: impl Fn(S) -> T + Send + Sync + 'static) -> Built<T> {
        let Self { device, save, ports, mmio, function, worker } = self;
        let save = Box::new(move || save().map(&wrap));
        Built { device, save, ports, mmio, function, worker }
    }
}

/// What tests and fuzz targets know of a kind: without the host's names, and without KVM.
#[cfg(any(test, fuzzing))]
pub trait Sample: Kind {
    /// The options of a device that does something.
    fn options() -> Self::Options;

    /// Files as [`Kind::open`] would have opened them, fit for `state` if there is one. `None` if no
    /// files can be.
    fn files(state: Option<&Self::State>) -> Option<SampleFiles>;
}

/// Files of a device in a test.
#[cfg(any(test, fuzzing))]
#[derive(Debug)]
pub struct SampleFiles {
    /// What the device gets.
    pub opened: Vec<Opened>,
    /// The other end of what the device is connected to.
    pub peer: Option<std::os::unix::net::UnixStream>,
}
