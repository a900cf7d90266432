//! `perennial luo`: prints handover trees, and runs programs with an emulated `/dev/liveupdate`.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ::luo::builtin::tree::{Handover, v1};
use clap::Subcommand;

#[cfg(not(feature = "luo-tools"))]
mod left_out;
#[cfg(feature = "luo-tools")]
mod tools;

#[cfg(not(feature = "luo-tools"))]
use left_out as tools;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run a program with a /dev/liveupdate that is served by the built-in orchestrator
    ///
    /// The program runs unmodified, even a static one. When it calls reboot(2) to kexec, it is started
    /// again as the next kernel's first process, with its sessions handed over. With --state, the run
    /// ends there instead: preserved memory goes to a file in the directory, and the next run with the
    /// same directory is the next kernel. A run that ends without a kexec leaves the directory as it was.
    /// PERENNIAL_LIVEUPDATE_NUMBER in the program's environment is the number of live updates so far.
    ///
    /// The exit status is the program's, or 128 plus the number of the signal that ended it; 0 after a
    /// kexec; 125 if it could not be supervised, 126 or 127 if it could not be started.
    Emulate {
        /// The directory with the sessions of the previous run; this run leaves its sessions there
        #[arg(long, value_name = "DIR")]
        state: Option<PathBuf>,
        /// Kexec when the program exits with 0; processes that it leaves running keep its sessions open
        /// until then
        #[arg(long, requires = "state")]
        kexec: bool,
        /// The program, and its arguments
        #[arg(required = true, trailing_var_arg = true, value_name = "PROGRAM")]
        program: Vec<OsString>,
    },
    /// Print a handover tree: sessions, files and their tokens
    Show {
        /// The tree: `tree-N.dtb` of a state directory, or the 32 bytes of Linux's `struct luo_ser`
        file: PathBuf,
        /// The memory that the addresses in the tree point to: a file of pages, each preceded by its
        /// address (8 bytes, little-endian)
        #[arg(long, value_name = "FILE")]
        pages: Option<PathBuf>,
    },
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Tools(#[from] tools::Error),
    #[error("cannot read {}", file.display())]
    Read {
        file: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{}", file.display())]
    V1 {
        file: PathBuf,
        #[source]
        source: v1::Error,
    },
}

impl Error {
    fn code(&self) -> u8 {
        match self {
            Self::Tools(error) => error.code(),
            _ => 1,
        }
    }
}

pub(super) fn run(command: Command) -> ExitCode {
    let result = match command {
        Command::Emulate { state, kexec, program } => {
            tools::emulate(state, kexec, program).map_err(Error::Tools)
        }
        Command::Show { file, pages } => show(&file, pages.as_deref()).map(|()| ExitCode::SUCCESS),
    };
    super::report(&result);
    result.unwrap_or_else(|error| error.code().into())
}

fn show(file: &Path, pages: Option<&Path>) -> Result<(), Error> {
    super::output::print(tree(file, pages)?);
    Ok(())
}

/// Reads a tree of any layout. `pages` is the file with the memory that the tree points to.
fn tree(file: &Path, pages: Option<&Path>) -> Result<Handover, Error> {
    let bytes = read(file)?;
    // The kernel's layout begins with `luo-`, an FDT with a magic number. Two layouts are FDTs; of these
    // only the seed's points to memory.
    if bytes.starts_with(b"luo-") || pages.is_some() {
        let pages = pages.map(|pages| Ok::<_, Error>((pages, read(pages)?))).transpose()?;
        return Ok(tools::tree(file, &bytes, pages)?);
    }
    v1::decode(&bytes).map_err(|source| Error::V1 { file: file.to_owned(), source })
}

fn read(file: &Path) -> Result<Vec<u8>, Error> {
    fs::read(file).map_err(|source| Error::Read { file: file.to_owned(), source })
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
    fn options_after_the_program_are_passed_to_the_program() {
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
    fn incomplete_arguments_are_refused() {
        for words in ["emulate", "emulate --kexec true", "emulate --state", "show"] {
            assert!(parse(words).is_err(), "{words}");
        }
    }

    #[test]
    fn a_tree_of_this_program_is_read_by_every_build() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../luo/golden");
        let tree = tree(&golden.join("luo-v1-inline.dtb"), None).unwrap();
        assert!(!tree.sessions.is_empty());
    }
}
