//! Files that come back from quarantine.
//!
//! ```text
//!   Restore ──► .seawall-restore-TICKET, mode 0600 ──parts──► whole, and its hash right
//!                                                             │ owner, attributes, mode, times
//!                                                             ▼
//!                                              renamed to its name ──► Restored
//! ```
//!
//! Until the rename nothing is at the file's place that was not there before. A restore that breaks
//! off leaves at most the hidden file, which the next try with the same ticket replaces.

use super::Place;
use crate::content::{Reads, hash_of};
use rustix::fs::{AtFlags, Mode, OFlags, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;
use seawall_proto::remedy::{
    Attributes, Obstacle, Restore, RestoreContent, RestoreProgress, Restored,
};
use seawall_proto::{Ticket, ToHost};
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// Restores under way at once.
const MOST: usize = 8;
/// One that nothing came for in so long is given up.
const PATIENCE: Duration = Duration::from_secs(60);

/// Restores under way.
#[derive(Default)]
pub struct Restores(HashMap<Ticket, Restoring>);

struct Restoring {
    restore: Restore,
    place: Place,
    hidden: Vec<u8>,
    file: File,
    parts: u32,
    last_heard: Instant,
}

impl Restores {
    /// Begins one, in place of an earlier try.
    pub fn begin(&mut self, restore: Restore) -> Option<ToHost> {
        let ticket = restore.ticket;
        drop(self.0.remove(&ticket));
        if self.0.len() >= MOST {
            return Some(restored(ticket, Err(Obstacle::BrokenOff)));
        }
        match Restoring::begin(restore) {
            Ok(restoring) => {
                self.0.insert(ticket, restoring);
                Some(ToHost::RestoreProgress(RestoreProgress { ticket, parts: 0 }))
            }
            Err(obstacle) => Some(restored(ticket, Err(obstacle))),
        }
    }

    /// Takes a part; after the last one the file is at its place.
    pub fn go_on(&mut self, content: &RestoreContent) -> Option<ToHost> {
        let ticket = content.ticket;
        // One that ended with an obstacle may still have parts on their way.
        let restoring = self.0.get_mut(&ticket)?;
        let done = restoring.write(content);
        if done.is_ok() && !content.last {
            return Some(ToHost::RestoreProgress(RestoreProgress {
                ticket,
                parts: restoring.parts,
            }));
        }
        let mut restoring = self.0.remove(&ticket)?;
        let result = done.and_then(|()| restoring.finish());
        Some(restored(ticket, result))
    }

    /// The host gives it up.
    pub fn end(&mut self, ticket: Ticket) -> Option<ToHost> {
        let _hidden_file_goes = self.0.remove(&ticket)?;
        Some(restored(ticket, Err(Obstacle::BrokenOff)))
    }

    /// Gives up those that nothing came for in a while: the link was lost.
    pub fn forget_idle(&mut self) {
        self.0.retain(|_, restoring| restoring.last_heard.elapsed() < PATIENCE);
    }
}

fn restored(ticket: Ticket, result: Result<(), Obstacle>) -> ToHost {
    ToHost::Restored(Restored { ticket, result })
}

impl Restoring {
    fn begin(restore: Restore) -> Result<Self, Obstacle> {
        let place = Place::of(&restore.path).map_err(|errno| match errno {
            Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::INVAL => Obstacle::NoFolder,
            errno => obstacle(errno),
        })?;
        may_be_put(&place, restore.overwrite)?;
        let hidden = format!(".seawall-restore-{}", restore.ticket).into_bytes();
        // What an earlier try left. Its name cannot be guessed, so it is nobody else's.
        let _none = rustix::fs::unlinkat(&place.folder, &*hidden, AtFlags::empty());
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&place.folder, &*hidden, flags, Mode::RUSR | Mode::WUSR)
            .map_err(obstacle)?;
        let last_heard = Instant::now();
        Ok(Self { restore, place, hidden, file: file.into(), parts: 0, last_heard })
    }

    fn write(&mut self, content: &RestoreContent) -> Result<(), Obstacle> {
        let end = content.offset.checked_add(content.bytes.len() as u64);
        if end.is_none_or(|end| end > self.restore.size) {
            return Err(Obstacle::Content);
        }
        self.file.write_all_at(&content.bytes, content.offset).map_err(io_obstacle)?;
        self.parts += 1;
        self.last_heard = Instant::now();
        Ok(())
    }

    fn finish(&mut self) -> Result<(), Obstacle> {
        self.file.set_len(self.restore.size).map_err(io_obstacle)?;
        let Restore { size, hash, .. } = self.restore;
        let found = hash_of(&self.file, size, Reads::Waiting, &mut Vec::new(), || true);
        if found.map_err(io_obstacle)? != Some(hash) {
            return Err(Obstacle::Content);
        }
        set_attributes(&self.file, &self.restore.attributes)?;
        self.file.sync_all().map_err(io_obstacle)?;
        self.put()?;
        self.place.sync();
        Ok(())
    }

    fn put(&self) -> Result<(), Obstacle> {
        let Place { folder, name, .. } = &self.place;
        let plain = || {
            may_be_put(&self.place, self.restore.overwrite)?;
            rustix::fs::renameat(folder, &*self.hidden, folder, &**name).map_err(obstacle)
        };
        if self.restore.overwrite {
            return plain();
        }
        match self.place.rename(&self.hidden, name) {
            Err(Errno::EXIST) => Err(Obstacle::Exists),
            Err(Errno::INVAL) => plain(),
            result => result.map_err(obstacle),
        }
    }
}

