//! A guest of a few bytes that counts, through pause, save, and restore in another VM.

use std::sync::{Mutex, OnceLock};

use kvm_bindings::kvm_regs;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::bus::BusDevice;
use crate::kvm::clock::Passage;
use crate::kvm::test_vm::TestVm;

/// Where the code is, and where the count.
const CODE: u64 = 0x1000;
const COUNT: GuestAddress = GuestAddress(0x2000);
/// Where the guest's kvmclock is, and in it the byte of its flags (`struct pvclock_vcpu_time_info`).
const KVMCLOCK: GuestAddress = GuestAddress(0x3000);
const KVMCLOCK_FLAGS: GuestAddress = GuestAddress(KVMCLOCK.0 + 29);
/// The flag that KVM sets for a guest that was paused.
const PVCLOCK_GUEST_STOPPED: u8 = 1 << 1;
/// The MSR with the address of the kvmclock; bit 0 enables it.
const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
/// The port of [`Echo`].
const PORT: u16 = 0x80;

/// The number at which [`Echo`] panics.
const FATAL: u32 = 1 << 30;

/// Says once that it runs, then counts in a register and in memory without an exit.
const SILENT: &[u8] = &[
    0xe6, PORT as u8, // out PORT, al
    0x66, 0x43, // again: inc ebx
    0x66, 0x89, 0x1e, 0x00, 0x20, // mov [0x2000], ebx
    0xeb, 0xf7, // jmp again
];

/// Counts by two exits for each number: it asks for the last number and answers with the next.
const TALKING: &[u8] = &[
    0x66, 0x31, 0xc0, // again: xor eax, eax
    0x66, 0xe5, PORT as u8, // in eax, PORT
    0x66, 0x40, // inc eax
    0x66, 0x43, // inc ebx
    0x66, 0x89, 0x1e, 0x00, 0x20, // mov [0x2000], ebx
    0x66, 0xe7, PORT as u8, // out PORT, eax
    0xeb, 0xec, // jmp again
];

/// What the machine around the guest sees.
#[derive(Debug, PartialEq)]
enum Seen {
    Read(u32),
    Wrote(u32),
    Ended(VcpuEvent),
}

/// Hands back the last number that was written, and reports every access. One of them lasts until
/// the vCPU has been told to stop: so a pause falls into the midst of it.
struct Echo {
    last: u32,
    seen: Sender<Seen>,
    accesses_until_pause: u32,
    control: Arc<OnceLock<Arc<Control>>>,
}

impl Echo {
    fn report(&mut self, seen: Seen) {
        self.seen.send(seen).unwrap();
        self.accesses_until_pause = self.accesses_until_pause.wrapping_sub(1);
        while self.accesses_until_pause == 0 && !self.control.wait().stop.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
    }
}

impl BusDevice for Echo {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.copy_from_slice(&self.last.to_le_bytes()[..data.len()]);
        self.report(Seen::Read(self.last));
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        let mut word = [0; 4];
        word[..data.len()].copy_from_slice(data);
        self.last = u32::from_le_bytes(word);
        assert!(self.last != FATAL, "on purpose");
        self.report(Seen::Wrote(self.last));
    }
}

/// One machine of one vCPU: all that [`VcpuSet`] needs, and what the guest says.
struct Guest {
    vcpus: VcpuSet,
    seen: Receiver<Seen>,
    ram: GuestMemoryMmap,
    // Dropped last: the VM's RAM is mapped as long as its vCPU may run.
    _vm: kvm_ioctls::VmFd,
}

impl Guest {
    /// A machine that begins at [`CODE`]. `None` where there is no KVM.
    fn new(ram: &GuestMemoryMmap) -> Option<Self> {
        Self::with(ram, None, 0, 0)
    }

