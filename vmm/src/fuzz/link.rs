//! Targets for the link between the host and a VM's process, one for each direction.
//!
//! A script is a list of packets: the number of fds (u8), the kind of each fd (u8), and a long
//! piece.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use perennial_fuzz::Script;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, sendmsg};
use std::io::IoSlice;

use crate::guests::conversation::Conversation;
use crate::link::{Channel, FromVm, LinkError, Request};
use crate::vm::serve::{ServeError, serve};

/// Most packets of a script, and most fds of a packet.
const MOST: usize = 6;
/// A state document.
const DOCUMENT: &[u8] = include_bytes!("../../golden/vm-v1.dtb");

/// Sends packets to a VM's process, which must answer each or end with a link error.
pub fn to_vm(input: &[u8]) {
    let (host, vm) = Channel::pair().unwrap();
    let sent = send_all(&host, input);
    rustix::net::shutdown(&host, Shutdown::Write).unwrap();
    let served = serve(vm);
    let mut answers = 0;
    while let Ok((message, _)) = host.receive::<FromVm>() {
        assert!(matches!(message, FromVm::Reply(_)), "{message:?}");
        answers += 1;
    }
    match served {
        Ok(()) => assert_eq!(answers, sent),
        Err(ServeError::Link(LinkError::Malformed(_))) => assert!(answers < sent),
        Err(error) => panic!("{error}"),
    }
}

/// Sends packets to the host, which sends requests, reads the events and waits for the end.
pub fn from_vm(input: &[u8]) {
    let (host, vm) = Channel::pair().unwrap();
    host.set_timeout(Some(Duration::from_secs(1))).unwrap();
    let conversation = Conversation::new(host);
    send_all(&vm, input);
    rustix::net::shutdown(&vm, Shutdown::Write).unwrap();
    for request in [Request::Save, Request::Pause] {
        if let Err(error) = conversation.ask(request) {
            assert!(crate::causes::chain(&error).len() < 40);
        }
    }
    let _ = conversation.events();
    while conversation.last_words().is_some() {}
    assert!(!conversation.has_events());
}

/// Sends the script's packets. Returns their number.
fn send_all(channel: &Channel, input: &[u8]) -> usize {
    let mut script = Script::new(input);
    let mut sent = 0;
    while !script.is_at_end() && sent < MOST {
        let count = usize::from(script.u8()) % (MOST + 1);
        let fds: Vec<OwnedFd> = (0..count).map(|_| fd(script.u8())).collect();
        let packet = script.long_piece();
        // An empty packet looks like the end of the link to the receiver.
        if packet.is_empty() {
            break;
        }
        let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !borrowed.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&borrowed));
        }
        sendmsg(channel, &[IoSlice::new(packet)], &mut control, SendFlags::NOSIGNAL).unwrap();
        sent += 1;
    }
    sent
}

/// Returns a file: `/dev/null`, a memfd with a state document, an empty memfd, or a pipe.
fn fd(kind: u8) -> OwnedFd {
    let memfd = || memfd_create("fuzz", MemfdFlags::CLOEXEC).unwrap();
    match kind % 4 {
        0 => File::open("/dev/null").unwrap().into(),
        1 => {
            let file = File::from(memfd());
            file.write_all_at(DOCUMENT, 0).unwrap();
            file.into()
        }
        2 => memfd(),
        _ => std::io::pipe().unwrap().0.into(),
    }
}
