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
//! A handover through a pool passes its ticket to the next program in its environment, which is gone if that program is
//! killed. So each of the two notes the ticket, and the host that is started then uses it as one from the command line. The
//! last host's note may be of a handover that never took place: that host may have been killed before the switch.
//!
//! Every live update leaves a mark on the command line as well, whatever carries the VMs. A host that finds the mark
//! and no VMs knows that they are lost, and that this is no cold boot.
//!
//! The decisions are recorded in `/run`, which lasts as long as the kernel, so that a restarted host
//! service knows them. They are about what the last host left, so they end when a host has taken that over: the next
//! one finds newer states of the same VMs. Hosts with locks of their own have notes of their own, but for the ticket, which is
//! the kernel's: the host that has its pool redeems it for all. What the notes say is in the names of files: `/run`
//! takes a new name also when it is full.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use luo::builtin::pool::Expect;
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

/// File name of the note of the ticket that was used, and with `-TICKET` behind it the same note without contents. Earlier
/// versions have only the first.
const REDEEMED: &str = "redeemed";
/// File name of the note of the mark whose VMs a host looked for, likewise.
const SEEN: &str = "seen";

/// What the file names of the notes of handovers start with: by the last host, before it hands over, and by the next one.
/// The ticket follows.
const BEGUN: &str = "handing-over-";
const HANDED_OVER: &str = "handed-over-";

/// How long a host that starts tries to read the command line. What prevents it may pass: a want of memory or of files.
const READ_WITHIN: Duration = Duration::from_secs(2);
/// Time between two attempts.
const READ_AGAIN: Duration = Duration::from_millis(100);

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
    #[error(
        "the value of `{PARAMETER}=` on the command line of this kernel is not a ticket, so no host of this kernel finds \
         the VMs that are in a pool: enter a kernel with the right value, or give their state up with `stop`"
    )]
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

/// Where a ticket comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TicketOrigin {
    /// The kernel's command line.
    CommandLine,
    /// The last host of this process.
    LastHost,
    /// The note of a handover that began.
    Begun,
    /// The note of a handover that took place.
    HandedOver,
}

