//! How this kernel was entered, and the decisions since then about the VMs that came with it.
//!
//! A live update through a pool passes a [`Ticket`] to the next kernel on its command line. With a ticket,
//! VMs are in the pool even if this host cannot reach it. None of them may be booted afresh meanwhile: the
//! boot would change the VM's disks, which would no longer fit the memory that is resumed later.
//!
//! ```text
//!   no ticket: no VM is preserved in a pool; the contents of any pool are from another boot
//!   a ticket --the manifest is read--> redeemed: the same as no ticket
//!       \--an operator gives up a VM that cannot be reached--> it is not restored in this boot
//! ```
//!
//! Every live update leaves a mark on the command line as well, whatever carries the VMs. A host that finds the mark
//! and no VMs knows that they are lost, and that this is no cold boot.
//!
//! The decisions are recorded in `/run`, which lasts as long as the kernel, so that a restarted host
//! service knows them. They are about what the last host left, so they end when a host has taken that over: the next
//! one finds newer states of the same VMs. Hosts with locks of their own have notes of their own, but for the ticket, which is
//! the kernel's: the host that has its pool redeems it for all.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use luo::{Ticket, TicketError};

use super::instance::DEFAULT_LOCK;
use crate::live_update::next_kernel::{MARK, PARAMETER};
use crate::machine::VmName;

/// Directory of the recorded decisions.
const NOTES: &str = "/run/perennial";
/// Directory in it of the hosts that have a lock of their own.
const OTHER_HOSTS: &str = "other-hosts";
/// Directory of the notes of VMs that were given up.
const GIVEN_UP: &str = "given-up";

/// File name of the note of the ticket that was used.
const REDEEMED: &str = "redeemed";
/// File name of the note of the mark whose VMs a host looked for.
const SEEN: &str = "seen";

/// Prefix of the file names of given-up VMs: a VM's name alone could be `..`.
const PREFIX: &str = "vm-";

/// How this kernel was entered cannot be found out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelEntryError {
    /// The command line cannot be read.
    #[error("cannot read {}, which tells whether this kernel was entered by a live update", path.display())]
    CommandLine {
        /// The file with the command line.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The parameter's value is not a ticket.
    #[error("the value of `{PARAMETER}=` on the command line of this kernel is not a ticket")]
    Ticket(#[from] TicketError),
}

/// The decision to give a VM up cannot be recorded.
#[derive(Debug, thiserror::Error)]
#[error("cannot record in {} that the VM is given up: its old state might be resumed later", path.display())]
pub struct NoteError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// How this kernel was entered.
#[derive(Debug)]
pub struct KernelEntry {
    ticket: Option<Ticket>,
    /// The mark of the live update, until a host looked for its VMs.
    mark: Option<String>,
    /// Whether the ticket is from the kernel's command line, where a restarted host finds it again.
    of_kernel: bool,
    notes: PathBuf,
    /// The directory of the notes that all hosts share.
    shared: PathBuf,
}

impl KernelEntry {
    /// Reads the kernel's command line and the recorded decisions, from `/proc` and `/run` below `root`.
    /// `left` is a ticket from the last host of this process; if given, the command line is not read. `lock` is the lock
    /// that the host's configuration names.
    pub fn read(
        root: &Path,
        left: Option<Ticket>,
        lock: Option<&Path>,
    ) -> Result<Self, KernelEntryError> {
        let below = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
        let (notes, shared) = (below(&notes(lock)), below(Path::new(NOTES)));
        if left.is_some() {
            return Ok(Self { ticket: left, mark: None, of_kernel: false, notes, shared });
        }
        let path = root.join("proc/cmdline");
        let line = fs::read_to_string(&path);
        let line = line.map_err(|source| KernelEntryError::CommandLine { path, source })?;
        // An operator may have copied an old value into the next kernel's command line.
        let last = |name| {
            let values = kexec::parameters(&line).filter(|parameter| parameter.is(name));
            values.filter_map(|parameter| parameter.value).last()
        };
        let noted = |path: PathBuf| fs::read_to_string(path).unwrap_or_default();
        let ticket = last(PARAMETER).map(str::parse::<Ticket>).transpose()?;
        let ticket = ticket.filter(|ticket| ticket.to_string() != noted(shared.join(REDEEMED)));
        let mark = last(MARK).filter(|mark| **mark != *noted(notes.join(SEEN))).map(str::to_owned);
        Ok(Self { ticket, mark, of_kernel: true, notes, shared })
    }

    /// The value for a kernel whose command line cannot be read.
    pub fn unknown(lock: Option<&Path>) -> Self {
        let (notes, shared) = (notes(lock), PathBuf::from(NOTES));
        Self { ticket: None, mark: None, of_kernel: true, notes, shared }
    }

    /// The ticket of the live update that entered this kernel, if VMs may be in a pool. `None` if there is
    /// no ticket or it was redeemed.
    pub fn ticket(&self) -> Option<Ticket> {
        self.ticket
    }

    /// Whether a live update entered this kernel, and no host has looked for its VMs yet.
    pub fn is_marked(&self) -> bool {
        self.ticket.is_some() || self.mark.is_some()
    }

    /// Marks the ticket as used, because its sessions can be retrieved only once, and notes that a host looked for the
    /// VMs. From now on no VM counts as given up.
    pub fn redeem(&mut self) {
        let (ticket, mark) = (self.ticket.take(), self.mark.take());
        if !self.of_kernel {
            return self.forget_given_up();
        }
        let ticket = ticket.map(|ticket| ticket.to_string());
        let notes = [(self.shared.join(REDEEMED), ticket), (self.notes.join(SEEN), mark)];
        let mut notes = notes.into_iter().filter_map(|(path, value)| Some((path, value?)));
        let noted = notes
            .try_for_each(|(path, value)| self.make_notes().and_then(|()| fs::write(path, value)));
        match noted {
            // Until then they can come again.
            Ok(()) => self.forget_given_up(),
            Err(error) => tracing::warn!(
                "cannot record in {} that the VMs of the last kernel were retrieved: {error}; if this \
                 host is restarted, its VMs may have to be started by hand",
                self.shared.display()
            ),
        }
    }

    /// Records that a VM is given up: no host restores it in this boot, even if it can be reached later.
    pub fn give_up(&self, vm: &VmName) -> Result<(), NoteError> {
        let path = self.given_up(vm);
        self.make_notes()
            .and_then(|()| fs::write(&path, ""))
            .map_err(|source| NoteError { path, source })
    }

    /// Whether a VM was given up.
    pub fn is_given_up(&self, vm: &VmName) -> bool {
        self.given_up(vm).exists()
    }

    /// The name of a VM that was given up, if there is one.
    pub fn any_given_up(&self) -> Option<String> {
        let notes = fs::read_dir(self.notes.join(GIVEN_UP)).ok()?.flatten().next()?;
        let name = notes.file_name().to_string_lossy().into_owned();
        Some(name.strip_prefix(PREFIX).unwrap_or(&name).to_owned())
    }

    /// Forgets which VMs were given up, because nothing of the last host's can come any more. What this host leaves of
    /// them is newer.
    fn forget_given_up(&self) {
        let path = self.notes.join(GIVEN_UP);
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => tracing::error!(
                "cannot remove {}: {error}. The VMs that it names would end with this host: remove it by hand",
                path.display()
            ),
            _ => {}
        }
    }

    fn given_up(&self, vm: &VmName) -> PathBuf {
        self.notes.join(GIVEN_UP).join(format!("{PREFIX}{vm}"))
    }

    fn make_notes(&self) -> io::Result<()> {
        let made =
            fs::DirBuilder::new().mode(0o700).recursive(true).create(self.notes.join(GIVEN_UP));
        made.or_else(
            |error| if error.kind() == ErrorKind::AlreadyExists { Ok(()) } else { Err(error) },
        )
    }
}

