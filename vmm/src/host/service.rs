//! The host as a systemd service: the fd store as LUO, readiness, and the kexec by systemd.
//!
//! ```text
//!   update:  load the next kernel -> `systemctl kexec` -> systemd stops every service, this one too
//!   SIGTERM: the VMs into the fd store -> exit          whether for a kexec or for a restart
//! ```
//!
//! systemd does not tell a service why it is stopped, and the host need not know: the next start of the
//! service gets the contents of the store, under the same kernel or another. See `docs/systemd.md`.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use luo::Orchestrator;
use luo::systemd::{Count, FIRST_VERSION, FdStore, Notify};

use crate::answer::{Answer, Output};
use crate::causes::chain;
use crate::live_update::manifest::{host_session, vm_of_session};
use crate::live_update::next_kernel::Loaded;
use crate::live_update::programs::MAX_HELD;
use crate::machine::Machine;
use crate::vm::ram_layout;

/// How long systemd may take for an answer to a question.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);
/// How long systemd may take to accept the request for a kexec.
const KEXEC_ACCEPTED_WITHIN: Duration = Duration::from_secs(25);
/// For how long each step of a stop asks systemd to wait for the host.
const STEP_TAKES: Duration = Duration::from_secs(300);

/// systemd could not be asked for the kexec.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KexecError {
    /// `systemctl` cannot be run.
    #[error("cannot run `systemctl kexec`")]
    Run(#[source] std::io::Error),
    /// `systemctl` failed.
    #[error("`systemctl kexec` failed: {0}")]
    Failed(String),
    /// systemd may carry it out all the same.
    #[error(
        "`systemctl kexec` has not answered for {} s: see `systemctl list-jobs` before you update again",
        KEXEC_ACCEPTED_WITHIN.as_secs()
    )]
    Late,
}

/// Returns the fd store of this service as LUO. `None` if there is no fd store or systemd does not carry
/// it over a kexec: then the caller chooses another LUO. Logs an error if the store has too little room
/// for `machines`.
pub fn luo(machines: &[Machine]) -> Option<Result<Box<dyn Orchestrator>, String>> {
    let Some(store) = FdStore::from_env(count) else { return without_store().map(Err) };
    let version = version();
    if version.is_none_or(|version| version < FIRST_VERSION) {
        let found = version.map_or("an unknown version".to_owned(), |version| version.to_string());
        // The last host used it, and this one could not find out the version, for lack of memory for example.
        if store.as_ref().is_ok_and(|store| !store.waiting().is_empty()) {
            return Some(Err(format!(
                "the fd store holds sessions and cannot be used: that needs systemd {FIRST_VERSION}, this is {found}"
            )));
        }
        tracing::warn!(
            "the fd store is not used: it survives a kexec from systemd {FIRST_VERSION} on, this is \
             {found}"
        );
        return None;
    }
    let store = match store {
        Ok(store) => store,
        Err(errno) => return Some(Err(format!("the fd store cannot be used: {errno}"))),
    };
    tracing::info!("live updates go through the fd store, which takes {} fds", store.capacity());
    report_room(&store, fds_needed(machines));
    report_contents(&store);
    Some(Ok(Box::new(store)))
}

/// Why a service without an fd store may hold VMs all the same: systemd has passed it what the last host stored, and the
/// unit has been changed since.
fn without_store() -> Option<String> {
    let passed = FdStore::passed_sessions();
    let of_vms = passed.iter().filter(|session| vm_of_session(session).is_some());
    let names: Vec<String> = of_vms.map(ToString::to_string).collect();
    (!names.is_empty()).then(|| {
        format!(
            "systemd has passed the sessions `{}`, but this service has no fd store now: set FileDescriptorStoreMax= \
             and NotifyAccess=main in the unit again, and restart the service",
            names.join("`, `")
        )
    })
}

/// Whether systemd empties the fd store when it stops this service, as before a kexec. False if it does not tell.
pub fn empties_store() -> bool {
    let said =
        unit().and_then(|unit| ask(&["show", "--property=FileDescriptorStorePreserve", &unit]));
    said.is_some_and(|said| is_emptied(&said))
}

/// Parses the output of `systemctl show` with what becomes of the fd store.
fn is_emptied(text: &str) -> bool {
    ["FileDescriptorStorePreserve=no", "FileDescriptorStorePreserve=restart"].contains(&text.trim())
}

fn report_room(store: &FdStore, needed: usize) {
    if needed > store.capacity() {
        tracing::error!(
            "the fd store takes {} fds, but the VMs of the configuration can need {needed}, and some \
             would be lost: set FileDescriptorStoreMax={needed} in the unit, or configure fewer VMs",
            store.capacity()
        );
    }
}

