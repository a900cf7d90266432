//! `net = ["tap=vm0,mac=52:54:00:12:34:56,mtu=1500,queues=2,bridge=br0"]`: the tap of the
//! device, and the settings that the host makes.

use serde::{Deserialize, Serialize};

use super::{MTU_MAX, MTU_MIN, PAIRS_MAX, lent};
use crate::devices::claims::Claim;
use crate::devices::files::{OpenError, Opened};
use crate::devices::interface::Mac;
use crate::devices::interface::check_name;
use crate::devices::needs::HostNeed;
use crate::options::Options;
use crate::state::{Node, Reader, Schema, StateError};

/// The role of each pair's file descriptor.
pub(super) const TAPS: [&str; PAIRS_MAX] =
    ["tap-0", "tap-1", "tap-2", "tap-3", "tap-4", "tap-5", "tap-6", "tap-7"];

/// Keys that only Cloud Hypervisor has, with what to do instead.
pub(super) const FOREIGN: &[(&str, &str)] = &[
    ("host_mac", ""),
    ("ip", "give the tap an address with `ip`, or a bridge with bridge="),
    ("mask", "give the tap an address with `ip`, or a bridge with bridge="),
    ("offload_csum", "switch it off in the guest with `ethtool -K`"),
    ("offload_tso", "switch it off in the guest with `ethtool -K`"),
    ("offload_ufo", "leave it out: no guest gets UFO, which Linux has removed"),
    ("queue_size", "a queue has 256 entries"),
    ("socket", "name a tap with tap="),
    ("vhost_mode", ""),
    ("vhost_user", "name a tap with tap="),
];

/// Values that change nothing. Queues that are larger than asked for do no harm.
pub(super) const HARMLESS: &[(&str, &[&str])] = &[
    ("host_mac", &[""]),
    ("ip", &[""]),
    ("mac", &[""]),
    ("mask", &[""]),
    ("offload_csum", &["on"]),
    ("offload_tso", &["on"]),
    ("offload_ufo", &["off"]),
    ("queue_size", &["16", "32", "64", "128", "256"]),
    ("tap", &[""]),
    ("vhost_user", &["off"]),
];

/// One network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct NetOptions {
    /// The name of the tap. The host creates a missing tap.
    pub tap: String,
    /// The guest's Ethernet address. `None`: an address that is computed from the VM's name.
    pub mac: Option<Mac>,
    /// The largest packet in bytes, for the tap and the guest.
    pub mtu: Option<u16>,
    /// Pairs of queues, 1 to [`PAIRS_MAX`].
    pub queues: u16,
    /// The bridge of the host of which the tap becomes a port.
    pub bridge: Option<String>,
}

