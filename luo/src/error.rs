//! The errors of sessions: one sentence for each pair of operation and errno.
//!
//! An error names the operation and its object. The sentence for the errno says what to do, so a user
//! need not look the errno up. For an errno without a sentence the system's text is used. The sentences follow
//! `kernel/liveupdate/luo_{core,session,file}.c` and `mm/memfd_luo.c` of Linux 7.3.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use rustix::io::Errno;

use crate::builtin::Disabled;
use crate::{Incoming, NameError, SessionName, Token};

/// An operation that failed, with its object and its errno.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Opening the device.
    #[error("cannot open {}: {}", path.display(), why_open(*errno, *waited))]
    Open {
        /// The device.
        path: PathBuf,
        /// What the kernel answered last.
        errno: Errno,
        /// How long the call waited because the device was busy.
        waited: Duration,
    },
    /// Creating an outgoing session.
    #[error("cannot create session `{session}`: {}", why_create(*errno))]
    Create {
        /// The session.
        session: SessionName,
        /// What the kernel answered, or would have.
        errno: Errno,
    },
    /// Retrieving an incoming session.
    #[error("cannot retrieve session `{session}`: {}", why_retrieve_session(*errno))]
    RetrieveSession {
        /// The session.
        session: SessionName,
        /// What the kernel answered.
        errno: Errno,
    },
    /// Preserving a file.
    #[error("cannot preserve token {token} in session `{session}`: {}", why_preserve(*errno))]
    Preserve {
        /// The outgoing session.
        session: SessionName,
        /// The key of the file.
        token: Token,
        /// What the kernel answered, or would have.
        errno: Errno,
    },
    /// Retrieving a file.
    #[error("cannot retrieve token {token} of session `{session}`: {}", why_retrieve(*errno, *is_kept))]
    Retrieve {
        /// The incoming session.
        session: SessionName,
        /// The key of the file.
        token: Token,
        /// What the kernel answered.
        errno: Errno,
        /// Whether the file can be retrieved again, because the attempt has changed nothing.
        is_kept: bool,
    },
    /// Finishing an incoming session.
    #[error("cannot finish session `{session}`: {}", why_finish(*errno))]
    Finish {
        /// The session, which is still there.
        session: SessionName,
        /// What the kernel answered.
        errno: Errno,
    },
    /// Finding out which session an fd from another process is.
    #[error("cannot take fd {fd} as a session: {}", why_adopt(*errno))]
    Adopt {
        /// The number of the fd.
        fd: i32,
        /// What the kernel answered.
        errno: Errno,
    },
    /// The built-in orchestrator refuses all work until it is started again.
    #[error("live update is disabled until the host is booted again")]
    Disabled {
        /// Why.
        #[source]
        source: Disabled,
    },
    /// The built-in orchestrator cannot read the sessions that were handed over.
    #[error("cannot read the sessions of the last generation: {}", why_unreadable(*errno))]
    Unreadable {
        /// What the state machine answered.
        errno: Errno,
    },
    /// Creating memory that can be preserved.
    #[error("cannot create {len} bytes of memory for `{name}`: {}", why_memory(*errno))]
    CreateMemory {
        /// The name of the memory.
        name: String,
        /// How many bytes.
        len: u64,
        /// What was answered.
        errno: Errno,
    },
    /// Handing all outgoing sessions over. The sessions are unchanged.
    #[error("cannot hand the sessions over: {}", why_switch(*errno))]
    Switch {
        /// What was answered.
        errno: Errno,
    },
    /// An fd from another process is a session, but its name is not a [`SessionName`].
    #[error("cannot take fd {fd} as a session of this program")]
    ForeignName {
        /// The number of the fd.
        fd: i32,
        /// What is wrong with its name.
        #[source]
        source: NameError,
    },
}

