//! File handles (name_to_handle_at(2)) and the question whether somebody writes a file.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// The longest handle that is kept, in bytes. ext4 and tmpfs need 8 to 16, XFS and btrfs up to 40.
pub const HANDLE_MAX: usize = 64;

/// Names a file on a mounted file system without a path, and without holding it open. Plain data, so
/// that it can lie in memory that two processes share.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileHandle {
    /// The device of the file system (`st_dev`).
    pub device: u64,
    kind: i32,
    len: u32,
    bytes: [u8; HANDLE_MAX],
}

#[repr(C)]
struct RawHandle {
    handle_bytes: u32,
    handle_type: i32,
    bytes: [u8; HANDLE_MAX],
}

impl FileHandle {
    /// The handle of an open file on `device`.
    ///
    /// # Errors
    /// EOPNOTSUPP where the file system has no handles, EOVERFLOW where they are longer than
    /// [`HANDLE_MAX`].
    pub fn of(file: BorrowedFd<'_>, device: u64) -> io::Result<Self> {
        let mut raw = RawHandle {
            handle_bytes: u32::try_from(HANDLE_MAX).expect("it is 64"),
            handle_type: 0,
            bytes: [0; HANDLE_MAX],
        };
        let mut mount_id = 0;
        // SAFETY: `raw` has the layout of struct file_handle with room for the bytes that it
        // announces; the empty path is NUL-terminated.
        let result = unsafe {
            libc::name_to_handle_at(
                file.as_raw_fd(),
                c"".as_ptr(),
                (&raw mut raw).cast(),
                &raw mut mount_id,
                libc::AT_EMPTY_PATH,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { device, kind: raw.handle_type, len: raw.handle_bytes, bytes: raw.bytes })
    }

    /// The same file where its file system has another device number now.
    #[must_use]
    pub fn on(self, device: u64) -> Self {
        Self { device, ..self }
    }

    /// As bytes, to be kept outside this process: device and type as 8 and 4 bytes in little-endian
    /// order, then the handle.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let len = (self.len as usize).min(HANDLE_MAX);
        let mut bytes = Vec::with_capacity(12 + len);
        bytes.extend(self.device.to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(&self.bytes[..len]);
        bytes
    }

    /// Back from [`Self::to_bytes`]; none where they cannot be a handle's.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (device, rest) = bytes.split_first_chunk()?;
        let (kind, rest) = rest.split_first_chunk()?;
        let mut handle = Self {
            device: u64::from_le_bytes(*device),
            kind: i32::from_le_bytes(*kind),
            len: u32::try_from(rest.len()).ok()?,
            bytes: [0; HANDLE_MAX],
        };
        handle.bytes.get_mut(..rest.len())?.copy_from_slice(rest);
        Some(handle)
    }

    /// Opens the file for reading; `mount` is any open file or folder of the same file system. Needs
    /// CAP_DAC_READ_SEARCH.
    ///
    /// # Errors
    /// ESTALE when the file is gone.
    pub fn open(&self, mount: impl AsFd) -> io::Result<File> {
        let mut raw =
            RawHandle { handle_bytes: self.len, handle_type: self.kind, bytes: self.bytes };
        let flags =
            libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOATIME | libc::O_NOCTTY;
        // SAFETY: `raw` has the layout of struct file_handle, with at most HANDLE_MAX bytes.
        let fd = unsafe {
            libc::open_by_handle_at(mount.as_fd().as_raw_fd(), (&raw mut raw).cast(), flags)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just given us this descriptor.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
    }
}

/// Whether any process has the file open for writing. User space has no other way to ask than to
/// take a read lease for a moment (fcntl(2), "Leases"), which the kernel refuses while there is a
/// writer. A process that opens the file for writing in that moment waits until the lease is given
/// back, a microsecond; with O_NONBLOCK it would get EWOULDBLOCK.
///
/// # Errors
/// What fcntl(2) says; EINVAL where the file system has no leases.
pub fn is_open_for_writing(file: BorrowedFd<'_>) -> io::Result<bool> {
    // SAFETY: no pointers.
    let taken = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) };
    if taken == 0 {
        // SAFETY: no pointers.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
        return Ok(false);
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::EAGAIN) => Ok(true),
        error => Err(error),
    }
}

/// Whether the kernel has the first `len` bytes of a file in its page cache, so that to read them waits for no disk and
/// begins no read-ahead (cachestat(2)).
///
/// # Errors
/// ENOSYS before Linux 6.5; EOPNOTSUPP for hugetlbfs.
pub fn is_cached(file: BorrowedFd<'_>, len: u64) -> io::Result<bool> {
    /// The same on all architectures.
    const SYS_CACHESTAT: libc::c_long = 451;
    let range = [0_u64, len];
    // Pages that are cached, dirty, under writeback, evicted, evicted lately.
    let mut stat = [0_u64; 5];
    // SAFETY: `range` is a struct cachestat_range and `stat` a struct cachestat (include/uapi/linux/mman.h); the kernel
    // reads and writes no more than these.
    let result = unsafe {
        libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), range.as_ptr(), stat.as_mut_ptr(), 0_u32)
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let page = u64::try_from(rustix::param::page_size()).unwrap_or(u64::MAX);
    Ok(stat[0] >= len.div_ceil(page))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::io::Read;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_handle_finds_its_file_after_a_rename_and_not_after_a_delete() {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let (one, two) = (folder.path().join("one"), folder.path().join("two"));
        std::fs::write(&one, "content").unwrap();
        let file = File::open(&one).unwrap();
        let handle = FileHandle::of(file.as_fd(), file.metadata().unwrap().dev()).unwrap();
        drop(file);
        assert_eq!(FileHandle::from_bytes(&handle.to_bytes()), Some(handle));
        assert_eq!(FileHandle::from_bytes(&[0; 12 + HANDLE_MAX + 1]), None);
        std::fs::rename(&one, &two).unwrap();
        let mount = File::open(folder.path()).unwrap();
        let mut content = String::new();
        handle.open(&mount).unwrap().read_to_string(&mut content).unwrap();
        assert_eq!(content, "content");
        std::fs::remove_file(&two).unwrap();
        let gone = handle.open(&mount).unwrap_err();
        assert_eq!(gone.raw_os_error(), Some(libc::ESTALE));
    }

    #[test]
    fn a_writer_is_seen_while_it_holds_the_file() {
        let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        let reader = File::open(file.path()).unwrap();
        let path = file.into_temp_path();
        assert!(!is_open_for_writing(reader.as_fd()).unwrap());
        let writer = OpenOptions::new().write(true).open(&path).unwrap();
        assert!(is_open_for_writing(reader.as_fd()).unwrap());
        drop(writer);
        assert!(!is_open_for_writing(reader.as_fd()).unwrap());
    }

    #[test]
    fn what_is_cached_is_told_from_what_is_on_a_disk() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, vec![7; 100_000]).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let is_cached = |len| match is_cached(file.as_fd(), len) {
            Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => None,
            result => Some(result.unwrap()),
        };
        assert_ne!(is_cached(100_000), Some(false));
        assert_ne!(is_cached(1), Some(false));
        assert_ne!(is_cached(200_000), Some(true), "there is no more");
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        // Where it is not a file system in memory.
        let now = is_cached(100_000);
        let kind = rustix::fs::fstatfs(&file).unwrap().f_type;
        assert!(now != Some(true) || kind == 0x0102_1994, "{kind:x}");
    }
}
