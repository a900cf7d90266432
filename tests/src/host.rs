//! A host in QEMU with its VMs, from boot to power-off, over any number of live updates.
//!
//! The harness talks to the host by its control port and listens to each guest by a port of its
//! own. A host that is dropped before [`Host::power_off`] or [`Host::done`] was called belongs to a test
//! that failed: its console's last lines, and what it and its silent guests hang on, are told.

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::control::{self, Control, ControlError};
use crate::diagnosis::{self, Silent};
use crate::guest::Guest;
use crate::plan::{CONTROL_PORT, HostPlan};
use crate::qemu::{self, Accelerator, Qemu};
use crate::report::{Report, Status};
use crate::suite;
use crate::systemd::ORDERS_PORT;
use crate::workload::disk::{self, Contents};

/// Longest time from power-on to `ready`, and from an update's request to the next `ready`. Under
/// emulation, on a machine with other things to do; what hangs takes for ever.
pub const BOOT: Duration = Duration::from_secs(240);

/// Longest time for an answer of a host that runs.
pub const ANSWER: Duration = Duration::from_secs(60);

/// Longest time for a guest to boot, and to verify all of its memory twice.
pub const WORK: Duration = Duration::from_secs(240);

/// The steps of a live update and of a handover, in order.
pub const STEPS: [&str; 7] =
    ["load", "preserve-ram", "pause", "save", "preserve-state", "sync", "jump"];

/// Anything that makes a test fail.
pub type Failure = Box<dyn Error>;

