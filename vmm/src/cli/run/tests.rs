use std::collections::BTreeSet;

use clap::Parser;

use super::*;
use crate::devices::serial::SerialOptions;
use crate::devices::virtio::block::BlockOptions;
use crate::machine::{Boot, DiskBoot, KernelBoot, Machine};

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    arguments: Arguments,
}

/// The arguments of a line, with a kernel in front.
fn arguments(line: &str) -> Arguments {
    let words = ["run", "--kernel", "/k"].into_iter().chain(line.split_whitespace());
    Line::try_parse_from(words).expect(line).arguments
}

fn config(line: &str) -> Result<Config, RunError> {
    Config::parse(&arguments(line).to_config()?).map_err(config_error)
}

fn machine(line: &str) -> Machine {
    config(line).expect(line).machines.remove(0)
}

fn refused(line: &str) -> String {
    let error = crate::causes::chain(&config(line).expect_err(line)).join(": ");
    assert!(!error.contains('\n'), "{error}");
    error
}

/// The options of the devices of one kind, by its key.
fn options(machine: &Machine, key: &str) -> Vec<String> {
    let of_kind = machine.devices.iter().filter(|device| device.options.kind().key == key);
    of_kind.map(|device| format!("{:?}", device.options)).collect()
}

fn kernel(machine: &Machine) -> &KernelBoot {
    match &machine.boot {
        Boot::Kernel(boot) => boot,
        Boot::Disk(_) => panic!("it boots from its disk"),
    }
}

#[test]
fn the_manual_lists_all_that_is_accepted_and_changes_nothing() {
    let manual = include_str!("../../../../docs/run.md");
    let row = |option: &str| {
        let start = format!("| `--{option}` | `");
        manual.lines().map(str::trim_start).find(|line| line.starts_with(&start)).expect(option)
    };
    let of_kinds = KINDS.iter().filter_map(|kind| Some((kind.key, kind.command_line?.harmless)));
    let of_kinds = of_kinds.flat_map(|(option, harmless)| {
        harmless
            .iter()
            .flat_map(move |(key, values)| values.iter().map(move |v| (option, *key, *v)))
    });
    for (option, key, value) in of_kinds.chain(foreign::HARMLESS.iter().copied()) {
        assert!(row(option).contains(&format!("`{key}={value}`")), "{option}: {key}={value}");
    }
}

#[test]
fn a_kernel_is_enough_and_the_rest_is_as_in_cloud_hypervisor() {
    let machine = machine("");
    assert_eq!(machine.cpus, 1);
    assert_eq!(machine.ram_bytes, 512 << 20);
    assert_eq!(kernel(&machine).kernel, Path::new("/k"));
    assert_eq!(options(&machine, "serial"), [r"Serial(Tty)"]);
    assert!(options(&machine, "rng")[0].contains("/dev/urandom"));
    assert_eq!(options(&machine, "disk").len(), 0);
}

#[test]
fn every_option_reaches_the_machine() {
    let line = "--initramfs i --cmdline console=ttyS0 --cpus boot=2 --memory size=2G --disk path=a \
                path=b,readonly=on --net tap=t --disk path=c --serial null --console off --rng \
                src=/dev/random --api-socket s -vv";
    let machine = machine(line);
    assert_eq!(kernel(&machine).initramfs.as_deref(), Some(Path::new("i")));
    assert_eq!(kernel(&machine).cmdline, "console=ttyS0");
    assert_eq!((machine.cpus, machine.ram_bytes), (2, 2 << 30));
    let disk = |path: &str, readonly| {
        // One queue for each of the two vCPUs.
        let more_queues = 1;
        let path = path.into();
        let options = BlockOptions { path, readonly, more_queues, ..BlockOptions::default() };
        format!("VirtioBlk({options:?})")
    };
    let disks = [disk("a", false), disk("b", true), disk("c", false)];
    assert_eq!(options(&machine, "disk"), disks);
    assert_eq!(options(&machine, "serial"), [format!("Serial({:?})", SerialOptions::Off)]);
    assert!(options(&machine, "rng")[0].contains("/dev/random"));
    assert!(options(&machine, "net")[0].contains("\"t\""));
    assert_eq!(config(line).unwrap().host.socket.as_deref(), Some(Path::new("s")));
    assert_eq!(arguments(line).level(), LevelFilter::DEBUG);
}

