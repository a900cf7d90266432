//! The threads of the workload, and the numbers that they report in the heartbeat.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use perennial_tests::workload::counter::Counter;
use perennial_tests::workload::disk::{self, BLOCK, Block, Record};
use perennial_tests::workload::kernel_log::complaint;
use perennial_tests::workload::memory::{Memory, WORDS};
use rustix::fs::OFlags;
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::clocks;
use crate::console::Console;
use crate::settings::Settings;

/// Steps between two checks of the registers: about a millisecond under emulation.
const STRETCH: u64 = 50_000;

/// The file of the entropy device.
const ENTROPY: &str = "/dev/hwrng";

/// Number of pages that are verified before the thread yields.
const PAGES: usize = 256;

/// A number that one thread sets and the heartbeat reads.
#[derive(Debug, Default)]
pub(crate) struct Gauge(AtomicU64);

impl Gauge {
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
    fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }
    pub(crate) fn add(&self, value: u64) {
        self.0.fetch_add(value, Ordering::Relaxed);
    }
}

/// The progress and the errors of all workers.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    counters: Vec<Gauge>,
    pub(crate) cpu_errors: Gauge,
    pub(crate) memory_passes: Gauge,
    pub(crate) memory_errors: Gauge,
    pub(crate) disk_seq: Gauge,
    pub(crate) disk_errors: Gauge,
    pub(crate) entropy_draws: Gauge,
    pub(crate) clock_backward: Gauge,
    pub(crate) kernel_warnings: Gauge,
}

impl Progress {
    pub(crate) fn new(vcpus: usize) -> Self {
        Self { counters: (0..vcpus).map(|_| Gauge::default()).collect(), ..Self::default() }
    }

    /// The count of each vCPU, in thousands of steps.
    pub(crate) fn counters(&self) -> Vec<u64> {
        self.counters.iter().map(|count| count.get() / 1000).collect()
    }
}

/// Starts all threads.
pub(crate) fn start(
    settings: &Settings,
    boot: &str,
    progress: &Arc<Progress>,
    console: &Arc<Console>,
) {
    for vcpu in 0..progress.counters.len() {
        let (progress, busy) = (Arc::clone(progress), settings.busy);
        thread::spawn(move || count(vcpu, busy, &progress));
    }
    let bytes = settings.memory;
    spawn(progress, console, move |progress, console| watch_memory(bytes, progress, console));
    if let Some(path) = settings.disk.clone() {
        let boot = boot.to_owned();
        spawn(progress, console, move |progress, console| {
            if let Err(error) = use_disk(&path, &boot, progress, console) {
                progress.disk_errors.add(1);
                console.note("problem", &format!("{path}: {error}"));
            }
        });
    }
    for reader in 0..settings.readers {
        let path = settings.disk.clone().unwrap_or_default();
        spawn(progress, console, move |progress, console| {
            if let Err(error) = read_records(&path, reader.into(), progress) {
                progress.disk_errors.add(1);
                console.note("problem", &format!("{path}: reader {reader}: {error}"));
            }
        });
    }
    spawn(progress, console, |progress, console| {
        if let Err(error) = draw_entropy(progress) {
            console.note("problem", &format!("{ENTROPY}: {error}"));
        }
    });
    spawn(progress, console, |progress, _| watch_clocks(progress));
    let broken = settings.broken.clone();
    spawn(progress, console, move |progress, console| {
        if let Err(error) = watch_kernel_log(&broken, progress, console) {
            console.note("problem", &format!("/dev/kmsg: {error}"));
        }
    });
}

fn spawn(
    progress: &Arc<Progress>,
    console: &Arc<Console>,
    work: impl FnOnce(&Progress, &Console) + Send + 'static,
) {
    let (progress, console) = (Arc::clone(progress), Arc::clone(console));
    thread::spawn(move || work(&progress, &console));
}

fn pin(vcpu: usize) {
    let mut cpus = CpuSet::new();
    cpus.set(vcpu);
    let _ = sched_setaffinity(None, &cpus);
}

