//! The next host program of a handover: checks it as far as is possible while the guests run, executes
//! it in this process, and, in the new program, takes over what the old one left.
//!
//! The kernel stays the same. A keeper holds the sessions as open fds, which the next program inherits
//! across the exec and finds by their numbers. With a pool, the next program needs only the ticket.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use luo::builtin::keeper::Handover;
use luo::{Ticket, TicketError};
use rustix::fs::{Access, access};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitOptions, kill_process, pidfd_open, wait,
    waitid, waitpid,
};

use super::breakpoint;
use super::manifest::{CARRIES_ON, TAKES_SIGNALS, refused_config};
use super::programs::own_version;
use crate::answer::{Answer, Output, ends_within, named};
use crate::devices::files::open_at_once;
use crate::guests::memfd::document_memfd;
use crate::open_files::Count;
use crate::signals::Blocked;
use crate::{inherited_fd, look, open_files, work};

/// The environment variable with which a host passes on what it leaves to the next host in the same
/// process: the fd numbers of the keeper's tree and of the preserved files, in this order (`7,8,9`), or
/// the ticket for the sessions in a pool (`ticket=...`).
pub const HANDOVER_VARIABLE: &str = "PERENNIAL_HANDOVER";
/// The environment variable with the number of the fd that has the machine's lock on hosts.
const LOCK_VARIABLE: &str = "PERENNIAL_LOCK";
/// The environment variable with the process IDs of the old VMs' processes: `21,22`.
const PROCESSES_VARIABLE: &str = "PERENNIAL_OLD_VMS";
/// Prefix of a ticket in the variable, which distinguishes it from fds.
const TICKET: &str = "ticket=";

/// How long the next program may take to answer. Most of its answers are needed in the blackout.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// How long a handover waits, while the guests run, for what threads of this host do.
const UNENDED_WITHIN: Duration = Duration::from_secs(10);
/// Files that the next host must be able to open beside those that it gets, so that it comes as far as to hold its VMs.
pub const STARTS_WITH: u64 = 16;
/// The same of a program that does not say that it takes signals: such a one opens a file for each signal.
const EARLIER_STARTS_WITH: u64 = 64;
/// Files of the next host beside those of sessions and those that it inherits anyway: the lock, and the keeper's tree.
const PASSED: u64 = 2;
/// Files that this host has open, until the exec, for a document that it preserves: the document, LUO's copy of the fd, and
/// what LUO passes on.
const OF_A_DOCUMENT: u64 = 3;
/// Files that this host opens beside those of sessions: the keeper's tree, and for a moment those for asking the next program.
const LEAVES_WITH: u64 = 8;
/// Files that the next host opens for each VM beside its RAM: the link, the process, and both ends of what stands for the
/// session.
pub(super) const OF_A_VM: u64 = 4;
/// How long the processes of the last host's VMs may take to end.
const GONE_WITHIN: Duration = Duration::from_secs(10);

