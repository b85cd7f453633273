//! A program that an engine needs besides itself, in a sandbox of its own.
//!
//! For what cannot live under an engine's own allow list because it opens files and starts threads while it
//! works: clamd. It gets one listening socket and no way to make another, reads and writes only the folders
//! named, has the engine's memory limit, and dies with the engine.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use landlock::{
    ABI, Access, AccessFs, AccessNet, RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
    path_beneath_rules,
};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen as Length, SeccompCmpOp as Op,
    SeccompCondition, SeccompFilter, SeccompRule,
};

use crate::sys;

/// What programs need to start at all: themselves, their libraries, and how those are configured.
const SYSTEM: [&str; 5] =
    ["/usr", "/etc/ld.so.cache", "/etc/localtime", "/etc/ssl/openssl.cnf", "/dev/urandom"];

/// Folders and files that a helper may use.
#[derive(Clone, Debug, Default)]
pub struct HelperFolders {
    /// To be read only.
    pub read: Vec<PathBuf>,
    /// To be read and written.
    pub write: Vec<PathBuf>,
}

/// Starts `program` with `listener` as descriptor 3, in the way of sd_listen_fds(3). Only while an engine
/// loads: it forks, and the process may have one thread then.
///
/// # Errors
/// The program cannot be started, or its sandbox not be entered; the kernel has no Landlock.
pub fn start_helper(
    program: &[String],
    listener: BorrowedFd<'_>,
    folders: HelperFolders,
) -> io::Result<Child> {
    // The number of the process is known only in it.
    let script = "export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$@\"";
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script, "sh"]).args(program).env_clear().stdin(Stdio::null());
    // Takes number 3 if nobody has it.
    let _three = sys::duplicate(listener)?;
    sys::prepare_helper(&mut command, listener, move || {
        enter_landlock(&folders).map_err(io::Error::other)?;
        sys::drop_capabilities()?;
        for filter in filters(std::process::id()).map_err(io::Error::other)? {
            seccompiler::apply_filter(&filter).map_err(io::Error::other)?;
        }
        Ok(())
    });
    command.spawn()
}

fn enter_landlock(folders: &HelperFolders) -> io::Result<()> {
    let abi = ABI::V6;
    let read = AccessFs::from_read(abi);
    let enter = || -> Result<_, landlock::RulesetError> {
        landlock::Ruleset::default()
            .handle_access(AccessFs::from_all(abi))?
            .handle_access(AccessNet::from_all(abi))?
            .scope(Scope::from_all(abi))?
            .create()?
            .add_rules(path_beneath_rules(SYSTEM, read))?
            .add_rules(path_beneath_rules(["/dev/null"], AccessFs::from_file(abi)))?
            .add_rules(path_beneath_rules(&folders.read, read))?
            .add_rules(path_beneath_rules(&folders.write, AccessFs::from_all(abi)))?
            .restrict_self()
    };
    // An older one lacks the network, signals and truncate(2): those the filters forbid as well.
    if enter().map_err(io::Error::other)?.ruleset == RulesetStatus::NotEnforced {
        return Err(io::Error::other(
            "this kernel has no Landlock: the program could read every file",
        ));
    }
    Ok(())
}

/// What a program that only answers on the socket it was given never does. A list of what is forbidden is
/// weaker than one of what is allowed; what clamd and its libraries call is not ours to know.
fn filters(pid: u32) -> Result<Vec<BpfProgram>, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for number in FORBIDDEN {
        rules.insert(*number, Vec::new());
    }
    // Threads, and no processes: a child would outlive its parent.
    let no_thread = condition(0, Op::MaskedEq(libc::CLONE_THREAD as u64), 0)?;
    rules.insert(libc::SYS_clone, vec![SeccompRule::new(vec![no_thread])?]);
    // Signals and limits for itself.
    let other = condition(0, Op::Ne, pid.into())?;
    rules.insert(libc::SYS_tgkill, vec![SeccompRule::new(vec![other])?]);
    let another = vec![condition(0, Op::Ne, 0)?, condition(0, Op::Ne, pid.into())?];
    rules.insert(libc::SYS_prlimit64, vec![SeccompRule::new(another)?]);
    // An older Landlock lets a file be opened for reading and cut at once.
    let cut = (libc::O_TRUNC | libc::O_ACCMODE) as u64;
    let truncates = |argument| condition(argument, Op::MaskedEq(cut), libc::O_TRUNC as u64);
    rules.insert(libc::SYS_open, vec![SeccompRule::new(vec![truncates(1)?])?]);
    rules.insert(libc::SYS_openat, vec![SeccompRule::new(vec![truncates(2)?])?]);
    // The same calls by their x32 numbers, where a kernel has them.
    let x32: Vec<i64> = rules.keys().map(|number| number | X32).collect();
    rules.extend(x32.into_iter().map(|number| (number, Vec::new())));
    // Its flags lie in memory, where no filter looks: the C library takes clone(2) instead.
    let missing = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let program = |rules, errno: i32| -> Result<BpfProgram, BackendError> {
        let (pass, refuse) = (SeccompAction::Allow, SeccompAction::Errno(errno as u32));
        SeccompFilter::new(rules, pass, refuse, std::env::consts::ARCH.try_into()?)?.try_into()
    };
    Ok(vec![program(rules, libc::EPERM)?, program(missing, libc::ENOSYS)?])
}

fn condition(argument: u8, op: Op, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, Length::Dword, op, value)
}

/// Marks a system call's number as one of the x32 interface.
const X32: i64 = 0x4000_0000;
/// fchmodat2(2), which the library does not name.
const SYS_FCHMODAT2: i64 = 452;

const FORBIDDEN: &[i64] = &[
    // other ways to talk
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // other processes
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_setsid,
    libc::SYS_setpgid,
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_pidfd_send_signal,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_setpriority,
    libc::SYS_ioprio_set,
    libc::SYS_sched_setscheduler,
    libc::SYS_sched_setparam,
    libc::SYS_sched_setattr,
    libc::SYS_sched_setaffinity,
    // what an owner may do to a file without opening it
    libc::SYS_chmod,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    SYS_FCHMODAT2,
    libc::SYS_chown,
    libc::SYS_fchown,
    libc::SYS_lchown,
    libc::SYS_fchownat,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_fsetxattr,
    libc::SYS_removexattr,
    libc::SYS_lremovexattr,
    libc::SYS_fremovexattr,
    libc::SYS_utime,
    libc::SYS_utimes,
    libc::SYS_futimesat,
    libc::SYS_utimensat,
    libc::SYS_truncate,
    // namespaces and mounts
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsmount,
    libc::SYS_open_by_handle_at,
    // the kernel's rarer doors
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
];