/// A running host.
#[derive(Debug)]
pub struct Host {
    qemu: Qemu,
    control: Control,
    /// Takes commands for a shell, if the host is under systemd.
    orders: Option<UnixStream>,
    guests: Vec<Guest>,
    vm_disks: Vec<(String, PathBuf)>,
    /// Name of each VM and its number of vCPUs.
    vcpus: Vec<(String, u32)>,
    /// Where the symbols are of the host's kernels and of the guests', if they have any.
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
        let mut qemu = Qemu::start(&prepared.machine, accelerator, directory)?;
        let mut port = |name: &str| qemu.take_port(name).ok_or(format!("two ports called {name}"));
        let control = Control::new(port(CONTROL_PORT)?)?;
        let orders = plan.under_systemd.then(|| port(ORDERS_PORT)).transpose()?;
        let guests = plan
            .vms
            .iter()
            .map(|vm| Ok(Guest::listen(&vm.name, port(&vm.port())?)?))
            .collect::<Result<_, Failure>>()?;
        let vm_disks = prepared.vm_disks;
        let kernels = plan.symbols();
        let vcpus = plan.vms.iter().map(|vm| (vm.name.clone(), vm.cpus)).collect();
        let mut host =
            Self { qemu, control, orders, guests, vm_disks, vcpus, kernels, done: false };
        let status = host.wait_until_ready()?;
        Ok((host, status))
    }

    fn wait_until_ready(&mut self) -> Result<Status, Failure> {
        let deadline = Instant::now() + BOOT;
        loop {
            // In slices, to notice a machine that is gone: its ports close only then.
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

    /// No longer expects anything of a guest: the test took it away.
    pub fn forget_guest(&mut self, name: &str) {
        self.guests.retain(|guest| guest.name() != name);
        self.vm_disks.retain(|(guest, _)| guest != name);
    }

    /// Waits until every guest works: has booted, and done each kind of work at least once.
    pub fn wait_for_guests(&self) -> Result<(), Failure> {
        for guest in &self.guests {
            let booted = guest.wait_for_note("boot", WORK)?;
            let expected = self.vcpus.iter().find(|(name, _)| name == guest.name());
            if expected.is_some_and(|(_, vcpus)| booted["vcpus"] != *vcpus) {
                return Err(format!("guest {} has other vCPUs: {booted}", guest.name()).into());
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

    /// What the host says of itself.
    pub fn status(&mut self) -> Result<Status, Failure> {
        Ok(serde_json::from_value(self.request(json!({"do": "status"}))?)?)
    }

    /// The ledger of the last live update.
    pub fn report(&mut self) -> Result<Report, Failure> {
        Ok(serde_json::from_value(self.request(json!({"do": "report"}))?)?)
    }

    /// A live update that is to succeed: `arguments` are those of the API's `update`. Returns when
    /// the next host is ready.
    pub fn update(&mut self, arguments: Value) -> Result<Status, Failure> {
        self.replace("update", arguments, "live-update")
    }

    /// A handover that is to succeed: `arguments` are those of the API's `handover`. Returns when the
    /// next host is ready.
    pub fn hand_over(&mut self, arguments: Value) -> Result<Status, Failure> {
        self.replace("handover", arguments, "handover")
    }

    fn replace(&mut self, command: &str, arguments: Value, boot: &str) -> Result<Status, Failure> {
        self.mark();
        self.control.send(with_command(command, arguments))?;
        let status = self.wait_until_ready()?;
        if status.boot != boot {
            return Err(format!("the host came back by a `{}` boot", status.boot).into());
        }
        Ok(status)
    }

    /// Has a shell of the host run a command. What it prints goes to the console.
    pub fn order(&self, command: &str) -> Result<(), Failure> {
        let mut port = self.orders.as_ref().ok_or("there is a shell under systemd only")?;
        Ok(port.write_all(format!("{command}\n").as_bytes())?)
    }

    /// A command that makes systemd stop the host's service and start it again, under this kernel.
    /// Returns when the next host is ready.
    pub fn restart_service(&mut self, command: &str) -> Result<Status, Failure> {
        self.mark();
        self.order(command)?;
        self.wait_until_ready()
    }

    /// A live update that must not happen: returns the reply, whichever it is.
    pub fn try_update(&mut self, arguments: Value) -> Result<Value, ControlError> {
        self.try_to("update", arguments)
    }

    /// Has a live update or a handover (`command`) undone before each of its steps: every guest has to
    /// run on.
    pub fn stop_before_each_step(&mut self, command: &str) -> Result<(), Failure> {
        for step in STEPS {
            let reply = self.try_to(command, json!({"stop_before": step}))?;
            if reply["outcome"] != "running" || reply["stopped_before"] != step {
                return Err(format!("stopped before {step}, the host says {reply}").into());
            }
            self.check_guests().map_err(|error| format!("stopped before {step}: {error}"))?;
        }
        Ok(())
    }

    /// A live update or a handover (`command`) that has to be refused with the guests running and
    /// `named` in the error.
    pub fn expect_refusal(
        &mut self,
        command: &str,
        arguments: Value,
        named: &str,
    ) -> Result<(), Failure> {
        let reply = self.try_to(command, arguments.clone());
        control::expect_refusal(&reply, "running", named)
            .map_err(|error| format!("{arguments}: {error}").into())
    }

    fn try_to(&mut self, command: &str, arguments: Value) -> Result<Value, ControlError> {
        self.mark();
        self.control.request(with_command(command, arguments), BOOT)
    }

    fn mark(&self) {
        self.guests.iter().for_each(Guest::mark);
    }

    /// Waits until every guest has, since the last update was asked for, done all of its work
    /// again, and fails if anything that was checked did not hold.
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
                // What its kernel complained of, in its own words.
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

    /// Stops the machine's CPUs, as a debugger does: from now on the host answers nothing.
    pub fn freeze(&mut self) -> Result<(), Failure> {
        // QEMU says nothing when it has obeyed; whether it has, it says when asked.
        let refused = self.qemu.ask("stop");
        let status = self.qemu.ask("info status");
        if status.contains("paused") {
            return Ok(());
        }
        Err(format!("the machine does not stop: {refused}{status}").into())
    }

    /// Ends the machine at once: the test has seen what it wanted.
    pub fn done(mut self) {
        self.done = true;
    }

    /// Powers the host off by its API, and reads the disks that the guests wrote to, from outside.
    pub fn power_off(mut self) -> Result<Vec<(String, Contents)>, Failure> {
        match self.orders {
            // There the API's command ends the service only.
            Some(_) => self.order("systemctl poweroff")?,
            None => drop(self.control.send(json!({"do": "power-off"}))?),
        }
        if !self.qemu.wait_for_end(ANSWER) {
            return Err("the machine did not power off".into());
        }
        let contents = self
            .vm_disks
            .iter()
            .map(|(name, path)| {
                let disk = File::open(path)?;
                let slots = disk::slots(disk.metadata()?.len());
                Ok((name.clone(), disk::read_ring(&disk, slots)?))
            })
            .collect::<Result<_, Failure>>()?;
        self.done = true;
        Ok(contents)
    }

    /// Powers off, and fails unless each guest's disk holds every record that the guest's last
    /// heartbeat says was written, all of them by the same boot.
    pub fn power_off_and_check_disks(self) -> Result<(), Failure> {
        let said: Vec<_> = self.guests.iter().map(|g| (g.name().to_owned(), g.last())).collect();
        for (name, contents) in self.power_off()? {
            let Some((_, Some(last))) = said.iter().find(|(guest, _)| *guest == name) else {
                return Err(format!("{name}: never said what it wrote").into());
            };
            let whole = contents.bad.is_empty() && contents.missing.is_empty();
            if !whole || contents.newest < last.disk_seq || contents.newest_boot != last.boot {
                return Err(format!(
                    "{name}: said record {} of boot {}, its disk holds: {contents:?}",
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
    /// Where the machine, its host and the guests that were waited for in vain are now. The last lines
    /// say what each of these guests hangs on, as far as can be told.
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
            // Whatever is wrong with the machine, the test's own failure has to be told.
            let found = catch_unwind(AssertUnwindSafe(|| self.diagnosis()));
            suite::explain(found.unwrap_or_else(|_| "the diagnosis itself failed".to_owned()));
        }
    }
}
