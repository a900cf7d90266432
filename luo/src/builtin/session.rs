//! Sessions: named sets of files under tokens, outgoing or incoming.
//!
//! ```text
//!  outgoing   create --> preserve* --> (switch)
//!                                  close: unpreserves all files, last first
//!  incoming   (switch) --> retrieve session --> retrieve fd* --> finish --> close
//!                                  close without finish: finishes first; if a handler forbids
//!                                  that, the session stays, out of reach, until the next switch
//! ```
//!
//! A name is unique among the outgoing sessions, and among the incoming sessions. The two kinds are
//! two lists and two types; an outgoing session never becomes an incoming one. Every look-up uses a
//! map: no operation takes longer because there are more sessions, or more files in a session.
//! Follows `kernel/liveupdate/luo_session.c` (Linux 7.3).

use std::collections::{BTreeMap, HashMap};

use rustix::io::Errno;

use super::file::{Arrived, Preserved, Registry};
use super::handler::{File, Retrieval};
use super::label::Name;
use super::model::Luo;
use crate::Token;
use crate::uapi::SESSION_NAME_LENGTH;

/// The number of a session of either kind. Numbers follow the order of creation and are never
/// reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub(super) u64);

/// Which side of the switch a session belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SessionKind {
    /// Created in this kernel, for the next kernel.
    Outgoing,
    /// Created in the previous kernel, and retrieved in this one.
    Incoming,
}

/// Files in the order in which they were added, each under a token.
#[derive(Debug)]
pub(super) struct TokenFiles<T> {
    list: Vec<(Token, T)>,
    by_token: HashMap<Token, usize>,
}

impl<T> Default for TokenFiles<T> {
    fn default() -> Self {
        Self { list: Vec::new(), by_token: HashMap::new() }
    }
}

impl<T> TokenFiles<T> {
    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    pub(super) fn contains(&self, token: Token) -> bool {
        self.by_token.contains_key(&token)
    }

    /// Adds a file at the end. EEXIST if the token is in use.
    pub(super) fn push(&mut self, token: Token, file: T) -> Result<(), Errno> {
        if self.contains(token) {
            return Err(Errno::EXIST);
        }
        self.by_token.insert(token, self.list.len());
        self.list.push((token, file));
        Ok(())
    }

    fn get(&self, token: Token) -> Option<&T> {
        let index = *self.by_token.get(&token)?;
        self.list.get(index).map(|(_, file)| file)
    }

    fn get_mut(&mut self, token: Token) -> Option<&mut T> {
        let index = *self.by_token.get(&token)?;
        self.list.get_mut(index).map(|(_, file)| file)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &(Token, T)> {
        self.list.iter()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut (Token, T)> {
        self.list.iter_mut()
    }

    /// Removes and returns all files, last first.
    fn drain_backwards(&mut self) -> impl Iterator<Item = T> {
        self.by_token.clear();
        std::mem::take(&mut self.list).into_iter().rev().map(|(_, file)| file)
    }
}

/// A session that was created in this kernel.
#[derive(Debug)]
pub(super) struct OutgoingSession<F> {
    pub(super) name: Name,
    pub(super) files: TokenFiles<Preserved<F>>,
}

/// Whether an incoming session has a holder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// Not retrieved yet.
    Waiting,
    /// Retrieved, and not closed yet.
    Retrieved,
    /// Closed, but a handler refused to finish it: nobody can reach it.
    Lost,
}

/// A session of the previous kernel.
#[derive(Debug)]
pub(super) struct IncomingSession<F> {
    pub(super) name: Name,
    pub(super) reach: Reach,
    pub(super) files: TokenFiles<Arrived<F>>,
}

impl<F> IncomingSession<F> {
    pub(super) fn new(name: Name) -> Self {
        Self { name, reach: Reach::Waiting, files: TokenFiles::default() }
    }
}

/// The sessions of one kind, in the order of their creation and by name.
#[derive(Debug)]
pub(super) struct Sessions<S> {
    by_id: BTreeMap<SessionId, S>,
    by_name: HashMap<Name, SessionId>,
}

impl<S> Default for Sessions<S> {
    fn default() -> Self {
        Self { by_id: BTreeMap::new(), by_name: HashMap::new() }
    }
}

impl<S> Sessions<S> {
    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Adds a session. EEXIST if the name is in use.
    pub(super) fn insert(&mut self, id: SessionId, name: Name, session: S) -> Result<(), Errno> {
        if self.by_name.contains_key(&name) {
            return Err(Errno::EXIST);
        }
        self.by_name.insert(name, id);
        self.by_id.insert(id, session);
        Ok(())
    }

