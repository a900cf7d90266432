//! One request to a running host, and the lines that the host sends then.
//!
//! Not every line is the reply: on a control port the host has kept what an earlier client left unread, and says unasked
//! that it is ready. So the request has a random id, and lines that are for others are skipped.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::Value;

use super::ctl::CtlError;
use crate::api::{Call, Command, Event, Line};
use crate::random::random;

/// The connection to the host, with a request that was sent.
pub(super) struct Request {
    id: u64,
    lines: io::Lines<BufReader<UnixStream>>,
}

impl Request {
    /// Sends a command to the host of a socket.
    pub(super) fn send(socket: &Path, command: Command) -> Result<Self, CtlError> {
        let connect = |source| CtlError::Connect { socket: socket.to_owned(), source };
        let mut stream = UnixStream::connect(socket).map_err(connect)?;
        // 0 is the id of requests that have none.
        let call = Call { id: random().max(1), command };
        writeln!(stream, "{}", serde_json::to_string(&call)?)?;
        Ok(Self { id: call.id, lines: BufReader::new(stream).lines() })
    }

    /// Waits for the reply. Says on standard error when the host is about to jump.
    pub(super) fn reply(&mut self) -> Result<Value, CtlError> {
        let mut jumping = false;
        while let Some(line) = self.line()? {
            match serde_json::from_str(&line) {
                Ok(Line::Ok { id, ok }) if id == self.id => return Ok(ok),
                // A line that is too long is answered with the id 0.
                Ok(Line::Error { id, error, outcome }) if id == self.id || id == 0 => {
                    return Err(CtlError::Refused { error, outcome });
                }
                Ok(Line::Event(Event::Jumping)) => {
                    jumping = true;
                    eprintln!("jumping");
                }
                // A newer host may know lines that this program does not.
                Ok(_) | Err(_) => {}
            }
        }
        Err(CtlError::NoAnswer { jumping })
    }

    /// Waits for the next line, of whatever kind. Returns `None` at the end of the connection.
    pub(super) fn line(&mut self) -> io::Result<Option<String>> {
        self.lines.next().transpose()
    }
}
