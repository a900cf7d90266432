//! `ctl rehearse` of a host that cannot rehearse: it is not the first process of its machine.

use crate::host::Host;

#[test]
fn a_host_whose_program_is_not_in_the_initramfs_refuses_to_rehearse_and_serves_on() {
    let host = Host::start();
    let refused = host.ctl(&["rehearse", "--kernel", "/nowhere", "--initramfs", "/nowhere"]);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains("first process of its machine"), "{said}");
    assert_eq!(refused.status.code(), Some(1), "{said}");
    // The preflight comes before the rehearsal of an update.
    let next = ["--kernel", "/nowhere", "--initramfs", "/nowhere"];
    let refused = host.ctl(&[&["update", "--rehearse"], &next[..]].concat());
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains("/nowhere") && said.contains("kernel-file"), "{said}");
    assert!(said.contains("guests: running"), "{said}");
    host.answers();
}
