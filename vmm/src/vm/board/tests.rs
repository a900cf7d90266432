//! Boards of devices on their own threads, without KVM.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, Sender};

use event_manager::{EventOps, Events as Happened};
use rustix::event::{EventfdFlags, eventfd};
use vmm_sys_util::epoll::EventSet;

use super::*;
use crate::arch::x86_64::cpuid::CpuModel;
use crate::devices::catalog::DeviceOptions;
use crate::devices::files::Opened;
use crate::devices::identity::Identity;
use crate::devices::serial::SerialOptions;
use crate::devices::virtio::block::BlockOptions;
use crate::devices::virtio::driver::{Ring, WRITE, ram, start};
use crate::kvm::interrupts::fake::FakeWires;
use crate::link::Role;
use crate::machine::{DiskBoot, VmName, place};
use vm_memory::{Bytes, GuestAddress};

/// Longer than anything takes that is not stuck.
const PATIENCE: Duration = Duration::from_secs(60);

const HEADER: u64 = 0x1_0000;
const STATUS: u64 = 0x1_8000;
const DATA: u64 = 0x2_0000;
/// What the status byte is before the device writes it.
const UNTOUCHED: u8 = 0xee;

fn machine() -> Machine {
    let options = BlockOptions { path: "/a".into(), ..BlockOptions::default() };
    let disk = || DeviceOptions::VirtioBlk(options.clone());
    let serial = DeviceOptions::Serial(SerialOptions::Port("console".to_owned()));
    Machine {
        name: VmName::new("a-vm").unwrap(),
        ram_bytes: 64 << 20,
        cpus: 1,
        cpu: CpuModel::Host,
        boot: DiskBoot::default().into(),
        devices: place(vec![serial, disk(), disk()]),
    }
}

/// The files of [`machine`], and the other end of its console.
fn files(image: &File) -> (Fds, UnixStream) {
    let (console, sink) = UnixStream::pair().unwrap();
    sink.set_nonblocking(true).unwrap();
    let identity = Some(Identity::of(image).unwrap());
    let image = |node: &str| {
        let fd = image.try_clone().unwrap().into();
        Role::of_device(node, Opened { role: "image", fd, identity: identity.clone() })
    };
    let sink = Opened { role: "sink", fd: sink.into(), identity: None };
    let (roles, fds): (Vec<Role>, Vec<OwnedFd>) =
        [Role::of_device("serial@3f8", sink), image("virtio-blk@1"), image("virtio-blk@2")]
            .into_iter()
            .unzip();
    (Fds::new(&roles, fds).unwrap(), console)
}

struct Running {
    board: Board,
    memory: GuestMemoryMmap,
    wires: Arc<FakeWires>,
    console: UnixStream,
    events: Receiver<Event>,
}

impl Running {
    /// A running board, whose devices' threads are those that `change` leaves.
    fn new(change: impl FnOnce(&mut Board)) -> Self {
        let image = tempfile::tempfile().unwrap();
        image.set_len(8 * 512).unwrap();
        let (memory, fake) = (ram(), Arc::new(FakeWires::default()));
        let (sender, events) = mpsc::channel();
        let events_of_devices: Events = Arc::new(move |event| drop(sender.send(event)));
        let wires = Wires {
            memory: memory.clone(),
            interrupts: fake.clone(),
            doorbells: fake.clone(),
            clock: fake.clone(),
            events: events_of_devices.clone(),
        };
        let (mut fds, console) = files(&image);
        let mut board = Board::new(&machine(), &wires, &mut fds).unwrap();
        assert_eq!(fds.finish(), Ok(()));
        change(&mut board);
        board.start_threads(&events_of_devices).unwrap();
        board.resume();
        Self { board, memory, wires: fake, console, events }
    }

    fn bar(index: u64) -> u64 {
        layout::PCI_BARS.0 + index * u64::from(BAR_SIZE)
    }

    /// Has a driver start disk `index` as it should. Gives the ring of its first queue.
    fn start_disk(&self, index: u64) -> Ring {
        let command = 0x8000_0004_u32 | (index as u32 + 1) << 11;
        self.board.pio.write(0xcf8, &command.to_le_bytes());
        self.board.pio.write(0xcfc, &6_u16.to_le_bytes());
        let ring = Ring::new(&self.memory, 0x4000 + 0x4000 * index, 16);
        start(&ring, 0, |at, bytes| self.board.mmio.write(Self::bar(index) + at, bytes));
        ring
    }

    /// Has disk `index` read its first sector, and waits for the end of that.
    fn read_sector(&self, index: u64, ring: &mut Ring) {
        self.memory.write_slice(&[0; 16], GuestAddress(HEADER)).unwrap();
        self.memory.write_slice(&[UNTOUCHED], GuestAddress(STATUS)).unwrap();
        ring.offer(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
        let before = ring.used_index();
        crate::kvm::interrupts::pull(
            &self.wires.doorbells.lock().unwrap()[&(Self::bar(index) + 0x3000)],
        );
        let deadline = Instant::now() + PATIENCE;
        while ring.used_index() == before {
            assert!(Instant::now() < deadline, "disk {index} does not answer");
            thread::yield_now();
        }
        assert_eq!(self.memory.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), 0);
    }
}

/// A worker that is called once, says so, and then waits for `released`, as for a disk that takes its
/// time to flush.
struct Stuck {
    called: OwnedFd,
    stuck: Sender<()>,
    released: Receiver<()>,
}

