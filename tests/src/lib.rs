//! The two-kernel harness: builds images, boots a host in QEMU, runs live updates on it, and checks
//! from outside whether its VMs went on undisturbed.

pub mod binaries;
pub mod conformance;
pub mod continuity;
pub mod control;
pub mod datagrams;
pub mod debian;
pub mod dependencies;
pub mod diagnosis;
pub mod earlier;
pub mod foreground;
pub mod guest;
pub mod host;
pub mod image;
pub mod iperf3;
pub mod kernels;
pub mod modules;
pub mod mutex;
pub mod network;
pub mod paths;
pub mod plan;
pub mod pool;
pub mod qemu;
pub mod recipe;
pub mod report;
pub mod samples;
pub mod side_by_side;
pub mod suite;
pub mod systemd;
mod tap;
pub mod timeline;
mod times;
mod tsc;
pub mod unified;
pub mod wire;
pub mod workload;
