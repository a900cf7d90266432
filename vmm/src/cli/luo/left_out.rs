//! Replaces `tools` in a build without the feature `luo-tools`, such as that of a host's image: every
//! function errors with the name of the missing part.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ::luo::builtin::tree::Handover;

#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error(
        "this build leaves out {0}: build `perennial` with its default features (`cargo build -p vmm`)"
    )]
    LeftOut(&'static str),
}

impl Error {
    /// The exit status 125, with which `env` and `timeout` report their own failures.
    pub(super) fn code(&self) -> u8 {
        125
    }
}

pub(super) fn emulate(
    _state: Option<PathBuf>,
    _kexec: bool,
    _program: Vec<OsString>,
) -> Result<ExitCode, Error> {
    Err(Error::LeftOut("`luo emulate`"))
}

pub(super) fn tree(
    _file: &Path,
    _bytes: &[u8],
    _pages: Option<(&Path, Vec<u8>)>,
) -> Result<Handover, Error> {
    Err(Error::LeftOut("trees of other kernels"))
}
