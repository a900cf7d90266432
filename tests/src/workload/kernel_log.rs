//! Recognises lines of the guest kernel's log that report a problem which a live update may cause.

/// Parts of messages, in lower case, by which the guest's kernel reports a problem.
/// From Linux's kernel/watchdog.c, kernel/hung_task.c, kernel/rcu/tree_stall.h,
/// kernel/workqueue.c, kernel/time/clocksource.c, arch/x86/kernel/tsc_sync.c, block/blk-core.c,
/// fs/ext4/super.c, lib/bug.c.
const COMPLAINTS: &[&str] = &[
    "soft lockup",
    "hard lockup",
    "blocked for more than",
    "detected stalls",
    "self-detected stall",
    "rcu: info:",
    "workqueue lockup",
    "marked unstable",
    "tsc unstable",
    "clocksource watchdog",
    "i/o error",
    "ext4-fs error",
    "buffer i/o",
    "bug:",
    "warning:",
    "general protection",
    "unable to handle",
    "call trace",
    "oops",
    "nobody cared",
    "nmi received",
    "mce:",
];

/// The highest level that is checked: messages of higher levels (info, debug) report no problem.
const HIGHEST_LEVEL: u32 = 5;

/// The message of a record of `/dev/kmsg`, if it reports a problem.
///
/// The record's form is `prefix,sequence,timestamp,flags;message`, where the prefix's low three
/// bits are the level (Documentation/ABI/testing/dev-kmsg).
pub fn complaint(record: &str) -> Option<&str> {
    let (header, rest) = record.split_once(';')?;
    let prefix: u32 = header.split(',').next()?.parse().ok()?;
    let message = rest.lines().next()?;
    let lower = message.to_lowercase();
    let complains = (prefix & 7) <= HIGHEST_LEVEL && COMPLAINTS.iter().any(|c| lower.contains(c));
    complains.then_some(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_found_with_their_message() {
        for (record, message) in [
            (
                "0,512,20000000,-;watchdog: BUG: soft lockup - CPU#1 stuck for 22s! [init:1]\n",
                "watchdog: BUG: soft lockup - CPU#1 stuck for 22s! [init:1]",
            ),
            (
                "3,77,1,-;INFO: task kworker/0:1 blocked for more than 120 seconds.\n A=b",
                "INFO: task kworker/0:1 blocked for more than 120 seconds.",
            ),
            (
                "3,9,1,-;rcu: INFO: rcu_sched detected stalls on CPUs/tasks:",
                "rcu: INFO: rcu_sched detected stalls on CPUs/tasks:",
            ),
            (
                "4,9,1,-;I/O error, dev vda, sector 8 op 0x1:(WRITE)",
                "I/O error, dev vda, sector 8 op 0x1:(WRITE)",
            ),
            (
                "4,9,1,-;clocksource: timekeeping watchdog: Marking clocksource 'tsc' as unstable; clocksource watchdog",
                "clocksource: timekeeping watchdog: Marking clocksource 'tsc' as unstable; clocksource watchdog",
            ),
        ] {
            assert_eq!(complaint(record), Some(message));
        }
    }

    #[test]
    fn ordinary_messages_and_things_that_are_no_records_are_not() {
        for record in [
            "6,0,0,-;Linux version 7.3.4",
            "6,1,0,-;watchdog: soft lockup detector enabled",
            "30,1,0,-;systemd[1]: WARNING: level is informational",
            "",
            "no record",
            "x,1,2,-;BUG: not a number",
        ] {
            assert_eq!(complaint(record), None, "{record}");
        }
    }
}
