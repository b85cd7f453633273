//! Golden images: templates whose files the service knows in their clones.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What the service has learned of a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GoldenList {
    /// Its name.
    pub name: String,
    /// Of what it was learned: `guest NAME` or `tree PATH`, escaped.
    pub source: String,
    /// The tenant whose guests use it; none for those that have no tenant, or, for a tree, all.
    #[serde(default)]
    pub tenant: Option<String>,
    /// How many files.
    pub files: u64,
    /// When it was learned (RFC 3339, UTC).
    pub learned: String,
    /// Files of clones that were known by it since the service started.
    pub known: u64,
    /// Of files of clones that would have been known, those whose content was asked for all the same, to see whether it is
    /// the same.
    pub sampled: u64,
}

/// A guest that is known not to be a clone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GoldenDistrust {
    /// The guest.
    pub guest: String,
    /// The list with which it did not agree.
    pub list: String,
    /// The file in which its content was another, escaped.
    pub path: String,
    /// Since when (RFC 3339, UTC).
    pub since: String,
}

/// All that was learned, and of whom it is not used.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct GoldenReport {
    /// By name.
    pub lists: Vec<GoldenList>,
    /// Guests for which no list is used any more.
    pub distrusted: Vec<GoldenDistrust>,
}

/// Whose files are to be learned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GoldenLearnRequest {
    /// The guest, which is the template.
    pub guest: String,
}

/// The files of a tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GoldenFiles {
    /// The tree's path on this machine.
    pub tree: String,
    /// Its files with content, scanned and clean.
    pub files: Vec<GoldenFile>,
}

/// A file of a tree, as statx(2) and statfs(2) show it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GoldenFile {
    /// Type of the file system (`f_type`).
    pub fs_type: u64,
    /// Its id (`f_fsid`).
    pub fs_id: u64,
    /// Inode number.
    pub inode: u64,
    /// Size in bytes.
    pub size: u64,
    /// Last change of the content: seconds since 1970, and nanoseconds.
    pub modified: (i64, u32),
    /// Last change of content or attributes.
    pub changed: (i64, u32),
    /// When the inode was made.
    pub born: (i64, u32),
    /// BLAKE3 of the content, in hexadecimal.
    pub hash: String,
}
