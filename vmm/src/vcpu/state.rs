//! The state of one vCPU, and the order in which to read it from KVM and to set it.
//!
//! The order matters: each step of [`VcpuStateV1::save`] and [`VcpuStateV1::restore`] has a comment
//! that says why it is at its place. The sources are Documentation/virt/kvm/api.rst and
//! arch/x86/kvm of Linux.

use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use zerocopy::{FromBytes, IntoBytes};

use crate::arch::x86_64::cpuid::{self, Comparison, Missing, Uncarried};
use crate::arch::x86_64::msr::{self, IA32_TSC_DEADLINE, Msr};
use crate::kvm::clock::Passage;
use crate::kvm::{Attempt, Capabilities, KvmError, uapi};
use crate::machine::MAX_CPUS;
use crate::state::{Node, Raw, Reader, Schema, StateError};

#[cfg(test)]
mod tests;

/// Two TSC rates count as equal if they differ by less than this, in parts per million. Two kernels
/// on one machine measure the rate differently: if they calibrate against a PIT, by some hundreds
/// on real machines; 1040 was seen on a busy emulated machine. Processors of different rates differ
/// by more.
const SAME_CRYSTAL_PPM: u64 = 20_000;
/// Largest XSAVE area that a document may have, in bytes: AMX needs 11 KiB.
const MAX_XSAVE: usize = 64 << 10;
/// Offset of the LVT timer register in the LAPIC's page (Intel SDM 3A, table 11-1).
const LVT_TIMER: usize = 0x320;
/// Timer mode, bits 18..17 of the LVT timer register: TSC deadline.
const LVT_TIMER_MODE: u32 = 0b11 << 17;
const LVT_TIMER_DEADLINE: u32 = 0b10 << 17;

/// The state of one vCPU. Binding `perennial,vcpu-x86-v1`.
#[derive(Debug, Clone, PartialEq)]
pub struct VcpuStateV1 {
    /// The vCPU's number, which is also its APIC id.
    pub id: u32,
    /// The CPUID entries that the guest sees.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Rate of the vCPU's TSC, in kHz.
    pub tsc_khz: u32,
    /// The vCPU's TSC minus the host's TSC, modulo 2^64.
    pub tsc_offset: u64,
    /// The guest TSC at which the LAPIC timer fires; 0 if disarmed.
    pub tsc_deadline: u64,
    /// Model-specific registers, ascending.
    pub msrs: Vec<Msr>,
    /// XSAVE area, at least 4096 bytes.
    pub xsave: Vec<u8>,
    /// General registers.
    pub regs: Raw<kvm_regs>,
    /// Segment and control registers.
    pub sregs: Raw<kvm_sregs>,
    /// Extended control registers.
    pub xcrs: Raw<kvm_xcrs>,
    /// Debug registers.
    pub debugregs: Raw<kvm_debugregs>,
    /// Local APIC.
    pub lapic: Raw<kvm_lapic_state>,
    /// Run state: running, halted, waiting for INIT or SIPI.
    pub mp_state: Raw<kvm_mp_state>,
    /// Pending exceptions, interrupts, NMIs and SMIs.
    pub events: Raw<kvm_vcpu_events>,
}

