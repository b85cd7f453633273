//! The security API: how content reaches an engine, and how its report comes back.
//!
//! An engine is a process of its own. The service starts it, hands it one end of a socket pair and,
//! for each scan, the content: in the message if it is small, else as a read-only descriptor. The engine loads its
//! signatures, enters the sandbox and answers. Nothing else connects the two.
//!
//! - [`host::EngineHandle`], for the service: supervises one configured engine. It starts the
//!   process, queues scans, keeps the time limits, replaces a process that crashed or hangs, and
//!   brings a new signature set in beside the old one.
//! - [`runtime::run`], for an engine's `main`: takes an implementation of [`runtime::Engine`] and
//!   does the rest, sandbox included.
//! - [`protocol`] is what passes between them, [`report`] the words that both use, [`content`] the
//!   bytes to scan, [`signatures`] a way to find files of signatures.
//!
//! An engine that finds one word, complete but for its `main`:
//!
//! ```
//! use seawall_engine::runtime::{Engine, LoadError, Request, ScanError, Scanner};
//! use seawall_engine::{Description, Detection, Generation, Outcome};
//!
//! struct Word;
//!
//! impl Engine for Word {
//!     fn describe(&self) -> Description {
//!         Description::new("word", "1", Generation([0; 32])).with_rules(1)
//!     }
//!
//!     fn scanner(&self) -> Result<Box<dyn Scanner + '_>, LoadError> {
//!         Ok(Box::new(Find))
//!     }
//! }
//!
//! struct Find;
//!
//! impl Scanner for Find {
//!     fn scan(&mut self, request: &Request<'_>) -> Result<Outcome, ScanError> {
//!         let found = request.content.bytes()?.windows(4).position(|four| four == b"evil");
//!         Ok(found.map_or(Outcome::Clean, |at| {
//!             Outcome::Infected(vec![Detection { offset: Some(at as u64), ..Detection::new("Evil") }])
//!         }))
//!     }
//! }
//!
//! // fn main() -> std::process::ExitCode { seawall_engine::runtime::run(|_| Ok(Word)) }
//! ```

pub mod archive;
pub mod content;
pub mod host;
pub mod protocol;
pub mod report;
pub mod runtime;
pub mod signatures;
mod sys;

pub use report::{
    ArchiveLimits, Cleaning, Description, Detection, Diagnostic, Generation, Level, MAX_MEMBER,
    Metadata, Operation, Outcome, Severity,
};

/// Environment variable with the number of the inherited socket.
pub const FD_VARIABLE: &str = "SEAWALL_ENGINE_FD";
