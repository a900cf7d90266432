//! The host's main loop: the API's clients, the VMs' processes, and the signals.

mod rehearse;

use std::cell::RefCell;
use std::convert::Infallible;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{WaitOptions, wait};
use rustix::time::Timespec;
use signal_hook::consts::{
    SIGALRM, SIGCHLD, SIGHUP, SIGIO, SIGPROF, SIGQUIT, SIGUSR1, SIGUSR2, SIGVTALRM, SIGXCPU,
    SIGXFSZ,
};

use super::clients::{Client, Clients};
use super::events::Watchers;
use super::port::Port;
use super::rehearsals::{Asked, Rehearsals};
use super::stop::Stops;
use super::waits::Waits;
use super::{Host, HostError, service};
use crate::api::{
    Answer, Call, Command, Event, Line, RecoverCall, Status, StreamError, Transaction, With, hex,
    now_ms,
};
use crate::causes::chain;
use crate::config::HostSection;
use crate::guests::Life;
use crate::guests::conversation::ProcessError;
use crate::link::LinkError;
use crate::live_update::preflight;
use crate::live_update::rehearsal::Rehearsal;
use crate::live_update::{Observer, Outcome, Progress, Step, UpdateError};
use crate::open_files;

/// Time until the host waits again after poll(2) has failed.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// Time between two attempts to open a socket that cannot be opened.
const SOCKET_PAUSE: Duration = Duration::from_secs(1);

/// Listeners, clients and signals.
pub(super) struct Server {
    children: UnixStream,
    end: UnixStream,
    ignored: UnixStream,
    left: Option<UnixStream>,
    clients: Option<Clients>,
    /// The socket that could not be opened, if the host goes on without clients, and when it is tried again.
    unopened: Option<(PathBuf, Instant)>,
    port: Option<Port>,
    stops: Stops<Whom>,
    watchers: Watchers<Whom>,
    waits: Waits<Whom>,
    rehearsals: Rehearsals<Whom>,
}

/// The client that a reply is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whom {
    Port,
    Client(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Children,
    End,
    Ignored,
    Left,
    Listener,
    Port,
    Client(u64),
    Vm(usize),
    /// A VM that boots again.
    Booting,
    /// A VM of the last host that is late.
    Late,
    /// The VM of a rehearsal.
    Rehearsal,
}

impl Server {
    /// Installs the signal handlers. To be called before the first child is started.
    /// `end` are the signals that end the host. No other signal does, except those that nobody can catch.
    pub(super) fn new(end: &[i32]) -> Result<Self, HostError> {
        let pipe = |signals: &[i32]| -> io::Result<UnixStream> {
            let (read, write) = UnixStream::pair()?;
            read.set_nonblocking(true)?;
            for signal in signals {
                signal_hook::low_level::pipe::register(*signal, write.try_clone()?)?;
            }
            Ok(read)
        };
        // By default each of them ends the process, and with it all VMs.
        let named = [
            SIGHUP,
            SIGQUIT,
            SIGUSR1,
            SIGUSR2,
            SIGALRM,
            SIGVTALRM,
            SIGPROF,
            SIGIO,
            SIGXCPU,
            SIGXFSZ,
            libc::SIGPWR,
            libc::SIGSTKFLT,
        ];
        let ignored = named.into_iter().chain(libc::SIGRTMIN()..=libc::SIGRTMAX());
        let ignored: Vec<i32> = ignored.filter(|signal| !end.contains(signal)).collect();
        Ok(Self {
            children: pipe(&[SIGCHLD]).map_err(HostError::Loop)?,
            end: pipe(end).map_err(HostError::Loop)?,
            ignored: pipe(&ignored).map_err(HostError::Loop)?,
            left: None,
            clients: None,
            unopened: None,
            port: None,
            stops: Stops::default(),
            watchers: Watchers::default(),
            waits: Waits::default(),
            rehearsals: Rehearsals::default(),
        })
    }

    /// Ends the host when the other end of `left` is closed: the user at the terminal has left.
    pub(super) fn end_with(&mut self, left: UnixStream) {
        self.left = Some(left);
    }

