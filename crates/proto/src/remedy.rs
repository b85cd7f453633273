//! Quarantine and restore: what driver and host say to each other about one infected file.
//!
//! ```text
//!   host                                   driver
//!   Verdict { remediation: Quarantine } ──►   denies the access, looks at the file
//!                              ◄── Offer      path, identity, attributes; or why it stays
//!   content and entry durable
//!   Remove { ticket, path, identity } ──►     removes it if it is still that file
//!                              ◄── Removed    or why it stays
//!
//!   Restore, RestoreContent… ──►              writes a file beside the place, then puts it there
//!                              ◄── RestoreProgress…, Restored
//! ```
//!
//! The driver keeps nothing between these messages: everything needed comes with each, so either side
//! may die anywhere and the host asks again.

use crate::{ContentHash, RequestId};
use serde::{Deserialize, Serialize};

/// Names one entry of the host's quarantine. Random: names of files that are made of it cannot be
/// guessed in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Ticket(pub u64);

impl std::fmt::Display for Ticket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// What policy wants done with a file beyond the decision on its access.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum Remediation {
    /// Nothing.
    #[default]
    None,
    /// The file goes to the host's quarantine.
    Quarantine,
}

/// What policy wants done with processes that have an infected file mapped as program or library.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub enum Running {
    /// Nobody looks for them.
    #[default]
    Leave,
    /// They are named.
    Report,
    /// They are stopped (SIGSTOP), and named.
    Stop,
    /// They are killed (SIGKILL), and named.
    Kill,
}

/// A point in time: seconds since 1970 and nanoseconds, as in stat(2).
pub type Time = (i64, u32);

/// What tells a file and its content from every other. As long as it is the same, so is the content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileIdentity {
    /// Device number.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// Size in bytes.
    pub size: u64,
    /// Last change of the content.
    pub modified: Time,
    /// Last change of content or attributes.
    pub changed: Time,
}

/// What a restore gives back besides the content.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Attributes {
    /// Permission bits, with set-user-id, set-group-id and sticky bit.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last access.
    pub accessed: Time,
    /// Last change of the content.
    pub modified: Time,
    /// Extended attributes, names and values; POSIX ACLs and file capabilities are among them.
    pub xattrs: Vec<(serde_bytes::ByteBuf, serde_bytes::ByteBuf)>,
    /// Offset and length of each part that is not a hole, in order; empty for a file without holes.
    pub extents: Vec<(u64, u64)>,
    /// How many names the file had.
    pub links: u32,
}

impl Attributes {
    /// The most bytes of extended attributes, names and values together.
    pub const XATTRS_MAX: usize = 40 * 1024;
    /// The most parts that a sparse file is taken apart into; one with more is restored without
    /// holes.
    pub const EXTENTS_MAX: usize = 512;
}

/// The driver's answer to a verdict that asks for quarantine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The request that had the verdict.
    pub id: RequestId,
    /// The file, or why it stays.
    pub file: Result<Offered, Stays>,
}

/// A file that can go to quarantine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offered {
    /// A path that leads to it in the driver's own view; at most 4,096 bytes.
    pub path: serde_bytes::ByteBuf,
    /// What it was when its content was read.
    pub identity: FileIdentity,
    /// What a restore needs.
    pub attributes: Attributes,
}

/// The host has all of a file, durably: the guest's own may go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remove {
    /// The entry.
    pub ticket: Ticket,
    /// As offered.
    pub path: serde_bytes::ByteBuf,
    /// As offered.
    pub identity: FileIdentity,
}

/// What became of [`Remove`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removed {
    /// The entry.
    pub ticket: Ticket,
    /// How many other names the file still has, or why it stays.
    pub result: Result<u32, Stays>,
}

/// Why an infected file stays where it is. Opening it is denied all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Stays {
    /// It is not what it was when it was scanned.
    Changed,
    /// It had no name any more.
    Gone,
    /// A process has it open for writing.
    Writer,
    /// It is immutable or append-only (chattr(1)).
    Immutable,
    /// Its file system is mounted read-only.
    ReadOnly,
    /// No path leads to it in the driver's own view: it is in an overlay or a mount namespace of others.
    NoPath,
    /// Something is mounted on it.
    Busy,
    /// Its extended attributes are larger than [`Attributes::XATTRS_MAX`].
    Attributes,
    /// The system said no, with this errno.
    Failed {
        /// errno(3).
        errno: i32,
    },
}

/// A file comes back: what it shall be. Its content follows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restore {
    /// The entry.
    pub ticket: Ticket,
    /// Where to; absolute.
    pub path: serde_bytes::ByteBuf,
    /// Size in bytes.
    pub size: u64,
    /// Digest of the content.
    pub hash: ContentHash,
    /// What it shall have besides.
    pub attributes: Attributes,
    /// Whether a file that is there now is replaced.
    pub overwrite: bool,
}

/// A part of the content of a file that comes back; what no part covers is a hole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreContent {
    /// The entry.
    pub ticket: Ticket,
    /// Where in the file.
    pub offset: u64,
    /// At most [`RestoreContent::PIECE_MAX`] bytes.
    pub bytes: serde_bytes::ByteBuf,
    /// Whether this is the last part.
    pub last: bool,
}

impl RestoreContent {
    /// The most bytes in one part.
    pub const PIECE_MAX: usize = 32 * 1024;
    /// Parts that the host sends ahead of the driver's [`RestoreProgress`].
    pub const AHEAD: u32 = 8;
}

/// How many parts the driver has written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreProgress {
    /// The entry.
    pub ticket: Ticket,
    /// Parts since the restore began.
    pub parts: u32,
}

/// What became of a restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restored {
    /// The entry.
    pub ticket: Ticket,
    /// Nothing, or why the file is not there.
    pub result: Result<(), Obstacle>,
}

/// Why a file cannot come back to where it shall.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Obstacle {
    /// There is a file already, and it shall not be replaced.
    Exists,
    /// There is something else than a file.
    NotAFile,
    /// Its folder is not there, or a symbolic link leads to it.
    NoFolder,
    /// The file system is full, or a quota is.
    NoSpace,
    /// The file system is mounted read-only.
    ReadOnly,
    /// An attribute cannot be set, with this errno.
    Attributes {
        /// errno(3).
        errno: i32,
    },
    /// What arrived is not the content.
    Content,
    /// The restore was broken off.
    BrokenOff,
    /// The system said no, with this errno.
    Failed {
        /// errno(3).
        errno: i32,
    },
}
