//! Opens the files of a VM on a thread of its own, because that may take long or never end: a disk on a server that
//! is gone, a device that has not appeared yet.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use super::elsewhere::Elsewhere;
use super::files::{Files, OpenError};
use crate::machine::Machine;

/// Files that are being opened. Its fd is readable when that has ended. If this is dropped before, the files are closed
/// when they have been opened.
#[derive(Debug)]
pub struct Opening(Elsewhere<Result<Files, OpenError>>);

impl Opening {
    /// Begins to open what the restore of `machine` needs.
    pub fn begin(machine: &Machine) -> Result<Self, OpenError> {
        let of = machine.clone();
        Self::run(machine, move || Files::for_machine(&of))
    }

    /// Begins to open what a boot of `machine` needs.
    pub fn begin_with_kernel(machine: &Machine) -> Result<Self, OpenError> {
        let of = machine.clone();
        Self::run(machine, move || {
            of.devices.iter().try_for_each(|device| device.options.check_before_boot())?;
            Files::for_machine(&of)?.with_kernel(&of)
        })
    }

    fn run(
        machine: &Machine,
        open: impl FnOnce() -> Result<Files, OpenError> + Send + 'static,
    ) -> Result<Self, OpenError> {
        let what = format!("opening the files of VM `{}`", machine.name);
        Elsewhere::begin("open", what, open).map(Self).map_err(failed)
    }

    /// The error if they are not open after `within`.
    pub fn is_late(&self, within: Duration) -> OpenError {
        let seconds = within.as_secs();
        let problem = format!("one is not open after {seconds} s: its disk or its server hangs");
        failed(io::Error::other(problem))
    }

    /// Returns the files. Waits until they are open.
    pub fn files(self) -> Result<Files, OpenError> {
        self.0.wait().map_err(|panicked| failed(io::Error::other(panicked)))?
    }
}

fn failed(source: io::Error) -> OpenError {
    OpenError { what: "the files", path: "of its devices".into(), remedy: "", source }
}

impl AsFd for Opening {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guests::entry::tests::sample;

    #[test]
    fn a_boot_makes_only_the_last_directory_for_a_log_and_a_restore_makes_all() {
        let directory = tempfile::tempdir().unwrap();
        let missing = directory.path().join("missing");
        let logs = missing.join("logs");
        let serial = format!("file={}", logs.join("log").display());
        let text = format!(
            "[[vm]]\nname = \"a\"\nmemory = \"size=64M\"\nkernel = \"/dev/null/k\"\nserial = \"{serial}\"\n"
        );
        let machine = crate::config::Config::parse(&text).unwrap().machines.remove(0);
        let boot = || {
            let files = Opening::begin_with_kernel(&machine).unwrap().files();
            crate::causes::chain(&files.unwrap_err()).join(": ")
        };
        let said = boot();
        let no_directory = format!("there is no directory {}", missing.display());
        assert!(said.contains("make the directory") && said.ends_with(&no_directory), "{said}");
        assert!(!missing.exists());
        std::fs::create_dir(&missing).unwrap();
        assert!(!boot().contains("there is no directory"));
        std::fs::remove_dir_all(&missing).unwrap();
        for device in &machine.devices {
            device.options.open().unwrap();
        }
        assert!(logs.join("log").exists());
    }

    #[test]
    fn a_thread_that_panics_is_an_error() {
        let opening = Opening::run(&sample().machine, || panic!("on purpose")).unwrap();
        let error = crate::causes::chain(&opening.files().unwrap_err()).join(": ");
        assert!(error.contains("the files of its devices: its thread"), "{error}");
    }
}