/// Warns about contents of the store that no host will retrieve.
fn report_contents(store: &FdStore) {
    let waiting = store.waiting();
    if !store.strangers().is_empty() {
        let names = store.strangers().join("`, `");
        tracing::warn!("the fd store holds `{names}`, which no host has put there");
    }
    if !waiting.is_empty() && !waiting.contains(&host_session()) {
        let names: Vec<String> = waiting.iter().map(ToString::to_string).collect();
        tracing::error!(
            "the fd store holds `{}` but no manifest: no VM can be resumed from that, and the memory \
             stays in use until `systemctl stop` and `systemctl clean --what=fdstore`",
            names.join("`, `")
        );
    }
}

/// Returns the version of systemd; `None` if `systemctl --version` does not tell it.
fn version() -> Option<u32> {
    parse_version(&ask(&["--version"])?)
}

/// The unit of this process, once systemd has told something of it.
static UNIT: OnceLock<String> = OnceLock::new();

/// Returns the unit of this process. `None` if systemd does not tell it.
fn unit() -> Option<String> {
    UNIT.get().cloned().or_else(|| ask(&["whoami"]))
}

/// Returns what systemd says of the fd store of this service. `None`, and a line in the log, if it does not say.
fn count() -> Option<Count> {
    let of_unit = |unit: &str| {
        let properties = "--property=NFileDescriptorStore,FileDescriptorStoreMax";
        parse_count(&ask(&["show", properties, unit])?)
    };
    let count = unit().and_then(|unit| {
        let count = of_unit(&unit)?;
        UNIT.get_or_init(|| unit);
        Some(count)
    });
    if count.is_none() {
        tracing::warn!(
            "`systemctl` does not tell how many fds are in the fd store of this service, so nobody would notice \
             if systemd dropped one"
        );
    }
    count
}

/// Parses the output of `systemctl show` with the two properties of the fd store.
fn parse_count(text: &str) -> Option<Count> {
    let value = |name: &str| {
        let mut values = text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        values.next()?.parse().ok()
    };
    Some(Count { files: value("NFileDescriptorStore")?, most: value("FileDescriptorStoreMax")? })
}

/// Returns what `systemctl` says, if it succeeds.
fn ask(arguments: &[&str]) -> Option<String> {
    said(arguments).filter(|answer| answer.is_good).map(|answer| answer.said)
}

/// Returns the answer of `systemctl`. `None` if it cannot be run, or does not end in time.
fn said(arguments: &[&str]) -> Option<Answer> {
    let output = Output::new().ok()?;
    let mut command = Command::new("systemctl");
    command.args(arguments).stdin(Stdio::null()).stderr(Stdio::null());
    command.stdout(output.writer().ok()?);
    output.answer_of(&mut command, ANSWERS_WITHIN, 0).ok()?
}

/// Whether systemd stops all services, for a kexec or another end of the machine's run. `None` if it does not tell.
pub fn is_ending() -> Option<bool> {
    parse_state(&said(&["is-system-running"])?.said)
}

/// Parses the output of `systemctl is-system-running`, whose exit status tells only whether all is well.
fn parse_state(text: &str) -> Option<bool> {
    let states = ["initializing", "starting", "running", "degraded", "maintenance", "stopping"];
    states.contains(&text.trim()).then_some(text.trim() == "stopping")
}

/// Whether systemd is about to enter the kernel that this host has loaded.
pub fn is_kexec_pending() -> bool {
    let running = kexec::Running::read(Path::new("/"));
    let is_loaded = running.ok().and_then(|running| running.kexec_loaded);
    is_pending(is_loaded, is_ending)
}

/// Whether a kexec may be pending: it is, unless it is known not to be.
fn is_pending(is_loaded: Option<bool>, is_ending: impl FnOnce() -> Option<bool>) -> bool {
    is_loaded != Some(false) && is_ending() != Some(false)
}

