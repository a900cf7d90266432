//! VMs as the host holds them: each with its description, its files, its RAM, and a process that it asks
//! and listens to. Both the host and the live update work with them, so they know of neither.

pub mod conversation;
pub mod entry;
pub mod files;
mod guest;
pub mod ledger;
pub mod memfd;
pub mod process;
pub mod ram;

pub use guest::{Guest, GuestError, Life, Live, MOST_MEMORY_BYTES};
