//! The host's main loop: the API's clients, the VMs' processes, and the signals.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{WaitOptions, wait};
use rustix::time::Timespec;
use signal_hook::consts::SIGCHLD;

use super::stop::Stops;
use super::{Host, HostError, service};
use crate::api::{Answer, Call, Command, Line, Lines, hex};
use crate::causes::chain;
use crate::config::HostSection;
use crate::devices::serial::open_port;
use crate::guests::Life;
use crate::live_update::{Outcome, UpdateError};
use crate::socket::listen;

/// Most clients of the API socket at a time.
const MAX_CLIENTS: usize = 64;
/// Time between two attempts to read a control port whose other end is closed. Such a port is not polled,
/// because every poll would return at once.
const PORT_PAUSE: Duration = Duration::from_millis(200);

/// Listeners, clients and signals.
pub(super) struct Server {
    children: UnixStream,
    end: UnixStream,
    left: Option<UnixStream>,
    listener: Option<(UnixListener, PathBuf)>,
    port: Option<Port>,
    clients: Vec<Client>,
    /// Number of the next client.
    next_client: u64,
    stops: Stops<Whom>,
}

/// A client of the socket.
struct Client {
    /// Differs from that of every other client, also of those that are gone.
    number: u64,
    lines: Lines,
}

/// The client that a reply is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whom {
    Port,
    Client(u64),
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
    Left,
    Listener,
    Port,
    Client(usize),
    Vm(usize),
}

