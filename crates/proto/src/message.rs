//! The messages of protocol version 1.
//!
//! The order of variants and fields is the format (postcard): new variants go at the end, and
//! [`frame::Message::KINDS`](crate::frame::Message::KINDS) grows with them.

use crate::policy::PolicyPart;
use crate::remedy::{self, Remediation, Running, Ticket};
use crate::walk;
use crate::{
    ContentHash, Decision, Fingerprint, Generation, Proof, RegionId, RequestId, RingKey,
    VerdictKind,
};
use serde::{Deserialize, Serialize};

/// What the driver says to the host.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum ToHost {
    /// The first message of a session: who is there, and the proof that it is the guest's root.
    Attach(Attach),
    /// A file access waits for a verdict.
    ScanRequest(ScanRequest),
    /// More content of an open request.
    Content(Content),
    /// The driver waits for this request no longer; its slots stay the host's until it says
    /// [`ToGuest::Copied`] or sends the verdict.
    Cancel(RequestId),
    /// The driver lives; sent every [`Attached::heartbeat_ms`].
    Heartbeat(Heartbeat),
    /// Something that the operator may want to know.
    Notice(Notice),
    /// An infected file that policy wants in quarantine, or why it stays.
    Offer(remedy::Offer),
    /// What became of a removal.
    Removed(remedy::Removed),
    /// How far a restore is.
    RestoreProgress(remedy::RestoreProgress),
    /// What became of a restore.
    Restored(remedy::Restored),
    /// How far a walk is.
    WalkProgress(walk::WalkProgress),
    /// What a walk left out.
    WalkMissed(walk::WalkMissed),
    /// Something was asked in the ring while the host did not look at it.
    Doorbell,
    /// As [`Self::ScanRequest`], for a file with this fingerprint; it brings [`Part::Fingerprint`] or [`Part::Hash`].
    Fingerprinted(Fingerprint, ScanRequest),
    /// The content of an open request ends here, though no part of it was said to be the last.
    Ended(Ended),
}

/// What the host says to the driver.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum ToGuest {
    /// The session stands once the policy, which follows, is whole.
    Attached(Attached),
    /// The session does not stand; the host closes the connection.
    Refused(Refusal),
    /// The answer to a request. It also gives back whatever slots of it were not copied yet.
    Verdict(Verdict),
    /// The host has copied this many slots of a request so far, in the order in which they were
    /// sent; they are free again.
    Copied {
        /// The request.
        id: RequestId,
        /// Slots copied since the request began.
        slots: u32,
    },
    /// A part of the policy: after [`Self::Attached`], and whenever it changes.
    Policy(PolicyPart),
    /// Engines or signatures changed: nothing remembered of an older generation counts.
    Generation(Generation),
    /// The host lives: its answer to each heartbeat. A scan may take longer than the driver would
    /// otherwise believe in a silent host.
    Alive,
    /// A file is in quarantine: the guest's own may go.
    Remove(remedy::Remove),
    /// A file comes back.
    Restore(remedy::Restore),
    /// A part of its content.
    RestoreContent(remedy::RestoreContent),
    /// It does not come back after all.
    RestoreEnd(Ticket),
    /// The files of the guest are to be scanned.
    Walk(walk::Walk),
    /// What the walk of this number shall do.
    WalkOrder(u64, walk::WalkOrder),
    /// The host does not know the content whose hash this request named. The request is over; the driver sends
    /// the content with another one.
    SendContent(RequestId),
    /// The driver may ask in the ring of the session's region; this is the key of its digests.
    Ring(RingKey),
    /// A reply that the driver did not look for in the ring.
    Answered {
        /// The query's number.
        number: u64,
        /// That the content is clean; `None` where that is not known.
        clean: Option<Clean>,
    },
    /// What the host does with fingerprints from now on; before the first of these, nothing.
    Golden(Golden),
}

/// What the host does with files' fingerprints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Golden {
    /// It knows some: the driver may ask by a file's fingerprint ([`Part::Fingerprint`]), and names it with the content that
    /// it sends then.
    pub knows: bool,
    /// It learns them: requests of walks name each file's fingerprint, also those for files that the driver remembers.
    pub learns: bool,
}

impl Golden {
    /// Whether files are asked for by their fingerprints: not while a template is learned, which is to be seen as it is.
    #[must_use]
    pub fn is_asked(self) -> bool {
        self.knows && !self.learns
    }
}