impl Error {
    /// Returns the errno. `None` if the failure has no errno.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Open { errno, .. }
            | Self::Create { errno, .. }
            | Self::RetrieveSession { errno, .. }
            | Self::Preserve { errno, .. }
            | Self::Retrieve { errno, .. }
            | Self::Finish { errno, .. }
            | Self::Adopt { errno, .. }
            | Self::Unreadable { errno }
            | Self::CreateMemory { errno, .. }
            | Self::Switch { errno } => Some(*errno),
            Self::ForeignName { .. } | Self::Disabled { .. } => None,
        }
    }

    /// Whether the session or the token that was to be retrieved does not exist. After a cold boot that
    /// is the normal answer.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::RetrieveSession { .. } | Self::Retrieve { .. })
            && self.errno() == Some(Errno::NOENT)
    }

    /// Whether the kernel cannot preserve this kind of file, so that its contents must be saved in another
    /// way. The only way to find out which kinds the kernel can preserve is to try.
    pub fn is_unsupported(&self) -> bool {
        matches!(self, Self::Preserve { .. }) && self.errno() == Some(Errno::NOENT)
    }

    /// Whether the service manager that keeps the files did not answer. Nothing is wrong with the files.
    pub fn is_unanswered(&self) -> bool {
        matches!(self, Self::Preserve { .. } | Self::Switch { .. })
            && matches!(self.errno(), Some(Errno::TIMEDOUT | Errno::CONNREFUSED))
    }

    /// Whether repeating the operation cannot succeed before the next boot. A file that could not be
    /// retrieved is lost, except if there was no free fd (EMFILE), the token does not exist (ENOENT) or the
    /// request could not be read (EFAULT), and except with an orchestrator that keeps it.
    pub fn is_final(&self) -> bool {
        match self {
            Self::Open { errno, .. } => *errno == Errno::IO,
            Self::Disabled { .. } | Self::Unreadable { .. } => true,
            Self::Retrieve { errno, is_kept, .. } => {
                !(*is_kept || matches!(*errno, Errno::MFILE | Errno::NOENT | Errno::FAULT))
            }
            _ => false,
        }
    }
}

/// A session that could not be finished. The error hands the session back, because dropping it would
/// finish it and lose every file that was not retrieved.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct FinishError {
    /// The session as it was.
    pub session: Incoming,
    /// Why it could not be finished.
    pub error: Error,
}

/// An fd that this program refuses as a session. The error hands the fd back, because closing it could
/// lose the files of a session.
#[derive(Debug, thiserror::Error)]
#[error("the fd is refused as a session")]
pub struct FromFdError {
    /// The fd as it was.
    pub fd: OwnedFd,
    /// Why it was refused.
    #[source]
    pub error: Error,
}

const NO_FD: &str =
    "this process has no file descriptor left; raise its limit (RLIMIT_NOFILE) and try again";
const NO_FILE: &str = "the system has no open file left; raise fs.file-max and try again";
const GONE: &str = "all sessions have been handed over to the next generation already";
const READ_ONLY: &str = "the pool became read-only; see the kernel's log";
const NO_MANAGER: &str = "no service manager listens at NOTIFY_SOCKET; restart the service";
const NOT_LUO: &str = "it does not speak the protocol of the Live Update Orchestrator";

fn known_or_os(known: &str, errno: Errno) -> String {
    if known.is_empty() { errno.to_string() } else { known.to_owned() }
}

fn why_open(errno: Errno, waited: Duration) -> String {
    let known = match errno {
        Errno::BUSY => {
            return format!(
                "another process kept it open for {waited:?}; only one process at a time can open \
                 it, and systemd does so at start-up and shutdown: try again later"
            );
        }
        Errno::NOENT => {
            "it does not exist: this kernel has no Live Update Orchestrator, or \
             `liveupdate=on kho=on` is missing on its command line"
        }
        Errno::IO => {
            "the kernel could not read the sessions of the previous kernel (its log says why, after \
             `luo:`); they cannot be retrieved in this boot, and no session can be created"
        }
        Errno::ACCESS => "only root may open it; run as root, or receive the sessions as fds",
        Errno::PERM => "a security policy forbids it; allow this program to open the device",
        Errno::NXIO | Errno::NODEV => {
            return format!("there is no driver behind the device node ({errno}); recreate it");
        }
        Errno::NOTDIR => "a part of its path is not a directory",
        Errno::MFILE => NO_FD,
        Errno::NFILE => NO_FILE,
        Errno::NOMEM => "the kernel is out of memory; free some and try again",
        _ => "",
    };
    known_or_os(known, errno)
}

