//! What the driver knows of a file: its identity, and whether it is old enough to be remembered.

use crate::truth::ShownPath;
use rustix::fs::{FileType, Mode, OFlags, Stat};
use seawall_fanotify::FileHandle;
use seawall_proto::golden::Origin;
use seawall_proto::remedy::{FileIdentity, Time};
use seawall_proto::{FailMode, FileMetadata};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

/// A file whose ctime is younger than this when its read begins may change again without a change of
/// its times: two ticks of the slowest kernel clock in use (100 Hz).
const TWO_TICKS: Duration = Duration::from_millis(20);

/// A file's identity. As long as it stays the same, so does the content (but for the stated limit of
/// shared writable mappings).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    pub device: u64,
    pub inode: u64,
    pub size: u64,
    mtime: (i64, u64),
    ctime: (i64, u64),
}

impl Identity {
    /// As a golden image has it; `born` is what statx(2) says besides.
    pub fn origin(self, fs_type: u64, fs_id: u64, born: Time) -> Origin {
        let FileIdentity { inode, size, modified, changed, .. } = self.to_proto();
        Origin { fs_type, fs_id, inode, size, modified, changed, born }
    }

    /// As the host gets it.
    pub fn to_proto(self) -> FileIdentity {
        let time = |(seconds, nanos): (i64, u64)| (seconds, u32::try_from(nanos).unwrap_or(0));
        FileIdentity {
            device: self.device,
            inode: self.inode,
            size: self.size,
            modified: time(self.mtime),
            changed: time(self.ctime),
        }
    }
}

/// A file's identity and what else one fstat tells.
#[derive(Debug, Clone, Copy)]
pub struct Look {
    pub identity: Identity,
    pub is_regular: bool,
    /// Its owner's user id.
    pub owner: u32,
    /// How many names it has.
    pub links: u64,
    /// Whether another user than root may write it by its mode.
    pub user_writable: bool,
    /// Whether another user than root could come to write it: its owner can change its mode.
    pub user_changeable: bool,
    /// Whether its last change is long enough ago for it to be remembered.
    pub settled: bool,
    /// Whether somebody had it open for writing when it was read; false before anybody has looked.
    pub written: bool,
    /// Whether it was the same after its read, and nobody had it open for writing; false before anybody has looked.
    pub steady: bool,
}

impl Look {
    /// Looks at an open file.
    pub fn at(file: impl AsFd) -> rustix::io::Result<Self> {
        let stat = rustix::fs::fstat(file)?;
        let identity = Identity {
            device: stat.st_dev,
            inode: stat.st_ino,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            mtime: (stat.st_mtime, stat.st_mtime_nsec),
            ctime: (stat.st_ctime, stat.st_ctime_nsec),
        };
        Ok(Self {
            identity,
            is_regular: FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile,
            owner: stat.st_uid,
            links: stat.st_nlink,
            user_writable: user_writable(&stat),
            user_changeable: stat.st_uid != 0 || stat.st_mode & 0o022 != 0,
            settled: is_settled(identity.ctime),
            written: false,
            steady: false,
        })
    }

    /// Looks once more, after the read.
    pub fn again(self, file: impl AsFd) -> Self {
        let same = Self::at(&file).is_ok_and(|now| now.identity == self.identity);
        let written = seawall_fanotify::is_open_for_writing(file.as_fd()).unwrap_or(true);
        Self { steady: same && !written && !self.written, ..self }
    }
}

impl Look {
    /// Whether its last change was before this time.
    pub fn changed_before(&self, time: Time) -> bool {
        let (seconds, nanoseconds) = self.identity.ctime;
        (seconds, nanoseconds) < (time.0, time.1.into())
    }

    /// Whether it changed within so many seconds, or in the future.
    pub fn changed_within(&self, seconds: i64) -> bool {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse).tv_sec;
        self.identity.ctime.0 >= now - seconds
    }
}

fn user_writable(stat: &Stat) -> bool {
    let mode = stat.st_mode;
    mode & 0o002 != 0
        || (mode & 0o020 != 0 && stat.st_gid != 0)
        || (mode & 0o200 != 0 && stat.st_uid != 0)
}

