//! Disks whose storage grows, fails or hangs.

use super::*;

#[test]
fn a_disk_that_grows_while_its_guest_runs_is_larger_for_the_guest_which_is_told() {
    for options in ENGINES {
        let file = image();
        let mut guest = Guest::new(file.try_clone().unwrap(), options, F_FLUSH);
        let beyond = guest.offer(0, SECTORS, &[(DATA, 512, WRITE)]);
        guest.ring_doorbell();
        guest.run_until(1);
        assert_eq!((guest.status(beyond), guest.capacity()), (1, (SECTORS, false)));
        // The operator has made the file larger. A part of a sector at its end is left out.
        file.set_len((SECTORS + 8) * 512 + 100).unwrap();
        assert_eq!(guest.resize(None), Ok((SECTORS + 8) * 512));
        assert_eq!(guest.capacity(), (SECTORS + 8, true), "{options}");
        let now = guest.offer(0, SECTORS, &[(DATA, 512, WRITE)]);
        guest.ring_doorbell();
        guest.run_until(2);
        assert_eq!(guest.status(now), 0);
        // The disk makes the file larger itself.
        let wanted = (SECTORS + 64) * 512;
        assert_eq!(guest.resize(Some(wanted)), Ok(wanted));
        assert_eq!(
            (file.metadata().unwrap().len(), guest.capacity()),
            (wanted, (SECTORS + 64, true))
        );
        // A resize that changes nothing tells the guest nothing, and neither does a pause.
        assert_eq!(guest.resize(None), Ok(wanted));
        guest.pause();
        guest.function.resume();
        assert_eq!(guest.capacity(), (SECTORS + 64, false));
    }
}

#[test]
fn a_resize_that_cannot_be_is_refused_with_both_sizes_and_changes_nothing() {
    let file = image();
    let mut guest = Guest::new(file.try_clone().unwrap(), ENGINES[0], F_FLUSH);
    let refused = guest.resize(Some(512)).unwrap_err();
    assert!(
        refused.contains("a disk has 32768 bytes") && refused.contains("512 bytes"),
        "{refused}"
    );
    let refused = guest.resize(Some(32769)).unwrap_err();
    assert!(refused.contains("multiple of 512 bytes, and 32769"), "{refused}");
    let refused = guest.resize(Some(u64::MAX / 512 * 512)).unwrap_err();
    assert!(refused.contains("cannot grow the file"), "{refused}");
    assert_eq!(file.metadata().unwrap().len(), 32768);
    file.set_len(512).unwrap();
    let refused = guest.resize(None).unwrap_err();
    assert!(refused.contains("32768 bytes") && refused.contains("only 512 now"), "{refused}");
    assert_eq!(guest.capacity(), (SECTORS, false));

    // Not a file, so only its own tools could grow it.
    let device = File::options().read(true).write(true).open("/dev/zero").unwrap();
    let refused = Guest::new(device, ENGINES[0], F_FLUSH).resize(Some(65536)).unwrap_err();
    assert!(
        refused.contains("0 bytes") && refused.contains("65536 bytes: grow it there"),
        "{refused}"
    );
}

#[test]
fn nobody_waits_for_a_disk_whose_thread_hangs() {
    let guest = Guest::new(image(), ENGINES[0], F_FLUSH);
    // Nobody runs the disk's thread.
    guest.disk.begin_sync();
    let error = guest.disk.end_sync(Instant::now()).unwrap_err().to_string();
    assert!(error.contains("the storage of the disk a disk has not answered"), "{error}");
    guest.disk.resize(None, Box::new(|_| unreachable!("the thread hangs")));
    let (sender, refused) = std::sync::mpsc::channel();
    guest.disk.resize(None, Box::new(move |result| sender.send(result.unwrap_err()).unwrap()));
    let refused = refused.try_recv().unwrap().to_string();
    assert!(refused.contains("a disk is being resized already"), "{refused}");
}

#[test]
fn errors_of_the_host_are_counted_and_the_last_one_is_told() {
    use crate::devices::storage::{Cause, Operation};
    for options in ENGINES {
        let full = File::options().read(true).write(true).open("/dev/full").unwrap();
        let mut guest = Guest::new(full, options, F_FLUSH);
        let report = guest.disk.report();
        assert_eq!((report.errors, report.last_error, report.stalled), (0, None, 0));
        assert_eq!((report.queues, report.bytes), (1, SECTORS * 512));
        let writes: Vec<u64> = (0..3).map(|n| guest.offer(1, n, &[(DATA, 512, 0)])).collect();
        guest.ring_doorbell();
        guest.run_until(3);
        assert!(writes.iter().all(|n| guest.status(*n) == 1));
        let report = guest.disk.report();
        let last = report.last_error.unwrap();
        assert_eq!((report.errors, last.operation), (3, Operation::Write), "{options}");
        assert_eq!(last.cause, Cause::Errno(libc::ENOSPC));
        assert_eq!((report.stalled, report.waiting_s), (0, 0), "all are answered");
        if options.ends_with("_disable_io_uring=on") {
            assert_eq!(report.engine, storage::Engine::Threads);
        }

        let mut guest = Guest::new(image(), options, F_FLUSH);
        guest.disk.image.file.set_len(512).unwrap();
        guest.offer(0, 1, &[(DATA, 512, WRITE)]);
        guest.ring_doorbell();
        guest.run_until(1);
        let last = guest.disk.report().last_error.unwrap();
        assert_eq!((last.operation, last.cause), (Operation::Read, Cause::End), "{options}");
    }
}

#[test]
fn an_operation_that_the_storage_does_not_answer_is_reported_while_the_disk_goes_on() {
    let mut guest = Guest::new(image(), ENGINES[0], F_FLUSH);
    let long_ago = Instant::now().checked_sub(Duration::from_secs(12)).unwrap();
    let ticket = guest.disk.health.begin(long_ago);
    guest.offer(0, 1, &[(DATA, 512, WRITE)]);
    guest.ring_doorbell();
    guest.run_until(1);
    let report = guest.disk.report();
    assert_eq!(report.stalled, 1);
    assert!(report.waiting_s >= 12, "{report:?}");
    let error = guest.disk.check_answers().unwrap_err().to_string();
    assert!(error.contains("the disk a disk has not answered for 12 s (operations: 1)"), "{error}");
    guest.disk.health.end(ticket);
    guest.disk.check_answers().unwrap();
    let report = guest.disk.report();
    assert_eq!((report.stalled, report.waiting_s), (0, 0));
}

#[test]
fn a_disk_that_cannot_make_its_writes_durable_says_so_when_it_is_synced() {
    let null = File::options().read(true).write(true).open("/dev/null").unwrap();
    for options in ENGINES {
        let mut guest = Guest::new(image(), options, F_FLUSH);
        guest.pause();
        assert_eq!(guest.sync(), Ok(()), "{options}");
        let mut guest = Guest::new(null.try_clone().unwrap(), options, F_FLUSH);
        guest.pause();
        let error = guest.sync().unwrap_err();
        assert!(error.contains("cannot make the writes to the disk a disk durable"), "{error}");
    }
}
