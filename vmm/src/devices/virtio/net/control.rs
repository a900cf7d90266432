//! The control queue (5.1.6.5): commands of the driver, each answered by one byte.

use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryMmap};

use super::filter::MacTable;
use super::{F_CTRL_MAC_ADDR, F_CTRL_RX, F_GUEST_ANNOUNCE, F_MQ, QUEUE_SIZE, Shared};
use crate::devices::interface::Mac;
use crate::devices::virtio::Chain;

/// Answers.
const OK: u8 = 0;
const ERR: u8 = 1;

/// Classes and commands.
const RX: u8 = 0;
const RX_PROMISC: u8 = 0;
const RX_ALLMULTI: u8 = 1;
const MAC: u8 = 1;
const MAC_TABLE_SET: u8 = 0;
const MAC_ADDR_SET: u8 = 1;
const ANNOUNCE: u8 = 3;
const ANNOUNCE_ACK: u8 = 0;
const MQ: u8 = 4;
const MQ_VQ_PAIRS_SET: u8 = 0;

/// Most bytes of a command: room for two tables of 5,000 addresses each.
const COMMAND_MAX: usize = 64 << 10;

/// Executes the command of one chain. Returns how many bytes were written into the chain.
pub(super) fn execute(shared: &Shared, memory: &GuestMemoryMmap, chain: Chain) -> u32 {
    let mut command = Vec::new();
    let mut answer = None;
    let mut broken = false;
    for (number, descriptor) in chain.enumerate() {
        // No chain is longer than the queue (2.7.5.3.1).
        if number == usize::from(QUEUE_SIZE) {
            broken = true;
            break;
        }
        let len = descriptor.len() as usize;
        if descriptor.is_write_only() {
            if answer.is_none() && len > 0 {
                answer = Some(descriptor.addr());
            }
            continue;
        }
        let begin = command.len();
        // Descriptors that the device reads come before those that it writes (2.7.4.2).
        if answer.is_some() || len > COMMAND_MAX - begin {
            broken = true;
            break;
        }
        command.resize(begin + len, 0);
        broken |= memory.read_slice(&mut command[begin..], descriptor.addr()).is_err();
    }
    // A command without room for its answer is not executed.
    let answer = answer.and_then(|address| memory.get_slice(address, 1).ok());
    let Some(answer) = answer else { return 0 };
    let done = !broken && obey(shared, &command).is_some();
    match answer.write_obj(if done { OK } else { ERR }, 0) {
        Ok(()) => 1,
        Err(_) => 0,
    }
}

/// Executes a command. Returns `None` if the command is unknown or fails.
fn obey(shared: &Shared, command: &[u8]) -> Option<()> {
    let (&[class, command], data) = command.split_first_chunk()?;
    let agreed = |feature| (shared.features() & feature != 0).then_some(());
    match (class, command) {
        (RX, RX_PROMISC) => {
            agreed(F_CTRL_RX)?;
            shared.driver().filter.promiscuous = switch(data)?;
        }
        (RX, RX_ALLMULTI) => {
            agreed(F_CTRL_RX)?;
            shared.driver().filter.all_multicast = switch(data)?;
        }
        (MAC, MAC_TABLE_SET) => {
            agreed(F_CTRL_RX)?;
            let (unicast, data) = table(data)?;
            let (multicast, rest) = table(data)?;
            rest.is_empty().then_some(())?;
            let mut driver = shared.driver();
            (driver.filter.unicast, driver.filter.multicast) = (unicast, multicast);
        }
        (MAC, MAC_ADDR_SET) => {
            agreed(F_CTRL_MAC_ADDR)?;
            let mac = Mac(data.try_into().ok()?);
            mac.is_of_interface().then_some(())?;
            shared.driver().mac = mac;
        }
        (ANNOUNCE, ANNOUNCE_ACK) => {
            agreed(F_GUEST_ANNOUNCE)?;
            shared.driver().announce = false;
        }
        (MQ, MQ_VQ_PAIRS_SET) => {
            agreed(F_MQ)?;
            shared.use_pairs(u16::from_le_bytes(data.try_into().ok()?))?;
        }
        _ => return None,
    }
    Some(())
}

/// On or off.
fn switch(data: &[u8]) -> Option<bool> {
    match data {
        [0] => Some(false),
        [1] => Some(true),
        _ => None,
    }
}

/// Takes a table of addresses off the front of `data`: the number of addresses, then the addresses.
fn table(data: &[u8]) -> Option<(MacTable, &[u8])> {
    let (count, data) = data.split_first_chunk()?;
    let len = usize::try_from(u32::from_le_bytes(*count)).ok()?.checked_mul(6)?;
    let (macs, rest) = data.split_at_checked(len)?;
    let (macs, _) = macs.as_chunks();
    Some((MacTable::new(macs.iter().map(|mac| Mac(*mac)).collect()), rest))
}
