//! Concurrent calls: cases 58, 82, 121 and 173 to 179.

use luo::Errno;
use luo::uapi::{
    CREATE_SESSION, RETRIEVE_SESSION, SESSION_FINISH, SESSION_PRESERVE_FD, SESSION_RETRIEVE_FD,
};

use super::Class::{G, U};
use super::{Row, row};
use crate::conformance::file::{FileCall, What};
use crate::conformance::profile::Need;
use crate::conformance::system::{Answer, Call, Fd, Load};
use crate::conformance::world::{
    Outcome, World, named, refused, request, same, second, tokened, words,
};

const THREADS: usize = 8;

/// Most attempts at a background request: the check whether its file is preserved can make it fail.
const BEGINNINGS: usize = 20;

type Answers = Vec<Result<Answer, Errno>>;

/// [`THREADS`] calls, each made from its index.
fn many(call: impl Fn(usize) -> Call) -> Vec<Call> {
    (0..THREADS).map(call).collect()
}

/// Errors unless one call succeeded and all others failed with `errno`.
#[track_caller]
fn one_succeeds(answers: &Answers, errno: Errno) -> Outcome {
    let succeeded = answers.iter().filter(|answer| answer.is_ok()).count();
    let refused = answers.iter().filter(|answer| answer.as_ref().err() == Some(&errno)).count();
    same((succeeded, refused), (1, THREADS - 1))
}

/// Starts in the background to preserve a file that takes long, and returns its session and the file
/// when the preservation has begun.
fn preserve_for_long(w: &mut World) -> Result<(Fd, Fd), Errno> {
    let session = w.session("web")?;
    let file = w.file(What::Memfd)?;
    // Linux fills every hole of the file, which takes about a second under emulation.
    let bytes: u64 = if w.has(Need::Kernel) { 192 << 20 } else { 1 << 20 };
    w.on(file, FileCall::Truncate(bytes))?;
    let preserve = request(session, SESSION_PRESERVE_FD, tokened(16, file.number, 1));
    for _ in 0..BEGINNINGS {
        w.call(Call::Begin(Box::new(preserve.clone())))?;
        // `is_preserved` preserves the file for a moment. A background request that begins in that
        // moment is refused, and is then repeated.
        while w.call(Call::Running)?.number > 0 {
            if w.is_preserved(file)? {
                return Ok((session, file));
            }
        }
        // The request may have finished before the first check.
        if w.is_preserved(file)? {
            return Ok((session, file));
        }
    }
    Err(Errno::BUSY)
}

