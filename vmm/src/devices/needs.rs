//! What a device needs of a host besides its files, so that an update to a host that lacks it is refused before it
//! begins. The check is in [`live_update::preflight`](crate::live_update::preflight).

/// Something without which a host cannot open a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostNeed {
    /// A driver of Linux.
    Driver {
        /// The name of its module, with `_` for `-`.
        module: &'static str,
        /// What it drives, such as `taps`.
        of: &'static str,
    },
    /// A bridge of this name.
    Bridge(String),
}
