//! A TCP connection from outside the host into a guest, which sends back what it gets.
//!
//! QEMU's user network holds the host's wire: it listens on a port of this computer and forwards what
//! comes there to a guest, which is on the same network as the host's uplink. The connection has data on
//! its way in both directions all the time, and each byte is checked.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::mutex::lock;

/// The port on which a guest with a network sends back what it gets.
pub const ECHO_PORT: u16 = 7;
/// The host's own address on QEMU's user network, and the gateway there.
pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// The gateway on QEMU's user network.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

/// Most bytes that are on their way there and back at a time.
const ON_THEIR_WAY: u64 = 32 << 10;
/// Bytes that are written at a time.
const PIECE: usize = 4 << 10;
/// Time from one piece to the next. Without a limit the network alone would take all of the emulated CPU
/// that a host and its guests share, and the guests would get nowhere with their other work. Three connections at this
/// pace are 60 KiB/s each way, of 80 KiB/s that a slow computer was seen to manage.
const PACE: Duration = Duration::from_millis(200);

/// The address of the guest with this number among those of a host.
pub fn address(number: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 2, 50 + number as u8)
}

/// A port of this computer that nobody listens on.
pub fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// The byte at a position of the stream: no two stretches of it are the same, so that bytes that are
/// lost, doubled or exchanged show.
fn byte(position: u64) -> u8 {
    let mixed = (position ^ position >> 8).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 56) as u8
}

/// How far a connection is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that were sent.
    pub sent: u64,
    /// Bytes that came back, each as it was sent.
    pub returned: u64,
    /// The other side has sent its end.
    pub ended: bool,
    /// What went wrong.
    pub error: Option<String>,
    stopping: bool,
}

type Shared = Arc<(Mutex<Progress>, Condvar)>;

/// A connection with data on its way.
#[derive(Debug)]
pub struct Connection {
    name: String,
    shared: Shared,
}

impl Connection {
    /// Connects to a port of this computer. `name` is the guest's, for errors.
    pub fn open(name: &str, port: u16) -> io::Result<Self> {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        let shared = Shared::default();
        let (reader, for_reader) = (stream.try_clone()?, Arc::clone(&shared));
        thread::spawn(move || note_error(&for_reader, receive(reader, &for_reader)));
        let for_writer = Arc::clone(&shared);
        thread::spawn(move || note_error(&for_writer, send(stream, &for_writer)));
        Ok(Self { name: name.to_owned(), shared })
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        lock(&self.shared.0).clone()
    }

    /// Waits until this many more bytes than now have come back.
    pub fn wait_for(&self, bytes: u64, timeout: Duration) -> Result<(), String> {
        let wanted = lock(&self.shared.0).returned + bytes;
        self.wait(timeout, &format!("{wanted} bytes did not come back"), |now| {
            now.returned >= wanted
        })
    }

    /// Stops sending, and waits until all that was sent has come back, and then the end. Returns how many
    /// bytes that was.
    pub fn finish(&self, timeout: Duration) -> Result<u64, String> {
        lock(&self.shared.0).stopping = true;
        self.shared.1.notify_all();
        self.wait(timeout, "the end did not come back", |now| now.ended)?;
        let now = self.progress();
        match now.sent == now.returned {
            true => Ok(now.sent),
            false => Err(format!("connection to {}: it ended too early: {now:?}", self.name)),
        }
    }

    fn wait(
        &self,
        timeout: Duration,
        missing: &str,
        condition: impl Fn(&Progress) -> bool,
    ) -> Result<(), String> {
        let deadline = Instant::now() + timeout;
        let mut now = lock(&self.shared.0);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match condition(&now) {
                true if now.error.is_none() => return Ok(()),
                _ if now.error.is_some() || now.ended || left.is_zero() => {
                    return Err(format!("connection to {}: {missing}: {:?}", self.name, *now));
                }
                _ => {}
            }
            let waited = self.shared.1.wait_timeout(now, left);
            now = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn note_error(shared: &Shared, result: io::Result<()>) {
    if let Err(error) = result {
        lock(&shared.0).error.get_or_insert(error.to_string());
    }
    shared.1.notify_all();
}

fn send(mut stream: TcpStream, shared: &Shared) -> io::Result<()> {
    loop {
        let begin = {
            let mut now = lock(&shared.0);
            while !now.stopping && now.sent - now.returned > ON_THEIR_WAY - PIECE as u64 {
                now = shared.1.wait(now).unwrap_or_else(PoisonError::into_inner);
                if now.error.is_some() || now.ended {
                    return Ok(());
                }
            }
            if now.stopping {
                return stream.shutdown(Shutdown::Write);
            }
            // Before it is sent: it may come back at once.
            now.sent += PIECE as u64;
            now.sent - PIECE as u64
        };
        let piece: Vec<u8> = (begin..begin + PIECE as u64).map(byte).collect();
        stream.write_all(&piece)?;
        thread::sleep(PACE);
    }
}

fn receive(mut stream: TcpStream, shared: &Shared) -> io::Result<()> {
    let mut bytes = [0; PIECE];
    loop {
        let count = stream.read(&mut bytes)?;
        let mut now = lock(&shared.0);
        if count == 0 {
            now.ended = true;
            return Ok(());
        }
        let right =
            bytes[..count].iter().zip(now.returned..).take_while(|(b, at)| **b == byte(*at));
        let right = right.count();
        now.returned += right as u64;
        if right < count || now.returned > now.sent {
            return Err(io::Error::other(format!("byte {} is not what was sent", now.returned)));
        }
        shared.1.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    /// A port on which one connection is served.
    fn serve(with: impl FnOnce(TcpStream) + Send + 'static) -> u16 {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || with(listener.accept().unwrap().0));
        port
    }

    #[test]
    fn every_byte_that_comes_back_is_counted() {
        let port = serve(|stream| drop(io::copy(&mut &stream, &mut &stream)));
        let connection = Connection::open("web", port).unwrap();
        connection.wait_for(64 << 10, SOON).unwrap();
        assert!(connection.finish(SOON).unwrap() >= 64 << 10);
    }

    #[test]
    fn a_byte_that_is_lost_doubled_or_changed_and_an_early_end_are_noticed() {
        let spoil: [fn(&mut Vec<u8>); 3] = [
            |bytes| bytes.truncate(3000),
            |bytes| bytes.insert(9, bytes[8] ^ 1),
            |bytes| bytes[3] ^= 1,
        ];
        for spoil in spoil {
            let port = serve(move |mut stream| {
                let mut bytes = vec![0; PIECE];
                stream.read_exact(&mut bytes).unwrap();
                spoil(&mut bytes);
                stream.write_all(&bytes).unwrap();
                drop(io::copy(&mut &stream, &mut &stream));
            });
            let error = Connection::open("web", port).unwrap().wait_for(1 << 20, SOON).unwrap_err();
            assert!(error.contains("is not what was sent"), "{error}");
        }
        let port = serve(|stream| drop(io::copy(&mut (&stream).take(100), &mut &stream)));
        Connection::open("web", port).unwrap().wait_for(1 << 20, SOON).unwrap_err();
    }
}
