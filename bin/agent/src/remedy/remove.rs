//! Removing a file that the host has.
//!
//! Linux cannot remove a name only if it is a certain file. So the name is changed to one that nobody
//! can guess, which says for sure what it named; if that is another file, it gets its name back.
//!
//! ```text
//!   NAME is the file ──rename──► .seawall-quarantine-TICKET is the file ──► removed
//!        │                                     │
//!        └─ is not: stays                      └─ is not: renamed back, stays
//! ```
//!
//! Whoever dies between these steps leaves the file under one name or the other; the host asks again,
//! and both are looked for.

use super::{Place, failed, may_go};
use crate::file::Look;
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use seawall_proto::remedy::{FileIdentity, Remove, Stays};
use std::fs::File;

/// Removes the file if it is still what was offered. Gives how many other names it has.
pub fn remove(remove: &Remove) -> Result<u32, Stays> {
    let Remove { ticket, path, identity } = remove;
    let place = match Place::of(path) {
        Ok(place) => place,
        Err(Errno::NOENT) => return Err(Stays::Gone),
        Err(Errno::LOOP) => return Err(Stays::Changed),
        Err(errno) => return Err(failed(errno)),
    };
    let hidden = format!(".seawall-quarantine-{ticket}").into_bytes();
    if place.is(&hidden, identity) {
        // An earlier try got this far.
        let file = open(&place, &hidden)?;
        return take(&place, &file, &hidden);
    }
    let file = open(&place, &place.name)?;
    check(&file, identity)?;
    match place.rename(&place.name, &hidden) {
        Ok(()) => {}
        Err(Errno::INVAL) => {
            // Without a rename that spares what is there, the moment between look and removal stays.
            return if place.is(&place.name, identity) {
                take(&place, &file, &place.name)
            } else {
                Err(Stays::Changed)
            };
        }
        Err(errno) => return Err(failed(errno)),
    }
    let still = if place.is(&hidden, identity) {
        is_unwritten(&file, identity)
    } else {
        Err(Stays::Changed)
    };
    match still {
        Ok(()) => take(&place, &file, &hidden),
        Err(stays) => {
            if let Err(errno) = place.rename(&hidden, &place.name) {
                let name = String::from_utf8_lossy(&hidden).into_owned();
                tracing::warn!(%errno, %name, "a file that is not the infected one kept this name");
            }
            Err(stays)
        }
    }
}

fn open(place: &Place, name: &[u8]) -> Result<File, Stays> {
    let flags =
        OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOATIME | OFlags::CLOEXEC;
    match rustix::fs::openat(&place.folder, name, flags, Mode::empty()) {
        Ok(file) => Ok(file.into()),
        Err(Errno::NOENT) => Err(Stays::Gone),
        // A symbolic link, or something that is no file, has taken its name.
        Err(Errno::LOOP | Errno::NXIO | Errno::NODEV) => Err(Stays::Changed),
        Err(errno) => Err(failed(errno)),
    }
}

fn check(file: &File, identity: &FileIdentity) -> Result<(), Stays> {
    let look = Look::at(file).map_err(failed)?;
    if !look.is_regular || look.identity.to_proto() != *identity {
        return Err(Stays::Changed);
    }
    may_go(file)
}

/// Renaming has changed the ctime; the content is told by size and mtime.
fn is_unwritten(file: &File, identity: &FileIdentity) -> Result<(), Stays> {
    let now = Look::at(file).map_err(failed)?.identity.to_proto();
    if (now.size, now.modified) != (identity.size, identity.modified) {
        return Err(Stays::Changed);
    }
    may_go(file)
}

fn take(place: &Place, file: &File, name: &[u8]) -> Result<u32, Stays> {
    rustix::fs::unlinkat(&place.folder, name, AtFlags::empty()).map_err(failed)?;
    place.sync();
    let links = rustix::fs::fstat(file).map_err(failed)?.st_nlink;
    Ok(u32::try_from(links).unwrap_or(u32::MAX))
}
