//! The model: a second, simple implementation of the state machine, with lists and loops over them.
//!
//! It uses no logic of the crate. Where the state machine keeps counters or tables, the model goes
//! through all files. It records the calls of handlers in the form of [`luo::builtin::scripted`].

use luo::Errno;
use luo::builtin::scripted::Callback::*;
use luo::builtin::scripted::{Call, Callback, Script, ScriptedFile};

use crate::support::compatible;

/// A handler: its name, the kinds of files that it accepts, whether it identifies files by object,
/// and the shared objects that it needs.
#[derive(Debug, Clone)]
pub(crate) struct Handler {
    pub(crate) name: &'static str,
    pub(crate) kinds: &'static [u32],
    pub(crate) by_object: bool,
    pub(crate) flbs: &'static [usize],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Retrieval {
    Never,
    Done(ScriptedFile),
    Failed(Errno),
}

#[derive(Debug, Clone)]
struct File {
    token: u64,
    handler: &'static str,
    /// The open file. In an incoming session only its object is meaningful.
    file: ScriptedFile,
    handle: u64,
    retrieval: Retrieval,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Outgoing,
    /// Incoming, and not retrieved.
    Waiting,
    Retrieved,
    /// Closed, but a file could not be finished.
    Stuck,
    Gone,
}

#[derive(Debug, Clone)]
struct Session {
    name: Vec<u8>,
    state: State,
    files: Vec<File>,
}

/// The state of the incoming record of a shared object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shared {
    Nothing,
    Waiting,
    Retrieved,
    Finished,
}

#[derive(Debug, Clone)]
pub(crate) struct Reference {
    pub(crate) handlers: Vec<Handler>,
    pub(crate) flbs: &'static [(&'static str, u64)],
    shared: Vec<Shared>,
    /// All sessions, past ones included, in the order of creation. Incoming sessions are in
    /// `arrived` until the device is opened.
    sessions: Vec<Session>,
    arrived: Vec<Session>,
    /// Files of the previous kernel that no session has, because one of them has no handler. The shared objects
    /// that they need count them for ever.
    lost: Vec<File>,
    device_open: bool,
    built: Option<Result<(), Errno>>,
    pub(crate) limits: (usize, usize),
    pub(crate) number: u64,
    pub(crate) faults: Vec<(Callback, u32, Errno)>,
    pub(crate) calls: Vec<Call>,
}

type Answer<T> = Result<T, Errno>;

/// A session's name, and the token and handle of each of its files.
pub(crate) type Listed = (Vec<u8>, Vec<(u64, u64)>);

/// The answer of [`Reference::retrieve`]: the file of an earlier retrieval, or the properties of a
/// new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Retrieved {
    Same(ScriptedFile),
    New { kind: u32, object: u32 },
}

