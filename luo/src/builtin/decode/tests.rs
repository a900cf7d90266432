//! Requests with all combinations of faults, compared with the list of checks in the module text.

use proptest::prelude::*;

use super::*;
use crate::builtin::scripted::{Script, ScriptedFile};
use crate::builtin::{Compatible, Luo, Parameters};

const KIND: u32 = 1;
const PAGE: u64 = 4096;

/// A process whose only memory is `bytes`, from `address` on.
struct Process {
    address: u64,
    bytes: Vec<u8>,
    writable: bool,
    free_fds: usize,
    /// Number of fds that are reserved, and neither released nor installed.
    reserved: usize,
    /// Sessions that have an fd.
    installed: Vec<SessionId>,
    opened: Vec<SessionId>,
    files: Vec<ScriptedFile>,
    file: Option<ScriptedFile>,
}

impl Process {
    fn new(bytes: Vec<u8>) -> Self {
        Self {
            address: 0x10_0000 - bytes.len() as u64,
            bytes,
            writable: true,
            free_fds: 10,
            reserved: 0,
            installed: Vec::new(),
            opened: Vec::new(),
            files: Vec::new(),
            file: None,
        }
    }

    fn at(&self, address: u64, length: usize) -> Result<std::ops::Range<usize>, Fault> {
        let start = address.checked_sub(self.address).ok_or(Fault)? as usize;
        let end = start.checked_add(length).filter(|end| *end <= self.bytes.len()).ok_or(Fault)?;
        Ok(start..end)
    }
}

impl Caller<ScriptedFile> for Process {
    fn read(&mut self, address: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        let range = self.at(address, bytes.len())?;
        bytes.copy_from_slice(&self.bytes[range]);
        Ok(())
    }

    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Fault> {
        let range = self.at(address, bytes.len())?;
        if !self.writable {
            return Err(Fault);
        }
        self.bytes[range].copy_from_slice(bytes);
        Ok(())
    }

    fn file(&mut self, _: i32) -> Option<ScriptedFile> {
        self.file
    }

    fn reserve_fd(&mut self) -> Result<i32, Errno> {
        self.free_fds = self.free_fds.checked_sub(1).ok_or(Errno::MFILE)?;
        self.reserved += 1;
        Ok(77)
    }

    fn release_fd(&mut self, fd: i32) {
        assert_eq!(fd, 77);
        self.reserved -= 1;
        self.free_fds += 1;
    }

    fn open_session(&mut self, session: SessionId) -> Result<(), Errno> {
        self.opened.push(session);
        Ok(())
    }

    fn drop_session(&mut self, session: SessionId) {
        self.opened.retain(|other| *other != session);
    }

    fn install_session(&mut self, fd: i32, session: SessionId) {
        assert_eq!(fd, 77);
        self.reserved -= 1;
        self.installed.push(session);
    }

    fn install_file(&mut self, fd: i32, file: ScriptedFile) {
        assert_eq!(fd, 77);
        self.reserved -= 1;
        self.files.push(file);
    }
}

/// A [`Luo`] with one incoming session "in", not retrieved, with token 1; and no outgoing session.
fn machine(script: &Script) -> Luo<ScriptedFile> {
    let start = |tree: Result<Vec<u8>, Errno>| {
        let mut luo = Luo::start(Parameters::default(), || tree);
        let format = Compatible::new("paper-v1").unwrap();
        luo.register_handler(script.handler(format, &[KIND], true)).unwrap();
        luo.open_device().unwrap();
        luo
    };
    let mut old = start(Err(Errno::NOENT));
    let id = old.create_session(&name(b"in"), |_| Ok(())).unwrap();
    old.preserve_fd(id, Token(1), Some(script.open(KIND, 1))).unwrap();
    let mut tree = Vec::new();
    old.reboot(|bytes| {
        tree = bytes.to_vec();
        Ok(())
    })
    .unwrap();
    start(Ok(tree))
}

fn name(name: &[u8]) -> [u8; 64] {
    let mut field = [0; 64];
    field[..name.len()].copy_from_slice(name);
    field
}

