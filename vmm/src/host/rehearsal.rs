//! The next host in a rehearsal: PID 1 in a VM of the host that wants to be updated. It does what a host does after
//! the jump, up to the restore of the VMs, tells what it found on the serial port, and switches the VM off. It mounts
//! nothing and runs no VM.
//!
//! The other half is `live_update::rehearsal`.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use luo::Orchestrator;
use luo::kernel::Device;

use super::{IMAGE_CONFIG, modules};
use crate::arch::x86_64::cpuid;
use crate::causes::chain;
use crate::config::{Config, HostSection};
use crate::guests::confinement::Confinement;
use crate::guests::process::VmProcess;
use crate::kvm::{self, Capabilities};
use crate::live_update::index::Index;
use crate::live_update::manifest::{Manifest, host_session};
use crate::live_update::preflight::{Check, Finding};
use crate::live_update::programs::own_version;
use crate::live_update::rehearsal::report::Line;
use crate::live_update::rehearsal::{
    CPU_FLAGS, DIRECTORY, INDEX, LUO, MANIFEST, PARAMETER, STATES, VM, cpu_flags,
};
use crate::state::{Schema, document};
use crate::vm::VmStateV1;

/// The serial port of the VM, and what is used without its driver.
const PORTS: [&str; 2] = ["/dev/ttyS0", "/dev/console"];
/// The kernel writes to the console only what is more urgent than this: nothing.
const QUIET: &str = "/proc/sys/kernel/printk";

/// Whether this host is rehearsed: the command line of its kernel says so, and there are documents for it.
pub fn is_one(root: &Path) -> bool {
    let line = fs::read_to_string(root.join("proc/cmdline")).unwrap_or_default();
    let is_asked = kexec::parameters(&line).any(|parameter| parameter.is(PARAMETER));
    is_asked && root.join(DIRECTORY).is_dir()
}

/// Does what an arrival would do, and tells what it found.
pub fn run() {
    // Its lines must not come between those of the report.
    let _ = fs::write(QUIET, "1");
    let opened = PORTS.iter().find_map(|path| OpenOptions::new().write(true).open(path).ok());
    let Some(mut port) = opened else {
        tracing::error!("the rehearsal cannot be reported: there is no serial port");
        return;
    };
    if let Err(error) = report(&mut port) {
        tracing::error!("the rehearsal cannot be reported: {error}");
    }
}

fn report(port: &mut File) -> io::Result<()> {
    let mut tell = |line: Line| port.write_all(line.text().as_bytes());
    let version = own_version();
    let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    // Before anything that may hang, so that the report says that the next host has begun.
    tell(Line::Begun { version, kernel })?;
    let Found(found) = Found::look(Path::new("/"));
    let findings = found.len();
    found.into_iter().try_for_each(|finding| tell(Line::finding(finding)))?;
    tell(Line::Ended { findings })?;
    Ok(rustix::termios::tcdrain(&*port)?)
}

/// What was found.
#[derive(Debug, Default)]
struct Found(Vec<Finding>);

impl Found {
    /// Looks at everything, with the documents below `root`. The log comes over the serial port, too: its last line
    /// says what hangs if the report does not come.
    fn look(root: &Path) -> Self {
        let mut found = Self::default();
        let documents = root.join(DIRECTORY);
        let section = found.configuration(Path::new(IMAGE_CONFIG));
        found.modules(&section.modules);
        tracing::info!("rehearsal: the LUO");
        let backend = fs::read_to_string(documents.join(LUO)).unwrap_or_default();
        found.luo(&backend, &section, &Device::default());
        tracing::info!("rehearsal: the documents");
        found.manifest(&documents);
        let states = found.states(&documents);
        tracing::info!("rehearsal: KVM");
        found.cpu(&documents, &states);
        tracing::info!("rehearsal: the confinement of a VM's process");
        found.confinement(&section);
        found
    }