/// Returns the directory with the notes of the host that has this lock, or the default one.
fn notes(lock: Option<&Path>) -> PathBuf {
    match lock {
        None => NOTES.into(),
        Some(lock) if lock == Path::new(DEFAULT_LOCK) => NOTES.into(),
        Some(lock) => {
            let number = crc32fast::hash(lock.as_os_str().as_bytes());
            Path::new(NOTES).join(OTHER_HOSTS).join(format!("{number:08x}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICKET: &str = "00112233445566778899aabbccddeeff";

    fn kernel(command_line: &str) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("proc")).unwrap();
        fs::write(root.path().join("proc/cmdline"), format!("{command_line}\n")).unwrap();
        root
    }

    fn ticket(root: &tempfile::TempDir) -> Option<String> {
        KernelEntry::read(root.path(), None, None)
            .unwrap()
            .ticket()
            .map(|ticket| ticket.to_string())
    }

    #[test]
    fn the_last_ticket_on_the_command_line_is_the_one() {
        assert_eq!(ticket(&kernel("quiet")), None);
        assert_eq!(ticket(&kernel(&format!("-- {PARAMETER}={TICKET}"))), None, "that is for init");
        let old = "f".repeat(32);
        let line = format!("quiet {PARAMETER}={old} {PARAMETER}={TICKET}");
        assert_eq!(ticket(&kernel(&line)).as_deref(), Some(TICKET));
    }

    #[test]
    fn what_is_no_ticket_or_cannot_be_read_is_an_error_and_not_a_cold_boot() {
        let error =
            KernelEntry::read(kernel(&format!("{PARAMETER}=7")).path(), None, None).unwrap_err();
        assert!(matches!(error, KernelEntryError::Ticket(_)), "{error}");
        let nowhere = tempfile::tempdir().unwrap();
        let error = KernelEntry::read(nowhere.path(), None, None).unwrap_err().to_string();
        assert!(error.contains("proc/cmdline"), "{error}");
    }

    #[test]
    fn redeeming_a_ticket_holds_for_every_host_of_this_kernel_and_only_for_that_ticket() {
        let root = kernel(&format!("{PARAMETER}={TICKET}"));
        let mut kernel_entry = KernelEntry::read(root.path(), None, None).unwrap();
        assert!(kernel_entry.ticket().is_some());
        kernel_entry.redeem();
        assert_eq!(kernel_entry.ticket(), None);
        assert_eq!(ticket(&root), None);
        let other = TICKET.replace('0', "1");
        fs::write(root.path().join("proc/cmdline"), format!("{PARAMETER}={other}")).unwrap();
        assert_eq!(ticket(&root), Some(other));
    }

    #[test]
    fn the_last_mark_counts_until_a_host_has_looked_for_the_vms() {
        let root = kernel(&format!("{MARK}=1 quiet {MARK}=2"));
        let mut kernel_entry = KernelEntry::read(root.path(), None, None).unwrap();
        assert!(kernel_entry.is_marked() && kernel_entry.ticket().is_none());
        assert!(
            KernelEntry::read(root.path(), None, None).unwrap().is_marked(),
            "nothing is noted yet"
        );
        kernel_entry.redeem();
        assert!(!kernel_entry.is_marked());
        assert!(!KernelEntry::read(root.path(), None, None).unwrap().is_marked());
        fs::write(root.path().join("proc/cmdline"), format!("{MARK}=3\n")).unwrap();
        assert!(KernelEntry::read(root.path(), None, None).unwrap().is_marked(), "another kernel");
        assert!(!KernelEntry::read(kernel("quiet").path(), None, None).unwrap().is_marked());
    }

    #[test]
    fn a_vm_that_was_given_up_stays_so_in_this_boot() {
        let root = kernel(&format!("{PARAMETER}={TICKET}"));
        let (web, db) = (VmName::new("web").unwrap(), VmName::new("db").unwrap());
        let kernel_entry = KernelEntry::read(root.path(), None, None).unwrap();
        assert_eq!((kernel_entry.is_given_up(&web), kernel_entry.any_given_up()), (false, None));
        kernel_entry.give_up(&web).unwrap();
        kernel_entry.give_up(&web).unwrap();
        let again = KernelEntry::read(root.path(), None, None).unwrap();
        assert!(again.is_given_up(&web) && !again.is_given_up(&db));
        assert_eq!(again.any_given_up().as_deref(), Some("web"));
        fs::remove_dir_all(root.path().join("run")).unwrap();
        fs::write(root.path().join("run"), "").unwrap();
        let error = kernel_entry.give_up(&db).unwrap_err().to_string();
        assert!(error.contains("given-up/vm-db"), "{error}");
    }

    #[test]
    fn no_vm_counts_as_given_up_when_nothing_of_it_can_come_any_more() {
        for line in [format!("{PARAMETER}={TICKET}"), "quiet".to_owned()] {
            let (root, web) = (kernel(&line), VmName::new("web").unwrap());
            let mut kernel_entry = KernelEntry::read(root.path(), None, None).unwrap();
            kernel_entry.give_up(&web).unwrap();
            kernel_entry.redeem();
            assert!(!kernel_entry.is_given_up(&web) && kernel_entry.any_given_up().is_none());
            kernel_entry.give_up(&web).unwrap();
            assert!(kernel_entry.is_given_up(&web), "a later decision");
        }
    }

    #[test]
    fn the_host_that_has_the_pool_redeems_the_ticket_for_hosts_with_locks_of_their_own() {
        let root = kernel(&format!("{PARAMETER}={TICKET}"));
        let read =
            |lock: Option<&str>| KernelEntry::read(root.path(), None, lock.map(Path::new)).unwrap();
        let other = Some("/run/other.lock");
        assert!(read(None).ticket().is_some() && read(other).ticket().is_some());
        read(other).redeem();
        assert!(read(None).ticket().is_none() && read(other).ticket().is_none());
    }

    #[test]
    fn hosts_with_locks_of_their_own_decide_for_themselves() {
        let (root, web) = (kernel(&format!("{MARK}=1")), VmName::new("web").unwrap());
        let read =
            |lock: Option<&str>| KernelEntry::read(root.path(), None, lock.map(Path::new)).unwrap();
        let mut first = read(Some("/run/first.lock"));
        first.give_up(&web).unwrap();
        for other in [None, Some(DEFAULT_LOCK), Some("/run/second.lock")] {
            assert!(!read(other).is_given_up(&web), "{other:?}");
            read(other).redeem();
        }
        assert!(read(Some("/run/first.lock")).is_given_up(&web));
        assert!(read(Some("/run/first.lock")).is_marked());
        first.redeem();
        assert!(!read(Some("/run/first.lock")).is_marked());
        // The default lock is the same one, whether or not it is named.
        assert!(!read(None).is_marked() && !read(Some(DEFAULT_LOCK)).is_marked());
    }
}
