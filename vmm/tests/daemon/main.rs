//! Hosts that are not PID 1, without running VMs: what needs no KVM.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod clients;
mod events;
mod handover;
mod host;
mod instance;
mod signals;
