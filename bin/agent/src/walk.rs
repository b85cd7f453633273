//! Going through all files of a mount, or beneath a folder.
//!
//! Folders are users', who may change them meanwhile. So each name is opened beneath its folder's
//! descriptor, following no link and into no other mount, and looked at before it is opened for reading.
//! What is in memory is one folder's descriptor for each level. Where a walk is can be told, and another one
//! begun there: the folders' names, and how far each was read.

use crate::file::{open_mount, reopen};
use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags};
use serde::{Deserialize, Serialize};
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

/// Folders deeper than this are not gone into: each level takes a descriptor.
const DEPTH_MAX: usize = 64;

/// What comes next in a walk.
pub enum Step {
    File(File),
    /// Something that is no file with content.
    Other,
    /// A folder or file that cannot be looked at.
    Missed(&'static str),
    End,
}

/// A folder on the way to where a walk is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Level {
    /// Its name in the folder above; empty for the first.
    name: serde_bytes::ByteBuf,
    /// How far it was read (`d_off`, getdents64(2)).
    offset: i64,
}

/// A walk through one mount.
pub struct Walk {
    folders: Vec<(Dir, Level)>,
    /// A file where it began, which is all there is.
    file: Option<File>,
}

impl Walk {
    /// Begins at the root of the file system of `device` that is mounted there.
    ///
    /// # Errors
    /// NotFound when another one is; ENOTDIR when a file is mounted there.
    pub fn begin(device: u64, mount_point: &Path) -> io::Result<Self> {
        Self::of_folder(open_mount(device, mount_point)?)
    }

    /// Begins at a file or folder; no link leads there.
    ///
    /// # Errors
    /// When it cannot be opened, or is something else.
    pub fn beneath(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let resolve = ResolveFlags::NO_SYMLINKS;
        let found = rustix::fs::openat2(rustix::fs::CWD, path, flags, Mode::empty(), resolve)?;
        match FileType::from_raw_mode(rustix::fs::fstat(&found)?.st_mode) {
            FileType::Directory => Self::of_folder(reopen(&found, OFlags::DIRECTORY)?),
            FileType::RegularFile => {
                let file = Some(reopen(&found, OFlags::NOATIME)?.into());
                Ok(Self { folders: Vec::new(), file })
            }
            _ => Err(io::Error::other("neither a file nor a folder")),
        }
    }

    fn of_folder(root: OwnedFd) -> io::Result<Self> {
        let level = Level { name: serde_bytes::ByteBuf::new(), offset: 0 };
        Ok(Self { folders: vec![(Dir::new(root)?, level)], file: None })
    }

    /// Where it is.
    pub fn place(&self) -> Vec<Level> {
        self.folders.iter().map(|(_, level)| level.clone()).collect()
    }

    /// Goes to where another walk of the same folder was. Folders that are gone by now are left out.
    pub fn go_to(&mut self, place: &[Level]) {
        for (depth, level) in place.iter().enumerate() {
            if depth > 0 {
                let Ok(name) = std::ffi::CString::new(level.name.as_slice()) else { return };
                let Some((above, _)) = self.folders.last() else { return };
                let folder = above.fd().ok().and_then(|above| {
                    let found = look_up(above, &name).ok()?;
                    reopen(&found, OFlags::DIRECTORY | OFlags::NOATIME).ok()
                });
                let Some(folder) = folder.and_then(|folder| Dir::new(folder).ok()) else { return };
                self.folders.push((folder, level.clone()));
            }
            let Some((folder, own)) = self.folders.last_mut() else { return };
            if level.offset != 0 && folder.seek(level.offset).is_err() {
                folder.rewind();
                own.offset = 0;
                return;
            }
            own.offset = level.offset;
        }
    }

    /// The folder that it is in.
    pub fn folder(&self) -> Option<BorrowedFd<'_>> {
        self.folders.last().and_then(|(folder, _)| folder.fd().ok())
    }

    /// One step further.
    pub fn step(&mut self) -> Step {
        let Some((folder, level)) = self.folders.last_mut() else {
            return self.file.take().map_or(Step::End, Step::File);
        };
        let entry = match folder.read() {
            Some(Ok(entry)) => entry,
            ended => {
                self.folders.pop();
                return if ended.is_some() { Step::Missed("unreadable") } else { Step::Other };
            }
        };
        level.offset = entry.offset();
        let name = entry.file_name();
        let is_wanted = matches!(
            entry.file_type(),
            FileType::Directory | FileType::RegularFile | FileType::Unknown
        );
        if !is_wanted || matches!(name.to_bytes(), b"." | b"..") {
            return Step::Other;
        }
        let Ok(above) = folder.fd() else { return Step::Missed("unreadable") };
        let found = match look_up(above, name) {
            Ok(found) => found,
            // Removed meanwhile, or another mount's.
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::XDEV | rustix::io::Errno::LOOP) => {
                return Step::Other;
            }
            Err(_) => return Step::Missed("unreadable"),
        };
        let Ok(stat) = rustix::fs::fstat(&found) else { return Step::Missed("unreadable") };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile if stat.st_size > 0 => reopen(&found, OFlags::NOATIME)
                .map_or(Step::Missed("unreadable"), |file| Step::File(file.into())),
            FileType::Directory if self.folders.len() == DEPTH_MAX => {
                Step::Missed("folders are too deep")
            }
            FileType::Directory => {
                let flags = OFlags::DIRECTORY | OFlags::NOATIME;
                match reopen(&found, flags).and_then(|folder| Ok(Dir::new(folder)?)) {
                    Ok(folder) => {
                        let name = serde_bytes::ByteBuf::from(name.to_bytes());
                        self.folders.push((folder, Level { name, offset: 0 }));
                        Step::Other
                    }
                    Err(_) => Step::Missed("unreadable"),
                }
            }
            _ => Step::Other,
        }
    }
}

