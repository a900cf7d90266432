//! Preserved VMs that travel from program to program. A made-up predecessor leaves them, so no test needs KVM: each
//! handover is a real one.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use luo::builtin::keeper::Keeper;
use luo::{Orchestrator, Outgoing, SessionName, Token};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, Signal, kill_process};
use vmm::config::Config;
use vmm::guests::entry::{SegmentEntry, VmEntry};
use vmm::guests::ledger::Ledger;
use vmm::guests::memfd::document_memfd;
use vmm::live_update::index::{FileKind, Index, IndexedFile, IndexedSession};
use vmm::live_update::manifest::{
    INDEX_TOKEN, MANIFEST_TOKEN, Manifest, STATE_TOKEN, host_session, segment_token, vm_session,
};
use vmm::live_update::next_host::STARTS_WITH;
use vmm::state::document::write_document;

use crate::errands::Client;
use crate::host::{Host, PERENNIAL};

/// A state document that no restore accepts.
const STATE: &[u8] = b"a state of some other time";
/// What is written in the RAM of each VM.
const WRITTEN: &[u8] = b"a guest wrote this";
/// Where it is written.
const AT: u64 = 5 << 20;

/// Changes an index and a manifest before the next host gets them.
pub(crate) type Damage = fn(&mut Vec<u8>, &mut Vec<u8>);

/// A host that was here before, with the files of its VMs.
pub(crate) struct Predecessor {
    keeper: Keeper,
    sessions: Vec<Outgoing>,
    manifest: Manifest,
    /// The RAM of each VM.
    ram: Vec<File>,
    /// The VMs as the next host's configuration has them.
    configured: String,
    /// The programs that the host leaves, the oldest first: each as it was, and as the next host gets it.
    programs: Vec<[Vec<u8>; 2]>,
    /// The state document of each VM.
    state: &'static [u8],
}

impl Predecessor {
    pub(crate) fn new(vms: &[&str]) -> Self {
        Self::with_state(vms, STATE)
    }

    fn with_state(vms: &[&str], state: &'static [u8]) -> Self {
        let keeper = Keeper::start();
        let manifest = Manifest {
            kernel: "7.3.4 #1".to_owned(),
            number: 3,
            config: String::new(),
            ticks: 1,
            realtime_ns: 2,
            ledger: Ledger::default(),
            vms: Vec::new(),
            boots: Vec::new(),
        };
        let mut predecessor = Self {
            keeper,
            sessions: Vec::new(),
            manifest,
            ram: Vec::new(),
            configured: String::new(),
            programs: Vec::new(),
            state,
        };
        vms.iter().for_each(|name| predecessor.add(name));
        predecessor
    }

    /// With its VMs in the next host's configuration.
    fn with_configuration(mut self) -> Self {
        self.configured =
            self.manifest.vms.iter().map(|vm| text(vm.machine.name.as_str())).collect();
        self
    }

    fn add(&mut self, name: &str) {
        let machine = Config::parse(&text(name)).unwrap().machines.remove(0);
        let ram = File::from(luo::memfd(name, machine.ram_bytes).unwrap());
        ram.write_all_at(WRITTEN, AT).unwrap();
        let state = document_memfd("state", self.state).unwrap();
        let session = self.keeper.create_session(&vm_session(&machine.name)).unwrap();
        session.preserve(ram.as_fd(), segment_token(0)).unwrap();
        session.preserve(state.as_fd(), STATE_TOKEN).unwrap();
        self.sessions.push(session);
        self.ram.push(ram);
        self.manifest.vms.push(VmEntry {
            running: true,
            state_bytes: self.state.len() as u64,
            state_digest: crc32fast::hash(self.state),
            last_exit_ticks: 1,
            ledger: Ledger::default(),
            segments: vec![SegmentEntry {
                bytes: machine.ram_bytes,
                preserved: true,
                frames: None,
            }],
            machine,
        });
    }