/// The lines of a Markdown file that run `perennial run`, as a shell splits them into words.
fn command_lines(markdown: &str) -> Vec<Vec<String>> {
    let lines = markdown.replace("\\\n", " ");
    let lines = lines.lines().filter_map(|line| line.strip_prefix("perennial run "));
    let words = |line: &str| {
        let (mut words, mut in_quotes) = (vec!["run".to_owned(), String::new()], false);
        for c in line.chars() {
            match c {
                '"' => in_quotes = !in_quotes,
                ' ' if !in_quotes => words.push(String::new()),
                _ => words.last_mut().unwrap().push(c),
            }
        }
        words.retain(|word| !word.is_empty());
        words
    };
    lines.map(words).collect()
}

#[test]
fn each_command_line_of_the_documents_is_accepted() {
    let readme = command_lines(include_str!("../../../../README.md"));
    assert!(readme.iter().flatten().any(|word| word == "--cloud-init"), "{readme:?}");
    let manual = command_lines(include_str!("../../../../docs/run.md"));
    assert!(readme.len() >= 2 && !manual.is_empty());
    for line in readme.into_iter().chain(manual) {
        // `perennial run` would make a tap, and add its name.
        let line: Vec<_> =
            line.into_iter().map(|word| word.replace("tap=,", "tap=vmtap0,")).collect();
        let text = Line::try_parse_from(&line).unwrap().arguments.to_config().unwrap();
        let parsed = Config::parse(&text).map_err(config_error);
        assert!(parsed.is_ok(), "{line:?}: {parsed:?}");
    }
}

#[test]
fn the_directory_of_a_seed_is_relative_to_the_working_directory() {
    let here = std::env::current_dir().unwrap().join("seed");
    assert_eq!(machine("--cloud-init seed"), machine(&format!("--cloud-init {}", here.display())));
    assert!(refused("--cloud-init=").contains("path of a directory"));
}

#[test]
fn two_vms_have_different_addresses_and_uuids_and_what_is_given_stays() {
    let line = |line| super::parse(&arguments(line).to_config().unwrap()).unwrap();
    let machine = |text| line(text).machines.remove(0);
    let [one, other] = [(); 2].map(|()| machine("--net tap=a tap=b"));
    let taps = [options(&one, "net"), options(&other, "net")].concat();
    let different: BTreeSet<&str> =
        taps.iter().map(|tap| tap.split_once("mac: ").unwrap().1).collect();
    assert_eq!(different.len(), 4, "{taps:?}");
    assert!(!taps.iter().any(|tap| tap.contains("mac: None")), "{taps:?}");
    let uuids = [options(&one, "platform"), options(&other, "platform")].concat();
    assert!(uuids[0] != uuids[1] && !uuids[0].contains("uuid: None"), "{uuids:?}");
    let given =
        "--net tap=a,mac=02:00:00:00:00:07 --platform uuid=6f1f2f5c-8a0e-4c39-9d0b-2f6b1c0de5a7";
    assert_eq!(machine(given), config(given).unwrap().machines.remove(0));
}

#[test]
fn short_forms_mean_the_same() {
    assert_eq!(machine("--cpus 2 --memory 1G"), machine("--cpus boot=2,max=2 --memory size=1G"));
    let socket = |line| config(line).unwrap().host.socket;
    assert_eq!(socket("--api-socket path=/s"), socket("--api-socket /s"));
    assert_eq!(kernel(&machine("--cmdline --quiet")).cmdline, "--quiet");
}

