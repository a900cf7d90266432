//! `perennial state`: prints and checks state documents.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::Subcommand;

use super::output;
use crate::causes::chain;
use crate::config::Config;
use crate::live_update::index::Index;
use crate::live_update::manifest::{CARRIES_ON, Manifest, REFUSES_CONFIG, TAKES_SIGNALS};
use crate::state::document::{self, Detail};
use crate::state::node::read_node;
use crate::state::{Reader, Schema, StateError};
use crate::vm::VmStateV1;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Print a state document as device tree source
    Show {
        /// The document
        file: PathBuf,
        /// Print long byte arrays completely
        #[arg(long)]
        full: bool,
    },
    /// Decode state documents completely, as a restore would, and say whether they are sound
    Check {
        /// State documents of VMs, manifests or indexes
        #[arg(required = true)]
        files: Vec<PathBuf>,
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
    match command {
        Command::Show { file, full } => {
            let detail = if full { Detail::Full } else { Detail::Brief };
            let root = document::decode(&read(&file)?).map_err(|e| state_error(&file, e))?;
            output::print(document::show(&root, detail));
        }
        Command::Check { files } => {
            for file in files {
                let what = check(&read(&file)?).map_err(|source| state_error(&file, source))?;
                output::line(format_args!("{}: {what}", file.display()));
            }
        }
    }
    Ok(())
}

fn read(file: &Path) -> Result<Vec<u8>, Error> {
    fs::read(file).map_err(|source| Error::Read { file: file.to_owned(), source })
}

fn state_error(file: &Path, source: StateError) -> Error {
    Error::State { file: file.to_owned(), source }
}

/// Decodes a document completely, and returns a description of it.
fn check(bytes: &[u8]) -> Result<String, StateError> {
    let root = document::decode(bytes)?;
    let reader = Reader::new(&root, "")?;
    if Manifest::COMPATIBLE.iter().any(|binding| reader.is_compatible(binding)) {
        let manifest: Manifest = read_node(&root, "")?;
        let sound = format!(
            "a sound manifest of a host on {} with {} VMs; {CARRIES_ON}; {TAKES_SIGNALS}",
            manifest.kernel,
            manifest.vms.len()
        );
        return Ok(match Config::parse(&manifest.config) {
            Ok(_) => sound,
            // The VMs come over without it, so the manifest is sound.
            Err(error) => {
                let why = chain(&error).join(": ").replace('\n', "; ");
                format!("{sound}; {REFUSES_CONFIG}: {why}")
            }
        });
    }
    if root.is_compatible(Index::COMPATIBLE[0]) {
        let index: Index = read_node(&root, "")?;
        return Ok(format!("a sound index of {} sessions", index.sessions.len()));
    }
    let state: VmStateV1 = read_node(&root, "")?;
    Ok(format!(
        "a sound state document of VM `{}` with {} vCPUs and {} MiB of RAM",
        state.machine.name,
        state.vcpus.len(),
        state.machine.ram_bytes >> 20
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live_update::manifest::refused_config;
    use crate::state::document::write_document;

    #[test]
    fn a_manifest_is_sound_whatever_configuration_it_has_and_the_check_says_what_is_wrong_with_that()
     {
        let mut manifest = crate::live_update::manifest::tests::sample();
        for (config, refused) in [
            ("[host]\n", None),
            ("", None),
            ("[host]\nhostnaem = 'a'\n", Some("hostnaem")),
            ("[[vm]]\nname = 'a'\nmemory = 'size=4096T'\nkernel = '/k'\n", Some("VM `a`: memory")),
            ("[host\n\n", Some("line ")),
        ] {
            manifest.config = config.to_owned();
            let said = check(&write_document(&manifest).unwrap()).unwrap();
            assert!(said.contains(CARRIES_ON) && !said.contains('\n'), "{said}");
            let line = format!("the other: ?\nthe manifest: {said}");
            let why = refused_config(&line, "the manifest");
            assert_eq!(why.is_some(), refused.is_some(), "{line}");
            assert!(why.unwrap_or("").contains(refused.unwrap_or("")), "{line}");
            assert_eq!(refused_config(&line, "the other"), None);
        }
    }
}
