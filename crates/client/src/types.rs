//! What the service answers. Durations and sizes carry their unit in the name.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What was found in a content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Every engine looked at all of it and found nothing.
    Clean,
    /// At least one engine found malware.
    Infected,
    /// No engine could say.
    Error,
    /// The scan took longer than it may.
    TimedOut,
}

/// How the service as a whole is.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// The service's version.
    pub version: String,
    /// Whether every engine runs with all its signatures, and every guest that was seen is protected.
    pub healthy: bool,
    /// What is not as it should be, for people; empty when `healthy`.
    pub problems: Vec<String>,
    /// When the service started (RFC 3339, UTC).
    pub started: String,
    /// Counts changes of engines and signatures.
    pub generation: u64,
    /// The engines, in the order in which they scan.
    pub engines: Vec<Engine>,
    /// Where their signatures come from, for those that take them of the host's sets.
    #[serde(default)]
    pub signatures: Signatures,
    /// How many guests are in each state.
    pub guests: GuestCounts,
    /// What was done since the start.
    pub counters: Counters,
    /// Verdicts in the cache now.
    pub cached_verdicts: u64,
    /// Copies of guests' content that wait for their scan.
    pub private_copies: PrivateCopies,
    /// How full the quarantine is.
    pub quarantine: QuarantineUse,
    /// What the drivers are told to do.
    pub policy: PolicyInForce,
    /// What the service itself costs, without its engines.
    pub resources: Resources,
}

/// How full the quarantine is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct QuarantineUse {
    /// Bytes on disk.
    pub used_bytes: u64,
    /// The most bytes on disk.
    pub most_bytes: u64,
}

/// What the drivers are told to do, in the words of the configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PolicyInForce {
    /// What is done with an infected file: `deny` or `quarantine`.
    pub infected: String,
    /// What an open gets that no verdict decided.
    pub fail_mode_open: String,
    /// The same for an exec.
    pub fail_mode_exec: String,
    /// A larger file is let through on access and scanned in the background, in bytes.
    pub whole_file_limit_bytes: u64,
    /// Which accesses are held and what is scanned besides, like `smart`.
    pub mode: String,
    /// How many exclusions there are.
    pub exclusions: usize,
}

/// How many guests are in each state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestCounts {
    /// Sessions with a heartbeat.
    pub protected: u32,
    /// Silent, but not for long enough for the alarm.
    pub silent: u32,
    /// Silent for longer than allowed.
    pub unprotected: u32,
    /// No driver since the guest was configured.
    pub never_seen: u32,
}

/// What a process costs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Resources {
    /// Resident memory in KiB.
    pub resident_kib: u64,
    /// CPU time used in milliseconds.
    pub cpu_ms: u64,
    /// Threads.
    pub threads: u32,
}

/// The memory for private copies.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PrivateCopies {
    /// Bytes in memory now.
    pub memory_bytes: u64,
    /// At most so many bytes are in memory.
    pub memory_limit_bytes: u64,
    /// Bytes in unlinked files now.
    pub spooled_bytes: u64,
}

/// What was done since the service started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Counters {
    /// Requests from guests.
    pub requests: u64,
    /// Bytes copied out of regions.
    pub bytes_copied: u64,
    /// Contents given to the engines.
    pub scans: u64,
    /// Requests answered by the verdict cache.
    pub cache_hits: u64,
    /// Requests that waited for another's scan of the same content.
    pub joined: u64,
    /// Verdicts by kind.
    pub verdicts: VerdictCounts,
    /// Requests whose content, or all that was found in it, policy excludes.
    pub excluded: u64,
    /// Events that were left out.
    pub events_dropped: u64,
}

/// Verdicts by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VerdictCounts {
    /// Clean.
    pub clean: u64,
    /// Infected.
    pub infected: u64,
    /// Error.
    pub error: u64,
    /// Timed out.
    pub timed_out: u64,
}

/// What an engine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EngineState {
    /// It loads its signatures.
    Starting,
    /// It takes scans.
    Ready,
    /// Its process ended; a new one is being started.
    Restarting,
    /// It cannot run; it is tried again.
    Failed,
}

