//! Files of this host, by path or by descriptor: opened where clients may look, and copied once.
//!
//! A path is taken apart beneath the folders that the configuration names: it is their descriptor from
//! which the kernel looks it up, and it does not leave them, whatever links and folders are swapped
//! meanwhile. It is looked at before it is opened for reading, so that nothing waits for a FIFO.
//! Everything here may wait for a disk.

use crate::config::ScanPath;
use crate::copy::{CopyError, PrivateCopy, Share};
use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Component, Path};
use std::sync::Arc;

/// Folders deeper than this are not gone into: each level takes a descriptor.
const DEPTH_MAX: usize = 64;
/// Bytes that are read at once.
const PIECE: usize = 256 * 1024;

/// Why there is nothing to scan, in words that clamd's clients know.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error("Access denied.")]
    Denied,
    #[error("File path check failure: {}.", words(.0))]
    Path(#[source] io::Error),
    #[error("Not supported file type")]
    Special,
    #[error("Not a regular file")]
    NotRegular,
    #[error("Can't read file")]
    Read(#[source] io::Error),
    #[error("File size limit exceeded.")]
    TooLong,
    #[error("Error writing to temporary file")]
    NoRoom,
    #[error("Directory recursion limit reached")]
    TooDeep,
}

/// An error of the system without its number.
fn words(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

impl From<CopyError> for Fault {
    fn from(error: CopyError) -> Self {
        match error {
            CopyError::TooLong { .. } => Self::TooLong,
            CopyError::Spooled | CopyError::Store(_) => Self::NoRoom,
        }
    }
}

/// How long content may be, and whose memory it takes.
#[derive(Debug, Clone)]
pub struct Copying {
    pub share: Arc<Share>,
    pub limit: u64,
    /// The usual size, from which the room on disk follows.
    pub usual: u64,
}

impl Copying {
    /// An empty copy; on the heap, since it is large and goes from hand to hand.
    pub fn begin(&self) -> Box<PrivateCopy> {
        Box::new(PrivateCopy::new(Arc::clone(&self.share), self.limit, self.usual, Vec::new()))
    }

    /// Copies a regular file from its beginning, wherever whoever opened it stands in it.
    pub fn copy(&self, file: &File) -> Result<Box<PrivateCopy>, Fault> {
        let found = file.metadata().map_err(Fault::Read)?;
        if !found.is_file() {
            return Err(Fault::NotRegular);
        }
        if found.size() > self.limit {
            return Err(Fault::TooLong);
        }
        let mut copy = self.begin();
        let (mut piece, mut scratch) = (vec![0; PIECE], Vec::new());
        loop {
            let len = match file.read_at(&mut piece, copy.len()) {
                Ok(0) => return Ok(copy),
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Fault::Read(error)),
            };
            add(&mut copy, &piece[..len], &mut scratch)?;
        }
    }
}

/// Adds bytes that are ours already.
pub fn add(copy: &mut PrivateCopy, bytes: &[u8], scratch: &mut Vec<u8>) -> Result<(), CopyError> {
    copy.append(bytes.len(), scratch, |to| {
        to.copy_from_slice(bytes);
        Ok(())
    })
}

/// What a path leads to.
#[derive(Debug)]
pub enum Target {
    File(File),
    Folder(Walk),
}

/// Opens what clients may have scanned.
///
/// # Errors
/// [`Fault::Denied`] for all that is outside of `allowed`, whether it is there or not.
pub fn open(allowed: &[ScanPath], path: &[u8]) -> Result<Target, Fault> {
    let path = Path::new(std::ffi::OsStr::from_bytes(path));
    let climbs = path.components().any(|part| part == Component::ParentDir);
    if !path.is_absolute() || climbs {
        return Err(Fault::Denied);
    }
    // The innermost counts, so that a link out of one folder into it is none out of the other.
    let within = allowed.iter().filter(|allowed| path.starts_with(&allowed.0));
    let root = within.max_by_key(|allowed| allowed.0.components().count()).ok_or(Fault::Denied)?;
    let rest = path.strip_prefix(&root.0).map_err(|_| Fault::Denied)?;
    let found = look_up(&root.0, rest).map_err(|error| match error {
        Errno::XDEV | Errno::LOOP | Errno::ACCESS | Errno::PERM => Fault::Denied,
        error => Fault::Path(error.into()),
    })?;
    target(found, true)
}

fn look_up(root: &Path, rest: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let root = rustix::fs::open(root, flags, Mode::empty())?;
    if rest.as_os_str().is_empty() {
        return Ok(root);
    }
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    loop {
        match rustix::fs::openat2(&root, rest, flags, Mode::empty(), resolve) {
            // Something was renamed meanwhile (openat2(2)).
            Err(Errno::AGAIN | Errno::INTR) => {}
            ended => return ended,
        }
    }
}

fn target(found: OwnedFd, may_be_folder: bool) -> Result<Target, Fault> {
    let stat = rustix::fs::fstat(&found).map_err(|error| Fault::Path(error.into()))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(Target::File(reopen(&found, OFlags::empty())?.into())),
        FileType::Directory if may_be_folder => Ok(Target::Folder(Walk::begin(&found)?)),
        FileType::Directory => Err(Fault::TooDeep),
        _ => Err(Fault::Special),
    }
}

