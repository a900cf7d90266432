//! Malformed requests and GET_NAME: cases 16 to 38, 55 to 57 and 59.

use luo::Errno;
use luo::uapi::{
    CREATE_SESSION, RETRIEVE_SESSION, SESSION_FINISH, SESSION_GET_NAME, SESSION_PRESERVE_FD,
};

use super::Class::{G, U};
use super::{Row, row};
use crate::conformance::profile::Need;
use crate::conformance::system::Fd;
use crate::conformance::system::Place::{self, CutAfter, Null, ReadOnly, Unaligned, Writable};
use crate::conformance::world::{Failure, Outcome, World, named, refused, same, tokened, words};

/// `_IOWR(0xBA, nr, a struct of 72 bytes)`.
const fn iowr(nr: u32) -> u32 {
    0xc048_ba00 | nr
}

/// Errors unless each of these requests, with the same argument, fails with `errno`.
fn all_refused(
    w: &mut World,
    fd: Fd,
    commands: &[u32],
    bytes: &[u8],
    place: Place,
    errno: Errno,
) -> Outcome {
    for command in commands {
        let answer = w.ioctl(fd, *command, bytes.to_vec(), place);
        refused(answer, errno).map_err(|why| Failure(format!("{command:#x}: {}", why.0)))?;
    }
    Ok(())
}

/// A good argument for a session called "web", followed by `tail`.
fn with_tail(size: u32, tail: &[u8]) -> Vec<u8> {
    [&named(size, b"web")[..], tail].concat()
}

