//! A hostile guest and a hostile network: whatever both do, the guest finds only frames that have arrived, in their
//! order and each once, and the device writes nowhere but into buffers that it has.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use proptest::prelude::*;
use proptest::sample::select;

use super::*;

/// Where the buffers are, and their end.
const END: u64 = 0x8_0000;
/// Queues of a device with one pair.
const QUEUES: [u16; 3] = [0, 1, 2];

/// What the guest, the network or the host does.
#[derive(Debug, Clone)]
enum Act {
    Start { features: u64, size: u16 },
    ResetQueue { size: u16 },
    Offer(Vec<Piece>),
    Arrive { header: [u8; header::LEN], to: Mac, len: usize },
    Junk(Vec<u8>),
    Send(Vec<u8>),
    Command(Vec<u8>),
    Doorbell(u16),
    Link(bool),
    Pause,
    LiveUpdate,
}

/// A part of a chain.
#[derive(Debug, Clone, Copy)]
enum Piece {
    Writable(u32),
    ReadOnly,
    NotInRam,
}

fn act() -> impl Strategy<Value = Act> {
    let features = select(vec![
        LINUX,
        LINUX | RING_EVENT_IDX | RING_INDIRECT_DESC,
        LINUX & !F_MRG_RXBUF,
        LINUX & !F_GUEST_TSO4,
        LINUX & !F_GUEST_CSUM,
        0,
    ]);
    let size = select(vec![1_u16, 2, 16, 256]);
    let len = prop_oneof![select(vec![0_u32, 1, 11, 12, 13, 26, 1526, 4096]), 0_u32..3000];
    let piece = prop_oneof![9 => len.prop_map(Piece::Writable), 1 => Just(Piece::ReadOnly), 1 => Just(Piece::NotInRam)];
    let byte = || prop_oneof![4 => Just(0_u8), 1 => select(vec![1_u8, 2, 4, 5, 0x80, 0x81, 0xff])];
    let header = prop::array::uniform12(byte());
    let to = select(vec![MAC, OTHER, Mac::BROADCAST, Mac([1, 0, 0x5e, 0, 0, 1])]);
    let frame_len = prop_oneof![
        select(vec![14_usize, 60, 1514, 9000, LARGE + 1, FRAME_MAX, FRAME_MAX + 1]),
        14_usize..2000
    ];
    // Less than a header, or a frame that is too short.
    let header_len = select(vec![0, 1, 11, header::LEN, header::LEN]);
    let command = prop_oneof![
        select(vec![vec![0, 0, 0], vec![0, 0, 1], vec![0, 1, 1], vec![1, 1, 2, 0, 0, 0, 0, 2]]),
        prop::collection::vec(any::<u8>(), 0..20)
    ];
    prop_oneof![
        2 => (features, size.clone()).prop_map(|(features, size)| Act::Start { features, size }),
        1 => size.prop_map(|size| Act::ResetQueue { size }),
        8 => prop::collection::vec(piece, 1..4).prop_map(Act::Offer),
        8 => (header, to, frame_len).prop_map(|(header, to, len)| Act::Arrive { header, to, len }),
        1 => (header_len, prop::collection::vec(any::<u8>(), 0..14))
            .prop_map(|(header, rest)| Act::Junk([vec![0; header], rest].concat())),
        1 => prop::collection::vec(any::<u8>(), 0..100).prop_map(Act::Send),
        1 => command.prop_map(Act::Command),
        1 => (0_u16..3).prop_map(Act::Doorbell),
        1 => any::<bool>().prop_map(Act::Link),
        1 => Just(Act::Pause),
        1 => Just(Act::LiveUpdate),
    ]
}

/// The guest, and what is known about it.
struct Play {
    guest: Guest,
    features: u64,
    /// Frames on the wire or held by the device, oldest first.
    waiting: VecDeque<Vec<u8>>,
    /// Frames that were sent to the guest so far.
    sent: u32,
    /// The places that the device may write to, by the head of their chain.
    offered: BTreeMap<u32, Vec<Range<u64>>>,
    /// Descriptors that the driver has used since its start.
    descriptors: usize,
    /// Used elements of the receive queue that were looked at.
    seen: u16,
    /// Where the next buffer begins. No two buffers lie on each other.
    next: u64,
    /// The bytes from [`DATA`] on after the last act.
    memory: Vec<u8>,
}

