//! Looks at files by their paths. The storage of a file may hang, a server that is gone for example, and whoever looks
//! at the file hangs with it, so that is a thread that nobody waits for any longer than he can.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use crate::mutex::lock;
use crate::signals;
use crate::work::Work;

/// The files whose threads have not come back.
static HANGING: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// Calls `look` with each of `paths`, all at the same time, and returns what it returned, or `None` where it has not
/// returned `within` that time. A file that hangs is not looked at again until then.
pub(crate) fn at<T: Send + 'static>(
    paths: &[PathBuf],
    within: Duration,
    look: fn(&Path) -> T,
) -> Vec<Option<T>> {
    let deadline = Instant::now() + within;
    let (sender, seen) = channel();
    let mut results: Vec<Option<T>> = paths.iter().map(|_| None).collect();
    let mut begun = vec![false; paths.len()];
    for (index, path) in paths.iter().enumerate() {
        if lock(&HANGING).contains(path) {
            continue;
        }
        let (path, sender) = (path.clone(), sender.clone());
        let name = thread::Builder::new().name("look".to_owned());
        let work = Work::begins(format!("looking at {}", path.display()));
        let thread = name.spawn(move || {
            signals::leave_to_main_thread();
            let _work = work;
            let result = look(&path);
            let mut hanging = lock(&HANGING);
            hanging.remove(&path);
            // Nobody listens any more if it is late.
            let _ = sender.send((index, result));
        });
        begun[index] = thread.is_ok();
    }
    for _ in begun.iter().filter(|begun| **begun) {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok((index, result)) = seen.recv_timeout(left) else { break };
        results[index] = Some(result);
    }
    // A thread that comes back now waits for the lock, so that none is noted that is back.
    let mut hanging = lock(&HANGING);
    seen.try_iter().for_each(|(index, result)| results[index] = Some(result));
    // Without a thread nothing would take the note back.
    let late = (0..paths.len()).filter(|index| begun[*index] && results[*index].is_none());
    hanging.extend(late.map(|index| paths[index].clone()));
    results
}

#[cfg(test)]
mod tests {
    use std::sync::Condvar;

    use super::*;

    /// Whether the storage that hangs answers again.
    static ANSWERS: (Mutex<bool>, Condvar) = (Mutex::new(false), Condvar::new());

    fn name(path: &Path) -> String {
        if path.ends_with("hangs") {
            let answers = lock(&ANSWERS.0);
            drop(ANSWERS.1.wait_while(answers, |answers| !*answers));
        }
        path.display().to_string()
    }

    #[test]
    fn a_file_that_hangs_delays_no_other_one_and_is_looked_at_once() {
        let paths = ["/a", "/hangs", "/b", "/a"].map(PathBuf::from);
        let found = |name: &str| Some(name.to_owned());
        let others = vec![found("/a"), None, found("/b"), found("/a")];
        assert_eq!(at(&paths, Duration::from_millis(200), name), others);
        // Nobody waits for it again, for however long he could.
        assert_eq!(at(&paths, Duration::from_secs(1000), name), others);
        *lock(&ANSWERS.0) = true;
        ANSWERS.1.notify_all();
        while lock(&HANGING).contains(&paths[1]) {
            thread::yield_now();
        }
        assert_eq!(at(&paths, Duration::from_secs(1000), name)[1], found("/hangs"));
    }
}
