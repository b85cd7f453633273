//! The part of the policy that the driver carries out, and how it travels.
//!
//! With thousands of exclusions a policy is longer than a message may be, so it goes in parts:
//! [`Policy::to_parts`] on the host, [`PolicyParts`] in the driver.

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::fmt;

/// The longest policy in bytes, as it travels.
pub const POLICY_MAX: usize = 1 << 20;
/// The most bytes of it in one message: a verdict never waits long behind one.
const PART_MAX: usize = 16 * 1024;

/// The part of the policy that the driver carries out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Which accesses are held, and what is scanned after writing.
    pub mode: Mode,
    /// What happens to an open that gets no verdict.
    pub fail_open: FailMode,
    /// What happens to an exec that gets no verdict.
    pub fail_exec: FailMode,
    /// What happens to an access to a file above the limit; `None` goes by the operation.
    pub fail_too_large: Option<FailMode>,
    /// What happens to an access to a file that changes each time it is read; `None` goes by the operation.
    pub fail_changing: Option<FailMode>,
    /// What happens to an access whose verdict does not come in time; `None` goes by the operation.
    pub fail_timed_out: Option<FailMode>,
    /// What happens to an access to a file with such a path that gets no verdict, for whatever reason. The first that holds
    /// counts, and before all of the above.
    pub fail_paths: Vec<FailPath>,
    /// The longest that an open is held, in milliseconds.
    pub open_deadline_ms: u32,
    /// The longest that an exec is held, in milliseconds.
    pub exec_deadline_ms: u32,
    /// Added to a deadline for each 64 MiB of content, in milliseconds.
    pub deadline_per_64_mib_ms: u32,
    /// No deadline is longer than this, in milliseconds.
    pub most_deadline_ms: u32,
    /// A larger file is not scanned on access, in bytes.
    pub whole_file_limit: u64,
    /// What is not scanned.
    pub exclude: Exclude,
}

impl Default for Policy {
    /// DESIGN.md's defaults: what a driver does before it has ever met its host.
    fn default() -> Self {
        Self {
            mode: Mode::Smart,
            fail_open: FailMode::Open,
            fail_exec: FailMode::ClosedIfUserWritable,
            fail_too_large: Some(FailMode::Open),
            fail_changing: None,
            fail_timed_out: None,
            fail_paths: Vec::new(),
            open_deadline_ms: 5_000,
            exec_deadline_ms: 10_000,
            deadline_per_64_mib_ms: 1_000,
            most_deadline_ms: 30_000,
            whole_file_limit: 256 << 20,
            exclude: Exclude::default(),
        }
    }
}

/// Which accesses are held until there is a verdict, and what is scanned besides.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Open and exec are held; what was written is scanned at its last close.
    #[default]
    Smart,
    /// Open and exec are held, and nothing else is scanned.
    Open,
    /// Exec alone is held: not what an interpreter, the dynamic loader or dlopen(3) opens.
    Exec,
    /// Nothing is held; what was written is scanned at its last close.
    Write,
    /// As [`Self::Smart`], and no file that another user than root could change is remembered as clean.
    Strict,
    /// Nothing is held and nothing is scanned.
    Off,
}

impl fmt::Display for Mode {
    /// In the word of the configuration.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Smart => "smart",
            Self::Open => "open",
            Self::Exec => "exec",
            Self::Write => "write",
            Self::Strict => "strict",
            Self::Off => "off",
        })
    }
}

impl Mode {
    /// Whether an open waits for its verdict.
    #[must_use]
    pub fn holds_open(self) -> bool {
        matches!(self, Self::Smart | Self::Open | Self::Strict)
    }

    /// Whether an exec waits for its verdict.
    #[must_use]
    pub fn holds_exec(self) -> bool {
        self.holds_open() || self == Self::Exec
    }

    /// Whether what was written is scanned at its last close.
    #[must_use]
    pub fn scans_written(self) -> bool {
        matches!(self, Self::Smart | Self::Write | Self::Strict)
    }
}

/// What an access gets that no verdict decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FailMode {
    /// It goes on, and the file is scanned when that is possible again.
    Open,
    /// It ends with EPERM.
    Closed,
    /// It ends with EPERM when another user than root may write the file, else it goes on.
    ClosedIfUserWritable,
}

/// A fail mode of files with certain paths.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailPath {
    /// A pattern of absolute paths; see [`Rules`](crate::Rules).
    pub path: ByteBuf,
    /// What their accesses get.
    pub mode: FailMode,
}

