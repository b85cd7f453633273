//! The system calls that the standard library lacks, each behind a safe function.
//!
//! All `unsafe` code of the crate is here; it owns no state.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::{MaybeUninit, zeroed};
use std::ops::Deref;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::protocol::CANCEL_PAGE;

/// Turns the -1 of a system call into the error of the moment.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn check_long(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A descriptor that a system call has just returned.
fn owned(fd: libc::c_int) -> OwnedFd {
    // SAFETY: the callers pass a fresh descriptor from a successful call; nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A connected pair of close-on-exec SOCK_SEQPACKET sockets.
pub(crate) fn seqpacket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [-1; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: `fds` has room for the two descriptors.
    check(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) })?;
    Ok((owned(fds[0]), owned(fds[1])))
}

/// Lets `bytes` lie in the socket before a send has to wait; what the system allows of it (`SO_SNDBUFFORCE` for who
/// may, else `SO_SNDBUF`, socket(7)).
pub(crate) fn set_send_buffer(socket: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    let wanted = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    let set = |option| {
        // SAFETY: `wanted` is live and of the size stated.
        check(unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                option,
                (&raw const wanted).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        })
    };
    set(libc::SO_SNDBUFFORCE).or_else(|_| set(libc::SO_SNDBUF)).map(drop)
}

/// The type of the socket (`SO_TYPE`); an error when it is no socket.
pub(crate) fn socket_type(fd: BorrowedFd<'_>) -> io::Result<libc::c_int> {
    let mut kind: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `kind` and `length` are live and of the sizes stated.
    check(unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_TYPE,
            (&raw mut kind).cast(),
            &mut length,
        )
    })?;
    Ok(kind)
}

/// Takes over a descriptor inherited across exec and makes it close-on-exec.
pub(crate) fn adopt(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_SETFD touches no memory; it fails with EBADF when there is no such descriptor.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    Ok(owned(fd))
}

/// Room for a control message with one descriptor, aligned as `cmsghdr` needs it.
#[repr(C)]
union Control {
    header: libc::cmsghdr,
    bytes: [u8; 32],
}

/// `CMSG_SPACE` of one descriptor; checked against [`Control`] at compile time.
const CONTROL_LEN: usize =
    // SAFETY: CMSG_SPACE is arithmetic on its argument.
    unsafe { libc::CMSG_SPACE(size_of::<RawFd>() as libc::c_uint) } as usize;
const _: () = assert!(CONTROL_LEN <= size_of::<Control>());

