//! The harness's end of one guest's serial port.
//!
//! A thread reads the port from before the host boots until the machine ends, so that no line is lost
//! over any number of updates. Notes of the guest ([`Note`]) and the last lines that were not
//! heartbeats are kept for error messages.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::continuity::{Check, Continuity};
use crate::mutex::lock;
use crate::paths;
use crate::workload::Heartbeat;
use crate::workload::heartbeat::{NOTE_MARKER, unseal};

/// Number of the guest's last lines that are kept, without heartbeats and notes.
const KEPT_LINES: usize = 40;

/// An announcement of the guest. The member `note` is its kind.
pub type Note = Value;

#[derive(Debug, Default)]
struct Heard {
    continuity: Continuity,
    notes: Vec<Note>,
    other: VecDeque<String>,
    closed: bool,
    /// The text that is looked for in lines that are neither heartbeats nor notes, and whether one had it.
    looked_for: Option<(String, bool)>,
    /// What the last wait that timed out was for.
    missed: Option<String>,
}

/// A guest, observed through its serial port.
#[derive(Debug)]
pub struct Guest {
    name: String,
    heard: Arc<(Mutex<Heard>, Condvar)>,
    port: UnixStream,
}

/// A guest did not do what the harness waited for.
#[derive(Debug, thiserror::Error)]
#[error(
    "guest {name}: {waited_for} did not happen {until}; last heartbeat: {last}; last lines:\n{lines}"
)]
pub struct GuestError {
    name: String,
    waited_for: String,
    until: String,
    last: String,
    lines: String,
}

impl Guest {
    /// Listens to `port` from now on.
    pub fn listen(name: &str, port: UnixStream) -> io::Result<Self> {
        let heard = Arc::new((Mutex::new(Heard::default()), Condvar::new()));
        let (reader, shared) = (BufReader::new(port.try_clone()?), Arc::clone(&heard));
        thread::spawn(move || hear(reader, &shared));
        Ok(Self { name: name.to_owned(), heard, port })
    }

    /// The VM's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Sends the guest an order: `say TEXT`, `date`, `carrier 0|1`, `offline VCPU`, `online VCPU`, `size PATH`,
    /// `write PATH OFFSET`, `zero PATH`, `scratch`, `poweroff`, `reboot`, `panic`, `hang`.
    pub fn order(&self, order: &str) -> io::Result<()> {
        (&self.port).write_all(format!("{order}\n").as_bytes())
    }

    /// Sets the mark: progress is counted from here on.
    pub fn mark(&self) {
        self.lock().continuity.mark();
    }

    /// Notes that the guest was resumed: only later lines show its state after the resume.
    pub fn resumed(&self) {
        self.lock().continuity.resumed();
    }

    /// Waits for `count` more heartbeats.
    pub fn wait_for_heartbeats(&self, count: u64, timeout: Duration) -> Result<(), GuestError> {
        let wanted = self.lock().continuity.lines() + count;
        self.wait(&format!("heartbeat {wanted}"), timeout, |heard| {
            heard.continuity.lines() >= wanted
        })
    }

    /// Looks out, from now on, for a line of the guest's kernel that contains `text`.
    pub fn look_out_for(&self, text: &str) {
        self.lock().looked_for = Some((text.to_owned(), false));
    }

    /// Waits for the line that is looked for.
    pub fn wait_for_line(&self, timeout: Duration) -> Result<(), GuestError> {
        let looked_for = self.lock().looked_for.clone();
        let what = format!("the line {:?}", looked_for.map(|(text, _)| text));
        self.wait(&what, timeout, |heard| heard.looked_for.as_ref().is_none_or(|(_, seen)| *seen))
    }

    /// Waits until the guest has, since the mark, made progress in each kind of work: counters, memory,
    /// disk and entropy ([`Continuity::has_settled`]).
    pub fn wait_until_settled(&self, timeout: Duration) -> Result<(), GuestError> {
        self.wait("progress of all of its work", timeout, |heard| heard.continuity.has_settled())
    }

    /// Waits for a note of a kind and returns the latest one.
    pub fn wait_for_note(&self, kind: &str, timeout: Duration) -> Result<Note, GuestError> {
        let find = |heard: &Heard| heard.notes.iter().rfind(|n| n["note"] == kind).cloned();
        self.wait(&format!("a note of kind {kind}"), timeout, |heard| find(heard).is_some())?;
        Ok(find(&self.lock()).unwrap_or_default())
    }

    /// Waits until `are_enough` holds for the notes so far, and returns them.
    pub fn wait_for_notes(
        &self,
        waited_for: &str,
        timeout: Duration,
        are_enough: impl Fn(&[Note]) -> bool,
    ) -> Result<Vec<Note>, GuestError> {
        self.wait(waited_for, timeout, |heard| are_enough(&heard.notes))?;
        Ok(self.notes())
    }

    /// The results of all checks of this guest, in a fixed order.
    pub fn checks(&self) -> Vec<Check> {
        self.lock().continuity.checks()
    }

    /// How much its clock fell behind the harness's clock over all updates, in microseconds; negative if it ran
    /// ahead. `None` before the first.
    pub fn clock_behind_us(&self) -> Option<i64> {
        self.lock().continuity.clock_step()
    }

    /// All notes so far.
    pub fn notes(&self) -> Vec<Note> {
        self.lock().notes.clone()
    }

    /// The last heartbeat.
    pub fn last(&self) -> Option<Heartbeat> {
        self.lock().continuity.last().cloned()
    }

