//! Many requests at a time, on both engines: in flight during a pause, flushes, limits, and what a
//! hostile driver does meanwhile.

mod backing;

use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberOps};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::bus::BusDevice;
use crate::devices::Device;
use crate::devices::pci::PciFunction;
use crate::devices::storage;
use crate::devices::virtio::Worker;
use crate::devices::virtio::driver::{BAR, Part, Ring, WRITE, ram, resources, start_queues};
use crate::kvm::interrupts::fake::FakeWires;
use crate::kvm::interrupts::pull;
use crate::state::Persist;

const HEADERS: u64 = 0x1_0000;
const STATUSES: u64 = 0x1_8000;
const DATA: u64 = 0x2_0000;
const SECTORS: u64 = 64;
/// What a status byte is before the device writes it.
const UNTOUCHED: u8 = 0xee;
const PATIENCE: Duration = Duration::from_secs(60);

struct Guest {
    function: VirtioPci<Block>,
    thread: EventManager<Worker<BlockWorker>>,
    wires: Arc<FakeWires>,
    memory: GuestMemoryMmap,
    ring: Ring,
    /// The rings of the other queues, if the disk has several.
    more: Vec<Ring>,
    offered: u64,
    disk: Arc<Shared>,
}

impl Guest {
    /// A guest whose driver has started the disk `file`, with the options `options` and the features `features`.
    fn new(file: File, options: &str, features: u64) -> Self {
        Self::with_sectors(file, SECTORS, options, features)
    }

    fn with_sectors(file: File, sectors: u64, options: &str, features: u64) -> Self {
        let identity = Identity::File { file_system: 1, inode: 2, born: None };
        Self::with_identity(file, identity, sectors, options, features)
    }

    fn with_identity(
        file: File,
        identity: Identity,
        sectors: u64,
        options: &str,
        features: u64,
    ) -> Self {
        let (memory, wires) = (ram(), Arc::new(FakeWires::default()));
        let resources = resources(&memory, &wires);
        let options = BlockOptions::parse(&format!("path=a disk,{options}"), 1).unwrap();
        let (file, cached) = match options.direct.then(|| without_cache(&file)).flatten() {
            Some(direct) => (direct, Some(file)),
            None => (file, None),
        };
        let image = Image { file, cached, identity, options };
        let block =
            Block::with(image, sectors, Geometry::default(), [0; identification::LEN], true);
        let disk = block.0.clone();
        let mut function = VirtioPci::new(block, resources).unwrap();
        let mut thread = EventManager::new().unwrap();
        thread.add_subscriber(function.worker());
        let ring = Ring::new(&memory, 0x4000, QUEUE_SIZE);
        function.write_config(4, &6_u16.to_le_bytes());
        let more =
            (1..function.queues()).map(|n| Ring::new(&memory, 0x4000 + 0x4000 * n, QUEUE_SIZE));
        let more: Vec<Ring> = more.collect();
        let rings: Vec<&Ring> = std::iter::once(&ring).chain(&more).collect();
        start_queues(&rings, features, |at, bytes| function.write(at, bytes));
        Self { function, thread, wires, memory, ring, more, offered: 0, disk }
    }

    /// Offers a request. Gives its number, by which its status is found.
    fn offer(&mut self, kind: u32, sector: u64, data: &[Part]) -> u64 {
        self.offer_on(0, kind, sector, data)
    }

    fn offer_on(&mut self, queue: usize, kind: u32, sector: u64, data: &[Part]) -> u64 {
        let number = self.offered;
        self.offered += 1;
        let (header, status) = (HEADERS + 16 * number, STATUSES + number);
        let bytes = u128::from(kind) | u128::from(sector) << 64;
        self.memory.write_slice(&bytes.to_le_bytes(), GuestAddress(header)).unwrap();
        self.memory.write_slice(&[UNTOUCHED], GuestAddress(status)).unwrap();
        let ring = if queue == 0 { &mut self.ring } else { &mut self.more[queue - 1] };
        ring.offer(&[&[(header, 16, 0)], data, &[(status, 1, WRITE)]].concat());
        number
    }

