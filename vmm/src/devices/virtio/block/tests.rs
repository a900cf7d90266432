//! A disk, asked for what a driver asks and for what none should.

use std::io::Write;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use rustix::fs::{MemfdFlags, memfd_create};
use tempfile::NamedTempFile;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::request::{Clear, How, Status, Task};
use super::*;
use crate::devices::virtio::driver::{INDIRECT, NEXT, Part, Ring, WRITE, ram};
use crate::state::Persist;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// What the status byte is before the device writes it.
const UNTOUCHED: u8 = 0xee;

/// Where these tests have the parts of a request in guest memory.
const HEADER: u64 = 0x1_0000;
const STATUS: u64 = 0x1_8000;
const DATA: u64 = 0x2_0000;

const HEADER_PART: Part = (HEADER, 16, 0);
const STATUS_PART: Part = (STATUS, 1, WRITE);

const SECTORS: u64 = 8;

/// A file of [`SECTORS`] sectors, each byte of which is the number of its sector.
fn image() -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    (0..SECTORS).for_each(|sector| file.write_all(&[sector as u8; 512]).unwrap());
    file
}

fn opened(file: File, readonly: bool, path: &str) -> Image {
    let identity = Identity::File { file_system: 1, inode: 2, born: None };
    let options = BlockOptions { path: path.into(), readonly, ..BlockOptions::default() };
    Image { file, cached: None, identity, options }
}

fn disk(file: &NamedTempFile, readonly: bool) -> Image {
    opened(file.reopen().unwrap(), readonly, "/a/disk")
}

/// A disk on which every read ends at once, every write succeeds, and making it durable fails.
fn null() -> Image {
    let file = File::options().read(true).write(true).open("/dev/null").unwrap();
    opened(file, false, "/dev/null")
}

struct Guest {
    image: NamedTempFile,
    block: Block,
    memory: GuestMemoryMmap,
    ring: Ring,
    queue: Queue,
    /// What the device is to discard or to zero.
    cleared: Vec<Clear>,
}

impl Guest {
    /// A guest whose driver knows FLUSH.
    fn new(readonly: bool) -> Self {
        let image = image();
        let mut block = Block::new(disk(&image, readonly), "a-vm-0").unwrap();
        block.negotiated(F_FLUSH);
        let memory = ram();
        let ring = Ring::new(&memory, 0x4000, 256);
        let mut queue = Queue::new(QUEUE_SIZE).unwrap();
        let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
        let (low, high) = halves(ring.descriptors());
        queue.set_desc_table_address(low, high);
        let (low, high) = halves(ring.available());
        queue.set_avail_ring_address(low, high);
        let (low, high) = halves(ring.used());
        queue.set_used_ring_address(low, high);
        queue.set_ready(true);
        assert!(queue.is_valid(&memory));
        Self { image, block, memory, ring, queue, cleared: Vec::new() }
    }