impl NetOptions {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let keys = ["tap", "fd", "mac", "mtu", "queues", "num_queues", "bridge"];
        let options = Options::parse(text, &keys)?;
        let name = |key| match options.get(key) {
            Some(name) => check_name(name).map(|()| Some(name.to_owned())),
            None => Ok(None),
        };
        let mac = options.get("mac").map(Mac::parse).transpose()?;
        let mtu = options.get("mtu").map(parse_mtu).transpose()?;
        let queues = match (options.get("queues"), options.get("num_queues")) {
            (Some(_), Some(_)) => {
                return Err(
                    "queues= counts pairs and num_queues= single queues: not both".to_owned()
                );
            }
            (Some(pairs), None) => Some(parse_queues(pairs)?),
            (None, Some(single)) => Some(parse_single_queues(single)?),
            (None, None) => None,
        };
        let (tap, bridge) = (name("tap")?, name("bridge")?);
        let (tap, queues) = match (tap, options.get("fd")) {
            (Some(tap), None) => (tap, queues.unwrap_or(1)),
            (None, Some(_)) if bridge.is_some() => {
                return Err(
                    "bridge= is for a tap that this host makes; with fd= the owner of the tap \
                            puts it into a bridge"
                        .to_owned(),
                );
            }
            // The last check, because it lends the descriptors to this device.
            (None, Some(list)) => lent::claim(list, queues)?,
            (Some(_), Some(_)) => {
                return Err(
                    "name a tap with tap=, or give its file descriptors with fd=: not both"
                        .to_owned(),
                );
            }
            (None, None) => return Err("it must name a tap: tap=NAME".to_owned()),
        };
        Ok(Self { tap, mac, mtu, queues, bridge })
    }

    /// Returns the text with the name of a tap that this makes, if the text names none.
    pub(super) fn complete(text: &str) -> Result<String, String> {
        let keys: Vec<_> = text.split(',').filter_map(|pair| pair.split_once('=')).collect();
        if keys.iter().any(|(key, _)| ["tap", "fd"].contains(key)) {
            return Ok(text.to_owned());
        }
        let named = |tap: &str| match text {
            "" => format!("tap={tap}"),
            text => format!("{text},tap={tap}"),
        };
        let Self { tap: _, mac: _, mtu, queues, bridge } = Self::parse(&named("vmtap"))?;
        Ok(named(&lent::make(queues, mtu, bridge.as_deref())?))
    }

    /// The tap; and on a bridge the address, because a bridge sends all frames for an address to one port.
    pub(super) fn claims(&self) -> Vec<Claim> {
        let address = self.mac.zip(self.bridge.as_ref());
        let address = address.map(|(mac, bridge)| {
            Claim::named("MAC address on a bridge", format!("{mac} on {bridge}"))
        });
        [Claim::named("tap", &self.tap)].into_iter().chain(address).collect()
    }

    /// The drivers of taps and bridges, and the bridge. The host makes no tap whose descriptors it was lent.
    pub(super) fn needs(&self) -> Vec<HostNeed> {
        if lent::has(&self.tap) {
            return Vec::new();
        }
        let tun = HostNeed::Driver { module: "tun", of: "taps" };
        let bridge = self.bridge.iter().flat_map(|bridge| {
            [HostNeed::Driver { module: "bridge", of: "bridges" }, HostNeed::Bridge(bridge.clone())]
        });
        [tun].into_iter().chain(bridge).collect()
    }

    pub(super) fn open(&self) -> Result<Vec<Opened>, OpenError> {
        super::host::open(self)
    }
}

fn parse_mtu(text: &str) -> Result<u16, String> {
    let mtu = text.parse().ok().filter(|mtu| (MTU_MIN..=MTU_MAX).contains(mtu));
    mtu.ok_or_else(|| format!("mtu is a number of bytes from {MTU_MIN} to {MTU_MAX}, not `{text}`"))
}

fn parse_queues(text: &str) -> Result<u16, String> {
    let pairs = text.parse().ok().filter(|pairs| (1..=PAIRS_MAX as u16).contains(pairs));
    pairs.ok_or_else(|| {
        format!("queues is a number of pairs of queues from 1 to {PAIRS_MAX}, not `{text}`")
    })
}

/// Returns the pairs of Cloud Hypervisor's `num_queues`, which counts the queues of both directions.
fn parse_single_queues(text: &str) -> Result<u16, String> {
    let most = 2 * PAIRS_MAX as u16;
    let single = text.parse().ok().filter(|n: &u16| n.is_multiple_of(2) && (2..=most).contains(n));
    let pairs = single.map(|single| single / 2);
    pairs.ok_or_else(|| {
        format!("num_queues is an even number of queues from 2 to {most}, two for each pair, not `{text}`")
    })
}

