//! The first steps of a host: it loads modules and mounts file systems, looks for the VMs of the last
//! kernel or host, and chooses the configuration. None of these steps starts or stops a VM.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use luo::Ticket;
use luo::builtin::keeper::Keeper;
use luo::builtin::pool::Expect;
use luo::systemd::FdStore;

use super::backend::{self, ChosenLuo, NoLuo};
use super::instance::{DEFAULT_LOCK, Instance, InstanceError};
use super::kernel_entry::{KernelEntry, KernelEntryError};
use super::mounts::Unmounted;
use super::{DEFAULT_CONTROL_PORT, DEFAULT_SOCKET, HostError, Look, init, modules, network};
use crate::api::report::Replaced;
use crate::causes::chain;
use crate::config::{Config, ConfigError, HostSection};
use crate::live_update::arrival;
use crate::live_update::manifest::host_session;
use crate::live_update::next_host::{InheritError, Inherited};
use crate::live_update::next_kernel::{MARK, is_of_update};
use crate::machine::Machine;

/// Loads the modules, mounts the file systems and sets up the network of `[host]` (PID 1 only). `fresh`
/// says that no VM can be preserved in a pool, `is_first` that no host of this kernel can have done it before. Returns what
/// failed; the rest is in place.
pub(super) fn prepare(section: &HostSection, fresh: bool, is_first: bool) -> Unprepared {
    if !init::is_pid_1() {
        return Unprepared::default();
    }
    let absent = modules::load_all(&section.modules);
    let absent = absent.iter().map(|error| chain(error).join(": "));
    let unmounted = init::mount_all(&section.mounts, fresh, is_first).into_iter();
    let unmounted = unmounted.map(|(mount, error)| Unmounted::new(mount, &error)).collect();
    let disconnected = network::set_up(section);
    let disconnected = disconnected.iter().map(|error| chain(error).join(": "));
    let unprepared = Unprepared { errors: absent.chain(disconnected).collect(), unmounted };
    let unmounted = unprepared.unmounted.iter().map(Unmounted::why);
    let errors = unprepared.errors.iter().map(String::as_str);
    errors.chain(unmounted).for_each(|why| tracing::error!("{why}"));
    unprepared
}

/// What a host could not prepare.
#[derive(Default)]
pub(super) struct Unprepared {
    /// The errors of modules and of the network.
    pub errors: Vec<String>,
    /// The mounts that failed.
    pub unmounted: Vec<Unmounted>,
}

impl Unprepared {
    /// Whether nothing failed.
    pub(super) fn is_empty(&self) -> bool {
        self.errors.is_empty() && self.unmounted.is_empty()
    }
}

/// Takes the machine's lock on hosts. `goes_on` says that this host must not end, because there are VMs that
/// only it can resume, or because it is PID 1: then it goes on without the lock. If the lock cannot be made, so does one for
/// which VMs may wait, and one that is not root's, if its configuration names no lock and it may not have the default one.
pub(super) fn lock(
    section: &HostSection,
    left: Option<OwnedFd>,
    goes_on: bool,
) -> Result<Option<Instance>, HostError> {
    let path = section.lock.as_deref().unwrap_or(Path::new(DEFAULT_LOCK));
    match Instance::take(path, left) {
        Ok(instance) => Ok(Some(instance)),
        Err(error @ (InstanceError::Taken { .. } | InstanceError::Foreign { .. })) if !goes_on => {
            Err(error.into())
        }
        Err(error) if !goes_on && !may_go_without(section, Path::new("/")) => Err(error.into()),
        Err(error) => {
            tracing::error!("{}", chain(&error).join(": "));
            Ok(None)
        }
    }
}

/// Whether a host for which no lock can be made starts all the same: it may not have the default one, as it is not root's, or
/// VMs of the last kernel or of the last process of this service may wait for it.
fn may_go_without(section: &HostSection, root: &Path) -> bool {
    let line = fs::read_to_string(root.join("proc/cmdline")).unwrap_or_default();
    let is_not_allowed = section.lock.is_none() && !rustix::process::geteuid().is_root();
    is_not_allowed || is_of_update(&line) || !FdStore::passed_sessions().is_empty()
}

