//! The next host program: everything that can be known about it before the guests are touched, the
//! exec that makes it this process, and what it finds there.
//!
//! The kernel stays, so nothing has to survive one: what a keeper holds are open files, which the
//! successor inherits by their numbers. A pool needs not even that.

#![expect(unsafe_code, reason = "an inherited fd is known by its number only")]

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use luo::builtin::keeper::Handover;
use luo::{Ticket, TicketError};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Access, access};
use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd};
use rustix::process::{Pid, PidfdFlags, WaitOptions, pidfd_open, wait};
use rustix::time::Timespec;

use crate::guests::memfd::document_memfd;

/// Tells a host that another one was in this process before it, and what that one left: the fds of the
/// keeper's tree and of the preserved files, in this order (`7,8,9`), or the ticket for what is in a
/// pool (`ticket=...`).
pub const VARIABLE: &str = "PERENNIAL_HANDOVER";
/// How a ticket is told from fds.
const TICKET: &str = "ticket=";

/// How long the next program may take to answer a question. It is asked while the guests stand still.
const ANSWER_WITHIN: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };
/// How long the last host's VM processes may take to be gone.
const GONE_WITHIN: Duration = Duration::from_secs(10);
/// Fds below this are nobody's to hand over.
const FIRST_FD: RawFd = 3;
/// Most of what a program said that an error repeats, in bytes.
const MOST_SAID: u64 = 4096;

/// The next program cannot take over.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NextHostError {
    /// It cannot be opened or started.
    #[error("cannot {attempt} {}", path.display())]
    Program {
        /// What was tried.
        attempt: &'static str,
        /// The program.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is another program.
    #[error(
        "{} is not a `perennial` program: `--version` answered {said:?}. Give the path of one",
        path.display()
    )]
    Stranger {
        /// The program.
        path: PathBuf,
        /// The first line of what it said.
        said: String,
    },
    /// It does not understand a document that it would have to go by.
    #[error("{} cannot take over: {said}", path.display())]
    Rehearsal {
        /// The program.
        path: PathBuf,
        /// What it said.
        said: String,
    },
    /// It did not answer.
    #[error("{} did not answer within {} s, and was ended", path.display(), ANSWER_WITHIN.tv_sec)]
    Silent {
        /// The program.
        path: PathBuf,
    },
}