/// The bytes of a request: its size, its second word, and the rest.
fn request(size: u32, second: i32, rest: &[u8]) -> Vec<u8> {
    [&size.to_le_bytes()[..], &second.to_le_bytes(), rest].concat()
}

fn device(luo: &mut Luo<ScriptedFile>, process: &mut Process, command: u32) -> Result<(), Errno> {
    let address = process.address;
    luo.device_ioctl(process, command, address)
}

fn session(
    luo: &mut Luo<ScriptedFile>,
    process: &mut Process,
    id: SessionId,
    command: u32,
) -> Result<(), Errno> {
    let address = process.address;
    luo.session_ioctl(process, id, command, address)
}

#[test]
fn an_answer_reaches_as_far_as_the_struct_and_an_error_changes_nothing() {
    let script = Script::new();
    let mut luo = machine(&script);
    let mut bytes = request(80, -1, &name(b"web"));
    bytes.extend([0; 8]);
    let mut process = Process::new(bytes.clone());
    device(&mut luo, &mut process, uapi::CREATE_SESSION).unwrap();
    bytes[4..8].copy_from_slice(&77_i32.to_le_bytes());
    assert_eq!(process.bytes, bytes);

    let again = request(72, -1, &name(b"web"));
    let mut process = Process::new(again.clone());
    assert_eq!(device(&mut luo, &mut process, uapi::CREATE_SESSION), Err(Errno::EXIST));
    assert_eq!((process.bytes, process.reserved), (again, 0));
}

#[test]
fn a_created_session_is_closed_if_its_answer_cannot_be_written() {
    let script = Script::new();
    let mut luo = machine(&script);
    let mut process = Process::new(request(72, -1, &name(b"web")));
    process.writable = false;
    assert_eq!(device(&mut luo, &mut process, uapi::CREATE_SESSION), Err(Errno::FAULT));
    assert_eq!((process.reserved, process.opened.len()), (0, 0));
    process.writable = true;
    device(&mut luo, &mut process, uapi::CREATE_SESSION).unwrap();
}

#[test]
fn a_session_can_be_retrieved_again_if_its_answer_cannot_be_written() {
    let script = Script::new();
    let mut luo = machine(&script);
    let mut process = Process::new(request(72, -1, &name(b"in")));
    process.writable = false;
    assert_eq!(device(&mut luo, &mut process, uapi::RETRIEVE_SESSION), Err(Errno::FAULT));
    assert_eq!((process.reserved, process.opened.len()), (0, 0));
    process.writable = true;
    device(&mut luo, &mut process, uapi::RETRIEVE_SESSION).unwrap();
    assert_eq!(device(&mut luo, &mut process, uapi::RETRIEVE_SESSION), Err(Errno::INVAL));
    assert_eq!(process.reserved, 0);
}

#[test]
fn preserve_retrieve_and_finish_stay_done_if_their_answer_cannot_be_written() {
    let script = Script::new();
    let mut luo = machine(&script);
    let incoming = luo.retrieve_session(&name(b"in"), |_| Ok(())).unwrap();
    let outgoing = luo.create_session(&name(b"out"), |_| Ok(())).unwrap();
    let token = 1_u64.to_le_bytes();

    let mut process = Process::new(request(16, 5, &token));
    process.writable = false;
    process.file = Some(script.open(KIND, 9));
    let preserve = uapi::SESSION_PRESERVE_FD;
    assert_eq!(session(&mut luo, &mut process, outgoing, preserve), Err(Errno::FAULT));
    assert_eq!(session(&mut luo, &mut process, outgoing, preserve), Err(Errno::EXIST));

    let retrieve = uapi::SESSION_RETRIEVE_FD;
    assert_eq!(session(&mut luo, &mut process, incoming, retrieve), Err(Errno::FAULT));
    assert_eq!((process.reserved, process.files.len()), (0, 0));
    process.writable = true;
    session(&mut luo, &mut process, incoming, retrieve).unwrap();
    assert_eq!((process.reserved, process.files[0].object), (0, 1));

    let mut process = Process::new(request(8, 0, &[]));
    process.writable = false;
    let finish = uapi::SESSION_FINISH;
    assert_eq!(session(&mut luo, &mut process, incoming, finish), Err(Errno::FAULT));
    assert_eq!(luo.retrieve_fd(incoming, Token(1)), Err(Errno::NOENT));
}

