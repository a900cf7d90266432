//! Reads from a state document what may explain why a guest makes no progress.
//!
//! Parts are found by their properties anywhere in the tree, so that documents with other nodes can be
//! read too. This reader ignores missing and damaged parts, because the rest still helps; the strict
//! decoder is in `vmm/src/state`.

use std::collections::BTreeMap;

/// Magic number and tokens of a flattened device tree (Devicetree Specification 0.4, chapter 5).
const MAGIC: u32 = 0xd00d_feed;
const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROPERTY: u32 = 3;
const NOP: u32 = 4;
/// Deepest nesting that is read.
const DEEPEST: usize = 32;

/// Indexes of registers in `struct kvm_regs` (Linux `arch/x86/include/uapi/asm/kvm.h`).
const RSP: usize = 6;
const RIP: usize = 16;
const RFLAGS: usize = 17;
/// Offsets into `struct kvm_sregs`.
const CS_SELECTOR: usize = 12;
const CR3: usize = 240;
const CR4: usize = 248;
/// Offsets into the page of the local APIC (Intel SDM 3A, table 11-1).
const TPR: usize = 0x80;
const ISR: usize = 0x100;
const IRR: usize = 0x200;
const LVTT: usize = 0x320;
const TMICT: usize = 0x380;
const TMCCT: usize = 0x390;

/// The state of one guest at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Snapshot {
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) queues: Vec<Queue>,
    pub(crate) serial: Option<Serial>,
    /// The host's TSC when the state was saved.
    pub(crate) host_tsc: Option<u64>,
}

/// One vCPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Vcpu {
    pub(crate) id: u32,
    /// `struct kvm_regs`.
    pub(crate) registers: Vec<u64>,
    pub(crate) privilege: u8,
    pub(crate) cr3: u64,
    pub(crate) cr4: u64,
    /// `KVM_MP_STATE_*`.
    pub(crate) mp_state: u32,
    /// `struct kvm_vcpu_events`.
    pub(crate) events: Vec<u8>,
    pub(crate) apic: Apic,
    pub(crate) tsc_deadline: u64,
    pub(crate) tsc_offset: u64,
    pub(crate) tsc_khz: u32,
}

impl Vcpu {
    pub(crate) fn rip(&self) -> u64 {
        self.registers[RIP]
    }

    pub(crate) fn rsp(&self) -> u64 {
        self.registers[RSP]
    }

    pub(crate) fn rflags(&self) -> u64 {
        self.registers[RFLAGS]
    }

    pub(crate) fn takes_interrupts(&self) -> bool {
        self.rflags() & 1 << 9 != 0
    }
}

/// A local APIC.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Apic {
    pub(crate) tpr: u32,
    pub(crate) timer: u32,
    pub(crate) initial_count: u32,
    pub(crate) current_count: u32,
    /// Vectors in service.
    pub(crate) in_service: Vec<u8>,
    /// Vectors that were requested and are not in service yet.
    pub(crate) requested: Vec<u8>,
}

/// A virtqueue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Queue {
    /// The names of the queue's node and of its device's node.
    pub(crate) name: String,
    pub(crate) is_ready: bool,
    pub(crate) next_avail: u16,
    pub(crate) next_used: u16,
    /// Guest-physical address of the available ring.
    pub(crate) avail_ring: u64,
    /// Guest-physical address of the used ring.
    pub(crate) used_ring: u64,
}

/// A serial port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Serial {
    pub(crate) ier: u32,
    pub(crate) fcr: u32,
    pub(crate) mcr: u32,
    /// The guest has not been told that it can send again.
    pub(crate) empty_pending: bool,
    /// Bytes that the guest has not read.
    pub(crate) input: usize,
    /// Bytes from the guest that the host has not written yet.
    pub(crate) output: usize,
}

impl Snapshot {
    /// Reads a state document. `None` if the bytes are not a device tree.
    pub(crate) fn read(document: &[u8]) -> Option<Self> {
        let root = tree(document)?;
        let mut snapshot = Self::default();
        snapshot.collect(&root, "");
        snapshot.vcpus.sort_by_key(|vcpu| vcpu.id);
        Some(snapshot)
    }