    fn remove(&mut self, id: SessionId, name: &Name) {
        self.by_id.remove(&id);
        self.by_name.remove(name);
    }

    pub(super) fn iter(&self) -> impl DoubleEndedIterator<Item = &S> {
        self.by_id.values()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut S> {
        self.by_id.values_mut()
    }

    /// Returns a session, in any state.
    pub(super) fn get(&self, id: SessionId) -> Option<&S> {
        self.by_id.get(&id)
    }
}

impl<F: File> Luo<F> {
    /// Creates an outgoing session. Its name is `name` up to the first NUL.
    ///
    /// `open` makes the file that stands for the session; if `open` fails, no session is created.
    /// EINVAL if the name is empty or has no NUL. [`Limits::sessions_errno`] (ENOSPC in Linux 7.3)
    /// if there are [`Limits::sessions`] sessions. EEXIST if an outgoing session has the name.
    ///
    /// [`Limits::sessions_errno`]: super::Limits::sessions_errno
    /// [`Limits::sessions`]: super::Limits::sessions
    pub fn create_session(
        &mut self,
        name: &[u8; SESSION_NAME_LENGTH],
        open: impl FnOnce(SessionId) -> Result<(), Errno>,
    ) -> Result<SessionId, Errno> {
        self.check_running()?;
        let name = Name::from_field(name).ok_or(Errno::INVAL)?;
        if self.outgoing.len() >= self.limits.sessions {
            return Err(self.limits.sessions_errno);
        }
        let id = self.new_session_id();
        self.outgoing.insert(id, name, OutgoingSession { name, files: TokenFiles::default() })?;
        if let Err(errno) = open(id) {
            self.outgoing.remove(id, &name);
            return Err(errno);
        }
        Ok(id)
    }

    /// Retrieves an incoming session. Its name is `name` up to the first NUL.
    ///
    /// `open` makes the file that stands for the session; if `open` fails, the session can still be
    /// retrieved. ENOENT if no incoming session has the name, or it was closed. EINVAL if it is
    /// retrieved already, or was closed and could not be finished.
    pub fn retrieve_session(
        &mut self,
        name: &[u8; SESSION_NAME_LENGTH],
        open: impl FnOnce(SessionId) -> Result<(), Errno>,
    ) -> Result<SessionId, Errno> {
        self.check_running()?;
        let name = Name::from_field(name).ok_or(Errno::NOENT)?;
        let id = *self.incoming.by_name.get(&name).ok_or(Errno::NOENT)?;
        let session = self.incoming.by_id.get_mut(&id).ok_or(Errno::NOENT)?;
        if session.reach != Reach::Waiting {
            return Err(Errno::INVAL);
        }
        open(id)?;
        session.reach = Reach::Retrieved;
        Ok(id)
    }

    /// Undoes [`retrieve_session`](Self::retrieve_session), for when the answer does not reach the
    /// process that asked. EBADF if the session is not retrieved.
    ///
    /// The kernel closes the session instead, and all its files are lost.
    pub fn return_session(&mut self, id: SessionId) -> Result<(), Errno> {
        self.check_running()?;
        self.retrieved(id)?.reach = Reach::Waiting;
        Ok(())
    }

    /// Returns the kind of a session. EBADF if there is no outgoing and no retrieved session `id`.
    pub fn kind(&self, id: SessionId) -> Result<SessionKind, Errno> {
        if self.outgoing.get(id).is_some() {
            return Ok(SessionKind::Outgoing);
        }
        match self.incoming.get(id) {
            Some(session) if session.reach == Reach::Retrieved => Ok(SessionKind::Incoming),
            _ => Err(Errno::BADF),
        }
    }

    /// Returns the name of a session. EBADF if there is no outgoing and no retrieved session `id`.
    pub fn session_name(&self, id: SessionId) -> Result<Name, Errno> {
        self.check_running()?;
        let outgoing = self.outgoing.get(id).map(|session| session.name);
        let retrieved = |session: &&IncomingSession<F>| session.reach == Reach::Retrieved;
        let incoming = || self.incoming.get(id).filter(retrieved).map(|session| session.name);
        outgoing.or_else(incoming).ok_or(Errno::BADF)
    }