    /// Leaves each program in a session of its own. Returns the sessions, and what the index says of them.
    fn leave_programs(&self) -> (Vec<Outgoing>, Vec<IndexedSession>) {
        let leave = |(number, [was, is]): (usize, &[Vec<u8>; 2])| {
            let name = format!("perennial-program-{number:08x}-0.0.9");
            let session = SessionName::new(name.as_str()).unwrap();
            let session = self.keeper.create_session(&session).unwrap();
            let memory = File::from(luo::memfd("program", is.len() as u64).unwrap());
            memory.write_all_at(is, 0).unwrap();
            session.preserve(memory.as_fd(), Token(0)).unwrap();
            let (kind, bytes, digest) = (FileKind::Program, was.len() as u64, crc32fast::hash(was));
            let files = vec![IndexedFile { token: 0, kind, bytes, digest }];
            (session, IndexedSession { name, files })
        };
        self.programs.iter().enumerate().map(leave).unzip()
    }

    /// Hands over to a `perennial`, which is the command `program` with its arguments. `change` may damage the
    /// index and the manifest.
    pub(crate) fn hand_over(self, program: &[&str], change: Damage) -> Left {
        let mut left = self.leave(program, change);
        left.host.wait_until_ready("boot handover");
        left
    }

    /// The same, and does not wait until the program is ready.
    fn leave(self, program: &[&str], change: Damage) -> Left {
        let mut manifest = write_document(&self.manifest).unwrap();
        let mut index = write_document(&Index::of(&self.manifest, &manifest)).unwrap();
        let (_programs, indexed) = self.leave_programs();
        if !indexed.is_empty() {
            index = write_document(&Index::of(&self.manifest, &manifest).with(&indexed)).unwrap();
        }
        change(&mut index, &mut manifest);
        let host = self.keeper.create_session(&host_session()).unwrap();
        for (bytes, token) in [(&index, INDEX_TOKEN), (&manifest, MANIFEST_TOKEN)] {
            host.preserve(document_memfd("document", bytes).unwrap().as_fd(), token).unwrap();
        }
        let directory = tempfile::tempdir().unwrap();
        let config = directory.path().join("config.toml");
        let (socket, lock) = (directory.path().join("socket"), directory.path().join("lock"));
        let section = format!("[host]\nsocket = {socket:?}\nlock = {lock:?}\n");
        fs::write(&config, section + &self.configured).unwrap();
        let handed = self.keeper.hand_over(|handover| {
            let tree = OwnedFd::from(document_memfd("tree", &handover.tree).unwrap());
            let fds: Vec<OwnedFd> = std::iter::once(tree).chain(handover.fds).collect();
            let numbers: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd().to_string()).collect();
            fds.iter().for_each(|fd| fcntl_setfd(fd, FdFlags::empty()).unwrap());
            let mut command = Command::new(program[0]);
            command.args(&program[1..]).args(["host", "--config"]).arg(&config);
            command.env("PERENNIAL_HANDOVER", numbers.join(","));
            Ok::<_, std::convert::Infallible>(Host::run(command, directory))
        });
        Left { host: handed.unwrap(), ram: self.ram }
    }
}

/// The configuration of a VM.
fn text(name: &str) -> String {
    format!("[[vm]]\nname = {name:?}\nmemory = \"size=32M\"\nkernel = \"/nowhere/kernel\"\n")
}

/// The host that took over, and the RAM of the VMs.
pub(crate) struct Left {
    pub(crate) host: Host,
    ram: Vec<File>,
}

impl Left {
    /// Returns the state of each VM with its error as one text.
    pub(crate) fn vms(&self) -> Vec<(String, String, String)> {
        let output = self.host.ctl(&["status"]);
        assert!(output.status.success(), "{output:?}");
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        let vms = status["vms"].as_array().unwrap().iter();
        vms.map(|vm| (text(&vm["name"]), text(&vm["state"]), vm["error"].to_string())).collect()
    }

    /// Asserts that there is one VM, in this state and with this in its error.
    fn expect(&self, state: &str, named: &str) {
        let vms = self.vms();
        let [(_, found, error)] = &vms[..] else { panic!("{vms:?}") };
        assert!(found == state && error.contains(named), "{vms:?}");
    }

    fn hand_over(&mut self, program: &Path) {
        let output = self.host.ctl(&["handover", "--program", program.to_str().unwrap()]);
        assert!(output.status.success(), "{output:?}");
        self.host.wait_until_ready("boot handover");
    }

