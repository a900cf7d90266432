//! The emulated part of one kernel: answers the program's calls on the device and its sessions.
//!
//! Calls are handled one after another; each is answered by the state machine or passed on to the
//! real kernel. Before each call the state machine learns of every file whose last reference was
//! closed: a program that closes the device and opens it again must not find it busy.
//!
//! The time for a call does not depend on the number of sessions: the file behind an fd is looked
//! up by the cookie of its socket, and an epoll returns the sockets that are hung up.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::net::sockopt::socket_cookie;

use super::anchor::{Anchor, of_the_system};
use super::memfd::{MemfdHandler, Store};
use super::node;
use super::notify::{Answer, Listener, Notification};
use super::path;
use super::request::{New, Request};
use super::tracee::Tracee;
use crate::builtin::{Disabled, Luo, OpenFile, Parameters, SessionId};
use crate::uapi;

/// The file that a socket of the program stands for.
#[derive(Debug, Clone, Copy)]
enum Emulated {
    Device,
    Session(SessionId),
}

/// How the supervisor handles a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Give this answer.
    Answer(Answer),
    /// Do nothing: the call is answered already, or no thread waits for an answer.
    Done,
    /// Switch to the next kernel.
    Reboot,
}

impl From<Answer> for Verdict {
    fn from(answer: Answer) -> Self {
        Self::Answer(answer)
    }
}

const CREATE_NEW: i32 = libc::O_CREAT | libc::O_EXCL;
const LET_THROUGH: Verdict = Verdict::Answer(Answer::Continue);

/// The emulated part of a kernel.
#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) luo: Luo<OpenFile>,
    /// The supervisor's sockets, by the cookie of the program's socket.
    anchors: HashMap<u64, (OwnedFd, Emulated)>,
    /// An epoll of these sockets, whose events are hang-ups.
    hung_up: OwnedFd,
}

impl Kernel {
    /// Starts a kernel with the handover tree of the previous one.
    pub(super) fn start(tree: Option<&[u8]>, store: &Store) -> Result<Self, StartError> {
        let mut luo = Luo::start(Parameters::default(), || tree.ok_or(Errno::NOENT));
        if let Some(disabled) = luo.disabled() {
            return Err(StartError::Tree(disabled.clone()));
        }
        luo.register_handler(MemfdHandler(store.clone())).map_err(StartError::System)?;
        let hung_up = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(StartError::System)?;
        Ok(Self { luo, anchors: HashMap::new(), hung_up })
    }

    /// Tells the state machine of all files whose last reference was closed.
    pub(super) fn release_closed_files(&mut self) -> Result<(), Errno> {
        const AT_ONCE: usize = 64;
        let mut events: Vec<epoll::Event> = Vec::with_capacity(AT_ONCE);
        loop {
            events.clear();
            epoll::wait(&self.hung_up, spare_capacity(&mut events), Some(&Timespec::default()))?;
            for event in &events {
                let closed = match self.anchors.remove(&event.data.u64()) {
                    Some((_, Emulated::Device)) => self.luo.close_device(),
                    Some((_, Emulated::Session(session))) => self.luo.close_session(session),
                    None => Ok(()),
                };
                // Linux ignores errors of a release, too.
                let _ = closed;
            }
            if events.len() < AT_ONCE {
                return Ok(());
            }
        }
    }

    /// Handles a call, and returns what is left to do.
    pub(super) fn judge(&mut self, listener: &Listener, call: &Notification) -> Verdict {
        let [first, second, third, fourth, fifth, _] = call.arguments;
        let tracee = Tracee::new(call.thread);
        // The path counts only if the thread still waits after it was read.
        let on_device = |directory: u64, path| {
            is_device(&tracee, directory as i32, path) && listener.waits(call.id)
        };
        const HERE: u64 = libc::AT_FDCWD as u32 as u64;
        let answer = |address, bytes: Vec<u8>| match tracee.write(address, &bytes) {
            Ok(()) => Answer::Success,
            Err(_) => Answer::Errno(Errno::FAULT),
        };
        match call.call {
            libc::SYS_ioctl => self.ioctl(listener, call, &tracee),
            libc::SYS_reboot => reboot(first, second),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_open if on_device(HERE, first) => self.open(listener, call, &tracee, second),
            libc::SYS_openat if on_device(first, second) => {
                self.open(listener, call, &tracee, third)
            }
            libc::SYS_openat2 if on_device(first, second) => match open_how(&tracee, third, fourth)
            {
                Ok(flags) => self.open(listener, call, &tracee, flags),
                Err(errno) => Answer::Errno(errno).into(),
            },
            #[cfg(target_arch = "x86_64")]
            libc::SYS_stat | libc::SYS_lstat if on_device(HERE, first) => {
                answer(second, node::stat()).into()
            }
            libc::SYS_newfstatat if on_device(first, second) => answer(third, node::stat()).into(),
            libc::SYS_statx if on_device(first, second) => answer(fifth, node::statx()).into(),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_access if on_device(HERE, first) => {
                Answer::from(node::access(second as u32)).into()
            }
            libc::SYS_faccessat | libc::SYS_faccessat2 if on_device(first, second) => {
                Answer::from(node::access(third as u32)).into()
            }
            // The device is not a symbolic link and has no extended attributes.
            #[cfg(target_arch = "x86_64")]
            libc::SYS_readlink if on_device(HERE, first) => Answer::Errno(Errno::INVAL).into(),
            libc::SYS_readlinkat if on_device(first, second) => Answer::Errno(Errno::INVAL).into(),
            libc::SYS_getxattr | libc::SYS_lgetxattr if on_device(HERE, first) => {
                Answer::Errno(Errno::NODATA).into()
            }
            libc::SYS_listxattr | libc::SYS_llistxattr if on_device(HERE, first) => {
                Answer::Success.into()
            }
            _ => LET_THROUGH,
        }
    }

