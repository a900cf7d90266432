//! The PICs and the I/O APIC, which KVM emulates.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip,
};
use kvm_ioctls::VmFd;

use super::{Attempt, KvmError};
use crate::state::{Node, Raw, Reader, Schema, StateError};

/// The three chips as `struct kvm_irqchip` has them. `perennial,irqchip-x86-v1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IrqchipStateV1 {
    pic_master: Raw<kvm_irqchip>,
    pic_slave: Raw<kvm_irqchip>,
    ioapic: Raw<kvm_irqchip>,
}

impl IrqchipStateV1 {
    /// Reads the chips. No vCPU runs.
    pub fn save(vm: &VmFd) -> Result<Self, KvmError> {
        let chip = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).attempt("read an interrupt controller")?;
            Ok(Raw(chip))
        };
        Ok(Self {
            pic_master: chip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: chip(KVM_IRQCHIP_IOAPIC)?,
        })
    }

    /// Sets the chips. After the LAPICs: an I/O APIC with a pending level line delivers at once.
    pub fn restore(&self, vm: &VmFd) -> Result<(), KvmError> {
        let Self { pic_master, pic_slave, ioapic } = self;
        for chip in [pic_master, pic_slave, ioapic] {
            vm.set_irqchip(&chip.0).attempt("set an interrupt controller")?;
        }
        Ok(())
    }
}

impl Schema for IrqchipStateV1 {
    const COMPATIBLE: &'static [&'static str] = &["perennial,irqchip-x86-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { pic_master, pic_slave, ioapic } = self;
        pic_master.put(node, "pic-master");
        pic_slave.put(node, "pic-slave");
        ioapic.put(node, "ioapic");
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let mut chip = |property, id| {
            let chip = Raw::<kvm_irqchip>::take(reader, property)?;
            match chip.0.chip_id == id {
                true => Ok(chip),
                // A chip under another's name would overwrite it without an error.
                false => Err(reader.invalid(property, format!("chip id {}", chip.0.chip_id))),
            }
        };
        Ok(Self {
            pic_master: chip("pic-master", KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: chip("pic-slave", KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: chip("ioapic", KVM_IRQCHIP_IOAPIC)?,
        })
    }
}
