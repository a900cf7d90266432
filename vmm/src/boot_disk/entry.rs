//! An entry of a boot loader's configuration, and what becomes of it.

use super::grub::{Place, Save};
use super::image::Image;

/// An entry that may be booted.
#[derive(Debug)]
pub(super) struct Entry {
    /// Which entry of which configuration this is, for people.
    pub(super) origin: String,
    pub(super) files: Files,
    pub(super) cmdline: String,
    /// Whether the entry was chosen for this boot only. It is booted only if `saves` can be written.
    pub(super) is_once: bool,
    /// What is written to the disk before the entry is booted.
    pub(super) saves: Vec<Save>,
}

/// Where the files of an entry are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Files {
    /// A kernel, and the files that make up its initramfs, one behind the other.
    Separate { kernel: Place, initramfs: Vec<Place> },
    /// A unified kernel image, with its own command line.
    Unified(Place),
}

impl Files {
    /// Whether there is an initramfs, as far as the configuration says: a unified kernel image has its own.
    pub(super) fn have_initramfs(&self) -> bool {
        matches!(self, Self::Separate { initramfs, .. } if !initramfs.is_empty())
    }
}

/// The opened files of an entry, to be loaded into the guest's memory.
pub struct Boot {
    /// The kernel.
    pub kernel: Image,
    /// The initramfs, if there is one.
    pub initramfs: Option<Image>,
    /// The command line.
    pub cmdline: String,
    /// Which entry of which configuration this is, for people.
    pub origin: String,
}

/// An entry cannot be loaded.
#[derive(Debug)]
pub enum LoadError<E> {
    /// Its files are damaged, with the reason: the next entry is tried.
    Damaged(String),
    /// Another reason, which other entries would not help against.
    Other(E),
}

/// The entry that is booted.
#[derive(Debug)]
pub struct Booted<T> {
    /// What the caller loaded.
    pub loaded: T,
    /// Which entry of which configuration this is, for people.
    pub origin: String,
    /// What an operator should know about it: the entries that should have been booted and cannot be.
    pub warnings: Vec<String>,
}
