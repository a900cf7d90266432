//! Target `control`: a client of the host's API. A script is a list of pieces that the client
//! sends.

use std::io::Write;
use std::os::unix::net::UnixStream;

use perennial_fuzz::Script;

use crate::api::{Call, Line, Lines};

/// Most pieces of a script: so many fit in a socket's buffer.
const MOST: usize = 200;

/// Sends the pieces. The host must read the same lines however the bytes are cut into pieces, and
/// each line must be a valid call or get an error as the answer.
pub fn control(input: &[u8]) {
    let (mut client, host) = UnixStream::pair().unwrap();
    host.set_nonblocking(true).unwrap();
    let mut lines = Lines::new(host.into());
    let mut script = Script::new(input);
    let (mut sent, mut received) = (Vec::new(), Vec::new());
    for _ in 0..MOST {
        let piece = script.piece();
        client.write_all(piece).unwrap();
        sent.extend_from_slice(piece);
        received.extend(lines.read().unwrap());
    }
    let (complete, _) =
        sent.split_at(sent.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1));
    let expected = complete.split(|b| *b == b'\n').filter(|line| !line.is_empty());
    let expected: Vec<String> = expected.map(|l| String::from_utf8_lossy(l).into()).collect();
    assert_eq!(received, expected);
    received.iter().for_each(|line| answer(line));
}

fn answer(line: &str) {
    match Call::parse(line) {
        Ok(call) => {
            let again = serde_json::to_string(&call).unwrap();
            assert_eq!(Call::parse(&again), Ok(call));
        }
        Err(refusal) => {
            assert!(matches!(refusal, Line::Error { .. }), "{refusal:?}");
            let again = serde_json::to_string(&refusal).unwrap();
            assert!(!again.contains('\n'));
            assert_eq!(serde_json::from_str::<Line>(&again).unwrap(), refusal);
        }
    }
}
