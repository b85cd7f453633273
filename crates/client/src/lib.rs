//! The service's REST interface: its types, and a client over its unix socket.
//!
//! [`Status`], [`Guest`], [`Event`] and [`ScanReport`] are what `seawalld` answers; the service
//! serialises them, the command line reads them, and the `OpenAPI` document is made from them. With
//! the feature `client`, `Client` asks the service. [`text`] makes names that came from a guest
//! fit for a terminal.
//!
//! ```
//! use seawall_client::{Event, EventKind};
//!
//! let line = r#"{"time":"2026-11-23T10:00:00.000Z","kind":"guest_unprotected","guest":"web01"}"#;
//! let event: Event = serde_json::from_str(line)?;
//! assert_eq!(event.kind, EventKind::GuestUnprotected);
//! # Ok::<(), serde_json::Error>(())
//! ```

#[cfg(feature = "client")]
mod client;
mod event;
mod golden;
mod policy;
mod scans;
pub mod text;
mod types;

#[cfg(feature = "client")]
pub use client::{Client, ClientError, Lines, Pieces};
pub use event::{Event, EventKind, EventsQuery};
pub use golden::{
    GoldenDistrust, GoldenFile, GoldenFiles, GoldenLearnRequest, GoldenList, GoldenReport,
};
pub use policy::{
    ExplainQuery, GuestPolicy, PolicyCheck, PolicyExplanation, PolicyFinding, PolicyGroup,
    PolicyOrigin, PolicySetting, PolicyStep,
};
pub use scans::{
    FoundFile, GuestScan, GuestScanState, LeftOut, ScanTarget, ScansRequest, ScheduleReport,
};
pub use types::{
    ApplyRequest, Approval, ChangeKind, Counters, Coverage, Detection, Diagnostic, Driver,
    DriverCounters, Engine, EngineReport, EngineState, Fault, Guest, GuestCounts, GuestState,
    LinkKind, PolicyInForce, PrivateCopies, Quarantine, QuarantineAttributes, QuarantineEntry,
    QuarantineState, QuarantineUse, Reload, ReloadedEngine, Resources, RestoreRequest,
    RollbackRequest, ScanReport, Session, SetEngine, SignatureChange, SignatureSet, Signatures,
    Status, Uncovered, Verdict, VerdictCounts,
};

/// Where the service listens unless configured otherwise.
pub const DEFAULT_SOCKET: &str = "/run/seawall/api.sock";
