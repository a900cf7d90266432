//! Connections between devices and KVM: interrupts into the guest, doorbells out of the guest.
//!
//! A device owns [`MsiLine`]s and legacy edge lines, which it triggers by writing to an eventfd,
//! and doorbells (ioeventfds), which the guest rings without an exit to this process. The routing
//! table says where each line leads. KVM accepts the table only as a whole, so [`KvmInterrupts`]
//! keeps a copy and sends all of it on each change. Devices use only the traits [`Interrupts`] and
//! [`Doorbells`], so that they can be tested without KVM.
//!
//! Invariant: KVM's table equals the table kept here; a change that KVM refuses is not made here.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::mutex::lock;

/// GSIs below this one are the pins of the PICs and the I/O APIC; message-signalled ones follow.
pub const FIRST_MSI_GSI: u32 = 24;

/// One past the last GSI that can be allocated. KVM accepts 4096 routes (`KVM_MAX_IRQ_ROUTES`), of
/// which the pins use 40, and only GSIs below 4096.
const MSI_GSI_END: u32 = 4000;

/// A message-signalled interrupt, as the guest wrote it into an MSI-X table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiMessage {
    /// The address that the message is written to: on x86, the local APIC window with the
    /// destination.
    pub address: u64,
    /// The value that is written: on x86, vector and delivery mode.
    pub data: u32,
}

/// A GSI and its new target: a message, or nothing.
pub type Route = (u32, Option<MsiMessage>);

/// An interrupt line whose interrupts travel as messages.
#[derive(Debug)]
pub struct MsiLine {
    gsi: u32,
    event: EventFd,
}

impl MsiLine {
    /// Wraps `event`, which the caller has connected to line `gsi`.
    pub fn new(gsi: u32, event: EventFd) -> Self {
        Self { gsi, event }
    }

    /// Returns the number of the line, at least [`FIRST_MSI_GSI`].
    pub fn gsi(&self) -> u32 {
        self.gsi
    }

    /// Sends the message that the line leads to. Without effect on a line that has no message.
    pub fn trigger(&self) {
        pull(&self.event);
    }
}

/// Adds one to `event`. A write to a non-blocking eventfd fails only if the counter is at its
/// limit, and then the reader has a wake-up pending already.
pub fn pull(event: &EventFd) {
    let _ = event.write(1);
}

