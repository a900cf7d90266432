//! One finding of the preflight, and the table of all checks with their names.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::causes::chain;

/// What a finding means for the update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// The update would fail or lose VMs: it does not begin.
    Refusal,
    /// The update can work, and something will be worse after it.
    Warning,
    /// Nothing is wrong: a fact, or something that could not be found out.
    Note,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Refusal => "refusal",
            Self::Warning => "warning",
            Self::Note => "note",
        })
    }
}

/// Makes the enum of all checks, in the order in which findings are shown.
macro_rules! checks {
    ($($(#[$doc:meta])+ $check:ident = $name:literal, $severity:ident $(, $forced:ident)?;)+) => {
        /// The checks of the preflight, in the order of their findings.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum Check {
            $($(#[$doc])+ $check,)+
        }

        impl Check {
            /// All checks.
            pub const ALL: &'static [Self] = &[$(Self::$check),+];

            /// The name, as operators write it.
            pub fn name(self) -> &'static str {
                match self { $(Self::$check => $name,)+ }
            }

            /// The severity of its findings.
            pub fn severity(self) -> Severity {
                match self { $(Self::$check => Severity::$severity,)+ }
            }

            /// Whether an operator can override a refusal by it.
            pub fn can_be_forced(self) -> bool {
                match self { $(Self::$check => checks!(@ $($forced)?),)+ }
            }
        }
    };
    (@ forceable) => { true };
    (@) => { false };
}

checks! {
    /// Facts about the running kernel cannot be read.
    RunningKernel = "running-kernel", Refusal;
    /// The running kernel has no KHO.
    RunningKho = "running-kho", Refusal;
    /// The running kernel has no LUO.
    RunningLuo = "running-luo", Refusal;
    /// The next kernel's file cannot be loaded.
    KernelFile = "kernel-file", Refusal;
    /// The next kernel's release.
    KernelRelease = "kernel-release", Note;
    /// The next kernel's file is damaged.
    KernelDamaged = "kernel-damaged", Refusal;
    /// The next kernel is compressed in an unknown way.
    KernelUnknown = "kernel-unknown", Note;
    /// The next kernel has no LUO or KHO.
    KernelLuo = "kernel-luo", Refusal;
    /// The next kernel reads other handover formats.
    KernelFormats = "kernel-formats", Refusal;
    /// The formats that the running kernel writes are not known.
    KernelFormatsUnknown = "kernel-formats-unknown", Note;
    /// The next host would lack a driver that it needs.
    Driver = "driver", Refusal, forceable;
    /// It is not known whether the next host has a driver that it needs.
    DriverUnknown = "driver-unknown", Note;
    /// The next command line cannot be used.
    CommandLine = "command-line", Refusal;
    /// The next command line switches off what carries the VMs.
    CommandLineSwitch = "command-line-switch", Refusal;
    /// The next command line reserves other memory for the pool.
    CommandLineMemmap = "command-line-memmap", Refusal;
    /// The next command line is longer than the next kernel accepts.
    CommandLineLength = "command-line-length", Refusal;
    /// What the host adds to the next command line.
    CommandLineAdded = "command-line-added", Note;
    /// The next initramfs cannot be loaded.
    InitramfsFile = "initramfs-file", Refusal;
    /// The next initramfs is damaged.
    InitramfsDamaged = "initramfs-damaged", Refusal;
    /// The next initramfs has nothing to execute as the first process.
    InitramfsInit = "initramfs-init", Refusal;
    /// The first program of the next initramfs cannot run there.
    InitramfsProgram = "initramfs-program", Refusal;
    /// The first program of the next initramfs could not be tried.
    InitramfsUntried = "initramfs-untried", Note;
    /// The next host could not read the manifest of this host, or the state document of a VM.
    InitramfsDocuments = "initramfs-documents", Refusal, forceable;
    /// The next host would lose the VMs, because it is older than what this host leaves beside them.
    InitramfsOlder = "initramfs-older", Refusal;
    /// The next host could not read the state document of a VM that is preserved here.
    InitramfsPreserved = "initramfs-preserved", Warning;
    /// A document was not shown to the next host.
    InitramfsDocumentUnknown = "initramfs-document-unknown", Note;
    /// The next initramfs has no configuration, or one that this program or the next one cannot read.
    InitramfsConfig = "initramfs-config", Warning;
    /// The next host can use neither the configuration in its initramfs nor that of this host.
    InitramfsConfigUnusable = "initramfs-config-unusable", Refusal, forceable;
    /// The next initramfs lacks modules that its configuration lists.
    InitramfsModules = "initramfs-modules", Refusal, forceable;
    /// The next kernel and initramfs do not fit into the scratch areas.
    Scratch = "scratch", Refusal;
    /// The host has too little memory for the update.
    Memory = "memory", Refusal;
    /// The host may not open as many files as the update needs.
    OpenFiles = "open-files", Refusal;
    /// The fd store of the service takes fewer files than the update preserves.
    FdStore = "fd-store", Refusal;
    /// The pool has too little room for the documents of the update.
    PoolRoom = "pool-room", Refusal, forceable;
    /// The next host would not find the pool that has the VMs.
    PoolHidden = "pool-hidden", Refusal, forceable;
    /// The next host would lack a bridge that a VM's tap is a port of.
    BridgeHidden = "bridge-hidden", Refusal, forceable;
    /// The RAM of a VM has another size than it was made with.
    RamResized = "ram-resized", Refusal;
    /// The next command line switches off CPU features of a guest.
    Cpu = "cpu", Refusal, forceable;
    /// The next command line switches off hints of a guest's CPUID.
    CpuHints = "cpu-hints", Warning;
    /// What the next kernel offers guests is not known.
    CpuUnknown = "cpu-unknown", Note;
    /// A VM's disk does not answer.
    DiskStalled = "disk-stalled", Refusal;
    /// A VM's disk is not at its path.
    DiskMissing = "disk-missing", Refusal, forceable;
    /// A VM's disk is another one now.
    DiskOther = "disk-other", Refusal, forceable;
    /// A VM's disk is smaller than the guest knows it.
    DiskSize = "disk-size", Refusal, forceable;
    /// A VM's disk is larger than the guest knows it.
    DiskGrown = "disk-grown", Note;
    /// A VM's disk has no serial number, nor anything else by which the next host could know it.
    DiskUnidentified = "disk-unidentified", Warning;
    /// The next host would not find a VM's disk at its path.
    DiskHidden = "disk-hidden", Refusal, forceable;
    /// The next host could not restore a VM that is preserved here, for lack of a disk.
    DiskPreserved = "disk-preserved", Warning;
    /// Another host of this machine has VMs.
    OtherHost = "other-host", Refusal, forceable;
    /// Written data that is not on disks yet.
    UnwrittenData = "unwritten-data", Note;
    /// What was rehearsed.
    Rehearsed = "rehearsed", Note;
    /// The update cannot be rehearsed here now.
    RehearsalUntried = "rehearsal-untried", Refusal, forceable;
    /// The next kernel or the next host did not start in the rehearsal.
    RehearsalBoot = "rehearsal-boot", Refusal, forceable;
    /// The next host could not load a module in the rehearsal.
    RehearsalModules = "rehearsal-modules", Refusal, forceable;
    /// The next host had no LUO in the rehearsal.
    RehearsalLuo = "rehearsal-luo", Refusal, forceable;
    /// The next host could not use its configuration in the rehearsal.
    RehearsalConfig = "rehearsal-config", Warning;
    /// The next host could not read a document in the rehearsal.
    RehearsalDocuments = "rehearsal-documents", Refusal, forceable;
    /// There was no state document of a VM to rehearse with.
    RehearsalDocumentUnknown = "rehearsal-document-unknown", Note;
    /// The next kernel lacks CPU features of a guest.
    RehearsalCpu = "rehearsal-cpu", Refusal, forceable;
    /// The next kernel lacks hints of a guest's CPUID.
    RehearsalCpuHints = "rehearsal-cpu-hints", Warning;
    /// What the next kernel's KVM offers guests is not known.
    RehearsalCpuUnknown = "rehearsal-cpu-unknown", Note;
    /// The next host could not confine the VMs' processes as its configuration wants, in the rehearsal.
    RehearsalConfinement = "rehearsal-confinement", Refusal, forceable;
    /// A finding of the next host that this one does not know.
    RehearsalOther = "rehearsal-other", Refusal, forceable;
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that no check has, or one that cannot be overridden.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` is no finding that can be overridden; those are: {known}")]
pub struct UnknownCheck {
    name: String,
    known: String,
}

impl Check {
    /// Returns the check that `name` overrides.
    pub fn to_force(name: &str) -> Result<Self, UnknownCheck> {
        let mut forceable = Self::ALL.iter().copied().filter(|check| check.can_be_forced());
        forceable.clone().find(|check| check.name() == name).ok_or_else(|| {
            let first = forceable.next().map_or("", Self::name).to_owned();
            let known = forceable.fold(first, |all, check| all + ", " + check.name());
            UnknownCheck { name: name.to_owned(), known }
        })
    }
}

/// Something that the preflight found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What it means for the update.
    pub severity: Severity,
    /// Which check found it.
    pub name: Check,
    /// What it is about: a file, a VM, a parameter.
    pub subject: String,
    /// What was found, both sides of a mismatch included.
    pub sentence: String,
    /// What to do. Empty if nothing needs to be done.
    pub remedy: String,
    /// Whether `--force NAME` goes on in spite of it.
    pub can_be_forced: bool,
}

impl Finding {
    /// A finding of `check` about `subject`.
    pub fn new(
        check: Check,
        subject: impl fmt::Display,
        sentence: impl fmt::Display,
        remedy: impl fmt::Display,
    ) -> Self {
        Self {
            severity: check.severity(),
            name: check,
            subject: subject.to_string(),
            sentence: sentence.to_string(),
            remedy: remedy.to_string(),
            can_be_forced: check.can_be_forced(),
        }
    }

    /// A finding whose sentence and remedy are those of an error.
    pub fn of_error(check: Check, error: &dyn std::error::Error) -> Self {
        let said = chain(error).join(": ");
        let (sentence, remedy) = match said.rsplit_once("; ") {
            Some((sentence, remedy)) => (sentence.to_owned(), remedy.to_owned()),
            None => (said, String::new()),
        };
        Self::new(check, "", sentence, remedy)
    }

    /// The same finding about `subject`.
    pub fn about(self, subject: impl fmt::Display) -> Self {
        Self { subject: subject.to_string(), ..self }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { severity, name, subject, sentence, remedy, can_be_forced } = self;
        write!(f, "{severity} `{name}`: ")?;
        if !subject.is_empty() && !sentence.contains(subject.as_str()) {
            write!(f, "{subject}: ")?;
        }
        f.write_str(sentence)?;
        if !remedy.is_empty() {
            write!(f, "; {remedy}")?;
        }
        match can_be_forced {
            true => write!(f, " (or go on with `--force {name}`)"),
            false => Ok(()),
        }
    }
}

/// Puts findings into the order of the checks.
pub fn sort(findings: &mut [Finding]) {
    findings.sort_by(|a, b| (a.name, &a.subject).cmp(&(b.name, &b.subject)));
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_check_has_a_name_of_its_own_which_json_writes_too() {
        let names: BTreeSet<&str> = Check::ALL.iter().map(|check| check.name()).collect();
        assert_eq!(names.len(), Check::ALL.len());
        assert!(Check::ALL.is_sorted());
        for check in Check::ALL {
            let json = serde_json::to_string(check).unwrap();
            assert_eq!(json, format!("\"{}\"", check.name()));
            assert!(!check.can_be_forced() || check.severity() == Severity::Refusal, "{check}");
        }
    }

    #[test]
    fn the_documentation_lists_every_check_with_its_severity_in_order() {
        let page = include_str!("../../../../docs/preflight.md");
        let rows = page.lines().filter_map(|line| line.strip_prefix("| `"));
        let rows: Vec<(&str, &str, bool)> = rows
            .map(|row| {
                let mut cells = row.split('|').map(str::trim);
                let name = cells.next().unwrap().trim_end_matches('`');
                let severity = cells.next().unwrap();
                let (severity, forced) = match severity.split_once(", ") {
                    Some((severity, forced)) => (severity, forced == "`--force`"),
                    None => (severity, false),
                };
                (name, severity, forced)
            })
            .collect();
        let severities: Vec<String> = Check::ALL.iter().map(|c| c.severity().to_string()).collect();
        let expected = Check::ALL.iter().zip(&severities);
        let expected: Vec<(&str, &str, bool)> =
            expected.map(|(c, s)| (c.name(), s.as_str(), c.can_be_forced())).collect();
        assert_eq!(rows, expected);
    }

    #[test]
    fn a_finding_says_all_that_it_knows_in_one_line() {
        let finding = Finding::new(Check::Driver, "ext4", "the next host has none", "add it");
        assert_eq!(
            finding.to_string(),
            "refusal `driver`: ext4: the next host has none; add it (or go on with `--force driver`)"
        );
        let finding = Finding::new(Check::KernelRelease, "/k", "/k is Linux 7.3", "");
        assert_eq!(finding.to_string(), "note `kernel-release`: /k is Linux 7.3");
    }

    #[test]
    fn only_what_can_be_overridden_is() {
        assert_eq!(Check::to_force("driver"), Ok(Check::Driver));
        for wrong in ["kernel-file", "", "Driver"] {
            let error = Check::to_force(wrong).unwrap_err().to_string();
            assert!(error.contains("driver, initramfs-documents"), "{error}");
        }
    }

    #[test]
    fn findings_come_in_the_order_of_the_checks() {
        let finding = |check, subject: &str| Finding::new(check, subject, "", "");
        let mut findings = vec![
            finding(Check::Scratch, ""),
            finding(Check::Driver, "xfs"),
            finding(Check::KernelFile, ""),
            finding(Check::Driver, "ext4"),
        ];
        sort(&mut findings);
        let order: Vec<_> = findings.iter().map(|f| (f.name, f.subject.as_str())).collect();
        assert_eq!(
            order,
            [
                (Check::KernelFile, ""),
                (Check::Driver, "ext4"),
                (Check::Driver, "xfs"),
                (Check::Scratch, "")
            ]
        );
    }
}
