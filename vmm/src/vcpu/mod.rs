//! vCPUs: their threads and their state.
//!
//! [`VcpuSet`] runs them, [`VcpuStateV1`] is what one of them is made of.

mod run;
mod run_page;
mod set;
mod state;

pub use run::VcpuEvent;
pub use set::{VcpuError, VcpuSet};
pub use state::{RestoreError, VcpuStateV1};
