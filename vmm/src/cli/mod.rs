//! The command line: `perennial host`, `run`, `console`, `ctl`, `preflight`, `state`, `luo`, and the internal `vmm` and `dhcp`.

#![deny(clippy::print_stdout, reason = "it panics if nobody reads: see `output`")]

mod console;
mod ctl;
mod log;
mod luo;
mod output;
mod preflight;
mod request;
mod run;
mod state;
mod terminal;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT};
use tracing::level_filters::LevelFilter;

use crate::causes::chain;
use crate::confine::trial;
use crate::guests::process::is_vm_process;
use crate::host::{self, dhcp, init, rehearsal};
use crate::link::PROTOCOL;
use crate::live_update::next_host;
use crate::live_update::programs::own_version;
use crate::vm;

/// A hypervisor host whose VMs outlive its kernel.
#[derive(Debug, Parser)]
#[command(name = "perennial", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the host: start, watch and live-update the VMs of a configuration
    Host {
        /// The configuration
        #[arg(long, value_name = "FILE", default_value = host::IMAGE_CONFIG)]
        config: PathBuf,
    },
    /// Run one VM in the foreground, with the options of Cloud Hypervisor
    Run(Box<run::Arguments>),
    /// Attach the terminal to the console of a VM of a running host
    Console(console::Arguments),
    /// Talk to a running host
    Ctl(ctl::Arguments),
    /// Say what would stand in the way of a live update, by looking at the files and the running kernel
    Preflight(preflight::Arguments),
    /// Print or check state documents
    #[command(subcommand)]
    State(state::Command),
    /// Use the Live Update Orchestrator without a kernel that has it
    #[command(subcommand)]
    Luo(luo::Command),
    /// The process of one VM; the host starts it, with the link as its standard input
    #[command(hide = true)]
    Vmm {
        /// How much to log
        #[arg(long, default_value_t = LevelFilter::INFO)]
        log: LevelFilter,
        /// Print the number of the protocol with the host, and do nothing else
        #[arg(long)]
        protocol: bool,
    },
    /// The process around a program that is tried; the host starts it
    #[command(hide = true)]
    Try {
        /// What the host passes
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<OsString>,
    },
    /// The process that speaks DHCP for the host; the host starts it, with its sockets as standard input
    /// and output
    #[command(hide = true)]
    Dhcp {
        /// How much to log
        #[arg(long, default_value_t = LevelFilter::INFO)]
        log: LevelFilter,
        /// The user and group ID to change to
        #[arg(long)]
        user: u32,
        /// The address of the uplink
        #[arg(long)]
        mac: String,
    },
}

/// Runs the command of the command line; as PID 1, runs the host. `started` is the TSC at the start of the
/// process.
pub fn main(started: u64) -> ExitCode {
    let inherited = next_host::inherit();
    if init::is_pid_1() && !is_vm_process() && !dhcp::is_dhcp_process() && !trial::is_trial() {
        if inherited.is_none() {
            init::set_up();
        }
        log::start(LevelFilter::INFO);
        if inherited.is_none() && rehearsal::is_one(Path::new("/")) {
            rehearsal::run();
            init::power_off();
        }
        let result = host::run(Path::new(host::IMAGE_CONFIG), started, inherited);
        report(&result);
        init::power_off();
    }
    let words: Vec<_> = std::env::args_os().skip(1).collect();
    if let Some((option, instead)) = run_like_qemu(&words) {
        eprintln!("perennial: QEMU has `{option}`; here it is {instead}");
        return ExitCode::from(USAGE);
    }
    let command = match Arguments::try_parse() {
        Ok(arguments) => arguments.command,
        Err(answer) if answer.kind() == ErrorKind::DisplayVersion => {
            output::line(format_args!("perennial {}", own_version()));
            return ExitCode::SUCCESS;
        }
        Err(answer) => answer.exit(),
    };
    log::start(match &command {
        Command::Run(arguments) => arguments.level(),
        Command::Vmm { log, .. } | Command::Dhcp { log, .. } => *log,
        _ => LevelFilter::INFO,
    });
    match command {
        Command::Host { config } => exit(host::run(&config, started, inherited)),
        Command::Run(arguments) => exit_with(run::run(&arguments)),
        Command::Vmm { protocol: true, .. } => {
            output::line(PROTOCOL);
            ExitCode::SUCCESS
        }
        Command::Vmm { .. } => {
            ignore_keys();
            exit(vm::serve::run())
        }
        Command::Dhcp { log: _, user, mac } => exit(dhcp::run_process(user, &mac)),
        Command::Try { words } => ExitCode::from(trial::surround(words)),
        Command::Console(arguments) => exit(console::run(&arguments)),
        Command::Ctl(arguments) => exit_with(ctl::run(arguments)),
        Command::Preflight(arguments) => exit_with(preflight::run(arguments)),
        Command::State(command) => exit(state::run(command)),
        Command::Luo(command) => luo::run(command),
    }
}

/// The exit status after a wrong command line, as that of `clap`.
const USAGE: u8 = 2;

/// If this is `perennial run` with an option of QEMU, returns that and what to write here.
fn run_like_qemu(words: &[OsString]) -> Option<(String, &'static str)> {
    let (command, words) = words.split_first()?;
    if command == "run" { run::qemu(words) } else { None }
}

/// Lets the signals of a terminal's keys and of its end do nothing: they go to all processes in the
/// foreground, and the host decides what becomes of its VMs.
fn ignore_keys() {
    for signal in [SIGINT, SIGQUIT, SIGHUP] {
        let noticed = Arc::new(AtomicBool::new(false));
        if let Err(error) = signal_hook::flag::register(signal, noticed) {
            tracing::warn!("signal {signal} will end this VM: {error}");
        }
    }
}

/// Returns the exit status of a command that chooses it.
fn exit_with<E: std::error::Error>(result: Result<ExitCode, E>) -> ExitCode {
    report(&result);
    result.unwrap_or(ExitCode::FAILURE)
}

fn exit<E: std::error::Error>(result: Result<(), E>) -> ExitCode {
    report(&result);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Prints an error once, with all its causes in one line.
fn report<T, E: std::error::Error>(result: &Result<T, E>) {
    if let Err(error) = result {
        log::say(&format!("perennial: {}\n", chain(error).join(": ")));
    }
}
