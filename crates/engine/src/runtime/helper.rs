//! A program that an engine needs besides itself, in a sandbox of its own.
//!
//! For what cannot live under an engine's own allow list because it opens files and starts threads while it
//! works: clamd. It gets one listening socket and no way to make another, reads and writes only the folders
//! named, has the engine's memory limit, and dies with the engine.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use landlock::{
    ABI, Access, AccessFs, AccessNet, RulesetAttr, RulesetCreatedAttr, Scope, path_beneath_rules,
};
use seccompiler::{SeccompAction, SeccompFilter};

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
/// The program cannot be started, or its sandbox not be entered.
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
    let filter = filter().map_err(io::Error::other)?;
    sys::prepare_helper(&mut command, listener, move || {
        enter_landlock(&folders).map_err(io::Error::other)?;
        sys::drop_capabilities()?;
        seccompiler::apply_filter(&filter).map_err(io::Error::other)
    });
    command.spawn()
}

fn enter_landlock(folders: &HelperFolders) -> Result<(), landlock::RulesetError> {
    let abi = ABI::V6;
    let read = AccessFs::from_read(abi);
    landlock::Ruleset::default()
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?
        .add_rules(path_beneath_rules(SYSTEM, read))?
        .add_rules(path_beneath_rules(["/dev/null"], AccessFs::from_file(abi)))?
        .add_rules(path_beneath_rules(&folders.read, read))?
        .add_rules(path_beneath_rules(&folders.write, AccessFs::from_all(abi)))?
        .restrict_self()?;
    Ok(())
}

/// What a program that only answers on the socket it was given never does. A list of what is forbidden is
/// weaker than one of what is allowed; what clamd and its libraries call is not ours to know.
fn filter() -> Result<seccompiler::BpfProgram, seccompiler::BackendError> {
    let rules = FORBIDDEN.iter().map(|number| (*number, Vec::new())).collect();
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    let arch = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch)?.try_into()
}

const FORBIDDEN: &[i64] = &[
    // other ways to talk
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    // other processes
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
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