    fn modules(&mut self, names: &[String]) {
        for name in names {
            tracing::info!("rehearsal: the module {name}");
            for error in modules::load_all(std::slice::from_ref(name)) {
                let remedy = "build the initramfs with modules of this kernel, or change `modules`";
                self.add(Check::RehearsalModules, "", chain(&error).join(": "), remedy);
            }
        }
    }

    fn add(&mut self, check: Check, subject: &str, sentence: impl Display, remedy: &str) {
        self.0.push(Finding::new(check, subject, sentence, remedy));
    }

    /// Reads the configuration as a start does.
    fn configuration(&mut self, path: &Path) -> HostSection {
        let (text, parsed) = Config::read_with_text(path);
        match parsed {
            Ok(config) => config.host,
            Err(error) => {
                let sentence = format!(
                    "the next host would use the configuration of this host: {}",
                    chain(&error).join(": ")
                );
                self.add(Check::RehearsalConfig, "", sentence, "mend it in the initramfs");
                HostSection::salvage(&text)
            }
        }
    }

    /// Looks for what `backend` needs: the kernel's LUO, which makes a session, or a pool in the configuration. The
    /// pool itself is memory of the machine, which the VM does not have.
    fn luo(&mut self, backend: &str, section: &HostSection, device: &Device) {
        if backend == luo::Backend::Pool.to_string() {
            if section.pool.is_none() {
                let sentence =
                    "the VMs are in a pool, and `[host]` of the next host names no `pool`";
                self.add(Check::RehearsalLuo, "", sentence, "add it to the initramfs");
            }
            return;
        }
        let why = match device.is_present() {
            false => Some("there is no /dev/liveupdate".to_owned()),
            true => device.create_session(&host_session()).err().map(|e| chain(&e).join(": ")),
        };
        if let Some(why) = why {
            let sentence = format!("the next kernel has no LUO that the next host can use: {why}");
            let remedy = "build it with CONFIG_KEXEC_HANDOVER, CONFIG_LIVEUPDATE and \
                          CONFIG_LIVEUPDATE_MEMFD, or update to another kernel";
            self.add(Check::RehearsalLuo, "", sentence, remedy);
        }
    }

    /// Reads the manifest and the index.
    fn manifest(&mut self, documents: &Path) {
        let Some((manifest, bytes)) =
            self.read::<Manifest>("the manifest", &documents.join(MANIFEST))
        else {
            return;
        };
        let Some((index, _)) = self.read::<Index>("the index", &documents.join(INDEX)) else {
            return;
        };
        if let Err(error) = index.check(&manifest, &bytes) {
            self.unreadable("the index", &error.to_string());
        }
    }

    /// Reads the state documents. Returns those that can be read, with the names of their VMs.
    fn states(&mut self, documents: &Path) -> Vec<(String, VmStateV1)> {
        let mut paths: Vec<PathBuf> = match fs::read_dir(documents.join(STATES)) {
            Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
            Err(error) => {
                self.unreadable("the state documents", &error.to_string());
                Vec::new()
            }
        };
        paths.sort();
        let read = |path: PathBuf| {
            let name = path.file_name().map(|name| String::from_utf8_lossy(name.as_bytes()));
            let name = name.unwrap_or_default().trim_start_matches(VM).to_owned();
            let (state, _) =
                self.read::<VmStateV1>(&format!("the state document of VM `{name}`"), &path)?;
            Some((name, state))
        };
        paths.into_iter().filter_map(read).collect()
    }

    fn read<S: Schema>(&mut self, what: &str, path: &Path) -> Option<(S, Vec<u8>)> {
        let read = || {
            let bytes = fs::read(path).map_err(|error| error.to_string())?;
            let document = document::read_document(&bytes).map_err(|e| chain(&e).join(": "))?;
            Ok::<_, String>((document, bytes))
        };
        read().map_err(|why| self.unreadable(what, &why)).ok()
    }

    fn unreadable(&mut self, what: &str, why: &str) {
        let sentence = format!("the next host cannot read {what}: {why}");
        let remedy = "build the initramfs with a `perennial` that is not older than this one";
        self.add(Check::RehearsalDocuments, what, sentence, remedy);
    }

