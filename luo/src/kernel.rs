//! The kernel's LUO, at `/dev/liveupdate`.
//!
//! Only one process at a time can have the device open, and systemd opens it too. So each call opens the
//! device for its own duration, and waits while the device is busy. Sessions do not need the device.
//!
//! This process never asks the kernel for a name that it knows to be in use. Linux 7.3 leaves an empty
//! block behind if it refuses a duplicate name while the number of sessions is a multiple of 51, and that
//! block makes the *next* kernel panic. If another process has the name, creating one more session and
//! closing it removes the block.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::mutex::lock;
use crate::{
    Backend, Error, FromFdError, Incoming, Orchestrator, Outgoing, Preserve, Retrieve, Room,
    Session, SessionName, Ticket, Token, ioctl, memory, uapi,
};

/// The device of the kernel's LUO.
///
/// Clones share the list of names in use, so a process should have one `Device` and clones of it.
#[derive(Debug, Clone)]
pub struct Device {
    path: PathBuf,
    patience: Duration,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Lets threads of this process take turns, instead of finding the device busy.
    turn: Mutex<()>,
    /// Names of the outgoing sessions that this process created and still has open.
    names: Mutex<BTreeSet<SessionName>>,
}

impl Default for Device {
    fn default() -> Self {
        Self::new(uapi::DEVICE)
    }
}

impl Device {
    /// How long a call waits for a busy device by default.
    pub const PATIENCE: Duration = Duration::from_secs(10);

    /// The device at `path`. Calls open it when they need it.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), patience: Self::PATIENCE, shared: Arc::default() }
    }

    /// Lets each call wait up to `patience` for a busy device; with zero it does not wait.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// The path of the device.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the device node exists. Only a call shows whether the device works.
    pub fn is_present(&self) -> bool {
        self.path.metadata().is_ok_and(|found| found.file_type().is_char_device())
    }

    /// Takes over a session that another process created or retrieved, received from an fd store, from a
    /// socket, or across an `exec`. Does not need the device.
    pub fn adopt(&self, fd: OwnedFd) -> Result<Session, FromFdError> {
        match identify(fd.as_fd()) {
            Ok((name, true)) => Ok(Session::Incoming(Incoming::new(name, Box::new(Taken { fd })))),
            Ok((name, false)) => {
                let claim = self.claim(&name);
                let made = Made { fd, _claim: claim };
                Ok(Session::Outgoing(Outgoing::new(name, Box::new(made))))
            }
            Err(error) => Err(FromFdError { fd, error }),
        }
    }

    fn open(&self) -> Result<OwnedFd, Error> {
        // Read access is enough for every request, because the kernel does not check the mode.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        wait_while_busy(self.patience, std::thread::sleep, || {
            rustix::fs::open(&self.path, flags, Mode::empty())
        })
        .map_err(|(errno, waited)| Error::Open { path: self.path.clone(), errno, waited })
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        lock(&self.shared.turn)
    }

    /// Reserves `name`. Returns `None` if the name is in use.
    fn claim(&self, name: &SessionName) -> Option<Claim> {
        let mut names = lock(&self.shared.names);
        names
            .insert(name.clone())
            .then(|| Claim { name: name.clone(), shared: Arc::clone(&self.shared) })
    }
}

impl Orchestrator for Device {
    fn backend(&self) -> Backend {
        Backend::Kernel
    }

    fn ticket(&self) -> Option<Ticket> {
        None
    }

    fn room(&self) -> Room {
        Room::default()
    }

    fn create_session(&self, name: &SessionName) -> Result<Outgoing, Error> {
        let error = |errno| Error::Create { session: name.clone(), errno };
        let claim = self.claim(name).ok_or_else(|| error(Errno::EXIST))?;
        let _turn = self.turn();
        let device = self.open()?;
        let fd = ioctl::create_session(device.as_fd(), name).map_err(|errno| {
            if errno == Errno::EXIST {
                drop_empty_block(device.as_fd());
            }
            error(errno)
        })?;
        Ok(Outgoing::new(name.clone(), Box::new(Made { fd, _claim: Some(claim) })))
    }