/// A content is known to be clean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clean {
    /// It is an archive that nobody has looked into.
    pub unopened: bool,
    /// The generation whose engines looked.
    pub generation: Generation,
    /// Its digest, as the host has it.
    pub hash: ContentHash,
}

/// Opens a session.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Attach {
    /// Shows that the sender can read the region's header.
    pub proof: Proof,
    /// The region that the driver has mapped.
    pub region: RegionId,
    /// The driver's version, for the operator.
    pub driver_version: String,
    /// The guest's kernel release, for the operator.
    pub kernel: String,
    /// The kernel's random boot id: tells a reconnect from a reboot.
    pub boot_id: String,
}

/// The host's answer to [`Attach`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Attached {
    /// The name by which the host knows this guest.
    pub guest: String,
    /// The generation of engines and signatures in use.
    pub generation: Generation,
    /// How often the driver sends a heartbeat, in milliseconds.
    pub heartbeat_ms: u32,
}

/// Why a session was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// The proof does not fit the key in the region's current header: read it again.
    Proof,
    /// The region named is not this guest's.
    Region,
    /// The first message was not [`Attach`].
    Order,
}

/// Why the driver asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Operation {
    /// A process opens the file and waits.
    Open,
    /// A process executes the file and waits.
    Exec,
    /// Nobody waits: the file was written, was let through unscanned before, or was running when
    /// the driver started.
    Background,
    /// Nobody waits: somebody asked for a scan of the guest's files.
    OnDemand,
}

/// Asks for a verdict. What is in `content` is the file's beginning; the rest follows in
/// [`Content`] messages.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ScanRequest {
    /// Names this request in the session.
    pub id: RequestId,
    /// Why the driver asks.
    pub operation: Operation,
    /// How long the driver waits at most, in milliseconds.
    pub deadline_ms: u32,
    /// What the guest says of the file.
    pub file: FileMetadata,
    /// The first part of the content.
    pub part: Part,
    /// Whether `part` is all of it.
    pub last: bool,
}

/// What the guest says of a file: for the operator's eyes and the engines' hints, never believed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FileMetadata {
    /// The path as the driver sees it, at most 4,096 bytes; any bytes but NUL.
    pub path: serde_bytes::ByteBuf,
    /// Whether opening that path without symlinks, in the driver's own namespace, gave this file.
    pub path_is_true: bool,
    /// Device and inode number.
    pub inode: (u64, u64),
    /// Size in bytes when the driver began to read.
    pub size: u64,
    /// The process that waits; 0 where none does.
    pub pid: u32,
}

/// More content of an open request.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Content {
    /// The request.
    pub id: RequestId,
    /// The next part.
    pub part: Part,
    /// Whether the content ends here.
    pub last: bool,
}

/// Ends a content, where [`Golden`] wants to know whose it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// The request.
    pub id: RequestId,
    /// The fingerprint of its file, if that was the same before and after all was read, and nobody wrote it.
    pub fingerprint: Option<Fingerprint>,
}

/// Part of a content. All parts of one request are of one kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Part {
    /// Slots of the region, in order.
    Slots(Vec<SlotRef>),
    /// The bytes themselves, at most [`INLINE_MAX`](crate::INLINE_MAX), where the guest has no region.
    /// They are the host's when they arrive: no [`ToGuest::Copied`] follows.
    Inline(serde_bytes::ByteBuf),
    /// Not the content but its digest, for a host that knows it: all that a request brings. The host answers
    /// from what it found in such content, if it was clean, or with [`ToGuest::SendContent`].
    Hash(ContentHash),
    /// Neither, but the file's fingerprint, which the message names besides: all that a request brings. The host answers
    /// from what it found in the content that it has learned of such a file, or with [`ToGuest::SendContent`].
    Fingerprint,
}

/// Bytes in the region: the first `len` of one slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotRef {
    /// The slot's number.
    pub index: u16,
    /// How many bytes of it are content.
    pub len: u32,
}

/// The answer to a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// The request.
    pub id: RequestId,
    /// What the host found.
    pub kind: VerdictKind,
    /// What policy decides; `None` leaves it to the fail mode.
    pub decision: Option<Decision>,
    /// The generation whose engines looked.
    pub generation: Generation,
    /// The digest of what the host copied; `None` when the content never became whole.
    pub hash: Option<ContentHash>,
    /// The first detection's name, or why there is no verdict.
    pub detail: Option<String>,
    /// What policy wants done with the file besides.
    pub remediation: Remediation,
    /// And with processes that have it mapped as program or library.
    pub running: Running,
}