/// Sends one datagram of two parts, with a descriptor when `pass` names one.
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    parts: [&[u8]; 2],
    pass: Option<BorrowedFd<'_>>,
    wait: bool,
) -> io::Result<()> {
    let mut pieces = parts
        .map(|part| libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() });
    let mut control = Control { bytes: [0; 32] };
    // SAFETY: all-zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { zeroed() };
    header.msg_iov = pieces.as_mut_ptr();
    header.msg_iovlen = pieces.len() as _;
    if let Some(fd) = pass {
        header.msg_control = (&raw mut control).cast();
        header.msg_controllen = CONTROL_LEN as _;
        // SAFETY: the control buffer is aligned and at least CMSG_SPACE(one fd) long, so the first
        // header and its data lie within it; `header` points to it and both live to the end.
        unsafe {
            let first = libc::CMSG_FIRSTHDR(&header);
            (*first).cmsg_level = libc::SOL_SOCKET;
            (*first).cmsg_type = libc::SCM_RIGHTS;
            (*first).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as libc::c_uint) as _;
            libc::CMSG_DATA(first).cast::<RawFd>().write_unaligned(fd.as_raw_fd());
        }
    }
    let flags = libc::MSG_NOSIGNAL | if wait { 0 } else { libc::MSG_DONTWAIT };
    loop {
        // SAFETY: `header` and everything it points to live across the call; the kernel only reads.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &header, flags) };
        if sent >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// What [`receive`] got.
pub(crate) struct Received {
    /// Bytes of the datagram that are in the buffer; 0 = the other end is closed.
    pub length: usize,
    /// The datagram was longer than the buffer.
    pub cut: bool,
    /// The descriptor that came with it.
    pub fd: Option<OwnedFd>,
    /// Descriptors came that were not taken: unwanted, too many, or no number was free.
    pub lost_fd: bool,
}

/// Receives one datagram. Descriptors are taken only with `take_fd`; others the kernel closes.
pub(crate) fn receive(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    take_fd: bool,
    wait: bool,
) -> io::Result<Received> {
    let mut piece = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let mut control = Control { bytes: [0; 32] };
    // SAFETY: all-zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { zeroed() };
    header.msg_iov = &mut piece;
    header.msg_iovlen = 1;
    let flags = libc::MSG_CMSG_CLOEXEC | if wait { 0 } else { libc::MSG_DONTWAIT };
    let length = loop {
        if take_fd {
            header.msg_control = (&raw mut control).cast();
            header.msg_controllen = CONTROL_LEN as _;
        }
        // SAFETY: the buffers behind `header` are live, exclusively ours and of the stated lengths.
        let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut header, flags) };
        if got >= 0 {
            break got as usize;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    };
    let (fd, extra) = if take_fd { passed(&header) } else { (None, false) };
    Ok(Received {
        length,
        cut: header.msg_flags & libc::MSG_TRUNC != 0,
        fd,
        lost_fd: extra || header.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

/// The first passed descriptor of a received message; any further one is closed, and told.
fn passed(header: &libc::msghdr) -> (Option<OwnedFd>, bool) {
    let mut first = None;
    let mut extra = false;
    // SAFETY: recvmsg filled the control buffer and set its length; the CMSG macros stay within it.
    // Each SCM_RIGHTS entry holds whole descriptors that now belong to this process alone.
    unsafe {
        let mut entry = libc::CMSG_FIRSTHDR(header);
        while !entry.is_null() {
            if (*entry).cmsg_level == libc::SOL_SOCKET && (*entry).cmsg_type == libc::SCM_RIGHTS {
                let bytes = (*entry).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                let data = libc::CMSG_DATA(entry).cast::<RawFd>();
                for index in 0..bytes / size_of::<RawFd>() {
                    let fd = OwnedFd::from_raw_fd(data.add(index).read_unaligned());
                    if first.is_none() {
                        first = Some(fd);
                    } else {
                        extra = true;
                    }
                }
            }
            entry = libc::CMSG_NXTHDR(header, entry);
        }
    }
    (first, extra)
}

/// A new memfd that can be sealed and not executed.
pub(crate) fn memfd(name: &CStr) -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: `name` is a C string.
    let create = |flags| check(unsafe { libc::memfd_create(name.as_ptr(), flags) });
    let fd = match create(flags | libc::MFD_NOEXEC_SEAL) {
        // Kernels before 6.3 do not know MFD_NOEXEC_SEAL.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => create(flags)?,
        other => other?,
    };
    Ok(File::from(owned(fd)))
}

/// Seals a memfd, which nobody has mapped, for good: no write, no other size, no further change of seals.
///
/// With F_SEAL_FUTURE_WRITE (Linux 5.1) rather than F_SEAL_WRITE: they differ only for mappings that are
/// there already, and the latter looks at every page, waits for each that the kernel happens to hold
/// (it moves them about when it wants large pages), and fails with EBUSY when one is held for long.
pub(crate) fn seal(file: &File) -> io::Result<()> {
    let seals =
        libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS touches no memory.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) }).map(drop)
}

/// Gives pages of a file, from its beginning, to a pipe, which holds them until they are read.
#[cfg(test)]
pub(crate) fn splice(file: BorrowedFd<'_>, pipe: BorrowedFd<'_>, length: usize) -> io::Result<i64> {
    let (file, pipe, none) = (file.as_raw_fd(), pipe.as_raw_fd(), ptr::null_mut());
    // SAFETY: the offset is a place of ours.
    check_long(unsafe { libc::splice(file, &mut 0, pipe, none, length, 0) } as i64)
}

/// True when the bytes behind `fd` can neither change nor go away.
pub(crate) fn is_sealed(fd: BorrowedFd<'_>) -> bool {
    let needed = libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_SHRINK;
    // SAFETY: F_GET_SEALS touches no memory; EINVAL for everything that is no memfd or tmpfs file.
    let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
    seals >= 0 && seals & needed == needed
}

/// True when the descriptor cannot write.
pub(crate) fn is_read_only(fd: BorrowedFd<'_>) -> io::Result<bool> {
    // SAFETY: F_GETFL touches no memory.
    let flags = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })?;
    Ok(flags & libc::O_ACCMODE == libc::O_RDONLY)
}

/// Size of the file in bytes. The system call itself: glibc's wrapper takes one that names paths,
/// which the sandbox does not allow.
pub(crate) fn file_size(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: fstat fills the struct when it succeeds.
    let stat = unsafe {
        check_long(libc::syscall(libc::SYS_fstat, fd.as_raw_fd(), stat.as_mut_ptr()))?;
        stat.assume_init()
    };
    Ok(u64::try_from(stat.st_size).unwrap_or(0))
}

