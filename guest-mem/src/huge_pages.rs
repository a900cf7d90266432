//! The host's setting for huge pages in shared memory.
//!
//! Every kernel starts with `never` unless its command line says
//! `transparent_hugepage_shmem=advise`. So the host sets `advise` on every boot, before it creates guest
//! RAM *and* before it maps retrieved guest RAM: pages that are mapped small stay mapped small.

use std::fmt;
use std::path::Path;

use crate::Error;

const SHMEM_ENABLED: &str = "kernel/mm/transparent_hugepage/shmem_enabled";

/// The values of `shmem_enabled` (Linux `Documentation/admin-guide/mm/transhuge.rst`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShmemPolicy {
    /// Huge pages wherever they fit.
    Always,
    /// Huge pages where they fit into the file's size, and where advised.
    WithinSize,
    /// Huge pages where MADV_HUGEPAGE asks for them, as this crate does.
    Advise,
    /// No huge pages, even where MADV_HUGEPAGE asks for them.
    Never,
    /// No huge pages anywhere, for emergencies.
    Deny,
    /// Huge pages everywhere, for testing.
    Force,
}

impl ShmemPolicy {
    const ALL: [(Self, &'static str); 6] = [
        (Self::Always, "always"),
        (Self::WithinSize, "within_size"),
        (Self::Advise, "advise"),
        (Self::Never, "never"),
        (Self::Deny, "deny"),
        (Self::Force, "force"),
    ];

    /// Whether guest RAM gets huge pages under this policy.
    pub fn gives_huge_pages(self) -> bool {
        !matches!(self, Self::Never | Self::Deny)
    }
}

impl fmt::Display for ShmemPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::ALL.iter().find(|(policy, _)| policy == self).map_or("", |(_, n)| n))
    }
}

/// The setting as read from sysfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HugePages {
    /// The policy in force.
    pub shmem: ShmemPolicy,
}

impl HugePages {
    /// Reads the setting from the sysfs mounted at `sysfs` (`/sys`).
    pub fn read(sysfs: &Path) -> Result<Self, Error> {
        let path = sysfs.join(SHMEM_ENABLED);
        let read = std::fs::read_to_string(&path).and_then(|text| {
            parse(&text).ok_or_else(|| {
                std::io::Error::other(format!("`{}` names no known policy", text.trim()))
            })
        });
        read.map(|shmem| Self { shmem }).map_err(|source| failed("read", &path, source))
    }

    /// Changes `never` to `advise`, which affects only memory whose owner asks for huge pages. Leaves
    /// any other policy alone, because an administrator chose it. Returns the policy now in force; check
    /// it with [`ShmemPolicy::gives_huge_pages`].
    pub fn set_advise(sysfs: &Path) -> Result<Self, Error> {
        let before = Self::read(sysfs)?;
        if before.shmem != ShmemPolicy::Never {
            return Ok(before);
        }
        let path = sysfs.join(SHMEM_ENABLED);
        std::fs::write(&path, "advise")
            .map_err(|source| failed("write `advise` to", &path, source))?;
        Self::read(sysfs)
    }
}

fn parse(text: &str) -> Option<ShmemPolicy> {
    let chosen = chosen(text)?;
    ShmemPolicy::ALL.iter().find(|(_, name)| *name == chosen).map(|(policy, _)| *policy)
}

/// Returns the word in brackets, such as `never` in `always within_size advise [never] deny force`.
pub(crate) fn chosen(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once('[')?;
    rest.split_once(']').map(|(chosen, _)| chosen)
}

pub(crate) fn failed(attempt: &'static str, path: &Path, source: std::io::Error) -> Error {
    Error::HugePages { attempt, path: path.display().to_string(), source }
}
