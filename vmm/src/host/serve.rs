//! The host's main loop: the API's clients, the VMs' processes, and the signals.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{WaitOptions, wait};
use rustix::time::Timespec;
use signal_hook::consts::{SIGCHLD, SIGINT, SIGTERM};

use super::{Host, HostError, service};
use crate::api::{Answer, Call, Command, Line, Lines, hex};
use crate::causes::chain;
use crate::config::HostSection;
use crate::devices::serial::open_port;
use crate::guests::Life;
use crate::live_update::{Outcome, UpdateError};

/// Most clients of the API socket at a time.
const MAX_CLIENTS: usize = 64;
/// Nanoseconds between two attempts to read a control port whose other end is closed. Such a port is not
/// polled, because every poll would return at once.
const PORT_PAUSE_NS: i64 = 200_000_000;

/// Listeners, clients and signals.
pub(super) struct Server {
    children: UnixStream,
    end: UnixStream,
    listener: Option<(UnixListener, PathBuf)>,
    port: Option<Port>,
    clients: Vec<Lines>,
}

/// The control port, which stays open when its client disconnects.
struct Port {
    name: String,
    lines: Lines,
    hung_up: bool,
}

enum Source {
    Children,
    End,
    Listener,
    Port,
    Client(usize),
    Vm(usize),
}

enum After {
    GoOn,
    Stop,
}

impl Server {
    /// Installs the signal handlers. To be called before the first child is started.
    pub(super) fn new() -> Result<Self, HostError> {
        let pipe = |signals: &[i32]| -> io::Result<UnixStream> {
            let (read, write) = UnixStream::pair()?;
            read.set_nonblocking(true)?;
            for signal in signals {
                signal_hook::low_level::pipe::register(*signal, write.try_clone()?)?;
            }
            Ok(read)
        };
        Ok(Self {
            children: pipe(&[SIGCHLD]).map_err(HostError::Loop)?,
            end: pipe(&[SIGTERM, SIGINT]).map_err(HostError::Loop)?,
            listener: None,
            port: None,
            clients: Vec::new(),
        })
    }

    /// Opens the socket and the control port of the configuration.
    pub(super) fn listen(&mut self, section: &HostSection) -> Result<(), HostError> {
        if let Some(path) = &section.socket {
            let error = |source| HostError::Socket { path: path.clone(), source };
            self.listener = Some((listen(path).map_err(error)?, path.clone()));
        }
        if let Some(name) = &section.control_port {
            match open_port(name) {
                Ok(file) => {
                    let lines = Lines::new(file.into());
                    self.port = Some(Port { name: name.clone(), lines, hung_up: false });
                }
                // A host without its control port still runs its VMs.
                Err(error) => tracing::error!("{}", chain(&error).join(": ")),
            }
        }
        Ok(())
    }

    /// Serves until `power-off`, SIGTERM or SIGINT.
    pub(super) fn run(&mut self, host: &mut Host) -> Result<(), HostError> {
        let summary = summary(host);
        tracing::info!("ready: {summary}");
        service::ready(&summary);
        self.tell_port(&Line::ready(&host.status()));
        loop {
            for source in self.wait(host).map_err(|e| HostError::Loop(e.into()))? {
                if let After::Stop = self.handle(source, host) {
                    return Ok(());
                }
            }
            self.clients.retain(|client| !client.is_closed());
        }
    }

