//! One machine in QEMU: the level-1 host of every test.
//!
//! QEMU connects to sockets on which the harness already listens, one for each virtio port, so that no
//! byte of a port is lost. The console goes to a file. All processes together run at most
//! [`machines_at_a_time`] machines in parallel ([`Lock`]). A machine is killed when it is dropped.
//!
//! An emulated machine gets an extra interrupt twice a second, a nudge. When QEMU 10.0 emulates a CPU
//! that leaves a guest, it changes the set of pending interrupts without a lock, and can lose an
//! interrupt that another thread adds at that moment, until the next interrupt arrives. A host that
//! sleeps until a lost timer interrupt would otherwise sleep forever.

use std::collections::HashMap;
use std::env;
use std::fmt;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::SocketAddrV4;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::binaries;
use crate::image::Initramfs;
use crate::kernels::{self, Role};
use crate::paths::{self, Lock};
use crate::plan::CONTROL_PORT;
use crate::tsc;
use crate::wire::{self, Sent};

/// What `probe-init` prints if it can open `/dev/kvm`.
pub const PROBE_KVM: &str = "perennial-probe: kvm";
/// What `probe-init` prints, with the reason, if it cannot.
pub const PROBE_NO_KVM: &str = "perennial-probe: no kvm";

const PROGRAM: &str = "qemu-system-x86_64";

/// Longest time of the probe: several times as long as hardware virtualisation needs, and far shorter
/// than an outer KVM that emulates every instruction would need.
const PROBE_DEADLINE: Duration = Duration::from_secs(20);

/// Number of lines for a reset in QEMU's log: a headline, and the CPU's registers.
const RESET_LINES: usize = 48;

/// Most memory that a machine uses, in KiB.
const MACHINE_KIB: usize = 4 << 20;

/// Most machines that run in parallel.
const MOST_MACHINES: usize = 8;

/// Time from one nudge to the next.
const NUDGES: Duration = Duration::from_millis(500);

/// How long QEMU's monitor may take for a line of its answer: on a busy machine, the emulated CPU may keep it from the lock
/// that both need.
const MONITOR_DEADLINE: Duration = Duration::from_secs(60);

/// Most lines of the monitor that are read in search of the answer.
const MOST_MONITOR_LINES: usize = 100;

/// The id that distinguishes the answer from the monitor's other lines.
const ANSWER_ID: &str = "answer";

/// Time between two looks at a machine's CPUs, long enough for a running CPU to move on.
const A_MOMENT: Duration = Duration::from_millis(300);

/// What runs the machine's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// Nested hardware virtualisation.
    Kvm,
    /// QEMU's emulation, which offers AMD SVM with nested paging.
    Tcg,
}

impl Accelerator {
    fn arguments(self) -> [&'static str; 6] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host", "-smp", "2"],
            // One CPU: with two, errors in QEMU 10.0's emulation of SVM sometimes cause a triple
            // fault of a host or a guest (four VMs on two CPUs: most runs of a minute; on one: none).
            //
            // A small translation cache, which QEMU empties when it is full: after a kexec most pages
            // of the old kernel's code become data, and as long as the cache has code of a page, every
            // write to the page is slow. With QEMU's default of 1 GiB a kernel starts two to four
            // times slower after a kexec than after power-on.
            Self::Tcg => ["-accel", "tcg,tb-size=64", "-cpu", "max", "-smp", "1"],
        }
    }
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "KVM",
            Self::Tcg => "TCG",
        })
    }
}

/// A machine to be started.
#[derive(Debug, Clone, Default)]
pub struct Machine {
    /// The kernel.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initramfs: PathBuf,
    /// Its command line.
    pub cmdline: String,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// A file that backs this RAM. Created if absent.
    pub ram_file: Option<PathBuf>,
    /// Raw images, in the order of `/dev/vda`, `/dev/vdb`, ... One may have faults ([`faults_of`]).
    pub disks: Vec<PathBuf>,
    /// Names of virtio ports.
    pub ports: Vec<String>,
    /// Ports of this computer, and where on the machine's network connections to them go. Without any
    /// the machine has no network.
    pub forwards: Vec<(u16, SocketAddrV4)>,
    /// Whether QEMU writes down what is on the machine's wire.
    pub watches_wire: bool,
    /// Whether its CPU lacks virtualisation, so that its kernel has no KVM.
    pub without_kvm: bool,
    /// Whether a reset restarts the machine; otherwise a reset ends it.
    pub may_reset: bool,
    /// Whether it has a watchdog that resets it.
    pub watchdog: bool,
}