/// What is now at the path that this program was started from cannot be told.
#[derive(Debug, thiserror::Error)]
#[error("cannot find this host's own program: name the next one with the command")]
pub struct OwnProgramError(#[source] io::Error);

/// What is now at the path that this program was started from: after a package was upgraded, the next
/// version.
pub fn own_program() -> Result<PathBuf, OwnProgramError> {
    let path = std::env::current_exe().map_err(OwnProgramError)?.into_os_string().into_vec();
    let path = path.strip_suffix(b" (deleted)").unwrap_or(&path).to_vec();
    Ok(OsString::from_vec(path).into())
}

/// A program that is to become this process. It is the file that was opened, whatever its name means
/// later.
#[derive(Debug)]
pub struct NextHost {
    program: File,
    path: PathBuf,
}

impl NextHost {
    /// Opens a program and makes sure that it is a perennial.
    pub fn open(path: &Path) -> Result<Self, NextHostError> {
        let error = |attempt| {
            move |source| NextHostError::Program { attempt, path: path.to_owned(), source }
        };
        let program = File::open(path).map_err(error("open"))?;
        access(path, Access::EXEC_OK).map_err(|e| error("execute")(e.into()))?;
        let next = Self { program, path: path.to_owned() };
        let (_, said) = next.ask(&["--version".into()])?;
        match said.starts_with("perennial ") {
            true => Ok(next),
            false => {
                let said = said.lines().next().unwrap_or_default().to_owned();
                Err(NextHostError::Stranger { path: next.path, said })
            }
        }
    }

    /// Has the program decode each document as it will have to, before there is no way back.
    pub fn rehearse(&self, documents: &[(String, BorrowedFd<'_>)]) -> Result<(), NextHostError> {
        let own = std::process::id();
        let path = |fd: BorrowedFd<'_>| format!("/proc/{own}/fd/{}", fd.as_raw_fd());
        let mut arguments: Vec<OsString> = vec!["state".into(), "check".into()];
        arguments.extend(documents.iter().map(|(_, fd)| path(*fd).into()));
        let (good, said) = self.ask(&arguments)?;
        if good {
            return Ok(());
        }
        let named = documents.iter().fold(said, |said, (name, fd)| said.replace(&path(*fd), name));
        Err(NextHostError::Rehearsal { path: self.path.clone(), said: named })
    }

    /// Becomes the program, and leaves it what it needs to find the VMs. Returns only if it does not,
    /// and then nothing has changed.
    pub fn enter(&self, left: Left) -> NextHostError {
        let Handover { tree, mut fds } = match left {
            Left::InPool(ticket) => return self.exec(&format!("{TICKET}{ticket}")),
            Left::Kept(handover) => handover,
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
        self.exec(&numbers.join(","))
    }

    /// The keeper's tree as a file that the program has been seen to understand.
    fn write_tree(&self, tree: &[u8]) -> Result<File, NextHostError> {
        let file = document_memfd("tree", tree);
        let file = file.map_err(|source| self.error("write a tree for", source))?;
        let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        match self.ask(&["luo".into(), "show".into(), path.into()])? {
            (true, _) => Ok(file),
            (false, said) => Err(NextHostError::Rehearsal { path: self.path.clone(), said }),
        }
    }

    fn exec(&self, left: &str) -> NextHostError {
        let mut arguments = std::env::args_os();
        let name = arguments.next().unwrap_or_else(|| "perennial".into());
        let mut command = self.command();
        for variable in luo::systemd::PASSED {
            command.env_remove(variable);
        }
        let error = command.arg0(name).args(arguments).env(VARIABLE, left).exec();
        self.error("execute", error)
    }

    fn command(&self) -> Command {
        Command::new(format!("/proc/self/fd/{}", self.program.as_raw_fd()))
    }

    /// Runs the program; whether it ended well, and the beginning of what it said.
    fn ask(&self, arguments: &[OsString]) -> Result<(bool, String), NextHostError> {
        let error = |source| self.error("execute", source);
        // Not a pipe: nothing that the program writes makes it wait for a reader.
        let mut said = document_memfd("said", &[]).map_err(error)?;
        let output = || said.try_clone().map(Stdio::from).map_err(error);
        let mut child = self
            .command()
            .args(arguments)
            .env_remove(VARIABLE)
            .stdin(Stdio::null())
            .stdout(output()?)
            .stderr(output()?)
            .spawn()
            .map_err(error)?;
        let ended = wait_for(&child).map_err(|errno| error(errno.into()));
        if !matches!(ended, Ok(true)) {
            let _ = child.kill();
        }
        let status = child.wait().map_err(error)?;
        if !ended? {
            return Err(NextHostError::Silent { path: self.path.clone() });
        }
        let mut text = Vec::new();
        said.rewind().and_then(|()| said.take(MOST_SAID).read_to_end(&mut text)).map_err(error)?;
        Ok((status.success(), String::from_utf8_lossy(&text).trim().to_owned()))
    }

    fn error(&self, attempt: &'static str, source: io::Error) -> NextHostError {
        NextHostError::Program { attempt, path: self.path.clone(), source }
    }
}

/// Whether a child ends in time.
fn wait_for(child: &Child) -> Result<bool, Errno> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let mut ended = [PollFd::new(&pidfd, PollFlags::IN)];
    Ok(rustix::io::retry_on_intr(|| poll(&mut ended, Some(&ANSWER_WITHIN)))? > 0)
}

/// What a host leaves to the next one in its process.
#[derive(Debug)]
pub enum Left {
    /// Everything.
    Kept(Handover),
    /// The ticket: all else is in the pool.
    InPool(Ticket),
}

/// What was left cannot be taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InheritError {
    /// The variable is not what a host writes.
    #[error("{VARIABLE}={text:?} in the environment: no list of fds that a host left here")]
    Variable {
        /// The variable.
        text: String,
    },
    /// The text is not a ticket.
    #[error("{VARIABLE} in the environment has no ticket that a host left here")]
    Ticket(#[source] TicketError),
    /// The keeper's tree cannot be read.
    #[error("cannot read what the last host kept")]
    Tree(#[source] io::Error),
}

/// Takes what the last host left in this process; `None` if there was none. To be called once, before
/// this process has opened any file.
pub fn inherit() -> Option<Result<Left, InheritError>> {
    let text = std::env::var_os(VARIABLE)?.to_string_lossy().into_owned();
    if let Some(ticket) = text.strip_prefix(TICKET) {
        return Some(ticket.parse().map(Left::InPool).map_err(InheritError::Ticket));
    }
    let fds = text.split(',').map(|number| take_fd(number.parse().ok()?)).collect();
    let Some::<Vec<OwnedFd>>(mut fds) = fds else {
        return Some(Err(InheritError::Variable { text }));
    };
    let mut tree = Vec::new();
    let read = File::from(fds.remove(0)).read_to_end(&mut tree);
    Some(match read {
        Ok(_) => Ok(Left::Kept(Handover { tree, fds })),
        Err(error) => Err(InheritError::Tree(error)),
    })
}

fn take_fd(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: borrowed only to ask whether it is open, which is defined for any number but -1.
    let borrowed = (number >= FIRST_FD).then(|| unsafe { BorrowedFd::borrow_raw(number) })?;
    // One that closes itself on exec was not left here: this process has opened it.
    if fcntl_getfd(borrowed).ok()? != FdFlags::empty() {
        return None;
    }
    fcntl_setfd(borrowed, FdFlags::CLOEXEC).ok()?;
    // SAFETY: it is open, and nothing in this process owns it: std opens no file that outlives an
    // exec, so it came with one. The flag that was just set keeps it from being taken twice.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Waits until the processes of the last host's VMs, which ended with their links, are gone: what they
/// had open is free for the next ones. They are this process's children still.
pub fn outlive_children() {
    let deadline = Instant::now() + GONE_WITHIN;
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some(_)) | Err(Errno::INTR) => {}
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
            Ok(None) => {
                tracing::error!(
                    "processes of the last host's VMs do not end: they may keep disks and ports busy"
                );
                return;
            }
            Err(_) => return,
        }
    }
}
