//! Scans for which nobody waits: files closed after writing, and files that were let through.
//!
//! ```text
//!   close after write ─────────────► queue ────────────────┐
//!   let through ──► ledger ──► journal (the file goes on) ──┴─► a few scans at a time
//!                                 ▲                                   │
//!                                 └───────── settled: taken out ◄─────┘
//! ```
//!
//! Two threads. [`watch_closes`] takes close-after-write events: the file is no longer clean, and it
//! is queued by its handle, so that nothing keeps its file system busy meanwhile. [`work`] scans what
//! is due as long as there is a session, and alone has the journal. Where more was let through than
//! the journal holds, all files of the mount are scanned.

use crate::driver::{Driver, Job, Subject};
use crate::event::wait_readable;
use crate::file::{Look, OwnFile, OwnMount};
use crate::journal::{Added, Exposed, Journal, Record};
use crate::{scan, truth};
use seawall_fanotify::{Event, EventKind, FileHandle, process};
use seawall_proto::{ExposureReason, Notice};
use std::collections::HashMap;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long after its close a file is scanned, in milliseconds: its times are settled then, and it
/// can be marked clean.
const AFTER_CLOSE_MS: u64 = 100;
/// A file that is written again and again is scanned at most this often, in milliseconds.
const SAME_FILE_MS: u64 = 10_000;
/// An exposure whose scan came to nothing is tried again after this, in milliseconds; then after twice as
/// long, and so on.
const RETRY_MS: u64 = 10_000;
/// From the end of one walk over all files of mounts to the next, in milliseconds: whoever can have many
/// files let through must not keep the disks busy for ever.
const WALK_PAUSE_MS: u64 = 3_600_000;
/// Files found held by writers that wait to be noted. One more is scanned at its close all the same.
const WRITTEN_MAX: usize = 1024;
/// After a boot a file system may take this long to be mounted, in milliseconds; what was let through
/// on it is given up then.
const MOUNTED_MS: u64 = 600_000;
/// How often a journal that cannot be opened is tried, in milliseconds.
const OPEN_AGAIN_MS: u64 = 1_000;
/// How often the journal is made to outlast a loss of power, in milliseconds.
const SYNC_MS: u64 = 1_000;
/// How many such scans are under way at once.
const AT_ONCE: usize = 4;
/// Folder entries looked at in one turn.
const ENTRIES: usize = 256;
/// How often the queue is looked at while files wait in it, and while none does.
const TICK: Duration = Duration::from_millis(50);
const IDLE: Duration = Duration::from_millis(500);
/// How many closed files wait at most. One more is scanned when it is opened.
const CLOSED_MAX: usize = 4096;

