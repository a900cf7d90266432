//! `serial = "..."`: the sink of the serial port's output.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::log::LogOptions;
use super::pty;
use crate::devices::claims::Claim;
use crate::devices::files::{OpenError, Opened, open, wait_for_device};
use crate::devices::needs::HostNeed;
use crate::devices::terminal;
use crate::options::{Options, UNKNOWN, nearest};
use crate::socket;
use crate::state::{Node, Reader, Schema, StateError};

/// The role of the file that takes the output.
pub(in crate::devices) const SINK: &str = "sink";
/// The role of the socket on which clients of the console connect.
pub(super) const LISTENER: &str = "listener";
/// The role of the socket on which the host sends the next logs.
pub(super) const NEXT: &str = "next";
/// The role of the inotify instance that reports that a program has opened the pseudoterminal.
pub(super) const OPENED: &str = "opened";

/// What an option can begin with.
const WORDS: [&str; 7] = ["off", "null", "tty", "pty", "socket", "file", "port"];
/// What an option can be, for an error.
const CHOICE: &str = "it is one of off, tty, pty, socket=PATH, file=PATH, port=NAME";
/// Most bytes of the path of a socket: with a zero behind it, it fits `sun_path` of unix(7).
const SOCKET_PATH: usize = 107;

fn parse_socket(text: &str) -> Result<PathBuf, String> {
    let path = match text {
        "socket" => "",
        _ => Options::parse(text, &["socket"])?.get("socket").unwrap_or_default(),
    };
    match path.len() {
        0 => Err("it must name a path: socket=PATH".to_owned()),
        1..=SOCKET_PATH => Ok(path.into()),
        length => {
            Err(format!("the path of a socket has at most {SOCKET_PATH} bytes, not {length}"))
        }
    }
}

/// The sink of the serial port's output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SerialOptions {
    /// No sink: the output is dropped.
    Off,
    /// The host's terminal: its standard output, and in `perennial run` its standard input as well.
    Tty,
    /// A pseudoterminal that the host makes.
    Pty,
    /// A socket that the host makes at this path, for one client at a time.
    Socket(PathBuf),
    /// A file, appended to.
    File(LogOptions),
    /// A virtio-serial port of the host, by name.
    Port(String),
}

impl SerialOptions {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let word = text.split(['=', ',']).next().unwrap_or_default();
        let rest = &text[word.len()..];
        let alone = |options| match rest {
            "" => Ok(options),
            _ => Err(format!("nothing may follow `{word}`, as `{rest}` does")),
        };
        match word {
            "off" | "null" => alone(Self::Off),
            "tty" => alone(Self::Tty),
            "pty" => alone(Self::Pty),
            "socket" => parse_socket(text).map(Self::Socket),
            "file" => LogOptions::parse(text).map(Self::File),
            "port" => match rest.strip_prefix('=') {
                Some(name) if !name.is_empty() => Ok(Self::Port(name.to_owned())),
                _ => Err("it must name a virtio-serial port of the host: port=NAME".to_owned()),
            },
            _ => Err(match nearest(word, &WORDS) {
                Some(meant) => format!("`{word}`{UNKNOWN}: did you mean `{meant}`? {CHOICE}"),
                None => CHOICE.to_owned(),
            }),
        }
    }

    /// The roles of the files that [`open`](Self::open) returns: sink, listener, watch of a
    /// pseudoterminal, and next sinks.
    pub(super) fn roles(&self) -> [Option<&'static str>; 4] {
        match self {
            Self::Off => [None; 4],
            Self::Tty | Self::Port(_) => [Some(SINK), None, None, None],
            Self::File(_) => [Some(SINK), None, None, Some(NEXT)],
            Self::Socket(_) => [None, Some(LISTENER), None, None],
            Self::Pty => [Some(SINK), None, Some(OPENED), None],
        }
    }

    /// What no other VM's port can have. Any number of them can write to the terminal.
    pub(super) fn claims(&self) -> Vec<Claim> {
        match self {
            Self::Off | Self::Tty | Self::Pty => Vec::new(),
            Self::Socket(path) => vec![Claim::path("serial socket", path)],
            Self::File(log) => log.claims(),
            Self::Port(name) => vec![Claim::named("virtio-serial port", name)],
        }
    }

    pub(super) fn needs(&self) -> Vec<HostNeed> {
        match self {
            Self::Port(_) => {
                vec![HostNeed::Driver { module: "virtio_console", of: "virtio-serial ports" }]
            }
            _ => Vec::new(),
        }
    }

    pub(super) fn open(&self) -> Result<Vec<Opened>, OpenError> {
        let sink: OwnedFd = match self {
            Self::Off => return Ok(Vec::new()),
            Self::Pty => return pty::open(),
            Self::Socket(path) => {
                let listener = socket::listen(path).map_err(|source| OpenError {
                    what: "serial socket",
                    path: path.clone(),
                    remedy: "",
                    source,
                })?;
                let fd = listener.into();
                return Ok(vec![Opened { role: LISTENER, fd, identity: None }]);
            }
            Self::Tty => terminal::open_line()?,
            Self::File(log) => return log.open(),
            Self::Port(name) => open_port(name)?.into(),
        };
        Ok(vec![Opened { role: SINK, fd: sink, identity: None }])
    }
}