/// The next program cannot take over.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NextHostError {
    /// The program cannot be opened or started.
    #[error("cannot {attempt} {}", path.display())]
    Program {
        /// The step that failed.
        attempt: &'static str,
        /// The program.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is some other program.
    #[error(
        "{} is not a `perennial` program: `--version` answered {said:?}. Give the path of one",
        path.display()
    )]
    Stranger {
        /// The program.
        path: PathBuf,
        /// The first line of its output.
        said: String,
    },
    /// The program cannot read a document that it would have to restore from.
    #[error(
        "{} cannot take over: {said}. Hand over to a `perennial` that is not older than this one ({})",
        path.display(),
        own_version()
    )]
    Rehearsal {
        /// The program.
        path: PathBuf,
        /// Its output.
        said: String,
    },
    /// The program can use none of the configurations that it would find.
    #[error(
        "{} cannot use {}. The VMs that run would come over, but of VMs whose sections it refuses, those that are stopped \
         and the restart policies and priorities would be lost: mend the configuration file, or hand over to another \
         `perennial`",
        path.display(),
        refused.join(", nor ")
    )]
    Configuration {
        /// The program.
        path: PathBuf,
        /// The configurations, each with what is wrong with it.
        refused: Vec<String>,
    },
    /// The program would refuse all VMs, because it finds sessions that are no VM's.
    #[error(
        "{} ({version}) cannot take over from perennial {}: it is too old to carry on sessions that it does not know, \
         and would lose all VMs. Hand over to a `perennial` that is not older than this one",
        path.display(),
        own_version()
    )]
    Older {
        /// The program.
        path: PathBuf,
        /// What it answered to `--version`.
        version: String,
    },
    /// The program did not answer in time.
    #[error("{} did not answer within {:.1} s, and was ended", path.display(), within.as_secs_f32())]
    Silent {
        /// The program.
        path: PathBuf,
        /// How long it was waited for.
        within: Duration,
    },
    /// This host has got a signal that ends it, after it was asked for the next one.
    #[error(
        "this host was told to end meanwhile (SIGTERM or SIGINT), and the next one would not know that. Ask the host that \
         is started next"
    )]
    Ending,
    /// The VMs could not be handed over, or taken over, for lack of files.
    #[error(
        "the handover needs {needed} open files at a time, and this process may have {limit}, which the next host \
         inherits: raise the limit (LimitNOFILE= of the service, or `prlimit --nofile`), or stop a VM"
    )]
    Files {
        /// How many files it needs.
        needed: u64,
        /// How many this process may have.
        limit: u64,
    },
    /// This process cannot find out how many files it has open.
    #[error("cannot count the open files of this host")]
    CountFiles(#[source] io::Error),
    /// Threads of this host do what no signal ends.
    #[error(
        "this host is still {}. Its program cannot be replaced before that has ended, and all guests would \
         stand still until then. Repair what it waits for, such as a disk or a server that does not answer \
         (`umount -f` ends the wait for an NFS server), and try again. An `update` does not wait for it",
        work.join(" and ")
    )]
    Unended {
        /// What they do.
        work: Vec<String>,
    },
}

/// Whether this process has got a signal that ends it.
static IS_TOLD_TO_END: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// Refuses from the first of these `signals` on what would replace this process: the next host would not know of it.
pub fn heed(signals: &[i32]) -> io::Result<()> {
    let heed = |signal: &i32| signal_hook::flag::register(*signal, IS_TOLD_TO_END.clone());
    signals.iter().try_for_each(|signal| heed(signal).map(drop))
}

/// Errors if this process has got a signal that ends it.
pub fn refuse_if_told_to_end() -> Result<(), NextHostError> {
    match IS_TOLD_TO_END.load(Ordering::Relaxed) {
        true => Err(NextHostError::Ending),
        false => Ok(()),
    }
}

/// Errors if this process cannot be replaced soon, because the work of its threads does not end. Waits for it.
pub fn refuse_unended_work() -> Result<(), NextHostError> {
    ends_work(UNENDED_WITHIN)
}

fn ends_work(within: Duration) -> Result<(), NextHostError> {
    let work = work::unended(within);
    if work.is_empty() { Ok(()) } else { Err(NextHostError::Unended { work }) }
}

/// The path that this program was started from cannot be found out.
#[derive(Debug, thiserror::Error)]
#[error("cannot find this host's own program: name the next one with the command")]
pub struct OwnProgramError(#[source] io::Error);

/// Start of the name of a program that runs from a memfd, in place of its path.
const IN_MEMORY: &[u8] = b"/memfd:";

/// Returns the path that this program was started from. After a package upgrade, the file at this path
/// is the next version.
pub fn own_program() -> Result<PathBuf, OwnProgramError> {
    let path = std::env::current_exe().map_err(OwnProgramError)?.into_os_string().into_vec();
    let path = path.strip_suffix(b" (deleted)").unwrap_or(&path).to_vec();
    if path.starts_with(IN_MEMORY) {
        let why = "it travelled with earlier hosts and has no path";
        return Err(OwnProgramError(io::Error::other(why)));
    }
    Ok(OsString::from_vec(path).into())
}

/// What goes to the next program besides the sessions.
#[derive(Debug, Clone, Copy)]
pub struct Passed<'a> {
    /// The machine's lock on hosts.
    pub lock: Option<BorrowedFd<'a>>,
    /// The processes of the VMs, which the next program ends.
    pub processes: &'a [Pid],
}

