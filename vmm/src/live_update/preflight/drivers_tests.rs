use super::*;
use crate::config::HostSection;
use crate::guests::confinement::Confinement;
use crate::guests::process::VmProcess;
use crate::guests::{Guest, Life, Live};
use crate::machine::VmName;

fn config(text: &str) -> Config {
    Config::parse(text).unwrap()
}

fn machine() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let device = root.path().join("sys/devices/virtio0/block/vda");
    std::fs::create_dir_all(device.join("vda1")).unwrap();
    std::fs::create_dir_all(root.path().join("sys/class/block")).unwrap();
    std::fs::create_dir_all(root.path().join("sys/module/kvm_amd")).unwrap();
    let link = |to: &str, at: std::path::PathBuf| std::os::unix::fs::symlink(to, at).unwrap();
    std::fs::create_dir_all(device.join("device")).unwrap();
    link("../../../bus/drivers/virtio-blk", device.join("device/driver"));
    for name in ["vda", "vda/vda1"] {
        let at = root.path().join("sys/class/block").join(name.rsplit('/').next().unwrap());
        link(&format!("../../devices/virtio0/block/{name}"), at);
    }
    root
}

fn names(needs: &[Need]) -> Vec<&str> {
    needs.iter().map(|need| need.module.as_str()).collect()
}

#[test]
fn kvm_and_what_is_mounted_are_needed() {
    let root = machine();
    let next = config(
        "[host]\nmounts = [\n\
         { source = \"/dev/vda1\", target = \"/data\", type = \"ext4\" },\n\
         { source = \"none\", target = \"/tmp\", type = \"tmpfs\" }]\n",
    );
    let none = Modules::default();
    let (root, nothing) = (root.path(), Surroundings::without_vms());
    let first = Surroundings { is_first_process: true, root, ..nothing };
    let needs = needed(&first, Some(&next), &none);
    assert_eq!(names(&needs), ["kvm", "kvm_amd", "ext4", "virtio_blk"]);
    assert!(needs[2].what.contains("/data") && needs[3].what.contains("/dev/vda1"));
    let loadable = ["kvm", "virtio_blk"].map(str::to_owned).into();
    let modules = Modules { loadable, built_in: None };
    assert_eq!(names(&needed(&first, Some(&next), &modules)), ["kvm_amd", "ext4"]);
    let built_in = Some(built_in("kernel/fs/ext4/ext4.ko\n"));
    let modules = Modules { built_in, ..modules };
    let needs = needed(&first, Some(&next), &modules);
    assert_eq!(names(&needs), ["kvm_amd"]);
    let (found, unknown) = missing(needs.clone(), &modules, Some("7.3.4-a"));
    assert_eq!((found.len(), unknown), (1, Vec::new()));
    let text = found[0].to_string();
    assert!(text.contains("refusal `driver`") && text.contains("`kvm_amd`"), "{text}");
    assert!(text.contains("Linux 7.3.4-a does not list"), "{text}");
    assert_eq!(missing(needs.clone(), &none, Some("7.3.4-a")), (Vec::new(), needs));
    // The CPU is Intel's: the kernel has AMD's driver built in.
    std::fs::create_dir_all(root.join("proc")).unwrap();
    std::fs::write(root.join("proc/cpuinfo"), "flags : fpu vmx\n").unwrap();
    assert_eq!(names(&needed(&first, None, &none)), ["kvm"]);
    std::fs::write(root.join("proc/cpuinfo"), "flags : fpu svm\n").unwrap();
    // A host on a distribution has its file systems already.
    let other = Surroundings { is_first_process: false, ..first };
    assert_eq!(names(&needed(&other, Some(&next), &none)), ["kvm", "kvm_amd"]);
}

