//! State of the two PICs and the I/O APIC, which KVM emulates.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip,
    kvm_irqchip__bindgen_ty_1, kvm_pic_state,
};
use kvm_ioctls::VmFd;

use super::{Attempt, KvmError};
use crate::state::{Node, Raw, Reader, Schema, StateError};

/// For each PIC: its chip id, the vector of its first line as a PC's firmware sets it, and a mask
/// of the lines that can be level-triggered (`PIC_ELCR_MASK`s in arch/x86/kvm/i8259.c).
const PICS: [(u32, u8, u8); 2] =
    [(KVM_IRQCHIP_PIC_MASTER, 0x08, 0xf8), (KVM_IRQCHIP_PIC_SLAVE, 0x70, 0xde)];

/// Masks every line of the PICs of a new machine, as firmware does. KVM creates the PICs unmasked
/// and with vectors from 0 on. A kernel that uses only the I/O APIC may never configure the PICs, and
/// would take the first interrupt of COM1, IRQ 4, for the exception with that vector.
pub fn mask_pics(vm: &VmFd) -> Result<(), KvmError> {
    for (chip_id, irq_base, elcr_mask) in PICS {
        let pic = kvm_pic_state { imr: 0xff, irq_base, elcr_mask, ..Default::default() };
        let chip = kvm_irqchip__bindgen_ty_1 { pic };
        let chip = kvm_irqchip { chip_id, pad: 0, chip };
        vm.set_irqchip(&chip).attempt("mask the lines of a PIC")?;
    }
    Ok(())
}

/// The three chips, each as a `struct kvm_irqchip`. Binding `perennial,irqchip-x86-v1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IrqchipStateV1 {
    pic_master: Raw<kvm_irqchip>,
    pic_slave: Raw<kvm_irqchip>,
    ioapic: Raw<kvm_irqchip>,
}

impl IrqchipStateV1 {
    /// Reads the chips. Call while no vCPU runs.
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

    /// Sets the chips. Call after the LAPICs are set: an I/O APIC with a pending level-triggered
    /// line delivers its interrupt at once.
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
                // KVM sets the chip that the id names: with a wrong id this chip would overwrite
                // another one, without an error.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::test_vm::TestVm;
    use crate::state::contract::contract_tests;
    use crate::state::node::read_node;
    use kvm_bindings::kvm_ioapic_state;

    fn chip(id: u32, seed: u8) -> Raw<kvm_irqchip> {
        let mut chip = Raw::<kvm_irqchip>::pattern(seed);
        chip.0.chip_id = id;
        chip
    }

    impl IrqchipStateV1 {
        pub(crate) fn sample() -> Self {
            Self {
                pic_master: chip(KVM_IRQCHIP_PIC_MASTER, 1),
                pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE, 2),
                ioapic: chip(KVM_IRQCHIP_IOAPIC, 3),
            }
        }
    }

    impl IrqchipStateV1 {
        pub(crate) fn other_sample() -> Self {
            Self { ioapic: chip(KVM_IRQCHIP_IOAPIC, 4), ..Self::sample() }
        }
    }

    contract_tests! {
        IrqchipStateV1,
        sample: IrqchipStateV1::sample,
        changes: [
            |s| s.pic_master = chip(KVM_IRQCHIP_PIC_MASTER, 9),
            |s| s.pic_slave = chip(KVM_IRQCHIP_PIC_SLAVE, 9),
            |s| s.ioapic = chip(KVM_IRQCHIP_IOAPIC, 9),
        ],
        golden: "irqchip-x86-v1",
    }

    #[test]
    fn a_chip_under_anothers_name_is_refused() {
        let mut state = IrqchipStateV1::sample();
        state.pic_slave = state.pic_master;
        let error = read_node::<IrqchipStateV1>(&state.to_node("irqchip"), "/").unwrap_err();
        assert_eq!(error.to_string(), "/irqchip: property `pic-slave`: chip id 0");
    }

    /// Masks, bases, trigger modes and routes such as a guest sets, with one edge that waits behind
    /// a mask.
    fn program(vm: &VmFd) {
        let pic = |base, mask, elcr| kvm_pic_state {
            irq_base: base,
            imr: mask,
            elcr,
            elcr_mask: 0xf8,
            init4: 1,
            ..Default::default()
        };
        let pics = [
            (KVM_IRQCHIP_PIC_MASTER, pic(0x20, 0xfb, 0x20)),
            (KVM_IRQCHIP_PIC_SLAVE, pic(0x28, 0xff, 0x0c)),
        ];
        for (chip_id, pic) in pics {
            let chip = kvm_irqchip__bindgen_ty_1 { pic };
            vm.set_irqchip(&kvm_irqchip { chip_id, chip, ..Default::default() }).unwrap();
        }
        let mut ioapic =
            kvm_ioapic_state { id: 5, base_address: 0xfec0_0000, ..Default::default() };
        const MASKED: u64 = 1 << 16;
        for (pin, entry) in (0..).zip(&mut ioapic.redirtbl) {
            entry.bits = MASKED | (0x30 + pin);
        }
        // Level-triggered, to vCPU 1.
        ioapic.redirtbl[10].bits = 1 << 56 | MASKED | 1 << 15 | 0x41;
        let chip = kvm_irqchip__bindgen_ty_1 { ioapic };
        vm.set_irqchip(&kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, chip, ..Default::default() })
            .unwrap();
        vm.set_irq_line(4, true).unwrap();
        vm.set_irq_line(4, false).unwrap();
    }

    #[test]
    fn the_chips_are_the_same_in_another_vm() {
        let (Some(before), Some(after)) = (TestVm::new(), TestVm::new()) else { return };
        let fresh = IrqchipStateV1::save(&after.vm).unwrap();
        program(&before.vm);
        let saved = IrqchipStateV1::save(&before.vm).unwrap();
        for property in ["pic-master", "pic-slave", "ioapic"] {
            let [saved, fresh] = [saved, fresh].map(|s| s.to_node("").properties[property].clone());
            assert_ne!(saved, fresh, "{property} was not programmed");
        }
        saved.restore(&after.vm).unwrap();
        let node = |state: IrqchipStateV1| state.to_node("");
        assert_eq!(node(IrqchipStateV1::save(&after.vm).unwrap()), node(saved));
        assert_eq!(node(IrqchipStateV1::save(&before.vm).unwrap()), node(saved), "no change");
    }
}
