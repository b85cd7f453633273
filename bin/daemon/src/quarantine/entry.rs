//! What is known of one quarantined file, and how far its quarantine is.

use seawall_proto::remedy::{Attributes, FileIdentity, Stays};
use seawall_proto::{ContentHash, Ticket};
use serde::{Deserialize, Serialize};

/// Version of the entry's own format; see [`Entry`].
pub const VERSION: u32 = 1;

/// One file of one guest. Kept encrypted beside the content; the index only repeats it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// [`VERSION`] of the service that wrote it.
    pub version: u32,
    pub ticket: Ticket,
    pub hash: ContentHash,
    /// Bytes of content.
    pub size: u64,
    pub guest: String,
    /// As the guest's driver said, any bytes.
    pub path: Vec<u8>,
    pub identity: FileIdentity,
    pub attributes: Attributes,
    /// The first detection and the engine that made it.
    pub detection: String,
    pub engine: String,
    /// When it was stored, in milliseconds since 1970.
    pub stored_ms: i64,
    pub state: State,
    /// Policy wants it deleted: the entry goes when the guest's file is gone.
    #[serde(default)]
    pub delete: bool,
}

/// How far a quarantine is.
///
/// ```text
///   Stored ──the driver removed the guest's file──► Quarantined ──► Restored
///      └─────the driver says why it stays──────────► Stays ───────────┘
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// Durable here; the guest's file may be there still.
    Stored,
    /// Here alone. Other names of the file that are left in the guest.
    Quarantined { links: u32 },
    /// Here, and in the guest too.
    Stays(Stays),
    /// It was given back.
    Restored { guest: String, path: Vec<u8> },
}

impl State {
    /// The word by which the operator knows it.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Stored => "stored",
            Self::Quarantined { .. } => "quarantined",
            Self::Stays(_) => "stays",
            Self::Restored { .. } => "restored",
        }
    }

    /// The rest of the story, for people; empty where there is none.
    pub fn detail(&self) -> String {
        match self {
            Self::Stored => "the guest's file is not removed yet".into(),
            Self::Quarantined { links: 0 } => String::new(),
            Self::Quarantined { links } => {
                format!(
                    "{links} other names of the file are left in the guest; opening them is denied"
                )
            }
            Self::Stays(why) => format!("the guest's file stays and is denied: {}", stays(*why)),
            Self::Restored { guest, path } => {
                format!("given back to {guest}:{}", seawall_client::text::escape(path))
            }
        }
    }
}

/// Why a file stays in the guest, for people.
pub fn stays(why: Stays) -> String {
    match why {
        Stays::Changed => "it is not what was scanned any more".into(),
        Stays::Gone => "it has no name any more".into(),
        Stays::Writer => "a process has it open for writing".into(),
        Stays::Immutable => "it is immutable or append-only (chattr -i -a lifts that once its content is approved \
            for the guest; revoke the approval afterwards)"
            .into(),
        Stays::ReadOnly => "its file system is mounted read-only".into(),
        Stays::NoPath => {
            "no path of the guest's own leads to it: it is in a container's overlay or mount namespace".into()
        }
        Stays::Busy => "something is mounted on it".into(),
        Stays::Attributes => "its extended attributes are too large to be kept".into(),
        Stays::Failed { errno } => system(errno),
    }
}

/// An errno for people.
pub fn system(errno: i32) -> String {
    format!("the guest's system says: {}", std::io::Error::from_raw_os_error(errno))
}
