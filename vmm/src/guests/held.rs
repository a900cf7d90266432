//! The session of a VM that this host does not run: the host holds the files in it, and knows no more about them
//! than an index says. So it can carry on a VM about which it can read nothing else.
//!
//! ```text
//!   Unretrieved --retrieve--> in LUO --collect--> held, and in LUO --release--> held by this process alone
//!       (LUO could not be asked)     (not all files)                               |
//!        ^------------- the next host <-- switch <-- preserve, in a session of the same name
//! ```
//!
//! No failure on this way loses anything: each step can be tried again. Dropping the value gives the VM up.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use luo::{Errno, Error, Incoming, Orchestrator, Outgoing, SessionName, Token};

use super::indexed::{IndexedFile, IndexedSession};

/// A session and the files in it. See the [module](self).
#[derive(Debug)]
#[must_use = "dropping it frees everything in the session"]
pub struct Held {
    name: SessionName,
    /// What the index says of the files that exist.
    files: Vec<IndexedFile>,
    /// The files that were retrieved to be held, by token.
    fds: BTreeMap<u64, OwnedFd>,
    origin: Origin,
}

/// Where the files are beside this process.
#[derive(Debug)]
enum Origin {
    /// In a session that LUO has not given out yet.
    Unretrieved,
    /// In this session, which is not finished.
    Session(Incoming),
    /// Nowhere.
    Finished,
}

impl Held {
    /// A session that was retrieved.
    pub fn new(session: Incoming, files: Vec<IndexedFile>) -> Self {
        let name = session.name().clone();
        Self { name, files, fds: BTreeMap::new(), origin: Origin::Session(session) }
    }

    /// Files that no LUO has: copies of those `fds` that `files` lists.
    pub fn copies<'a>(
        name: SessionName,
        files: Vec<IndexedFile>,
        fds: impl Iterator<Item = (Token, BorrowedFd<'a>)>,
    ) -> Result<Self, Errno> {
        let listed = fds.filter(|(token, _)| files.iter().any(|file| file.token == token.0));
        let copies =
            listed.map(|(token, fd)| Ok((token.0, rustix::io::fcntl_dupfd_cloexec(fd, 0)?)));
        let fds = copies.collect::<Result<_, Errno>>()?;
        Ok(Self { name, files, fds, origin: Origin::Finished })
    }

    /// A session that LUO could not give out when it was asked.
    pub fn unretrieved(name: SessionName, files: Vec<IndexedFile>) -> Self {
        Self { name, files, fds: BTreeMap::new(), origin: Origin::Unretrieved }
    }

    /// The session's name.
    pub fn name(&self) -> &SessionName {
        &self.name
    }

    /// What the index has to say of it.
    pub fn indexed(&self) -> IndexedSession {
        IndexedSession { name: self.name.to_string(), files: self.files.clone() }
    }

    /// What the index says of its files.
    pub fn files(&self) -> &[IndexedFile] {
        &self.files
    }

    /// Sets the list of its files, where no index has one.
    pub fn list(&mut self, files: Vec<IndexedFile>) {
        self.files = files;
    }

    /// Retrieves the session from `luo`, if that was not possible before.
    pub fn retrieve(&mut self, luo: &dyn Orchestrator) -> Result<(), Error> {
        if let Origin::Unretrieved = self.origin {
            self.origin = Origin::Session(luo.retrieve_session(&self.name)?);
        }
        Ok(())
    }

    /// Returns a new fd of the file `token`.
    pub fn file(&self, token: Token) -> Result<OwnedFd, Error> {
        let session = || self.name.clone();
        let error = |errno| Error::Retrieve { session: session(), token, errno, is_kept: false };
        match (self.fds.get(&token.0), &self.origin) {
            (Some(fd), _) => rustix::io::fcntl_dupfd_cloexec(fd, 0).map_err(error),
            (None, Origin::Session(session)) => session.retrieve(token),
            (None, _) => Err(error(Errno::NOENT)),
        }
    }

    /// Holds `fd` in place of the file `token`, when the session is finished: a copy of the file in other memory.
    pub fn replace(&mut self, token: Token, fd: OwnedFd) {
        if let Origin::Finished = self.origin {
            self.fds.insert(token.0, fd);
        }
    }

    /// Retrieves the session and all files in it, so that this process has them. Errors if some cannot be retrieved;
    /// those that can be are held nevertheless.
    ///
    /// Before this process ends, there is no later attempt: so if the VM is `leaving`, a file that LUO will never
    /// give out is taken from the list, with a line in the log, and is no error.
    pub fn collect(&mut self, luo: &dyn Orchestrator, leaving: bool) -> Result<(), Error> {
        self.retrieve(luo)?;
        let Origin::Session(session) = &self.origin else { return Ok(()) };
        let (mut gone, mut failed) = (Vec::new(), None);
        for file in &self.files {
            if self.fds.contains_key(&file.token) {
                continue;
            }
            match session.retrieve(Token(file.token)) {
                Ok(fd) => drop(self.fds.insert(file.token, fd)),
                Err(error) if leaving && (error.is_final() || error.is_not_found()) => {
                    tracing::error!("{error}");
                    gone.push(file.token);
                }
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        self.files.retain(|file| !gone.contains(&file.token));
        failed.map_or(Ok(()), Err)
    }

    /// Finishes the session, after which only this process has its files, and can preserve them again. Errors, and
    /// changes nothing, if not all files were collected yet or LUO refuses.
    pub fn release(&mut self) -> Result<(), Error> {
        if let Some(missing) = self.files.iter().find(|file| !self.fds.contains_key(&file.token)) {
            let (session, token) = (self.name.clone(), Token(missing.token));
            return Err(Error::Retrieve { session, token, errno: Errno::NOENT, is_kept: false });
        }
        match std::mem::replace(&mut self.origin, Origin::Finished) {
            Origin::Session(session) => session.finish().map_err(|failure| {
                self.origin = Origin::Session(failure.session);
                failure.error
            }),
            Origin::Unretrieved | Origin::Finished => Ok(()),
        }
    }

    /// Preserves the files for the next host, in a session of the same name and under the same tokens. Returns
    /// `None` if the session that they came in is not finished, because it stays where it is.
    pub fn preserve(&self, luo: &dyn Orchestrator) -> Result<Option<Outgoing>, Error> {
        let Origin::Finished = self.origin else { return Ok(None) };
        let session = luo.create_session(&self.name)?;
        for (token, fd) in &self.fds {
            session.preserve(fd.as_fd(), Token(*token))?;
        }
        Ok(Some(session))
    }

    /// Returns what the index says of the files that [`preserve`](Self::preserve) preserves. None if they stay in the
    /// session that they came in.
    pub fn preserved_again(&self) -> impl Iterator<Item = &IndexedFile> {
        let leaves = matches!(self.origin, Origin::Finished);
        self.files.iter().filter(move |file| leaves && self.fds.contains_key(&file.token))
    }

    /// Gives up the files but the session: everything of it was retrieved and is in use. `None` if it is finished.
    pub fn into_session(self) -> Option<Incoming> {
        match self.origin {
            Origin::Session(session) => Some(session),
            Origin::Unretrieved | Origin::Finished => None,
        }
    }
}