/// Parses the output of `systemctl --version`, which begins with `systemd 262 (262.1-1)`.
fn parse_version(text: &str) -> Option<u32> {
    let number = text.strip_prefix("systemd ")?;
    number.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// Returns the number of fds for the VMs when all of their memory was touched: each VM's segments and
/// state document, the manifest and the index, and the programs of hosts.
fn fds_needed(machines: &[Machine]) -> usize {
    let segments = |ram_bytes| ram_layout(ram_bytes).map_or(0, |layout| layout.segments().len());
    2 + MAX_HELD + 1 + machines.iter().map(|machine| segments(machine.ram_bytes) + 1).sum::<usize>()
}

/// Tells systemd that the host is ready, and its status line. Does nothing without systemd.
pub fn ready(status: &str) {
    send_to_systemd(&format!("READY=1\nSTATUS={status}"));
}

/// Tells systemd that the host is stopping, unless systemd takes no messages now.
pub fn stopping(status: &str) {
    hint(&format!("STOPPING=1\nSTATUS={status}"));
}

/// Asks systemd to wait for another while, if the unit's TimeoutStopSec= is shorter than what is left to do. Does nothing if
/// systemd takes no messages now.
pub fn extend_timeout() {
    hint(&format!("EXTEND_TIMEOUT_USEC={}", STEP_TAKES.as_micros()));
}

fn hint(message: &str) {
    if let Some(Ok(notify)) = Notify::from_env() {
        // Whether systemd answers is found out otherwise.
        let _ = notify.hint(message);
    }
}

fn send_to_systemd(message: &str) {
    match Notify::from_env() {
        Some(Err(errno)) => tracing::warn!("cannot reach the service manager: {errno}"),
        Some(Ok(notify)) => {
            if let Err(errno) = notify.send(message) {
                tracing::warn!("cannot notify the service manager: {errno}");
            }
        }
        None => {}
    }
}

/// Looks once more, before this service ends, at the next kernel, and says loudly if it is not the one that was checked.
/// `ours`: the one that this host has loaded and asked systemd to enter. It is loaded again: the running kernel does not
/// tell whose image it holds, and to load the same one twice does no harm. The VMs go into the fd store in any case: they
/// outlive a restart of the service.
pub fn look_again(ours: Option<&mut Loaded>) {
    let running = kexec::Running::read(Path::new("/"));
    let is_loaded = running.ok().and_then(|running| running.kexec_loaded);
    let load_again = ours.map(|ours| || ours.load_again());
    match secure(is_loaded, is_ending, load_again) {
        Next::AsBefore => {}
        Next::LoadedAgain => tracing::info!(
            "the next kernel that was checked is loaded again, in case another program has loaded one over it"
        ),
        Next::Restored => tracing::warn!(
            "the next kernel that this host had checked and loaded was unloaded by another program: it is loaded again"
        ),
        Next::Doubtful(error) => tracing::error!(
            "the next kernel that this host had checked cannot be loaded again: {}. If another program has loaded one \
             over it, the VMs are lost unless that one takes them over",
            chain(&error).join(": ")
        ),
        Next::Gone(error) => tracing::error!(
            "the next kernel that this host had checked and loaded was unloaded by another program, and cannot be loaded \
             again: {}. systemd reboots the machine or loads a kernel of its own, and the VMs are lost unless that one \
             takes them over. To keep them, load the kernel again before systemd is through: `kexec -s -l`",
            chain(&error).join(": ")
        ),
        Next::Unchecked => tracing::warn!(
            "a next kernel is loaded that this host has not checked: if systemd enters it, the VMs come back only if it \
             has the same LUO and `kho=on liveupdate=on` on its command line; use `perennial ctl update`, which checks it"
        ),
    }
}

/// What is known of the next kernel at the end of this service.
#[derive(Debug, PartialEq, Eq)]
enum Next<E> {
    /// Nothing was done: none is loaded, or systemd enters none.
    AsBefore,
    /// The checked one, which may have been another one until now.
    LoadedAgain,
    /// The checked one, which was unloaded.
    Restored,
    /// The checked one could not be loaded again, and may be another one.
    Doubtful(E),
    /// The checked one was unloaded, and could not be loaded again.
    Gone(E),
    /// One that this host has not loaded.
    Unchecked,
}

/// Loads the checked kernel again, unless systemd only stops this service. `is_loaded`: whether any next kernel is loaded, if
/// the kernel tells. `is_ending`: whether systemd ends the machine's run, if it tells. `load_again`: `None` if this host has
/// loaded none.
fn secure<E>(
    is_loaded: Option<bool>,
    is_ending: impl FnOnce() -> Option<bool>,
    load_again: Option<impl FnOnce() -> Result<(), E>>,
) -> Next<E> {
    let is_gone = is_loaded == Some(false);
    let Some(load_again) = load_again else {
        return if is_loaded == Some(true) { Next::Unchecked } else { Next::AsBefore };
    };
    if is_ending() == Some(false) {
        return Next::AsBefore;
    }
    match load_again() {
        Ok(()) if is_gone => Next::Restored,
        Ok(()) => Next::LoadedAgain,
        Err(error) if is_gone => Next::Gone(error),
        Err(error) => Next::Doubtful(error),
    }
}

/// Asks systemd to enter the loaded kernel. Returns as soon as systemd has accepted the request.
pub fn ask_for_kexec() -> Result<(), KexecError> {
    let output = Output::new().map_err(KexecError::Run)?;
    let mut command = Command::new("systemctl");
    command.args(["kexec", "--no-block"]).stdin(Stdio::null());
    command.stdout(output.writer().map_err(KexecError::Run)?);
    command.stderr(output.writer().map_err(KexecError::Run)?);
    match output.answer_of(&mut command, KEXEC_ACCEPTED_WITHIN, 0).map_err(KexecError::Run)? {
        Some(answer) if answer.is_good => Ok(()),
        Some(answer) => Err(KexecError::Failed(answer.said.trim().to_owned())),
        None => Err(KexecError::Late),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::tests::sample;

    #[test]
    fn the_version_is_the_first_number() {
        assert_eq!(parse_version("systemd 262 (262.1-1)\n+PAM"), Some(262));
        assert_eq!(parse_version("systemd 257~rc1-1"), Some(257));
        assert_eq!(parse_version("elogind 252"), None);
        assert_eq!(parse_version("systemd \n"), None);
        assert_eq!(parse_version(""), None);
    }

    #[test]
    fn a_store_that_does_not_outlast_a_stop_is_known() {
        let is_emptied = |value| is_emptied(&format!("FileDescriptorStorePreserve={value}\n"));
        assert!(is_emptied("no") && is_emptied("restart"));
        assert!(!is_emptied("yes") && !is_emptied("on-success") && !is_emptied(""));
    }

    #[test]
    fn a_kexec_is_pending_unless_systemd_says_that_it_is_not() {
        assert_eq!(parse_state("stopping\n"), Some(true));
        assert_eq!(parse_state("degraded\n"), Some(false));
        assert_eq!((parse_state("offline\n"), parse_state("")), (None, None));
        assert!(is_pending(Some(true), || Some(true)) && is_pending(None, || None));
        assert!(!is_pending(Some(true), || Some(false)), "it was cancelled");
        assert!(!is_pending(Some(false), || panic!("there is nothing to enter")));
    }

    #[test]
    fn both_properties_of_the_store_are_needed() {
        let text = "FileDescriptorStoreMax=4096\nNFileDescriptorStore=17\n";
        assert_eq!(parse_count(text), Some(Count { files: 17, most: 4096 }));
        assert_eq!(parse_count("NFileDescriptorStore=17\n"), None);
        assert_eq!(parse_count("NFileDescriptorStore=\nFileDescriptorStoreMax=1\n"), None);
    }

    #[test]
    fn the_checked_kernel_is_loaded_again_before_systemd_enters_the_one_that_is_loaded() {
        let loads = |result: Result<(), u8>| Some(move || result);
        let loads_none = || None::<fn() -> Result<(), u8>>;
        let is_ending = || Some(true);
        for (is_loaded, loaded, refused) in [
            (Some(true), Next::LoadedAgain, Next::Doubtful(1)),
            (None, Next::LoadedAgain, Next::Doubtful(1)),
            (Some(false), Next::Restored, Next::Gone(1)),
        ] {
            assert_eq!(secure(is_loaded, is_ending, loads(Ok(()))), loaded);
            assert_eq!(secure(is_loaded, || None, loads(Ok(()))), loaded, "what is not known");
            assert_eq!(secure(is_loaded, is_ending, loads(Err(1))), refused);
            let cancelled = || Some(false);
            let unasked = Some(|| -> Result<(), u8> { panic!("systemd stops only the service") });
            assert_eq!(secure(is_loaded, cancelled, unasked), Next::AsBefore);
        }
        assert_eq!(secure(Some(true), is_ending, loads_none()), Next::Unchecked);
        assert_eq!(secure(Some(false), is_ending, loads_none()), Next::AsBefore);
        assert_eq!(secure(None, is_ending, loads_none()), Next::AsBefore);
    }

    #[test]
    fn every_vm_needs_an_fd_for_each_segment_and_one_more() {
        let segments = ram_layout(sample().ram_bytes).unwrap().segments().len();
        assert!(segments > 0);
        let without = 2 + MAX_HELD + 1;
        assert_eq!(fds_needed(&[]), without);
        assert_eq!(fds_needed(&[sample(), sample()]), without + 2 * (segments + 1));
    }
}
