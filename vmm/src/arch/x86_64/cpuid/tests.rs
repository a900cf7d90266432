use super::features::{GROUPS, Group, Kind};
use super::*;

/// What is offered of `supported` where the XSAVE area that is saved has 16 KiB.
fn offer(supported: &[kvm_cpuid_entry2], tsc_deadline: bool) -> Vec<kvm_cpuid_entry2> {
    template(&complete(supported, tsc_deadline), 16 << 10)
}

fn entry(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = registers;
    kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
}

fn amd() -> Vec<kvm_cpuid_entry2> {
    vec![
        entry(0, 0, [0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
        entry(1, 0, [0, 0x1234_0800, bits(&[0, 5, 27]), bits(&[9])]),
        entry(4, 0, [3 << 5 | 1, 0, 0, 0]),
        entry(0x12, 0, [1, 1, 1, 1]),
        entry(0x1f, 0, [0, 0, 0, 0]),
        entry(0x8000_0001, 0, [0, 0, bits(&[2, 22]), 0]),
        entry(0x8000_0008, 0, [0x3030, 0, 0xffff, 0]),
        entry(0x8000_000a, 0, [1, 1, 1, 1]),
        entry(0x8000_001d, 0, [1 << 5 | 1 | 7 << 14, 0, 0, 0]),
        entry(0x8000_001d, 3, [3 << 5 | 3, 0, 0, 0]),
        entry(0x8000_001e, 0, [9, 9, 9, 9]),
    ]
}

#[test]
fn nested_virtualization_and_sgx_are_not_offered() {
    let offered = offer(&amd(), false);
    let leaf1 = find(&offered, 1, 0).unwrap();
    // OSXSAVE goes with XSAVE, which this processor does not have.
    assert_eq!(leaf1.ecx, bits(&[0, 21, 31]));
    assert_eq!(find(&offered, 0x8000_0001, 0).unwrap().ecx, bits(&[22]));
    for leaf in [0x12, 0x1f, 0x8000_000a] {
        assert!(find(&offered, leaf, 0).is_none(), "{leaf:#x}");
    }
    assert!(find(&offer(&amd(), true), 1, 0).unwrap().ecx & bits(&[24]) != 0);
}

#[test]
fn every_vcpu_finds_its_own_apic_id_in_every_leaf_that_has_one() {
    let template = offer(&amd(), true);
    for id in [0, 2, 5] {
        let entries = for_vcpu(&template, id, 6);
        assert_eq!(find(&entries, 1, 0).unwrap().ebx, id << 24 | 8 << 16 | 0x800);
        assert!(find(&entries, 1, 0).unwrap().edx & bits(&[28]) != 0);
        let smt = find(&entries, 0xb, 0).unwrap();
        assert_eq!([smt.eax, smt.ebx, smt.ecx, smt.edx], [0, 1, 0x100, id]);
        let core = find(&entries, 0xb, 1).unwrap();
        assert_eq!([core.eax, core.ebx, core.ecx, core.edx], [3, 6, 0x201, id]);
        assert_eq!(find(&entries, 0x8000_001e, 0).unwrap().eax, id);
        assert_eq!(find(&entries, 0x8000_0008, 0).unwrap().ecx, 0x0f00 | 3 << 12 | 5);
        assert_eq!(find(&entries, 0x8000_001d, 0).unwrap().eax >> 14, 0);
        assert_eq!(find(&entries, 0x8000_001d, 3).unwrap().eax >> 14, 5);
    }
}

#[test]
fn sixteen_vcpus_are_the_cores_of_one_package_by_every_leaf_on_both_vendors() {
    let mut intel = amd();
    // GenuineIntel; caches of the first and the third level.
    intel[0] = entry(0, 0, [0x1f, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]);
    intel.insert(3, entry(4, 3, [3 << 5 | 3, 0, 0, 0]));
    let (amd, intel) = (offer(&amd(), true), offer(&intel, true));
    let mut found = Vec::new();
    for id in 0..16 {
        for template in [&amd, &intel] {
            let entries = for_vcpu(template, id, 16);
            let [thread, core] = [0, 1].map(|level| *find(&entries, 0xb, level).unwrap());
            assert_eq!((thread.eax, thread.ebx), (0, 1), "one thread to a core");
            assert_eq!((core.eax, core.ebx, core.edx), (4, 16, id));
            assert_eq!(core.edx >> core.eax, 0, "one package");
            assert!(find(&entries, 0x1f, 0).is_none(), "no other leaf that could disagree");
            assert_eq!(find(&entries, 1, 0).unwrap().ebx >> 16 & 0xff, 16);
        }
        let entries = for_vcpu(&intel, id, 16);
        let cache = |level| find(&entries, 4, level).unwrap().eax;
        assert_eq!([cache(0) >> 26, cache(3) >> 26], [15, 15], "cores of the package");
        assert_eq!(cache(3) >> 14 & 0xfff, 15, "all share the third level");
        let entries = for_vcpu(&amd, id, 16);
        assert_eq!(find(&entries, 0x8000_0008, 0).unwrap().ecx & 0xf0ff, 4 << 12 | 15);
        let node = find(&entries, 0x8000_001e, 0).unwrap();
        assert_eq!((node.eax, node.ebx, node.ecx), (id, id, 0), "core, one thread, one node");
        found.push(node.eax);
    }
    assert_eq!(found, (0..16).collect::<Vec<_>>());
}

#[test]
fn the_rates_of_tsc_and_lapic_timer_are_told_within_the_range_of_leaves() {
    let mut entries = amd();
    add_frequencies(&mut entries, 2_994_375);
    assert!(find(&entries, FREQUENCIES, 0).is_none(), "there is no hypervisor");
    entries.push(entry(HYPERVISOR, 0, [0x4000_0001, 1, 2, 3]));
    for khz in [2_994_375, 3_000_000] {
        add_frequencies(&mut entries, khz);
        let found: Vec<_> = entries.iter().filter(|e| e.function == FREQUENCIES).collect();
        assert_eq!(found.iter().map(|e| (e.eax, e.ebx)).collect::<Vec<_>>(), [(khz, 1_000_000)]);
    }
    assert_eq!(find(&entries, HYPERVISOR, 0).unwrap().eax, FREQUENCIES);
}

#[test]
fn one_vcpu_is_not_hyperthreaded() {
    let entries = for_vcpu(&offer(&amd(), true), 0, 1);
    assert_eq!(find(&entries, 1, 0).unwrap().edx & bits(&[28]), 0);
    assert_eq!(find(&entries, 0x8000_0001, 0).unwrap().ecx & 2, 0);
    assert_eq!(find(&entries, 4, 0).unwrap().eax >> 14, 0);
}

#[test]
fn a_host_that_offers_what_the_guest_has_is_accepted() {
    let template = offer(&amd(), true);
    assert_eq!(compare(&for_vcpu(&template, 1, 2), &template), Comparison::default());
    assert_eq!(compare(&[], &template), Comparison::default());
}

#[test]
fn bits_that_follow_the_guests_own_state_are_not_compared() {
    let mut host = offer(&amd(), true);
    let document = for_vcpu(&host, 0, 2);
    for entry in host.iter_mut().filter(|e| e.function == 1) {
        entry.ecx &= !bits(&[27]);
        entry.edx &= !bits(&[9, 28]);
    }
    assert_eq!(compare(&document, &host), Comparison::default());
}

/// A processor with every bit set in every feature register, known or not, and every XSAVE component.
fn everything() -> Vec<kvm_cpuid_entry2> {
    let all = u32::MAX;
    let mut entries = vec![
        entry(0, 0, [0x20, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        entry(1, 0, [0, 0, all, all]),
        entry(6, 0, [all; 4]),
        entry(0x8000_0001, 0, [0, 0, all, all]),
        entry(0x8000_0007, 0, [0, all, 0, all]),
        entry(0x8000_0008, 0, [0x3030, all, 0, 0]),
        entry(0xd, 0, [all, 2696, 11008, all]),
        entry(0xd, 1, [all, 0, all, all]),
        entry(0x14, 0, [all; 4]),
        entry(0x4000_0001, 0, [all, 0, 0, all]),
    ];
    entries.extend(
        (0..4).map(|index| entry(7, index, if index == 0 { [3, all, all, all] } else { [all; 4] })),
    );
    entries.extend([0x8000_0021, 0x8000_0022].map(|leaf| entry(leaf, 0, [all; 4])));
    // Bytes and offset of each component in the standard format (Intel SDM 1, 13.5; AMX: 13.5.12).
    let components = [
        (2, 256, 576),
        (3, 64, 960),
        (4, 64, 1024),
        (5, 64, 1088),
        (6, 512, 1152),
        (7, 1024, 1664),
        (8, 128, 0),
        (9, 8, 2688),
        (11, 16, 0),
        (12, 24, 0),
        (17, 64, 2752),
        (18, 8192, 2816),
        (19, 128, 960),
    ];
    entries
        .extend(components.map(|(index, bytes, offset)| entry(0xd, index, [bytes, offset, 0, 0])));
    entries
}

fn names_in(entries: &[kvm_cpuid_entry2]) -> Vec<&'static str> {
    let has = |group: &&Group, bit: u8| {
        find(entries, group.leaf, group.subleaf)
            .is_some_and(|e| get(e, group.register) & 1 << bit != 0)
    };
    let names = GROUPS.iter().flat_map(|group| {
        let here = group.bits.iter().filter(move |(bit, _)| has(&group, *bit));
        here.map(|(_, name)| *name)
    });
    names.collect()
}

#[test]
fn no_bit_is_in_two_groups_and_every_group_says_why() {
    for (index, group) in GROUPS.iter().enumerate() {
        assert!(group.why.len() > 10 && !group.bits.is_empty());
        assert_eq!(group.mask().count_ones() as usize, group.bits.len(), "{:?}", group.bits);
        for other in &GROUPS[index + 1..] {
            let same = (other.leaf, other.subleaf, other.register)
                == (group.leaf, group.subleaf, group.register);
            assert!(
                !same || other.mask() & group.mask() == 0,
                "{:?} and {:?}",
                group.bits,
                other.bits
            );
        }
    }
}

#[test]
fn only_known_features_whose_state_is_carried_are_offered() {
    let offered = offer(&everything(), true);
    for entry in &offered {
        for register in [Eax, Ebx, Ecx, Edx] {
            let at = (entry.function, entry.index, register);
            let groups = || GROUPS.iter().filter(|g| (g.leaf, g.subleaf, g.register) == at);
            if groups().next().is_some() {
                let carried = groups().filter(|g| g.kind != Kind::Withheld);
                let mask = carried.fold(0, |mask, group| mask | group.mask());
                assert_eq!(get(entry, register), mask, "{at:x?}");
            }
        }
    }
    let names = names_in(&offered);
    for name in [
        "user_shstk",
        "ibt",
        "vmx",
        "svm",
        "sgx",
        "intel_pt",
        "pks",
        "enqcmd",
        "fred",
        "apx",
        "arch_lbr",
    ] {
        assert!(!names.contains(&name), "{name}");
    }
    for name in ["avx2", "amx_tile", "pku", "spec_ctrl", "srso_no", "kvm_clocksource2"] {
        assert!(names.contains(&name), "{name}");
    }
    assert!(find(&offered, 0x14, 0).is_none(), "processor trace");
    assert!(find(&offered, 7, 3).is_none() && find(&offered, 7, 0).unwrap().eax == 2);
    let xcr0 = find(&offered, 0xd, 0).unwrap();
    assert_eq!(xcr0.eax, bits(&[0, 1, 2, 3, 4, 5, 6, 7, 9, 17, 18]));
    assert_eq!((xcr0.ecx, xcr0.edx), (2816 + 8192, 0));
    let xss = find(&offered, 0xd, 1).unwrap();
    assert_eq!((xss.ecx, xss.edx), (0, 0));
    assert!([8, 11, 12, 19].iter().all(|component| find(&offered, 0xd, *component).is_none()));
}

#[test]
fn amx_is_offered_only_if_the_xsave_area_that_is_saved_has_room_for_it() {
    let offered = template(&everything(), 4096);
    let names = names_in(&offered);
    assert!(!names.iter().any(|name| name.starts_with("amx")), "{names:?}");
    assert!(names.contains(&"avx512f") && names.contains(&"pku"));
    let xcr0 = find(&offered, 0xd, 0).unwrap();
    assert_eq!((xcr0.eax, xcr0.ecx), (bits(&[0, 1, 2, 3, 4, 5, 6, 7, 9]), 2696));
    assert!(find(&offered, 0xd, 18).is_none());
}

#[test]
fn a_baseline_is_its_level_and_what_every_processor_has() {
    let offered = offer(&everything(), true);
    let v2 = baseline(&offered, CpuModel::V2).unwrap();
    let names = names_in(&v2);
    for name in [
        "sse4_2",
        "popcnt",
        "cx16",
        "lahf_lm",
        "nx",
        "x2apic",
        "tsc_deadline_timer",
        "spec_ctrl",
        "srso_no",
    ] {
        assert!(names.contains(&name), "{name}");
    }
    for name in ["avx", "xsave", "aes", "smap", "pcid", "bmi1", "pdcm", "movbe"] {
        assert!(!names.contains(&name), "{name}");
    }
    assert!(find(&v2, 0xd, 0).is_none(), "no XSAVE");
    let v3 = baseline(&offered, CpuModel::V3).unwrap();
    let names = names_in(&v3);
    for name in ["avx2", "fma", "bmi1", "bmi2", "abm", "movbe", "f16c", "xsave", "sse4_2"] {
        assert!(names.contains(&name), "{name}");
    }
    assert!(
        !names.iter().any(|name| name.starts_with("avx512") || name.starts_with("amx")),
        "{names:?}"
    );
    assert!(!names.contains(&"xsaves") && !names.contains(&"sha_ni"));
    let xcr0 = find(&v3, 0xd, 0).unwrap();
    assert_eq!((xcr0.eax, xcr0.ecx), (0b111, 832));
    let v4 = baseline(&offered, CpuModel::V4).unwrap();
    let names = names_in(&v4);
    for name in ["avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl", "avx2"] {
        assert!(names.contains(&name), "{name}");
    }
    assert!(!names.contains(&"avx512_vnni") && !names.contains(&"amx_tile"));
    assert_eq!(find(&v4, 0xd, 0).unwrap().eax, bits(&[0, 1, 2, 5, 6, 7]));
    assert_eq!(baseline(&offered, CpuModel::Host).unwrap(), offered);
    assert_eq!(compare(&v4, &offered), Comparison::default());
}

#[test]
fn a_baseline_that_the_host_cannot_offer_names_what_is_missing() {
    let mut host = everything();
    for entry in host.iter_mut().filter(|e| (e.function, e.index) == (7, 0)) {
        entry.ebx &= !bits(&[5, 16, 30]);
    }
    let offered = offer(&host, true);
    assert_eq!(baseline(&offered, CpuModel::V3).unwrap_err(), ["avx2"]);
    assert_eq!(baseline(&offered, CpuModel::V4).unwrap_err(), ["avx2", "avx512f", "avx512bw"]);
    baseline(&offered, CpuModel::V2).unwrap();
}

#[test]
fn a_model_has_one_name() {
    for model in CpuModel::ALL {
        assert_eq!(CpuModel::from_name(model.name()), Some(model));
        assert_eq!(serde_json::to_value(model).unwrap(), model.name());
    }
    assert_eq!(CpuModel::from_name("x86-64-v9"), None);
}

/// Clears bits of the host's CPUID.
fn without(
    mut host: Vec<kvm_cpuid_entry2>,
    leaf: u32,
    register: Register,
    lost: &[u32],
) -> Vec<kvm_cpuid_entry2> {
    for entry in host.iter_mut().filter(|e| (e.function, e.index) == (leaf, 0)) {
        *get_mut(entry, register) &= !bits(lost);
    }
    host
}

#[test]
fn a_missing_instruction_is_named_with_both_sides() {
    let guest = offer(&everything(), true);
    let document = for_vcpu(&guest, 0, 1);
    let found = compare(&document, &without(guest, 7, Ebx, &[5, 8, 9]));
    assert_eq!(found.hints.iter().flat_map(|m| m.names.clone()).collect::<Vec<_>>(), ["erms"]);
    assert_eq!(found.lacking.len(), 1);
    let words = found.lacking[0].to_string();
    let wanted = "avx2, bmi2 (CPUID leaf 0x7 subleaf 0 Ebx: the document has 0xfdbf6ffb";
    assert!(words.starts_with(wanted), "{words}");
    assert!(words.contains("this host offers 0xfdbf6cdb"), "{words}");
}

#[test]
fn words_about_weaknesses_and_speed_are_no_condition() {
    let guest = offer(&everything(), true);
    let document = for_vcpu(&guest, 0, 1);
    let host = without(
        guest,
        0x8000_0021,
        Eax,
        &(0..32).filter(|bit| ![8, 17, 27].contains(bit)).collect::<Vec<_>>(),
    );
    let host = without(host, 0x8000_0021, Ecx, &[1, 2]);
    let host = without(host, 7, Edx, &[4, 10]);
    let found = compare(&document, &host);
    assert_eq!(found.lacking, []);
    let names: Vec<_> = found.hints.iter().flat_map(|m| m.names.clone()).collect();
    for name in ["srso_no", "tsa_l1_no", "lfence_rdtsc", "md_clear", "fsrm"] {
        assert!(names.contains(&name.to_owned()), "{name}");
    }
}

#[test]
fn lost_state_is_a_refusal_and_a_component_of_xsave_is_named() {
    let guest = offer(&everything(), true);
    let document = for_vcpu(&guest, 0, 1);
    let host = without(guest.clone(), 7, Edx, &[26]);
    let found = compare(&document, &without(host, 0xd, Eax, &[9]));
    let names: Vec<_> = found.lacking.iter().flat_map(|m| m.names.clone()).collect();
    assert_eq!(names, ["spec_ctrl", "the XSAVE component of pku"]);
    assert_eq!(found.hints, []);
    // The host loses the whole leaf.
    let host: Vec<_> = guest.into_iter().filter(|e| e.function != 0x4000_0001).collect();
    let found = compare(&document, &host);
    assert!(found.lacking[0].names.contains(&"kvm_clocksource2".to_owned()), "{found:?}");
}

#[test]
fn a_guest_with_a_feature_whose_state_is_not_saved_is_refused_although_the_host_has_it() {
    let host = everything();
    let mut document = offer(&host, true);
    for entry in document.iter_mut().filter(|e| (e.function, e.index) == (7, 0)) {
        entry.ecx |= bits(&[7]);
    }
    let found = compare(&document, &host);
    assert_eq!(found.uncarried.iter().map(|u| u.name).collect::<Vec<_>>(), ["user_shstk"]);
    assert!(found.uncarried[0].to_string().contains("shadow stack pointer"));
}

#[test]
fn a_guest_of_another_makers_processor_is_told_apart() {
    let guest = offer(&everything(), true);
    let mut host = guest.clone();
    host[0] = amd()[0];
    let found = compare(&guest, &host);
    assert_eq!(found.vendors, Some(("GenuineIntel".to_owned(), "AuthenticAMD".to_owned())));
}