/// Sent while the driver lives. Counters count from the worker's start.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Heartbeat {
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
    pub held_by_writer: u64,
    /// Files let through unscanned that were deleted before their scan.
    pub unknown: u64,
    /// Mounts of which all files are to be scanned, since more were let through than could be noted.
    pub mounts_exposed: u32,
    /// Permission events that wait for their answer now.
    pub outstanding: u32,
    /// Whether a supervisor would answer if the worker died.
    pub supervised: bool,
    /// Resident memory of worker and supervisor in KiB (PSS, without the region).
    pub memory_kib: u32,
    /// CPU time of worker and supervisor in milliseconds.
    pub cpu_ms: u64,
}

/// Something that the operator may want to know.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Notice {
    /// What became of a request that was not simply clean and allowed.
    Outcome(Outcome),
    /// An access was answered without a verdict.
    Unscanned {
        /// What the guest says of the file.
        file: FileMetadata,
        /// What the process wanted.
        operation: Operation,
        /// Why there was no verdict.
        reason: ExposureReason,
        /// What fail mode made of it.
        decision: Decision,
        /// Who waited.
        process: Process,
        /// How long it waited, in milliseconds.
        waited_ms: u32,
        /// How long ago it was answered when this was sent, in milliseconds: a report waits for a
        /// session.
        age_ms: u64,
    },
    /// Which file systems the driver watches; sent at attach and at each change.
    Coverage(Coverage),
    /// The supervisor started a new worker after the last one died.
    WorkerRestarted {
        /// Events that fail mode answered in its place.
        orphans: u32,
    },
    /// A file that was let through unscanned was deleted before it could be scanned: what it held is
    /// not known.
    ExposureGone {
        /// Its path when it was let through, at most 4,096 bytes; empty where there was none.
        path: serde_bytes::ByteBuf,
        /// Why it was let through.
        reason: ExposureReason,
    },
    /// More files were let through unscanned than could be noted: the driver scans all files of this
    /// mount.
    MountExposed {
        /// Where it is mounted, at most 4,096 bytes; empty for all that is watched.
        mount_point: serde_bytes::ByteBuf,
    },
    /// Processes have an infected file mapped as program or library.
    Mapped {
        /// The file's path, at most 4,096 bytes; empty where there was none.
        path: serde_bytes::ByteBuf,
        /// Whether the driver could open the file by it.
        path_is_true: bool,
        /// Who they are, and what became of them; at most [`Mapper::MOST`].
        mappers: Vec<Mapper>,
        /// Further ones, with which the same was done.
        more: u32,
    },
}

/// A process that has an infected file mapped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapper {
    /// Its process id.
    pub pid: u32,
    /// Its name and user.
    pub process: Process,
    /// What was done with it.
    pub end: MapperEnd,
}

impl Mapper {
    /// The most of one file that are told one by one.
    pub const MOST: usize = 16;
}

/// What was done with a process that has an infected file mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MapperEnd {
    /// Nothing: policy wants no more than to know.
    Left,
    /// It was stopped (SIGSTOP).
    Stopped,
    /// It was killed (SIGKILL).
    Killed,
    /// Nothing: the guest's first process has the file mapped, too, and does not live without it.
    Spared,
    /// The kernel refused, with this error.
    Failed {
        /// As in errno(3).
        errno: i32,
    },
}

/// What became of a request.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Outcome {
    /// The request.
    pub id: RequestId,
    /// What the kernel was told; `None` where nobody waited any more.
    pub decision: Option<Decision>,
    /// Who waited.
    pub process: Process,
}

/// The process that waits for an access: for the operator's eyes, never believed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Process {
    /// Its name (`/proc/PID/comm`), any bytes; empty where it is not known.
    pub name: serde_bytes::ByteBuf,
    /// Its real user id.
    pub uid: Option<u32>,
}

/// Why an access was answered without a verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ExposureReason {
    /// There was no session with the host.
    LinkDown,
    /// The deadline passed.
    Deadline,
    /// The file is larger than the whole-file limit.
    TooLarge,
    /// The host had no verdict: an engine failed, or it was overloaded.
    HostError,
    /// More events were outstanding than may be.
    Overload,
    /// The content changed each time it was read.
    Changing,
    /// The driver could not read the file.
    Unreadable,
    /// The worker that held the event died.
    WorkerDied,
    /// Somebody had it open for writing: what was scanned may not be what it holds now.
    HeldByWriter,
    /// It was running before the driver watched its file system.
    RanBefore,
}

impl ExposureReason {
    /// As a number, for memory that two processes share.
    #[must_use]
    pub fn number(self) -> u32 {
        self as u32
    }

