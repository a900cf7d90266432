//! The protocol between the host and the process of one VM.
//!
//! The host knows all names (paths, sessions). The VM's process opens nothing by name and receives
//! file descriptors instead, each with its [`Role`]. The host sends a [`Request`] and waits for its
//! [`Reply`]; the VM's process may send an [`Event`] at any time. Messages are JSON, one per
//! packet. They contain no bytes that a guest wrote, except for the names in an event or an error about a VM that
//! boots from its disk, which are short and escaped.

mod channel;
#[cfg(test)]
mod frozen;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use guest_mem::Backing;
use serde::{Deserialize, Serialize};

pub use channel::{Channel, LinkError};

use crate::devices::files::{DeviceFiles, Opened};
use crate::devices::identity::Identity;
use crate::devices::network::Link;
use crate::devices::storage::StorageReport;
use crate::machine::Machine;

/// The number of this protocol. Raise it with every change after which a host cannot serve a VM's process of the
/// version before: `recover VM --with previous` starts such a process only if both numbers are equal.
pub const PROTOCOL: u32 = 1;

/// The purpose of a file descriptor that is sent with a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// `/dev/kvm`.
    Kvm,
    /// The kernel image to boot.
    Kernel,
    /// The initramfs to boot with.
    Initramfs,
    /// A file of one of the machine's devices.
    Device {
        /// The device's node in the state document.
        node: String,
        /// The purpose of the file; each kind of device defines its own names.
        role: String,
        /// The identity of the file that the host opened, if the device checks it.
        identity: Option<Identity>,
    },
    /// A segment of guest RAM. Segments are sent in the layout's order.
    Segment,
    /// The memfd of the state document.
    State,
}

impl Role {
    /// Returns the role of a file that was opened for the device at `node`, and the file.
    pub fn of_device(node: &str, opened: Opened) -> (Self, OwnedFd) {
        let Opened { role, fd, identity } = opened;
        (Self::Device { node: node.to_owned(), role: role.to_owned(), identity }, fd)
    }
}

/// The kind of file that holds guest RAM. It depends on the backend, which only the host knows; the
/// host sends it so that the VM's process refuses segments of the other kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ram {
    /// Memfds.
    Memfd,
    /// Files with DAX, in a pool.
    DaxFile,
}

impl From<Ram> for Backing {
    fn from(ram: Ram) -> Self {
        match ram {
            Ram::Memfd => Self::Memfd,
            Ram::DaxFile if crate::confine::pools_have_dax() => Self::DaxFile,
            Ram::DaxFile => Self::AnyFile,
        }
    }
}

/// What to do with a VM to whose guest an earlier host told something of its processor's speed or safety that
/// is not true of this host's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MissingHints {
    /// Continue the guest, and report what is missing.
    #[default]
    Accept,
    /// Keep the VM preserved.
    Refuse,
}

/// A request of the host to a VM's process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Give up all power that the process does not need. Always the first request, and only then.
    Confine {
        /// The user and group ID to change to. Used if the process runs as root.
        user: u32,
    },
    /// Build the machine and load its kernel; it stays paused.
    Boot {
        /// The description of the machine.
        machine: Machine,
        /// The kind of its RAM segments.
        ram: Ram,
        /// Whether its guest may have VMs of its own. The state of such a machine is not complete, so it is never
        /// carried over an update.
        #[serde(default)]
        nested: bool,
    },
    /// Build the machine from the state document; it stays paused.
    Restore {
        /// The host's description of the machine, which must equal that in the document.
        machine: Machine,
        /// The kind of its RAM segments.
        ram: Ram,
        /// Length of the document in bytes. The memfd may be longer.
        bytes: u64,
        /// What to do if the host lacks hints of the guest's CPUID.
        hints: MissingHints,
    },
    /// Resume the guest.
    Resume,
    /// Stop the vCPUs, then drain the devices.
    Pause,
    /// Write the state document into the memfd that comes with this request, and check it.
    Save,
    /// Write the state in which the machine came into this process into the memfd that comes with this request: that
    /// before the first instruction of a boot, or that which was restored. The guest may run or be paused.
    SaveFirst,
    /// Make durable what the guest wrote to its disks until now. It may run or be paused.
    Sync,
    /// Press the machine's power button: ask the guest to shut down.
    PressPowerButton,
    /// Take the link of a network device up or down.
    SetLink {
        /// The device's node in the state document.
        device: String,
        /// Whether the link is to be up.
        up: bool,
    },
    /// Report the state of the storage of each device that has one.
    ReportStorage,
    /// Make a device as large as its storage, and tell the guest. [`Event::Resized`] tells the end.
    Resize {
        /// The device's node.
        device: String,
        /// The size to which the storage grows before that.
        bytes: Option<u64>,
    },
}

