//! vCPUs: their threads and their state.
//!
//! [`VcpuSet`] runs the vCPUs of a machine; [`VcpuStateV1`] is the saved state of one vCPU.

mod run;
mod run_page;
mod set;
mod state;

pub use run::VcpuEvent;
pub use set::{VcpuError, VcpuSet};
pub use state::{RestoreError, VcpuStateV1};