#[test]
fn a_tail_is_read_page_by_page_up_to_its_end() {
    let script = Script::new();
    let mut luo = machine(&script);
    let size = 72 + 3 * PAGE as u32;
    let mut bytes = request(size, -1, &name(b"web"));
    bytes.resize(size as usize, 0);
    let last = bytes.len() - 1;
    bytes[last] = 1;
    let mut process = Process::new(bytes);
    assert_eq!(device(&mut luo, &mut process, uapi::CREATE_SESSION), Err(Errno::TOOBIG));
    process.bytes[last] = 0;
    device(&mut luo, &mut process, uapi::CREATE_SESSION).unwrap();
    // The end of the address space.
    let mut process = Process::new(request(u32::MAX, -1, &name(b"web")));
    process.address = u64::MAX - 71;
    assert_eq!(device(&mut luo, &mut process, uapi::CREATE_SESSION), Err(Errno::FAULT));
}

/// A request with any combination of faults.
#[derive(Debug, Clone)]
struct Probe {
    command: u32,
    size: u32,
    second: i32,
    rest: Vec<u8>,
    /// Number of bytes that can be read; the rest of the request is beyond the end of memory.
    readable: usize,
    writable: bool,
    free_fds: usize,
}

fn any_probe() -> impl Strategy<Value = Probe> {
    let number = prop_oneof![0_u32..4, 0x3e_u32..0x46, Just(0xff)];
    let kind = prop_oneof![8 => Just(0xba00_u32), 1 => Just(0x5400), 1 => Just(0xc048_ba00)];
    let size = prop_oneof![
        prop::sample::select(vec![0_u32, 4, 7, 8, 15, 16, 17, 24, 71, 72, 73, 80, 200]),
        0_u32..300,
    ];
    let rest = (0_u64..3, prop::sample::select(vec![&b"in"[..], b"out", b"new", b"", &[b'x'; 64]]));
    let rest = rest.prop_flat_map(|(token, text)| {
        let named = any::<bool>();
        (named, prop::option::weighted(0.3, 0_usize..292)).prop_map(move |(named, junk)| {
            let mut rest = vec![0; 292];
            if named {
                rest[..64].copy_from_slice(&name(text));
            } else {
                rest[..8].copy_from_slice(&token.to_le_bytes());
            }
            if let Some(at) = junk {
                rest[at] = 1;
            }
            rest
        })
    });
    let readable = prop_oneof![3 => Just(300_usize), 1 => 0_usize..300];
    let second = prop_oneof![Just(0), Just(5), Just(-1)];
    (kind, number, size, second, rest, readable, any::<bool>(), 0_usize..3).prop_map(
        |(kind, number, size, second, rest, readable, writable, free_fds)| Probe {
            command: kind | number,
            size,
            second,
            rest,
            readable,
            writable,
            free_fds,
        },
    )
}

/// Does the checks of every request in their order. Returns the bytes of the struct, or the errno.
fn checked(probe: &Probe, known: &[(u32, usize)], fits: bool) -> Result<Vec<u8>, Errno> {
    let bytes = &request(probe.size, probe.second, &probe.rest)[..probe.readable];
    let command = probe.command;
    let (number, length) =
        *known.iter().find(|(number, _)| number % 256 == command % 256).ok_or(Errno::INVAL)?;
    if probe.readable < 4 {
        return Err(Errno::FAULT);
    }
    if command != number {
        return Err(Errno::NOTTY);
    }
    if !fits || (probe.size as usize) < length {
        return Err(Errno::INVAL);
    }
    for at in length..probe.size as usize {
        if *bytes.get(at).ok_or(Errno::FAULT)? != 0 {
            return Err(Errno::TOOBIG);
        }
    }
    Ok(bytes.get(..length).ok_or(Errno::FAULT)?.to_vec())
}