/// File times come from the coarse clock, so that is what they are compared with. A time in the
/// future is not settled.
fn is_settled(ctime: (i64, u64)) -> bool {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
    let nanos = |seconds: i64, nanos: i128| i128::from(seconds) * 1_000_000_000 + nanos;
    let age = nanos(now.tv_sec, now.tv_nsec.into()) - nanos(ctime.0, ctime.1.into());
    age > i128::try_from(TWO_TICKS.as_nanos()).unwrap_or(i128::MAX)
}

/// What the host is told of a file.
pub fn metadata(shown: ShownPath, identity: &Identity, pid: u32) -> FileMetadata {
    FileMetadata {
        path: serde_bytes::ByteBuf::from(shown.path),
        path_is_true: shown.is_true,
        inode: (identity.device, identity.inode),
        size: identity.size,
        pid,
    }
}

/// Opens what is mounted at `mount_point` if it is the file system of `device` (`st_dev`). What it is
/// is looked at before it is opened: its folder may be a user's, who may put a device in its place.
///
/// # Errors
/// NotFound when something else is there.
pub fn open_mount(device: u64, mount_point: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let found = rustix::fs::open(mount_point, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&found)?;
    let is_file_or_folder = matches!(
        FileType::from_raw_mode(stat.st_mode),
        FileType::Directory | FileType::RegularFile
    );
    if stat.st_dev != device || !is_file_or_folder {
        return Err(io::ErrorKind::NotFound.into());
    }
    reopen(&found, OFlags::empty())
}

/// Opens for reading what was found by an O_PATH descriptor.
pub fn reopen(found: &OwnedFd, flags: OFlags) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", found.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY | flags;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Opens a file of the file system that is mounted at `mount_point`.
///
/// # Errors
/// ESTALE when the file is gone; NotFound when another file system is mounted there.
pub fn open_handle(handle: &FileHandle, mount_point: &Path) -> io::Result<File> {
    handle.open(open_mount(handle.device, mount_point)?)
}

/// A fail mode as a number other than 0, for the memory that worker and supervisor share.
pub fn mode_number(mode: FailMode) -> u32 {
    match mode {
        FailMode::Open => 1,
        FailMode::Closed => 2,
        FailMode::ClosedIfUserWritable => 3,
    }
}

/// Back from [`mode_number`]; `default` for anything else.
pub fn mode_from_number(number: u32, default: FailMode) -> FailMode {
    let all = [FailMode::Open, FailMode::Closed, FailMode::ClosedIfUserWritable];
    all.into_iter().find(|mode| mode_number(*mode) == number).unwrap_or(default)
}

/// Whether fail mode lets an access to this file go on.
pub fn fails_open(mode: FailMode, look: &Look) -> bool {
    match mode {
        FailMode::Open => true,
        FailMode::Closed => false,
        FailMode::ClosedIfUserWritable => !look.user_writable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_file_just_written_is_not_settled_and_later_is() {
        let file = tempfile::tempfile().unwrap();
        assert!(!Look::at(&file).unwrap().settled);
        std::thread::sleep(Duration::from_millis(60));
        assert!(Look::at(&file).unwrap().settled);
    }

    #[test]
    fn who_may_write_decides_the_fail_mode_of_exec() {
        let file = tempfile::tempfile().unwrap();
        let look = |mode| {
            file.set_permissions(PermissionsExt::from_mode(mode)).unwrap();
            Look::at(&file).unwrap()
        };
        if !rustix::process::geteuid().is_root() {
            return;
        }
        assert!(look(0o775).user_changeable && !look(0o755).user_changeable);
        for (mode, opens) in [(0o755, true), (0o757, false), (0o775, true)] {
            assert_eq!(fails_open(FailMode::ClosedIfUserWritable, &look(mode)), opens, "{mode:o}");
        }
        std::os::unix::fs::fchown(&file, Some(1000), None).unwrap();
        assert!(!fails_open(FailMode::ClosedIfUserWritable, &look(0o755)));
        assert!(fails_open(FailMode::ClosedIfUserWritable, &look(0o555)));
        assert!(look(0o555).user_changeable);
    }
}