impl Reference {
    pub(crate) fn new(
        handlers: Vec<Handler>,
        flbs: &'static [(&'static str, u64)],
        limits: (usize, usize),
    ) -> Self {
        Self {
            handlers,
            flbs,
            shared: vec![Shared::Nothing; flbs.len()],
            sessions: Vec::new(),
            arrived: Vec::new(),
            lost: Vec::new(),
            device_open: false,
            built: None,
            limits,
            number: 0,
            faults: Vec::new(),
            calls: Vec::new(),
        }
    }

    fn call(
        &mut self,
        who: &str,
        callback: Callback,
        object: u32,
        handle: u64,
        retrieved: Option<Result<(), Errno>>,
    ) -> Answer<()> {
        self.calls.push(Call { who: compatible(who), callback, object, handle, retrieved });
        let fault = self.faults.iter().find(|(c, o, _)| (*c, *o) == (callback, object));
        fault.map_or(Ok(()), |(_, _, errno)| Err(*errno))
    }

    fn handler(&self, name: &str) -> Option<Handler> {
        self.handlers.iter().find(|handler| handler.name == name).cloned()
    }

    /// All files of sessions in one of these states.
    fn files_in(&self, states: &[State]) -> Vec<File> {
        let sessions = self.sessions.iter().filter(|session| states.contains(&session.state));
        sessions.flat_map(|session| session.files.clone()).collect()
    }

    fn users_of_flb(&self, flb: usize, files: &[File]) -> usize {
        let uses = |file: &&File| {
            self.handlers.iter().any(|h| h.name == file.handler && h.flbs.contains(&flb))
        };
        files.iter().filter(uses).count()
    }

    pub(crate) fn open_device(&mut self) -> Answer<()> {
        if self.device_open {
            return Err(Errno::BUSY);
        }
        if self.built.is_none() {
            self.built = Some(self.build());
        }
        if self.built != Some(Ok(())) {
            return Err(Errno::IO);
        }
        self.device_open = true;
        Ok(())
    }

    pub(crate) fn close_device(&mut self) -> Answer<()> {
        if !self.device_open {
            return Err(Errno::BADF);
        }
        self.device_open = false;
        Ok(())
    }

    fn build(&mut self) -> Answer<()> {
        let mut arrived = std::mem::take(&mut self.arrived).into_iter();
        while let Some(session) = arrived.next() {
            for (index, file) in session.files.iter().enumerate() {
                if self.handler(file.handler).is_none() {
                    // The session keeps the files before the one that has no handler.
                    let files = session.files[..index].to_vec();
                    self.lost = session.files[index..].to_vec();
                    self.lost.extend(arrived.flat_map(|session| session.files));
                    self.sessions.push(Session { files, ..session });
                    return Err(Errno::NOENT);
                }
            }
            self.sessions.push(session);
        }
        Ok(())
    }

    pub(crate) fn create(&mut self, name: &[u8]) -> Answer<usize> {
        if name.is_empty() || name.len() > 63 {
            return Err(Errno::INVAL);
        }
        let outgoing = || self.sessions.iter().filter(|s| s.state == State::Outgoing);
        if outgoing().count() >= self.limits.0 {
            return Err(Errno::NOSPC);
        }
        if outgoing().any(|session| session.name == name) {
            return Err(Errno::EXIST);
        }
        let session = Session { name: name.to_vec(), state: State::Outgoing, files: Vec::new() };
        self.sessions.push(session);
        Ok(self.sessions.len() - 1)
    }

    pub(crate) fn retrieve_session(&mut self, name: &[u8]) -> Answer<usize> {
        for (id, session) in self.sessions.iter_mut().enumerate() {
            if session.name != name {
                continue;
            }
            match session.state {
                State::Waiting => {
                    session.state = State::Retrieved;
                    return Ok(id);
                }
                State::Retrieved | State::Stuck => return Err(Errno::INVAL),
                State::Outgoing | State::Gone => {}
            }
        }
        Err(Errno::NOENT)
    }

    pub(crate) fn return_session(&mut self, id: usize) -> Answer<()> {
        if self.sessions[id].state != State::Retrieved {
            return Err(Errno::BADF);
        }
        self.sessions[id].state = State::Waiting;
        Ok(())
    }

    /// EBADF if the session is not open, EINVAL if it is of the other kind.
    fn expect(&self, id: usize, outgoing: bool) -> Answer<()> {
        match (&self.sessions[id].state, outgoing) {
            (State::Outgoing, true) | (State::Retrieved, false) => Ok(()),
            (State::Outgoing, false) | (State::Retrieved, true) => Err(Errno::INVAL),
            (State::Waiting | State::Stuck | State::Gone, _) => Err(Errno::BADF),
        }
    }

    pub(crate) fn name(&self, id: usize) -> Answer<Vec<u8>> {
        match self.sessions[id].state {
            State::Waiting | State::Stuck | State::Gone => Err(Errno::BADF),
            State::Outgoing | State::Retrieved => Ok(self.sessions[id].name.clone()),
        }
    }

    pub(crate) fn preserve(
        &mut self,
        id: usize,
        token: u64,
        file: Option<ScriptedFile>,
    ) -> Answer<()> {
        self.expect(id, true)?;
        if self.sessions[id].files.iter().any(|other| other.token == token) {
            return Err(Errno::EXIST);
        }
        if self.sessions[id].files.len() >= self.limits.1 {
            return Err(Errno::NOSPC);
        }
        let file = file.ok_or(Errno::BADF)?;
        let handler = self.accepting(&file).ok_or(Errno::NOENT)?;
        if self.is_busy(&handler, &file) {
            return Err(Errno::BUSY);
        }
        let users = self.files_in(&[State::Outgoing]);
        for (index, flb) in handler.flbs.iter().enumerate() {
            if self.users_of_flb(*flb, &users) > 0 {
                continue;
            }
            if let Err(errno) = self.call(self.flbs[*flb].0, FlbPreserve, 0, 0, None) {
                self.put_flbs(&handler.flbs[..index]);
                return Err(errno);
            }
        }
        if let Err(errno) = self.call(handler.name, Preserve, file.object, 0, None) {
            self.put_flbs(handler.flbs);
            return Err(errno);
        }
        let (handle, retrieval) = (file.object.into(), Retrieval::Never);
        let file = File { token, handler: handler.name, file, handle, retrieval };
        self.sessions[id].files.push(file);
        Ok(())
    }

    fn accepting(&mut self, file: &ScriptedFile) -> Option<Handler> {
        for handler in self.handlers.clone() {
            let asked = self.call(handler.name, CanPreserve, file.object, 0, None);
            if asked.is_ok() && handler.kinds.contains(&file.kind) {
                return Some(handler);
            }
        }
        None
    }

    fn is_busy(&self, handler: &Handler, file: &ScriptedFile) -> bool {
        let same = |name: &str, other: &ScriptedFile| {
            let theirs = self.handler(name).is_some_and(|handler| handler.by_object);
            if handler.by_object || theirs {
                handler.name == name && other.object == file.object
            } else {
                other.description == file.description
            }
        };
        let preserved = self.files_in(&[State::Outgoing]);
        let came = self.files_in(&[State::Waiting, State::Retrieved, State::Stuck]);
        preserved.iter().any(|other| same(other.handler, &other.file))
            || came.iter().any(|other| match other.retrieval {
                Retrieval::Done(file) => same(other.handler, &file),
                _ => false,
            })
    }

    /// Unpreserves, in reverse order, those shared objects that no preserved file needs any more.
    fn put_flbs(&mut self, flbs: &[usize]) {
        let users = self.files_in(&[State::Outgoing]);
        for flb in flbs.iter().rev() {
            if self.users_of_flb(*flb, &users) == 0 {
                let (name, handle) = self.flbs[*flb];
                let _ = self.call(name, FlbUnpreserve, 0, handle, None);
            }
        }
    }

    pub(crate) fn retrieve(&mut self, id: usize, token: u64) -> Answer<Retrieved> {
        self.expect(id, false)?;
        let index = self.sessions[id].files.iter().position(|file| file.token == token);
        let index = index.ok_or(Errno::NOENT)?;
        let file = self.sessions[id].files[index].clone();
        match file.retrieval {
            Retrieval::Done(same) => return Ok(Retrieved::Same(same)),
            Retrieval::Failed(errno) => return Err(errno),
            Retrieval::Never => {}
        }
        let called = self.call(file.handler, Retrieve, file.file.object, file.handle, None);
        if let Err(errno) = called {
            self.sessions[id].files[index].retrieval = Retrieval::Failed(errno);
            return Err(errno);
        }
        let kind = self.handler(file.handler).unwrap().kinds[0];
        Ok(Retrieved::New { kind, object: file.file.object })
    }

    /// Records the file that the state machine created for [`Retrieved::New`].
    pub(crate) fn made(&mut self, id: usize, token: u64, made: ScriptedFile) {
        let file = self.sessions[id].files.iter_mut().find(|file| file.token == token);
        file.unwrap().retrieval = Retrieval::Done(made);
    }

    pub(crate) fn finish(&mut self, id: usize) -> Answer<()> {
        self.expect(id, false)?;
        for file in self.sessions[id].files.clone() {
            self.call_at_end(CanFinish, &file).map_err(|_| Errno::BUSY)?;
        }
        while let Some(file) = self.sessions[id].files.pop() {
            let _ = self.call_at_end(Finish, &file);
            let mut left = self.files_in(&[State::Waiting, State::Retrieved, State::Stuck]);
            left.extend(self.lost.clone());
            for flb in self.handler(file.handler).unwrap().flbs.iter().rev() {
                if self.users_of_flb(*flb, &left) > 0 {
                    continue;
                }
                if self.retrieve_flb(*flb).is_ok() {
                    let (name, handle) = self.flbs[*flb];
                    let _ = self.call(name, FlbFinish, 0, handle, None);
                }
                self.shared[*flb] = Shared::Finished;
            }
        }
        Ok(())
    }

    fn call_at_end(&mut self, callback: Callback, file: &File) -> Answer<()> {
        let retrieved = match file.retrieval {
            Retrieval::Never => None,
            Retrieval::Done(_) => Some(Ok(())),
            Retrieval::Failed(errno) => Some(Err(errno)),
        };
        self.call(file.handler, callback, file.file.object, file.handle, retrieved)
    }

    pub(crate) fn retrieve_flb(&mut self, flb: usize) -> Answer<()> {
        match self.shared[flb] {
            Shared::Nothing => return Err(Errno::NOENT),
            Shared::Finished => return Err(Errno::NODATA),
            Shared::Retrieved => return Ok(()),
            Shared::Waiting => {}
        }
        let (name, handle) = self.flbs[flb];
        self.call(name, FlbRetrieve, 0, handle, None)?;
        self.shared[flb] = Shared::Retrieved;
        Ok(())
    }

    pub(crate) fn close(&mut self, id: usize) -> Answer<()> {
        match self.sessions[id].state {
            State::Outgoing => {
                while let Some(file) = self.sessions[id].files.pop() {
                    let object = file.file.object;
                    let _ = self.call(file.handler, Unpreserve, object, file.handle, None);
                    self.put_flbs(self.handler(file.handler).unwrap().flbs);
                }
                self.sessions[id].state = State::Gone;
                Ok(())
            }
            State::Retrieved => {
                let finished = self.finish(id);
                let state = if finished.is_ok() { State::Gone } else { State::Stuck };
                self.sessions[id].state = state;
                finished
            }
            State::Waiting | State::Stuck | State::Gone => Err(Errno::BADF),
        }
    }

    fn outgoing(&self) -> Vec<usize> {
        let is_outgoing = |id: &usize| self.sessions[*id].state == State::Outgoing;
        (0..self.sessions.len()).filter(is_outgoing).collect()
    }

    /// Freezes all sessions. [`Reference::next`] returns the next kernel.
    pub(crate) fn reboot(&mut self, finalize: Answer<()>) -> Answer<()> {
        let sessions = self.outgoing();
        for (before, id) in sessions.iter().enumerate() {
            for index in 0..self.sessions[*id].files.len() {
                let file = self.sessions[*id].files[index].clone();
                let frozen = self.call(file.handler, Freeze, file.file.object, file.handle, None);
                if let Err(errno) = frozen {
                    self.thaw(*id, index);
                    self.thaw_sessions(&sessions[..before]);
                    return Err(errno);
                }
                self.sessions[*id].files[index].handle += Script::FROZEN;
            }
        }
        if finalize.is_err() {
            self.thaw_sessions(&sessions);
            return Err(Errno::AGAIN);
        }
        Ok(())
    }

    fn thaw_sessions(&mut self, ids: &[usize]) {
        for id in ids.iter().rev() {
            self.thaw(*id, self.sessions[*id].files.len());
        }
    }

    fn thaw(&mut self, id: usize, count: usize) {
        for index in 0..count {
            let file = self.sessions[id].files[index].clone();
            let _ = self.call(file.handler, Unfreeze, file.file.object, file.handle, None);
        }
    }

    /// Returns the next kernel, with these handlers.
    pub(crate) fn next(&self, handlers: Vec<Handler>) -> Self {
        let mut next = Self::new(handlers, self.flbs, self.limits);
        next.number = self.number + 1;
        next.faults.clone_from(&self.faults);
        for id in self.outgoing() {
            next.arrived.push(Session { state: State::Waiting, ..self.sessions[id].clone() });
        }
        let files = self.files_in(&[State::Outgoing]);
        for flb in 0..self.flbs.len() {
            if self.users_of_flb(flb, &files) > 0 {
                next.shared[flb] = Shared::Waiting;
            }
        }
        next
    }

    /// The names of all preserved sessions, with the tokens and handles of their files.
    pub(crate) fn preserved(&self) -> Vec<Listed> {
        let of = |id: &usize| {
            let Session { name, files, .. } = &self.sessions[*id];
            (name.clone(), files.iter().map(|file| (file.token, file.handle)).collect())
        };
        self.outgoing().iter().map(of).collect()
    }

    /// The shared objects, with the number of preserved files that need each.
    pub(crate) fn preserved_flbs(&self) -> Vec<(String, u64)> {
        let files = self.files_in(&[State::Outgoing]);
        let users = |flb| self.users_of_flb(flb, &files) as u64;
        let all =
            self.flbs.iter().enumerate().map(|(flb, (name, _))| (name.to_string(), users(flb)));
        all.filter(|(_, users)| *users > 0).collect()
    }
}