/// A read-only mapping of sealed content.
pub(crate) struct Mapping {
    start: *const u8,
    length: usize,
}

impl Mapping {
    /// Maps the first `length` bytes. Refuses what is not sealed or is shorter, so that neither a
    /// change of the bytes nor a SIGBUS is possible.
    pub(crate) fn new(fd: BorrowedFd<'_>, length: usize) -> io::Result<Self> {
        if !is_sealed(fd) || file_size(fd)? < length as u64 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if length == 0 {
            return Ok(Self { start: ptr::NonNull::dangling().as_ptr(), length });
        }
        // Private, not shared: kernels before 6.7 refuse a shared mapping of a write-sealed memfd.
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                length,
                libc::PROT_READ,
                libc::MAP_PRIVATE,
                fd.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start: start.cast(), length })
    }
}

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping is `length` bytes long and lives as long as `self`; `new` checked the
        // seals, so nobody can change or take away the bytes.
        unsafe { std::slice::from_raw_parts(self.start, self.length) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.length > 0 {
            // SAFETY: exactly the mapping that `new` made; no borrow outlives `self`.
            unsafe { libc::munmap(self.start.cast_mut().cast(), self.length) };
        }
    }
}

/// A page of numbers that another process writes and this one reads.
pub(crate) struct Numbers(ptr::NonNull<AtomicU64>);

// SAFETY: the numbers are atomic, and the mapping is this value's own.
unsafe impl Send for Numbers {}
// SAFETY: as above.
unsafe impl Sync for Numbers {}

impl Numbers {
    const COUNT: usize = CANCEL_PAGE / size_of::<u64>();

    /// Where the number for `id` is, in bytes from the start.
    pub(crate) fn place(id: u64) -> u64 {
        id % Self::COUNT as u64 * size_of::<u64>() as u64
    }

    /// Maps the page. Refuses what is shorter: a touch behind the end of a file is SIGBUS. The writer is
    /// trusted not to truncate it later.
    pub(crate) fn map(fd: BorrowedFd<'_>) -> io::Result<Self> {
        if file_size(fd)? < CANCEL_PAGE as u64 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            let (read, shared) = (libc::PROT_READ, libc::MAP_SHARED);
            libc::mmap(ptr::null_mut(), CANCEL_PAGE, read, shared, fd.as_raw_fd(), 0)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        ptr::NonNull::new(start.cast()).map(Self).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// The number at the place of `id`.
    pub(crate) fn get(&self, id: u64) -> u64 {
        let index = usize::try_from(id % Self::COUNT as u64).unwrap_or(0);
        // SAFETY: `index` is below COUNT, the mapping holds COUNT aligned numbers and lives as long as
        // `self`; who writes them does it through write(2), and a number is never taken for a pointer.
        unsafe { self.0.add(index).as_ref() }.load(Ordering::Relaxed)
    }
}

impl Drop for Numbers {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping that `map` made; no borrow outlives `self`.
        unsafe { libc::munmap(self.0.as_ptr().cast(), CANCEL_PAGE) };
    }
}

/// A counter to wake a thread that polls.
pub(crate) fn event_fd() -> io::Result<File> {
    // SAFETY: no pointers.
    let fd = check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
    Ok(File::from(owned(fd)))
}

/// A descriptor that becomes readable when the process ends.
pub(crate) fn pid_fd(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = check_long(unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) })?;
    Ok(owned(fd as libc::c_int))
}

/// Kills the process group that a child leads. The child must not have been waited for.
pub(crate) fn kill_group(pid: u32) {
    let Ok(pid) = libc::pid_t::try_from(pid) else { return };
    if pid > 1 {
        // SAFETY: no pointers. An unreaped child keeps its number, so it is no stranger's group.
        unsafe { libc::kill(-pid, libc::SIGKILL) };
    }
}

/// One descriptor to wait for, and what is wanted of it.
pub(crate) struct Wait<'a> {
    /// The descriptor.
    pub fd: BorrowedFd<'a>,
    /// Wait for room to write, too.
    pub write: bool,
}

/// Waits until one of the descriptors is ready or the time is up; tells for each whether it is.
pub(crate) fn poll(waits: &[Wait<'_>], timeout: Duration) -> io::Result<Vec<bool>> {
    let mut entries: Vec<libc::pollfd> = waits
        .iter()
        .map(|wait| libc::pollfd {
            fd: wait.fd.as_raw_fd(),
            events: libc::POLLIN | if wait.write { libc::POLLOUT } else { 0 },
            revents: 0,
        })
        .collect();
    // Rounded up: a deadline 0.4 ms away must not become a busy loop.
    let millis = timeout.as_micros().div_ceil(1000).min(i32::MAX as u128) as libc::c_int;
    // SAFETY: the array is live and of the stated length.
    let ready = unsafe { libc::poll(entries.as_mut_ptr(), entries.len() as libc::nfds_t, millis) };
    match check(ready) {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ => Ok(entries.iter().map(|entry| entry.revents != 0).collect()),
    }
}

/// Makes reads from `fd` return at once.
pub(crate) fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: F_GETFL and F_SETFL touch no memory.
    unsafe {
        let flags = check(libc::fcntl(fd.as_raw_fd(), libc::F_GETFL))?;
        check(libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)).map(drop)
    }
}

