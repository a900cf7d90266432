//! Loads a kernel over whatever is loaded for a kexec, as another tool or an operator might: the one whose path is the
//! argument, without an initramfs, so that a machine that enters it has no host.

use std::error::Error;
use std::path::Path;

use kexec::{CommandLine, Image, Running};

fn main() -> Result<(), Box<dyn Error>> {
    let kernel = std::env::args_os().nth(1).ok_or("the path of a kernel is missing")?;
    let image = Image::open(Path::new(&kernel), None)?;
    let running = Running::read(Path::new("/"))?;
    let loaded = kexec::load(&image, &CommandLine::new("panic=1")?, &running)?;
    // Dropping it would unload it.
    std::mem::forget(loaded);
    println!("another kernel is loaded over it");
    Ok(())
}
