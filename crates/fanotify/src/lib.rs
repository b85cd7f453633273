//! Safe wrapper of what a guest driver needs from fanotify(7) and its surroundings.
//!
//! - [`Group`]: a notification group; marks on file systems, ignore marks on inodes, events, answers.
//! - [`FileHandle`]: a name for a file that needs no path and holds nothing open.
//! - [`ledger`]: which events are held, in memory that outlives the worker process, so that its
//!   supervisor can answer them. An event is claimed once; who holds the claim answers.
//! - [`process`]: forking a worker, and the limits and privileges that both run with.
//! - [`probe`]: what this kernel can do, found out by trying.
//!
//! The kernel holds a process in open(2) or execve(2) until somebody answers, without a time-out of
//! its own. A response names a file descriptor *number*, and any process that holds the group may
//! write one. That is why answers go through the ledger's claims and nowhere else.

#![allow(unsafe_code)] // System calls that no safe crate covers; each block says why it holds.

mod group;
mod handle;
pub mod ledger;
pub mod probe;
pub mod process;

pub use group::{Answer, Event, EventKind, Group, Holds, IgnoreMark, Purpose};
pub use handle::{FileHandle, is_cached, is_open_for_writing};
