//! Requests of several threads at once.

use std::fs::File;
use std::thread;

use luo::Errno;
use rustix::fs::{MemfdFlags, memfd_create};

use super::calls::{self, create, device, finish, preserve, reboot, retrieve, retrieve_session};
use super::{Case, Failure, Inside, inside, kernel_number, refused, same};

const THREADS: usize = 8;

fn memfd() -> Result<File, Errno> {
    memfd_create("case", MemfdFlags::CLOEXEC).map(File::from)
}

/// Runs `run` in several threads at once, and returns the answers of all.
fn all<T: Send>(run: impl Fn(usize) -> Result<T, Errno> + Sync) -> Vec<Result<T, Errno>> {
    thread::scope(|scope| {
        let run = &run;
        let threads: Vec<_> = (0..THREADS).map(|number| scope.spawn(move || run(number))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no thread panics")).collect()
    })
}

/// Errors unless one answer is a success and all others are `errno`.
fn one_succeeds<T>(answers: &[Result<T, Errno>], errno: Errno) -> Result<(), Failure> {
    let succeeded = answers.iter().filter(|answer| answer.is_ok()).count();
    let refused = answers.iter().filter(|answer| answer.as_ref().err() == Some(&errno)).count();
    same((succeeded, refused), (1, THREADS - 1))
}

/// Preserves a session with files under the tokens from 0 on, and switches.
fn leave() -> Case {
    let session = create(device()?, "web")?;
    (0..THREADS).try_for_each(|token| preserve(&session, memfd()?, token as u64))?;
    reboot(calls::MAGIC, calls::KEXEC)?;
    Err("reboot came back".into())
}

/// Cases 174, 175 and 179 of the conformance table, with threads.
fn find() -> Case {
    let device = device()?;
    let answers = all(|_| retrieve_session(&device, "web"));
    one_succeeds(&answers, Errno::INVAL)?;
    let session = answers.into_iter().find_map(Result::ok).ok_or("one succeeded")?;
    let files = all(|_| retrieve(&session, 0)).into_iter().collect::<Result<Vec<_>, _>>()?;
    // All fds share one file position, so each read returns the next byte.
    rustix::io::pwrite(&files[0], b"01234567", 0)?;
    for (number, file) in files.iter().enumerate() {
        let mut byte = [0];
        rustix::io::read(file, &mut byte)?;
        same(usize::from(byte[0] - b'0'), number)?;
    }
    // Each file is retrieved before the session is finished, or fails with ENOENT after that.
    let answers = all(|number| match number {
        0 => finish(&session),
        token => match retrieve(&session, token as u64) {
            Ok(_) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno),
        },
    });
    same(answers.iter().all(Result::is_ok), true)?;
    refused(retrieve(&session, 1), Errno::NOENT)
}

pub(super) const CROSSING: &[Inside] =
    &[inside("threads share one incoming session", || match kernel_number() {
        0 => leave(),
        _ => find(),
    })];
