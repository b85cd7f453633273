//! What is done with an infected file besides denying it: it is offered to the host's quarantine and
//! removed once the host has it, and it comes back when the operator says so.
//!
//! One thread does this, behind a bounded queue. It may wait for disks; nothing here is between an
//! access and its answer. It keeps nothing but restores under way: what else is needed comes with each
//! message ([`seawall_proto::remedy`]).

mod remove;
mod restore;

use crate::driver::{Driver, Subject};
use crate::file::Look;
use crate::on_demand::Judging;
use crate::session::{Pending, Session};
use crate::{truth, verdict};
use restore::Restores;
use rustix::fs::{IFlags, OFlags};
use rustix::io::Errno;
use seawall_proto::remedy::{
    Attributes, FileIdentity, Offer, Offered, Remove, Removed, Restore, RestoreContent, Stays,
};
use seawall_proto::{RequestId, Ticket, ToHost, Verdict};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

/// How many tasks wait. The host asks again for what finds no room.
pub const TASKS: usize = 64;
/// How often restores that nobody goes on with are looked for.
const TICK: Duration = Duration::from_secs(10);

/// Something to do.
pub enum Task {
    /// The verdict on a file for which nobody waits.
    Judged { pending: Box<Pending>, verdict: Box<Verdict>, _judging: Option<Judging> },
    /// Policy wants this file in quarantine.
    Offer { id: RequestId, subject: Subject, look: Look },
    /// The host has it.
    Remove(Remove),
    /// A file comes back.
    Restore(Restore),
    /// A part of it.
    Content(RestoreContent),
    /// It does not come back after all.
    End(Ticket),
}

/// Works for ever. Nothing is left to do for a session that has ended: the host asks again.
pub fn work(driver: &Driver, tasks: &Receiver<(Arc<Session>, Task)>) {
    let mut restores = Restores::default();
    loop {
        let (session, task) = match tasks.recv_timeout(TICK) {
            Ok(next) => next,
            Err(RecvTimeoutError::Timeout) => {
                restores.forget_idle();
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let message = match task {
            Task::Judged { pending, verdict, _judging } => {
                verdict::take_later(driver, &session, *pending, *verdict);
                None
            }
            Task::Offer { id, subject, look } => {
                let file = examine(&subject, &look);
                Some(ToHost::Offer(Offer { id, file }))
            }
            Task::Remove(remove) => {
                let Remove { ticket, path, .. } = &remove;
                let result = remove::remove(&remove);
                let path = String::from_utf8_lossy(path).escape_debug().to_string();
                driver.note_verdict(path, told(result));
                Some(ToHost::Removed(Removed { ticket: *ticket, result }))
            }
            Task::Restore(restore) => restores.begin(restore),
            Task::Content(content) => restores.go_on(&content),
            Task::End(ticket) => restores.end(ticket),
        };
        if let Some(message) = message
            && session.send(&message).is_err()
        {
            session.end();
        }
    }
}

fn told(result: Result<u32, Stays>) -> String {
    match result {
        Ok(0) => "moved to the host's quarantine".into(),
        Ok(more) => format!("moved to the host's quarantine; {more} other names are left"),
        Err(stays) => format!("in quarantine, and stays here ({stays:?})"),
    }
}

/// Collects what a restore needs, if the file is still what was judged.
fn examine(subject: &Subject, look: &Look) -> Result<Offered, Stays> {
    let file = subject.file().ok_or(Stays::Gone)?;
    let stat = rustix::fs::fstat(file).map_err(failed)?;
    let now = Look::at(file).map_err(failed)?;
    if stat.st_nlink == 0 {
        return Err(Stays::Gone);
    }
    if now.identity != look.identity {
        return Err(Stays::Changed);
    }
    may_go(file)?;
    let identity = look.identity.to_proto();
    let path = truth::true_path(file, identity.device, identity.inode).ok_or(Stays::NoPath)?;
    let attributes = Attributes {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        accessed: (stat.st_atime, u32::try_from(stat.st_atime_nsec).unwrap_or(0)),
        modified: identity.modified,
        xattrs: xattrs(file)?,
        extents: extents(file, identity.size),
        links: u32::try_from(stat.st_nlink).unwrap_or(u32::MAX),
    };
    Ok(Offered { path: path.into(), identity, attributes })
}

/// What forbids removing the file although root asks.
fn may_go(file: &File) -> Result<(), Stays> {
    // Not every file system has these flags.
    let flags = rustix::fs::ioctl_getflags(file).unwrap_or(IFlags::empty());
    if flags.intersects(IFlags::IMMUTABLE | IFlags::APPEND) {
        return Err(Stays::Immutable);
    }
    if rustix::fs::fstatvfs(file)
        .is_ok_and(|fs| fs.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY))
    {
        return Err(Stays::ReadOnly);
    }
    if seawall_fanotify::is_open_for_writing(std::os::fd::AsFd::as_fd(file)).unwrap_or(false) {
        return Err(Stays::Writer);
    }
    Ok(())
}

fn xattrs(file: &File) -> Result<Vec<(serde_bytes::ByteBuf, serde_bytes::ByteBuf)>, Stays> {
    let mut names = vec![0; Attributes::XATTRS_MAX];
    let len = match rustix::fs::flistxattr(file, &mut names) {
        Ok(len) => len,
        Err(Errno::NOTSUP) => return Ok(Vec::new()),
        Err(Errno::RANGE | Errno::TOOBIG) => return Err(Stays::Attributes),
        Err(errno) => return Err(failed(errno)),
    };
    let mut left = Attributes::XATTRS_MAX - len;
    let mut all = Vec::new();
    for name in names[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; left];
        let len = match rustix::fs::fgetxattr(file, name, &mut value) {
            Ok(len) => len,
            // Taken away since it was listed.
            Err(Errno::NODATA) => continue,
            Err(Errno::RANGE) => return Err(Stays::Attributes),
            Err(errno) => return Err(failed(errno)),
        };
        value.truncate(len);
        left -= len;
        all.push((name.to_vec().into(), value.into()));
    }
    Ok(all)
}

