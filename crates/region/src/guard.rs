//! A mapping that the program itself touches, of what may be gone at any time.
//!
//! The kernel tells of a touch of nothing by SIGBUS. The handler puts memory of zeros there and lets the program go on: it
//! finds no header, no reply and nobody who looks, and asks the kernel whether the region is there before it believes that.
//! Only a region's beginning is guarded, before its slots: those the kernel alone touches.

#![allow(unsafe_code)] // A signal handler and mmap; see the SAFETY comments.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How many mappings are guarded at a time. A driver has one, and another while it changes them.
const MOST: usize = 64;

static STARTS: [AtomicUsize; MOST] = [const { AtomicUsize::new(0) }; MOST];
static LENS: [AtomicUsize; MOST] = [const { AtomicUsize::new(0) }; MOST];
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Guards a mapping until it is dropped.
#[derive(Debug)]
pub struct Guard(usize);

impl Guard {
    /// Guards `len` bytes from the address `start` on, whole pages. `None` when too many are guarded.
    pub fn new(start: usize, len: usize) -> Option<Self> {
        BEFORE.get_or_init(install);
        let free = |place: &&AtomicUsize| {
            place.compare_exchange(0, start, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        let place = STARTS.iter().position(|place| free(&place))?;
        LENS[place].store(len, Ordering::Release);
        Some(Self(place))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        LENS[self.0].store(0, Ordering::Release);
        STARTS[self.0].store(0, Ordering::Release);
    }
}

/// Gives what was installed before.
fn install() -> libc::sigaction {
    // SAFETY: all zeros is a sigaction; both are valid for the calls, and the handler does nothing that is not
    // async-signal-safe (signal-safety(7)): atomic loads and system calls.
    unsafe {
        let mut before: libc::sigaction = std::mem::zeroed();
        let mut new: libc::sigaction = std::mem::zeroed();
        new.sa_sigaction = on_sigbus as *const () as libc::sighandler_t;
        new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&raw mut new.sa_mask);
        libc::sigaction(libc::SIGBUS, &raw const new, &raw mut before);
        before
    }
}

extern "C" fn on_sigbus(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: the kernel gives a siginfo_t with the address (SA_SIGINFO). Pages are replaced only within a mapping that is
    // guarded, so that lives as long as whoever touched it; it holds nothing that Rust knows of. errno is kept.
    unsafe {
        let errno = *libc::__errno_location();
        let at = (*info).si_addr() as usize;
        for (start, len) in STARTS.iter().zip(&LENS) {
            let (start, len) = (start.load(Ordering::Acquire), len.load(Ordering::Acquire));
            if start != 0 && (start..start.saturating_add(len)).contains(&at) {
                let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                let access = libc::PROT_READ | libc::PROT_WRITE;
                let mapped = libc::mmap(start as *mut libc::c_void, len, access, flags, -1, 0);
                if mapped != libc::MAP_FAILED {
                    *libc::__errno_location() = errno;
                    return;
                }
            }
        }
        // Not ours: the same again, as if we were not here.
        if let Some(before) = BEFORE.get() {
            libc::sigaction(libc::SIGBUS, before, std::ptr::null_mut());
        }
    }
}
