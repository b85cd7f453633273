//! Quarantine and restore in the driver, on this machine's kernel, with a host that the test controls.

#![allow(clippy::unwrap_used)] // A test says what it expects by unwrapping it.

mod common;

use common::{Native, Reply, is_denied};
use seawall_proto::remedy::{
    Attributes, FileIdentity, Obstacle, Offered, Remove, Restore, RestoreContent, Stays,
};
use seawall_proto::{ContentHash, Policy, ScanRequest, Ticket, ToGuest, ToHost};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const EVIL: &[u8] = b"evil content";

fn to_quarantine(_: &ScanRequest, content: &[u8]) -> Reply {
    if content.starts_with(b"evil") { Reply::Quarantine } else { Reply::Clean }
}

fn start() -> Native {
    Native::start(Policy::default(), to_quarantine)
}

/// What the driver offers of a file that is opened.
fn offer(native: &Native, path: &Path) -> Result<Offered, Stays> {
    native.settle();
    native.host.seen.messages.lock().unwrap().clear();
    assert!(is_denied(&std::fs::read(path)));
    native.host.heard(|message| match message {
        ToHost::Offer(offer) => Some(offer.file.clone()),
        _ => None,
    })
}

fn remove(native: &Native, ticket: u64, offered: &Offered) -> Result<u32, Stays> {
    let Offered { path, identity, .. } = offered.clone();
    native.host.say(&ToGuest::Remove(Remove { ticket: Ticket(ticket), path, identity }));
    native.host.heard(|message| match message {
        ToHost::Removed(removed) if removed.ticket == Ticket(ticket) => Some(removed.result),
        _ => None,
    })
}

/// Sends a whole restore, the parts of `content` that `attributes` names.
fn restore(
    native: &Native,
    path: &Path,
    content: &[u8],
    attributes: Attributes,
    overwrite: bool,
) -> Result<(), Obstacle> {
    let ticket = Ticket(77);
    native.host.say(&ToGuest::Restore(Restore {
        ticket,
        path: path.as_os_str().as_encoded_bytes().to_vec().into(),
        size: content.len() as u64,
        hash: ContentHash(*blake3::hash(content).as_bytes()),
        overwrite,
        attributes: attributes.clone(),
    }));
    let mut extents = attributes.extents;
    if extents.is_empty() {
        extents = vec![(0, content.len() as u64)];
    }
    let piece = RestoreContent::PIECE_MAX as u64;
    let pieces: Vec<_> = extents
        .iter()
        .flat_map(|(start, len)| {
            let end = start + len;
            (*start..end).step_by(piece as usize).map(move |at| (at, piece.min(end - at)))
        })
        .collect();
    for (nth, (offset, len)) in pieces.iter().enumerate() {
        let bytes = content[*offset as usize..(offset + len) as usize].to_vec().into();
        let last = nth + 1 == pieces.len();
        let part = RestoreContent { ticket, offset: *offset, bytes, last };
        native.host.say(&ToGuest::RestoreContent(part));
    }
    native.host.heard(|message| match message {
        ToHost::Restored(restored) if restored.ticket == ticket => Some(restored.result),
        _ => None,
    })
}

fn names(native: &Native) -> Vec<String> {
    let all = std::fs::read_dir(native.path("")).unwrap();
    let mut all: Vec<_> =
        all.map(|one| one.unwrap().file_name().to_string_lossy().into_owned()).collect();
    all.sort();
    all
}

#[test]
fn an_infected_file_is_offered_and_removed_once_the_host_has_it() {
    let native = start();
    let path = native.write("evil", EVIL);
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o4751)).unwrap();
    std::os::unix::fs::chown(&path, Some(1000), Some(1001)).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o4751)).unwrap();
    rustix::fs::setxattr(&path, "trusted.seawall", b"value", rustix::fs::XattrFlags::empty())
        .unwrap();
    let offered = offer(&native, &path).unwrap();
    assert_eq!(&**offered.path, path.as_os_str().as_encoded_bytes());
    let Attributes { mode, uid, gid, xattrs, links, .. } = &offered.attributes;
    assert_eq!((*mode, *uid, *gid, *links), (0o4751, 1000, 1001, 1));
    let has = |(name, value): &(serde_bytes::ByteBuf, serde_bytes::ByteBuf)| {
        &**name == b"trusted.seawall" && &**value == b"value"
    };
    assert!(xattrs.iter().any(has), "{xattrs:?}");
    assert!(path.exists(), "the host has not said that it has the file");
    assert_eq!(remove(&native, 1, &offered), Ok(0));
    assert!(names(&native).is_empty());
    assert_eq!(remove(&native, 1, &offered), Err(Stays::Gone), "asked again");
}

