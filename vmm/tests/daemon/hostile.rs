//! Processes of VMs that a guest has taken over, clients that behave badly, and 64 VMs at once, beside a VM that must not
//! notice any of it.
//!
//! A test plays such a process: it stops the real one and takes its end of the link.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use rustix::process::{
    Pid, PidfdFlags, PidfdGetfdFlags, Signal, kill_process, pidfd_getfd, pidfd_open,
};
use serde_json::{Value, json};

use crate::guests::{Vm, host};
use crate::host::{Host, PERENNIAL};
use crate::kernel::{COUNTS, HALTS};

/// How much the host's memory may grow, in KiB.
const MOST_GROWN: u64 = 32 << 10;
/// A text as long as fits into a message on the link, once it is in JSON.
const WORST_BYTES: usize = 120 << 10;

/// The end of the link of a VM's process, which is stopped.
struct Impostor(OwnedFd);

impl Impostor {
    /// Takes the place of a VM's process. `None`, with a word about it, if this test may not.
    fn of(host: &Host, vm: &str) -> Option<Self> {
        Self::of_process(host.vm(vm)["pid"].as_i64().unwrap())
    }

    fn of_process(pid: i64) -> Option<Self> {
        let process = Pid::from_raw(pid as i32).unwrap();
        kill_process(process, Signal::STOP).unwrap();
        Some(Self(file_of(pid, 0)?))
    }

    /// Sends a message; waits while the link is full. Returns whether the host still has the link.
    fn says(&self, message: &Value, fds: &[&OwnedFd]) -> bool {
        let text = message.to_string();
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&fds));
        }
        let slices = [IoSlice::new(text.as_bytes())];
        match sendmsg(&self.0, &slices, &mut control, SendFlags::NOSIGNAL) {
            Ok(_) => true,
            Err(Errno::PIPE | Errno::CONNRESET) => false,
            Err(errno) => panic!("{errno}"),
        }
    }

    /// Waits for a request, and returns its name and the first fd that came with it. Answers those of `status` meanwhile.
    fn is_asked(&self) -> (String, Option<OwnedFd>) {
        loop {
            let (name, fd) = self.hears();
            if name != "report-storage" {
                return (name, fd);
            }
            self.says(&json!({"reply": {"storage": []}}), &[]);
        }
    }

    fn hears(&self) -> (String, Option<OwnedFd>) {
        let mut bytes = vec![0; 128 << 10];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let count = recvmsg(&self.0, &mut slices, &mut control, flags).unwrap().bytes;
        let fds = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        let fd = fds.flatten().next();
        let envelope: Value = serde_json::from_slice(&bytes[..count]).unwrap();
        let request = &envelope["request"];
        let of_object = || request.as_object().unwrap().keys().next().unwrap().clone();
        (request.as_str().map_or_else(of_object, str::to_owned), fd)
    }
}

/// Copies a file descriptor of another process. `None`, with a word about it, if this test may not.
fn file_of(pid: i64, number: i32) -> Option<OwnedFd> {
    let pidfd = pidfd_open(Pid::from_raw(pid as i32).unwrap(), PidfdFlags::empty()).unwrap();
    match pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()) {
        Ok(fd) => Some(fd),
        Err(Errno::PERM) => {
            eprintln!("skipped: this user may not take files of another process");
            None
        }
        Err(errno) => panic!("{errno}"),
    }
}

impl Host {
    /// Waits until a VM has failed, and returns why.
    fn fails(&self, vm: &str) -> String {
        self.wait_for(vm, |vm| vm["state"] == "failed")["error"].to_string()
    }

    fn open_files(&self) -> u64 {
        self.status()["resources"]["open_files"].as_u64().unwrap()
    }
}

