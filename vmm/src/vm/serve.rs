//! `perennial vmm`: the process of one VM, which executes the requests of the host.
//!
//! At its start the process has only the link to the host. It ends when the link closes, because the host has
//! ended or given the VM up.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Vm, VmError, VmStateV1, calls};
use crate::causes::{chain, panic_message};
use crate::confine;
use crate::devices::storage::StorageFailure;
use crate::link::{
    Channel, Envelope, Event, Fds, FdsError, FromVm, LinkError, Reply, Request, Role,
};
use crate::state::{StateError, document};

/// The VM's process must end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// Standard input is not the link.
    #[error("cannot take the link from standard input; `perennial vmm` is started by the host")]
    NoLink(#[source] io::Error),
    /// The link broke.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// Files that the host left open cannot be closed: a kernel before Linux 5.9.
    #[error("cannot close the files that the host may have left open")]
    Files(#[source] io::Error),
    /// The first request is not [`Request::Confine`].
    #[error(
        "the first request on the link is not to confine the process: this is a bug, please report it"
    )]
    Unconfined,
    /// The thread that serves the host panicked.
    #[error("the main thread panicked: this is a bug, please report it")]
    Panicked,
}

/// A request failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
enum RequestError {
    #[error("there is a machine in this process already")]
    Second,
    #[error("this process has been confined already")]
    Confined,
    #[error("there is no machine in this process yet")]
    NoMachine,
    #[error(transparent)]
    Fds(#[from] FdsError),
    #[error(transparent)]
    Vm(#[from] VmError),
    #[error("cannot read the state document from its memfd")]
    Read(#[source] io::Error),
    #[error("cannot write the state document into its memfd")]
    Write(#[source] io::Error),
    #[error("the state document has {found} bytes, the manifest says {wanted}")]
    Length { found: u64, wanted: u64 },
    #[error("the state document cannot be used")]
    State(#[from] StateError),
    #[error("the state document does not say what was saved: this is a bug, please report it")]
    SelfCheck,
}

/// Serves the host that started this process.
pub fn run() -> Result<(), ServeError> {
    // The process has only its link and its log, also if the host left more open by mistake.
    confine::close_all_files_from(3).map_err(ServeError::Files)?;
    let link = io::stdin().as_fd().try_clone_to_owned().map_err(ServeError::NoLink)?;
    let link = Channel::from_fd(link);
    confine(&link)?;
    serve(link)
}

/// Confines this process as the host says in its first request.
fn confine(link: &Channel) -> Result<(), ServeError> {
    let (Envelope { request: Request::Confine { user }, .. }, _) = link.receive()? else {
        return Err(ServeError::Unconfined);
    };
    let (before, after) = Event::CRASHED;
    let report = confine::Report { socket: link.as_fd().as_raw_fd(), before, after };
    let mut missing = confine::isolate(user);
    missing.extend(confine::end_with_host());
    missing.extend(confine::filter(&calls::process(), report));
    let missing = missing.iter().map(ToString::to_string).collect();
    Ok(link.send(&FromVm::Reply(Reply::Confined { missing }), &[])?)
}

/// Serves the host until it closes the link. If this thread panics, tells the host the reason, and errors.
pub fn serve(link: Channel) -> Result<(), ServeError> {
    let link = Arc::new(link);
    // The machine outlives a panic: its end may wait for a device.
    let mut process = Process { link: link.clone(), vm: None, first: None };
    report_panic(&link, || process.serve())
}

/// Calls `serve`. If it panics, tells the host the reason.
fn report_panic(
    link: &Channel,
    serve: impl FnOnce() -> Result<(), ServeError>,
) -> Result<(), ServeError> {
    catch_unwind(AssertUnwindSafe(serve)).unwrap_or_else(|panic| {
        let why = format!("the main thread panicked: {}", panic_message(&*panic));
        // If the send fails, the host has ended.
        let _ = link.send(&FromVm::Event(Event::Crashed(why)), &[]);
        Err(ServeError::Panicked)
    })
}

struct Process {
    link: Arc<Channel>,
    vm: Option<Vm>,
    /// The state in which the machine came into this process, or why it is not known.
    first: Option<Result<VmStateV1, Vec<String>>>,
}

impl Process {
    fn serve(&mut self) -> Result<(), ServeError> {
        loop {
            let (envelope, fds) = match self.link.receive::<Envelope>() {
                Err(LinkError::Closed | LinkError::Unread) => return Ok(()),
                other => other?,
            };
            let reply = Fds::new(&envelope.roles, fds)
                .map_err(RequestError::from)
                .and_then(|fds| self.handle(envelope.request, fds))
                .unwrap_or_else(|error| Reply::Failed(chain(&error)));
            match self.link.send(&FromVm::Reply(reply), &[]) {
                Err(LinkError::Closed | LinkError::Unread) => return Ok(()),
                other => other?,
            }
        }
    }

    fn handle(&mut self, request: Request, mut fds: Fds) -> Result<Reply, RequestError> {
        match request {
            Request::Confine { .. } => Err(RequestError::Confined),
            Request::Boot { machine, ram, nested } => {
                let events = self.events()?;
                let vm = Vm::boot(machine, ram, nested, &mut fds, events)?;
                fds.finish()?;
                // A machine runs also if this fails; only a rehearsal lacks it then.
                self.first = Some(vm.save().map_err(|error| chain(&error)));
                self.keep(vm);
                Ok(Reply::Built)
            }
            Request::Restore { machine, ram, bytes, hints } => {
                let events = self.events()?;
                // The whole document is decoded to checked plain data before the first KVM call.
                let state: VmStateV1 = document::read_document(&read_state(&mut fds, bytes)?)?;
                let first = state.clone();
                let (vm, missing_hints) =
                    Vm::restore(&machine, hints, state, ram, &mut fds, events)?;
                fds.finish()?;
                self.first = Some(Ok(first));
                self.keep(vm);
                Ok(Reply::Restored { missing_hints })
            }
            Request::Resume => Ok(Reply::Resumed { first_entry_ticks: self.vm()?.resume()? }),
            Request::Pause => Ok(Reply::Paused { last_exit_ticks: self.vm()?.pause()? }),
            Request::Save => save(&self.vm()?.save()?, &mut fds),
            Request::SaveFirst => match self.first.as_ref().ok_or(RequestError::NoMachine)? {
                Ok(state) => save(state, &mut fds),
                Err(why) => Ok(Reply::Failed(why.clone())),
            },
            Request::Sync => {
                self.vm()?.sync()?;
                Ok(Reply::Synced)
            }
            Request::ReportStorage => Ok(Reply::Storage(self.vm()?.storage_reports())),
            Request::Resize { device, bytes } => {
                self.resize(device, bytes);
                Ok(Reply::Resizing)
            }
            Request::PressPowerButton => {
                self.vm()?.press_power_button()?;
                Ok(Reply::Pressed)
            }
            Request::SetLink { device, up } => {
                self.vm()?.set_link(&device, up)?;
                Ok(Reply::LinkSet)
            }
        }
    }

    /// Resizes a device. The host is told the end in an event, because the storage may take long, and this thread must
    /// stay able to answer.
    fn resize(&mut self, device: String, bytes: Option<u64>) {
        let (link, node) = (self.link.clone(), device.clone());
        // If a send fails, the host has ended, and this process will end too.
        let tell = move |resized| {
            drop(link.send(&FromVm::Event(Event::Resized { device: node, resized }), &[]))
        };
        let begun = self.vm().and_then(|vm| {
            let tell = tell.clone();
            let on_resized = move |resized: Result<u64, StorageFailure>| {
                tell(resized.map_err(|error| chain(&*error)));
            };
            Ok(vm.resize(&device, bytes, Box::new(on_resized))?)
        });
        if let Err(error) = begun {
            tell(Err(chain(&error)));
        }
    }

    /// Keeps the machine, which is built. From now on this thread only answers requests to it.
    fn keep(&mut self, vm: Vm) {
        confine::thread(&calls::main(&vm.machine));
        self.vm = Some(vm);
    }

    /// Returns the function that sends the machine's events to the host. A machine ends once, however often its guest
    /// asks for it: a guest that writes to the register in a loop could fill the link, and the host takes a process that
    /// sends without end for broken.
    fn events(&self) -> Result<impl Fn(Event) + Send + Sync + 'static, RequestError> {
        let (link, has_ended) = (self.link.clone(), AtomicBool::new(false));
        match self.vm {
            None => Ok(move |event| {
                let ends = matches!(event, Event::Shutdown | Event::Reset);
                if ends && has_ended.swap(true, Ordering::Relaxed) {
                    return;
                }
                // If the send fails, the host has ended, and this process will end too. Or the host stops the vCPU that
                // waits for room in the link.
                let sent = link.send(&FromVm::Event(event), &[]);
                if ends && sent.is_err() {
                    has_ended.store(false, Ordering::Relaxed);
                }
            }),
            Some(_) => Err(RequestError::Second),
        }
    }

    fn vm(&mut self) -> Result<&mut Vm, RequestError> {
        self.vm.as_mut().ok_or(RequestError::NoMachine)
    }
}

fn read_state(fds: &mut Fds, bytes: u64) -> Result<Vec<u8>, RequestError> {
    let file = File::from(fds.take_one(Role::State)?);
    let found = file.metadata().map_err(RequestError::Read)?.len();
    // `found` is the memfd's real size; it is bounded before the allocation.
    if found != bytes || found > document::MAX_BYTES as u64 {
        return Err(RequestError::Length { found, wanted: bytes });
    }
    let mut state = vec![0; found as usize];
    file.read_exact_at(&mut state, 0).map_err(RequestError::Read)?;
    Ok(state)
}

fn save(state: &VmStateV1, fds: &mut Fds) -> Result<Reply, RequestError> {
    let file = File::from(fds.take_one(Role::State)?);
    let bytes = document::write_document(state)?;
    // Checks that the new kernel's host will read what was saved, while the guest can still be resumed.
    if document::read_document::<VmStateV1>(&bytes)? != *state {
        return Err(RequestError::SelfCheck);
    }
    file.write_all_at(&bytes, 0).map_err(RequestError::Write)?;
    Ok(Reply::Saved { bytes: bytes.len() as u64 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_ends_its_machine_without_end_is_heard_once() {
        let (host, vm) = Channel::pair().unwrap();
        let process = Process { link: Arc::new(vm), vm: None, first: None };
        let events = process.events().unwrap();
        // A guest may write to the register in a loop until its machine is off.
        for event in [Event::Shutdown, Event::Reset, Event::Shutdown] {
            events(event);
        }
        let why = Event::Crashed("the thread of vCPU 1 panicked".to_owned());
        events(why.clone());
        let said = [(); 2].map(|()| host.receive::<FromVm>().unwrap().0);
        assert_eq!(said, [FromVm::Event(Event::Shutdown), FromVm::Event(why)]);
    }

    #[test]
    fn the_host_hears_why_the_main_thread_panicked() {
        let (host, vm) = Channel::pair().unwrap();
        let ended = report_panic(&vm, || panic!("on purpose"));
        assert!(matches!(ended, Err(ServeError::Panicked)));
        let why = "the main thread panicked: on purpose".to_owned();
        let (said, _) = host.receive::<FromVm>().unwrap();
        assert_eq!(said, FromVm::Event(Event::Crashed(why)));
    }
}
