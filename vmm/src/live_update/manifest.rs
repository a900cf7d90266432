//! The manifest: the host's own document, with the description, RAM segments and ledger of every VM.
//!
//! It is preserved in the host's session, because LUO can list neither sessions nor tokens. Only hosts
//! write and read it. A VM's process writes only the VM's state document, and the host opens no path
//! from there.

use luo::{SessionName, Token};

use crate::guests::entry::VmEntry;
use crate::guests::ledger::Ledger;
use crate::machine::{Machine, VmName};
use crate::state::{Node, Reader, Schema, StateError};

/// Most VMs of one host. A bound for the decoder, far above any tested number.
const MAX_VMS: usize = 4096;

/// Token of the state document in a VM's session.
pub const STATE_TOKEN: Token = Token(0);
/// Token of the manifest in the host's session.
pub const MANIFEST_TOKEN: Token = Token(0);

/// Token of the index in the host's session.
pub const INDEX_TOKEN: Token = Token(1);

/// Token in the host's session of the first document that the host only carries on. The others follow.
pub const FIRST_CARRIED_TOKEN: Token = Token(2);
/// What a host writes over its index and its manifest if it did not leave after all, and they may still reach a later host.
pub const UNDONE: &[u8] = b"perennial: the guests ran on";

/// What `perennial state check` adds to what it says of a manifest. A program that neither says it nor tells its link
/// protocol refuses all VMs if the index has a session that is no VM's, such as that of an earlier program.
pub const CARRIES_ON: &str = "this program carries on what it does not know";

/// What `perennial state check` adds, with the reason behind it, if it cannot use the configuration in a manifest.
pub const REFUSES_CONFIG: &str = "this program cannot use the configuration in it";

/// Returns why a program cannot use the configuration in the manifest `name`, from what it `said` of documents. `None` if it
/// can, or does not say.
pub fn refused_config<'a>(said: &'a str, name: &str) -> Option<&'a str> {
    let about = |line: &'a str| line.strip_prefix(name)?.strip_prefix(": ");
    let (_, why) = said.lines().find_map(about)?.split_once(REFUSES_CONFIG)?;
    Some(why.trim_start_matches(": "))
}

/// What `perennial state check` adds as well. A program that says it takes the signals that were blocked when it was
/// executed. One that does not would never get them.
pub const TAKES_SIGNALS: &str = "this program takes signals that came before it";

/// Token of RAM segment `index` in a VM's session.
pub fn segment_token(index: usize) -> Token {
    Token(1 + index as u64)
}

/// The name of the host's session.
pub fn host_session() -> SessionName {
    "perennial-host".parse().expect("a constant that fits")
}

/// The name of a VM's session.
pub fn vm_session(vm: &VmName) -> SessionName {
    format!("perennial-vm-{vm}").parse().expect("VmName keeps it short and plain")
}

/// Returns the VM whose session this is. `None` if it is no VM's.
pub fn vm_of_session(session: &SessionName) -> Option<VmName> {
    VmName::new(session.as_str().strip_prefix("perennial-vm-")?).ok()
}

/// The whole manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Release and version of the kernel that wrote it.
    pub kernel: String,
    /// Number of this live update, counted from the last cold boot; the first is 1.
    pub number: u32,
    /// Text of the old host's configuration, for a new host whose own configuration cannot be used.
    pub config: String,
    /// The ledgers' counter when the live update began.
    pub ticks: u64,
    /// `CLOCK_REALTIME` in nanoseconds at the moment of `ticks`.
    pub realtime_ns: u64,
    /// The phases of the host.
    pub ledger: Ledger,
    /// The VMs, the most urgent one first; those that are only carried on are behind the others.
    pub vms: Vec<VmEntry>,
    /// VMs without a state, which the next host boots: they were about to boot when the live update began.
    pub boots: Vec<Machine>,
}

