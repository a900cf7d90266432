//! An example client of the Live Update Orchestrator, with the stages before and after the kexec.
//!
//! ```text
//!   first kernel    client save TEXT    creates a session, preserves a memfd, waits for the kexec
//!   next kernel     client load         retrieves the session and the memfd, reads it, finishes
//! ```
//!
//! The first stage must run until the kexec: if the last file descriptor of a session is closed
//! earlier, the session and its preserved files are gone. With `--switch` the client starts the
//! kexec itself; load the next kernel before (`kexec -l`, as root). On a kernel without LUO use the
//! emulator:
//!
//! ```text
//!   perennial luo emulate -- client save --switch 'some text'
//! ```
//!
//! starts the program a second time, as the first process of the "next kernel". There the client
//! finds the incoming session and continues with the second stage.

use std::error::Error;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;

use luo::kernel::Device;
use luo::{Orchestrator, SessionName, Token};
use rustix::event::pause;
use rustix::fs::sync;
use rustix::system::{RebootCommand, reboot};

/// The session's name. All programs on a machine share one name space.
const SESSION: &str = "example-client";
/// The token of the text. Each session has its own tokens.
const TEXT: Token = Token(0);

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let device = Device::default();
    let name: SessionName = SESSION.parse()?;
    match arguments[..] {
        // A client first looks for an incoming session, because it may be running after a live
        // update.
        ["load"] | ["save", ..] if load(&device, &name)? => Ok(()),
        ["load"] => {
            Err("no session was handed over: run `client save` and a live update first".into())
        }
        ["save", "--switch", text] => save(&device, &name, text, true),
        ["save", text] => save(&device, &name, text, false),
        _ => Err("usage: client save [--switch] TEXT | client load".into()),
    }
}

/// The stage in the old kernel: preserves the text and waits.
fn save(
    device: &Device,
    name: &SessionName,
    text: &str,
    switch: bool,
) -> Result<(), Box<dyn Error>> {
    // Dropping the session unpreserves its files and loses no data.
    let session = device.create_session(name)?;
    // A memfd, whose pages stay in place over the kexec.
    let memory = device.create_memory("text", text.len() as u64)?;
    let mut file = File::from(memory);
    file.write_all(text.as_bytes())?;
    session.preserve(file.as_fd(), TEXT)?;
    println!("preserved {} bytes; waiting for the kexec", text.len());
    if switch {
        sync();
        reboot(RebootCommand::Kexec)?;
    }
    // The session stays open until this process ends.
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
    // Finish last, after the text is read: finishing ends the preservation.
    session.finish()?;
    println!("retrieved: {}", text.trim_end_matches('\0'));
    Ok(true)
}