/// Lets the child inherit `keep` and nothing else above standard error, and die with the thread
/// that starts it.
pub(crate) fn prepare_child(command: &mut Command, keep: BorrowedFd<'_>) {
    let keep = keep.as_raw_fd();
    // SAFETY: the closure makes only system calls that are async-signal-safe and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            // PR_SET_PDEATHSIG is about the thread that forked, so the supervisor's own thread
            // must start the process (prctl(2)).
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
            // Marks instead of closing: the standard library's own pipe must live until exec.
            // Kernels before 5.11 lack it; what Rust opens is close-on-exec anyway.
            libc::syscall(
                libc::SYS_close_range,
                3u32,
                u32::MAX,
                libc::CLOSE_RANGE_CLOEXEC as libc::c_int,
            );
            check(libc::fcntl(keep, libc::F_SETFD, 0)).map(drop)
        });
    }
}

/// Gives the child `listener` as descriptor 3 and nothing else above standard error, and lets it die with
/// this thread. `enter` runs last in it. This process must have one thread: `enter` may allocate. Number 3 must
/// be in use here, so that the standard library's own pipe to the child has another.
pub(crate) fn prepare_helper(
    command: &mut Command,
    listener: BorrowedFd<'_>,
    mut enter: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) {
    let listener = listener.as_raw_fd();
    // SAFETY: the process has one thread, so no lock is held that the closure could wait for.
    unsafe {
        command.pre_exec(move || {
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
            libc::syscall(
                libc::SYS_close_range,
                3u32,
                u32::MAX,
                libc::CLOSE_RANGE_CLOEXEC as libc::c_int,
            );
            // With equal numbers dup2(2) does nothing, and the mark stays.
            if listener == 3 {
                check(libc::fcntl(3, libc::F_SETFD, 0))?;
            } else {
                check(libc::dup2(listener, 3))?;
            }
            enter()
        });
    }
}

/// Another descriptor of the same file, with the lowest free number from 3 on.
pub(crate) fn duplicate(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC touches no memory.
    let fd = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 3) })?;
    Ok(owned(fd))
}

/// Die when the parent does; no core dump; no ptrace or /proc access by the same user.
pub(crate) fn harden_process() -> io::Result<()> {
    // SAFETY: these prctl calls take no pointers.
    unsafe {
        check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
        check(libc::prctl(libc::PR_SET_DUMPABLE, 0))?;
    }
    limit(libc::RLIMIT_CORE, 0)
}

/// Sets both limits of a resource.
fn limit(resource: libc::__rlimit_resource_t, most: u64) -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
    // SAFETY: `limit` is live.
    check(unsafe { libc::setrlimit(resource, &limit) }).map(drop)
}

/// Limits private writable memory. Not RLIMIT_AS: a WebAssembly runtime reserves gigabytes of
/// addresses that it never touches.
pub(crate) fn limit_memory(bytes: u64) -> io::Result<()> {
    limit(libc::RLIMIT_DATA, bytes)
}

/// Limits descriptor numbers, and forbids new processes and files.
pub(crate) fn limit_descriptors(most: u64) -> io::Result<()> {
    limit(libc::RLIMIT_NOFILE, most)?;
    limit(libc::RLIMIT_FSIZE, 0)?;
    limit(libc::RLIMIT_NPROC, 0)
}

/// Drops every capability of this thread, and with it of the threads that it starts later.
pub(crate) fn drop_capabilities() -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: libc::c_int,
    }
    // linux/capability.h: _LINUX_CAPABILITY_VERSION_3; two sets of {effective, permitted,
    // inheritable}.
    let header = Header { version: 0x2008_0522, pid: 0 };
    let empty = [0u32; 6];
    // SAFETY: both structs are live and laid out as capset(2) says for version 3.
    check_long(unsafe { libc::syscall(libc::SYS_capset, &raw const header, empty.as_ptr()) })?;
    Ok(())
}

/// Ends the process at once, without running destructors of threads that may hold locks.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: does not return.
    unsafe { libc::_exit(code) }
}