/// A VM that counts, and one whose process is to be taken over.
fn two() -> Option<Host> {
    let vms: [Vm<'_>; 2] = [("good", COUNTS, ""), ("evil", HALTS, "")];
    let host = host("", &vms)?;
    host.counts_on("good");
    Some(host)
}

#[test]
fn a_process_that_floods_lies_or_answers_unasked_fails_alone_with_one_error() {
    let Some(host) = two() else { return };
    let before = (host.peak_kib(), host.open_files());
    let null: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
    let event = |event: Value| json!({ "event": event });
    let many_fds = vec![&null; 200];
    let link = event(json!({"link": {"device": "net@1", "link": "up"}}));
    let stranger = json!({ "reply": { "x".repeat(WORST_BYTES): 1 } });
    let cases: [(&str, &Value, &[&OwnedFd]); 5] = [
        ("without end", &link, &[]),
        ("came with more files than it may", &link, &many_fds),
        ("no answer to the request", &json!({"reply": "synced"}), &[]),
        ("no answer to the request", &json!({"reply": {"saved": {"bytes": u64::MAX}}}), &[]),
        ("cannot be read", &stranger, &[]),
    ];
    for (number, (why, message, fds)) in cases.into_iter().enumerate() {
        if number > 0 {
            assert!(host.ctl(&["boot", "evil"]).status.success());
        }
        let Some(impostor) = Impostor::of(&host, "evil") else { return };
        let talks = thread::spawn({
            let (message, count, null) = (message.clone(), fds.len(), null.try_clone().unwrap());
            // As long as the host listens.
            move || while impostor.says(&message, &vec![&null; count]) {}
        });
        host.answers();
        let said = host.fails("evil");
        assert!(said.contains(why) && said.len() < 8 << 10, "{number}: {said}");
        talks.join().unwrap();
        host.counts_on("good");
    }
    let grown = host.peak_kib() - before.0;
    assert!(grown < MOST_GROWN, "it grew by {grown} KiB");
    // The last process and its files are gone.
    let left = host.open_files();
    assert!(left < before.1, "{left} files are open, {} were before", before.1);
}

#[test]
fn a_process_that_lies_about_its_state_costs_no_memory_and_only_its_own_command() {
    let Some(host) = two() else { return };
    let before = host.peak_kib();
    let Some(impostor) = Impostor::of(&host, "evil") else { return };
    for claimed in [1 << 40, u64::MAX, 0] {
        let mut dump = Command::new(PERENNIAL);
        dump.args(["ctl", "--socket"]).arg(host.socket()).args(["dump", "evil", "/nowhere/state"]);
        let dump = dump.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        assert_eq!(impostor.is_asked().0, "pause");
        impostor.says(&json!({"reply": {"paused": {"last_exit_ticks": 1}}}), &[]);
        let (request, state) = impostor.is_asked();
        assert_eq!(request, "save");
        // As large as it likes, and all of it a hole.
        rustix::fs::ftruncate(state.unwrap(), claimed.min(1 << 40)).unwrap();
        impostor.says(&json!({"reply": {"saved": {"bytes": claimed}}}), &[]);
        assert_eq!(impostor.is_asked().0, "resume");
        impostor.says(&json!({"reply": {"resumed": {"first_entry_ticks": 2}}}), &[]);
        let output = dump.wait_with_output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && said.contains("`evil`"), "{claimed}: {said}");
        host.counts_on("good");
    }
    let grown = host.peak_kib() - before;
    assert!(grown < MOST_GROWN, "it grew by {grown} KiB");
    assert_eq!(host.vm("evil")["state"], "running");
}

#[test]
fn a_process_cannot_resize_its_memory() {
    let Some(host) = two() else { return };
    let pid = host.vm("evil")["pid"].as_i64().unwrap();
    let is_ram = |number: &i32| {
        let of = std::fs::metadata(format!("/proc/{pid}/fd/{number}"));
        of.is_ok_and(|file| file.len() == 32 << 20)
    };
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let files = files.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let found: Vec<i32> = files.map(|name| name.parse().unwrap()).filter(is_ram).collect();
    // The process may have closed what it has mapped.
    for number in found {
        let Some(ram) = file_of(pid, number) else { return };
        for size in [0, 64 << 20] {
            assert_eq!(rustix::fs::ftruncate(&ram, size), Err(Errno::PERM), "sealed");
        }
    }
    host.counts_on("good");
}