    /// Preserves `file` under `token` in an outgoing session; `None` stands for an fd that is not
    /// open.
    ///
    /// A failure changes nothing. The errors are checked in this order: EBADF if there is no such
    /// session. EINVAL if it is an incoming session. EEXIST if the token is in use. ENOSPC if the
    /// session has [`Limits::files`](super::Limits::files) files. EBADF if `file` is `None`. ENOENT
    /// if no handler can preserve the file. EBUSY if its object is preserved already, or retrieved
    /// and not finished. Then any error of the shared objects and of the handler.
    pub fn preserve_fd(
        &mut self,
        id: SessionId,
        token: Token,
        file: Option<F>,
    ) -> Result<(), Errno> {
        self.check_running()?;
        self.expect_kind(id, SessionKind::Outgoing)?;
        let session = self.outgoing.by_id.get_mut(&id).ok_or(Errno::BADF)?;
        if session.files.contains(token) {
            return Err(Errno::EXIST);
        }
        if session.files.len() >= self.limits.files {
            return Err(Errno::NOSPC);
        }
        let file = file.ok_or(Errno::BADF)?;
        let preserved = self.registry.preserve(file)?;
        session.files.push(token, preserved)
    }

    /// Returns a new reference to the file under `token` of an incoming session.
    ///
    /// The first call for a token makes the handler retrieve the file. If the handler fails, this
    /// and all later calls return its errno, unless the handler keeps the file. EINVAL if the session is an outgoing one. ENOENT if
    /// the session has no such token, or is finished.
    pub fn retrieve_fd(&mut self, id: SessionId, token: Token) -> Result<F, Errno> {
        self.check_running()?;
        self.expect_kind(id, SessionKind::Incoming)?;
        let session = self.incoming.by_id.get_mut(&id).ok_or(Errno::BADF)?;
        self.registry.retrieve(session.files.get_mut(token).ok_or(Errno::NOENT)?)
    }

    /// Whether a file of an incoming session can still be retrieved.
    pub(super) fn has_fd(&self, id: SessionId, token: Token) -> bool {
        let file = self.incoming.get(id).and_then(|session| session.files.get(token));
        file.is_some_and(|file| !matches!(file.retrieval(), Retrieval::Failed(_)))
    }

    /// Finishes an incoming session. First asks the handler of each file, first file first, whether
    /// the file can be finished; then finishes all files, last first. Files that were not retrieved
    /// are discarded. Finishing again does nothing.
    ///
    /// EINVAL if the session is an outgoing one. EBUSY if a handler refuses; then no file is
    /// finished.
    pub fn finish(&mut self, id: SessionId) -> Result<(), Errno> {
        self.check_running()?;
        self.expect_kind(id, SessionKind::Incoming)?;
        let session = self.incoming.by_id.get_mut(&id).ok_or(Errno::BADF)?;
        finish_files(&mut self.registry, session)
    }

    /// Closes a session, after the last reference to the file that stands for it is gone.
    ///
    /// Unpreserves the files of an outgoing session, last first, and frees its name. Finishes an
    /// incoming session and removes it. EBUSY if a handler refuses to finish a file; the incoming
    /// session then stays, with its name, and cannot be reached any more. EBADF if there is no
    /// outgoing and no retrieved session `id`.
    pub fn close_session(&mut self, id: SessionId) -> Result<(), Errno> {
        self.check_running()?;
        if let Some(mut session) = self.outgoing.by_id.remove(&id) {
            self.outgoing.by_name.remove(&session.name);
            for preserved in session.files.drain_backwards() {
                self.registry.unpreserve(preserved);
            }
            return Ok(());
        }
        self.retrieved(id)?;
        let session = self.incoming.by_id.get_mut(&id).ok_or(Errno::BADF)?;
        if let Err(errno) = finish_files(&mut self.registry, session) {
            session.reach = Reach::Lost;
            return Err(errno);
        }
        let name = session.name;
        self.incoming.remove(id, &name);
        Ok(())
    }

    fn expect_kind(&self, id: SessionId, kind: SessionKind) -> Result<(), Errno> {
        if self.kind(id)? == kind { Ok(()) } else { Err(Errno::INVAL) }
    }

    /// Returns a retrieved incoming session. EBADF if there is none of that number.
    fn retrieved(&mut self, id: SessionId) -> Result<&mut IncomingSession<F>, Errno> {
        let session = self.incoming.by_id.get_mut(&id);
        session.filter(|session| session.reach == Reach::Retrieved).ok_or(Errno::BADF)
    }
}

fn finish_files<F: File>(
    registry: &mut Registry<F>,
    session: &mut IncomingSession<F>,
) -> Result<(), Errno> {
    if !session.files.iter().all(|(_, arrived)| registry.can_finish(arrived)) {
        return Err(Errno::BUSY);
    }
    for arrived in session.files.drain_backwards() {
        registry.finish(arrived);
    }
    Ok(())
}