impl Play {
    fn new() -> Self {
        let guest = Guest::new(1);
        let memory = guest.get(DATA, (END - DATA) as usize);
        let (waiting, offered) = (VecDeque::new(), BTreeMap::new());
        let mut play = Self {
            guest,
            features: 0,
            waiting,
            sent: 0,
            offered,
            descriptors: 0,
            seen: 0,
            next: DATA,
            memory,
        };
        play.start(LINUX, 256);
        play
    }

    fn start(&mut self, features: u64, size: u16) {
        self.features = features;
        self.guest.start_with(features, &QUEUES, size);
        self.forget_buffers();
    }

    fn forget_buffers(&mut self) {
        self.offered.clear();
        (self.descriptors, self.seen) = (0, 0);
    }

    /// Resets the receive queue and gives it a ring of another size.
    fn reset_queue(&mut self, size: u16) {
        if self.features & features::RING_RESET == 0 {
            return;
        }
        self.guest.write(0x16, 0, 2);
        self.guest.write(0x3a, 1, 2);
        assert_eq!(self.guest.read::<2>(0x3a), [0; 2], "nothing is in flight");
        self.forget_buffers();
        self.guest.set_up(0, size);
        self.guest.run();
    }

    /// Offers a chain, as long as its descriptors are free.
    fn offer(&mut self, pieces: &[Piece]) {
        let size = usize::from(self.guest.ring(0).size());
        let bytes: u64 = pieces.iter().map(|piece| piece.len()).sum();
        if self.descriptors + pieces.len() > size || self.next + bytes > END {
            return;
        }
        self.descriptors += pieces.len();
        let (mut parts, mut places, mut reachable) = (Vec::new(), Vec::new(), true);
        for piece in pieces {
            match *piece {
                Piece::Writable(len) => {
                    parts.push((self.next, len, WRITE));
                    let place = self.next..self.next + u64::from(len);
                    // The device looks at no part behind one that is not in RAM.
                    places.extend(Some(place.clone()).filter(|_| reachable && len > 0));
                    self.next = place.end;
                }
                Piece::ReadOnly => parts.push((DATA, 100, 0)),
                Piece::NotInRam => {
                    parts.push((0x9_0000, 100, WRITE));
                    reachable = false;
                }
            }
        }
        let head = self.guest.ring(0).offer(&parts);
        self.offered.insert(head.into(), places);
        self.guest.ring_doorbell(0);
    }

