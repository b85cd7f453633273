//! Small values that both sides name things with.

use serde::{Deserialize, Serialize};
use std::fmt;

/// BLAKE3 digest of a file's whole content. Only one computed by the host is ever believed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ContentHash(pub [u8; 32]);

impl fmt::Display for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ContentHash({self})")
    }
}

/// Counts the changes of engines and signatures on one service. A clean verdict of an older
/// generation is worth nothing.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct Generation(pub u64);

/// Names one scan request within one session. The driver counts up and never uses one twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RequestId(pub u64);

/// What the host found in a content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum VerdictKind {
    /// Every engine looked at all of it and found nothing.
    Clean,
    /// At least one engine found malware.
    Infected,
    /// No engine could say: it failed, was overloaded, or the content broke off.
    Error,
    /// The scan took longer than it may.
    TimedOut,
    /// Policy excludes this content, or all that was found in it.
    Excluded,
    /// Clean as a whole; an archive that nobody has looked into, as a scan on demand would.
    Unopened,
}

/// What the driver tells the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Decision {
    /// The access goes on.
    Allow,
    /// The access ends with EPERM.
    Deny,
}
