//! The only list of the kinds of devices. Code outside the folders of the kinds uses this list, and
//! handles devices only as [`DeviceOptions`], [`DeviceState`] and [`Built`].
//!
//! Devices get their slots on the PCI bus in the order of the list. A new kind goes to the end, so
//! that it does not move the devices of other kinds.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::DeviceError;
use super::claims::Claim;
use super::files::{OpenError, Opened};
use super::kind::{Built, CommandLine, DeviceCalls, Kind, Place, Site};
use super::needs::HostNeed;
use crate::state::node::read_node;
use crate::state::{Node, Schema, StateError};

/// One entry of the catalog: a kind of device as the rest of the program uses it.
#[derive(Debug)]
pub struct KindInfo {
    /// The key in a VM's configuration that adds a device of this kind.
    pub key: &'static str,
    /// The option of `perennial run` that adds a device of this kind.
    pub command_line: Option<CommandLine>,
    /// The name of its nodes in the state document.
    pub name: &'static str,
    /// Maximum number of devices of this kind in one machine.
    pub most: usize,
    /// Where the guest finds such a device.
    pub place: Place,
    /// The system calls that its devices make.
    pub calls: DeviceCalls,
    /// The role of the file from which a machine can boot, for kinds of disks.
    pub boots_from: Option<&'static str>,
    /// Parses the configuration's text for one device of a machine with this number of vCPUs.
    pub parse: fn(&str, u32) -> Result<DeviceOptions, String>,
    /// Adds to the value of an option of `perennial run` what a person may leave out of it.
    pub complete: fn(&str) -> Result<String, String>,
    /// The device that a machine gets by default if its configuration does not have the key.
    pub unasked: fn() -> Option<DeviceOptions>,
    options: Decoder<DeviceOptions>,
    state: Decoder<DeviceState>,
}

/// Decodes nodes whose binding is in `bindings`.
#[derive(Debug)]
struct Decoder<T> {
    bindings: &'static [&'static str],
    read: fn(&Node, &str) -> Result<T, StateError>,
}

macro_rules! catalog {
    ($($kind:ident => $path:ty,)+) => {
        /// The kinds, in the order of their slots.
        pub const KINDS: &[KindInfo] = &[$(KindInfo {
            key: <$path>::KEY,
            command_line: <$path>::COMMAND_LINE,
            name: <$path as Kind>::NAME,
            most: <$path>::MOST,
            place: <$path>::PLACE,
            calls: <$path>::CALLS,
            boots_from: <$path>::BOOTS_FROM,
            parse: |text, vcpus| <$path>::parse(text, vcpus).map(DeviceOptions::$kind),
            complete: <$path>::complete,
            unasked: || <$path>::unasked().map(DeviceOptions::$kind),
            options: Decoder {
                bindings: <$path as Kind>::Options::COMPATIBLE,
                read: |node, parent| read_node(node, parent).map(DeviceOptions::$kind),
            },
            state: Decoder {
                bindings: <$path as Kind>::State::COMPATIBLE,
                read: |node, parent| read_node(node, parent).map(DeviceState::$kind),
            },
        }),+];

        /// The options of one device, of any kind.
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum DeviceOptions {
            $(
                #[doc = concat!("Of a `", stringify!($kind), "`.")]
                $kind(<$path as Kind>::Options),
            )+
        }

        /// The state of one device, of any kind.
        #[derive(Debug, Clone, PartialEq)]
        pub enum DeviceState {
            $(
                #[doc = concat!("Of a `", stringify!($kind), "`.")]
                $kind(<$path as Kind>::State),
            )+
        }

        impl DeviceOptions {
            /// The kind of the device.
            pub fn kind(&self) -> &'static KindInfo {
                let name = match self {
                    $(Self::$kind(_) => <$path as Kind>::NAME,)+
                };
                kind_of(name)
            }

            /// Sets at random what would follow from the name of the VM, for a VM whose name others have as well.
            pub fn make_unique(&mut self) {
                match self {
                    $(Self::$kind(options) => <$path>::make_unique(options),)+
                }
            }

            /// Returns the path of the file or block device in which the device keeps its data, if it has a
            /// storage.
            pub fn stored_at(&self) -> Option<&Path> {
                match self {
                    $(Self::$kind(options) => <$path>::stored_at(options),)+
                }
            }

            /// Returns what the device takes for itself of its host.
            pub fn claims(&self) -> Vec<Claim> {
                match self {
                    $(Self::$kind(options) => <$path>::claims(options),)+
                }
            }

            /// Returns what a host must have before it can open the device.
            pub fn needs(&self) -> Vec<HostNeed> {
                match self {
                    $(Self::$kind(options) => <$path>::needs(options),)+
                }
            }

            /// Errors if a machine should not boot with these options on this host as it is now.
            pub fn check_before_boot(&self) -> Result<(), OpenError> {
                match self {
                    $(Self::$kind(options) => <$path>::check_before_boot(options),)+
                }
            }

            /// Opens the files that the device needs by path. Called in the host's process.
            pub fn open(&self) -> Result<Vec<Opened>, OpenError> {
                match self {
                    $(Self::$kind(options) => <$path>::open(options),)+
                }
            }

            /// Builds the device in the VM's process. Without a state the device is in its reset
            /// state and runs; with a state it is restored and paused.
            pub fn build(
                &self,
                site: &mut Site,
                state: Option<DeviceState>,
            ) -> Result<Built<DeviceState>, DeviceError> {
                match (self, state) {
                    $(
                        (Self::$kind(options), None) => {
                            <$path>::build(options, site, None).map(|b| b.map(DeviceState::$kind))
                        }
                        (Self::$kind(options), Some(DeviceState::$kind(state))) => {
                            let built = <$path>::build(options, site, Some(state));
                            built.map(|built| built.map(DeviceState::$kind))
                        }
                    )+
                    (_, Some(other)) => {
                        let other = other.kind().name;
                        Err(site.error("restore it", format!("the state is of a {other}")))
                    }
                }
            }

            /// The options as a node called `name`.
            pub fn to_node(&self, name: &str) -> Node {
                match self {
                    $(Self::$kind(options) => options.to_node(name),)+
                }
            }
        }

        impl DeviceState {
            /// The kind of the device.
            pub fn kind(&self) -> &'static KindInfo {
                let name = match self {
                    $(Self::$kind(_) => <$path as Kind>::NAME,)+
                };
                kind_of(name)
            }

            /// The state as a node called `name`.
            pub fn to_node(&self, name: &str) -> Node {
                match self {
                    $(Self::$kind(state) => state.to_node(name),)+
                }
            }
        }

        #[cfg(any(test, fuzzing))]
        impl KindInfo {
            /// Returns sample options, one for each kind.
            pub(crate) fn samples() -> Vec<DeviceOptions> {
                use super::kind::Sample;
                vec![$(DeviceOptions::$kind(<$path>::options())),+]
            }

            /// Returns files for a device with these options, and with this state if given.
            pub(crate) fn sample_files(
                options: &DeviceOptions,
                state: Option<&DeviceState>,
            ) -> Option<super::kind::SampleFiles> {
                use super::kind::Sample;
                match (options, state) {
                    $(
                        (DeviceOptions::$kind(_), None) => <$path>::files(None),
                        (DeviceOptions::$kind(_), Some(DeviceState::$kind(state))) => {
                            <$path>::files(Some(state))
                        }
                    )+
                    _ => None,
                }
            }
        }
    };
}

