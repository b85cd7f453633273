//! Files of golden images: templates of which many guests are clones.
//!
//! A clone's files have the inodes and times of the template's, so a file's [`Fingerprint`] stands for the content that
//! the host saw when it learned the template. It is what is trusted of such a file, and as far as a kernel's change
//! time is: nobody but root sets one.

use crate::remedy::Time;
use serde::{Deserialize, Serialize};
use std::fmt;

/// `f_type` of the file systems that count (statfs(2)): each gives a change time of the kernel's own, to the nanosecond.
const EXT4: u64 = 0xef53;
const BTRFS: u64 = 0x9123_683e;
/// Its `f_fsid` is a device number and not the file system's own.
const XFS: u64 = 0x5846_5342;

/// What a file system says of a file that has content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// `f_type` (statfs(2)).
    pub fs_type: u64,
    /// `f_fsid` (statfs(2)): on ext4 and btrfs made of the file system's UUID.
    pub fs_id: u64,
    /// Inode number.
    pub inode: u64,
    /// Size in bytes.
    pub size: u64,
    /// Last change of the content.
    pub modified: Time,
    /// Last change of content or attributes.
    pub changed: Time,
    /// When the inode was made (`stx_btime`, statx(2)).
    pub born: Time,
}

impl Origin {
    /// `None` where it says too little: a change time in whole seconds is a program's that made the file system, or one
    /// of a file system that keeps no better ones, and another file may have the same. So it is with file systems of other
    /// kinds, which may have their change times from whoever made the file.
    #[must_use]
    pub fn fingerprint(&self) -> Option<Fingerprint> {
        if self.changed.1 == 0 || ![EXT4, BTRFS, XFS].contains(&self.fs_type) {
            return None;
        }
        let mut hasher = blake3::Hasher::new_derive_key("seawall 2026 a file of a golden image");
        let fs_id = if self.fs_type == XFS { 0 } else { self.fs_id };
        for number in [self.fs_type, fs_id, self.inode, self.size] {
            hasher.update(&number.to_le_bytes());
        }
        for (seconds, nanoseconds) in [self.modified, self.changed, self.born] {
            hasher.update(&seconds.to_le_bytes()).update(&nanoseconds.to_le_bytes());
        }
        let mut fingerprint = [0; 16];
        hasher.finalize_xof().fill(&mut fingerprint);
        Some(Fingerprint(fingerprint))
    }
}

/// Stands for a file with its content, in a template and in its clones: a digest of an [`Origin`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Fingerprint(pub [u8; 16]);

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

/// In hexadecimal.
impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Not 32 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a fingerprint is 32 hexadecimal digits")]
pub struct NoFingerprint;

impl std::str::FromStr for Fingerprint {
    type Err = NoFingerprint;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_hex = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = u128::from_str_radix(text, 16).ok().filter(|_| is_hex).ok_or(NoFingerprint)?;
        Ok(Self(number.to_be_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORIGIN: Origin = Origin {
        fs_type: 0xef53,
        fs_id: 1,
        inode: 2,
        size: 3,
        modified: (4, 0),
        changed: (5, 6),
        born: (7, 8),
    };

    #[test]
    fn whatever_differs_makes_another_file() {
        let own = ORIGIN.fingerprint().unwrap();
        let others = [
            Origin { fs_type: 0x9123_683e, ..ORIGIN },
            Origin { fs_id: 2, ..ORIGIN },
            Origin { inode: 3, ..ORIGIN },
            Origin { size: 4, ..ORIGIN },
            Origin { modified: (4, 1), ..ORIGIN },
            Origin { changed: (5, 7), ..ORIGIN },
            Origin { born: (7, 9), ..ORIGIN },
        ];
        assert!(others.iter().all(|other| other.fingerprint().is_some_and(|other| other != own)));
        assert_eq!(ORIGIN.fingerprint(), Some(own));
        // The device that an XFS is on may be another.
        let xfs = Origin { fs_type: XFS, ..ORIGIN };
        assert_eq!(xfs.fingerprint(), Origin { fs_id: 9, ..xfs }.fingerprint());
    }

    #[test]
    fn times_that_a_kernel_does_not_give_say_too_little() {
        assert_eq!(Origin { changed: (5, 0), ..ORIGIN }.fingerprint(), None);
        // tmpfs and exFAT.
        for fs_type in [0x0102_1994, 0x2011_bab0] {
            assert_eq!(Origin { fs_type, ..ORIGIN }.fingerprint(), None);
        }
    }

    #[test]
    fn a_fingerprint_is_read_as_it_is_written() {
        let own = ORIGIN.fingerprint().unwrap();
        assert_eq!(own.to_string().parse(), Ok(own));
        let zeros = "0".repeat(32);
        assert_eq!(zeros.parse(), Ok(Fingerprint([0; 16])));
        let (short, signed, long) =
            ("0".repeat(31), format!("+{}", "0".repeat(31)), "0".repeat(33));
        for wrong in ["", &short, &signed, &long, &"g".repeat(32)] {
            assert_eq!(wrong.parse::<Fingerprint>(), Err(NoFingerprint), "{wrong}");
        }
    }
}
