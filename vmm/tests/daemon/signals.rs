//! A host ends when it is told to, and by no other signal.

use rustix::process::Signal;

use crate::host::Host;

#[test]
fn only_the_signals_that_end_a_host_end_it() {
    let mut host = Host::start();
    let others = [
        Signal::HUP,
        Signal::QUIT,
        Signal::PIPE,
        Signal::ALARM,
        Signal::USR1,
        Signal::USR2,
        Signal::VTALARM,
        Signal::PROF,
        Signal::IO,
        Signal::POWER,
        Signal::STKFLT,
        Signal::XCPU,
        Signal::XFSZ,
        Signal::TTIN,
        Signal::CONT,
    ];
    for signal in others {
        host.signal(signal);
        host.signal(Signal::CONT);
        host.answers();
    }
    host.signal(Signal::TERM);
    assert!(host.child.wait().unwrap().success());
}