/// The parts that are not holes; none where there are no holes, or too many.
fn extents(file: &File, size: u64) -> Vec<(u64, u64)> {
    use rustix::fs::SeekFrom;
    let mut all = Vec::new();
    let mut at = 0;
    while at < size {
        let Ok(start) = rustix::fs::seek(file, SeekFrom::Data(at)) else { break };
        let Ok(end) = rustix::fs::seek(file, SeekFrom::Hole(start)) else { return Vec::new() };
        if end <= start || all.len() == Attributes::EXTENTS_MAX {
            return Vec::new();
        }
        all.push((start, end.min(size) - start));
        at = end;
    }
    if all == [(0, size)] { Vec::new() } else { all }
}

fn failed(errno: Errno) -> Stays {
    match errno {
        Errno::ROFS => Stays::ReadOnly,
        Errno::BUSY => Stays::Busy,
        errno => Stays::Failed { errno: errno.raw_os_error() },
    }
}

/// A folder and a name in it. No symbolic link was followed on the way.
struct Place {
    folder: OwnedFd,
    name: Vec<u8>,
}

impl Place {
    fn of(path: &[u8]) -> rustix::io::Result<Self> {
        let end = path.iter().rposition(|byte| *byte == b'/').ok_or(Errno::INVAL)?;
        let (folder, name) = (&path[..=end], &path[end + 1..]);
        if !path.starts_with(b"/") || matches!(name, b"" | b"." | b"..") {
            return Err(Errno::INVAL);
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::openat2(
            rustix::fs::CWD,
            folder,
            flags,
            rustix::fs::Mode::empty(),
            rustix::fs::ResolveFlags::NO_SYMLINKS | rustix::fs::ResolveFlags::NO_MAGICLINKS,
        )?;
        Ok(Self { folder, name: name.to_vec() })
    }

    /// Whether `name` is this very inode, and not a link to it.
    fn is(&self, name: &[u8], identity: &FileIdentity) -> bool {
        let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::statat(&self.folder, name, flags)
            .is_ok_and(|stat| (stat.st_dev, stat.st_ino) == (identity.device, identity.inode))
    }

    /// Renames within the folder, never over anything. Where the file system cannot promise that,
    /// it says EINVAL.
    fn rename(&self, from: &[u8], to: &[u8]) -> rustix::io::Result<()> {
        let flags = rustix::fs::RenameFlags::NOREPLACE;
        rustix::fs::renameat_with(&self.folder, from, &self.folder, to, flags)
    }

    /// What was done in the folder outlasts a crash. Where that cannot be had, nothing else can be done.
    fn sync(&self) {
        let _no_harm = rustix::fs::fsync(&self.folder);
    }
}
