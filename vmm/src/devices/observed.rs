//! The devices of a machine that no configuration describes and whose console the host itself reads: those that every
//! machine has, and a serial port whose output goes to a file of the host.

use std::io;
use std::os::fd::OwnedFd;

use super::catalog::{DeviceOptions, KINDS};
use super::files::Opened;
use super::serial::{SINK, SerialOptions};

/// Returns the options of the devices. Only the serial port needs a file, which [`console_file`] gives it.
pub fn options() -> Vec<DeviceOptions> {
    let others = KINDS.iter().filter_map(|kind| (kind.unasked)());
    let others = others.filter(|options| !matches!(options, DeviceOptions::Serial(_)));
    others.chain([DeviceOptions::Serial(SerialOptions::Tty)]).collect()
}

/// Returns the file that a device of these `options` needs, so that its output goes to `sink`; `None` if it has no
/// output.
pub fn console_file(options: &DeviceOptions, sink: &OwnedFd) -> io::Result<Option<Opened>> {
    match options {
        DeviceOptions::Serial(_) => {
            let fd = sink.try_clone()?;
            Ok(Some(Opened { role: SINK, fd, identity: None }))
        }
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_device_has_a_file_and_no_other_opens_any() {
        let sink: OwnedFd = tempfile::tempfile().unwrap().into();
        let mut files = 0;
        for options in options() {
            match console_file(&options, &sink).unwrap() {
                Some(_) => files += 1,
                None => assert!(options.open().unwrap().is_empty(), "{options:?}"),
            }
        }
        assert_eq!(files, 1);
    }
}
