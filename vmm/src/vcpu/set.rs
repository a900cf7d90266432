//! All vCPUs of a machine, each on its own thread.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Once};
use std::thread::{self, JoinHandle};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::run::{Command, Control, Runner, VcpuEvent};
use super::run_page::RunPage;
use super::state::VcpuStateV1;
use crate::bus::Bus;
use crate::confine::Call;
use crate::kvm::{Capabilities, KvmError};

/// An operation on the vCPUs failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VcpuError {
    /// The thread could not be started.
    #[error("cannot start the thread of vCPU {id}")]
    Thread {
        /// Which vCPU.
        id: u32,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The vCPU's thread has panicked, which is a bug.
    #[error("the thread of vCPU {id} has panicked: this is a bug, please report it")]
    Gone {
        /// Which vCPU.
        id: u32,
    },
    /// The signal that interrupts the thread could not be sent.
    #[error("cannot interrupt vCPU {id}")]
    Kick {
        /// Which vCPU.
        id: u32,
        /// Why.
        #[source]
        source: vmm_sys_util::errno::Error,
    },
    /// KVM did not return the vCPU's state.
    #[error("cannot save vCPU {id}")]
    Save {
        /// Which vCPU.
        id: u32,
        /// Why.
        #[source]
        source: KvmError,
    },
}

/// The vCPUs of a machine. Paused when created.
pub struct VcpuSet {
    vcpus: Vec<Handle>,
    _events: Arc<dyn Fn(VcpuEvent) + Send + Sync>,
}

struct Handle {
    id: u32,
    control: Arc<Control>,
    commands: Sender<Command>,
    stopped: Receiver<u64>,
    thread: Option<JoinHandle<()>>,
}

impl VcpuSet {
    /// Starts a thread for each of `vcpus`; the index of a vCPU is its id. The vCPUs' threads call
    /// `events`, and are confined to the system calls of `calls`.
    pub fn spawn(
        vcpus: Vec<VcpuFd>,
        capabilities: &Arc<Capabilities>,
        pio: &Arc<Bus>,
        mmio: &Arc<Bus>,
        events: Arc<dyn Fn(VcpuEvent) + Send + Sync>,
        calls: &[&'static [Call]],
    ) -> Result<Self, VcpuError> {
        install_kick();
        let mut set = Self { vcpus: Vec::with_capacity(vcpus.len()), _events: events.clone() };
        for (id, mut vcpu) in (0..).zip(vcpus) {
            let (stopped_sender, stopped) = channel();
            let (commands, commands_receiver) = channel();
            let page = RunPage::new(&mut vcpu);
            let stop = AtomicBool::new(false);
            let control = Arc::new(Control { page, stop });
            let runner = Runner {
                id,
                vcpu,
                capabilities: capabilities.clone(),
                pio: pio.clone(),
                mmio: mmio.clone(),
                control: control.clone(),
                commands: commands_receiver,
                stopped: stopped_sender,
                events: Arc::downgrade(&events),
                undelivered: 0,
            };
            let calls = calls.to_vec();
            let thread = thread::Builder::new()
                .name(format!("vcpu{id}"))
                .spawn(move || runner.run(&calls))
                .map_err(|source| VcpuError::Thread { id, source })?;
            set.vcpus.push(Handle { id, control, commands, stopped, thread: Some(thread) });
        }
        Ok(set)
    }

    /// Resumes all vCPUs, which must be paused. Returns the host TSC at which the first was about
    /// to enter `KVM_RUN`.
    pub fn resume(&mut self) -> Result<u64, VcpuError> {
        let (first_entry, stamps) = channel();
        for vcpu in &self.vcpus {
            vcpu.control.stop.store(false, Ordering::SeqCst);
            vcpu.control.page.set_immediate_exit(false);
            vcpu.send(Command::Run(first_entry.clone()))?;
        }
        drop(first_entry);
        Ok(stamps.iter().min().unwrap_or(0))
    }

    /// Pauses all vCPUs, which must be running, with no exit half handled. Returns the host TSC at
    /// which the last had left `KVM_RUN`.
    pub fn pause(&mut self) -> Result<u64, VcpuError> {
        for vcpu in &self.vcpus {
            vcpu.kick()?;
        }
        let mut last = 0;
        for vcpu in &self.vcpus {
            let stamp = vcpu.stopped.recv().map_err(|_| VcpuError::Gone { id: vcpu.id })?;
            last = last.max(stamp);
        }
        Ok(last)
    }

    /// Returns the state of all vCPUs in the order of their ids. They must be paused.
    pub fn save(&self) -> Result<Vec<VcpuStateV1>, VcpuError> {
        let ask = |vcpu: &Handle| {
            let (reply, state) = channel();
            vcpu.send(Command::Save(reply)).map(|()| (vcpu.id, state))
        };
        // All threads get the command before the first answer is awaited: they save in parallel.
        let asked = self.vcpus.iter().map(ask).collect::<Result<Vec<_>, _>>()?;
        let take = |(id, state): (u32, Receiver<_>)| {
            let state: Result<_, _> = state.recv().map_err(|_| VcpuError::Gone { id })?;
            state.map_err(|source| VcpuError::Save { id, source })
        };
        asked.into_iter().map(take).collect()
    }
}

impl Drop for VcpuSet {
    fn drop(&mut self) {
        for vcpu in &mut self.vcpus {
            let _ = vcpu.kick();
            let _ = vcpu.send(Command::Exit);
            if let Some(thread) = vcpu.thread.take() {
                // The thread owns the vCPU's fd, so the shared page is mapped until the thread
                // ends.
                let _ = thread.join();
            }
        }
    }
}

impl Handle {
    fn send(&self, command: Command) -> Result<(), VcpuError> {
        self.commands.send(command).map_err(|_| VcpuError::Gone { id: self.id })
    }

    /// Makes the vCPU leave `KVM_RUN`. The order matters: a `KVM_RUN` that begins after the byte
    /// `immediate_exit` is set returns at once, and the signal ends one that began before. `stop` is
    /// set behind the byte, so that who sees it knows that the guest begins no other access.
    fn kick(&self) -> Result<(), VcpuError> {
        self.control.page.set_immediate_exit(true);
        self.control.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
            let error = |source| VcpuError::Kick { id: self.id, source };
            thread.kill(SIGRTMIN()).map_err(error)?;
        }
        Ok(())
    }
}

/// Installs a signal handler that does nothing: the signal only makes `KVM_RUN` return EINTR.
fn install_kick() {
    static ONCE: Once = Once::new();
    extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    ONCE.call_once(|| {
        if let Err(error) = register_signal_handler(SIGRTMIN(), kicked) {
            tracing::error!("cannot handle the signal that stops vCPUs: {error}");
        }
    });
}

#[cfg(test)]
mod tests;
