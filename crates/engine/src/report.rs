//! The words both ends share: what is asked of an engine, and what it says.
//!
//! Plain data, owned, `Send`. Nothing here does I/O. Every value that comes from an engine is
//! hostile until [`crate::protocol`] has checked it against the limits below.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest name, family or version string that travels, in bytes.
pub const MAX_NAME: usize = 256;
/// Longest reason or file name of a diagnostic that travels, in bytes.
pub const MAX_REASON: usize = 1024;
/// Longest guest path that travels, in bytes (Linux's own PATH_MAX). Of a longer one the end is kept.
pub const MAX_PATH: usize = 4096;
/// Most detections in one report; an engine that finds more names the first ones.
pub const MAX_DETECTIONS: usize = 64;

/// Digest of a whole signature set: two processes with the same generation give the same verdicts.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Generation(pub [u8; 32]);

impl Generation {
    /// The first 12 hex digits, for log lines and tables.
    pub fn short(&self) -> String {
        self.to_string()[..12].to_owned()
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Generation({self})")
    }
}

/// What was being done to the file when its content was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Operation {
    /// An `open()` is held.
    Open,
    /// An `execve()` is held.
    Exec,
    /// Nobody is held: the file was closed after a write, or was let through unscanned before.
    Rescan,
    /// A person or a schedule asked.
    OnDemand,
}

/// What is known of the file besides its content. All of it was said by a guest: it may lie.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// Path as the guest named it: any bytes. Empty unless the engine says [`Description::by_name`]: the
    /// verdict is for the content, whatever a guest calls it.
    #[serde(with = "serde_bytes")]
    pub path: Vec<u8>,
    /// Name of the guest in the service's configuration; empty as the path is.
    pub guest: String,
    /// Why the content is looked at.
    pub operation: Operation,
    /// Size of the file in the guest, in bytes; the content may be shorter.
    pub size: u64,
    /// How far to look into the content where it is an archive of a [`crate::archive::Kind`]; not at all without
    /// it. An engine may look into others, too, and always.
    pub archives: Option<ArchiveLimits>,
}

/// How far an engine looks into an archive. What is beyond a limit was not looked at, which is an error, never clean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArchiveLimits {
    /// Layers: an archive in an archive is two, and a compressed tar is two.
    pub depth: u32,
    /// Members of all layers together.
    pub members: u32,
    /// Bytes of the largest member.
    pub member: u64,
    /// Bytes that come out of all layers together.
    pub unpacked: u64,
}

/// Longest [`Detection::member`], in bytes.
pub const MAX_MEMBER: usize = 512;

/// How bad a detection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Severity {
    /// Unwanted, not harmful by itself.
    Low,
    /// Likely harmful.
    Medium,
    /// Harmful.
    High,
    /// Harmful and spreading or destroying.
    Critical,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
            Self::Critical => "critical",
        })
    }
}

/// A word that names no [`Severity`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{word}` is no severity; use low, medium, high or critical")]
pub struct UnknownSeverity {
    /// The word found.
    pub word: String,
}

impl FromStr for Severity {
    type Err = UnknownSeverity;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        match word.to_ascii_lowercase().as_str() {
            "low" => Ok(Self::Low),
            "medium" => Ok(Self::Medium),
            "high" => Ok(Self::High),
            "critical" => Ok(Self::Critical),
            _ => Err(UnknownSeverity { word: word.to_owned() }),
        }
    }
}

/// One thing that an engine found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detection {
    /// Name of the signature or rule.
    pub name: String,
    /// How bad it is.
    pub severity: Severity,
    /// Malware family, where the signature names one.
    pub family: Option<String>,
    /// Offset of the first match in the content, in bytes, where the engine knows it.
    pub offset: Option<u64>,
    /// What would rid the file of it, where the signature says so. A hint: policy decides.
    pub cleaning: Option<Cleaning>,
    /// The member of an archive that it was found in, where the engine looked into one: its path there, and `!/` between
    /// archives that lie in one another. An archive's maker chose it; no control characters.
    pub member: Option<String>,
}

impl Detection {
    /// A detection with a name, of high severity, and nothing else known.
    pub fn new(name: impl Into<String>) -> Self {
        let name = name.into();
        Self {
            name,
            severity: Severity::High,
            family: None,
            offset: None,
            cleaning: None,
            member: None,
        }
    }
}

/// What would rid a file of what was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cleaning {
    /// Nothing in the file is worth keeping.
    Delete,
    /// These bytes are the harmful part; without them the file is as it was.
    Cut {
        /// The first of them.
        offset: u64,
        /// How many.
        length: u64,
    },
}

impl fmt::Display for Cleaning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Delete => f.write_str("delete"),
            Self::Cut { offset, length } => write!(f, "cut {length} bytes at {offset}"),
        }
    }
}

/// What a finished scan says. An engine's failure is never an `Outcome`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Nothing was found in the whole content.
    Clean,
    /// At least one detection.
    Infected(Vec<Detection>),
    /// The very content is known to be good: engines after this one need not look. Counts only where
    /// the configuration lets this engine say so, else as clean.
    Allowed {
        /// The entry of the list that says so.
        name: String,
    },
}

