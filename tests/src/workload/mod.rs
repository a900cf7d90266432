//! The guests' workload, which exercises what a live update could break.
//!
//! One thread for each vCPU counts; others verify and change memory, write and verify records on a
//! disk, draw entropy, and watch the clocks and the kernel's log. Ten times a second the guest sends
//! their state as one [`heartbeat`]. Guest and harness share these formats.

pub mod counter;
pub mod disk;
pub mod heartbeat;
pub mod kernel_log;
pub mod memory;

pub use heartbeat::Heartbeat;