    fn open(
        &mut self,
        listener: &Listener,
        call: &Notification,
        tracee: &Tracee,
        flags: u64,
    ) -> Verdict {
        let opened = match flags as i32 {
            flags if flags & CREATE_NEW == CREATE_NEW => Err(Errno::EXIST),
            flags if flags & libc::O_DIRECTORY != 0 => Err(Errno::NOTDIR),
            // Calls on such an fd never reach a driver, so the file of another device will do.
            flags if flags & libc::O_PATH != 0 => return open_path(listener, call, flags),
            flags => self.open_device(listener, call, flags),
        };
        match opened {
            Ok(()) => Verdict::Done,
            Err(_) if tracee.has_no_free_fd() => Answer::Errno(Errno::MFILE).into(),
            Err(errno) => Answer::Errno(errno).into(),
        }
    }

    fn open_device(
        &mut self,
        listener: &Listener,
        call: &Notification,
        flags: i32,
    ) -> Result<(), Errno> {
        self.luo.open_device()?;
        let installed = Anchor::new().and_then(|anchor| {
            let closes_on_exec = flags & libc::O_CLOEXEC != 0;
            listener.answer_with_fd(call.id, anchor.theirs.as_fd(), closes_on_exec)?;
            self.watch(anchor, Emulated::Device)
        });
        if installed.is_err() {
            self.luo.close_device()?;
        }
        installed
    }

    /// Watches for the last close of a file that the program got.
    fn watch(&mut self, anchor: Anchor, file: Emulated) -> Result<(), Errno> {
        let Anchor { theirs: _, ours, cookie } = anchor;
        let data = epoll::EventData::new_u64(cookie);
        // An epoll always reports hang-ups, without a flag.
        epoll::add(&self.hung_up, &ours, data, epoll::EventFlags::empty())?;
        self.anchors.insert(cookie, (ours, file));
        Ok(())
    }

    fn ioctl(&mut self, listener: &Listener, call: &Notification, tracee: &Tracee) -> Verdict {
        let [fd, command, address, ..] = call.arguments;
        let command = command as u32;
        if is_of_every_file(command) {
            return LET_THROUGH;
        }
        // The new reference is dropped at once, because it would keep the file open.
        let cookie = tracee.file(fd as i32).and_then(socket_cookie);
        if cookie == Err(Errno::MFILE) {
            return Answer::Errno(of_the_system(Errno::MFILE)).into();
        }
        let anchor = cookie.ok().and_then(|cookie| self.anchors.get(&cookie));
        let Some((_, file)) = anchor.filter(|_| listener.waits(call.id)) else {
            return LET_THROUGH;
        };
        let mut request = Request::new(listener, call.id, tracee);
        let result = match *file {
            Emulated::Device => self.luo.device_ioctl(&mut request, command, address),
            Emulated::Session(id) => self.luo.session_ioctl(&mut request, id, command, address),
        };
        match result.map_err(|errno| (errno, None)).and_then(|()| request.install()) {
            Ok(Some(New::Session(id, anchor))) => {
                Answer::from(self.watch(anchor, Emulated::Session(id))).into()
            }
            Ok(_) => Answer::Success.into(),
            Err((errno, new)) => {
                if let Some(New::Session(id, _)) = new {
                    self.take_back(id, command);
                }
                Answer::Errno(request.worst(errno)).into()
            }
        }
    }

    /// Undoes a request for a session that could not be put behind an fd.
    fn take_back(&mut self, session: SessionId, command: u32) {
        let undone = if command == uapi::CREATE_SESSION {
            self.luo.close_session(session)
        } else {
            self.luo.return_session(session)
        };
        debug_assert_eq!(undone, Ok(()), "the session was made a moment ago");
    }
}

