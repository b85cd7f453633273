//! Scans for which nobody waits: files closed after writing, and files that were let through.
//!
//! Two threads. [`watch_closes`] takes close-after-write events: the file is no longer clean, and it
//! is queued by its handle, so that nothing keeps its file system busy meanwhile. [`work`] scans what
//! is due, a few at a time, and the exposures in the ledger as soon as there is a session.

use crate::driver::{Driver, Job, Subject};
use crate::event::wait_readable;
use crate::file::{Look, OwnFile};
use crate::scan;
use seawall_fanotify::ledger::Exposure;
use seawall_fanotify::{Event, EventKind, FileHandle, process};
use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long after its close a file is scanned, in milliseconds: its times are settled then, and it
/// can be marked clean.
const AFTER_CLOSE_MS: u64 = 100;
/// A file that is written again and again is scanned at most this often, in milliseconds.
const SAME_FILE_MS: u64 = 10_000;
/// An exposure whose scan came to nothing is tried again after this, in milliseconds.
const RETRY_MS: u64 = 10_000;
/// How many such scans are under way at once.
const AT_ONCE: usize = 4;
/// How often the queue is looked at while files wait in it, and while none does.
const TICK: Duration = Duration::from_millis(50);
const IDLE: Duration = Duration::from_millis(500);
/// How many closed files wait at most. One more is scanned when it is opened.
const CLOSED_MAX: usize = 4096;

/// Files that were closed after writing and wait for their scan.
#[derive(Debug, Default)]
pub struct Closed {
    due: Mutex<Due>,
    added: Condvar,
}

#[derive(Debug, Default)]
struct Due {
    waiting: HashMap<FileHandle, u64>,
    scanned: HashMap<FileHandle, u64>,
}

impl Closed {
    fn lock(&self) -> MutexGuard<'_, Due> {
        self.due.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until something may be due: soon while files wait or scans are under way, else when a file is
    /// added, and now and then for the exposures.
    fn wait(&self, busy: bool) {
        let due = self.lock();
        if due.waiting.is_empty() && !busy {
            let waited = self.added.wait_timeout(due, IDLE);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
        } else {
            drop(due);
            std::thread::sleep(TICK);
        }
    }

    fn add(&self, handle: FileHandle, now_ms: u64) {
        let mut due = self.lock();
        if due.waiting.len() >= CLOSED_MAX {
            return;
        }
        let again = due.scanned.get(&handle).map_or(0, |at| at + SAME_FILE_MS);
        due.waiting.insert(handle, (now_ms + AFTER_CLOSE_MS).max(again));
        self.added.notify_one();
    }

    fn take(&self, now_ms: u64) -> Option<FileHandle> {
        let mut due = self.lock();
        let next = due.waiting.iter().find(|(_, at)| **at <= now_ms).map(|(handle, _)| *handle)?;
        due.waiting.remove(&next);
        due.scanned.retain(|_, at| *at + SAME_FILE_MS > now_ms);
        if due.scanned.len() < CLOSED_MAX {
            due.scanned.insert(next, now_ms);
        }
        Some(next)
    }
}

/// Takes close-after-write events for ever.
pub fn watch_closes(driver: &Driver, closed: &Closed) {
    let group = &driver.groups.close_write;
    loop {
        if !wait_readable(group) {
            continue;
        }
        // One at a time: an event whose file the kernel cannot open for us (a lease, no descriptors) is
        // gone, and told by an error only where it is the first of a read.
        if group.read(1, |event| take(driver, closed, event)).is_err() {
            tracing::warn!("a close after write was lost; everything clean is forgotten");
            driver.forget_all();
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn take(driver: &Driver, closed: &Closed, event: Event) {
    let Some(fd) = event.fd else {
        if event.kind == EventKind::Overflow {
            tracing::warn!("closes after write were lost; everything clean is forgotten");
            driver.forget_all();
        }
        return;
    };
    let Ok(look) = Look::at(&fd) else { return };
    let identity = look.identity;
    driver.forget(&fd, &identity);
    if look.is_regular
        && identity.size > 0
        && let Ok(handle) = FileHandle::of(fd.as_fd(), identity.device)
    {
        closed.add(handle, process::now_ms());
    }
}

/// Scans in the background for ever.
pub fn work(driver: &Driver, closed: &Closed) {
    let mut tried: HashMap<FileHandle, u64> = HashMap::new();
    let mut busy = false;
    let mut buffer = Vec::new();
    loop {
        closed.wait(busy);
        let now_ms = process::now_ms();
        let Some(session) = driver.session() else {
            tried.clear();
            busy = false;
            continue;
        };
        while session.in_background() < AT_ONCE {
            if let Some(handle) = closed.take(now_ms) {
                start(driver, &handle, None, &mut buffer);
                continue;
            }
            tried.retain(|_, at| *at + RETRY_MS > now_ms);
            // One whose scan is under way is not begun again, however long it takes.
            let fresh = |exposure: &Exposure| {
                !tried.contains_key(&exposure.handle) && !session.scans_exposure(exposure)
            };
            let Some(next) = driver.ledger.exposures().find(fresh) else { break };
            tried.insert(next.handle, now_ms);
            start(driver, &next.handle.clone(), Some(next), &mut buffer);
        }
        busy = session.in_background() > 0;
    }
}

fn start(driver: &Driver, handle: &FileHandle, exposure: Option<Exposure>, buffer: &mut Vec<u8>) {
    match open(driver, handle) {
        Ok(Some(file)) => {
            let subject = Subject::Background { file: Arc::new(file), exposure };
            scan::scan(driver, Job { subject, reads: 0 }, buffer);
        }
        // Gone, or its file system is: nothing is left to scan.
        Ok(None) => {
            if let Some(exposure) = exposure {
                driver.ledger.settle(&exposure);
            }
        }
        Err(error) => tracing::debug!(%error, "a file cannot be reached now; it is tried again"),
    }
}

/// The file; none when it or its file system is gone.
fn open(driver: &Driver, handle: &FileHandle) -> std::io::Result<Option<OwnFile>> {
    let Some(path) = driver.coverage.path_on(handle.device) else { return Ok(None) };
    match OwnFile::open(handle, &path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == std::io::ErrorKind::StaleNetworkFileHandle => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handle() -> FileHandle {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        FileHandle::of(file.as_fd(), 1).unwrap()
    }

    #[test]
    fn a_file_written_again_and_again_is_scanned_once_in_a_while() {
        let (closed, file) = (Closed::default(), handle());
        closed.add(file, 1_000);
        assert_eq!(closed.take(1_000), None, "its times are not settled yet");
        assert_eq!(closed.take(1_000 + AFTER_CLOSE_MS), Some(file));
        for now_ms in [1_200, 1_300, 5_000] {
            closed.add(file, now_ms);
        }
        assert_eq!(closed.take(6_000), None);
        assert_eq!(closed.take(1_100 + SAME_FILE_MS), Some(file));
        assert_eq!(closed.take(60_000), None);
    }
}
