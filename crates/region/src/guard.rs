//! A mapping that the program itself touches, of what may be gone at any time.
//!
//! The kernel tells of a touch of nothing by SIGBUS. The handler puts memory of zeros there and lets the program go on: it
//! finds no header, no reply and nobody who looks, and asks the kernel whether the region is there before it believes that.
//! A driver guards a region's beginning, before its slots: those the kernel alone touches.

#![allow(unsafe_code)] // A signal handler and mmap; see the SAFETY comments.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};

/// How many mappings are guarded at a time. A driver has one, and another while it changes them; a host one for each guest.
const MOST: usize = 4096;
/// So much is put in place of what is gone, around what was touched.
const BLOCK: usize = 64 * 1024;

/// Where each begins, on a page, and in the bits below the exponent of its length: one word, so that nobody sees half of it.
static RANGES: [AtomicUsize; MOST] = [const { AtomicUsize::new(0) }; MOST];
const EXPONENT: usize = 0xfff;
static WHOLE: [AtomicBool; MOST] = [const { AtomicBool::new(true) }; MOST];
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Guards a mapping until it is dropped.
#[derive(Debug)]
pub struct Guard(usize);

impl Guard {
    /// Guards `len` bytes from the address `start` on. `None` when too many are guarded.
    ///
    /// # Panics
    /// When `start` is not on a page, or `len` no power of two of at least a block of 64 KiB.
    pub fn new(start: usize, len: usize) -> Option<Self> {
        assert!(start & EXPONENT == 0 && len.is_power_of_two() && len >= BLOCK, "a mapping");
        BEFORE.get_or_init(install);
        let range = start | len.trailing_zeros() as usize;
        let take = |place: &&AtomicUsize| {
            place.compare_exchange(0, TAKEN, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        let place = RANGES.iter().position(|place| take(&place))?;
        WHOLE[place].store(true, Ordering::Relaxed);
        RANGES[place].store(range, Ordering::Release);
        Some(Self(place))
    }

    /// Whether nothing of it was gone when it was touched.
    pub fn is_whole(&self) -> bool {
        // What was read before this comes before it.
        fence(Ordering::SeqCst);
        WHOLE[self.0].load(Ordering::Acquire)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        RANGES[self.0].store(0, Ordering::Release);
    }
}

/// A place that is being filled in.
const TAKEN: usize = EXPONENT;

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
        // Sent by somebody (sigaction(2)): there is no address.
        if (*info).si_code <= 0 {
            return;
        }
        for (range, whole) in RANGES.iter().zip(&WHOLE) {
            let range = range.load(Ordering::Acquire);
            if range == 0 || range == TAKEN {
                continue;
            }
            let (start, len) = (range & !EXPONENT, 1_usize << (range & EXPONENT));
            if (start..start + len).contains(&at) {
                // Before anybody can read zeros.
                whole.store(false, Ordering::SeqCst);
                let block = start + (at - start) / BLOCK * BLOCK;
                let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                let access = libc::PROT_READ | libc::PROT_WRITE;
                // Of huge pages nothing less than all.
                for (at, len) in [(block, BLOCK), (start, len)] {
                    let mapped = libc::mmap(at as *mut libc::c_void, len, access, flags, -1, 0);
                    if mapped != libc::MAP_FAILED {
                        *libc::__errno_location() = errno;
                        return;
                    }
                }
            }
        }
        // Not ours: the same again, as if we were not here.
        if let Some(before) = BEFORE.get() {
            libc::sigaction(libc::SIGBUS, before, std::ptr::null_mut());
        }
    }
}
