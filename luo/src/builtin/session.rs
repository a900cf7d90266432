//! Sessions: named sets of files under tokens, outgoing or incoming.
//!
//! ```text
//!  outgoing   create --> preserve* --> (switch)          close: all unpreserved, last first
//!  incoming   (switch) --> retrieve session --> retrieve fd* --> finish --> close
//!                                  close without finish: finished first; or, if a handler forbids
//!                                  that, kept out of reach until the next switch
//! ```
//!
//! Names are unique among the outgoing sessions and among the incoming ones. The two kinds are two
//! lists and two types; a session never changes sides. Every look-up is by map: no operation takes
//! longer because there are more sessions, or more files in one. Follows
//! `kernel/liveupdate/luo_session.c` (Linux 7.3).

use std::collections::{BTreeMap, HashMap};

use rustix::io::Errno;

use super::file::{Arrived, Preserved, Registry};
use super::handler::File;
use super::label::Name;
use super::model::Luo;
use crate::Token;
use crate::uapi::SESSION_NAME_LENGTH;

/// A session of either kind. Numbers follow the order of creation and are not used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub(super) u64);

/// Which side of the switch a session belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Of this kernel, for the next.
    Outgoing,
    /// Of the previous kernel, and retrieved.
    Incoming,
}

/// Files in the order in which they were added, each under a token.
#[derive(Debug)]
pub(super) struct Files<T> {
    list: Vec<(Token, T)>,
    by_token: HashMap<Token, usize>,
}

impl<T> Default for Files<T> {
    fn default() -> Self {
        Self { list: Vec::new(), by_token: HashMap::new() }
    }
}

impl<T> Files<T> {
    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    pub(super) fn contains(&self, token: Token) -> bool {
        self.by_token.contains_key(&token)
    }

    /// Adds a file at the end. EEXIST: the token is taken.
    pub(super) fn push(&mut self, token: Token, file: T) -> Result<(), Errno> {
        if self.contains(token) {
            return Err(Errno::EXIST);
        }
        self.by_token.insert(token, self.list.len());
        self.list.push((token, file));
        Ok(())
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

    /// Takes all files out, last first.
    fn drain_backwards(&mut self) -> impl Iterator<Item = T> {
        self.by_token.clear();
        std::mem::take(&mut self.list).into_iter().rev().map(|(_, file)| file)
    }
}

/// A session that was created here.
#[derive(Debug)]
pub(super) struct OutgoingSession<F> {
    pub(super) name: Name,
    pub(super) files: Files<Preserved<F>>,
}

/// Who has an incoming session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// Nobody yet.
    Waiting,
    /// Whoever retrieved it.
    Retrieved,
    /// Nobody any more: it was closed, but could not be finished.
    Lost,
}

/// A session that came in.
#[derive(Debug)]
pub(super) struct IncomingSession<F> {
    pub(super) name: Name,
    pub(super) reach: Reach,
    pub(super) files: Files<Arrived<F>>,
}

impl<F> IncomingSession<F> {
    pub(super) fn new(name: Name) -> Self {
        Self { name, reach: Reach::Waiting, files: Files::default() }
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

    /// Adds a session. EEXIST: the name is taken.
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

    /// A session, whatever its state.
    pub(super) fn get(&self, id: SessionId) -> Option<&S> {
        self.by_id.get(&id)
    }
}

impl<F: File> Luo<F> {
    /// Creates an outgoing session called as `name` says up to its first NUL.
    ///
    /// `open` makes the file that stands for the session; if it fails there is no session. EINVAL:
    /// the name is empty or has no NUL. ENOSPC: there are as many sessions as there can be. EEXIST:
    /// an outgoing session has the name.
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
        self.outgoing.insert(id, name, OutgoingSession { name, files: Files::default() })?;
        if let Err(errno) = open(id) {
            self.outgoing.remove(id, &name);
            return Err(errno);
        }
        Ok(id)
    }