/// One engine.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Engine {
    /// Its name in the configuration.
    pub name: String,
    /// What it does.
    pub state: EngineState,
    /// Why, where it is not ready.
    pub reason: Option<String>,
    /// What it says of itself: program and version.
    pub version: Option<String>,
    /// Digest of its signature set, in hexadecimal.
    pub signatures: Option<String>,
    /// Rules or signatures loaded.
    pub rules: Option<u32>,
    /// What its signature files say about themselves: broken and doubtful rules.
    pub diagnostics: Vec<Diagnostic>,
    /// Why the last new signature set was refused; the one before it is in use.
    pub refused: Vec<Diagnostic>,
    /// A new signature set is being loaded.
    pub loading: bool,
    /// Its process id.
    pub pid: Option<u32>,
    /// That of the one that stands ready to take its place, where the configuration wants a spare.
    #[serde(default)]
    pub spare_pid: Option<u32>,
    /// How often its process had to be replaced.
    pub restarts: u64,
    /// Contents that wait for it.
    pub queued: u64,
    /// Contents that it has.
    pub in_flight: u64,
    /// Contents that it was given since the service started.
    pub scans: u64,
    /// Of these, those that ended without clean or infected.
    pub failures: u64,
    /// What its process costs, with those that it started; a spare one not.
    pub resources: Option<Resources>,
}

/// What is wrong in a signature file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Diagnostic {
    /// `error` or `warning`.
    pub level: String,
    /// The file.
    pub file: String,
    /// The line, from 1; 0 where there is none.
    pub line: u32,
    /// The column, from 1; 0 where there is none.
    pub column: u32,
    /// A stable code.
    pub code: String,
    /// What is wrong.
    pub reason: String,
}

/// How a guest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GuestState {
    /// No driver since the guest was configured.
    NeverSeen,
    /// A session with a heartbeat.
    Protected,
    /// No session or no heartbeat, but not for long enough for the alarm.
    Silent,
    /// No sign of life for longer than allowed.
    Unprotected,
}

/// By what a guest is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LinkKind {
    /// The guest's unix socket: vhost-device-vsock, or a driver on this machine.
    Unix,
    /// TCP over the bridge, encrypted.
    Tcp,
    /// AF_VSOCK.
    Vsock,
    /// The guest's virtio-serial channel.
    Serial,
}

/// One guest. Strings under `session` come from the guest and are escaped.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Guest {
    /// Its name in the configuration.
    pub name: String,
    /// The group whose policy it has; none where no group names it.
    pub group: Option<String>,
    /// What its policy has held and scanned, like `smart`.
    pub mode: String,
    /// How it is.
    pub state: GuestState,
    /// Why, for people; empty when protected.
    pub reason: String,
    /// Since when it is in this state (RFC 3339, UTC).
    pub since: String,
    /// When its driver was there for the first time, also before the service's last start (RFC 3339,
    /// UTC); null for never.
    #[serde(default)]
    pub first_seen: Option<String>,
    /// When its driver was last there, to about 30 s (RFC 3339, UTC).
    #[serde(default)]
    pub last_seen: Option<String>,
    /// The file behind its region; none where content travels on the link.
    pub region: Option<String>,
    /// Why its region or its key file cannot be used, if so.
    pub region_fault: Option<String>,
    /// Its session, where there is one.
    pub session: Option<Session>,
    /// Requests since the service started.
    pub requests: u64,
    /// Verdicts for it since the service started.
    pub verdicts: VerdictCounts,
}

/// A guest's session.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Session {
    /// By what it is connected.
    pub link: LinkKind,
    /// When it began (RFC 3339, UTC).
    pub started: String,
    /// What the driver says of itself.
    pub driver: Driver,
    /// Milliseconds since the last heartbeat.
    pub heartbeat_age_ms: u64,
    /// Requests that wait for their verdict.
    pub outstanding: u32,
    /// What the driver counts, as of its last heartbeat.
    pub counters: DriverCounters,
    /// Which file systems the driver watches.
    pub coverage: Coverage,
}

/// What a driver says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Driver {
    /// The driver's version.
    pub version: String,
    /// The guest's kernel release.
    pub kernel: String,
    /// The guest's boot id.
    pub boot_id: String,
}

/// What a driver counts since its worker's start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DriverCounters {
    /// Permission events read.
    pub events: u64,
    /// Answered at once: own process, excluded, empty, not a regular file.
    pub passed: u64,
    /// Answered from what the driver remembers.
    pub remembered: u64,
    /// Requests sent to the host.
    pub requests: u64,
    /// Accesses denied because of a verdict.
    pub denied: u64,
    /// Accesses answered by fail mode.
    pub unscanned: u64,
    /// Of these, because more were outstanding than may be.
    pub overloaded: u64,
    /// Files let through unscanned that still wait for their scan.
    pub exposed: u64,
    /// Of these, files that somebody has open for writing; they are scanned at their last close.
    #[serde(default)]
    pub held_by_writer: u64,
    /// Files let through unscanned that were deleted before their scan: what they held is not known.
    #[serde(default)]
    pub unknown: u64,
    /// Mounts of which all files are being scanned, since more were let through than could be noted.
    #[serde(default)]
    pub mounts_exposed: u32,
    /// Permission events that wait for their answer.
    pub outstanding: u32,
    /// Whether a supervisor would answer if the worker died.
    pub supervised: bool,
    /// Resident memory of worker and supervisor in KiB.
    pub memory_kib: u32,
    /// CPU time of worker and supervisor in milliseconds.
    pub cpu_ms: u64,
}