    fn retrieve_session(&self, name: &SessionName) -> Result<Incoming, Error> {
        let _turn = self.turn();
        let device = self.open()?;
        let fd = ioctl::retrieve_session(device.as_fd(), name)
            .map_err(|errno| Error::RetrieveSession { session: name.clone(), errno })?;
        Ok(Incoming::new(name.clone(), Box::new(Taken { fd })))
    }

    fn create_memory(&self, name: &str, len: u64) -> Result<OwnedFd, Error> {
        memory::memfd(name, len)
    }

    /// Only calls `jump`: the kernel hands the sessions over in reboot(2), and undoes that if it fails.
    fn switch(&self, jump: &mut dyn FnMut()) -> Result<(), Error> {
        jump();
        Ok(())
    }
}

/// An outgoing session. Its fd is closed before its name is freed.
#[derive(Debug)]
struct Made {
    fd: OwnedFd,
    _claim: Option<Claim>,
}

impl Preserve for Made {
    fn preserve(&self, fd: BorrowedFd<'_>, token: Token) -> Result<(), Errno> {
        ioctl::preserve(self.fd.as_fd(), fd, token)
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// An incoming session.
#[derive(Debug)]
struct Taken {
    fd: OwnedFd,
}

impl Retrieve for Taken {
    fn retrieve(&self, token: Token) -> Result<OwnedFd, Errno> {
        ioctl::retrieve_fd(self.fd.as_fd(), token)
    }

    /// A file that the kernel failed to retrieve is lost.
    fn keeps(&self, _: Token) -> bool {
        false
    }

    fn finish(&self) -> Result<(), Errno> {
        ioctl::finish(self.fd.as_fd())
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A name that an outgoing session of this process uses.
#[derive(Debug)]
struct Claim {
    name: SessionName,
    shared: Arc<Shared>,
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut names = lock(&self.shared.names);
        names.remove(&self.name);
    }
}

/// Returns the name of a session, and whether it is an incoming session.
fn identify(fd: BorrowedFd<'_>) -> Result<(SessionName, bool), Error> {
    let number = fd.as_raw_fd();
    let error = |errno| Error::Adopt { fd: number, errno };
    let name = ioctl::get_name(fd).map_err(error)?;
    let name = SessionName::from_array(&name)
        .map_err(|source| Error::ForeignName { fd: number, source })?;
    Ok((name, ioctl::is_incoming(fd).map_err(error)?))
}

/// Removes the block that a refused duplicate name may have left behind (see the module's text): when a
/// session is closed, the kernel frees a trailing empty block. Ignores errors, because the caller already
/// reports one.
fn drop_empty_block(device: BorrowedFd<'_>) {
    let name = SessionName::new(format!("luo-shrink-{}", std::process::id()));
    if let Ok(name) = name {
        drop(ioctl::create_session(device, &name));
    }
}

/// Repeats `attempt` while it fails with EBUSY, with pauses from 1 ms, doubling up to 64 ms, until the
/// pauses add up to `patience`. The error has the sum of the pauses.
fn wait_while_busy<T>(
    patience: Duration,
    mut pause: impl FnMut(Duration),
    mut attempt: impl FnMut() -> Result<T, Errno>,
) -> Result<T, (Errno, Duration)> {
    const FIRST: Duration = Duration::from_millis(1);
    const LONGEST: Duration = Duration::from_millis(64);
    let mut waited = Duration::ZERO;
    let mut next = FIRST;
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(Errno::BUSY) if waited < patience => {
                let now = next.min(patience - waited);
                pause(now);
                waited += now;
                next = (next * 2).min(LONGEST);
            }
            Err(errno) => return Err((errno, waited)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn name(text: &str) -> SessionName {
        SessionName::new(text).unwrap()
    }

    #[test]
    fn a_busy_device_is_tried_until_it_is_free() {
        let mut pauses = Vec::new();
        let mut answers = vec![Ok(7), Err(Errno::BUSY), Err(Errno::BUSY), Err(Errno::BUSY)];
        let got = wait_while_busy(
            Duration::from_secs(1),
            |pause| pauses.push(pause.as_millis()),
            || answers.pop().unwrap(),
        );
        assert_eq!(got, Ok(7));
        assert_eq!(pauses, [1, 2, 4]);
    }

    #[test]
    fn patience_ends_and_the_pauses_add_up_to_it() {
        let mut pauses = Vec::new();
        let patience = Duration::from_millis(500);
        let got = wait_while_busy(patience, |p| pauses.push(p), || Err::<(), _>(Errno::BUSY));
        assert_eq!(got, Err((Errno::BUSY, patience)));
        assert_eq!(pauses.iter().sum::<Duration>(), patience);
        assert!(pauses.iter().all(|pause| *pause <= Duration::from_millis(64)));
    }

    #[test]
    fn without_patience_there_is_one_attempt() {
        let mut attempts = 0;
        let got = wait_while_busy(
            Duration::ZERO,
            |_| unreachable!(),
            || {
                attempts += 1;
                Err::<(), _>(Errno::BUSY)
            },
        );
        assert_eq!((got, attempts), (Err((Errno::BUSY, Duration::ZERO)), 1));
    }

    #[test]
    fn any_other_error_ends_the_waiting_at_once() {
        let mut answers = vec![Err::<(), _>(Errno::IO), Err(Errno::BUSY)];
        let got = wait_while_busy(Duration::MAX, |_| (), || answers.pop().unwrap());
        assert_eq!(got, Err((Errno::IO, Duration::from_millis(1))));
    }

    #[test]
    fn an_absent_device_is_reported_and_frees_the_name() {
        let dir = tempfile::tempdir().unwrap();
        let device = Device::new(dir.path().join("liveupdate"));
        assert!(!device.is_present());
        for _ in 0..2 {
            let error = device.create_session(&name("web")).unwrap_err();
            assert_eq!(error.errno(), Some(Errno::NOENT), "{error}");
            assert!(!error.is_not_found());
        }
        let error = device.retrieve_session(&name("web")).unwrap_err();
        assert!(matches!(error, Error::Open { .. }) && !error.is_not_found(), "{error}");
    }

    #[test]
    fn the_switch_is_left_to_the_kernel() {
        let mut jumps = 0;
        Device::new("/dev/null").switch(&mut || jumps += 1).unwrap();
        assert_eq!(jumps, 1);
    }

    #[test]
    fn a_regular_file_is_no_device() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(!Device::new(file.path()).is_present());
    }

    #[test]
    fn a_device_other_than_luo_is_reported() {
        let device = Device::new("/dev/null");
        assert!(device.is_present());
        let error = device.create_session(&name("web")).unwrap_err();
        assert_eq!(error, Error::Create { session: name("web"), errno: Errno::NOTTY });
        let error = device.retrieve_session(&name("web")).unwrap_err();
        assert_eq!(error, Error::RetrieveSession { session: name("web"), errno: Errno::NOTTY });
    }

    #[test]
    fn a_name_in_use_does_not_reach_the_kernel_from_any_clone() {
        let device = Device::new("/dev/null");
        let claim = device.claim(&name("web"));
        assert!(claim.is_some());
        let error = device.clone().create_session(&name("web")).unwrap_err();
        assert_eq!(error, Error::Create { session: name("web"), errno: Errno::EXIST });
        drop(claim);
        let error = device.create_session(&name("web")).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::NOTTY));
    }

    #[test]
    fn an_fd_that_is_no_session_is_handed_back() {
        let null = OwnedFd::from(File::open("/dev/null").unwrap());
        let number = null.as_raw_fd();
        let refused = Device::default().adopt(null).unwrap_err();
        assert_eq!(refused.fd.as_raw_fd(), number);
        assert_eq!(refused.error, Error::Adopt { fd: number, errno: Errno::NOTTY });
    }
}
