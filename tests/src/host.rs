//! A host in QEMU with its VMs, from boot to power-off, over any number of live updates.
//!
//! The harness sends requests to the control port, and reads each guest's serial output from a separate
//! port. If a host is dropped before [`Host::power_off`] or [`Host::done`], its test has failed: the
//! failure then includes the last lines of the console and a diagnosis of the host and its silent guests.

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::control::{self, Control, ControlError};
use crate::datagrams::Datagrams;
use crate::diagnosis::{self, Silent};
use crate::guest::Guest;
use crate::network::{Connection, ECHO_PORT};
use crate::plan::{CONTROL_PORT, DiskKind, HostPlan, Prepared, VmDisk, VmPort};
use crate::qemu::{self, Accelerator, Machine, Qemu};
use crate::report::{Report, Status};
use crate::suite;
use crate::systemd::ORDERS_PORT;
use crate::wire::Sent;
use crate::workload::disk::{self, Contents};

/// Longest time from power-on to `ready`, and from an update's request to the next `ready`. The time
/// suffices under emulation on a busy computer.
pub const BOOT: Duration = Duration::from_secs(480);

/// Longest time for an answer of a host that runs.
pub const ANSWER: Duration = Duration::from_secs(60);

/// Longest time for a guest to boot, and to verify all of its memory twice.
pub const WORK: Duration = Duration::from_secs(480);

/// The steps of a live update, and of a handover, in order.
pub const STEPS: [&str; 7] =
    ["load", "preserve-ram", "pause", "save", "preserve-state", "sync", "jump"];

/// Anything that makes a test fail.
pub type Failure = Box<dyn Error>;

/// A running host.
#[derive(Debug)]
pub struct Host {
    qemu: Qemu,
    control: Control,
    /// The port for the commands of a shell, if the host is under systemd.
    orders: Option<UnixStream>,
    guests: Vec<Guest>,
    vm_disks: Vec<VmDisk>,
    /// What QEMU runs, and on what, for another start.
    machine: (Machine, Accelerator),
    vm_ports: Vec<VmPort>,
    /// Name of each VM and its number of vCPUs.
    vcpus: Vec<(String, u32)>,
    /// Paths of the symbols of the host's kernels, and of the guests' kernel, if available.
    kernels: [Option<PathBuf>; 2],
    done: bool,
}

impl Host {
    /// Builds the images, boots, and waits until the host is ready.
    pub fn boot(plan: &HostPlan) -> Result<(Self, Status), Failure> {
        Self::boot_on(plan, qemu::accelerator())
    }

    /// As [`Host::boot`], on this accelerator.
    pub fn boot_on(plan: &HostPlan, accelerator: Accelerator) -> Result<(Self, Status), Failure> {
        let directory = qemu::scratch_directory()?;
        let prepared = plan.prepare(directory.path())?;
        Self::start(plan, prepared, accelerator, directory)
    }

    fn start(
        plan: &HostPlan,
        prepared: Prepared,
        accelerator: Accelerator,
        directory: TempDir,
    ) -> Result<(Self, Status), Failure> {
        let mut qemu = Qemu::start(&prepared.machine, accelerator, directory)?;
        let mut port = |name: &str| qemu.take_port(name).ok_or(format!("two ports called {name}"));
        let control = Control::new(port(CONTROL_PORT)?)?;
        let orders = plan.under_systemd.then(|| port(ORDERS_PORT)).transpose()?;
        let guests = plan
            .vms
            .iter()
            .map(|vm| Ok(Guest::listen(&vm.name, port(&vm.port())?)?))
            .collect::<Result<_, Failure>>()?;
        let Prepared { machine, vm_disks, vm_ports } = prepared;
        let machine = (machine, accelerator);
        let kernels = plan.symbols();
        let vcpus = plan.vms.iter().map(|vm| (vm.name.clone(), vm.cpus)).collect();
        let mut host = Self {
            qemu,
            control,
            orders,
            guests,
            vm_disks,
            machine,
            vm_ports,
            vcpus,
            kernels,
            done: false,
        };
        let status = host.wait_until_ready()?;
        Ok((host, status))
    }

