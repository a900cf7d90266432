//! The device: cases 1 to 15.

use luo::Errno;
use luo::uapi::{CREATE_SESSION, SESSION_GET_NAME};

use super::Class::{K, U};
use super::{Row, row};
use crate::conformance::file::FileCall;
use crate::conformance::profile::{Deviation, Need};
use crate::conformance::system::{Call, Fd, Next};
use crate::conformance::world::{named, refused, same};

pub(super) const ROWS: &[Row] = &[
    row(1, U, "open and close", |w| {
        let device = w.open()?;
        Ok(w.close(device)?)
    }),
    row(2, U, "a device opened for reading creates sessions", |w| {
        let device = w.open_in(w.me, true)?;
        w.create(device, b"web")?;
        Ok(())
    }),
    row(3, U, "the device opens once", |w| {
        w.open()?;
        refused(w.open(), Errno::BUSY)
    }),
    row(4, U, "the device opens once for all processes", |w| {
        w.open()?;
        let other = w.spawn();
        refused(w.open_in(other, false), Errno::BUSY)
    }),
    row(5, U, "a copy of the device's fd keeps it open", |w| {
        let device = w.open()?;
        let copy = w.dup(device)?;
        w.close(device)?;
        refused(w.open(), Errno::BUSY)?;
        w.close(copy)?;
        w.open()?;
        Ok(())
    }),
    row(6, U, "a child keeps the device open", |w| {
        let device = w.open()?;
        let child = w.fork(w.me);
        w.close(device)?;
        refused(w.open(), Errno::BUSY)?;
        w.kill(child);
        w.open()?;
        Ok(())
    }),
    row(7, U, "a killed process closes the device", |w| {
        let child = w.spawn();
        w.open_in(child, false)?;
        w.kill(child);
        w.open()?;
        Ok(())
    }),
    row(8, U, "a session is created in the process that asks", |w| {
        let device = w.open()?;
        let other = w.spawn();
        let letter = w.send(device)?;
        let device = w.receive(letter, other)?;
        let session = w.create(device, b"web")?;
        same(session.process, other)?;
        same(w.name(session)?, b"web".to_vec())?;
        refused(w.name(Fd { process: w.me, ..session }), Errno::BADF)
    }),
    row(9, U, "an open that failed leaves nothing", |w| {
        let device = w.open()?;
        refused(w.open(), Errno::BUSY)?;
        w.close(device)?;
        w.open()?;
        Ok(())
    }),
    row(10, U, "neither the device nor a session is read, sought or mapped", |w| {
        let device = w.open()?;
        let session = w.create(device, b"web")?;
        for fd in [device, session] {
            refused(w.read(fd, 8), Errno::INVAL)?;
            let errno = match w.deviates(Deviation::WriteIsNotConnected) {
                true => Errno::NOTCONN,
                false => Errno::INVAL,
            };
            refused(w.on(fd, FileCall::Write(vec![0])), errno)?;
            refused(w.on(fd, FileCall::Seek(0)), Errno::SPIPE)?;
            refused(w.on(fd, FileCall::Map), Errno::NODEV)?;
        }
        Ok(())
    })
    .needing(&[Need::Processes]),
    row(11, K, "a 32-bit program's requests are refused", |w| {
        let device = w.open()?;
        let session = w.create(device, b"web")?;
        let create = named(72, &w.full_name(b"db"));
        refused(w.call(Call::Ioctl32(device.number, CREATE_SESSION, create)), Errno::NOTTY)?;
        let name = named(72, b"");
        refused(w.call(Call::Ioctl32(session.number, SESSION_GET_NAME, name)), Errno::NOTTY)
    }),
    row(12, K, "a kernel whose LUO is off has no device", |w| {
        w.switch_to(Next::WithoutLuo)?;
        refused(w.open(), Errno::NOENT)?;
        w.switch()?;
        w.open()?;
        Ok(())
    })
    .alone(),
    row(13, U, "a session does not need the device", |w| {
        let session = w.session("web")?;
        let file = w.memfd("data")?;
        w.preserve(session, file, 1)?;
        same(w.name(session)?, b"web".to_vec())
    }),
    row(14, U, "sessions of all openings share their names", |w| {
        w.session("web")?;
        refused(w.session("web"), Errno::EXIST)
    }),
    row(15, K, "the device is root's", |w| {
        let found = w.call(Call::Stat(luo::uapi::DEVICE.to_owned()))?.each;
        let numbers = found.into_iter().map(|one| one.map_or(-1, |answer| answer.number));
        same(numbers.collect(), vec![0o020_600, 0])
    }),
];