/// Why a vCPU cannot be restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The host lacks CPU features that the guest's CPUID has, and without which the guest cannot run.
    #[error(
        "this host lacks CPU features that the guest uses: {}. Update to a kernel, or on a machine, that has \
         them",
        list(.0)
    )]
    Features(Vec<Missing>),
    /// The host lacks hints that the guest's CPUID has, and they are not to be given up.
    #[error(
        "this host lacks what the guest was told of its processor's speed or safety: {}. `missing-hints` in \
         [host] refuses that; `perennial ctl restore VM --force` continues the guest without them",
        list(.0)
    )]
    Hints(Vec<Missing>),
    /// The guest has features whose state no document has.
    #[error("the guest uses CPU features whose state is not saved: {}", list(.0))]
    Uncarried(Vec<Uncarried>),
    /// The processors are of different makers, and the kernel of the guest has adapted itself to one.
    #[error("the guest started on a processor of {document}, this host's is of {host}")]
    Vendor {
        /// In the document.
        document: String,
        /// Of this host.
        host: String,
    },
    /// The TSC runs at another rate and cannot be scaled.
    #[error(
        "the guest's TSC ran at {document} kHz, this host's runs at {host} kHz and cannot be scaled"
    )]
    TscRate {
        /// In the document.
        document: u32,
        /// Of this host.
        host: u32,
    },
    /// The XSAVE area is larger than this host has.
    #[error("the XSAVE area has {document} bytes, this host's has {host}")]
    Xsave {
        /// In the document.
        document: usize,
        /// Of this host.
        host: usize,
    },
    /// An MSR.
    #[error(transparent)]
    Msr(#[from] msr::WriteError),
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

fn list<T: ToString>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

impl VcpuStateV1 {
    /// Compares the guest's CPU features with this host's. Returns the hints that the host lacks. Errors if it
    /// lacks something without which the guest cannot run.
    pub fn missing_hints(&self, host: &Capabilities) -> Result<Vec<Missing>, RestoreError> {
        let found = cpuid::compare(&self.cpuid, &host.supported);
        let Comparison { vendors, lacking, hints, uncarried } = found;
        if let Some((document, host)) = vendors {
            return Err(RestoreError::Vendor { document, host });
        }
        if !uncarried.is_empty() {
            return Err(RestoreError::Uncarried(uncarried));
        }
        match lacking.is_empty() {
            true => Ok(hints),
            false => Err(RestoreError::Features(lacking)),
        }
    }

    /// Reads the state of a vCPU. All vCPUs must be paused, with no exit half handled.
    pub fn save(id: u32, vcpu: &VcpuFd, host: &Capabilities) -> Result<Self, KvmError> {
        // First: this makes KVM process a pending INIT or SIPI, which changes the state that all
        // calls below read (`kvm_arch_vcpu_ioctl_get_mpstate`).
        let mp_state = vcpu.get_mp_state().attempt("read the run state")?;
        let regs = vcpu.get_regs().attempt("read the general registers")?;
        let sregs = vcpu.get_sregs().attempt("read the special registers")?;
        let xsave = uapi::xsave(vcpu, host.xsave_size).attempt("read the XSAVE area")?;
        let xcrs = vcpu.get_xcrs().attempt("read the extended control registers")?;
        let debugregs = vcpu.get_debug_regs().attempt("read the debug registers")?;
        // This call updates the LAPIC's registers from its timer (`kvm_apic_get_state`).
        let lapic = vcpu.get_lapic().attempt("read the LAPIC")?;
        let msrs = msr::read(vcpu, &host.msrs).attempt("read the MSRs")?;
        let deadline = msr::read(vcpu, &[IA32_TSC_DEADLINE]).attempt("read the TSC deadline")?;
        let cpuid =
            vcpu.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).attempt("read the CPUID")?;
        let tsc_khz = vcpu.get_tsc_khz().attempt("read the rate of the TSC")?;
        let tsc_offset = uapi::tsc_offset(vcpu).attempt("read the offset of the TSC")?;
        // Last: the calls above may move an event from one place to another.
        let events = vcpu.get_vcpu_events().attempt("read the pending events")?;
        Ok(Self {
            id,
            cpuid: cpuid.as_slice().to_vec(),
            tsc_khz,
            tsc_offset,
            tsc_deadline: deadline.first().map_or(0, |msr| msr.data),
            msrs,
            xsave,
            regs: Raw(regs),
            sregs: Raw(sregs),
            xcrs: Raw(xcrs),
            debugregs: Raw(debugregs),
            lapic: Raw(lapic),
            mp_state: Raw(mp_state),
            events: Raw(events),
        })
    }

    /// Sets the state of a new vCPU, which has not run any instruction. `passage` says by how much
    /// the clocks advance. Errors if the host lacks something that the state needs.
    pub fn restore(
        &self,
        vcpu: &VcpuFd,
        host: &Capabilities,
        passage: Passage,
    ) -> Result<(), RestoreError> {
        let Self {
            id: _,
            cpuid,
            tsc_khz,
            tsc_offset,
            tsc_deadline,
            msrs,
            xsave,
            regs,
            sregs,
            xcrs,
            debugregs,
            lapic,
            mp_state,
            events,
        } = self;
        // The caller decides about missing hints; they are no obstacle.
        self.missing_hints(host)?;
        // First: the CPUID decides which registers, MSRs and XSAVE components the vCPU has.
        let entries = cpuid::to_kvm(cpuid).attempt("set the CPUID")?;
        vcpu.set_cpuid2(&entries).attempt("set the CPUID")?;
        restore_tsc_rate(vcpu, *tsc_khz, host.tsc_scaling)?;
        // Before the MSRs: kvmclock's MSR derives the guest's clock page from the TSC.
        uapi::set_tsc_offset(vcpu, tsc_offset.wrapping_add(passage.offset_change))
            .attempt("set the offset of the TSC")?;
        // Before the LAPIC: the APIC base selects xAPIC or x2APIC. EFER selects the processor's
        // mode.
        vcpu.set_sregs(&sregs.0).attempt("set the special registers")?;
        vcpu.set_regs(&regs.0).attempt("set the general registers")?;
        // Before the MSRs: KVM checks IA32_XSS and similar MSRs against XCR0.
        vcpu.set_xcrs(&xcrs.0).attempt("set the extended control registers")?;
        if xsave.len() > host.xsave_size {
            let (document, host) = (xsave.len(), host.xsave_size);
            return Err(RestoreError::Xsave { document, host });
        }
        uapi::set_xsave(vcpu, xsave, host.xsave_size).attempt("set the XSAVE area")?;
        vcpu.set_debug_regs(&debugregs.0).attempt("set the debug registers")?;
        vcpu.set_lapic(&lapic.0).attempt("set the LAPIC")?;
        msr::write(vcpu, msrs)?;
        // After the LAPIC, whose timer mode decides whether a deadline is used, and after the TSC.
        msr::write(vcpu, &self.deadline(*tsc_deadline))?;
        vcpu.set_mp_state(mp_state.0).attempt("set the run state")?;
        // Last: setting registers drops pending exceptions (`kvm_arch_vcpu_ioctl_set_regs`).
        vcpu.set_vcpu_events(&events.0).attempt("set the pending events")?;
        Ok(())
    }

    /// Returns the MSR that arms the LAPIC timer, or nothing if the timer is not in deadline mode.
    /// A deadline that passed, also while the vCPU was paused, reads as 0, and its interrupt may
    /// not have reached the LAPIC yet. So a deadline of 0 is armed as 1, in the past, and fires at
    /// once: an extra tick does no harm, but a lost one stops the guest's clock events permanently.
    fn deadline(&self, saved: u64) -> Vec<Msr> {
        let register = self.lapic.0.regs[LVT_TIMER..LVT_TIMER + 4].as_bytes();
        let timer = u32::read_from_bytes(register).unwrap_or(0);
        match timer & LVT_TIMER_MODE == LVT_TIMER_DEADLINE {
            true => vec![Msr { index: IA32_TSC_DEADLINE, data: saved.max(1) }],
            false => Vec::new(),
        }
    }
}

