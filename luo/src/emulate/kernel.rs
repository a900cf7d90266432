//! One generation as the program sees it: the calls that its kernel would answer.
//!
//! A call is looked at, answered by the state machine or let through, one after another. Before
//! anything is looked at, the machine is told of every file whose last reference is gone by now: a
//! program that closes the device and opens it again must not find it busy.
//!
//! All that is done for a call takes the same time however many sessions there are: who an fd belongs
//! to is looked up by the cookie of its socket, and which are hung up is said by an epoll.

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

/// What a socket of the program stands for.
#[derive(Debug, Clone, Copy)]
enum What {
    Device,
    Session(SessionId),
}

/// What comes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It has this answer.
    Answer(Answer),
    /// It is answered already, or nobody waits for an answer.
    Done,
    /// The program asks for the next kernel.
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
    /// Our ends of the program's sockets, by the cookie of the other end.
    anchors: HashMap<u64, (OwnedFd, What)>,
    /// Says which of them are hung up.
    hung_up: OwnedFd,
}

impl Kernel {
    /// Starts a kernel with the tree of the previous one.
    pub(super) fn start(tree: Option<&[u8]>, store: &Store) -> Result<Self, StartError> {
        let mut luo = Luo::start(Parameters::default(), || tree.ok_or(Errno::NOENT));
        if let Some(disabled) = luo.disabled() {
            return Err(StartError::Tree(disabled.clone()));
        }
        luo.register_handler(MemfdHandler(store.clone())).map_err(StartError::System)?;
        let hung_up = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(StartError::System)?;
        Ok(Self { luo, anchors: HashMap::new(), hung_up })
    }

    /// Tells the machine of all files whose last reference is gone.
    pub(super) fn close_what_is_gone(&mut self) -> Result<(), Errno> {
        const AT_ONCE: usize = 64;
        let mut events: Vec<epoll::Event> = Vec::with_capacity(AT_ONCE);
        loop {
            events.clear();
            epoll::wait(&self.hung_up, spare_capacity(&mut events), Some(&Timespec::default()))?;
            for event in &events {
                let closed = match self.anchors.remove(&event.data.u64()) {
                    Some((_, What::Device)) => self.luo.close_device(),
                    Some((_, What::Session(session))) => self.luo.close_session(session),
                    None => Ok(()),
                };
                // What a release says is lost on Linux, too.
                let _ = closed;
            }
            if events.len() < AT_ONCE {
                return Ok(());
            }
        }
    }

    /// What comes of a call.
    pub(super) fn judge(&mut self, listener: &Listener, call: &Notification) -> Verdict {
        let [first, second, third, fourth, fifth, _] = call.arguments;
        let tracee = Tracee::new(call.thread);
        // What was read counts only if the thread is still there.
        let looks = |directory: u64, path| {
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
            libc::SYS_open if looks(HERE, first) => self.open(listener, call, &tracee, second),
            libc::SYS_openat if looks(first, second) => self.open(listener, call, &tracee, third),
            libc::SYS_openat2 if looks(first, second) => match open_how(&tracee, third, fourth) {
                Ok(flags) => self.open(listener, call, &tracee, flags),
                Err(errno) => Answer::Errno(errno).into(),
            },
            #[cfg(target_arch = "x86_64")]
            libc::SYS_stat | libc::SYS_lstat if looks(HERE, first) => {
                answer(second, node::stat()).into()
            }
            libc::SYS_newfstatat if looks(first, second) => answer(third, node::stat()).into(),
            libc::SYS_statx if looks(first, second) => answer(fifth, node::statx()).into(),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_access if looks(HERE, first) => {
                Answer::from(node::access(second as u32)).into()
            }
            libc::SYS_faccessat | libc::SYS_faccessat2 if looks(first, second) => {
                Answer::from(node::access(third as u32)).into()
            }
            // It is no link and has no attributes.
            #[cfg(target_arch = "x86_64")]
            libc::SYS_readlink if looks(HERE, first) => Answer::Errno(Errno::INVAL).into(),
            libc::SYS_readlinkat if looks(first, second) => Answer::Errno(Errno::INVAL).into(),
            libc::SYS_getxattr | libc::SYS_lgetxattr if looks(HERE, first) => {
                Answer::Errno(Errno::NODATA).into()
            }
            libc::SYS_listxattr | libc::SYS_llistxattr if looks(HERE, first) => {
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
            // Such an fd never reaches a driver: any other device does as well.
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
            self.watch(anchor, What::Device)
        });
        if installed.is_err() {
            self.luo.close_device()?;
        }
        installed
    }

    /// Takes note of a file that the program has now.
    fn watch(&mut self, anchor: Anchor, what: What) -> Result<(), Errno> {
        let Anchor { theirs: _, ours, cookie } = anchor;
        let data = epoll::EventData::new_u64(cookie);
        // Being hung up is told without being asked for.
        epoll::add(&self.hung_up, &ours, data, epoll::EventFlags::empty())?;
        self.anchors.insert(cookie, (ours, what));
        Ok(())
    }