    /// Whether the host holds the RAM of VM `index`: the very same file, as the guest left it.
    pub(crate) fn holds(&self, index: usize) -> bool {
        let wanted = self.ram[index].metadata().unwrap();
        let mut held = fs::read_dir(format!("/proc/{}/fd", self.host.child.id())).unwrap();
        let is_wanted = |entry: std::io::Result<fs::DirEntry>| {
            fs::metadata(entry.unwrap().path())
                .is_ok_and(|found| (found.dev(), found.ino()) == (wanted.dev(), wanted.ino()))
        };
        let held = held.any(is_wanted);
        let mut written = [0; WRITTEN.len()];
        self.ram[index].read_exact_at(&mut written, AT).unwrap();
        assert_eq!(written, WRITTEN);
        held
    }

    fn said(&self, arguments: &[&str]) -> String {
        let output = self.host.ctl(arguments);
        assert!(!output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    }
}

fn unchanged(_: &mut Vec<u8>, _: &mut Vec<u8>) {}

/// Makes the bytes a document of no kind.
fn ruin(document: &mut [u8]) {
    document[..4].copy_from_slice(b"ruin");
}

#[test]
fn a_preserved_vm_goes_along_with_every_handover_until_it_is_given_up() {
    let mut left = Predecessor::new(&["web"]).hand_over(&[PERENNIAL], unchanged);
    for _ in 0..3 {
        left.expect("preserved", "");
        assert!(left.holds(0));
        assert!(left.said(&["restore", "web"]).contains("its memory is still preserved"));
        assert!(left.said(&["boot", "web"]).contains("is preserved"));
        left.hand_over(Path::new(PERENNIAL));
    }
    left.expect("preserved", "");
    assert!(left.host.ctl(&["stop", "web", "--now"]).status.success());
    left.expect("stopped", "null");
    assert!(!left.holds(0), "its memory is freed");
}

#[test]
fn the_disks_of_a_preserved_vm_are_its_own_and_a_write_to_them_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("web.img");
    fs::write(&image, [0; 4096]).unwrap();
    let disk = format!("disk = [\"path={}\"]\n", image.display());
    let mut predecessor = Predecessor::new(&["web"]);
    predecessor.manifest.vms[0].machine =
        Config::parse(&(text("web") + &disk)).unwrap().machines.remove(0);
    predecessor.configured = text("web") + &disk;
    let mut left = predecessor.hand_over(&[PERENNIAL], unchanged);
    for _ in 0..2 {
        assert_eq!(left.vms()[0].1, "preserved");
        // The lock is there when the handover is over, or soon after.
        wait_until_locked(&image, true);
        // The restore itself has the disk.
        let said = left.said(&["restore", "web"]);
        assert!(
            said.contains("its memory is still preserved") && !said.contains("in use"),
            "{said}"
        );
        left.hand_over(Path::new(PERENNIAL));
    }
    // What `cp` does: it asks for no lock. The host looks at the image when it has locked it, so perhaps after that.
    let file = File::options().write(true).open(&image).unwrap();
    let is_noticed = |seconds| {
        wait_until_locked(&image, true);
        let time = std::time::Duration::from_secs(seconds);
        file.set_modified(std::time::SystemTime::UNIX_EPOCH + time).unwrap();
        let said = left.said(&["restore", "web"]);
        said.contains("something was written to its disk") && said.contains("web.img")
    };
    assert!((0..100).any(is_noticed));
    let said = left.said(&["restore", "web", "--force"]);
    assert!(said.contains("its memory is still preserved"), "{said}");
    assert!(left.host.ctl(&["stop", "web", "--now"]).status.success());
    wait_until_locked(&image, false);
}