/// `perennial,virtio-net-options-v1`.
impl Schema for NetOptions {
    const COMPATIBLE: &'static [&'static str] = &["perennial,virtio-net-options-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { tap, mac, mtu, queues, bridge } = self;
        node.put_str("tap", tap);
        // Empty or 0 for options that are not configured.
        node.put_bytes("mac", mac.as_ref().map_or(&[][..], |mac| &mac.0));
        node.put_u32("mtu", mtu.unwrap_or(0).into());
        node.put_u32("queue-pairs", (*queues).into());
        node.put_str("bridge", bridge.as_deref().unwrap_or_default());
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let tap = reader.str("tap")?;
        check_name(&tap).map_err(|problem| reader.invalid("tap", problem))?;
        let mac = match reader.bytes("mac")? {
            [] => None,
            bytes => {
                let mac = bytes.try_into().ok().map(Mac).filter(|mac| mac.is_of_interface());
                Some(mac.ok_or_else(|| {
                    reader.invalid("mac", "it is no address of an interface".to_owned())
                })?)
            }
        };
        let mtu = match reader.narrow("mtu")? {
            0 => None,
            mtu if (MTU_MIN..=MTU_MAX).contains(&mtu) => Some(mtu),
            mtu => {
                let problem = format!("{mtu} is not from {MTU_MIN} to {MTU_MAX}");
                return Err(reader.invalid("mtu", problem));
            }
        };
        let queues = reader.narrow("queue-pairs")?;
        if !(1..=PAIRS_MAX as u16).contains(&queues) {
            let problem = format!("{queues} is not from 1 to {PAIRS_MAX}");
            return Err(reader.invalid("queue-pairs", problem));
        }
        let bridge = match reader.str("bridge")? {
            name if name.is_empty() => None,
            name => {
                check_name(&name).map_err(|problem| reader.invalid("bridge", problem))?;
                Some(name)
            }
        };
        Ok(Self { tap, mac, mtu, queues, bridge })
    }
}

#[cfg(any(test, fuzzing))]
mod sample {
    #![expect(clippy::unwrap_used, reason = "a test or fuzz target that cannot go on has failed")]

    use std::os::unix::net::UnixStream;

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;
    use crate::devices::kind::{Sample, SampleFiles};
    use crate::devices::virtio::VirtioState;
    use crate::devices::virtio::net::{Net, VirtioNetStateV1};

    impl Sample for Net {
        fn options() -> NetOptions {
            NetOptions {
                tap: "vm0".to_owned(),
                mac: None,
                mtu: Some(1400),
                queues: 2,
                bridge: None,
            }
        }

