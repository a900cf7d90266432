//! The programs of earlier commits, beside which the suite `versions` runs this one.
//!
//! The recipe in `resources/versions/build.sh` builds them, or finds them in its cache. The file `commits` beside it
//! says which commits they are of.

use std::path::PathBuf;
use std::sync::OnceLock;

use crate::recipe;

/// An earlier `perennial`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Earlier {
    /// That of the commit that landed last.
    Previous,
    /// The oldest one whose documents this program reads.
    Oldest,
}

impl Earlier {
    /// Its name in the file `commits`.
    fn name(self) -> &'static str {
        match self {
            Self::Previous => "previous",
            Self::Oldest => "oldest",
        }
    }

    /// Returns the path of the static program. Finds it once for each process.
    pub fn program(self) -> Result<PathBuf, String> {
        static FOUND: [OnceLock<Result<PathBuf, String>>; 2] = [const { OnceLock::new() }; 2];
        let build = || {
            recipe::run("resources/versions/build.sh", &[self.name()])
                .map(|directory| directory.join("perennial"))
                .map_err(|error| format!("no {} program: {error}", self.name()))
        };
        FOUND[self as usize].get_or_init(build).clone()
    }
}

/// Why the tests lack an earlier program on this computer. `None` if they have all of them.
pub fn missing() -> Option<String> {
    [Earlier::Previous, Earlier::Oldest].into_iter().find_map(|earlier| earlier.program().err())
}
