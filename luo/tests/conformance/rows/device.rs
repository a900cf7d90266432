//! The device: cases 1 to 15.

use luo::Errno;

use super::Class::U;
use super::{Row, row};
use crate::system::Fd;
use crate::world::{refused, same};

pub(super) const ROWS: &[Row] = &[
    row(1, U, "open and close", |w| {
        let device = w.open()?;
        Ok(w.close(device)?)
    }),
    row(2, U, "a device opened for reading creates sessions", |w| {
        let device = w.system.open_device(w.me, true)?;
        w.create(device, b"web")?;
        Ok(())
    }),
    row(3, U, "the device opens once", |w| {
        w.open()?;
        refused(w.open(), Errno::BUSY)
    }),
    row(4, U, "the device opens once for all processes", |w| {
        w.open()?;
        let other = w.system.spawn();
        refused(w.system.open_device(other, false), Errno::BUSY)
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
        let child = w.system.fork(w.me);
        w.close(device)?;
        refused(w.open(), Errno::BUSY)?;
        w.system.kill(child);
        w.open()?;
        Ok(())
    }),
    row(7, U, "a killed process closes the device", |w| {
        let child = w.system.spawn();
        w.system.open_device(child, false)?;
        w.system.kill(child);
        w.open()?;
        Ok(())
    }),
    row(8, U, "a session is created in the process that asks", |w| {
        let device = w.open()?;
        let other = w.system.spawn();
        let letter = w.system.send(device)?;
        let device = w.system.receive(letter, Some(other)).ok_or(Errno::BADF)?;
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
];