        /// A wire of sockets that keep frames apart, as a tap does: the end of the first pair is the
        /// peer, nothing is at the end of the others.
        fn files(state: Option<&VirtioState<VirtioNetStateV1>>) -> Option<SampleFiles> {
            let pairs = state.map_or(Self::options().queues, |state| state.device.queue_pairs);
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let ends = TAPS.iter().take(pairs.into()).map(|role| {
                let pair = socketpair(AddressFamily::UNIX, SocketType::DGRAM, flags, None);
                let (fd, peer) = pair.unwrap();
                (Opened { role, fd, identity: None }, peer)
            });
            let (opened, peers): (Vec<_>, Vec<_>) = ends.unzip();
            Some(SampleFiles { opened, peer: peers.into_iter().next().map(UnixStream::from) })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::contract::contract_tests;
    use crate::state::node::read_node;

    const MAC: Mac = Mac([0x52, 0x54, 0, 0x12, 0x34, 0x56]);

    fn sample() -> NetOptions {
        NetOptions {
            tap: "vm0".to_owned(),
            mac: Some(MAC),
            mtu: Some(1400),
            queues: 4,
            bridge: Some("br0".to_owned()),
        }
    }

    contract_tests! {
        NetOptions,
        sample: sample,
        changes: [
            |o| o.tap.push('1'),
            |o| o.mac = None,
            |o| o.mac = Some(Mac([2, 0, 0, 0, 0, 1])),
            |o| o.mtu = None,
            |o| o.queues = 1,
            |o| o.bridge = None,
        ],
        golden: "virtio-net-options-v1",
    }

    #[test]
    fn a_device_has_a_tap_and_the_rest_if_it_is_given() {
        let all = "tap=vm0,mac=52:54:00:12:34:56,mtu=1400,queues=4,bridge=br0";
        assert_eq!(NetOptions::parse(all), Ok(sample()));
        let (tap, queues) = ("vm0".to_owned(), 1);
        let least = NetOptions { tap, mac: None, mtu: None, queues, bridge: None };
        assert_eq!(NetOptions::parse("tap=vm0"), Ok(least));
        for (single, pairs) in [("2", 1), ("16", 8)] {
            let options = NetOptions::parse(&format!("tap=vm0,num_queues={single}")).unwrap();
            assert_eq!(options.queues, pairs);
        }
    }

    #[test]
    fn every_wrong_option_says_what_would_be_right() {
        for (text, problem) in [
            ("mac=52:54:00:12:34:56", "tap=NAME"),
            ("tap=", "cannot be the name"),
            ("tap=vm%d", "characters"),
            ("tap=0123456789abcdef", "at most 15"),
            ("tap=vm0,bridge=a/b", "characters"),
            ("tap=vm0,mac=ff:ff:ff:ff:ff:ff", "lowest bit"),
            ("tap=vm0,mac=1", "such as 52:54"),
            ("tap=vm0,mtu=67", "from 68 to 65521"),
            ("tap=vm0,mtu=65522", "from 68 to 65521"),
            ("tap=vm0,queues=0", "from 1 to 8"),
            ("tap=vm0,queues=9", "from 1 to 8"),
            ("tap=vm0,queues=two", "not `two`"),
            ("tap=vm0,num_queues=3", "an even number of queues from 2 to 16"),
            ("tap=vm0,num_queues=0", "not `0`"),
            ("tap=vm0,num_queues=18", "not `18`"),
            ("tap=vm0,num_queues=4,queues=2", "not both"),
            ("tap=vm0,tap=vm1", "twice"),
            ("tap=vm0,colour=red", "there is tap, fd, mac, mtu, queues, num_queues, bridge"),
            ("vm0", "key=value"),
            ("", "key=value"),
            ("tap=vm0,", "key=value"),
            ("tap=.", "cannot be the name"),
            ("tap=a b", "characters"),
            ("tap=vm0,bridge=", "cannot be the name"),
            ("tap=vm0,bridge=0123456789abcdef", "at most 15"),
            ("tap=vm0,mac=", "such as 52:54"),
            ("tap=vm0,mac=00:00:00:00:00:00", "lowest bit"),
            ("tap=vm0,mac=52:54:00:12:34", "such as 52:54"),
            ("tap=vm0,mac=52-54-00-12-34-56", "such as 52:54"),
            ("tap=vm0,mtu=", "not ``"),
            ("tap=vm0,mtu=-1", "not `-1`"),
            ("tap=vm0,mtu=1500k", "not `1500k`"),
            ("tap=vm0,mtu=99999999999999999999", "from 68"),
            ("tap=vm0,queues=", "not ``"),
            ("tap=vm0,queues=1.5", "not `1.5`"),
            ("tap=vm0,TAP=vm1", "`TAP` is not known here"),
            ("tap=vm0,queue=2", "did you mean `queues`"),
            ("tap=vm0,fd=3", "not both"),
            ("fd=3,bridge=br0", "the owner of the tap"),
            ("fd=three", "such as [3,4]"),
            ("fd=[3,3]", "twice"),
            ("fd=[3", "such as [3,4]"),
        ] {
            let said = NetOptions::parse(text).expect_err(text);
            assert!(said.contains(problem), "{text}: {said}");
        }
    }

    #[test]
    fn options_that_no_text_gives_are_refused() {
        let changes: [fn(&mut NetOptions); 6] = [
            |o| o.tap = "a/b".to_owned(),
            |o| o.mac = Some(Mac::BROADCAST),
            |o| o.mtu = Some(67),
            |o| o.queues = 0,
            |o| o.queues = 9,
            |o| o.bridge = Some("..".to_owned()),
        ];
        for change in changes {
            let mut options = sample();
            change(&mut options);
            let error = read_node::<NetOptions>(&options.to_node("net"), "/").unwrap_err();
            assert!(error.to_string().starts_with("/net: property"), "{error}");
        }
    }
}
