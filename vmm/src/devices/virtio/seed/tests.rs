//! Tests of the device with its disk.

use std::fs;
use std::path::Path;

use super::*;
use crate::state::Persist;

fn image(directory: &Path) -> SeedImage {
    let mut opened = SeedOptions { directory: directory.to_owned() }.open().unwrap();
    let Opened { fd, identity, .. } = opened.remove(0);
    SeedImage {
        disk: fd.into(),
        identity: identity.unwrap(),
        directory: directory.display().to_string(),
    }
}

#[test]
fn a_seed_is_a_read_only_disk() {
    let directory = tempfile::tempdir().unwrap();
    let image = image(directory.path());
    assert!(image.disk.write_at(&[1], 0).is_err(), "it is sealed");
    let seed = Seed::new(image, "web-0").unwrap();
    let state = seed.save().unwrap();
    assert!(state.disk.readonly);
    assert_eq!(state.disk.capacity_sectors, (512 << 10) / 512);
}

#[test]
fn a_seed_is_restored_if_its_directory_makes_the_same_disk() {
    let directory = tempfile::tempdir().unwrap();
    let user_data = directory.path().join("user-data");
    fs::write(&user_data, "#cloud-config\n").unwrap();
    let state = Seed::new(image(directory.path()), "web-0").unwrap().save().unwrap();
    // Another memfd, from files that were written again.
    fs::remove_file(&user_data).unwrap();
    fs::write(&user_data, "#cloud-config\n").unwrap();
    let restored = Seed::restore(state.clone(), image(directory.path())).unwrap();
    let again = restored.save().unwrap();
    assert_eq!((again.digest, again.disk.id), (state.digest, state.disk.id));
    fs::write(&user_data, "#cloud-config\npackages: [a]\n").unwrap();
    let error = Seed::restore(state, image(directory.path())).unwrap_err().to_string();
    assert!(error.contains("bring the old ones back, then restore the VM"), "{error}");
}
