//! Describes the findings about a guest: its vCPUs, timers, rings and serial port, and in one line what
//! the guest hangs on.

use std::fmt::Write as _;

use super::document::{Apic, Queue, Serial, Snapshot, Vcpu};
use super::symbols::Symbols;

/// Most calls in the verdict's line.
const CALLS_IN_VERDICT: usize = 4;

/// `KVM_MP_STATE_RUNNABLE` and `KVM_MP_STATE_HALTED`.
const RUNNABLE: u32 = 0;
const HALTED: u32 = 3;

/// The findings about one guest.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    /// Two state documents, some seconds apart.
    pub(crate) before: Snapshot,
    pub(crate) after: Snapshot,
    /// The calls on the stack of each vCPU at the time of the second document, and the error that ended
    /// each list, if one did.
    pub(crate) calls: Vec<(Vec<String>, Option<String>)>,
    /// The indexes in the guest's memory, for each queue: available and used. `None` if unreadable.
    pub(crate) rings: Vec<Option<(u16, u16)>>,
    pub(crate) symbols: Option<Symbols>,
}

impl Findings {
    fn place(&self, vcpu: &Vcpu) -> String {
        if vcpu.privilege == 3 {
            return format!("a program of the guest at {:#x}", vcpu.rip());
        }
        let name = self.symbols.as_ref().and_then(|symbols| symbols.name(vcpu.rip()));
        name.unwrap_or_else(|| format!("{:#x}", vcpu.rip()))
    }

    fn same_function(&self, a: &Vcpu, b: &Vcpu) -> bool {
        let function = |vcpu: &Vcpu| {
            let symbols = self.symbols.as_ref().filter(|_| vcpu.privilege != 3);
            symbols.and_then(|symbols| symbols.function(vcpu.rip())).map(|(start, _)| start)
        };
        a.rip() == b.rip() || (function(a).is_some() && function(a) == function(b))
    }

    /// All findings, one on each line.
    pub(crate) fn text(&self) -> String {
        let mut out = String::new();
        for (when, snapshot) in [("at first", &self.before), ("then", &self.after)] {
            for vcpu in &snapshot.vcpus {
                // Writing to a String cannot fail.
                let _ = writeln!(out, "vCPU {} {when}: {}", vcpu.id, self.vcpu(snapshot, vcpu));
            }
            if let Some(serial) = &snapshot.serial {
                let _ = writeln!(out, "serial port {when}: {}", serial_text(serial));
            }
        }
        for (vcpu, (calls, problem)) in self.after.vcpus.iter().zip(&self.calls) {
            let _ =
                writeln!(out, "vCPU {}: code addresses on its stack, innermost first:", vcpu.id);
            for call in calls {
                let _ = writeln!(out, "    {call}");
            }
            if let Some(problem) = problem {
                let _ = writeln!(out, "    (no further: {problem})");
            }
        }
        for (queue, ring) in self.after.queues.iter().zip(&self.rings) {
            let _ = writeln!(out, "{}: {}", queue.name, queue_text(queue, *ring));
        }
        out
    }

    fn vcpu(&self, snapshot: &Snapshot, vcpu: &Vcpu) -> String {
        format!(
            "{}, {}, RIP {:#x}, RSP {:#x}, RFLAGS {:#x} (interrupts {}), {}; LAPIC: {}, TPR {:#x}, in \
             service {}, requested {}; {}",
            mp_state(vcpu.mp_state),
            self.place(vcpu),
            vcpu.rip(),
            vcpu.rsp(),
            vcpu.rflags(),
            if vcpu.takes_interrupts() { "on" } else { "off" },
            events(&vcpu.events),
            timer_registers(&vcpu.apic),
            vcpu.apic.tpr,
            hexadecimal(&vcpu.apic.in_service),
            hexadecimal(&vcpu.apic.requested),
            timer(snapshot, vcpu),
        )
    }

    /// One line about what the guest hangs on, as far as known.
    pub(crate) fn verdict(&self) -> String {
        let mut said: Vec<String> = Vec::new();
        for (index, vcpu) in self.after.vcpus.iter().enumerate() {
            let before = self.before.vcpus.iter().find(|other| other.id == vcpu.id);
            said.push(format!("vCPU {} {}", vcpu.id, self.does(index, before, vcpu)));
        }
        for (queue, ring) in self.after.queues.iter().zip(&self.rings) {
            if let Some((avail, _)) = ring
                && queue.is_ready
                && *avail != queue.next_avail
            {
                let waiting = avail.wrapping_sub(queue.next_avail);
                said.push(format!(
                    "{} has {waiting} requests that the device has not taken",
                    queue.name
                ));
            }
        }
        if let Some(serial) = &self.after.serial
            && serial.output > 0
        {
            said.push(format!("{} bytes of serial output were not taken", serial.output));
        }
        if said.is_empty() { "its state document has no vCPU".to_owned() } else { said.join("; ") }
    }

