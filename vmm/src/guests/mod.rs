//! VMs as the host holds them: each with its description, its open files, its RAM, and a process to which
//! the host sends requests. Both `host` and `live_update` use this module, so it imports neither.

mod again;
pub mod answers;
mod booting;
pub mod confinement;
pub mod conversation;
pub mod elsewhere;
mod ending;
pub mod entry;
pub mod errand;
pub mod files;
pub mod first_states;
mod guest;
pub mod held;
mod hints;
pub mod indexed;
pub mod ledger;
mod links;
pub mod memfd;
pub mod opening;
pub mod process;
mod process_error;
pub mod ram;
mod restarts;
pub mod resuming;
pub mod staged;
pub mod storage;
pub mod told;
pub mod turns;
mod users;
mod words;

pub use guest::{Guest, GuestError, Life, Live, MOST_MEMORY_BYTES};
