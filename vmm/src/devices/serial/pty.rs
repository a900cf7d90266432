//! A pseudoterminal as the console: its master is the port's sink, programs of the host open its slave.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl, inotify};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::options::{OPENED, SINK};
use crate::devices::files::{OpenError, Opened};
use crate::devices::terminal;

/// Makes a pseudoterminal, and watches its slave for programs that open it: the kernel does not tell the
/// master of them.
pub(super) fn open() -> Result<Vec<Opened>, OpenError> {
    let make = || -> rustix::io::Result<(OwnedFd, OwnedFd, String)> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        fcntl_setfl(&master, fcntl_getfl(&master)? | OFlags::NONBLOCK)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        // Raw from the start: an echo would come back to the guest as input.
        let mut raw = tcgetattr(&master)?;
        raw.make_raw();
        tcsetattr(&master, OptionalActions::Now, &raw)?;
        let opened = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
        let slave = ptsname(&master, Vec::new())?;
        inotify::add_watch(&opened, &slave, inotify::WatchFlags::OPEN)?;
        Ok((master, opened, slave.to_string_lossy().into_owned()))
    };
    let (master, opened, slave) = make().map_err(|errno| OpenError {
        what: "a pseudoterminal at",
        path: "/dev/ptmx".into(),
        remedy: ": devpts must be mounted on /dev/pts",
        source: io::Error::from(errno),
    })?;
    terminal::tell(&format!("the serial port is at {slave}"));
    let file = |role, fd| Opened { role, fd, identity: None };
    Ok(vec![file(SINK, master), file(OPENED, opened)])
}
