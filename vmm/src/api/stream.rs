//! Reads and writes lines on a non-blocking stream, with a bound on the bytes in each direction.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Longest line that a client may send, in bytes.
const MAX_LINE: usize = 64 << 10;
/// Most lines that are returned at once: the commands of one client that are carried out before those of the
/// next one.
const MAX_LINES: usize = 8;
/// Most unwritten bytes for a client that does not read. Above this, the client is dropped, unless all of them belong to
/// one line: the status of a host with many VMs may be longer.
const MAX_BACKLOG: usize = 4 << 20;

/// Why a stream can no longer be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The client hung up.
    #[error("the client hung up")]
    Closed,
    /// The client sent too many bytes without a line end.
    #[error("a line is longer than {MAX_LINE} bytes")]
    TooLong,
    /// The client does not read its replies.
    #[error("the client does not read: more than {MAX_BACKLOG} bytes wait for it")]
    Stuck,
    /// The stream failed.
    #[error("the stream failed")]
    Io(#[from] io::Error),
}

/// A non-blocking stream of lines.
#[derive(Debug)]
pub struct Lines {
    stream: File,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    /// Whether what comes up to the next line end is the rest of a line that was too long.
    skips: bool,
    /// Whether the last line was not written to its end.
    is_cut: bool,
    ended: bool,
    closed: bool,
}

impl Lines {
    /// Wraps a stream, which must be non-blocking: a socket or a character device.
    pub fn new(stream: OwnedFd) -> Self {
        Self {
            stream: stream.into(),
            incoming: Vec::new(),
            outgoing: Vec::new(),
            skips: false,
            is_cut: false,
            ended: false,
            closed: false,
        }
    }

    /// Reads what is available, up to a bound, and returns the complete lines, at most eight. What is
    /// left is returned by the next calls: see [`has_lines`](Self::has_lines). Errors with
    /// [`StreamError::Closed`] only after all complete lines have been returned, and with [`StreamError::TooLong`]
    /// once for each line that is too long.
    pub fn read(&mut self) -> Result<Vec<String>, StreamError> {
        if !self.has_lines() {
            self.receive()?;
        }
        let lines = self.incoming.split_inclusive(|b| *b == b'\n').take(MAX_LINES);
        let complete: Vec<&[u8]> = lines.filter(|line| line.ends_with(b"\n")).collect();
        let bytes: usize = complete.iter().map(|line| line.len()).sum();
        if bytes == 0 {
            return if self.ended { Err(StreamError::Closed) } else { Ok(Vec::new()) };
        }
        let text = |line: &&[u8]| String::from_utf8_lossy(&line[..line.len() - 1]).into_owned();
        let lines = complete.iter().map(text).filter(|line| !line.is_empty()).collect();
        self.incoming.drain(..bytes);
        Ok(lines)
    }

    /// Reads until the stream has no more bytes or `incoming` has as many as a line may have.
    fn receive(&mut self) -> Result<(), StreamError> {
        let mut buffer = [0; 4096];
        while !self.ended && self.incoming.len() <= MAX_LINE {
            match self.stream.read(&mut buffer) {
                Ok(0) => self.ended = true,
                Ok(count) => self.incoming.extend_from_slice(&buffer[..count]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e.into()),
            }
        }
        if self.skips {
            let end = self.incoming.iter().position(|byte| *byte == b'\n');
            self.incoming.drain(..end.map_or(self.incoming.len(), |end| end + 1));
            self.skips = end.is_none();
        }
        match self.incoming.len() > MAX_LINE && !self.has_lines() {
            true => {
                self.incoming.clear();
                self.skips = true;
                Err(StreamError::TooLong)
            }
            false => Ok(()),
        }
    }

    /// Reads on after the end of the stream: a port has one client after another. The last one's unfinished line is
    /// dropped.
    pub fn go_on(&mut self) {
        self.incoming.clear();
        (self.skips, self.ended) = (false, false);
    }

    /// Whether [`read`](Self::read) returns lines although the stream may have no more bytes.
    pub fn has_lines(&self) -> bool {
        self.incoming.contains(&b'\n')
    }

    /// Queues one line and writes as much as the stream takes.
    pub fn write(&mut self, line: &str) -> Result<(), StreamError> {
        self.flush()?;
        let is_behind = self.is_behind();
        if std::mem::take(&mut self.is_cut) {
            self.outgoing.push(b'\n');
        }
        self.outgoing.extend_from_slice(line.as_bytes());
        self.outgoing.push(b'\n');
        self.flush()?;
        if is_behind && self.outgoing.len() > MAX_BACKLOG {
            self.forget();
            return Err(StreamError::Stuck);
        }
        Ok(())
    }