#[test]
fn each_mistake_is_named_with_its_option_and_what_would_be_right() {
    for (line, parts) in [
        ("--cpus two", ["--cpus two: ", "boot is a number"]),
        ("--cpus boot=", ["--cpus boot=: ", "not ``"]),
        ("--cpus max=2", ["--cpus max=2: ", "boot=2"]),
        ("--cpus boot=1,max=2", ["--cpus ", "max must be 1"]),
        ("--cpus boot=1,boot=2", ["--cpus ", "twice"]),
        ("--cpus boot=0", ["0 vCPUs", "1 to 64"]),
        ("--cpus bot=1", ["--cpus bot=1: ", "did you mean `boot`"]),
        ("--memory 2X", ["--memory size=2X: ", "512M"]),
        ("--memory 1K", ["1024 bytes", "multiple of 2 MiB"]),
        ("--memory size=1G,", ["--memory size=1G,: ", "key=value"]),
        ("--memory 2GiB", ["--memory size=2GiB: ", "did you mean 2G?"]),
        ("--memory 1024", ["1024 bytes", "with a unit that is size=1024M"]),
        ("--disk img", ["--disk img: ", "did you mean `path=img`"]),
        ("--disk file=img", ["--disk file=img: ", "did you mean `path`"]),
        ("--disk path=a,ro=on", ["--disk ", "did you mean `readonly`"]),
        ("--disk path=a,readonly", ["--disk ", "write `readonly=` and a value"]),
        ("--disk path=", ["--disk path=: ", "path=FILE"]),
        ("--disk pth=a", ["--disk pth=a: ", "did you mean `path`"]),
        ("--disk path=a,readonly=yes", ["--disk ", "on or off, not `yes`"]),
        ("--disk path=a,colour=red", ["--disk ", "there is path, readonly"]),
        (
            "--disk path=a,bw_size=1G,bw_refill_time=1s",
            ["bw_refill_time: ", "milliseconds, not `1s`"],
        ),
        ("--net tap=a/b", ["--net tap=a/b: ", "a/b"]),
        ("--net tap=a,mac=x", ["--net tap=a,mac=x: ", "such as 52:54:00:12:34:56"]),
        ("--net tap=a,queues=0", ["--net ", "from 1 to 8, not `0`"]),
        ("--disk path=a,path=b", ["--disk ", "`path` is given twice"]),
        ("--disk path=a path=a", ["the disk a twice", "readonly=on for all of them"]),
        ("--disk path=a,image_type=qcow2", ["--disk ", "the only format there is, not `qcow2`"]),
        ("--memory size=1.5G", ["--memory size=1.5G: ", "such as 512M or 2G"]),
        ("--serial on", ["--serial on: ", "file=PATH"]),
        ("--serial tty --serial off", ["2 of `serial`", "at most 1"]),
        ("--rng /dev/urandom", ["--rng /dev/urandom: ", "did you mean `src=/dev/urandom`"]),
        ("--console tty", ["--console tty: ", "console=ttyS0"]),
        ("--api-socket fd=3", ["--api-socket fd=3: ", "--api-socket PATH"]),
        ("--api-socket path=", ["--api-socket path=: ", "--api-socket PATH"]),
    ] {
        let error = refused(line);
        parts.iter().for_each(|part| assert!(error.contains(part), "{line}: {error}"));
    }
}

#[test]
fn a_guest_without_a_kernel_boots_its_first_disk_and_is_refused_without_one() {
    let parsed = |line: &[&str]| Line::try_parse_from([&["run"], line].concat()).unwrap().arguments;
    let text = parsed(&["--disk", "path=a", "--cmdline", "quiet"]).to_config().unwrap();
    let machine = Config::parse(&text).unwrap().machines.remove(0);
    assert_eq!(machine.boot, Boot::Disk(DiskBoot { cmdline: "quiet".to_owned() }));
    for line in [&["--cmdline", "quiet"][..], &["--disk", "path=a", "--initramfs", "i"]] {
        let error = parsed(line).to_config().unwrap_err().to_string();
        assert!(error.contains("--kernel FILE") && error.contains("--disk path=FILE"), "{error}");
    }
}