#[test]
fn the_driver_of_a_watchdog_that_runs_is_needed() {
    let root = tempfile::tempdir().unwrap();
    let class = root.path().join("sys/class/watchdog");
    for (name, module, state) in [
        ("watchdog0", "i6300esb", Some("active\n")),
        ("watchdog1", "softdog", Some("inactive\n")),
        ("watchdog2", "iTCO_wdt", None),
    ] {
        let driver = class.join(name).join("device/driver");
        std::fs::create_dir_all(&driver).unwrap();
        let module = format!("../../../../../module/{module}");
        std::os::unix::fs::symlink(module, driver.join("module")).unwrap();
        if let Some(state) = state {
            std::fs::write(class.join(name).join("state"), state).unwrap();
        }
    }
    let root = root.path();
    let first = Surroundings { is_first_process: true, root, ..Surroundings::without_vms() };
    let needs = needed(&first, None, &Modules::default());
    assert_eq!(names(&needs), ["kvm", "i6300esb"]);
    assert!(needs[1].what.contains("/dev/watchdog0"), "{needs:?}");
    // The service manager of a distribution loads it.
    let service = Surroundings { is_first_process: false, ..first };
    assert_eq!(names(&needed(&service, None, &Modules::default())), ["kvm"]);
}

#[test]
fn a_driver_that_is_missing_is_refused_and_an_unknown_one_is_a_note() {
    let need = Need::new("ext4", "the file system ext4 of /data".to_owned()).unwrap();
    let severity = |presence| need.finding(presence).map(|finding| finding.name);
    assert_eq!(severity(Presence::BuiltIn), None);
    assert_eq!(severity(Presence::Module), Some(Check::Driver));
    assert_eq!(severity(Presence::Absent), Some(Check::Driver));
    assert_eq!(severity(Presence::Unknown), Some(Check::DriverUnknown));
    let text = need.finding(Presence::Module).unwrap().to_string();
    assert!(text.contains("/data") && text.contains("CONFIG_EXT4_FS=y"), "{text}");
    assert_eq!(Need::new("no-such-driver", String::new()), None);
}

#[test]
fn modules_are_known_by_their_files() {
    assert_eq!(module_name("lib/modules/kvm-amd.ko.xz").as_deref(), Some("kvm_amd"));
    assert_eq!(module_name("kvm.ko").as_deref(), Some("kvm"));
    assert_eq!(module_name("lib/modules/modules.order"), None);
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join("lib/modules/7.3.4-a");
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("modules.dep"), "a/kvm-amd.ko: a/kvm.ko\na/kvm.ko:\n").unwrap();
    std::fs::write(directory.join("modules.builtin"), "kernel/fs/ext4/ext4.ko\n").unwrap();
    let found = |name: &str| installed(root.path(), release(Some(name)));
    let there = found("7.3.4-a (builder) #1");
    assert_eq!(there.loadable, ["kvm", "kvm_amd"].map(str::to_owned).into());
    assert_eq!(there.built_in, Some(["ext4".to_owned()].into()));
    for other in ["../7.3.4-a", "7.2", "..", " "] {
        assert_eq!(found(other), Modules::default(), "{other:?}");
    }
    assert_eq!(release(None), None);
}

#[test]
fn what_the_devices_of_a_running_vm_use_is_needed() {
    let text = "[[vm]]\nname = \"web\"\nmemory = \"size=64M\"\nkernel = \"/k\"\nserial = \"port=web\"\n\
                net = [\"tap=vm0,bridge=br0\", \"tap=vm1\"]\n";
    let machine = config(text).machines.remove(0);
    let confinement = Confinement::new(&HostSection::default());
    let mut vm = Guest::new(machine, &confinement);
    let names = |vm: &Guest, without: &[VmName]| {
        let root = tempfile::tempdir().unwrap();
        let (vms, root) = (std::slice::from_ref(vm), root.path());
        let here = Surroundings { vms, without, root, ..Surroundings::without_vms() };
        let needs = needed(&here, None, &Modules::default());
        needs.into_iter().map(|need| (need.module, need.what)).collect::<Vec<_>>()
    };
    assert_eq!(names(&vm, &[]).len(), 1, "KVM, for a VM that is stopped");
    let (process, _link) = VmProcess::idle(&confinement);
    vm.life = Life::Live(Live::without_ram(process));
    let found = names(&vm, &[]);
    let modules: Vec<_> = found.iter().map(|(module, _)| module.as_str()).collect();
    assert_eq!(modules, ["kvm", "virtio_console", "tun", "bridge"]);
    assert!(found[2].1.contains("taps") && found[2].1.contains("VM `web`"), "{found:?}");
    let name = vm.machine.name.clone();
    assert_eq!(names(&vm, &[name]).len(), 1, "it stays behind");
}
