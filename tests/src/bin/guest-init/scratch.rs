//! Work on disks that is the same over and over: writes, zeroes and discards blocks, and verifies what it then finds. Of a disk
//! that is read-only it verifies what the harness has put there.

#![expect(unsafe_code, reason = "the ioctl that discards")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use perennial_tests::workload::disk::{BLOCK, Block, READ_ONLY_BLOCKS, Record, read_only_record};
use rustix::fs::{FallocateFlags, OFlags, fallocate};
use rustix::ioctl::{Setter, ioctl};
use serde_json::{Value, json};

use crate::console::Console;
use crate::workers::Progress;

/// `_IO(0x12, 119)` (Linux include/uapi/linux/fs.h).
const BLKDISCARD: rustix::ioctl::Opcode = 0x1277;

/// The blocks of a round, and those of them that become zeroes, in two ways, and that are discarded.
const WRITTEN: Range<u64> = 0..12;
const ZEROED: Range<u64> = 2..4;
const UNMAPPED: Range<u64> = 5..7;
const DISCARDED: Range<u64> = 8..10;

/// A disk that is worked on.
#[derive(Debug)]
pub(crate) struct Scratch {
    name: String,
    rounds: AtomicU64,
}

impl Scratch {
    /// Starts a thread for each of these disks: `vdb`, for example.
    pub(crate) fn start(
        names: &[String],
        progress: &Arc<Progress>,
        console: &Arc<Console>,
    ) -> Arc<[Self]> {
        let disk = |name: &String| Self { name: name.clone(), rounds: AtomicU64::new(0) };
        let disks: Arc<[Self]> = names.iter().map(disk).collect();
        for index in 0..disks.len() {
            let (disks, progress, console) = (disks.clone(), progress.clone(), console.clone());
            thread::spawn(move || {
                let disk = &disks[index];
                if let Err(error) = disk.work() {
                    progress.disk_errors.add(1);
                    console.note("problem", &format!("{}: {error}", disk.name));
                }
            });
        }
        disks
    }

    /// How far the work on all disks is: rounds, sectors in bytes, and which are read-only.
    pub(crate) fn note(disks: &[Self]) -> Value {
        let each = |value: fn(&Self) -> Value| disks.iter().map(value).collect::<Vec<_>>();
        json!({
            "note": "scratch",
            "rounds": each(|disk| disk.rounds.load(Ordering::Relaxed).into()),
            "sectors": each(|disk| disk.attribute("queue/logical_block_size").into()),
            "read_only": each(|disk| disk.attribute("ro").into()),
        })
    }

    fn attribute(&self, name: &str) -> String {
        crate::read(&format!("/sys/block/{}/{name}", self.name))
    }

    /// Works without end.
    fn work(&self) -> io::Result<()> {
        let path = format!("/dev/{}", self.name);
        let (mut options, flags) = (File::options(), OFlags::DIRECT.bits() as i32);
        options.read(true).custom_flags(flags);
        let read_only = self.attribute("ro") == "1";
        // Linux opens a disk that is read-only also for writing.
        let disk = options.write(true).open(&path)?;
        if read_only && disk.write_all_at(&Block::default().0, 0).is_ok() {
            return Err(io::Error::other("it is read-only and can be written"));
        }
        for round in 1.. {
            match read_only {
                true => verify_read_only(&disk)?,
                false => write(&disk, round).and_then(|()| verify(&disk, round))?,
            }
            self.rounds.store(round, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// What a round writes to a block.
fn record(round: u64, number: u64) -> Record {
    Record { seq: round * WRITTEN.end + number + 1, boot: "scratch".to_owned() }
}

fn write(disk: &File, round: u64) -> io::Result<()> {
    for number in WRITTEN {
        disk.write_all_at(&record(round, number).to_block().0, number * BLOCK as u64)?;
        crate::pause();
    }
    let keep = FallocateFlags::KEEP_SIZE;
    let zero = |blocks: &Range<u64>, flags| {
        let [start, end] = [blocks.start, blocks.end].map(|block| block * BLOCK as u64);
        fallocate(disk, flags | keep, start, end - start)
    };
    zero(&ZEROED, FallocateFlags::ZERO_RANGE)?;
    crate::pause();
    // Linux writes no zeroes by itself if the disk cannot unmap.
    zero(&UNMAPPED, FallocateFlags::PUNCH_HOLE)?;
    crate::pause();
    let [start, end] = [DISCARDED.start, DISCARDED.end].map(|block| block * BLOCK as u64);
    discard(disk, start, end - start)?;
    crate::pause();
    Ok(())
}

/// Discards a part of a disk.
pub(crate) fn discard(disk: &File, start: u64, length: u64) -> io::Result<()> {
    // SAFETY: the ioctl reads two numbers, start and length.
    let discard = unsafe { Setter::<BLKDISCARD, [u64; 2]>::new([start, length]) };
    // SAFETY: as above; it touches no memory of this process.
    Ok(unsafe { ioctl(disk, discard) }?)
}

/// Errors if a block is not as [`write()`] has left it. What was discarded may be there still.
fn verify(disk: &File, round: u64) -> io::Result<()> {
    for number in WRITTEN {
        let found = read(disk, number)?;
        let is_written = found == Ok(Some(record(round, number)));
        let is_zero = found == Ok(None);
        let is_right = match number {
            _ if ZEROED.contains(&number) || UNMAPPED.contains(&number) => is_zero,
            _ if DISCARDED.contains(&number) => is_zero || is_written,
            _ => is_written,
        };
        if !is_right {
            let why = format!("round {round}: block {number} holds {found:?}");
            return Err(io::Error::other(why));
        }
        crate::pause();
    }
    Ok(())
}

fn verify_read_only(disk: &File) -> io::Result<()> {
    for number in 0..READ_ONLY_BLOCKS {
        let found = read(disk, number)?;
        if found != Ok(Some(read_only_record(number))) {
            return Err(io::Error::other(format!("block {number} holds {found:?}")));
        }
        crate::pause();
    }
    Ok(())
}

fn read(disk: &File, number: u64) -> io::Result<Result<Option<Record>, &'static str>> {
    let mut block = Block::default();
    disk.read_exact_at(&mut block.0, number * BLOCK as u64)?;
    Ok(Record::from_block(&block))
}
