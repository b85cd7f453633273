//! The driver's side: the BAR mapped write-combining, and the pool of its slots.
//!
//! Owns the mapping and knows which slots are free. A [`Slot`] is taken by one request at a time;
//! dropping it gives it back. Content goes in by pread, whose target is the mapping itself: the
//! driver holds no copy, and reads nothing back from the slots (an uncached read costs about a
//! microsecond per eight bytes).
//!
//! The device may be unplugged at any time. A mapping of what is gone kills the program that touches
//! it (SIGBUS), or reads as ones and swallows what is written. So only the kernel touches slots and header, on
//! the program's behalf: a system call that meets nothing fails with EFAULT. And whether writes arrived is
//! asked of the header's magic ([`GuestRegion::is_there`]) before the host is told of them. The words of the
//! [ring](crate::ring) the program touches itself, under a [guard](crate::guard).

#![allow(unsafe_code)] // Mapping device memory and reading into it; see the SAFETY comments.

use crate::layout::{
    ENCODED_HEADER_LEN, Geometry, HEADER_LEN, Header, LayoutError, MAGIC, SLOT_LEN,
};
use crate::mapping::Mapping;
use seawall_proto::SlotRef;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// ivshmem's PCI vendor and device (QEMU docs/specs/ivshmem-spec).
const IVSHMEM: (&str, &str) = ("0x1af4", "0x1110");

/// Why the driver cannot use a region.
#[derive(Debug, thiserror::Error)]
pub enum GuestRegionError {
    /// No ivshmem device is plugged in.
    #[error("this machine has no ivshmem device (PCI 1af4:1110)")]
    NoDevice,
    /// The device or file cannot be opened or mapped; EPERM under kernel lockdown.
    #[error("{path}: cannot be {action}: {reason}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system says.
        reason: io::Error,
    },
    /// The length is none that a region has.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// What was mapped is there no longer.
    #[error("the region is gone: its device was unplugged or its file cut short")]
    Gone,
}

/// Why a slot was not filled.
#[derive(Debug, thiserror::Error)]
pub enum FillError {
    /// The region is gone; the file may be all right.
    #[error("the region is gone")]
    Gone,
    /// The file cannot be read.
    #[error(transparent)]
    File(#[from] io::Error),
}

/// Reads what is mapped without touching it: the kernel copies it into a pipe.
#[derive(Debug)]
struct Probe {
    reader: File,
    writer: File,
}

#[derive(Debug)]
struct Free {
    slots: Vec<u16>,
    /// Threads that wait for one. Who wakes nobody need not ask the kernel.
    waiting: u32,
}

#[derive(Debug)]
struct Pool {
    free: Mutex<Free>,
    returned: Condvar,
}

/// The region as the driver sees it.
#[derive(Debug, Clone)]
pub struct GuestRegion {
    mapping: Arc<Mapping>,
    probe: Arc<Mutex<Probe>>,
    pool: Arc<Pool>,
    geometry: Geometry,
}

impl GuestRegion {
    /// Finds the ivshmem device in sysfs and maps its memory write-combining.
    ///
    /// # Errors
    /// [`GuestRegionError::NoDevice`] without one; an I/O error where the kernel forbids it.
    pub fn open_pci() -> Result<Self, GuestRegionError> {
        let device = find_ivshmem(Path::new("/sys/bus/pci/devices"))?;
        let enable = device.join("enable");
        std::fs::write(&enable, "1").map_err(|reason| GuestRegionError::Io {
            path: enable,
            action: "written",
            reason,
        })?;
        Self::open_file(&device.join("resource2_wc"))
    }

    /// Maps a file: the device's resource, or an ordinary file where driver and host run on one
    /// machine.
    ///
    /// # Errors
    /// As [`Self::open_pci`].
    pub fn open_file(path: &Path) -> Result<Self, GuestRegionError> {
        let error = |action| {
            let path = path.to_owned();
            move |reason| GuestRegionError::Io { path, action, reason }
        };
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(error("opened"))?;
        let len = file.metadata().map_err(error("examined"))?.len();
        let geometry = Geometry::of(len)?;
        let (reader, writer) = io::pipe().map_err(error("probed"))?;
        let probe = Probe {
            reader: File::from(std::os::fd::OwnedFd::from(reader)),
            writer: File::from(std::os::fd::OwnedFd::from(writer)),
        };
        let mapping = Mapping::new(&file, len, HEADER_LEN).map_err(error("mapped"))?;
        let free = Free { slots: (0..geometry.slots()).rev().collect(), waiting: 0 };
        Ok(Self {
            mapping: Arc::new(mapping),
            probe: Arc::new(Mutex::new(probe)),
            pool: Arc::new(Pool { free: Mutex::new(free), returned: Condvar::new() }),
            geometry,
        })
    }