/// Why a machine could not be started.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// QEMU is not installed.
    #[error("{PROGRAM} is not installed (Debian: qemu-system-x86)")]
    Absent,
    /// A system call on this computer failed.
    #[error("{0}")]
    Io(String, #[source] io::Error),
    /// QEMU ended during its start.
    #[error("QEMU ended at once ({status}): {said}")]
    Ended {
        /// Its exit status.
        status: String,
        /// What it wrote to stderr.
        said: String,
    },
}

fn io_error(what: impl fmt::Display) -> impl FnOnce(io::Error) -> QemuError {
    move |error| QemuError::Io(format!("{what}: {error}"), error)
}

/// How many machines may run in parallel on this computer: each needs a CPU and up to 4 GiB, and at
/// most 8 run. `PERENNIAL_MACHINES` overrides the number.
pub fn machines_at_a_time() -> usize {
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    machines(cpus, &meminfo, env::var("PERENNIAL_MACHINES").ok().as_deref())
}

fn machines(cpus: usize, meminfo: &str, wanted: Option<&str>) -> usize {
    if let Some(number) = wanted.and_then(|wanted| wanted.parse().ok()) {
        return MOST_MACHINES.min(number).max(1);
    }
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|rest| rest.split_whitespace().next()?.parse::<usize>().ok());
    let by_memory = kib.unwrap_or(0) / MACHINE_KIB;
    cpus.min(by_memory).clamp(1, MOST_MACHINES)
}

/// A running machine.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    directory: Option<TempDir>,
    ports: HashMap<String, UnixStream>,
    /// Whether an end of QEMU by a signal is expected, and not reported.
    may_crash: bool,
    /// Ends the nudges when dropped. `None` if the machine gets none.
    _nudges: Option<Sender<()>>,
    _lock: Lock,
}

impl Qemu {
    /// Whether QEMU is installed.
    pub fn is_installed() -> bool {
        let found = Command::new(PROGRAM).arg("--version").stdout(Stdio::null()).status();
        found.is_ok_and(|status| status.success())
    }

