//! The Perennial VMM: virtual machines whose memory and state outlive the host's kernel.

pub mod bus;
pub mod devices;
pub mod state;
