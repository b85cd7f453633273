//! What a file has besides its content.

use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::Context;
use rustix::fs::{AtFlags, CWD, Gid, IFlags, Mode, Timespec, Timestamps, Uid, XattrFlags};
use serde_json::{Map, Value, json};

/// An ACL that lets user 1001 read: version 2, then tag, permissions and id of each entry in
/// little-endian order (acl(5), the kernel's posix_acl_xattr).
fn acl() -> Vec<u8> {
    const NOBODY: u32 = u32::MAX;
    let mut acl = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in
        [(1_u16, 6_u16, NOBODY), (2, 4, 1001), (4, 4, NOBODY), (16, 4, NOBODY), (32, 0, NOBODY)]
    {
        acl.extend(tag.to_le_bytes());
        acl.extend(permissions.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    acl
}

/// Gives a file an owner, a mode, an ACL, an extended attribute and times; does not open it.
pub fn dress(path: &Path) -> anyhow::Result<Value> {
    rustix::fs::chown(path, Some(Uid::from_raw(1000)), Some(Gid::from_raw(100)))?;
    rustix::fs::chmod(path, Mode::from_raw_mode(0o640))?;
    let none = XattrFlags::empty();
    rustix::fs::setxattr(path, "user.origin", b"the net", none).context("user.origin")?;
    rustix::fs::setxattr(path, "system.posix_acl_access", &acl(), none).context("the ACL")?;
    let time = |tv_sec| Timespec { tv_sec, tv_nsec: 123_456_789 };
    let times =
        Timestamps { last_access: time(1_000_000_000), last_modification: time(1_234_567_890) };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::empty())?;
    describe(path)
}

/// Makes a file that even root may not change or remove.
pub fn fixed(path: &Path, content: &[u8]) -> anyhow::Result<Value> {
    let mut file = std::fs::File::create_new(path)?;
    file.write_all(content)?;
    set_immutable(&file, true)
}

/// Allows it again.
pub fn unfixed(path: &Path) -> anyhow::Result<Value> {
    set_immutable(&std::fs::File::open(path)?, false)
}

fn set_immutable(file: &std::fs::File, yes: bool) -> anyhow::Result<Value> {
    let mut flags = rustix::fs::ioctl_getflags(file)?;
    flags.set(IFlags::IMMUTABLE, yes);
    rustix::fs::ioctl_setflags(file, flags)?;
    Ok(json!({ "immutable": yes }))
}

/// What it has, without opening it.
pub fn describe(path: &Path) -> anyhow::Result<Value> {
    let stat = rustix::fs::lstat(path).with_context(|| path.display().to_string())?;
    let mut names = vec![0; 4096];
    let len = rustix::fs::llistxattr(path, &mut names)?;
    let mut xattrs = Map::new();
    for name in names[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 4096];
        let name = std::ffi::OsStr::from_bytes(name);
        let len = rustix::fs::lgetxattr(path, name, &mut value)?;
        xattrs.insert(name.to_string_lossy().into_owned(), json!(value[..len]));
    }
    Ok(json!({
        "mode": format!("{:o}", stat.st_mode),
        "uid": stat.st_uid,
        "gid": stat.st_gid,
        "size": stat.st_size,
        "sparse": stat.st_blocks * 512 < stat.st_size,
        "modified": [stat.st_mtime, i64::try_from(stat.st_mtime_nsec)?],
        "xattrs": xattrs,
    }))
}