    /// Pulls the plug of the host's machine: what the host has in its memory is lost. Then boots it again with its
    /// disks as they are. `plan` is the host's.
    pub fn pull_plug_and_boot(mut self, plan: &HostPlan) -> Result<(Self, Status), Failure> {
        let (machine, accelerator) = self.machine.clone();
        let vm_disks = std::mem::take(&mut self.vm_disks);
        let vm_ports = std::mem::take(&mut self.vm_ports);
        self.done = true;
        let directory = self.qemu.kill().ok_or("the machine has no directory")?;
        // The machine's place among those that may run is free before it is taken again.
        drop(self);
        Self::start(plan, Prepared { machine, vm_disks, vm_ports }, accelerator, directory)
    }

    /// Leaves the control port, and comes back as another client.
    pub fn connect_again(&mut self) -> Result<(), Failure> {
        self.control.leave();
        self.control = Control::new(self.qemu.connect_again()?)?;
        Ok(())
    }

    fn wait_until_ready(&mut self) -> Result<Status, Failure> {
        let deadline = Instant::now() + BOOT;
        loop {
            // Waits in slices, to notice between them that the machine has ended.
            let slice = Duration::from_secs(2).min(deadline.duration_since(Instant::now()));
            match self.control.event("ready", slice) {
                Ok(mut event) => {
                    self.guests.iter().for_each(Guest::resumed);
                    return Ok(serde_json::from_value(event["status"].take())?);
                }
                Err(ControlError::Timeout { .. }) if Instant::now() < deadline => {}
                Err(error) => return Err(error.into()),
            }
            if self.qemu.has_ended() {
                return Err("the machine ended before its host was ready".into());
            }
        }
    }

    /// The guests, in the order of the plan.
    pub fn guests(&self) -> &[Guest] {
        &self.guests
    }

    /// A connection from outside to a guest on the network, with data on its way in both directions. The
    /// guest is waited for.
    pub fn connect(&self, name: &str) -> Result<Connection, Failure> {
        Ok(Connection::open(name, self.echo_port(name)?)?)
    }

    /// Datagrams from outside to a guest on the network, which sends them back. The guest is waited for.
    pub fn send_datagrams(&self, name: &str) -> Result<Datagrams, Failure> {
        Ok(Datagrams::start(name, self.echo_port(name)?)?)
    }

    /// Waits until the guest sends back what it gets, and returns the port of this computer that leads to it.
    fn echo_port(&self, name: &str) -> Result<u16, Failure> {
        let guest = self.guests.iter().find(|guest| guest.name() == name).ok_or("no such guest")?;
        let port = self.port(name, ECHO_PORT)?;
        guest.wait_for_note("echo", WORK)?;
        Ok(port)
    }

    /// The port of this computer that leads to a port of a guest.
    pub fn port(&self, name: &str, guest_port: u16) -> Result<u16, Failure> {
        let leads = |port: &&VmPort| port.vm == name && port.guest_port == guest_port;
        let port = self.vm_ports.iter().find(leads);
        Ok(port.ok_or_else(|| format!("no port leads to port {guest_port} of {name}"))?.port)
    }

    /// Removes a guest from all checks: the test has removed its VM.
    pub fn forget_guest(&mut self, name: &str) {
        self.guests.retain(|guest| guest.name() != name);
        self.vm_disks.retain(|disk| disk.vm != name);
    }

    /// Waits until every guest has booted and made progress in each kind of work.
    pub fn wait_for_guests(&self) -> Result<(), Failure> {
        for guest in &self.guests {
            let booted = guest.wait_for_note("boot", WORK)?;
            let expected = self.vcpus.iter().find(|(name, _)| name == guest.name());
            if expected.is_some_and(|(_, vcpus)| booted["vcpus"] != *vcpus) {
                let error =
                    format!("guest {} booted with a wrong number of vCPUs: {booted}", guest.name());
                return Err(error.into());
            }
        }
        for guest in &self.guests {
            guest.wait_until_settled(WORK)?;
        }
        Ok(())
    }

    /// Sends a request and waits for its reply.
    pub fn request(&mut self, request: Value) -> Result<Value, ControlError> {
        self.control.request(request, ANSWER)
    }

