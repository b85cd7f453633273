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
        // Not signals: those are the filter's to forbid, and one of them is sent in the engine's name when it ends, to
        // what it has started (PR_SET_PDEATHSIG); landlock would keep that back.
        .scope(Scope::AbstractUnixSocket)?
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
pub(super) fn enter_filter(
    socket: BorrowedFd<'_>,
    others: &[BorrowedFd<'_>],
    threads: u32,
) -> Result<(), SandboxError> {
    // Standard streams, the socket, one content per worker, and as many again for what a library
    // opened while it loaded.
    let own = others.iter().map(|socket| socket.as_raw_fd()).max().unwrap_or(0);
    let own = u64::try_from(own).unwrap_or(0);
    sys::limit_descriptors(16 + own + 2 * u64::from(threads))?;
    let filter: seccompiler::BpfProgram = filter(socket, others)?.try_into()?;
    seccompiler::apply_filter_all_threads(&filter)?;
    Ok(())
}

/// The allow list.
fn filter(
    socket: BorrowedFd<'_>,
    others: &[BorrowedFd<'_>],
) -> Result<SeccompFilter, BackendError> {
    let mut rules: Vec<(i64, Vec<SeccompRule>)> =
        ALWAYS.iter().map(|&number| (number, Vec::new())).collect();
    let sockets = || {
        let all = std::iter::once(&socket).chain(others);
        let rule =
            |one: &BorrowedFd<'_>| SeccompRule::new(vec![equals(0, one.as_raw_fd() as u64)?]);
        all.map(rule).collect::<Result<Vec<_>, _>>()
    };
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
        (libc::SYS_sendmsg, sockets()?),
        (libc::SYS_recvmsg, sockets()?),
        (libc::SYS_write, vec![SeccompRule::new(vec![equals(0, libc::STDERR_FILENO as u64)?])?]),
        // What glibc says before it ends the process.
        (libc::SYS_writev, vec![SeccompRule::new(vec![equals(0, libc::STDERR_FILENO as u64)?])?]),
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
    libc::SYS_fstatfs,
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
    // a thread that was started just before does this at its own start, and glibc ends the process
    // when it cannot
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
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

#[cfg(test)]
#[allow(unsafe_code, clippy::unwrap_used)]
mod tests {
    use std::os::fd::AsFd;
    use std::process::Command;
    use std::ptr;

    use super::*;

    const INSIDE: &str = "SEAWALL_TEST_INSIDE";

    /// The filter cannot be left again, so this test runs itself in a process of its own.
    #[test]
    fn what_is_not_allowed_is_refused_and_what_is_needed_works() {
        let own = std::env::current_exe().unwrap();
        let output = Command::new(own)
            .args(["--exact", "runtime::sandbox::tests::inside", "--nocapture"])
            .env(INSIDE, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{text}");
        assert!(text.contains("all as told"), "{text}");
    }

    /// Body of the test above; alone it has nothing to do.
    #[test]
    fn inside() {
        if std::env::var_os(INSIDE).is_none() {
            return;
        }
        let (socket, other) = sys::seqpacket_pair().unwrap();
        let landlock = enter_landlock().unwrap().is_none().then(landlocked).unwrap_or_default();
        enter_filter(socket.as_fd(), &[], 1).unwrap();
        let wrong = [landlock, refused(other.as_raw_fd()), allowed()].concat();
        if wrong.is_empty() {
            eprintln!("all as told");
        } else {
            eprintln!("not as told: {wrong:?}");
        }
        sys::exit_now(i32::from(!wrong.is_empty()));
    }

    /// What the first layer alone does not refuse, with EACCES as landlock does.
    fn landlocked() -> Vec<&'static str> {
        let refused = |error: Option<io::Error>| {
            error.is_some_and(|error| error.raw_os_error() == Some(libc::EACCES))
        };
        let mut wrong = Vec::new();
        if !refused(std::fs::File::open("/etc/passwd").err()) {
            wrong.push("landlock: open");
        }
        if !refused(std::net::TcpStream::connect("127.0.0.1:1").err()) {
            wrong.push("landlock: connect");
        }
        wrong
    }

    /// Names of the calls that were not refused with EPERM.
    fn refused(other_socket: i32) -> Vec<&'static str> {
        let shared = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let validate = libc::MAP_SHARED_VALIDATE | libc::MAP_ANONYMOUS;
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let (write, exec) = (libc::PROT_READ | libc::PROT_WRITE, libc::PROT_READ | libc::PROT_EXEC);
        let map = |prot: i32, flags: i32| [0, 4096, prot as i64, flags as i64, -1, 0];
        let path = c"/etc/passwd".as_ptr() as i64;
        let parent = i64::from(std::os::unix::process::parent_id());
        let here = i64::from(libc::AT_FDCWD);
        // SAFETY: a fresh private page, never unmapped; only its protection is asked to change.
        let page = unsafe { libc::mmap(ptr::null_mut(), 4096, write, private, -1, 0) } as i64;
        let calls: &[(&str, i64, [i64; 6])] = &[
            ("open", libc::SYS_open, [path, 0, 0, 0, 0, 0]),
            ("openat", libc::SYS_openat, [here, path, 0, 0, 0, 0]),
            ("openat2", libc::SYS_openat2, [here, path, 0, 0, 0, 0]),
            ("stat", libc::SYS_stat, [path, page, 0, 0, 0, 0]),
            ("newfstatat", libc::SYS_newfstatat, [here, path, page, 0, 0, 0]),
            ("unlink", libc::SYS_unlink, [path, 0, 0, 0, 0, 0]),
            ("socket", libc::SYS_socket, [2, 1, 0, 0, 0, 0]),
            ("socketpair", libc::SYS_socketpair, [1, 1, 0, page, 0, 0]),
            ("connect", libc::SYS_connect, [3, page, 16, 0, 0, 0]),
            ("sendmsg elsewhere", libc::SYS_sendmsg, [other_socket.into(), page, 0, 0, 0, 0]),
            ("write elsewhere", libc::SYS_write, [1, page, 1, 0, 0, 0]),
            ("writev elsewhere", libc::SYS_writev, [1, page, 1, 0, 0, 0]),
            ("execve", libc::SYS_execve, [path, 0, 0, 0, 0, 0]),
            ("fork", libc::SYS_fork, [0; 6]),
            ("clone", libc::SYS_clone, [0; 6]),
            ("clone3", libc::SYS_clone3, [page, 64, 0, 0, 0, 0]),
            ("memfd_create", libc::SYS_memfd_create, [path, 0, 0, 0, 0, 0]),
            ("mmap executable", libc::SYS_mmap, map(exec, private)),
            ("mmap shared", libc::SYS_mmap, map(write, shared)),
            ("mmap shared, validated", libc::SYS_mmap, map(write, validate)),
            ("mprotect executable", libc::SYS_mprotect, [page, 4096, exec.into(), 0, 0, 0]),
            ("pkey_mprotect", libc::SYS_pkey_mprotect, [page, 4096, exec.into(), -1, 0, 0]),
            ("kill", libc::SYS_kill, [parent, 0, 0, 0, 0, 0]),
            ("tgkill of another", libc::SYS_tgkill, [parent, parent, 0, 0, 0, 0]),
            ("ptrace", libc::SYS_ptrace, [16, parent, 0, 0, 0, 0]),
            ("process_vm_readv", libc::SYS_process_vm_readv, [parent, page, 1, page, 1, 0]),
            ("pidfd_open", libc::SYS_pidfd_open, [parent, 0, 0, 0, 0, 0]),
            ("prlimit64", libc::SYS_prlimit64, [0, 7, 0, page, 0, 0]),
            ("prctl", libc::SYS_prctl, [1, 0, 0, 0, 0, 0]),
            ("ioctl", libc::SYS_ioctl, [2, 0x5412, page, 0, 0, 0]),
            ("io_uring_setup", libc::SYS_io_uring_setup, [1, page, 0, 0, 0, 0]),
            ("bpf", libc::SYS_bpf, [0, page, 8, 0, 0, 0]),
            ("userfaultfd", libc::SYS_userfaultfd, [0; 6]),
            ("unshare", libc::SYS_unshare, [0x1000_0000, 0, 0, 0, 0, 0]),
            ("fcntl F_SETFL", libc::SYS_fcntl, [2, 4, 0, 0, 0, 0]),
            ("fcntl F_DUPFD", libc::SYS_fcntl, [2, 0, 0, 0, 0, 0]),
        ];
        let works = |number: i64, a: &[i64; 6]| {
            // SAFETY: each call is one that the filter must refuse before the kernel looks at its
            // arguments; those that point somewhere point to a live page or string.
            let got = unsafe { libc::syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]) };
            got != -1 || io::Error::last_os_error().raw_os_error() != Some(libc::EPERM)
        };
        calls.iter().filter(|(_, number, a)| works(*number, a)).map(|(name, ..)| *name).collect()
    }

    /// Names of what does not work though an engine needs it.
    fn allowed() -> Vec<&'static str> {
        let mut wrong = Vec::new();
        // Above the allocator's threshold: a mapping of its own, grown by mremap.
        let mut memory = vec![1u8; 8 << 20];
        memory.resize(16 << 20, 2);
        if memory.iter().map(|byte| u64::from(*byte)).sum::<u64>() != 24 << 20 {
            wrong.push("memory");
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
        // What a thread does at its start may come after the filter. EINVAL, not EPERM: asked wrongly.
        for (name, number) in [("rseq", libc::SYS_rseq), ("robust list", libc::SYS_set_robust_list)]
        {
            // SAFETY: with these lengths the kernel looks at no memory.
            let got = unsafe { libc::syscall(number, ptr::null::<u8>(), 0, 0, 0) };
            let error = io::Error::last_os_error().raw_os_error();
            if got != -1 || error == Some(libc::EPERM) {
                wrong.push(name);
            }
        }
        if std::panic::catch_unwind(|| panic!("on purpose")).is_ok() {
            wrong.push("panic");
        }
        wrong
    }
}
