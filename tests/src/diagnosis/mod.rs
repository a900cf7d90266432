//! Finds out what a silent guest or host hangs on, when a test's wait has timed out.
//!
//! First the host is asked for its status. If the host does not answer, QEMU's monitor shows the CPUs of
//! the machine. If it answers, the host dumps the state document of each silent guest twice, and parts of
//! its RAM. These show registers, timers, rings, the serial port and the calls on the stack, with names
//! from the guest kernel's symbols. The last line says what the guest hangs on, as far as known.
//!
//! The machine may be in any state, so every request has a deadline, and the text reports failures.

mod document;
mod machine;
mod stack;
mod symbols;
mod verdict;

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::control::Control;
use crate::kernels::{self, Role};
use crate::qemu::Qemu;
use document::{Queue, Snapshot};
use symbols::Symbols;
use verdict::Findings;

/// Longest time for all requests to the host about its guests.
const WITHIN: Duration = Duration::from_secs(90);
/// Longest time for an answer of a running host. Under emulation a state document takes a second.
const ANSWER: Duration = Duration::from_secs(20);
/// Longest time for the first answer, of a host that may hang.
const FIRST_ANSWER: Duration = Duration::from_secs(10);
/// Time between two looks at a guest. In this time every timer and watchdog of a kernel should fire.
const BETWEEN: Duration = Duration::from_secs(3);
/// Where in a ring the driver's or the device's index is (Virtio 1.2, 2.7.6 and 2.7.8).
const RING_INDEX: u64 = 2;

/// A guest that did not do what a test waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Silent {
    /// Name of the VM.
    pub name: String,
    /// What the test waited for.
    pub waited_for: String,
}

/// Describes the state of the machine, its host and these guests. `host_kernel` and `guest_kernel` are
/// `vmlinux` files with the symbols for addresses.
pub fn diagnose(
    qemu: &mut Qemu,
    control: &mut Control,
    silent: &[Silent],
    host_kernel: Option<&Path>,
    guest_kernel: Option<&Path>,
) -> String {
    if let Some(end) = qemu.end_of_process() {
        return end;
    }
    let read = |path: Option<&Path>| path.and_then(|path| Symbols::read(path).ok());
    let status = match control.ask(json!({"do": "status"}), FIRST_ANSWER) {
        Ok(status) => status,
        Err(problem) => {
            let (seen, said) = machine::look(qemu, read(host_kernel).as_ref());
            return format!("{seen}\nthe host does not answer ({problem}): {said}");
        }
    };
    let mut text = format!("the host answers: {status}");
    if silent.is_empty() {
        return text;
    }
    let (seen, said) = machine::look(qemu, read(host_kernel).as_ref());
    text += &format!("\n{seen}\nthe machine: {said}");
    let symbols = read(guest_kernel);
    let deadline = Instant::now() + WITHIN;
    let mut last_lines = String::new();
    for Silent { name, waited_for } in silent {
        text += &format!("\n--- guest {name}; the test waited for {waited_for}:\n");
        let said = match state(&status, name).as_deref() {
            Some("running") => {
                let mut host = Asked { control, name, deadline };
                match host.look(symbols.clone()) {
                    Ok(findings) => {
                        text += &findings.text();
                        findings.verdict()
                    }
                    Err(problem) => format!("its state cannot be read: {problem}"),
                }
            }
            Some(state) => format!("the host says that it is {state}"),
            None => "the host's status has no such VM".to_owned(),
        };
        last_lines += &format!("\nguest {name}: {said}");
    }
    text.trim_end().to_owned() + &last_lines
}

/// The state of each vCPU of a VM, one of `KVM_MP_STATE_*`.
pub(crate) fn run_states(control: &mut Control, name: &str) -> Result<Vec<u32>, String> {
    let deadline = Instant::now() + WITHIN;
    let snapshot = Asked { control, name, deadline }.document()?;
    Ok(snapshot.vcpus.iter().map(|vcpu| vcpu.mp_state).collect())
}

/// Describes the state of a machine of the conformance suite, with the symbols of a host's kernel.
pub(crate) fn machine(qemu: &mut Qemu) -> String {
    if let Some(end) = qemu.end_of_process() {
        return end;
    }
    let kernel = kernels::find(Role::HostA).ok().map(|kernel| kernel.vmlinux());
    let symbols = kernel.and_then(|path| Symbols::read(&path).ok());
    let (seen, said) = machine::look(qemu, symbols.as_ref());
    format!("{seen}\nthe machine: {said}")
}

