//! A path counts only if it is true.
//!
//! Bind mounts, overlays and user namespaces let an unprivileged user show any path. So the path that
//! the kernel shows for an open file is looked up again in the driver's own namespace, without
//! following symlinks, and counts only when that gives the same device and inode. The look-up uses
//! only what the kernel has in its directory cache (RESOLVE_CACHED, openat2(2)): it was filled by the
//! open that waits, and nothing here may wait for a disk, a network or an automount.

use rustix::fs::{Mode, OFlags, ResolveFlags};
use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;

/// The path of an open file as the driver sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ShownPath {
    /// The path; empty where the kernel shows none.
    pub path: Vec<u8>,
    /// Whether it leads to this very file.
    pub is_true: bool,
}

impl ShownPath {
    /// The path, where it is true.
    pub fn if_true(&self) -> Option<&[u8]> {
        self.is_true.then_some(self.path.as_slice())
    }
}

/// The program that a process runs, where it is wanted and its path is true, and the real user id that it runs as. Before
/// it is known to be wanted, nothing is asked of its file system: that may be a server's that does not answer.
pub fn program_of(pid: u32, is_wanted: impl FnOnce(&[u8], u32) -> bool) -> Option<(Vec<u8>, u32)> {
    let link = format!("/proc/{pid}/exe");
    let path = rustix::fs::readlink(&link, Vec::new()).ok()?.into_bytes();
    let user = user_of(pid).filter(|user| is_wanted(&path, *user))?;
    let found = cached_stat(rustix::fs::CWD, &link)?;
    leads_to(&path, found.0, found.1, ResolveFlags::CACHED).then_some((path, user))
}

/// Which inode: its number is another's once it is gone, with another time of birth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Born {
    /// `st_dev` of stat(2).
    pub device: u64,
    pub inode: u64,
    /// Seconds and nanoseconds of its birth, which nobody can set (`stx_btime` of statx(2)); none where its file system
    /// keeps none.
    pub at: Option<(i64, u32)>,
}

/// Which inode a file is, as the kernel knows it without asking anybody (AT_STATX_DONT_SYNC, statx(2)).
pub fn born(at: impl AsFd, path: &str) -> Option<Born> {
    use rustix::fs::{AtFlags, StatxFlags, makedev, statx};
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::EMPTY_PATH;
    let found = statx(at, path, flags, StatxFlags::INO | StatxFlags::BTIME).ok()?;
    let has_birth = found.stx_mask & StatxFlags::BTIME.bits() != 0;
    Some(Born {
        device: makedev(found.stx_dev_major, found.stx_dev_minor),
        inode: found.stx_ino,
        at: has_birth.then_some((found.stx_btime.tv_sec, found.stx_btime.tv_nsec)),
    })
}

/// Device and inode of a file, as the kernel knows them without asking anybody.
pub fn cached_stat(at: impl AsFd, path: &str) -> Option<(u64, u64)> {
    born(at, path).map(|found| (found.device, found.inode))
}

/// The real user id of a process: the owner of its folder in /proc is the effective one.
pub fn user_of(pid: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let users = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    users.split_ascii_whitespace().next()?.parse().ok()
}

/// The path of `file`, which is the given device and inode.
pub fn shown_path(file: impl AsFd, device: u64, inode: u64) -> ShownPath {
    let Some(path) = path_of(file) else { return ShownPath::default() };
    let is_true = leads_to(&path, device, inode, ResolveFlags::CACHED);
    ShownPath { path, is_true }
}

/// The same path if it leads to this very file. May wait for a disk: not for the answer path.
pub fn true_path(file: impl AsFd, device: u64, inode: u64) -> Option<Vec<u8>> {
    let path = path_of(file)?;
    leads_to(&path, device, inode, ResolveFlags::empty()).then_some(path)
}

/// The path that the kernel shows, true or not.
pub fn path_of(file: impl AsFd) -> Option<Vec<u8>> {
    let link = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    Some(rustix::fs::readlink(link, Vec::new()).ok()?.into_bytes())
}

fn leads_to(path: &[u8], device: u64, inode: u64, how: ResolveFlags) -> bool {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_SYMLINKS | how;
    let path = OsStr::from_bytes(path);
    let Ok(found) = rustix::fs::openat2(rustix::fs::CWD, path, flags, Mode::empty(), resolve)
    else {
        return false;
    };
    if resolve.contains(ResolveFlags::CACHED) {
        return cached_stat(&found, "") == Some((device, inode));
    }
    rustix::fs::fstat(found).is_ok_and(|found| (found.st_dev, found.st_ino) == (device, inode))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::Look;
    use std::fs::File;

    fn shown(path: &std::path::Path) -> ShownPath {
        let file = File::open(path).unwrap();
        let identity = Look::at(&file).unwrap().identity;
        shown_path(&file, identity.device, identity.inode)
    }

    #[test]
    fn a_plain_file_shows_a_true_path_and_a_deleted_one_does_not() {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = folder.path().join("x");
        std::fs::write(&path, "x").unwrap();
        assert_eq!(
            shown(&path),
            ShownPath { path: path.as_os_str().as_bytes().into(), is_true: true }
        );
        let file = File::open(&path).unwrap();
        let identity = Look::at(&file).unwrap().identity;
        std::fs::remove_file(&path).unwrap();
        assert!(!shown_path(&file, identity.device, identity.inode).is_true);
        std::fs::write(folder.path().join("x (deleted)"), "another").unwrap();
        assert!(!shown_path(&file, identity.device, identity.inode).is_true);
    }

    #[test]
    fn a_program_has_a_true_path_and_its_user() {
        let (path, user) = program_of(std::process::id(), |_, _| true).unwrap();
        let own = std::env::current_exe().unwrap();
        assert_eq!(path, own.as_os_str().as_bytes());
        assert_eq!(user, rustix::process::getuid().as_raw());
        assert_eq!(program_of(u32::MAX, |_, _| true), None);
        assert_eq!(program_of(std::process::id(), |_, _| false), None);
    }
}
