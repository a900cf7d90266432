//! PID 1 of the machine that probes an accelerator of QEMU: prints whether this machine has a usable
//! `/dev/kvm`, and powers off.

use std::fs::OpenOptions;

use perennial_tests::qemu::{PROBE_KVM, PROBE_NO_KVM};
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};

fn main() {
    let _ = mount("devtmpfs", "/dev", "devtmpfs", MountFlags::empty(), None);
    for problem in perennial_tests::modules::load_all() {
        println!("{problem}");
    }
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => println!("{PROBE_KVM}"),
        Err(error) => println!("{PROBE_NO_KVM}: {error}"),
    }
    let _ = reboot(RebootCommand::PowerOff);
}