#[test]
fn what_only_cloud_hypervisor_has_is_named_as_such() {
    for (line, parts) in [
        (
            "--firmware /fw",
            [
                "Cloud Hypervisor has `--firmware`",
                "hypervisor-fw or CLOUDHV.fd is needed: leave it",
            ],
        ),
        ("--igvm /fw", ["Cloud Hypervisor has `--igvm`", "boots what is on its first `--disk`"]),
        ("--watchdog", ["Cloud Hypervisor has `--watchdog`", "Perennial has not: leave it out"]),
        ("--seccomp false", ["Cloud Hypervisor has `--seccomp`", "always on"]),
        ("--seccomp true --seccomp log", ["Cloud Hypervisor has `--seccomp`", "always on"]),
        (
            "--landlock-rules path=/a,access=rw",
            ["Cloud Hypervisor has `--landlock-rules`", "opens no file"],
        ),
        ("--fs tag=a,socket=b tag=c", ["Cloud Hypervisor has `--fs`", "`--disk`"]),
        ("--memory size=1G,shared=off", ["Cloud Hypervisor has `shared`", "always shared"]),
        (
            "--memory size=1G,hugepages=on",
            ["Cloud Hypervisor has `hugepages`", "transparent huge pages"],
        ),
        (
            "--disk path=a,queue_size=1024",
            ["Cloud Hypervisor has `queue_size`", "a queue has 256 entries"],
        ),
        ("--disk path=a,serial=x", ["Cloud Hypervisor has `serial`", "file system"]),
        ("--disk path=a,iommu=on", ["Cloud Hypervisor has `iommu`", "leave it out"]),
        (
            "--net tap=a,ip=10.0.0.1",
            ["Cloud Hypervisor has `ip`", "give the tap an address with `ip`"],
        ),
        ("--net tap=a,offload_tso=off", ["Cloud Hypervisor has `offload_tso`", "ethtool"]),
        ("--cpus boot=1,topology=1:1:1:1", ["Cloud Hypervisor has `topology`", "--cpus"]),
        ("--net tap=a,vhost_mode=client", ["Cloud Hypervisor has `vhost_mode`", "leave it out"]),
        ("--rng src=/dev/random,iommu=on", ["Cloud Hypervisor has `iommu`", "--rng"]),
    ] {
        let error = refused(line);
        parts.iter().for_each(|part| assert!(error.contains(part), "{line}: {error}"));
    }
}

#[test]
fn what_changes_nothing_is_accepted_as_cloud_hypervisor_writes_it() {
    for (line, same) in [
        ("--seccomp true --landlock --disk path=a,id=d0", "--disk path=a"),
        (
            "--disk path=a,sparse=on,queue_size=128,num_queues=1,_disable_aio=on",
            "--disk path=a,num_queues=1",
        ),
        ("--disk path=a,iommu=false,pci_segment=0", "--disk path=a"),
        ("--memory size=1G,shared=on,thp=on,hugepages=off", "--memory size=1G"),
        ("--memory shared=true,size=1G", "--memory 1G"),
        ("--cpus boot=2,kvm_hyperv=off", "--cpus boot=2"),
        ("--net tap=a,mac=,ip=,mask=,id=n", "--net tap=a"),
        ("--net tap=a,num_queues=4,queue_size=256,offload_tso=on", "--net tap=a,queues=2"),
        ("--rng src=/dev/random,iommu=off", "--rng src=/dev/random"),
        ("--platform num_pci_segments=1,serial_number=x", "--platform serial_number=x"),
    ] {
        assert_eq!(machine(line), machine(same), "{line}");
    }
}

