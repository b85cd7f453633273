//! A file in memory without a copy, for reading, whatever becomes of the file.
//!
//! A mapping spares a lookup the system call, which costs more than the rest of it. What it brings with it:
//! when somebody cuts the file short, or the disk fails, the access is not an error but a signal (SIGBUS, mmap(2)),
//! which would end the engine and blame the content in work. So there is a handler for it: it puts a page of
//! zeros where the missing one was and notes that the mapping is broken; the read that met it, and
//! every later one, is an error.
//!
//! All `unsafe` code of the crate is here.

#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::ptr;
use std::sync::atomic::{self, AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, Once, PoisonError};

use memmap2::{Mmap, MmapOptions};

/// Most mappings at a time.
const MOST: usize = 64;
/// [`page_size`] for the signal handler; 4096 until a file was mapped.
static PAGE: AtomicUsize = AtomicUsize::new(4096);

/// The mappings that the signal handler knows.
static PLACES: [Place; MOST] = [const { Place::free() }; MOST];
/// Held while a place is taken.
static TAKING: Mutex<()> = Mutex::new(());

/// Where a mapping lies.
struct Place {
    start: AtomicUsize,
    /// Bytes; 0 while the place is free.
    length: AtomicUsize,
    broken: AtomicBool,
}

impl Place {
    const fn free() -> Self {
        Self {
            start: AtomicUsize::new(0),
            length: AtomicUsize::new(0),
            broken: AtomicBool::new(false),
        }
    }

    /// Whether an address lies in the mapping, up to the end of its last page.
    fn holds(&self, address: usize) -> bool {
        let length = self.length.load(Ordering::Acquire);
        let after = address.wrapping_sub(self.start.load(Ordering::Acquire));
        length > 0 && after < length.next_multiple_of(PAGE.load(Ordering::Relaxed))
    }
}

/// A mapped file.
pub struct Mapped {
    file: File,
    map: Mmap,
    place: &'static Place,
}

impl Mapped {
    /// Maps a whole file, which is not empty.
    pub fn new(file: File) -> io::Result<Self> {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(handle);
        let taking = TAKING.lock().unwrap_or_else(PoisonError::into_inner);
        let free = PLACES.iter().find(|place| place.length.load(Ordering::Acquire) == 0);
        let place = free.ok_or_else(|| io::Error::other("too many files are mapped"))?;
        // SAFETY: nobody gets a reference into the mapping (`read` copies), so that it may change; what is gone
        // is the handler's business.
        let map = unsafe { MmapOptions::new().map(&file) }?;
        place.broken.store(false, Ordering::Release);
        place.start.store(map.as_ptr() as usize, Ordering::Release);
        place.length.store(map.len(), Ordering::Release);
        drop(taking);
        Ok(Self { file, map, place })
    }