/// The answer to a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// To [`Request::Confine`].
    Confined {
        /// The parts of the confinement that are missing, each with the reason.
        missing: Vec<String>,
    },
    /// To [`Request::Boot`].
    Built,
    /// To [`Request::Restore`].
    Restored {
        /// Names of the hints in the guest's CPUID that this host lacks.
        missing_hints: Vec<String>,
    },
    /// To [`Request::Resume`].
    Resumed {
        /// Host TSC when the first vCPU was about to enter `KVM_RUN`.
        first_entry_ticks: u64,
    },
    /// To [`Request::Pause`].
    Paused {
        /// Host TSC when the last vCPU had left `KVM_RUN`.
        last_exit_ticks: u64,
    },
    /// To [`Request::Save`] and [`Request::SaveFirst`].
    Saved {
        /// Length of the document in bytes.
        bytes: u64,
    },
    /// To [`Request::Sync`].
    Synced,
    /// To [`Request::PressPowerButton`].
    Pressed,
    /// To [`Request::SetLink`].
    LinkSet,
    /// To [`Request::ReportStorage`]: each storage by the node of its device.
    Storage(Vec<(String, StorageReport)>),
    /// To [`Request::Resize`], which begins.
    Resizing,
    /// The request failed: the chain of causes, outermost first. A running VM keeps running, a
    /// paused one stays paused.
    Failed(Vec<String>),
}

/// A message that a VM's process sends without a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// The guest powered its machine off.
    Shutdown,
    /// The guest asked for a reset.
    Reset,
    /// A vCPU cannot continue; the text says why.
    Crashed(String),
    /// The link of a network device has changed. Also sent once when the machine is built.
    Link {
        /// The device's node in the state document.
        device: String,
        /// The state of the link.
        link: Link,
    },
    /// A [`Request::Resize`] has ended.
    Resized {
        /// The device's node in the state document.
        device: String,
        /// Its size in bytes, or the chain of causes why it stays as it is, outermost first.
        resized: Result<u64, Vec<String>>,
    },
    /// The kernel of a VM that boots from its disk is loaded.
    Booted {
        /// Which entry of the disk it is.
        entry: String,
        /// What of the disk should have been booted and cannot be, and other warnings.
        warnings: Vec<String>,
    },
}

impl Event {
    /// What stands before and after the text in a packet with [`Event::Crashed`], for a signal handler, which
    /// cannot use the allocator. The text must have neither quotation marks nor backslashes.
    pub const CRASHED: (&str, &str) = ("{\"event\":{\"crashed\":\"", "\"}}");
}

/// Any message that a VM's process sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FromVm {
    /// The answer to the oldest unanswered request.
    Reply(Reply),
    /// An event.
    Event(Event),
}

/// A request as it is sent, with the roles of its fds.
#[derive(Debug, Serialize, Deserialize)]
pub struct Envelope {
    /// The request.
    pub request: Request,
    /// One role for each fd of the packet, in the order of the fds.
    pub roles: Vec<Role>,
}

/// The file descriptors that came with a request. Each can be taken once.
#[derive(Debug, Default)]
pub struct Fds(Vec<(Role, OwnedFd)>);

/// The file descriptors that came with a request are not those that it needs.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FdsError {
    /// The packet has more or fewer fds than roles.
    #[error("the request names {roles} file descriptors, {fds} came with it")]
    Count {
        /// Roles in the envelope.
        roles: usize,
        /// Descriptors received.
        fds: usize,
    },
    /// The number of descriptors for one role is not the number that the machine needs.
    #[error(
        "the request came with {found} file descriptors for {role:?}, the machine needs {wanted}"
    )]
    Role {
        /// The role.
        role: Box<Role>,
        /// How many came.
        found: usize,
        /// How many are needed.
        wanted: usize,
    },
    /// A descriptor that nothing in the machine needs.
    #[error("the request came with a file descriptor for {0:?}, which the machine does not need")]
    Leftover(Box<Role>),
}

