//! `perennial run`: one VM in the foreground, described on the command line in Cloud Hypervisor's dialect.
//!
//! The command line becomes the text of a configuration with one VM. It is read as the file of a host is:
//! checks and errors are the same, and a new kind of device needs nothing here.

mod devices;
mod foreign;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{ArgAction, Args};
use rustix::stdio::{dup2_stderr, stderr};
use tracing::level_filters::LevelFilter;

use super::terminal::Terminal;
use crate::config::{BootFrom, Config, ConfigError};
use crate::devices::catalog::KINDS;
use crate::devices::{inherited, terminal};
use crate::host::{self, HostError, alone};
use crate::options::Options;
use devices::{DeviceArguments, ForeignArguments};
pub(super) use foreign::qemu;

/// Name of the VM in the API and in messages.
const NAME: &str = "vm";

#[derive(Debug, Clone, Args)]
pub(super) struct Arguments {
    /// The guest's kernel: a bzImage or a PVH ELF kernel. Without it the guest boots what is on its first disk
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The guest's initramfs
    #[arg(long, value_name = "FILE")]
    initramfs: Option<PathBuf>,
    /// The command line of the guest's kernel, such as "console=ttyS0 root=/dev/vda"
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// Number of vCPUs: boot=N, or N
    #[arg(long, value_name = "OPTIONS", default_value = "boot=1")]
    cpus: String,
    /// RAM: size=2G, or 2G
    #[arg(long, value_name = "OPTIONS", default_value = "size=512M")]
    memory: String,
    #[command(flatten)]
    devices: DeviceArguments,
    /// A virtio-console: off, because there is none
    #[arg(long, value_name = "off")]
    console: Option<String>,
    /// Serve the API on this socket, for `perennial ctl --socket PATH`; the VM is called `vm`
    #[arg(long, value_name = "PATH")]
    api_socket: Option<String>,
    /// Append the log to this file instead of writing it to standard error
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// Log more than warnings; twice for still more
    #[arg(short, action = ArgAction::Count)]
    verbose: u8,
    #[command(flatten)]
    foreign: ForeignArguments,
}

