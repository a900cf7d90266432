//! The partition tables of disks, whole, damaged and left behind.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::tests::{
    MIB, booted, debian, debian_boots, ext4, fat, file, gpt, gpt_of, mbr_entry, refused,
    search_sectors, write_mbr, write_mbr_at,
};

#[test]
fn a_gpt_whose_first_header_is_damaged_is_read_from_its_copy() {
    let disk = gpt(&[(1, &ext4(&[], debian))]);
    disk.write_all_at(&[1], 512 + 60).unwrap();
    debian_boots(disk);
}

#[test]
fn partitions_of_an_mbr_are_found_logical_ones_too() {
    let root = ext4(&[], debian);
    let sectors = (root.len() / 512) as u32;
    let disk = file(&[]);
    disk.write_all_at(&root, 4096 * 512).unwrap();
    write_mbr(&disk, 0, &[mbr_entry(0x83, 4096, sectors)]);
    debian_boots(disk);
    let disk = file(&[]);
    disk.set_len(32 * MIB).unwrap();
    write_mbr(&disk, 0, &[mbr_entry(0x83, 1, 1), mbr_entry(0x05, 100, sectors + 9000)]);
    write_mbr(&disk, 100, &[mbr_entry(0x83, 1, 1), mbr_entry(0x05, 50, 9000)]);
    write_mbr(&disk, 150, &[mbr_entry(0x83, 4000, sectors)]);
    disk.write_all_at(&root, 4150 * 512).unwrap();
    debian_boots(disk);
}

#[test]
fn partition_tables_count_in_the_logical_sectors_of_the_disk() {
    let root = ext4(&[], debian);
    let sectors = |sector: u64| (root.len() as u64 / sector) as u32;
    let mbr = |sector: u64| {
        let disk = file(&[]);
        disk.write_all_at(&root, 1024 * sector).unwrap();
        write_mbr(&disk, 0, &[mbr_entry(0x83, 1024, sectors(sector))]);
        disk
    };
    let logical = |sector: u64| {
        let disk = file(&[]);
        disk.write_all_at(&root, 550 * sector).unwrap();
        write_mbr(&disk, 0, &[mbr_entry(0x05, 100, sectors(sector) + 1000)]);
        write_mbr_at(&disk, 100 * sector, &[mbr_entry(0x83, 1, 1), mbr_entry(0x05, 50, 900)]);
        write_mbr_at(&disk, 150 * sector, &[mbr_entry(0x83, 400, sectors(sector))]);
        disk
    };
    let gpt = |sector: u64| gpt_of(sector, &[(1, &root)]);
    let makers: [&dyn Fn(u64) -> File; 3] = [&mbr, &logical, &gpt];
    for (number, disk) in makers.into_iter().enumerate() {
        for (made, read) in [(512, 512), (4096, 4096), (512, 4096), (4096, 512)] {
            let found = search_sectors(disk(made), read, |_| Ok(()));
            assert_eq!(found.is_ok(), made == read, "disk {number}: {made} read as {read}");
        }
    }
}

#[test]
fn a_gpt_that_a_later_table_or_file_system_has_left_is_not_used() {
    let root = ext4(&[], debian);
    let stale = || gpt(&[(1, &fat(&[("loader/entries/a.conf", b"linux /k"), ("k", b"stale")]))]);
    let sectors = (root.len() / 512) as u32;
    let disk = stale();
    disk.write_all_at(&root, 16 * MIB).unwrap();
    write_mbr(&disk, 0, &[mbr_entry(0x83, 16 * 2048, sectors)]);
    debian_boots(disk);
    // ext4 leaves its first 1024 bytes alone, and so a table that was there, but for what mke2fs erases.
    let disk = stale();
    disk.write_all_at(&[0; 512], 0).unwrap();
    disk.write_all_at(&root[1024..], 1024).unwrap();
    debian_boots(disk);
    // A type alone, somewhere on the disk, protects nothing.
    let disk = stale();
    disk.write_all_at(&root, 16 * MIB).unwrap();
    let entries = [mbr_entry(0xee, 2, 9), mbr_entry(0x83, 16 * 2048, sectors)];
    write_mbr(&disk, 0, &entries);
    debian_boots(disk);
    let mixed = [mbr_entry(0x83, 16 * 2048, sectors), mbr_entry(0xee, 1, 9)];
    let disk = stale();
    write_mbr(&disk, 0, &mixed);
    assert_eq!(booted(disk).0, "stale");
}

#[test]
fn logical_partitions_in_a_circle_end() {
    let disk = file(&[]);
    disk.set_len(MIB).unwrap();
    write_mbr(&disk, 0, &[mbr_entry(0x05, 100, 1000)]);
    write_mbr(&disk, 100, &[mbr_entry(0x83, 1, 1), mbr_entry(0x05, 0, 1000)]);
    let refused = refused(disk);
    assert!(refused.contains("an MBR") && refused.contains("partition 5 (512 bytes)"), "{refused}");
}
