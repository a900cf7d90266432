//! The first steps of a host: what has to be there before anything can be found, what the last kernel
//! left, and which configuration to go by. None of them starts or stops a VM.

use super::backend::{self, Chosen, NoLuo};
use super::entered::{Entered, EnteredError};
use super::{DEFAULT_CONTROL_PORT, DEFAULT_SOCKET, HostError, init, modules};
use crate::api::chain;
use crate::config::{Config, ConfigError, HostSection};
use crate::live_update::incoming::{self, Arrival};

/// What has to be there before anything can be found: modules and file systems. For PID 1 only. `fresh`
/// says that no VM can be preserved in a pool. Says what cannot be had; all else is there.
pub(super) fn prepare(section: &HostSection, fresh: bool) -> Option<Vec<String>> {
    if !init::is_pid_1() {
        return None;
    }
    let absent = modules::load_all(&section.modules);
    let absent = absent.iter().map(|error| chain(error).join(": "));
    let unmounted = init::mount_all(&section.mounts, fresh);
    let unmounted = unmounted.iter().map(|error| chain(error).join(": "));
    let missing: Vec<String> = absent.chain(unmounted).collect();
    missing.iter().for_each(|why| tracing::error!("{why}"));
    (!missing.is_empty()).then_some(missing)
}

/// Chooses a LUO, and looks for what the last kernel left in it.
pub(super) fn find_vms(
    section: &HostSection,
    ram_bytes: u64,
    entered: Result<Entered, EnteredError>,
) -> (Entered, Chosen, Option<Arrival>) {
    let holds = |why: String| {
        tracing::error!("{why}");
        Err(NoLuo { why, holds: true })
    };
    let mut entered = match entered {
        Ok(entered) => entered,
        Err(error) => return (Entered::unknown(), holds(chain(&error).join(": ")), None),
    };
    let luo = match backend::choose(section, ram_bytes, entered.ticket()) {
        Ok(luo) => luo,
        none => return (entered, none, None),
    };
    match incoming::arrive(luo.as_ref()) {
        Ok(None) if entered.ticket().is_some() => {
            let why = "the pool is the right one, but its manifest is gone: a host that has ended \
                       took it, and nothing else says what lies there";
            (entered, holds(why.to_owned()), None)
        }
        Ok(arrival) => {
            entered.redeem();
            (entered, Ok(luo), arrival)
        }
        Err(error) => (entered, holds(chain(&HostError::Arrival(error)).join(": ")), None),
    }
}

/// What to go by when the configuration cannot be used. After a live update it must not take the VMs
/// down: the one of the old host serves. PID 1 without one comes up without VMs, so that whoever has
/// to mend it can ask what is wrong; a daemon ends, and its service manager says so.
pub(super) fn choose_config(
    text: String,
    parsed: Result<Config, ConfigError>,
    arrival: Option<&Arrival>,
) -> Result<(Config, String, Option<Vec<String>>), HostError> {
    let error = match parsed {
        Ok(config) => return Ok((config, text, None)),
        Err(error) => error,
    };
    let why = chain(&error);
    match arrival {
        Some(arrival) => {
            tracing::error!("{}; the configuration of the old host is used", why.join(": "));
            let text = arrival.manifest.config.clone();
            Ok(match Config::parse(&text) {
                Ok(config) => (config, text, Some(why)),
                // The manifest has all that the VMs need.
                Err(error) => {
                    let olds = format!("nor that of the old host: {}", chain(&error).join(": "));
                    tracing::error!("{olds}");
                    (bare_config(), text, Some(why.into_iter().chain([olds]).collect()))
                }
            })
        }
        None if init::is_pid_1() => {
            tracing::error!("{}; this host comes up without VMs", why.join(": "));
            Ok((bare_config(), text, Some(why)))
        }
        None => Err(error.into()),
    }
}

/// A host that can be asked what is wrong.
fn bare_config() -> Config {
    let host = HostSection {
        socket: Some(DEFAULT_SOCKET.into()),
        control_port: Some(DEFAULT_CONTROL_PORT.to_owned()),
        ..HostSection::default()
    };
    Config { host, ..Config::default() }
}
