//! The Perennial VMM: virtual machines whose memory and state outlive the host's kernel.

pub mod arch;
pub mod bus;
pub mod config;
pub mod devices;
pub mod kvm;
pub mod link;
pub mod machine;
pub mod state;
pub mod vcpu;
