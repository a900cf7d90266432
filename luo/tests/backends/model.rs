//! The model: a state machine whose files are numbers.

use std::collections::BTreeSet;

use luo::builtin::scripted::{Script, ScriptedFile};
use luo::builtin::tree::{Handover, v1};
use luo::builtin::{Compatible, Luo, Name, Parameters, SessionId};
use luo::{Errno, SessionName, Token};

/// A state machine, with the incoming sessions and the names of the retrieved ones, which are
/// needed after a crash of the host.
pub(crate) struct Model {
    luo: std::cell::RefCell<Luo<ScriptedFile>>,
    script: Script,
    arrived: Option<Handover>,
    taken: BTreeSet<Name>,
}

impl Model {
    pub(crate) fn new() -> Self {
        let script = Script::new();
        let luo = start(&script, None).into();
        Self { luo, script, arrived: None, taken: BTreeSet::new() }
    }

    pub(crate) fn create(&self, name: &SessionName) -> Result<SessionId, Errno> {
        self.with_device(|luo| luo.create_session(&name.to_array(), |_| Ok(())))
    }

    pub(crate) fn retrieve_session(&mut self, name: &SessionName) -> Result<SessionId, Errno> {
        let id = self.with_device(|luo| luo.retrieve_session(&name.to_array(), |_| Ok(())))?;
        self.taken.insert(name.into());
        Ok(id)
    }

    fn with_device<T>(
        &self,
        act: impl FnOnce(&mut Luo<ScriptedFile>) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let mut luo = self.luo.borrow_mut();
        luo.open_device()?;
        let done = act(&mut luo);
        luo.close_device()?;
        done
    }

    pub(crate) fn preserve(&self, id: SessionId, token: Token, object: u32) -> Result<(), Errno> {
        let file = self.script.open(1, object);
        self.luo.borrow_mut().preserve_fd(id, token, Some(file))
    }

    pub(crate) fn retrieve(&self, id: SessionId, token: Token) -> Result<u32, Errno> {
        self.luo.borrow_mut().retrieve_fd(id, token).map(|file| file.object)
    }

    pub(crate) fn close(&self, id: SessionId) {
        self.luo.borrow_mut().close_session(id).unwrap();
    }

    pub(crate) fn finish_and_close(&self, id: SessionId) {
        self.luo.borrow_mut().finish(id).unwrap();
        self.close(id);
    }

    pub(crate) fn switch(&mut self) {
        let mut tree = Vec::new();
        let keep = |bytes: &[u8]| {
            tree = bytes.to_vec();
            Ok(())
        };
        self.luo.borrow_mut().reboot(keep).unwrap();
        self.arrived = Some(v1::decode(&tree).unwrap());
        self.taken.clear();
        self.luo = start(&self.script, self.arrived.as_ref()).into();
    }

    pub(crate) fn switch_in_vain(&self) {
        let answer = self.luo.borrow_mut().reboot(|_| Err(Errno::IO));
        assert_eq!(answer, Err(Errno::AGAIN));
    }

    /// Starts the next host, which finds the incoming sessions that were not retrieved, and those without files: nothing
    /// of them can be given out twice, so no mark says that they were taken.
    pub(crate) fn crash(&mut self) {
        let Self { arrived, taken, .. } = self;
        if let Some(arrived) = arrived {
            arrived.sessions.retain(|s| s.files.is_empty() || !taken.contains(&s.name));
        }
        self.luo = start(&self.script, self.arrived.as_ref()).into();
    }

    /// The number of files in sessions that were not retrieved.
    pub(crate) fn waiting_files(&self) -> usize {
        let sessions = self.arrived.iter().flat_map(|arrived| &arrived.sessions);
        let waiting = sessions.filter(|session| !self.taken.contains(&session.name));
        waiting.map(|session| session.files.len()).sum()
    }

    pub(crate) fn liveupdate_number(&self) -> u64 {
        self.luo.borrow().liveupdate_number()
    }
}

fn start(script: &Script, arrived: Option<&Handover>) -> Luo<ScriptedFile> {
    let tree = arrived.map(|handover| v1::encode(handover).unwrap());
    let mut luo = Luo::start(Parameters::default(), || tree.ok_or(Errno::NOENT));
    let format = Compatible::new("scripted-v1").unwrap();
    luo.register_handler(script.handler(format, &[1], true)).unwrap();
    luo
}
