//! The keys of `[host]` about the processes of VMs: the users they run as, and whether they must be confined.

use serde::Deserialize;

/// Number of user IDs that a host may use.
pub const USERS: u32 = 4096;
/// The first ID behind those of a machine's services (<https://systemd.io/UIDS-GIDS>). A process with the ID of one
/// could be killed by that service, and could read its files. People have IDs from 1000 to 60000, but a host in a user
/// namespace may have no others.
const FIRST: u32 = 1000;

/// `users`: the first of the [`USERS`] user IDs that processes of VMs run as, each its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "u32")]
pub struct FirstUser(pub u32);

/// Neither Linux distributions nor systemd use the IDs from 1879048192 to 2147483647
/// (<https://systemd.io/UIDS-GIDS>).
impl Default for FirstUser {
    fn default() -> Self {
        Self(1_900_000_000)
    }
}

impl TryFrom<u32> for FirstUser {
    type Error = String;

    /// The last ID, 4294967295, stands for none.
    fn try_from(first: u32) -> Result<Self, String> {
        match first {
            FIRST..=0xffff_efff => Ok(Self(first)),
            _ => Err(format!(
                "{USERS} user IDs from {first} on are not free for VMs: IDs below {FIRST} belong to services of \
                 the machine, and the last is {}; give the first of a range that nothing else uses, such as {}",
                u32::MAX - 1,
                Self::default().0
            )),
        }
    }
}

/// `confine`: what to do with a VM whose process cannot be confined in full.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Confine {
    /// Start it, and say in the log and in the status what is missing.
    #[default]
    BestEffort,
    /// Do not start it.
    Required,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn the_users_of_vms_are_a_range_of_their_own() {
        let host =
            |lines: &str| Config::parse(&format!("[host]\n{lines}")).map(|config| config.host);
        let section = host("users = 70000\nconfine = \"required\"").unwrap();
        assert_eq!((section.users, section.confine), (FirstUser(70_000), Confine::Required));
        let section = host("").unwrap();
        assert_eq!((section.users, section.confine), (FirstUser::default(), Confine::BestEffort));
        for wrong in [
            "users = 0",
            "users = 1",
            "users = 999",
            "users = 4294963200",
            "users = 4294967295",
            "users = -1",
            "confine = \"off\"",
        ] {
            host(wrong).expect_err(wrong);
        }
        assert!(host("users = 1000").is_ok() && host("users = 4294963199").is_ok());
        let said = host("users = 1").unwrap_err().to_string();
        assert!(said.starts_with("line 2: [host]: `users`: 4096 user IDs from 1 on"), "{said}");
    }
}
