//! Loads of a disk, past the guest's page cache.
//!
//! As many threads as there are requests at a time, each with one request after the other: that needs no
//! asynchronous interface in the guest's kernel. The work that this is for the guest is the same in every VMM.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{SeekFrom, seek};

use super::guest::Done;

/// What O_DIRECT asks of addresses and sizes, for disks with blocks of up to this size.
const ALIGNMENT: usize = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
}

/// One load.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    access: Access,
    /// Bytes of a request.
    request: usize,
    /// Requests at a time.
    depth: usize,
    /// Whether the requests are at random places, and the amount is their number; else they follow each
    /// other, and the amount is their bytes.
    random: bool,
}

impl Load {
    /// Requests of 4 KiB.
    pub(super) const fn random(access: Access, depth: usize) -> Self {
        Self { access, request: 4096, depth, random: true }
    }

    /// Requests of 1 MiB, one at a time.
    pub(super) const fn sequential(access: Access) -> Self {
        Self { access, request: 1 << 20, depth: 1, random: false }
    }
}

/// Loads the disk for this time.
pub(super) fn load(path: &str, load: &Load, during: Duration) -> io::Result<Done> {
    let mut options = OpenOptions::new();
    options.read(true).write(load.access == Access::Write).custom_flags(libc::O_DIRECT);
    let disk = options.open(path)?;
    let requests = seek(&disk, SeekFrom::End(0))? / load.request as u64;
    if requests == 0 {
        return Err(io::Error::other(format!("{path} is smaller than one request")));
    }
    let start = Instant::now();
    let until = start + during;
    let done = thread::scope(|scope| {
        let threads: Vec<_> = (0..load.depth)
            .map(|seed| {
                let places = Places::new(load.random, requests, seed as u64);
                let disk = &disk;
                scope.spawn(move || one_after_the_other(disk, load, places, until))
            })
            .collect();
        let ended = threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| io::Error::other("a thread panicked"))?);
        ended.sum::<io::Result<u64>>()
    })?;
    let seconds = start.elapsed().as_secs_f64();
    let each = if load.random { 1 } else { load.request as u64 };
    Ok(Done { amount: (done * each) as f64, seconds })
}

/// Returns how many requests were done.
fn one_after_the_other(
    disk: &File,
    load: &Load,
    mut places: Places,
    until: Instant,
) -> io::Result<u64> {
    let mut space = vec![0x5a; load.request + ALIGNMENT];
    let at = space.as_ptr().align_offset(ALIGNMENT);
    let bytes = &mut space[at..at + load.request];
    let mut done = 0;
    while Instant::now() < until {
        let offset = places.next() * load.request as u64;
        match load.access {
            Access::Read => disk.read_exact_at(bytes, offset)?,
            Access::Write => disk.write_all_at(bytes, offset)?,
        }
        done += 1;
    }
    Ok(done)
}

/// The numbers of the requests' places on the disk.
#[derive(Debug)]
struct Places {
    random: bool,
    count: u64,
    state: u64,
}

impl Places {
    fn new(random: bool, count: u64, seed: u64) -> Self {
        Self { random, count, state: seed << 32 }
    }

    fn next(&mut self) -> u64 {
        self.state += 1;
        if !self.random {
            return self.state % self.count;
        }
        // The finalizer of MurmurHash3, whose results for consecutive numbers look random.
        let mut mixed = self.state;
        for factor in [0xff51_afd7_ed55_8ccd, 0xc4ce_b9fe_1a85_ec53] {
            mixed = (mixed ^ mixed >> 33).wrapping_mul(factor);
        }
        (mixed ^ mixed >> 33) % self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequential_places_follow_each_other_and_begin_again() {
        let mut places = Places::new(false, 3, 0);
        assert_eq!([(); 5].map(|()| places.next()), [1, 2, 0, 1, 2]);
    }

    #[test]
    fn random_places_are_on_the_disk_and_reach_all_of_it() {
        let mut places = Places::new(true, 64, 7);
        let mut seen = [false; 64];
        for _ in 0..1000 {
            seen[places.next() as usize] = true;
        }
        assert!(seen.iter().all(|seen| *seen));
    }
}