    /// What the device and its worker share, while there is no worker.
    fn inside(&mut self) -> &mut Shared {
        Arc::get_mut(&mut self.block.0).unwrap()
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn put_header(&self, kind: u32, sector: u64) {
        self.put(HEADER, &kind.to_le_bytes());
        self.put(HEADER + 4, &[0xab; 4]);
        self.put(HEADER + 8, &sector.to_le_bytes());
        self.put(STATUS, &[UNTOUCHED]);
    }

    /// Has the device execute one chain. Gives the length that it reports as written.
    fn execute(&mut self, parts: &[Part]) -> u32 {
        self.ring.offer(parts);
        let memory = Arc::new(self.memory.clone());
        let chain = self.queue.iter(memory.clone()).unwrap().next().unwrap();
        let disk = &*self.block.0;
        let Some((answer, task)) = request::parse(disk, &memory, chain) else { return 0 };
        let (done, written) = match task {
            Task::Done(status, written) => return answer.give(&memory, status, written),
            Task::Flush => (flush(disk), 0),
            Task::Clear(clear) => {
                self.cleared.push(clear);
                (Ok(()), 0)
            }
            Task::Transfer(mut transfer) => {
                let mut move_all = || {
                    while !transfer.advance(transfer.step(&disk.image, 0)?)? {}
                    // As the worker has it.
                    match transfer.write && !disk.driver_flushes.load(Ordering::Relaxed) {
                        true => flush(disk),
                        false => Ok(()),
                    }
                };
                (move_all(), if transfer.write { 0 } else { transfer.bytes })
            }
        };
        match done {
            Ok(()) => answer.give(&memory, Status::Ok, written),
            Err(_) => answer.give(&memory, Status::IoError, 0),
        }
    }

    /// A request as Linux makes it: header, data, and the status in a descriptor of its own.
    fn request(&mut self, kind: u32, sector: u64, data: &[Part]) -> (u8, u32) {
        self.put_header(kind, sector);
        let written = self.execute(&[&[HEADER_PART], data, &[STATUS_PART]].concat());
        (self.get(STATUS, 1)[0], written)
    }

    fn on_disk(&self) -> Vec<u8> {
        std::fs::read(self.image.path()).unwrap()
    }
}

fn original() -> Vec<u8> {
    (0..SECTORS).flat_map(|sector| [sector as u8; 512]).collect()
}

fn flush(disk: &Shared) -> std::io::Result<()> {
    if disk.image.options.readonly { Ok(()) } else { disk.image.file.sync_data() }
}

#[test]
fn a_read_gives_what_is_on_the_disk() {
    let mut guest = Guest::new(false);
    assert_eq!(guest.request(IN, 3, &[(DATA, 1024, WRITE)]), (OK, 1025));
    assert_eq!(guest.get(DATA, 1024), [[3; 512], [4; 512]].concat());
    assert_eq!(guest.get(DATA + 1024, 1), [0], "and nothing behind it");
    assert_eq!(guest.request(IN, 0, &[(DATA, 4096, WRITE)]), (OK, 4097));
    assert_eq!(guest.get(DATA, 4096), original());
}

#[test]
fn a_write_is_on_the_disk_when_it_is_complete() {
    let mut guest = Guest::new(false);
    guest.put(DATA, &[0x77; 1024]);
    assert_eq!(guest.request(OUT, 6, &[(DATA, 1024, 0)]), (OK, 1));
    let mut expected = original();
    expected[6 * 512..].fill(0x77);
    assert_eq!(guest.on_disk(), expected);
}

#[test]
fn a_request_for_no_sector_at_all_succeeds() {
    let mut guest = Guest::new(false);
    assert_eq!(guest.request(IN, SECTORS, &[]), (OK, 1));
    assert_eq!(guest.request(OUT, 0, &[]), (OK, 1));
    assert_eq!(guest.on_disk(), original());
}

#[test]
fn the_status_may_end_the_last_buffer() {
    let mut guest = Guest::new(false);
    guest.put_header(IN, 5);
    guest.put(DATA, &[UNTOUCHED; 514]);
    assert_eq!(guest.execute(&[HEADER_PART, (DATA, 513, WRITE)]), 513);
    assert_eq!(guest.get(DATA, 514), [&[5; 512][..], &[OK, UNTOUCHED]].concat());
}

#[test]
fn a_request_without_place_for_its_status_is_not_executed() {
    let mut guest = Guest::new(false);
    guest.put_header(OUT, 0);
    guest.put(DATA, &[0x77; 512]);
    assert_eq!(guest.execute(&[HEADER_PART, (DATA, 512, 0)]), 0);
    assert_eq!(guest.execute(&[HEADER_PART, (DATA, 512, 0), (0x9_0000, 1, WRITE)]), 0);
    assert_eq!(guest.execute(&[HEADER_PART, (DATA, 512, 0), (STATUS, 0, WRITE)]), 0);
    assert_eq!(guest.on_disk(), original());
}

#[test]
fn a_header_that_is_too_short_is_an_error() {
    let mut guest = Guest::new(false);
    for len in [0, 1, 15] {
        guest.put_header(IN, 0);
        assert_eq!(guest.execute(&[(HEADER, len, 0), (DATA, 512, WRITE), STATUS_PART]), 0);
        assert_eq!(guest.get(STATUS, 1), [IOERR]);
        assert_eq!(guest.get(DATA, 512), [0; 512]);
    }
}

#[test]
fn data_that_is_not_whole_sectors_is_an_error_and_moves_nothing() {
    let mut guest = Guest::new(false);
    guest.put(DATA, &[0x77; 1024]);
    for len in [1, 511, 513, 1023] {
        assert_eq!(guest.request(OUT, 0, &[(DATA, len, 0)]), (IOERR, 1), "{len}");
        assert_eq!(guest.request(IN, 0, &[(DATA, len, WRITE)]), (IOERR, 0), "{len}");
    }
    assert_eq!(guest.get(DATA, 1024), [0x77; 1024]);
    assert_eq!(guest.on_disk(), original());
    // It is the whole that counts, and the place in memory does not.
    assert_eq!(guest.request(OUT, 0, &[(DATA + 3, 511, 0), (DATA, 513, 0)]), (OK, 1));
}

#[test]
fn what_reaches_beyond_the_end_is_an_error_and_moves_nothing() {
    let mut guest = Guest::new(false);
    guest.put(DATA, &[0x77; 1024]);
    let far = [SECTORS - 1, SECTORS, SECTORS + 1, u64::MAX / 512, u64::MAX - 1, u64::MAX];
    for sector in far {
        assert_eq!(guest.request(OUT, sector, &[(DATA, 1024, 0)]), (IOERR, 1), "{sector:#x}");
        assert_eq!(guest.request(IN, sector, &[(DATA, 1024, WRITE)]), (IOERR, 0), "{sector:#x}");
    }
    // Numbers that would be small again as bytes in 64 bits.
    for sector in [1 << 55, 1 << 56 | 1, 1 << 63] {
        assert_eq!(guest.request(IN, sector, &[(DATA, 512, WRITE)]), (IOERR, 0), "{sector:#x}");
    }
    assert_eq!(guest.get(DATA, 1024), [0x77; 1024]);
    assert_eq!(guest.on_disk(), original());
}

#[test]
fn the_last_sector_of_the_largest_disk_can_be_read() {
    let mut guest = Guest::new(false);
    let fd = rustix::fs::memfd_create("huge", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let bytes = i64::MAX as u64 / 4096 * 4096;
    rustix::fs::ftruncate(&fd, bytes).unwrap();
    let huge = opened(fd.into(), false, "huge");
    guest.block = Block::new(huge, "huge").unwrap();
    let last = bytes / 512 - 1;
    guest.put(DATA, &[0x77; 512]);
    assert_eq!(guest.request(IN, last, &[(DATA, 512, WRITE)]), (OK, 513));
    assert_eq!(guest.get(DATA, 512), [0; 512]);
    assert_eq!(guest.request(IN, last + 1, &[(DATA, 512, WRITE)]), (IOERR, 0));
}

#[test]
fn the_identification_is_20_bytes() {
    let mut guest = Guest::new(false);
    let id = *b"a-vm-0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    guest.put(DATA, &[UNTOUCHED; 32]);
    assert_eq!(guest.request(GET_ID, 0, &[(DATA, 20, WRITE)]), (OK, 21));
    assert_eq!(guest.get(DATA, 21), [&id[..], &[UNTOUCHED]].concat());
    // Of a longer buffer only 20 bytes are written, so the status does not count.
    assert_eq!(guest.request(GET_ID, 9, &[(DATA, 1, WRITE), (DATA + 1, 31, WRITE)]), (OK, 20));
    assert_eq!(guest.get(DATA, 21), [&id[..], &[UNTOUCHED]].concat());
    assert_eq!(guest.request(GET_ID, 0, &[(DATA, 19, WRITE)]), (IOERR, 0));
}

#[test]
fn an_image_in_another_format_is_refused_unless_it_is_said_to_be_raw() {
    let file = image();
    file.as_file().write_all_at(b"QFI\xfb\0\0\0\x03", 0).unwrap();
    let refused = Block::new(disk(&file, false), "a-vm-0").unwrap_err().to_string();
    assert!(refused.starts_with("the disk /a/disk is a qcow2 image"), "{refused}");
    assert!(refused.contains("image_type=raw"), "{refused}");
    let mut image = disk(&file, false);
    image.options.raw = true;
    let block = Block::new(image, "a-vm-0").unwrap();
    // What the guest wrote while it ran does not keep it from being restored.
    Block::restore(block.save().unwrap(), disk(&file, false)).unwrap();
}

#[test]
fn other_requests_are_not_supported() {
    let mut guest = Guest::new(false);
    for kind in [2, 3, 5, 7, 9, 12, 14, 0x8000_0000, u32::MAX] {
        assert_eq!(guest.request(kind, 0, &[(DATA, 512, 0)]), (UNSUPP, 1), "{kind}");
    }
    assert_eq!(guest.on_disk(), original());
}

const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// The range that a discard or a write-zeroes names.
fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let fields = u128::from(sector) | u128::from(sectors) << 64 | u128::from(flags) << 96;
    fields.to_le_bytes()
}

#[test]
fn a_host_that_cannot_unmap_zeroes_without_that() {
    let clear = |how| Clear { how, offset: 1024, bytes: 1536 };
    let unsupported = std::io::Error::from_raw_os_error(libc::EOPNOTSUPP);
    let full = std::io::Error::from_raw_os_error(libc::ENOSPC);
    let unmapping = clear(How::ZeroAndUnmap);
    assert_eq!(unmapping.instead(&unsupported), Some(clear(How::Zero)));
    assert_eq!(unmapping.instead(&full), None);
    for other in [How::Zero, How::Discard] {
        assert_eq!(clear(other).instead(&unsupported), None, "{other:?}");
    }
}

#[test]
fn a_discard_and_a_write_of_zeroes_name_one_range_of_the_disk() {
    for (kind, flags, how) in [
        (DISCARD, 0, How::Discard),
        (WRITE_ZEROES, 0, How::Zero),
        (WRITE_ZEROES, 1, How::ZeroAndUnmap),
    ] {
        let mut guest = Guest::new(false);
        guest.put(DATA, &range(2, 3, flags));
        assert_eq!(guest.request(kind, 99, &[(DATA, 5, 0), (DATA + 5, 11, 0)]), (OK, 1));
        assert_eq!(guest.cleared, [Clear { how, offset: 1024, bytes: 1536 }]);
        guest.put(DATA, &range(SECTORS, 0, flags));
        assert_eq!(guest.request(kind, 0, &[(DATA, 16, 0)]), (OK, 1), "of nothing");

        for (sector, sectors) in
            [(SECTORS, 1), (0, SECTORS as u32 + 1), (u64::MAX, 1), (1 << 55, 1), (0, u32::MAX)]
        {
            guest.put(DATA, &range(sector, sectors, flags));
            assert_eq!(guest.request(kind, 0, &[(DATA, 16, 0)]), (IOERR, 1), "{sector}, {sectors}");
        }
        // No range, a part of one, more than one.
        for len in [0, 1, 15, 17, 32] {
            assert_eq!(guest.request(kind, 0, &[(DATA, len, 0)]), (IOERR, 1), "{len}");
        }
        for flags in if kind == DISCARD { [1, 2] } else { [2, 0x8000_0000] } {
            guest.put(DATA, &range(0, 1, flags));
            assert_eq!(guest.request(kind, 0, &[(DATA, 16, 0)]), (UNSUPP, 1), "{flags}");
        }
        assert_eq!(guest.cleared.len(), 1);
        let mut guest = Guest::new(true);
        guest.put(DATA, &range(0, 1, flags));
        assert_eq!(guest.request(kind, 0, &[(DATA, 16, 0)]), (IOERR, 1), "read-only");
        assert_eq!(guest.block.features() & (F_DISCARD | F_WRITE_ZEROES), 0);
    }
}

#[test]
fn discards_are_offered_for_storage_that_can_discard_only() {
    let can = F_DISCARD | F_WRITE_ZEROES;
    let offered = |image: Image, label| Block::new(image, label).unwrap().features() & can;
    let file = image();
    assert_eq!(offered(disk(&file, false), "a-vm-0"), can);
    // A file takes no ioctl of a block device, as a device without discards does not.
    let (major, minor, serial) = (254, 16, String::new());
    let identity = Identity::BlockDevice { major, minor, serial, unit: None, others: Vec::new() };
    let device = Image { identity, ..disk(&file, false) };
    assert_eq!(offered(device, "a-vm-1"), F_WRITE_ZEROES);
}

#[test]
fn a_disk_has_as_many_queues_as_its_options_say() {
    let file = image();
    let mut image = disk(&file, false);
    image.options.more_queues = 3;
    let block = Block::new(image, "a-vm-0").unwrap();
    assert_eq!(block.queue_sizes(), [256; 4]);
    assert_ne!(block.features() & F_MQ, 0);
    assert_eq!(block.config()[34], 4);
    assert_eq!(Guest::new(false).block.features() & F_MQ, 0);
}

#[test]
fn a_read_only_disk_says_so_and_is_not_written() {
    let mut guest = Guest::new(true);
    assert_eq!(guest.block.features() & F_RO, F_RO);
    assert_eq!(Guest::new(false).block.features() & F_RO, 0);
    guest.put(DATA, &[0x77; 512]);
    assert_eq!(guest.request(OUT, 0, &[(DATA, 512, 0)]), (IOERR, 1));
    assert_eq!(guest.on_disk(), original());
    assert_eq!(guest.request(IN, 1, &[(DATA, 512, WRITE)]), (OK, 513));
    assert_eq!(guest.request(FLUSH, 0, &[]), (OK, 1));
    // Nothing to make durable.
    let storage = guest.block.storage().unwrap();
    storage.begin_sync();
    storage.end_sync(std::time::Instant::now()).unwrap();
}

#[test]
fn a_chain_with_a_wrong_descriptor_is_an_error_and_moves_nothing() {
    let wrong: [&[Part]; 6] = [
        // What the device reads, behind what it writes.
        &[(DATA, 512, WRITE), (DATA, 512, 0)],
        // Outside RAM, across its end, across the hole in it, around the end of all addresses.
        &[(DATA, 512, 0), (0x9_0000, 512, 0)],
        &[(DATA, 512, 0), (0x10_ff00, 512, 0)],
        &[(0x7_ff00, 0x8_0200, 0)],
        &[(u64::MAX - 511, 512, 0)],
        &[(DATA, 512, 0), (u64::MAX - 10, 512, 0)],
    ];
    for parts in wrong {
        let mut guest = Guest::new(false);
        guest.put(DATA, &[0x77; 512]);
        assert_eq!(guest.request(OUT, 0, parts), (IOERR, 0), "{parts:x?}");
        let writable: Vec<Part> = parts.iter().map(|(at, len, _)| (*at, *len, WRITE)).collect();
        if parts[0].2 != WRITE {
            assert_eq!(guest.request(IN, 0, &writable), (IOERR, 0), "{parts:x?}");
        }
        assert_eq!(guest.get(DATA, 512), [0x77; 512]);
        assert_eq!(guest.on_disk(), original());
    }
}

#[test]
fn empty_descriptors_are_passed_over() {
    let mut guest = Guest::new(false);
    let data = [(u64::MAX, 0, 0), (DATA, 512, WRITE), (0, 0, WRITE), (DATA, 0, 0)];
    assert_eq!(guest.request(IN, 2, &data), (OK, 513));
    assert_eq!(guest.get(DATA, 512), [2; 512]);
}

#[test]
fn a_chain_is_no_longer_than_the_queue() {
    let mut guest = Guest::new(false);
    for (descriptors, status, sector) in [(256, OK, 1), (257, IOERR, 0)] {
        // Two for the header and the status; the rest of the data in pieces of two bytes.
        let table = 0x3_0000;
        let pieces = descriptors - 2;
        let first = 1024 - 2 * (pieces - 1);
        guest.put(DATA, &[0; 1024]);
        guest.put_header(IN, 1);
        guest.ring.describe(table, 0, (HEADER, 16, NEXT), 1);
        for piece in 0..pieces {
            let (at, len) = if piece == 0 { (0, first) } else { (first + 2 * (piece - 1), 2) };
            let part = (DATA + u64::from(at), len, WRITE | NEXT);
            guest.ring.describe(table, piece as u16 + 1, part, piece as u16 + 2);
        }
        guest.ring.describe(table, descriptors as u16 - 1, STATUS_PART, 0);
        guest.execute(&[(table, 16 * descriptors, INDIRECT)]);
        assert_eq!(guest.get(DATA, 512), [sector; 512], "{descriptors} descriptors");
        // Of a chain that is cut the last byte is the status.
        let place = if status == OK { STATUS } else { DATA + 1023 };
        assert_eq!(guest.get(place, 1), [status]);
    }
}

#[test]
fn a_request_that_would_take_for_ever_is_an_error() {
    let mut guest = Guest::new(false);
    // Gives as much as is asked for.
    guest.inside().image.file = File::open("/dev/zero").unwrap();
    guest.inside().sectors = AtomicU64::new(1 << 40);
    for (more, status) in [(0, OK), (512, IOERR)] {
        let largest: Vec<Part> = (0..SEG_MAX)
            .map(|n| (DATA, if n == 0 { SIZE_MAX + more } else { SIZE_MAX }, WRITE))
            .collect();
        assert_eq!(guest.request(IN, 0, &largest).0, status, "{more} bytes more");
    }
}

#[test]
fn flush_makes_the_disk_durable_and_says_if_it_could_not() {
    let mut guest = Guest::new(false);
    assert_eq!(guest.request(FLUSH, 0, &[]), (OK, 1));
    guest.inside().image = null();
    assert_eq!(guest.request(FLUSH, 0, &[]), (IOERR, 1));
    assert_ne!(guest.block.features() & F_FLUSH, 0);
}

#[test]
fn a_write_is_durable_at_once_for_a_driver_that_does_not_know_flush() {
    let mut guest = Guest::new(false);
    guest.inside().image = null();
    assert_eq!(guest.request(OUT, 0, &[(DATA, 512, 0)]), (OK, 1), "FLUSH would come later");
    guest.block.negotiated(0);
    assert_eq!(guest.request(OUT, 0, &[(DATA, 512, 0)]), (IOERR, 1), "it could not be made so");
    guest.inside().image = disk(&guest.image, false);
    assert_eq!(guest.request(OUT, 0, &[(DATA, 512, 0)]), (OK, 1));
}

#[test]
fn an_error_of_the_disk_is_an_error_of_the_request() {
    let mut guest = Guest::new(false);
    // Opened in another mode than was said.
    guest.inside().image.file = File::open(guest.image.path()).unwrap();
    assert_eq!(guest.request(OUT, 0, &[(DATA, 512, 0)]), (IOERR, 1));
    // No space left.
    guest.inside().image.file = File::options().write(true).open("/dev/full").unwrap();
    assert_eq!(guest.request(OUT, 0, &[(DATA, 512, 0)]), (IOERR, 1));
    assert_eq!(guest.request(IN, 0, &[(DATA, 512, WRITE)]), (IOERR, 0));
    // Cut short under the guest, in the middle of a request.
    guest.inside().image = disk(&guest.image, false);
    guest.image.as_file().set_len(512).unwrap();
    assert_eq!(guest.request(IN, 0, &[(DATA, 1024, WRITE)]), (IOERR, 0));
    assert_eq!(guest.request(IN, 0, &[(DATA, 512, WRITE)]), (OK, 513));
}

#[test]
fn the_configuration_has_the_size_of_the_disk_and_of_its_requests() {
    let mut guest = Guest::new(false);
    let read = |guest: &Guest, at| {
        let mut data = [0xff; 8];
        guest.block.read_config(at, &mut data);
        u64::from_le_bytes(data)
    };
    guest.block.write_config(0, &[0xff; 24]);
    assert_eq!(read(&guest, 0), SECTORS);
    assert_eq!(read(&guest, 8), 254 << 32 | 128 << 10);
    assert_eq!(read(&guest, 20), 512);
    assert_eq!(read(&guest, 24), 0, "no topology is told");
    assert_eq!(read(&guest, 32), (65_024 << 32) | (1 << 16), "one queue");
    assert_eq!(read(&guest, 40), 1 << 32 | 1);
    assert_eq!(read(&guest, 48), 1 << 32 | 65_024);
    assert_eq!(read(&guest, 56), 1);
    assert_eq!(read(&guest, 0xfff), 0);
    assert_eq!(guest.block.queue_sizes(), [256]);
}

#[test]
fn a_file_that_is_not_whole_sectors_is_no_disk() {
    let file = NamedTempFile::new().unwrap();
    for len in [0, 1, 511, 513] {
        file.as_file().set_len(len).unwrap();
        let error = Block::new(disk(&file, false), "id").unwrap_err();
        let expected = format!("the disk /a/disk has {len} bytes");
        assert!(error.to_string().starts_with(&expected), "{error}");
    }
    let (pipe, _other_end) = std::io::pipe().unwrap();
    let file = File::from(std::os::fd::OwnedFd::from(pipe));
    let disk = opened(file, false, "/a/pipe");
    let error = Block::new(disk, "id").unwrap_err();
    assert_eq!(error.to_string(), "cannot read the size of the disk /a/pipe");
}

#[test]
fn a_disk_goes_on_as_what_it_was() {
    let mut before = Guest::new(false);
    before.put(DATA, &[0x77; 512]);
    assert_eq!(before.request(OUT, 7, &[(DATA, 512, 0)]), (OK, 1));
    let state = before.block.save().unwrap();
    assert_eq!(state, before.block.save().unwrap());
    let mut after = Guest::new(false);
    after.block = Block::restore(state.clone(), disk(&before.image, false)).unwrap();
    assert_eq!(after.block.save().unwrap(), state);
    assert_eq!(after.request(IN, 7, &[(DATA, 512, WRITE)]), (OK, 513));
    assert_eq!(after.get(DATA, 512), [0x77; 512]);
    assert_eq!(after.request(GET_ID, 0, &[(DATA, 20, WRITE)]), (OK, 21));
    assert_eq!(after.get(DATA, 6), b"a-vm-0");
    // Until the transport says what was negotiated, the safe side.
    after.inside().image = null();
    assert_eq!(after.request(OUT, 0, &[(DATA, 512, 0)]), (IOERR, 1));
}

#[test]
fn another_disk_after_an_update_is_refused_by_its_name() {
    let guest = Guest::new(false);
    let state = guest.block.save().unwrap();
    for len in [0, 512, SECTORS * 512 - 512, SECTORS * 512 - 1] {
        guest.image.as_file().set_len(len).unwrap();
        let error = Block::restore(state.clone(), disk(&guest.image, false)).unwrap_err();
        let expected =
            format!("the disk /a/disk had 4096 bytes before the update and has only {len} now");
        assert!(error.to_string().starts_with(&expected), "{error}");
    }
    guest.image.as_file().set_len(SECTORS * 512).unwrap();
    Block::restore(state.clone(), disk(&guest.image, false)).unwrap();

    let error = Block::restore(state.clone(), disk(&guest.image, true)).unwrap_err().to_string();
    assert_eq!(error, "the disk /a/disk was writable before the update and is read-only now");
    let readonly = VirtioBlkStateV4 { readonly: true, ..state.clone() };
    let error = Block::restore(readonly, disk(&guest.image, false)).unwrap_err().to_string();
    assert_eq!(error, "the disk /a/disk was read-only before the update and is writable now");
    let mut another = disk(&guest.image, false);
    another.identity = Identity::File { file_system: 1, inode: 3, born: None };
    let error = Block::restore(state.clone(), another).unwrap_err().to_string();
    assert!(error.contains("/a/disk was the file with inode 2 on file system 1"), "{error}");
    assert!(error.contains("is the file with inode 3 on file system 1 now"), "{error}");
    // A copy that was put in the place of the image, and got its inode number.
    let made_at = |born: &str| {
        let born = Some(born.to_owned());
        Image {
            identity: Identity::File { file_system: 1, inode: 2, born },
            ..disk(&guest.image, false)
        }
    };
    let born = Block::restore(state.clone(), made_at("5.000000000")).unwrap().save().unwrap();
    let error = Block::restore(born, made_at("6.000000000")).unwrap_err().to_string();
    assert!(error.contains("made at 5.000000000") && error.contains("made at 6.0"), "{error}");
    // On tmpfs the ID of the file system tells nothing.
    let mut renumbered = disk(&guest.image, false);
    renumbered.file = memfd_create("image", MemfdFlags::CLOEXEC).unwrap().into();
    renumbered.file.set_len(SECTORS * 512).unwrap();
    renumbered.identity = Identity::File { file_system: 7, inode: 2, born: None };
    Block::restore(state, renumbered).unwrap();
}

#[test]
fn a_disk_that_grew_during_an_update_is_larger_for_the_guest_which_is_told_once() {
    let guest = Guest::new(false);
    let state = guest.block.save().unwrap();
    guest.image.as_file().set_len(SECTORS * 512 + 512 + 100).unwrap();
    let mut block = Block::restore(state, disk(&guest.image, false)).unwrap();
    let mut capacity = [0; 8];
    block.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), SECTORS + 1);
    assert_eq!((block.resumed(), block.resumed()), (true, false));
    assert_eq!(block.save().unwrap().capacity_sectors, SECTORS + 1);
    assert!(!Block::new(disk(&guest.image, false), "a").is_ok_and(|mut block| block.resumed()));
}