fn why_create(errno: Errno) -> String {
    let known = match errno {
        Errno::EXIST => "a session of that name is open; close it first",
        Errno::INVAL => "the kernel refuses the name or does not know the request",
        Errno::NOSPC => "the kernel has as many sessions as it allows; close some",
        Errno::NOMEM => "the kernel is out of memory; free some and try again",
        Errno::MFILE => NO_FD,
        Errno::NFILE => NO_FILE,
        Errno::NOTTY => "the device is not the Live Update Orchestrator",
        Errno::SHUTDOWN => GONE,
        _ => "",
    };
    known_or_os(known, errno)
}

fn why_retrieve_session(errno: Errno) -> String {
    let known = match errno {
        Errno::NOENT => {
            "the previous kernel handed over no session of that name, or it was closed since"
        }
        Errno::INVAL => "another process has retrieved it and still has it open",
        Errno::NOMEM => "the kernel is out of memory; free some and try again",
        Errno::MFILE => NO_FD,
        Errno::NFILE => NO_FILE,
        Errno::NOTTY => "the device is not the Live Update Orchestrator",
        Errno::NOSPC => "the pool has no room to record the retrieval; free some and try again",
        Errno::ROFS => READ_ONLY,
        Errno::SHUTDOWN => GONE,
        _ => "",
    };
    known_or_os(known, errno)
}

fn why_preserve(errno: Errno) -> String {
    let known = match errno {
        Errno::EXIST => "the session has a file under that token; use another one",
        Errno::BADF => "the fd is not an open file (or was opened with O_PATH)",
        Errno::NOENT => {
            "the kernel cannot preserve this kind of file; use a memfd, but not one of hugetlbfs"
        }
        Errno::BUSY => {
            "the same file is preserved already, or was retrieved from a session that is not \
             finished, or a device is using its pages; finish or close that session first"
        }
        Errno::NOMEM => {
            "there is not enough free memory: holes of the file are filled, and pages in the \
             scratch area are moved out, which a device that uses them prevents; free some, or boot \
             with a smaller `kho_scratch=`"
        }
        Errno::NOSPC => {
            "the session has as many files as it allows: use another session; or the pool is full: \
             free some of it; or the service's fd store is full: raise FileDescriptorStoreMax="
        }
        Errno::TOOBIG => {
            "the file's memory is not in the pool, and is too big to be copied there; create it in \
             the pool"
        }
        Errno::MFILE => NO_FD,
        Errno::CONNREFUSED => NO_MANAGER,
        Errno::TIMEDOUT => "the service manager takes no message",
        Errno::ROFS => READ_ONLY,
        Errno::SHUTDOWN => GONE,
        Errno::OPNOTSUPP => "the file carries a seal that this kernel cannot hand over",
        Errno::FBIG => "the file is too big; split it into files under 16 TiB",
        Errno::INVAL => "the session is an incoming one, or the file's memory cannot be preserved",
        Errno::NOTTY => NOT_LUO,
        Errno::FAULT => "the kernel could not read the request",
        _ => "",
    };
    known_or_os(known, errno)
}

fn why_retrieve(errno: Errno, is_kept: bool) -> String {
    let known = match errno {
        Errno::NFILE if is_kept => NO_FILE,
        Errno::NOMEM if is_kept => "there is not enough free memory; free some and try again",
        Errno::IO if is_kept => "the pool could not be read or written; try again",
        Errno::NOSPC if is_kept => {
            "the pool has no room to record the retrieval; free some and try again"
        }
        Errno::ROFS if is_kept => READ_ONLY,
        Errno::NOENT => "nothing is preserved under that token, or the session is finished already",
        Errno::MFILE => NO_FD,
        Errno::NFILE => {
            "the system had no open file left (fs.file-max); what was preserved under the token is \
             lost"
        }
        Errno::NOMEM => {
            "the memory limit of this control group was hit; what was preserved under the token is \
             lost"
        }
        Errno::NOSPC => {
            "the limit for shared memory was hit; what was preserved under the token is lost"
        }
        Errno::IO => "a page was not handed over; what was preserved under the token is lost",
        Errno::OPNOTSUPP => {
            "the file has a seal that this kernel does not know; what was preserved under the token \
             is lost"
        }
        Errno::STALE => {
            "another file is in its place, and the preserved file is lost; check whether a program \
             changed the pool or mixed up the fds"
        }
        Errno::ROFS => "the pool became read-only; what was preserved under the token is lost",
        Errno::NOTUNIQ => {
            "the service's fd store holds two files of that name, and nothing says which is the \
             right one; `systemd-analyze fdstore` lists them"
        }
        Errno::SHUTDOWN => GONE,
        Errno::INVAL => "the session is an outgoing one, or the record of the file is damaged",
        Errno::NOTTY => NOT_LUO,
        Errno::FAULT => "the kernel could not write its answer; try again",
        _ => "",
    };
    known_or_os(known, errno)
}