pub(super) const ROWS: &[Row] = &[
    row(16, U, "the device knows two numbers", |w| {
        let device = w.open()?;
        let numbers = [0xba02, 0xba3f, 0xba40, 0xba43, 0xbaff];
        all_refused(w, device, &numbers, &named(72, b"web"), Writable, Errno::INVAL)
    }),
    row(17, U, "an unknown number comes before a bad pointer", |w| {
        let device = w.open()?;
        all_refused(w, device, &[0xba02], &[], Null, Errno::INVAL)
    }),
    row(18, U, "a request of another ioctl type is refused", |w| {
        let device = w.open()?;
        all_refused(w, device, &[0x5400], &named(72, b"web"), Writable, Errno::NOTTY)
    }),
    row(19, U, "a request with direction and size bits is refused", |w| {
        let device = w.open()?;
        all_refused(w, device, &[iowr(0)], &named(72, b"web"), Writable, Errno::NOTTY)
    }),
    row(20, U, "a bad pointer is checked before the ioctl type", |w| {
        let device = w.open()?;
        all_refused(w, device, &[iowr(0)], &[], Null, Errno::FAULT)
    }),
    row(21, U, "a request needs a pointer", |w| {
        let device = w.open()?;
        let commands = [CREATE_SESSION, RETRIEVE_SESSION];
        all_refused(w, device, &commands, &[], Null, Errno::FAULT)
    }),
    row(22, U, "a struct that is too small is refused", |w| {
        let device = w.open()?;
        for size in [0, 4, 71] {
            let commands = [CREATE_SESSION, RETRIEVE_SESSION];
            all_refused(w, device, &commands, &named(size, b"web"), Writable, Errno::INVAL)?;
        }
        Ok(())
    }),
    row(23, U, "a struct of its size is taken", |w| {
        let device = w.open()?;
        w.ioctl(device, CREATE_SESSION, named(72, b"web"), Writable)?;
        Ok(())
    }),
    row(24, U, "a longer struct is taken if the rest is zero", |w| {
        let device = w.open()?;
        let sent = with_tail(80, &[0; 8]);
        let answer = w.ioctl(device, CREATE_SESSION, sent.clone(), Writable)?;
        same(&answer[..4], &sent[..4])?;
        same(&answer[8..], &sent[8..])
    }),
    row(25, U, "a longer struct with anything else is too big", |w| {
        let device = w.open()?;
        for tail in [[1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]] {
            let sent = with_tail(80, &tail);
            refused(w.ioctl(device, CREATE_SESSION, sent, Writable), Errno::TOOBIG)?;
        }
        w.create(device, b"web")?;
        Ok(())
    }),
    row(26, U, "a struct can be longer than a page", |w| {
        let device = w.open()?;
        let sent = with_tail(4096 + 72, &[0; 4096]);
        w.ioctl(device, CREATE_SESSION, sent, Writable)?;
        Ok(())
    }),
    row(27, U, "the rest of a longer struct has to be there", |w| {
        let device = w.open()?;
        let sent = with_tail(100, &[0; 8]);
        refused(w.ioctl(device, CREATE_SESSION, sent, Writable), Errno::FAULT)
    }),
    row(28, U, "a struct has to be there", |w| {
        let device = w.open()?;
        let answer = w.ioctl(device, CREATE_SESSION, named(72, b"web"), CutAfter(4));
        refused(answer, Errno::FAULT)
    }),
    row(29, U, "a bad size with a bad name creates nothing", |w| {
        let device = w.open()?;
        let answer = w.ioctl(device, CREATE_SESSION, named(71, b""), Writable);
        refused(answer, Errno::INVAL)
    }),
    row(30, U, "a session knows four numbers", |w| {
        let session = w.session("web")?;
        let numbers = [0xba00, 0xba01, 0xba3f, 0xba44, 0xbaff];
        all_refused(w, session, &numbers, &named(72, b"web"), Writable, Errno::INVAL)
    }),
    row(31, U, "a session's request with direction bits is refused, a bad pointer first", |w| {
        let session = w.session("web")?;
        let iow = [0x4010_ba40];
        all_refused(w, session, &iow, &tokened(16, -1, 1), Writable, Errno::NOTTY)?;
        all_refused(w, session, &iow, &[], Null, Errno::FAULT)
    }),
    row(32, U, "sizes of PRESERVE_FD", |w| {
        let session = w.session("web")?;
        let mut ask = |token: u64, size, tail: &[u8]| {
            let file = w.memfd("data")?;
            let sent = [&tokened(size, file.number, token)[..], tail].concat();
            w.ioctl(session, SESSION_PRESERVE_FD, sent, Writable)
        };
        refused(ask(1, 15, &[]), Errno::INVAL)?;
        ask(1, 16, &[])?;
        ask(2, 24, &[0; 8])?;
        refused(ask(3, 24, &[0, 0, 0, 0, 0, 0, 0, 1]), Errno::TOOBIG)
    }),
    row(33, G, "a small FINISH", |w| {
        let session = w.arrived(&[])?;
        refused(w.ioctl(session, SESSION_FINISH, words(4, 0), Writable), Errno::INVAL)
    }),
    row(34, U, "the kind of session comes before the size", |w| {
        let session = w.session("web")?;
        refused(w.ioctl(session, SESSION_FINISH, words(0, 0), Writable), Errno::INVAL)
    }),
    row(35, U, "neither the device nor a session is a terminal", |w| {
        const TCGETS: u32 = 0x5401;
        let device = w.open()?;
        let session = w.create(device, b"web")?;
        all_refused(w, device, &[TCGETS], &[0; 60], Writable, Errno::NOTTY)?;
        all_refused(w, session, &[TCGETS], &[0; 60], Writable, Errno::INVAL)
    }),
    row(36, U, "what every file answers is not LUO's", |w| {
        const FIONCLEX: u32 = 0x5450;
        const FIOCLEX: u32 = 0x5451;
        let session = w.session("web")?;
        for (command, closes) in [(FIONCLEX, false), (FIOCLEX, true)] {
            w.ioctl(session, command, vec![], Null)?;
            same(w.closes_on_exec(session)?, closes)?;
        }
        Ok(())
    })
    .needing(&[Need::Processes]),
    row(37, U, "a struct can be anywhere", |w| {
        let device = w.open()?;
        let session = w.create_at(device, b"web", Unaligned)?;
        same(w.name(session)?, b"web".to_vec())
    }),
    row(38, U, "a request that fails leaves the struct as it was", |w| {
        let device = w.open()?;
        w.create(device, b"web")?;
        // Every system answers EUCLEAN if a failed request changed its argument.
        refused(w.create(device, b"web"), Errno::EXIST)
    }),
    row(55, U, "GET_NAME", |w| {
        let session = w.session("web")?;
        same(w.name(session)?, b"web".to_vec())
    }),
    row(56, U, "GET_NAME refuses what is reserved", |w| {
        let session = w.session("web")?;
        let sent = [words(72, 1), vec![0; 64]].concat();
        refused(w.ioctl(session, SESSION_GET_NAME, sent, Writable), Errno::INVAL)
    }),
    row(57, G, "GET_NAME of an incoming session, before and after FINISH", |w| {
        let session = w.arrived(&[(1, "data")])?;
        same(w.name(session)?, b"web".to_vec())?;
        w.finish(session)?;
        same(w.name(session)?, b"web".to_vec())
    }),
    row(59, U, "GET_NAME has to be able to answer", |w| {
        let session = w.session("web")?;
        let sent = [words(72, 0), vec![0; 64]].concat();
        refused(w.ioctl(session, SESSION_GET_NAME, sent, ReadOnly), Errno::FAULT)
    }),
];