/// Whether a diagnostic keeps signatures out of use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Level {
    /// Signatures are missing, or the engine cannot run.
    Error,
    /// Works, but a person should know.
    Warning,
}

/// One thing an operator should know about an engine or its signatures.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnostic {
    /// Error or warning.
    pub level: Level,
    /// File it is about; empty when it is about none.
    pub file: String,
    /// Line, from 1; 0 = the whole file.
    pub line: u32,
    /// Column in characters, from 1; 0 = the whole line.
    pub column: u32,
    /// Stable code, to search for.
    pub code: String,
    /// What is wrong, and what to do.
    pub reason: String,
}

impl Diagnostic {
    /// An error that is about no file.
    pub fn error(code: &str, reason: impl Into<String>) -> Self {
        Self {
            level: Level::Error,
            file: String::new(),
            line: 0,
            column: 0,
            code: code.to_owned(),
            reason: reason.into(),
        }
    }

    /// The same, about this file.
    pub fn in_file(self, file: impl AsRef<std::path::Path>) -> Self {
        Self { file: file.as_ref().display().to_string(), ..self }
    }

    /// A warning that is about no file.
    pub fn warning(code: &str, reason: impl Into<String>) -> Self {
        Self { level: Level::Warning, ..Self::error(code, reason) }
    }

    /// Cuts every string to what may travel.
    pub(crate) fn clip(&mut self) {
        clip(&mut self.file, MAX_REASON);
        clip(&mut self.code, MAX_NAME);
        clip(&mut self.reason, MAX_REASON);
    }
}

/// `file:line:column: error[code]: reason`, leaving out what is not known.
impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.file.is_empty() {
            write!(f, "{}:", self.file)?;
            if self.line > 0 {
                write!(f, "{}:", self.line)?;
                if self.column > 0 {
                    write!(f, "{}:", self.column)?;
                }
            }
            f.write_str(" ")?;
        }
        let level = match self.level {
            Level::Error => "error",
            Level::Warning => "warning",
        };
        write!(f, "{level}[{}]: {}", self.code, self.reason)
    }
}

/// What a ready engine says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// Name of the engine.
    pub name: String,
    /// Version of the engine.
    pub version: String,
    /// Digest of the signatures in use.
    pub generation: Generation,
    /// Whether a verdict depends on path or guest besides the content. Then it is remembered for that name
    /// alone, and what a guest calls a file moves the engine.
    pub by_name: bool,
    /// Whether each content has to come as a descriptor. Else small content comes with the message that asks for
    /// its scan, which is quicker.
    pub by_descriptor: bool,
    /// Signatures in use.
    pub rules: u32,
    /// What could not be loaded, and what else is worth knowing.
    pub diagnostics: Vec<Diagnostic>,
    /// Diagnostics left out because the message would have been too long.
    pub omitted: u32,
}

impl Description {
    /// With neither signatures nor diagnostics, and verdicts that follow from the content alone.
    pub fn new(
        name: impl Into<String>,
        version: impl Into<String>,
        generation: Generation,
    ) -> Self {
        Self {
            name: name.into(),
            version: version.into(),
            generation,
            by_name: false,
            by_descriptor: false,
            rules: 0,
            diagnostics: Vec::new(),
            omitted: 0,
        }
    }

    /// So many signatures are in use; more than fit the number count as the most that do.
    pub fn with_rules(self, count: u64) -> Self {
        Self { rules: u32::try_from(count).unwrap_or(u32::MAX), ..self }
    }

    /// Whether verdicts depend on path or guest.
    pub fn with_by_name(self, by_name: bool) -> Self {
        Self { by_name, ..self }
    }

    /// Whether each content has to come as a descriptor.
    pub fn with_by_descriptor(self, by_descriptor: bool) -> Self {
        Self { by_descriptor, ..self }
    }

    /// What could not be loaded, and what else is worth knowing.
    pub fn with_diagnostics(self, diagnostics: Vec<Diagnostic>) -> Self {
        Self { diagnostics, ..self }
    }

    /// True when signatures are missing from the set.
    pub fn has_errors(&self) -> bool {
        self.diagnostics.iter().any(|one| one.level == Level::Error)
    }
}

/// Shortens `text` to at most `most` bytes, never within a character.
pub(crate) fn clip(text: &mut String, most: usize) {
    if text.len() > most {
        text.truncate(text.floor_char_boundary(most));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_diagnostic_shows_only_what_is_known() {
        let mut one = Diagnostic::error("E001", "syntax error");
        assert_eq!(one.to_string(), "error[E001]: syntax error");
        one.file = "a.yar".into();
        assert_eq!(one.to_string(), "a.yar: error[E001]: syntax error");
        one.line = 3;
        one.column = 7;
        assert_eq!(one.to_string(), "a.yar:3:7: error[E001]: syntax error");
    }

    #[test]
    fn clipping_keeps_characters_whole() {
        let mut text = "aé".to_owned();
        clip(&mut text, 2);
        assert_eq!(text, "a");
    }

    #[test]
    fn severities_parse_as_they_print() {
        for severity in [Severity::Low, Severity::Medium, Severity::High, Severity::Critical] {
            assert_eq!(severity.to_string().parse(), Ok(severity));
        }
        assert!("bad".parse::<Severity>().is_err());
    }
}