catalog! {
    Serial => super::serial::Serial,
    VirtioBlk => super::virtio::Block,
    VirtioRng => super::virtio::rng::Rng,
    VirtioNet => super::virtio::net::Net,
    Acpi => super::acpi::Acpi,
    Rtc => super::rtc::Rtc,
    Smbios => super::smbios::Smbios,
    CloudInit => super::virtio::seed::Seed,
}

fn kind_of(name: &str) -> &'static KindInfo {
    // The search always succeeds: every name comes from the same list.
    KINDS.iter().find(|kind| kind.name == name).unwrap_or(&KINDS[0])
}

impl DeviceOptions {
    /// Decodes a child of the node at `parent`: its binding decides which kind it is of.
    pub fn read(node: &Node, parent: &str) -> Result<Self, StateError> {
        read_any(node, parent, |kind| &kind.options)
    }
}

impl DeviceState {
    /// Decodes a child of the node at `parent`: its binding decides which kind it is of.
    pub fn read(node: &Node, parent: &str) -> Result<Self, StateError> {
        read_any(node, parent, |kind| &kind.state)
    }
}

fn read_any<T>(
    node: &Node,
    parent: &str,
    decoder: fn(&'static KindInfo) -> &'static Decoder<T>,
) -> Result<T, StateError> {
    let decoders = || KINDS.iter().map(decoder);
    let found = decoders().find(|d| d.bindings.iter().any(|binding| node.is_compatible(binding)));
    match found {
        Some(decoder) => (decoder.read)(node, parent),
        None => {
            // A node without `compatible` gets its own error, from `reader`.
            node.reader(parent)?;
            let known: Vec<&str> = decoders().flat_map(|d| d.bindings).copied().collect();
            Err(node.incompatible(parent, &known))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn kinds_differ_in_key_name_and_bindings() {
        let all_differ = |names: Vec<&str>| {
            let different: BTreeSet<&str> = names.iter().copied().collect();
            assert_eq!(different.len(), names.len(), "{names:?}");
        };
        all_differ(KINDS.iter().map(|kind| kind.key).collect());
        all_differ(KINDS.iter().map(|kind| kind.name).collect());
        let bindings = |kind: &'static KindInfo| [kind.options.bindings, kind.state.bindings];
        all_differ(KINDS.iter().flat_map(bindings).flatten().copied().collect());
    }

    #[test]
    fn options_of_every_kind_are_read_by_their_binding() {
        for options in KindInfo::samples() {
            let node = options.to_node(&format!("{}@1", options.kind().name));
            assert_eq!(DeviceOptions::read(&node, "/machine"), Ok(options));
        }
        let stray = Node::new("stray@1", &["perennial,stray-v1"]);
        let error = DeviceOptions::read(&stray, "/machine").unwrap_err().to_string();
        assert!(error.starts_with("/machine/stray@1: the document has `perennial,stray-v1`"));
        assert!(error.contains("`perennial,virtio-blk-options-v1`"), "{error}");
    }
}
