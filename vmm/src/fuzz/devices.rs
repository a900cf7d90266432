//! Machines with one device of every kind, with files and wires, without a host and KVM.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use crate::arch::x86_64::cpuid::CpuModel;
use crate::devices::catalog::KindInfo;
use crate::devices::files::Opened;
use crate::kvm::interrupts::fake::FakeWires;
use crate::link::{Fds, Role};
use crate::machine::{DiskBoot, Machine, VmName, place};
use crate::vm::DevicesStateV1;
use crate::vm::board::Wires;

/// A machine with one device of every kind.
pub(super) fn machine() -> Machine {
    Machine {
        name: VmName::new("fuzz").unwrap(),
        ram_bytes: 64 << 20,
        cpus: 1,
        cpu: CpuModel::Host,
        boot: DiskBoot::default().into(),
        devices: place(KindInfo::samples()),
    }
}

/// Returns wires that need no KVM, and the object that records what the devices send on them.
pub(super) fn wires(memory: &GuestMemoryMmap) -> (Wires, Arc<FakeWires>) {
    let fake = Arc::new(FakeWires::default());
    let wires = Wires {
        memory: memory.clone(),
        interrupts: fake.clone(),
        doorbells: fake.clone(),
        clock: fake.clone(),
        events: Arc::new(|_| ()),
    };
    (wires, fake)
}

/// The files of each device of a machine, with the name of the device's node.
pub(super) type Files = Vec<(String, Vec<Opened>)>;

/// Opens files as the host would. Returns them and, for sockets, the other ends.
pub(super) fn open(
    machine: &Machine,
    state: Option<&DevicesStateV1>,
) -> Option<(Files, Vec<UnixStream>)> {
    let (mut files, mut peers) = (Vec::new(), Vec::new());
    for (index, device) in machine.devices.iter().enumerate() {
        let state = state.map(|state| &state.devices[index].state);
        let sample = KindInfo::sample_files(&device.options, state)?;
        files.push((device.node(), sample.opened));
        peers.extend(sample.peer);
    }
    Some((files, peers))
}

/// Returns duplicates of the files in the form in which the VM's process receives them.
pub(super) fn send(files: &Files) -> Fds {
    let (mut roles, mut fds) = (Vec::new(), Vec::new());
    for (node, opened) in files {
        for Opened { role, fd, identity } in opened {
            let (node, role) = (node.clone(), (*role).to_owned());
            roles.push(Role::Device { node, role, identity: identity.clone() });
            fds.push(fd.try_clone().unwrap());
        }
    }
    Fds::new(&roles, fds).unwrap()
}

/// Returns a machine's files as the VM's process receives them, and the other ends.
pub(super) fn files_for(
    machine: &Machine,
    state: Option<&DevicesStateV1>,
) -> Option<(Fds, Vec<UnixStream>)> {
    let (files, peers) = open(machine, state)?;
    Some((send(&files), peers))
}