/// The VM of a command line cannot be run.
#[derive(Debug, thiserror::Error)]
pub(super) enum RunError {
    #[error(
        "the guest needs a kernel: name a bzImage or a PVH ELF kernel with `--kernel FILE`, or only a disk \
         that has one with `--disk path=FILE`"
    )]
    NoKernel,
    #[error("Cloud Hypervisor has `--{option}`, Perennial has not{}", or_else(remedy))]
    Foreign { option: String, remedy: &'static str },
    #[error("--{option} {value}: {problem}")]
    Option { option: String, value: String, problem: String },
    #[error("--{option} {}: the path is not UTF-8, so no configuration can name it", path.display())]
    NotText { option: &'static str, path: PathBuf },
    #[error("the command line cannot be written as a configuration")]
    Text(#[from] toml::ser::Error),
    #[error(transparent)]
    Config(ConfigError),
    #[error("cannot open the log {}", path.display())]
    Log {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot use the terminal")]
    Terminal(#[from] io::Error),
    #[error(transparent)]
    Host(#[from] HostError),
}

fn or_else(remedy: &str) -> String {
    match remedy {
        "" => ": leave it out".to_owned(),
        remedy => format!(": {remedy}"),
    }
}

impl Arguments {
    /// How much is logged: warnings, and one level more for each `-v`.
    pub(super) fn level(&self) -> LevelFilter {
        match self.verbose {
            0 => LevelFilter::WARN,
            1 => LevelFilter::INFO,
            2 => LevelFilter::DEBUG,
            _ => LevelFilter::TRACE,
        }
    }

    /// The configuration, as the text of a file.
    fn to_config(&self) -> Result<String, RunError> {
        self.check_foreign()?;
        self.check_console()?;
        let mut vm = toml::Table::new();
        let mut put = |key: &str, value: toml::Value| vm.insert(key.to_owned(), value);
        put("name", NAME.into());
        put("memory", self.memory_option().into());
        put("cpus", i64::from(self.vcpus()?).into());
        match &self.kernel {
            Some(kernel) => put("kernel", text("kernel", kernel)?.into()),
            None if self.has_disk() && self.initramfs.is_none() => {
                put("boot", toml::Value::try_from(BootFrom::Disk)?)
            }
            None => return Err(RunError::NoKernel),
        };
        if let Some(initramfs) = &self.initramfs {
            put("initramfs", text("initramfs", initramfs)?.into());
        }
        put("cmdline", self.cmdline.clone().unwrap_or_default().into());
        for (key, values) in &self.devices.values {
            put(key, values.clone().into());
        }
        let mut file = toml::Table::new();
        file.insert("vm".to_owned(), vec![vm].into());
        if let Some(socket) = self.socket()? {
            let mut host = toml::Table::new();
            host.insert("socket".to_owned(), socket.into());
            file.insert("host".to_owned(), host.into());
        }
        Ok(toml::to_string(&file)?)
    }

    /// Whether there is a disk that the guest may boot from.
    fn has_disk(&self) -> bool {
        let boots = |key| KINDS.iter().any(|kind| kind.key == key && kind.boots_from.is_some());
        self.devices.values.iter().any(|(key, _)| boots(*key))
    }

    fn memory_option(&self) -> String {
        match self.memory.contains('=') {
            true => foreign::without_harmless("memory", &self.memory),
            false => format!("size={}", self.memory),
        }
    }

    fn vcpus(&self) -> Result<u32, RunError> {
        let text = match self.cpus.contains('=') {
            true => foreign::without_harmless("cpus", &self.cpus),
            false => format!("boot={}", self.cpus),
        };
        let number = |options: &Options<'_>, key| match options.get(key) {
            None => Ok(None),
            Some(value) => {
                let number = value.parse::<u32>().map(Some);
                number.map_err(|_| format!("{key} is a number of vCPUs, not `{value}`"))
            }
        };
        let parse = || -> Result<u32, String> {
            let options = Options::parse(&text, &["boot", "max"])?;
            let boot = number(&options, "boot")?.ok_or("it must be of the form boot=2")?;
            match number(&options, "max")? {
                Some(max) if max != boot => {
                    Err(format!("max must be {boot} like boot, because no vCPU is added later"))
                }
                _ => Ok(boot),
            }
        };
        parse().map_err(|problem| option_error("cpus", &self.cpus, problem))
    }

    fn check_foreign(&self) -> Result<(), RunError> {
        match self.foreign.given.first() {
            Some((option, remedy)) => Err(RunError::Foreign { option: option.clone(), remedy }),
            None => Ok(()),
        }
    }

    fn check_console(&self) -> Result<(), RunError> {
        match self.console.as_deref() {
            None | Some("off" | "null") => Ok(()),
            Some(other) => {
                let problem = "there is no virtio-console: use `--serial` and `console=ttyS0` in \
                               --cmdline, with `--console off` or without";
                Err(option_error("console", other, problem.to_owned()))
            }
        }
    }

    /// The path of the API socket, which may be written as `path=PATH`.
    fn socket(&self) -> Result<Option<String>, RunError> {
        let Some(given) = &self.api_socket else { return Ok(None) };
        let path = match given.split_once('=') {
            Some(("path", path)) => path,
            Some(("fd", _)) => "",
            _ => given,
        };
        match path {
            "" => {
                let problem = "it must name a path: --api-socket PATH".to_owned();
                Err(option_error("api-socket", given, problem))
            }
            path => Ok(Some(path.to_owned())),
        }
    }

    /// What a person may wonder about who sees nothing on the serial port.
    fn hints(&self) -> Option<&'static str> {
        if self.kernel.as_deref().is_some_and(is_firmware) {
            return Some(
                "no firmware is needed: without --kernel the guest boots what is on its first disk",
            );
        }
        let cmdline = self.cmdline.as_deref().unwrap_or_default();
        let mut consoles = cmdline.split_whitespace().filter_map(|w| w.strip_prefix("console="));
        match consoles.next() {
            Some(console) if consoles.next().is_none() && console.starts_with("hvc") => {
                Some("there is no virtio-console: write `console=ttyS0` in --cmdline")
            }
            // What is on a disk has a command line of its own.
            None if self.devices.use_terminal() && self.kernel.is_some() => {
                Some("a Linux guest prints nothing without `console=ttyS0` in --cmdline")
            }
            _ => None,
        }
    }
}

/// Whether this is one of the firmwares by which Cloud Hypervisor boots the image of a cloud.
fn is_firmware(kernel: &Path) -> bool {
    let name = kernel.file_name().unwrap_or_default().to_string_lossy();
    name.starts_with("hypervisor-fw") || name.starts_with("CLOUDHV")
}

fn text(option: &'static str, path: &Path) -> Result<String, RunError> {
    let not_text = || RunError::NotText { option, path: path.to_owned() };
    path.to_str().map(str::to_owned).ok_or_else(not_text)
}

/// The error for one value. If Cloud Hypervisor has a key in it that Perennial has not, says so.
fn option_error(option: &str, value: &str, problem: String) -> RunError {
    let problem = match foreign::key(option, &problem) {
        Some((key, remedy)) => {
            format!("Cloud Hypervisor has `{key}` here, Perennial has not{}", or_else(remedy))
        }
        None => problem,
    };
    RunError::Option { option: option.to_owned(), value: value.to_owned(), problem }
}

/// Reads the text of a configuration. All VMs of `perennial run` have one name, so what tells guests apart is random
/// where the command line does not say it. It stays for as long as the command runs, over resets of the guest too.
fn parse(text: &str) -> Result<Config, RunError> {
    let mut config = Config::parse(text).map_err(config_error)?;
    let devices = config.machines.iter_mut().flat_map(|machine| &mut machine.devices);
    devices.for_each(|device| device.options.make_unique());
    Ok(config)
}

/// An error of the configuration in the words of the command line.
fn config_error(error: ConfigError) -> RunError {
    match error {
        ConfigError::Option { key, value, problem, .. } => option_error(&key, &value, problem),
        other => RunError::Config(other),
    }
}

/// Standard error is a file for as long as this lives, for this process and the VM's.
struct LogFile {
    before: OwnedFd,
}

impl LogFile {
    fn open(path: &Path) -> Result<Self, RunError> {
        let open = || -> io::Result<Self> {
            let file: File = OpenOptions::new().create(true).append(true).open(path)?;
            let before = rustix::io::fcntl_dupfd_cloexec(stderr(), 3)?;
            dup2_stderr(&file)?;
            Ok(Self { before })
        };
        open().map_err(|source| RunError::Log { path: path.to_owned(), source })
    }
}

impl Drop for LogFile {
    fn drop(&mut self) {
        let _ = dup2_stderr(&self.before);
    }
}

/// Runs the VM until it powers off, fails, or the user leaves. Failure is a VM that failed.
pub(super) fn run(arguments: &Arguments) -> Result<ExitCode, RunError> {
    arguments.check_foreign()?;
    inherited::lend();
    let mut arguments = arguments.clone();
    let completed = arguments.devices.complete();
    completed.map_err(|(option, value, problem)| option_error(option, &value, problem))?;
    let text = arguments.to_config()?;
    let config = parse(&text)?;
    if let Some(hint) = arguments.hints() {
        eprintln!("perennial: {hint}");
    }
    let _log = arguments.log_file.as_deref().map(LogFile::open).transpose()?;
    let console = Terminal::open()?;
    let lines = console.lines()?;
    terminal::lend(move |line| lines.add(OwnedFd::from(line).into()));
    let ended = host::alone::run(config, text, console.left()?)?;
    drop(console);
    match ended {
        alone::Ended::Stopped => Ok(ExitCode::SUCCESS),
        // The reason is in the log.
        alone::Ended::Failed => Ok(ExitCode::FAILURE),
    }
}

#[cfg(test)]
mod tests;