    /// Gives out the incoming session called as `name` says up to its first NUL.
    ///
    /// `open` makes the file that stands for the session; if it fails the session stays as it was.
    /// ENOENT: none of that name came in, or it was closed since. EINVAL: it is given out, or was
    /// closed and could not be finished.
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

    /// Takes back what [`retrieve_session`](Self::retrieve_session) gave out, when the caller could
    /// not be told. EBADF: no such session is given out.
    ///
    /// The kernel closes the session in this case, and with it loses all that is in it.
    pub fn return_session(&mut self, id: SessionId) -> Result<(), Errno> {
        self.check_running()?;
        self.retrieved(id)?.reach = Reach::Waiting;
        Ok(())
    }

    /// Which kind of session `id` is, as far as it can be reached. EBADF: none.
    pub fn kind(&self, id: SessionId) -> Result<Kind, Errno> {
        if self.outgoing.get(id).is_some() {
            return Ok(Kind::Outgoing);
        }
        match self.incoming.get(id) {
            Some(session) if session.reach == Reach::Retrieved => Ok(Kind::Incoming),
            _ => Err(Errno::BADF),
        }
    }

    /// The name of a session of either kind. EBADF: no such session.
    pub fn session_name(&self, id: SessionId) -> Result<Name, Errno> {
        self.check_running()?;
        let outgoing = self.outgoing.get(id).map(|session| session.name);
        let retrieved = |session: &&IncomingSession<F>| session.reach == Reach::Retrieved;
        let incoming = || self.incoming.get(id).filter(retrieved).map(|session| session.name);
        outgoing.or_else(incoming).ok_or(Errno::BADF)
    }

    /// Preserves `file` under `token` in an outgoing session; `None` is an fd that is not open.
    ///
    /// A failure changes nothing. In this order: EINVAL: the session is an incoming one. EEXIST:
    /// the token is taken. ENOSPC: the session has as many files as it can. EBADF: not open.
    /// ENOENT: no handler takes such a file. EBUSY: its object is preserved already, or retrieved
    /// and not finished. Then whatever shared objects and the handler say.
    pub fn preserve_fd(
        &mut self,
        id: SessionId,
        token: Token,
        file: Option<F>,
    ) -> Result<(), Errno> {
        self.check_running()?;
        self.expect_kind(id, Kind::Outgoing)?;
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

    /// Another reference to the file under `token` of an incoming session.
    ///
    /// The handler makes the file when it is asked for the first time; if it fails, its errno is the
    /// answer ever after. EINVAL: the session is an outgoing one. ENOENT: no such token, or the
    /// session is finished.
    pub fn retrieve_fd(&mut self, id: SessionId, token: Token) -> Result<F, Errno> {
        self.check_running()?;
        self.expect_kind(id, Kind::Incoming)?;
        let session = self.incoming.by_id.get_mut(&id).ok_or(Errno::BADF)?;
        self.registry.retrieve(session.files.get_mut(token).ok_or(Errno::NOENT)?)
    }

    /// Finishes an incoming session: asks every handler, first file first, then ends all files, last
    /// first. Files that were not retrieved are discarded. Finishing again does nothing.
    ///
    /// EINVAL: the session is an outgoing one. EBUSY: a handler does not let its file go; nothing
    /// was finished.
    pub fn finish(&mut self, id: SessionId) -> Result<(), Errno> {
        self.check_running()?;
        self.expect_kind(id, Kind::Incoming)?;
        let session = self.incoming.by_id.get_mut(&id).ok_or(Errno::BADF)?;
        finish_files(&mut self.registry, session)
    }

    /// The last reference to the session's file is gone.
    ///
    /// An outgoing session is unpreserved, last file first, and its name is free. An incoming one is
    /// finished and forgotten; EBUSY: a handler does not let a file go, and the session stays in
    /// its place, out of reach. EBADF: no such session is given out.
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

    fn expect_kind(&self, id: SessionId, kind: Kind) -> Result<(), Errno> {
        if self.kind(id)? == kind { Ok(()) } else { Err(Errno::INVAL) }
    }

    /// An incoming session that somebody has.
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