/// Sets the vCPU's TSC rate to that of the document, unless both rates are nearly equal: then they
/// are two measurements of one machine's rate, and scaling one to the other would make the guest's
/// time run wrong. Errors if the rates differ and the host cannot scale.
fn restore_tsc_rate(vcpu: &VcpuFd, document: u32, scaling: bool) -> Result<(), RestoreError> {
    let host = vcpu.get_tsc_khz().attempt("read the rate of the TSC")?;
    if is_same_crystal(document, host) {
        return Ok(());
    }
    if !scaling {
        return Err(RestoreError::TscRate { document, host });
    }
    Ok(vcpu.set_tsc_khz(document).attempt("set the rate of the TSC")?)
}

fn is_same_crystal(a: u32, b: u32) -> bool {
    u64::from(a.abs_diff(b)) * 1_000_000 <= u64::from(a) * SAME_CRYSTAL_PPM
}

impl Schema for VcpuStateV1 {
    const COMPATIBLE: &'static [&'static str] = &["perennial,vcpu-x86-v1"];

    fn encode(&self, node: &mut Node) {
        let Self {
            id,
            cpuid,
            tsc_khz,
            tsc_offset,
            tsc_deadline,
            msrs,
            xsave,
            regs,
            sregs,
            xcrs,
            debugregs,
            lapic,
            mp_state,
            events,
        } = self;
        node.put_u32("id", *id);
        node.put_bytes("cpuid", cpuid.as_bytes());
        node.put_u32("tsc-khz", *tsc_khz);
        node.put_u64("tsc-offset", *tsc_offset);
        node.put_u64("tsc-deadline", *tsc_deadline);
        let pairs = msrs.iter().flat_map(|msr| [u64::from(msr.index), msr.data]);
        node.put_u64s("msrs", &pairs.collect::<Vec<_>>());
        node.put_bytes("xsave", xsave);
        regs.put(node, "regs");
        sregs.put(node, "sregs");
        xcrs.put(node, "xcrs");
        debugregs.put(node, "debugregs");
        lapic.put(node, "lapic");
        mp_state.put(node, "mp-state");
        events.put(node, "events");
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        Ok(Self {
            id: decode_id(reader)?,
            cpuid: decode_cpuid(reader)?,
            tsc_khz: decode_tsc_khz(reader)?,
            tsc_offset: reader.u64("tsc-offset")?,
            tsc_deadline: reader.u64("tsc-deadline")?,
            msrs: decode_msrs(reader)?,
            xsave: decode_xsave(reader)?,
            regs: Raw::take(reader, "regs")?,
            sregs: Raw::take(reader, "sregs")?,
            xcrs: Raw::take(reader, "xcrs")?,
            debugregs: Raw::take(reader, "debugregs")?,
            lapic: Raw::take(reader, "lapic")?,
            mp_state: Raw::take(reader, "mp-state")?,
            events: Raw::take(reader, "events")?,
        })
    }
}

