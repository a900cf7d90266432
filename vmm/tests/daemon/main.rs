//! Hosts that are not PID 1: without VMs, for what needs no KVM, and with guests of a few bytes.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod clients;
mod defects;
mod ending;
mod errands;
mod events;
mod exchanged;
mod faults;
mod files;
mod guests;
mod handover;
mod host;
mod hostile;
mod instance;
mod kernel;
mod log;
mod rehearsal;
mod signals;
mod travel;
