//! The thread of one vCPU: it runs, or it stands still and does what it is asked.
//!
//! ```text
//!   standing still --Run--> KVM_RUN, exit, KVM_RUN, exit ... --EINTR and told to stop--> standing still
//! ```
//!
//! An exit that was handled is completed only by the next `KVM_RUN`. So the thread never stops after
//! an exit, only after an EINTR: then nothing is half done, and the registers are the whole truth.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Weak};

use kvm_ioctls::{VcpuExit, VcpuFd};

use super::run_page::RunPage;
use super::state::VcpuStateV1;
use crate::arch::x86_64::tsc;
use crate::bus::Bus;
use crate::kvm::{Capabilities, KvmError};

/// Why a vCPU cannot go on by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VcpuEvent {
    /// A triple fault, or KVM's own reset event: the machine resets, as real ones do.
    Reset,
    /// KVM cannot run it.
    Failed(String),
}

/// What a vCPU's thread is asked. Answers go to the sender that comes with it.
pub(super) enum Command {
    /// Run until told to stop. Answered with the host TSC before the first `KVM_RUN`.
    Run(Sender<u64>),
    /// Read the state.
    Save(Sender<Result<VcpuStateV1, KvmError>>),
    /// End the thread.
    Exit,
}

/// What the other threads share with a vCPU's.
pub(super) struct Control {
    pub(super) page: RunPage,
    pub(super) stop: AtomicBool,
    /// Where the thread reports the host TSC at which it left the last `KVM_RUN`.
    pub(super) stopped: Sender<u64>,
}

/// One vCPU with all that its thread needs.
pub(super) struct Runner {
    pub(super) id: u32,
    pub(super) vcpu: VcpuFd,
    pub(super) capabilities: Arc<Capabilities>,
    pub(super) pio: Arc<Bus>,
    pub(super) mmio: Arc<Bus>,
    pub(super) control: Arc<Control>,
    pub(super) commands: Receiver<Command>,
    pub(super) events: Weak<dyn Fn(VcpuEvent) + Send + Sync>,
}

enum Next {
    Enter,
    StandStill,
}

impl Runner {
    /// The thread's life.
    pub(super) fn run(mut self) {
        while let Ok(command) = self.commands.recv() {
            match command {
                Command::Run(entered) => self.run_until_stopped(entered),
                Command::Save(reply) => {
                    let state = VcpuStateV1::save(self.id, &self.vcpu, &self.capabilities);
                    // Nobody waits any more: the machine is going down.
                    let _ = reply.send(state);
                }
                Command::Exit => return,
            }
        }
    }

    fn run_until_stopped(&mut self, entered: Sender<u64>) {
        let _ = entered.send(tsc::now());
        // Who asked waits until no vCPU has anything more to say.
        drop(entered);
        while let Next::Enter = self.step() {}
        let _ = self.control.stopped.send(tsc::now());
    }

    fn step(&mut self) -> Next {
        let event = match self.vcpu.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                // A string instruction is many accesses to one port.
                for access in data.chunks_mut(self.control.page.io_size()) {
                    self.pio.read(port.into(), access);
                }
                return Next::Enter;
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                for access in data.chunks(self.control.page.io_size()) {
                    self.pio.write(port.into(), access);
                }
                return Next::Enter;
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.mmio.read(address, data);
                return Next::Enter;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.mmio.write(address, data);
                return Next::Enter;
            }
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => return Next::Enter,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                return match self.control.stop.load(Ordering::SeqCst) {
                    true => Next::StandStill,
                    false => Next::Enter,
                };
            }
            Ok(VcpuExit::Shutdown) => {
                self.describe_triple_fault();
                VcpuEvent::Reset
            }
            Ok(VcpuExit::SystemEvent(..)) => VcpuEvent::Reset,
            Ok(exit) => VcpuEvent::Failed(format!("vCPU {}: KVM exit {exit:?}", self.id)),
            Err(error) => VcpuEvent::Failed(format!("vCPU {}: KVM_RUN failed: {error}", self.id)),
        };
        if let Some(events) = self.events.upgrade() {
            events(event);
        }
        self.wait_for_stop()
    }

    /// A triple fault is how some kernels reset their machine, and how others die: the log says
    /// where, for the message about it.
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

    /// A vCPU that cannot go on stands until it is told to stop, like the others.
    fn wait_for_stop(&self) -> Next {
        while !self.control.stop.load(Ordering::SeqCst) {
            // The kick's signal ends the park as well as a KVM_RUN; unpark comes with it.
            std::thread::park();
        }
        Next::StandStill
    }
}
