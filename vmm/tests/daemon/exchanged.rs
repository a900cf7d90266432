//! State documents that two VMs have exchanged when the next host gets them.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::thread;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use vmm::live_update::index::Index;
use vmm::live_update::manifest::Manifest;
use vmm::state::document::{read_document, write_document};

use crate::guests::{configuration, has_kvm};
use crate::host::Host;
use crate::kernel::COUNTS_A_BOOT;

/// The document memfds of a process with this name.
fn memfds(process: u32, name: &str) -> Vec<File> {
    let (mut seen, mut files) = (BTreeSet::new(), Vec::new());
    for fd in fs::read_dir(format!("/proc/{process}/fd")).unwrap().flatten() {
        let is_named = fs::read_link(fd.path())
            .is_ok_and(|target| target.to_string_lossy().starts_with(&format!("/memfd:{name} ")));
        if is_named {
            let file = File::options().read(true).write(true).open(fd.path()).unwrap();
            if seen.insert(file.metadata().unwrap().ino()) {
                files.push(file);
            }
        }
    }
    files
}

fn contents(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// Exchanges the documents of the VMs `vm-one` and `vm-two` in a host that has not looked at them yet. If they are `hidden`, the
/// manifest and the index say that this is right.
fn exchange(host: u32, hidden: bool) {
    let states = memfds(host, "state");
    let of = |name: &str| {
        let names = |part: &[u8]| part == name.as_bytes();
        let mut has = states.iter().filter(|file| contents(file).windows(name.len()).any(names));
        has.next().unwrap_or_else(|| panic!("no document of {name:?} among {}", states.len()))
    };
    let (one, two) = (of("vm-one"), of("vm-two"));
    let (bytes_of_one, bytes_of_two) = (contents(one), contents(two));
    assert_eq!(bytes_of_one.len(), bytes_of_two.len(), "VMs that are alike");
    one.write_all_at(&bytes_of_two, 0).unwrap();
    two.write_all_at(&bytes_of_one, 0).unwrap();
    if !hidden {
        return;
    }
    let (manifest_files, index_files) = (memfds(host, "manifest"), memfds(host, "index"));
    let ([manifest_file], [index_file]) = (&manifest_files[..], &index_files[..]) else {
        panic!("{} manifests and {} indexes", manifest_files.len(), index_files.len())
    };
    let mut manifest: Manifest = read_document(&contents(manifest_file)).unwrap();
    let place = |name: &str| manifest.vms.iter().position(|vm| vm.machine.name.as_str() == name);
    let (one, two) = (place("vm-one").unwrap(), place("vm-two").unwrap());
    let digests = [one, two].map(|vm| manifest.vms[vm].state_digest);
    [manifest.vms[one].state_digest, manifest.vms[two].state_digest] = [digests[1], digests[0]];
    let bytes = write_document(&manifest).unwrap();
    let index: Index = read_document(&contents(index_file)).unwrap();
    let again = Index::of(&manifest, &bytes);
    let is_new = |name: &str| !again.sessions.iter().any(|session| session.name == name);
    let carried: Vec<_> =
        index.sessions.iter().filter(|session| is_new(&session.name)).cloned().collect();
    let index = write_document(&again.with(&carried)).unwrap();
    for (file, bytes) in [(manifest_file, &bytes), (index_file, &index)] {
        assert_eq!(contents(file).len(), bytes.len());
        file.write_all_at(bytes, 0).unwrap();
    }
}

/// Hands over to a host that gets exchanged documents.
fn hand_over_exchanged(host: &mut Host, breakpoint: &Path, hidden: bool) {
    fs::write(breakpoint, "look").unwrap();
    let pid = host.child.id();
    let exchanges = thread::spawn(move || {
        let process = Pid::from_raw(pid as i32).unwrap();
        let stops = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        let status = waitid(WaitId::Pid(process), stops).unwrap().unwrap();
        assert!(status.stopped(), "the host has ended");
        exchange(pid, hidden);
        kill_process(process, Signal::CONT).unwrap();
    });
    host.hands_over(&[]);
    exchanges.join().unwrap();
}

/// Which boot of it a guest's memory says this is.
fn boot_of(host: &Host, name: &str) -> String {
    let output = host.ctl(&["memory", name, "0x200004", "4"]);
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn vms_that_have_exchanged_their_documents_are_preserved_and_another_runs_on() {
    if !has_kvm() {
        return;
    }
    for (hidden, named) in
        [(false, "its state document has the digest"), (true, "of another machine")]
    {
        let names = ["vm-one", "vm-two", "vm-three"];
        let vms = names.map(|name| (name, COUNTS_A_BOOT, ""));
        let (mut command, directory) = Host::command(|place| configuration(place, "", &vms));
        let breakpoint = directory.path().join("breakpoint");
        command.env("PERENNIAL_BREAKPOINT", &breakpoint);
        let mut host = Host::run(command, directory);
        host.wait_until_ready("boot cold");
        names.iter().for_each(|name| host.counts_on(name));
        let boots = names.map(|name| boot_of(&host, name));
        hand_over_exchanged(&mut host, &breakpoint, hidden);
        for name in ["vm-one", "vm-two"] {
            let vm = host.vm(name);
            assert_eq!(vm["state"], "preserved", "{vm}");
            assert!(vm["error"].to_string().contains(named), "{vm}");
        }
        host.counts_on("vm-three");
        assert_eq!(boot_of(&host, "vm-three"), boots[2]);
        if hidden {
            continue;
        }
        // Nothing is lost: with the right documents they run on.
        exchange(host.child.id(), false);
        for (name, boot) in names.iter().zip(boots).take(2) {
            let restored = host.ctl(&["restore", name]);
            assert!(restored.status.success(), "{restored:?}");
            host.counts_on(name);
            assert_eq!(boot_of(&host, name), boot);
        }
    }
}