/// The virtio-serial ports of the host.
const PORTS: &str = "/sys/class/virtio-ports";

/// Opens a virtio-serial port of the host by its name, without blocking.
pub fn open_port(name: &str) -> Result<File, OpenError> {
    let find = || match find_port(name) {
        // The names of ports appear some time after the driver was loaded.
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        found => Some(found),
    };
    open_found(name, wait_for_device(find).unwrap_or(Err(io::ErrorKind::NotFound.into())))
}

/// The same for a caller that cannot wait until the port appears.
pub fn open_port_now(name: &str) -> Result<File, OpenError> {
    open_found(name, find_port(name))
}

fn find_port(name: &str) -> io::Result<PathBuf> {
    for entry in std::fs::read_dir(PORTS)? {
        let entry = entry?;
        match std::fs::read_to_string(entry.path().join("name")) {
            Ok(found) if found.trim_end() == name => {
                return Ok(Path::new("/dev").join(entry.file_name()));
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

fn open_found(name: &str, found: io::Result<PathBuf>) -> Result<File, OpenError> {
    let path = found.map_err(|source| OpenError {
        what: "virtio-serial port",
        path: name.into(),
        remedy: ": the name is looked up in /sys/class/virtio-ports",
        source,
    })?;
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    open("virtio-serial port", &path, &options)
}

/// `perennial,serial-options-v1`.
impl Schema for SerialOptions {
    const COMPATIBLE: &'static [&'static str] = &["perennial,serial-options-v1"];

    fn encode(&self, node: &mut Node) {
        let (kind, argument) = match self {
            Self::File(LogOptions { path, max_size, keep }) => {
                let path = path.to_string_lossy();
                let (max_size, keep) = (max_size.to_string(), keep.to_string());
                return node.put_strings("output", &["file", &path, &max_size, &keep]);
            }
            Self::Off => ("off", String::new()),
            Self::Tty => ("tty", String::new()),
            Self::Pty => ("pty", String::new()),
            Self::Socket(path) => ("socket", path.to_string_lossy().into_owned()),
            Self::Port(port) => ("port", port.clone()),
        };
        node.put_strings("output", &[kind, &argument]);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let words = reader.strings("output")?;
        match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["off", ""] => Ok(Self::Off),
            ["tty", ""] => Ok(Self::Tty),
            ["pty", ""] => Ok(Self::Pty),
            ["socket", path] => Ok(Self::Socket(path.into())),
            ["file", path, max_size, keep] => {
                let number = |text: &str| {
                    let problem = || format!("`{text}` is not a number");
                    text.parse::<u64>().map_err(|_| reader.invalid("output", problem()))
                };
                let keep = u32::try_from(number(keep)?).unwrap_or(u32::MAX);
                Ok(Self::File(LogOptions { path: path.into(), max_size: number(max_size)?, keep }))
            }
            ["port", port] => Ok(Self::Port(port.to_owned())),
            _ => Err(reader.invalid("output", format!("{words:?} names no output"))),
        }
    }
}

#[cfg(any(test, fuzzing))]
mod sample {
    #![expect(clippy::unwrap_used, reason = "a test or fuzz target that cannot go on has failed")]

    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::devices::kind::{Sample, SampleFiles};
    use crate::devices::serial::{Serial, SerialStateV1};

    impl Sample for Serial {
        fn options() -> SerialOptions {
            SerialOptions::Port("web".to_owned())
        }

        /// A line whose other end is the peer.
        fn files(_state: Option<&SerialStateV1>) -> Option<SampleFiles> {
            let (peer, sink) = UnixStream::pair().unwrap();
            peer.set_nonblocking(true).unwrap();
            sink.set_nonblocking(true).unwrap();
            let opened = vec![Opened { role: SINK, fd: sink.into(), identity: None }];
            Some(SampleFiles { opened, peer: Some(peer) })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::contract::contract_tests;

    contract_tests! {
        SerialOptions,
        sample: || SerialOptions::Port("web".to_owned()),
        changes: [
            |s| *s = SerialOptions::Off,
            |s| *s = SerialOptions::Tty,
            |s| *s = SerialOptions::Pty,
            |s| *s = SerialOptions::Socket("web".into()),
            |s| *s = SerialOptions::File(LogOptions::parse("file=web").unwrap()),
            |s| *s = SerialOptions::File(LogOptions::parse("file=web,keep=1").unwrap()),
            |s| *s = SerialOptions::File(LogOptions::parse("file=web,max_size=1M").unwrap()),
            |s| *s = SerialOptions::Port("other".to_owned()),
        ],
        golden: "serial-options-v1",
    }

    #[test]
    fn an_output_is_one_of_six_things() {
        assert_eq!(SerialOptions::parse("off"), Ok(SerialOptions::Off));
        assert_eq!(SerialOptions::parse("tty"), Ok(SerialOptions::Tty));
        assert_eq!(SerialOptions::parse("null"), Ok(SerialOptions::Off));
        assert_eq!(SerialOptions::parse("pty"), Ok(SerialOptions::Pty));
        assert_eq!(SerialOptions::parse("socket=/s"), Ok(SerialOptions::Socket("/s".into())));
        let log = LogOptions { path: "/a=b".into(), max_size: 1 << 20, keep: 2 };
        let text = "file=/a=b,max_size=1M,keep=2";
        assert_eq!(SerialOptions::parse(text), Ok(SerialOptions::File(log)));
        assert_eq!(SerialOptions::parse("port=web"), Ok(SerialOptions::Port("web".to_owned())));
    }

    #[test]
    fn every_mistake_has_an_error_that_says_what_was_meant() {
        let long = format!("socket=/{}", "a".repeat(SOCKET_PATH));
        for (wrong, why) in [
            ("", CHOICE),
            ("on", CHOICE),
            ("stdio", CHOICE),
            ("=/a", CHOICE),
            ("Off", "`Off` is not known here: did you mean `off`? it is one of off, tty"),
            ("tti", "did you mean `tty`?"),
            ("sock=/a", "did you mean `socket`?"),
            ("flie=/a", "did you mean `file`?"),
            ("pty=1", "nothing may follow `pty`, as `=1` does"),
            ("off,keep=1", "nothing may follow `off`, as `,keep=1` does"),
            ("socket", "it must name a path: socket=PATH"),
            ("socket=", "it must name a path: socket=PATH"),
            ("socket=/a,keep=1", "`keep` is not known here; there is socket"),
            ("socket=/a,b", "`b` is not of the form key=value"),
            (&long, "the path of a socket has at most 107 bytes, not 108"),
            ("port", "it must name a virtio-serial port of the host: port=NAME"),
            ("port=", "it must name a virtio-serial port of the host: port=NAME"),
            ("file", "it must name a path: file=PATH"),
            ("file=", "it must name a path: file=PATH"),
            ("file=,keep=1", "it must name a path: file=PATH"),
            ("file,keep=1", "it must name a path: file=PATH"),
            ("file=/a,", "`` is not of the form key=value"),
            ("file=/a,size=1M", "`size` is not known here; there is file, max_size, keep"),
            ("file=/a,max-size=1M", "did you mean `max_size`?"),
            ("file=/a,keep=1,keep=2", "`keep` is given twice"),
            (
                "file=/a,max_size=1K",
                "max_size is at least 64 K, or 0 for a log without bound; not 1024",
            ),
            ("file=/a,max_size=", "max_size: `` is not a size such as 512M"),
            ("file=/a,max_size=64KB", "max_size: `64KB` is not a size such as 512M"),
            ("file=/a,max_size=-1", "max_size: `-1` is not a size such as 512M"),
            ("file=/a,keep=101", "keep is a number of old logs, 0 to 100, not `101`"),
            ("file=/a,keep=", "keep is a number of old logs, 0 to 100, not ``"),
        ] {
            let error = SerialOptions::parse(wrong).unwrap_err();
            assert!(error.contains(why), "{wrong}: {error}");
        }
    }
}