/// `perennial,host-v2`, with VMs to boot, and v1, without: see `docs/state-document.md`.
impl Schema for Manifest {
    const COMPATIBLE: &'static [&'static str] = &["perennial,host-v2", "perennial,host-v1"];

    fn bindings(&self) -> &'static [&'static str] {
        match self.boots.is_empty() {
            true => &Self::COMPATIBLE[1..],
            false => &Self::COMPATIBLE[..1],
        }
    }

    fn encode(&self, node: &mut Node) {
        let Self { kernel, number, config, ticks, realtime_ns, ledger, vms, boots } = self;
        node.put_str("kernel", kernel);
        node.put_u32("number", *number);
        node.put_str("config", config);
        node.put_u64("ticks", *ticks);
        node.put_u64("realtime-ns", *realtime_ns);
        node.push(ledger.to_node("ledger"));
        for (index, vm) in vms.iter().enumerate() {
            node.push(vm.to_node(&format!("vm@{index:x}")));
        }
        for (index, machine) in boots.iter().enumerate() {
            node.push(machine.to_node(&format!("boot@{index:x}")));
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let manifest = Self {
            kernel: reader.str("kernel")?,
            number: reader.u32("number")?,
            config: reader.str("config")?,
            ticks: reader.u64("ticks")?,
            realtime_ns: reader.u64("realtime-ns")?,
            ledger: reader.child("ledger")?,
            vms: reader.sequence::<VmEntry>("vm")?,
            boots: match reader.is_compatible(Self::COMPATIBLE[0]) {
                true => reader.sequence::<Machine>("boot")?,
                false => Vec::new(),
            },
        };
        if manifest.vms.len() + manifest.boots.len() > MAX_VMS {
            let problem = format!("{} VMs, at most {MAX_VMS}", manifest.vms.len());
            return Err(reader.invalid("number", problem));
        }
        let mut names: Vec<&VmName> = manifest.vms.iter().map(|vm| &vm.machine.name).collect();
        names.extend(manifest.boots.iter().map(|machine| &machine.name));
        names.sort();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(reader.invalid("number", format!("two VMs are called {}", pair[0]))),
            None => Ok(manifest),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::guests::entry::tests::{rename, sample as entry};
    use crate::state::contract::{contract_tests, refusal};
    use crate::state::node::read_node;

    pub(crate) fn sample() -> Manifest {
        Manifest {
            kernel: "7.3.4-a #1".to_owned(),
            number: 3,
            config: "[host]\n".to_owned(),
            ticks: 123,
            realtime_ns: 456,
            ledger: Ledger::sample(),
            vms: vec![entry()],
            boots: Vec::new(),
        }
    }

    fn machine(name: &str) -> Machine {
        Machine { name: VmName::new(name).unwrap(), ..crate::machine::tests::sample() }
    }

    contract_tests! {
        Manifest,
        sample: sample,
        changes: [
            |m| m.kernel.push('x'),
            |m| m.number += 1,
            |m| m.config.clear(),
            |m| m.ticks += 1,
            |m| m.realtime_ns += 1,
            |m| m.ledger.phases.clear(),
            |m| rename(&mut m.vms[0]),
            |m| { m.vms.push(entry()); rename(&mut m.vms[1]) },
            |m| m.vms.clear(),
            |m| m.boots.push(machine("resets")),
        ],
        optional: ["/vm@0:segment-frames", "/vm@0/machine/boot:initramfs"],
        golden: "host-v1",
    }

    mod with_vms_to_boot {
        use super::*;

        contract_tests! {
            Manifest,
            sample: || Manifest { boots: vec![machine("resets")], ..super::sample() },
            changes: [
                |m| m.boots.clear(),
                |m| m.boots.push(machine("again")),
                |m| m.boots[0].cpus = 1,
            ],
            optional: [
                "/vm@0:segment-frames", "/vm@0/machine/boot:initramfs", "/boot@0/boot:initramfs",
            ],
            golden: "host-v2",
        }
    }

    fn refused(change: fn(&mut Manifest)) -> String {
        refusal(sample(), change)
    }

    #[test]
    fn a_manifest_survives_its_node() {
        let mut manifest = sample();
        assert_eq!(read_node(&manifest.to_node(""), ""), Ok(manifest.clone()));
        manifest.vms[0].segments[0].frames = None;
        manifest.config = String::new();
        assert_eq!(read_node(&manifest.to_node(""), ""), Ok(manifest));
    }

    #[test]
    fn a_manifest_that_contradicts_itself_is_refused() {
        assert!(refused(|m| m.vms.push(m.vms[0].clone())).contains("two VMs are called web-1"));
        assert!(refused(|m| m.boots.push(machine("web-1"))).contains("two VMs are called web-1"));
        assert!(refused(|m| m.vms[0].segments[0].bytes += 1).contains("segment-bytes"));
        assert!(refused(|m| m.vms[0].segments.clear()).contains("1 to 64 segments"));
        assert!(refused(|m| m.vms[0].segments[0].preserved = false).contains("segment-frames"));
        assert!(refused(|m| m.vms[0].segments[0].bytes = u64::MAX).contains("segment-bytes"));
    }

    #[test]
    fn every_vm_name_fits_a_session() {
        let longest = VmName::new(&"x".repeat(VmName::MAX)).unwrap();
        assert!(vm_session(&longest).as_str().len() <= 63);
        assert_eq!(host_session().as_str(), "perennial-host");
        assert_eq!(vm_of_session(&vm_session(&longest)), Some(longest));
        assert_eq!(vm_of_session(&host_session()), None);
    }
}
