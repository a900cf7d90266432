//! A client of the host's API on the control port: one JSON object a line, in both directions.
//!
//! The port is the same before and after a live update, so this is one stream over all kernels of
//! a test. A reply is matched by its id; every other message is an event. A line that is not a JSON
//! object is an error of the host, which every method but [`Control::ask`] reports.

use std::io::{self, BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Most characters of a message that an error repeats.
const MOST_REPEATED: usize = 200;

/// Why a request or an event failed.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The host refused or failed.
    #[error("the host says: {}{}", errors.join(": "), outcome.as_ref().map(|o| format!(" (outcome: {o})")).unwrap_or_default())]
    Refused {
        /// The chain of errors, outermost first.
        errors: Vec<String>,
        /// What became of the guests, for a live update.
        outcome: Option<String>,
    },
    /// The host did not send the expected message in time.
    #[error("the host sent no {waited_for} within {timeout:?}; the last that it sent was {last}")]
    Timeout {
        /// What was waited for.
        waited_for: String,
        /// How long.
        timeout: Duration,
        /// The last message. If it is `jumping`, the host has started the jump.
        last: String,
    },
    /// The machine has ended.
    #[error("the control port was closed while waiting for {0}")]
    Closed(String),
    /// A line that breaks the protocol.
    #[error("the control port carried {line:?}: {problem}")]
    Protocol {
        /// The line.
        line: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The request could not be sent.
    #[error("cannot write to the control port")]
    Send(#[source] io::Error),
}

impl ControlError {
    /// What became of the guests, as the host reported it.
    pub fn outcome(&self) -> Option<&str> {
        match self {
            Self::Refused { outcome, .. } => outcome.as_deref(),
            _ => None,
        }
    }
}

/// Errors unless the request was refused with this outcome and with `named` in its error.
pub fn expect_refusal(
    reply: &Result<Value, ControlError>,
    outcome: &str,
    named: &str,
) -> Result<(), String> {
    match reply {
        Err(ControlError::Refused { errors, outcome: Some(said) })
            if said == outcome && errors.join(": ").contains(named) =>
        {
            Ok(())
        }
        other => Err(format!(
            "expected a refusal with outcome `{outcome}` and `{named}` in its error, got {other:?}"
        )),
    }
}

/// The harness's end of the control port.
#[derive(Debug)]
pub struct Control {
    port: UnixStream,
    lines: Receiver<String>,
    events: Vec<Value>,
    last: String,
    next_id: u64,
}

impl Control {
    /// Listens to `port` from now on.
    pub fn new(port: UnixStream) -> io::Result<Self> {
        let reader = BufReader::new(port.try_clone()?);
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in reader.split(b'\n').map_while(Result::ok) {
                if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                    return;
                }
            }
        });
        Ok(Self { port, lines, events: Vec::new(), last: "nothing".to_owned(), next_id: 1 })
    }

    /// Closes the connection, so that the port has no client any more.
    pub fn leave(&self) {
        // Errors if the other end has closed it already.
        let _ = self.port.shutdown(Shutdown::Both);
    }

    /// Sends `request` (an object with `do`) and waits for its result.
    pub fn request(&mut self, request: Value, timeout: Duration) -> Result<Value, ControlError> {
        let (id, name) = self.send(request)?;
        self.reply(id, &name, timeout)
    }

    /// As [`Control::request`], for a host in an unknown state after a failed test: ignores every
    /// message that is not the reply.
    pub fn ask(&mut self, request: Value, timeout: Duration) -> Result<Value, ControlError> {
        let (id, name) = self.send(request)?;
        let deadline = Instant::now() + timeout;
        loop {
            match self.receive(&format!("reply to `{name}`"), deadline, timeout) {
                Ok(mut message) if message["id"] == json!(id) => return outcome_of(&mut message),
                Ok(_) | Err(ControlError::Protocol { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends `request` without waiting. Returns its id and name.
    pub fn send(&mut self, mut request: Value) -> Result<(u64, String), ControlError> {
        let id = self.next_id;
        self.next_id += 1;
        request["id"] = json!(id);
        let name = request["do"].as_str().unwrap_or_default().to_owned();
        self.port.write_all(format!("{request}\n").as_bytes()).map_err(ControlError::Send)?;
        Ok((id, name))
    }

    /// Waits for the reply to a request that was sent.
    pub fn reply(&mut self, id: u64, name: &str, timeout: Duration) -> Result<Value, ControlError> {
        let deadline = Instant::now() + timeout;
        loop {
            let mut message = self.receive(&format!("reply to `{name}`"), deadline, timeout)?;
            if message["id"] == json!(id) {
                return outcome_of(&mut message);
            }
            if message["event"].is_null() {
                return Err(ControlError::Protocol {
                    line: message.to_string(),
                    problem: format!("neither an event nor the reply to request {id}"),
                });
            }
            self.events.push(message);
        }
    }

    /// Waits for the next event called `name`; those before it are dropped.
    pub fn event(&mut self, name: &str, timeout: Duration) -> Result<Value, ControlError> {
        let deadline = Instant::now() + timeout;
        loop {
            let message = if self.events.is_empty() {
                self.receive(&format!("event `{name}`"), deadline, timeout)?
            } else {
                self.events.remove(0)
            };
            if message["event"] == name {
                return Ok(message);
            }
            if message.get("id").is_some() {
                // A reply to a request that was sent without waiting. If it is an update's error, it
                // explains why the event does not come.
                let mut message = message;
                outcome_of(&mut message)?;
            }
        }
    }

    fn receive(
        &mut self,
        waited_for: &str,
        deadline: Instant,
        timeout: Duration,
    ) -> Result<Value, ControlError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left).map_err(|error| match error {
                RecvTimeoutError::Disconnected => ControlError::Closed(waited_for.to_owned()),
                RecvTimeoutError::Timeout => ControlError::Timeout {
                    waited_for: waited_for.to_owned(),
                    timeout,
                    last: self.last.clone(),
                },
            })?;
            if line.trim().is_empty() {
                continue;
            }
            self.last = line.chars().take(MOST_REPEATED).collect();
            let problem = match serde_json::from_str::<Value>(&line) {
                Ok(message) if message.is_object() => return Ok(message),
                Ok(_) => "not an object".to_owned(),
                Err(error) => error.to_string(),
            };
            return Err(ControlError::Protocol { line, problem });
        }
    }
}

/// Returns `ok` of a reply, or its `error` as an error.
fn outcome_of(reply: &mut Value) -> Result<Value, ControlError> {
    if let Some(ok) = reply.get_mut("ok") {
        return Ok(ok.take());
    }
    let Some(errors) = reply.get("error").and_then(Value::as_array) else {
        let problem = "a reply has `ok` or a list called `error`".to_owned();
        return Err(ControlError::Protocol { line: reply.to_string(), problem });
    };
    Err(ControlError::Refused {
        errors: errors.iter().map(|e| e.as_str().unwrap_or_default().to_owned()).collect(),
        outcome: reply["outcome"].as_str().map(str::to_owned),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    /// A host that answers each request with the lines that `answer` gives for it.
    fn host(answer: impl Fn(Value) -> String + Send + 'static) -> Control {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let reader = BufReader::new(theirs.try_clone().unwrap());
        thread::spawn(move || {
            for line in reader.lines().map_while(Result::ok) {
                let answer = answer(serde_json::from_str(&line).unwrap());
                (&theirs).write_all(answer.as_bytes()).unwrap();
            }
        });
        Control::new(ours).unwrap()
    }

    #[test]
    fn a_refusal_has_to_say_what_is_wrong_and_what_became_of_the_guests() {
        let refused = |outcome: Option<&str>| {
            let errors = vec!["no update".to_owned(), "no /pool".to_owned()];
            Err(ControlError::Refused { errors, outcome: outcome.map(str::to_owned) })
        };
        assert_eq!(expect_refusal(&refused(Some("running")), "running", "/pool"), Ok(()));
        expect_refusal(&refused(Some("running")), "running", "kho=off").unwrap_err();
        expect_refusal(&refused(Some("lost")), "running", "/pool").unwrap_err();
        expect_refusal(&refused(None), "running", "/pool").unwrap_err();
        expect_refusal(&Ok(json!({})), "running", "").unwrap_err();
    }

    fn status(control: &mut Control) -> Result<Value, ControlError> {
        control.request(json!({"do": "status"}), SOON)
    }

    #[test]
    fn a_reply_is_found_behind_events_which_are_kept() {
        let mut control = host(|request| {
            format!(
                "{{\"event\":\"ready\",\"status\":{{}}}}\n{}\n",
                json!({"id": request["id"], "ok": request["do"]})
            )
        });
        assert_eq!(status(&mut control).unwrap(), "status");
        assert_eq!(control.event("ready", SOON).unwrap()["event"], "ready");
    }

    #[test]
    fn a_refusal_carries_the_chain_and_the_outcome() {
        let mut control = host(|request| {
            let error = json!({"id": request["id"], "error": ["cannot load", "no such file"],
                "outcome": "running"});
            format!("{error}\n")
        });
        let error = status(&mut control).unwrap_err();
        assert_eq!(error.outcome(), Some("running"));
        let text = error.to_string();
        assert_eq!(text, "the host says: cannot load: no such file (outcome: running)");
    }

    #[test]
    fn what_is_no_json_object_no_reply_or_somebody_elses_is_an_error_of_the_protocol() {
        for answer in [
            "Kernel panic\n",
            "[1]\n",
            "{\"id\":1}\n",
            "{\"id\":1,\"error\":\"text\"}\n",
            "{\"id\":99,\"ok\":1}\n",
            "{}\n",
        ] {
            let mut control = host(move |_| answer.to_owned());
            let error = status(&mut control).unwrap_err();
            assert!(matches!(error, ControlError::Protocol { .. }), "{answer}: {error}");
        }
    }

    #[test]
    fn what_is_not_the_reply_is_passed_over_when_a_host_in_trouble_is_asked() {
        let mut control = host(|request| {
            let reply = json!({"id": request["id"], "ok": "here"});
            let other = json!({"id": 99, "error": ["no"]});
            format!("Kernel panic\n{other}\n{{\"event\":\"ready\"}}\n{reply}\n")
        });
        assert_eq!(control.ask(json!({"do": "status"}), SOON).unwrap(), "here");
        let mut silent = host(|_| String::new());
        let error = silent.ask(json!({"do": "status"}), Duration::ZERO).unwrap_err();
        assert!(matches!(error, ControlError::Timeout { .. }), "{error}");
    }

    #[test]
    fn an_update_that_failed_explains_why_the_new_host_is_never_ready() {
        let mut control = host(|request| {
            let error = json!({"id": request["id"], "error": ["no"], "outcome": "running"});
            format!("{error}\n")
        });
        control.send(json!({"do": "update"})).unwrap();
        let error = control.event("ready", SOON).unwrap_err();
        assert_eq!(error.outcome(), Some("running"));
    }

    #[test]
    fn a_machine_that_is_gone_and_one_that_is_silent_are_told_apart() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut control = Control::new(ours).unwrap();
        let error = control.event("ready", Duration::ZERO).unwrap_err();
        assert!(matches!(error, ControlError::Timeout { .. }), "{error}");
        drop(theirs);
        let error = control.event("ready", SOON).unwrap_err();
        assert!(matches!(error, ControlError::Closed(_)), "{error}");
    }
}