    fn does(&self, index: usize, before: Option<&Vcpu>, vcpu: &Vcpu) -> String {
        let interrupts = if vcpu.takes_interrupts() { "on" } else { "off" };
        if vcpu.mp_state == HALTED {
            let requested = match vcpu.apic.requested.as_slice() {
                [] => String::new(),
                some => format!(" although {} is requested", hexadecimal(some)),
            };
            let timer = timer(&self.after, vcpu);
            return format!("sleeps with interrupts {interrupts}{requested}; its timer {timer}");
        }
        if vcpu.mp_state != RUNNABLE {
            return format!("is {}", mp_state(vcpu.mp_state));
        }
        let Some(before) = before else { return format!("is in {}", self.place(vcpu)) };
        let called = match self.calls.get(index).map(|(calls, _)| calls.as_slice()) {
            None | Some([]) => String::new(),
            Some(calls) => {
                let first = &calls[..calls.len().min(CALLS_IN_VERDICT)];
                format!(" (called from {})", first.join(", "))
            }
        };
        let here = self.place(vcpu);
        match self.same_function(before, vcpu) {
            true => format!("spins with interrupts {interrupts} at {here}{called}"),
            false => format!("runs: it was at {}, then at {here}{called}", self.place(before)),
        }
    }
}

fn mp_state(state: u32) -> String {
    match state {
        RUNNABLE => "runnable".to_owned(),
        1 => "waiting for INIT".to_owned(),
        2 => "waiting for SIPI".to_owned(),
        HALTED => "halted".to_owned(),
        4 => "about to start at a SIPI".to_owned(),
        other => format!("in MP state {other}"),
    }
}

/// The pending events in `struct kvm_vcpu_events` (Linux `arch/x86/include/uapi/asm/kvm.h`).
fn events(events: &[u8]) -> String {
    let byte = |at: usize| events.get(at).copied().unwrap_or(0);
    let is_set = |at: usize| byte(at) != 0;
    let mut found = Vec::new();
    if is_set(0) || is_set(3) {
        found.push(format!("exception {}", byte(1)));
    }
    if is_set(8) {
        found.push(format!("interrupt {:#x} injected", byte(9)));
    }
    if is_set(11) {
        found.push("in an interrupt shadow".to_owned());
    }
    if is_set(12) || is_set(13) {
        found.push("an NMI pending".to_owned());
    }
    if is_set(14) {
        found.push("NMIs masked".to_owned());
    }
    if is_set(24) {
        found.push("in SMM".to_owned());
    }
    if found.is_empty() { "no event pending".to_owned() } else { found.join(", ") }
}

/// Mode, mask and vector of the timer's entry (Intel SDM 3A, figure 11-8), and its counts.
fn timer_registers(apic: &Apic) -> String {
    let mode = match apic.timer >> 17 & 3 {
        0 => "one shot",
        1 => "periodic",
        2 => "TSC deadline",
        _ => "reserved mode",
    };
    let masked = if apic.timer & 1 << 16 != 0 { ", masked" } else { "" };
    format!(
        "timer {:#x} ({mode}{masked}), initial count {}, current count {}",
        apic.timer, apic.initial_count, apic.current_count
    )
}

/// The state of the LAPIC's timer, and when it fires.
fn timer(snapshot: &Snapshot, vcpu: &Vcpu) -> String {
    let is_deadline = vcpu.apic.timer >> 17 & 3 == 2;
    if vcpu.apic.timer & 1 << 16 != 0 {
        return "is masked".to_owned();
    }
    if !is_deadline {
        return match vcpu.apic.current_count {
            0 => "does not count".to_owned(),
            count => format!("counts and is at {count}"),
        };
    }
    let (Some(host_tsc), 1..) = (snapshot.host_tsc, vcpu.tsc_deadline) else {
        return "is not armed".to_owned();
    };
    let now = host_tsc.wrapping_add(vcpu.tsc_offset);
    let ticks = vcpu.tsc_deadline.wrapping_sub(now) as i64;
    let ms = ticks as f64 / f64::from(vcpu.tsc_khz.max(1));
    match ticks {
        0.. => format!("fires in {ms:.1} ms"),
        _ => format!("should have fired {:.1} ms ago", -ms),
    }
}

fn serial_text(serial: &Serial) -> String {
    let Serial { ier, fcr, mcr, empty_pending, input, output } = serial;
    let empty = if *empty_pending { ", the guest not told that it can send" } else { "" };
    format!(
        "IER {ier:#x}, FCR {fcr:#x}, MCR {mcr:#x}{empty}; {input} bytes not read by the guest, {output} \
         bytes not taken from it"
    )
}

fn queue_text(queue: &Queue, ring: Option<(u16, u16)>) -> String {
    let Some((avail, used)) = ring else {
        return format!("taken {}, its ring cannot be read", queue.next_avail);
    };
    format!(
        "{} requests made, {} taken; {} answers given, {} written",
        avail, queue.next_avail, queue.next_used, used
    )
}

