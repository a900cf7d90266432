//! Reads facts about the running kernel from `/proc`, `/sys` and `/dev`.
//!
//! Everything is read below a root directory, `/` outside of tests. A fact that the kernel does not show,
//! for example because debugfs is not mounted, is `None` and never a guess.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::switch;

/// Facts about the running kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Running {
    /// The release (`uname -r`).
    pub release: String,
    /// The build (`uname -v`).
    pub version: String,
    /// The command line.
    pub command_line: String,
    /// Whether a next kernel is loaded, by any program and either system call.
    pub kexec_loaded: Option<bool>,
    /// Whether the kernel has LUO: `/dev/liveupdate` exists.
    pub luo: bool,
    /// Whether KHO works. Without KHO nothing can be handed over.
    pub kho: Option<bool>,
    /// The scratch areas, in the order in which the kernel searches them.
    pub scratch: Option<Vec<ScratchArea>>,
}

/// Memory that the next kernel is loaded into. Its size is set at a cold boot and stays over every kexec.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScratchArea {
    /// Physical address of its first byte.
    pub start: u64,
    /// Size in bytes.
    pub size: u64,
}

/// The facts about the running kernel could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StatusError {
    /// A file that every kernel has could not be read.
    #[error("cannot read {} of the running kernel; is its file system mounted?", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file does not have the expected format.
    #[error("cannot parse {}: {problem}", path.display())]
    Nonsense {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

/// Directory of KHO in debugfs, below the root.
pub(crate) const KHO: &str = "sys/kernel/debug/kho";

impl Running {
    /// Reads the facts from `/proc`, `/sys` and `/dev` below `root`.
    pub fn read(root: &Path) -> Result<Self, StatusError> {
        let command_line = line(&root.join("proc/cmdline"))?;
        let luo = root.join("dev/liveupdate").exists();
        let kho = if luo || root.join(KHO).is_dir() {
            Some(true)
        } else {
            // `kho=on` proves nothing, because KHO may have failed at boot; `kho=off` is certain.
            switch(&command_line, "kho").filter(|on| !on)
        };
        Ok(Self {
            release: line(&root.join("proc/sys/kernel/osrelease"))?,
            version: line(&root.join("proc/sys/kernel/version"))?,
            kexec_loaded: kexec_loaded(&root.join("sys/kernel/kexec_loaded"))?,
            scratch: scratch(&root.join(KHO).join("out"))?,
            command_line,
            luo,
            kho,
        })
    }
}

fn line(path: &Path) -> Result<String, StatusError> {
    match fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).trim_end().to_owned()),
        Err(source) => Err(StatusError::Read { path: path.to_owned(), source }),
    }
}

/// [`line()`], or `None` if the file does not exist or may not be read.
fn optional_line(path: &Path) -> Result<Option<String>, StatusError> {
    use io::ErrorKind::{NotADirectory, NotFound, PermissionDenied};
    match line(path) {
        Err(StatusError::Read { source, .. })
            if matches!(source.kind(), NotFound | NotADirectory | PermissionDenied) =>
        {
            Ok(None)
        }
        other => other.map(Some),
    }
}

fn kexec_loaded(path: &Path) -> Result<Option<bool>, StatusError> {
    match optional_line(path)?.as_deref() {
        None => Ok(None),
        Some("0") => Ok(Some(false)),
        Some("1") => Ok(Some(true)),
        Some(other) => {
            let problem = format!("{other:?} is neither 0 nor 1");
            Err(StatusError::Nonsense { path: path.to_owned(), problem })
        }
    }
}

/// Reads the scratch areas from two files, with one hexadecimal number per line. `None` if a file is
/// missing.
fn scratch(out: &Path) -> Result<Option<Vec<ScratchArea>>, StatusError> {
    let (starts_path, sizes_path) = (out.join("scratch_phys"), out.join("scratch_len"));
    let (Some(starts), Some(sizes)) = (optional_line(&starts_path)?, optional_line(&sizes_path)?)
    else {
        return Ok(None);
    };
    let (starts, sizes) = (numbers(&starts_path, &starts)?, numbers(&sizes_path, &sizes)?);
    if starts.len() != sizes.len() {
        let problem = format!("{} sizes for {} addresses", sizes.len(), starts.len());
        return Err(StatusError::Nonsense { path: sizes_path, problem });
    }
    let areas = starts.into_iter().zip(sizes);
    Ok(Some(areas.map(|(start, size)| ScratchArea { start, size }).collect()))
}