    /// Back from [`Self::number`].
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        [
            Self::LinkDown,
            Self::Deadline,
            Self::TooLarge,
            Self::HostError,
            Self::Overload,
            Self::Changing,
            Self::Unreadable,
            Self::WorkerDied,
            Self::HeldByWriter,
            Self::RanBefore,
        ]
        .into_iter()
        .find(|reason| reason.number() == number)
    }
}

/// Which file systems the driver watches.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Coverage {
    /// How many file systems carry marks.
    pub covered: u32,
    /// Those that do not.
    pub uncovered: Vec<Uncovered>,
}

/// A file system without marks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uncovered {
    /// Where it is mounted, any bytes.
    pub mount_point: serde_bytes::ByteBuf,
    /// Its type, as in mountinfo.
    pub fs_type: String,
    /// Why it is not watched.
    pub reason: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{self, Message};

    /// The bytes of version 1. A change here is a new protocol version.
    #[test]
    fn version_1_is_pinned() {
        let request = ToHost::ScanRequest(ScanRequest {
            id: RequestId(300),
            operation: Operation::Exec,
            deadline_ms: 5,
            file: FileMetadata {
                path: serde_bytes::ByteBuf::from(b"/a\xff".to_vec()),
                path_is_true: true,
                inode: (1, 2),
                size: 3,
                pid: 4,
            },
            part: Part::Slots(vec![SlotRef { index: 7, len: 3 }]),
            last: true,
        });
        let mut wire = Vec::new();
        frame::encode(&request, &mut wire).expect("it is short");
        assert_eq!(
            wire,
            b"\x13\0\0\0\x01\xac\x02\x01\x05\x03/a\xff\x01\x01\x02\x03\x04\0\x01\x07\x03\x01"
        );
        let part = Part::Inline(serde_bytes::ByteBuf::from(b"abc".to_vec()));
        let content = ToHost::Content(Content { id: RequestId(300), part, last: false });
        wire.clear();
        frame::encode(&content, &mut wire).expect("it is short");
        assert_eq!(wire, b"\x09\0\0\0\x02\xac\x02\x01\x03abc\0");
        let part = Part::Hash(ContentHash([7; 32]));
        let content = ToHost::Content(Content { id: RequestId(300), part, last: true });
        wire.clear();
        frame::encode(&content, &mut wire).expect("it is short");
        assert_eq!(wire, [b"\x25\0\0\0\x02\xac\x02\x02".as_slice(), &[7; 32], &[1]].concat());
        let verdict = ToGuest::Verdict(Verdict {
            id: RequestId(300),
            kind: VerdictKind::Infected,
            decision: Some(Decision::Deny),
            generation: Generation(2),
            hash: None,
            detail: Some("x".into()),
            remediation: Remediation::Quarantine,
            running: Running::Kill,
        });
        wire.clear();
        frame::encode(&verdict, &mut wire).expect("it is short");
        assert_eq!(wire, b"\x0d\0\0\0\x02\xac\x02\x01\x01\x01\x02\0\x01\x01x\x01\x03");
    }

    #[test]
    fn the_longest_request_fits_a_frame() {
        let inline = Part::Inline(serde_bytes::ByteBuf::from(vec![0xff; crate::INLINE_MAX]));
        let slots = Part::Slots(vec![SlotRef { index: u16::MAX, len: u32::MAX }; 256]);
        for part in [inline, slots] {
            let request = ToHost::ScanRequest(ScanRequest {
                id: RequestId(u64::MAX),
                operation: Operation::Background,
                deadline_ms: u32::MAX,
                file: FileMetadata {
                    path: serde_bytes::ByteBuf::from(vec![b'/'; 4096]),
                    path_is_true: true,
                    inode: (u64::MAX, u64::MAX),
                    size: u64::MAX,
                    pid: u32::MAX,
                },
                part,
                last: false,
            });
            assert_eq!(frame::encode(&request, &mut Vec::new()), Ok(()));
        }
    }

    #[test]
    fn the_last_kinds_are_known() {
        let ended = Ended { id: RequestId(1), fingerprint: None };
        for (payload, kinds) in [
            (postcard::to_stdvec(&ToHost::Ended(ended)), ToHost::KINDS),
            (postcard::to_stdvec(&ToGuest::Golden(Golden::default())), ToGuest::KINDS),
        ] {
            assert_eq!(u32::from(payload.expect("it is short")[0]) + 1, kinds);
        }
    }
}