/// Lowers this thread's priority: otherwise counting would starve the heartbeat.
fn yield_to_others() {
    let _ = rustix::process::nice(19);
}

fn count(vcpu: usize, busy: u32, progress: &Progress) {
    pin(vcpu);
    yield_to_others();
    let mut counter = Counter::default();
    loop {
        let start = Instant::now();
        counter.run(STRETCH);
        if !counter.is_consistent() {
            progress.cpu_errors.add(1);
            counter = Counter::default();
            continue;
        }
        progress.counters[vcpu].set(counter.steps());
        if busy < 100 {
            // The bound keeps a pause of the whole guest from causing a long sleep here.
            let worked = start.elapsed().min(Duration::from_millis(50));
            thread::sleep(worked * (100 - busy) / busy);
        }
    }
}

fn watch_memory(bytes: usize, progress: &Progress, console: &Console) {
    yield_to_others();
    let mut memory = Memory::new(bytes / (WORDS * size_of::<u64>()));
    let above_4gib = bytes_above_4gib(memory.addresses()).unwrap_or(0);
    console.note_json(&serde_json::json!({
        "note": "memory", "bytes": memory.bytes(), "above_4gib": above_4gib,
    }));
    if memory.bytes() == 0 {
        return;
    }
    loop {
        let verified = memory.verify(PAGES);
        progress.memory_errors.add(verified.errors);
        progress.memory_passes.set(verified.passes);
        thread::yield_now();
    }
}

/// How many bytes of a range of this process lie above the first 4 GiB of RAM, by the page-frame numbers that
/// Linux tells root (Documentation/admin-guide/mm/pagemap.rst).
fn bytes_above_4gib(addresses: Range<usize>) -> io::Result<usize> {
    const PAGE: usize = 4096;
    const FRAME: u64 = (1 << 55) - 1;
    let first = addresses.start.div_ceil(PAGE);
    let mut entries = vec![0; (addresses.end / PAGE - first) * size_of::<u64>()];
    File::open("/proc/self/pagemap")?
        .read_exact_at(&mut entries, (first * size_of::<u64>()) as u64)?;
    let frames = entries.as_chunks().0.iter().map(|entry| u64::from_ne_bytes(*entry) & FRAME);
    Ok(frames.filter(|frame| *frame >= 1 << 20).count() * PAGE)
}

/// Writes records and reads older ones back, without end. Errors if the disk cannot be opened or read
/// at the start.
fn use_disk(path: &str, boot: &str, progress: &Progress, console: &Console) -> io::Result<()> {
    let flags = OFlags::DIRECT | OFlags::DSYNC;
    let disk =
        OpenOptions::new().read(true).write(true).custom_flags(flags.bits() as i32).open(path)?;
    let bytes = (&disk).seek(SeekFrom::End(0))?;
    let slots = disk::slots(bytes);
    let previous = disk::read_ring(&disk, slots)?;
    console.note_json(&serde_json::json!({
        "note": "disk", "path": path, "bytes": bytes, "records": previous.records,
        "newest": previous.newest, "newest_boot": previous.newest_boot,
        "bad": previous.bad.len(), "missing": previous.missing.len(),
    }));
    progress.disk_errors.add((previous.bad.len() + previous.missing.len()) as u64);
    for seq in previous.newest + 1.. {
        let record = Record { seq, boot: boot.to_owned() };
        let done = write_record(&disk, slots, &record).and_then(|()| {
            let back = seq - seq * 7919 % (slots / 2).max(1).min(seq);
            read_record(&disk, slots, back)
        });
        match done {
            Ok(()) => progress.disk_seq.set(seq),
            Err(error) => {
                progress.disk_errors.add(1);
                console.note("problem", &format!("record {seq} of {path}: {error}"));
            }
        }
        crate::pause();
    }
    Ok(())
}