impl MutEventSubscriber for Stuck {
    fn process(&mut self, _events: Happened, _ops: &mut EventOps<'_>) {
        let _ = rustix::io::read(&self.called, &mut [0; 8]);
        self.stuck.send(()).unwrap();
        let _ = self.released.recv();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        ops.add(Happened::new(&self.called, EventSet::IN)).unwrap();
    }
}

/// Puts a [`Stuck`] in the place of the worker of `node`. Gives what tells that it is stuck, and what
/// releases it.
fn get_stuck(board: &mut Board, node: &str) -> (Receiver<()>, Sender<()>) {
    let called = eventfd(1, EventfdFlags::empty()).unwrap();
    let ((stuck, is_stuck), (release, released)) = (mpsc::channel(), mpsc::channel());
    let place = board.workers.iter_mut().find(|thread| thread.name == node).unwrap();
    place.worker = Box::new(Stuck { called, stuck, released });
    (is_stuck, release)
}

#[test]
fn a_disk_that_is_stuck_delays_neither_another_disk_nor_the_console() {
    let mut ends = None;
    let mut machine = Running::new(|board| ends = Some(get_stuck(board, "virtio-blk@1")));
    let (is_stuck, release) = ends.unwrap();
    is_stuck.recv_timeout(PATIENCE).unwrap();

    let mut ring = machine.start_disk(1);
    machine.read_sector(1, &mut ring);
    machine.board.pio.write(0x3f8, b"x");
    machine.console.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut shown = [0];
    machine.console.read_exact(&mut shown).unwrap();
    assert_eq!(&shown, b"x");
    // Nor do the registers of the disk that is stuck.
    let mut status = [0xff];
    machine.start_disk(0);
    machine.board.mmio.read(Running::bar(0) + 0x14, &mut status);
    assert_eq!(status, [15]);
    drop(release);
}

#[test]
fn a_device_that_would_keep_a_pause_waiting_is_known_before_it() {
    struct Deaf;
    impl Device for Deaf {
        fn pause(&mut self) {
            panic!("it was asked before");
        }
        fn check_answers(&self, _now: Instant) -> Result<(), DeviceError> {
            Err(DeviceError {
                device: "deaf@1".to_owned(),
                attempt: "stop",
                source: "it is".into(),
            })
        }
        fn drain(&mut self, _deadline: Instant) -> Result<(), DeviceError> {
            Ok(())
        }
        fn resume(&mut self) {}
    }
    let mut machine = Running::new(|_| ());
    machine.board.check_answers().unwrap();
    machine.board.devices[1].device = Arc::new(Mutex::new(Deaf));
    assert_eq!(machine.board.check_answers().unwrap_err().device, "deaf@1");
}

#[test]
fn a_device_whose_thread_ends_ends_its_vm_visibly() {
    struct Panics(OwnedFd);
    impl MutEventSubscriber for Panics {
        fn process(&mut self, _events: Happened, _ops: &mut EventOps<'_>) {
            panic!("on\n purpose");
        }
        fn init(&mut self, ops: &mut EventOps<'_>) {
            ops.add(Happened::new(&self.0, EventSet::IN)).unwrap();
        }
    }
    let machine = Running::new(|board| {
        let called = eventfd(1, EventfdFlags::empty()).unwrap();
        board.workers[2].worker = Box::new(Panics(called));
    });
    match machine.events.recv_timeout(PATIENCE).unwrap() {
        Event::Crashed(why) => {
            assert_eq!(why, "the thread of virtio-blk@2 ended: it panicked: on purpose");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_board_goes_on_with_the_state_that_it_had() {
    let image = tempfile::tempfile().unwrap();
    image.set_len(8 * 512).unwrap();
    let wires = || {
        let fake = Arc::new(FakeWires::default());
        let events: Events = Arc::new(|_| ());
        Wires {
            memory: ram(),
            interrupts: fake.clone(),
            doorbells: fake.clone(),
            clock: fake,
            events,
        }
    };
    let board = Board::new(&machine(), &wires(), &mut files(&image).0).unwrap();
    board.pause().unwrap();
    let state = board.save().unwrap();
    assert_eq!(state, board.save().unwrap());
    assert_eq!(state.nodes(), ["serial@3f8", "virtio-blk@1", "virtio-blk@2"]);
    let restored =
        Board::restore(&machine(), state.clone(), &wires(), &mut files(&image).0).unwrap();
    assert_eq!(restored.save().unwrap(), state);

    let refused = |state, fds: &mut Fds| {
        let error = Board::restore(&machine(), state, &wires(), fds).map(drop).unwrap_err();
        crate::causes::chain(&error).join(": ")
    };
    let mut fewer = state.clone();
    fewer.devices.pop();
    let error = refused(fewer, &mut files(&image).0);
    assert!(error.contains(r#"["serial@3f8", "virtio-blk@1"], the machine has"#), "{error}");
    let mut exchanged = state.clone();
    exchanged.devices.swap(0, 1);
    assert!(refused(exchanged, &mut files(&image).0).contains("the machine has"));
    let error = refused(state.clone(), &mut Fds::default());
    assert!(
        error.contains("serial@3f8") && error.contains("no file for its role `sink`"),
        "{error}"
    );
    let other = tempfile::tempfile().unwrap();
    other.set_len(8 * 512).unwrap();
    let error = refused(state, &mut files(&other).0);
    assert!(error.contains("virtio-blk@1") && error.contains("the file with inode"), "{error}");
}