/// What the last host of this process left, as far as it can be read.
#[derive(Default)]
pub(super) struct Inheritance {
    /// The keeper with the sessions.
    pub keeper: Option<Keeper>,
    /// The ticket for the sessions in the pool.
    pub ticket: Option<Ticket>,
}

/// Takes over what the last host of this process left. Logs an error if it cannot be read.
pub(super) fn inherit(sessions: Option<Result<Inherited, InheritError>>) -> Inheritance {
    let why = match sessions {
        None => return Inheritance::default(),
        Some(Ok(Inherited::InPool(ticket))) => {
            return Inheritance { ticket: Some(ticket), ..Inheritance::default() };
        }
        Some(Ok(Inherited::Kept(handover))) => match Keeper::arrive(handover) {
            Ok(keeper) => {
                return Inheritance { keeper: Some(keeper), ..Inheritance::default() };
            }
            Err(error) => chain(&error),
        },
        Some(Err(error)) => chain(&error),
    };
    tracing::error!("the VMs of the last host are lost: {}", why.join(": "));
    Inheritance::default()
}

/// Chooses a LUO, and looks at what the last host left in `keeper` or, without a keeper, in that LUO. Looking
/// consumes nothing: what cannot be read stays, and can be looked at again.
pub(super) fn find_vms(
    section: &HostSection,
    machines: &[Machine],
    kernel_entry: Result<KernelEntry, KernelEntryError>,
    keeper: Option<&Keeper>,
) -> (KernelEntry, ChosenLuo, Look) {
    let kernel_entry = match kernel_entry {
        Ok(kernel_entry) => kernel_entry,
        Err(error) => {
            let why = chain(&error).join(": ");
            tracing::error!("{why}");
            let lock = section.lock.as_deref();
            let kernel_entry = match error {
                KernelEntryError::CommandLine { .. } => KernelEntry::unread(Path::new("/"), lock),
                // Another look would find the same.
                KernelEntryError::Ticket(_) => KernelEntry::unknown(lock),
            };
            // All that there is has come with the handover: a host that withholds VMs hands nothing over.
            let may_hold_vms = keeper.is_none();
            let look = keeper.map_or(Ok(None), |keeper| arrival::look(keeper));
            return (kernel_entry, Err(NoLuo { why, may_hold_vms }), look);
        }
    };
    let luo = match (backend::choose(section, machines, kernel_entry.expect()), keeper) {
        (luo, Some(keeper)) => return (kernel_entry, luo, arrival::look(keeper)),
        (luo, None) => luo,
    };
    let (luo, look) = look_into(luo, kernel_entry.expect());
    (kernel_entry, luo, look)
}

/// Looks at what the last host left in the LUO that was chosen because it is to have this.
pub(super) fn look_into(luo: ChosenLuo, expect: Expect) -> (ChosenLuo, Look) {
    let luo = match luo {
        Ok(luo) => luo,
        none => return (none, Ok(None)),
    };
    match arrival::look(luo.as_ref()) {
        // It was finished once, and is still in the pool, so it must not be taken for absent.
        Ok(None) if matches!(expect, Expect::Switch(_)) => {
            let why = "the pool is the right one, but it has no manifest: another host of this kernel \
                       finished it and ended, and without it the VMs in the pool cannot be restored";
            tracing::error!("{why}");
            (Err(NoLuo { why: why.to_owned(), may_hold_vms: true }), Ok(None))
        }
        Ok(arrival) => (Ok(luo), Ok(arrival)),
        Err(not_seen) => (Ok(luo), Err(not_seen)),
    }
}

