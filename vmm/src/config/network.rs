//! `[host.network]`: the network that PID 1 sets up.

use std::net::Ipv4Addr;

use serde::{Deserialize, Deserializer};

use crate::devices::interface;

/// `[host.network]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct NetworkSection {
    /// A bridge to create, for the taps of guests.
    #[serde(deserialize_with = "interface_name")]
    pub bridge: Option<String>,
    /// The host's interface to the network. It becomes a port of the bridge, if a bridge is configured.
    #[serde(deserialize_with = "interface_name")]
    pub uplink: Option<String>,
    /// The host's own address, on the bridge or, without one, on the uplink.
    pub address: Option<HostAddress>,
    /// The default gateway.
    pub gateway: Option<Ipv4Addr>,
}

impl NetworkSection {
    /// The interface that has the host's own address.
    pub fn own_interface(&self) -> Option<&str> {
        self.bridge.as_deref().or(self.uplink.as_deref())
    }

    /// Checks that the settings fit each other. The error says which do not.
    pub(super) fn check(&self) -> Result<(), String> {
        let Self { bridge, uplink, address, gateway } = self;
        if (address.is_some() || gateway.is_some()) && bridge.is_none() && uplink.is_none() {
            return Err("an address needs a `bridge` or an `uplink` that has it".to_owned());
        }
        if bridge.is_some() && bridge == uplink {
            return Err("`bridge` and `uplink` must be different interfaces".to_owned());
        }
        if *address == Some(HostAddress::Dhcp) && uplink.is_none() {
            let remedy = "name the `uplink` through which a DHCP server answers; on a bridge alone, only guests \
                          could";
            return Err(remedy.to_owned());
        }
        match (gateway, address) {
            (Some(gateway), Some(HostAddress::Fixed(address)))
                if address.has_in_network(*gateway) =>
            {
                Ok(())
            }
            (Some(_), Some(HostAddress::Dhcp)) => {
                Err("the `gateway` comes by DHCP as the address does; remove it".to_owned())
            }
            (Some(gateway), Some(HostAddress::Fixed(Address { address, prefix }))) => {
                Err(format!("the gateway {gateway} is not in the network of {address}/{prefix}"))
            }
            (Some(_), None) => Err("a `gateway` needs an `address`".to_owned()),
            (None, _) => Ok(()),
        }
    }
}

/// Where the host's own address comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum HostAddress {
    /// `dhcp`: a server on the network assigns the address and the gateway.
    Dhcp,
    /// This address.
    Fixed(Address),
}

impl TryFrom<String> for HostAddress {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        match text.as_str() {
            "dhcp" => Ok(Self::Dhcp),
            _ => Address::try_from(text).map(Self::Fixed),
        }
    }
}

/// An IPv4 address with the length of its network's prefix in bits: `192.0.2.5/24`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Address {
    /// The address.
    pub address: Ipv4Addr,
    /// 1 to 32.
    pub prefix: u8,
}

impl Address {
    /// Whether `other` is in the network of this address.
    fn has_in_network(self, other: Ipv4Addr) -> bool {
        let host_bits = 32 - u32::from(self.prefix.clamp(1, 32));
        (self.address.to_bits() ^ other.to_bits()) >> host_bits == 0
    }
}

impl TryFrom<String> for Address {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let parsed = text.split_once('/').and_then(|(address, prefix)| {
            let prefix = prefix.parse().ok().filter(|prefix| (1..=32).contains(prefix))?;
            Some(Self { address: address.parse().ok()?, prefix })
        });
        parsed.ok_or_else(|| {
            format!(
                "`{}` is neither `dhcp` nor an IPv4 address with its prefix, such as 192.0.2.5/24",
                text.escape_default()
            )
        })
    }
}

fn interface_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let name = String::deserialize(deserializer)?;
    interface::check_name(&name).map_err(serde::de::Error::custom)?;
    Ok(Some(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn parse(lines: &str) -> Result<Option<NetworkSection>, String> {
        let config = Config::parse(&format!("[host.network]\n{lines}"));
        config.map(|config| config.host.network).map_err(|error| error.to_string())
    }

    #[test]
    fn a_network_is_a_bridge_an_uplink_and_an_address_as_far_as_they_are_given() {
        let full = parse(
            "bridge = \"br0\"\nuplink = \"eth0\"\naddress = \"10.0.2.15/24\"\ngateway = \"10.0.2.2\"",
        );
        let address =
            HostAddress::Fixed(Address { address: Ipv4Addr::new(10, 0, 2, 15), prefix: 24 });
        let expected = NetworkSection {
            bridge: Some("br0".to_owned()),
            uplink: Some("eth0".to_owned()),
            address: Some(address),
            gateway: Some(Ipv4Addr::new(10, 0, 2, 2)),
        };
        assert_eq!(full, Ok(Some(expected)));
        let by_dhcp = parse("uplink = \"eth0\"\naddress = \"dhcp\"").unwrap().unwrap();
        assert_eq!(by_dhcp.address, Some(HostAddress::Dhcp));
        assert_eq!(by_dhcp.own_interface(), Some("eth0"));
        assert_eq!(parse(""), Ok(Some(NetworkSection::default())));
        assert_eq!(Config::parse("").unwrap().host.network, None);
    }

    #[test]
    fn a_network_that_cannot_be_is_refused_with_what_would_be_right() {
        for (lines, problem) in [
            ("bridge = \"a b\"", "characters"),
            ("uplink = \"\"", "cannot be the name"),
            ("bridge = \"br0\"\nuplink = \"br0\"", "must be different"),
            ("address = \"10.0.2.15/24\"", "`bridge` or an `uplink`"),
            ("bridge = \"br0\"\naddress = \"10.0.2.15\"", "such as 192.0.2.5/24"),
            ("bridge = \"br0\"\naddress = \"10.0.2.15/0\"", "such as 192.0.2.5/24"),
            ("bridge = \"br0\"\naddress = \"10.0.2.15/33\"", "such as 192.0.2.5/24"),
            ("bridge = \"br0\"\ngateway = \"10.0.2.2\"", "needs an `address`"),
            (
                "bridge = \"br0\"\naddress = \"10.0.2.15/24\"\ngateway = \"10.0.3.2\"",
                "10.0.3.2 is not in the network of 10.0.2.15/24",
            ),
            ("address = \"dhcp\"", "`bridge` or an `uplink`"),
            ("bridge = \"br0\"\naddress = \"dhcp\"", "name the `uplink`"),
            ("uplink = \"eth0\"\naddress = \"dhcp\"\ngateway = \"10.0.3.2\"", "comes by DHCP"),
            ("bridge = \"br0\"\naddress = \"DHCP\"", "neither `dhcp` nor"),
            ("colour = \"red\"", "colour"),
        ] {
            let said = parse(lines).expect_err(lines);
            assert!(said.contains(problem) && !said.contains('\n'), "{lines}: {said}");
        }
    }
}
