//! Measures the throughput of a disk as a guest's driver sees it: `cargo test --release -p vmm --lib --
//! --ignored --nocapture throughput`. The image is a sparse file in the directory for temporary files
//! (`TMPDIR`), in the page cache unless `PERENNIAL_DISK` is `direct=on`. With `PERENNIAL_CONFINED`
//! set, the disk's threads run under the filters that they have in a VM's process. The CPU time of the disk's
//! thread depends less than the throughput on what else the computer does.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberOps};
use rustix::time::{ClockId, clock_gettime};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::bus::BusDevice;
use crate::confine::calls::EVENT_LOOP;
use crate::confine::{self, Call};
use crate::devices::pci::PciFunction;
use crate::devices::virtio::driver::{BAR, Ring, WRITE, resources, start};
use crate::kvm::interrupts::fake::FakeWires;
use crate::kvm::interrupts::pull;

const RAM: usize = 64 << 20;
const DISK: u64 = 256 << 20;
/// Where the data of the requests is, above rings and headers.
const DATA: u64 = 1 << 20;
const RUN: Duration = Duration::from_secs(2);

/// One kind of load: its name, bytes of a request, whether it writes, whether positions are random,
/// requests in flight.
type Load = (&'static str, u32, bool, bool, u16);

const LOADS: [Load; 6] = [
    ("4 KiB random read, depth 1", 4 << 10, false, true, 1),
    ("4 KiB random read, depth 32", 4 << 10, false, true, 32),
    ("4 KiB random write, depth 1", 4 << 10, true, true, 1),
    ("4 KiB random write, depth 32", 4 << 10, true, true, 32),
    ("1 MiB sequential read", 1 << 20, false, false, 2),
    ("1 MiB sequential write", 1 << 20, true, false, 2),
];

/// What this test does beside the disk: duplicates doorbells, and removes the image.
const OF_THE_TEST: &[Call] = &[Call::any(libc::SYS_fcntl), Call::any(libc::SYS_unlink)];

struct Driver {
    _function: VirtioPci<Block>,
    memory: GuestMemoryMmap,
    ring: Ring,
    doorbell: vmm_sys_util::eventfd::EventFd,
    position: u64,
    cpu_time: Arc<CpuTime>,
}

/// The CPU time of the disk's thread, which the thread reads when it is asked.
#[derive(Debug, Default)]
struct CpuTime {
    asked: AtomicBool,
    nanoseconds: AtomicU64,
}

impl CpuTime {
    fn answer(&self) {
        if self.asked.load(Ordering::Acquire) {
            let time = clock_gettime(ClockId::ThreadCPUTime);
            let nanoseconds = time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64;
            self.nanoseconds.store(nanoseconds, Ordering::Relaxed);
            self.asked.store(false, Ordering::Release);
        }
    }
}

impl Driver {
    fn new(file: File, path: &std::path::Path) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
        // So that the host has the pages.
        memory.write_slice(&vec![0; RAM], GuestAddress(0)).unwrap();
        let wires = Arc::new(FakeWires::default());
        let resources = resources(&memory, &wires);
        let identity = Identity::of(&file).unwrap();
        let text = ["path=bench,image_type=raw", &disk_options()].join(",");
        let options = BlockOptions::parse(text.trim_end_matches(','), 1).unwrap();
        let cached =
            options.direct.then(|| File::options().read(true).write(true).open(path).unwrap());
        let image = Image { file, cached, identity, options };
        // rustix looks for the clock's vDSO at the first call, in a way that the filters do not allow.
        let _ = clock_gettime(ClockId::ThreadCPUTime);
        if is_confined() {
            let report = confine::Report { socket: 2, before: "", after: "\n" };
            let lists =
                [&[EVENT_LOOP, calls::CALLS.build, OF_THE_TEST], calls::CALLS.thread].concat();
            assert!(confine::filter(&lists, report).is_none());
        }
        let block = Block::new(image, "bench-0").unwrap();
        let mut function = VirtioPci::new(block, resources).unwrap();
        let worker = function.worker();
        let cpu_time = Arc::new(CpuTime::default());
        let of_thread = cpu_time.clone();
        std::thread::spawn(move || {
            if is_confined() {
                confine::thread(&[&[EVENT_LOOP], calls::CALLS.thread].concat());
            }
            let mut thread = EventManager::new().unwrap();
            thread.add_subscriber(worker);
            loop {
                thread.run().unwrap();
                of_thread.answer();
            }
        });
        let ring = Ring::new(&memory, 0x4000, QUEUE_SIZE);
        function.write_config(4, &6_u16.to_le_bytes());
        start(&ring, F_FLUSH, |at, bytes| function.write(at, bytes));
        let mut status = [0];
        function.read(0x14, &mut status);
        assert_eq!(status, [15]);
        let doorbells = wires.doorbells.lock().unwrap();
        let doorbell = doorbells[&(u64::from(BAR) + 0x3000)].try_clone().unwrap();
        drop(doorbells);
        Self { _function: function, memory, ring, doorbell, position: 1, cpu_time }
    }

    /// Offers one request, with its data in 4 KiB pieces as a guest's pages are.
    fn offer(&mut self, number: u64, (_, bytes, write, random, _): Load) {
        let blocks = DISK / u64::from(bytes);
        self.position = match random {
            // A linear congruential generator, by Knuth.
            true => {
                self.position.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040)
            }
            false => self.position + 1,
        };
        let block = if random { self.position >> 33 } else { self.position } % blocks;
        let slot = number % 64;
        let (header, status) = (0x10000 + slot * 16, 0x20000 + slot);
        let mut bytes_of_header = [0; 16];
        bytes_of_header[0] = u8::from(write);
        let sector = block * u64::from(bytes) / 512;
        bytes_of_header[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory.write_slice(&bytes_of_header, GuestAddress(header)).unwrap();
        let pieces = u64::from(bytes / 4096).min(60);
        let piece = bytes / pieces as u32 / 512 * 512;
        let flags = if write { 0 } else { WRITE };
        let data = DATA + slot % (RAM as u64 / 2 / u64::from(bytes)) * u64::from(bytes);
        let mut parts = vec![(header, 16, 0)];
        for n in 0..pieces {
            let last = n + 1 == pieces;
            let len = if last { bytes - piece * (pieces - 1) as u32 } else { piece };
            parts.push((data + n * u64::from(piece), len, flags));
        }
        parts.push((status, 1, WRITE));
        self.ring.offer(&parts);
    }

    /// The CPU time of the disk's thread so far, in nanoseconds.
    fn cpu_time(&self) -> u64 {
        self.cpu_time.asked.store(true, Ordering::Release);
        pull(&self.doorbell);
        while self.cpu_time.asked.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        self.cpu_time.nanoseconds.load(Ordering::Relaxed)
    }

    /// Requests a second, and nanoseconds of the disk's thread for each.
    fn measure(&mut self, load: Load) -> (f64, f64) {
        let before = self.cpu_time();
        let first = self.ring.used_index();
        let (start, mut offered, mut done) = (Instant::now(), 0u64, 0u64);
        while start.elapsed() < RUN || done < offered {
            if start.elapsed() < RUN {
                let room = u64::from(load.4) - (offered - done);
                for _ in 0..room {
                    self.offer(offered, load);
                    offered += 1;
                }
                if room > 0 {
                    pull(&self.doorbell);
                }
            }
            let seen = self.ring.used_index().wrapping_sub(first).wrapping_sub(done as u16);
            done += u64::from(seen);
            let stuck = start.elapsed() > 3 * RUN;
            assert!(!stuck, "no answer: {done} of {offered}, {seen} {:?}", self.ring.used_index());
            if seen == 0 {
                std::thread::yield_now();
            }
        }
        let rate = done as f64 / start.elapsed().as_secs_f64();
        (rate, (self.cpu_time() - before) as f64 / done as f64)
    }
}

fn is_confined() -> bool {
    std::env::var_os("PERENNIAL_CONFINED").is_some()
}

fn disk_options() -> String {
    std::env::var("PERENNIAL_DISK").unwrap_or_default()
}

#[test]
#[ignore = "measures, and takes 15 s"]
fn throughput() {
    use std::os::unix::fs::FileExt;
    let file = tempfile::NamedTempFile::new().unwrap();
    for at in 0..DISK >> 20 {
        file.as_file().write_all_at(&vec![at as u8; 1 << 20], at << 20).unwrap();
    }
    file.as_file().sync_all().unwrap();
    let mut options = File::options();
    options.read(true).write(true);
    if disk_options().contains("direct=on") {
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_DIRECT);
    }
    let mut driver = Driver::new(options.open(file.path()).unwrap(), file.path());
    for load in LOADS {
        let (rate, cpu) = driver.measure(load);
        let mib = rate * f64::from(load.1) / f64::from(1 << 20);
        println!("{:30} {rate:10.0} requests/s {mib:8.1} MiB/s {cpu:8.0} ns of CPU each", load.0);
    }
}
