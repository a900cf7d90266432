//! Measures the built-in LUO's calls, and whether their cost grows with the number of sessions and files.
//!
//! A client, which is this program again, measures its own calls under `perennial luo emulate`. The
//! switch is measured in this process, on a keeper. The arrival of a VM's memory is measured on a pool
//! in `/dev/shm`, which runs the pool's code without DAX.

use std::env;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write, stdout};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use luo::builtin::keeper::Keeper;
use luo::builtin::pool::{Options, Pool};
use luo::emulate::NUMBER_VARIABLE;
use luo::kernel::Device;
use luo::{Orchestrator, Outgoing, SessionName, Token};
use perennial_tests::host::Failure;
use perennial_tests::samples::Samples;
use perennial_tests::{binaries, paths};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::system::{RebootCommand, reboot};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::target::{self, Target};

/// The argument that makes this program the client which measures its calls.
pub(crate) const CALLER: &str = "luo-caller";
/// The argument that makes this program the client which preserves many files and then switches.
pub(crate) const FILLER: &str = "luo-filler";

/// Number of existing sessions or files, in the two cases of each call.
const FEW_AND_MANY: [usize; 2] = [100, 2000];
/// Number of calls in each case.
const CALLS: usize = 200;
/// Numbers of sessions, and of files in each, that are serialized.
const SERIALIZED: (usize, usize) = (1000, 8);
/// Number of switches, and of runs of the selftest.
const ROUNDS: usize = 9;
/// Memory of the arriving VMs, in MiB.
const VM_MIB: [u64; 2] = [256, 2048];

/// The line that the client prints when it has preserved all files.
const FULL: &str = "full\n";

/// The client's measurements, in nanoseconds for each call.
#[derive(Debug, Serialize, Deserialize)]
struct Calls {
    /// Times to create and close a session, with few and with many other sessions.
    sessions: [Vec<u64>; 2],
    /// Times to preserve a file, in a session with few and with many files.
    files: [Vec<u64>; 2],
}

/// Runs all measurements of the built-in LUO and prints them.
pub(crate) fn bench() -> Result<Value, Failure> {
    allow_many_fds()?;
    println!("The built-in LUO; min / median / max\n");
    let perennial = binaries::with_tools()?;
    let Calls { sessions, files } = calls(perennial)?;
    let [few_sessions, many_sessions] = sessions.map(Samples::new);
    let [few_files, many_files] = files.map(Samples::new);
    print("create and close a session of 100", &few_sessions);
    print("create and close a session of 2000", &many_sessions);
    print("preserve file 100 of a session", &few_files);
    print("preserve file 2000 of a session", &many_files);
    let serializing = serializing()?;
    print("serialize 1000 sessions of 8 files", &serializing);
    let state = into_a_state_directory(perennial)?;
    print("the emulator's switch with as many", &state);
    let [small, large] = VM_MIB.map(arrival);
    let (small, large) = (small?, large?);
    print("retrieve 256 MiB from a pool", &small);
    print("retrieve 2048 MiB from a pool", &large);
    let selftest = selftest(perennial).unwrap_or_else(|error| {
        println!("Linux's selftest `liveupdate` could not be measured: {error}");
        Samples::default()
    });
    print("Linux's selftest `liveupdate`", &selftest);
    let targets = [
        Target::ratio("a session of 2000 to one of 100", &many_sessions, &few_sessions, 1.5),
        Target::ratio("file 2000 to file 100", &many_files, &few_files, 1.5),
        Target::ratio("2048 MiB from a pool to 256 MiB", &large, &small, 1.5),
        Target::time("serializing to 50 ms", &serializing, 50_000_000),
        Target::time("the selftest to 2 s", &selftest, 2_000_000_000),
    ];
    target::print(&targets);
    Ok(json!({
        "create_and_close_ns": {"of_100": few_sessions, "of_2000": many_sessions},
        "preserve_ns": {"of_100": few_files, "of_2000": many_files},
        "serialize_1000_sessions_of_8_files_ns": serializing,
        "emulator_switch_1000_sessions_of_8_files_ns": state,
        "retrieve_from_pool_ns": {"256_mib": small, "2048_mib": large},
        "selftest_ns": selftest,
        "targets": targets,
    }))
}

