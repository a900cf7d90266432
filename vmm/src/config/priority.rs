//! `priority`: which VMs come first.

use serde::{Deserialize, Serialize};

/// How urgent a VM is. The more urgent one is resumed earlier after a live update, and paused later before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Priority(u8);

impl Priority {
    /// The least urgent.
    pub const LEAST: u8 = 1;
    /// The most urgent.
    pub const MOST: u8 = 100;

    /// Reads the value of the key. Errors if it is no priority.
    pub(super) fn read(value: &toml::Value) -> Result<Self, String> {
        let number = value.as_integer().and_then(|number| u8::try_from(number).ok());
        let number = number.filter(|number| (Self::LEAST..=Self::MOST).contains(number));
        number.map(Self).ok_or_else(|| {
            format!(
                "a priority is a number from {} to {}: the VM with the highest is resumed first; without the key a \
                 VM has {}",
                Self::LEAST,
                Self::MOST,
                Self::default().0
            )
        })
    }
}

impl Default for Priority {
    fn default() -> Self {
        Self(50)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn parse(lines: &str) -> Result<Priority, String> {
        let vm = "[[vm]]\nname = \"web\"\nmemory = \"size=64M\"\nkernel = \"/k\"\n";
        let config = Config::parse(&format!("{vm}{lines}")).map_err(|error| error.to_string())?;
        Ok(config.priority(&config.machines[0].name))
    }

    #[test]
    fn a_vm_has_its_priority_or_the_middle() {
        assert_eq!(parse("priority = 1"), Ok(Priority(1)));
        assert_eq!(parse("priority = 100"), Ok(Priority(100)));
        assert_eq!(parse(""), Ok(Priority::default()));
        assert!(Priority(51) > Priority::default(), "the higher one is more urgent");
    }

    #[test]
    fn what_is_no_priority_is_refused_with_what_would_be_one() {
        for wrong in
            ["0", "101", "-1", "256", "9223372036854775807", "1.5", "\"high\"", "true", "[1]"]
        {
            let said = parse(&format!("priority = {wrong}")).unwrap_err();
            assert!(
                said.contains("VM `web`: priority = ") && said.contains("from 1 to 100"),
                "{said}"
            );
        }
    }
}
