//! Sends back what arrives on a TCP port. The kernel has set up the interface (`ip=` on its command line).

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;

use crate::console::Console;

/// Starts the server, which says `echo` when it listens.
pub(crate) fn start(port: u16, console: &Arc<Console>) {
    let console = Arc::clone(console);
    thread::spawn(move || {
        if let Err(error) = serve(port, &console) {
            console.note("problem", &format!("port {port}: {error}"));
        }
    });
}

fn serve(port: u16, console: &Arc<Console>) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
    console.note("echo", &format!("port {port}"));
    loop {
        let (stream, _) = listener.accept()?;
        let console = Arc::clone(console);
        thread::spawn(move || {
            if let Err(error) = echo(stream) {
                console.note("problem", &format!("a connection to port {port}: {error}"));
            }
        });
    }
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    let mut bytes = vec![0; 64 << 10];
    loop {
        match stream.read(&mut bytes)? {
            0 => return stream.shutdown(Shutdown::Write),
            count => stream.write_all(&bytes[..count])?,
        }
    }
}
