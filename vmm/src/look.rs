//! Looks at files by their paths. The storage of a file may hang, a server that is gone for example, and whoever looks
//! at the file hangs with it, so that is a thread that nobody waits for any longer than he can.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
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

/// How long a file may take to show its beginning.
const BEGINS_WITHIN: Duration = Duration::from_secs(2);

/// Errors if the beginning of the file at `path` does not come, because its storage hangs: whoever reads it would hang. Any other
/// error is for him. What the kernel has of the file comes without its storage, so this finds most of those that hang.
pub(crate) fn check_answers(path: &Path) -> io::Result<()> {
    answers_within(path, BEGINS_WITHIN, begin)
}

fn answers_within(path: &Path, within: Duration, look: fn(&Path)) -> io::Result<()> {
    match at(&[path.to_owned()], within, look)[..] {
        [Some(())] => Ok(()),
        _ => {
            let seconds = within.as_secs();
            let why = format!("its storage has not shown what is there for {seconds} s; repair it");
            Err(io::Error::new(io::ErrorKind::TimedOut, why))
        }
    }
}

/// Reads the beginning of a file.
fn begin(path: &Path) {
    // A pipe without a writer would wait for one.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let _ = file.and_then(|mut file| file.read(&mut [0; 512]));
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
        let error = answers_within(&paths[1], Duration::from_secs(1000), |_| ()).unwrap_err();
        assert!(error.to_string().contains("1000 s"), "{error}");
        *lock(&ANSWERS.0) = true;
        ANSWERS.1.notify_all();
        while lock(&HANGING).contains(&paths[1]) {
            thread::yield_now();
        }
        assert_eq!(at(&paths, Duration::from_secs(1000), name)[1], found("/hangs"));
    }

    #[test]
    fn what_is_there_at_once_answers_also_if_it_cannot_be_read() {
        let directory = tempfile::tempdir().unwrap();
        let pipe = directory.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let missing = directory.path().join("missing");
        for path in [pipe.as_path(), directory.path(), &missing, Path::new("/bin/sh")] {
            check_answers(path).unwrap();
        }
    }
}