#[test]
fn only_the_file_that_was_judged_is_removed() {
    let native = start();
    let path = native.write("evil", EVIL);
    let offered = offer(&native, &path).unwrap();
    // A link to something precious takes its place.
    let precious = native.write("precious", b"good");
    std::fs::remove_file(&path).unwrap();
    symlink(&precious, &path).unwrap();
    assert_eq!(remove(&native, 1, &offered), Err(Stays::Changed));
    // Then another file, then a hard link to it.
    std::fs::remove_file(&path).unwrap();
    native.write("evil", b"good");
    assert_eq!(remove(&native, 2, &offered), Err(Stays::Changed));
    std::fs::remove_file(&path).unwrap();
    std::fs::hard_link(&precious, &path).unwrap();
    assert_eq!(remove(&native, 3, &offered), Err(Stays::Changed));
    std::fs::remove_file(&path).unwrap();
    // A folder on the way becomes a link.
    let folder = native.path("folder");
    std::fs::create_dir(&folder).unwrap();
    let inner = native.write("folder/evil", EVIL);
    let offered = offer(&native, &inner).unwrap();
    std::fs::rename(&folder, native.path("other")).unwrap();
    symlink("other", &folder).unwrap();
    assert_eq!(remove(&native, 4, &offered), Err(Stays::Changed));
    assert_eq!(names(&native), ["folder", "other", "precious"]);
    // Written meanwhile: it is not what the host has.
    let path = native.write("evil", EVIL);
    let offered = offer(&native, &path).unwrap();
    std::fs::write(&path, b"new words").unwrap_err();
    let seen = File::options().append(true).open(&path);
    assert!(is_denied(&seen), "not even to write: {seen:?}");
    assert_eq!(remove(&native, 5, &offered), Ok(0));
}

#[test]
fn what_cannot_go_stays_for_a_stated_reason() {
    let native = start();
    // Two names: one goes, the other is named.
    let first = native.write("first", EVIL);
    std::fs::hard_link(&first, native.path("second")).unwrap();
    let offered = offer(&native, &first).unwrap();
    assert_eq!(offered.attributes.links, 2);
    assert_eq!(remove(&native, 1, &offered), Ok(1));
    assert!(is_denied(&std::fs::read(native.path("second"))));
    // A name that an earlier try had hidden.
    let path = native.write("evil", b"evil, hidden by a try that broke off");
    let offered = offer(&native, &path).unwrap();
    std::fs::rename(&path, native.path(&format!(".seawall-quarantine-{}", Ticket(2)))).unwrap();
    assert_eq!(remove(&native, 2, &offered), Ok(0));
    assert_eq!(names(&native), ["second"]);
    // A writer that had it open before.
    let path = native.write("written", b"good for now");
    let writer = OpenOptions::new().write(true).open(&path).unwrap();
    writer.write_all_at(EVIL, 0).unwrap();
    assert_eq!(offer(&native, &path), Err(Stays::Writer));
    drop(writer);
    // Something mounted on it.
    let path = native.write("mounted", b"evil, mounted on");
    let offered = offer(&native, &path).unwrap();
    let none = None::<&str>;
    let bind = nix::mount::MsFlags::MS_BIND;
    nix::mount::mount(Some(&native.path("second")), &path, none, bind, none).unwrap();
    let result = remove(&native, 3, &offered);
    nix::mount::umount(&path).unwrap();
    assert_eq!(result, Err(Stays::Changed), "its name shows another file");
    // No way to it: its name is gone, or is in a place that the driver does not see.
    let path = native.write("deleted", b"evil, deleted while open");
    native.settle();
    native.host.seen.messages.lock().unwrap().clear();
    let file =
        rustix::fs::open(&path, rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    std::fs::remove_file(&path).unwrap();
    let number = std::os::fd::AsRawFd::as_raw_fd(&file);
    assert!(is_denied(&std::fs::read(format!("/proc/self/fd/{number}"))));
    let stays = native.host.heard(|message| match message {
        ToHost::Offer(offer) => Some(offer.file.clone()),
        _ => None,
    });
    assert_eq!(stays, Err(Stays::Gone));
}

#[test]
fn immutable_and_read_only_files_stay() {
    let native = start();
    // tmpfs keeps no such flags before Linux 6.6.
    let path = native.write("immutable", b"evil, immutable");
    let chattr = |how: &str| Command::new("chattr").arg(how).arg(&path).output().unwrap();
    if chattr("+i").status.success() {
        assert_eq!(offer(&native, &path), Err(Stays::Immutable));
        assert!(chattr("-i").status.success());
        let offered = offer(&native, &path).unwrap();
        assert!(chattr("+i").status.success());
        let result = remove(&native, 1, &offered);
        assert!(chattr("-i").status.success());
        assert!(matches!(result, Err(Stays::Changed | Stays::Immutable)), "{result:?}");
    } else {
        println!("skipped: this kernel's tmpfs has no immutable files");
    }
    let path = native.write("evil", EVIL);
    native.settle();
    let flags = nix::mount::MsFlags::MS_REMOUNT | nix::mount::MsFlags::MS_RDONLY;
    let remount = |flags| {
        nix::mount::mount(None::<&str>, &native.path(""), None::<&str>, flags, None::<&str>)
    };
    let offered = offer(&native, &path).unwrap();
    remount(flags).unwrap();
    let result = remove(&native, 2, &offered);
    assert_eq!(result, Err(Stays::ReadOnly));
    assert_eq!(offer(&native, &path), Err(Stays::ReadOnly));
    remount(nix::mount::MsFlags::MS_REMOUNT).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), EVIL.len() as u64);
}