/// The files of a handover, before a guest is paused.
#[derive(Debug, Clone, Copy)]
pub struct HandoverFiles {
    /// Files that are preserved: RAM, programs, and all of the VMs that stay preserved.
    pub preserved: u64,
    /// Documents that will be preserved.
    pub documents: u64,
    /// Whether this process passes on what is preserved. Otherwise the next host opens it.
    pub has_keeper: bool,
    /// Files that the next host opens beside those to run the VMs, until it has finished the sessions.
    pub of_vms: u64,
}

impl HandoverFiles {
    /// How many this process has open at a time until the exec, if it has so many now. The exec closes most of them, but they
    /// are in the way until then.
    fn here(&self, open: u64) -> u64 {
        let passed_on = if self.has_keeper { self.preserved } else { 0 };
        open + passed_on + OF_A_DOCUMENT * self.documents + LEAVES_WITH
    }

    /// How many the next host has open at a time, which inherits so many others and needs so many to start.
    fn there(&self, inherited: u64, starts_with: u64) -> u64 {
        inherited + PASSED + self.preserved + self.documents + self.of_vms + starts_with
    }
}

/// A program that will be executed in this process. It is kept as an open file, so that a later change of
/// the path has no effect.
#[derive(Debug, Clone)]
pub struct NextHost {
    program: Arc<File>,
    /// Its path, or what it is if it has none.
    path: PathBuf,
    /// When it must have answered everything. `None`: each answer may take [`ANSWER_WITHIN`].
    deadline: Option<Instant>,
    /// Whether it takes signals that are blocked when it is executed, as it has said in the rehearsal.
    takes_signals: bool,
}

impl NextHost {
    /// Opens a program and checks that it is a `perennial` program.
    pub fn open(path: &Path) -> Result<Self, NextHostError> {
        let error = |attempt| {
            move |source| NextHostError::Program { attempt, path: path.to_owned(), source }
        };
        look::check_answers(path).map_err(error("open"))?;
        let program = open_at_once(path, File::options().read(true)).map_err(error("open"))?;
        access(path, Access::EXEC_OK).map_err(|e| error("execute")(e.into()))?;
        Self::of(program, path.to_owned(), None)
    }

    /// Checks that an open file is a `perennial` program. `what` is its path, or what it is if it has none. All its answers
    /// must come until `deadline`, if there is one, or until it is [chosen](Self::chosen).
    pub fn of(
        program: File,
        what: PathBuf,
        deadline: Option<Instant>,
    ) -> Result<Self, NextHostError> {
        let next = Self { program: Arc::new(program), path: what, deadline, takes_signals: false };
        let Answer { said, .. } = next.ask(&["--version".into()])?;
        match said.starts_with("perennial ") {
            true => Ok(next),
            false => {
                let said = said.lines().next().unwrap_or_default().to_owned();
                Err(NextHostError::Stranger { path: next.path, said })
            }
        }
    }