/// What other threads leave for [`work`].
#[derive(Debug, Default)]
pub struct Queue {
    inner: Mutex<Inner>,
    added: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    /// Files that were closed after writing, and when each is due.
    closed: HashMap<FileHandle, u64>,
    scanned: HashMap<FileHandle, u64>,
    settled: Vec<Exposed>,
    written: Vec<FileHandle>,
    shown: Shown,
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
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until something may be due: soon while files wait or scans are under way, else when something is
    /// added, and now and then for the exposures.
    fn wait(&self, busy: bool) {
        let inner = self.lock();
        let soon = busy || !inner.closed.is_empty();
        let waited = self.added.wait_timeout(inner, if soon { TICK } else { IDLE });
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    fn add_closed(&self, handle: FileHandle, now_ms: u64) {
        let mut inner = self.lock();
        if inner.closed.len() >= CLOSED_MAX {
            return;
        }
        let again = inner.scanned.get(&handle).map_or(0, |at| at + SAME_FILE_MS);
        let first = inner.closed.is_empty();
        inner.closed.insert(handle, (now_ms + AFTER_CLOSE_MS).max(again));
        if first {
            self.added.notify_one();
        }
    }

    fn take_closed(&self, now_ms: u64) -> Option<FileHandle> {
        let mut inner = self.lock();
        let next = inner.closed.iter().find(|(_, at)| **at <= now_ms).map(|(handle, _)| *handle)?;
        inner.closed.remove(&next);
        inner.scanned.retain(|_, at| *at + SAME_FILE_MS > now_ms);
        if inner.scanned.len() < CLOSED_MAX {
            inner.scanned.insert(next, now_ms);
        }
        Some(next)
    }

    /// A scan for which nobody waited is over; with a verdict, it settles its exposure. Never waits.
    pub fn done(&self, settled: Option<Exposed>) {
        self.lock().settled.extend(settled);
        self.added.notify_one();
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

/// Takes close-after-write events for ever.
pub fn watch_closes(driver: &Driver) {
    let group = &driver.groups.close_write;
    loop {
        if !wait_readable(group) {
            continue;
        }
        // One at a time: an event whose file the kernel cannot open for us (a lease, no descriptors) is
        // gone, and told by an error only where it is the first of a read.
        if group.read(1, |event| take(driver, event)).is_err() {
            tracing::warn!("a close after write was lost; everything clean is forgotten");
            driver.forget_all();
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn take(driver: &Driver, event: Event) {
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
        driver.background.add_closed(handle, process::now_ms());
    }
}

/// Scans in the background for ever. The journal is kept at `path`.
pub fn work(driver: &Driver, path: &Path) {
    let mut work = match Journal::in_memory() {
        Ok(journal) => Work::new(journal, path),
        Err(error) => {
            // Exposures stay in the ledger.
            tracing::error!(%error, "nothing can be scanned in the background");
            return;
        }
    };
    loop {
        driver.background.wait(work.busy);
        work.turn(driver);
    }
}

struct Work<'a> {
    journal: Journal,
    path: &'a Path,
    boot_id: [u8; 16],
    started_ms: u64,
    /// Why the journal is in memory, as long as it is.
    in_memory: Option<String>,
    opened_ms: u64,
    synced_ms: u64,
    unknown: u64,
    /// Mounts that the host has not heard of yet.
    untold: Vec<Vec<u8>>,
    walk: Option<Walk>,
    /// When the last walk ended.
    walked_ms: Option<u64>,
    busy: bool,
    buffer: Vec<u8>,
}

impl<'a> Work<'a> {
    fn new(journal: Journal, path: &'a Path) -> Self {
        Self {
            journal,
            path,
            boot_id: boot_id(),
            started_ms: process::now_ms(),
            in_memory: Some("not opened yet".into()),
            opened_ms: 0,
            synced_ms: 0,
            unknown: 0,
            untold: Vec::new(),
            walk: None,
            walked_ms: None,
            busy: false,
            buffer: Vec::new(),
        }
    }

    fn turn(&mut self, driver: &Driver) {
        let now_ms = process::now_ms();
        self.open(driver, now_ms);
        // What was settled may have been noted once more since.
        let (settled, written) = {
            let mut inner = driver.background.lock();
            (std::mem::take(&mut inner.settled), std::mem::take(&mut inner.written))
        };
        settled.into_iter().for_each(|exposed| self.journal.remove(exposed));
        self.enter(driver);
        for handle in written {
            // It is scanned at its last close in any case.
            let _or_not = self.note(driver, &handle, ExposureReason::HeldByWriter);
        }
        if self.synced_ms + SYNC_MS <= now_ms {
            self.journal.sync();
            self.synced_ms = now_ms;
        }
        self.show(driver);
        // Before the first look at the mounts every file system seems to be gone.
        let Some(session) = driver.session().filter(|_| driver.coverage.is_ready()) else {
            self.busy = false;
            return;
        };
        self.tell(driver);
        let mut entries = ENTRIES;
        while session.in_background() < AT_ONCE && self.start_next(driver, now_ms, &mut entries) {}
        self.busy = session.in_background() > 0 || self.walk.is_some();
    }

    fn show(&self, driver: &Driver) {
        let shown = Shown {
            files: self.journal.files() as u64,
            written: self.journal.written() as u64,
            unknown: self.unknown,
            mounts: self.journal.mounts().into_iter().collect(),
            in_memory: self.in_memory.clone(),
        };
        driver.background.lock().shown = shown;
    }

    /// Opens the journal's file once this driver is the only one and the file can be had.
    fn open(&mut self, driver: &Driver, now_ms: u64) {
        if self.in_memory.is_none()
            || self.opened_ms + OPEN_AGAIN_MS > now_ms
            || !driver.has_taken_over()
        {
            return;
        }
        self.opened_ms = now_ms;
        let opened = Journal::open(self.path).and_then(|(mut journal, damaged)| {
            journal.add_all(&self.journal)?;
            Ok((journal, damaged))
        });
        match opened {
            Ok((journal, damaged)) => {
                self.journal = journal;
                self.in_memory = None;
                if damaged > 0 {
                    tracing::warn!(damaged, "the journal of exposures is damaged; all is scanned");
                    self.expose_mount(driver, b"");
                }
            }
            Err(error) => {
                let why = format!("{}: {error}", self.path.display());
                if self.in_memory.as_ref() != Some(&why) {
                    tracing::warn!(%why, "exposures are kept in memory for now");
                }
                self.in_memory = Some(why);
            }
        }
    }

    // --- from the ledger to the journal ---------------------------------------------------------

    fn enter(&mut self, driver: &Driver) {
        let is_ready = driver.coverage.is_ready();
        for exposure in driver.ledger.exposures() {
            if !is_ready && driver.coverage.path_on(exposure.handle.device).is_none() {
                continue;
            }
            let reason = ExposureReason::from_number(exposure.reason);
            let reason = reason.unwrap_or(ExposureReason::WorkerDied);
            if let Err(error) = self.note(driver, &exposure.handle, reason) {
                tracing::warn!(%error, "the journal of exposures cannot be written; trying again");
                return;
            }
            driver.ledger.settle(&exposure);
        }
        let lost = driver.ledger.take_exposures_lost();
        self.unknown += u64::from(lost.without_handle);
        if lost.without_room > 0 {
            self.expose_mount(driver, b"");
        }
    }

    fn note(
        &mut self,
        driver: &Driver,
        handle: &FileHandle,
        reason: ExposureReason,
    ) -> std::io::Result<()> {
        let mut record = Record::of(handle, reason);
        record.boot_id = self.boot_id;
        let Some(mount_point) = driver.coverage.path_on(handle.device) else {
            self.gone(driver, &record);
            return Ok(());
        };
        match OwnFile::open(handle, &mount_point) {
            Ok(file) => {
                record.path = true_path(&file).unwrap_or_default().into();
            }
            Err(error) if error.kind() == std::io::ErrorKind::StaleNetworkFileHandle => {
                self.gone(driver, &record);
                return Ok(());
            }
            Err(_) => (),
        }
        record.file_system = file_system(&mount_point).unwrap_or_default();
        record.mount_point = mount_point.into_os_string().into_vec().into();
        if self.journal.add(&record)? == Added::Full && reason != ExposureReason::HeldByWriter {
            self.expose_mount(driver, &record.mount_point);
        }
        Ok(())
    }

    /// What it was that was let through will never be known.
    fn gone(&mut self, driver: &Driver, record: &Record) {
        self.unknown += 1;
        let path = if record.handle().is_some() { &record.path } else { &record.mount_point };
        driver.notice(Notice::ExposureGone { path: path.clone(), reason: record.reason });
    }

    fn expose_mount(&mut self, driver: &Driver, mount_point: &[u8]) {
        let mut record = Record::of_mount(mount_point, ExposureReason::Overload);
        record.boot_id = self.boot_id;
        match self.journal.add(&record) {
            Ok(Added::New) => {
                self.untold.push(mount_point.to_vec());
                self.tell(driver);
            }
            Ok(Added::Known) => (),
            Ok(Added::Full) if mount_point.is_empty() => (),
            // There is always room for one more that stands for all.
            Ok(Added::Full) => self.expose_mount(driver, b""),
            Err(error) => tracing::warn!(%error, "the journal of exposures cannot be written"),
        }
    }

    /// One report for many files: it is sent until there is room for it.
    fn tell(&mut self, driver: &Driver) {
        while let Some(mount_point) = self.untold.last() {
            let mount_point = mount_point.clone().into();
            if !driver.notice(Notice::MountExposed { mount_point }) {
                return;
            }
            self.untold.pop();
        }
    }

    // --- scans ----------------------------------------------------------------------------------

    /// Starts one more scan, or does something else that takes a moment. `false`: nothing is due.
    fn start_next(&mut self, driver: &Driver, now_ms: u64, entries: &mut usize) -> bool {
        if let Some(handle) = driver.background.take_closed(now_ms) {
            let exposed = self.journal.find(&handle);
            if let Some(Ok(file)) = open(driver, &handle) {
                self.scan(driver, file, exposed);
            }
            return true;
        }
        if let Some(exposed) = self.journal.next_due(now_ms, RETRY_MS) {
            if let Some(record) = self.journal.record(exposed) {
                self.start(driver, exposed, &record, now_ms);
            }
            return true;
        }
        self.go_on_walking(driver, entries)
    }

    fn scan(&mut self, driver: &Driver, file: OwnFile, exposed: Option<Exposed>) {
        let subject = Subject::Background { file: Arc::new(file), exposed };
        scan::scan(driver, Job { subject, reads: 0 }, &mut self.buffer);
    }

    fn start(&mut self, driver: &Driver, exposed: Exposed, record: &Record, now_ms: u64) {
        // One whose scan is under way is not begun again, however long it takes.
        if driver.session().is_some_and(|session| session.scans_exposure(exposed)) {
            return;
        }
        let Some(handle) = record.handle() else {
            return self.start_mount(driver, exposed, record, now_ms);
        };
        let Some(device) = self.device(driver, record, &handle) else {
            if !self.may_be_mounted_yet(record, now_ms) {
                self.gone(driver, record);
                self.journal.remove(exposed);
            }
            return;
        };
        match open(driver, &handle.on(device)) {
            Some(Ok(file)) => {
                // It is scanned at its last close; until then it would be read again and again.
                let written = record.reason == ExposureReason::HeldByWriter
                    && seawall_fanotify::is_open_for_writing(file.file().as_fd()).unwrap_or(false);
                if !written {
                    self.scan(driver, file, Some(exposed));
                }
            }
            Some(Err(error)) if error.kind() != std::io::ErrorKind::StaleNetworkFileHandle => {
                tracing::debug!(%error, "a file cannot be reached now; it is tried again");
            }
            _ => {
                self.gone(driver, record);
                self.journal.remove(exposed);
            }
        }
    }

    /// The device of the record's file system in this boot.
    fn device(&self, driver: &Driver, record: &Record, handle: &FileHandle) -> Option<u64> {
        if record.boot_id == self.boot_id {
            return driver.coverage.path_on(handle.device).map(|_| handle.device);
        }
        // Copies of a disk have the same number, and some file systems have none.
        let is_there = |path: &Path| path.as_os_str().as_bytes() == record.mount_point.as_slice();
        let has_number = record.file_system.1 != 0;
        let mut found = driver.coverage.reached();
        found.retain(|(_, path)| {
            (has_number || is_there(path)) && file_system(path) == Some(record.file_system)
        });
        let exact = found.iter().find(|(_, path)| is_there(path));
        exact.or(found.first()).map(|(device, _)| *device)
    }

    /// After a boot file systems come one by one.
    fn may_be_mounted_yet(&self, record: &Record, now_ms: u64) -> bool {
        record.boot_id != self.boot_id && now_ms < self.started_ms + MOUNTED_MS
    }

    // --- all files of a mount -------------------------------------------------------------------

    fn start_mount(&mut self, driver: &Driver, exposed: Exposed, record: &Record, now_ms: u64) {
        let too_early = self.walked_ms.is_some_and(|at| now_ms < at + WALK_PAUSE_MS);
        if self.walk.is_some() || too_early {
            return;
        }
        let mut mounts = driver.coverage.reached();
        if !record.mount_point.is_empty() {
            mounts.retain(|(_, path)| path.as_os_str().as_bytes() == record.mount_point.as_slice());
        }
        if !mounts.is_empty() {
            self.walk = Some(Walk { exposed, mounts, tree: None });
        } else if !self.may_be_mounted_yet(record, now_ms) {
            self.gone(driver, record);
            self.journal.remove(exposed);
        }
    }

    /// Begins the scan of one more file. `false`: there is none, or enough was done for one turn.
    fn go_on_walking(&mut self, driver: &Driver, entries: &mut usize) -> bool {
        let Some(walk) = &mut self.walk else { return false };
        while *entries > 0 {
            *entries -= 1;
            let Some(tree) = walk.tree(driver) else {
                self.journal.remove(walk.exposed);
                self.walk = None;
                self.walked_ms = Some(process::now_ms());
                return true;
            };
            match tree.entries.next() {
                Some(Ok(entry)) if entry.file_type().is_file() => {
                    let Ok(file) = tree.mount.open_path(entry.path()) else { continue };
                    let Ok(look) = Look::at(file.file()) else { continue };
                    let known = driver.memory.known(&look.identity, process::now_ms());
                    if look.is_regular && look.identity.size > 0 && known.is_none() {
                        self.scan(driver, file, None);
                        return true;
                    }
                }
                Some(_) => (),
                None => walk.tree = None,
            }
        }
        false
    }
}

/// A walk over all files of some mounts.
struct Walk {
    exposed: Exposed,
    /// Those that it has not come to yet.
    mounts: Vec<(u64, PathBuf)>,
    tree: Option<Tree>,
}

struct Tree {
    device: u64,
    mount: OwnMount,
    entries: walkdir::IntoIter,
}

impl Walk {
    /// Where it is; none at its end.
    fn tree(&mut self, driver: &Driver) -> Option<&mut Tree> {
        // What was unmounted meanwhile is given up, so that its device is free.
        let is_there = |tree: &Tree| driver.coverage.path_on(tree.device).is_some();
        if !self.tree.as_ref().is_some_and(is_there) {
            self.tree = None;
        }
        while self.tree.is_none() {
            let (device, mount_point) = self.mounts.pop()?;
            self.tree = Tree::of(device, &mount_point)
                .inspect_err(|error| {
                    tracing::warn!(%error, mount = %mount_point.display(), "cannot be scanned");
                })
                .ok();
        }
        self.tree.as_mut()
    }
}

impl Tree {
    fn of(device: u64, mount_point: &Path) -> std::io::Result<Self> {
        let mount = OwnMount::open(device, mount_point)?;
        tracing::info!(mount = %mount_point.display(), "all its files are scanned");
        // Few folders are held open at once: descriptors are for held accesses.
        let walk = walkdir::WalkDir::new(mount.root()).max_open(4);
        let entries = walk.same_file_system(!mount.is_copy()).into_iter();
        Ok(Self { device, mount, entries })
    }
}

fn true_path(file: &OwnFile) -> Option<Vec<u8>> {
    let identity = Look::at(file.file()).ok()?.identity;
    truth::true_path(file.file(), file.under(), identity.device, identity.inode)
}

/// The file; none when its file system is gone.
fn open(driver: &Driver, handle: &FileHandle) -> Option<std::io::Result<OwnFile>> {
    let path = driver.coverage.path_on(handle.device)?;
    Some(OwnFile::open(handle, &path))
}

/// A file system's type and number, the same in every boot where it has one of its own.
fn file_system(mount_point: &Path) -> Option<(u64, u64)> {
    let kind = rustix::fs::statfs(mount_point).ok()?.f_type.cast_unsigned();
    Some((kind, rustix::fs::statvfs(mount_point).ok()?.f_fsid))
}

fn boot_id() -> [u8; 16] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digest = blake3::hash(text.as_bytes());
    digest.as_bytes()[..16].try_into().unwrap_or_default()
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
