//! Measurements of iperf3 from outside the host to a guest that serves them.

use std::io;
use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

/// What iperf3 sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// A stream.
    Tcp,
    /// Datagrams.
    Udp,
}

impl Protocol {
    /// How much is sent and how fast: slow enough for an emulated guest, and long enough for an update on the way.
    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Tcp => &["-n", "4M", "-b", "800K"],
            Self::Udp => &["-u", "-n", "1M", "-b", "200K", "-l", "1000"],
        }
    }
}

/// Why this computer cannot measure. `None` if it can.
pub fn missing() -> Option<String> {
    let found = Command::new("iperf3").arg("--version").stdout(Stdio::null()).status();
    match found {
        Ok(status) if status.success() => None,
        _ => Some("iperf3 is not installed".to_owned()),
    }
}

/// A measurement that runs.
#[derive(Debug)]
pub struct Measurement(Child);

impl Measurement {
    /// Starts to send to a port of this computer.
    pub fn start(protocol: Protocol, port: u16) -> io::Result<Self> {
        let mut client = Command::new("iperf3");
        client.args(["-J", "-c", &Ipv4Addr::LOCALHOST.to_string(), "-p", &port.to_string()]);
        client.args(protocol.arguments()).stdin(Stdio::null()).stdout(Stdio::piped());
        Ok(Self(client.spawn()?))
    }

    /// Waits for the end. Errors if the measurement was cut off, or nothing arrived.
    pub fn finish(self) -> Result<(), String> {
        let output = self.0.wait_with_output().map_err(|error| format!("iperf3: {error}"))?;
        let said = String::from_utf8_lossy(&output.stdout);
        match output.status.success() && received(&said) > 0 {
            true => Ok(()),
            false => Err(format!("iperf3: {}: {said}", output.status)),
        }
    }
}

/// Bytes that the guest has received, by iperf3's result.
fn received(result: &str) -> u64 {
    let result: Value = serde_json::from_str(result).unwrap_or_default();
    let sums = ["sum_received", "sum"].map(|sum| result["end"][sum]["bytes"].as_u64());
    sums.into_iter().flatten().next().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_arrived_is_read_and_a_result_without_it_is_nothing() {
        assert_eq!(received(r#"{"end": {"sum_received": {"bytes": 7}}}"#), 7);
        assert_eq!(received(r#"{"end": {"sum": {"bytes": 5}}}"#), 5);
        assert_eq!(received(r#"{"error": "unable to connect"}"#), 0);
        assert_eq!(received(""), 0);
    }
}