    /// Copies the bytes from `at` on. An error when they reach beyond the file as it was when it was mapped,
    /// or when the page, then or at any time before, was gone or could not be read. In the last page of a file that was cut
    /// short zeros follow its end; [`Mapped::check`] tells.
    pub fn read(&self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        let at = usize::try_from(at).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        if self.map.len().checked_sub(at).is_none_or(|left| left < buffer.len()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // SAFETY: the bytes lie in the mapping, as just seen, and `buffer` is memory of its own. That somebody may
        // write the file at the same time makes the copy no worse than pread(2)'s: any mixture of old and new.
        unsafe {
            ptr::copy_nonoverlapping(self.map.as_ptr().add(at), buffer.as_mut_ptr(), buffer.len());
        }
        // Whoever found the page missing has noted that before he put another there.
        atomic::fence(Ordering::SeqCst);
        if self.place.broken.load(Ordering::Acquire) {
            return Err(io::Error::other("it was cut short, or cannot be read from its disk"));
        }
        Ok(())
    }
}

impl Mapped {
    /// An error when the file is shorter than it was when it was mapped. A system call.
    pub fn check(&self) -> io::Result<()> {
        let last = (self.map.len() as u64).saturating_sub(1);
        match self.file.read_at(&mut [0], last)? {
            1 => Ok(()),
            _ => Err(io::Error::other("it was cut short")),
        }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        self.place.length.store(0, Ordering::Release);
    }
}

/// Asks for huge pages (madvise(2), MADV_HUGEPAGE) below what a vector has reserved: one look into it then costs
/// one missing line of the cache, and none of the page tables'. Where there are none, nothing changes.
pub fn in_huge_pages<T>(vector: &Vec<T>) {
    let (start, length) = (vector.as_ptr() as usize, vector.capacity() * size_of::<T>());
    // The pages that are the vector's alone.
    let page = page_size();
    let first = start.next_multiple_of(page);
    let end = (start + length) & !(page - 1);
    if first < end {
        // SAFETY: the range is reserved memory of the vector, and the advice leaves its contents as they are.
        unsafe { libc::madvise(first as *mut c_void, end - first, libc::MADV_HUGEPAGE) };
    }
}

/// Bytes of a page, a power of two.
fn page_size() -> usize {
    // SAFETY: no memory is involved.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(page).unwrap_or(4096)
}

/// Has SIGBUS handled by [`on_sigbus`], for the rest of the process's life.
fn handle() {
    PAGE.store(page_size(), Ordering::Relaxed);
    // SAFETY: an all-zero sigaction is a valid one, and the handler has the signature that SA_SIGINFO asks for and
    // does only what signal-safety(7) allows. On the alternate stack, as the standard library's.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigbus as extern "C" fn(_, _, _) as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGBUS, &action, ptr::null_mut());
    }
}

/// Puts a page of zeros where a mapped one is missing. Any other SIGBUS ends the process as ever.
extern "C" fn on_sigbus(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: with SA_SIGINFO the kernel hands over a valid siginfo_t, and SIGBUS fills in its address.
    let address = unsafe { (*info).si_addr() } as usize;
    if let Some(place) = PLACES.iter().find(|place| place.holds(address)) {
        place.broken.store(true, Ordering::Release);
        let page = PAGE.load(Ordering::Relaxed);
        let start = (address & !(page - 1)) as *mut c_void;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: the page belongs to a mapping of ours to which no references exist, and mmap(2) is a plain system
        // call on Linux, which leaves nothing half done.
        let zeros = unsafe { libc::mmap(start, page, libc::PROT_READ, flags, -1, 0) };
        if zeros != libc::MAP_FAILED {
            return;
        }
    }
    // SAFETY: resetting a signal is allowed in a handler; the access is repeated, and its signal then ends the process.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_file_is_read_where_asked_and_never_beyond_its_end() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"abcdef").unwrap();
        let mapped = Mapped::new(file).unwrap();
        let mut buffer = [0; 3];
        mapped.read(3, &mut buffer).unwrap();
        assert_eq!(&buffer, b"def");
        for at in [4, 6, 7, u64::MAX] {
            assert!(mapped.read(at, &mut buffer).is_err(), "{at}");
        }
    }

    /// Also for a page that another thread needed first, and for those that are still there.
    #[test]
    fn a_file_that_is_cut_short_is_an_error_from_then_on() {
        const PAGE: usize = 64 << 10;
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; 10 * PAGE]).unwrap();
        let (mapped, whole) = (
            Mapped::new(file.try_clone().unwrap()).unwrap(),
            Mapped::new(file.try_clone().unwrap()).unwrap(),
        );
        let mut byte = [0];
        mapped.read(9 * PAGE as u64, &mut byte).unwrap();
        file.set_len(PAGE as u64).unwrap();
        whole.read(0, &mut byte).unwrap();
        for at in [9 * PAGE, 9 * PAGE, 5 * PAGE, 0] {
            mapped.read(at as u64, &mut byte).unwrap_err();
        }
        assert!(mapped.check().is_err());
        drop(mapped);
        whole.read(1, &mut byte).unwrap();
        assert_eq!(byte, [7]);
    }
}
