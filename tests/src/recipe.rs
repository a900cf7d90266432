//! Runs the recipes in `resources/`, which make an artefact or find it in their cache.

use std::io;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::paths;

/// Runs the recipe `script`, a path in the workspace. Returns the directory that it prints as its last line on stdout.
pub fn run(script: &str, arguments: &[&str]) -> io::Result<PathBuf> {
    let script = paths::workspace().join(script);
    let output = Command::new(&script).args(arguments).stderr(Stdio::inherit()).output()?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    match stdout.lines().last() {
        Some(directory) if output.status.success() => Ok(directory.into()),
        _ => Err(io::Error::other(format!("{}: {}", script.display(), output.status))),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::path::Path;
    use std::process::{Child, ChildStderr, ChildStdout};

    use rustix::process::{Pid, Signal, kill_process};

    use super::*;

    /// A recipe that makes the file `made`, which may end only when its stdin is closed.
    const RECIPE: &str = r#"
        set -euo pipefail
        say() { echo "$*" >&2; }
        . resources/alone.sh
        work_alone "$0/lock" "$0/work" "touch $0/cleaned"
        if [[ -e $0/made ]]; then echo found; exit; fi
        touch "$work/half"
        echo working
        read -r _ || true
        mv "$work/half" "$0/made"
        echo made
    "#;

    struct Recipe {
        child: Child,
        stdout: BufReader<ChildStdout>,
        stderr: BufReader<ChildStderr>,
    }

    impl Recipe {
        fn start(cache: &Path, stdin: Stdio) -> Self {
            let mut command = Command::new("bash");
            command.args(["-c", RECIPE]).arg(cache).current_dir(paths::workspace());
            command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut child = command.spawn().unwrap();
            let stdout = BufReader::new(child.stdout.take().unwrap());
            let stderr = BufReader::new(child.stderr.take().unwrap());
            Self { child, stdout, stderr }
        }
    }

    fn line(from: &mut impl BufRead) -> String {
        let mut line = String::new();
        from.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    #[test]
    fn one_recipe_at_a_time_works_and_another_waits_and_finds_what_it_made() {
        let cache = tempfile::tempdir().unwrap();
        let path = |name| cache.path().join(name);
        // An earlier recipe was killed.
        std::fs::create_dir(path("work")).unwrap();
        std::fs::write(path("work/old"), "").unwrap();
        let mut first = Recipe::start(cache.path(), Stdio::piped());
        assert_eq!(line(&mut first.stdout), "working");
        assert!(!path("work/old").exists());

        let mut ended = Recipe::start(cache.path(), Stdio::null());
        assert_eq!(line(&mut ended.stderr), "waiting for another build");
        let mut second = Recipe::start(cache.path(), Stdio::null());
        assert_eq!(line(&mut second.stderr), "waiting for another build");
        kill_process(Pid::from_child(&ended.child), Signal::TERM).unwrap();
        assert!(!ended.child.wait().unwrap().success());
        let untouched = path("work/half").exists() && !path("cleaned").exists();
        assert!(untouched, "one that only waits cleans nothing up");

        drop(first.child.stdin.take());
        assert_eq!(line(&mut first.stdout), "made");
        assert!(first.child.wait().unwrap().success());
        assert_eq!(line(&mut second.stdout), "found");
        assert!(second.child.wait().unwrap().success());
        assert!(path("made").exists() && path("cleaned").exists() && !path("work").exists());
    }
}
