//! The options of devices: one for each kind of the catalog, under the kind's key in the configuration. And
//! Cloud Hypervisor's options that there are not, so that they can be named.

use clap::error::Error;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use super::foreign;
use crate::devices::catalog::KINDS;

/// The values of the devices' options, by key, in the order of the catalog.
#[derive(Debug, Clone, Default)]
pub(super) struct DeviceArguments {
    pub(super) values: Vec<(&'static str, Vec<String>)>,
}

impl DeviceArguments {
    /// Adds what a person may leave out, and makes it on the host: a tap. Errors with the option, its value and the
    /// problem.
    pub(super) fn complete(&mut self) -> Result<(), (&'static str, String, String)> {
        for (key, values) in &mut self.values {
            let Some(kind) = KINDS.iter().find(|kind| kind.key == *key) else { continue };
            for value in values {
                *value =
                    (kind.complete)(value).map_err(|problem| (*key, value.clone(), problem))?;
            }
        }
        Ok(())
    }

    /// Whether a device has the terminal.
    pub(super) fn use_terminal(&self) -> bool {
        self.values.iter().any(|(_, values)| values.iter().any(|value| value == "tty"))
    }
}

/// Returns a path as an absolute one, which a configuration needs. A text that cannot be one is left for the
/// configuration's error.
fn absolute(path: String) -> String {
    let absolute = std::path::absolute(&path).ok();
    absolute.and_then(|path| path.into_os_string().into_string().ok()).unwrap_or(path)
}

impl FromArgMatches for DeviceArguments {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let values = KINDS.iter().filter_map(|kind| {
            let command_line = kind.command_line?;
            let given = matches.get_many::<String>(kind.key)?;
            let values = match command_line.is_path {
                true => given.cloned().map(absolute).collect(),
                false => given.map(|value| foreign::without_harmless(kind.key, value)).collect(),
            };
            Some((kind.key, values))
        });
        Ok(Self { values: values.collect() })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for DeviceArguments {
    fn augment_args(command: Command) -> Command {
        command.args(KINDS.iter().filter_map(|kind| {
            let command_line = kind.command_line?;
            let arg = Arg::new(kind.key)
                .long(kind.key)
                .help(command_line.usage)
                .value_name("OPTIONS")
                .action(ArgAction::Append);
            // Several devices may follow one option, as for Cloud Hypervisor.
            let arg = if kind.most > 1 { arg.num_args(1..) } else { arg };
            Some(match command_line.default {
                Some(default) => arg.default_value(default),
                None => arg,
            })
        }))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

/// Those of Cloud Hypervisor's options that were given and that there are not, with their remedies.
#[derive(Debug, Clone, Default)]
pub(super) struct ForeignArguments {
    pub(super) given: Vec<(String, &'static str)>,
}

/// Those options of Cloud Hypervisor that no kind of device here has as its key.
fn foreign_options() -> impl Iterator<Item = &'static (&'static str, &'static str)> {
    foreign::OPTIONS.iter().filter(|(name, _)| KINDS.iter().all(|kind| kind.key != *name))
}

impl FromArgMatches for ForeignArguments {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let given = foreign_options().filter(|(name, _)| {
            let mut values =
                matches.get_many::<String>(name).into_iter().flatten().map(String::as_str);
            let only = (values.next().unwrap_or_default(), values.next());
            matches.contains_id(name) && !(only.1.is_none() && foreign::is_always_so(name, only.0))
        });
        Ok(Self { given: given.map(|(name, remedy)| ((*name).to_owned(), *remedy)).collect() })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for ForeignArguments {
    fn augment_args(command: Command) -> Command {
        command.args(foreign_options().map(|(name, _)| {
            Arg::new(*name).long(*name).hide(true).num_args(0..).action(ArgAction::Append)
        }))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}