    /// Compares what the guests' CPUs have with what KVM offers here, or the kernel, if it has no KVM here.
    fn cpu(&mut self, documents: &Path, states: &[(String, VmStateV1)]) {
        match kvm::offered() {
            Ok(host) => states.iter().for_each(|(name, state)| self.guest_cpu(name, state, &host)),
            Err(error) => {
                let why = chain(&error).join(": ");
                let sentence = format!(
                    "what the next kernel's KVM offers guests is not known: {why}; only the features were \
                     looked at that the kernel itself uses"
                );
                self.add(Check::RehearsalCpuUnknown, "", sentence, "");
                let before = fs::read_to_string(documents.join(CPU_FLAGS)).unwrap_or_default();
                let now = cpu_flags();
                let cpu = cpuid::names(&cpuid::of_this_processor());
                for (name, state) in states {
                    let guest = state.vcpus.first().map(|vcpu| cpuid::names(&vcpu.cpuid));
                    let lost = lost(&guest.unwrap_or_default(), &cpu, &before, &now);
                    self.lacks(name, &lost);
                }
            }
        }
    }

    /// Starts the process of a VM and lets it confine itself.
    fn confinement(&mut self, section: &HostSection) {
        let confined = || {
            let process = VmProcess::spawn(&Confinement::new(section))?;
            process.confined(process.reply()?)
        };
        if let Err(error) = confined() {
            let said = chain(&error).join(": ");
            let sentence = format!("the next host could not run the process of a VM: {said}");
            let remedy = "update to a kernel with what is missing, or change `confine` in the next configuration";
            self.add(Check::RehearsalConfinement, "", sentence, remedy);
        }
    }

    fn guest_cpu(&mut self, name: &str, state: &VmStateV1, host: &Capabilities) {
        // All vCPUs of a machine have the same features.
        let Some(vcpu) = state.vcpus.first() else { return };
        let subject = format!("VM `{name}`");
        match vcpu.missing_hints(host) {
            Ok(hints) if hints.is_empty() => {}
            Ok(hints) => {
                let names: Vec<_> = hints.into_iter().flat_map(|hint| hint.names).collect();
                let sentence =
                    format!("the next kernel lacks hints of its CPUID: {}", names.join(", "));
                let remedy = "see docs/cpu.md: the guest runs on without them";
                self.add(Check::RehearsalCpuHints, &subject, sentence, remedy);
            }
            Err(error) => {
                let sentence =
                    format!("its guest could not be restored: {}", chain(&error).join(": "));
                self.add(Check::RehearsalCpu, &subject, sentence, CPU_REMEDY);
            }
        }
    }

    fn lacks(&mut self, name: &str, lost: &[&str]) {
        if !lost.is_empty() {
            let sentence = format!(
                "the next kernel has switched off CPU features that its guest has: {}",
                lost.join(", ")
            );
            self.add(Check::RehearsalCpu, &format!("VM `{name}`"), sentence, CPU_REMEDY);
        }
    }
}

const CPU_REMEDY: &str =
    "update to a kernel and a command line that leave these features on, or leave the VM out";

