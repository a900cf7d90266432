//! The workload's settings on the kernel's command line.

use std::fs;
use std::time::Duration;

/// The parameters that start with `perennial.`.
#[derive(Debug)]
pub(crate) struct Settings {
    /// `perennial.memory=MIB`, or `all` for the free memory except a reserve. In bytes.
    pub(crate) memory: usize,
    /// `perennial.disk=PATH`, or `off`.
    pub(crate) disk: Option<String>,
    /// `perennial.readers=COUNT`: the number of threads that read the disk besides the one that writes.
    pub(crate) readers: u32,
    /// `perennial.busy=PERCENT`: the share of each vCPU that its counter uses.
    pub(crate) busy: u32,
    /// `perennial.interval=MS`: the time between two heartbeats.
    pub(crate) interval: Duration,
    /// `perennial.echo=PORT`: the TCP port on which what arrives is sent back.
    pub(crate) echo: Option<u16>,
    /// `perennial.button=obey`: the guest powers itself off when its power button is pressed. Otherwise it
    /// ignores the button.
    pub(crate) obeys_button: bool,
    /// `perennial.broken=DISK,..`: the disks, such as `vdb`, whose I/O errors are expected.
    pub(crate) broken: Vec<String>,
    /// `perennial.scratch=DISK,..`: the disks of [`crate::scratch`].
    pub(crate) scratch: Vec<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            memory: 16 << 20,
            disk: Some("/dev/vda".to_owned()),
            readers: 0,
            busy: 100,
            interval: Duration::from_millis(200),
            echo: None,
            obeys_button: false,
            broken: Vec::new(),
            scratch: Vec::new(),
        }
    }
}

impl Settings {
    /// Parses a command line. Ignores other parameters; an unknown one that starts with `perennial.` is an
    /// error.
    pub(crate) fn parse(cmdline: &str) -> Result<Self, String> {
        let mut settings = Self::default();
        for word in cmdline.split_whitespace() {
            let Some(setting) = word.strip_prefix("perennial.") else { continue };
            let (key, value) = setting.split_once('=').ok_or(format!("{word}: has no value"))?;
            let number = || value.parse::<u32>().map_err(|_| format!("{word}: not a number"));
            match key {
                "memory" if value == "all" => settings.memory = free_memory(),
                "memory" => settings.memory = (number()? as usize) << 20,
                "disk" => settings.disk = (value != "off").then(|| value.to_owned()),
                "readers" => settings.readers = number()?.min(64),
                "busy" => settings.busy = number()?.clamp(1, 100),
                "interval" => settings.interval = Duration::from_millis(number()?.into()),
                "echo" => {
                    let port = value.parse().map_err(|_| format!("{word}: not a port"))?;
                    settings.echo = Some(port);
                }
                "button" if value == "obey" => settings.obeys_button = true,
                "broken" => settings.broken = value.split(',').map(str::to_owned).collect(),
                "scratch" => settings.scratch = value.split(',').map(str::to_owned).collect(),
                _ => return Err(format!("{word}: no such setting")),
            }
        }
        Ok(settings)
    }
}

/// The memory that the kernel reports as available, minus a reserve, in bytes.
fn free_memory() -> usize {
    let available = meminfo("MemAvailable") << 10;
    let reserve = (available / 32).max(16 << 20);
    available.saturating_sub(reserve)
}

/// A value in `/proc/meminfo` in KiB; 0 if it is missing.
pub(crate) fn meminfo(key: &str) -> usize {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_words_are_read_and_the_rest_keeps_its_default() {
        let settings =
            Settings::parse("console=ttyS0 perennial.memory=64 quiet perennial.disk=off").unwrap();
        assert_eq!(settings.memory, 64 << 20);
        assert_eq!(settings.disk, None);
        assert_eq!(settings.busy, 100);
    }

    #[test]
    fn unknown_settings_and_values_that_are_no_numbers_are_errors() {
        for bad in ["perennial.memroy=1", "perennial.memory", "perennial.busy=much"] {
            assert!(Settings::parse(bad).unwrap_err().contains(bad), "{bad}");
        }
    }
}