/// Why an interrupt line or a doorbell could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InterruptError {
    /// The machine has too many interrupt lines.
    #[error("all {} message-signalled interrupt lines are taken", MSI_GSI_END - FIRST_MSI_GSI)]
    Exhausted,
    /// An eventfd could not be created.
    #[error("cannot create an eventfd for {0}")]
    Event(String, #[source] std::io::Error),
    /// KVM refused to connect an eventfd to an interrupt line.
    #[error("cannot connect an eventfd to GSI {0} (KVM_IRQFD)")]
    Line(u32, #[source] kvm_ioctls::Error),
    /// KVM refused to change the level of an interrupt line.
    #[error("cannot set the level of GSI {0} (KVM_IRQ_LINE)")]
    Level(u32, #[source] kvm_ioctls::Error),
    /// KVM refused the routing table.
    #[error("cannot route {0} (KVM_SET_GSI_ROUTING)")]
    Routing(String, #[source] kvm_ioctls::Error),
    /// KVM refused to watch an address.
    #[error("cannot watch guest address {0:#x} (KVM_IOEVENTFD)")]
    Doorbell(u64, #[source] kvm_ioctls::Error),
}

/// Allocates interrupt lines and sets where they lead.
pub trait Interrupts: Send + Sync {
    /// Allocates a line, which leads nowhere at first.
    fn allocate(&self) -> Result<MsiLine, InterruptError>;

    /// Sets where lines lead: applies all of `routes` or, on an error, none. Pass many lines in one
    /// call: each call costs the kernel an RCU grace period, however many lines it changes.
    fn program(&self, routes: &[Route]) -> Result<(), InterruptError>;

    /// Returns an eventfd that raises and lowers pin `gsi` (below [`FIRST_MSI_GSI`]) of the
    /// interrupt controllers: an edge-triggered interrupt, as of an ISA device.
    fn edge(&self, gsi: u32) -> Result<EventFd, InterruptError>;

    /// Raises or lowers pin `gsi` (below [`FIRST_MSI_GSI`]) of the interrupt controllers, which stays as it
    /// is until the next call: a level-triggered interrupt. KVM does not save the levels of pins, so a
    /// restored device sets its own again.
    fn set_level(&self, gsi: u32, high: bool) -> Result<(), InterruptError>;
}

/// Turns guest writes into eventfd wake-ups, without a return to this process.
pub trait Doorbells: Send + Sync {
    /// From now on a guest write of any size at guest physical `address` adds one to `event`.
    fn watch(&self, address: u64, event: &EventFd) -> Result<(), InterruptError>;
}

/// The interrupt wiring of one VM in KVM. The VM has its in-kernel interrupt controllers.
#[derive(Debug)]
pub struct KvmInterrupts {
    vm: Arc<VmFd>,
    table: Mutex<Table>,
}

#[derive(Debug, Clone)]
struct Table {
    next_gsi: u32,
    messages: BTreeMap<u32, MsiMessage>,
    /// Changes that KVM has not been told yet. `None` if KVM is told each change at once.
    collected: Option<BTreeMap<u32, Option<MsiMessage>>>,
}

impl KvmInterrupts {
    /// Creates the wiring of `vm`, on which KVM_CREATE_IRQCHIP was called. KVM has its default
    /// table then, and keeps it until the first message is routed.
    pub fn new(vm: Arc<VmFd>) -> Self {
        let table = Table { next_gsi: FIRST_MSI_GSI, messages: BTreeMap::new(), collected: None };
        Self { vm, table: Mutex::new(table) }
    }

    /// Tells KVM all changes of routes that `build` makes in one call at its end, which costs one grace period instead
    /// of one for each device. A route that KVM refuses is left out. No line may be triggered in `build`.
    pub fn program_together<T>(&self, build: impl FnOnce() -> T) -> T {
        lock(&self.table).collected = Some(BTreeMap::new());
        let built = build();
        let collected = lock(&self.table).collected.take().unwrap_or_default();
        let routes: Vec<Route> = collected.into_iter().collect();
        if self.program(&routes).is_err() {
            for route in &routes {
                let refused = |error: &InterruptError| tracing::debug!(%error, ?route);
                let _ = self.program(std::slice::from_ref(route)).inspect_err(refused);
            }
        }
        built
    }

    fn connect(&self, gsi: u32) -> Result<EventFd, InterruptError> {
        let event = event(&format!("GSI {gsi}"))?;
        self.vm.register_irqfd(&event, gsi).map_err(|e| InterruptError::Line(gsi, e))?;
        Ok(event)
    }
}

/// Creates a non-blocking eventfd that is closed on exec. `purpose` is for the error's text.
pub fn event(purpose: &str) -> Result<EventFd, InterruptError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
        .map_err(|e| InterruptError::Event(purpose.to_owned(), e))
}

impl Interrupts for KvmInterrupts {
    fn allocate(&self) -> Result<MsiLine, InterruptError> {
        let mut table = lock(&self.table);
        if table.next_gsi == MSI_GSI_END {
            return Err(InterruptError::Exhausted);
        }
        let gsi = table.next_gsi;
        let event = self.connect(gsi)?;
        table.next_gsi += 1;
        Ok(MsiLine::new(gsi, event))
    }

    fn program(&self, routes: &[Route]) -> Result<(), InterruptError> {
        let mut table = lock(&self.table);
        if let Some(collected) = &mut table.collected {
            collected.extend(routes.iter().copied());
            return Ok(());
        }
        let mut messages = table.messages.clone();
        for (gsi, message) in routes {
            match message {
                Some(message) => messages.insert(*gsi, *message),
                None => messages.remove(gsi),
            };
        }
        if messages == table.messages {
            return Ok(());
        }
        // The guest chose the message. KVM refuses some messages (`kvm_msi_route_invalid`) and then
        // keeps its table; so the copy here is changed only after KVM accepted the new table.
        set_routing(&self.vm, &messages)
            .map_err(|e| InterruptError::Routing(format!("{routes:x?}"), e))?;
        table.messages = messages;
        Ok(())
    }

    fn edge(&self, gsi: u32) -> Result<EventFd, InterruptError> {
        // An irqfd without resampling raises and lowers its pin: `irqfd_inject` in
        // virt/kvm/eventfd.c.
        self.connect(gsi)
    }

    fn set_level(&self, gsi: u32, high: bool) -> Result<(), InterruptError> {
        self.vm.set_irq_line(gsi, high).map_err(|e| InterruptError::Level(gsi, e))
    }
}

impl Doorbells for KvmInterrupts {
    fn watch(&self, address: u64, event: &EventFd) -> Result<(), InterruptError> {
        self.vm
            .register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(|e| InterruptError::Doorbell(address, e))
    }
}

/// Returns the whole routing table. First the pins, as KVM itself routes them when it creates the
/// controllers (`default_routing` in arch/x86/kvm/irq.c: GSI n to I/O APIC pin n, without an
/// exception for the timer, and the first 16 to the PICs as well), then the messages.
fn entries(messages: &BTreeMap<u32, MsiMessage>) -> Vec<kvm_irq_routing_entry> {
    let pins = (0..FIRST_MSI_GSI).flat_map(|gsi| {
        let pic = match gsi {
            0..8 => Some((KVM_IRQCHIP_PIC_MASTER, gsi)),
            8..16 => Some((KVM_IRQCHIP_PIC_SLAVE, gsi - 8)),
            _ => None,
        };
        [Some((KVM_IRQCHIP_IOAPIC, gsi)), pic]
            .into_iter()
            .flatten()
            .map(move |(chip, pin)| pin_entry(gsi, chip, pin))
    });
    pins.chain(messages.iter().map(|(gsi, message)| message_entry(*gsi, message))).collect()
}

fn pin_entry(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry =
        kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip = kvm_bindings::kvm_irq_routing_irqchip { irqchip, pin };
    entry
}

fn message_entry(gsi: u32, message: &MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi = kvm_bindings::kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    entry
}

fn set_routing(vm: &VmFd, messages: &BTreeMap<u32, MsiMessage>) -> Result<(), kvm_ioctls::Error> {
    let table = KvmIrqRouting::from_entries(&entries(messages))
        .map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
    vm.set_gsi_routing(&table)
}

/// Wiring without KVM, for tests of devices: records the routes and counts interrupts per line.
#[cfg(any(test, fuzzing))]
pub(crate) mod fake {
    #![expect(clippy::unwrap_used, reason = "a test or fuzz target that cannot go on has failed")]

    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::kvm::clock::GuestClock;

    /// A guest's message that [`FakeWires`] refuses, as KVM refuses some.
    pub(crate) const REFUSED: u64 = 0xdead_0000;

    #[derive(Debug, Default)]
    pub(crate) struct FakeWires {
        lines: Mutex<Vec<EventFd>>,
        pub(crate) routes: Mutex<BTreeMap<u32, MsiMessage>>,
        pub(crate) doorbells: Mutex<BTreeMap<u64, EventFd>>,
        pub(crate) levels: Mutex<BTreeMap<u32, bool>>,
        /// The guest's clock, which only a test moves.
        pub(crate) now_ns: AtomicU64,
        /// The host's date, which only a test moves.
        pub(crate) realtime_ns: AtomicU64,
    }

    impl FakeWires {
        /// How often line `index`, in the order of allocation, was pulled since the last call.
        #[cfg(test)]
        pub(crate) fn taken(&self, index: usize) -> u64 {
            self.lines.lock().unwrap()[index].read().unwrap_or(0)
        }

        #[cfg(test)]
        pub(crate) fn route(&self, index: usize) -> Option<MsiMessage> {
            self.routes.lock().unwrap().get(&(FIRST_MSI_GSI + index as u32)).copied()
        }
    }

    impl Interrupts for FakeWires {
        fn allocate(&self) -> Result<MsiLine, InterruptError> {
            let mut lines = self.lines.lock().unwrap();
            let event = event("a test").unwrap();
            lines.push(event.try_clone().unwrap());
            Ok(MsiLine::new(FIRST_MSI_GSI + lines.len() as u32 - 1, event))
        }

        fn program(&self, routes: &[Route]) -> Result<(), InterruptError> {
            if routes.iter().any(|(_, m)| m.is_some_and(|m| m.address == REFUSED)) {
                let refused = kvm_ioctls::Error::new(libc::EINVAL);
                return Err(InterruptError::Routing(format!("{routes:x?}"), refused));
            }
            let mut table = self.routes.lock().unwrap();
            for (gsi, message) in routes {
                match message {
                    Some(message) => table.insert(*gsi, *message),
                    None => table.remove(gsi),
                };
            }
            Ok(())
        }

        fn edge(&self, gsi: u32) -> Result<EventFd, InterruptError> {
            event(&format!("GSI {gsi}"))
        }

        fn set_level(&self, gsi: u32, high: bool) -> Result<(), InterruptError> {
            self.levels.lock().unwrap().insert(gsi, high);
            Ok(())
        }
    }

    impl GuestClock for FakeWires {
        fn now_ns(&self) -> u64 {
            self.now_ns.load(Ordering::Relaxed)
        }

        fn realtime_ns(&self) -> u64 {
            self.realtime_ns.load(Ordering::Relaxed)
        }
    }

    impl Doorbells for FakeWires {
        fn watch(&self, address: u64, event: &EventFd) -> Result<(), InterruptError> {
            self.doorbells.lock().unwrap().insert(address, event.try_clone().unwrap());
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::test_vm::TestVm;

    fn vm() -> Option<Arc<VmFd>> {
        TestVm::new().map(|machine| Arc::new(machine.vm))
    }

    const MESSAGE: MsiMessage = MsiMessage { address: 0xfee0_0000, data: 0x31 };

    #[test]
    fn the_table_has_every_pin_and_every_message() {
        let entries = entries(&BTreeMap::from([(24, MESSAGE)]));
        assert_eq!(entries.len(), 24 + 16 + 1);
        let message = entries.last().unwrap();
        assert_eq!((message.gsi, message.type_), (24, KVM_IRQ_ROUTING_MSI));
        let gsis: Vec<u32> = entries.iter().map(|e| e.gsi).filter(|gsi| *gsi < 3).collect();
        assert_eq!(gsis, [0, 0, 1, 1, 2, 2]);
    }

    #[test]
    fn kvm_takes_routes_lines_and_doorbells() {
        let Some(vm) = vm() else { return };
        let wires = KvmInterrupts::new(vm);
        let (first, second) = (wires.allocate().unwrap(), wires.allocate().unwrap());
        assert_eq!((first.gsi(), second.gsi()), (24, 25));
        wires.program(&[(24, Some(MESSAGE)), (25, Some(MESSAGE))]).unwrap();
        wires.program(&[(24, None)]).unwrap();
        assert_eq!(wires.table.lock().unwrap().messages, BTreeMap::from([(25, MESSAGE)]));
        first.trigger();
        second.trigger();
        pull(&wires.edge(4).unwrap());
        wires.set_level(9, true).unwrap();
        wires.set_level(9, false).unwrap();
        let doorbell = event("a test").unwrap();
        wires.watch(0xc000_3000, &doorbell).unwrap();
        let twice = wires.watch(0xc000_3000, &doorbell).unwrap_err();
        assert!(twice.to_string().contains("0xc0003000"), "{twice}");
    }

    #[test]
    fn a_route_that_kvm_refuses_changes_nothing() {
        let Some(vm) = vm() else { return };
        let wires = KvmInterrupts::new(vm);
        wires.program(&[(24, Some(MESSAGE))]).unwrap();
        // KVM has no GSI as high as this.
        wires.program(&[(24, None), (1 << 20, Some(MESSAGE))]).unwrap_err();
        assert_eq!(wires.table.lock().unwrap().messages, BTreeMap::from([(24, MESSAGE)]));
        wires.program(&[(25, Some(MESSAGE))]).unwrap();
    }

    #[test]
    fn routes_that_are_programmed_together_take_effect_at_the_end_and_a_refused_one_is_left_out() {
        let Some(vm) = vm() else { return };
        let wires = KvmInterrupts::new(vm);
        let routes = || wires.table.lock().unwrap().messages.clone();
        wires.program(&[(24, Some(MESSAGE))]).unwrap();
        let built = wires.program_together(|| {
            wires.program(&[(24, None), (25, Some(MESSAGE))]).unwrap();
            wires.program(&[(26, Some(MESSAGE))]).unwrap();
            wires.program(&[(26, None), (27, Some(MESSAGE))]).unwrap();
            assert_eq!(routes(), BTreeMap::from([(24, MESSAGE)]));
            7
        });
        assert_eq!((built, routes()), (7, BTreeMap::from([(25, MESSAGE), (27, MESSAGE)])));
        wires.program_together(|| {
            // KVM has no GSI as high as this.
            wires.program(&[(24, Some(MESSAGE)), (1 << 20, Some(MESSAGE))]).unwrap();
        });
        assert_eq!(routes(), BTreeMap::from([24, 25, 27].map(|gsi| (gsi, MESSAGE))));
        // From now on again at once.
        wires.program(&[(28, Some(MESSAGE))]).unwrap();
        assert!(routes().contains_key(&28));
    }

    #[test]
    fn lines_run_out_as_an_error() {
        let Some(vm) = vm() else { return };
        let wires = KvmInterrupts::new(vm);
        wires.table.lock().unwrap().next_gsi = MSI_GSI_END - 1;
        wires.allocate().unwrap();
        assert!(matches!(wires.allocate(), Err(InterruptError::Exhausted)));
    }
}
