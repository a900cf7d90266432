//! The command line: `perennial host`, `ctl`, `state`, `luo`, and the internal `vmm`.

mod ctl;
mod luo;
mod state;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::causes::chain;
use crate::guests::process::is_vm_process;
use crate::host::{self, init};
use crate::live_update::next_host;
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
    /// Talk to a running host
    Ctl(ctl::Arguments),
    /// Print or check state documents
    #[command(subcommand)]
    State(state::Command),
    /// Use the Live Update Orchestrator without a kernel that has it
    #[command(subcommand)]
    Luo(luo::Command),
    /// The process of one VM; the host starts it, with the link as its standard input
    #[command(hide = true)]
    Vmm,
}

/// Runs the command of the command line; as PID 1, runs the host. `started` is the TSC at the start of the
/// process.
pub fn main(started: u64) -> ExitCode {
    let inherited = next_host::inherit();
    if init::is_pid_1() && !is_vm_process() {
        if inherited.is_none() {
            init::set_up();
        }
        log();
        let result = host::run(Path::new(host::IMAGE_CONFIG), started, inherited);
        report(&result);
        init::power_off();
    }
    log();
    match Arguments::parse().command {
        Command::Host { config } => exit(host::run(&config, started, inherited)),
        Command::Vmm => exit(vm::serve::run()),
        Command::Ctl(arguments) => exit(ctl::run(arguments)),
        Command::State(command) => exit(state::run(command)),
        Command::Luo(command) => luo::run(command),
    }
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
        eprintln!("perennial: {}", chain(error).join(": "));
    }
}

fn log() {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(false)
        .without_time()
        .init();
}
