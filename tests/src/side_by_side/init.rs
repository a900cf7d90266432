//! PID 1, of the machine and of its guests.

use std::fs;

use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};

use super::{PROBLEM, RESULT, Settings, guest, host};

/// On the command line of the guests.
pub(super) const GUEST: &str = "side.guest";

/// Measures or works, depending on the kernel's command line.
pub fn main() {
    let cmdline = match begin() {
        Ok(cmdline) => cmdline,
        Err(error) => {
            println!("{PROBLEM}PID 1 cannot begin: {error}");
            String::new()
        }
    };
    let settings = Settings::parse(&cmdline);
    match settings {
        Ok(settings) if cmdline.split_whitespace().any(|word| word == GUEST) => {
            guest::run(settings)
        }
        Ok(settings) => {
            let done = host::run(settings, |measured| {
                println!("{RESULT}{}", serde_json::to_string(measured)?);
                Ok(())
            });
            if let Err(problem) = done {
                println!("{PROBLEM}{}", problem.to_string().replace(['\r', '\n'], " "));
            }
        }
        Err(problem) => println!("{PROBLEM}{problem}"),
    }
    let _ = reboot(RebootCommand::PowerOff);
}

/// Mounts what both need, and returns the command line.
fn begin() -> Result<String, std::io::Error> {
    mount("proc", "/proc", "proc", MountFlags::empty(), None)?;
    mount("devtmpfs", "/dev", "devtmpfs", MountFlags::empty(), None)?;
    fs::read_to_string("/proc/cmdline")
}
