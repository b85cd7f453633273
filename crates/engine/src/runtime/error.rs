//! Why an engine does not run, and why a scan has no outcome.

use std::fmt;
use std::io;

use crate::content::ContentError;
use crate::protocol::ProtocolError;
use crate::report::Diagnostic;

use super::SandboxError;

/// Why an engine cannot run, in one or more diagnostics. Every error becomes one with `?`; where a file is
/// to be named, make it from a [`Diagnostic`].
#[derive(Debug)]
pub struct LoadError {
    diagnostics: Vec<Diagnostic>,
}

impl LoadError {
    /// One error that is about no file, with a stable code to search for.
    pub fn new(code: &str, reason: impl Into<String>) -> Self {
        Diagnostic::error(code, reason).into()
    }

    /// All that is wrong; the first one is what `status` shows as the reason.
    pub fn all(diagnostics: Vec<Diagnostic>) -> Self {
        Self { diagnostics }
    }

    pub(super) fn into_diagnostics(self) -> Vec<Diagnostic> {
        self.diagnostics
    }
}

impl From<Diagnostic> for LoadError {
    fn from(one: Diagnostic) -> Self {
        Self { diagnostics: vec![one] }
    }
}

/// With its causes, in one line. So this is no `std::error::Error` itself.
impl<E: std::error::Error> From<E> for LoadError {
    fn from(error: E) -> Self {
        Self::new("engine-load", chain(&error))
    }
}

/// A line for each diagnostic.
impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, one) in self.diagnostics.iter().enumerate() {
            write!(f, "{}{one}", if number == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

/// Why a scan has no outcome.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// The engine gave up before the time limit.
    #[error("the scan took too long")]
    TimedOut,
    /// The same, and the engine knows what took the time.
    #[error("the scan took too long: {what}")]
    TimedOutIn {
        /// For people: rules, parts of the content.
        what: String,
    },
    /// Nobody wants the report any more.
    #[error("nobody waits for the scan any more")]
    Cancelled,
    /// The content could not be read.
    #[error(transparent)]
    Content(#[from] ContentError),
    /// The engine cannot go on: its process ends, another one takes its place, and the scan is tried once
    /// more there.
    #[error("{reason}")]
    Broken {
        /// For the log.
        reason: String,
    },
    /// Anything else.
    #[error("{reason}")]
    Failed {
        /// For people.
        reason: String,
    },
}

/// Why the process ends before its first scan.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    #[error("a system call failed")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    #[error("the service sent something else than Start")]
    NoStart,
    #[error("Start came without the page of cancelled scans")]
    NoPage,
    #[error("the service is gone")]
    Gone,
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    #[error("the engine cannot be used")]
    Refused(Vec<Diagnostic>),
}

/// An error and its causes in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_says_why_an_engine_does_not_run() {
        let plain = || -> Result<(), LoadError> { Ok(Err(io::Error::other("no disk"))?) };
        let text = plain().map_err(|error| error.to_string());
        assert_eq!(text, Err("error[engine-load]: no disk".into()));
        let two = vec![Diagnostic::error("a", "x"), Diagnostic::warning("b", "y")];
        assert_eq!(LoadError::all(two).to_string(), "error[a]: x\nwarning[b]: y");
    }
}
