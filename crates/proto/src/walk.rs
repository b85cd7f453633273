//! A scan of a guest's files that somebody asked for.
//!
//! The host says what, the driver walks and asks for the verdict on each file as for any other
//! ([`Operation::OnDemand`](crate::Operation::OnDemand)). Now and then, when no such request is under way, it says how
//! far it is; from there it can go on in another session, after a restart of either side or of the guest. A session
//! has one walk at a time.

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

/// The longest [`WalkProgress::place`], in bytes.
pub const PLACE_MAX: usize = 16 * 1024;

/// Starts a walk, or goes on with one; an earlier one of the session ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Walk {
    /// Names it in all messages about it.
    pub id: u64,
    /// Absolute paths of files and folders to scan; empty for all that is watched.
    pub roots: Vec<ByteBuf>,
    /// Not all files: what is being executed, what starts by itself, and what changed lately.
    pub quick: bool,
    /// Where it was; `None` begins at the beginning.
    pub place: Option<ByteBuf>,
    /// No more than this is read in a second, in bytes; 0 for no limit.
    pub bytes_per_second: u64,
    /// Larger files are left out, in bytes.
    pub file_limit: u64,
    /// It waits while the guest's processes wait for a disk or a CPU for a larger part of the time than this, in
    /// percent (PSI, `some avg10`); 0 for never.
    pub pressure_percent: u8,
}

/// What the host wants of a walk under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum WalkOrder {
    /// It stands still until [`Self::GoOn`].
    Hold,
    /// It goes on.
    GoOn,
    /// It ends.
    End,
}

/// How far a walk is, since it began in this session.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct WalkProgress {
    /// Which.
    pub id: u64,
    /// Where it can go on: the driver's own words, at most [`PLACE_MAX`] bytes.
    pub place: ByteBuf,
    /// Files come to.
    pub files: u64,
    /// Of these, files known to be clean, which were not sent.
    pub known: u64,
    /// Files that policy excludes.
    pub excluded: u64,
    /// Files and folders that could not be read, that are too large or too deep.
    pub missed: u64,
    /// Bytes sent to the host.
    pub bytes: u64,
    /// How many files there may be in all, as the file systems say; 0 where they do not.
    pub expected: u64,
    /// Whether it waits because of the guest's pressure.
    pub pressed: bool,
    /// Whether it is at its end.
    pub done: bool,
}

/// A file or folder that a walk left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalkMissed {
    /// The walk.
    pub id: u64,
    /// Its path, or that of the folder that it is in, at most 4,096 bytes.
    pub path: ByteBuf,
    /// Why, for people.
    pub reason: String,
}
