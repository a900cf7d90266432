//! A client of the Live Update Orchestrator, both of its stages, for people who write one.
//!
//! ```text
//!   first kernel    client save TEXT    creates a session, preserves a memfd, waits for the kexec
//!   next kernel     client load         retrieves the session and the memfd, reads it, finishes
//! ```
//!
//! The first stage has to live until the jump: a session whose last file descriptor is closed before
//! is gone, and what it preserved with it. With `--switch` it asks for the jump itself, once the next
//! kernel has been loaded (`kexec -l`, as root). Without such a kernel the emulator is as good:
//!
//! ```text
//!   perennial luo emulate -- client save --switch 'some text'
//! ```
//!
//! starts the program a second time as the first process of the "next kernel", where it finds the
//! session that is in its way, and goes on with the second stage.

use std::error::Error;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;

use luo::kernel::Device;
use luo::{Orchestrator, SessionName, Token};
use rustix::event::pause;
use rustix::fs::sync;
use rustix::system::{RebootCommand, reboot};

/// The session's name; all programs of a machine share one name space.
const SESSION: &str = "example-client";
/// The text's token, of this session's own.
const TEXT: Token = Token(0);

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let device = Device::default();
    let name: SessionName = SESSION.parse()?;
    match arguments[..] {
        // Whoever comes up after a live update looks first: a session that is not retrieved waits.
        ["load"] | ["save", ..] if load(&device, &name)? => Ok(()),
        ["load"] => Err("there is no session: no live update came before this".into()),
        ["save", "--switch", text] => save(&device, &name, text, true),
        ["save", text] => save(&device, &name, text, false),
        _ => Err("usage: client save [--switch] TEXT | client load".into()),
    }
}

/// The stage in the old kernel.
fn save(
    device: &Device,
    name: &SessionName,
    text: &str,
    switch: bool,
) -> Result<(), Box<dyn Error>> {
    // Dropped, it would abandon what it preserved; nothing would be lost but the intention.
    let session = device.create_session(name)?;
    // A memfd that LUO can carry: its pages stay where they are.
    let memory = device.create_memory("text", text.len() as u64)?;
    let mut file = File::from(memory);
    file.write_all(text.as_bytes())?;
    session.preserve(file.as_fd(), TEXT)?;
    println!("preserved {} bytes; waiting for the kexec", text.len());
    if switch {
        sync();
        reboot(RebootCommand::Kexec)?;
    }
    // The session is open until this process ends.
    loop {
        pause();
    }
}

/// The stage in the next kernel. Returns whether there was a session.
fn load(device: &Device, name: &SessionName) -> Result<bool, Box<dyn Error>> {
    let session = match device.retrieve_session(name) {
        Ok(session) => session,
        Err(error) if error.is_not_found() => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    let mut file = File::from(session.retrieve(TEXT)?);
    let mut text = String::new();
    file.rewind()?;
    file.read_to_string(&mut text)?;
    // Only now: until then a program that failed could be started again and find everything.
    session.finish()?;
    println!("retrieved: {}", text.trim_end_matches('\0'));
    Ok(true)
}