    /// Waits for a free place and starts `machine`. Its files are in `directory`, which is deleted with
    /// the machine unless `PERENNIAL_KEEP` is set.
    pub fn start(
        machine: &Machine,
        accelerator: Accelerator,
        directory: TempDir,
    ) -> Result<Self, QemuError> {
        let lock = Lock::acquire_place("qemu", machines_at_a_time())
            .map_err(io_error("waiting until another machine has ended"))?;
        let ends = ends(machine, directory.path())?;
        let stderr_path = stderr_path(directory.path());
        let stderr = fs::File::create(&stderr_path).map_err(io_error(stderr_path.display()))?;
        let mut child = command(machine, accelerator, directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => QemuError::Absent,
                _ => io_error(PROGRAM)(error),
            })?;
        let mut ports = HashMap::new();
        for (name, end) in ends {
            match connected(&end, &mut child) {
                Ok(stream) => ports.insert(name, stream),
                Err(status) => {
                    let said = fs::read_to_string(&stderr_path).unwrap_or_default();
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(QemuError::Ended { status, said: said.trim().to_owned() });
                }
            };
        }
        let nudges = (accelerator == Accelerator::Tcg).then(|| nudge(directory.path()));
        let directory = Some(directory);
        Ok(Self { child, directory, ports, may_crash: false, _nudges: nudges, _lock: lock })
    }

    /// Takes the harness's end of a virtio port. `None` if no port has this name, or the port was
    /// taken before.
    pub fn take_port(&mut self, name: &str) -> Option<UnixStream> {
        self.ports.remove(name)
    }

    /// Connects to the control port again, whose last connection was closed.
    pub fn connect_again(&self) -> io::Result<UnixStream> {
        let directory = self.directory.as_ref().ok_or(io::ErrorKind::NotFound)?;
        UnixStream::connect(control_path(directory.path()))
    }

    /// All that the machine wrote to its console so far.
    pub fn console(&self) -> String {
        let Some(directory) = &self.directory else { return String::new() };
        let bytes = fs::read(console_path(directory.path())).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// What was sent from `mac` over the machine's wire, if the machine watches that.
    pub fn sent_from(&self, mac: [u8; 6]) -> io::Result<Sent> {
        let directory = self.directory.as_ref().ok_or(io::ErrorKind::NotFound)?;
        wire::sent_from(mac, &wire_path(directory.path()))
    }

    /// The last `count` lines of the console.
    pub fn last_lines(&self, count: usize) -> String {
        last_lines(&self.console(), count)
    }

    /// If QEMU has ended: its exit status and the end of its log.
    pub fn end_of_process(&mut self) -> Option<String> {
        let status = self.child.try_wait().ok().flatten()?;
        let log = self.directory.as_ref().map(|directory| log_path(directory.path()));
        let log = log.and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default();
        let last = last_lines(&log, RESET_LINES);
        Some(format!("QEMU has ended: {status}; its log ends with\n{last}"))
    }

    /// QEMU's description of the machine's CPUs and local APICs, as text for people, now and a moment
    /// later: shows where a machine that no longer answers has stopped.
    pub fn cpus(&mut self) -> [String; 2] {
        let looked = |qemu: &mut Self| {
            let said = qemu.ask("info registers -a") + &qemu.ask("info lapic");
            let is_told =
                |line: &&str| !["FPR", "XMM", "YMM", "ZMM"].iter().any(|r| line.starts_with(r));
            said.lines().filter(is_told).collect::<Vec<_>>().join("\n")
        };
        let first = looked(self);
        thread::sleep(A_MOMENT);
        [first, looked(self)]
    }

    /// Runs a command of QEMU's human monitor and returns its output. A failure is also returned as text.
    pub fn ask(&mut self, question: &str) -> String {
        let Some(directory) = &self.directory else { return String::new() };
        let asked = UnixStream::connect(monitor_path(directory.path())).and_then(|monitor| {
            monitor.set_read_timeout(Some(MONITOR_DEADLINE))?;
            monitor.set_write_timeout(Some(MONITOR_DEADLINE))?;
            ask_monitor(&monitor, question)
        });
        asked.unwrap_or_else(|error| format!("QEMU's monitor: {error}"))
    }

    /// Whether QEMU has ended, for example after the machine's power-off.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until QEMU ends; false if it still runs at the end of `timeout`.
    pub fn wait_for_end(&mut self, timeout: Duration) -> bool {
        self.wait_until(timeout, |_| false)
    }

    /// Waits until `condition` holds or QEMU ends; false after `timeout`.
    fn wait_until(&mut self, timeout: Duration, condition: impl Fn(&Self) -> bool) -> bool {
        let start = Instant::now();
        loop {
            if condition(self) || self.has_ended() {
                return true;
            }
            if start.elapsed() > timeout {
                return false;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Kills the machine, and returns the directory of its files.
    pub fn kill(&mut self) -> Option<TempDir> {
        self.end();
        self.may_crash = true;
        self.directory.take()
    }

    fn end(&mut self) {
        // Reports a crash of QEMU. A QEMU whose machine powered off has exit status 0.
        if let Ok(Some(status)) = self.child.try_wait()
            && !status.success()
            && !self.may_crash
        {
            let directory = self.directory.as_ref().map(|directory| stderr_path(directory.path()));
            let said = directory.and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default();
            eprintln!("QEMU ended by itself: {status}: {}", said.trim());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.end();
        if env::var_os("PERENNIAL_KEEP").is_some()
            && let Some(directory) = self.directory.take()
        {
            eprintln!("kept {}", directory.keep().display());
        }
    }
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// Interrupts the machine every [`NUDGES`] until the returned sender is dropped: opens and closes a
/// connection to an unused port, which interrupts the kernel's driver.
fn nudge(directory: &Path) -> Sender<()> {
    let path = nudge_path(directory);
    let (sender, ended) = channel::<()>();
    thread::spawn(move || {
        while ended.recv_timeout(NUDGES) == Err(RecvTimeoutError::Timeout) {
            let _ = UnixStream::connect(&path);
        }
    });
    sender
}

fn nudge_path(directory: &Path) -> PathBuf {
    directory.join("nudge")
}

fn log_path(directory: &Path) -> PathBuf {
    directory.join("qemu.log")
}

fn console_path(directory: &Path) -> PathBuf {
    directory.join("console.log")
}

fn wire_path(directory: &Path) -> PathBuf {
    directory.join("wire.pcap")
}

fn monitor_path(directory: &Path) -> PathBuf {
    directory.join("monitor")
}

/// Runs a command of QEMU's human monitor over QMP, and returns its output. Every message of QMP is a
/// line: the greeting, the reply to `qmp_capabilities`, events, and the answer.
pub(crate) fn ask_monitor(mut monitor: &UnixStream, question: &str) -> io::Result<String> {
    let begin = json!({"execute": "qmp_capabilities"});
    let arguments = json!({"command-line": question});
    let ask = json!({"execute": "human-monitor-command", "arguments": arguments, "id": ANSWER_ID});
    monitor.write_all(format!("{begin}\n{ask}\n").as_bytes())?;
    for line in BufReader::new(monitor).lines().take(MOST_MONITOR_LINES) {
        let message: Value = serde_json::from_str(&line?)?;
        if message["id"] == ANSWER_ID {
            return Ok(match message["return"].as_str() {
                Some(answer) => answer.to_owned(),
                None => message["error"].to_string(),
            });
        }
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}

fn stderr_path(directory: &Path) -> PathBuf {
    directory.join("qemu.stderr")
}

/// The harness's end of a virtio port before QEMU has connected it.
enum End {
    /// QEMU connects once.
    Listens(UnixListener),
    /// QEMU listens, for one client after another: the control port.
    Connects(PathBuf),
}

fn control_path(directory: &Path) -> PathBuf {
    directory.join("control")
}

fn ends(machine: &Machine, directory: &Path) -> Result<Vec<(String, End)>, QemuError> {
    machine
        .ports
        .iter()
        .enumerate()
        .map(|(index, name)| {
            let is_control = name == CONTROL_PORT;
            let path = match is_control {
                true => control_path(directory),
                false => directory.join(format!("port{index}")),
            };
            // From an earlier start of the machine in this directory.
            let _ = fs::remove_file(&path);
            if is_control {
                return Ok((name.clone(), End::Connects(path)));
            }
            let listener = UnixListener::bind(&path).map_err(io_error(path.display()))?;
            listener.set_nonblocking(true).map_err(io_error(path.display()))?;
            Ok((name.clone(), End::Listens(listener)))
        })
        .collect()
}

/// Waits for the connection. QEMU connects or listens while it reads its arguments, so a connection
/// also shows that QEMU accepted these. The error is QEMU's exit status.
fn connected(end: &End, child: &mut Child) -> Result<UnixStream, String> {
    loop {
        let stream = match end {
            End::Listens(listener) => listener.accept().map(|(stream, _)| stream),
            End::Connects(path) => UnixStream::connect(path),
        };
        if let Ok(stream) = stream {
            return match stream.set_nonblocking(false) {
                Ok(()) => Ok(stream),
                Err(error) => Err(error.to_string()),
            };
        }
        match child.try_wait() {
            Ok(None) => thread::sleep(Duration::from_millis(5)),
            Ok(Some(status)) => return Err(status.to_string()),
            Err(error) => return Err(error.to_string()),
        }
    }
}

/// The command line of the machine's kernel.
///
/// An emulated machine has the TSC of this computer. Its kernel would measure the TSC's rate while the emulator may
/// lose its CPU, and on a busy computer the result can be a quarter of the rate. Then clocks and timers of the
/// machine's guests are wrong. So the kernel is told the rate.
fn cmdline(machine: &Machine, accelerator: Accelerator) -> String {
    match accelerator {
        Accelerator::Tcg => format!("tsc_early_khz={} {}", tsc::khz(), machine.cmdline),
        Accelerator::Kvm => machine.cmdline.clone(),
    }
}

/// The command that starts QEMU for `machine`, with its files in `directory`.
fn command(machine: &Machine, accelerator: Accelerator, directory: &Path) -> Command {
    let mut command = Command::new(PROGRAM);
    command
        .args(accelerator.arguments())
        .args(["-m", &format!("{}M", machine.memory_mib)])
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args((!machine.may_reset).then_some("-no-reboot"))
        .args(machine.watchdog.then_some(["-device", "i6300esb"]).into_iter().flatten())
        .args(machine.without_kvm.then_some(["-cpu", "max,svm=off,vmx=off"]).into_iter().flatten())
        .arg("-serial")
        .arg(format!("file:{}", console_path(directory).display()))
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", monitor_path(directory).display()))
        .arg("-kernel")
        .arg(&machine.kernel)
        .arg("-initrd")
        .arg(&machine.initramfs)
        .args(["-append", &cmdline(machine, accelerator)])
        .args(["-device", "virtio-rng-pci"])
        .args(["-device", "virtio-serial-pci,max_ports=31"]);
    // Logs the cause of a reset: a triple fault leaves nothing on the console.
    command.args(["-d", "cpu_reset", "-D"]).arg(log_path(directory));
    if accelerator == Accelerator::Tcg {
        let path = nudge_path(directory);
        command
            .args([
                "-chardev",
                &format!("socket,id=nudge,server=on,wait=off,path={}", path.display()),
            ])
            .args(["-device", "virtserialport,chardev=nudge,name=nudge"]);
    }
    if let Some(path) = &machine.ram_file {
        let ram = format!("size={}M,mem-path={}", machine.memory_mib, path.display());
        command
            .args(["-object", &format!("memory-backend-file,id=ram,share=on,{ram}")])
            .args(["-machine", "memory-backend=ram"]);
    }
    for (index, name) in machine.ports.iter().enumerate() {
        let socket = match name == CONTROL_PORT {
            true => format!("path={},server=on,wait=off", control_path(directory).display()),
            false => format!("path={}", directory.join(format!("port{index}")).display()),
        };
        command
            .args(["-chardev", &format!("socket,id=port{index},{socket}")])
            .args(["-device", &format!("virtserialport,chardev=port{index},name={name}")]);
    }
    if !machine.forwards.is_empty() {
        let forward = |(port, to): &(u16, SocketAddrV4)| {
            let end = format!("127.0.0.1:{port}-{}:{}", to.ip(), to.port());
            format!(",hostfwd=tcp:{end},hostfwd=udp:{end}")
        };
        let forwards: String = machine.forwards.iter().map(forward).collect();
        // Not `restrict=on`: that also drops the datagrams with which a guest answers forwarded ones.
        command
            .args(["-netdev", &format!("user,id=net{forwards}")])
            .args(["-device", "virtio-net-pci,netdev=net,romfile="]);
        if machine.watches_wire {
            let file = wire_path(directory);
            let (kept, file) = (wire::KEPT, file.display());
            command.args([
                "-object",
                &format!("filter-dump,id=wire,netdev=net,maxlen={kept},file={file}"),
            ]);
        }
    }
    for (index, disk) in machine.disks.iter().enumerate() {
        // Unsafe caching suffices: this computer's page cache outlives the machine, so that the
        // machine's flushes need not reach this computer's disk.
        let faults = faults_of(disk);
        let file = match faults.exists() {
            true => format!("blkdebug:{}:{}", faults.display(), disk.display()),
            false => disk.display().to_string(),
        };
        let drive =
            format!("if=none,id=disk{index},format=raw,cache=unsafe,discard=unmap,file={file}");
        let properties = std::fs::read_to_string(properties_of(disk));
        let properties = properties.map_or(String::new(), |text| format!(",{text}"));
        command
            .args(["-drive", &drive])
            .args(["-device", &format!("virtio-blk-pci,drive=disk{index}{properties}")]);
    }
    command
}

/// The file beside a disk's image that says which operations on the disk fail, in the format of QEMU's blkdebug. A
/// disk without that file has no faults.
pub fn faults_of(disk: &Path) -> PathBuf {
    disk.with_extension("faults")
}

/// The file beside a disk's image with properties of QEMU's virtio-blk-pci for that disk. A disk without that file has
/// the usual ones.
pub fn properties_of(disk: &Path) -> PathBuf {
    disk.with_extension("properties")
}

/// The contents of a file of faults: writes of this sector fail with EIO.
pub fn write_fault(sector: u64) -> String {
    format!(
        "[inject-error]\nevent = \"none\"\niotype = \"write\"\nsector = \"{sector}\"\nerrno = \"5\"\n"
    )
}

/// Makes a temporary directory for one machine's files.
pub fn scratch_directory() -> io::Result<TempDir> {
    // Short: the path of a socket has at most 107 bytes.
    let _ = fs::create_dir_all(paths::target());
    tempfile::Builder::new().prefix("perennial-").tempdir()
}

/// Finds the best accelerator, once for each process: KVM if a host kernel boots on it in time and can
/// open `/dev/kvm` for its own guests; otherwise TCG.
///
/// `PERENNIAL_ACCELERATOR` (`kvm` or `tcg`) decides without a probe. The result of a probe is kept in
/// the build output until this computer reboots.
pub fn accelerator() -> Accelerator {
    static FOUND: OnceLock<Accelerator> = OnceLock::new();
    *FOUND.get_or_init(|| match env::var("PERENNIAL_ACCELERATOR").as_deref() {
        Ok("kvm") => Accelerator::Kvm,
        Ok("tcg") => Accelerator::Tcg,
        _ => remembered_probe(),
    })
}

fn remembered_probe() -> Accelerator {
    if fs::metadata("/dev/kvm").is_err() {
        return Accelerator::Tcg;
    }
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let memory = paths::target().join("perennial-accelerator");
    let known = fs::read_to_string(&memory).unwrap_or_default();
    match known.strip_prefix(&boot).map(str::trim) {
        Some("KVM") => return Accelerator::Kvm,
        Some("TCG") => return Accelerator::Tcg,
        _ => {}
    }
    let found = match probe() {
        Ok(true) => Accelerator::Kvm,
        Ok(false) => Accelerator::Tcg,
        // The probe could not run, which says nothing about KVM, so the result is not kept. The
        // test that needs the machine names what is missing.
        Err(_) => return Accelerator::Tcg,
    };
    let _ = fs::write(memory, format!("{boot}{found}"));
    found
}

fn probe() -> Result<bool, Box<dyn std::error::Error>> {
    let directory = scratch_directory()?;
    let initramfs = directory.path().join("initramfs");
    let mut archive = Initramfs::new()?;
    archive.file("init", 0o755, &binaries::contents(&binaries::build()?.probe_init())?)?;
    // A kernel that the environment names is preferred: it needs no build or download.
    let role = if kernels::is_named(Role::StockB) { Role::StockB } else { Role::HostA };
    let kernel = kernels::find(role)?;
    archive.modules(kernel, &kernel.modules)?;
    archive.write(&initramfs)?;
    let machine = Machine {
        kernel: kernel.bzimage(),
        initramfs,
        cmdline: "console=ttyS0 panic=-1 quiet".into(),
        memory_mib: 512,
        ..Machine::default()
    };
    let mut qemu = match Qemu::start(&machine, Accelerator::Kvm, directory) {
        Ok(qemu) => qemu,
        Err(QemuError::Ended { .. }) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    // QEMU fails with an assertion if the outer KVM does not support all that QEMU sets.
    qemu.may_crash = true;
    let says = |qemu: &Qemu, what| qemu.console().contains(what);
    qemu.wait_until(PROBE_DEADLINE, |qemu| says(qemu, PROBE_KVM) || says(qemu, PROBE_NO_KVM));
    Ok(says(&qemu, PROBE_KVM))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_machines_run_side_by_side_as_there_are_cpus_and_memory_for() {
        let meminfo = |gib: usize| format!("MemTotal:       {} kB\nMemFree: 1 kB\n", gib << 20);
        assert_eq!(machines(2, &meminfo(24), None), 2);
        assert_eq!(machines(64, &meminfo(512), None), MOST_MACHINES);
        assert_eq!(machines(4, &meminfo(9), None), 2);
        assert_eq!(machines(2, &meminfo(3), None), 1);
        assert_eq!(machines(2, "", None), 1);
        assert_eq!(machines(2, &meminfo(24), Some("1")), 1);
        assert_eq!(machines(2, &meminfo(24), Some("0")), 1);
        assert_eq!(machines(2, &meminfo(24), Some("two")), 2);
    }
}
