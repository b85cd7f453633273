//! Notification groups, marks, events and answers (fanotify_init(2), fanotify_mark(2), fanotify(7)).
//!
//! Owns the group's descriptor. When the last descriptor of a permission group closes, the kernel
//! allows everything that it holds, so the supervisor keeps one of its own (by fork).

use std::ffi::CString;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// What a group is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Holds open and exec until they are answered.
    Permission,
    /// Tells of files closed after writing.
    CloseWrite,
    /// Tells of files that were opened, and of those closed after writing.
    Record,
}

impl Purpose {
    fn mask(self, holds: Holds) -> u64 {
        match (self, holds) {
            (Self::CloseWrite, _) => libc::FAN_CLOSE_WRITE,
            (Self::Record, _) => libc::FAN_OPEN | libc::FAN_CLOSE_WRITE,
            (Self::Permission, Holds::OpenAndExec) => {
                libc::FAN_OPEN_PERM | libc::FAN_OPEN_EXEC_PERM
            }
            (Self::Permission, Holds::Exec) => libc::FAN_OPEN_EXEC_PERM,
            (Self::Permission, Holds::Nothing) => 0,
        }
    }
}

/// Which accesses a [`Purpose::Permission`] group holds on a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holds {
    /// Both.
    OpenAndExec,
    /// Exec alone.
    Exec,
    /// None.
    Nothing,
}

/// What the kernel is told of a held access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The access goes on.
    Allow,
    /// The access ends with EPERM.
    Deny,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// A process waits to open the file.
    Open,
    /// A process waits to execute the file.
    Exec,
    /// A file was opened.
    Opened,
    /// A file was closed after it had been open for writing.
    CloseWrite,
    /// Both by the same process: the kernel makes one event of what is queued for a file.
    OpenedAndWritten,
    /// Events of a group that holds nothing were lost.
    Overflow,
}

/// One event.
#[derive(Debug)]
pub struct Event {
    /// What happened.
    pub kind: EventKind,
    /// The file, open for reading; none for an overflow. Its number names the event in an answer.
    pub fd: Option<OwnedFd>,
    /// The process (thread group) that caused it; 0 when it is in another PID namespace.
    pub pid: u32,
}

/// How clean inodes are marked on this kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IgnoreMark {
    /// FAN_MARK_IGNORE with FAN_MARK_EVICTABLE: holds no inode in memory (Linux 6.0, back-ported to 5.15).
    Evictable,
    /// FAN_MARK_IGNORED_MASK: each mark holds its inode in memory, so their number must be bounded.
    Plain,
}

/// A fanotify group.
#[derive(Debug)]
pub struct Group {
    fd: OwnedFd,
    purpose: Purpose,
}