/// Cuts `len` bytes from `start` on into descriptors at `cuts`.
fn pieces(start: u64, len: u64, cuts: &[u64], flags: u16) -> Vec<Part> {
    let mut ends: Vec<u64> = cuts.iter().map(|cut| cut % (len + 1)).chain([0, len]).collect();
    ends.sort_unstable();
    let piece = |pair: &[u64]| (start + pair[0], (pair[1] - pair[0]) as u32, flags);
    ends.windows(2).map(piece).collect()
}

proptest! {
    #[test]
    fn a_request_means_the_same_however_it_is_cut(
        write: bool,
        sector in 0..SECTORS - 1,
        read_cuts in prop::collection::vec(any::<u64>(), 0..20),
        write_cuts in prop::collection::vec(any::<u64>(), 0..20),
    ) {
        let mut guest = Guest::new(false);
        guest.put_header(if write { OUT } else { IN }, sector);
        // One run of bytes for each direction: header and data; data and status.
        guest.put(HEADER + 16, &[0x77; 1024]);
        guest.put(DATA, &[UNTOUCHED; 1025]);
        let (readable, writable) = if write { (16 + 1024, 1) } else { (16, 1024 + 1) };
        let mut parts = pieces(HEADER, readable, &read_cuts, 0);
        parts.extend(pieces(DATA, writable, &write_cuts, WRITE));
        let written = guest.execute(&parts);
        let mut sectors = vec![0; 1024];
        guest.image.as_file().read_exact_at(&mut sectors, sector * 512).unwrap();
        prop_assert_eq!(u64::from(written), writable);
        if write {
            prop_assert_eq!(sectors, [0x77; 1024]);
            prop_assert_eq!(guest.get(DATA, 2), [OK, UNTOUCHED]);
        } else {
            prop_assert_eq!(guest.get(DATA, 1025), [&sectors[..], &[OK]].concat());
        }
    }
}