/// How far ahead of the newest record the writer may come while a record is read.
const AHEAD: u64 = 64;

/// Reads records in all parts of the ring, in parallel with other readers, until a record is wrong.
fn read_records(path: &str, reader: u64, progress: &Progress) -> io::Result<()> {
    let flags = OFlags::DIRECT.bits() as i32;
    let disk = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let slots = disk::slots((&disk).seek(SeekFrom::End(0))?);
    let mut block = Block::default();
    for number in reader.. {
        let (slot, newest) = (number * 7919 % slots, progress.disk_seq.get());
        // A slot that is being written can be anything.
        if newest > 0 && (slot + slots - newest % slots) % slots > AHEAD {
            disk.read_exact_at(&mut block.0, slot * BLOCK as u64)?;
            match Record::from_block(&block) {
                Ok(None) => {}
                Ok(Some(record)) if record.seq % slots == slot => {}
                other => return Err(io::Error::other(format!("slot {slot}: {other:?}"))),
            }
        }
        crate::pause();
    }
    Ok(())
}

fn write_record(disk: &File, slots: u64, record: &Record) -> io::Result<()> {
    disk.write_all_at(&record.to_block().0, record.seq % slots * BLOCK as u64)?;
    disk.sync_data()
}

fn read_record(disk: &File, slots: u64, seq: u64) -> io::Result<()> {
    let mut block = Block::default();
    disk.read_exact_at(&mut block.0, seq % slots * BLOCK as u64)?;
    match Record::from_block(&block) {
        Ok(Some(record)) if record.seq == seq => Ok(()),
        found => Err(io::Error::other(format!("reading back record {seq} gave {found:?}"))),
    }
}

/// Reads from the machine's entropy device. Errors if a read fails, or returns the same bytes as the
/// last one or only zeroes.
fn draw_entropy(progress: &Progress) -> io::Result<()> {
    let mut device = File::open(ENTROPY)?;
    let mut last = [0; 32];
    loop {
        let mut drawn = [0; 32];
        device.read_exact(&mut drawn)?;
        if drawn == last || drawn == [0; 32] {
            return Err(io::Error::other(format!("{drawn:x?} after {last:x?}")));
        }
        last = drawn;
        progress.entropy_draws.add(1);
        crate::pause();
    }
}

/// Reads the clocks on every vCPU in turn, to detect a vCPU whose clocks are behind the others'.
///
/// The TSC is read directly before and after the change of vCPU, to detect differences that are
/// smaller than the pause as well.
fn watch_clocks(progress: &Progress) {
    let mut last = clocks::now();
    for vcpu in (0..progress.counters.len()).cycle() {
        let before = clocks::tsc();
        pin(vcpu);
        let after = clocks::tsc();
        let now = clocks::now();
        if after < before || now.0 < last.0 || now.1 < last.1 {
            progress.clock_backward.add(1);
        }
        last = now;
        crate::pause();
    }
}

fn watch_kernel_log(broken: &[String], progress: &Progress, console: &Console) -> io::Result<()> {
    let mut log = File::open("/dev/kmsg")?;
    // One read gives one record (Documentation/ABI/testing/dev-kmsg).
    let mut record = [0; 8192];
    loop {
        match log.read(&mut record) {
            Ok(len) => {
                let text = String::from_utf8_lossy(&record[..len]);
                if let Some(message) = complaint(&text).filter(|m| !is_expected(m, broken)) {
                    progress.kernel_warnings.add(1);
                    console.note("kernel", message);
                }
            }
            // Records were overwritten before they were read: continues with the next one.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Err(error) => return Err(error),
        }
    }
}

/// Whether the message is about an I/O error of one of the disks that are broken on purpose.
fn is_expected(message: &str, broken: &[String]) -> bool {
    let of = message.split_once("I/O error, dev ").map_or("", |(_, rest)| rest);
    broken.iter().any(|disk| of.strip_prefix(disk).is_some_and(|rest| rest.starts_with(',')))
}