impl Drop for Restoring {
    /// After the rename there is nothing under this name.
    fn drop(&mut self) {
        let _none = rustix::fs::unlinkat(&self.place.folder, &*self.hidden, AtFlags::empty());
    }
}

fn may_be_put(place: &Place, overwrite: bool) -> Result<(), Obstacle> {
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    match rustix::fs::statat(&place.folder, &*place.name, flags) {
        Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(obstacle(errno)),
        Ok(stat) if rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file() => {
            if overwrite {
                Ok(())
            } else {
                Err(Obstacle::Exists)
            }
        }
        Ok(_) => Err(Obstacle::NotAFile),
    }
}

/// Owner first, since changing it takes set-user-id bits and capabilities away; then attributes, which
/// may hold an ACL; then the mode, which is the ACL's too; the times last.
fn set_attributes(file: &File, attributes: &Attributes) -> Result<(), Obstacle> {
    let refused = |errno: Errno| match errno {
        Errno::NOSPC | Errno::DQUOT => Obstacle::NoSpace,
        errno => Obstacle::Attributes { errno: errno.raw_os_error() },
    };
    let owner = rustix::fs::Uid::from_raw(attributes.uid);
    let group = rustix::fs::Gid::from_raw(attributes.gid);
    rustix::fs::fchown(file, Some(owner), Some(group)).map_err(refused)?;
    for (name, value) in &attributes.xattrs {
        rustix::fs::fsetxattr(file, &***name, value, XattrFlags::empty()).map_err(refused)?;
    }
    rustix::fs::fchmod(file, Mode::from_raw_mode(attributes.mode)).map_err(refused)?;
    let time = |(seconds, nanos): (i64, u32)| Timespec { tv_sec: seconds, tv_nsec: nanos.into() };
    let times = Timestamps {
        last_access: time(attributes.accessed),
        last_modification: time(attributes.modified),
    };
    rustix::fs::futimens(file, &times).map_err(refused)
}

fn io_obstacle(error: io::Error) -> Obstacle {
    Errno::from_io_error(&error).map_or(Obstacle::BrokenOff, obstacle)
}

fn obstacle(errno: Errno) -> Obstacle {
    match errno {
        Errno::NOSPC | Errno::DQUOT => Obstacle::NoSpace,
        Errno::ROFS => Obstacle::ReadOnly,
        errno => Obstacle::Failed { errno: errno.raw_os_error() },
    }
}