    /// A frame arrives that no other one is equal to.
    fn arrive(&mut self, header: [u8; header::LEN], to: Mac, len: usize) {
        let mut frame = frame(to, len);
        let number = self.sent.to_le_bytes();
        frame.iter_mut().skip(14).zip(number).for_each(|(byte, number)| *byte = number);
        if self.guest.wire[0].send(&[&header[..], &frame].concat()).is_ok() {
            self.sent += 1;
            self.waiting.push_back(frame);
        }
        self.guest.run();
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Start { features, size } => self.start(features, size),
            Act::ResetQueue { size } => self.reset_queue(size),
            Act::Offer(pieces) => self.offer(&pieces),
            Act::Arrive { header, to, len } => self.arrive(header, to, len),
            Act::Junk(bytes) => {
                let _ = self.guest.wire[0].send(&bytes);
                self.guest.run();
            }
            Act::Send(bytes) => {
                self.guest.put(0x3_0000, &bytes);
                self.guest.offer(1, &[(0x3_0000, bytes.len() as u32, 0)]);
            }
            Act::Command(bytes) => {
                self.guest.put(0x3_0000, &bytes);
                let parts = [(0x3_0000, bytes.len() as u32, 0), (0x3_1000, 1, WRITE)];
                let is_short = self.guest.ring(2).size() < 2;
                self.guest.offer(2, &parts[usize::from(is_short)..]);
            }
            Act::Doorbell(queue) => self.guest.ring_doorbell(queue),
            Act::Link(up) => {
                self.guest.function.network_port().unwrap().set_link(up);
                self.guest.run();
            }
            Act::Pause => {
                self.guest.function.pause();
                self.guest.function.drain(std::time::Instant::now()).unwrap();
                self.guest.function.resume();
                self.guest.run();
            }
            Act::LiveUpdate => unreachable!("it makes another guest"),
        }
    }

    /// Looks at what the device has given to the guest and what it has written.
    fn check(&mut self) {
        let used = self.guest.ring(0).used_index();
        while self.seen != used {
            let frame = self.next_received(used);
            let found = self.waiting.iter().position(|waiting| *waiting == frame);
            let found = found.unwrap_or_else(|| {
                panic!("no such frame waits: {} bytes, {:x?}", frame.len(), frame.get(..18))
            });
            // Those before it were dropped.
            self.waiting.drain(..=found);
        }
        let now = self.guest.get(DATA, (END - DATA) as usize);
        let mut expected = std::mem::replace(&mut self.memory, now);
        for place in self.offered.values().flatten() {
            let place = (place.start - DATA) as usize..(place.end - DATA) as usize;
            expected[place.clone()].copy_from_slice(&self.memory[place]);
        }
        assert!(expected == self.memory, "the device has written where it has no buffer");
    }

    /// The next frame in the guest's buffers. Checks its header.
    fn next_received(&mut self, used: u16) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut count = 0;
        let mut buffers = 1;
        while count < buffers {
            assert_ne!(self.seen, used, "a part of a frame is missing");
            let (head, len) = self.guest.ring(0).used_element(self.seen);
            self.seen = self.seen.wrapping_add(1);
            count += 1;
            let places = &self.offered[&head];
            let all: Vec<u8> = places
                .iter()
                .flat_map(|place| self.guest.get(place.start, (place.end - place.start) as usize))
                .collect();
            bytes.extend(&all[..len as usize]);
            match bytes.first_chunk::<{ header::LEN }>() {
                Some(header) => buffers = header::Header::from_bytes(*header).num_buffers,
                // The header goes on in the next one.
                None => buffers = count + 1,
            }
        }
        let (header, frame) = bytes.split_first_chunk().unwrap();
        let header::Header { flags, gso_type, num_buffers, .. } =
            header::Header::from_bytes(*header);
        assert_eq!(num_buffers, count);
        let has = |feature| self.features & feature != 0;
        assert!(flags & !(header::NEEDS_CSUM | header::DATA_VALID) == 0, "{flags}");
        assert!(flags == 0 || has(F_GUEST_CSUM), "{flags}");
        assert!(match gso_type {
            header::GSO_NONE => true,
            header::GSO_TCPV4 => has(F_GUEST_TSO4),
            header::GSO_TCPV6 => has(F_GUEST_TSO6),
            _ => false,
        });
        assert!(num_buffers == 1 || has(F_MRG_RXBUF));
        assert!((FRAME_MIN..=FRAME_MAX).contains(&frame.len()));
        frame.to_vec()
    }

    fn live_update(self) -> Self {
        let mut guest = self.guest.switch();
        guest.resume();
        // The frames on the wire are lost with the tap.
        Self { guest, waiting: VecDeque::new(), ..self }
    }
}

impl Piece {
    fn len(self) -> u64 {
        match self {
            Self::Writable(len) => len.into(),
            Self::ReadOnly | Self::NotInRam => 0,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn a_guest_finds_only_frames_that_arrived_in_buffers_that_it_gave(
        acts in prop::collection::vec(act(), 1..60)
    ) {
        let mut play = Play::new();
        for act in acts {
            match act {
                Act::LiveUpdate => play = play.live_update(),
                act => play.act(act),
            }
            play.check();
        }
        // The device works for the next driver.
        play.act(Act::Link(true));
        loop {
            play.start(LINUX, 256);
            play.next = DATA;
            (0..64).for_each(|_| play.offer(&[Piece::Writable(4096)]));
            play.check();
            if play.seen == 0 {
                break;
            }
        }
        play.arrive([0; header::LEN], MAC, 60);
        play.check();
        prop_assert!(play.waiting.is_empty());
    }
}
