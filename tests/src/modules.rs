//! Loads the kernel modules of an image. Used by the harness's PID 1 programs.

use std::fs::{self, File};

use rustix::io::Errno;

/// Directory of an image with the modules, and with a list of them in loading order.
pub const DIRECTORY: &str = "lib/modules";
/// File name of the list.
pub const ORDER: &str = "order";
/// File name of the list of what a kernel has built in, in a directory that is named for the kernel's release.
pub const BUILT_IN: &str = "modules.builtin";

/// Loads all modules of the list; an image without a list has no modules. Returns one text for each
/// module that failed.
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