    /// Rings the doorbells of all queues.
    fn ring_doorbell(&self) {
        let doorbells = self.wires.doorbells.lock().unwrap();
        for queue in 0..=self.more.len() as u64 {
            pull(&doorbells[&(u64::from(BAR) + 0x3000 + 4 * queue)]);
        }
    }

    /// Number of requests that the disk has completed, of all queues.
    fn completed(&self) -> u16 {
        self.ring.used_index() + self.more.iter().map(Ring::used_index).sum::<u16>()
    }

    fn status(&self, number: u64) -> u8 {
        self.memory.read_obj(GuestAddress(STATUSES + number)).unwrap()
    }

    /// Runs the disk's thread until `count` requests are completed.
    fn run_until(&mut self, count: u16) {
        let deadline = Instant::now() + PATIENCE;
        while self.completed() != count {
            assert!(Instant::now() < deadline, "{} of {count} requests", self.completed());
            self.thread.run_with_timeout(100).unwrap();
        }
    }

    /// Resizes the disk as the operator does, while its thread runs. Returns the size or the error text.
    fn resize(&mut self, bytes: Option<u64>) -> Result<u64, String> {
        let (sender, resized) = std::sync::mpsc::channel();
        let on_resized = move |result: Result<u64, storage::StorageFailure>| {
            sender.send(result.map_err(|error| error.to_string())).unwrap();
        };
        self.disk.resize(bytes, Box::new(on_resized));
        loop {
            match resized.try_recv() {
                Ok(result) => return result,
                Err(_) => drop(self.thread.run_with_timeout(100).unwrap()),
            }
        }
    }

    /// Syncs the paused disk, while its thread runs. Returns the error text.
    fn sync(&mut self) -> Result<(), String> {
        let Self { thread, disk, .. } = self;
        disk.begin_sync();
        std::thread::scope(|scope| {
            let synced = scope.spawn(|| disk.end_sync(Instant::now() + PATIENCE));
            while !synced.is_finished() {
                thread.run_with_timeout(1).unwrap();
            }
            synced.join().unwrap().map_err(|error| error.to_string())
        })
    }

    /// The capacity in sectors, and whether the driver was interrupted for a change of the configuration since
    /// the last call.
    fn capacity(&mut self) -> (u64, bool) {
        let (mut capacity, mut isr) = ([0; 8], [0]);
        self.function.read(0x2000, &mut capacity);
        self.function.read(0x1000, &mut isr);
        (u64::from_le_bytes(capacity), isr[0] & 2 != 0)
    }

    /// Pauses the disk, while its thread runs.
    fn pause(&mut self) {
        let Self { function, thread, .. } = self;
        function.pause();
        std::thread::scope(|scope| {
            let drained = scope.spawn(move || function.drain(Instant::now() + PATIENCE).unwrap());
            while !drained.is_finished() {
                thread.run_with_timeout(1).unwrap();
            }
        });
    }
}

fn image() -> File {
    let mut file = tempfile::tempfile().unwrap();
    (0..SECTORS).for_each(|sector| file.write_all(&[sector as u8; 512]).unwrap());
    file
}

/// The same file opened with O_DIRECT, or `None` if it is not a file of a file system that supports it.
fn without_cache(file: &File) -> Option<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_DIRECT).open(path).ok()
}

/// Both engines, with and without the host's page cache.
const ENGINES: [&str; 4] = [
    "_disable_io_uring=off",
    "_disable_io_uring=on",
    "direct=on,_disable_io_uring=off",
    "direct=on,_disable_io_uring=on",
];

