//! `perennial luo`: the Live Update Orchestrator for people, and for programs that have none.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ::luo::builtin::tree::memory::{PAGE_BYTES, SimulatedMemory};
use ::luo::builtin::tree::{Handover, v1, v5};
use ::luo::emulate::{self, Exit, Options, Program};
use clap::Subcommand;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run a program with a /dev/liveupdate that is served by the built-in orchestrator
    ///
    /// The program runs as it is, also if it is static. When it calls reboot(2) for the next kernel,
    /// it is started again as that kernel's first process, with its sessions handed over; with
    /// --state this run ends there, preserved memory goes to a file in the directory, and the next run
    /// with the same directory is the next kernel. A run that does not end so leaves it as it was.
    /// PERENNIAL_LIVEUPDATE_NUMBER in its environment says how many live updates there were.
    ///
    /// The exit status is the program's, or 128 and the number of the signal that ended it; 0 after
    /// a switch; 125 if it could not be supervised, 126 or 127 if it could not be started.
    Emulate {
        /// Where the previous kernel left its sessions, and where this one leaves them
        #[arg(long, value_name = "DIR")]
        state: Option<PathBuf>,
        /// Switch to the next kernel when the program ends with 0; what it leaves running holds its
        /// sessions until then
        #[arg(long, requires = "state")]
        kexec: bool,
        /// The program, and its arguments
        #[arg(required = true, trailing_var_arg = true, value_name = "PROGRAM")]
        program: Vec<OsString>,
    },
    /// Print a handover tree: sessions, files, and what they are retrieved by
    Show {
        /// The tree: `tree-N.dtb` of a state directory, or the 32 bytes of Linux's `struct luo_ser`
        file: PathBuf,
        /// The memory that the addresses in the tree point to: pages, each behind its address (8
        /// bytes, little-endian)
        #[arg(long, value_name = "FILE")]
        pages: Option<PathBuf>,
    },
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Emulate(#[from] emulate::Error),
    #[error("cannot read {}", file.display())]
    Read {
        file: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is no row of pages: it has {bytes} bytes", file.display())]
    Pages { file: PathBuf, bytes: usize },
    #[error("{}", file.display())]
    V1 {
        file: PathBuf,
        #[source]
        source: v1::Error,
    },
    #[error("{}", file.display())]
    V5 {
        file: PathBuf,
        #[source]
        source: v5::Error,
    },
}

impl Error {
    /// As `env` and `timeout` say it.
    fn code(&self) -> u8 {
        match self {
            Self::Emulate(emulate::Error::Start { source, .. }) => match source.kind() {
                io::ErrorKind::NotFound => 127,
                _ => 126,
            },
            Self::Emulate(_) => 125,
            _ => 1,
        }
    }
}

pub(super) fn run(command: Command) -> ExitCode {
    let result = match command {
        Command::Emulate { state, kexec, program } => emulate(state, kexec, program),
        Command::Show { file, pages } => show(&file, pages.as_deref()).map(|()| ExitCode::SUCCESS),
    };
    super::report(&result);
    result.unwrap_or_else(|error| error.code().into())
}

fn emulate(state: Option<PathBuf>, kexec: bool, program: Vec<OsString>) -> Result<ExitCode, Error> {
    let mut words = program.into_iter();
    let path = words.next().unwrap_or_default();
    let program = Program { path, arguments: words.collect() };
    let code = match emulate::run(&program, &Options { state, kexec })? {
        Exit::Status(status) => status,
        Exit::Signal(signal) => 128 + signal,
    };
    // A status has eight bits, and so has a signal above 128.
    Ok(ExitCode::from(code as u8))
}

fn show(file: &Path, pages: Option<&Path>) -> Result<(), Error> {
    print!("{}", tree(file, pages)?);
    Ok(())
}

/// Reads a tree of any layout. What points to memory is read with `pages`.
fn tree(file: &Path, pages: Option<&Path>) -> Result<Handover, Error> {
    let bytes = read(file)?;
    let memory = pages.map_or_else(|| Ok(SimulatedMemory::new()), read_pages)?;
    let v1 = |source| Error::V1 { file: file.to_owned(), source };
    let v5 = |source| Error::V5 { file: file.to_owned(), source };
    // The kernel's layout starts with its name, an FDT with a number.
    if bytes.starts_with(b"luo-") {
        v5::decode(&bytes, &memory).map_err(v5)
    } else if pages.is_some() {
        v1::seed::decode(&bytes, &memory).map_err(v1)
    } else {
        v1::decode(&bytes).map_err(v1)
    }
}

fn read(file: &Path) -> Result<Vec<u8>, Error> {
    fs::read(file).map_err(|source| Error::Read { file: file.to_owned(), source })
}

fn read_pages(file: &Path) -> Result<SimulatedMemory, Error> {
    const ADDRESS_BYTES: usize = size_of::<u64>();
    let bytes = read(file)?;
    let (rows, rest) = bytes.as_chunks::<{ ADDRESS_BYTES + PAGE_BYTES }>();
    if !rest.is_empty() {
        return Err(Error::Pages { file: file.to_owned(), bytes: bytes.len() });
    }
    let mut memory = SimulatedMemory::new();
    for row in rows {
        let (mut address, mut page) = ([0; ADDRESS_BYTES], [0; PAGE_BYTES]);
        address.copy_from_slice(&row[..ADDRESS_BYTES]);
        page.copy_from_slice(&row[ADDRESS_BYTES..]);
        memory.insert(u64::from_le_bytes(address), page);
    }
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn parse(words: &str) -> Result<Command, clap::Error> {
        let words = ["perennial", "luo"].into_iter().chain(words.split(' '));
        match crate::cli::Arguments::try_parse_from(words)?.command {
            crate::cli::Command::Luo(command) => Ok(command),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_programs_options_are_the_programs() {
        for words in [
            "emulate --state here --kexec -- test -s 1 --state there",
            "emulate --state here --kexec test -s 1 --state there",
        ] {
            let Ok(Command::Emulate { state, kexec: true, program }) = parse(words) else {
                panic!("{words}");
            };
            assert_eq!(state, Some("here".into()));
            assert_eq!(program, ["test", "-s", "1", "--state", "there"]);
        }
    }

    #[test]
    fn what_has_no_sense_is_refused() {
        for words in ["emulate", "emulate --kexec true", "emulate --state", "show"] {
            assert!(parse(words).is_err(), "{words}");
        }
    }

    #[test]
    fn trees_of_every_layout_are_read() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../luo/golden");
        for (file, pages) in [
            ("luo-v1-inline.dtb", None),
            ("luo-v1-seed.dtb", Some("luo-v1-seed.pages")),
            ("luo-v5.ser", Some("luo-v5.pages")),
        ] {
            let pages = pages.map(|pages| golden.join(pages));
            let tree = tree(&golden.join(file), pages.as_deref()).unwrap();
            assert!(!tree.sessions.is_empty(), "{file}");
        }
    }

    #[test]
    fn a_tree_without_its_memory_is_an_error() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../luo/golden");
        for file in ["luo-v1-seed.dtb", "luo-v5.ser", "luo-v5.pages"] {
            assert!(tree(&golden.join(file), None).is_err(), "{file}");
        }
        let pages = golden.join("luo-v5.ser");
        let error = tree(&golden.join("luo-v5.ser"), Some(&pages)).unwrap_err();
        assert!(error.to_string().contains("is no row of pages: it has 32 bytes"));
    }

    #[test]
    fn a_program_that_is_not_there_has_the_status_of_the_shell() {
        for (kind, code) in [(io::ErrorKind::NotFound, 127), (io::ErrorKind::PermissionDenied, 126)]
        {
            let program = "x".into();
            let error = Error::Emulate(emulate::Error::Start { program, source: kind.into() });
            assert_eq!(error.code(), code);
        }
    }
}