/// Returns why the VMs of the last kernel or host are lost: it was `replaced` with a mark, but left nothing that
/// could still come. `None` after a cold boot, or if it left something.
pub(super) fn lost(
    replaced: Replaced,
    kernel_entry: &KernelEntry,
    luo: &ChosenLuo,
    arrival: &Look,
) -> Option<Vec<String>> {
    let is_marked = replaced == Replaced::Program || kernel_entry.is_marked();
    let nowhere = match luo {
        Err(none) if none.may_hold_vms => return None,
        Err(none) => none.why.clone(),
        Ok(luo) => format!(
            "the LUO `{}` has no session `{}`: another host took it and ended, or the kernel could not \
             take it over",
            luo.backend(),
            host_session()
        ),
    };
    // A host that ended before it handed over has lost its VMs as any host does that is killed.
    if !is_marked || kernel_entry.has_only_begun() || !matches!(arrival, Ok(None)) {
        return None;
    }
    let entered = match replaced {
        Replaced::Kernel => {
            format!("a live update entered this kernel (`{MARK}=` on its command line)")
        }
        Replaced::Program => "another host handed over to this program".to_owned(),
    };
    // Where the manifest does not come again, VMs may be found by their names.
    let but = match luo {
        Ok(luo) if !luo.backend().comes_again() => ", but for those that are found by their names",
        _ => "",
    };
    let words = format!("the VMs of the last host are lost{but}: {entered}, but nothing was left");
    tracing::error!("{words}: {nowhere}");
    Some(vec![words, nowhere])
}

/// Returns the text of the old host's configuration, if there was one and its manifest can be read.
pub(super) fn config_of_old_host(arrival: &Look) -> Option<&str> {
    let manifest = arrival.as_ref().ok()?.as_ref()?.manifest.as_ref()?;
    Some(&manifest.config)
}

/// Chooses the configuration. After a live update, a configuration that cannot be used must not end the
/// VMs, so the old host's is used instead. Otherwise PID 1 starts without VMs, so that an operator can
/// ask what is wrong with `status`, and a daemon errors, which its service manager reports.
pub(super) fn choose_config(
    text: String,
    parsed: Result<Config, ConfigError>,
    arrival: &Look,
) -> Result<(Config, String, Option<Vec<String>>), HostError> {
    let error = match parsed {
        Ok(config) => return Ok((config, text, None)),
        Err(error) => error,
    };
    let why = chain(&error);
    match config_of_old_host(arrival) {
        Some(old) => {
            tracing::error!("{}; the configuration of the old host is used", why.join(": "));
            let text = old.to_owned();
            Ok(match Config::parse(&text) {
                Ok(config) => (config, text, Some(why)),
                // The manifest has all that the VMs need that run.
                Err(error) => {
                    let olds = format!(
                        "the configuration of the old host cannot be used either: {}",
                        chain(&error).join(": ")
                    );
                    tracing::error!("{olds}");
                    let (config, left_out) = part_of_config(&text);
                    let why = why.into_iter().chain([olds]).chain(left_out).collect();
                    (config, text, Some(why))
                }
            })
        }
        // A host that holds preserved VMs must not end either.
        None if !matches!(arrival, Ok(None)) => {
            tracing::error!("{}", why.join(": "));
            let (config, left_out) = part_of_config(&text);
            Ok((config, text, Some(why.into_iter().chain(left_out).collect())))
        }
        None if init::is_pid_1() => {
            tracing::error!("{}; this host starts without VMs", why.join(": "));
            Ok((bare_config(&text), text, Some(why)))
        }
        None => Err(error.into()),
    }
}

/// What is valid of a configuration, where VMs have come over, and why other parts of it are not.
fn part_of_config(text: &str) -> (Config, Vec<String>) {
    let (config, left_out) = Config::salvage(text);
    let say = |error: &ConfigError| {
        let said =
            format!("a section of that configuration is left out: {}", chain(error).join(": "));
        tracing::error!("{said}");
        said
    };
    let left_out = left_out.iter().map(say).collect();
    (Config { host: bare_config(text).host, ..config }, left_out)
}

