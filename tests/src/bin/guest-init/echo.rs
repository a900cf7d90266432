//! Sends back what arrives on a port, by TCP and by UDP. The kernel has set up the interface (`ip=` on its command line).

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::thread;

use rustix::thread::{CpuSet, sched_setaffinity};

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
    let datagrams = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))?;
    let for_datagrams = Arc::clone(console);
    thread::spawn(move || {
        if let Err(error) = return_datagrams(&datagrams) {
            for_datagrams.note("problem", &format!("datagrams to port {port}: {error}"));
        }
    });
    console.note("echo", &format!("port {port}"));
    let vcpus = thread::available_parallelism().map_or(1, usize::from);
    for number in 0.. {
        let (stream, _) = listener.accept()?;
        let console = Arc::clone(console);
        thread::spawn(move || {
            // Each vCPU sends by a pair of queues of its own, and the host answers by the pair from which it got
            // something. One that was taken offline cannot be chosen.
            let mut vcpu = CpuSet::new();
            vcpu.set(number % vcpus);
            let _ = sched_setaffinity(None, &vcpu);
            if let Err(error) = echo(stream) {
                console.note("problem", &format!("a connection to port {port}: {error}"));
            }
        });
    }
    Ok(())
}

fn return_datagrams(socket: &UdpSocket) -> io::Result<()> {
    let mut bytes = [0; 2048];
    loop {
        let (count, from) = socket.recv_from(&mut bytes)?;
        // A datagram may be lost, also because there is no route for a moment.
        let _ = socket.send_to(&bytes[..count], from);
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