/// What is not scanned. [`Rules`](crate::Rules) says whether something is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exclude {
    /// Patterns of absolute paths; see [`Rules`](crate::Rules).
    pub paths: Vec<ByteBuf>,
    /// What names of files end with behind their last dot, in ASCII lower case.
    pub extensions: Vec<ByteBuf>,
    /// Types of file systems, as in mountinfo.
    pub file_systems: Vec<String>,
    /// User ids of files' owners.
    pub owners: Vec<u32>,
    /// Programs whose opens are not held.
    pub processes: Vec<ExcludedProcess>,
}

/// A program whose opens are not held.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ExcludedProcess {
    /// The executable's absolute path.
    pub path: ByteBuf,
    /// The real user id that it runs as: everybody can run a program with code of their own in it.
    pub user: u32,
}

/// A part of a policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyPart {
    /// The next bytes of it, in postcard.
    pub bytes: ByteBuf,
    /// Whether it ends here.
    pub last: bool,
}

impl Policy {
    /// The policy as it travels. It has at least one part.
    #[must_use]
    pub fn to_parts(&self) -> Vec<PolicyPart> {
        let all = postcard::to_stdvec(self).unwrap_or_default();
        let mut parts: Vec<_> = all
            .chunks(PART_MAX)
            .map(|bytes| PolicyPart { bytes: ByteBuf::from(bytes), last: false })
            .collect();
        if let Some(part) = parts.last_mut() {
            part.last = true;
        }
        parts
    }

    /// How many bytes it is long as it travels.
    #[must_use]
    pub fn encoded_len(&self) -> usize {
        postcard::experimental::serialized_size(self).unwrap_or(usize::MAX)
    }
}

/// Why parts are no policy.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PolicyError {
    /// They are too many.
    #[error("a policy of more than {POLICY_MAX} bytes")]
    TooLong,
    /// They hold something else.
    #[error("a policy that is none: {0}")]
    Malformed(postcard::Error),
}

/// Collects the parts of a policy.
#[derive(Debug, Default)]
pub struct PolicyParts(Vec<u8>);

impl PolicyParts {
    /// Adds a part; gives the policy when it was the last.
    ///
    /// # Errors
    /// When the parts are no policy. The next part begins another one.
    pub fn add(&mut self, part: &PolicyPart) -> Result<Option<Policy>, PolicyError> {
        if self.0.len() + part.bytes.len() > POLICY_MAX {
            self.0 = Vec::new();
            return Err(PolicyError::TooLong);
        }
        self.0.extend_from_slice(&part.bytes);
        if !part.last {
            return Ok(None);
        }
        let all = std::mem::take(&mut self.0);
        postcard::from_bytes(&all).map(Some).map_err(PolicyError::Malformed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn long() -> Policy {
        let paths = (0..10_000).map(|n| format!("/srv/data/{n}").into_bytes().into()).collect();
        Policy { exclude: Exclude { paths, ..Exclude::default() }, ..Policy::default() }
    }

    #[test]
    fn a_policy_arrives_as_it_was_sent_however_long_it_is() {
        for policy in [Policy::default(), long()] {
            let parts = policy.to_parts();
            assert!(parts.iter().all(|part| part.bytes.len() <= PART_MAX));
            assert_eq!(
                parts.iter().map(|part| part.bytes.len()).sum::<usize>(),
                policy.encoded_len()
            );
            let (last, before) = parts.split_last().expect("it has one");
            let mut collected = PolicyParts::default();
            assert!(before.iter().all(|part| collected.add(part) == Ok(None)));
            assert_eq!(collected.add(last), Ok(Some(policy)));
        }
        assert!(long().to_parts().len() > 5);
    }

    #[test]
    fn what_is_no_policy_is_refused_and_the_next_one_is_read() {
        let mut collected = PolicyParts::default();
        let part = |len, last| PolicyPart { bytes: ByteBuf::from(vec![0xff; len]), last };
        assert!(matches!(collected.add(&part(9, true)), Err(PolicyError::Malformed(_))));
        assert_eq!(collected.add(&part(POLICY_MAX, false)), Ok(None));
        assert_eq!(collected.add(&part(1, false)), Err(PolicyError::TooLong));
        let policy = Policy::default();
        assert_eq!(collected.add(&policy.to_parts()[0]), Ok(Some(policy)));
    }
}