/// The configuration of a host without VMs, whose API can be asked what is wrong. What can be read of `[host]` holds: the
/// last host has left its watchdog running, which this one must feed, and clients know where the API was.
fn bare_config(text: &str) -> Config {
    let salvaged = HostSection::salvage(text);
    let host = HostSection {
        socket: salvaged.socket.or_else(|| Some(DEFAULT_SOCKET.into())),
        control_port: salvaged.control_port.or_else(|| Some(DEFAULT_CONTROL_PORT.to_owned())),
        ..salvaged
    };
    Config { host, ..Config::default() }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::guests::memfd::document_memfd;
    use crate::live_update::arrival::NotSeen;
    use crate::live_update::index::Index;
    use crate::live_update::manifest::{self, INDEX_TOKEN, MANIFEST_TOKEN};
    use crate::state::document::write_document;

    /// What a host left that had this configuration.
    fn left_by_host_with(config: &str) -> Look {
        let mut manifest = manifest::tests::sample();
        manifest.config = config.to_owned();
        let bytes = write_document(&manifest).unwrap();
        let index = write_document(&Index::of(&manifest, &bytes)).unwrap();
        let keeper = Keeper::start();
        let session = luo::Orchestrator::create_session(&keeper, &host_session()).unwrap();
        for (token, bytes) in [(INDEX_TOKEN, &index), (MANIFEST_TOKEN, &bytes)] {
            session.preserve(document_memfd("a", bytes).unwrap().as_fd(), token).unwrap();
        }
        arrival::look(&Keeper::arrive(keeper.switch().unwrap()).unwrap())
    }

    #[test]
    fn a_host_for_which_vms_may_wait_starts_although_its_lock_cannot_be_made() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("proc")).unwrap();
        let section = HostSection { lock: Some("/a/lock".into()), ..HostSection::default() };
        for (line, may) in [
            ("quiet", false),
            ("quiet perennial.update=7", true),
            ("perennial.ticket=0123 quiet", true),
            ("quiet -- perennial.update=7", false),
        ] {
            fs::write(root.path().join("proc/cmdline"), line).unwrap();
            assert_eq!(may_go_without(&section, root.path()), may, "{line}");
        }
    }

    #[test]
    fn after_an_update_the_mistake_in_one_vms_section_costs_no_other_vm_its_own() {
        let vm = |name: &str, lines: &str| {
            format!("[[vm]]\nname = '{name}'\nmemory = 'size=64M'\nkernel = '/k'\n{lines}\n")
        };
        let bad = vm("bad", "").replace("64M", "4096T");
        let old = format!("[host]\nsocket = '/s'\n{}{bad}", vm("web-1", "restart = 'always'"));
        let choose = |new: &str, left: &Look| {
            choose_config(new.to_owned(), Config::parse(new), left).unwrap()
        };
        let names = |config: &Config| {
            config.machines.iter().map(|m| m.name.to_string()).collect::<Vec<_>>()
        };
        // The new configuration is no help, and this program refuses a section of the old one.
        let (config, text, why) = choose("[host", &left_by_host_with(&old));
        assert_eq!((names(&config), text), (vec!["web-1".to_owned()], old));
        assert_eq!(config.restart(&config.machines[0].name), crate::config::Restart::Always);
        assert_eq!(config.host.socket.as_deref(), Some("/s".as_ref()));
        let why = why.unwrap().join("\n");
        assert!(why.contains("is left out: VM `bad`") && why.contains("4096T"), "{why}");
        // What the last host left cannot be read, so there is only the new one.
        let io = luo::Error::RetrieveSession { session: host_session(), errno: luo::Errno::IO };
        let unseen = NotSeen { session: None, error: Box::new(io.into()) };
        let new = format!("{}{bad}", vm("db", ""));
        let (config, ..) = choose(&new, &Err(unseen));
        assert_eq!(names(&config), ["db"]);
    }

    #[test]
    fn a_host_whose_configuration_is_wrong_feeds_the_watchdog_and_is_reached_where_it_was() {
        let text = "[host]\nhostnaem = \"a\"\nsocket = \"/s\"\nwatchdog = \"/dev/watchdog\"\n\
                    watchdog-timeout-s = 7\nusers = 0\nconfine = \"required\"\n[[vm]]\nname = 7\n";
        Config::parse(text).expect_err("wrong");
        let host = bare_config(text).host;
        assert_eq!(host.socket.as_deref(), Some("/s".as_ref()));
        assert_eq!(host.watchdog.as_deref(), Some("/dev/watchdog".as_ref()));
        assert_eq!(host.watchdog_timeout_s(), 7);
        assert_eq!(host.confine, crate::config::Confine::Required);
        assert_eq!(host.control_port.as_deref(), Some(DEFAULT_CONTROL_PORT));
        let none = bare_config("not TOML").host;
        assert_eq!(none.socket.as_deref(), Some(DEFAULT_SOCKET.as_ref()));
        assert_eq!(none.watchdog, None);
    }
}
