//! The sandbox that an engine enters once its signatures are loaded.
//!
//! Two layers. Landlock takes away the file system, TCP, abstract unix sockets and signals to
//! others; it is entered before the workers start, because it binds only the calling thread and
//! those it starts later. The seccomp filter is an allow list for every thread of the process; it is
//! entered last, when the workers and all that they start exist, because it forbids new threads.
//! A kernel without landlock costs a warning; without seccomp the engine does not run.
//!
//! A forbidden call gets EPERM and not death: libraries probe for things they can do without.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use landlock::{
    ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetError, RulesetStatus, Scope,
};
use seccompiler::{
    BackendError, SeccompAction, SeccompCmpArgLen as Length, SeccompCmpOp as Op, SeccompCondition,
    SeccompFilter, SeccompRule,
};

use crate::report::Diagnostic;
use crate::sys;

/// Why the sandbox could not be entered.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A landlock call failed, though the kernel has landlock.
    #[error("landlock cannot be entered")]
    Landlock(#[from] RulesetError),
    /// The filter does not compile for this processor.
    #[error("the system call filter does not compile")]
    Filter(#[from] BackendError),
    /// The kernel refused the filter.
    #[error("the system call filter cannot be entered")]
    Seccomp(#[from] seccompiler::Error),
    /// Another limit could not be set.
    #[error("a process limit cannot be set")]
    Limit(#[from] io::Error),
}

/// First layer, before the workers start: what those may do that inherit from this thread.
pub(super) fn enter_landlock() -> Result<Option<Diagnostic>, SandboxError> {
    // Rights that the kernel does not know are left out, and reported below.
    let abi = ABI::V6;
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?
        .restrict_self()?;
    // Capabilities go after landlock, which needs none, and before the threads that inherit them.
    sys::drop_capabilities()?;
    Ok(match status.ruleset {
        RulesetStatus::FullyEnforced => None,
        RulesetStatus::PartiallyEnforced => Some(Diagnostic::warning(
            "sandbox-landlock",
            "this kernel has an older landlock: some of the sandbox rests on the system call \
             filter alone",
        )),
        RulesetStatus::NotEnforced => Some(Diagnostic::warning(
            "sandbox-landlock",
            "this kernel has no landlock: the sandbox rests on the system call filter alone",
        )),
    })
}

/// Second layer, for every thread of the process, when nothing more is to be started.
pub(super) fn enter_filter(socket: BorrowedFd<'_>, threads: u32) -> Result<(), SandboxError> {
    // Standard streams, the socket, one content per worker, and as many again for what a library
    // opened while it loaded.
    sys::limit_descriptors(16 + 2 * u64::from(threads))?;
    let filter: seccompiler::BpfProgram = filter(socket)?.try_into()?;
    seccompiler::apply_filter_all_threads(&filter)?;
    Ok(())
}

/// The allow list.
fn filter(socket: BorrowedFd<'_>) -> Result<SeccompFilter, BackendError> {
    let mut rules: Vec<(i64, Vec<SeccompRule>)> =
        ALWAYS.iter().map(|&number| (number, Vec::new())).collect();
    let socket = socket.as_raw_fd() as u64;
    let pid = u64::from(std::process::id());
    let exec = libc::PROT_EXEC as u64;
    // A shared mapping would be memory that RLIMIT_DATA does not count. MAP_TYPE also holds
    // MAP_SHARED_VALIDATE (3), so both bits are compared.
    let private = [
        masked(2, exec, 0)?,
        masked(3, (libc::MAP_SHARED | libc::MAP_PRIVATE) as u64, libc::MAP_PRIVATE as u64)?,
    ];
    rules.extend([
        (libc::SYS_mmap, vec![SeccompRule::new(private.into())?]),
        // No new executable memory: rules are compiled and scanners built before the sandbox.
        (libc::SYS_mprotect, vec![SeccompRule::new(vec![masked(2, exec, 0)?])?]),
        (libc::SYS_sendmsg, vec![SeccompRule::new(vec![equals(0, socket)?])?]),
        (libc::SYS_recvmsg, vec![SeccompRule::new(vec![equals(0, socket)?])?]),
        (libc::SYS_write, vec![SeccompRule::new(vec![equals(0, libc::STDERR_FILENO as u64)?])?]),
        // abort() and a caught stack overflow raise a signal in the own process.
        (libc::SYS_tgkill, vec![SeccompRule::new(vec![equals(0, pid)?])?]),
        (
            libc::SYS_fcntl,
            vec![
                SeccompRule::new(vec![equals(1, libc::F_GETFD as u64)?])?,
                SeccompRule::new(vec![equals(1, libc::F_GET_SEALS as u64)?])?,
            ],
        ),
    ]);
    SeccompFilter::new(
        rules.into_iter().collect(),
        SeccompAction::Errno(libc::EPERM as u32),
        SeccompAction::Allow,
        std::env::consts::ARCH.try_into()?,
    )
}

/// Calls that reach nothing outside the process, whatever their arguments.
const ALWAYS: &[i64] = &[
    // memory
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // the received content
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_pread64,
    // waiting and time
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_futex,
    libc::SYS_gettimeofday,
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    // what a runtime asks about itself
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    // signals: a WebAssembly trap is a SIGSEGV, handled on an alternate stack
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    // the end
    libc::SYS_exit,
    libc::SYS_exit_group,
];

fn equals(argument: u8, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, Length::Dword, Op::Eq, value)
}

fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, Length::Dword, Op::MaskedEq(mask), value)
}
