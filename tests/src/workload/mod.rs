//! What the guests do, so that a live update has something to break.
//!
//! One thread for each vCPU counts, one verifies and changes memory, one writes and verifies
//! records on a disk, one watches the clocks and one the kernel's log; ten times a second their
//! state goes out as one [`heartbeat`]. The formats are shared with the harness, which judges
//! them from outside.

pub mod counter;
pub mod disk;
pub mod heartbeat;
pub mod kernel_log;
pub mod memory;

pub use heartbeat::Heartbeat;