/// Waits until somebody has a lock on the file, or nobody.
fn wait_until_locked(path: &Path, locked: bool) {
    let number = format!(":{} ", fs::metadata(path).unwrap().ino());
    let is_locked = || fs::read_to_string("/proc/locks").unwrap().contains(&number);
    let deadline = std::time::Instant::now() + crate::guests::PATIENCE;
    while is_locked() != locked {
        assert!(std::time::Instant::now() < deadline, "{}: {locked}", path.display());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn a_vm_whose_manifest_cannot_be_read_goes_along_until_a_program_can_read_it() {
    let predecessor = Predecessor::new(&["web"]);
    let directory = tempfile::tempdir().unwrap();
    let ignorant = crate::handover::other_version(directory.path(), "entry-v1", "entry-v9");
    let mut left = predecessor.hand_over(&[ignorant.to_str().unwrap()], unchanged);
    for _ in 0..3 {
        left.expect("preserved", "vm-entry-v9");
        assert!(left.holds(0));
        assert!(left.said(&["restore", "web"]).contains("vm-entry-v9"));
        left.hand_over(&ignorant);
    }
    assert!(left.holds(0));
    // This one reads the manifest, and gets as far as the state document, or KVM.
    left.hand_over(Path::new(PERENNIAL));
    let vms = left.vms();
    assert!(!vms[0].2.contains("manifest"), "{vms:?}");
    left.expect("preserved", "");
    assert!(left.holds(0));
    left.hand_over(Path::new(PERENNIAL));
    left.expect("preserved", "");
    assert!(left.host.ctl(&["stop", "web", "--now"]).status.success());
    assert!(!left.holds(0));
}

#[test]
fn a_manifest_that_is_damaged_costs_no_vm_its_memory() {
    let damages: [Damage; 4] = [
        |_, manifest| ruin(manifest),
        // It still says something, but not what was written.
        |_, manifest| {
            let at = manifest.windows(7).position(|bytes| bytes == b"nowhere").unwrap();
            manifest[at] = b'm';
        },
        |_, manifest| manifest.truncate(100),
        // Larger than any manifest.
        |_, manifest| manifest.resize(17 << 20, 0),
    ];
    for damage in damages {
        let mut left = Predecessor::new(&["web", "db"]).hand_over(&[PERENNIAL], damage);
        for _ in 0..2 {
            let vms = left.vms();
            assert!(vms.iter().all(|(_, state, _)| state == "preserved"), "{vms:?}");
            assert!(vms[0].2.contains("manifest"), "{vms:?}");
            left.hand_over(Path::new(PERENNIAL));
        }
        assert!(left.holds(0) && left.holds(1));
        assert!(left.host.ctl(&["stop", "db", "--now"]).status.success());
        assert!(left.holds(0) && !left.holds(1));
        assert!(left.said(&["boot", "db"]).contains("configuration"));
        left.hand_over(Path::new(PERENNIAL));
        left.expect("preserved", "manifest");
        assert!(left.holds(0));
    }
}

#[test]
fn an_index_that_is_damaged_costs_nothing_while_the_manifest_is_sound() {
    let mut left = Predecessor::new(&["web"]).hand_over(&[PERENNIAL], |index, _| ruin(index));
    left.expect("preserved", "");
    assert!(left.holds(0));
    left.hand_over(Path::new(PERENNIAL));
    left.expect("preserved", "");
    assert!(left.holds(0));
}

#[test]
fn what_says_nothing_at_all_stays_as_it_is() {
    let left = Predecessor::new(&["web"]).hand_over(&[PERENNIAL], |index, manifest| {
        ruin(index);
        ruin(manifest);
    });
    assert!(left.vms().is_empty());
    assert!(left.holds(0));
    let said = left.said(&["handover", "--program", PERENNIAL]);
    assert!(said.contains("what the last host left cannot be read"), "{said}");
    assert!(said.contains("[guests: preserved]"), "{said}");
    assert!(left.holds(0));
}

/// The files that the next host gets of a predecessor with one VM: the standard streams, the keeper's tree, the index, the
/// manifest, the RAM and the state document.
const INHERITED: u64 = 3 + 1 + 2 + 2;

/// The limit of open files is so low that not everything can be retrieved.
#[test]
fn what_cannot_be_looked_at_for_lack_of_files_is_kept() {
    let mut seen = std::collections::BTreeSet::new();
    for most in 10..100 {
        // Root could raise the limit.
        let script = format!("ulimit -n {most}; exec \"$0\" \"$@\"");
        let sh = ["sh", "-c", &script, PERENNIAL];
        let drop_privilege = ["setpriv", "--bounding-set=-sys_resource"];
        let program = match rustix::process::geteuid().is_root() {
            true => [&drop_privilege[..], &sh].concat(),
            false => sh.to_vec(),
        };
        let predecessor = Predecessor::new(&["web"]).with_configuration();
        let mut left = predecessor.leave(&program, unchanged);
        // No host hands over to one that could open fewer.
        let is_enough = most >= INHERITED + STARTS_WITH;
        let Some(line) = left.host.becomes_ready() else {
            assert!(!is_enough, "{most} files are not enough for a host");
            continue;
        };
        let state = line.split("web ").last().unwrap_or_default().trim().to_owned();
        assert!(state == "preserved" || state == "withheld" && !is_enough, "{most}: {line}");
        assert!(left.holds(0), "{most}: {line}");
        seen.insert(state);
        if is_enough {
            break;
        }
    }
    assert_eq!(seen.len(), 2, "{seen:?}");
}

/// The report of a handover that went well.
const EARLIER_REPORT: &str = r#"{"host": {"replaced": "program", "kernel_before": "a", "kernel_after": "a",
    "luo": "keeper", "number": 0, "reboot_to_init_ns": 1, "counter_khz": 1, "phases": []},
    "vms": [{"name": "web", "ram_bytes": 1, "blackout_ns": 1, "outcome": "running", "phases": [], "frames": null,
    "segments": {"preserved": 1, "recreated": 0}}], "guest_ram_bytes_copied": 0}"#;

