//! Makes requests to a backend, one at a time or several at the same time.
//!
//! Each of several threads has a copy of the process's fds during its request, as the kernel holds a
//! reference to an fd during a system call. Afterwards the files that the requests opened are moved to
//! the process's table.

use std::sync::Barrier;
use std::thread;

use luo::Errno;
use luo::builtin::{Luo, SessionId};

use super::Backend;
use super::process::{Opened, RealFiles, Table};
use crate::conformance::request::Request;
use crate::conformance::system::{Answer, Argument, Call};

/// Makes a request of the process with this fd table.
pub(super) fn ioctl(
    backend: &impl Backend,
    table: &mut Table,
    number: i32,
    command: u32,
    mut argument: Argument,
) -> Result<Answer, Errno> {
    let session: Option<SessionId> = match table.get(number)?.opened {
        Opened::Device(_) => None,
        Opened::Session(id, _) => Some(id),
        Opened::File(_) => return Err(Errno::NOTTY),
    };
    let sent = argument.bytes.clone();
    let open = |id| backend.open_session(id);
    let mut request = Request::new(RealFiles(&open), table, &mut argument);
    let address = request.address();
    let result = backend.with_luo(&mut |luo| match session {
        None => luo.device_ioctl(&mut request, command, address),
        Some(id) => luo.session_ioctl(&mut request, id, command, address),
    });
    argument.answer(result, &sent)
}

/// Makes all calls at the same time, and returns the answer of each.
pub(super) fn together(
    backend: &impl Backend,
    table: &mut Table,
    calls: Vec<Call>,
) -> Vec<Result<Answer, Errno>> {
    let (barrier, first) = (Barrier::new(calls.len()), table.next());
    let copies: Vec<(Call, Table)> = calls.into_iter().map(|call| (call, table.clone())).collect();
    // This thread closes the fds of `Call::Close`, while the other calls run.
    let closed = copies.iter().filter_map(|(call, _)| match call {
        Call::Close(number) => Some(*number),
        _ => None,
    });
    let closed: Vec<i32> = closed.collect();
    let done = thread::scope(|scope| {
        let threads: Vec<_> = copies
            .into_iter()
            .map(|(call, mut copy)| {
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    let answer = one(backend, &mut copy, call);
                    (answer, copy)
                })
            })
            .collect();
        drop(closed.into_iter().map(|number| table.take(number)).collect::<Vec<_>>());
        let join = |thread: thread::ScopedJoinHandle<'_, _>| thread.join().expect("no call panics");
        threads.into_iter().map(join).collect::<Vec<_>>()
    });
    done.into_iter().map(|(answer, copy)| adopt(table, first, answer, copy)).collect()
}

fn one(backend: &impl Backend, table: &mut Table, call: Call) -> Result<Answer, Errno> {
    match call {
        Call::Ioctl(number, command, argument) => ioctl(backend, table, number, command, argument),
        Call::Close(_) => Ok(Answer::default()),
        Call::OpenAndClose(times) => {
            let mut opened = 0;
            for _ in 0..times {
                match backend.with_luo(&mut Luo::open_device) {
                    Ok(()) => {
                        backend.with_luo(&mut Luo::close_device)?;
                        opened += 1;
                    }
                    Err(Errno::BUSY) => {}
                    Err(errno) => return Err(errno),
                }
            }
            Ok(Answer::number(opened))
        }
        _ => Err(Errno::OPNOTSUPP),
    }
}

/// Moves an fd that a request opened (a number from `first` on) from the thread's copy to the process's
/// table, under the next free number, and changes the number in the answer.
fn adopt(
    table: &mut Table,
    first: i32,
    answer: Result<Answer, Errno>,
    mut copy: Table,
) -> Result<Answer, Errno> {
    let mut answer = answer?;
    if let Some(field) = answer.bytes.get_mut(4..8)
        && let Ok(number) = <[u8; 4]>::try_from(&field[..]).map(i32::from_le_bytes)
        && number >= first
        && let Some(entry) = copy.take(number)
    {
        let number = table.reserve()?;
        table.put(number, entry);
        field.copy_from_slice(&number.to_le_bytes());
    }
    Ok(answer)
}