impl Server {
    /// Installs the signal handlers. To be called before the first child is started.
    /// `end` are the signals that end the host.
    pub(super) fn new(end: &[i32]) -> Result<Self, HostError> {
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
            end: pipe(end).map_err(HostError::Loop)?,
            left: None,
            listener: None,
            port: None,
            clients: Vec::new(),
            next_client: 0,
            stops: Stops::default(),
        })
    }

    /// Ends the host when the other end of `left` is closed: the user at the terminal has left.
    pub(super) fn end_with(&mut self, left: UnixStream) {
        self.left = Some(left);
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

    /// Serves until `power-off`, SIGTERM or SIGINT, and then until all VMs have ended.
    pub(super) fn run(&mut self, host: &mut Host) -> Result<(), HostError> {
        let summary = summary(host);
        tracing::info!("ready: {summary}");
        service::ready(&summary);
        self.tell_port(&Line::ready(&host.status()));
        loop {
            for source in self.wait(host).map_err(|e| HostError::Loop(e.into()))? {
                self.handle(source, host);
            }
            for (whom, line) in self.stops.round(host) {
                self.tell(whom, &line);
            }
            if self.stops.has_ended(host) || host.has_nothing_left() {
                return Ok(());
            }
            self.clients.retain(|client| !client.lines.is_closed());
        }
    }

    /// Waits until at least one source is ready. Returns the sources that are ready.
    fn wait(&self, host: &Host) -> rustix::io::Result<Vec<Source>> {
        let mut sources = vec![Source::Children, Source::End];
        let mut fds =
            vec![PollFd::new(&self.children, PollFlags::IN), PollFd::new(&self.end, PollFlags::IN)];
        if let Some(left) = &self.left {
            sources.push(Source::Left);
            fds.push(PollFd::new(left, PollFlags::IN));
        }
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
        if let Some(port) = self.port.as_ref().filter(|port| !port.hung_up) {
            sources.push(Source::Port);
            fds.push(PollFd::new(&port.lines, interest(&port.lines)));
        }
        for (index, client) in self.clients.iter().enumerate() {
            sources.push(Source::Client(index));
            fds.push(PollFd::new(&client.lines, interest(&client.lines)));
        }
        for (index, vm) in host.vms.iter().enumerate() {
            if let Life::Live(live) = &vm.life {
                sources.push(Source::Vm(index));
                fds.push(PollFd::from_borrowed_fd(live.process.as_fd(), PollFlags::IN));
            }
        }
        let timeout = self.timeout(host).and_then(|timeout| Timespec::try_from(timeout).ok());
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

    /// Returns how long to wait at most. `None`: until a source is ready.
    fn timeout(&self, host: &Host) -> Option<Duration> {
        let heard = |life: &Life| matches!(life, Life::Live(live) if live.process.has_events());
        let heard = host.vms.iter().any(|vm| heard(&vm.life)).then_some(Duration::ZERO);
        let stop = host.stop_deadline();
        let stop = stop.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let hung_up = self.port.as_ref().is_some_and(|port| port.hung_up);
        [heard, stop, hung_up.then_some(PORT_PAUSE)].into_iter().flatten().min()
    }

    fn handle(&mut self, source: Source, host: &mut Host) {
        match source {
            Source::Children => reap(&self.children, host),
            Source::End => self.end(host),
            Source::Left => {
                tracing::info!("stopping: the user has left");
                self.stops.end_host(host, None, 0);
            }
            Source::Listener => self.accept(),
            Source::Port => self.serve_port(host),
            Source::Client(index) => self.serve_client(index, host),
            Source::Vm(index) => handle_events(host, index),
        }
    }

    /// Handles SIGTERM or SIGINT: leaves the VMs to systemd, or asks all guests to shut down. A second signal
    /// pulls the plug at once.
    fn end(&mut self, host: &mut Host) {
        drain(&self.end);
        let within_s = match self.stops.host_ends() {
            true => 0,
            false => host.config.host.stop_within_s(),
        };
        tracing::info!("got SIGTERM or SIGINT: all VMs are stopped within {within_s} s");
        let announce = |server: &mut Self| server.tell_port(&Line::jumping());
        host.leave_to_service(|| announce(self));
        self.stops.end_host(host, None, within_s);
    }

    fn accept(&mut self) {
        let Some((listener, _)) = &self.listener else { return };
        match listener.accept().and_then(|(stream, _)| {
            stream.set_nonblocking(true)?;
            Ok(stream)
        }) {
            Ok(stream) => {
                let (number, lines) = (self.next_client, Lines::new(OwnedFd::from(stream)));
                self.next_client += 1;
                self.clients.push(Client { number, lines });
            }
            Err(error) => tracing::warn!("a client of the API could not be accepted: {error}"),
        }
    }

    fn serve_port(&mut self, host: &mut Host) {
        let Some(port) = &mut self.port else { return };
        port.hung_up = false;
        let lines = port.lines.flush().and_then(|()| port.lines.read());
        match lines {
            Ok(lines) => {
                // No bytes although the port was ready: the other end is closed.
                port.hung_up = lines.is_empty() && !port.lines.is_behind();
                self.answer_all(lines, host, Whom::Port);
            }
            Err(error) => {
                if let crate::api::StreamError::Closed = error {
                    port.hung_up = true;
                } else {
                    tracing::warn!("control port `{}`: {}", port.name, chain(&error).join(": "));
                    port.hung_up = true;
                }
            }
        }
    }

    fn serve_client(&mut self, index: usize, host: &mut Host) {
        let Client { number, lines } = &mut self.clients[index];
        match lines.flush().and_then(|()| lines.read()) {
            Ok(lines) => {
                let whom = Whom::Client(*number);
                self.answer_all(lines, host, whom);
            }
            Err(_) => lines.close(),
        }
    }

    /// Sends a line to a client, if it is still there.
    fn tell(&mut self, whom: Whom, line: &Line) {
        match whom {
            Whom::Port => self.tell_port(line),
            Whom::Client(number) => {
                let client = self.clients.iter_mut().find(|client| client.number == number);
                if let Some(client) = client {
                    client.lines.send(&line.text());
                }
            }
        }
    }

    fn tell_port(&mut self, line: &Line) {
        if let Some(port) = &mut self.port {
            port.lines.send(&line.text());
        }
    }

    fn answer_all(&mut self, lines: Vec<String>, host: &mut Host, whom: Whom) {
        for line in lines {
            let call = match Call::parse(&line) {
                Ok(call) => call,
                Err(refusal) => {
                    self.tell(whom, &refusal);
                    continue;
                }
            };
            let id = call.id;
            let line = match self.carry_out(call, host, whom) {
                // The reply comes when what was asked for has ended.
                Ok(None) => continue,
                Ok(Some(answer)) => Line::ok(id, &answer),
                Err(error) => {
                    let why = chain(&error);
                    tracing::warn!("{}", why.join(": "));
                    Line::Error { id, error: why, outcome: error.outcome() }
                }
            };
            self.tell(whom, &line);
        }
    }

    /// Carries out a command. Returns the answer, or `None` if the answer comes later.
    fn carry_out(
        &mut self,
        call: Call,
        host: &mut Host,
        whom: Whom,
    ) -> Result<Option<Answer>, HostError> {
        let within_s = host.config.host.stop_within_s();
        match call.command {
            Command::Stop { vm, now, within_s: own } => {
                let within_s = if now { 0 } else { own.unwrap_or(within_s) };
                self.stops.stop(host, (whom, call.id), vm, within_s)?;
                Ok(None)
            }
            Command::PowerOff { now } => {
                let within_s = if now { 0 } else { within_s };
                self.stops.end_host(host, Some((whom, call.id)), within_s);
                Ok(None)
            }
            Command::Boot { .. } | Command::Restore { .. } if self.stops.host_ends() => {
                Err(HostError::Ending)
            }
            command => self.carry_out_at_once(command, host, whom).map(Some),
        }
    }

    fn carry_out_at_once(
        &mut self,
        command: Command,
        host: &mut Host,
        whom: Whom,
    ) -> Result<Answer, HostError> {
        let announce = |server: &mut Self| server.tell(whom, &Line::jumping());
        match command {
            Command::Status | Command::Stop { .. } | Command::PowerOff { .. } => {
                return Ok(Answer::Status(Box::new(host.status())));
            }
            Command::Report => {
                let report = host.report.clone().ok_or(HostError::NoReport)?;
                return Ok(Answer::Report(Box::new(report)));
            }
            Command::Boot { vm } => host.boot(&vm)?,
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

/// Reads the signals that have come.
fn drain(pipe: &UnixStream) {
    let mut bytes = [0; 64];
    while io::Read::read(&mut &*pipe, &mut bytes).is_ok_and(|count| count > 0) {}
}

/// Reaps every child that has ended: processes of VMs and, as PID 1, orphaned processes.
fn reap(pipe: &UnixStream, host: &mut Host) {
    drain(pipe);
    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
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
            let how = match (status.terminating_signal(), status.exit_status()) {
                (Some(signal), _) => format!("signal {signal} ended its process"),
                (None, code) => format!("its process ended with exit code {}", code.unwrap_or(0)),
            };
            host.on_event(index, last.or(Some(crate::link::Event::Crashed(how))));
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
