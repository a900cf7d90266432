//! Numbered datagrams from outside the host into a guest, which sends them back.
//!
//! The network may lose a datagram. It may not change one, and a device that repeats the frames of its queue after
//! an update would bring one back twice.

use std::collections::HashSet;
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::mutex::lock;

/// Time from one datagram to the next.
const PACE: Duration = Duration::from_millis(50);
/// Bytes of a datagram: its number, then bytes that follow from the number.
const BYTES: usize = 512;

#[derive(Debug, Default)]
struct Progress {
    sent: u64,
    returned: HashSet<u64>,
    error: Option<String>,
    stopping: bool,
}

type Shared = Arc<(Mutex<Progress>, Condvar)>;

/// Datagrams that are sent all the time.
#[derive(Debug)]
pub struct Datagrams {
    name: String,
    shared: Shared,
}

impl Datagrams {
    /// Sends to a port of this computer. `name` is the guest's, for errors.
    pub fn start(name: &str, port: u16) -> io::Result<Self> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        socket.connect((Ipv4Addr::LOCALHOST, port))?;
        let shared = Shared::default();
        let (receiver, for_receiver) = (socket.try_clone()?, Arc::clone(&shared));
        thread::spawn(move || receive(&receiver, &for_receiver));
        let for_sender = Arc::clone(&shared);
        thread::spawn(move || send(&socket, &for_sender));
        Ok(Self { name: name.to_owned(), shared })
    }

    /// Waits until this many datagrams that are sent from now on have come back.
    pub fn wait_for(&self, count: u64, timeout: Duration) -> Result<(), String> {
        let deadline = Instant::now() + timeout;
        let mut now = lock(&self.shared.0);
        let first = now.sent;
        loop {
            let returned = now.returned.iter().filter(|number| **number >= first).count() as u64;
            let left = deadline.saturating_duration_since(Instant::now());
            if let Some(error) = &now.error {
                return Err(format!("datagrams to {}: {error}", self.name));
            }
            if returned >= count {
                return Ok(());
            }
            if left.is_zero() {
                let sent = now.sent - first;
                return Err(format!("datagrams to {}: {returned} of {sent} came back", self.name));
            }
            let waited = self.shared.1.wait_timeout(now, left);
            now = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Stops sending. Returns how many datagrams were sent and how many came back. Errors if one came back changed
    /// or twice.
    pub fn finish(&self) -> Result<(u64, u64), String> {
        let mut now = lock(&self.shared.0);
        now.stopping = true;
        match &now.error {
            Some(error) => Err(format!("datagrams to {}: {error}", self.name)),
            None => Ok((now.sent, now.returned.len() as u64)),
        }
    }
}

fn datagram(number: u64) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    for (position, byte) in (0u64..).zip(&mut bytes) {
        *byte = (number.wrapping_mul(31) + position * 7) as u8;
    }
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes
}

fn send(socket: &UdpSocket, shared: &Shared) {
    loop {
        let number = {
            let mut now = lock(&shared.0);
            if now.stopping {
                return;
            }
            now.sent += 1;
            now.sent - 1
        };
        // A refusal tells of an earlier datagram that nobody took: lost, as a datagram may be.
        let _ = socket.send(&datagram(number));
        thread::sleep(PACE);
    }
}

fn receive(socket: &UdpSocket, shared: &Shared) {
    // Longer than a datagram, so that one that has grown is noticed.
    let mut bytes = [0; BYTES + 1];
    loop {
        let received = socket.recv(&mut bytes);
        let mut now = lock(&shared.0);
        if now.stopping {
            return;
        }
        let Ok(count) = received else { continue };
        if let Err(error) = check(&bytes[..count], &mut now) {
            now.error.get_or_insert(error);
        }
        shared.1.notify_all();
    }
}

fn check(bytes: &[u8], now: &mut Progress) -> Result<(), String> {
    let (number, _) = bytes.split_first_chunk().ok_or("one came back cut")?;
    let number = u64::from_le_bytes(*number);
    if number >= now.sent || bytes != datagram(number) {
        return Err(format!("number {number} is not what was sent"));
    }
    match now.returned.insert(number) {
        true => Ok(()),
        false => Err(format!("number {number} came back twice")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    /// A port whose datagrams are sent back as `answer` makes them.
    fn serve(answer: impl Fn(u64, &[u8]) -> Vec<Vec<u8>> + Send + 'static) -> u16 {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = socket.local_addr().unwrap().port();
        thread::spawn(move || {
            let mut bytes = [0; 2048];
            for number in 0.. {
                let (count, from) = socket.recv_from(&mut bytes).unwrap();
                for answer in answer(number, &bytes[..count]) {
                    socket.send_to(&answer, from).unwrap();
                }
            }
        });
        port
    }

    #[test]
    fn datagrams_may_be_lost() {
        let port = serve(|number, bytes| vec![bytes.to_vec(); usize::from(number % 3 != 1)]);
        let datagrams = Datagrams::start("web", port).unwrap();
        datagrams.wait_for(8, SOON).unwrap();
        let (sent, returned) = datagrams.finish().unwrap();
        assert!(returned >= 8 && sent > returned, "{returned} of {sent}");
    }

    #[test]
    fn a_datagram_that_is_doubled_changed_cut_or_from_the_future_is_noticed() {
        type Spoil = fn(&[u8]) -> Vec<Vec<u8>>;
        let spoil: [(Spoil, &str); 4] = [
            (|bytes| vec![bytes.to_vec(); 2], "twice"),
            (|bytes| vec![bytes[..bytes.len() - 1].to_vec()], "not what was sent"),
            (|bytes| vec![bytes[..4].to_vec()], "cut"),
            (|_| vec![datagram(1000).to_vec()], "not what was sent"),
        ];
        for (spoil, problem) in spoil {
            let port = serve(move |_, bytes| spoil(bytes));
            let datagrams = Datagrams::start("web", port).unwrap();
            let error = datagrams.wait_for(u64::MAX, SOON).unwrap_err();
            assert!(error.contains(problem), "{error}");
            datagrams.finish().unwrap_err();
        }
    }
}