/// The reason why an emulated kernel does not start.
#[derive(Debug)]
pub(super) enum StartError {
    Tree(Disabled),
    System(Errno),
}

fn is_device(tracee: &Tracee, directory: i32, path: u64) -> bool {
    let Some(path) = tracee.path(path) else { return false };
    path::is_device(&path, || tracee.directory(directory))
}

/// Reads the flags of a `struct open_how`. EINVAL: `size` is too small for one.
fn open_how(tracee: &Tracee, address: u64, size: u64) -> Result<u64, Errno> {
    const SIZE: u64 = size_of::<libc::open_how>() as u64;
    let mut flags = [0; 8];
    if size < SIZE {
        return Err(Errno::INVAL);
    }
    tracee.read(address, &mut flags).map_err(|_| Errno::FAULT)?;
    Ok(u64::from_le_bytes(flags))
}

/// Answers an open with O_PATH. The supervisor cannot pass an O_PATH file to another process, so
/// the program gets `/dev/null`, which unlike an O_PATH file can be read.
fn open_path(listener: &Listener, call: &Notification, flags: i32) -> Verdict {
    use rustix::fs::{Mode, OFlags, open};
    let null = open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let closes_on_exec = flags & libc::O_CLOEXEC != 0;
    match null.and_then(|null| listener.answer_with_fd(call.id, null.as_fd(), closes_on_exec)) {
        Ok(()) => Verdict::Done,
        Err(errno) => Answer::Errno(errno).into(),
    }
}

/// Whether Linux handles an ioctl for files of any kind, before the driver gets it.
fn is_of_every_file(command: u32) -> bool {
    const FIOQSIZE: u32 = 0x5460;
    let commands = [libc::FIOCLEX, libc::FIONCLEX, libc::FIONBIO, libc::FIOASYNC];
    commands.iter().any(|known| *known as u32 == command) || command == FIOQSIZE
}

/// Checks the magic numbers of reboot(2). The filter passes only the KEXEC command.
fn reboot(magic: u64, magic2: u64) -> Verdict {
    const MAGIC: u32 = 0xfee1_dead;
    const MAGIC2: [u32; 4] = [0x2812_1969, 0x0512_1996, 0x1604_1998, 0x2011_2000];
    if magic as u32 == MAGIC && MAGIC2.contains(&(magic2 as u32)) {
        Verdict::Reboot
    } else {
        Answer::Errno(Errno::INVAL).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::builtin::Name;

    fn kernel() -> Kernel {
        Kernel::start(None, &Store::default()).unwrap()
    }

    /// Watches a new file, and returns the program's socket.
    fn watched(kernel: &mut Kernel, file: Emulated) -> OwnedFd {
        let anchor = Anchor::new().unwrap();
        let theirs = anchor.theirs.try_clone().unwrap();
        kernel.watch(anchor, file).unwrap();
        theirs
    }

    #[test]
    fn the_device_is_free_after_its_last_close() {
        let mut kernel = kernel();
        kernel.luo.open_device().unwrap();
        let theirs = watched(&mut kernel, Emulated::Device);
        let copy = theirs.try_clone().unwrap();
        drop(theirs);
        kernel.release_closed_files().unwrap();
        assert_eq!(kernel.luo.open_device(), Err(Errno::BUSY));
        drop(copy);
        kernel.release_closed_files().unwrap();
        kernel.luo.open_device().unwrap();
    }

    #[test]
    fn all_closed_files_are_released_at_once() {
        let mut kernel = kernel();
        kernel.luo.open_device().unwrap();
        let mut files = Vec::new();
        for number in 0..500 {
            let name = Name::new(format!("session {number}")).unwrap().to_field();
            let id = kernel.luo.create_session(&name, |_| Ok(())).unwrap();
            files.push((name, watched(&mut kernel, Emulated::Session(id))));
        }
        let names: Vec<_> = files.into_iter().map(|(name, _)| name).collect();
        kernel.release_closed_files().unwrap();
        assert!(kernel.anchors.is_empty());
        for name in names {
            kernel.luo.create_session(&name, |_| Ok(())).unwrap();
        }
    }

    #[test]
    fn only_a_reboot_with_the_magic_numbers_switches() {
        assert_eq!(reboot(0xfee1_dead, 672_274_793), Verdict::Reboot);
        for (magic, magic2) in [(0, 672_274_793), (0xfee1_dead, 0), (0xfee1_dead, 1)] {
            assert_eq!(reboot(magic, magic2), Answer::Errno(Errno::INVAL).into());
        }
    }
}