    /// Reads the header that the host wrote. Done once for each connection.
    ///
    /// # Errors
    /// [`GuestRegionError::Gone`] when the region is; [`GuestRegionError::Layout`] when there is no
    /// header, or one of another layout.
    pub fn header(&self) -> Result<Header, GuestRegionError> {
        let mut bytes = [0; ENCODED_HEADER_LEN];
        self.peek(&mut bytes).map_err(|_| GuestRegionError::Gone)?;
        Ok(Header::parse(&bytes)?)
    }

    /// Whether the host's header can still be seen: then what was [published](Self::publish) before
    /// has arrived, and the host can read it. Takes one uncached read of eight bytes.
    #[must_use]
    pub fn is_there(&self) -> bool {
        let mut magic = [0; MAGIC.len()];
        self.peek(&mut magic).is_ok() && magic == MAGIC
    }

    /// Copies the region's first bytes, at most a header.
    fn peek(&self, bytes: &mut [u8]) -> io::Result<()> {
        let len = bytes.len().min(ENCODED_HEADER_LEN);
        let probe = self.probe.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // SAFETY: the mapping is longer than a header and lives as long as `self`; only the kernel
        // reads it, and fails with EFAULT where nothing is behind it any more. A pipe takes PIPE_BUF
        // (4,096) bytes at once or not at all (pipe(7)), and it is empty between two calls.
        let copied =
            unsafe { libc::write(probe.writer.as_raw_fd(), self.mapping.address(0).cast(), len) };
        if copied < 0 {
            return Err(io::Error::last_os_error());
        }
        let copied = usize::try_from(copied).unwrap_or(0).min(len);
        (&probe.reader).read_exact(&mut bytes[..copied])?;
        if copied < bytes.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    /// What is mapped.
    pub(crate) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// How many slots there are.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// A free slot, if there is one now.
    #[must_use]
    pub fn take_slot(&self) -> Option<Slot> {
        let index = lock(&self.pool.free).slots.pop()?;
        Some(self.slot(index))
    }

    /// A free slot, waiting for one until `until`.
    #[must_use]
    pub fn wait_slot(&self, until: Instant) -> Option<Slot> {
        let mut free = lock(&self.pool.free);
        loop {
            if let Some(index) = free.slots.pop() {
                return Some(self.slot(index));
            }
            let left = until.checked_duration_since(Instant::now()).filter(|t| !t.is_zero())?;
            // Looks again now and then, so that a wake that goes missing costs time and not a guest.
            let wait = left.min(Duration::from_millis(100));
            free.waiting += 1;
            let waited = self.pool.returned.wait_timeout(free, wait);
            free = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
            free.waiting -= 1;
        }
    }

    fn slot(&self, index: u16) -> Slot {
        Slot { region: self.clone(), index }
    }

    /// Makes everything written so far visible to the host before whatever is sent next.
    /// Write-combining stores are weakly ordered: a release store is not enough (Intel SDM vol. 3,
    /// 12.3.1 "Buffering of Write Combining Memory Locations").
    pub fn publish(&self) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: SFENCE has no operands and exists on every x86-64 CPU.
        unsafe {
            std::arch::x86_64::_mm_sfence();
        }
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }
}

fn lock(free: &Mutex<Free>) -> std::sync::MutexGuard<'_, Free> {
    free.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// One slot, held by one request. Dropping it gives it back.
#[derive(Debug)]
pub struct Slot {
    region: GuestRegion,
    index: u16,
}

impl Slot {
    /// The slot's number.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Reads from `file` at `offset` until the slot is full or the file ends. Returns the bytes
    /// read.
    ///
    /// # Errors
    /// [`FillError::Gone`] when the region is; else what pread(2) says of the file.
    pub fn fill(&mut self, file: &File, offset: u64) -> Result<u32, FillError> {
        let slot = SlotRef { index: self.index, len: SLOT_LEN };
        let start = self.region.geometry.offset(slot).expect("pool slots are in range");
        let start = usize::try_from(start).expect("a region fits the address space");
        debug_assert!(start as u64 >= HEADER_LEN);
        let mut done = 0_u32;
        while done < SLOT_LEN {
            let at = i64::try_from(offset + u64::from(done))
                .map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
            // SAFETY: start + SLOT_LEN is within the mapping (Geometry::offset), which lives as long
            // as `self.region`; this slot is held by `self` alone, and no reference to it exists.
            let read = unsafe {
                let target = self.region.mapping.address(start + done as usize);
                libc::pread(file.as_raw_fd(), target.cast(), (SLOT_LEN - done) as usize, at)
            };
            match read {
                0 => break,
                n if n > 0 => done += u32::try_from(n).expect("at most SLOT_LEN was asked for"),
                _ => {
                    let error = io::Error::last_os_error();
                    match error.raw_os_error() {
                        // The target of the read is the region and nothing else.
                        Some(libc::EFAULT) => return Err(FillError::Gone),
                        Some(libc::EINTR) => (),
                        _ => return Err(error.into()),
                    }
                }
            }
        }
        Ok(done)
    }