#[test]
fn a_restored_file_has_all_that_it_had() {
    let native = start();
    let path = native.path("evil");
    // A hole between two parts.
    let mut content = vec![0; 1 << 20];
    content[..EVIL.len()].copy_from_slice(EVIL);
    content[(1 << 20) - 5..].copy_from_slice(b"tail!");
    let file = File::create(&path).unwrap();
    file.write_all_at(EVIL, 0).unwrap();
    file.write_all_at(b"tail!", (1 << 20) - 5).unwrap();
    std::os::unix::fs::chown(&path, Some(1000), Some(1001)).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o6640)).unwrap();
    // An ACL: version 2, owner, user 1003 may read, group, mask, others (linux/posix_acl_xattr.h).
    let mut acl = 2_u32.to_le_bytes().to_vec();
    for (tag, rights, id) in [(1, 6, !0), (2, 4, 1003), (4, 4, !0), (0x10, 4, !0), (0x20, 0, !0)] {
        acl.extend(u16::to_le_bytes(tag));
        acl.extend(u16::to_le_bytes(rights));
        acl.extend(u32::to_le_bytes(id));
    }
    let no_flags = rustix::fs::XattrFlags::empty();
    for (name, value) in [("system.posix_acl_access", &*acl), ("trusted.x", b"value")] {
        rustix::fs::setxattr(&path, name, value, no_flags).unwrap();
    }
    let old = std::time::SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    file.set_modified(old).unwrap();
    drop(file);
    native.settle();
    let before = std::fs::metadata(&path).unwrap();
    let offered = offer(&native, &path).unwrap();
    assert_eq!(offered.attributes.extents.len(), 2, "{:?}", offered.attributes.extents);
    assert_eq!(remove(&native, 1, &offered), Ok(0));

    let attributes = offered.attributes;
    assert_eq!(restore(&native, &path, &content, attributes.clone(), false), Ok(()));
    let after = std::fs::metadata(&path).unwrap();
    let told = |file: &std::fs::Metadata| {
        (file.mode(), file.uid(), file.gid(), file.len(), file.mtime(), file.mtime_nsec())
    };
    assert_eq!(told(&after), told(&before));
    assert_eq!(
        (after.atime(), after.atime_nsec()),
        (attributes.accessed.0, attributes.accessed.1.into())
    );
    assert!(after.blocks() < 64, "the hole is a hole: {} blocks", after.blocks());
    for (name, value) in [("system.posix_acl_access", &*acl), ("trusted.x", b"value")] {
        let mut got = vec![0; 256];
        let len = rustix::fs::getxattr(&path, name, &mut got).unwrap();
        assert_eq!(&got[..len], value, "{name}");
    }
    assert_eq!(names(&native), ["evil"]);
    assert!(native.stop());
    assert_eq!(std::fs::read(&path).unwrap(), content);
}