    fn ioctl(&mut self, listener: &Listener, call: &Notification, tracee: &Tracee) -> Verdict {
        let [fd, command, address, ..] = call.arguments;
        let command = command as u32;
        if is_of_every_file(command) {
            return LET_THROUGH;
        }
        // The reference is dropped at once: it would keep the file open.
        let cookie = tracee.file(fd as i32).and_then(socket_cookie);
        if cookie == Err(Errno::MFILE) {
            return Answer::Errno(of_the_system(Errno::MFILE)).into();
        }
        let what = cookie.ok().and_then(|cookie| self.anchors.get(&cookie));
        let Some((_, what)) = what.filter(|_| listener.waits(call.id)) else { return LET_THROUGH };
        let mut request = Request::new(listener, call.id, tracee);
        let result = match *what {
            What::Device => self.luo.device_ioctl(&mut request, command, address),
            What::Session(id) => self.luo.session_ioctl(&mut request, id, command, address),
        };
        match result.map_err(|errno| (errno, None)).and_then(|()| request.install()) {
            Ok(Some(New::Session(id, anchor))) => {
                Answer::from(self.watch(anchor, What::Session(id))).into()
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

/// Why a kernel does not start.
#[derive(Debug)]
pub(super) enum StartError {
    Tree(Disabled),
    System(Errno),
}

fn is_device(tracee: &Tracee, directory: i32, path: u64) -> bool {
    let Some(path) = tracee.path(path) else { return false };
    path::is_device(&path, || tracee.directory(directory))
}

/// The flags in a `struct open_how`.
fn open_how(tracee: &Tracee, address: u64, size: u64) -> Result<u64, Errno> {
    const SIZE: u64 = size_of::<libc::open_how>() as u64;
    let mut flags = [0; 8];
    if size < SIZE {
        return Err(Errno::INVAL);
    }
    tracee.read(address, &mut flags).map_err(|_| Errno::FAULT)?;
    Ok(u64::from_le_bytes(flags))
}

/// Opens for who wants no more than a path. A file that is opened with O_PATH cannot be given to
/// another process, so this one can also be read, as empty.
fn open_path(listener: &Listener, call: &Notification, flags: i32) -> Verdict {
    use rustix::fs::{Mode, OFlags, open};
    let null = open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let closes_on_exec = flags & libc::O_CLOEXEC != 0;
    match null.and_then(|null| listener.answer_with_fd(call.id, null.as_fd(), closes_on_exec)) {
        Ok(()) => Verdict::Done,
        Err(errno) => Answer::Errno(errno).into(),
    }
}

/// Whether Linux answers an ioctl for every file, before its driver is asked.
fn is_of_every_file(command: u32) -> bool {
    const FIOQSIZE: u32 = 0x5460;
    let commands = [libc::FIOCLEX, libc::FIONCLEX, libc::FIONBIO, libc::FIOASYNC];
    commands.iter().any(|known| *known as u32 == command) || command == FIOQSIZE
}

/// Checks the magic numbers of reboot(2). The filter has seen that it is for the next kernel.
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

    /// Watches a new file; gives back the program's end.
    fn watched(kernel: &mut Kernel, what: What) -> OwnedFd {
        let anchor = Anchor::new().unwrap();
        let theirs = anchor.theirs.try_clone().unwrap();
        kernel.watch(anchor, what).unwrap();
        theirs
    }

    #[test]
    fn the_device_is_free_as_soon_as_its_last_reference_is_gone() {
        let mut kernel = kernel();
        kernel.luo.open_device().unwrap();
        let theirs = watched(&mut kernel, What::Device);
        let copy = theirs.try_clone().unwrap();
        drop(theirs);
        kernel.close_what_is_gone().unwrap();
        assert_eq!(kernel.luo.open_device(), Err(Errno::BUSY));
        drop(copy);
        kernel.close_what_is_gone().unwrap();
        kernel.luo.open_device().unwrap();
    }

    #[test]
    fn all_that_is_gone_is_closed_before_anything_else() {
        let mut kernel = kernel();
        kernel.luo.open_device().unwrap();
        let mut files = Vec::new();
        for number in 0..500 {
            let name = Name::new(format!("session {number}")).unwrap().to_field();
            let id = kernel.luo.create_session(&name, |_| Ok(())).unwrap();
            files.push((name, watched(&mut kernel, What::Session(id))));
        }
        let names: Vec<_> = files.into_iter().map(|(name, _)| name).collect();
        kernel.close_what_is_gone().unwrap();
        assert!(kernel.anchors.is_empty());
        for name in names {
            kernel.luo.create_session(&name, |_| Ok(())).unwrap();
        }
    }

    #[test]
    fn only_a_right_call_of_reboot_switches() {
        assert_eq!(reboot(0xfee1_dead, 672_274_793), Verdict::Reboot);
        for (magic, magic2) in [(0, 672_274_793), (0xfee1_dead, 0), (0xfee1_dead, 1)] {
            assert_eq!(reboot(magic, magic2), Answer::Errno(Errno::INVAL).into());
        }
    }
}