    fn collect(&mut self, node: &Node, parent: &str) {
        self.vcpus.extend(vcpu(node));
        self.queues.extend(queue(node, parent));
        self.serial = serial(node).or(self.serial.take());
        self.host_tsc = node.u64("host-tsc").or(self.host_tsc);
        // The node of a virtio transport is always called `transport`; its parent is named for the
        // device.
        let of = if node.name == "transport" { parent } else { &node.name };
        node.children.iter().for_each(|child| self.collect(child, of));
    }
}

fn vcpu(node: &Node) -> Option<Vcpu> {
    let (sregs, lapic) = (node.get("sregs")?, node.get("lapic")?);
    let words = node.get("regs")?.chunks_exact(8);
    let registers: Vec<u64> = words.filter_map(|word| le64(word, 0)).collect();
    if registers.len() <= RFLAGS {
        return None;
    }
    Some(Vcpu {
        id: node.u32("id")?,
        registers,
        privilege: sregs.get(CS_SELECTOR)? & 3,
        cr3: le64(sregs, CR3)?,
        cr4: le64(sregs, CR4)?,
        mp_state: le32(node.get("mp-state")?, 0)?,
        events: node.get("events")?.to_vec(),
        apic: Apic {
            tpr: le32(lapic, TPR)?,
            timer: le32(lapic, LVTT)?,
            initial_count: le32(lapic, TMICT)?,
            current_count: le32(lapic, TMCCT)?,
            in_service: vectors(lapic, ISR),
            requested: vectors(lapic, IRR),
        },
        tsc_deadline: node.u64("tsc-deadline")?,
        tsc_offset: node.u64("tsc-offset")?,
        tsc_khz: node.u32("tsc-khz")?,
    })
}

/// The vectors whose bits are set, in registers of 32 bits at a distance of 16 bytes.
fn vectors(lapic: &[u8], start: usize) -> Vec<u8> {
    let is_set = |vector: &u8| {
        let (word, bit) = (usize::from(vector / 32), vector % 32);
        le32(lapic, start + 16 * word).is_some_and(|bits| bits & 1 << bit != 0)
    };
    (0..=255).filter(is_set).collect()
}

fn queue(node: &Node, parent: &str) -> Option<Queue> {
    let low = |value: u32| u16::try_from(value).ok();
    Some(Queue {
        name: format!("{} of {parent}", node.name),
        is_ready: node.u32("ready")? != 0,
        next_avail: low(node.u32("next-avail")?)?,
        next_used: low(node.u32("next-used")?)?,
        avail_ring: node.u64("avail-ring")?,
        used_ring: node.u64("used-ring")?,
    })
}

fn serial(node: &Node) -> Option<Serial> {
    Some(Serial {
        ier: node.u32("ier")?,
        fcr: node.u32("fcr")?,
        mcr: node.u32("mcr")?,
        empty_pending: node.u32("transmitter-empty-pending")? != 0,
        input: node.get("receive-fifo")?.len(),
        output: node.get("outbox")?.len(),
    })
}

#[derive(Debug, Default)]
struct Node {
    name: String,
    properties: BTreeMap<String, Vec<u8>>,
    children: Vec<Node>,
}

impl Node {
    fn get(&self, name: &str) -> Option<&[u8]> {
        self.properties.get(name).map(Vec::as_slice)
    }

    fn u32(&self, name: &str) -> Option<u32> {
        Some(u32::from_be_bytes(self.get(name)?.try_into().ok()?))
    }

    fn u64(&self, name: &str) -> Option<u64> {
        Some(u64::from_be_bytes(self.get(name)?.try_into().ok()?))
    }
}

/// The root of a flattened device tree. `None` if the tree is damaged.
fn tree(document: &[u8]) -> Option<Node> {
    let header = |at| usize::try_from(be32(document, at)?).ok();
    if be32(document, 0)? != MAGIC {
        return None;
    }
    let strings = document.get(header(12)?..)?;
    let mut at = header(8)?;
    let mut open: Vec<Node> = Vec::new();
    loop {
        let token = be32(document, at)?;
        at += 4;
        match token {
            BEGIN_NODE if open.len() < DEEPEST => {
                let name = text(document.get(at..)?)?;
                at += (name.len() + 1).next_multiple_of(4);
                open.push(Node { name, ..Node::default() });
            }
            END_NODE => {
                let node = open.pop()?;
                match open.last_mut() {
                    Some(parent) => parent.children.push(node),
                    None => return Some(node),
                }
            }
            PROPERTY => {
                let len = usize::try_from(be32(document, at)?).ok()?;
                let name = usize::try_from(be32(document, at + 4)?).ok()?;
                let start = at + 8;
                let value = document.get(start..start.checked_add(len)?)?.to_vec();
                open.last_mut()?.properties.insert(text(strings.get(name..)?)?, value);
                at = start + len.next_multiple_of(4);
            }
            NOP => {}
            _ => return None,
        }
    }
}

