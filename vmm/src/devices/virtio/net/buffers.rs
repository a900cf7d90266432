//! The buffers of the guest that a received frame is put into.

use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

use super::QUEUE_SIZE;
use crate::devices::virtio::{Chain, Request, Rings};

/// Buffers that were taken from a receive queue, in order, and the parts of them that are in RAM.
pub(super) struct Buffers<'m> {
    taken: Vec<Request>,
    slices: Vec<Vec<VolatileSlice<'m>>>,
    /// Bytes in all of them.
    pub(super) room: usize,
}

impl<'m> Buffers<'m> {
    /// Takes as many buffers as it needs for `wanted` bytes, if the queue has so many. `first` was already taken.
    /// Without `merges` the frame must lie in the first (5.1.6.4).
    pub(super) fn take(
        rings: &'m Rings,
        queue: usize,
        first: Request,
        wanted: usize,
        merges: bool,
    ) -> Self {
        let mut buffers = Self { taken: Vec::new(), slices: Vec::new(), room: 0 };
        let mut next = Some(first);
        while let Some(request) = next {
            let slices = writable(rings.memory(), request.chain());
            buffers.room += slices.iter().map(VolatileSlice::len).sum::<usize>();
            buffers.taken.push(request);
            buffers.slices.push(slices);
            next = match buffers.room >= wanted || !merges {
                true => None,
                false => rings.take(queue),
            };
        }
        buffers
    }

    /// The number of buffers.
    pub(super) fn count(&self) -> usize {
        self.taken.len()
    }

    /// Whether these buffers take so much of their queue that the driver has no room for another one of their kind.
    pub(super) fn exhaust(&self, rings: &Rings, queue: usize) -> bool {
        let (mut all, mut widest) = (0, 0);
        for entries in self.taken.iter().map(|request| rings.entries(request)) {
            all += entries;
            widest = entries.max(widest);
        }
        all + widest > rings.size(queue)
    }

    /// Returns the number of buffers that `len` bytes take.
    pub(super) fn count_for(&self, len: usize) -> usize {
        let mut room = 0;
        let is_full = |slices: &Vec<VolatileSlice<'_>>| {
            room += slices.iter().map(VolatileSlice::len).sum::<usize>();
            room >= len
        };
        self.slices.iter().position(is_full).map_or(self.count(), |at| at + 1)
    }

    /// Puts all buffers back into their queue.
    pub(super) fn give_back(self, rings: &Rings) {
        rings.give_back(self.taken);
    }

    /// Puts all buffers but the first back into their queue, and returns the first.
    pub(super) fn give_back_but_first(mut self, rings: &Rings) -> Option<Request> {
        rings.give_back(self.taken.split_off(1));
        self.taken.pop()
    }

    /// Returns the places in RAM behind the first `skipped` bytes.
    pub(super) fn behind(&self, mut skipped: usize) -> Vec<VolatileSlice<'m>> {
        let behind = |slice: &VolatileSlice<'m>| {
            let here = skipped.min(slice.len());
            skipped -= here;
            slice.offset(here).ok().filter(|rest| !rest.is_empty())
        };
        self.slices.iter().flatten().filter_map(behind).collect()
    }

    /// Copies `parts`, one after the other, into the buffers from the first on.
    pub(super) fn write(&self, parts: &[&[u8]]) {
        let mut places = self.slices.iter().flatten();
        let (mut place, mut at) = (places.next(), 0);
        for part in parts {
            let mut rest = *part;
            while let (Some(slice), false) = (place, rest.is_empty()) {
                let count = rest.len().min(slice.len() - at);
                // Within the slice.
                let _ = slice.write_slice(&rest[..count], at);
                rest = &rest[count..];
                at += count;
                if at == slice.len() {
                    (place, at) = (places.next(), 0);
                }
            }
        }
    }

    /// Adds the buffers that `len` bytes take to `filled`, and puts the others back into their queue.
    pub(super) fn fill(mut self, rings: &Rings, len: usize, filled: &mut Vec<(Request, u32)>) {
        let unused = self.taken.split_off(self.count_for(len));
        rings.give_back(unused);
        let mut left = len;
        for (request, slices) in self.taken.into_iter().zip(&self.slices) {
            let here = left.min(slices.iter().map(VolatileSlice::len).sum());
            left -= here;
            filled.push((request, here as u32));
        }
    }
}

/// Returns the parts of a chain that the device may write to, in order, up to the first that is not in RAM.
fn writable(memory: &GuestMemoryMmap, chain: Chain) -> Vec<VolatileSlice<'_>> {
    // No chain is longer than the queue (2.7.5.3.1).
    let parts = chain.take(QUEUE_SIZE.into()).filter(|descriptor| descriptor.is_write_only());
    let slices = parts.map_while(|d| memory.get_slice(d.addr(), d.len() as usize).ok());
    slices.filter(|slice| !slice.is_empty()).collect()
}
