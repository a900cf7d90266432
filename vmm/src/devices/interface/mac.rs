//! Ethernet addresses.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::random::random;

/// First octet of an address that no configuration gives: locally administered (bit 1 set) and unicast (bit 0 clear), so it is no
/// vendor's address (IEEE 802).
const LOCAL: u8 = 0x02;

/// The address of one network interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The broadcast address.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Reads `52:54:00:12:34:56`. Errors if the text is not of this form, or if no interface can have
    /// the address because it is that of a group.
    pub fn parse(text: &str) -> Result<Self, String> {
        let octets: Option<Vec<u8>> = text
            .split(':')
            .map(|octet| {
                let is_octet = octet.len() == 2 && octet.bytes().all(|b| b.is_ascii_hexdigit());
                u8::from_str_radix(octet, 16).ok().filter(|_| is_octet)
            })
            .collect();
        let mac = octets.and_then(|octets| octets.try_into().ok()).map(Self);
        let mac =
            mac.ok_or_else(|| format!("`{text}` is no MAC address such as 52:54:00:12:34:56"))?;
        match mac.is_of_interface() {
            true => Ok(mac),
            false => Err(format!(
                "`{text}` cannot be the MAC address of an interface: the lowest bit of its first octet \
                 must be 0, and another bit 1"
            )),
        }
    }

    /// Returns the address of a device without a configured one: always the same for one label, and most
    /// likely different for another label (40 bits of the label's 64-bit FNV-1a hash).
    pub fn derived(label: &str) -> Self {
        let hash = label.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        Self::local(hash)
    }

    /// Returns a random address, for a device whose label another one on its network may have.
    pub fn random() -> Self {
        Self::local(random())
    }

    fn local(number: u64) -> Self {
        let [a, b, c, d, e, ..] = number.to_le_bytes();
        Self([LOCAL, a, b, c, d, e])
    }

    /// Whether the address is a group address, which includes broadcast.
    pub fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// Whether the address can belong to one interface.
    pub fn is_of_interface(self) -> bool {
        !self.is_multicast() && self.0 != [0; 6]
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl TryFrom<String> for Mac {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text)
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_six_octets_and_not_that_of_a_group() {
        let mac = Mac::parse("52:54:00:12:aB:0f").unwrap();
        assert_eq!(mac, Mac([0x52, 0x54, 0, 0x12, 0xab, 0x0f]));
        assert_eq!(mac.to_string(), "52:54:00:12:ab:0f");
        for wrong in ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "52-54-00-12-34-56"] {
            assert!(Mac::parse(wrong).unwrap_err().contains("no MAC address"), "{wrong}");
        }
        for wrong in ["52:54:0:12:34:56", "52:54:+1:12:34:56", "52:54:0g:12:34:56"] {
            assert!(Mac::parse(wrong).is_err(), "{wrong}");
        }
        for group in ["ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01", "00:00:00:00:00:00"] {
            assert!(Mac::parse(group).unwrap_err().contains("cannot be"), "{group}");
        }
    }

    #[test]
    fn a_derived_address_is_local_and_never_changes() {
        let mac = Mac::derived("web-0");
        // A guest's configuration may name this address: another hash would change it.
        assert_eq!(mac.to_string(), "02:6c:20:5c:09:2e");
        assert!(mac.is_of_interface());
        assert_ne!(Mac::derived("web-1"), mac);
        assert_ne!(Mac::derived("db-0"), mac);
    }
}
