//! Messages between the guest driver (`seawall-agent`) and the host service (`seawalld`).
//!
//! A link carries, in each direction, one fixed-layout [`Hello`] and then length-prefixed frames
//! ([`frame`]) that each hold one message: [`ToHost`] from the driver, [`ToGuest`] from the host.
//! This crate does no I/O: [`frame::Decoder`] takes bytes as they arrive and gives whole payloads.
//!
//! ```
//! use seawall_proto::{frame, ToHost, Heartbeat};
//!
//! let mut wire = Vec::new();
//! frame::encode(&ToHost::Heartbeat(Heartbeat::default()), &mut wire)?;
//! let mut decoder = frame::Decoder::new();
//! decoder.extend(&wire);
//! let payload = decoder.next_payload()?.expect("the frame is whole");
//! assert!(matches!(frame::decode(payload)?, Some(ToHost::Heartbeat(_))));
//! # Ok::<(), frame::FrameError>(())
//! ```
//!
//! Whatever comes from a guest is hostile. Lengths are checked before anything is allocated, and a
//! value that passed this crate is well-formed, not true.

pub mod frame;
pub mod golden;
mod hello;
mod identity;
mod message;
pub mod noise;
mod policy;
pub mod remedy;
mod rules;
pub mod serial;
mod types;
pub mod walk;

pub use golden::Fingerprint;
pub use hello::{Hello, HelloError, PREFACE_LEN, Preface};
pub use identity::{Key, Proof, RegionId, RingKey};
pub use message::{
    Attach, Attached, Clean, Content, Coverage, Ended, ExposureReason, FileMetadata, Golden,
    Heartbeat, Mapper, MapperEnd, Notice, Operation, Outcome, Part, Process, Refusal, ScanRequest,
    SlotRef, ToGuest, ToHost, Uncovered, Verdict,
};
pub use policy::{
    Exclude, ExcludedProcess, FailMode, FailPath, Mode, POLICY_MAX, Policy, PolicyError,
    PolicyPart, PolicyParts,
};
pub use remedy::{Remediation, Running, Ticket};
pub use rules::{Exclusion, Facts, Rules, check_name_pattern, check_pattern, name_fits};
pub use types::{ContentHash, Decision, Generation, RequestId, VerdictKind};

/// The port on which the service listens for drivers, on AF_VSOCK and on TCP alike.
pub const PORT: u16 = 7325;

/// The most bytes of content that one message carries itself. Small enough that a heartbeat or another
/// request never waits long behind it.
pub const INLINE_MAX: usize = 32 * 1024;

/// Protocol versions, one sentence each:
///
/// 1. Scan requests with content in region slots or inline, verdicts, policy, heartbeats, notices,
///    quarantine and restore.
pub const VERSION: u16 = 1;

/// The lowest protocol version that this build still speaks.
pub const LOWEST_VERSION: u16 = 1;