/// Which file systems a driver watches.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Coverage {
    /// How many are watched.
    pub covered: u32,
    /// Those that are not.
    pub uncovered: Vec<Uncovered>,
}

/// A file system that is not watched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Uncovered {
    /// Where it is mounted.
    pub mount_point: String,
    /// Its type.
    pub fs_type: String,
    /// Why it is not watched.
    pub reason: String,
}

/// The answer to an on-demand scan.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ScanReport {
    /// The name that came with the content.
    pub name: String,
    /// What was found.
    pub verdict: Verdict,
    /// Why there is no verdict, for `error` and `timed_out`.
    pub reason: Option<String>,
    /// What was found, in the order of the engines.
    pub detections: Vec<Detection>,
    /// What each engine did; empty when the verdict was known.
    pub engines: Vec<EngineReport>,
    /// BLAKE3 of the content in hexadecimal.
    pub hash: String,
    /// The content's size in bytes.
    pub size: u64,
    /// Whether the verdict was known already.
    pub cached: bool,
    /// The generation of engines and signatures that looked.
    pub generation: u64,
    /// From the content's arrival to the verdict, in microseconds.
    pub duration_us: u64,
}

/// What one engine did with a content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EngineReport {
    /// The engine.
    pub engine: String,
    /// What it found.
    pub verdict: Verdict,
    /// What it detected.
    #[serde(default)]
    pub detections: Vec<Detection>,
    /// The entry of its list by which the content is known to be good: engines after it did not look.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed: Option<String>,
    /// Why it has no verdict.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// How long the content waited for it, in microseconds.
    pub queued_us: u64,
    /// How long it looked, in microseconds.
    pub scanned_us: u64,
}

/// Something found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Detection {
    /// The signature's name.
    pub name: String,
    /// `low`, `medium`, `high` or `critical`.
    pub severity: String,
    /// The malware family, where the signature names one.
    pub family: Option<String>,
    /// What would rid the file of it, where the signature says so: `delete`, or `cut N bytes at OFFSET`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cleaning: Option<String>,
    /// The engine that found it.
    pub engine: String,
    /// The member of the archive that it was found in: its path there, and `!/` between archives that lie in one
    /// another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub member: Option<String>,
}

/// The answer to a reload.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct Reload {
    /// Whether everything was taken over.
    pub taken: bool,
    /// Why the configuration was refused, with file, line and column; the running one stays.
    pub config_error: Option<String>,
    /// Changes that count only after a restart.
    pub restart_needed: Vec<String>,
    /// What became of each engine's signatures.
    pub engines: Vec<ReloadedEngine>,
}

/// What became of an engine's signatures at a reload.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ReloadedEngine {
    /// The engine.
    pub engine: String,
    /// Whether the new set is in use.
    pub taken: bool,
    /// Rules loaded, where it is.
    pub rules: Option<u32>,
    /// What is wrong with the set.
    pub diagnostics: Vec<Diagnostic>,
}

/// Which folder becomes a signature set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ApplyRequest {
    /// An absolute path on the service's host.
    pub folder: String,
    /// Load and try it, and leave everything as it is.
    #[serde(default)]
    pub check: bool,
}

/// Which signature set is to be used again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RollbackRequest {
    /// The set, or its first digits; the one that was in use before where there is none.
    pub set: Option<String>,
}

/// What a change of signatures came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ChangeKind {
    /// The first set, at a start of the service.
    First,
    /// Somebody applied a folder.
    Apply,
    /// Somebody asked what would become of a folder.
    Check,
    /// A watched folder changed.
    Watch,
    /// Somebody went back to an earlier set.
    Rollback,
}