    /// The same for a request that takes long.
    pub fn request_within(
        &mut self,
        request: Value,
        within: Duration,
    ) -> Result<Value, ControlError> {
        self.control.request(request, within)
    }

    /// Sends a request without waiting. [`reply`](Self::reply) waits for its reply.
    pub fn send(&mut self, request: Value) -> Result<(u64, String), ControlError> {
        self.control.send(request)
    }

    /// Waits for the reply to a request that was sent. It must be the next reply of the host.
    pub fn reply(&mut self, (id, name): (u64, String)) -> Result<Value, ControlError> {
        self.control.reply(id, &name, ANSWER)
    }

    /// The state of each vCPU of a VM, one of `KVM_MP_STATE_*`.
    pub fn run_states(&mut self, name: &str) -> Result<Vec<u32>, Failure> {
        Ok(diagnosis::run_states(&mut self.control, name)?)
    }

    /// The host's status.
    pub fn status(&mut self) -> Result<Status, Failure> {
        Ok(serde_json::from_value(self.request(json!({"do": "status"}))?)?)
    }

    /// The ledger of the last live update.
    pub fn report(&mut self) -> Result<Report, Failure> {
        Ok(serde_json::from_value(self.request(json!({"do": "report"}))?)?)
    }

    /// Runs a live update that must succeed; `arguments` are those of the API's `update`. Returns when
    /// the next host is ready.
    pub fn update(&mut self, arguments: Value) -> Result<Status, Failure> {
        self.replace("update", arguments, "live-update")
    }

    /// Runs a handover that must succeed; `arguments` are those of the API's `handover`. Returns when
    /// the next host is ready.
    pub fn hand_over(&mut self, arguments: Value) -> Result<Status, Failure> {
        self.replace("handover", arguments, "handover")
    }

    /// Hands over to the program of an earlier host, which must succeed. Returns when that is ready.
    pub fn hand_back(&mut self) -> Result<Status, Failure> {
        self.replace("recover", json!({"with": "previous"}), "handover")
    }

    fn replace(&mut self, command: &str, arguments: Value, boot: &str) -> Result<Status, Failure> {
        self.mark();
        self.control.send(with_command(command, arguments))?;
        let status = self.wait_until_ready()?;
        if status.boot != boot {
            return Err(
                format!("the host's status has boot `{}`, not `{boot}`", status.boot).into()
            );
        }
        Ok(status)
    }

    /// Waits until the machine has reset and its host is ready again, after a command that ends in a reset.
    pub fn wait_for_reset(&mut self) -> Result<Status, Failure> {
        loop {
            let status = self.wait_until_ready()?;
            if status.boot == "cold" {
                return Ok(status);
            }
        }
    }

    /// Runs a command in the host's shell, under systemd. Its output goes to the console.
    pub fn order(&self, command: &str) -> Result<(), Failure> {
        let mut port = self.orders.as_ref().ok_or("a host without systemd has no shell")?;
        Ok(port.write_all(format!("{command}\n").as_bytes())?)
    }

    /// Runs a command that makes systemd restart the host's service under the same kernel. Returns when
    /// the next host is ready.
    pub fn restart_service(&mut self, command: &str) -> Result<Status, Failure> {
        self.mark();
        self.order(command)?;
        self.wait_until_ready()
    }

    /// Requests a live update that must not happen. Returns the reply, whether success or error.
    pub fn try_update(&mut self, arguments: Value) -> Result<Value, ControlError> {
        self.try_to("update", arguments)
    }

    /// Requests a live update or a handover (`command`) that stops before a step and is undone, for each
    /// step. Errors unless every guest then runs on.
    pub fn stop_before_each_step(&mut self, command: &str) -> Result<(), Failure> {
        for step in STEPS {
            let reply = self.try_to(command, json!({"stop_before": step}))?;
            if reply["outcome"] != "running" || reply["stopped_before"] != step {
                return Err(format!(
                    "the host should have stopped before {step}, it replied {reply}"
                )
                .into());
            }
            self.check_guests().map_err(|error| format!("stopped before {step}: {error}"))?;
        }
        Ok(())
    }

