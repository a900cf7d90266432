//! The agent: a real process of a system, which makes the system calls that the test orders.
//!
//! Its connection to the test is at an fd far above the fds that cases use. The agent ends when the
//! connection is closed.
#![expect(unsafe_code, reason = "raw system calls")]

use std::ffi::OsStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use libc::{c_int, c_long};
use luo::Errno;
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::arena;
use super::cgroup;
use super::wire::{self, Hello, Order};
use crate::conformance::file;
use crate::conformance::machine::kernel;
use crate::conformance::system::{Answer, Call, Reopen, Who};

/// The first argument of an agent. The second is the path of the socket.
pub(crate) const ROLE: &str = "--agent";

/// The fd of the connection to the test.
const CONTROL: RawFd = 900;

/// Serves as an agent until the connection ends.
pub(crate) fn main(socket: &OsStr) -> Result<(), Errno> {
    // SAFETY: this process has no handler for the signal. While it is ignored, ended children leave no
    // zombies.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    match serve(socket) {
        Err(Errno::PIPE | Errno::CONNRESET) => Ok(()),
        ended => ended,
    }
}

fn check(result: impl Into<c_long>) -> Result<i64, Errno> {
    let result = result.into();
    if result >= 0 {
        return Ok(result);
    }
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}

fn control() -> BorrowedFd<'static> {
    // SAFETY: the fd is open while the agent serves, and nothing else closes it.
    unsafe { BorrowedFd::borrow_raw(CONTROL) }
}

fn hello(path: &OsStr) -> Result<(), Errno> {
    let socket =
        socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    // SAFETY: dup3 closes the fd that CONTROL was before: after a fork, the copy of the parent's
    // connection.
    check(unsafe { libc::dup3(socket.as_raw_fd(), CONTROL, libc::O_CLOEXEC) })?;
    let number = std::env::var(luo::emulate::NUMBER_VARIABLE).ok();
    let number = number.and_then(|number| number.parse().ok());
    wire::send(control(), &Hello { pid: std::process::id(), number }, None)
}

fn serve(path: &OsStr) -> Result<(), Errno> {
    hello(path)?;
    loop {
        let (order, fd) = wire::receive(control())?;
        let mut sent = None;
        let result = match order {
            Order::Spawn | Order::Fork => {
                // SAFETY: the child has only the thread that forks. This process has no other thread, or
                // threads that never return from a system call.
                let child = check(unsafe { libc::fork() })?;
                if child == 0 {
                    if matches!(order, Order::Spawn) {
                        // SAFETY: the child uses none of these copies of its parent's fds.
                        check(unsafe { libc::close_range(3, CONTROL as u32 - 1, 0) })?;
                    }
                    hello(path)?;
                }
                continue;
            }
            Order::Send(number) => file::borrow(number).map(|fd| {
                sent = Some(fd);
                Answer::default()
            }),
            Order::Receive => fd.ok_or(Errno::BADF).map(|fd| Answer::number(fd.into_raw_fd())),
            Order::Call(Call::Exec) => return Err(exec(path)),
            Order::Call(call) => execute(call),
        };
        wire::send(control(), &result.map_err(Errno::raw_os_error), sent)?;
    }
}

/// Executes this program again; it then sends a new hello.
fn exec(path: &OsStr) -> Errno {
    let error = Command::new("/proc/self/exe").arg(ROLE).arg(path).exec();
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

fn execute(call: Call) -> Result<Answer, Errno> {
    let number = |number: i64| Ok(Answer::number(number));
    match call {
        Call::LimitFds(limited) => limit_fds(limited),
        Call::OpenDevice { read_only } => {
            let flags = if read_only { libc::O_RDONLY } else { libc::O_RDWR };
            number(open(luo::uapi::DEVICE, flags)?)
        }
        Call::Open(what) => number(file::open(what)?.into_raw_fd().into()),
        Call::OpenScripted(_) => Err(Errno::OPNOTSUPP),
        Call::Reopen(fd, how) => {
            let flags = match how {
                Reopen::ReadWrite => libc::O_RDWR,
                Reopen::ReadOnly => libc::O_RDONLY,
                Reopen::Path => libc::O_PATH,
            };
            number(open(&format!("/proc/self/fd/{fd}"), flags)?)
        }
        // SAFETY: the call only creates an fd.
        Call::Dup(fd) => number(check(unsafe { libc::dup(fd) })?),
        // SAFETY: cases refer to fds by number; no `OwnedFd` of this process owns this one.
        Call::Close(fd) => number(check(unsafe { libc::close(fd) })?),
        Call::Ioctl(fd, command, argument) => {
            Ok(Answer::bytes(arena::ioctl(fd, command, argument)?))
        }
        Call::Ioctl32(fd, command, bytes) => arena::ioctl32(fd, command, &bytes).and_then(number),
        Call::EnterCgroup => cgroup::enter().and_then(|()| number(0)),
        Call::ChargedBytes => number(cgroup::charged_bytes()?),
        Call::ClosesOnExec(fd) => {
            let flags = rustix::io::fcntl_getfd(file::borrow(fd)?)?;
            number(flags.contains(rustix::io::FdFlags::CLOEXEC).into())
        }
        Call::IsSameOpenFile(one, other) => number(is_same_file(one, other)?.into()),
        Call::File(fd, call) => file::operate(file::borrow(fd)?, call),
        Call::Together(calls) => Ok(Answer::each(together(calls))),
        Call::Begin(call) => {
            begin(*call);
            number(0)
        }
        Call::OpenAndClose(times) => open_and_close(times),
        Call::Running => number(BEGUN.load(Ordering::SeqCst) as i64),
        Call::Exec => Err(Errno::INVAL),
        Call::BecomeUser(user) => {
            // SAFETY: the call changes the ids of this thread, the only one of this process.
            number(check(unsafe { libc::syscall(libc::SYS_setresuid, user, user, user) })?)
        }
        Call::Stat(path) => {
            let stat = rustix::fs::stat(path)?;
            Ok(Answer::each(vec![
                Ok(Answer::number(i64::from(stat.st_mode))),
                Ok(Answer::number(i64::from(stat.st_uid))),
            ]))
        }
        Call::Load(how) => {
            kernel::load(how)?;
            number(0)
        }
        Call::Reboot(who) => reboot_as(who),
    }
}

fn open(path: &str, flags: c_int) -> Result<i64, Errno> {
    let path = std::ffi::CString::new(path).map_err(|_| Errno::INVAL)?;
    // SAFETY: the path is a C string.
    check(unsafe { libc::open(path.as_ptr(), flags) })
}

/// Prevents this process from opening further fds, or allows it again.
fn limit_fds(limited: bool) -> Result<Answer, Errno> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let current = if limited {
        // The lowest free number becomes the limit; open fds above it stay open.
        // SAFETY: `open` just created the fd, and nothing else owns it.
        Some(unsafe { OwnedFd::from_raw_fd(open("/dev/null", 0)? as RawFd) }.as_raw_fd() as u64)
    } else {
        limit.maximum.or(Some(1024))
    };
    setrlimit(Resource::Nofile, Rlimit { current, ..limit })?;
    Ok(Answer::default())
}

