//! What the process of a VM has told the host, and what nobody waited for: the links of its network devices, the
//! state of its disks, the ends of resizes, the entry that it boots from its disk.
//!
//! A guest may have taken the process over, so all of it is bounded.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::devices::network::Link;
use crate::devices::storage::StorageReport;
use crate::link::LinkError;

/// Most devices with a link, and most with a storage: more than a machine has slots.
const MAX_DEVICES: usize = 64;
/// Most bytes of a device's name.
const MAX_NAME: usize = 64;
/// Most ends of resizes that nobody has taken. The host takes them after each message.
const MAX_RESIZED: usize = 64;

/// Most events within [`EVENTS_WITHIN`]. A VM sends one for each change of a link, each resize, and its end.
const MAX_EVENTS: u32 = 2048;
/// The time in which events are counted.
const EVENTS_WITHIN: Duration = Duration::from_secs(10);

/// How long a process may take to report the state of its disks before nobody waits for it any more.
const REPORT_WITHIN: Duration = Duration::from_secs(1);

/// The state of the storages of a VM, by the nodes of their devices.
pub type Reports = BTreeMap<String, StorageReport>;

/// The end of a resize: the node of the device, and its size in bytes or the chain of causes why that stays as it is.
pub type Resized = (String, Result<u64, Vec<String>>);

/// The entry that a VM booted from its own disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootedEntry {
    /// Which entry of the disk.
    pub entry: String,
    /// What of the disk should have been booted and cannot be, and other warnings.
    pub warnings: Vec<String>,
}

/// What one process has told.
#[derive(Debug, Default)]
pub struct Told {
    booted: Option<BootedEntry>,
    links: BTreeMap<String, Link>,
    reports: Option<(Instant, Reports)>,
    /// When it was asked for the reports that it owes.
    asked: Option<Instant>,
    resized: VecDeque<Resized>,
    /// Since when events are counted, and their number.
    events: Option<(Instant, u32)>,
}

impl Told {
    /// Counts an event. Errors if the process sends them without end: each wakes the host.
    pub fn note_event(&mut self, now: Instant) -> Result<(), LinkError> {
        let (since, count) = match self.events {
            Some((since, count)) if now.saturating_duration_since(since) < EVENTS_WITHIN => {
                (since, count + 1)
            }
            _ => (now, 1),
        };
        self.events = Some((since, count));
        match count > MAX_EVENTS {
            true => {
                let seconds = EVENTS_WITHIN.as_secs();
                let problem = format!(
                    "the VM's process sends without end: more than {MAX_EVENTS} events within {seconds} s"
                );
                Err(LinkError::Malformed(problem))
            }
            false => Ok(()),
        }
    }

    /// The entry that was booted from the VM's disk. `None` if the process booted nothing from it.
    pub fn booted(&self) -> Option<&BootedEntry> {
        self.booted.as_ref()
    }

    /// Keeps the entry that was booted.
    pub fn set_booted(&mut self, booted: BootedEntry) {
        self.booted = Some(booted);
    }

    /// The links of the network devices, by node.
    pub fn links(&self) -> &BTreeMap<String, Link> {
        &self.links
    }

    /// Keeps the link of a device.
    pub fn set_link(&mut self, device: String, link: Link) -> Result<(), LinkError> {
        if device.is_empty()
            || device.len() > MAX_NAME
            || !device.bytes().all(|byte| byte.is_ascii_graphic())
        {
            return Err(LinkError::Malformed("the link of a device without a name".to_owned()));
        }
        if self.links.len() >= MAX_DEVICES && !self.links.contains_key(&device) {
            return Err(LinkError::Malformed(format!("links of more than {MAX_DEVICES} devices")));
        }
        self.links.insert(device, link);
        Ok(())
    }

    /// Notes that the process is asked for reports. Returns whether to ask: not if it owes them already.
    pub fn ask_for_reports(&mut self, now: Instant) -> bool {
        let asks = self.asked.is_none();
        self.asked.get_or_insert(now);
        asks
    }

    /// Keeps the reports that the process owed.
    pub fn report(&mut self, reports: Vec<(String, StorageReport)>, now: Instant) {
        self.asked = None;
        self.reports = Some((now, reports.into_iter().take(MAX_DEVICES).collect()));
    }

    /// Notes that the process has refused to report.
    pub fn refuse_reports(&mut self) {
        self.asked = None;
    }

    /// Until when to wait for the reports that the process owes. `None` if it owes none.
    pub fn reports_due(&self) -> Option<Instant> {
        self.asked.map(|asked| asked + REPORT_WITHIN)
    }

    /// The last reports, and their age. `None` if the process has not reported yet.
    pub fn reports(&self, now: Instant) -> Option<(Duration, &Reports)> {
        let (at, reports) = self.reports.as_ref()?;
        Some((now.saturating_duration_since(*at), reports))
    }

    /// Keeps the end of a resize.
    pub fn resized(&mut self, resized: Resized) -> Result<(), LinkError> {
        if self.resized.len() >= MAX_RESIZED {
            let problem = format!("more than {MAX_RESIZED} ends of resizes without a request");
            return Err(LinkError::Malformed(problem));
        }
        self.resized.push_back(resized);
        Ok(())
    }

    /// Takes the ends of resizes, oldest first.
    pub fn take_resized(&mut self) -> Vec<Resized> {
        self.resized.drain(..).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_stay_known_while_the_process_owes_newer_ones() {
        let (mut told, start) = (Told::default(), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        assert!(told.reports(start).is_none() && told.reports_due().is_none());
        assert!(told.ask_for_reports(start));
        told.report(Vec::new(), after(1));
        assert_eq!(told.reports_due(), None);
        assert!(told.ask_for_reports(after(5)));
        assert!(!told.ask_for_reports(after(7)), "it owes them already");
        assert_eq!(told.reports_due(), Some(after(5) + REPORT_WITHIN));
        assert_eq!(told.reports(after(8)), Some((Duration::from_secs(7), &Reports::new())));
        told.refuse_reports();
        assert!(told.ask_for_reports(after(9)));
    }

    #[test]
    fn only_so_many_events_may_come_in_a_time() {
        let (mut told, start) = (Told::default(), Instant::now());
        for round in 0..3 {
            let now = start + EVENTS_WITHIN * round;
            (0..MAX_EVENTS).for_each(|_| told.note_event(now).unwrap());
        }
        told.note_event(start + EVENTS_WITHIN * 3 - Duration::from_millis(1)).unwrap_err();
    }

    #[test]
    fn what_a_process_tells_is_bounded() {
        let mut told = Told::default();
        for name in ["a\n", "", &"x".repeat(MAX_NAME + 1)] {
            told.set_link(name.to_owned(), Link::Up).unwrap_err();
        }
        for number in 0..MAX_DEVICES {
            told.set_link(format!("net@{number}"), Link::Up).unwrap();
        }
        told.set_link("one-too-many".to_owned(), Link::Up).unwrap_err();
        told.set_link("net@1".to_owned(), Link::Gone).unwrap();
        for number in 0..MAX_RESIZED {
            told.resized((format!("d@{number}"), Ok(0))).unwrap();
        }
        told.resized(("d@0".to_owned(), Ok(0))).unwrap_err();
        assert_eq!(told.take_resized().len(), MAX_RESIZED);
        told.resized(("d@0".to_owned(), Err(Vec::new()))).unwrap();
    }
}
