//! What `scan` gets to look at.

use std::cell::OnceCell;
use std::ffi::{CString, c_char, c_int, c_void};
use std::{ptr, slice};

use seawall_engine::{Operation, runtime};

use crate::with;

/// An open() is held until the verdict.
pub const SEAWALL_OPERATION_OPEN: c_int = 0;
/// An execve() is held until the verdict.
pub const SEAWALL_OPERATION_EXEC: c_int = 1;
/// Nobody is held: the file was closed after a write, or was let through unscanned before.
pub const SEAWALL_OPERATION_RESCAN: c_int = 2;
/// A person or a schedule asked.
pub const SEAWALL_OPERATION_ON_DEMAND: c_int = 3;

/// One content to look at, and what is known of its file. That was said by a guest: it may lie.
pub struct Request<'a> {
    inner: &'a runtime::Request<'a>,
    /// The guest's name as a C string, made at the first question.
    guest: OnceCell<CString>,
}

impl<'a> Request<'a> {
    pub(crate) fn new(inner: &'a runtime::Request<'a>) -> Self {
        Self { inner, guest: OnceCell::new() }
    }
}

/// Bytes of content.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn seawall_request_length(request: *const Request<'_>) -> u64 {
    // SAFETY: as the header says.
    unsafe { with(request, 0, |request| request.inner.content.len()) }
}

/// The whole content in place, and its length in *length; length may be NULL. The bytes cannot change,
/// and must not be written. NULL when they cannot be had: then the scan ends with SEAWALL_ERROR, or goes
/// on with seawall_request_read where only the memory for a copy is missing. Never NULL for empty
/// content.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn seawall_request_bytes(
    request: *const Request<'_>,
    length: *mut usize,
) -> *const u8 {
    // SAFETY: as the header says.
    let bytes = unsafe {
        with(request, None, |request| {
            let bytes = request.inner.content.bytes().ok()?;
            Some((bytes.as_ptr(), bytes.len()))
        })
    };
    let (start, count) = bytes.unwrap_or((ptr::null(), 0));
    if !length.is_null() {
        // SAFETY: as the header says: NULL, or a size_t to write to.
        unsafe { length.write(count) };
    }
    start
}

/// Copies length bytes of the content from offset into buffer, fewer only at the end of the content.
/// Returns how many, or -1 when they cannot be read; a scan that has met -1 here is never clean. buffer
/// has room for length bytes; it may be NULL when length is 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn seawall_request_read(
    request: *const Request<'_>,
    offset: u64,
    buffer: *mut c_void,
    length: usize,
) -> i64 {
    if buffer.is_null() && length > 0 {
        return -1;
    }
    // SAFETY: as the header says. The part that is used is filled before it is seen as a slice: C may
    // give memory that nobody has written to yet.
    unsafe {
        with(request, -1, |request| {
            let left = request.inner.content.len().saturating_sub(offset);
            let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(length);
            if wanted == 0 {
                return 0;
            }
            ptr::write_bytes(buffer.cast::<u8>(), 0, wanted);
            let buffer = slice::from_raw_parts_mut(buffer.cast::<u8>(), wanted);
            let got = request.inner.content.read_at(offset, buffer).ok();
            got.and_then(|got| i64::try_from(got).ok()).unwrap_or(-1)
        })
    }
}

/// The path as the guest named it, and its length in *length; length may be NULL. Any bytes, without a
/// NUL at the end; at most 4096, of a longer one the end. Length 0 when the access has no true path, and
/// always unless the engine has said seawall_description_by_name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn seawall_request_path(
    request: *const Request<'_>,
    length: *mut usize,
) -> *const u8 {
    // SAFETY: as the header says.
    let (start, count) = unsafe {
        with(request, (ptr::null(), 0), |request| {
            let path = &request.inner.metadata.path;
            (path.as_ptr(), path.len())
        })
    };
    if !length.is_null() {
        // SAFETY: as the header says: NULL, or a size_t to write to.
        unsafe { length.write(count) };
    }
    start
}

/// Name of the guest in the service's configuration, a string; empty unless the engine has said
/// seawall_description_by_name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn seawall_request_guest(request: *const Request<'_>) -> *const c_char {
    // SAFETY: as the header says.
    unsafe {
        with(request, ptr::null(), |request| {
            let make = || {
                let name = request.inner.metadata.guest.bytes().filter(|byte| *byte != 0);
                CString::new(name.collect::<Vec<u8>>()).unwrap_or_default()
            };
            request.guest.get_or_init(make).as_ptr()
        })
    }
}

/// Why the content is looked at: one of SEAWALL_OPERATION_OPEN to SEAWALL_OPERATION_ON_DEMAND. Later
/// versions may have more. -1 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn seawall_request_operation(request: *const Request<'_>) -> c_int {
    // SAFETY: as the header says.
    unsafe {
        with(request, -1, |request| match request.inner.metadata.operation {
            Operation::Open => SEAWALL_OPERATION_OPEN,
            Operation::Exec => SEAWALL_OPERATION_EXEC,
            Operation::Rescan => SEAWALL_OPERATION_RESCAN,
            Operation::OnDemand => SEAWALL_OPERATION_ON_DEMAND,
        })
    }
}

/// Size of the file in the guest, in bytes; the content may be shorter.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn seawall_request_file_size(request: *const Request<'_>) -> u64 {
    // SAFETY: as the header says.
    unsafe { with(request, 0, |request| request.inner.metadata.size) }
}

/// How long this scan may take from its start, in milliseconds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn seawall_request_limit_ms(request: *const Request<'_>) -> u64 {
    // SAFETY: as the header says.
    unsafe { with(request, 0, |request| millis(request.inner.limit)) }
}

/// How long it may still take, in milliseconds. At 0 the process is killed, and all scans in it must be
/// done again: return SEAWALL_TIMED_OUT before that.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn seawall_request_left_ms(request: *const Request<'_>) -> u64 {
    // SAFETY: as the header says.
    unsafe { with(request, 0, |request| millis(request.inner.left())) }
}

/// Whether nobody wants the report any more. Costs one read of memory: ask as often as you like, and
/// return SEAWALL_CANCELLED when it is true.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn seawall_request_is_cancelled(request: *const Request<'_>) -> bool {
    // SAFETY: as the header says.
    unsafe { with(request, false, |request| request.inner.is_cancelled()) }
}

fn millis(time: std::time::Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