#[test]
fn a_host_to_which_nothing_was_handed_over_says_that_the_vms_are_lost() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("config.toml");
    let (socket, lock) = (directory.path().join("socket"), directory.path().join("lock"));
    let section = format!("[host]\nsocket = {socket:?}\nlock = {lock:?}\n");
    fs::write(&config, section + &text("web")).unwrap();
    let kept = directory.path().join("lock.report.json");
    fs::write(&kept, EARLIER_REPORT).unwrap();
    let mut command = Command::new(PERENNIAL);
    command.args(["host", "--config"]).arg(&config).env("PERENNIAL_HANDOVER", "77,78");
    let mut host = Host::run(command, directory);
    host.wait_until_ready("boot lost");
    let output = host.ctl(&["status"]);
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let why = status["last_host_error"].to_string();
    assert!(why.contains("are lost") && why.contains("handed over"), "{why}");
    // It is started by its policy, and fails because there is no kernel for it.
    assert_eq!(status["vms"][0]["state"], "failed");
    // An earlier report says that it runs.
    let report: serde_json::Value = serde_json::from_slice(&host.ctl(&["report"]).stdout).unwrap();
    assert_eq!(report["host"]["replaced"], "program", "{report}");
    assert_eq!(report["vms"][0]["name"], "web");
    assert_eq!(report["vms"][0]["outcome"], "lost", "{report}");
    assert!(report["vms"][0]["error"].to_string().contains("are lost"), "{report}");
    let kept: serde_json::Value = serde_json::from_slice(&fs::read(&kept).unwrap()).unwrap();
    assert_eq!(kept, report);
}

/// A state document that every program can decode.
const SOUND: &[u8] = include_bytes!("../../golden/vm-v1.dtb");

/// Changes a program before the next host gets it.
type Loss = fn(Vec<u8>) -> Vec<u8>;

/// A predecessor whose program was this one, and `left` is what the next host gets of it.
fn with_program(left: impl FnOnce(Vec<u8>) -> Vec<u8>) -> Predecessor {
    let was = fs::read(PERENNIAL).unwrap();
    let is = left(was.clone());
    Predecessor { programs: vec![[was, is]], ..Predecessor::with_state(&["web"], SOUND) }
}

#[test]
fn a_host_that_cannot_read_the_manifest_hands_back_to_the_program_that_can() {
    let directory = tempfile::tempdir().unwrap();
    let ignorant = crate::handover::other_version(directory.path(), "entry-v1", "entry-v9");
    let mut left = with_program(|whole| whole).hand_over(&[ignorant.to_str().unwrap()], unchanged);
    // It stays with the VM over further handovers.
    left.hand_over(&ignorant);
    left.expect("preserved", "vm-entry-v9");
    let programs = &left.host.status()["programs"];
    assert_eq!(programs.as_array().unwrap().len(), 1, "{programs}");
    assert_eq!(programs[0]["version"], "0.0.9");
    let said = left.said(&["recover", "web"]);
    assert!(said.contains("vm-entry-v9"), "{said}");
    let said = left.said(&["recover", "web", "--with", "previous"]);
    assert!(said.contains("without a VM") && said.contains("[guests: preserved]"), "{said}");
    let output = left.host.ctl(&["recover", "--with", "previous"]);
    assert!(output.status.success(), "{output:?}");
    left.host.wait_until_ready("boot handover");
    // It reads the manifest, and gets as far as what the state document says, or KVM.
    let vms = left.vms();
    assert!(vms[0].1 == "preserved" && !vms[0].2.contains("manifest"), "{vms:?}");
    assert!(left.holds(0));
    let programs = &left.host.status()["programs"];
    assert_eq!(programs.as_array().unwrap().len(), 1, "the one that was left: {programs}");
    // It has no path.
    let said = left.said(&["handover"]);
    assert!(said.contains("name the next one"), "{said}");
}

