//! What a VM's process cannot do, tried from inside: this test program starts itself again as a VM's process, and
//! as processes that are confined like one and then do what a guest would do that has taken one over.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![expect(unsafe_code, reason = "the attempts are system calls")]

use std::ffi::CString;
use std::fs;
use std::io::{self, BufRead, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::thread;

use libtest_mimic::{Arguments, Failed, Trial};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use rustix::time::Timespec;
use vmm::config::HostSection;
use vmm::confine::{self, Layer, Report, trial};
use vmm::guests::confinement::Confinement;
use vmm::guests::process::{VmProcess, is_vm_process};
use vmm::host::dhcp;
use vmm::kvm::calls::VCPU;
use vmm::link::Request;

/// The argument that makes this program an inside of a confinement.
const INSIDE: &str = "inside";
/// The argument that makes this program a host, with a process of the kind in the next argument.
const HOST: &str = "host";
const VM: &str = "vm";
const DHCP: &str = "dhcp";
/// The user that the process for DHCP runs as.
const DHCP_USER: u32 = 1_900_000_009;
const USER: u32 = 1_900_000_000;

// How an inside is confined.
/// As a VM's process is.
const FILTER: &str = "filter";
/// Without the seccomp filter.
const NO_FILTER: &str = "no-filter";
/// Without the filter, by a host that does not run as root.
const WITHOUT_ROOT: &str = "without-root";

/// What each layer stops alone, without the others and without the filter: its name as an argument, the layer, and
/// the attempts with the error that shows that it was this layer.
type Alone = (&'static str, Layer, &'static [(&'static str, libc::c_int)]);

const LAYERS: &[Alone] = &[
    (
        "only-namespaces",
        Layer::Namespaces,
        &[
            // There are no files.
            ("read_a_file", libc::ENOENT),
            ("touch_luo", libc::ENOENT),
            ("open_kvm", libc::ENOENT),
            ("execute_a_program", libc::ENOENT),
            ("write_a_file", libc::ENOENT),
            // Nor a network.
            ("connect_out", libc::ENETUNREACH),
        ],
    ),
    (
        "only-user",
        Layer::User,
        &[
            ("read_a_secret", libc::EACCES),
            ("signal_a_process", libc::EPERM),
            ("trace_a_process", libc::EPERM),
            ("read_the_memory_of_a_process", libc::EPERM),
            ("become_root", libc::EPERM),
            ("mount", libc::EPERM),
            ("set_the_hosts_name", libc::EPERM),
            ("restart_the_host", libc::EPERM),
        ],
    ),
    (
        "only-capabilities",
        Layer::Capabilities,
        &[
            ("trace_a_process", libc::EPERM),
            ("read_the_memory_of_a_process", libc::EPERM),
            ("mount", libc::EPERM),
            ("set_the_hosts_name", libc::EPERM),
            ("restart_the_host", libc::EPERM),
        ],
    ),
    (
        "only-landlock",
        Layer::Landlock,
        &[
            ("read_a_file", libc::EACCES),
            ("read_the_root", libc::EACCES),
            ("write_a_file", libc::EACCES),
            ("open_kvm", libc::EACCES),
            ("execute_a_program", libc::EACCES),
            ("connect_out", libc::EACCES),
            ("listen_on_a_port", libc::EACCES),
            ("signal_a_process", libc::EPERM),
            ("trace_a_process", libc::EPERM),
            ("mount", libc::EPERM),
        ],
    ),
];

/// Without any layer: what a test may do then without harm.
const NOTHING: &str = "nothing";
const HARMLESS: &[&str] = &[
    "read_a_file",
    "read_the_root",
    "read_a_secret",
    "connect_out",
    "signal_a_process",
    "use_a_file_of_the_host",
];
/// Without any layer but the closing of the files that the host has open.
const ONLY_FILES: &str = "only-files";

/// An attempt: its name, the system call that it makes and the one that the filter stops, if another.
struct Attempt {
    name: &'static str,
    stopped_at: &'static str,
    make: fn(&Outside) -> libc::c_long,
}

/// What the attempts are made on: a process and a TCP port outside of the confinement.
struct Outside {
    process: libc::pid_t,
    port: u16,
}

fn call(number: libc::c_long, arguments: [usize; 5]) -> libc::c_long {
    let [a, b, c, d, e] = arguments;
    // Six arguments at most, of which none of the attempts needs the last: it must be 0, not what is in the register.
    // SAFETY: the attempts pass addresses of values that live during the call, or null.
    unsafe { libc::syscall(number, a, b, c, d, e, 0usize) }
}

fn path(text: &str) -> (CString, usize) {
    let text = CString::new(text).unwrap();
    let address = text.as_ptr() as usize;
    (text, address)
}

fn open(file: &str, flags: libc::c_int) -> libc::c_long {
    let (_text, address) = path(file);
    call(libc::SYS_openat, [libc::AT_FDCWD as usize, address, flags as usize, 0, 0])
}

/// A TCP socket, and the address of a port of this machine (`struct sockaddr_in`).
fn internet(port: u16) -> (libc::c_long, [u8; 16]) {
    let socket =
        call(libc::SYS_socket, [libc::AF_INET as usize, libc::SOCK_STREAM as usize, 0, 0, 0]);
    let mut address = [0u8; 16];
    address[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
    address[2..4].copy_from_slice(&port.to_be_bytes());
    address[4..8].copy_from_slice(&[127, 0, 0, 1]);
    (socket, address)
}

fn connect(outside: &Outside) -> libc::c_long {
    let (socket, address) = internet(outside.port);
    call(libc::SYS_connect, [socket as usize, address.as_ptr() as usize, 16, 0, 0])
}

const ATTEMPTS: &[Attempt] = &[
    Attempt { name: "read_a_file", stopped_at: "openat", make: |_| open("/etc/passwd", 0) },
    Attempt { name: "read_the_root", stopped_at: "openat", make: |_| open("/", libc::O_DIRECTORY) },
    Attempt {
        name: "write_a_file",
        stopped_at: "openat",
        make: |_| open("/tmp/confinement", libc::O_CREAT | libc::O_WRONLY),
    },
    Attempt {
        name: "touch_luo",
        stopped_at: "openat",
        make: |_| open("/dev/liveupdate", libc::O_RDWR),
    },
    Attempt { name: "open_kvm", stopped_at: "openat", make: |_| open("/dev/kvm", libc::O_RDWR) },
    Attempt { name: "connect_out", stopped_at: "socket", make: connect },
    Attempt {
        name: "signal_a_process",
        stopped_at: "kill",
        make: |outside| call(libc::SYS_kill, [outside.process as usize, 0, 0, 0, 0]),
    },
    Attempt {
        name: "trace_a_process",
        stopped_at: "ptrace",
        make: |outside| {
            let (attach, process) = (libc::PTRACE_ATTACH as usize, outside.process as usize);
            call(libc::SYS_ptrace, [attach, process, 0, 0, 0])
        },
    },
    Attempt {
        name: "read_the_memory_of_a_process",
        stopped_at: "process_vm_readv",
        make: |outside| {
            let byte = 0u8;
            let piece = libc::iovec { iov_base: (&raw const byte).cast_mut().cast(), iov_len: 1 };
            let piece = (&raw const piece) as usize;
            call(libc::SYS_process_vm_readv, [outside.process as usize, piece, 1, piece, 1])
        },
    },
    Attempt {
        name: "load_a_module",
        stopped_at: "init_module",
        make: |_| {
            call(
                libc::SYS_init_module,
                [INSIDE.as_ptr() as usize, 6, INSIDE.as_ptr() as usize, 0, 0],
            )
        },
    },
    Attempt {
        name: "mount",
        stopped_at: "mount",
        make: |_| {
            let ((_fs, fs), (_at, at)) = (path("tmpfs"), path("/"));
            call(libc::SYS_mount, [fs, at, fs, 0, 0])
        },
    },
    Attempt {
        name: "become_root",
        stopped_at: "setresuid",
        make: |_| call(libc::SYS_setresuid, [0, 0, 0, 0, 0]),
    },
    Attempt {
        name: "set_the_hosts_name",
        stopped_at: "sethostname",
        make: |_| call(libc::SYS_sethostname, [INSIDE.as_ptr() as usize, 6, 0, 0, 0]),
    },
    Attempt {
        name: "restart_the_host",
        stopped_at: "reboot",
        make: |_| {
            // With a magic number that is wrong: nothing happens to one who may.
            call(libc::SYS_reboot, [libc::LINUX_REBOOT_MAGIC1 as u32 as usize, 0, 0, 0, 0])
        },
    },
    Attempt {
        name: "execute_a_program",
        stopped_at: "execve",
        make: |_| {
            let (_text, address) = path("/bin/true");
            let none = [0usize; 1];
            call(libc::SYS_execve, [address, none.as_ptr() as usize, none.as_ptr() as usize, 0, 0])
        },
    },
];

/// Attempts that only the filter stops: they harm nobody outside, but widen what can be attacked.
const FILTERED: &[Attempt] = &[
    Attempt {
        name: "fork",
        stopped_at: "clone",
        make: |_| call(libc::SYS_clone, [libc::SIGCHLD as usize, 0, 0, 0, 0]),
    },
    Attempt {
        name: "make_a_namespace",
        stopped_at: "unshare",
        make: |_| call(libc::SYS_unshare, [libc::CLONE_NEWUSER as usize, 0, 0, 0, 0]),
    },
    Attempt { name: "use_bpf", stopped_at: "bpf", make: |_| call(libc::SYS_bpf, [0, 0, 0, 0, 0]) },
    Attempt {
        name: "type_into_a_terminal",
        stopped_at: "ioctl",
        make: |_| {
            call(libc::SYS_ioctl, [2, libc::TIOCSTI as usize, INSIDE.as_ptr() as usize, 0, 0])
        },
    },
    Attempt {
        name: "make_memory_executable",
        stopped_at: "mmap",
        make: |_| {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let protection = (libc::PROT_READ | libc::PROT_EXEC) as usize;
            call(libc::SYS_mmap, [0, 4096, protection, flags as usize, usize::MAX])
        },
    },
    Attempt {
        name: "handle_sigsys_itself",
        stopped_at: "rt_sigaction",
        make: |_| call(libc::SYS_rt_sigaction, [libc::SIGSYS as usize, 0, 0, 8, 0]),
    },
    Attempt {
        name: "signal_another_process_by_tgkill",
        stopped_at: "tgkill",
        make: |outside| {
            let process = outside.process as usize;
            call(libc::SYS_tgkill, [process, process, 0, 0, 0])
        },
    },
    Attempt {
        name: "receive_requests_on_a_vcpus_thread",
        stopped_at: "recvmsg",
        make: |_| {
            thread::Builder::new()
                .name("vcpu7".to_owned())
                .spawn(|| {
                    confine::thread(&[VCPU]);
                    call(libc::SYS_recvmsg, [0, 0, 0, 0, 0])
                })
                .unwrap()
                .join()
                .unwrap()
        },
    },
];

/// Attempts that a layer stops alone, and that are pointless with all of them.
const OF_A_LAYER: &[Attempt] = &[
    Attempt { name: "read_a_secret", stopped_at: "openat", make: |_| open("/etc/shadow", 0) },
    Attempt {
        name: "use_a_file_of_the_host",
        stopped_at: "fcntl",
        make: |_| call(libc::SYS_fcntl, [INHERITED as usize, libc::F_GETFD as usize, 0, 0, 0]),
    },
];

/// The number of a file that the host has open without close-on-exec when it starts a process.
const INHERITED: libc::c_int = 100;

/// An attempt that, without the filter, only landlock stops.
const BIND: Attempt = Attempt { name: "listen_on_a_port", stopped_at: "socket", make: bind };

fn bind(outside: &Outside) -> libc::c_long {
    let (socket, address) = internet(outside.port);
    call(libc::SYS_bind, [socket as usize, address.as_ptr() as usize, 16, 0, 0])
}

/// A failure of the program itself, whose handling makes system calls, and what becomes of the process: the
/// signal that ends it, or none.
type Failure = (&'static str, Option<libc::c_int>, fn());

const FAILURES: &[Failure] = &[
    ("panic", None, || {
        thread::spawn(|| panic!("on purpose")).join().unwrap_err();
    }),
    ("abort", Some(libc::SIGABRT), || std::process::abort()),
    ("overflow_of_the_stack", Some(libc::SIGABRT), || {
        fn deep(depth: u64) -> u64 {
            let bytes = std::hint::black_box([depth; 64]);
            if bytes[0] == u64::MAX { 0 } else { bytes[0] + deep(depth + 1) }
        }
        thread::spawn(|| deep(0)).join().unwrap();
    }),
    ("many_threads_that_allocate", None, || {
        let threads: Vec<_> = (0..40u8)
            .map(|index| {
                thread::spawn(move || {
                    let mut bytes = Vec::new();
                    for _ in 0..1000 {
                        bytes.extend_from_slice(&[index; 4096]);
                    }
                    thread::sleep(std::time::Duration::from_nanos(1));
                    bytes.len()
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| assert_eq!(thread.join().unwrap(), 1000 * 4096));
    }),
];

/// Has mounts and the host's name of its own, so that an attempt that succeeds, because what it tests is broken, changes
/// nothing on the computer.
fn spare_the_computer() {
    // SAFETY: only UnshareFlags::FILES is unsafe, and it is not used.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::NEWUTS) }.unwrap();
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
}

/// What an inside does: confines itself, makes the attempt, writes `errno N` or `done` to its standard output.
fn inside(arguments: &[String]) -> ExitCode {
    let [how, name, process, port] = arguments else { panic!("{arguments:?}") };
    let outside = Outside { process: process.parse().unwrap(), port: port.parse().unwrap() };
    spare_the_computer();
    let attempts = ATTEMPTS.iter().chain(FILTERED).chain(OF_A_LAYER).chain([&BIND]);
    let mut attempts = attempts.filter(|attempt| attempt.name == name);
    let make = |attempt: &Attempt| match (attempt.make)(&outside) {
        -1 => println!("errno {}", io::Error::last_os_error()),
        _ => println!("done"),
    };
    if let Some((_, layer, _)) = LAYERS.iter().find(|(layer, _, _)| layer == how) {
        let found = confine::isolate_by(*layer, USER);
        // The host makes the PID namespace.
        assert!(found.iter().all(|part| part.part == "PID namespace"), "{found:?}");
        make(attempts.next().unwrap());
        return ExitCode::SUCCESS;
    }
    if how != NOTHING {
        confine::close_all_files_from(3).unwrap();
    }
    if [NOTHING, ONLY_FILES].contains(&how.as_str()) {
        make(attempts.next().unwrap());
        return ExitCode::SUCCESS;
    }
    let mut missing = vec!["PID namespace"];
    if how == WITHOUT_ROOT {
        missing.insert(0, "a user of its own");
        let nobody = rustix::process::Uid::from_raw(65534);
        rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
    }
    let found = confine::isolate(USER);
    assert_eq!(found.iter().map(|part| part.part).collect::<Vec<_>>(), missing, "{found:?}");
    if how == FILTER {
        let report = Report { socket: io::stdin().as_raw_fd(), before: "", after: "" };
        let missing = confine::filter(&vmm::vm::calls::process(), report);
        assert!(missing.is_none(), "{missing:?}");
    }
    if let Some((_, _, fail)) = FAILURES.iter().find(|(failure, _, _)| failure == name) {
        fail();
        println!("done");
        return ExitCode::SUCCESS;
    }
    make(attempts.next().unwrap());
    ExitCode::SUCCESS
}

/// Leaves a file open, as a part of the host might do by mistake.
fn inherit() -> io::Result<()> {
    // SAFETY: the number is used for nothing else.
    match unsafe { libc::dup2(1, INHERITED) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Runs an inside. Returns its end, its report of a forbidden system call, and its output.
fn run(name: &str, how: &str) -> (ExitStatus, String, String) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (mut report, link) = UnixStream::pair().unwrap();
    // A process outside, of root.
    let mut other = Command::new("sleep").arg("600").spawn().unwrap();
    let mut command = Command::new("/proc/self/exe");
    // SAFETY: between fork and exec dup2 may be called. The number is used for nothing else.
    unsafe { command.pre_exec(inherit) };
    command
        .args([INSIDE, how, name, &other.id().to_string(), &port.to_string()])
        .env_clear()
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(link)))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    // It holds the other end of the report.
    drop(command);
    let output = child.wait_with_output().unwrap();
    other.kill().unwrap();
    other.wait().unwrap();
    let mut text = String::new();
    report.read_to_string(&mut text).unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status, text, String::from_utf8_lossy(&said).into_owned())
}

fn check(holds: bool, why: impl std::fmt::Debug) -> Result<(), Failed> {
    if holds { Ok(()) } else { Err(format!("{why:?}").into()) }
}

/// The filter ends the process, and the report names the system call and the thread.
fn is_stopped(attempt: &Attempt) -> Result<(), Failed> {
    let (status, report, said) = run(attempt.name, FILTER);
    let thread = if attempt.stopped_at == "recvmsg" { "vcpu7" } else { "main" };
    let expected = format!("its thread `{thread}` made the system call {} ", attempt.stopped_at);
    let holds = status.code() == Some(159) && report.starts_with(&expected) && said.is_empty();
    check(holds, (status, report, said))
}

/// Without the filter the other parts make the attempt fail.
fn fails(attempt: &Attempt, how: &str) -> Result<(), Failed> {
    let (status, report, said) = run(attempt.name, how);
    check(
        status.success() && said.starts_with("errno ") && report.is_empty(),
        (status, report, said),
    )
}

fn fails_by_itself(name: &str, signal: Option<libc::c_int>) -> Result<(), Failed> {
    let (status, report, said) = run(name, FILTER);
    let ended = match signal {
        None => status.success() && said.contains("done"),
        Some(_) => status.signal() == signal,
    };
    check(ended && report.is_empty(), (status, report, said))
}

/// One layer alone stops the attempt, with an error that tells which it was; without any layer root may do it.
fn is_stopped_by(how: &str, name: &str, errno: libc::c_int) -> Result<(), Failed> {
    let (status, report, said) = run(name, how);
    let denied = format!("errno {}", io::Error::from_raw_os_error(errno));
    let holds = status.success() && said.trim_end() == denied && report.is_empty();
    check(holds, (status, report, said))
}

/// Without a layer an attempt succeeds: so it shows something if it fails.
fn is_possible(name: &str) -> Result<(), Failed> {
    let (status, report, said) = run(name, NOTHING);
    check(status.success() && said.trim_end() == "done", (status, report, said))
}

/// The namespaces alone would allow it: a process may listen on its own network.
fn landlock_is_in_force() -> Result<(), Failed> {
    let (status, report, said) = run(BIND.name, NO_FILTER);
    let denied = format!("errno {}", io::Error::from_raw_os_error(libc::EACCES));
    check(status.success() && said.starts_with(&denied), (status, report, said))
}

/// A VM's process as the host starts it.
fn a_process_of_the_host_is_confined() -> Result<(), Failed> {
    let confinement = Confinement::new(&HostSection::default());
    let (first, second) =
        (VmProcess::spawn(&confinement).unwrap(), VmProcess::spawn(&confinement).unwrap());
    for (process, user) in [(&first, USER), (&second, USER + 1)] {
        // Any request: the answer to it comes after that to the first, which confines the process.
        process.build(Request::Sync, &[]).unwrap();
        let error = vmm::causes::chain(&process.reply().unwrap_err()).join(": ");
        check(error.contains("no machine"), error)?;
        check(process.missing().is_empty(), process.missing())?;
        is_confined(process.pid(), user, 4)?;
    }
    Ok(())
}

/// The process that speaks DHCP as the host starts it.
fn the_process_that_speaks_dhcp_is_confined() -> Result<(), Failed> {
    let (wire, _network) = UnixStream::pair().unwrap();
    let (process, _socket) = start_dhcp(wire)?;
    is_confined(process.pid(), DHCP_USER, 3)
}

/// Starts the process that speaks DHCP, and waits until it is confined. Returns it with the host's socket.
fn start_dhcp(wire: UnixStream) -> Result<(confine::Process, OwnedFd), Failed> {
    let (process, socket) =
        dhcp::start_process(DHCP_USER, "02:00:00:00:00:01", wire.into()).unwrap();
    // Its first message says what is missing.
    let mut first = [0; 64];
    let len = rustix::io::read(&socket, &mut first).unwrap();
    check(first[..len] == *b"c", String::from_utf8_lossy(&first[..len]))?;
    Ok((process, socket))
}

/// Whether a process runs as `user`, has this many open files and no power.
fn is_confined(pid: rustix::process::Pid, user: u32, files: usize) -> Result<(), Failed> {
    let proc = format!("/proc/{pid}");
    let proc = Path::new(&proc);
    let status = fs::read_to_string(proc.join("status")).unwrap();
    let line = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key));
        line.unwrap_or("absent").split_whitespace().collect::<Vec<_>>()
    };
    for (key, expected) in [
        ("CapEff:", "0000000000000000"),
        ("CapPrm:", "0000000000000000"),
        ("CapBnd:", "0000000000000000"),
        ("CapAmb:", "0000000000000000"),
        ("NoNewPrivs:", "1"),
        ("Seccomp:", "2"),
    ] {
        check(line(key) == [expected], (key, line(key)))?;
    }
    check(line("Groups:").is_empty(), line("Groups:"))?;
    check(line("NSpid:").last() == Some(&"1"), line("NSpid:"))?;
    let user = user.to_string();
    check(line("Uid:") == [user.as_str(); 4], line("Uid:"))?;
    check(line("Uid:") == line("Gid:"), line("Gid:"))?;
    for namespace in ["user", "mnt", "net", "pid", "ipc", "uts"] {
        let [inside, outside] = [proc, Path::new("/proc/self")]
            .map(|proc| fs::read_link(proc.join("ns").join(namespace)).unwrap());
        check(inside != outside, namespace)?;
    }
    check(fs::read_dir(proc.join("root")).unwrap().next().is_none(), "files in the root")?;
    check(fs::read(proc.join("environ")).unwrap().is_empty(), "an environment")?;
    let open = fs::read_dir(proc.join("fd")).unwrap().count();
    check(open == files, ("open files", open))
}

/// A host that is killed, and with it the process of its VM, which does nothing any more by itself.
fn a_process_ends_with_its_host() -> Result<(), Failed> {
    ends_with_its_host(VM)
}

fn the_process_that_speaks_dhcp_ends_with_its_host() -> Result<(), Failed> {
    ends_with_its_host(DHCP)
}

fn ends_with_its_host(kind: &str) -> Result<(), Failed> {
    let mut host = Command::new("/proc/self/exe")
        .args([HOST, kind])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut pid = String::new();
    io::BufReader::new(host.stdout.take().unwrap()).read_line(&mut pid).unwrap();
    let pid = Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    host.kill().unwrap();
    host.wait().unwrap();
    let mut ended = [PollFd::new(&pidfd, PollFlags::IN)];
    let patience = Timespec { tv_sec: 60, tv_nsec: 0 };
    let count = poll(&mut ended, Some(&patience)).unwrap();
    kill_process(pid, Signal::KILL).ok();
    check(count == 1, "the process outlives its host")
}

/// A host with one process, of a VM or for DHCP, whose ID it prints. Ends with its standard input.
fn host(kind: &str) -> ExitCode {
    let wait = |pid: Pid| {
        println!("{}", pid.as_raw_pid());
        let _ = io::stdin().read(&mut [0]);
    };
    if kind == DHCP {
        let (wire, _network) = UnixStream::pair().unwrap();
        // On a thread, as in a host.
        let serve = move || {
            let (process, _socket) = start_dhcp(wire).unwrap();
            wait(process.pid());
        };
        thread::spawn(serve).join().unwrap();
        return ExitCode::SUCCESS;
    }
    let process = VmProcess::spawn(&Confinement::new(&HostSection::default())).unwrap();
    // The answer comes when the process is confined.
    process.build(Request::Sync, &[]).unwrap();
    wait(process.pid());
    ExitCode::SUCCESS
}

/// Tries a shell in the place of a next host's program.
fn a_program_that_is_tried_answers_and_can_do_nothing() -> Result<(), Failed> {
    let shell = std::fs::File::open("/bin/sh").unwrap();
    let document = vmm::guests::memfd::document_memfd("a document", b"contents").unwrap();
    let within = std::time::Duration::from_secs(30);
    let tried = |script: &str| {
        let arguments = ["-c", script];
        trial::run(shell.as_fd(), &arguments, &[("a document", document.as_fd())], within)
    };
    // Not the first process, which a host's program would take for the first process of a machine.
    let script = "cat $0; echo; id -u; test $$ != 1 && echo second; grep -c : /proc/net/dev";
    let answer = tried(script).map_err(|error| error.to_string())?;
    if !answer.is_good || answer.said != "contents\n65534\nsecond\n1" {
        return Err(format!("{answer:?}").into());
    }
    let answer = tried("echo $0: unreadable; exit 1").map_err(|error| error.to_string())?;
    if answer.is_good || answer.said != "a document: unreadable" {
        return Err(format!("{answer:?}").into());
    }
    let own = std::process::id();
    for wrong in [
        format!("kill -CONT {own}"),
        "mount -t tmpfs none /tmp".to_owned(),
        "touch /etc/a-file-of-a-stranger".to_owned(),
        "echo 1 > /proc/sys/kernel/panic".to_owned(),
        "exit 3".to_owned(),
    ] {
        let answer = tried(&wrong).map_err(|error| error.to_string())?;
        if answer.is_good {
            return Err(format!("it can {wrong}").into());
        }
    }
    let endless = ["-c", "while :; do :; done"];
    match trial::run(shell.as_fd(), &endless, &[], std::time::Duration::from_millis(200)) {
        Err(trial::TrialError::Silent(_)) => Ok(()),
        other => Err(format!("an endless program: {other:?}").into()),
    }
}

fn main() -> ExitCode {
    if is_vm_process() {
        return match vmm::vm::serve::run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if dhcp::is_dhcp_process() {
        let [_dhcp, _log, _level, _user, user, _mac, mac] = &arguments[..] else {
            panic!("arguments of the DHCP process: {arguments:?}")
        };
        return match dhcp::run_process(user.parse().unwrap(), mac) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    if trial::is_trial() {
        return trial::surround(std::env::args_os().skip(2)).into();
    }
    if let [HOST, kind] = arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        return host(kind);
    }
    if let Some((INSIDE, rest)) =
        arguments.split_first().map(|(first, rest)| (first.as_str(), rest))
    {
        return inside(rest);
    }
    if !rustix::process::geteuid().is_root() {
        println!("SKIP: the confinement is tested as root, because only root can make all of it");
        return ExitCode::SUCCESS;
    }
    let mut trials: Vec<Trial> = Vec::new();
    for attempt in ATTEMPTS.iter().chain(FILTERED) {
        let name = format!("the_filter_reports_an_attempt_to_{}", attempt.name);
        trials.push(Trial::test(name, || is_stopped(attempt)));
    }
    for attempt in ATTEMPTS {
        for how in [NO_FILTER, WITHOUT_ROOT] {
            let name = format!("{how}_an_attempt_to_{}_fails", attempt.name);
            trials.push(Trial::test(name, move || fails(attempt, how)));
        }
    }
    for (name, signal, _) in FAILURES {
        let trial = format!("the_filter_allows_what_follows_{name}");
        trials.push(Trial::test(trial, || fails_by_itself(name, *signal)));
    }
    let name = "a_program_that_is_tried_answers_and_can_do_nothing";
    trials.push(Trial::test(name, a_program_that_is_tried_answers_and_can_do_nothing));
    let name = "a_process_of_the_host_is_confined";
    trials.push(Trial::test(name, a_process_of_the_host_is_confined));
    let name = "the_process_that_speaks_dhcp_is_confined";
    trials.push(Trial::test(name, the_process_that_speaks_dhcp_is_confined));
    trials.push(Trial::test("a_process_ends_with_its_host", a_process_ends_with_its_host));
    let name = "the_process_that_speaks_dhcp_ends_with_its_host";
    trials.push(Trial::test(name, the_process_that_speaks_dhcp_ends_with_its_host));
    trials.push(Trial::test("landlock_is_in_force", landlock_is_in_force));
    for (how, _, attempts) in LAYERS {
        for (name, errno) in *attempts {
            let trial = format!("{how}_stops_an_attempt_to_{name}");
            trials.push(Trial::test(trial, || is_stopped_by(how, name, *errno)));
        }
    }
    for name in HARMLESS {
        let trial = format!("{NOTHING}_stops_an_attempt_to_{name}");
        trials.push(Trial::test(trial, || is_possible(name)));
    }
    let name = "only-files_stops_an_attempt_to_use_a_file_of_the_host";
    let attempt = "use_a_file_of_the_host";
    trials.push(Trial::test(name, || is_stopped_by(ONLY_FILES, attempt, libc::EBADF)));
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