fn decode_id(reader: &mut Reader<'_>) -> Result<u32, StateError> {
    match reader.u32("id")? {
        id @ 0..MAX_CPUS => Ok(id),
        id => Err(reader.invalid("id", format!("{id}, the most is {}", MAX_CPUS - 1))),
    }
}

/// Refuses a rate of 0, which KVM would silently take for the host's rate.
fn decode_tsc_khz(reader: &mut Reader<'_>) -> Result<u32, StateError> {
    match reader.u32("tsc-khz")? {
        0 => Err(reader.invalid("tsc-khz", "a TSC of 0 kHz does not count")),
        khz => Ok(khz),
    }
}

fn decode_cpuid(reader: &mut Reader<'_>) -> Result<Vec<kvm_cpuid_entry2>, StateError> {
    let bytes = reader.bytes("cpuid")?;
    let entry = size_of::<kvm_cpuid_entry2>();
    let most = kvm_bindings::KVM_MAX_CPUID_ENTRIES;
    if !bytes.len().is_multiple_of(entry) || bytes.len() / entry > most {
        let problem = format!("{} bytes are not 0 to {most} entries of {entry}", bytes.len());
        return Err(reader.invalid("cpuid", problem));
    }
    bytes
        .chunks_exact(entry)
        .map(kvm_cpuid_entry2::read_from_bytes)
        .collect::<Result<_, _>>()
        .map_err(|_| reader.invalid("cpuid", "it is not a list of entries"))
}

fn decode_msrs(reader: &mut Reader<'_>) -> Result<Vec<Msr>, StateError> {
    let values = reader.u64s("msrs")?;
    let (pairs, rest) = values.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(reader.invalid("msrs", "it is not a list of pairs"));
    }
    let msrs = pairs
        .iter()
        .map(|&[index, data]| {
            let index = u32::try_from(index)
                .map_err(|_| reader.invalid("msrs", format!("there is no MSR {index:#x}")))?;
            match msr::exclusion(index) {
                None => Ok(Msr { index, data }),
                Some(why) => Err(reader.invalid("msrs", format!("MSR {index:#x}: {why}"))),
            }
        })
        .collect::<Result<Vec<_>, _>>()?;
    match msrs.is_sorted_by(|a, b| a.index < b.index) {
        true => Ok(msrs),
        false => Err(reader.invalid("msrs", "they are not in ascending order")),
    }
}

fn decode_xsave(reader: &mut Reader<'_>) -> Result<Vec<u8>, StateError> {
    let bytes = reader.bytes("xsave")?;
    match (size_of::<kvm_xsave>()..=MAX_XSAVE).contains(&bytes.len()) {
        true => Ok(bytes.to_vec()),
        false => {
            let problem = format!("{} bytes, there must be 4096 to {MAX_XSAVE}", bytes.len());
            Err(reader.invalid("xsave", problem))
        }
    }
}