#[test]
fn a_program_that_is_damaged_truncated_or_no_perennial_is_not_entered() {
    let directory = tempfile::tempdir().unwrap();
    let ignorant = crate::handover::other_version(directory.path(), "entry-v1", "entry-v9");
    let damages: [(Loss, &str); 3] = [
        (
            |mut whole| {
                whole[5000] ^= 1;
                whole
            },
            "the program is damaged: it has the digest",
        ),
        (|whole| whole[..whole.len() / 2].to_vec(), "the program is damaged: it has"),
        (|_| Vec::new(), "it has 0 bytes"),
    ];
    for (damage, named) in damages {
        let left = with_program(damage).hand_over(&[ignorant.to_str().unwrap()], unchanged);
        let said = left.said(&["recover", "--with", "previous"]);
        assert!(said.contains(named), "{said}");
        left.expect("preserved", "vm-entry-v9");
        assert!(left.holds(0));
    }
    let stranger = fs::read("/bin/true").unwrap();
    let predecessor =
        Predecessor { programs: vec![[stranger.clone(), stranger]], ..Predecessor::new(&["web"]) };
    let left = predecessor.hand_over(&[ignorant.to_str().unwrap()], unchanged);
    let said = left.said(&["recover", "--with", "previous"]);
    assert!(said.contains("is not a `perennial` program"), "{said}");
    // Without any program it says so.
    let left = Predecessor::new(&["web"]).hand_over(&[ignorant.to_str().unwrap()], unchanged);
    let said = left.said(&["recover", "--with", "previous"]);
    assert!(said.contains("no program of an earlier host is held"), "{said}");
    assert!(left.holds(0));
}

#[test]
fn a_program_that_cannot_decode_the_state_either_is_not_used() {
    let directory = tempfile::tempdir().unwrap();
    let ignorant = crate::handover::other_version(directory.path(), "entry-v1", "entry-v9");
    let mut left = Predecessor::new(&["web"]).hand_over(&[ignorant.to_str().unwrap()], unchanged);
    // The ignorant program goes along.
    left.hand_over(Path::new(PERENNIAL));
    assert_eq!(left.host.status()["programs"].as_array().unwrap().len(), 1);
    for arguments in
        [&["recover", "web", "--with", "previous"][..], &["recover", "--with", "previous"]]
    {
        let said = left.said(arguments);
        assert!(said.contains("the state document of VM `web`"), "{said}");
        left.expect("preserved", "");
        assert!(left.holds(0));
    }
    assert!(left.host.ctl(&["stop", "web", "--now"]).status.success());
    // The way back of a host without preserved VMs.
    let output = left.host.ctl(&["recover", "--with", "previous"]);
    assert!(output.status.success(), "{output:?}");
    left.host.wait_until_ready("boot handover");
}

/// A program that waits for ever, whatever it is asked. `number` makes it another file.
fn that_hangs(number: u8) -> Vec<u8> {
    const AT: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let code = [
        0xb8, 0x22, 0x00, 0x00, 0x00, // again: mov eax, pause
        0x0f, 0x05, // syscall
        0xeb, 0xf7, // jmp again
    ];
    let mut elf = vec![0; HEADERS as usize];
    elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    elf[16..24].copy_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
    elf[24..32].copy_from_slice(&(AT + HEADERS).to_le_bytes());
    elf[32..40].copy_from_slice(&64u64.to_le_bytes());
    elf[52..58].copy_from_slice(&[64, 0, 56, 0, 1, 0]);
    elf.extend(code);
    elf.push(number);
    let bytes = elf.len() as u64;
    // PT_LOAD, readable and executable; all of the file.
    for (place, word) in
        [(64, 1 | 5 << 32), (80, AT), (88, AT), (96, bytes), (104, bytes), (112, 4096)]
    {
        elf[place..place + 8].copy_from_slice(&u64::to_le_bytes(word));
    }
    elf
}