fn hexadecimal(vectors: &[u8]) -> String {
    if vectors.is_empty() {
        return "nothing".to_owned();
    }
    vectors.iter().map(|vector| format!("{vector:#x}")).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::super::symbols::tests::kernel;
    use super::*;

    const LOCK: u64 = 0xffff_ffff_8100_0112;
    const HALT: u64 = 0xffff_ffff_8100_0801;

    fn vcpu(id: u32, rip: u64, rflags: u64, mp_state: u32) -> Vcpu {
        let mut registers = vec![0; 18];
        (registers[6], registers[16], registers[17]) = (0xffff_c900_0000_0e00, rip, rflags);
        Vcpu {
            id,
            registers,
            privilege: 0,
            cr3: 0x1000,
            cr4: 0,
            mp_state,
            events: vec![0; 64],
            apic: Apic { timer: 0x0004_00ec, ..Apic::default() },
            tsc_deadline: 0,
            tsc_offset: 1000,
            tsc_khz: 1000,
        }
    }

    fn findings(before: Vec<Vcpu>, after: Vec<Vcpu>) -> Findings {
        let snapshot = |vcpus| Snapshot { vcpus, host_tsc: Some(50_000), ..Snapshot::default() };
        Findings {
            before: snapshot(before),
            after: snapshot(after),
            symbols: Some(kernel()),
            ..Findings::default()
        }
    }

    #[test]
    fn a_vcpu_that_waits_for_a_lock_with_interrupts_off_is_named_with_its_callers() {
        let mut found = findings(vec![vcpu(0, LOCK, 0x46, 0)], vec![vcpu(0, LOCK + 2, 0x46, 0)]);
        found.calls = vec![(vec!["sched_tick+0x4".into(), "hrtimer_interrupt+0x80".into()], None)];
        assert_eq!(
            found.verdict(),
            "vCPU 0 spins with interrupts off at native_queued_spin_lock_slowpath+0x14 (called from \
             sched_tick+0x4, hrtimer_interrupt+0x80)"
        );
        assert!(found.text().contains("    hrtimer_interrupt+0x80\n"), "{}", found.text());
    }

    #[test]
    fn a_vcpu_that_goes_on_is_not_said_to_spin() {
        let found = findings(vec![vcpu(0, LOCK, 0x246, 0)], vec![vcpu(0, HALT, 0x246, 0)]);
        assert_eq!(
            found.verdict(),
            "vCPU 0 runs: it was at native_queued_spin_lock_slowpath+0x12, then at \
             pv_native_safe_halt+0x1"
        );
    }

    #[test]
    fn a_sleeping_vcpu_is_told_with_its_timer_and_what_should_have_woken_it() {
        let sleeper = |deadline, requested| {
            let mut sleeper = vcpu(0, HALT, 0x246, HALTED);
            sleeper.tsc_deadline = deadline;
            sleeper.apic.requested = requested;
            let found = findings(vec![sleeper.clone()], vec![sleeper]);
            found.verdict()
        };
        assert_eq!(sleeper(0, vec![]), "vCPU 0 sleeps with interrupts on; its timer is not armed");
        assert!(sleeper(53_000, vec![]).ends_with("its timer fires in 2.0 ms"));
        assert!(sleeper(41_000, vec![]).ends_with("its timer should have fired 10.0 ms ago"));
        assert!(sleeper(0, vec![0xec]).contains("interrupts on although 0xec is requested"));
    }

    #[test]
    fn requests_and_output_that_nobody_takes_are_named() {
        let mut found = findings(vec![vcpu(0, HALT, 0x246, 3)], vec![vcpu(0, HALT, 0x246, 3)]);
        let queue = Queue {
            name: "queue@0 of virtio-blk@1".into(),
            is_ready: true,
            next_avail: 65534,
            next_used: 65534,
            avail_ring: 0,
            used_ring: 0,
        };
        found.after.queues = vec![queue.clone(), Queue { is_ready: false, ..queue }];
        found.rings = vec![Some((1, 65534)), Some((9, 9))];
        found.after.serial =
            Some(Serial { ier: 5, fcr: 1, mcr: 8, empty_pending: true, input: 0, output: 77 });
        let verdict = found.verdict();
        let parts: Vec<&str> = verdict.split("; ").collect();
        assert_eq!(
            parts[2..],
            [
                "queue@0 of virtio-blk@1 has 3 requests that the device has not taken",
                "77 bytes of serial output were not taken"
            ]
        );
    }

    #[test]
    fn an_injected_interrupt_and_a_program_are_told() {
        let mut program = vcpu(1, 0x40_1000, 0x202, 0);
        program.privilege = 3;
        program.events[8..10].copy_from_slice(&[1, 0xec]);
        let found = findings(vec![program.clone()], vec![program]);
        assert!(found.text().contains("interrupt 0xec injected"), "{}", found.text());
        let spins = "vCPU 1 spins with interrupts on at a program of the guest at 0x401000";
        assert_eq!(found.verdict(), spins);
    }

    #[test]
    fn a_kernel_without_symbols_is_told_in_numbers() {
        let mut found = findings(vec![vcpu(0, LOCK, 0x46, 0)], vec![vcpu(0, LOCK, 0x46, 0)]);
        found.symbols = None;
        let verdict = "vCPU 0 spins with interrupts off at 0xffffffff81000112";
        assert_eq!(found.verdict(), verdict);
        assert_eq!(Findings::default().verdict(), "its state document has no vCPU");
    }
}