    /// Requests a live update or a handover (`command`). Errors unless the host refuses it with the
    /// guests running and `named` in the error.
    pub fn expect_refusal(
        &mut self,
        command: &str,
        arguments: Value,
        named: &str,
    ) -> Result<(), Failure> {
        self.expect_refusal_of_all(command, arguments, &[named])
    }

    /// The same with several texts, all of them in the one error.
    pub fn expect_refusal_of_all(
        &mut self,
        command: &str,
        arguments: Value,
        named: &[impl AsRef<str>],
    ) -> Result<(), Failure> {
        let reply = self.try_to(command, arguments.clone());
        named.iter().try_for_each(|named| {
            control::expect_refusal(&reply, "running", named.as_ref())
                .map_err(|error| format!("{arguments}: {error}").into())
        })
    }

    fn try_to(&mut self, command: &str, arguments: Value) -> Result<Value, ControlError> {
        self.mark();
        self.control.request(with_command(command, arguments), BOOT)
    }

    fn mark(&self) {
        self.guests.iter().for_each(Guest::mark);
    }

    /// Waits until every guest has made progress in each kind of work since the last update was
    /// requested. Errors if a guest did not, or if one of its checks failed.
    pub fn check_guests(&self) -> Result<(), Failure> {
        let mut failed = Vec::new();
        for guest in &self.guests {
            if let Err(error) = guest.wait_until_settled(WORK) {
                failed.push(error.to_string());
            }
            let checks = guest.checks();
            let wrong = checks.iter().filter(|check| !check.ok);
            let wrong = wrong.map(|c| format!("{}: {}: {}", guest.name(), c.name, c.evidence));
            let before = failed.len();
            failed.extend(wrong);
            if failed.len() > before {
                // Adds the warnings of the guest's kernel.
                let said = guest.notes().into_iter().filter(|note| note["note"] == "kernel");
                failed.extend(said.map(|note| format!("{}: {note}", guest.name())));
            }
        }
        if failed.is_empty() { Ok(()) } else { Err(failed.join("\n").into()) }
    }

    /// The last lines of the host's console.
    pub fn last_lines(&self, count: usize) -> String {
        self.qemu.last_lines(count)
    }

    /// All of the host's console.
    pub fn console(&self) -> String {
        self.qemu.console()
    }

    /// What was sent from `mac` over the machine's wire. One of the VMs must have a mute network device.
    pub fn sent_from(&self, mac: [u8; 6]) -> Result<Sent, Failure> {
        Ok(self.qemu.sent_from(mac)?)
    }

    /// Runs a command of QEMU's monitor that answers nothing if it succeeds.
    pub fn change_machine(&mut self, command: &str) -> Result<(), Failure> {
        match self.qemu.ask(command) {
            said if said.trim().is_empty() => Ok(()),
            said => Err(format!("QEMU's monitor to `{command}`: {said}").into()),
        }
    }

    /// Lets the machine's disk with this number answer no request, or requests again. It may still do the first one.
    pub fn hang_disk(&mut self, number: usize, hang: bool) -> Result<(), Failure> {
        // One byte a second: QEMU delays all requests but the first by their bytes.
        let bytes = u8::from(hang);
        self.change_machine(&format!("block_set_io_throttle disk{number} {bytes} 0 0 0 0 0"))
    }

    /// Stops the machine's CPUs, as a debugger does: from now on the host answers nothing.
    pub fn freeze(&mut self) -> Result<(), Failure> {
        // QEMU answers `stop` with nothing if it succeeded, so the status is read as a check.
        let refused = self.qemu.ask("stop");
        let status = self.qemu.ask("info status");
        if status.contains("paused") {
            return Ok(());
        }
        Err(format!("QEMU does not stop the machine: {refused}{status}").into())
    }

    /// Ends the machine at once, at the end of a successful test.
    pub fn done(mut self) {
        self.done = true;
    }

    /// Powers the host off, which asks its guests to shut down. Returns the host's console up to its end.
    pub fn shut_down(mut self) -> Result<String, Failure> {
        self.control.send(json!({"do": "power-off"}))?;
        if !self.qemu.wait_for_end(BOOT) {
            return Err("the machine did not power off".into());
        }
        self.done = true;
        Ok(self.qemu.console())
    }

