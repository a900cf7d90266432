//! The Perennial VMM: virtual machines whose memory and state outlive the host's kernel.

pub mod answer;
pub mod api;
pub mod arch;
pub mod boot_disk;
pub mod bus;
pub mod causes;
pub mod cli;
pub mod config;
pub mod confine;
pub mod devices;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod guests;
pub mod host;
mod inherited_fd;
pub mod kvm;
pub mod link;
pub mod live_update;
mod look;
pub mod machine;
mod mutex;
mod open_files;
pub mod options;
pub mod random;
mod signals;
pub mod socket;
pub mod state;
pub mod vcpu;
pub mod vm;
mod work;
