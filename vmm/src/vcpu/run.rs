//! The thread of one vCPU: either runs the vCPU, or is paused and answers commands.
//!
//! ```text
//!   paused --Run--> KVM_RUN, exit, KVM_RUN, exit ... --EINTR and `stop` is set--> paused
//! ```
//!
//! KVM completes an exit that was handled only in the next `KVM_RUN`. So the thread pauses after an
//! EINTR, never directly after an exit that it handled: no exit is half done, and the registers are
//! complete. A vCPU that cannot continue ([`VcpuEvent`]) pauses without an EINTR.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Weak};

use kvm_ioctls::{VcpuExit, VcpuFd};

use super::run_page::RunPage;
use super::state::VcpuStateV1;
use crate::arch::x86_64::tsc;
use crate::bus::Bus;
use crate::causes::panic_message;
use crate::confine::{self, Call};
use crate::kvm::{Capabilities, KvmError};

/// `KVM_INTERNAL_ERROR_DELIVERY_EV` (`linux/kvm.h`): KVM would have to emulate an instruction of the guest, and believes
/// that the guest was just being given an interrupt or an exception.
const DELIVERY_EV: u32 = 3;
/// How many times in a row the vCPU is entered again after that. Linux up to 7.3 believes so on AMD also if the CPU
/// says that no event is pending but leaves the type of the last one in the field, which QEMU's emulation does
/// (docs/emulation.md). Nothing has happened to the guest, and the next exit is without the old type. An
/// event that is really pending gives the same error each time.
const ATTEMPTS: u32 = 3;

/// Why a vCPU cannot continue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VcpuEvent {
    /// A triple fault or a KVM system event: the machine has to be reset, as a real one would be.
    Reset,
    /// KVM cannot run the vCPU. The text names the vCPU and the reason.
    Failed(String),
}

/// A command to a vCPU's thread. The thread answers through the sender in the command.
pub(super) enum Command {
    /// Tell the guest that it was paused, and run until `Control::stop` is set. The answer is the host TSC before the first `KVM_RUN`.
    Run(Sender<u64>),
    /// Read and return the vCPU's state.
    Save(Sender<Result<VcpuStateV1, KvmError>>),
    /// End the thread.
    Exit,
}

/// The data that a vCPU's thread shares with the thread that controls it.
pub(super) struct Control {
    pub(super) page: RunPage,
    pub(super) stop: AtomicBool,
}

/// One vCPU and everything that its thread needs.
pub(super) struct Runner {
    pub(super) id: u32,
    pub(super) vcpu: VcpuFd,
    pub(super) capabilities: Arc<Capabilities>,
    pub(super) pio: Arc<Bus>,
    pub(super) mmio: Arc<Bus>,
    pub(super) control: Arc<Control>,
    pub(super) commands: Receiver<Command>,
    /// Receives the host TSC at each pause, read after the last `KVM_RUN` returned.
    pub(super) stopped: Sender<u64>,
    pub(super) events: Weak<dyn Fn(VcpuEvent) + Send + Sync>,
    /// How many times the last `KVM_RUN`s ended with [`DELIVERY_EV`].
    pub(super) undelivered: u32,
}

enum Next {
    Run,
    Pause,
}