#[test]
fn a_whole_ring_of_requests_is_answered_each_with_its_own_data() {
    for options in ENGINES {
        let mut guest = Guest::new(image(), options, F_FLUSH);
        for n in 0..SECTORS {
            guest.offer(0, n, &[(DATA + 512 * n, 100, WRITE), (DATA + 512 * n + 100, 412, WRITE)]);
        }
        guest.ring_doorbell();
        guest.run_until(SECTORS as u16);
        for n in 0..SECTORS {
            let mut data = [0; 512];
            guest.memory.read_slice(&mut data, GuestAddress(DATA + 512 * n)).unwrap();
            assert_eq!((guest.status(n), data), (0, [n as u8; 512]), "{n}");
        }
        let mut heads: Vec<u32> = (0..64).map(|n| guest.ring.used_element(n).0).collect();
        heads.sort_unstable();
        assert_eq!(heads, (0..64).map(|n| n * 4).collect::<Vec<_>>(), "each once");
    }
}

#[test]
fn writes_in_flight_are_on_the_disk_after_a_pause_and_what_came_later_is_in_the_ring() {
    for options in ENGINES {
        let file = image();
        let mut guest = Guest::new(file.try_clone().unwrap(), options, F_FLUSH);
        guest.memory.write_slice(&[0x77; 512], GuestAddress(DATA)).unwrap();
        for n in 0..32 {
            guest.offer(1, n, &[(DATA, 512, 0)]);
        }
        guest.offer(4, 0, &[]);
        guest.ring_doorbell();
        guest.thread.run_with_timeout(0).unwrap();
        guest.pause();
        assert_eq!(guest.ring.used_index(), 33);
        assert!((0..33).all(|n| guest.status(n) == 0));
        let mut sectors = [0; 33 * 512];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut sectors, 0).unwrap();
        assert!(sectors[..32 * 512].iter().all(|byte| *byte == 0x77));
        assert_eq!(sectors[32 * 512], 32);
        guest.offer(1, 40, &[(DATA, 512, 0)]);
        guest.ring_doorbell();
        guest.thread.run_with_timeout(0).unwrap();
        assert_eq!(guest.status(33), UNTOUCHED);
        guest.function.resume();
        guest.run_until(34);
        assert_eq!(guest.status(33), 0);
    }
}

#[test]
fn a_flush_that_fails_fails_every_request_that_waits_for_one() {
    // Cannot be flushed, but takes every write.
    let null = || File::options().read(true).write(true).open("/dev/null").unwrap();
    for options in ENGINES {
        let mut guest = Guest::new(null(), options, F_FLUSH);
        let flushes: Vec<u64> = (0..5).map(|_| guest.offer(4, 0, &[])).collect();
        let write = guest.offer(1, 0, &[(DATA, 512, 0)]);
        guest.ring_doorbell();
        guest.run_until(6);
        assert!(flushes.iter().all(|n| guest.status(*n) == 1));
        assert_eq!(guest.status(write), 0);

        let mut guest = Guest::new(null(), options, 0);
        let write = guest.offer(1, 0, &[(DATA, 512, 0)]);
        guest.ring_doorbell();
        guest.run_until(1);
        assert_eq!(guest.status(write), 1, "a driver without FLUSH is not told of a durable write");
    }
}

#[test]
fn errors_of_the_host_are_errors_of_their_requests_only() {
    for options in ENGINES {
        let file = image();
        file.set_len(32 * 512).unwrap();
        let mut guest = Guest::new(file, options, F_FLUSH);
        let beyond = guest.offer(0, 31, &[(DATA, 1024, WRITE)]);
        let within = guest.offer(0, 31, &[(DATA + 4096, 512, WRITE)]);
        guest.ring_doorbell();
        guest.run_until(2);
        assert_eq!((guest.status(beyond), guest.status(within)), (1, 0));
    }
}

#[test]
fn a_driver_that_resets_the_disk_with_requests_in_flight_gets_it_back() {
    for options in ENGINES {
        let mut guest = Guest::new(image(), options, F_FLUSH);
        for n in 0..60 {
            guest.offer(
                u32::from(n % 2 == 0),
                n,
                &[(DATA, 512, if n % 2 == 0 { 0 } else { WRITE })],
            );
        }
        guest.ring_doorbell();
        guest.thread.run_with_timeout(0).unwrap();
        guest.function.write(0x14, &[0]);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut status = [0xff];
            guest.function.read(0x14, &mut status);
            if status == [0] {
                break;
            }
            assert!(Instant::now() < deadline);
            guest.thread.run_with_timeout(100).unwrap();
        }
        guest.pause();
    }
}