/// The children of a process that run a program from memory.
fn programs_of(host: u32) -> Vec<Pid> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let is_program = |pid: &i32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        status.contains(&format!("\nPPid:\t{host}\n"))
            && exe.to_string_lossy().starts_with("/memfd:perennial")
    };
    pids.filter(is_program).filter_map(Pid::from_raw).collect()
}

#[test]
fn programs_that_hang_hang_at_the_same_time_and_the_one_that_answers_is_used() {
    let directory = tempfile::tempdir().unwrap();
    let ignorant = crate::handover::other_version(directory.path(), "entry-v1", "entry-v9");
    let mut predecessor = with_program(|whole| whole);
    let hang = [1, 2].map(that_hangs);
    predecessor.programs.extend(hang.iter().map(|program| [program.clone(), program.clone()]));
    let mut left = predecessor.hand_over(&[ignorant.to_str().unwrap()], unchanged);
    assert_eq!(left.host.status()["programs"].as_array().unwrap().len(), 3);
    let mut recover = Command::new(PERENNIAL);
    recover.args(["ctl", "--socket"]).arg(left.host.socket());
    let mut recover = recover.args(["recover", "--with", "previous"]).spawn().unwrap();
    // The newer two; the oldest, which answers, has come to its end or not.
    let is_hanging = |pid: &Pid| {
        let exe = fs::read(format!("/proc/{}/exe", pid.as_raw_pid())).unwrap_or_default();
        hang.contains(&exe)
    };
    let hanging = loop {
        let hanging: Vec<Pid> =
            programs_of(left.host.child.id()).into_iter().filter(is_hanging).collect();
        if hanging.len() == hang.len() {
            break hanging;
        }
        let ended = recover.try_wait().unwrap();
        assert_eq!(ended, None, "it did not examine the programs at the same time");
    };
    // The deadline would end them.
    hanging.into_iter().for_each(|pid| kill_process(pid, Signal::KILL).unwrap());
    assert!(recover.wait().unwrap().success());
    left.host.wait_until_ready("boot handover");
    assert!(left.holds(0));
}

#[test]
fn a_program_that_hangs_keeps_nobody_waiting_who_did_not_ask_for_it() {
    let directory = tempfile::tempdir().unwrap();
    let other = crate::handover::other_version(directory.path(), "entry-v1", "entry-v9");
    let programs = [that_hangs(1), fs::read(other).unwrap()];
    let programs = programs.map(|program| [program.clone(), program]).to_vec();
    let predecessor = Predecessor { programs, ..Predecessor::new(&["web"]) };
    let left = predecessor.hand_over(&[PERENNIAL], unchanged);
    left.expect("preserved", "");
    let previous = serde_json::json!({"do": "recover", "vm": "web", "with": "previous"});
    let mut client = Client::asks(&left.host, &previous);
    let hanging = loop {
        client.does(&serde_json::json!({"do": "status"}));
        let found = programs_of(left.host.child.id()).into_iter().find(|pid| {
            let exe = fs::read(format!("/proc/{}/exe", pid.as_raw_pid())).unwrap_or_default();
            exe == that_hangs(1)
        });
        if let Some(pid) = found {
            break pid;
        }
    };
    for other in ["restore", "recover", "boot", "stop"] {
        let error = client.is_refused(&serde_json::json!({"do": other, "vm": "web"}));
        assert!(error.contains("VM `web` is being restored by another command"), "{error}");
    }
    let error = client.is_refused(&serde_json::json!({"do": "handover", "without": ["web"]}));
    assert!(error.contains("VM `web` is being restored by another command"), "{error}");
    kill_process(hanging, Signal::KILL).unwrap();
    // The host has not taken the end of the other program from the thread that waits for it.
    let answer = client.is_answered();
    let error = answer["error"].to_string();
    assert!(error.contains("the state document of VM `web`"), "{error}");
    assert_eq!(answer["outcome"], "running");
    left.expect("preserved", "");
    assert!(left.holds(0));
}
