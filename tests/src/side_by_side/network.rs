//! Loads of the network: TCP between the guest and a server in the host.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use super::guest::Done;

/// The tap, and the addresses of its two ends.
pub(super) const TAP: &str = "tap0";
pub(super) const HOST: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 2);
pub(super) const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
const PORT: u16 = 7777;

/// Bytes that a stream reads or writes at a time.
const PIECE: usize = 128 << 10;

/// What is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Exchange {
    /// A stream from the guest.
    Out,
    /// A stream to the guest.
    In,
    /// One byte each way, in turn.
    Requests,
}

impl Exchange {
    /// The first byte of a connection.
    fn code(self) -> u8 {
        match self {
            Self::Out => b'o',
            Self::In => b'i',
            Self::Requests => b'r',
        }
    }
}

/// The parameter that makes the guest's kernel set up its interface.
pub(super) fn parameter() -> String {
    format!("ip={GUEST}::{HOST}:{MASK}::eth0:off")
}

/// Connects the guest with the host.
pub(super) fn connect() -> io::Result<TcpStream> {
    let stream = TcpStream::connect((HOST, PORT))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// The guest's side of a new connection, for this time.
pub(super) fn exchange(
    mut stream: TcpStream,
    what: Exchange,
    during: Duration,
) -> io::Result<Done> {
    stream.write_all(&[what.code()])?;
    let mut bytes = vec![0x5a; PIECE];
    let start = Instant::now();
    let until = start + during;
    let mut amount = 0_u64;
    while Instant::now() < until {
        match what {
            Exchange::Out => amount += stream.write(&bytes)? as u64,
            Exchange::In => amount += stream.read(&mut bytes)? as u64,
            Exchange::Requests => {
                stream.write_all(&bytes[..1])?;
                stream.read_exact(&mut bytes[..1])?;
                amount += 1;
            }
        }
    }
    if what == Exchange::Out {
        // The stream has arrived when the host says how long it was.
        stream.shutdown(Shutdown::Write)?;
        let mut received = [0; 8];
        stream.read_exact(&mut received)?;
        let received = u64::from_le_bytes(received);
        if received != amount {
            return Err(io::Error::other(format!("{amount} bytes sent, {received} received")));
        }
    }
    Ok(Done { amount: amount as f64, seconds: start.elapsed().as_secs_f64() })
}

/// Starts the host's side. Connections that guests leave behind end with an error, which says nothing.
pub(super) fn serve() -> io::Result<()> {
    let listener = TcpListener::bind((HOST, PORT))?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || answer(stream));
        }
    });
    Ok(())
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut code = [0];
    stream.read_exact(&mut code)?;
    let mut bytes = vec![0x5a; PIECE];
    let [code] = code;
    if code == Exchange::Out.code() {
        let mut received = 0_u64;
        loop {
            match stream.read(&mut bytes)? {
                0 => return stream.write_all(&received.to_le_bytes()),
                count => received += count as u64,
            }
        }
    } else if code == Exchange::In.code() {
        loop {
            stream.write_all(&bytes)?;
        }
    } else {
        loop {
            stream.read_exact(&mut bytes[..1])?;
            stream.write_all(&bytes[..1])?;
        }
    }
}