#[test]
fn more_than_may_be_in_flight_waits_in_the_ring_and_is_done() {
    for options in ENGINES {
        // Gives as much as is asked for.
        let file = File::open("/dev/zero").unwrap();
        let mut guest = Guest::with_sectors(file, 1 << 40, options, F_FLUSH);
        // Four requests of 15 MiB, which may be two in flight.
        let data = vec![(DATA, 256 << 10, WRITE); 60];
        for n in 0..4 {
            guest.offer(0, n, &data);
        }
        guest.ring_doorbell();
        guest.run_until(4);
        assert!((0..4).all(|n| guest.status(n) == 0));
        assert_eq!(guest.ring.used_element(3).1, 60 * (256 << 10) + 1);
    }
}

#[test]
fn sectors_that_are_zeroed_or_discarded_read_as_zeroes_and_their_neighbours_as_before() {
    for options in ENGINES {
        let file = image();
        let mut guest = Guest::new(file.try_clone().unwrap(), options, F_FLUSH);
        for (n, (kind, sector, flags)) in
            [(11, 4u64, 0u32), (13, 8, 1), (13, 12, 0)].iter().enumerate()
        {
            let range = u128::from(*sector) | 2 << 64 | u128::from(*flags) << 96;
            let at = DATA + 16 * n as u64;
            guest.memory.write_slice(&range.to_le_bytes(), GuestAddress(at)).unwrap();
            guest.offer(*kind, 0, &[(at, 16, 0)]);
        }
        guest.ring_doorbell();
        guest.run_until(3);
        let mut expected: Vec<u8> = (0..SECTORS).flat_map(|sector| [sector as u8; 512]).collect();
        for (n, sector) in [4, 8, 12].into_iter().enumerate() {
            match guest.status(n as u64) {
                0 => expected[sector * 512..(sector + 2) * 512].fill(0),
                // The file system of temporary files cannot.
                status => assert_eq!((status, n), (2, 2)),
            }
        }
        let mut found = vec![0; expected.len()];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut found, 0).unwrap();
        assert!(found == expected);
    }
}

#[test]
fn what_is_discarded_is_given_back_to_the_file_system() {
    use std::os::unix::fs::{FileExt, MetadataExt};
    for options in ENGINES {
        let file = image();
        let blocks = || file.metadata().unwrap().blocks();
        let before = blocks();
        let mut guest = Guest::new(file.try_clone().unwrap(), options, F_FLUSH);
        // 8 KiB, whole blocks of the file system.
        guest.memory.write_slice(&(16 | 16u128 << 64).to_le_bytes(), GuestAddress(DATA)).unwrap();
        guest.offer(11, 0, &[(DATA, 16, 0)]);
        guest.ring_doorbell();
        guest.run_until(1);
        assert_eq!((guest.status(0), blocks()), (0, before - 16), "{options}");
        let mut found = [1; 512];
        file.read_exact_at(&mut found, 16 * 512).unwrap();
        assert_eq!(found, [0; 512]);
    }
}

#[test]
fn a_driver_keeps_the_discards_that_it_was_offered_and_gets_no_others() {
    let resets = |guest: &mut Guest| guest.function.write(0x14, &[0]);
    let keeps = |_: &mut Guest| {};
    for (agreed, then, wanted) in [
        (F_FLUSH | F_DISCARD, keeps as fn(&mut Guest), F_DISCARD),
        (F_FLUSH, keeps, 0),
        // A driver that begins again may have read the offer.
        (F_FLUSH, resets, F_DISCARD),
    ] {
        let mut guest = Guest::new(image(), ENGINES[0], agreed);
        then(&mut guest);
        guest.pause();
        let state = guest.function.save().unwrap();
        let identity = guest.disk.image.identity.clone();
        let options = guest.disk.image.options.clone();
        let image = Image { file: image(), cached: None, identity, options };
        let resources = resources(&ram(), &Arc::new(FakeWires::default()));
        let mut restored = VirtioPci::<Block>::restore(state, (resources, image)).unwrap();
        restored.write(0, &[0; 4]);
        let mut offered = [0; 4];
        restored.read(4, &mut offered);
        let offered = u64::from(u32::from_le_bytes(offered));
        assert_eq!(offered & (F_DISCARD | F_WRITE_ZEROES), wanted | F_WRITE_ZEROES);
    }
}

