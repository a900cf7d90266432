//! The next initramfs: whether it can be unpacked, what it starts, and whether it has what its configuration needs.

use std::borrow::Cow;
use std::collections::BTreeSet;

use kexec::{Archive, ArchiveError, Initramfs};

use super::drivers::{self, Modules, module_name};
use super::{Check, Finding, Surroundings, program};
use crate::causes::chain;
use crate::config::{Config, HostSection};

/// The configuration of a host that is the first process, within its initramfs.
const CONFIG: &str = "etc/perennial.toml";

/// What is known of the next host from its initramfs.
#[derive(Debug, Default)]
pub(super) struct Examined {
    /// The configuration that the next host uses, if it is a valid one.
    pub config: Option<Config>,
    /// The text of the next host's configuration, valid or not.
    pub config_text: Option<String>,
    /// The modules that the next host loads and that are there, and those that are built in.
    pub modules: Modules,
    /// The program that the next kernel starts, if its contents were kept.
    pub program: Option<Vec<u8>>,
}

/// Checks an initramfs whose kernel has this command line and this release, if that is known.
pub(super) fn check(
    initramfs: &Initramfs,
    command_line: &str,
    release: Option<&str>,
    surroundings: &Surroundings<'_>,
) -> (Vec<Finding>, Examined) {
    let path = initramfs.path.display();
    let init = kexec::parameters(command_line).filter(|parameter| parameter.is("rdinit"));
    let init = init.filter_map(|parameter| parameter.value).last().unwrap_or("/init");
    let mut examined = Examined::default();
    let built_in =
        release.map(|release| format!("{}/{release}/{}", drivers::DIRECTORY, drivers::BUILT_IN));
    let archive = match read(initramfs, &[init, CONFIG, built_in.as_deref().unwrap_or(CONFIG)]) {
        Ok(archive) => archive,
        Err(error) => {
            let sentence = format!("{path} is damaged: {}", chain(&error).join(": "));
            let remedy = "build or copy it again";
            let finding = Finding::new(Check::InitramfsDamaged, &path, sentence, remedy);
            return (vec![finding], examined);
        }
    };
    let mut findings = Vec::new();
    match find_init(&archive, init) {
        Ok(contents) if surroundings.is_first_process => match program::check(contents) {
            Ok(()) => examined.program = contents.map(<[u8]>::to_vec),
            Err(problem) => {
                let sentence = format!("`{init}` in {path} cannot be the next host: {problem}");
                let remedy = "build the initramfs with a static `perennial` as its first program";
                findings.push(Finding::new(Check::InitramfsProgram, &path, sentence, remedy));
            }
        },
        Ok(_) => {}
        Err(problem) => {
            let sentence = format!("the next kernel would panic: {path} {problem}");
            let remedy = "build the initramfs with a static `perennial` as /init";
            findings.push(Finding::new(Check::InitramfsInit, &path, sentence, remedy));
        }
    }
    if surroundings.is_first_process {
        findings.extend(configuration(initramfs, &archive, surroundings.config, &mut examined));
        let list = built_in.and_then(|path| archive.find(&path)?.1.contents.clone());
        let list = list.map(|list| drivers::built_in(&String::from_utf8_lossy(&list)));
        examined.modules.built_in = list;
    }
    (findings, examined)
}

/// Reads the archive with the contents of these files.
fn read(initramfs: &Initramfs, paths: &[&str]) -> Result<Archive, ArchiveError> {
    let names: Vec<&str> = paths.iter().map(|path| path.trim_start_matches('/')).collect();
    // On many distributions `/lib` is a link to `usr/lib`.
    let is_kept = |name: &str| names.contains(&name.strip_prefix("usr/").unwrap_or(name));
    let archive = Archive::read(initramfs, &is_kept)?;
    let found: Vec<String> = paths
        .iter()
        .filter_map(|path| archive.find(path))
        .filter_map(|(name, entry)| entry.is_file().then_some(name))
        .collect();
    // A symbolic link led to a file whose contents are not kept.
    match found.iter().all(|name| is_kept(name)) {
        true => Ok(archive),
        false => Archive::read(initramfs, &|name| found.iter().any(|other| other == name)),
    }
}

/// Returns the contents of the first program, if they were kept. Errors with a clause about the initramfs.
fn find_init<'a>(archive: &'a Archive, init: &str) -> Result<Option<&'a [u8]>, String> {
    match archive.find(init) {
        None => Err(format!("has no `{init}`")),
        Some((_, entry)) if !entry.is_file() => Err(format!("has an `{init}` that is no file")),
        Some((_, entry)) if !entry.is_executable() => {
            Err(format!("has an `{init}` that is not executable (mode {:o})", entry.mode & 0o7777))
        }
        Some((_, entry)) => Ok(entry.contents.as_deref()),
    }
}

/// Checks the configuration within the initramfs, and that the modules are there that it lists. Without one the next host
/// uses that of this host, whose text is `own`.
fn configuration(
    initramfs: &Initramfs,
    archive: &Archive,
    own: &str,
    examined: &mut Examined,
) -> Vec<Finding> {
    let path = initramfs.path.display();
    let warning = |sentence: String, remedy: &str| {
        vec![Finding::new(Check::InitramfsConfig, &path, sentence, remedy)]
    };
    let contents = archive.find(CONFIG).and_then(|(_, entry)| entry.contents.as_deref());
    let text = contents.map(String::from_utf8_lossy);
    let (config, mut findings) = match &text {
        None => {
            let sentence = format!(
                "{path} has no /{CONFIG}: the next host uses the configuration of this host, and finds no pool"
            );
            let mut config = Config::parse(own).ok();
            // That configuration comes with the manifest, which is in the pool.
            config.iter_mut().for_each(|config| config.host.pool = None);
            (config, warning(sentence, "add the file to the initramfs"))
        }
        Some(text) => match Config::parse(text) {
            Ok(config) => (Some(config), Vec::new()),
            Err(error) => {
                let sentence = format!(
                    "this program cannot read /{CONFIG} in {path}: {}; if the next host cannot either, it \
                     uses the configuration of this host",
                    chain(&error).join(": ")
                );
                (None, warning(sentence, "mend the file in the initramfs"))
            }
        },
    };
    let section = match &config {
        Some(config) => config.host.clone(),
        None => HostSection::salvage(text.as_deref().unwrap_or(own)),
    };
    examined.config = config;
    examined.config_text = text.map(Cow::into_owned);
    let prefix = format!("{}/", drivers::DIRECTORY);
    let files = archive.names().filter_map(|name| name.strip_prefix(&prefix));
    let there: BTreeSet<&str> = files.filter(|name| !name.contains('/')).collect();
    let is_there = |module: &str| {
        [".ko", ".ko.xz", ".ko.zst", ".ko.gz"]
            .iter()
            .any(|suffix| there.contains(format!("{module}{suffix}").as_str()))
    };
    let (found, absent): (Vec<_>, Vec<_>) =
        section.modules.iter().partition(|module| is_there(module));
    examined.modules.loadable =
        found.iter().filter_map(|module| module_name(&format!("{module}.ko"))).collect();
    if !absent.is_empty() {
        let names = absent.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        let sentence = format!(
            "{path} lacks modules that `modules` in its configuration lists: {names} in /{}",
            drivers::DIRECTORY
        );
        let remedy = "add them to the initramfs, or remove them from the list";
        findings.push(Finding::new(Check::InitramfsModules, &path, sentence, remedy));
    }
    findings
}

#[cfg(test)]
#[path = "initramfs_tests.rs"]
mod tests;