#[test]
fn clients_that_flood_stall_leave_or_send_a_gigabyte_are_told_and_no_vm_notices() {
    let Some(host) = host("", &[("good", COUNTS, "")]) else { return };
    host.counts_on("good");
    let before = host.peak_kib();
    let connect = || UnixStream::connect(host.socket()).unwrap();

    // A gigabyte without a line end: it is cut off long before, and told why.
    let mut endless = connect();
    let piece = vec![b'x'; 1 << 20];
    let written = (0..1 << 10).take_while(|_| endless.write_all(&piece).is_ok()).count();
    assert!(written < 1 << 10, "the host took a gigabyte");
    let mut said = String::new();
    let _ = endless.read_to_string(&mut said);
    assert!(said.contains("a line is longer than"), "{said}");
    host.counts_on("good");

    // Clients that ask without end and never read, beside some that leave in the middle of a line.
    let ends = thread::scope(|scope| {
        let floods: Vec<_> = (0..4)
            .map(|_| {
                let mut client = connect();
                client.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
                scope.spawn(move || {
                    let mut asked = 0;
                    while asked < 100_000 && client.write_all(b"{\"do\":\"status\"}\n").is_ok() {
                        asked += 1;
                    }
                    asked
                })
            })
            .collect();
        for _ in 0..20 {
            connect().write_all(b"{\"do\":\"sta").unwrap();
            host.counts_on("good");
        }
        floods.into_iter().map(|flood| flood.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(ends.iter().all(|asked| *asked < 100_000), "they are not read from: {ends:?}");
    host.answers();
    host.counts_on("good");
    let grown = host.peak_kib() - before;
    assert!(grown < MOST_GROWN, "it grew by {grown} KiB");
}

#[test]
fn sixty_four_vms_are_handed_over_and_their_worst_texts_fit_into_one_status() {
    let names: Vec<String> = (0..64).map(|number| format!("vm-{number}")).collect();
    // Guests that count would need all CPUs.
    let code = |number| if number % 16 == 0 { COUNTS } else { HALTS };
    let vms: Vec<Vm<'_>> =
        names.iter().enumerate().map(|(number, name)| (&name[..], code(number), "")).collect();
    let Some(mut host) = host("", &vms) else { return };
    let are_all = |host: &Host, state: &str| {
        let status = host.status();
        let vms = status["vms"].as_array().unwrap();
        assert_eq!(vms.len(), 64);
        let other = vms.iter().find(|vm| vm["state"] != state);
        assert!(other.is_none(), "not {state}: {other:?}");
    };
    let files = host.open_files();
    for _ in 0..2 {
        host.hands_over(&[]);
        are_all(&host, "running");
        names.iter().step_by(16).for_each(|name| host.counts_on(name));
    }
    assert_eq!(host.open_files(), files, "no file is left of a handover");
    let report: Value =
        serde_json::from_slice(&host.ctl(&["report"]).stdout).expect("the report is JSON");
    assert_eq!(report["vms"].as_array().unwrap().len(), 64);

    let worst = "\"\\\u{1}".repeat(WORST_BYTES / "\\\"\\\\\\u0001".len());
    let status = host.status();
    for vm in status["vms"].as_array().unwrap() {
        let Some(impostor) = Impostor::of_process(vm["pid"].as_i64().unwrap()) else { return };
        impostor.says(&json!({ "event": { "crashed": worst } }), &[]);
    }
    names.iter().for_each(|name| drop(host.fails(name)));
    are_all(&host, "failed");
    let said = host.status()["vms"][63]["error"].to_string();
    assert!(said.contains("(cut off)") && said.len() < 16 << 10, "{}", said.len());
}
