//! Going through all files of a mount.
//!
//! Folders are users', who may change them meanwhile. So each name is opened beneath its folder's
//! descriptor, following no link and into no other mount, and looked at before it is opened for reading.
//! What is in memory is one folder's descriptor for each level.

use crate::file::{open_mount, reopen};
use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags};
use std::fs::File;
use std::io;
use std::path::Path;

/// Folders deeper than this are not gone into: each level takes a descriptor.
const DEPTH_MAX: usize = 64;

/// What comes next in a walk.
pub enum Step {
    File(File),
    /// Something that is no file with content.
    Other,
    /// A folder or file that cannot be looked at.
    Missed,
    End,
}

/// A walk through one mount.
pub struct Walk {
    folders: Vec<Dir>,
}

impl Walk {
    /// Begins at the root of the file system of `device` that is mounted there.
    ///
    /// # Errors
    /// NotFound when another one is; ENOTDIR when a file is mounted there.
    pub fn begin(device: u64, mount_point: &Path) -> io::Result<Self> {
        let root = open_mount(device, mount_point)?;
        Ok(Self { folders: vec![Dir::new(root)?] })
    }

    /// One step further.
    pub fn step(&mut self) -> Step {
        let Some(folder) = self.folders.last_mut() else { return Step::End };
        let entry = match folder.read() {
            Some(Ok(entry)) => entry,
            ended => {
                self.folders.pop();
                return if ended.is_some() { Step::Missed } else { Step::Other };
            }
        };
        let name = entry.file_name();
        let is_wanted = matches!(
            entry.file_type(),
            FileType::Directory | FileType::RegularFile | FileType::Unknown
        );
        if !is_wanted || matches!(name.to_bytes(), b"." | b"..") {
            return Step::Other;
        }
        let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let Ok(above) = folder.fd() else { return Step::Missed };
        let found = rustix::fs::openat2(above, name, flags, Mode::empty(), resolve);
        let found = match found {
            Ok(found) => found,
            // Removed meanwhile, or another mount's.
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::XDEV | rustix::io::Errno::LOOP) => {
                return Step::Other;
            }
            Err(_) => return Step::Missed,
        };
        let Ok(stat) = rustix::fs::fstat(&found) else { return Step::Missed };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile if stat.st_size > 0 => {
                reopen(&found, OFlags::NOATIME).map_or(Step::Missed, |file| Step::File(file.into()))
            }
            FileType::Directory if self.folders.len() == DEPTH_MAX => Step::Missed,
            FileType::Directory => {
                let flags = OFlags::DIRECTORY | OFlags::NOATIME;
                match reopen(&found, flags).and_then(|folder| Ok(Dir::new(folder)?)) {
                    Ok(folder) => {
                        self.folders.push(folder);
                        Step::Other
                    }
                    Err(_) => Step::Missed,
                }
            }
            _ => Step::Other,
        }
    }
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
                Step::Missed => missed += 1,
                Step::End => break,
            }
        }
        found.sort();
        assert_eq!(found, ["a/b/c/three", "a/two", "one"]);
        assert_eq!(missed, 1, "what is too deep is told");
        assert!(Walk::begin(device + 1, root).is_err());
    }
}