    /// Writes as much as the stream takes.
    pub fn flush(&mut self) -> Result<(), StreamError> {
        while !self.outgoing.is_empty() {
            match self.stream.write(&self.outgoing) {
                Ok(0) => break,
                Ok(count) => drop(self.outgoing.drain(..count)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// [`write`](Self::write), where a failure only means that the client is gone.
    pub fn send(&mut self, line: &str) {
        if self.write(line).is_err() {
            self.close();
        }
    }

    /// Marks the stream as closed, and drops unwritten bytes.
    pub fn close(&mut self) {
        self.forget();
        self.closed = true;
    }

    fn forget(&mut self) {
        self.is_cut |= self.is_behind();
        self.outgoing.clear();
    }

    /// Whether the stream is marked as closed.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether there are unwritten bytes.
    pub fn is_behind(&self) -> bool {
        !self.outgoing.is_empty()
    }
}

impl AsFd for Lines {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn pair() -> (UnixStream, Lines) {
        let (client, server) = UnixStream::pair().unwrap();
        server.set_nonblocking(true).unwrap();
        (client, Lines::new(server.into()))
    }

    #[test]
    fn lines_are_put_together_from_pieces() {
        let (mut client, mut lines) = pair();
        client.write_all(b"on").unwrap();
        assert_eq!(lines.read().unwrap(), Vec::<String>::new());
        client.write_all(b"e\n\ntwo\nthr").unwrap();
        drop(client);
        assert_eq!(lines.read().unwrap(), ["one", "two"]);
        assert!(matches!(lines.read(), Err(StreamError::Closed)));
    }

    #[test]
    fn a_client_that_sends_without_end_takes_a_bounded_turn_and_bounded_memory() {
        let (mut client, mut lines) = pair();
        let writer = std::thread::spawn(move || client.write_all(&vec![b'\n'; 1 << 22]));
        for _ in 0..1000 {
            assert_eq!(lines.read().unwrap(), Vec::<String>::new());
            assert!(lines.incoming.len() <= MAX_LINE + 4096);
        }
        drop(lines);
        assert!(writer.join().unwrap().is_err(), "it wrote more than was read");

        let (mut client, mut lines) = pair();
        let sent = MAX_LINES * 2 + 1;
        (0..sent).for_each(|n| writeln!(client, "{n}").unwrap());
        drop(client);
        assert_eq!(lines.read().unwrap().len(), MAX_LINES);
        assert!(lines.has_lines());
        assert_eq!(lines.read().unwrap().last().unwrap(), &(sent - 2).to_string());
        assert_eq!(lines.read().unwrap(), [(sent - 1).to_string()]);
        assert!(!lines.has_lines());
        assert!(matches!(lines.read(), Err(StreamError::Closed)));
    }

    #[test]
    fn a_client_that_never_ends_its_line_is_cut_off() {
        let (mut client, mut lines) = pair();
        let writer = std::thread::spawn(move || client.write_all(&vec![b'x'; MAX_LINE * 2]));
        let error = loop {
            match lines.read() {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert!(matches!(error, StreamError::TooLong));
        drop(lines);
        let _ = writer.join().unwrap();
    }

    #[test]
    fn one_line_of_any_length_reaches_a_client_that_reads() {
        let (client, mut lines) = pair();
        let line = "x".repeat(MAX_BACKLOG + 1);
        lines.write(&line).unwrap();
        assert!(lines.is_behind());
        let reader = std::thread::spawn(move || {
            let mut read = String::new();
            io::BufRead::read_line(&mut io::BufReader::new(client), &mut read).unwrap();
            read
        });
        while lines.is_behind() {
            lines.flush().unwrap();
        }
        assert_eq!(reader.join().unwrap().len(), line.len() + 1);
    }

    #[test]
    fn a_client_that_never_reads_is_dropped_and_not_waited_for() {
        let (_client, mut lines) = pair();
        let line = "x".repeat(1 << 20);
        let error = (0..8).find_map(|_| lines.write(&line).err()).expect("it stops");
        assert!(matches!(error, StreamError::Stuck));
        assert!(!lines.is_behind());
    }

    #[test]
    fn the_line_behind_one_that_was_cut_off_is_whole() {
        let (client, mut lines) = pair();
        let line = "x".repeat(MAX_BACKLOG + 1);
        while lines.write(&line).is_ok() {}
        let reader = std::thread::spawn(move || {
            io::BufRead::lines(io::BufReader::new(client)).last().unwrap().unwrap()
        });
        lines.write("whole").unwrap();
        while lines.is_behind() {
            lines.flush().unwrap();
        }
        drop(lines);
        assert_eq!(reader.join().unwrap(), "whole");
    }
}
