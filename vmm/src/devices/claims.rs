//! What a device takes for itself of its host, so that two devices with the same file, tap or address are refused
//! before one of them does harm. The check is in [`machine::claims`](crate::machine::claims).

use std::path::PathBuf;

/// Something of the host that at most one device may have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// What the thing is for the device, such as `disk`.
    pub role: &'static str,
    /// The thing.
    pub thing: Thing,
    /// Whether other devices may have the thing, if all of them say so.
    pub shared: bool,
    /// The option with which devices say so. `None`: they cannot.
    pub shared_with: Option<&'static str>,
}

/// A thing of the host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Thing {
    /// A file, a block device or a socket. It may not exist yet.
    Path(PathBuf),
    /// Something else, by its kind and its name: `tap`, `vm0`.
    Named(&'static str, String),
}

impl Claim {
    /// A path that only one device may have.
    pub fn path(role: &'static str, path: impl Into<PathBuf>) -> Self {
        Self { role, thing: Thing::Path(path.into()), shared: false, shared_with: None }
    }

    /// A named thing that only one device may have. Its kind is its role.
    pub fn named(role: &'static str, name: impl Into<String>) -> Self {
        Self { role, thing: Thing::Named(role, name.into()), shared: false, shared_with: None }
    }
}