pub(super) const ROWS: &[Row] = &[
    row(58, U, "GET_NAME does not wait for PRESERVE_FD", |w| {
        let (session, _) = preserve_for_long(w)?;
        same(w.name(session)?, b"web".to_vec())?;
        if w.has(Need::Kernel) {
            same(w.call(Call::Running)?.number, 1)?;
        }
        Ok(())
    })
    .needing(&[Need::Background]),
    row(82, U, "threads preserve in one session", |w| {
        let session = w.session("web")?;
        let copy = w.dup(session)?;
        let files = (0..THREADS).map(|_| w.memfd("data")).collect::<Result<Vec<_>, _>>()?;
        let answers = w.together(many(|at| {
            let session = if at % 2 == 0 { session } else { copy };
            request(session, SESSION_PRESERVE_FD, tokened(16, files[at].number, at as u64))
        }))?;
        same(answers.iter().all(Result::is_ok), true)?;
        for file in files {
            same(w.is_preserved(file)?, true)?;
        }
        Ok(())
    })
    .needing(&[Need::Threads]),
    row(121, G, "the switch waits for PRESERVE_FD", |w| {
        if w.has(Need::Kernel) {
            // Loads the kernel first, so that the switch follows the request at once.
            w.call(Call::Load(Load::Next))?;
        }
        let (_, file) = preserve_for_long(w)?;
        let size = w.on(file, FileCall::Size)?;
        w.on(file, FileCall::Store(size as u64 - 1, b'!'))?;
        if w.has(Need::Kernel) {
            same(w.call(Call::Running)?.number, 1)?;
        }
        w.switch()?;
        let session = w.incoming("web")?;
        let file = w.retrieve(session, 1)?;
        same(w.on(file, FileCall::Size)?, size)?;
        same(w.bytes_of(file, FileCall::ReadAt(size as u64 - 2, 2))?.as_slice(), b"\0!")
    })
    .needing(&[Need::Background])
    .alone(),
    row(173, U, "of many creations of one name one succeeds", |w| {
        let device = w.open()?;
        let sent = named(72, &w.full_name(b"web"));
        let answers = w.together(many(|_| request(device, CREATE_SESSION, sent.clone())))?;
        one_succeeds(&answers, Errno::EXIST)
    })
    .needing(&[Need::Threads]),
    row(174, G, "of many retrievals of one session one succeeds", |w| {
        w.session("web")?;
        w.switch()?;
        let device = w.open()?;
        let sent = named(72, &w.full_name(b"web"));
        let answers = w.together(many(|_| request(device, RETRIEVE_SESSION, sent.clone())))?;
        one_succeeds(&answers, Errno::INVAL)
    })
    .needing(&[Need::Threads]),
    row(175, G, "many retrievals of one file give one open file", |w| {
        let session = w.arrived(&[(1, "01234567")])?;
        let answers =
            w.together(many(|_| request(session, SESSION_RETRIEVE_FD, tokened(16, -1, 1))))?;
        // The fds share one position, so each read returns the next byte.
        for (at, answer) in answers.into_iter().enumerate() {
            let file = Fd { number: second(&answer?.bytes), ..session };
            same(w.read(file, 1)?, vec![b'0' + at as u8])?;
        }
        Ok(())
    })
    .needing(&[Need::Threads]),
    row(176, U, "of many preservations of one file one succeeds", |w| {
        let file = w.memfd("data")?;
        let sessions = (0..THREADS).map(|at| w.session(&format!("session-{at}")));
        let sessions = sessions.collect::<Result<Vec<_>, _>>()?;
        let sent = tokened(16, file.number, 1);
        let answers =
            w.together(many(|at| request(sessions[at], SESSION_PRESERVE_FD, sent.clone())))?;
        one_succeeds(&answers, Errno::BUSY)
    })
    .needing(&[Need::Threads]),
    row(177, U, "a file whose session is closed meanwhile is free afterwards", |w| {
        let file = w.memfd("data")?;
        for _ in 0..20 {
            let session = w.session("web")?;
            let copy = w.dup(session)?;
            let preserve = request(copy, SESSION_PRESERVE_FD, tokened(16, file.number, 1));
            let answers = w.together(vec![Call::Close(session.number), preserve])?;
            same(answers.iter().all(Result::is_ok), true)?;
            w.close(copy)?;
            same(w.is_preserved(file)?, false)?;
        }
        Ok(())
    })
    .needing(&[Need::Threads]),
    row(178, U, "the device is open or busy, and free in the end", |w| {
        let answers = w.together(many(|_| Call::OpenAndClose(1250)))?;
        let opened: i64 = answers.into_iter().map(|one| one.map_or(-100_000, |a| a.number)).sum();
        same(opened > 0, true)?;
        w.open()?;
        Ok(())
    })
    .needing(&[Need::Threads]),
    row(179, G, "a file is retrieved before its session is finished, or not at all", |w| {
        let files: Vec<(u64, &str)> = (1..THREADS as u64).map(|token| (token, "data")).collect();
        let session = w.arrived(&files)?;
        let answers = w.together(many(|at| match at {
            0 => request(session, SESSION_FINISH, words(8, 0)),
            token => request(session, SESSION_RETRIEVE_FD, tokened(16, -1, token as u64)),
        }))?;
        for (at, answer) in answers.into_iter().enumerate() {
            match answer {
                Err(Errno::NOENT) if at > 0 => {}
                answer => {
                    let bytes = answer?.bytes;
                    if at > 0 {
                        let file = Fd { number: second(&bytes), ..session };
                        same(w.contents(file)?.as_str(), "data")?;
                    }
                }
            }
        }
        refused(w.retrieve(session, 1), Errno::NOENT)
    })
    .needing(&[Need::Threads]),
];
