//! Files of golden images: what the host knows of them by their fingerprints.
//!
//! A fingerprint is only as good as whoever made its file system. Inode numbers and times on a stick are whatever its maker
//! wanted, so only file systems count that root alone can have mounted: one that `mount` or udisks lets a user mount is
//! mounted nosuid. What is mounted where is found out by the thread that keeps the coverage, and looked up here.

use crate::driver::Driver;
use crate::file::Look;
use seawall_proto::{Fingerprint, Golden};
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// `f_type` and `f_fsid` of a file system (statfs(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileSystem {
    fs_type: u64,
    fs_id: u64,
}

impl FileSystem {
    fn of(fd: impl AsFd) -> rustix::io::Result<Self> {
        let fs_type = rustix::fs::fstatfs(&fd)?.f_type;
        let fs_id = rustix::fs::fstatvfs(fd)?.f_fsid;
        Ok(Self { fs_type: fs_type as u64, fs_id })
    }
}

/// File systems whose files' fingerprints count, by the `st_dev` of these.
#[derive(Debug, Default)]
pub struct FileSystems(Mutex<HashMap<u64, FileSystem>>);

impl FileSystems {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, FileSystem>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn of(&self, device: u64) -> Option<FileSystem> {
        self.lock().get(&device).copied()
    }

    /// A file system is gone: its device number may come to belong to another one.
    pub fn forget(&self, device: u64) {
        self.lock().remove(&device);
    }
}

/// Finds out which file systems count.
pub fn look(driver: &Driver) {
    let wants = driver.session().is_some_and(|session| session.golden() != Golden::default());
    if !wants {
        return driver.file_systems.lock().clear();
    }
    let Ok(mountinfo) = std::fs::read("/proc/self/mountinfo") else { return };
    let mounts = crate::mounts::parse(&mountinfo);
    let is_roots = |id| mounts.iter().any(|mount| mount.id == Some(id) && mount.is_roots);
    let reached = driver.coverage.reached();
    let file_system = |(device, path): (u64, PathBuf)| {
        // Another one may be mounted there by now. What is mounted elsewhere has a number that is not here.
        let fd = crate::file::open_mount(device, &path).ok()?;
        crate::coverage::mount_id(&fd).filter(|id| is_roots(*id))?;
        Some((device, FileSystem::of(fd).ok()?))
    };
    let found = reached.into_iter().filter_map(file_system).collect();
    *driver.file_systems.lock() = found;
}

/// A file's fingerprint, where that counts for anything.
pub fn fingerprint(driver: &Driver, file: BorrowedFd<'_>, look: &Look) -> Option<Fingerprint> {
    // A write may reach the disk before the change time does, if the machine loses power between.
    if !look.settled || look.user_changeable {
        return None;
    }
    let FileSystem { fs_type, fs_id } = driver.file_systems.of(look.identity.device)?;
    let born = crate::truth::born(file, "")?.at?;
    look.identity.origin(fs_type, fs_id, born).fingerprint()
}
