//! `restart`: when the host boots a VM again that has ended.

use serde::{Deserialize, Serialize};

/// When the host boots a VM again that has ended by itself. A VM that an operator stopped stays stopped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// When its guest resets it, unless the guest does so again and again.
    #[default]
    Never,
    /// Also when it fails: its process or a vCPU ends, or it cannot be started.
    OnFailure,
    /// Also when its guest powers it off.
    Always,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn each_vm_has_its_policy() {
        let vm = |name, lines| {
            format!("[[vm]]\nname = \"{name}\"\nmemory = \"size=64M\"\nkernel = \"/k\"\n{lines}\n")
        };
        let text = vm("a", "") + &vm("b", "restart = \"always\"");
        let config = Config::parse(&(text.clone() + &vm("c", "restart = \"on-failure\""))).unwrap();
        let policies: Vec<_> = config.machines.iter().map(|m| config.restart(&m.name)).collect();
        assert_eq!(policies, [Restart::Never, Restart::Always, Restart::OnFailure]);
        let wrong = Config::parse(&(text + &vm("c", "restart = \"sometimes\""))).unwrap_err();
        assert!(wrong.to_string().contains("`on-failure`"), "{wrong}");
    }
}
