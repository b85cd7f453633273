//! Scans of guests' files on demand.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How a scan of a guest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GuestScanState {
    /// It waits for its turn.
    Queued,
    /// It is under way.
    Running,
    /// It was begun, and its guest's driver is away; it goes on where it was.
    Waiting,
    /// The operator had it stop; it goes on where it was when he says so.
    Paused,
    /// It came to its end.
    Done,
    /// The operator ended it.
    Cancelled,
    /// It cannot go on; `reason` says why.
    Failed,
}

impl GuestScanState {
    /// Whether nothing more comes of it.
    #[must_use]
    pub fn has_ended(self) -> bool {
        matches!(self, Self::Done | Self::Cancelled | Self::Failed)
    }

    /// For people.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Waiting => "waiting",
            Self::Paused => "paused",
            Self::Done => "done",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        }
    }
}

/// A scan of a guest's files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GuestScan {
    /// Its number.
    pub id: u64,
    /// The guest.
    pub guest: String,
    /// What is scanned; empty for all that its driver watches.
    pub paths: Vec<String>,
    /// The schedule that has it done; none where somebody asked.
    #[serde(default)]
    pub schedule: Option<String>,
    /// The golden image that is learned by it; none where it is a scan alone.
    #[serde(default)]
    pub learns: Option<String>,
    /// Whether only what is being executed, starts by itself or changed within seven days is scanned.
    pub quick: bool,
    /// How it is.
    pub state: GuestScanState,
    /// Why it is so, for people; empty where there is nothing to say.
    pub reason: String,
    /// When it was asked for (RFC 3339, UTC).
    pub asked: String,
    /// When it began.
    pub started: Option<String>,
    /// When it ended.
    pub ended: Option<String>,
    /// For how long it was under way, in milliseconds.
    pub took_ms: u64,
    /// Files come to.
    pub files: u64,
    /// How many there may be in all, as the guest's file systems say; 0 where that is not known.
    pub expected: u64,
    /// Bytes that the guest sent.
    pub bytes: u64,
    /// Files that the guest knew to be clean and did not send.
    pub known: u64,
    /// Files that policy excludes.
    pub excluded: u64,
    /// Files and folders that were left out: unreadable, too large, too deep.
    pub missed: u64,
    /// Files on which the engines came to no verdict.
    pub errors: u64,
    /// Infected files.
    pub infected: u64,
    /// Those that are named, at most 1,000.
    #[serde(default)]
    pub found: Vec<FoundFile>,
    /// What was left out or has no verdict, named, at most 200.
    #[serde(default)]
    pub left_out: Vec<LeftOut>,
}

impl GuestScan {
    /// Files in a second, over the time that it was under way.
    #[must_use]
    pub fn files_per_second(&self) -> f64 {
        if self.took_ms == 0 { 0.0 } else { self.files as f64 * 1000.0 / self.took_ms as f64 }
    }

    /// Seconds that are left at this rate, where it is known how many files there are.
    #[must_use]
    pub fn left_seconds(&self) -> Option<u64> {
        let rate = self.files_per_second();
        let left = self.expected.checked_sub(self.files).filter(|_| self.expected > 0)?;
        (rate > 0.0).then(|| (left as f64 / rate) as u64)
    }
}

/// An infected file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FoundFile {
    /// Its path, escaped.
    pub path: String,
    /// What is found in it.
    pub detection: String,
    /// `low`, `medium`, `high` or `critical`.
    pub severity: String,
    /// The engine that found it.
    pub engine: String,
    /// The member of the archive that it is in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub member: Option<String>,
    /// The content's BLAKE3 digest.
    pub hash: String,
    /// What policy does about it: `allow`, `deny`, `quarantine` or `delete`.
    pub action: String,
}

/// Something that was left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LeftOut {
    /// The path, escaped; empty where it is not known.
    pub path: String,
    /// Why.
    pub reason: String,
}

/// Which guests are to be scanned.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ScansRequest {
    /// These guests.
    #[serde(default)]
    pub targets: Vec<ScanTarget>,
    /// Those of these groups.
    #[serde(default)]
    pub groups: Vec<String>,
    /// All guests.
    #[serde(default)]
    pub all: bool,
    /// Not all files, see [`GuestScan::quick`].
    #[serde(default)]
    pub quick: bool,
}

/// A guest, or a part of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ScanTarget {
    /// Its name.
    pub guest: String,
    /// Absolute paths of files and folders; empty for everything.
    #[serde(default)]
    pub paths: Vec<String>,
}

/// A schedule of scans.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ScheduleReport {
    /// Its name.
    pub name: String,
    /// When it runs, as the configuration has it.
    pub cron: String,
    /// When it runs next (RFC 3339, UTC).
    pub next: Option<String>,
    /// When it last ran.
    pub last: Option<String>,
    /// Whether the operator has one time left out; `next` is the one after.
    pub skip: bool,
    /// The guests that it is for now.
    pub guests: Vec<String>,
    /// Whether it is quick, see [`GuestScan::quick`].
    pub quick: bool,
    /// How long it may take each time, in minutes; 0 for no end.
    pub window_minutes: u32,
    /// Within how many minutes its guests begin.
    pub spread_minutes: u32,
}