/// Opens what a path descriptor stands for; that very file, whatever its path is by now.
fn reopen(found: &OwnedFd, more: OFlags) -> Result<OwnedFd, Fault> {
    let path = format!("/proc/self/fd/{}", found.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY | more;
    rustix::fs::open(path, flags, Mode::empty()).map_err(|error| match error {
        Errno::ACCESS | Errno::PERM => Fault::Denied,
        error => Fault::Path(error.into()),
    })
}

/// A way through a folder and those in it. Follows no link. What is in memory is one folder's descriptor for
/// each level.
#[derive(Debug)]
pub struct Walk {
    /// Each with its name, as it stands in paths.
    folders: Vec<(Vec<u8>, Dir)>,
}

/// What comes next: its path beneath the folder, and the file, or why it cannot be scanned.
pub type Step = (Vec<u8>, Result<File, Fault>);

impl Walk {
    fn begin(found: &OwnedFd) -> Result<Self, Fault> {
        Ok(Self { folders: vec![(Vec::new(), folder(found)?)] })
    }

    fn path_of(&self, name: &[u8]) -> Vec<u8> {
        let mut path = Vec::new();
        for part in self.folders.iter().map(|(name, _)| name.as_slice()).chain([name]) {
            if !part.is_empty() {
                path.push(b'/');
                path.extend_from_slice(part);
            }
        }
        path
    }

    /// The next file.
    pub fn next(&mut self) -> Option<Step> {
        loop {
            let entry = match self.folders.last_mut()?.1.read() {
                Some(Ok(entry)) => entry,
                Some(Err(error)) => {
                    let path = self.path_of(b"");
                    self.folders.pop();
                    return Some((path, Err(Fault::Path(error.into()))));
                }
                None => {
                    self.folders.pop();
                    continue;
                }
            };
            let name = entry.file_name();
            let is_wanted = matches!(
                entry.file_type(),
                FileType::Directory | FileType::RegularFile | FileType::Unknown
            );
            if !is_wanted || matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            match self.look_at(name) {
                Ok(None) => {}
                Ok(Some(file)) => return Some((self.path_of(name.to_bytes()), Ok(file))),
                Err(fault) => return Some((self.path_of(name.to_bytes()), Err(fault))),
            }
        }
    }

    /// A file; none where it is a folder, which is gone into, or of no interest.
    fn look_at(&mut self, name: &std::ffi::CStr) -> Result<Option<File>, Fault> {
        let Some((_, above)) = self.folders.last() else { return Ok(None) };
        let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let above = above.fd().map_err(|error| Fault::Path(error.into()))?;
        let found = match rustix::fs::openat2(above, name, flags, Mode::empty(), resolve) {
            Ok(found) => found,
            // Removed meanwhile, or a link by now.
            Err(Errno::NOENT | Errno::LOOP) => return Ok(None),
            Err(error) => return Err(Fault::Path(error.into())),
        };
        match target(found, self.folders.len() < DEPTH_MAX) {
            Ok(Target::File(file)) => Ok(Some(file)),
            Ok(Target::Folder(mut walk)) => {
                let inner = walk.folders.pop().map(|(_, folder)| folder);
                self.folders.extend(inner.map(|folder| (name.to_bytes().to_vec(), folder)));
                Ok(None)
            }
            Err(Fault::Special) => Ok(None),
            Err(fault) => Err(fault),
        }
    }
}

fn folder(found: &OwnedFd) -> Result<Dir, Fault> {
    Dir::new(reopen(found, OFlags::DIRECTORY)?).map_err(|error| Fault::Path(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn allow(path: &Path) -> ScanPath {
        ScanPath(path.to_owned())
    }

    fn opens(allowed: &[ScanPath], path: &Path) -> Result<Target, String> {
        open(allowed, path.as_os_str().as_bytes()).map_err(|fault| fault.to_string())
    }

    #[test]
    fn nothing_outside_of_what_is_allowed_is_opened() {
        let folder = tempfile::tempdir().unwrap();
        let (inside, outside) = (folder.path().join("in"), folder.path().join("out"));
        for path in [&inside, &outside] {
            std::fs::create_dir(path).unwrap();
            std::fs::write(path.join("file"), "content").unwrap();
        }
        symlink("file", inside.join("near")).unwrap();
        symlink("../out/file", inside.join("far")).unwrap();
        symlink(outside.join("file"), inside.join("absolute")).unwrap();
        symlink(&outside, inside.join("folder")).unwrap();
        symlink("/proc/self/fd/0", inside.join("magic")).unwrap();
        symlink("../out/nothing", inside.join("nothing")).unwrap();
        let allowed = [allow(&inside)];
        for name in ["file", "near", "", "."] {
            assert!(opens(&allowed, &inside.join(name)).is_ok(), "{name}");
        }
        // Whether something is there is not told either.
        for name in ["far", "absolute", "folder/file", "magic", "nothing", "../in/file"] {
            let told = opens(&allowed, &inside.join(name)).unwrap_err();
            assert_eq!(told, "Access denied.", "{name}");
        }
        for path in [outside.join("file"), outside.join("none"), "in/file".into(), "".into()] {
            assert_eq!(opens(&allowed, &path).unwrap_err(), "Access denied.", "{path:?}");
        }
        let beside = folder.path().join("inside");
        assert_eq!(opens(&allowed, &beside).unwrap_err(), "Access denied.", "no whole name");
        assert_eq!(opens(&[], &inside.join("file")).unwrap_err(), "Access denied.");
        let told = opens(&allowed, &inside.join("none")).unwrap_err();
        assert_eq!(told, "File path check failure: No such file or directory.");
        let both = [allow(folder.path()), allow(&inside)];
        assert!(opens(&both, &outside.join("file")).is_ok());
    }

    #[test]
    fn a_walk_finds_every_file_and_says_what_it_could_not_look_at() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        for name in ["one", "a/two", "a/b/three"] {
            std::fs::write(root.join(name), name).unwrap();
        }
        symlink("/etc", root.join("a/link")).unwrap();
        symlink("..", root.join("a/b/up")).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, root.join("fifo"), Mode::RWXU).unwrap();
        let deep = (0..DEPTH_MAX).fold(root.join("deep"), |path, _| path.join("d"));
        std::fs::create_dir_all(deep).unwrap();
        let Ok(Target::Folder(mut walk)) = opens(&[allow(root)], root) else { panic!() };
        let (mut found, mut missed) = (Vec::new(), Vec::new());
        while let Some((path, file)) = walk.next() {
            match file {
                Ok(_) => found.push(String::from_utf8(path).unwrap()),
                Err(fault) => missed.push((path.len(), fault.to_string())),
            }
        }
        found.sort();
        assert_eq!(found, ["/a/b/three", "/a/two", "/one"]);
        let too_deep = "/deep".len() + 2 * (DEPTH_MAX - 1);
        assert_eq!(missed, [(too_deep, "Directory recursion limit reached".to_owned())]);
    }
}
