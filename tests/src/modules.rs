//! Loads the modules of an image, in a PID 1 of the harness.

use std::fs::{self, File};

use rustix::io::Errno;

/// Where an image has its modules, and a list of them in the order in which they are loaded.
pub const DIRECTORY: &str = "lib/modules";
/// The name of the list.
pub const ORDER: &str = "order";

/// Loads all; an image without a list has none. Says what went wrong.
pub fn load_all() -> Vec<String> {
    let order = fs::read_to_string(format!("/{DIRECTORY}/{ORDER}")).unwrap_or_default();
    order.lines().filter_map(|name| load(name).err().map(|why| format!("{name}: {why}"))).collect()
}

fn load(name: &str) -> Result<(), std::io::Error> {
    let file = File::open(format!("/{DIRECTORY}/{name}.ko"))?;
    match rustix::system::finit_module(&file, c"", 0) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
