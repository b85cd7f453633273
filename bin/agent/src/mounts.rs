//! Reading mountinfo (proc_pid_mountinfo(5)) and telling which file systems are watched.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// Kernel interfaces: there are no files in them that somebody could have put there. devtmpfs is
/// here too: only root can make files in it, and opening an event's device node would open the
/// device.
const PSEUDO: &[&str] = &[
    "autofs",
    "binder",
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "devpts",
    "devtmpfs",
    "efivarfs",
    "fusectl",
    "hugetlbfs",
    "mqueue",
    "nsfs",
    "proc",
    "pstore",
    "resctrl",
    "rpc_pipefs",
    "securityfs",
    "selinuxfs",
    "smackfs",
    "sysfs",
    "tracefs",
];

/// A server elsewhere, or a process in this guest, may keep an open waiting for ever, and changes
/// made elsewhere are not seen.
const REMOTE: &[&str] = &[
    "9p",
    "afs",
    "ceph",
    "cifs",
    "coda",
    "fuse",
    "fuseblk",
    "glusterfs",
    "lustre",
    "nfs",
    "nfs4",
    "smb3",
    "smbfs",
    "virtiofs",
];

/// What is to be done with a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// A kernel interface without files of its own.
    Pseudo,
    /// Excluded; `status` says so.
    Remote,
    Overlay,
    Real,
}

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Its number in its mount namespace; none for one that was not read from a mountinfo.
    pub id: Option<u64>,
    /// The superblock's device: `st_dev` of its files, but on btrfs.
    pub device: u64,
    pub mount_point: PathBuf,
    pub fs_type: String,
    /// Root alone can have mounted it: what users may mount is mounted nosuid (mount(8), `user`; udisks).
    pub is_roots: bool,
}

impl Mount {
    pub fn class(&self) -> Class {
        let base = self.fs_type.split('.').next().unwrap_or_default();
        match base {
            "overlay" => Class::Overlay,
            base if PSEUDO.contains(&base) => Class::Pseudo,
            base if REMOTE.contains(&base) => Class::Remote,
            _ => Class::Real,
        }
    }
}

/// Reads the lines of a mountinfo file; a line that is none is passed over.
pub fn parse(mountinfo: &[u8]) -> Vec<Mount> {
    mountinfo.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let device = std::str::from_utf8(fields.nth(1)?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let device = rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?);
    let mount_point = unescape(fields.nth(1)?);
    let is_roots = !fields.next()?.split(|byte| *byte == b',').any(|option| option == b"nosuid");
    let fs_type = fields.skip_while(|field| *field != b"-").nth(1)?;
    Some(Mount {
        id: Some(id),
        device,
        mount_point: OsString::from_vec(mount_point).into(),
        fs_type: String::from_utf8_lossy(fs_type).into_owned(),
        is_roots,
    })
}

/// Space, tab, newline and backslash stand as three octal digits behind a backslash.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal = after.first_chunk::<3>().filter(|_| *first == b'\\');
        let octal = octal.and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                plain.push(byte);
                rest = &after[3..];
            }
            None => {
                plain.push(*first);
                rest = after;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_read_with_their_odd_names() {
        let text =
            b"36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 - ext3 /dev/root rw,errors=x\n\
            garbage\n\
            40 1 0:33 / /srv/a\\134b rw - fuse.sshfs host: rw\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].mount_point, PathBuf::from("/mnt 2"));
        assert_eq!(mounts[0].id, Some(36));
        assert_eq!(mounts[0].device, rustix::fs::makedev(98, 0));
        assert_eq!((mounts[0].fs_type.as_str(), mounts[0].class()), ("ext3", Class::Real));
        assert_eq!(mounts[1].mount_point, PathBuf::from("/srv/a\\b"));
        assert_eq!(mounts[1].class(), Class::Remote);
    }
}
