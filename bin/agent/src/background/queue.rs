//! What other threads leave for the background, and what it leaves for them.

use super::{Exposed, FileHandle, Purpose};
use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long after its close a file is scanned, in milliseconds: its times are settled then, and it
/// can be marked clean.
const AFTER_CLOSE_MS: u64 = 100;
/// A file that is written again and again is scanned at most this often, in milliseconds.
const SAME_FILE_MS: u64 = 10_000;
/// Files found held by writers that wait to be noted. One more is scanned at its close all the same.
const WRITTEN_MAX: usize = 1024;
/// How often the queue is looked at while files wait in it, and while none does.
const TICK: Duration = Duration::from_millis(50);
pub const IDLE: Duration = Duration::from_millis(250);
/// How many closed files wait at most. One more is scanned when it is opened.
const CLOSED_MAX: usize = 4096;

/// What other threads leave for [`super::work`].
#[derive(Debug, Default)]
pub struct Queue {
    inner: Mutex<Inner>,
    added: Condvar,
}

#[derive(Debug, Default)]
pub struct Inner {
    /// Files that were closed after writing, and when each is due.
    pub closed: HashMap<FileHandle, u64>,
    pub scanned: HashMap<FileHandle, u64>,
    pub settled: Vec<Exposed>,
    /// Records whose file is gone.
    pub gone: Vec<Exposed>,
    pub written: Vec<FileHandle>,
    pub judged: Vec<FileHandle>,
    /// What is to be scanned now, and how much of that is being sent.
    pub wanted: VecDeque<Wanted>,
    pub sending: usize,
    pub sent_now: Option<FileHandle>,
    /// Closes were lost: any file may have been written.
    pub lost: bool,
    /// A walk has come to its end; how much it could not look at.
    pub walked: Option<u64>,
    pub shown: Shown,
}

/// What is to be scanned.
#[derive(Debug)]
pub enum Wanted {
    File {
        handle: FileHandle,
        purpose: Purpose,
        /// Not while somebody writes it.
        unwritten: bool,
    },
    /// All files of these mounts: `st_dev` and path.
    Walk(Vec<(u64, PathBuf)>),
}

/// What `status` and the heartbeat show of the journal.
#[derive(Debug, Clone, Default)]
pub struct Shown {
    /// Files that wait.
    pub files: u64,
    /// Of these, files that wait for whoever writes them.
    pub written: u64,
    /// Files that were deleted before their scan, since the worker's start.
    pub unknown: u64,
    /// Mounts of which all files are to be scanned; an empty name for all.
    pub mounts: Vec<Vec<u8>>,
    /// Why the journal does not outlast the driver, when it does not.
    pub in_memory: Option<String>,
}

impl Queue {
    pub fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until something may be due: soon while files wait or scans are under way, else when something is
    /// added, and now and then for the exposures.
    pub fn wait(&self, busy: bool) {
        let inner = self.lock();
        let soon = busy || !inner.closed.is_empty();
        let waited = self.added.wait_timeout(inner, if soon { TICK } else { IDLE });
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// `false`: there is no room.
    pub fn add_closed(&self, handle: FileHandle, now_ms: u64) -> bool {
        let mut inner = self.lock();
        if inner.closed.len() >= CLOSED_MAX {
            return false;
        }
        let again = inner.scanned.get(&handle).map_or(0, |at| at + SAME_FILE_MS);
        let first = inner.closed.is_empty();
        inner.closed.insert(handle, (now_ms + AFTER_CLOSE_MS).max(again));
        if first {
            self.added.notify_all();
        }
        true
    }

    pub fn take_closed(&self, now_ms: u64) -> Option<FileHandle> {
        let mut inner = self.lock();
        let next = inner.closed.iter().find(|(_, at)| **at <= now_ms).map(|(handle, _)| *handle)?;
        inner.closed.remove(&next);
        inner.scanned.retain(|_, at| *at + SAME_FILE_MS > now_ms);
        if inner.scanned.len() < CLOSED_MAX {
            inner.scanned.insert(next, now_ms);
        }
        Some(next)
    }

    /// A scan for which nobody waited has its verdict. Never waits.
    pub fn done(&self, purpose: Purpose) {
        if let Purpose::Exposure(exposed) = purpose {
            self.lock().settled.push(exposed);
        }
        self.wake();
    }

    /// This file was found infected. Never waits.
    pub fn judged(&self, handle: FileHandle) {
        let mut inner = self.lock();
        if inner.judged.len() < WRITTEN_MAX {
            inner.judged.push(handle);
        }
    }

    /// There may be something to do.
    pub fn wake(&self) {
        self.added.notify_all();
    }

    pub fn want(&self, wanted: Wanted) {
        self.lock().wanted.push_back(wanted);
        self.wake();
    }

    pub fn sent(&self) {
        let mut inner = self.lock();
        inner.sending -= 1;
        inner.sent_now = None;
        drop(inner);
        self.wake();
    }

    /// How many scans are begun and not in a session yet.
    pub fn sending(&self) -> usize {
        let inner = self.lock();
        let files = inner.wanted.iter().filter(|wanted| matches!(wanted, Wanted::File { .. }));
        inner.sending + files.count()
    }

    /// How many files wait for a scan or are being sent.
    pub fn waiting(&self) -> usize {
        let inner = self.lock();
        inner.closed.len() + inner.wanted.len() + inner.sending
    }

    /// Takes what is wanted; waits for a moment where nothing is.
    pub fn next_wanted(&self, wait: Duration) -> Option<Wanted> {
        let mut inner = self.lock();
        if inner.wanted.is_empty() {
            inner = self.added.wait_timeout(inner, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        let wanted = inner.wanted.pop_front()?;
        if let Wanted::File { handle, .. } = &wanted {
            inner.sending += 1;
            inner.sent_now = Some(*handle);
        }
        Some(wanted)
    }

    /// A file was found clean while somebody had it open for writing. Never waits.
    pub fn add_written(&self, handle: FileHandle) {
        let mut inner = self.lock();
        if inner.written.len() < WRITTEN_MAX {
            inner.written.push(handle);
        }
    }

    /// What to show.
    pub fn shown(&self) -> Shown {
        self.lock().shown.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn handle() -> FileHandle {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        FileHandle::of(file.as_fd(), 1).unwrap()
    }

    #[test]
    fn a_file_written_again_and_again_is_scanned_once_in_a_while() {
        let (queue, file) = (Queue::default(), handle());
        queue.add_closed(file, 1_000);
        assert_eq!(queue.take_closed(1_000), None, "its times are not settled yet");
        assert_eq!(queue.take_closed(1_000 + AFTER_CLOSE_MS), Some(file));
        for now_ms in [1_200, 1_300, 5_000] {
            queue.add_closed(file, now_ms);
        }
        assert_eq!(queue.take_closed(6_000), None);
        assert_eq!(queue.take_closed(1_100 + SAME_FILE_MS), Some(file));
        assert_eq!(queue.take_closed(60_000), None);
    }
}