/// The device is a file, so that its discard fails: it would become zeroes by what discards parts of a file.
#[test]
fn a_discard_of_a_block_device_writes_no_zeroes_and_its_failure_is_told() {
    for options in ENGINES {
        let file = image();
        let (major, minor, serial) = (254, 16, String::new());
        let identity =
            Identity::BlockDevice { major, minor, serial, unit: None, others: Vec::new() };
        let same = file.try_clone().unwrap();
        let mut guest = Guest::with_identity(same, identity, SECTORS, options, F_FLUSH);
        guest.memory.write_slice(&(4 | 2u128 << 64).to_le_bytes(), GuestAddress(DATA)).unwrap();
        guest.offer(11, 0, &[(DATA, 16, 0)]);
        guest.ring_doorbell();
        guest.run_until(1);
        assert_eq!(guest.status(0), 1, "{options}");
        let mut found = [0; 1024];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut found, 4 * 512).unwrap();
        assert_eq!(found, *[[4; 512], [5; 512]].as_flattened(), "{options}");
    }
}

#[test]
fn a_disk_that_cannot_clear_sectors_says_so_and_one_that_cannot_discard_leaves_them() {
    for options in ENGINES {
        let file = File::options().read(true).write(true).open("/dev/zero").unwrap();
        let mut guest = Guest::new(file, options, F_FLUSH);
        guest.memory.write_slice(&(2u128 << 64).to_le_bytes(), GuestAddress(DATA)).unwrap();
        guest.offer(11, 0, &[(DATA, 16, 0)]);
        guest.offer(13, 0, &[(DATA, 16, 0)]);
        guest.ring_doorbell();
        guest.run_until(2);
        assert_eq!((guest.status(0), guest.status(1)), (0, 2));
    }
}

#[test]
fn the_format_of_a_disk_with_direct_on_is_recognized() {
    for head in [&b"QFI\xfb"[..], b""] {
        let file = image();
        std::os::unix::fs::FileExt::write_all_at(&file, head, 0).unwrap();
        let Some(direct) = without_cache(&file) else { return };
        let options = BlockOptions::parse("path=a,direct=on", 1).unwrap();
        let identity = Identity::File { file_system: 1, inode: 2, born: None };
        let image = Image { file: direct, cached: Some(file), identity, options };
        match Block::new(image, "a-0") {
            Ok(_) => assert_eq!(head, b""),
            Err(error) => assert!(error.to_string().contains("qcow2"), "{error}"),
        }
    }
}

#[test]
fn a_disk_with_direct_on_also_moves_what_o_direct_does_not_accept() {
    for options in &ENGINES[2..] {
        let file = image();
        let mut guest = Guest::new(file.try_clone().unwrap(), options, F_FLUSH);
        // Odd addresses and lengths in memory, and a sector within a block of the file.
        guest.memory.write_slice(&[0x77; 513], GuestAddress(DATA + 1)).unwrap();
        guest.offer(1, 5, &[(DATA + 1, 3, 0), (DATA + 4, 509, 0)]);
        guest.ring_doorbell();
        guest.run_until(1);
        let read = DATA + 0x1000;
        guest.offer(0, 4, &[(read + 3, 1001, WRITE), (read + 2001, 535, WRITE)]);
        guest.ring_doorbell();
        guest.run_until(2);
        assert_eq!((guest.status(0), guest.status(1)), (0, 0), "{options}");
        let mut sectors = [0; 1536];
        guest.memory.read_slice(&mut sectors[..1001], GuestAddress(read + 3)).unwrap();
        guest.memory.read_slice(&mut sectors[1001..], GuestAddress(read + 2001)).unwrap();
        assert_eq!(sectors, *[[4; 512], [0x77; 512], [6; 512]].as_flattened(), "{options}");
    }
}