    /// What the last wait that timed out was for. `None` if none has.
    pub fn missed(&self) -> Option<String> {
        self.lock().missed.clone()
    }

    /// Heartbeats that arrived so far.
    pub fn lines(&self) -> u64 {
        self.lock().continuity.lines()
    }

    fn wait(
        &self,
        waited_for: &str,
        timeout: Duration,
        condition: impl Fn(&Heard) -> bool,
    ) -> Result<(), GuestError> {
        let start = Instant::now();
        let mut heard = self.lock();
        while !condition(&heard) {
            let left = timeout.saturating_sub(start.elapsed());
            if left.is_zero() || heard.closed {
                heard.missed = (!heard.closed).then(|| waited_for.to_owned());
                return Err(self.error(&heard, waited_for, timeout));
            }
            // Every line wakes this thread. Without lines it looks once a second.
            let slice = left.min(Duration::from_secs(1));
            let waited = self.heard.1.wait_timeout(heard, slice);
            heard = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    fn error(&self, heard: &Heard, waited_for: &str, timeout: Duration) -> GuestError {
        let lines: Vec<&str> = heard.other.iter().map(String::as_str).collect();
        GuestError {
            name: self.name.clone(),
            waited_for: waited_for.to_owned(),
            until: match heard.closed {
                true => "before the machine ended".to_owned(),
                false => format!("within {timeout:?}"),
            },
            last: heard
                .continuity
                .last()
                .map_or("none".into(), |beat| beat.to_line().trim_end().to_owned()),
            lines: lines.join("\n"),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Heard> {
        lock(&self.heard.0)
    }
}

fn hear(mut reader: impl BufRead, shared: &(Mutex<Heard>, Condvar)) {
    let start = Instant::now();
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = reader.read_until(b'\n', &mut line);
        let mut heard = lock(&shared.0);
        match read {
            Ok(len) if len > 0 => {
                take(&mut heard, &String::from_utf8_lossy(&line), start.elapsed())
            }
            _ => heard.closed = true,
        }
        shared.1.notify_all();
        if heard.closed {
            return;
        }
    }
}

fn take(heard: &mut Heard, line: &str, at: Duration) {
    heard.continuity.observe(line, at);
    match unseal(NOTE_MARKER, line) {
        Some(Ok(note)) => heard.notes.extend(serde_json::from_str::<Note>(note)),
        _ if Heartbeat::parse(line).is_some_and(|beat| beat.is_ok()) => {}
        _ => {
            if paths::verbose() {
                eprintln!("guest: {}", line.trim_end());
            }
            if let Some((text, seen)) = &mut heard.looked_for {
                *seen |= line.contains(text.as_str());
            }
            if heard.other.len() == KEPT_LINES {
                heard.other.pop_front();
            }
            heard.other.push_back(line.trim_end().to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::heartbeat::sealed;

    const SOON: Duration = Duration::from_secs(20);

    #[test]
    fn notes_and_heartbeats_are_heard_and_kernel_lines_kept_for_the_error() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let guest = Guest::listen("web", ours).unwrap();
        theirs.write_all(b"[ 0.0] Linux version\r\n").unwrap();
        let note = sealed(NOTE_MARKER, r#"{"note":"boot","vcpus":2}"#);
        theirs.write_all(note.as_bytes()).unwrap();
        assert_eq!(guest.wait_for_note("boot", SOON).unwrap()["vcpus"], 2);
        drop(theirs);
        let error = guest.wait_for_heartbeats(1, SOON).unwrap_err().to_string();
        assert!(error.contains("guest web: heartbeat 1"), "{error}");
        assert!(error.contains("Linux version"), "{error}");
    }

    #[test]
    fn a_guest_that_is_waited_for_in_vain_remembers_what_for_and_one_that_is_gone_does_not() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let guest = Guest::listen("web", ours).unwrap();
        assert_eq!(guest.missed(), None);
        guest.wait_for_heartbeats(1, Duration::ZERO).unwrap_err();
        assert_eq!(guest.missed().as_deref(), Some("heartbeat 1"));
        drop(theirs);
        guest.wait_for_heartbeats(1, SOON).unwrap_err();
        assert_eq!(guest.missed(), None);
    }

    #[test]
    fn a_line_that_is_looked_for_is_seen_also_if_it_is_forgotten_when_it_is_waited_for() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let guest = Guest::listen("web", ours).unwrap();
        guest.look_out_for("Linux version");
        theirs.write_all(b"[ 0.0] Linux version 7.3\n").unwrap();
        theirs.write_all(&b"another line\n".repeat(2 * KEPT_LINES)).unwrap();
        guest.wait_for_line(SOON).unwrap();
        guest.look_out_for("Linux version");
        guest.wait_for_line(Duration::ZERO).unwrap_err();
    }

    #[test]
    fn bytes_that_are_no_text_harm_nothing() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let guest = Guest::listen("web", ours).unwrap();
        theirs.write_all(b"\xff\xfe\0@perennial \xc3\x28\n").unwrap();
        theirs.write_all(sealed(NOTE_MARKER, r#"{"note":"boot"}"#).as_bytes()).unwrap();
        guest.wait_for_note("boot", SOON).unwrap();
        assert_eq!(guest.lines(), 0);
    }

    #[test]
    fn an_order_goes_out_as_one_line() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let guest = Guest::listen("web", ours).unwrap();
        guest.order("say hello").unwrap();
        let mut line = String::new();
        BufReader::new(theirs).read_line(&mut line).unwrap();
        assert_eq!(line, "say hello\n");
    }
}
