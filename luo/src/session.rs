//! Sessions, and the trait through which programs create and retrieve them.
//!
//! Ownership follows the protocol: a process owns a session as a value, and dropping the value closes
//! the session. A backend implements the verbs ([`Preserve`], [`Retrieve`]) and answers with errnos;
//! [`Outgoing`] and [`Incoming`] turn these into errors with sentences.

use std::collections::BTreeSet;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

use rustix::io::Errno;

use crate::mutex::lock;
use crate::{Error, FinishError, SessionName, Ticket, Token};

/// The kind of orchestrator that carries the sessions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Backend {
    /// The kernel's LUO: sessions survive a kexec.
    Kernel,
    /// The fd store of a systemd service: they survive a restart of the service, and a kexec.
    Systemd,
    /// The built-in LUO on a pool: they survive a kexec, and what they hold lies in the pool.
    Pool,
    /// The built-in LUO on a keeper: they survive this process, but no kexec.
    Keeper,
}

/// What a user of sessions has to know of a backend. Ask for a property, not for a name.
impl Backend {
    /// Whether preserving memory pins its page frames, so that the kernel must not replace them until
    /// the switch.
    pub fn pins_pages(self) -> bool {
        matches!(self, Self::Kernel)
    }

    /// Whether preserving a memfd takes memory for every byte of it that has none.
    pub fn fills_holes(self) -> bool {
        // Under systemd, the kernel's LUO does so when systemd preserves.
        matches!(self, Self::Kernel | Self::Systemd)
    }

    /// Whether the memory that the backend creates is files of a DAX file system. Otherwise it is
    /// memfds.
    pub fn memory_is_dax_files(self) -> bool {
        matches!(self, Self::Pool)
    }

    /// Whether sessions can be retrieved after an `exec` on the same kernel.
    pub fn survives_exec(self) -> bool {
        matches!(self, Self::Pool | Self::Keeper)
    }

    /// Whether a session outlives the process that has it, if that neither finishes nor drops it.
    pub fn outlives_process(self) -> bool {
        matches!(self, Self::Systemd)
    }

    /// Whether an incoming session comes again to the next process if one that has retrieved it is killed before it has
    /// finished it. (From a pool only with [`taken_when_finished`](crate::builtin::pool::Options::taken_when_finished).)
    pub fn comes_again(self) -> bool {
        matches!(self, Self::Systemd | Self::Pool)
    }

    /// Whether systemd performs the kexec, after the process that preserved has ended.
    pub fn leaves_kexec_to_systemd(self) -> bool {
        matches!(self, Self::Systemd)
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::Systemd => "systemd",
            Self::Pool => "pool",
            Self::Keeper => "keeper",
        })
    }
}

/// Creates sessions in the old kernel and retrieves them in the new one.
pub trait Orchestrator: Send + Sync {
    /// The kind of this orchestrator.
    fn backend(&self) -> Backend;

    /// Creates an outgoing session called `name`. Errors if an outgoing session of that name exists. An
    /// incoming session may have the same name.
    fn create_session(&self, name: &SessionName) -> Result<Outgoing, Error>;

    /// Retrieves the incoming session called `name`. A session can be retrieved once. Errors if there is
    /// no such session ([`Error::is_not_found`]).
    fn retrieve_session(&self, name: &SessionName) -> Result<Incoming, Error>;

    /// Creates memory of `len` zero bytes that can be preserved without a copy. Returns an fd, open for
    /// reading and writing, with O_CLOEXEC. `name` appears in error messages and in `/proc`.
    ///
    /// Pages of a memfd are allocated when they are touched, pages of a file in a pool at once.
    fn create_memory(&self, name: &str, len: u64) -> Result<OwnedFd, Error>;

    /// Returns the ticket that the next host needs to get the sessions, for the next kernel's command line.
    /// `None` if the kernel itself hands the sessions over.
    fn ticket(&self) -> Option<Ticket>;

    /// Returns how much more can be preserved, as far as anything but the host's memory limits that.
    fn room(&self) -> Room;

    /// Makes sure, before a switch, that what was preserved is where it has to be. Only an orchestrator that another
    /// process keeps its files for can find that this is not so.
    fn confirm(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Returns what finds out whether the process that keeps the files answers. `None` if this process keeps them itself, or
    /// the kernel does.
    fn probe(&self) -> Option<Probe> {
        None
    }

    /// Makes the outgoing sessions available to the next kernel, then calls `jump`, which enters that
    /// kernel and returns only if it fails.
    ///
    /// Returns `Ok` if `jump` was called and returned, an error if `jump` was not called. In both cases all
    /// sessions are unchanged, except if the error says that a step cannot be undone. `jump` must not drop
    /// a session or call the orchestrator.
    fn switch(&self, jump: &mut dyn FnMut()) -> Result<(), Error>;
}

/// Waits until the process answers that keeps the files. Errors if it does not do so in time
/// ([`Error::is_unanswered`]). That takes seconds, so it can be called on another thread.
pub type Probe = Box<dyn FnOnce() -> Result<(), Error> + Send>;

/// How much more an orchestrator can preserve. The default is without a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Room {
    /// Number of files of any kind.
    pub files: Option<u64>,
    /// Of files that are copied: documents.
    pub copies: Option<Copies>,
}