/// The state of a VM in the host's status.
fn state(status: &Value, name: &str) -> Option<String> {
    let vm = status["vms"].as_array()?.iter().find(|vm| vm["name"] == name)?;
    Some(vm["state"].as_str()?.to_owned())
}

/// A connection to a host for requests about one of its guests.
struct Asked<'a> {
    control: &'a mut Control,
    name: &'a str,
    deadline: Instant,
}

impl Asked<'_> {
    fn look(&mut self, symbols: Option<Symbols>) -> Result<Findings, String> {
        let before = self.document()?;
        // No event would show a lack of progress, so this waits for a fixed time.
        thread::sleep(BETWEEN);
        let after = self.document()?;
        let rings = after.queues.iter().map(|queue| self.indexes(queue)).collect();
        let mut calls = Vec::new();
        if let Some(symbols) = &symbols {
            for vcpu in &after.vcpus {
                // No symbols are known for a program's stack.
                let found = match vcpu.privilege {
                    3 => (Vec::new(), None),
                    _ => {
                        let mut read = |at, bytes| self.memory(at, bytes);
                        let tables = (vcpu.cr3, vcpu.cr4);
                        stack::calls(&mut read, tables, vcpu.rsp(), symbols)
                    }
                };
                calls.push(found);
            }
        }
        Ok(Findings { before, after, calls, rings, symbols })
    }

    fn document(&mut self) -> Result<Snapshot, String> {
        let answer = self.ask(json!({"do": "dump", "vm": self.name}))?;
        let document = bytes_of(&answer["document"])?;
        Snapshot::read(&document)
            .ok_or_else(|| "its state document is not a device tree".to_owned())
    }

    fn memory(&mut self, address: u64, bytes: u64) -> Result<Vec<u8>, String> {
        let request = json!({"do": "memory", "vm": self.name, "address": address, "bytes": bytes});
        let memory = bytes_of(&self.ask(request)?["memory"])?;
        match memory.len() as u64 == bytes {
            true => Ok(memory),
            false => Err(format!("the host sent {} bytes of memory, not {bytes}", memory.len())),
        }
    }

    /// The indexes in the rings in the guest's memory: the driver's and the device's.
    fn indexes(&mut self, queue: &Queue) -> Option<(u16, u16)> {
        let mut index = |ring: u64| {
            let bytes = self.memory(ring.checked_add(RING_INDEX)?, 2).ok()?;
            Some(u16::from_le_bytes(bytes.try_into().ok()?))
        };
        queue.is_ready.then_some(())?;
        Some((index(queue.avail_ring)?, index(queue.used_ring)?))
    }

    fn ask(&mut self, request: Value) -> Result<Value, String> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(format!("the time for requests, {WITHIN:?}, has passed"));
        }
        self.control.ask(request, left.min(ANSWER)).map_err(|error| error.to_string())
    }
}

/// Parses bytes in hexadecimal.
fn bytes_of(text: &Value) -> Result<Vec<u8>, String> {
    let problem = || format!("not bytes in hexadecimal: {text}");
    let digits = text.as_str().ok_or_else(problem)?.as_bytes();
    let digit = |byte: u8| (byte as char).to_digit(16).map(|digit| digit as u8);
    let pair = |pair: &[u8]| match pair {
        [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
        _ => None,
    };
    digits.chunks(2).map(pair).collect::<Option<_>>().ok_or_else(problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_as_two_digits_each_and_anything_else_is_an_error() {
        assert_eq!(bytes_of(&json!("00ff1a")), Ok(vec![0, 255, 26]));
        assert_eq!(bytes_of(&json!("")), Ok(vec![]));
        for bad in [json!("0"), json!("0g"), json!("aé"), json!(7), Value::Null] {
            bytes_of(&bad).unwrap_err();
        }
    }

    #[test]
    fn a_vm_is_found_in_the_status() {
        let status = json!({"vms": [{"name": "web", "state": "paused"}]});
        assert_eq!(state(&status, "web").as_deref(), Some("paused"));
        assert_eq!(state(&status, "db"), None);
        assert_eq!(state(&json!({}), "web"), None);
    }
}