    /// Reads `len` bytes to `at` in the slot where the kernel has them in memory (RWF_NOWAIT, preadv2(2)). `false` where
    /// they are not all there, or there is no telling: nothing was waited for.
    ///
    /// # Errors
    /// As [`Self::fill`].
    ///
    /// # Panics
    /// When they are not within the slot.
    pub fn fill_now(
        &mut self,
        at: u32,
        file: &File,
        offset: u64,
        len: u32,
    ) -> Result<bool, FillError> {
        assert!(at <= SLOT_LEN && len <= SLOT_LEN - at, "no more than a slot holds");
        let slot = SlotRef { index: self.index, len: SLOT_LEN };
        let start = self.region.geometry.offset(slot).expect("pool slots are in range");
        let start =
            usize::try_from(start + u64::from(at)).expect("a region fits the address space");
        let offset =
            i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
        // SAFETY: as in `fill`; `len` bytes from `start` on are this slot's.
        let read = unsafe {
            let target = self.region.mapping.address(start);
            let piece = libc::iovec { iov_base: target.cast(), iov_len: len as usize };
            libc::preadv2(file.as_raw_fd(), &raw const piece, 1, offset, libc::RWF_NOWAIT)
        };
        if read >= 0 {
            return Ok(u32::try_from(read) == Ok(len));
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EFAULT) => Err(FillError::Gone),
            Some(libc::EAGAIN | libc::EOPNOTSUPP | libc::EINTR) => Ok(false),
            _ => Err(error.into()),
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut free = lock(&self.region.pool.free);
        free.slots.push(self.index);
        let is_waited_for = free.waiting > 0;
        drop(free);
        if is_waited_for {
            self.region.pool.returned.notify_one();
        }
    }
}

fn find_ivshmem(devices: &Path) -> Result<PathBuf, GuestRegionError> {
    let entries = std::fs::read_dir(devices).map_err(|_| GuestRegionError::NoDevice)?;
    let is_ivshmem = |device: &PathBuf| {
        let value = |name| std::fs::read_to_string(device.join(name)).unwrap_or_default();
        value("vendor").trim() == IVSHMEM.0 && value("device").trim() == IVSHMEM.1
    };
    let mut found: Vec<_> =
        entries.filter_map(|entry| Some(entry.ok()?.path())).filter(is_ivshmem).collect();
    found.sort();
    found.into_iter().next().ok_or(GuestRegionError::NoDevice)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::LEN_MIN;
    use std::io::Write;

    fn region() -> (tempfile::NamedTempFile, GuestRegion) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(LEN_MIN).unwrap();
        let region = GuestRegion::open_file(file.path()).unwrap();
        (file, region)
    }

    #[test]
    fn a_slot_takes_no_more_than_it_holds() {
        let (_file, region) = region();
        let mut content = tempfile::tempfile().unwrap();
        content.write_all(&vec![7; SLOT_LEN as usize + 10]).unwrap();
        let mut slot = region.take_slot().unwrap();
        assert_eq!(slot.fill(&content, 0).unwrap(), SLOT_LEN);
        assert_eq!(slot.fill(&content, u64::from(SLOT_LEN)).unwrap(), 10);
        assert_eq!(slot.fill(&content, 1 << 40).unwrap(), 0);
    }

    #[test]
    fn slots_are_held_by_one_and_come_back() {
        let (_file, region) = region();
        let held: Vec<_> = std::iter::from_fn(|| region.take_slot()).collect();
        assert_eq!(held.len(), 3);
        assert!(region.wait_slot(Instant::now() + Duration::from_millis(1)).is_none());
        let waiter = std::thread::spawn({
            let region = region.clone();
            move || region.wait_slot(Instant::now() + Duration::from_secs(10)).map(|s| s.index())
        });
        drop(held);
        assert!(waiter.join().unwrap().is_some_and(|index| index < 3));
    }

    #[test]
    fn a_region_without_a_header_says_so() {
        let (_file, region) = region();
        let error = region.header().unwrap_err();
        assert!(matches!(error, GuestRegionError::Layout(LayoutError::NoHeader)), "{error}");
        assert!(!region.is_there());
    }

    #[test]
    fn a_region_that_vanishes_is_an_error_and_not_a_signal() {
        let (file, region) = region();
        let header =
            Header { region: seawall_proto::RegionId([1; 16]), key: seawall_proto::Key([2; 32]) };
        file.as_file().write_all(&header.to_bytes()).unwrap();
        assert_eq!(region.header().unwrap(), header);
        assert!(region.is_there());
        let mut content = tempfile::tempfile().unwrap();
        content.write_all(b"words").unwrap();
        let mut slot = region.take_slot().unwrap();
        file.as_file().set_len(0).unwrap();
        assert!(matches!(slot.fill(&content, 0), Err(FillError::Gone)));
        assert!(matches!(region.header(), Err(GuestRegionError::Gone)));
        assert!(!region.is_there());
        // Back, but without its header: not the host's any more.
        file.as_file().set_len(LEN_MIN).unwrap();
        assert_eq!(slot.fill(&content, 0).unwrap(), 5);
        assert!(!region.is_there());
    }
}
