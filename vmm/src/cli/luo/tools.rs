//! The feature `luo-tools`: the emulator, and handover trees of other layouts. A host needs neither.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ::luo::builtin::tree::memory::{PAGE_BYTES, SimulatedMemory};
use ::luo::builtin::tree::{Handover, v1, v5};
use ::luo::emulate::{self, Exit, Options, Program};

#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error(transparent)]
    Emulate(#[from] emulate::Error),
    #[error(
        "{} is not a file of pages, each preceded by its address: {bytes} bytes are not a multiple of {}",
        file.display(),
        size_of::<u64>() + PAGE_BYTES
    )]
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
    /// The exit status, as `env` and `timeout` use it: 125 if the program could not be supervised, 127 if
    /// it was not found, 126 if it could not be started. 1 for other errors.
    pub(super) fn code(&self) -> u8 {
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

pub(super) fn emulate(
    state: Option<PathBuf>,
    kexec: bool,
    program: Vec<OsString>,
) -> Result<ExitCode, Error> {
    let mut words = program.into_iter();
    let path = words.next().unwrap_or_default();
    let program = Program { path, arguments: words.collect() };
    let code = match emulate::run(&program, &Options { state, kexec })? {
        Exit::Status(status) => status,
        Exit::Signal(signal) => 128 + signal,
    };
    // An exit status has eight bits, and 128 plus a signal number fits them.
    Ok(ExitCode::from(code as u8))
}

/// Reads a tree in the layout of Linux or of the seed. `pages` are the path and the contents of the file
/// with the memory that the tree points to.
pub(super) fn tree(
    file: &Path,
    bytes: &[u8],
    pages: Option<(&Path, Vec<u8>)>,
) -> Result<Handover, Error> {
    let memory = match pages {
        Some((name, pages)) => memory(name, &pages)?,
        None => SimulatedMemory::new(),
    };
    let file = || file.to_owned();
    match bytes.starts_with(b"luo-") {
        true => v5::decode(bytes, &memory).map_err(|source| Error::V5 { file: file(), source }),
        false => {
            let tree = v1::seed::decode(bytes, &memory);
            tree.map_err(|source| Error::V1 { file: file(), source })
        }
    }
}

fn memory(file: &Path, bytes: &[u8]) -> Result<SimulatedMemory, Error> {
    const ADDRESS_BYTES: usize = size_of::<u64>();
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
    use super::super::tree;
    use super::*;

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
        assert!(error.to_string().contains("is not a file of pages"));
        assert!(error.to_string().contains("32 bytes are not a multiple of 4104"));
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