fn why_finish(errno: Errno) -> String {
    let known = match errno {
        Errno::BUSY => "a file in it is not ready to be finished; nothing changed, try again later",
        Errno::INVAL => "the session is an outgoing one, or the kernel does not know the request",
        Errno::NOTTY => NOT_LUO,
        Errno::SHUTDOWN => GONE,
        _ => "",
    };
    known_or_os(known, errno)
}

fn why_adopt(errno: Errno) -> String {
    let known = match errno {
        Errno::NOTTY => NOT_LUO,
        Errno::INVAL => "it is no session, or this kernel is too old to tell a session's name",
        Errno::BADF => "it is not open, or was opened with O_PATH",
        _ => "",
    };
    known_or_os(known, errno)
}

fn why_unreadable(errno: Errno) -> String {
    let known = match errno {
        Errno::NOENT => "a file in them is of a format that this build does not know",
        Errno::EXIST => {
            "two sessions of one name, two files under one token or two shared objects of one format"
        }
        _ => "",
    };
    known_or_os(known, errno)
}

fn why_memory(errno: Errno) -> String {
    let known = match errno {
        Errno::ACCESS => {
            "executable memfds are forbidden, and no other kind survives a live update (is \
             vm.memfd_noexec 2?)"
        }
        Errno::NOSPC => "the pool has not that much room; stop a VM, or boot with a bigger pool",
        Errno::FBIG => "no file of the pool's filesystem can be that big; use smaller pieces",
        Errno::OPNOTSUPP => "the pool's filesystem cannot reserve room; use ext4 or XFS",
        Errno::INVAL => "memory cannot have this name or this size",
        Errno::MFILE => NO_FD,
        Errno::NFILE => NO_FILE,
        Errno::NOMEM => "the kernel is out of memory; free some and try again",
        Errno::ROFS => READ_ONLY,
        _ => "",
    };
    known_or_os(known, errno)
}