    /// Waits until at least one source is ready. Returns the sources that are ready.
    fn wait(&self, host: &Host) -> rustix::io::Result<Vec<Source>> {
        let mut sources = vec![Source::Children, Source::End];
        let mut fds =
            vec![PollFd::new(&self.children, PollFlags::IN), PollFd::new(&self.end, PollFlags::IN)];
        let interest = |lines: &Lines| match lines.is_behind() {
            true => PollFlags::IN | PollFlags::OUT,
            false => PollFlags::IN,
        };
        if let Some((listener, _)) = &self.listener
            && self.clients.len() < MAX_CLIENTS
        {
            sources.push(Source::Listener);
            fds.push(PollFd::new(listener, PollFlags::IN));
        }
        let mut timeout = None;
        match &self.port {
            Some(port) if port.hung_up => {
                timeout = Some(Timespec { tv_sec: 0, tv_nsec: PORT_PAUSE_NS });
            }
            Some(port) => {
                sources.push(Source::Port);
                fds.push(PollFd::new(&port.lines, interest(&port.lines)));
            }
            None => {}
        }
        for (index, client) in self.clients.iter().enumerate() {
            sources.push(Source::Client(index));
            fds.push(PollFd::new(client, interest(client)));
        }
        for (index, vm) in host.vms.iter().enumerate() {
            if let Life::Live(live) = &vm.life {
                if live.process.has_events() {
                    timeout = Some(Timespec { tv_sec: 0, tv_nsec: 0 });
                }
                sources.push(Source::Vm(index));
                fds.push(PollFd::from_borrowed_fd(live.process.as_fd(), PollFlags::IN));
            }
        }
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        let mut ready: Vec<Source> = sources
            .into_iter()
            .zip(&fds)
            .filter(|(_, fd)| !fd.revents().is_empty())
            .map(|(source, _)| source)
            .collect();
        drop(fds);
        for (index, vm) in host.vms.iter().enumerate() {
            let heard = matches!(&vm.life, Life::Live(live) if live.process.has_events());
            if heard && !ready.iter().any(|s| matches!(s, Source::Vm(i) if *i == index)) {
                ready.push(Source::Vm(index));
            }
        }
        if self.port.as_ref().is_some_and(|port| port.hung_up) {
            ready.push(Source::Port);
        }
        Ok(ready)
    }

    fn handle(&mut self, source: Source, host: &mut Host) -> After {
        match source {
            Source::Children => reap(&self.children, host),
            Source::End => {
                tracing::info!("stopping: got SIGTERM or SIGINT");
                let announce = |server: &mut Self| server.tell_port(&Line::jumping());
                host.leave_to_service(|| announce(self));
                return After::Stop;
            }
            Source::Listener => self.accept(),
            Source::Port => return self.serve_port(host),
            Source::Client(index) => return self.serve_client(index, host),
            Source::Vm(index) => handle_events(host, index),
        }
        After::GoOn
    }

    fn accept(&mut self) {
        let Some((listener, _)) = &self.listener else { return };
        match listener.accept().and_then(|(stream, _)| {
            stream.set_nonblocking(true)?;
            Ok(stream)
        }) {
            Ok(stream) => self.clients.push(Lines::new(OwnedFd::from(stream))),
            Err(error) => tracing::warn!("a client of the API could not be accepted: {error}"),
        }
    }

    fn serve_port(&mut self, host: &mut Host) -> After {
        let Some(port) = &mut self.port else { return After::GoOn };
        port.hung_up = false;
        let lines = port.lines.flush().and_then(|()| port.lines.read());
        match lines {
            Ok(lines) => {
                // No bytes although the port was ready: the other end is closed.
                port.hung_up = lines.is_empty() && !port.lines.is_behind();
                self.answer_all(lines, host, |server, line| server.tell_port(line))
            }
            Err(error) => {
                if let crate::api::StreamError::Closed = error {
                    port.hung_up = true;
                } else {
                    tracing::warn!("control port `{}`: {}", port.name, chain(&error).join(": "));
                    port.hung_up = true;
                }
                After::GoOn
            }
        }
    }

    fn serve_client(&mut self, index: usize, host: &mut Host) -> After {
        let client = &mut self.clients[index];
        match client.flush().and_then(|()| client.read()) {
            Ok(lines) => self.answer_all(lines, host, |server, line| {
                server.clients[index].send(&line.text());
            }),
            Err(_) => {
                client.close();
                After::GoOn
            }
        }
    }

    fn tell_port(&mut self, line: &Line) {
        if let Some(port) = &mut self.port {
            port.lines.send(&line.text());
        }
    }

    fn answer_all(
        &mut self,
        lines: Vec<String>,
        host: &mut Host,
        reply: impl Fn(&mut Self, &Line),
    ) -> After {
        for line in lines {
            let call = match Call::parse(&line) {
                Ok(call) => call,
                Err(refusal) => {
                    reply(self, &refusal);
                    continue;
                }
            };
            let id = call.id;
            if call.command == Command::PowerOff {
                reply(self, &Line::ok(id, &Answer::Done {}));
                return After::Stop;
            }
            let announce = |server: &mut Self| reply(server, &Line::jumping());
            let line = match self.carry_out(call.command, host, announce) {
                Ok(answer) => Line::ok(id, &answer),
                Err(error) => {
                    let why = chain(&error);
                    tracing::warn!("{}", why.join(": "));
                    Line::Error { id, error: why, outcome: error.outcome() }
                }
            };
            reply(self, &line);
        }
        After::GoOn
    }

