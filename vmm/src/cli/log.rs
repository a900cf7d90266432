//! The log on standard error, which never keeps the program waiting for long.
//!
//! ```text
//!   line --there is room--> standard error
//!     |                          ^
//!     +--no room within WAIT--> lost: counted, and the number is the next line that has room
//! ```
//!
//! Standard error may be a pipe that nobody reads, or a console that was stopped with Ctrl-S. A thread that waited for
//! either would stand still, and with the host's main thread all of its VMs. Without threads and buffers of its own, so
//! that a VM's process can confine itself afterwards.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, write};
use rustix::time::Timespec;
use tracing::level_filters::LevelFilter;

use crate::mutex::lock;

/// How long a line waits for room. A slow serial console takes a burst of lines in this time. Once a line was lost, no
/// line waits until there is room again.
const WAIT: Duration = Duration::from_millis(500);

/// Bytes for which there is room when poll(2) says so: a pipe takes so many at once (`PIPE_BUF`, half of it), and so
/// does a terminal.
const PIECE: usize = 2048;

/// Lines that were lost since the last one that was written.
static LOST: Mutex<u64> = Mutex::new(0);

/// Sends the log of this process to standard error.
pub(super) fn start(level: LevelFilter) {
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(|| Line)
        .with_target(false)
        .with_ansi(false)
        .without_time()
        .init();
}

/// Writes a text to standard error as a line of the log.
pub(super) fn say(text: &str) {
    write_or_lose(rustix::stdio::stderr(), text.as_bytes(), &mut lock(&LOST));
}

/// A writer of lines.
struct Line;

impl io::Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        write_or_lose(rustix::stdio::stderr(), line, &mut lock(&LOST));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes a line, in front of which stands how many were `lost`. Counts it as lost if it has no room in time.
fn write_or_lose(to: BorrowedFd<'_>, line: &[u8], lost: &mut u64) {
    let wait = if *lost == 0 { WAIT } else { Duration::ZERO };
    if *lost > 0 {
        let report = format!(" WARN {lost} lines of this log were lost: nobody has read them\n");
        if write_within(to, report.as_bytes(), wait) {
            *lost = 0;
        }
    }
    if *lost > 0 || !write_within(to, line, wait) {
        *lost += 1;
    }
}

/// Writes `bytes` if there is room within a time. Returns whether all of them were written.
fn write_within(to: BorrowedFd<'_>, bytes: &[u8], wait: Duration) -> bool {
    let deadline = Instant::now() + wait;
    let mut rest = bytes;
    while !rest.is_empty() {
        if !has_room(to, deadline) {
            return false;
        }
        match write(to, &rest[..rest.len().min(PIECE)]) {
            Ok(count) => rest = &rest[count..],
            Err(Errno::INTR | Errno::AGAIN) if Instant::now() < deadline => {}
            Err(_) => return false,
        }
    }
    true
}

/// Waits for room in a pipe or in a terminal. A file has room always.
fn has_room(to: BorrowedFd<'_>, deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let mut ready = [PollFd::from_borrowed_fd(to, PollFlags::OUT)];
        match poll(&mut ready, Some(&left)) {
            Ok(_) => return ready[0].revents().contains(PollFlags::OUT),
            Err(Errno::INTR) => {}
            // It cannot be waited for.
            Err(_) => return true,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn lines_that_have_no_room_are_lost_and_counted_and_wait_only_once() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut lost = 0;
        let line = [b'x'; 1000];
        let mut sent = 0;
        let start = Instant::now();
        // More than any pipe holds.
        while lost < 1000 {
            write_or_lose(writer.as_fd(), &line, &mut lost);
            sent += 1;
        }
        assert!(start.elapsed() < 100 * WAIT, "each lost line waited");
        let kept = sent - 1000;
        let mut bytes = vec![0; kept * line.len()];
        reader.read_exact(&mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == b'x'));

        write_or_lose(writer.as_fd(), b"after\n", &mut lost);
        assert_eq!(lost, 0);
        drop(writer);
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, " WARN 1000 lines of this log were lost: nobody has read them\nafter\n");
    }

    #[test]
    fn a_reader_that_is_gone_and_a_file_keep_nobody_waiting() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let mut lost = 0;
        write_or_lose(writer.as_fd(), b"x\n", &mut lost);
        assert_eq!(lost, 1);
        let file = tempfile::tempfile().unwrap();
        let line = [b'y'; 3 * PIECE];
        write_or_lose(file.as_fd(), &line, &mut lost);
        assert_eq!(lost, 0);
        assert!(
            file.metadata().unwrap().len() > line.len() as u64,
            "with the number of lost lines"
        );
    }
}
