//! The worker process, and what worker and supervisor run with.

use rustix::process::{Resource, Rlimit};
use std::io;

/// Milliseconds of CLOCK_MONOTONIC, the same in both processes.
#[must_use]
pub fn now_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1000 + now.tv_nsec.unsigned_abs() / 1_000_000
}

/// Forks. The child runs `child` and ends with its result as exit status; it never returns into the
/// caller. The parent gets the child's process id.
///
/// # Errors
/// What fork(2) says.
///
/// # Panics
/// When this process has more than one thread: the child would inherit locks that nobody opens.
pub fn fork(child: impl FnOnce() -> u8) -> io::Result<u32> {
    let threads = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    assert_eq!(threads, 1, "only a process of one thread may fork a worker");
    // SAFETY: there is one thread, so every lock in this process is in a state that the child can use.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child));
            // SAFETY: ends the process without running what the parent registered for its own end.
            unsafe { libc::_exit(i32::from(status.unwrap_or(101))) }
        }
        pid => Ok(pid.unsigned_abs()),
    }
}

/// Bytes of an allocation that has a mapping of its own.
const LARGE: libc::c_int = 32 * 1024;

/// Limits and privileges of both processes: no core dumps (the kernel would hold the dump's writer at
/// our own marks), as many descriptors as the ledger has numbers, never chosen by the OOM killer,
/// SIGIO ignored (a lease that breaks sends it), and an allocator that keeps little.
///
/// What cannot be set is returned, for the log; protection works without it.
#[must_use]
pub fn harden() -> Vec<String> {
    let mut missing = Vec::new();
    let mut check = |what: &str, result: io::Result<()>| {
        if let Err(error) = result {
            missing.push(format!("{what}: {error}"));
        }
    };
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    check("RLIMIT_CORE", rustix::process::setrlimit(Resource::Core, none).map_err(Into::into));
    let files = u64::try_from(crate::ledger::NUMBERS).unwrap_or(u64::MAX);
    let files = Rlimit { current: Some(files), maximum: Some(files) };
    check("RLIMIT_NOFILE", rustix::process::setrlimit(Resource::Nofile, files).map_err(Into::into));
    let dumpable = rustix::process::DumpableBehavior::NotDumpable;
    check("PR_SET_DUMPABLE", rustix::process::set_dumpable_behavior(dumpable).map_err(Into::into));
    check("oom_score_adj", std::fs::write("/proc/self/oom_score_adj", "-1000"));
    // SAFETY: SIG_IGN is a valid disposition and runs no code of ours.
    unsafe { libc::signal(libc::SIGIO, libc::SIG_IGN) };
    // One arena: many threads with one each cost megabytes. What is larger than this is given back when it is freed: a table
    // that has grown leaves no hole.
    for (option, value) in [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_THRESHOLD, LARGE)] {
        // SAFETY: mallopt takes two integers.
        unsafe { libc::mallopt(option, value) };
    }
    missing
}

/// Keeps in memory whatever this process has touched or will touch. Not inherited by fork.
///
/// # Errors
/// What mlockall(2) says.
pub fn lock_memory() -> io::Result<()> {
    use rustix::mm::MlockAllFlags as Flags;
    Ok(rustix::mm::mlockall(Flags::CURRENT | Flags::FUTURE | Flags::ONFAULT)?)
}

/// Takes out of this process's memory what its start had of it: the allocator's free pages, and the program's own pages, of
/// which those come back that are needed (madvise(2), MADV_DONTNEED on a private mapping of a file). For a process that
/// mostly waits and is not locked in memory.
pub fn let_go_of_the_start() {
    // SAFETY: takes an integer.
    unsafe { libc::malloc_trim(0) };
    // SAFETY: the callback has the type that is wanted, and takes no data.
    unsafe { libc::dl_iterate_phdr(Some(let_go_of_program), std::ptr::null_mut()) };
}

/// The first is the program itself (dl_iterate_phdr(3)).
unsafe extern "C" fn let_go_of_program(
    info: *mut libc::dl_phdr_info,
    _size: libc::size_t,
    _data: *mut libc::c_void,
) -> libc::c_int {
    // SAFETY: the caller gives what dl_iterate_phdr(3) says: headers of what is mapped for as long as we run.
    let (base, headers) = unsafe {
        let info = &*info;
        (info.dlpi_addr, std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()))
    };
    let page = rustix::param::page_size();
    for header in headers {
        if header.p_type != libc::PT_LOAD || header.p_flags & libc::PF_W != 0 {
            continue;
        }
        let start = (base + header.p_vaddr) as usize;
        let end = (start + header.p_memsz as usize).next_multiple_of(page);
        let start = start - start % page;
        let advice = rustix::mm::Advice::LinuxDontNeed;
        // SAFETY: a segment that nobody can write and nothing is relocated in: each of its pages comes back as it is in the
        // file.
        let _or_not = unsafe { rustix::mm::madvise(start as *mut _, end - start, advice) };
    }
    1
}