/// A change of signatures, or the try.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SignatureChange {
    /// When it began, in UTC.
    pub at: String,
    /// What it came from.
    pub kind: ChangeKind,
    /// The set, where there was one.
    pub set: Option<String>,
    /// The folders that it was made of.
    pub from: Vec<String>,
    /// Whether the set is in use since, or would be after a check.
    pub taken: bool,
    /// Why it was refused, where it was; or that nothing is new.
    pub reason: Option<String>,
    /// What each engine gets.
    pub engines: Vec<SetEngine>,
    /// Files that no engine takes, the first of them.
    pub left_out: Vec<String>,
    /// How many these are.
    pub left_out_count: u64,
    /// Files that it had to find, and found.
    pub known_bad: u64,
    /// Files in which it had to find nothing, and did not.
    pub known_good: u64,
    /// How long it took from the order to the end, in milliseconds.
    pub took_ms: u64,
}

/// One engine's part of a signature set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SetEngine {
    /// The engine's name.
    pub engine: String,
    /// Its files.
    pub files: u64,
    /// Their length in bytes.
    pub bytes: u64,
    /// Whether it is another than that of the set before; otherwise the engine goes on as it is.
    pub changed: bool,
    /// Rules or signatures that it loaded.
    pub rules: Option<u32>,
    /// How long it took to load, in milliseconds.
    pub load_ms: Option<u64>,
    /// What its process holds in memory, in bytes: so much more than before while both are loaded.
    pub resident_bytes: Option<u64>,
    /// What its files say about themselves: broken and doubtful rules.
    pub diagnostics: Vec<Diagnostic>,
}

/// A signature set that is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SignatureSet {
    /// Its name: a digest of its files.
    pub set: String,
    /// Whether it is in use.
    pub in_use: bool,
    /// Whether its engines are loaded, so that going back to it takes no time.
    pub standby: bool,
    /// Since when, or when it was last taken into use, in UTC.
    pub taken: String,
    /// The folders that it was made of.
    pub from: Vec<String>,
    /// What each engine has of it.
    pub engines: Vec<SetEngine>,
}

/// Where the host's signatures come from and how they are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Signatures {
    /// The set in use; none where every engine has signatures of its own, or nothing was applied yet.
    pub set: Option<String>,
    /// Why the last new set was refused; that of before is in use.
    pub refused: Option<String>,
    /// What is being loaded and tried: its folders.
    pub loading: Option<String>,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Fault {
    /// A stable code.
    pub code: String,
    /// What happened, why, and what to do.
    pub message: String,
}

/// How far the quarantine of a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum QuarantineState {
    /// Here; whether the guest's file is gone is not known yet.
    Stored,
    /// Here alone.
    Quarantined,
    /// Here, and in the guest too; `detail` says why.
    Stays,
    /// It was given back.
    Restored,
}

/// One quarantined file. Strings that came from a guest are escaped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct QuarantineEntry {
    /// Its ticket: 16 hexadecimal digits.
    pub id: String,
    /// How far it is.
    pub state: QuarantineState,
    /// The rest of the story, for people; empty where there is none.
    pub detail: String,
    /// The guest it came from.
    pub guest: String,
    /// Where it was.
    pub path: String,
    /// The same path's bytes in hexadecimal, where they are not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_hex: Option<String>,
    /// What was found.
    pub detection: String,
    /// The engine that found it.
    pub engine: String,
    /// BLAKE3 of the content in hexadecimal.
    pub hash: String,
    /// The content's size in bytes.
    pub size: u64,
    /// When it was stored (RFC 3339, UTC).
    pub stored: String,
    /// Owner, mode and so on; left out in a listing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attributes: Option<QuarantineAttributes>,
}

/// What a restore gives back besides the content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct QuarantineAttributes {
    /// Permission bits in octal.
    pub mode: String,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change of the content (RFC 3339, UTC).
    pub modified: String,
    /// Names of the extended attributes.
    pub xattrs: Vec<String>,
    /// Whether it has holes.
    pub sparse: bool,
    /// How many names it had in the guest.
    pub links: u32,
}

/// The quarantine as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Quarantine {
    /// Newest first.
    pub entries: Vec<QuarantineEntry>,
    /// Bytes on disk.
    pub used_bytes: u64,
    /// The most bytes on disk.
    pub most_bytes: u64,
}

/// Where a file shall go.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RestoreRequest {
    /// The guest; the one it came from if left out.
    #[serde(default)]
    pub guest: Option<String>,
    /// The absolute path; where it was if left out.
    #[serde(default)]
    pub path: Option<String>,
    /// Whether a file that is there is replaced.
    #[serde(default)]
    pub overwrite: bool,
}

/// A content that passes although it is detected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Approval {
    /// BLAKE3 of the content in hexadecimal.
    pub hash: String,
    /// The guest in which it passes; all if left out.
    #[serde(default)]
    pub guest: Option<String>,
    /// Since when (RFC 3339, UTC); set by the service.
    #[serde(default)]
    pub since: String,
}