    /// Opens the socket and the control port of the configuration.
    pub(super) fn listen(&mut self, section: &HostSection) -> Result<(), HostError> {
        if let Some(name) = &section.control_port {
            self.port = Some(Port::open(name));
        }
        if let Some(path) = &section.socket {
            match Clients::listen(path) {
                Ok(clients) => self.clients = Some(clients),
                Err(error) => {
                    self.unopened.get_or_insert((path.clone(), Instant::now() + SOCKET_PAUSE));
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Tries again to open the socket of a host that goes on without clients: what it failed for, such as too few file
    /// descriptors, may have come back, and nobody can do anything with a host that cannot be asked.
    fn listen_again(&mut self) {
        let Some((path, due)) = &mut self.unopened else { return };
        if self.clients.is_none() {
            if Instant::now() < *due {
                return;
            }
            let Ok(clients) = Clients::listen(path) else {
                *due = Instant::now() + SOCKET_PAUSE;
                return;
            };
            tracing::info!("the socket {} is open after all", path.display());
            self.clients = Some(clients);
        }
        self.unopened = None;
    }

    /// Serves until `power-off`, SIGTERM or SIGINT, and then until all VMs have ended.
    pub(super) fn run(&mut self, host: &mut Host) -> Result<(), HostError> {
        let status = host.status();
        let summary = summary(&status);
        tracing::info!("ready: {summary}");
        service::ready(&summary);
        self.tell_port(&Line::ready(&status));
        let mut failing = false;
        loop {
            self.listen_again();
            match self.wait(host) {
                Ok(ready) => {
                    failing = false;
                    ready.into_iter().for_each(|source| self.handle(source, host));
                }
                // What poll(2) failed for, such as memory, may come back. The host must not end for it, because
                // its VMs would end too.
                Err(errno) => {
                    if !std::mem::replace(&mut failing, true) {
                        tracing::error!("the host cannot wait for its clients and VMs: {errno}");
                    }
                    thread::sleep(RETRY_PAUSE);
                }
            }
            if !self.stops.host_ends() {
                host.go_on_with_late();
                host.boot_due();
            }
            self.go_on_with_rehearsal(host);
            let replies = [self.stops.round(host), self.waits.round(host)];
            for (whom, line) in replies.into_iter().flatten() {
                self.tell(whom, &line);
            }
            for event in self.watchers.changes(host) {
                self.tell_watchers(&Line::Event(event));
            }
            if self.stops.has_ended(host) || host.has_nothing_left() {
                return Ok(());
            }
            self.sweep();
        }
    }

    /// Waits until at least one source is ready. Returns the sources that are ready.
    fn wait(&self, host: &Host) -> rustix::io::Result<Vec<Source>> {
        let mut sources = vec![Source::Children, Source::End, Source::Ignored];
        let signals = [&self.children, &self.end, &self.ignored];
        let mut fds = signals.map(|pipe| PollFd::new(pipe, PollFlags::IN)).to_vec();
        if let Some(left) = &self.left {
            sources.push(Source::Left);
            fds.push(PollFd::new(left, PollFlags::IN));
        }
        let is_waiting = |number| self.waits(Whom::Client(number));
        if let Some(listener) = self.clients.as_ref().and_then(|c| c.listener(is_waiting)) {
            sources.push(Source::Listener);
            fds.push(PollFd::from_borrowed_fd(listener, PollFlags::IN));
        }
        if let Some((port, interest)) = self.port.as_ref().and_then(Port::interest) {
            sources.push(Source::Port);
            fds.push(PollFd::from_borrowed_fd(port, interest));
        }
        for client in self.clients() {
            sources.push(Source::Client(client.number));
            fds.push(PollFd::new(&client.lines, client.interest()));
        }
        for (index, vm) in host.vms.iter().enumerate() {
            if let Life::Live(live) = &vm.life {
                sources.push(Source::Vm(index));
                fds.push(PollFd::from_borrowed_fd(live.process.as_fd(), PollFlags::IN));
            }
            if let Some(booting) = vm.booting() {
                sources.push(Source::Booting);
                fds.push(PollFd::from_borrowed_fd(booting, PollFlags::IN));
            }
        }
        for fd in host.rehearsal.iter().flat_map(Rehearsal::fds) {
            sources.push(Source::Rehearsal);
            fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
        }
        for late in &host.late {
            sources.push(Source::Late);
            fds.push(PollFd::from_borrowed_fd(late.as_fd(), PollFlags::IN));
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
            if heard && !ready.contains(&Source::Vm(index)) {
                ready.push(Source::Vm(index));
            }
        }
        for client in self.clients().filter(|client| client.has_lines()) {
            if !ready.contains(&Source::Client(client.number)) {
                ready.push(Source::Client(client.number));
            }
        }
        if self.port.as_ref().is_some_and(Port::is_due) && !ready.contains(&Source::Port) {
            ready.push(Source::Port);
        }
        Ok(ready)
    }

    /// Returns how long to wait at most. `None`: until a source is ready.
    fn timeout(&self, host: &Host) -> Option<Duration> {
        let heard = |life: &Life| matches!(life, Life::Live(live) if live.process.has_events());
        let heard = host.vms.iter().any(|vm| heard(&vm.life));
        let heard = heard || self.clients().any(Client::has_lines);
        let heard = heard.then_some(Duration::ZERO);
        let paused = self.clients.as_ref().and_then(Clients::paused_for);
        let boot = host.next_boot().filter(|_| !self.stops.host_ends());
        let rehearsal = host.rehearsal.as_ref().map(Rehearsal::deadline);
        let socket = self.unopened.as_ref().map(|(_, due)| *due);
        let waits = self.waits.deadline(host);
        let port = self.port.as_ref().and_then(Port::due);
        let due = [host.stop_deadline(), waits, boot, host.late_until(), rehearsal, socket, port]
            .into_iter()
            .flatten()
            .min();
        let due = due.map(|at| at.saturating_duration_since(Instant::now()));
        [heard, due, paused].into_iter().flatten().min()
    }

    fn handle(&mut self, source: Source, host: &mut Host) {
        match source {
            Source::Children => reap(&self.children, host),
            Source::End => self.end(host),
            Source::Ignored => {
                drain(&self.ignored);
                tracing::warn!(
                    "got a signal that does nothing here: SIGTERM ends the host and its VMs"
                );
            }
            Source::Left => {
                tracing::info!("stopping: the user has left");
                self.stops.end_host(host, None, 0);
            }
            Source::Listener => {
                let Self { clients, stops, waits: waiting, watchers, rehearsals, .. } = self;
                let is_waiting =
                    |number| waits(stops, waiting, watchers, rehearsals, Whom::Client(number));
                clients.iter_mut().for_each(|clients| clients.accept(is_waiting));
            }
            Source::Port => self.serve_port(host),
            Source::Client(number) => self.serve_client(number, host),
            Source::Vm(index) => handle_events(host, index),
            // After all others, in each round.
            Source::Booting | Source::Late | Source::Rehearsal => {}
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
        self.observed(Whom::Port, Transaction::ServiceStop, |observer| {
            host.leave_to_service(observer);
        });
        self.stops.end_host(host, None, within_s);
    }

    fn clients(&self) -> impl Iterator<Item = &Client> {
        self.clients.iter().flat_map(|clients| &clients.all)
    }

    fn client(&mut self, number: u64) -> Option<&mut Client> {
        let mut all = self.clients.iter_mut().flat_map(|clients| &mut clients.all);
        all.find(|client| client.number == number)
    }

    fn serve_port(&mut self, host: &mut Host) {
        if self.port.as_mut().is_some_and(Port::open_again) {
            self.tell_port(&Line::ready(&host.status()));
        }
        let lines = self.port.as_mut().map(Port::read);
        self.answer_all(lines.unwrap_or_default(), host, Whom::Port);
    }

    fn serve_client(&mut self, number: u64, host: &mut Host) {
        let Some(client) = self.client(number) else { return };
        client.hear();
        match client.lines.flush().and_then(|()| client.lines.read()) {
            Ok(lines) => self.answer_all(lines, host, Whom::Client(number)),
            Err(StreamError::Closed) => client.end(),
            Err(error) => {
                let told = Line::Error { id: 0, error: chain(&error), outcome: None };
                client.lines.send(&told.text());
                client.lines.close();
            }
        }
    }

    /// Sends a line to a client, if it is still there.
    fn tell(&mut self, whom: Whom, line: &Line) {
        match whom {
            Whom::Port => self.tell_port(line),
            Whom::Client(number) => {
                if let Some(client) = self.client(number) {
                    client.lines.send(&line.text());
                }
            }
        }
    }

    fn tell_port(&mut self, line: &Line) {
        if let Some(port) = &mut self.port {
            port.send(line);
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
            if let Whom::Client(number) = whom
                && self.client(number).is_none_or(|client| client.has_left())
            {
                let what: String = line.chars().take(80).collect();
                tracing::warn!("not carried out, because its client has left: {what}");
                continue;
            }
            let id = call.id;
            let line = match self.carry_out(call, host, whom) {
                // The reply comes when what was asked for has ended.
                Ok(None) => continue,
                Ok(Some(answer)) => Line::ok(id, &answer),
                Err(error) => refusal(id, &error),
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
            Command::Events => {
                let events = self.watchers.add(whom, host)?;
                self.tell(whom, &Line::ok(call.id, &Answer::Done {}));
                events.into_iter().for_each(|event| self.tell(whom, &Line::Event(event)));
                Ok(None)
            }
            Command::Status => {
                self.waits.status(host, (whom, call.id))?;
                Ok(None)
            }
            Command::ResizeDisk { vm, disk, size } => {
                self.waits.resize(host, (whom, call.id), (vm, disk), size)?;
                Ok(None)
            }
            Command::Boot { .. }
            | Command::Restore { .. }
            | Command::Recover(_)
            | Command::Rehearse(_)
                if self.stops.host_ends() =>
            {
                Err(HostError::Ending)
            }
            Command::Rehearse(update) => {
                let request = (whom, call.id);
                self.rehearse(host, Asked { request, call: update, updates: false, files: None })
            }
            Command::Update(_) | Command::Handover(_) | Command::Recover(_)
                if host.rehearsal.is_some() =>
            {
                Err(HostError::Rehearsing)
            }
            Command::Update(update) if host.rehearses(&update) => {
                let request = (whom, call.id);
                host.refuse_before_rehearsal(&update)?;
                self.rehearse(host, Asked { request, call: update, updates: true, files: None })
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
        // What keeps a guest must not fail because other VMs have all the files.
        let keeps_guests =
            matches!(command, Command::Restore { .. } | Command::Recover(_) | Command::Update(_));
        let _reserve = keeps_guests.then(open_files::use_reserve);
        match command {
            // Their answers come later.
            Command::Status
            | Command::Stop { .. }
            | Command::PowerOff { .. }
            | Command::ResizeDisk { .. }
            | Command::Rehearse(_)
            | Command::Events => {}
            Command::Report => {
                let report = host.report.clone().ok_or(HostError::NoReport)?;
                return Ok(Answer::Report(Box::new(report)));
            }
            Command::Boot { vm } => host.boot(&vm)?,
            Command::Pause { vm } => host.vm(&vm)?.pause()?,
            Command::Resume { vm } => host.vm(&vm)?.resume()?,
            Command::Link { vm, device, up } => host.vm(&vm)?.set_link(device.as_deref(), up)?,
            Command::Restore { vm, force } => host.restore(&vm, force)?,
            Command::Recover(RecoverCall { vm, with: None }) => {
                return Ok(Answer::Recovered { recovered: host.recover(vm)? });
            }
            Command::Recover(RecoverCall { vm: Some(vm), with: Some(With::Previous) }) => {
                host.recover_with_previous(&vm)?;
                return Ok(Answer::Recovered { recovered: vec![vm] });
            }
            Command::Recover(RecoverCall { vm: None, with: Some(With::Previous) }) => {
                tracing::info!("the handover to an earlier program begins");
                return self
                    .transact(whom, Transaction::Handover, |observer| host.hand_back(observer));
            }
            Command::Dump { vm, path: Some(path) } => host.vm(&vm)?.dump(&path)?,
            Command::Dump { vm, path: None } => {
                return Ok(Answer::Document { document: hex(&host.vm(&vm)?.state_document()?) });
            }
            Command::Memory { vm, address, bytes } => {
                return Ok(Answer::Memory { memory: hex(&host.vm(&vm)?.memory(address, bytes)?) });
            }
            Command::Preflight(call) => {
                let findings = host.preflight(&call)?;
                let forced = call.forced()?;
                let refused = !preflight::refusals(&findings, &forced).is_empty();
                return Ok(Answer::Findings { refused, findings });
            }
            Command::Update(call) if host.is_left_to_systemd(&call) => {
                host.update_through_systemd(call)?;
                let outcome = Outcome::Running;
                return Ok(Answer::LeftToSystemd { outcome, kexec: "asked of systemd" });
            }
            Command::Update(call) => {
                tracing::info!("live update {} begins", host.number + 1);
                return self
                    .transact(whom, Transaction::Update, |observer| host.update(call, observer));
            }
            Command::Handover(call) => {
                tracing::info!("the handover to another program begins");
                return self.transact(whom, Transaction::Handover, |observer| {
                    host.hand_over(call, observer)
                });
            }
        }
        Ok(Answer::Done {})
    }

    /// Performs a live update or a handover, and tells of its progress. Returns only if it did not take place.
    fn transact(
        &mut self,
        whom: Whom,
        transaction: Transaction,
        run: impl FnOnce(Observer<'_>) -> Result<Infallible, HostError>,
    ) -> Result<Answer, HostError> {
        let result = answer_unless_done(self.observed(whom, transaction, run));
        let (error, outcome) = match &result {
            Err(error) => (chain(error), error.outcome()),
            Ok(_) => {
                (vec!["it stopped before a step, as was asked".into()], Some(Outcome::Running))
            }
        };
        let undone = Event::Undone { time_ms: now_ms(), transaction, error, outcome };
        self.tell_watchers(&Line::Event(undone));
        result
    }

    /// Runs a transaction and tells of its progress, `whom` of the jump.
    fn observed<T>(
        &mut self,
        whom: Whom,
        transaction: Transaction,
        run: impl FnOnce(Observer<'_>) -> T,
    ) -> T {
        let _reserve = open_files::use_reserve();
        let server = RefCell::new(self);
        run(&|progress| server.borrow_mut().progresses(whom, transaction, progress))
    }

    /// Tells the clients that watch of the progress, and `whom` of the jump.
    fn progresses(&mut self, whom: Whom, transaction: Transaction, progress: Progress<'_>) {
        let Progress { step, vm } = progress;
        let vm = vm.cloned();
        let event = Event::Step { time_ms: now_ms(), transaction, step, vm };
        self.tell_watchers(&Line::Event(event));
        if step == Step::Jump {
            if !self.watchers.has(whom) {
                self.tell(whom, &Line::jumping());
            }
            self.tell_watchers(&Line::jumping());
        }
    }

    fn tell_watchers(&mut self, line: &Line) {
        for whom in self.watchers.all() {
            self.tell(whom, line);
        }
    }

    /// Whether a client waits for something that is still to come.
    fn waits(&self, whom: Whom) -> bool {
        waits(&self.stops, &self.waits, &self.watchers, &self.rehearsals, whom)
    }

    /// Forgets the clients that are gone.
    fn sweep(&mut self) {
        let Self { port, clients, stops, waits: waiting, watchers, rehearsals, .. } = self;
        if let Some(clients) = clients {
            let is_waiting =
                |number| waits(stops, waiting, watchers, rehearsals, Whom::Client(number));
            clients.sweep(is_waiting);
        }
        let is_there = |number| clients.iter().flat_map(|c| &c.all).any(|c| c.number == number);
        watchers.retain(|whom| match whom {
            Whom::Port => port.as_ref().is_some_and(|port| !port.has_left()),
            Whom::Client(number) => is_there(number),
        });
    }
}

fn waits(
    stops: &Stops<Whom>,
    waits: &Waits<Whom>,
    watchers: &Watchers<Whom>,
    rehearsals: &Rehearsals<Whom>,
    whom: Whom,
) -> bool {
    stops.is_waiting(whom)
        || waits.is_waiting(whom)
        || watchers.has(whom)
        || rehearsals.is_waiting(whom)
}

/// Logs why request `id` was not carried out, and returns the reply.
pub(super) fn refusal(id: u64, error: &HostError) -> Line {
    let why = chain(error);
    tracing::warn!("{}", why.join(": "));
    Line::Error { id, error: why, outcome: error.outcome() }
}

/// Returns the answer to a live update or a handover that did not take place. If it stopped before a step
/// as requested, that is a success.
fn answer_unless_done(result: Result<Infallible, HostError>) -> Result<Answer, HostError> {
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
    match live.process.events() {
        Ok(events) => events.into_iter().for_each(|event| host.on_event(index, Some(event))),
        // How it ended is known when it is reaped, unless that has taken place.
        Err(ProcessError::Link { source: LinkError::Closed, .. }) => host.on_event(index, None),
        Err(error) => {
            let why = chain(&error).join(": ");
            host.on_event(index, Some(crate::link::Event::Crashed(why)));
        }
    }
}

fn summary(status: &Status) -> String {
    let vms: Vec<String> =
        status.vms.iter().map(|vm| format!("{} {}", vm.name, vm.state)).collect();
    let vms = if vms.is_empty() { "no VMs".to_owned() } else { vms.join(", ") };
    format!("kernel {}, LUO {}, boot {}, {vms}", status.kernel, status.luo, status.boot)
}
