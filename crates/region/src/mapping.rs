//! A region's file or device mapped into this program.
//!
//! What of it the program itself touches is under a [guard](crate::guard): what is behind a mapping may be gone at any time.
//! The other side changes it too, so it is touched as atomic words, and what has more than one is copied once before anybody
//! looks at it.

#![allow(unsafe_code)] // Mapping memory that others write too; see the SAFETY comments.

use crate::guard::Guard;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
    /// Of what the program touches.
    guard: Option<Guard>,
    guarded: usize,
}

// SAFETY: the mapping is plain memory that lives until drop; all access goes through raw pointers
// within slots that one owner holds at a time, and through atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // Before the addresses can be another mapping's.
        self.guard = None;
        // SAFETY: `start` and `len` are those of the mmap that made this mapping, unmapped nowhere else.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

impl Mapping {
    /// Maps a region of `len` bytes, of whose first ones so many are guarded: the program touches no others.
    ///
    /// # Errors
    /// What mmap(2) says; EBUSY where too many are mapped already.
    pub fn new(file: &File, len: u64, guarded: u64) -> io::Result<Self> {
        assert!(guarded <= len, "within the mapping");
        let [len, guarded] = [len, guarded].map(|len| usize::try_from(len).expect("it fits"));
        // SAFETY: a new shared mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast::<u8>()).expect("mmap never returns null on success");
        let mut mapping = Self { start, len, guard: None, guarded };
        mapping.guard = Guard::new(start.as_ptr().addr(), guarded);
        if mapping.guard.is_none() { Err(io::ErrorKind::ResourceBusy.into()) } else { Ok(mapping) }
    }

    /// Where byte `at` is mapped. For the kernel alone to touch.
    ///
    /// # Panics
    /// When it is not.
    pub fn address(&self, at: usize) -> *mut u8 {
        assert!(at < self.len, "within the mapping");
        // SAFETY: within the mapping.
        unsafe { self.start.as_ptr().add(at) }
    }

    /// Whether all that was read from words so far was there. What was not is zero.
    pub fn is_whole(&self) -> bool {
        self.guard.as_ref().is_some_and(Guard::is_whole)
    }

    /// The word at byte `at`.
    ///
    /// # Panics
    /// When there is none that is guarded.
    pub fn word(&self, at: u64) -> &AtomicU64 {
        let at = usize::try_from(at).expect("it is mapped");
        assert!(at < self.guarded && at.is_multiple_of(8), "a word that is guarded");
        let address = self.address(at);
        // SAFETY: mapped and guarded as long as `self` lives, at a multiple of eight bytes. Others change it too, so it is
        // only touched as an atomic.
        unsafe { AtomicU64::from_ptr(address.cast()) }
    }

    /// Copies words from byte `at` on.
    pub fn load<const LEN: usize>(&self, at: u64) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        for (at, word) in (at..).step_by(8).zip(bytes.chunks_exact_mut(8)) {
            word.copy_from_slice(&self.word(at).load(Ordering::Relaxed).to_le_bytes());
        }
        bytes
    }

    /// Copies bytes from `at` on, which is a multiple of eight.
    ///
    /// # Panics
    /// When they are not guarded.
    pub fn copy(&self, at: u64, copy: &mut [u8]) {
        let at = usize::try_from(at).expect("it is mapped");
        let words = copy.len().div_ceil(8);
        assert!(at.is_multiple_of(8) && at + words * 8 <= self.guarded, "guarded words");
        // SAFETY: as in `word`, for all of these.
        let words: &[AtomicU64] =
            unsafe { std::slice::from_raw_parts(self.address(at).cast(), words) };
        let (whole, rest) = copy.as_chunks_mut::<8>();
        for (word, copy) in words.iter().zip(&mut *whole) {
            *copy = word.load(Ordering::Relaxed).to_ne_bytes();
        }
        if let Some(last) = words.get(whole.len()) {
            rest.copy_from_slice(&last.load(Ordering::Relaxed).to_ne_bytes()[..rest.len()]);
        }
    }

    /// Writes words from byte `at` on.
    pub fn store<const LEN: usize>(&self, at: u64, bytes: &[u8; LEN]) {
        for (at, word) in (at..).step_by(8).zip(bytes.chunks_exact(8)) {
            let word = u64::from_le_bytes(word.try_into().expect("eight bytes"));
            self.word(at).store(word, Ordering::Relaxed);
        }
    }
}
