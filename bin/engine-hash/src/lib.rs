//! Hash lists as an engine: content that is known to be bad, and content that is known to be good.
//!
//! - [`lists::Lists`] turns a folder of lists into what can be asked, and says what is wrong with it;
//!   [`lists::compile`] does the work of that beforehand.
//! - [`set::Set`] is one compiled file in use: a small index in memory, the rest on disk.
//! - [`engine::Hash`] asks the lists about content. Process, sandbox and protocol are
//!   `seawall-engine`'s.
//!
//! ```text
//!  lists ──► parse ──► compile ──► format (a file) ──► set ──► engine
//!  a folder  lines     records                         index   digests, outcome
//! ```
//!
//! Where lists disagree about a content, the one that allows it decides.
//!
//! ```
//! use seawall_engine_hash::digest::Hashers;
//! use seawall_engine_hash::lists::Lists;
//!
//! let folder = tempfile::tempdir()?;
//! std::fs::write(folder.path().join("bad.md5"), "900150983cd24fb0d6963f7d28e17f72  Test.Abc\n")?;
//! let lists = Lists::load(folder.path(), true).expect("a good list");
//! let mut hashers = Hashers::new(lists.wanted(3));
//! hashers.update(b"abc");
//! let hits = lists.find(&hashers.finish(), 3)?;
//! assert_eq!(hits[0].name, "Test.Abc");
//! # Ok::<(), std::io::Error>(())
//! ```

pub mod compile;
pub mod digest;
pub mod engine;
pub mod format;
pub mod lists;
mod mapped;
pub mod parse;
pub mod report;
pub mod set;
