//! `perennial preflight`: what would stand in the way of a live update, without a running host.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::output;
use crate::config::{Config, ConfigError};
use crate::host;
use crate::live_update::next_kernel::{Candidate, NextKernel};
use crate::live_update::preflight::{self, Finding, Severity, Surroundings};

/// Exit status if an update would be refused.
pub(super) const REFUSED: u8 = 3;

/// Looks at the files of the next kernel and at the running one. A running host knows more: its VMs, and which LUO
/// carries them (`perennial ctl preflight`).
///
/// The exit status is 0 if an update would not be refused, 3 if it would, and 1 if that cannot be found out.
/// docs/preflight.md describes the findings.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The host's configuration; its `[update]` says what is not given here
    #[arg(long, value_name = "FILE", default_value = host::IMAGE_CONFIG)]
    config: PathBuf,
    #[command(flatten)]
    next: NextFiles,
    /// The next host is a service of a distribution, and not the first process of the next kernel
    #[arg(long)]
    service: bool,
    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
}

/// The next kernel, its initramfs and its command line.
#[derive(Debug, Args)]
pub(super) struct NextFiles {
    /// The next kernel, instead of the one in the configuration
    #[arg(long, value_name = "FILE", value_parser = absolute)]
    pub(super) kernel: Option<PathBuf>,
    /// Its initramfs
    #[arg(long, value_name = "FILE", value_parser = absolute)]
    pub(super) initramfs: Option<PathBuf>,
    /// Its command line; the parameters that a live update needs are added
    #[arg(long)]
    pub(super) cmdline: Option<String>,
}

/// A path as the host can use it, which has another working directory than the person who types it.
pub(super) fn absolute(path: &str) -> io::Result<PathBuf> {
    std::path::absolute(path)
}

/// There is nothing to look at.
#[derive(Debug, thiserror::Error)]
pub(super) enum PreflightError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("no kernel to look at: name one with --kernel, or in [update] of {}", config.display())]
    NoKernel { config: PathBuf },
}

pub(super) fn run(arguments: Arguments) -> Result<ExitCode, PreflightError> {
    let Arguments { config: path, next, service, json } = arguments;
    let NextFiles { kernel, initramfs, cmdline } = next;
    let is_needed = kernel.is_none() || cmdline.is_none();
    let config = match Config::read(&path) {
        Err(ConfigError::Read { .. }) if !is_needed => Config::default(),
        config => config?,
    };
    let update = config.update;
    let next = NextKernel {
        rehearsed: None,
        kernel: kernel.or(update.kernel).ok_or(PreflightError::NoKernel { config: path })?,
        initramfs: initramfs.or(update.initramfs),
        cmdline: cmdline.unwrap_or(update.cmdline),
        forced: Vec::new(),
    };
    // As the host would choose.
    let is_in_pool = config.host.pool.is_some() && !Path::new("/dev/liveupdate").exists();
    let surroundings = Surroundings { is_first_process: !service, ..Surroundings::without_vms() };
    let findings = preflight::run(&Candidate::look(&next, is_in_pool), &surroundings);
    let refused = !preflight::refusals(&findings, &[]).is_empty();
    match json {
        true => {
            output::line(format_args!("{:#}", json!({ "refused": refused, "findings": findings })))
        }
        false => print(&findings),
    }
    Ok(if refused { ExitCode::from(REFUSED) } else { ExitCode::SUCCESS })
}

/// Prints findings, one a line, and what they amount to.
pub(super) fn print(findings: &[Finding]) {
    for finding in findings {
        output::line(finding);
    }
    let count = |severity| findings.iter().filter(|f| f.severity == severity).count();
    let [refusals, warnings, notes] =
        [Severity::Refusal, Severity::Warning, Severity::Note].map(count);
    let verdict = if refusals == 0 { "nothing stands in the way" } else { "it would be refused" };
    let counts = format!("{refusals} refusals, {warnings} warnings, {notes} notes");
    output::line(format_args!("update: {verdict} ({counts})"));
}