#[test]
fn a_restore_spares_what_is_there_and_leaves_nothing_behind() {
    let native = start();
    let plain = || Attributes { mode: 0o600, ..Attributes::default() };
    let put = |path: &Path, overwrite| restore(&native, path, EVIL, plain(), overwrite);
    let path = native.write("there", b"good");
    assert_eq!(put(&path, false), Err(Obstacle::Exists));
    assert_eq!(std::fs::read(&path).unwrap(), b"good");
    assert_eq!(put(&native.path("no/such"), false), Err(Obstacle::NoFolder));
    symlink("/etc", native.path("link")).unwrap();
    assert_eq!(put(&native.path("link/passwd"), true), Err(Obstacle::NoFolder));
    symlink("there", native.path("to-a-file")).unwrap();
    assert_eq!(put(&native.path("to-a-file"), true), Err(Obstacle::NotAFile));
    std::fs::create_dir(native.path("folder")).unwrap();
    assert_eq!(put(&native.path("folder"), true), Err(Obstacle::NotAFile));
    assert_eq!(put(Path::new("relative"), true), Err(Obstacle::NoFolder));
    // What arrives is not what was announced.
    let holes = Attributes { extents: vec![(0, 4)], ..plain() };
    let short = restore(&native, &native.path("short"), EVIL, holes, false);
    assert_eq!(short, Err(Obstacle::Content));
    let past =
        RestoreContent { ticket: Ticket(77), offset: u64::MAX, bytes: vec![1].into(), last: true };
    native.host.say(&ToGuest::RestoreContent(past));
    assert_eq!(put(&path, true), Ok(()));
    assert_eq!(names(&native), ["folder", "link", "there", "to-a-file"]);
    assert!(native.stop());
    assert_eq!(std::fs::read(&path).unwrap(), EVIL);
}

#[test]
fn a_full_disk_in_the_guest_is_a_stated_obstacle() {
    let native = start();
    let size = Some("size=256k");
    let flags = nix::mount::MsFlags::MS_REMOUNT;
    nix::mount::mount(None::<&str>, &native.path(""), None::<&str>, flags, size).unwrap();
    let path = native.write("evil", EVIL);
    let full = File::create(native.path("full")).unwrap();
    let mut at = 0;
    while full.write_all_at(&[b'x'; 4096], at).is_ok() {
        at += 4096;
    }
    drop(full);
    // Removing needs no room.
    let offered = offer(&native, &path).unwrap();
    assert_eq!(remove(&native, 1, &offered), Ok(0));
    let full = restore(&native, &path, &[1; 65536], Attributes::default(), false);
    assert_eq!(full, Err(Obstacle::NoSpace));
    assert_eq!(names(&native), ["full"]);
    std::fs::remove_file(native.path("full")).unwrap();
    assert_eq!(restore(&native, &path, EVIL, offered.attributes, false), Ok(()));
}

/// Killed at every moment of a removal or restore: the file is there, under one name or the other,
/// until a second try has done it.
#[test]
fn a_driver_that_dies_in_the_midst_of_it_loses_nothing() {
    let native = start();
    for round in 0..3_u64 {
        let path = native.write("evil", format!("evil {round}").as_bytes());
        let offered = offer(&native, &path).unwrap();
        let Offered { path: name, identity, attributes } = offered.clone();
        native.host.say(&ToGuest::Remove(Remove { ticket: Ticket(round), path: name, identity }));
        std::thread::sleep(Duration::from_micros(round * 120));
        native.kill_worker();
        native.wait_protected();
        let again = remove(&native, round, &offered);
        assert!(matches!(again, Ok(0) | Err(Stays::Gone)), "{again:?}");
        assert!(names(&native).is_empty(), "{:?}", names(&native));

        let content = vec![b'e'; 20_000];
        native.host.say(&ToGuest::Restore(Restore {
            ticket: Ticket(77),
            path: path.as_os_str().as_encoded_bytes().to_vec().into(),
            size: content.len() as u64,
            hash: ContentHash([0; 32]),
            overwrite: false,
            attributes: attributes.clone(),
        }));
        std::thread::sleep(Duration::from_micros(round * 120));
        native.kill_worker();
        native.wait_protected();
        assert!(!path.exists(), "nothing is at its place before it is whole");
        assert_eq!(restore(&native, &path, &content, attributes, false), Ok(()));
        assert_eq!(names(&native), ["evil"]);
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn an_identity_of_another_file_removes_nothing() {
    let native = start();
    let good = native.write("good", b"good");
    let stat = std::fs::metadata(&good).unwrap();
    let identity = FileIdentity {
        device: stat.dev(),
        inode: stat.ino(),
        size: stat.len(),
        modified: (stat.mtime(), 0),
        changed: (stat.ctime(), 0),
    };
    let path = good.as_os_str().as_encoded_bytes().to_vec().into();
    let offered = Offered { path, identity, attributes: Attributes::default() };
    assert_eq!(remove(&native, 9, &offered), Err(Stays::Changed));
    let path = b"relative/../path".to_vec().into();
    assert!(remove(&native, 10, &Offered { path, ..offered }).is_err());
    assert!(good.exists());
}
