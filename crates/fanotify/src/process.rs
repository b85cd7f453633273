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

/// Limits and privileges of both processes: no core dumps (the kernel would hold the dump's writer at
/// our own marks), as many descriptors as the ledger has numbers, never chosen by the OOM killer,
/// memory that stays in memory once touched, SIGIO ignored (a lease that breaks sends it).
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
    // SAFETY: mallopt takes two integers. One arena: many threads with one each cost megabytes.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
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