fn expected_on_device(probe: &Probe) -> Result<(), Errno> {
    let bytes = checked(probe, &[(0xba00, 72), (0xba01, 72)], true)?;
    if probe.free_fds == 0 {
        return Err(Errno::MFILE);
    }
    let text = bytes[8..72].split(|byte| *byte == 0).next().unwrap();
    let is_name = (1..64).contains(&text.len());
    match (probe.command, text) {
        (0xba00, _) if !is_name => return Err(Errno::INVAL),
        (0xba00, b"out") => return Err(Errno::EXIST),
        (0xba00, _) => {}
        (_, b"in") => {}
        _ => return Err(Errno::NOENT),
    }
    if probe.writable { Ok(()) } else { Err(Errno::FAULT) }
}

fn expected_on_session(probe: &Probe, kind: SessionKind) -> Result<(), Errno> {
    let known = [(0xba40, 16), (0xba41, 16), (0xba42, 8), (0xba43, 72)];
    let fits = match probe.command {
        0xba40 => kind == SessionKind::Outgoing,
        0xba41 | 0xba42 => kind == SessionKind::Incoming,
        _ => true,
    };
    let bytes = checked(probe, &known, fits)?;
    let reserved = bytes[4..8] != [0; 4];
    let token = bytes.get(8..16).map(|token| u64::from_le_bytes(token.try_into().unwrap()));
    match probe.command {
        0xba40 if token == Some(1) => return Err(Errno::EXIST),
        0xba40 if probe.second == -1 => return Err(Errno::BADF),
        0xba41 if probe.free_fds == 0 => return Err(Errno::MFILE),
        0xba41 if token != Some(1) => return Err(Errno::NOENT),
        0xba42 | 0xba43 if reserved => return Err(Errno::INVAL),
        _ => {}
    }
    if probe.writable { Ok(()) } else { Err(Errno::FAULT) }
}

impl Probe {
    /// Returns a process that makes the request. Its memory ends at the end of a page.
    fn process(&self, script: &Script) -> Process {
        let bytes = &request(self.size, self.second, &self.rest)[..self.readable];
        let mut process = Process::new(bytes.to_vec());
        process.writable = self.writable;
        process.free_fds = self.free_fds;
        process.file = (self.second != -1).then(|| script.open(KIND, 9));
        process
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn the_device_finds_the_first_fault(probe in any_probe()) {
        let script = Script::new();
        let mut luo = machine(&script);
        luo.create_session(&name(b"out"), |_| Ok(())).unwrap();
        let mut process = probe.process(&script);
        let before = process.bytes.clone();
        let answer = device(&mut luo, &mut process, probe.command);
        prop_assert_eq!(answer, expected_on_device(&probe));
        prop_assert_eq!(process.reserved, 0);
        prop_assert_eq!(process.installed.len(), usize::from(answer.is_ok()));
        prop_assert_eq!(process.opened.len(), process.installed.len());
        prop_assert!(answer.is_ok() || process.bytes == before);
    }

    #[test]
    fn a_session_finds_the_first_fault(probe in any_probe(), outgoing in any::<bool>()) {
        let script = Script::new();
        let mut luo = machine(&script);
        let id = if outgoing {
            let id = luo.create_session(&name(b"out"), |_| Ok(())).unwrap();
            luo.preserve_fd(id, Token(1), Some(script.open(KIND, 1))).unwrap();
            id
        } else {
            luo.retrieve_session(&name(b"in"), |_| Ok(())).unwrap()
        };
        let kind = if outgoing { SessionKind::Outgoing } else { SessionKind::Incoming };
        let mut process = probe.process(&script);
        let before = process.bytes.clone();
        let answer = session(&mut luo, &mut process, id, probe.command);
        prop_assert_eq!(answer, expected_on_session(&probe, kind));
        prop_assert_eq!(process.reserved, 0);
        prop_assert!(answer.is_ok() || process.bytes == before);
        if answer.is_ok() && probe.command == uapi::SESSION_GET_NAME {
            prop_assert_eq!(&process.bytes[8..11], if outgoing { b"out" } else { b"in\0" });
        }
    }
}
