//! `perennial state`: a state document for people.

use std::fs;
use std::io;
use std::path::PathBuf;

use clap::Subcommand;

use crate::state::StateError;
use crate::state::document::{self, Detail};
use crate::vm::MachineStateV1;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Print a state document as device tree source
    Show {
        /// The document
        file: PathBuf,
        /// Print long byte arrays whole
        #[arg(long)]
        full: bool,
    },
    /// Decode a state document completely, as a restore would, and say whether it is sound
    Check {
        /// The document
        file: PathBuf,
    },
}

#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("cannot read {}", file.display())]
    Read {
        file: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{}", file.display())]
    State {
        file: PathBuf,
        #[source]
        source: StateError,
    },
}

pub(super) fn run(command: Command) -> Result<(), Error> {
    let (Command::Show { file, .. } | Command::Check { file }) = &command;
    let bytes = fs::read(file).map_err(|source| Error::Read { file: file.clone(), source })?;
    let error = |source| Error::State { file: file.clone(), source };
    match command {
        Command::Show { full, .. } => {
            let detail = if full { Detail::Full } else { Detail::Brief };
            let root = document::decode(&bytes).map_err(error)?;
            print!("{}", document::show(&root, detail));
        }
        Command::Check { .. } => {
            let state: MachineStateV1 = document::read_document(&bytes).map_err(error)?;
            println!(
                "{}: a sound state document of VM `{}` with {} vCPUs and {} MiB of RAM",
                file.display(),
                state.machine.name,
                state.vcpus.len(),
                state.machine.ram_bytes >> 20
            );
        }
    }
    Ok(())
}