/// The command lines of Cloud Hypervisor's README, with the tap that `perennial run` makes for the empty `tap=`.
#[test]
fn the_first_lines_of_cloud_hypervisors_readme_run() {
    let line = "--disk path=focal-server-cloudimg-amd64.raw path=/tmp/ubuntu-cloudinit.img --cpus boot=4 \
                --memory size=1024M --net tap=vmtap0,mac=,ip=,mask=";
    let with_kernel =
        machine(&format!("--console off --serial tty --cmdline console=ttyS0 {line}"));
    assert_eq!((with_kernel.cpus, with_kernel.ram_bytes), (4, 1 << 30));
    assert_eq!(options(&with_kernel, "disk").len(), 2);
    let words = ["run"].into_iter().chain(line.split_whitespace());
    let from_disk = Line::try_parse_from(words).unwrap().arguments.to_config().unwrap();
    let from_disk = Config::parse(&from_disk).unwrap().machines.remove(0);
    assert!(matches!(from_disk.boot, Boot::Disk(_)));
    assert_eq!(from_disk.devices, with_kernel.devices);
    let firmware = Line::try_parse_from(["run", "--kernel", "./hypervisor-fw"]).unwrap().arguments;
    assert!(firmware.hints().unwrap().contains("without --kernel"));
    assert_eq!(arguments("--cmdline console=ttyS0").hints(), None);
}

#[test]
fn one_who_knows_qemu_is_told_what_to_write() {
    let told = |line: &str| qemu(&line.split_whitespace().map(Into::into).collect::<Vec<_>>());
    for (line, option, instead) in [
        ("-kernel k -append console=ttyS0", "-kernel", "`--kernel FILE`"),
        ("--kernel k -m 512", "-m", "`--memory size=512M`"),
        ("--kernel k -smp 2", "-smp", "`--cpus boot=2`"),
        (
            "-bios OVMF.fd",
            "-bios",
            "nothing: without `--kernel` the guest boots what is on its first disk, and needs no firmware",
        ),
        ("--kernel k --drive file=d.img", "--drive", "`--disk path=FILE`"),
        ("--kernel k --initrd i", "--initrd", "`--initramfs FILE`"),
        ("-nographic", "-nographic", "nothing: the serial port has the terminal"),
    ] {
        assert_eq!(told(line), Some((option.to_owned(), instead)), "{line}");
    }
    for line in ["--kernel k --cmdline -m --serial tty -v", "--disk path=-m", ""] {
        assert_eq!(told(line), None, "{line}");
    }
}

#[test]
fn a_mistyped_option_is_told_what_was_meant() {
    for (typed, meant) in [("--memry", "--memory"), ("--disks", "--disk"), ("--kernal", "--kernel")]
    {
        let error = Line::try_parse_from(["run", typed, "x"]).unwrap_err().to_string();
        assert!(error.contains(&format!("'{meant}'")), "{error}");
    }
}

#[test]
fn help_says_what_the_options_of_every_kind_are() {
    let help = Line::try_parse_from(["run", "--help"]).unwrap_err().to_string();
    for kind in crate::devices::catalog::KINDS {
        let Some(command_line) = kind.command_line else { continue };
        assert!(help.contains(&format!("--{} ", kind.key)), "{help}");
        assert!(command_line.usage.contains('='), "{}", kind.key);
    }
    assert!(!help.contains("firmware"), "{help}");
}

#[test]
fn one_who_would_see_nothing_gets_a_hint() {
    assert!(arguments("").hints().unwrap().contains("console=ttyS0"));
    assert!(arguments("--cmdline console=hvc0").hints().unwrap().contains("virtio-console"));
    for silent in ["--cmdline console=ttyS0", "--serial off", "--cmdline console=tty0"] {
        assert_eq!(arguments(silent).hints(), None, "{silent}");
    }
}