fn is_same_file(one: RawFd, other: RawFd) -> Result<bool, Errno> {
    const KCMP_FILE: c_int = 0;
    let me = std::process::id();
    // SAFETY: the call compares two fds of this process and changes nothing.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, me, me, KCMP_FILE, one, other) };
    match check(order) {
        Err(Errno::NOSYS) => {
            const F_DUPFD_QUERY: c_int = 1027;
            // SAFETY: the query changes nothing.
            check(unsafe { libc::fcntl(one, F_DUPFD_QUERY, other) }).map(|same| same == 1)
        }
        order => order.map(|order| order == 0),
    }
}

/// Makes each call in a separate thread. A barrier starts all of them at the same time.
fn together(calls: Vec<Call>) -> Vec<Result<Answer, Errno>> {
    let barrier = std::sync::Barrier::new(calls.len());
    thread::scope(|scope| {
        let threads: Vec<_> = calls
            .into_iter()
            .map(|call| {
                scope.spawn(|| {
                    barrier.wait();
                    execute(call)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("no call panics")).collect()
    })
}

fn open_and_close(times: u32) -> Result<Answer, Errno> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let mut opened = 0;
    for _ in 0..times {
        match rustix::fs::open(luo::uapi::DEVICE, flags, Mode::empty()) {
            Ok(_) => opened += 1,
            Err(Errno::BUSY) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(Answer::number(opened))
}

/// Number of background calls that have not returned.
static BEGUN: AtomicUsize = AtomicUsize::new(0);

fn begin(call: Call) {
    BEGUN.fetch_add(1, Ordering::SeqCst);
    thread::spawn(|| {
        // Cases observe the effect of a background call, not its answer.
        let _ = execute(call);
        BEGUN.fetch_sub(1, Ordering::SeqCst);
    });
}

fn reboot() -> Result<Answer, Errno> {
    const MAGIC: u32 = 0xfee1_dead;
    const KEXEC: u32 = 0x4558_4543;
    // SAFETY: under the emulator this call only ends the program. Otherwise the case expects the
    // kernel to refuse the call, or wants the switch.
    check(unsafe { libc::syscall(libc::SYS_reboot, MAGIC, 0x2812_1969, KEXEC, 0) })
        .map(Answer::number)
}

fn reboot_as(who: Who) -> Result<Answer, Errno> {
    match who {
        Who::Root => reboot(),
        Who::Nobody => {
            // SAFETY: the call changes only the ids of the child.
            in_child(|| check(unsafe { libc::setresuid(65534, 65534, 65534) }).map(drop))
        }
        Who::OtherNamespace => in_child(|| {
            // SAFETY: the call affects only the children of this child.
            check(unsafe { libc::unshare(libc::CLONE_NEWPID) })?;
            // SAFETY: this process has one thread. Its child goes on and calls reboot(2).
            match check(unsafe { libc::fork() })? {
                0 => Ok(()),
                child => end_as(child as libc::pid_t),
            }
        }),
    }
}

/// Forks a child, which runs `prepare` and then calls reboot(2), and returns the answer of that call.
fn in_child(prepare: impl FnOnce() -> Result<(), Errno>) -> Result<Answer, Errno> {
    // SAFETY: this sets no handler. Only children of a process that does not ignore the signal can
    // be waited for.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    // SAFETY: this process has one thread.
    let child = check(unsafe { libc::fork() })?;
    if child == 0 {
        let errno = prepare().and_then(|()| reboot()).map_or_else(Errno::raw_os_error, |_| 0);
        std::process::exit(errno);
    }
    let status = wait(child as libc::pid_t);
    // SAFETY: this sets no handler; it restores the state from the start of the agent.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    match status? {
        0 => Ok(Answer::default()),
        errno => Err(Errno::from_raw_os_error(errno)),
    }
}

fn wait(child: libc::pid_t) -> Result<i32, Errno> {
    let mut status = 0;
    // SAFETY: `status` is a local variable, to which the kernel may write.
    check(unsafe { libc::waitpid(child, &raw mut status, 0) })?;
    Ok(libc::WEXITSTATUS(status))
}

/// Waits for a child and exits with its status.
fn end_as(child: libc::pid_t) -> Result<(), Errno> {
    std::process::exit(wait(child)?)
}
