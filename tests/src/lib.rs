//! The two-kernel harness: builds images, boots a host in QEMU, updates it, and judges from outside
//! whether the VMs on it noticed.

pub mod binaries;
pub mod image;
pub mod kernels;
pub mod paths;
pub mod qemu;
pub mod workload;