impl Fds {
    /// Pairs the roles of an envelope with the descriptors of its packet.
    pub fn new(roles: &[Role], fds: Vec<OwnedFd>) -> Result<Self, FdsError> {
        if roles.len() != fds.len() {
            return Err(FdsError::Count { roles: roles.len(), fds: fds.len() });
        }
        Ok(Self(roles.iter().cloned().zip(fds).collect()))
    }

    /// Takes all descriptors of `role`. Errors unless there are exactly `wanted`.
    pub fn take(&mut self, role: Role, wanted: usize) -> Result<Vec<OwnedFd>, FdsError> {
        let (taken, rest): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.0).into_iter().partition(|(r, _)| *r == role);
        self.0 = rest;
        if taken.len() != wanted {
            return Err(FdsError::Role { role: role.into(), found: taken.len(), wanted });
        }
        Ok(taken.into_iter().map(|(_, fd)| fd).collect())
    }

    /// Takes all descriptors of the device at `node`.
    pub fn take_device(&mut self, node: &str) -> DeviceFiles {
        let mut files = DeviceFiles::default();
        for (role, fd) in std::mem::take(&mut self.0) {
            match role {
                Role::Device { node: of, role, identity } if of == node => {
                    files.push(role, fd, identity);
                }
                other => self.0.push((other, fd)),
            }
        }
        files
    }

    /// Borrows the file `role` of the device at `node`, which stays.
    pub fn device_file(&self, node: &str, role: &str) -> Option<BorrowedFd<'_>> {
        let found = self.0.iter().find(|(found, _)| match found {
            Role::Device { node: of, role: found, identity: _ } => of == node && found == role,
            _ => false,
        });
        found.map(|(_, fd)| fd.as_fd())
    }

    /// Errors if a descriptor was not taken.
    pub fn finish(self) -> Result<(), FdsError> {
        match self.0.into_iter().next() {
            Some((role, _)) => Err(FdsError::Leftover(role.into())),
            None => Ok(()),
        }
    }

    /// Takes the descriptor of `role`. Errors unless there is exactly one.
    pub fn take_one(&mut self, role: Role) -> Result<OwnedFd, FdsError> {
        let mut fds = self.take(role.clone(), 1)?;
        fds.pop().ok_or_else(|| FdsError::Role { role: role.into(), found: 0, wanted: 1 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    fn null() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn fds_are_taken_by_role_and_counted() {
        let roles = [Role::Segment, Role::Kvm, Role::Segment];
        let mut fds = Fds::new(&roles, vec![null(), null(), null()]).unwrap();
        assert_eq!(fds.take(Role::Segment, 2).unwrap().len(), 2);
        let missing = fds.take_one(Role::State).unwrap_err();
        assert_eq!(missing, FdsError::Role { role: Role::State.into(), found: 0, wanted: 1 });
        assert_eq!(
            Fds::new(&[Role::Kvm], vec![null()]).unwrap().finish(),
            Err(FdsError::Leftover(Role::Kvm.into()))
        );
        assert!(fds.take_one(Role::Kvm).is_ok());
        assert_eq!(fds.finish(), Ok(()));
        assert_eq!(Fds::new(&roles, vec![]).unwrap_err(), FdsError::Count { roles: 3, fds: 0 });
    }

    #[test]
    fn a_device_gets_its_own_files_and_no_others() {
        let role = |node: &str, role: &str| Role::Device {
            node: node.to_owned(),
            role: role.to_owned(),
            identity: None,
        };
        let roles = [role("disk@1", "image"), role("disk@2", "image"), role("disk@1", "log")];
        let mut fds = Fds::new(&roles, vec![null(), null(), null()]).unwrap();
        assert!(
            fds.device_file("disk@1", "log").is_some()
                && fds.device_file("disk@2", "log").is_none()
        );
        let mut first = fds.take_device("disk@1");
        assert!(first.take("image").is_ok() && first.take("log").is_ok());
        assert_eq!(first.finish(), Ok(()));
        assert_eq!(fds.take_device("disk@3").finish(), Ok(()));
        assert!(fds.take_device("disk@2").take("image").is_ok());
        assert_eq!(fds.finish(), Ok(()));
    }
}