/// How many files an orchestrator can still copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copies {
    /// Number of files.
    pub files: u64,
    /// Bytes of all files together, each rounded up to 4096.
    pub bytes: u64,
}

/// The verbs of an outgoing session. Dropping it unpreserves everything.
pub trait Preserve: fmt::Debug + Send + Sync {
    /// Preserves the open file behind `fd` under `token`. A failure changes nothing.
    fn preserve(&self, fd: BorrowedFd<'_>, token: Token) -> Result<(), Errno>;

    /// Keeps room for a file under `token`, where the number of files is limited for all sessions together.
    fn reserve(&self, _token: Token) -> Result<(), Errno> {
        Ok(())
    }

    /// The fd whose last close ends the session.
    fn as_fd(&self) -> BorrowedFd<'_>;
}

/// The verbs of an incoming session. Dropping it finishes it.
pub trait Retrieve: fmt::Debug + Send + Sync {
    /// A new fd, with O_CLOEXEC, of the file preserved under `token`.
    fn retrieve(&self, token: Token) -> Result<OwnedFd, Errno>;

    /// Whether the file under `token` can be retrieved again after [`retrieve`](Self::retrieve) failed, because that
    /// has changed nothing. EMFILE, ENOENT and EFAULT change nothing with any orchestrator.
    fn keeps(&self, token: Token) -> bool;

    /// Ends the preservation of everything in the session.
    fn finish(&self) -> Result<(), Errno>;

    /// Preserves the files again that an outgoing session of the same name has replaced. Does nothing where such a
    /// session replaces none.
    fn put_back(&self) -> Result<(), (Token, Errno)> {
        Ok(())
    }

    /// The fd whose last close ends the session.
    fn as_fd(&self) -> BorrowedFd<'_>;
}

/// A session of this kernel, for the next kernel.
///
/// The session must stay open until the switch. Dropping it unpreserves all its files, loses nothing and
/// frees the name. A copy of its fd, in this process or another, keeps the session open.
#[derive(Debug)]
#[must_use = "dropping an outgoing session unpreserves everything in it"]
pub struct Outgoing {
    name: SessionName,
    session: Box<dyn Preserve>,
    tokens: Mutex<BTreeSet<Token>>,
}

impl Outgoing {
    /// A session called `name` whose verbs are `session`'s.
    pub fn new(name: SessionName, session: Box<dyn Preserve>) -> Self {
        Self { name, session, tokens: Mutex::default() }
    }

    /// The name by which the next kernel retrieves the session.
    pub fn name(&self) -> &SessionName {
        &self.name
    }

    /// Preserves the open file behind `fd` under `token`.
    ///
    /// The session has its own reference to the file, so the caller may close `fd`. Preserving fills the
    /// holes of a memfd; until the session ends, resizing the memfd or punching holes fails. Later writes
    /// to the memfd are preserved too. Preserving gigabytes can take seconds. After an error nothing has
    /// changed, and the session can still be used.
    pub fn preserve(&self, fd: BorrowedFd<'_>, token: Token) -> Result<(), Error> {
        let error = |errno| Error::Preserve { session: self.name.clone(), token, errno };
        let mut tokens = lock(&self.tokens);
        if tokens.contains(&token) {
            return Err(error(Errno::EXIST));
        }
        self.session.preserve(fd, token).map_err(error)?;
        tokens.insert(token);
        Ok(())
    }

    /// Keeps room for a file that will be preserved under `token`, so that no file of another session or token takes
    /// it. Errors like [`preserve`](Self::preserve) if there is no room.
    pub fn reserve(&self, token: Token) -> Result<(), Error> {
        let error = |errno| Error::Preserve { session: self.name.clone(), token, errno };
        self.session.reserve(token).map_err(error)
    }
}

impl AsFd for Outgoing {
    /// The fd whose last close ends the session, for an fd store or another process.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.session.as_fd()
    }
}

/// A session of the previous kernel.
///
/// **Dropping it without [`finish`](Self::finish) loses every file that was not retrieved.** A kexec before
/// the session is finished loses these files too. A copy of its fd keeps the session open, so a process
/// that restores from it can be started again. A file can be retrieved repeatedly; a session can be
/// finished once.
#[derive(Debug)]
#[must_use = "dropping an incoming session loses every file that was not retrieved"]
pub struct Incoming {
    name: SessionName,
    session: Box<dyn Retrieve>,
}

impl Incoming {
    /// A session called `name` whose verbs are `session`'s.
    pub fn new(name: SessionName, session: Box<dyn Retrieve>) -> Self {
        Self { name, session }
    }

    /// The name that the session was created with.
    pub fn name(&self) -> &SessionName {
        &self.name
    }