    /// Lets the program decode each document, while the handover can still be undone. `documents` are
    /// names for error texts and fds.
    pub fn rehearse(
        &mut self,
        documents: &[(String, BorrowedFd<'_>)],
    ) -> Result<(), NextHostError> {
        self.takes_signals = self.decode(documents)?.contains(TAKES_SIGNALS);
        Ok(())
    }

    /// Errors if the program would not take over the VMs of `manifest`, a draft of the one that it would get: it must read
    /// the manifest, and accept sessions that it does not know, which this host leaves as well.
    pub fn would_take_over(&mut self, manifest: BorrowedFd<'_>) -> Result<(), NextHostError> {
        let said = self.decode(&[("the manifest".to_owned(), manifest)])?;
        self.takes_signals = said.contains(TAKES_SIGNALS);
        if said.contains(CARRIES_ON) || self.link_protocol()?.is_some() {
            return Ok(());
        }
        let version = self.ask(&["--version".into()])?.said;
        Err(NextHostError::Older { path: self.path.clone(), version })
    }

    /// Errors if this process could not open what the rest of the handover needs, or the next host what it needs to run the
    /// VMs. That one has the limit of this process, and starts with those files only that stay open over the exec.
    pub fn refuse_too_few_files(&self, files: &HandoverFiles) -> Result<(), NextHostError> {
        self.too_few_files(files, open_files::count().map_err(NextHostError::CountFiles)?)
    }

    fn too_few_files(&self, files: &HandoverFiles, count: Count) -> Result<(), NextHostError> {
        let Count { open, inherited, limit } = count;
        let starts_with = if self.takes_signals { STARTS_WITH } else { EARLIER_STARTS_WITH };
        let needed = files.here(open).max(files.there(inherited, starts_with));
        match limit.filter(|limit| needed > *limit) {
            Some(limit) => Err(NextHostError::Files { needed, limit }),
            None => Ok(()),
        }
    }

    /// Errors if the program can use none of these configurations, each in a manifest of its own. The names are for the error
    /// text.
    pub fn can_use_one_of(
        &self,
        configs: &[(String, BorrowedFd<'_>)],
    ) -> Result<(), NextHostError> {
        let said = match self.decode(configs) {
            // It cannot read any manifest. Whether one is needed is checked with the VMs.
            Err(NextHostError::Rehearsal { .. }) => return Ok(()),
            said => said?,
        };
        let why =
            |(name, _): &(String, _)| Some(format!("{name} ({})", refused_config(&said, name)?));
        match configs.iter().map(why).collect::<Option<Vec<_>>>() {
            Some(refused) if !refused.is_empty() => {
                Err(NextHostError::Configuration { path: self.path.clone(), refused })
            }
            _ => Ok(()),
        }
    }

    /// Lets the program decode each document. Returns its output, with the names of the documents.
    fn decode(&self, documents: &[(String, BorrowedFd<'_>)]) -> Result<String, NextHostError> {
        let own = std::process::id();
        let path = |fd: BorrowedFd<'_>| format!("/proc/{own}/fd/{}", fd.as_raw_fd());
        let mut arguments: Vec<OsString> = vec!["state".into(), "check".into()];
        arguments.extend(documents.iter().map(|(_, fd)| path(*fd).into()));
        let Answer { is_good, said } = self.ask(&arguments)?;
        let files = documents.iter().map(|(name, fd)| (path(*fd), name.as_str())).collect();
        let said = named(&said, files);
        match is_good {
            true => Ok(said),
            false => Err(NextHostError::Rehearsal { path: self.path.clone(), said }),
        }
    }

    /// The program was examined, and each further answer may take [`ANSWER_WITHIN`].
    pub fn chosen(self) -> Self {
        Self { deadline: None, ..self }
    }

    /// From now on, all answers must come `within` this time: guests stand still until then.
    pub fn hurry(&mut self, within: Duration) {
        self.deadline = Some(Instant::now() + within.min(ANSWER_WITHIN));
    }

    /// The program's path, or what it is if it has none.
    pub fn describe(&self) -> String {
        self.path.display().to_string()
    }

    /// The program, to be executed.
    pub fn executable(&self) -> BorrowedFd<'_> {
        self.program.as_fd()
    }

    /// Returns the number of the protocol that the program's VM processes speak with their host. `None` if it does
    /// not say.
    pub fn link_protocol(&self) -> Result<Option<u32>, NextHostError> {
        let Answer { is_good, said } = self.ask(&["vmm".into(), "--protocol".into()])?;
        Ok(said.parse().ok().filter(|_| is_good))
    }

    /// Executes the program in this process, and passes `left` and what is `passed` on to it. Returns only on an
    /// error; the VMs are unchanged then.
    pub fn enter(&self, left: Inherited, passed: Passed<'_>) -> NextHostError {
        let Handover { tree, mut fds } = match left {
            Inherited::InPool(ticket) => return self.exec(&format!("{TICKET}{ticket}"), passed),
            Inherited::Kept(handover) => handover,
        };
        match self.write_tree(&tree) {
            Ok(file) => fds.insert(0, file.into()),
            Err(error) => return error,
        }
        for fd in &fds {
            if let Err(errno) = fcntl_setfd(fd, FdFlags::empty()) {
                return self.error("leave an fd for", errno.into());
            }
        }
        let numbers: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd().to_string()).collect();
        self.exec(&numbers.join(","), passed)
    }

    /// Writes the keeper's tree to a memfd, and checks that the program can read it.
    fn write_tree(&self, tree: &[u8]) -> Result<File, NextHostError> {
        let file = document_memfd("tree", tree);
        let file = file.map_err(|source| self.error("write a tree for", source))?;
        let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        match self.ask(&["luo".into(), "show".into(), path.into()])? {
            Answer { is_good: true, .. } => Ok(file),
            Answer { is_good: false, said } => {
                Err(NextHostError::Rehearsal { path: self.path.clone(), said })
            }
        }
    }

    fn exec(&self, left: &str, passed: Passed<'_>) -> NextHostError {
        // An earlier program would never get the signals.
        let blocked = match self.takes_signals {
            true => Blocked::new().map(Some),
            false => Ok(None),
        };
        let _blocked = match blocked {
            Ok(blocked) => blocked,
            Err(error) => return self.error("block signals for", error),
        };
        // The exec would wait for it as well, but without a bound.
        if let Err(error) = ends_work(self.left()).and_then(|()| refuse_if_told_to_end()) {
            return error;
        }
        let Passed { lock, processes } = passed;
        let processes: Vec<_> = processes.iter().map(|pid| pid.as_raw_pid().to_string()).collect();
        let mut arguments = std::env::args_os();
        let name = arguments.next().unwrap_or_else(|| "perennial".into());
        let mut command = self.command();
        for variable in luo::systemd::PASSED {
            command.env_remove(variable);
        }
        if let Some(lock) = lock {
            if let Err(errno) = fcntl_setfd(lock, FdFlags::empty()) {
                return self.error("leave the machine's lock for", errno.into());
            }
            command.env(LOCK_VARIABLE, lock.as_raw_fd().to_string());
        }
        command.env(HANDOVER_VARIABLE, left).env(PROCESSES_VARIABLE, processes.join(","));
        breakpoint::reach("exec", None);
        let error = command.arg0(name).args(arguments).exec();
        if let Some(lock) = lock {
            // This host goes on. A program that it starts must not have the lock.
            let _ = fcntl_setfd(lock, FdFlags::CLOEXEC);
        }
        self.error("execute", error)
    }

    fn command(&self) -> Command {
        Command::new(format!("/proc/self/fd/{}", self.program.as_raw_fd()))
    }

    /// Runs the program with `arguments`. Kills it and errors if that takes too long.
    fn ask(&self, arguments: &[OsString]) -> Result<Answer, NextHostError> {
        let error = |source| self.error("execute", source);
        let output = Output::new().map_err(error)?;
        let writer = || output.writer().map(Stdio::from).map_err(error);
        let mut command = self.command();
        command
            .args(arguments)
            .env_remove(HANDOVER_VARIABLE)
            .env_remove(LOCK_VARIABLE)
            .env_remove(PROCESSES_VARIABLE)
            .stdin(Stdio::null())
            .stdout(writer()?)
            .stderr(writer()?);
        let within = self.left();
        // Each argument may be a file.
        let answer = output.answer_of(&mut command, within, arguments.len()).map_err(error)?;
        answer.ok_or_else(|| NextHostError::Silent { path: self.path.clone(), within })
    }

    /// How long the next answer may take.
    fn left(&self) -> Duration {
        let left = |deadline: Instant| deadline.saturating_duration_since(Instant::now());
        self.deadline.map_or(ANSWER_WITHIN, left)
    }

    fn error(&self, attempt: &'static str, source: io::Error) -> NextHostError {
        NextHostError::Program { attempt, path: self.path.clone(), source }
    }
}

/// What a host leaves to the next one in its process.
#[derive(Debug)]
pub enum Inherited {
    /// The keeper's tree and all preserved files.
    Kept(Handover),
    /// The ticket for the sessions in the pool.
    InPool(Ticket),
}

/// What the last host in this process left cannot be taken over.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InheritError {
    /// The variable is not a list of open, inherited fds.
    #[error(
        "{HANDOVER_VARIABLE}={text:?} in the environment is not a list of fds that a host left open"
    )]
    Variable {
        /// The variable's value.
        text: String,
    },
    /// The variable's value is not a ticket.
    #[error("{HANDOVER_VARIABLE} in the environment is not a valid ticket")]
    Ticket(#[source] TicketError),
    /// The keeper's tree cannot be read.
    #[error("cannot read the tree of sessions that the last host left")]
    Tree(#[source] io::Error),
}

/// All that the last host in this process left.
#[derive(Debug)]
pub struct Left {
    /// The VMs' sessions.
    pub sessions: Result<Inherited, InheritError>,
    /// The machine's lock on hosts, unless that host had none.
    pub lock: Option<OwnedFd>,
}

/// Takes over what the last host in this process left; `None` if there was no host. Must be called once,
/// before this process opens any file.
pub fn inherit() -> Option<Left> {
    let sessions = inherit_sessions()?;
    let lock = std::env::var(LOCK_VARIABLE).ok().and_then(|number| take_fd(&number));
    Some(Left { sessions, lock })
}

fn inherit_sessions() -> Option<Result<Inherited, InheritError>> {
    let text = std::env::var_os(HANDOVER_VARIABLE)?.to_string_lossy().into_owned();
    if let Some(ticket) = text.strip_prefix(TICKET) {
        return Some(ticket.parse().map(Inherited::InPool).map_err(InheritError::Ticket));
    }
    let fds = text.split(',').map(take_fd).collect();
    let Some::<Vec<OwnedFd>>(mut fds) = fds else {
        return Some(Err(InheritError::Variable { text }));
    };
    let mut tree = Vec::new();
    let read = File::from(fds.remove(0)).read_to_end(&mut tree);
    Some(match read {
        Ok(_) => Ok(Inherited::Kept(Handover { tree, fds })),
        Err(error) => Err(InheritError::Tree(error)),
    })
}

fn take_fd(number: &str) -> Option<OwnedFd> {
    inherited_fd::take(number.parse().ok()?).ok()
}

/// Ends the processes of the last host's VMs, and waits until their disks and ports are free for the next
/// processes. The exec closed their links, so they end by themselves, unless a guest has taken one over.
/// They are still children of this process. Waits for no other child: PID 1 has orphans of other programs.
pub fn end_old_vm_processes() {
    let old = std::env::var(PROCESSES_VARIABLE).unwrap_or_default();
    let old: Vec<Pid> = old.split(',').filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect();
    if !end(&old, Instant::now() + GONE_WITHIN) {
        tracing::error!(
            "processes of the last host's VMs do not end: they may keep disks and ports busy"
        );
    }
    // Other children that ended before this program could notice.
    while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
}

/// Kills these children and waits until `deadline` for the end of each. Returns whether all have ended.
fn end(children: &[Pid], deadline: Instant) -> bool {
    // A child that has ended keeps its ID until it is waited for, so the ID is not another process's.
    let mine = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    let mine: Vec<Pid> =
        children.iter().copied().filter(|pid| waitid(WaitId::Pid(*pid), mine).is_ok()).collect();
    for pid in &mine {
        let _ = kill_process(*pid, Signal::KILL);
    }
    let has_ended = |pid: &Pid| {
        let pidfd = pidfd_open(*pid, PidfdFlags::empty())?;
        let ended = ends_within(pidfd, deadline.saturating_duration_since(Instant::now()))?;
        let _ = waitpid(Some(*pid), WaitOptions::NOHANG);
        Ok::<_, io::Error>(ended)
    };
    // Of each, so that all that have ended are reaped.
    mine.iter().filter(|pid| !has_ended(pid).unwrap_or(false)).count() == 0
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;
    use crate::signals;

    #[test]
    fn a_program_that_hangs_in_the_blackout_is_ended_when_the_budget_is_used_up() {
        let sleep = || Arc::new(File::open("/bin/sleep").unwrap());
        let (program, path) = (sleep(), "/bin/sleep".into());
        let mut next = NextHost { program, path, deadline: None, takes_signals: false };
        next.hurry(Duration::from_millis(200));
        for within in ["0.2 s", "0.0 s"] {
            let error = next.ask(&["1000".into()]).unwrap_err().to_string();
            assert!(error.contains("did not answer") && error.contains(within), "{error}");
        }
    }

    #[test]
    fn a_handover_needs_files_here_and_in_the_next_host() {
        let files = HandoverFiles { preserved: 100, documents: 10, has_keeper: true, of_vms: 120 };
        let in_pool = HandoverFiles { has_keeper: false, ..files };
        // Many open files, which the exec closes, are in the way of the handover, not of the next host.
        let (here, in_pool_here) = (900 + 100 + 3 * 10 + 8, 900 + 3 * 10 + 8);
        let there = |starts_with| 7 + 2 + 100 + 10 + 120 + starts_with;
        let (few, many) = (5, 900);
        for (takes_signals, open, files, needed) in [
            (true, many, files, here),
            (true, many, in_pool, in_pool_here),
            (true, few, files, there(STARTS_WITH)),
            (false, few, files, there(EARLIER_STARTS_WITH)),
            (false, few, in_pool, there(EARLIER_STARTS_WITH)),
        ] {
            let (program, path) = (Arc::new(File::open("/dev/null").unwrap()), "/dev/null".into());
            let next = NextHost { program, path, deadline: None, takes_signals };
            let look = |limit| next.too_few_files(&files, Count { open, inherited: 7, limit });
            look(None).unwrap();
            look(Some(needed)).unwrap();
            let error = look(Some(needed - 1)).unwrap_err().to_string();
            let numbers = [needed, needed - 1].map(|number| number.to_string());
            assert!(numbers.iter().all(|number| error.contains(number)), "{error}");
            assert!(error.contains("LimitNOFILE="), "{error}");
        }
    }

    #[test]
    fn files_that_the_exec_closes_are_open_and_not_inherited() {
        let Count { open, inherited, .. } = open_files::count().unwrap();
        let own: Vec<_> = (0..100).map(|_| File::open("/dev/null").unwrap()).collect();
        let now = open_files::count().unwrap();
        // Other tests open files as well, and few that stay open over an exec.
        assert!(now.open >= own.len() as u64 && open >= inherited);
        assert!(now.inherited < inherited + 50, "{} {inherited}", now.inherited);
    }

    #[test]
    fn nothing_is_executed_while_a_thread_is_stuck() {
        let work = work::Work::begins("looking at /gone".to_owned());
        let deadline = Some(Instant::now());
        let program = Arc::new(File::open("/dev/null").unwrap());
        let path = "/dev/null".into();
        let next = NextHost { program, path, deadline, takes_signals: true };
        let passed = Passed { lock: None, processes: &[] };
        let error = next.exec("", passed).to_string();
        assert!(error.contains("still") && error.contains("looking at /gone"), "{error}");
        drop(work);
        // Other tests have work as well.
        let error = next.exec("", passed).to_string();
        assert!(!error.contains("/gone"), "{error}");
        assert!(!signals::are_blocked(), "this host goes on");
    }

    #[test]
    fn a_program_that_is_a_fifo_is_refused_and_keeps_nobody_waiting() {
        use rustix::fs::{CWD, FileType, Mode, mknodat};
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("program");
        mknodat(CWD, &path, FileType::Fifo, Mode::RWXU, 0).unwrap();
        let said = crate::causes::chain(&NextHost::open(&path).unwrap_err()).join(": ");
        assert!(said.contains("/program: it is a FIFO"), "{said}");
    }

    #[test]
    fn only_the_processes_that_are_named_are_ended_and_waited_for() {
        let start = || Command::new("sleep").arg("1000").spawn().unwrap();
        let (old, ended, mut other) = (start(), start(), start());
        let (old, ended) = (Pid::from_child(&old), Pid::from_child(&ended));
        kill_process(ended, Signal::KILL).unwrap();
        // A wait for the other one would take this long.
        let deadline = Instant::now() + Duration::from_secs(1000);
        assert!(end(&[old, ended, rustix::process::getpid()], deadline));
        let again = waitpid(Some(old), WaitOptions::NOHANG);
        assert!(matches!(again, Err(Errno::CHILD)), "it is reaped");
        assert!(other.try_wait().unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
    }
}