impl Group {
    /// Makes a group. Needs CAP_SYS_ADMIN.
    ///
    /// Event files are opened with O_NONBLOCK, so that a FIFO or a lease cannot hold the reader, and
    /// with O_NOATIME.
    ///
    /// # Errors
    /// What fanotify_init(2) says; EINVAL where the kernel has no permission events.
    pub fn new(purpose: Purpose) -> io::Result<Self> {
        let class = match purpose {
            Purpose::Permission => libc::FAN_CLASS_CONTENT,
            Purpose::CloseWrite | Purpose::Record => libc::FAN_CLASS_NOTIF,
        };
        let unlimited = match purpose {
            Purpose::Permission => libc::FAN_UNLIMITED_QUEUE | libc::FAN_UNLIMITED_MARKS,
            Purpose::CloseWrite | Purpose::Record => libc::FAN_UNLIMITED_MARKS,
        };
        let flags = libc::FAN_CLOEXEC | libc::FAN_NONBLOCK | class | unlimited;
        let event_flags = libc::O_RDONLY
            | libc::O_LARGEFILE
            | libc::O_CLOEXEC
            | libc::O_NOATIME
            | libc::O_NONBLOCK;
        // SAFETY: no pointers; the result is a new descriptor or -1.
        let fd = unsafe { libc::fanotify_init(flags, event_flags.cast_unsigned()) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just given us this descriptor, and nobody else owns it.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) }, purpose })
    }

    /// Another descriptor of the same group.
    ///
    /// # Errors
    /// What dup(2) says.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { fd: self.fd.try_clone()?, purpose: self.purpose })
    }

    /// Marks the file system on which `path` lies, so that these accesses are held there and no others.
    /// Marking twice is harmless. For a group of the other purpose it does not matter what is held.
    ///
    /// # Errors
    /// What fanotify_mark(2) says.
    pub fn mark_filesystem(&self, path: &Path, holds: Holds) -> io::Result<()> {
        let (all, wanted) = (self.purpose.mask(Holds::OpenAndExec), self.purpose.mask(holds));
        if wanted != 0 {
            self.filesystem(libc::FAN_MARK_ADD, wanted, path)?;
        }
        if all & !wanted == 0 {
            return Ok(());
        }
        match self.filesystem(libc::FAN_MARK_REMOVE, all & !wanted, path) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            result => result,
        }
    }

    /// Takes the mark of the file system on which `path` lies away.
    ///
    /// # Errors
    /// What fanotify_mark(2) says; ENOENT when it had none.
    pub fn unmark_filesystem(&self, path: &Path) -> io::Result<()> {
        self.filesystem(libc::FAN_MARK_REMOVE, self.purpose.mask(Holds::OpenAndExec), path)
    }

    fn filesystem(&self, action: u32, mask: u64, path: &Path) -> io::Result<()> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        self.mark(action | libc::FAN_MARK_FILESYSTEM, mask, libc::AT_FDCWD, Some(&path))
    }

    /// Takes all file-system marks away. Events that are queued or held stay so.
    ///
    /// # Errors
    /// What fanotify_mark(2) says.
    pub fn flush_filesystems(&self) -> io::Result<()> {
        let root = CString::new("/")?;
        let flags = libc::FAN_MARK_FLUSH | libc::FAN_MARK_FILESYSTEM;
        self.mark(flags, 0, libc::AT_FDCWD, Some(&root))
    }

    /// Marks an inode so that opening it raises no event, until it is written or unmarked. Executing
    /// it still raises one. The kernel adds nothing, and says nothing, while a writer holds the file.
    ///
    /// # Errors
    /// What fanotify_mark(2) says.
    pub fn ignore_opens(&self, file: BorrowedFd<'_>, how: IgnoreMark) -> io::Result<()> {
        let flags = libc::FAN_MARK_ADD | ignore_flags(how);
        self.mark(flags, libc::FAN_OPEN_PERM, file.as_raw_fd(), None)
    }

    /// Takes an inode's ignore mark away. That there was none is no error.
    ///
    /// # Errors
    /// What fanotify_mark(2) says.
    pub fn unignore(&self, file: BorrowedFd<'_>, how: IgnoreMark) -> io::Result<()> {
        let flags = libc::FAN_MARK_REMOVE | (ignore_flags(how) & !libc::FAN_MARK_EVICTABLE);
        match self.mark(flags, libc::FAN_OPEN_PERM, file.as_raw_fd(), None) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            result => result,
        }
    }

    /// Takes the ignore marks of all inodes away.
    ///
    /// # Errors
    /// What fanotify_mark(2) says.
    pub fn flush_ignored(&self) -> io::Result<()> {
        let root = CString::new("/")?;
        self.mark(libc::FAN_MARK_FLUSH, 0, libc::AT_FDCWD, Some(&root))
    }

    fn mark(&self, flags: u32, mask: u64, at: RawFd, path: Option<&CString>) -> io::Result<()> {
        let path = path.map_or(std::ptr::null(), |path| path.as_ptr());
        // SAFETY: `path` is null or a NUL-terminated string that lives until the call returns.
        let result = unsafe { libc::fanotify_mark(self.fd.as_raw_fd(), flags, mask, at, path) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Reads what is queued, at most `most` events, and hands each to `each`. Returns how many. Never
    /// blocks for want of events.
    ///
    /// # Errors
    /// `WouldBlock` when nothing is queued. EMFILE when this process has no descriptor left; the
    /// kernel has then denied the access by itself.
    pub fn read(&self, most: usize, mut each: impl FnMut(Event)) -> io::Result<usize> {
        const LEN: usize = size_of::<libc::fanotify_event_metadata>();
        const MOST: usize = 32;
        let mut buffer = [0_u8; LEN * MOST];
        let room = LEN * most.clamp(1, MOST);
        let read = rustix::io::read(&self.fd, &mut buffer[..room])?;
        let mut count = 0;
        for raw in buffer[..read].chunks_exact(LEN) {
            // SAFETY: the kernel wrote a fanotify_event_metadata here (fanotify(7), "Reading fanotify
            // events"); the type is plain data and the copy needs no alignment.
            let raw: libc::fanotify_event_metadata =
                unsafe { std::ptr::read_unaligned(raw.as_ptr().cast()) };
            assert_eq!(raw.vers, libc::FANOTIFY_METADATA_VERSION, "the kernel's fanotify ABI");
            // SAFETY: an event's descriptor is new and ours alone.
            let fd = (raw.fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(raw.fd) });
            let Some(kind) = kind_of(raw.mask) else { continue };
            each(Event { kind, fd, pid: raw.pid.cast_unsigned() });
            count += 1;
        }
        Ok(count)
    }

    /// Answers the held event whose descriptor has this number. `Ok(false)`: there is none.
    ///
    /// # Errors
    /// What write(2) says; the event is still held then.
    pub fn answer(&self, number: RawFd, answer: Answer) -> io::Result<bool> {
        let response = libc::fanotify_response {
            fd: number,
            response: match answer {
                Answer::Allow => libc::FAN_ALLOW,
                Answer::Deny => libc::FAN_DENY,
            },
        };
        // SAFETY: the pointer and length are those of a live plain struct.
        let written = unsafe {
            libc::write(
                self.fd.as_raw_fd(),
                (&raw const response).cast(),
                size_of::<libc::fanotify_response>(),
            )
        };
        if written >= 0 {
            return Ok(true);
        }
        match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            error => Err(error),
        }
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn ignore_flags(how: IgnoreMark) -> u32 {
    match how {
        IgnoreMark::Evictable => libc::FAN_MARK_IGNORE | libc::FAN_MARK_EVICTABLE,
        IgnoreMark::Plain => libc::FAN_MARK_IGNORED_MASK,
    }
}

fn kind_of(mask: u64) -> Option<EventKind> {
    const BOTH: u64 = libc::FAN_OPEN | libc::FAN_CLOSE_WRITE;
    [
        (libc::FAN_OPEN_EXEC_PERM, EventKind::Exec),
        (libc::FAN_OPEN_PERM, EventKind::Open),
        (BOTH, EventKind::OpenedAndWritten),
        (libc::FAN_OPEN, EventKind::Opened),
        (libc::FAN_CLOSE_WRITE, EventKind::CloseWrite),
        (libc::FAN_Q_OVERFLOW, EventKind::Overflow),
    ]
    .into_iter()
    .find_map(|(bits, kind)| (mask & bits == bits).then_some(kind))
}