impl Runner {
    /// Runs the thread. If it panics, reports that and answers nothing any more.
    pub(super) fn run(mut self, calls: &[&'static [Call]]) {
        let serve = || {
            confine::thread(calls);
            self.serve();
        };
        let Err(panic) = catch_unwind(AssertUnwindSafe(serve)) else { return };
        let Self { id, vcpu, commands, stopped, events, .. } = self;
        // Whoever waits for the vCPU to stop hears that it is gone.
        drop(stopped);
        if let Some(events) = events.upgrade() {
            let why = format!("the thread of vCPU {id} panicked: {}", panic_message(&*panic));
            events(VcpuEvent::Failed(why));
        }
        // `Control` uses the page of the vCPU until the machine ends.
        while !matches!(commands.recv(), Ok(Command::Exit) | Err(_)) {}
        drop(vcpu);
    }

    /// Handles commands until `Exit` or until the sender is gone.
    fn serve(&mut self) {
        while let Ok(command) = self.commands.recv() {
            match command {
                Command::Run(first_entry) => self.run_until_stopped(first_entry),
                Command::Save(reply) => {
                    let state = VcpuStateV1::save(self.id, &self.vcpu, &self.capabilities);
                    // Fails only if nobody waits any more, because the machine is going down.
                    let _ = reply.send(state);
                }
                Command::Exit => return,
            }
        }
    }

    fn run_until_stopped(&mut self, first_entry: Sender<u64>) {
        self.tell_guest_of_pause();
        let _ = first_entry.send(tsc::now());
        // The receiver waits until all senders are dropped.
        drop(first_entry);
        while let Next::Run = self.step() {}
        let _ = self.stopped.send(tsc::now());
    }

    /// Sets the flag in the guest's kvmclock by which the guest's soft-lockup watchdog knows that the vCPU
    /// did not run for a while (`PVCLOCK_GUEST_STOPPED`, Documentation/virt/kvm/api.rst 4.70).
    fn tell_guest_of_pause(&self) {
        match self.vcpu.kvmclock_ctrl() {
            Ok(()) => {}
            // The guest has no kvmclock, or has not booted far enough to use it.
            Err(error) if error.errno() == libc::EINVAL => {}
            Err(error) => tracing::warn!("vCPU {}: KVM_KVMCLOCK_CTRL failed: {error}", self.id),
        }
    }

    fn step(&mut self) -> Next {
        let undelivered = std::mem::take(&mut self.undelivered);
        let event = match self.vcpu.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                // A string instruction gives several accesses to one port in one exit.
                for access in data.chunks_mut(self.control.page.io_size()) {
                    self.pio.read(port.into(), access);
                }
                return Next::Run;
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                for access in data.chunks(self.control.page.io_size()) {
                    self.pio.write(port.into(), access);
                }
                return Next::Run;
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.mmio.read(address, data);
                return Next::Run;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.mmio.write(address, data);
                return Next::Run;
            }
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => return Next::Run,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                return match self.control.stop.load(Ordering::SeqCst) {
                    true => Next::Pause,
                    false => Next::Run,
                };
            }
            Ok(VcpuExit::Shutdown) => {
                self.describe_triple_fault();
                VcpuEvent::Reset
            }
            Ok(VcpuExit::SystemEvent(..)) => VcpuEvent::Reset,
            Ok(VcpuExit::InternalError) => {
                let (suberror, _) = self.control.page.internal_error();
                if suberror == DELIVERY_EV && undelivered < ATTEMPTS {
                    self.undelivered = undelivered + 1;
                    return Next::Run;
                }
                VcpuEvent::Failed(self.describe_internal_error())
            }
            Ok(exit) => VcpuEvent::Failed(format!("vCPU {}: KVM exit {exit:?}", self.id)),
            Err(error) => VcpuEvent::Failed(format!("vCPU {}: KVM_RUN failed: {error}", self.id)),
        };
        if let Some(events) = self.events.upgrade() {
            events(event);
        }
        self.wait_for_stop()
    }

    /// Says what KVM could not do, and where the guest was.
    fn describe_internal_error(&self) -> String {
        let (suberror, data) = self.control.page.internal_error();
        let at = self.vcpu.get_regs().map_or("?".to_owned(), |regs| format!("{:#x}", regs.rip));
        format!(
            "vCPU {}: KVM cannot go on at rip {at}: internal error {suberror} (linux/kvm.h, \
             KVM_INTERNAL_ERROR_*), data {data:x?}",
            self.id
        )
    }

    /// Logs the registers after a triple fault. Some kernels reset the machine by a triple fault,
    /// others crash with one: the log shows where.
    fn describe_triple_fault(&self) {
        if let (Ok(regs), Ok(sregs)) = (self.vcpu.get_regs(), self.vcpu.get_sregs()) {
            tracing::warn!(
                "vCPU {}: triple fault at rip {:#x}, rsp {:#x}, cr0 {:#x}, cr2 {:#x}, cr3 {:#x}, cr4 {:#x}, efer {:#x}",
                self.id,
                regs.rip,
                regs.rsp,
                sregs.cr0,
                sregs.cr2,
                sregs.cr3,
                sregs.cr4,
                sregs.efer
            );
        }
    }

    /// Waits until `stop` is set: a vCPU that cannot continue pauses together with the others.
    fn wait_for_stop(&self) -> Next {
        while !self.control.stop.load(Ordering::SeqCst) {
            // `Handle::kick` sets `stop` and then unparks this thread.
            std::thread::park();
        }
        Next::Pause
    }
}
