//! seccomp filters: compiles lists of allowed system calls and installs them.
//!
//! The filters of a thread add up: those of the thread that started it, and its own. A call must be allowed
//! by all of them. A call outside a list raises SIGSYS, which [`trap`](super::trap) reports.

#![expect(unsafe_code, reason = "mallopt is an option of the C library's allocator")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

use super::calls::{Args, Call, EVERY_THREAD};
use crate::mutex::lock;

/// A filter cannot be installed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FilterError {
    /// The handler for SIGSYS cannot be installed.
    #[error("cannot handle SIGSYS")]
    Handler(#[from] std::io::Error),
    /// A list cannot be compiled.
    #[error("cannot compile a filter: {0}")]
    Compile(#[from] seccompiler::BackendError),
    /// The kernel refuses the filter.
    #[error("cannot install a filter: {0}")]
    Install(#[from] seccompiler::Error),
}

/// Most arenas of the allocator: only the first. To give back memory of another arena, glibc opens
/// /proc/sys/vm/overcommit_memory, and before it makes the ninth it opens a file in /sys to count the CPUs.
/// One arena also takes less memory, and each thread has its own cache in front of it.
const ARENAS: libc::c_int = 1;

/// Makes the allocator open no files.
pub(super) fn bound_allocator() {
    // SAFETY: sets an option of the allocator and takes no pointer. The process has one thread.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS) };
}

/// The filters of threads that this process has compiled, each with its lists. There are few: the threads of devices
/// of one kind have the same lists.
static COMPILED: Mutex<Vec<Compiled>> = Mutex::new(Vec::new());

type Compiled = (Vec<&'static [Call]>, Arc<BpfProgram>);

/// Restricts the process, which has one thread.
pub(super) fn restrict_process(lists: &[&[Call]]) -> Result<(), FilterError> {
    apply_filter(&compile(lists)?)?;
    // A filter of its own, because a filter has only one answer for calls that are not on its list.
    let clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let missing = SeccompAction::Errno(libc::ENOSYS as u32);
    let filter = SeccompFilter::new(clone3, SeccompAction::Allow, missing, TargetArch::x86_64)?;
    Ok(apply_filter(&BpfProgram::try_from(filter)?)?)
}

/// Restricts the calling thread.
pub(super) fn restrict_thread(lists: &[&'static [Call]]) -> Result<(), FilterError> {
    Ok(apply_filter(&compiled(lists)?)?)
}

/// Returns the filter of a thread. The first thread with these lists compiles it, and the others wait for that.
fn compiled(lists: &[&'static [Call]]) -> Result<Arc<BpfProgram>, FilterError> {
    let mut compiled = lock(&COMPILED);
    if let Some((_, program)) = compiled.iter().find(|(of, _)| of == lists) {
        return Ok(program.clone());
    }
    let program = Arc::new(compile(lists)?);
    compiled.push((lists.to_vec(), program.clone()));
    Ok(program)
}

fn compile(lists: &[&[Call]]) -> Result<BpfProgram, FilterError> {
    let mut rules: BTreeMap<i64, Option<Vec<SeccompRule>>> = BTreeMap::new();
    let calls = lists.iter().chain([&EVERY_THREAD]).flat_map(|list| list.iter());
    for Call { number, args } in calls {
        let entry = rules.entry(*number).or_insert_with(|| Some(Vec::new()));
        match (entry, condition(*args)?) {
            // `None`: any arguments.
            (entry, conditions) if conditions.is_empty() => *entry = None,
            (Some(entry), conditions) => {
                for condition in conditions {
                    entry.push(SeccompRule::new(vec![condition])?);
                }
            }
            (None, _) => {}
        }
    }
    let rules = rules.into_iter().map(|(number, rules)| (number, rules.unwrap_or_default()));
    let filter = SeccompFilter::new(
        rules.collect(),
        SeccompAction::Trap,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?;
    Ok(BpfProgram::try_from(filter)?)
}

/// Returns the conditions of which one must hold; none if any arguments are allowed.
fn condition(args: Args) -> Result<Vec<SeccompCondition>, seccompiler::BackendError> {
    let condition = |index, op, value: u32| {
        SeccompCondition::new(index, SeccompCmpArgLen::Dword, op, value.into())
    };
    match args {
        Args::Any => Ok(Vec::new()),
        Args::OneOf(index, values) => {
            values.iter().map(|value| condition(index, SeccompCmpOp::Eq, *value)).collect()
        }
        Args::Masked(index, mask, value) => {
            Ok(vec![condition(index, SeccompCmpOp::MaskedEq(mask.into()), value)?])
        }
        Args::OwnProcess(index) => {
            Ok(vec![condition(index, SeccompCmpOp::Eq, std::process::id())?])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::confine::calls::EVENT_LOOP;

    static OPEN: [Call; 1] = [Call::any(libc::SYS_openat)];
    /// The same at another place.
    static AGAIN: [Call; 1] = [Call::any(libc::SYS_openat)];

    #[test]
    fn a_filter_is_compiled_once_for_all_threads_with_its_lists() {
        let first = compiled(&[EVENT_LOOP, &OPEN]).unwrap();
        let again = compiled(&[EVENT_LOOP, &AGAIN]).unwrap();
        assert!(Arc::ptr_eq(&first, &again));
        let other = compiled(&[EVENT_LOOP]).unwrap();
        assert_ne!(*first, *other);
    }
}