/// Finds a name beneath a folder, following no link and into no other mount.
fn look_up(above: BorrowedFd<'_>, name: &CStr) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    rustix::fs::openat2(above, name, flags, Mode::empty(), resolve)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn it_finds_every_file_and_follows_no_link() {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let root = folder.path();
        std::fs::create_dir_all(root.join("a/b/c")).unwrap();
        for name in ["one", "a/two", "a/b/c/three"] {
            std::fs::write(root.join(name), name).unwrap();
        }
        std::fs::write(root.join("empty"), "").unwrap();
        std::os::unix::fs::symlink("/etc", root.join("a/link")).unwrap();
        std::os::unix::fs::symlink("one", root.join("link")).unwrap();
        let deep = (0..DEPTH_MAX).fold(root.join("deep"), |path, _| path.join("d"));
        std::fs::create_dir_all(&deep).unwrap();
        let device = root.metadata().unwrap().dev();
        let mut walk = Walk::begin(device, root).unwrap();
        let (mut found, mut missed) = (Vec::new(), 0);
        loop {
            match walk.step() {
                Step::File(mut file) => {
                    let mut text = String::new();
                    file.read_to_string(&mut text).unwrap();
                    found.push(text);
                }
                Step::Other => (),
                Step::Missed(_) => missed += 1,
                Step::End => break,
            }
        }
        found.sort();
        assert_eq!(found, ["a/b/c/three", "a/two", "one"]);
        assert_eq!(missed, 1, "what is too deep is told");
        assert!(Walk::begin(device + 1, root).is_err());
    }

    fn files_of(walk: &mut Walk, most: usize) -> Vec<String> {
        let mut found = Vec::new();
        while found.len() < most {
            match walk.step() {
                Step::File(mut file) => {
                    let mut text = String::new();
                    file.read_to_string(&mut text).unwrap();
                    found.push(text);
                }
                Step::End => break,
                Step::Other | Step::Missed(_) => (),
            }
        }
        found
    }

    #[test]
    fn another_walk_goes_on_where_one_was() {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let root = folder.path();
        for (folder, file) in (0..5).flat_map(|a| (0..7).map(move |b| (a, b))) {
            let folder = root.join(format!("{folder}/deep"));
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join(file.to_string()), format!("{}", folder.display())).unwrap();
        }
        let all = files_of(&mut Walk::beneath(root).unwrap(), usize::MAX);
        assert_eq!(all.len(), 35);
        for most in 0..36 {
            let mut first = Walk::beneath(root).unwrap();
            let mut found = files_of(&mut first, most);
            let mut second = Walk::beneath(root).unwrap();
            second.go_to(&first.place());
            found.extend(files_of(&mut second, usize::MAX));
            assert_eq!(found, all, "after {most}");
        }
        // The folder that it was in is gone: it goes on behind it.
        let mut first = Walk::beneath(root).unwrap();
        let before = files_of(&mut first, 10);
        let gone = root.join(Path::new(&before[9]).strip_prefix(root).unwrap());
        std::fs::remove_dir_all(gone.parent().unwrap()).unwrap();
        let mut second = Walk::beneath(root).unwrap();
        second.go_to(&first.place());
        let mut rest = files_of(&mut second, usize::MAX);
        rest.sort();
        let mut left: Vec<_> = all.iter().filter(|file| !before.contains(file)).cloned().collect();
        left.sort();
        assert_eq!(rest, left);
    }

    #[test]
    fn a_single_file_is_all_there_is() {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = folder.path().join("x");
        std::fs::write(&path, "x").unwrap();
        assert_eq!(files_of(&mut Walk::beneath(&path).unwrap(), usize::MAX), ["x"]);
        assert!(Walk::beneath(Path::new("/dev/null")).is_err());
    }
}