fn print(name: &str, samples: &Samples) {
    println!("{name:36} {}", samples.text());
}

/// Raises this process's limit of fds as far as allowed: a preserved file needs one fd, and two at the
/// switch.
fn allow_many_fds() -> Result<(), Failure> {
    let now = getrlimit(Resource::Nofile);
    let wanted = Rlimit { current: Some(40_000), maximum: Some(40_000) };
    let most = Rlimit { current: now.maximum, ..now };
    Ok(setrlimit(Resource::Nofile, wanted).or_else(|_| setrlimit(Resource::Nofile, most))?)
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn timed<T>(act: impl FnOnce() -> T) -> (T, u64) {
    let start = Instant::now();
    let done = act();
    (done, nanoseconds(start.elapsed()))
}

fn name(text: &str) -> Result<SessionName, Failure> {
    Ok(SessionName::new(text)?)
}

/// Creates a session of this name with `files` new memfds.
fn session(luo: &impl Orchestrator, text: &str, files: usize) -> Result<Outgoing, Failure> {
    let session = luo.create_session(&name(text)?)?;
    for token in 0..files {
        session.preserve(memory(luo)?.as_fd(), Token(token as u64))?;
    }
    Ok(session)
}

fn memory(luo: &impl Orchestrator) -> Result<OwnedFd, Failure> {
    Ok(luo.create_memory("bench", 4096)?)
}

/// A command that runs this program under the emulator, with `what` as its argument.
fn emulated(perennial: &Path, options: &[&OsStr], what: &str) -> Result<Command, Failure> {
    let mut command = Command::new(perennial);
    command.args(["luo", "emulate"]).args(options).arg("--").arg(env::current_exe()?).arg(what);
    command.stderr(Stdio::inherit()).stdout(Stdio::piped());
    Ok(command)
}

fn calls(perennial: &Path) -> Result<Calls, Failure> {
    let output = emulated(perennial, &[], CALLER)?.output()?;
    if !output.status.success() {
        return Err(format!("the client `{CALLER}` failed: {}", output.status).into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Measures the emulator's switch into a state directory: from the filler's last line, before its
/// reboot(2), to the end of the emulator.
fn into_a_state_directory(perennial: &Path) -> Result<Samples, Failure> {
    let mut samples = Vec::new();
    for _ in 0..ROUNDS {
        let directory = tempfile::tempdir_in("/dev/shm")?;
        let state = directory.path().join("state");
        let options = ["--state".as_ref(), state.as_os_str()];
        let mut run = emulated(perennial, &options, FILLER)?.spawn()?;
        let mut words = String::new();
        BufReader::new(run.stdout.take().ok_or("the client has no output")?)
            .read_line(&mut words)?;
        let (status, took) = timed(|| run.wait());
        let status = status?;
        if words != FULL || !status.success() {
            return Err(format!("the client `{FILLER}` under the emulator failed: {status}").into());
        }
        samples.push(took);
    }
    Ok(Samples::new(samples))
}

/// Preserves many files, prints [`FULL`], and switches by reboot(2).
pub(crate) fn filler() -> Result<(), Failure> {
    if env::var_os(NUMBER_VARIABLE).is_none() {
        return Err("not under the emulator: reboot(2) would restart this computer".into());
    }
    allow_many_fds()?;
    let _sessions = fill(&Device::default())?;
    print!("{FULL}");
    stdout().flush()?;
    reboot(RebootCommand::Kexec)?;
    Err("reboot(2) returned".into())
}

fn fill(luo: &impl Orchestrator) -> Result<Vec<Outgoing>, Failure> {
    let (sessions, files) = SERIALIZED;
    (0..sessions).map(|number| session(luo, &format!("session-{number}"), files)).collect()
}

/// Measures calls, and prints their times.
pub(crate) fn caller() -> Result<(), Failure> {
    allow_many_fds()?;
    let luo = Device::default();
    let calls = Calls { sessions: sessions(&luo)?, files: files(&luo)? };
    println!("{}", serde_json::to_string(&calls)?);
    Ok(())
}

fn sessions(luo: &Device) -> Result<[Vec<u64>; 2], Failure> {
    let mut open = Vec::new();
    let mut measured = [const { Vec::new() }; 2];
    let one_more = name("one-more")?;
    for (samples, count) in measured.iter_mut().zip(FEW_AND_MANY) {
        while open.len() < count {
            open.push(session(luo, &format!("session-{}", open.len()), 0)?);
        }
        for _ in 0..CALLS {
            let (made, took) = timed(|| luo.create_session(&one_more).map(drop));
            made?;
            samples.push(took);
        }
    }
    Ok(measured)
}

fn files(luo: &Device) -> Result<[Vec<u64>; 2], Failure> {
    let session = session(luo, "files", 0)?;
    let mut measured = [const { Vec::new() }; 2];
    // Half of the calls are before the number, half after it.
    let near = |number: usize, wanted: usize| number.abs_diff(wanted) <= CALLS / 4;
    for number in 0..FEW_AND_MANY[1] + CALLS / 4 {
        let memory = memory(luo)?;
        let (preserved, took) = timed(|| session.preserve(memory.as_fd(), Token(number as u64)));
        preserved?;
        for (samples, wanted) in measured.iter_mut().zip(FEW_AND_MANY) {
            if near(number, wanted) {
                samples.push(took);
            }
        }
    }
    Ok(measured)
}

/// Measures the time to freeze and serialize all sessions, until a successor could take them.
fn serializing() -> Result<Samples, Failure> {
    let keeper = Keeper::start();
    let _sessions = fill(&keeper)?;
    let mut samples = Vec::new();
    for _ in 0..ROUNDS {
        let start = Instant::now();
        let mut took = None;
        // The successor refuses the handover, which leaves the keeper unchanged.
        let taken: Result<(), _> = keeper.hand_over(|handover| {
            took = Some(nanoseconds(start.elapsed()));
            drop(handover);
            Err(())
        });
        drop(taken);
        samples.push(took.ok_or("the keeper handed nothing over")?);
    }
    Ok(Samples::new(samples))
}

/// Measures how long a starting host takes to get a VM's memory: to open the pool and to retrieve the
/// session and the memory.
fn arrival(mib: u64) -> Result<Samples, Failure> {
    let directory = tempfile::tempdir_in("/dev/shm")?;
    let options = Options { without_dax: true, ..Options::default() };
    let mut pool = Pool::start(directory.path(), &options)?;
    let mut memory = pool.create_memory("bench", mib << 20)?;
    let vm = name("vm")?;
    let mut samples = Vec::new();
    for _ in 0..ROUNDS {
        let session = pool.create_session(&vm)?;
        session.preserve(memory.as_fd(), Token(1))?;
        pool.hand_over(|| Ok::<(), ()>(())).map_err(|error| error.to_string())?;
        drop((session, memory, pool));
        let (arrived, took) = timed(|| -> Result<_, Failure> {
            let pool = Pool::start(directory.path(), &options)?;
            let session = pool.retrieve_session(&vm)?;
            let memory = session.retrieve(Token(1))?;
            Ok((pool, session, memory))
        });
        let session;
        (pool, session, memory) = arrived?;
        session.finish().map_err(|failure| failure.error)?;
        samples.push(took);
    }
    Ok(Samples::new(samples))
}

/// Measures how long Linux's selftest of LUO takes under the emulator.
fn selftest(perennial: &Path) -> Result<Samples, Failure> {
    let recipe = paths::workspace().join("resources/kernel/selftests.sh");
    let built = Command::new(recipe).stderr(Stdio::inherit()).output()?;
    if !built.status.success() {
        return Err("resources/kernel/selftests.sh could not build it".into());
    }
    let directory = String::from_utf8(built.stdout)?;
    let program = Path::new(directory.trim()).join("liveupdate");
    let mut samples = Vec::new();
    for _ in 0..ROUNDS {
        let mut command = Command::new(perennial);
        command.args(["luo", "emulate", "--"]).arg(&program);
        let (output, took) = timed(|| command.output());
        let output = output?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stdout).into_owned().into());
        }
        samples.push(took);
    }
    Ok(Samples::new(samples))
}