    fn carry_out(
        &mut self,
        command: Command,
        host: &mut Host,
        announce: impl FnOnce(&mut Self),
    ) -> Result<Answer, HostError> {
        match command {
            Command::Status | Command::PowerOff => {
                return Ok(Answer::Status(Box::new(host.status())));
            }
            Command::Report => {
                let report = host.report.clone().ok_or(HostError::NoReport)?;
                return Ok(Answer::Report(Box::new(report)));
            }
            Command::Boot { vm } => host.boot(&vm)?,
            Command::Stop { vm } => {
                host.stop(&vm)?;
            }
            Command::Pause { vm } => host.vm(&vm)?.pause()?,
            Command::Resume { vm } => host.vm(&vm)?.resume()?,
            Command::Restore { vm } => host.restore(&vm)?,
            Command::Dump { vm, path: Some(path) } => host.vm(&vm)?.dump(&path)?,
            Command::Dump { vm, path: None } => {
                return Ok(Answer::Document { document: hex(&host.vm(&vm)?.state_document()?) });
            }
            Command::Memory { vm, address, bytes } => {
                return Ok(Answer::Memory { memory: hex(&host.vm(&vm)?.memory(address, bytes)?) });
            }
            Command::Update(call) if host.is_left_to_systemd(&call) => {
                host.update_through_systemd(call)?;
                let outcome = Outcome::Running;
                return Ok(Answer::LeftToSystemd { outcome, kexec: "asked of systemd" });
            }
            Command::Update(call) => {
                tracing::info!("live update {} begins", host.number + 1);
                return answer_unless_done(host.update(call, || announce(self)));
            }
            Command::Handover(call) => {
                tracing::info!("the handover to another program begins");
                return answer_unless_done(host.hand_over(call, || announce(self)));
            }
        }
        Ok(Answer::Done {})
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some((_, path)) = &self.listener {
            let _ = fs::remove_file(path);
        }
    }
}

/// Returns the answer to a live update or a handover that did not take place. If it stopped before a step
/// as requested, that is a success.
fn answer_unless_done(
    result: Result<std::convert::Infallible, HostError>,
) -> Result<Answer, HostError> {
    match result {
        Ok(never) => match never {},
        Err(
            HostError::Update(UpdateError::Stopped(step))
            | HostError::Handover(UpdateError::Stopped(step)),
        ) => Ok(Answer::Stopped { outcome: Outcome::Running, stopped_before: step }),
        Err(error) => Err(error),
    }
}

/// Listens at `path`, accessible to root only. Replaces a socket of a process that has ended; errors if
/// another host listens there.
fn listen(path: &Path) -> io::Result<UnixListener> {
    if UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another host listens there"));
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Reaps every child that has ended: processes of VMs and, as PID 1, orphaned processes.
fn reap(pipe: &UnixStream, host: &mut Host) {
    let mut bytes = [0; 64];
    while io::Read::read(&mut &*pipe, &mut bytes).is_ok_and(|count| count > 0) {}
    while let Ok(Some((pid, _))) = wait(WaitOptions::NOHANG) {
        let ended = host
            .vms
            .iter()
            .position(|vm| matches!(&vm.life, Life::Live(l) if l.process.pid() == pid));
        if let Some(index) = ended {
            // The last event of the process explains its end.
            let last = match &host.vms[index].life {
                Life::Live(live) => live.process.last_words(),
                _ => None,
            };
            host.on_event(index, last);
        }
    }
}

/// Handles the events of a VM's process. An error on the link counts as the end of the process.
fn handle_events(host: &mut Host, index: usize) {
    let vm = &host.vms[index];
    let Life::Live(live) = &vm.life else { return };
    let readable = !live.process.has_events();
    match live.process.events(readable) {
        Ok(events) => events.into_iter().for_each(|event| host.on_event(index, Some(event))),
        Err(error) => {
            tracing::error!("VM `{}`: {}", vm.machine.name, chain(&error).join(": "));
            host.on_event(index, None);
        }
    }
}

fn summary(host: &Host) -> String {
    let status = host.status();
    let vms: Vec<String> =
        status.vms.iter().map(|vm| format!("{} {}", vm.name, vm.state)).collect();
    let vms = if vms.is_empty() { "no VMs".to_owned() } else { vms.join(", ") };
    format!("kernel {}, LUO {}, boot {}, {vms}", status.kernel, status.luo, status.boot)
}
