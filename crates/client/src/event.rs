//! One line of the event log.
//!
//! Names and meanings of the fields are stable: programs read them. A field that does not apply is
//! left out. Strings that came from a guest are escaped ([`text::escape`](crate::text::escape)).

use crate::types::Verdict;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// What an event tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// A request ended with another verdict than clean.
    Verdict,
    /// A driver reported what it did with a request whose verdict event was already written.
    Outcome,
    /// An access was answered without a verdict, by fail mode.
    Unscanned,
    /// A file that was let through unscanned was deleted before its scan: what it held is not known.
    ExposureGone,
    /// More files were let through unscanned than a driver can note: it scans all files of that mount.
    MountExposed,
    /// A process of a guest has an infected file mapped as program or library; `reason` says what became of it.
    Mapped,
    /// Which file systems of a guest are watched changed.
    Coverage,
    /// A guest's supervisor started a new worker after the last one died.
    WorkerRestarted,
    /// A guest's driver opened a session.
    SessionStarted,
    /// A guest's session ended.
    SessionEnded,
    /// No sign of life from a guest's driver for longer than allowed.
    GuestUnprotected,
    /// The driver of an unprotected guest is back.
    GuestProtected,
    /// An engine takes scans with the signatures named.
    EngineReady,
    /// An engine's process ended and is started again.
    EngineRestarting,
    /// An engine cannot run.
    EngineFailed,
    /// New signatures were refused; the last good set stays in use.
    SignaturesRefused,
    /// A signature set is in use from now on.
    SignaturesTaken,
    /// The service started.
    ServiceStarted,
    /// The service ended in good order.
    ServiceStopped,
    /// The configuration was read again.
    ConfigReloaded,
    /// The configuration could not be read again; the running one stays.
    ConfigRefused,
    /// Events were left out: the queue or the disk was full, or a guest caused too many.
    EventsDropped,
    /// An infected file is in quarantine, and the guest's own is gone.
    Quarantined,
    /// An infected file was deleted in its guest, and nothing of it is kept, as policy says.
    FileDeleted,
    /// An infected file cannot be removed from its guest, which denies it; `reason` says why.
    QuarantineStays,
    /// An infected file could not be stored; it stays in its guest, which denies it.
    QuarantineFailed,
    /// An entry was dropped: the quarantine was full, or the entry too old.
    QuarantineDropped,
    /// The operator deleted an entry.
    QuarantineDeleted,
    /// The quarantine is nearly full.
    QuarantineFilling,
    /// Something in the quarantine's store or index is damaged.
    QuarantineDamaged,
    /// A file was given back to a guest.
    Restored,
    /// A file could not be given back; it is still in quarantine.
    RestoreFailed,
    /// The operator lets a content pass, in one guest or in all.
    Approved,
    /// The operator took that back.
    ApprovalRevoked,
    /// A scan of a guest's files came to its end, or was ended.
    ScanEnded,
    /// The files of a template are known from now on; `reason` says which and how many.
    GoldenLearned,
    /// A file of a guest holds another content than the same file of the golden image: none is used for it any more.
    GoldenDistrusted,
    /// A database of the service was damaged or of another version: it was set aside and a new one
    /// begun.
    DatabaseSetAside,
    /// A kind that this build does not know.
    #[serde(other)]
    Unknown,
}

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Its number: later events have higher ones, also after a restart, and none is used twice. There
    /// may be gaps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// When, in UTC with milliseconds (RFC 3339).
    pub time: String,
    /// When it happened, by the same clock, where that was before it was told: a guest without a session
    /// keeps its reports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub occurred: Option<String>,
    /// What happened.
    pub kind: EventKind,
    /// The guest concerned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<String>,
    /// The file's path as the guest says, escaped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// The same path's bytes in hexadecimal, where they are not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_hex: Option<String>,
    /// Whether the driver could open the file by that path; a false path may be made up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_is_true: Option<bool>,
    /// What the process wanted: `open`, `exec` or `background`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<String>,
    /// What the process got: `allow` or `deny`; left out where nobody waited or it is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decision: Option<String>,
    /// What the host found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Verdict>,
    /// The first detection's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detection: Option<String>,
    /// The member of the archive that it is in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub member: Option<String>,
    /// The engine concerned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<String>,
    /// BLAKE3 of the content that was scanned, in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash: Option<String>,
    /// The content's size in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// The name of the process that waited, escaped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<String>,
    /// Its process id in the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Its real user id in the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// From the request's arrival to its verdict, in microseconds; of an access without a verdict, how
    /// long it was held, in whole milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration_us: Option<u64>,
    /// How many: events dropped, accesses answered in a dead worker's place, file systems not
    /// watched, rules loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u64>,
    /// The generation of engines and signatures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    /// The entry of the quarantine concerned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ticket: Option<String>,
    /// Why, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl Event {
    /// An event with nothing but its kind. The writer of the log sets the time.
    #[must_use]
    pub fn new(kind: EventKind) -> Self {
        Self {
            id: None,
            time: String::new(),
            occurred: None,
            kind,
            guest: None,
            path: None,
            path_hex: None,
            path_is_true: None,
            operation: None,
            decision: None,
            verdict: None,
            detection: None,
            member: None,
            engine: None,
            hash: None,
            size: None,
            process: None,
            pid: None,
            uid: None,
            duration_us: None,
            count: None,
            generation: None,
            ticket: None,
            reason: None,
        }
    }

    /// The same event about a guest.
    #[must_use]
    pub fn guest(mut self, name: &str) -> Self {
        self.guest = Some(name.to_owned());
        self
    }

    /// The same event with a reason.
    #[must_use]
    pub fn reason(mut self, reason: impl Into<String>) -> Self {
        self.reason = Some(reason.into());
        self
    }
}

/// Which events are wanted: those for which everything named holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub struct EventsQuery {
    /// The guest's name.
    pub guest: Option<String>,
    /// Kinds, separated by commas: any of them.
    pub kind: Option<String>,
    /// Not before this time (RFC 3339).
    pub since: Option<String>,
    /// Before this time (RFC 3339); not with `follow`.
    pub until: Option<String>,
    /// The content's hash begins with this: 4 to 64 hexadecimal digits.
    pub hash: Option<String>,
    /// The path, escaped as in the event, holds this text; case counts and no character is special.
    pub path: Option<String>,
    /// `clean`, `infected`, `error` or `timed_out`.
    pub verdict: Option<String>,
    /// Only events with a higher id, the oldest first: to go on where one was.
    pub after: Option<u64>,
    /// At most so many: the newest, or with `after` the next ones; 50 unless named, at most 100000.
    /// With `follow`: how many of the newest to begin with.
    #[param(maximum = 100000)]
    pub limit: Option<u32>,
    /// Whether to go on with those that come.
    pub follow: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_of_a_later_service_is_read() {
        let line = r#"{"time":"2026-11-23T10:00:00.000Z","kind":"from_the_future","x":1}"#;
        let event: Event = serde_json::from_str(line).unwrap();
        assert_eq!(event.kind, EventKind::Unknown);
    }

    #[test]
    fn what_does_not_apply_is_left_out() {
        let event = Event::new(EventKind::GuestProtected).guest("g1");
        let line = serde_json::to_string(&event).unwrap();
        assert_eq!(line, r#"{"time":"","kind":"guest_protected","guest":"g1"}"#);
    }
}
