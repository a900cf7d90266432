//! Access to fields of the page that KVM shares for a vCPU (`struct kvm_run`): `immediate_exit`, which
//! other threads write, `io.size`, which is read while kvm-ioctls' exit borrows the vCPU, and `internal`,
//! which kvm-ioctls leaves out.

#![expect(unsafe_code, reason = "fields of the page that KVM shares are accessed in place")]

use std::sync::atomic::{AtomicU8, Ordering};

use kvm_ioctls::VcpuFd;

/// Pointers to fields of a vCPU's `struct kvm_run`. They are valid while the vCPU's fd is open; the
/// owner of both ensures that.
pub(super) struct RunPage {
    immediate_exit: *mut u8,
    io_size: *mut u8,
    internal: *mut InternalError,
}

/// `kvm_run.internal` (linux/kvm.h): the kind of error, the number of valid data, and the data.
type InternalError = kvm_bindings::kvm_run__bindgen_ty_1__bindgen_ty_13;

// SAFETY: the page is shared memory that does not belong to a thread; accesses by several threads are atomic.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Returns the pointers into the page of `vcpu`.
    pub(super) fn new(vcpu: &mut VcpuFd) -> Self {
        let page = vcpu.get_kvm_run();
        let immediate_exit = &raw mut page.immediate_exit;
        // SAFETY: takes the address of a field in the mapped page. No value is read, so it does not
        // matter which member the union holds.
        let io_size = unsafe { &raw mut page.__bindgen_anon_1.io.size };
        let internal = &raw mut page.__bindgen_anon_1.internal;
        Self { immediate_exit, io_size, internal }
    }

    /// If `value`, the next `KVM_RUN` completes the pending exit and returns EINTR without running
    /// the guest; otherwise it runs the guest.
    pub(super) fn set_immediate_exit(&self, value: bool) {
        // SAFETY: a byte of the page, which is mapped as long as the vCPU is open.
        let byte = unsafe { AtomicU8::from_ptr(self.immediate_exit) };
        byte.store(value.into(), Ordering::SeqCst);
    }

    /// Returns the kind of the last internal error of KVM, and its data. Call only after such an exit.
    pub(super) fn internal_error(&self) -> (u32, Vec<u64>) {
        // SAFETY: part of the page, which is mapped as long as the vCPU is open; KVM writes it only during
        // KVM_RUN, which this thread calls.
        let InternalError { suberror, ndata, data } = unsafe { self.internal.read_volatile() };
        (suberror, data.into_iter().take(ndata as usize).collect())
    }

    /// Returns the size of each access of the last port I/O exit: 1, 2 or 4 bytes. Call only after
    /// such an exit.
    pub(super) fn io_size(&self) -> usize {
        // SAFETY: a byte of the page, which is mapped as long as the vCPU is open.
        let byte = unsafe { AtomicU8::from_ptr(self.io_size) };
        usize::from(byte.load(Ordering::Relaxed)).clamp(1, 4)
    }
}