fn why_switch(errno: Errno) -> String {
    let known = match errno {
        Errno::OPNOTSUPP => {
            "they live in this process, which does not survive a kexec; hand them to another process"
        }
        Errno::INVAL => "the size of a preserved file was changed; preserve the file again",
        Errno::MFILE => NO_FD,
        Errno::NFILE => NO_FILE,
        Errno::NOSPC => "the pool has no room for the tree; free some of it",
        Errno::ROFS => READ_ONLY,
        Errno::IO => "the pool cannot be written; see the kernel's log",
        Errno::NOTRECOVERABLE => {
            "the kernel was not entered, and what the pool holds for it cannot be taken back; remove \
             `handover` from the pool before anything else"
        }
        Errno::AGAIN => "their tree cannot be written",
        Errno::CONNREFUSED => NO_MANAGER,
        Errno::TIMEDOUT => "the service manager did not say that it has them",
        Errno::XFULL => {
            "the service manager has fewer files than were sent to it, and its log says why (`Failed to add fd to \
             store`)"
        }
        Errno::SHUTDOWN => GONE,
        _ => "",
    };
    known_or_os(known, errno)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Every way to fail with `errno`, and the words that name its object.
    fn all(errno: Errno) -> Vec<(Error, Vec<&'static str>)> {
        let session = SessionName::new("web").unwrap();
        let token = Token(4711);
        let waited = Duration::from_millis(1500);
        vec![
            (Error::Open { path: "/dev/x".into(), errno, waited }, vec!["open", "/dev/x"]),
            (Error::Create { session: session.clone(), errno }, vec!["create", "`web`"]),
            (Error::RetrieveSession { session: session.clone(), errno }, vec!["retrieve", "`web`"]),
            (
                Error::Preserve { session: session.clone(), token, errno },
                vec!["preserve", "`web`", "4711"],
            ),
            (
                Error::Retrieve { session: session.clone(), token, errno, is_kept: false },
                vec!["retrieve", "`web`", "4711"],
            ),
            (Error::Finish { session, errno }, vec!["finish", "`web`"]),
            (Error::Adopt { fd: 42, errno }, vec!["take", "42"]),
            (Error::Unreadable { errno }, vec!["read", "sessions"]),
            (
                Error::CreateMemory { name: "web".to_owned(), len: 4096, errno },
                vec!["create", "4096", "`web`"],
            ),
            (Error::Switch { errno }, vec!["hand", "over"]),
        ]
    }

    #[test]
    fn every_operation_has_another_sentence_for_every_errno_and_names_its_object() {
        let mut seen = BTreeMap::new();
        for number in 1..=133 {
            let errno = Errno::from_raw_os_error(number);
            for (error, words) in all(errno) {
                let sentence = error.to_string();
                for word in words {
                    assert!(sentence.contains(word), "{sentence:?} does not name {word}");
                }
                assert!(!sentence.contains('\n') && !sentence.ends_with('.'), "{sentence:?}");
                assert!(!sentence.contains("  "), "{sentence:?}");
                assert_eq!(error.errno(), Some(errno));
                if let Some(other) = seen.insert(sentence.clone(), error.clone()) {
                    panic!("{error:?} and {other:?} say the same: {sentence:?}");
                }
            }
        }
    }

    #[test]
    fn an_errno_without_a_sentence_falls_back_to_the_system_text() {
        for (error, _) in all(Errno::XDEV) {
            assert!(error.to_string().contains("Invalid cross-device link"), "{error}");
        }
    }

    #[test]
    fn an_absent_device_names_the_kernel_and_the_command_line() {
        let (error, _) = all(Errno::NOENT).remove(0);
        let sentence = error.to_string();
        assert!(sentence.contains("no Live Update Orchestrator"), "{sentence}");
        assert!(sentence.contains("`liveupdate=on kho=on`"), "{sentence}");
    }

    #[test]
    fn only_a_missing_session_or_token_is_not_found() {
        let found = |errno| -> Vec<bool> {
            all(errno).iter().map(|(error, _)| error.is_not_found()).collect()
        };
        let missing = [false, false, true, false, true, false, false, false, false, false];
        assert_eq!(found(Errno::NOENT), missing);
        assert_eq!(found(Errno::INVAL), [false; 10]);
    }

    #[test]
    fn only_a_file_that_no_handler_takes_is_unsupported() {
        let unsupported: Vec<bool> =
            all(Errno::NOENT).iter().map(|(error, _)| error.is_unsupported()).collect();
        let mut expected = [false; 10];
        expected[3] = true;
        assert_eq!(unsupported, expected);
        assert!(all(Errno::BADF).iter().all(|(error, _)| !error.is_unsupported()));
    }

    #[test]
    fn a_file_that_failed_to_be_retrieved_is_lost_and_says_so() {
        let fatal = [Errno::NOMEM, Errno::NOSPC, Errno::IO, Errno::NFILE, Errno::OPNOTSUPP];
        for errno in fatal.into_iter().chain([Errno::STALE, Errno::ROFS]) {
            let (error, _) = all(errno).remove(4);
            assert!(error.is_final(), "{error}");
            assert!(error.to_string().contains("is lost"), "{error}");
        }
        for errno in [Errno::MFILE, Errno::NOENT, Errno::FAULT] {
            let (error, _) = all(errno).remove(4);
            assert!(!error.is_final(), "{error}");
        }
        let session = SessionName::new("web").unwrap();
        for errno in [Errno::NOMEM, Errno::NOSPC, Errno::IO, Errno::NFILE, Errno::ROFS] {
            let session = session.clone();
            let kept = Error::Retrieve { session, token: Token(1), errno, is_kept: true };
            assert!(!kept.is_final() && !kept.to_string().contains("is lost"), "{kept}");
        }
        assert!(all(Errno::IO).remove(0).0.is_final());
        assert!(!all(Errno::BUSY).remove(0).0.is_final());
    }
}