/// How this kernel was entered.
#[derive(Debug)]
pub struct KernelEntry {
    ticket: Option<Ticket>,
    /// The mark of the live update, until a host looked for its VMs.
    mark: Option<String>,
    origin: TicketOrigin,
    notes: PathBuf,
    /// The directory of the notes that all hosts share.
    shared: PathBuf,
    /// The root directory and the host's lock, if the command line could not be read yet.
    unread: Option<(PathBuf, Option<PathBuf>)>,
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
        let of_host = |ticket, origin| {
            let (ticket, notes) = (Some(ticket), notes.clone());
            Self { ticket, mark: None, origin, notes, shared: shared.clone(), unread: None }
        };
        if let Some(ticket) = left {
            return Ok(of_host(ticket, TicketOrigin::LastHost));
        }
        if let Some((_, ticket, origin)) = handovers(&notes).max_by_key(|(written, ..)| *written) {
            return Ok(of_host(ticket, origin));
        }
        let path = root.join("proc/cmdline");
        let line = fs::read_to_string(&path);
        let line = line.map_err(|source| KernelEntryError::CommandLine { path, source })?;
        // An operator may have copied an old value into the next kernel's command line.
        let last = |name| {
            let values = kexec::parameters(&line).filter(|parameter| parameter.is(name));
            values.filter_map(|parameter| parameter.value).last()
        };
        let is_noted = |path: PathBuf, value: &str| {
            fs::read_to_string(&path).is_ok_and(|noted| noted == value)
                || with_value(&path, value).is_some_and(|path| path.exists())
        };
        let ticket = last(PARAMETER).map(str::parse::<Ticket>).transpose()?;
        let ticket = ticket.filter(|ticket| !is_noted(shared.join(REDEEMED), &ticket.to_string()));
        let mark = last(MARK).filter(|mark| !is_noted(notes.join(SEEN), mark)).map(str::to_owned);
        let origin = TicketOrigin::CommandLine;
        Ok(Self { ticket, mark, origin, notes, shared, unread: None })
    }

    /// The same at the start of a host: tries again for a while if the command line cannot be read.
    pub fn read_patiently(
        root: &Path,
        left: Option<Ticket>,
        lock: Option<&Path>,
    ) -> Result<Self, KernelEntryError> {
        let deadline = Instant::now() + READ_WITHIN;
        loop {
            match Self::read(root, left, lock) {
                Err(KernelEntryError::CommandLine { .. }) if Instant::now() < deadline => {
                    thread::sleep(READ_AGAIN);
                }
                done => return done,
            }
        }
    }

    /// The value where no kernel's command line matters.
    pub fn unknown(lock: Option<&Path>) -> Self {
        let (notes, shared) = (notes(lock), PathBuf::from(NOTES));
        let origin = TicketOrigin::CommandLine;
        Self { ticket: None, mark: None, origin, notes, shared, unread: None }
    }

    /// The value for a kernel whose command line cannot be read now.
    pub fn unread(root: &Path, lock: Option<&Path>) -> Self {
        let unread = Some((root.to_owned(), lock.map(Path::to_owned)));
        Self { unread, ..Self::unknown(lock) }
    }

    /// Whether it is not known how this kernel was entered, because its command line could not be read.
    pub fn is_unread(&self) -> bool {
        self.unread.is_some()
    }

    /// Tries again to read the command line, if it could not be read yet.
    pub fn read_again(&mut self) -> Result<(), KernelEntryError> {
        if let Some((root, lock)) = &self.unread {
            *self = Self::read(root, None, lock.as_deref())?;
        }
        Ok(())
    }

    /// The ticket of the live update that entered this kernel, if VMs may be in a pool. `None` if there is
    /// no ticket or it was redeemed.
    pub fn ticket(&self) -> Option<Ticket> {
        self.ticket
    }

    /// The ticket with which the next kernel's host can find the VMs, if this host cannot reach the pool. `None` also if only
    /// a note says that they are there.
    pub fn ticket_to_pass_on(&self) -> Option<Ticket> {
        self.ticket.filter(|_| !self.is_noted())
    }

    /// The sessions that the pool is to have.
    pub fn expect(&self) -> Expect {
        match (self.ticket, self.origin) {
            (None, _) => Expect::Nothing,
            (Some(ticket), TicketOrigin::Begun) => Expect::Begun(ticket),
            (Some(ticket), _) => Expect::Switch(ticket),
        }
    }

    /// Whether another host of this kernel began to hand over, and no host has taken over what it left.
    pub fn is_handed_over(&self) -> bool {
        self.ticket.is_some() && self.origin != TicketOrigin::CommandLine
    }

    /// Whether only a note says that another host handed over: what it left may have been given up since.
    pub fn is_noted(&self) -> bool {
        matches!(self.origin, TicketOrigin::Begun | TicketOrigin::HandedOver)
    }

    /// Whether the last host may have ended before it handed over, as far as the notes say.
    pub fn has_only_begun(&self) -> bool {
        self.origin == TicketOrigin::Begun
    }

    /// Notes the ticket of a handover that begins.
    pub fn note_handover(&self, ticket: Ticket) {
        self.note_ticket(BEGUN, ticket);
    }

    /// Notes the ticket of the handover by which this host was started.
    pub fn note_arrival(&self, ticket: Ticket) {
        self.note_ticket(HANDED_OVER, ticket);
    }

    /// Notes a ticket in place of those of earlier handovers. What was given up before is older than what is handed over.
    fn note_ticket(&self, kind: &str, ticket: Ticket) {
        let name = format!("{kind}{ticket}");
        let path = self.notes.join(&name);
        match self.make_notes().and_then(|()| fs::write(&path, "")) {
            Ok(()) => {
                remove(handover_notes(&self.notes).filter(|(noted, _)| *noted != name));
                self.forget_given_up();
            }
            Err(error) => tracing::warn!(
                "cannot record the handover in {}: {error}; if the next host is killed before it has taken over, the VMs \
                 are lost",
                path.display()
            ),
        }
    }

    /// Removes the notes of handovers, as none has taken place. Returns whether none is left.
    pub fn forget_handovers(&self) -> bool {
        remove(handover_notes(&self.notes))
    }

    /// Removes the notes of the handover with this ticket. The last host may have had another lock.
    fn forget_handover(&self, ticket: &str) {
        let others = fs::read_dir(self.shared.join(OTHER_HOSTS)).into_iter().flatten().flatten();
        let others = others.map(|directory| directory.path());
        let all = others.chain([self.shared.clone()]).flat_map(|notes| handover_notes(&notes));
        remove(all.filter(|(name, _)| name.ends_with(ticket)));
    }

    /// Whether a live update entered this kernel, and no host has looked for its VMs yet.
    pub fn is_marked(&self) -> bool {
        self.ticket.is_some() || self.mark.is_some()
    }

    /// Marks the ticket as used, because its sessions can be retrieved only once, and notes that a host looked for the
    /// VMs. From now on no VM counts as given up.
    pub fn redeem(&mut self) {
        let (ticket, mark) = (self.ticket.take(), self.mark.take());
        let ticket = ticket.map(|ticket| ticket.to_string());
        ticket.iter().for_each(|ticket| self.forget_handover(ticket));
        let none_is_noted = self.forget_handovers();
        if self.origin != TicketOrigin::CommandLine {
            if none_is_noted {
                self.forget_given_up();
            }
            return;
        }
        let notes = [(self.shared.join(REDEEMED), ticket), (self.notes.join(SEEN), mark)];
        let mut all_noted = none_is_noted;
        for (path, value) in notes.into_iter().filter_map(|(path, value)| Some((path, value?))) {
            if let Err(error) = self.note(&path, &value) {
                all_noted = false;
                tracing::warn!(
                    "cannot record in {} that the VMs of the last kernel were retrieved: {error}; if this \
                     host is restarted, its VMs may have to be started by hand",
                    path.display()
                );
            }
        }
        // Until then they can come again.
        if all_noted {
            self.forget_given_up();
        }
    }

    /// Records a decision. Errors if no later host will know of it.
    fn note(&self, path: &Path, value: &str) -> io::Result<()> {
        self.make_notes()?;
        let with_contents = fs::write(path, value);
        match with_value(path, value) {
            Some(path) => fs::write(path, ""),
            None => with_contents,
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

/// Returns the names and paths of the notes of handovers in this directory.
fn handover_notes(notes: &Path) -> impl Iterator<Item = (String, PathBuf)> + use<> {
    let files = fs::read_dir(notes).into_iter().flatten().flatten();
    let named = files.map(|file| (file.file_name().to_string_lossy().into_owned(), file.path()));
    named.filter(|(name, _)| [BEGUN, HANDED_OVER].iter().any(|kind| name.starts_with(kind)))
}

/// Returns the tickets of these notes, and when each was written.
fn handovers(notes: &Path) -> impl Iterator<Item = (SystemTime, Ticket, TicketOrigin)> {
    handover_notes(notes).filter_map(|(name, path)| {
        let (ticket, origin) = match name.strip_prefix(BEGUN) {
            Some(ticket) => (ticket, TicketOrigin::Begun),
            None => (name.strip_prefix(HANDED_OVER)?, TicketOrigin::HandedOver),
        };
        Some((fs::metadata(path).ok()?.modified().ok()?, ticket.parse().ok()?, origin))
    })
}

/// Removes these notes. Returns whether all are gone.
fn remove(notes: impl Iterator<Item = (String, PathBuf)>) -> bool {
    let mut all_gone = true;
    for (name, path) in notes {
        if let Err(error) = fs::remove_file(&path) {
            all_gone = false;
            tracing::warn!("cannot remove the note {name} of a handover: {error}");
        }
    }
    all_gone
}

/// Returns the path of a note that needs no contents. `None` if the value, which may be anything on a command line, cannot
/// be part of a file name.
fn with_value(path: &Path, value: &str) -> Option<PathBuf> {
    let fits = value.len() <= 64 && value.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    let name = path.file_name()?.to_str()?;
    fits.then(|| path.with_file_name(format!("{name}-{value}")))
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
    fn a_handover_that_was_noted_counts_until_it_is_redeemed() {
        for line in ["quiet".to_owned(), format!("{PARAMETER}={}", "f".repeat(32))] {
            let root = kernel(&line);
            let read = || KernelEntry::read(root.path(), None, None).unwrap();
            let of_other = || {
                KernelEntry::read(root.path(), None, Some(Path::new("/run/other.lock"))).unwrap()
            };
            let before = read().expect();
            let ticket = TICKET.parse().unwrap();
            read().note_handover("1".repeat(32).parse().unwrap());
            read().note_handover(ticket);
            for _ in 0..2 {
                assert_eq!(read().expect(), Expect::Begun(ticket), "the last one");
                assert!(read().is_handed_over() && read().is_marked() && read().is_noted());
                assert_eq!(read().ticket_to_pass_on(), None, "the pool may not have it");
                assert!(read().has_only_begun());
            }
            assert_eq!(of_other().expect(), before);
            read().redeem();
            assert_eq!(read().expect(), before);
            // The next program has it from the last one, and may have another lock.
            read().note_handover(ticket);
            let mut next = KernelEntry::read(root.path(), Some(ticket), None).unwrap();
            assert_eq!(next.expect(), Expect::Switch(ticket));
            assert_eq!(next.ticket_to_pass_on(), Some(ticket));
            next.note_arrival(ticket);
            of_other().note_arrival(ticket);
            assert!(read().expect() == Expect::Switch(ticket) && read().is_noted());
            assert!(!read().has_only_begun());
            assert_eq!(of_other().expect(), Expect::Switch(ticket));
            next.redeem();
            assert_eq!((read().expect(), of_other().expect()), (before, before));
            read().note_handover(ticket);
            assert!(read().forget_handovers());
            assert_eq!(read().expect(), before);
        }
    }

    #[test]
    fn what_was_given_up_counts_while_the_note_of_a_handover_cannot_be_removed() {
        let root = kernel("quiet");
        let read = || KernelEntry::read(root.path(), None, None).unwrap();
        read().note_handover(TICKET.parse().unwrap());
        let (mut entry, web) = (read(), VmName::new("web").unwrap());
        entry.give_up(&web).unwrap();
        // No file can be removed in place of this.
        let note = root.path().join("run/perennial").join(format!("{BEGUN}{TICKET}"));
        fs::remove_file(&note).unwrap();
        fs::create_dir(&note).unwrap();
        entry.redeem();
        assert!(read().is_noted() && read().is_given_up(&web));
    }

    #[test]
    fn notes_to_which_nothing_can_be_written_hold_all_the_same() {
        let root = kernel(&format!("{PARAMETER}={TICKET} {MARK}=7-x"));
        let mut entry = KernelEntry::read(root.path(), None, None).unwrap();
        // Nothing can be written to what has these names.
        let notes = root.path().join("run/perennial");
        for name in [REDEEMED, SEEN] {
            fs::create_dir_all(notes.join(name)).unwrap();
        }
        entry.redeem();
        let again = KernelEntry::read(root.path(), None, None).unwrap();
        assert!(again.ticket().is_none() && !again.is_marked());
        let other = TICKET.replace('0', "1");
        fs::write(root.path().join("proc/cmdline"), format!("{PARAMETER}={other} {MARK}=8"))
            .unwrap();
        let other = KernelEntry::read(root.path(), None, None).unwrap();
        assert!(other.ticket().is_some() && other.mark.is_some());
    }

    #[test]
    fn the_notes_of_an_earlier_version_count() {
        let root = kernel(&format!("{PARAMETER}={TICKET} {MARK}=../x"));
        let notes = root.path().join("run/perennial");
        fs::create_dir_all(&notes).unwrap();
        fs::write(notes.join(REDEEMED), TICKET).unwrap();
        let mut entry = KernelEntry::read(root.path(), None, None).unwrap();
        assert!(entry.ticket().is_none() && entry.is_marked());
        // A value that is no file name is in a file.
        entry.redeem();
        assert!(!KernelEntry::read(root.path(), None, None).unwrap().is_marked());
    }

    #[test]
    fn a_command_line_that_could_not_be_read_is_read_later() {
        let root = tempfile::tempdir().unwrap();
        let mut entry = KernelEntry::unread(root.path(), None);
        entry.read_again().unwrap_err();
        assert!(entry.is_unread());
        fs::create_dir(root.path().join("proc")).unwrap();
        fs::write(root.path().join("proc/cmdline"), format!("{PARAMETER}={TICKET}")).unwrap();
        entry.read_again().unwrap();
        assert!(!entry.is_unread() && entry.ticket().is_some());
    }

    #[test]
    fn a_host_that_starts_waits_for_the_command_line() {
        let root = tempfile::tempdir().unwrap();
        let (begun, there) = std::sync::mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(|| {
                begun.send(()).unwrap();
                assert!(KernelEntry::read_patiently(root.path(), None, None).unwrap().is_marked());
            });
            there.recv().unwrap();
            fs::create_dir(root.path().join("new")).unwrap();
            fs::write(root.path().join("new/cmdline"), format!("{MARK}=1")).unwrap();
            fs::rename(root.path().join("new"), root.path().join("proc")).unwrap();
        });
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