    /// Pulls the plug of all guests, powers the host off, and then reads the contents of the guests' disks from their image files.
    pub fn power_off(mut self) -> Result<Vec<(String, Contents)>, Failure> {
        self.switch_off()?;
        let contents = self
            .disks_with(DiskKind::Records)
            .map(|disk| {
                let file = File::open(&disk.path)?;
                let slots = disk::slots(file.metadata()?.len());
                Ok((disk.vm.clone(), disk::read_ring(&file, slots)?))
            })
            .collect::<Result<_, Failure>>()?;
        self.done = true;
        Ok(contents)
    }

    /// Powers the host off under its guests. Errors unless the file systems of Debian guests are consistent.
    pub fn power_off_and_check_file_systems(mut self) -> Result<(), Failure> {
        self.switch_off()?;
        for disk in &self.vm_disks {
            if let DiskKind::Debian(release) = disk.kind {
                release
                    .check_file_system(&disk.path)
                    .map_err(|error| format!("{}: {error}", disk.vm))?;
            }
        }
        self.done = true;
        Ok(())
    }

    fn disks_with(&self, kind: DiskKind) -> impl Iterator<Item = &VmDisk> {
        self.vm_disks.iter().filter(move |disk| disk.kind == kind)
    }

    /// The image of the first disk of this kind, which the machine reads and writes.
    pub fn disk_image(&self, kind: DiskKind) -> Result<&Path, Failure> {
        let disk = self.disks_with(kind).next();
        Ok(disk.map(|disk| disk.path.as_path()).ok_or("no VM has such a disk")?)
    }

    fn switch_off(&mut self) -> Result<(), Failure> {
        match self.orders {
            // Under systemd, the API's `power-off` ends only the service.
            Some(_) => self.order("systemctl poweroff")?,
            None => drop(self.control.send(json!({"do": "power-off", "now": true}))?),
        }
        if !self.qemu.wait_for_end(ANSWER) {
            return Err("the machine did not power off".into());
        }
        Ok(())
    }

    /// Powers off. Errors unless each guest's disk holds every record that the guest's last heartbeat
    /// reports as written, all of them from the same boot.
    pub fn power_off_and_check_disks(self) -> Result<(), Failure> {
        let said: Vec<_> = self.guests.iter().map(|g| (g.name().to_owned(), g.last())).collect();
        for (name, contents) in self.power_off()? {
            let Some((_, Some(last))) = said.iter().find(|(guest, _)| *guest == name) else {
                return Err(format!("{name}: sent no heartbeat").into());
            };
            let whole = contents.bad.is_empty() && contents.missing.is_empty();
            if !whole || contents.newest < last.disk_seq || contents.newest_boot != last.boot {
                return Err(format!(
                    "{name}: the last heartbeat has record {} of boot {}, the disk holds {contents:?}",
                    last.disk_seq, last.boot
                )
                .into());
            }
        }
        Ok(())
    }
}

fn with_command(command: &str, mut arguments: Value) -> Value {
    arguments["do"] = json!(command);
    arguments
}

impl Host {
    /// Describes where the machine, its host and its silent guests (a wait for them timed out) are now.
    /// The last lines say what each silent guest hangs on, as far as known.
    pub fn diagnosis(&mut self) -> String {
        let missed = |guest: &Guest| {
            let name = guest.name().to_owned();
            guest.missed().map(|waited_for| Silent { name, waited_for })
        };
        let silent: Vec<Silent> = self.guests.iter().filter_map(missed).collect();
        let console = format!("--- the host's last console lines:\n{}", self.qemu.last_lines(60));
        let [host_kernel, guest_kernel] = self.kernels.each_ref().map(Option::as_deref);
        let (qemu, control) = (&mut self.qemu, &mut self.control);
        let found = diagnosis::diagnose(qemu, control, &silent, host_kernel, guest_kernel);
        format!("{console}\n--- {found}")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if !self.done {
            // A panic in the diagnosis must not replace the test's own failure.
            let found = catch_unwind(AssertUnwindSafe(|| self.diagnosis()));
            suite::explain(found.unwrap_or_else(|_| "the diagnosis itself failed".to_owned()));
        }
    }
}
