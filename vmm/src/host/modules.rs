//! Loads the kernel modules that the configuration lists (PID 1 only).
//!
//! Dependencies are not resolved: the list names every module after those that it needs.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

/// What the running kernel was booted with.
const COMMAND_LINE: &str = "/proc/cmdline";
/// Directory of the modules in a host's image.
const DIRECTORY: &str = "/lib/modules";
/// `MODULE_INIT_COMPRESSED_FILE` (Linux `include/uapi/linux/module.h`).
const COMPRESSED_FILE: i32 = 4;
/// Suffixes of module files, each with the flags for `finit_module`.
const SUFFIXES: [(&str, i32); 4] = [
    (".ko", 0),
    (".ko.xz", COMPRESSED_FILE),
    (".ko.zst", COMPRESSED_FILE),
    (".ko.gz", COMPRESSED_FILE),
];

/// A module cannot be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModuleError {
    /// The text cannot be the name of a module.
    #[error("`{0}` is no name of a module: a name has letters, digits, `-` and `_` only")]
    Name(String),
    /// The module is not in the image.
    #[error("there is no module `{name}` in {} (as {name}.ko, or with .xz, .zst, .gz)", directory.display())]
    Absent {
        /// The module.
        name: String,
        /// The directory that was searched.
        directory: PathBuf,
    },
    /// The module's file cannot be read.
    #[error("cannot read the module {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel refuses the module.
    #[error("the kernel refuses the module {}: {}", path.display(), why(*errno))]
    Refused {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        errno: Errno,
    },
}

fn why(errno: Errno) -> String {
    let known = match errno {
        Errno::NOEXEC => "it was built for another kernel, or is damaged",
        Errno::NOENT => "it needs a module that is not loaded: list that one before it",
        Errno::NODEV => "its hardware is missing",
        Errno::OPNOTSUPP => {
            "the CPU lacks the feature that it needs, or the firmware has disabled it"
        }
        Errno::KEYREJECTED | Errno::NOKEY => "it is not signed with a key that the kernel trusts",
        Errno::PERM => {
            "CAP_SYS_MODULE is missing, kernel.modules_disabled is set, or `module_blacklist=` has it"
        }
        _ => return errno.to_string(),
    };
    known.to_owned()
}

/// Loads the modules in this order, each with its parameters of the kernel's command line. Returns those that failed. A
/// module whose hardware is missing is not an error: one image serves hosts with different hardware.
pub fn load_all(names: &[String]) -> Vec<ModuleError> {
    let command_line = fs::read_to_string(COMMAND_LINE).unwrap_or_else(|error| {
        tracing::warn!("modules are loaded without parameters: {COMMAND_LINE}: {error}");
        String::new()
    });
    load_each(names, |name| {
        let parameters = parameters_of(name, &command_line);
        load(Path::new(DIRECTORY), name, |file, flags| {
            rustix::system::finit_module(file, &parameters, flags)
        })
    })
}

fn load_each(names: &[String], load: impl Fn(&str) -> Result<(), ModuleError>) -> Vec<ModuleError> {
    let failed = names.iter().filter_map(|name| load(name).err());
    let (idle, wrong) = failed.partition::<Vec<_>, _>(|error| {
        matches!(error, ModuleError::Refused { errno: Errno::NODEV | Errno::OPNOTSUPP, .. })
    });
    idle.iter().for_each(|error| tracing::warn!("{error}"));
    wrong
}

/// The parameters of a module that a command line has: for the module `kvm-amd`, `kvm_amd.nested=1` is `nested=1`. The
/// kernel itself applies only those of what is built in, and leaves the rest to whoever loads the module, as `modprobe` does.
fn parameters_of(module: &str, command_line: &str) -> CString {
    let module = module.replace('-', "_");
    let own = kexec::parameters(command_line).filter_map(|parameter| {
        let (of, name) = parameter.name.split_once('.')?;
        let text = match parameter.value {
            Some(value) if value.contains(char::is_whitespace) => format!("{name}=\"{value}\""),
            Some(value) => format!("{name}={value}"),
            None => name.to_owned(),
        };
        (of.replace('-', "_") == module).then_some(text)
    });
    // A command line ends at the first NUL.
    CString::new(own.collect::<Vec<_>>().join(" ")).unwrap_or_default()
}

/// Loads one module. A module that is loaded already counts as loaded.
fn load(
    directory: &Path,
    name: &str,
    insert: impl Fn(&File, i32) -> Result<(), Errno>,
) -> Result<(), ModuleError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || !name.chars().all(plain) {
        return Err(ModuleError::Name(name.escape_default().to_string()));
    }
    for (suffix, flags) in SUFFIXES {
        let path = directory.join(format!("{name}{suffix}"));
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => return Err(ModuleError::Read { path, source }),
            Ok(file) => file,
        };
        return match insert(&file, flags) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(errno) => Err(ModuleError::Refused { path, errno }),
        };
    }
    Err(ModuleError::Absent { name: name.to_owned(), directory: directory.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_found_by_its_name_compressed_or_not() {
        let directory = tempfile::tempdir().unwrap();
        for (file, flags) in [("kvm.ko", 0), ("kvm-amd.ko.xz", 4), ("nd_pmem.ko.zst", 4)] {
            std::fs::write(directory.path().join(file), b"").unwrap();
            let name = file.split('.').next().unwrap();
            load(directory.path(), name, |_, found| {
                assert_eq!(found, flags);
                Ok(())
            })
            .unwrap();
        }
    }

    #[test]
    fn a_module_gets_its_parameters_of_the_command_line() {
        let line =
            "quiet kvm-amd.nested=1 kvm.x=2 kvm_amd.sev watchdog.name=\"a b\" -- kvm_amd.y=1";
        let of = |module| parameters_of(module, line).into_string().unwrap();
        assert_eq!(of("kvm-amd"), "nested=1 sev");
        assert_eq!(of("kvm_amd"), "nested=1 sev");
        assert_eq!(of("watchdog"), "name=\"a b\"");
        assert_eq!(of("quiet"), "");
    }

    #[test]
    fn a_module_that_is_loaded_already_is_no_error() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("kvm.ko"), b"").unwrap();
        load(directory.path(), "kvm", |_, _| Err(Errno::EXIST)).unwrap();
    }

    #[test]
    fn every_module_that_fails_is_returned_except_those_without_their_hardware() {
        let names = ["one", "intel", "two", "amd", "three"].map(str::to_owned);
        let failed = load_each(&names, |name| {
            let errno = match name {
                "two" => return Ok(()),
                "intel" => Errno::OPNOTSUPP,
                "amd" => Errno::NODEV,
                _ => Errno::NOEXEC,
            };
            Err(ModuleError::Refused { path: name.into(), errno })
        });
        let failed: Vec<String> = failed.iter().map(ToString::to_string).collect();
        assert!(failed.len() == 2 && failed[0].contains("one") && failed[1].contains("three"));
    }

    #[test]
    fn a_module_that_is_absent_or_refused_is_named() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("kvm.ko"), b"").unwrap();
        let refused = |name, errno| {
            load(directory.path(), name, |_, _| Err(errno)).expect_err(name).to_string()
        };
        assert!(refused("kvm-amd", Errno::IO).contains("no module `kvm-amd`"));
        assert!(refused("../kvm", Errno::IO).contains("`../kvm` is no name"));
        assert!(refused("", Errno::IO).contains("is no name"));
        let text = refused("kvm", Errno::NOENT);
        assert!(text.contains("kvm.ko") && text.contains("list that one before it"), "{text}");
        assert!(refused("kvm", Errno::XDEV).contains("cross-device"), "any other errno in words");
    }
}