    /// One that begins, or goes on, after `last` was written, and that expects a pause in the
    /// midst of its access `pause_at`, counted from 1; 0 is none.
    fn with(
        ram: &GuestMemoryMmap,
        state: Option<&VcpuStateV1>,
        last: u32,
        pause_at: u32,
    ) -> Option<Self> {
        let TestVm { vcpu, vm, capabilities, ram } = TestVm::with_ram(ram)?;
        match state {
            None => {
                let mut sregs = vcpu.get_sregs().unwrap();
                sregs.cs.base = 0;
                sregs.cs.selector = 0;
                vcpu.set_sregs(&sregs).unwrap();
                vcpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, ..Default::default() }).unwrap();
            }
            Some(state) => {
                let passage = Passage { elapsed_ns: 0, offset_change: 0 };
                state.restore(&vcpu, &capabilities, passage).unwrap();
            }
        }
        let (sender, seen) = channel();
        let mut pio = Bus::default();
        let control = Arc::new(OnceLock::new());
        let (seen_by_echo, shared) = (sender.clone(), control.clone());
        let echo =
            Echo { last, seen: seen_by_echo, accesses_until_pause: pause_at, control: shared };
        pio.insert(PORT.into(), 4, Arc::new(Mutex::new(echo))).unwrap();
        let events = Arc::new(move |event| sender.send(Seen::Ended(event)).unwrap());
        let buses = (Arc::new(pio), Arc::new(Bus::default()));
        let vcpus =
            VcpuSet::spawn(vec![vcpu], &capabilities, &buses.0, &buses.1, events, &[]).unwrap();
        assert!(control.set(vcpus.vcpus[0].control.clone()).is_ok());
        Some(Self { vcpus, seen, ram, _vm: vm })
    }

    fn count(&self) -> u32 {
        self.ram.read_obj(COUNT).unwrap()
    }

    /// Returns once the guest has counted on from `count`.
    fn counts_on_from(&self, count: u32) {
        while self.count() == count {
            std::thread::yield_now();
        }
    }

    /// The state of the vCPU, which stands still.
    fn save(&self) -> VcpuStateV1 {
        let mut states = self.vcpus.save().unwrap();
        assert_eq!(states.len(), 1);
        states.remove(0)
    }
}

fn ram_with(code: &[u8]) -> GuestMemoryMmap {
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    ram.write_slice(code, GuestAddress(CODE)).unwrap();
    ram
}

#[test]
fn a_guest_that_never_exits_stops_where_it_is_and_goes_on_from_there_in_another_vm() {
    let ram = ram_with(SILENT);
    let Some(mut before) = Guest::new(&ram) else { return };
    before.vcpus.resume().unwrap();
    assert_eq!(before.seen.recv().unwrap(), Seen::Wrote(0), "it says that it runs");
    before.counts_on_from(0);
    before.vcpus.pause().unwrap();
    let (saved, count) = (before.save(), before.count());
    assert_eq!(before.save(), saved, "a save changes nothing");
    assert_eq!(before.count(), count, "a paused guest does not run");
    // The pause may fall between the register and the memory.
    let register = saved.regs.0.rbx as u32;
    assert!([count, count.wrapping_add(1)].contains(&register), "{register} in it, {count} in RAM");
    drop(before);

    let mut after = Guest::with(&ram, Some(&saved), 0, 0).unwrap();
    assert_eq!(after.count(), count, "nothing runs before it is told to");
    after.vcpus.resume().unwrap();
    after.counts_on_from(count);
    after.vcpus.pause().unwrap();
    let resumed = after.save().regs.0.rbx as u32;
    assert!(resumed > register, "it counted from {register} and has {resumed}");
    assert_eq!(after.seen.try_recv().ok(), None, "it does not start again");
}

