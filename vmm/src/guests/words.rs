//! The texts that the process of a VM sends. A guest may have taken the process over, so they are bounded before the
//! host keeps, logs or shows any of them: the status of a host with many VMs must fit into one reply.

use crate::link::{Event, FromVm, Reply};

/// Most bytes of all texts of one message together. A chain of causes has a few hundred.
const MOST_BYTES: usize = 4096;
/// Most texts of one message.
const MOST_TEXTS: usize = 128;
/// Stands behind a text that was cut off.
const CUT_OFF: &str = " (cut off)";

/// Returns the message with bounded texts, each on one line.
pub(super) fn bounded(message: FromVm) -> FromVm {
    match message {
        FromVm::Reply(reply) => FromVm::Reply(bounded_reply(reply)),
        FromVm::Event(event) => FromVm::Event(bounded_event(event)),
    }
}

fn bounded_reply(reply: Reply) -> Reply {
    match reply {
        Reply::Confined { missing } => Reply::Confined { missing: bounded_texts(missing) },
        Reply::Restored { missing_hints } => {
            Reply::Restored { missing_hints: bounded_texts(missing_hints) }
        }
        Reply::Failed(chain) => Reply::Failed(bounded_texts(chain)),
        Reply::Storage(mut reports) => {
            reports.iter_mut().for_each(|(node, _)| *node = bounded_text(node));
            Reply::Storage(reports)
        }
        Reply::Built
        | Reply::Resumed { first_entry_ticks: _ }
        | Reply::Paused { last_exit_ticks: _ }
        | Reply::Saved { bytes: _ }
        | Reply::Synced
        | Reply::Pressed
        | Reply::LinkSet
        | Reply::Resizing => reply,
    }
}

fn bounded_event(event: Event) -> Event {
    match event {
        Event::Shutdown | Event::Reset => event,
        Event::Crashed(why) => Event::Crashed(bounded_text(&why)),
        Event::Link { device, link } => Event::Link { device: bounded_text(&device), link },
        Event::Resized { device, resized } => Event::Resized {
            device: bounded_text(&device),
            resized: resized.map_err(bounded_texts),
        },
        Event::Booted { entry, warnings } => {
            let mut texts = bounded_texts([entry].into_iter().chain(warnings).collect());
            Event::Booted { entry: texts.remove(0), warnings: texts }
        }
    }
}

fn bounded_texts(mut texts: Vec<String>) -> Vec<String> {
    texts.truncate(MOST_TEXTS);
    let mut left = MOST_BYTES;
    for text in &mut texts {
        *text = shortened(text, left);
        left = left.saturating_sub(text.len());
    }
    texts
}

/// Returns the text on one line, and cut off if it is long.
pub(super) fn bounded_text(text: &str) -> String {
    shortened(text, MOST_BYTES)
}

/// The same with at most `most` bytes. A line break or another control character in it becomes a space: it could make
/// up a line of the log, and takes six bytes in JSON.
fn shortened(text: &str, most: usize) -> String {
    let is_whole = text.len() <= most;
    let most = if is_whole { most } else { most.saturating_sub(CUT_OFF.len()) };
    let end = (0..=most.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    let kept = text[..end.unwrap_or(0)].chars();
    let mut line: String = kept.map(|c| if c.is_control() { ' ' } else { c }).collect();
    if !is_whole && most > 0 {
        line.push_str(CUT_OFF);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::network::Link;

    #[test]
    fn texts_of_any_length_are_cut_off_and_short_ones_are_whole() {
        let chain = ["cannot save", "the disk is gone"].map(str::to_owned).to_vec();
        assert_eq!(bounded_texts(chain.clone()), chain);
        for huge in [vec!["ä".repeat(60_000)], vec!["x".repeat(5000); 20], vec!["y".into(); 9000]]
        {
            let kept = bounded_texts(huge.clone());
            let bytes: usize = kept.iter().map(String::len).sum();
            assert!(bytes <= MOST_BYTES && kept.len() <= MOST_TEXTS, "{bytes} {}", kept.len());
            assert_eq!(kept[0].chars().next(), huge[0].chars().next());
        }
        assert!(bounded_text(&"ä".repeat(60_000)).ends_with("ä (cut off)"));
        assert_eq!(bounded_text("a\n2026 ERROR b\u{1b}[2J"), "a 2026 ERROR b [2J");
    }

    #[test]
    fn every_message_with_a_text_is_bounded() {
        let huge = || "z".repeat(100_000);
        let node = huge();
        let messages = [
            FromVm::Reply(Reply::Confined { missing: vec![huge()] }),
            FromVm::Reply(Reply::Restored { missing_hints: vec![huge()] }),
            FromVm::Reply(Reply::Failed(vec![huge()])),
            FromVm::Event(Event::Crashed(huge())),
            FromVm::Event(Event::Link { device: node.clone(), link: Link::Up }),
            FromVm::Event(Event::Resized { device: "d@1".into(), resized: Err(vec![huge()]) }),
            FromVm::Event(Event::Resized { device: node, resized: Ok(1) }),
            FromVm::Event(Event::Booted { entry: huge(), warnings: vec![huge()] }),
            FromVm::Event(Event::Booted { entry: "a".into(), warnings: vec![huge()] }),
        ];
        for message in messages {
            let kept = serde_json::to_string(&bounded(message)).unwrap();
            assert!(kept.len() < MOST_BYTES + 200 && kept.contains("cut off"), "{}", kept.len());
        }
    }
}
