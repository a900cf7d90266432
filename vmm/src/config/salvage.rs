//! What can be read of a configuration that is not valid as a whole. A mistake in the section of one VM must not cost the
//! others theirs where a configuration has to be used as it is: after a live update or a handover, by a program that
//! refuses what the one before accepted.

use super::{Config, ConfigError, HostSection, VmSection, mistake};
use crate::machine::VmName;
use crate::machine::claims::Claims;

impl Config {
    /// Reads the sections that are valid by themselves. Returns as well why the sections of VMs that are left out are not.
    pub fn salvage(text: &str) -> (Self, Vec<ConfigError>) {
        let mut config = Self { host: HostSection::salvage(text), ..Self::default() };
        let file: toml::Table = toml::from_str(text).unwrap_or_default();
        if let Some(update @ toml::Value::Table(_)) = file.get("update") {
            config.update = update.clone().try_into().unwrap_or_default();
        }
        let sections = file.get("vm").and_then(toml::Value::as_array);
        let (mut claims, mut left_out) = (Claims::default(), Vec::new());
        for section in sections.into_iter().flatten() {
            if let Err(error) = config.add(section, &mut claims) {
                left_out.push(error);
            }
        }
        (config, left_out)
    }

    /// Adds a VM whose section is valid, and does not contradict those before.
    fn add(&mut self, section: &toml::Value, claims: &mut Claims) -> Result<(), ConfigError> {
        let name = section.get("name").and_then(toml::Value::as_str).unwrap_or("?").to_owned();
        let section: VmSection = section
            .clone()
            .try_into()
            .map_err(|error| ConfigError::Parse(mistake::of_vm(&name, &error)))?;
        let (restart, priority) = (section.restart, section.priority()?);
        let machine = section.check()?;
        let is_known = |name: &VmName| self.machines.iter().any(|machine| machine.name == *name);
        if is_known(&machine.name) {
            return Err(ConfigError::DuplicateName(machine.name));
        }
        claims.add_names(&machine)?;
        self.push(machine, restart, priority);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Priority, Restart};

    #[test]
    fn a_mistake_in_the_section_of_one_vm_leaves_the_others_theirs() {
        let vm = |name: &str, lines: &str| {
            format!("[[vm]]\nname = \"{name}\"\nmemory = \"size=64M\"\nkernel = \"/k\"\n{lines}\n")
        };
        let good = "restart = \"always\"\npriority = 7\ndisk = 'path=/d'";
        for (bad, problem) in [
            (vm("b", "disk = 'path=/x,colour=red'"), "colour"),
            (vm("b", "").replace("64M", "4096T"), "4096T"),
            (vm("b", "cpus = 0"), "0 vCPUs"),
            (vm("b", "restart = 'sometimes'"), "VM `b`: unknown variant `sometimes`"),
            (vm("b", "kernle = '/k'"), "`kernle` is not known"),
            (vm("b", "priority = 1000"), "priority"),
            (vm("b", "disk = 'path=/d'"), "same disk /d"),
            (vm("a", ""), "two VMs are called `a`"),
            ("[[vm]]\nname = 7\n".to_owned(), "VM `?`"),
            ("[update]\nbudget = 'long'\n".to_owned(), ""),
        ] {
            let text = format!("[host]\nstop-within-s = 7\n{}{bad}{}", vm("a", good), vm("c", ""));
            Config::parse(&text).expect_err("it is not valid as a whole");
            let (config, left_out) = Config::salvage(&text);
            let names: Vec<_> = config.machines.iter().map(|vm| vm.name.as_str()).collect();
            assert_eq!(names, ["a", "c"], "{bad}");
            let a = &config.machines[0].name;
            assert_eq!((config.restart(a), config.host.stop_within_s), (Restart::Always, Some(7)));
            assert_eq!(config.priority(a), Priority::read(&toml::Value::Integer(7)).unwrap());
            let said: Vec<String> = left_out.iter().map(ToString::to_string).collect();
            assert_eq!(said.len(), usize::from(!problem.is_empty()), "{said:?}");
            assert!(said.concat().contains(problem), "{problem}: {said:?}");
        }
    }

    #[test]
    fn of_a_valid_configuration_nothing_is_left_out_and_of_no_configuration_nothing_is_there() {
        let text = "[host]\nhostname = 'h'\n[update]\nbudget = 5\n[[vm]]\nname = 'a'\nmemory = 'size=64M'\n\
                    kernel = '/k'\nrestart = 'always'\n";
        let (config, left_out) = Config::salvage(text);
        assert_eq!((Some(config), left_out.len()), (Config::parse(text).ok(), 0));
        for text in ["not TOML", "", "vm = 7", "update = [1]"] {
            let (config, left_out) = Config::salvage(text);
            assert_eq!((config, left_out.len()), (Config::default(), 0), "{text}");
        }
    }
}