    /// Returns a new fd, with O_CLOEXEC, of the file preserved under `token`. A repeated call returns another
    /// fd of the same open file. A memfd comes back open for reading and writing, at its former position,
    /// without its name, and charged to the control group of the caller.
    ///
    /// If the error is final ([`Error::is_final`]), the file is lost.
    pub fn retrieve(&self, token: Token) -> Result<OwnedFd, Error> {
        self.session.retrieve(token).map_err(|errno| Error::Retrieve {
            session: self.name.clone(),
            token,
            errno,
            is_kept: self.session.keeps(token),
        })
    }

    /// Preserves the files again that an outgoing session of the same name has replaced. Call this when that session was
    /// dropped.
    pub fn put_back(&self) -> Result<(), Error> {
        let error = |(token, errno)| Error::Preserve { session: self.name.clone(), token, errno };
        self.session.put_back().map_err(error)
    }

    /// Ends the preservation. Retrieved files are ordinary open files from then on and can be preserved
    /// again; files that were not retrieved are freed. The error hands the session back.
    pub fn finish(self) -> Result<(), FinishError> {
        match self.session.finish() {
            Ok(()) => Ok(()),
            Err(errno) => {
                let error = Error::Finish { session: self.name.clone(), errno };
                Err(FinishError { session: self, error })
            }
        }
    }
}

impl AsFd for Incoming {
    /// The fd whose last close ends the session, for an fd store or another process.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.session.as_fd()
    }
}

/// A session that was received as an fd. The kernel says which kind it is.
#[derive(Debug)]
pub enum Session {
    /// A session of this kernel.
    Outgoing(Outgoing),
    /// A session of the previous kernel.
    Incoming(Incoming),
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// A backend that answers the same to every verb and counts its calls.
    #[derive(Debug)]
    struct Always {
        answer: Result<(), Errno>,
        calls: Arc<AtomicUsize>,
        fd: File,
    }

    impl Always {
        fn new(answer: Result<(), Errno>) -> (Box<Self>, Arc<AtomicUsize>) {
            let calls = Arc::new(AtomicUsize::new(0));
            let fd = File::open("/dev/null").unwrap();
            (Box::new(Self { answer, calls: calls.clone(), fd }), calls)
        }

        fn answer(&self) -> Result<(), Errno> {
            self.calls.fetch_add(1, Ordering::Relaxed);
            self.answer
        }
    }

    impl Preserve for Always {
        fn preserve(&self, _: BorrowedFd<'_>, _: Token) -> Result<(), Errno> {
            self.answer()
        }
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.fd.as_fd()
        }
    }

    impl Retrieve for Always {
        fn retrieve(&self, _: Token) -> Result<OwnedFd, Errno> {
            self.answer().map(|()| self.fd.try_clone().unwrap().into())
        }
        fn keeps(&self, _: Token) -> bool {
            false
        }
        fn finish(&self) -> Result<(), Errno> {
            self.answer()
        }
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.fd.as_fd()
        }
    }

    fn name() -> SessionName {
        SessionName::new("web").unwrap()
    }

    #[test]
    fn an_orchestrator_fits_in_a_box_and_sessions_cross_threads() {
        fn crosses_threads<T: Send + Sync>() {}
        crosses_threads::<Box<dyn Orchestrator>>();
        crosses_threads::<Outgoing>();
        crosses_threads::<Incoming>();
    }

    #[test]
    fn a_token_that_is_taken_does_not_reach_the_backend() {
        let (backend, calls) = Always::new(Ok(()));
        let session = Outgoing::new(name(), backend);
        let file = File::open("/dev/null").unwrap();
        session.preserve(file.as_fd(), Token(1)).unwrap();
        let error = session.preserve(file.as_fd(), Token(1)).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::EXIST));
        assert_eq!(calls.load(Ordering::Relaxed), 1);
        session.preserve(file.as_fd(), Token(2)).unwrap();
    }

    #[test]
    fn a_token_that_failed_can_be_tried_again() {
        let (backend, calls) = Always::new(Err(Errno::NOMEM));
        let session = Outgoing::new(name(), backend);
        let file = File::open("/dev/null").unwrap();
        for _ in 0..2 {
            let error = session.preserve(file.as_fd(), Token(1)).unwrap_err();
            assert_eq!(error.errno(), Some(Errno::NOMEM));
        }
        assert_eq!(calls.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn a_session_that_cannot_be_finished_is_handed_back() {
        let (backend, calls) = Always::new(Err(Errno::BUSY));
        let mut session = Incoming::new(name(), backend);
        for attempt in 1..=2 {
            let failure = session.finish().unwrap_err();
            assert_eq!(failure.error, Error::Finish { session: name(), errno: Errno::BUSY });
            assert_eq!(calls.load(Ordering::Relaxed), attempt);
            session = failure.session;
        }
        assert_eq!(session.name(), &name());
    }

    #[test]
    fn a_file_that_is_not_there_is_not_found() {
        let (backend, _) = Always::new(Err(Errno::NOENT));
        let error = Incoming::new(name(), backend).retrieve(Token(9)).unwrap_err();
        assert!(error.is_not_found());
    }
}
