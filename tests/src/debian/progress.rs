//! How far the work of a Debian guest is, by its notes.

use std::collections::BTreeMap;

use crate::guest::Note;

/// Each kind of work and the number that its last note of one kind has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress(BTreeMap<String, u64>);

impl Progress {
    /// What is acknowledged. Errors if a kind of work failed.
    pub fn acknowledged(notes: &[Note]) -> Result<Self, String> {
        Self::by(notes, "progress")
    }

    /// What work found of an earlier boot. Errors if a kind of work failed.
    pub fn found(notes: &[Note]) -> Result<Self, String> {
        Self::by(notes, "found")
    }

    fn by(notes: &[Note], kind: &str) -> Result<Self, String> {
        if let Some(failed) = notes.iter().find(|note| note["note"] == "failed") {
            return Err(format!("the work failed: {failed}"));
        }
        let number =
            |note: &Note| Some((note["work"].as_str()?.to_owned(), note["number"].as_u64()?));
        Ok(Self(notes.iter().filter(|note| note["note"] == kind).filter_map(number).collect()))
    }

    /// The number of a kind of work. `None` if it has not said one.
    pub fn of(&self, work: &str) -> Option<u64> {
        self.0.get(work).copied()
    }

    /// Whether each of these kinds of work is at least this much further than before.
    pub fn is_beyond(&self, before: &Self, works: &[&str], by: u64) -> bool {
        works
            .iter()
            .all(|work| self.of(work).is_some_and(|now| now >= before.of(work).unwrap_or(0) + by))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn progress(work: &str, number: u64) -> Note {
        json!({"note": "progress", "work": work, "number": number})
    }

    #[test]
    fn the_last_number_of_each_kind_of_work_counts() {
        let notes = [progress("fio", 1), progress("redis", 7), progress("fio", 2)];
        let now = Progress::acknowledged(&notes).unwrap();
        assert_eq!((now.of("fio"), now.of("redis"), now.of("stress")), (Some(2), Some(7), None));
        assert_eq!(Progress::found(&notes), Ok(Progress::default()));
    }

    #[test]
    fn only_all_kinds_of_work_together_are_beyond() {
        let before = Progress::acknowledged(&[progress("fio", 1), progress("redis", 7)]).unwrap();
        let after = Progress::acknowledged(&[progress("fio", 3), progress("redis", 8)]).unwrap();
        assert!(after.is_beyond(&before, &["fio", "redis"], 1));
        assert!(after.is_beyond(&before, &["fio"], 2));
        assert!(!after.is_beyond(&before, &["fio", "redis"], 2));
        assert!(!after.is_beyond(&before, &["fio", "stress"], 1));
    }

    #[test]
    fn work_that_failed_is_an_error_whatever_was_said_before_and_after() {
        let failed = json!({"note": "failed", "work": "redis", "why": "7 is not 8"});
        for notes in [[failed.clone(), progress("fio", 1)], [progress("fio", 1), failed]] {
            assert!(Progress::acknowledged(&notes).unwrap_err().contains("7 is not 8"));
            assert!(Progress::found(&notes).is_err());
        }
    }
}
