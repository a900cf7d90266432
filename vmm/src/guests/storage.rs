//! The disks of a VM, for its operator: their state, and a larger size. A disk is any device that keeps its data in
//! a file or a block device of the host.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::guest::{Guest, GuestError, Life, Live};
use super::told::Resized;
use crate::devices::storage::StorageReport;
use crate::link::Request;
use crate::machine::Machine;
use crate::machine::claims::ClaimError;

/// A disk of a VM and its state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskReport {
    /// The device's node in the state document.
    pub device: String,
    /// The file or the block device.
    pub path: PathBuf,
    /// Its state, as the VM's process said.
    pub report: StorageReport,
    /// Time since then.
    pub age: Duration,
}

/// Asks the processes of all VMs for the state of their disks at the same time, and waits a second at most. Returns
/// what is known then, for each VM.
pub fn disk_reports<'a>(
    guests: impl Iterator<Item = &'a Guest> + Clone,
) -> Vec<Option<Vec<DiskReport>>> {
    guests.clone().for_each(Guest::ask_for_reports);
    guests.clone().for_each(Guest::await_reports);
    guests.map(Guest::disk_reports).collect()
}

/// Asks the process of a VM for the state of its disks, and waits a second at most. Returns what is known then.
pub fn disk_reports_of(machine: &Machine, live: &Live) -> Vec<DiskReport> {
    // A link that is broken ends the VM when the host looks at its events.
    let _ = live.process.ask_for_reports();
    let due = live.process.told().reports_due();
    let _ = due.map(|due| live.process.await_reports(due));
    known(machine, live).unwrap_or_default()
}

/// The last known state of the disks. `None` if the VM's process has not reported yet.
fn known(machine: &Machine, live: &Live) -> Option<Vec<DiskReport>> {
    let told = live.process.told();
    let (age, reports) = told.reports(Instant::now())?;
    let of_disk = |(device, path): (String, PathBuf)| {
        let report = reports.get(&device)?.clone();
        Some(DiskReport { device, path, report, age })
    };
    Some(disks_of(machine).filter_map(of_disk).collect())
}

/// The devices that keep data: node and path.
fn disks_of(machine: &Machine) -> impl Iterator<Item = (String, PathBuf)> {
    machine.devices.iter().filter_map(|device| {
        let path = device.options.stored_at()?;
        Some((device.node(), path.to_owned()))
    })
}

impl Guest {
    /// The error if another VM has a file of this one.
    pub fn claimed(&self, source: ClaimError) -> GuestError {
        GuestError::Claimed { name: self.name(), source }
    }

    /// Asks the VM's process for the state of its disks. Does not wait for the answer.
    pub fn ask_for_reports(&self) {
        match &self.life {
            // It would answer no earlier, and the host could not tell any more what it has read.
            Life::Live(live) if live.resuming.is_some() => {}
            Life::Live(live) => {
                // A link that is broken ends the VM when the host looks at its events.
                let _ = live.process.ask_for_reports();
            }
            _ => {}
        }
    }

    /// Waits until the VM's process has reported or is late.
    fn await_reports(&self) {
        if let (Life::Live(live), Some(due)) = (&self.life, self.reports_due()) {
            // A link that is broken ends the VM when the host looks at its events.
            let _ = live.process.await_reports(due);
        }
    }

    /// Until when to wait for the state of the disks, if the VM's process owes it.
    pub fn reports_due(&self) -> Option<Instant> {
        match &self.life {
            Life::Live(live) => live.process.told().reports_due(),
            _ => None,
        }
    }

    /// The last known state of the disks. `None` if the VM has no process, or one that has not reported yet.
    pub fn disk_reports(&self) -> Option<Vec<DiskReport>> {
        let Life::Live(live) = &self.life else { return None };
        known(&self.machine, live)
    }

    /// Begins to make the disk `disk` (a node or a path) as large as its file or block device is now; a file is grown
    /// to `bytes` before that. The guest is told. Returns the disk's node, with which [`resized`](Self::resized) tells
    /// the end. Errors unless the VM runs.
    pub fn resize_disk(&self, disk: &str, bytes: Option<u64>) -> Result<String, GuestError> {
        let name = self.machine.name.clone();
        let device = self.find_disk(disk)?;
        let live = match &self.life {
            Life::Live(live) if live.running => live,
            _ => return Err(self.wrong_state("only the disks of a VM that runs can be resized")),
        };
        // A process that hangs must not delay the host, so nobody waits for its answer.
        let sent = live.process.notify(Request::Resize { device: device.clone(), bytes });
        sent.map(|()| device).map_err(|source| GuestError::Process { name, source })
    }

    /// Takes the ends of resizes that the VM's process has told.
    pub fn resized(&self) -> Vec<Resized> {
        match &self.life {
            Life::Live(live) => live.process.told().take_resized(),
            _ => Vec::new(),
        }
    }

    /// Returns the node of the one disk that `disk` names by its node or its path.
    fn find_disk(&self, disk: &str) -> Result<String, GuestError> {
        let mut found =
            disks_of(&self.machine).filter(|(node, path)| node == disk || path.as_os_str() == disk);
        match (found.next(), found.next()) {
            (Some((node, _)), None) => Ok(node),
            _ => {
                let known = disks_of(&self.machine)
                    .map(|(node, path)| format!("{node} ({})", path.display()));
                let known: Vec<String> = known.collect();
                let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                let (name, wanted) = (self.machine.name.clone(), disk.to_owned());
                Err(GuestError::NoDisk { name, wanted, known })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::HostSection;
    use crate::guests::confinement::Confinement;
    use crate::machine::place;
    use crate::machine::tests::{disk, sample, serial};

    fn guest(machine: Machine) -> Guest {
        Guest::new(machine, &Confinement::new(&HostSection::default()))
    }

    #[test]
    fn a_disk_is_named_by_its_node_or_its_path_and_otherwise_those_that_exist_are_told() {
        let web = guest(sample());
        assert_eq!(web.find_disk("virtio-blk@1").unwrap(), "virtio-blk@1");
        assert_eq!(web.find_disk("/dev/vdb").unwrap(), "virtio-blk@2");
        for wrong in ["", "/data/b.img", "serial@3f8", "virtio-blk@3"] {
            let error = web.find_disk(wrong).unwrap_err().to_string();
            assert!(
                error.contains("virtio-blk@1 (/data/a.img), virtio-blk@2 (/dev/vdb)"),
                "{error}"
            );
        }
        // Two disks with one path.
        let devices = place(vec![disk("/a", true), disk("/a", true), serial()]);
        let twice = guest(Machine { devices, ..sample() });
        assert!(twice.find_disk("/a").unwrap_err().to_string().contains("`/a`"));
        assert_eq!(twice.find_disk("virtio-blk@2").unwrap(), "virtio-blk@2");
    }

    #[test]
    fn a_vm_that_is_switched_off_has_no_reports_and_its_disks_keep_their_size() {
        let web = guest(sample());
        web.ask_for_reports();
        assert_eq!((web.disk_reports(), web.reports_due()), (None, None));
        let error = web.resize_disk("/dev/vdb", Some(1 << 30)).unwrap_err().to_string();
        assert!(error.contains("stopped") && error.contains("a VM that runs"), "{error}");
    }
}
