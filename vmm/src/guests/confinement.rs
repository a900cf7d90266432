//! How the host confines the processes of its VMs: which users they run as, and whether a VM may run if a part
//! of its confinement is missing. What the confinement is, `crate::confine` says.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::conversation::ProcessError;
use super::users::{OF_MACHINE, Users};
use crate::config::{Confine, HostSection, USERS};
use crate::mutex::lock;

/// The confinement of all VMs of a host.
#[derive(Debug)]
pub struct Confinement {
    first_user: u32,
    required: bool,
    taken: Mutex<BTreeSet<u32>>,
    /// Reserves users among the hosts of this machine. `None`: only this host has VMs, or nothing can be reserved.
    reserved: Option<Users>,
    said: Mutex<BTreeSet<String>>,
}

impl Confinement {
    /// The confinement that `[host]` asks for, of a host whose VMs are the only ones of its machine.
    pub fn new(section: &HostSection) -> Arc<Self> {
        Arc::new(Self::with(section, None))
    }

    /// The same beside other hosts and programs that run VMs on this machine, if this one is root. For another user
    /// VMs have no user of their own.
    pub fn among_others(section: &HostSection) -> Arc<Self> {
        let is_root = rustix::process::geteuid().is_root();
        Arc::new(Self::with(section, is_root.then_some(Path::new(OF_MACHINE))))
    }

    fn with(section: &HostSection, reserved: Option<&Path>) -> Self {
        let (first_user, required) = (section.users.0, section.confine == Confine::Required);
        let (taken, said) = (Mutex::default(), Mutex::default());
        let reserved = reserved.and_then(|path| {
            let opened = Users::open(path);
            opened.inspect_err(|error| not_reserved(&path.display(), error)).ok()
        });
        Self { first_user, required, taken, reserved, said }
    }

    /// Takes a user that no other process of this machine runs as, for a new process. `None` if all are taken.
    pub fn take_user(self: &Arc<Self>) -> Option<User> {
        let mut taken = lock(&self.taken);
        let is_free = |id: &u32| {
            let reserved = self.reserved.as_ref().map_or(Ok(true), |users| users.reserve(*id));
            reserved.inspect_err(|error| not_reserved(id, error)).unwrap_or(true)
        };
        let id = (self.first_user..last_user(self.first_user))
            .find(|id| !taken.contains(id) && is_free(id))?;
        taken.insert(id);
        Some(User { id, confinement: self.clone() })
    }

    /// Decides whether a VM may run whose confinement lacks the parts in `missing`. If so, logs each of them
    /// once for all VMs.
    pub fn accept(&self, missing: &[String]) -> Result<(), ProcessError> {
        if self.required && !missing.is_empty() {
            return Err(ProcessError::Unconfined { missing: missing.join("; ") });
        }
        for text in missing {
            if lock(&self.said).insert(text.clone()) {
                tracing::warn!("the processes of VMs are not confined in full: {text}");
            }
        }
        Ok(())
    }
}

fn not_reserved(what: &dyn fmt::Display, error: &io::Error) {
    tracing::warn!(
        "the user IDs of VMs ({what}) cannot be reserved, so that another program may give its VMs the same ones: \
         {error}"
    );
}

/// The last user of the host's range, `first` being the first. No VM has it: it is for the process that
/// speaks DHCP for the host.
pub fn last_user(first: u32) -> u32 {
    first + USERS - 1
}

/// A user and group ID of one process. Free for another process when dropped.
#[derive(Debug)]
pub struct User {
    id: u32,
    confinement: Arc<Confinement>,
}

impl User {
    /// The user ID, and the group ID.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The confinement of the host.
    pub fn confinement(&self) -> &Arc<Confinement> {
        &self.confinement
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let mut taken = lock(&self.confinement.taken);
        if let Some(users) = &self.confinement.reserved {
            users.free(self.id);
        }
        taken.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::FirstUser;

    #[test]
    fn no_two_processes_run_as_one_user_at_a_time() {
        let section = HostSection { users: FirstUser(7000), ..HostSection::default() };
        let confinement = Confinement::new(&section);
        let take = || confinement.take_user().unwrap();
        let (a, b) = (take(), take());
        assert_eq!((a.id(), b.id()), (7000, 7001));
        drop(a);
        let c = take();
        assert_eq!((b.id(), c.id()), (7001, 7000));
        let rest: Vec<_> = (2..USERS - 1).map(|_| take()).collect();
        assert!(rest.iter().all(|user| user.id() != last_user(7000)));
        assert!(confinement.take_user().is_none());
        drop(rest);
        assert_eq!(take().id(), 7002);
    }

    #[test]
    fn no_two_hosts_of_a_machine_give_processes_the_same_user() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/users");
        let section = HostSection { users: FirstUser(7000), ..HostSection::default() };
        let host = || Arc::new(Confinement::with(&section, Some(&path)));
        let (one, other) = (host(), host());
        let taken = [&one, &other, &one].map(|host| host.take_user().unwrap());
        assert_eq!(taken.each_ref().map(User::id), [7000, 7001, 7002]);
        let [first, ..] = taken;
        drop(first);
        assert_eq!(other.take_user().unwrap().id(), 7000);
        // A host that ends leaves no lock behind.
        let (ending, next) = (Users::open(&path).unwrap(), Users::open(&path).unwrap());
        assert!(ending.reserve(7003).unwrap());
        assert!(!next.reserve(7003).unwrap());
        drop(ending);
        assert!(next.reserve(7003).unwrap());
    }

    #[test]
    fn an_incomplete_confinement_is_an_error_only_if_a_complete_one_is_required() {
        let missing = ["landlock: the kernel has none", "seccomp: none"].map(str::to_owned);
        for (confine, accepted) in [(Confine::BestEffort, true), (Confine::Required, false)] {
            let section = HostSection { confine, ..HostSection::default() };
            let confinement = Confinement::new(&section);
            assert!(confinement.accept(&[]).is_ok());
            match confinement.accept(&missing) {
                Ok(()) => assert!(accepted),
                Err(error) => {
                    let said = error.to_string();
                    assert!(
                        !accepted && said.ends_with("landlock: the kernel has none; seccomp: none")
                    );
                }
            }
        }
    }
}
