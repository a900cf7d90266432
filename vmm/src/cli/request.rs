//! One request to a running host, and the lines that the host sends then.
//!
//! Not every line is the reply: on a control port the host has kept what an earlier client left unread, and says unasked
//! that it is ready. So the request has a random id, and lines that are for others are skipped.
//!
//! A host that hangs answers nothing, and accepts no client. An operator is told that he waits for it.

use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde_json::Value;

use super::ctl::CtlError;
use crate::api::{Call, Command, Event, Line};
use crate::random::random;

/// How long nothing is said while the host does not answer.
const QUIET: Duration = Duration::from_secs(5);
/// How long a host may take to say its status. It does so at once, or after a second if a VM hangs; for other commands,
/// such as `stop`, nobody can say.
const STATUS_WITHIN: Duration = Duration::from_secs(30);

/// The connection to the host, with a request that was sent.
pub(super) struct Request {
    id: u64,
    reader: BufReader<UnixStream>,
    /// The beginning of the next line.
    begun: Vec<u8>,
    wait: Wait,
}

impl Request {
    /// Sends a command to the host of a socket.
    pub(super) fn send(socket: &Path, command: Command) -> Result<Self, CtlError> {
        let limit = matches!(command, Command::Status).then_some(STATUS_WITHIN);
        Self::send_within(socket, command, QUIET, limit)
    }

    /// The same to a host that may take long to answer, whatever it is asked.
    pub(super) fn send_patiently(socket: &Path, command: Command) -> Result<Self, CtlError> {
        Self::send_within(socket, command, QUIET, None)
    }

    fn send_within(
        socket: &Path,
        command: Command,
        quiet: Duration,
        limit: Option<Duration>,
    ) -> Result<Self, CtlError> {
        let (socket, begun) = (socket.to_owned(), Instant::now());
        let mut wait = Wait { socket, begun, quiet, limit, is_told: false };
        let mut stream = wait.connect()?;
        // 0 is the id of requests that have none.
        let call = Call { id: random().max(1), command };
        writeln!(stream, "{}", serde_json::to_string(&call)?)?;
        Ok(Self { id: call.id, reader: BufReader::new(stream), begun: Vec::new(), wait })
    }

    /// Waits for the reply. Says on standard error when the host is about to jump, and when it has been quiet for long.
    pub(super) fn reply(&mut self) -> Result<Value, CtlError> {
        let mut jumping = false;
        loop {
            let line = match self.read_line() {
                Ok(Some(line)) => line,
                Ok(None) => return Err(CtlError::NoAnswer { jumping }),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.wait.go_on()?;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
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
    }

    /// Waits for the next line, of whatever kind, for as long as that takes. Returns `None` at the end of the connection.
    pub(super) fn line(&mut self) -> io::Result<Option<String>> {
        loop {
            match self.read_line() {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                other => return other,
            }
        }
    }

    /// Reads the next line. Errors with [`ErrorKind::WouldBlock`] if nothing has come for [`Wait::quiet`].
    fn read_line(&mut self) -> io::Result<Option<String>> {
        // On an error, what was read before stays in `begun`.
        self.reader.read_until(b'\n', &mut self.begun)?;
        if self.begun.is_empty() {
            return Ok(None);
        }
        let line = std::mem::take(&mut self.begun);
        Ok(Some(String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned()))
    }
}

/// The wait for a host.
struct Wait {
    socket: PathBuf,
    begun: Instant,
    quiet: Duration,
    limit: Option<Duration>,
    /// Whether the operator was told that he waits.
    is_told: bool,
}

impl Wait {
    /// Connects. A host that hangs has no place for another client at some time.
    fn connect(&mut self) -> Result<UnixStream, CtlError> {
        let error = |socket: &Path, errno: Errno| {
            let (socket, source) = (socket.to_owned(), errno.into());
            CtlError::Connect { socket, source }
        };
        let address = SocketAddrUnix::new(&self.socket).map_err(|e| error(&self.socket, e))?;
        loop {
            let connected = (|| {
                let (family, kind) = (AddressFamily::UNIX, SocketType::STREAM);
                let fd = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
                set_socket_timeout(&fd, Timeout::Send, Some(self.quiet))?;
                set_socket_timeout(&fd, Timeout::Recv, Some(self.quiet))?;
                connect(&fd, &address)?;
                set_socket_timeout(&fd, Timeout::Send, None).map(|()| fd)
            })();
            match connected {
                Ok(fd) => return Ok(fd.into()),
                Err(Errno::AGAIN) => self.go_on()?,
                Err(errno) => return Err(error(&self.socket, errno)),
            }
        }
    }

    /// Notes that the host has been quiet. Errors if it is to be waited for no longer.
    fn go_on(&mut self) -> Result<(), CtlError> {
        let (socket, waited) = (&self.socket, self.begun.elapsed());
        if self.limit.is_some_and(|limit| waited >= limit) {
            return Err(CtlError::Silent { socket: socket.clone(), seconds: waited.as_secs() });
        }
        if !std::mem::replace(&mut self.is_told, true) {
            eprintln!("the host at {} has not answered yet: still waiting", socket.display());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    const SOON: Duration = Duration::from_millis(10);

    fn listener() -> (tempfile::TempDir, PathBuf, UnixListener) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        (directory, path, listener)
    }

    #[test]
    fn a_host_that_does_not_answer_is_given_up_if_there_is_a_limit() {
        let (_directory, path, listener) = listener();
        let mut request = Request::send_within(&path, Command::Status, SOON, Some(SOON)).unwrap();
        let error = request.reply().unwrap_err();
        assert!(matches!(error, CtlError::Silent { .. }), "{error}");
        assert!(error.to_string().contains("has not answered for"), "{error}");

        // The reply comes after all, in two pieces.
        let (mut host, _) = listener.accept().unwrap();
        let reply = format!("{{\"id\":{},\"ok\":{{\"here\":true}}}}\n", request.id);
        let (first, last) = reply.split_at(9);
        host.write_all(first.as_bytes()).unwrap();
        request.reply().unwrap_err();
        assert_eq!(request.begun, first.as_bytes());
        host.write_all(last.as_bytes()).unwrap();
        request.wait.limit = None;
        assert_eq!(request.reply().unwrap()["here"], true);
    }

    #[test]
    fn a_host_that_accepts_nobody_is_given_up_as_well() {
        let (_directory, path, listener) = listener();
        rustix::net::listen(&listener, 0).unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        let sent = Request::send_within(&path, Command::Status, SOON, Some(SOON));
        assert!(matches!(sent, Err(CtlError::Silent { .. })));
    }

    #[test]
    fn a_host_is_waited_for_without_a_limit_and_the_operator_is_told_once() {
        let (_directory, path, listener) = listener();
        let mut request = Request::send_within(&path, Command::Report, SOON, None).unwrap();
        let (mut host, _) = listener.accept().unwrap();
        assert!(!request.wait.is_told);
        request.wait.go_on().unwrap();
        assert!(request.wait.is_told);
        let reply = format!("{{\"id\":{},\"ok\":{{}}}}\n", request.id);
        host.write_all(reply.as_bytes()).unwrap();
        request.reply().unwrap();
    }
}