#[test]
fn a_disk_with_a_limit_takes_what_it_allows_and_the_rest_later() {
    for options in ENGINES {
        // Two requests at once, the next one after an hour.
        let limit = "ops_size=2,ops_refill_time=7200000";
        let mut guest = Guest::new(image(), &format!("{options},{limit}"), F_FLUSH);
        (0..6).for_each(|n| _ = guest.offer(0, n, &[(DATA, 512, WRITE)]));
        guest.ring_doorbell();
        guest.run_until(2);
        guest.ring_doorbell();
        guest.thread.run_with_timeout(0).unwrap();
        guest.pause();
        assert_eq!((guest.ring.used_index(), guest.status(2)), (2, UNTOUCHED), "{options}");

        // A flush counts as a request without bytes.
        let limit = "bw_size=512,bw_refill_time=1";
        let mut guest = Guest::new(image(), &format!("{options},{limit}"), F_FLUSH);
        (0..6).for_each(|n| _ = guest.offer(0, n, &[(DATA, 4096, WRITE)]));
        guest.offer(4, 0, &[]);
        guest.ring_doorbell();
        guest.run_until(7);
        assert!((0..7).all(|n| guest.status(n) == 0), "{options}");
    }
}

/// A disk with three queues, in flight with `each` writes of each queue, to sectors of their own.
fn three_queues(file: File, options: &str, features: u64, each: u64) -> Guest {
    let mut guest = Guest::new(file, &format!("{options},num_queues=3"), features);
    guest.memory.write_slice(&[0x77; 512], GuestAddress(DATA)).unwrap();
    for n in 0..3 * each {
        guest.offer_on((n % 3) as usize, 1, n, &[(DATA, 512, 0)]);
    }
    guest
}

#[test]
fn each_queue_gets_its_own_requests_back_before_and_after_a_pause() {
    for options in ENGINES {
        let file = image();
        let mut guest = three_queues(file.try_clone().unwrap(), options, F_FLUSH, 10);
        guest.ring_doorbell();
        guest.thread.run_with_timeout(0).unwrap();
        guest.pause();
        // What was not in flight at the pause is still in its ring.
        let before = guest.completed();
        guest.ring_doorbell();
        guest.thread.run_with_timeout(0).unwrap();
        assert_eq!(guest.completed(), before, "{options}");
        guest.function.resume();
        guest.run_until(30);
        let used = [&guest.ring, &guest.more[0], &guest.more[1]].map(Ring::used_index);
        assert_eq!(used, [10; 3], "{options}");
        assert!((0..30).all(|n| guest.status(n) == 0), "{options}");
        let mut sectors = [0; 31 * 512];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut sectors, 0).unwrap();
        assert!(sectors[..30 * 512].iter().all(|byte| *byte == 0x77), "{options}");
        assert_eq!(sectors[30 * 512], 30);
    }
}

#[test]
fn a_flush_that_fails_fails_the_requests_of_all_queues_that_wait_for_one() {
    // Cannot be flushed, but takes every write.
    let null = || File::options().read(true).write(true).open("/dev/null").unwrap();
    for options in ENGINES {
        let mut guest = three_queues(null(), options, 0, 4);
        guest.ring_doorbell();
        guest.run_until(12);
        assert!((0..12).all(|n| guest.status(n) == 1), "a write that is not durable succeeded");

        let mut guest = three_queues(null(), options, F_FLUSH, 0);
        (0..9).for_each(|n| _ = guest.offer_on(n % 3, 4, 0, &[]));
        guest.ring_doorbell();
        guest.run_until(9);
        assert!((0..9).all(|n| guest.status(n) == 1), "{options}");
    }
}
