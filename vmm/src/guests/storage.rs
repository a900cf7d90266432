//! The disks of a VM, for its operator: their state, and a larger size. A disk is any device that keeps its data in
//! a file or a block device of the host.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::conversation::unexpected;
use super::guest::{Guest, GuestError, Life};
use crate::devices::storage::StorageReport;
use crate::link::{Reply, Request};

/// How long the processes of all VMs together may take to report. A process that hangs must not keep an
/// operator from the state of the others.
const REPORT_WITHIN: Duration = Duration::from_secs(2);

/// A disk of a VM and its state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskReport {
    /// The device's node in the state document.
    pub device: String,
    /// The file or the block device.
    pub path: PathBuf,
    /// Its state, as the VM's process says.
    pub report: StorageReport,
}

/// Asks the processes of all VMs for the state of their disks. The result has an entry for each VM: `None` if it has
/// no process, or a process that does not answer in time.
pub fn disk_reports(guests: &[Guest]) -> Vec<Option<Vec<DiskReport>>> {
    let asked: Vec<bool> = guests.iter().map(Guest::ask_for_reports).collect();
    let deadline = Instant::now() + REPORT_WITHIN;
    let answered = guests.iter().zip(asked);
    answered.map(|(guest, asked)| guest.reports_by(deadline).filter(|_| asked)).collect()
}

impl Guest {
    /// The devices that keep data: node and path.
    fn disks(&self) -> impl Iterator<Item = (String, PathBuf)> {
        self.machine.devices.iter().filter_map(|device| {
            let path = device.options.stored_at()?;
            Some((device.node(), path.to_owned()))
        })
    }

    /// Returns whether the VM's process was asked and is to be waited for.
    fn ask_for_reports(&self) -> bool {
        match &self.life {
            // A link that is broken ends the VM when the host looks at its events.
            Life::Live(live) => live.process.query(Request::ReportStorage).unwrap_or(false),
            _ => false,
        }
    }

    fn reports_by(&self, deadline: Instant) -> Option<Vec<DiskReport>> {
        let Life::Live(live) = &self.life else { return None };
        let Ok(Some(Reply::Storage(reports))) = live.process.answer_by(deadline) else {
            return None;
        };
        let mut reports: BTreeMap<String, StorageReport> = reports.into_iter().collect();
        let of_disk = |(device, path): (String, PathBuf)| {
            let report = reports.remove(&device)?;
            Some(DiskReport { device, path, report })
        };
        Some(self.disks().filter_map(of_disk).collect())
    }

    /// Makes the disk `disk` (a node or a path) as large as its file or block device is now; a file is grown to
    /// `bytes` before that. The guest is told. Returns the size. Errors unless the VM runs.
    pub fn resize_disk(&self, disk: &str, bytes: Option<u64>) -> Result<u64, GuestError> {
        let name = self.machine.name.clone();
        let device = self.find_disk(disk)?;
        let live = match &self.life {
            Life::Live(live) if live.running => live,
            _ => return Err(self.wrong_state("only the disks of a VM that runs can be resized")),
        };
        let error = |source| GuestError::Process { name, source };
        match live.process.ask(Request::Resize { device, bytes }) {
            Ok(Reply::Resized { bytes }) => Ok(bytes),
            Ok(other) => Err(error(unexpected("resize a device", &other))),
            Err(source) => Err(error(source)),
        }
    }

    /// Returns the node of the one disk that `disk` names by its node or its path.
    fn find_disk(&self, disk: &str) -> Result<String, GuestError> {
        let mut found =
            self.disks().filter(|(node, path)| node == disk || path.as_os_str() == disk);
        match (found.next(), found.next()) {
            (Some((node, _)), None) => Ok(node),
            _ => {
                let known = self.disks().map(|(node, path)| format!("{node} ({})", path.display()));
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
    use crate::machine::tests::{disk, sample, serial};
    use crate::machine::{Machine, place};

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
        assert_eq!(disk_reports(&[guest(sample()), guest(sample())]), [None, None]);
        let error = web.resize_disk("/dev/vdb", Some(1 << 30)).unwrap_err().to_string();
        assert!(error.contains("stopped") && error.contains("a VM that runs"), "{error}");
    }
}