fn numbers(path: &Path, text: &str) -> Result<Vec<u64>, StatusError> {
    text.lines()
        .map(|number| {
            let digits = number.trim().trim_start_matches("0x");
            u64::from_str_radix(digits, 16).map_err(|_| StatusError::Nonsense {
                path: path.to_owned(),
                problem: format!("{number:?} is no hexadecimal number"),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn put(root: &TempDir, path: &str, text: &str) {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn root(command_line: &str) -> TempDir {
        let root = tempfile::tempdir().unwrap();
        put(&root, "proc/cmdline", &format!("{command_line}\n"));
        put(&root, "proc/sys/kernel/osrelease", "7.3.4-a\n");
        put(&root, "proc/sys/kernel/version", "#1 SMP\n");
        root
    }

    #[test]
    fn all_facts_of_a_kernel_are_read() {
        let root = root("console=ttyS0 kho=on");
        put(&root, "sys/kernel/kexec_loaded", "1\n");
        put(&root, "dev/liveupdate", "");
        put(&root, "sys/kernel/debug/kho/out/scratch_phys", "0x4000000\n0x10000000\n");
        put(&root, "sys/kernel/debug/kho/out/scratch_len", "0x1000000\n0x10000000\n");
        assert_eq!(
            Running::read(root.path()).unwrap(),
            Running {
                release: "7.3.4-a".to_owned(),
                version: "#1 SMP".to_owned(),
                command_line: "console=ttyS0 kho=on".to_owned(),
                kexec_loaded: Some(true),
                luo: true,
                kho: Some(true),
                scratch: Some(vec![
                    ScratchArea { start: 64 << 20, size: 16 << 20 },
                    ScratchArea { start: 256 << 20, size: 256 << 20 },
                ]),
            }
        );
    }

    #[test]
    fn a_fact_that_a_kernel_does_not_show_is_unknown_and_not_guessed() {
        let told = Running::read(root("quiet").path()).unwrap();
        assert_eq!((told.kexec_loaded, told.kho, told.scratch), (None, None, None));
        assert!(!told.luo);
        // `kho=on` alone does not show that KHO works.
        assert_eq!(Running::read(root("kho=on").path()).unwrap().kho, None);
        assert_eq!(Running::read(root("kho=off").path()).unwrap().kho, Some(false));
    }

    #[test]
    fn luo_or_its_debugfs_proves_that_kho_works() {
        let with_device = root("");
        put(&with_device, "dev/liveupdate", "");
        assert_eq!(Running::read(with_device.path()).unwrap().kho, Some(true));
        let with_debugfs = root("");
        fs::create_dir_all(with_debugfs.path().join(KHO)).unwrap();
        assert_eq!(Running::read(with_debugfs.path()).unwrap().kho, Some(true));
    }

    #[test]
    fn a_root_without_proc_names_the_file_that_is_missing() {
        let root = tempfile::tempdir().unwrap();
        let error = Running::read(root.path()).unwrap_err();
        assert!(error.to_string().contains("proc/cmdline"), "{error}");
    }

    #[test]
    fn nonsense_is_an_error_that_names_the_file() {
        for (file, text, problem) in [
            ("sys/kernel/kexec_loaded", "2\n", "neither 0 nor 1"),
            ("sys/kernel/debug/kho/out/scratch_len", "0x10\n0x20\n", "2 sizes for 1"),
            ("sys/kernel/debug/kho/out/scratch_len", "many\n", "no hexadecimal"),
        ] {
            let root = root("");
            put(&root, "sys/kernel/debug/kho/out/scratch_phys", "0x0\n");
            put(&root, file, text);
            let error = Running::read(root.path()).unwrap_err().to_string();
            assert!(error.contains(file) && error.contains(problem), "{error}");
        }
    }
}
