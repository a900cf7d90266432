//! PID 1 of the machine: runs a system, and executes the requests that the test sends over a virtio port.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::mount::{MountFlags, mount};

use super::kernel::{self, DATA};
use super::protocol::{Ask, Hello, PORT, ROLE, Say};
use super::{Owner, POOL, POOL_IMAGE};
use crate::conformance::backed::{Backed, KexecPoolBackend};
use crate::conformance::processes::{CGROUPS, Device, Processes};
use crate::conformance::system::{Answer, System, by_place};

type Problem = Box<dyn std::error::Error>;

/// Serves for as long as the machine runs.
pub(crate) fn main() -> ! {
    let ended = serve();
    // The kernel panics when PID 1 ends; this line precedes the panic on the console.
    eprintln!("conformance: {ended:?}");
    std::process::exit(1);
}

fn serve() -> Result<(), Problem> {
    mount_essentials()?;
    // Errors are ignored: a module for another vendor's processor is refused, and the cases show
    // if another one is missing.
    crate::modules::load_all();
    let line = open_line()?;
    let result = mount_data().and_then(|()| answer(&line));
    if let Err(problem) = &result {
        say(&line, &Say::Problem(problem.to_string()))?;
    }
    result
}

fn answer(line: &File) -> Result<(), Problem> {
    let mut system: Box<dyn System> = match Owner::of_this_machine()? {
        Owner::Kernel => Box::new(Processes::start(Device::Kernel)?),
        Owner::Pool => {
            mount_pool()?;
            Box::new(Backed::new(KexecPoolBackend::start(Path::new(POOL))?))
        }
    };
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned();
    let (generation, number) = (kernel::generation(), system.liveupdate_number());
    say(line, &Say::Hello(Hello { release, generation, number }))?;
    for ask in BufReader::new(line.try_clone()?).lines() {
        let answer = execute(&mut *system, serde_json::from_str(&ask?)?);
        say(line, &Say::Answer(answer.map_err(luo::Errno::raw_os_error)))?;
    }
    Err("the line ended".into())
}

fn execute(system: &mut dyn System, ask: Ask) -> Result<Answer, luo::Errno> {
    let process = |process: crate::conformance::system::Process| Answer::number(process.0);
    match ask {
        Ask::Spawn => Ok(process(system.spawn())),
        Ask::Fork(parent) => Ok(process(system.fork(parent))),
        Ask::Kill(victim) => {
            system.kill(victim);
            Ok(Answer::default())
        }
        Ask::Send(fd) => Ok(Answer::number(system.send(fd)?.0 as i64)),
        Ask::Receive(letter, by) => {
            system.receive(letter, by).map(|fd| Answer::number(fd.number)).ok_or(luo::Errno::BADF)
        }
        Ask::Call(process, call) => system.call(process, call),
        Ask::Direct(direction) => {
            let called = system.direct(direction)?;
            let known = called.into_iter().filter_map(|(callback, object)| {
                let bytes = vec![by_place::place(callback)? as u8];
                Some(Ok(Answer { number: object.into(), bytes, each: Vec::new() }))
            });
            Ok(Answer::each(known.collect()))
        }
        Ask::Switch(next) => system.switch(next).map(|()| Answer::default()),
    }
}

fn say(mut line: &File, say: &Say) -> Result<(), Problem> {
    let mut bytes = serde_json::to_vec(say)?;
    bytes.push(b'\n');
    Ok(line.write_all(&bytes)?)
}

fn mount_essentials() -> Result<(), Problem> {
    fs::create_dir_all("/dev")?;
    let mounts = [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/dev/shm"),
        ("tmpfs", "/tmp"),
        ("debugfs", "/sys/kernel/debug"),
        ("cgroup2", CGROUPS),
    ];
    for (fs, target) in mounts {
        fs::create_dir_all(target)?;
        mount(fs, target, fs, MountFlags::empty(), None)
            .map_err(|errno| format!("cannot mount {fs} on {target}: {errno}"))?;
    }
    // Only emergency messages go to the console.
    Ok(fs::write("/proc/sys/kernel/printk", "1")?)
}

fn mount_data() -> Result<(), Problem> {
    let device = Path::new("/dev/vda");
    wait_until(|| device.exists());
    mount(device, DATA, "ext4", MountFlags::RDONLY, None)
        .map_err(|errno| format!("cannot mount {} on {DATA}: {errno}", device.display()).into())
}

/// Mounts the pool. The first kernel copies the image of an empty pool into it before.
fn mount_pool() -> Result<(), Problem> {
    const DEVICE: &str = "/dev/pmem0";
    wait_until(|| Path::new(DEVICE).exists());
    if kernel::generation() == 0 {
        copy_image(&Path::new(DATA).join(POOL_IMAGE), Path::new(DEVICE))?;
    }
    fs::create_dir_all(POOL)?;
    mount(DEVICE, POOL, "ext4", MountFlags::empty(), c"dax=always")
        .map_err(|errno| format!("cannot mount {DEVICE} on {POOL}: {errno}").into())
}

/// Copies the chunks that are not zero. The rest is zero already, because the memory is new.
fn copy_image(image: &Path, device: &Path) -> Result<(), Problem> {
    const CHUNK: usize = 1 << 20;
    let (from, to) = (File::open(image)?, File::options().write(true).open(device)?);
    let mut bytes = vec![0; CHUNK];
    for offset in (0..from.metadata()?.len()).step_by(CHUNK) {
        let length = usize::try_from(from.metadata()?.len() - offset)?.min(CHUNK);
        from.read_exact_at(&mut bytes[..length], offset)?;
        if bytes[..length].iter().any(|byte| *byte != 0) {
            to.write_all_at(&bytes[..length], offset)?;
        }
    }
    Ok(to.sync_all()?)
}

fn open_line() -> Result<File, Problem> {
    wait_until(|| find_port().is_some());
    let device = find_port().ok_or_else(|| format!("no virtio port is called `{PORT}`"))?;
    Ok(File::options().read(true).write(true).open(device)?)
}

fn find_port() -> Option<PathBuf> {
    let ports = fs::read_dir("/sys/class/virtio-ports").ok()?.flatten();
    let mut named = ports.filter(|port| {
        fs::read_to_string(port.path().join("name")).is_ok_and(|name| name.trim() == PORT)
    });
    Some(Path::new("/dev").join(named.next()?.file_name()))
}

/// Waits at most 10 s for a driver to create a device. Polls, because a process without netlink gets no
/// event.
fn wait_until(condition: impl Fn() -> bool) {
    for _ in 0..1000 {
        if condition() {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

impl Owner {
    fn of_this_machine() -> Result<Self, Problem> {
        let word = kernel::word(ROLE).unwrap_or_default();
        Self::ALL.into_iter().find(|owner| owner.word() == word).ok_or_else(|| {
            format!("unknown owner of the LUO on the command line: `{ROLE}={word}`").into()
        })
    }
}
