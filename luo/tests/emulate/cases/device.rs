//! The device and sessions as files: paths, flags of open, close, signals and reboot.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use luo::kernel::Device;
use luo::{Errno, Orchestrator, SessionName, Token};
use rustix::fs::{
    Access, AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxFlags, accessat, getxattr, listxattr,
    open, openat, openat2, readlinkat, stat, statx,
};
use rustix::io::{FdFlags, fcntl_getfd, write};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use super::calls::{self, create, device, fork, preserve, reboot};
use super::{Inside, inside, refused, same};

const PATH: &str = "/dev/liveupdate";

pub(super) const CASES: &[Inside] = &[
    inside("stat, access and extended attributes find the device", || {
        let found = stat(PATH)?;
        let metadata = fs::metadata(PATH)?;
        same(metadata.file_type().is_char_device(), true)?;
        same((metadata.mode() & 0o7777, metadata.uid(), found.st_nlink as u64), (0o600, 0, 1))?;
        let statx = statx(CWD, PATH, AtFlags::empty(), StatxFlags::BASIC_STATS)?;
        same(u32::from(statx.stx_mode), found.st_mode)?;
        accessat(CWD, PATH, Access::READ_OK | Access::WRITE_OK, AtFlags::empty())?;
        accessat(CWD, PATH, Access::EXISTS, AtFlags::EACCESS)?;
        refused(accessat(CWD, PATH, Access::EXEC_OK, AtFlags::empty()), Errno::ACCESS)?;
        same(fs::canonicalize(PATH)?.as_os_str(), PATH.as_ref())?;
        refused(readlinkat(CWD, PATH, Vec::new()), Errno::INVAL)?;
        same(listxattr(PATH, &mut [0_u8; 64][..])?, 0)?;
        refused(getxattr(PATH, "security.selinux", &mut [0_u8; 64][..]), Errno::NODATA)?;
        same(fs::metadata("/dev/liveupdate2").is_err(), true)
    }),
    inside("every path to the device opens it", || {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let dev = open("/dev", OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?;
        drop(openat(&dev, "liveupdate", flags, Mode::empty())?);
        drop(openat2(&dev, "./liveupdate", flags, Mode::empty(), ResolveFlags::empty())?);
        drop(open("/dev/../dev//liveupdate", flags, Mode::empty())?);
        rustix::process::chdir("/dev/shm")?;
        drop(open("../liveupdate", flags, Mode::empty())?);
        refused(open("liveupdate", flags, Mode::empty()), Errno::NOENT)
    }),
    inside("flags of open have their usual effect", || {
        let opened = |flags| open(PATH, flags, Mode::empty());
        refused(opened(OFlags::RDWR | OFlags::CREATE | OFlags::EXCL), Errno::EXIST)?;
        refused(opened(OFlags::RDONLY | OFlags::DIRECTORY), Errno::NOTDIR)?;
        let with = opened(OFlags::RDWR | OFlags::CLOEXEC)?;
        same(fcntl_getfd(&with)?, FdFlags::CLOEXEC)?;
        // An open with O_PATH does not reach the driver, so the device is not busy. (On Linux an
        // ioctl on this fd fails with EBADF.)
        let path = opened(OFlags::PATH)?;
        refused(calls::plain_ioctl(&path, luo::uapi::CREATE_SESSION), Errno::NOTTY)?;
        drop(with);
        same(fcntl_getfd(opened(OFlags::RDWR)?)?, FdFlags::empty())
    }),
    inside("an ioctl on a file other than LUO's reaches that file", || {
        let null = open("/dev/null", OFlags::RDWR, Mode::empty())?;
        refused(calls::plain_ioctl(&null, 0x5401), Errno::NOTTY)?;
        refused(calls::plain_ioctl(&null, luo::uapi::CREATE_SESSION), Errno::NOTTY)?;
        let (reader, writer) = rustix::pipe::pipe()?;
        write(&writer, b"four")?;
        same(rustix::io::ioctl_fionread(&reader)?, 4)
    }),
    inside("a session is closed when its last holder dies", || {
        let session = create(device()?, "web")?;
        let child = fork(|| {
            loop {
                std::thread::park();
            }
        })?;
        drop(session);
        let device = device()?;
        refused(create(&device, "web"), Errno::EXIST)?;
        let child = Pid::from_raw(child).ok_or("a child has a number")?;
        kill_process(child, Signal::KILL)?;
        waitpid(Some(child), WaitOptions::empty())?;
        create(&device, "web")?;
        Ok(())
    }),
    inside("a close takes effect before the next call", || {
        for _ in 0..1000 {
            let device = device()?;
            let session = create(&device, "web")?;
            refused(create(&device, "web"), Errno::EXIST)?;
            drop(session);
            create(&device, "web")?;
        }
        Ok(())
    }),
    inside("a call that a signal interrupts does its work once", || {
        calls::interrupt_often()?;
        let device = device()?;
        let mut number = 0;
        // A request that was executed twice would fail with EEXIST.
        while calls::interruptions() < 200 {
            drop(create(&device, &format!("session {number}"))?);
            number += 1;
        }
        Ok(())
    }),
    inside("the client in this crate works unchanged", || {
        let (device, name) = (Device::default(), SessionName::new("web")?);
        same(device.is_present(), true)?;
        let session = device.create_session(&name)?;
        let memory = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC)?;
        session.preserve(memory.as_fd(), Token(1))?;
        same(session.preserve(memory.as_fd(), Token(2)).is_err(), true)?;
        drop(session);
        preserve(create(calls::device()?, "web")?, &memory, 3)?;
        Ok(())
    }),
    inside("the host is not rebooted", || {
        const RESTART: u32 = 0x0123_4567;
        const POWER_OFF: u32 = 0x4321_fedc;
        for command in [RESTART, POWER_OFF, 0, 7] {
            refused(reboot(calls::MAGIC, command), Errno::PERM)?;
        }
        refused(reboot(1, calls::KEXEC), Errno::INVAL)?;
        Ok(calls::kexec_file_load()?)
    }),
];