/// The features of a guest that this processor has and the kernel before showed, and that this kernel does not show.
fn lost<'a>(
    guest: &BTreeSet<&'a str>,
    processor: &BTreeSet<&str>,
    before: &str,
    now: &str,
) -> Vec<&'a str> {
    let set = |flags| str::split_whitespace(flags).collect::<BTreeSet<&str>>();
    let (before, now) = (set(before), set(now));
    let is_lost = |name: &&&str| {
        processor.contains(**name) && before.contains(**name) && !now.contains(**name)
    };
    guest.iter().filter(is_lost).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live_update::manifest::tests::sample as manifest;
    use crate::live_update::rehearsal::flags;

    fn names(found: &Found) -> Vec<Check> {
        found.0.iter().map(|finding| finding.name).collect()
    }

    #[test]
    fn only_a_kernel_with_the_parameter_and_the_documents_is_a_rehearsal() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("proc")).unwrap();
        let line = root.path().join("proc/cmdline");
        fs::write(&line, "quiet perennial.rehearsal=1\n").unwrap();
        assert!(!is_one(root.path()), "an operator may have copied the command line");
        fs::create_dir(root.path().join(DIRECTORY)).unwrap();
        assert!(is_one(root.path()));
        fs::write(&line, "quiet -- perennial.rehearsal=1\n").unwrap();
        assert!(!is_one(root.path()));
    }

    #[test]
    fn the_luo_that_the_vms_need_must_be_there() {
        let with = |backend: &str, pool: Option<&str>, device: &str| {
            let section = HostSection { pool: pool.map(Into::into), ..HostSection::default() };
            let mut found = Found::default();
            found.luo(backend, &section, &Device::new(device));
            names(&found)
        };
        assert_eq!(with("kernel", None, "/nowhere"), [Check::RehearsalLuo]);
        // It is there, and is no LUO.
        assert_eq!(with("systemd", None, "/dev/null"), [Check::RehearsalLuo]);
        assert_eq!(with("pool", None, "/nowhere"), [Check::RehearsalLuo]);
        assert_eq!(with("pool", Some("/pool"), "/nowhere"), []);
    }

    #[test]
    fn each_document_that_cannot_be_read_is_named() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        fs::create_dir(path(STATES)).unwrap();
        let bytes = document::write_document(&manifest()).unwrap();
        let index = document::write_document(&Index::of(&manifest(), &bytes)).unwrap();
        let state = document::write_document(&VmStateV1::sample()).unwrap();
        for (name, bytes) in [
            (MANIFEST, &bytes),
            (INDEX, &index),
            ("states/vm-..", &state),
            ("states/vm-web", &state),
        ] {
            fs::write(path(name), bytes).unwrap();
        }
        let look = || {
            let mut found = Found::default();
            found.manifest(root.path());
            let states = found.states(root.path());
            (states.into_iter().map(|(name, _)| name).collect::<Vec<_>>(), found)
        };
        let (states, found) = look();
        assert_eq!((states, names(&found)), (vec!["..".to_owned(), "web".to_owned()], vec![]));
        fs::write(path(INDEX), &bytes).unwrap();
        fs::write(path("states/vm-web"), &state[..state.len() - 1]).unwrap();
        let (states, found) = look();
        assert_eq!(states, [".."]);
        assert_eq!(names(&found), [Check::RehearsalDocuments; 2]);
        assert!(found.0[1].sentence.contains("state document of VM `web`"), "{found:?}");
        // Another index than that of the manifest.
        let other = Manifest { number: 77, ..manifest() };
        fs::write(path(MANIFEST), document::write_document(&other).unwrap()).unwrap();
        fs::write(path(INDEX), &index).unwrap();
        assert!(look().1.0[0].sentence.contains("cannot read the index"));
    }

    #[test]
    fn a_configuration_that_cannot_be_read_is_a_warning_and_its_modules_are_loaded_all_the_same() {
        let mut found = Found::default();
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "[host]\nmodules = [\"kvm\"]\nhostnaem = 1\n").unwrap();
        assert_eq!(found.configuration(file.path()).modules, ["kvm"]);
        found.configuration(Path::new("/nowhere"));
        assert_eq!(names(&found), [Check::RehearsalConfig; 2]);
    }

    #[test]
    fn a_feature_is_lost_if_only_the_kernel_has_taken_it_away() {
        let guest = BTreeSet::from(["avx2", "erms", "x2apic", "sse"]);
        let processor = BTreeSet::from(["avx2", "sse", "erms"]);
        let before = "sse avx2 x2apic";
        assert_eq!(lost(&guest, &processor, before, "sse"), ["avx2"]);
        assert!(lost(&guest, &processor, before, "avx2 sse").is_empty());
        assert_eq!(flags("vendor: x\nflags\t\t: sse avx2\n"), " sse avx2");
        assert_eq!(flags(""), "");
    }
}