#[test]
fn an_access_into_which_a_pause_falls_is_neither_lost_nor_repeated_in_another_vm() {
    let ram = ram_with(TALKING);
    let mut saved = None;
    let (mut last, mut reads_next) = (0, true);
    // The pauses fall on reads and on writes.
    for pause_at in [1, 1, 2, 3, 4, 5, 6, 7, 8, 1, 1] {
        let Some(mut guest) = Guest::with(&ram, saved.as_ref(), last, pause_at) else { return };
        guest.vcpus.resume().unwrap();
        for _ in 0..pause_at {
            last += u32::from(!reads_next);
            let expected = if reads_next { Seen::Read(last) } else { Seen::Wrote(last) };
            assert_eq!(guest.seen.recv().unwrap(), expected);
            reads_next = !reads_next;
        }
        guest.vcpus.pause().unwrap();
        assert_eq!(guest.seen.try_recv().ok(), None, "the access is finished, no other begun");
        assert_eq!(guest.count(), last);
        saved = Some(guest.save());
    }
    assert_eq!(last, 19);
}

#[test]
fn a_guest_that_cannot_go_on_says_so_and_can_still_be_stopped_and_saved() {
    // A far jump to the first byte behind its RAM.
    let ram = ram_with(&[0xea, 0x10, 0x00, 0xff, 0xff]);
    let Some(mut guest) = Guest::new(&ram) else { return };
    guest.vcpus.resume().unwrap();
    match guest.seen.recv().unwrap() {
        Seen::Ended(VcpuEvent::Failed(why)) => assert!(why.starts_with("vCPU 0: KVM"), "{why}"),
        other => panic!("{other:?}"),
    }
    guest.vcpus.pause().unwrap();
    guest.save();
}

#[test]
fn a_vcpu_whose_thread_panics_names_itself_and_the_reason_and_can_be_dropped() {
    let ram = ram_with(TALKING);
    let Some(mut guest) = Guest::with(&ram, None, FATAL - 1, 0) else { return };
    guest.vcpus.resume().unwrap();
    assert_eq!(guest.seen.recv().unwrap(), Seen::Read(FATAL - 1));
    let why = "the thread of vCPU 0 panicked: on purpose".to_owned();
    assert_eq!(guest.seen.recv().unwrap(), Seen::Ended(VcpuEvent::Failed(why)));
    let gone = |result: Result<_, VcpuError>| matches!(result, Err(VcpuError::Gone { id: 0 }));
    assert!(gone(guest.vcpus.pause()));
    assert!(gone(guest.vcpus.save().map(|_| 0)));
}

#[test]
fn a_guest_with_kvmclock_is_told_of_each_pause_and_of_its_restore() {
    let ram = ram_with(SILENT);
    let Some(mut before) = Guest::new(&ram) else { return };
    before.vcpus.resume().unwrap();
    before.vcpus.pause().unwrap();
    let mut saved = before.save();
    drop(before);
    let clock = saved.msrs.iter_mut().find(|msr| msr.index == MSR_KVM_SYSTEM_TIME_NEW).unwrap();
    assert_eq!(clock.data, 0, "a guest without kvmclock is paused and resumed all the same");
    clock.data = KVMCLOCK.0 | 1;

    let mut guest = Guest::with(&ram, Some(&saved), 0, 0).unwrap();
    for resume in ["after its restore", "after a pause", "after another pause"] {
        ram.write_obj(0u8, KVMCLOCK_FLAGS).unwrap();
        let count = guest.count();
        guest.vcpus.resume().unwrap();
        guest.counts_on_from(count);
        guest.vcpus.pause().unwrap();
        let flags: u8 = ram.read_obj(KVMCLOCK_FLAGS).unwrap();
        assert!(flags & PVCLOCK_GUEST_STOPPED != 0, "{resume}: flags {flags:#x}");
    }
}

#[test]
fn stamps_are_in_the_order_of_what_they_stamp() {
    let ram = ram_with(SILENT);
    let Some(mut guest) = Guest::new(&ram) else { return };
    let entered = guest.vcpus.resume().unwrap();
    let left = guest.vcpus.pause().unwrap();
    let entered_again = guest.vcpus.resume().unwrap();
    assert!(0 < entered && entered <= left && left <= entered_again);
}