fn text(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().position(|byte| *byte == 0)?;
    Some(String::from_utf8_lossy(&bytes[..end]).into_owned())
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn le64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::paths;

    /// The newest golden document of a whole VM.
    fn golden() -> Vec<u8> {
        let directory = paths::workspace().join("vmm/golden");
        let names = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
        let is_vm =
            |name: &str| name.strip_prefix("vm-v")?.strip_suffix(".dtb")?.parse::<u32>().ok();
        let newest = names.max_by_key(|path| is_vm(path.file_name().unwrap().to_str().unwrap()));
        fs::read(newest.unwrap()).unwrap()
    }

    #[test]
    fn every_part_is_found_in_a_document_of_a_whole_vm() {
        let snapshot = Snapshot::read(&golden()).unwrap();
        assert!(!snapshot.vcpus.is_empty());
        assert_eq!(snapshot.vcpus[0].id, 0);
        assert!(snapshot.serial.is_some());
        assert!(snapshot.host_tsc.is_some());
        let queue = snapshot.queues.first().unwrap();
        assert!(queue.name.starts_with("queue@0 of virtio-"), "{}", queue.name);
        assert!(queue.avail_ring != 0 && queue.used_ring != 0);
    }

    #[test]
    fn registers_are_taken_from_where_kvm_has_them() {
        let mut sregs = vec![0; 312];
        sregs[CS_SELECTOR] = 0x33;
        sregs[CR3..CR3 + 8].copy_from_slice(&0x1234_5000u64.to_le_bytes());
        sregs[CR4..CR4 + 8].copy_from_slice(&0x6f0u64.to_le_bytes());
        let mut regs = vec![0; 144];
        for (index, value) in [(6, 0x6666u64), (16, 0x7777), (17, 0x246)] {
            regs[8 * index..8 * index + 8].copy_from_slice(&value.to_le_bytes());
        }
        let mut lapic = vec![0; 1024];
        lapic[0x170..0x174].copy_from_slice(&(1u32 << 12).to_le_bytes());
        lapic[0x200 + 16..0x204 + 16].copy_from_slice(&3u32.to_le_bytes());
        lapic[0x320..0x324].copy_from_slice(&0x0004_00ecu32.to_le_bytes());
        let properties = [
            ("regs", regs),
            ("sregs", sregs),
            ("lapic", lapic),
            ("mp-state", vec![3, 0, 0, 0]),
            ("events", vec![0; 64]),
            ("id", vec![0, 0, 0, 1]),
            ("tsc-deadline", 99u64.to_be_bytes().to_vec()),
            ("tsc-offset", 0u64.to_be_bytes().to_vec()),
            ("tsc-khz", 1000u32.to_be_bytes().to_vec()),
        ];
        let properties = properties.map(|(name, value)| (name.to_owned(), value)).into();
        let vcpu = vcpu(&Node { properties, ..Node::default() }).unwrap();
        assert_eq!((vcpu.rsp(), vcpu.rip(), vcpu.rflags()), (0x6666, 0x7777, 0x246));
        assert_eq!((vcpu.privilege, vcpu.cr3, vcpu.cr4), (3, 0x1234_5000, 0x6f0));
        assert_eq!((vcpu.id, vcpu.mp_state, vcpu.tsc_deadline), (1, 3, 99));
        assert!(vcpu.takes_interrupts());
        assert_eq!(vcpu.apic.in_service, [0xec]);
        assert_eq!(vcpu.apic.requested, [0x20, 0x21]);
        assert_eq!(vcpu.apic.timer, 0x0004_00ec);
    }

    #[test]
    fn no_part_of_a_document_makes_the_reader_panic() {
        let golden = golden();
        for end in (0..golden.len()).step_by(37) {
            assert_eq!(Snapshot::read(&golden[..end]), None, "{end}");
        }
        // A damaged document may give any result, but no panic.
        for at in (0..golden.len()).step_by(37).chain(0..200) {
            let mut changed = golden.clone();
            changed[at] ^= 0xff;
            let _ = Snapshot::read(&changed);
        }
    }
}
