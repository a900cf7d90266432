//! Takes from the process of a VM, before it reads anything that a guest controls, all power that it does
//! not need: a guest that takes the process over finds no file, no network, no other process, and only the
//! system calls that the process makes anyway.
//!
//! ```text
//!   isolate(): limits -> namespaces, empty root -> user -> no capabilities -> landlock
//!   end_with_host()
//!   filter():  the system calls of all threads together
//!   thread():  those of one thread, which can only be a part of them
//! ```
//!
//! What the kernel or a host without root does not allow is skipped, and returned as [`Missing`]; the host
//! decides whether the VM may run without it. This module knows lists of system calls ([`calls`]), but not
//! who makes them: each thread's code brings its own list.

pub mod calls;
mod landlock;
mod namespaces;
mod privileges;
mod process;
mod seccomp;
mod trap;
pub mod trial;

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

pub use calls::{Args, Call};
pub use privileges::close_all_files_from;
pub use process::{Process, pools_have_dax, unended, was_started_as};
pub use seccomp::FilterError;
pub use trap::Report;

/// A part of the confinement that is missing, and why.
#[derive(Debug)]
pub struct Missing {
    /// The part.
    pub part: &'static str,
    /// The answer of the kernel.
    pub why: io::Error,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { part, why } = self;
        write!(f, "{part}: {why}")
    }
}

/// Collects what is missing.
#[derive(Debug, Default)]
struct Record(Vec<Missing>);

impl Record {
    /// Notes `part` as missing if `result` is an error. Returns whether it is there.
    fn note<E: Into<io::Error>>(&mut self, part: &'static str, result: Result<(), E>) -> bool {
        match result {
            Ok(()) => true,
            Err(error) => {
                self.0.push(Missing { part, why: error.into() });
                false
            }
        }
    }
}

/// Whether this process has a seccomp filter. In the processes of tests it has none.
static FILTERED: AtomicBool = AtomicBool::new(false);

/// Takes from this process everything but system calls. Call once, while the process has one thread and
/// before it reads what a guest controls. `user`: the user and group ID to change to, if the process runs as
/// root. Returns the parts that are missing.
pub fn isolate(user: u32) -> Vec<Missing> {
    let mut record = Record::default();
    // rustix looks for the vDSO when it reads a clock for the first time, and before Linux 6.4 that takes
    // /proc/self/auxv. So the first time is here.
    let _ = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    // Otherwise the name is that of the path by which the host started the program.
    record.note("name of the main thread", rustix::thread::set_name(c"main"));
    privileges::limit_resources(&mut record);
    if rustix::process::geteuid().is_root() {
        namespaces::enter_all_but_user(&mut record);
        privileges::change_user(user, &mut record);
        // Last: in a user namespace of its own the process has no right over the other namespaces.
        namespaces::enter_user(&mut record);
    } else {
        let why = io::Error::other("the host does not run as root");
        record.0.push(Missing { part: "a user of its own", why });
        // First: it gives the process the right to enter the others.
        if namespaces::enter_user(&mut record) {
            namespaces::enter_all_but_user(&mut record);
        }
    }
    privileges::drop_capabilities(&mut record);
    landlock::restrict(&mut record);
    record.0
}

/// A part of [`isolate`] that takes power from the process by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// The namespaces other than that of users, with the empty root.
    Namespaces,
    /// A user of its own, without groups.
    User,
    /// No capabilities, in a process that stays root's.
    Capabilities,
    /// The rules of landlock.
    Landlock,
}

/// Confines this process, of root, by one layer alone, so that a test can show what that layer does where the others
/// would do the same. Returns the parts that are missing.
pub fn isolate_by(layer: Layer, user: u32) -> Vec<Missing> {
    let mut record = Record::default();
    match layer {
        Layer::Namespaces => namespaces::enter_all_but_user(&mut record),
        Layer::User => privileges::change_user(user, &mut record),
        Layer::Capabilities => privileges::drop_capabilities(&mut record),
        Layer::Landlock => landlock::restrict(&mut record),
    }
    record.0
}

/// Has the kernel kill this process when the main thread of the host ends. The process ends by itself as well when
/// its link is closed, but not if a guest has taken it over. Call once, after [`isolate`] and a message of the host:
/// until then another thread of the host may be its parent. Returns what is missing, if this is.
pub fn end_with_host() -> Option<Missing> {
    let mut record = Record::default();
    record.note("end with the host", privileges::end_with_parent());
    record.0.pop()
}

/// Confines this process to the system calls of `lists`, which must have those of all its threads. Call once,
/// while the process has one thread. `report`: where to report a system call outside the lists. Returns what
/// is missing, if seccomp is.
pub fn filter(lists: &[&[Call]], report: Report) -> Option<Missing> {
    seccomp::bound_allocator();
    let mut record = Record::default();
    let filtered = trap::install(report)
        .map_err(FilterError::from)
        .and_then(|()| seccomp::restrict_process(lists))
        .map_err(io::Error::other);
    if record.note("seccomp", filtered) {
        FILTERED.store(true, Ordering::SeqCst);
    }
    record.0.pop()
}

/// Confines the calling thread to the system calls of `lists` and to those of every thread
/// ([`calls::EVERY_THREAD`]). Does nothing in a process without a filter. Threads that this thread starts
/// are confined likewise. Panics if the kernel refuses: it accepted the filter of the process.
pub fn thread(lists: &[&'static [Call]]) {
    if FILTERED.load(Ordering::SeqCst) {
        seccomp::restrict_thread(lists).expect("a filter, as the process has one");
    }
}
