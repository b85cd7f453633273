//! Scans for which nobody waits: files closed after writing, and files that were let through.
//!
//! ```text
//!   close after write ─────────────► queue ────────────────┐
//!   let through ──► ledger ──► journal (the file goes on) ──┴─► a few scans at a time
//!                                 ▲                                   │
//!                                 └───────── settled: taken out ◄─────┘
//! ```
//!
//! Three threads. [`watch_closes`] takes close-after-write events: the file is no longer clean, and it
//! is queued by its handle, so that nothing keeps its file system busy meanwhile. [`work`] alone has the
//! journal, and says what is due. [`scan_all`] opens and sends that, which may take minutes or wait for a
//! disk. Where more was let through than the journal holds, it goes through all files of the mount.

mod queue;

pub use queue::{Queue, Shown};

use crate::driver::{Driver, Job, Purpose, Subject, count};
use crate::event::wait_readable;
use crate::file::{Look, open_handle};
use crate::journal::{Added, Exposed, Journal, Record};
use crate::walk::{Step, Walk};
use crate::{scan, truth};
use queue::{IDLE, Wanted};
use seawall_fanotify::{Event, EventKind, FileHandle, process};
use seawall_proto::{ExposureReason, Notice, Operation};
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Types of file systems that end with their boot (statfs(2)): tmpfs and ramfs.
const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];
/// An exposure whose scan came to nothing is tried again after this, in milliseconds; then after twice as
/// long, and so on.
const RETRY_MS: u64 = 10_000;
/// From the end of one walk over all files of mounts to the next, in milliseconds: whoever can have many
/// files let through must not keep the disks busy for ever.
const WALK_PAUSE_MS: u64 = 3_600_000;
/// After a boot a file system may take this long to be mounted, in milliseconds; what was let through
/// on it is given up then.
const MOUNTED_MS: u64 = 600_000;
/// How often a journal that cannot be opened is tried, in milliseconds.
const OPEN_AGAIN_MS: u64 = 1_000;
/// How often the journal is made to outlast a loss of power, in milliseconds.
const SYNC_MS: u64 = 1_000;
/// How many such scans are under way at once.
const AT_ONCE: usize = 4;
/// A file system that is not found is looked for so often before what was let through on it is given up.
const LOOKS: u8 = 3;

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
            lost(driver);
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Whatever was written may be lost: nothing is clean, and where no open has it scanned, everything is scanned.
fn lost(driver: &Driver) {
    driver.forget_all();
    let mode = driver.policy().mode;
    if mode.scans_written() && !mode.holds_open() {
        driver.background.lock().lost = true;
    }
}

fn take(driver: &Driver, event: Event) {
    let Some(fd) = event.fd else {
        if event.kind == EventKind::Overflow {
            tracing::warn!("closes after write were lost; everything clean is forgotten");
            lost(driver);
        }
        return;
    };
    // The journal, which must not make work for itself.
    if event.pid == std::process::id() {
        return;
    }
    let Ok(look) = Look::at(&fd) else { return };
    let identity = look.identity;
    driver.forget(&fd, &identity);
    if driver.policy().mode.scans_written()
        && look.is_regular
        && identity.size > 0
        && let Ok(handle) = FileHandle::of(fd.as_fd(), identity.device)
    {
        let mode = driver.policy().mode;
        if !driver.background.add_closed(handle, process::now_ms()) && !mode.holds_open() {
            driver.ledger.expose(Some(&handle), ExposureReason::Overload.number());
        }
        // After it: whoever waits for one more finds its file waiting, or scanned.
        count(&driver.counters.closes);
    }
}

/// Keeps the journal, at `path`, and says what is to be scanned, for ever.
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

/// Scans what is wanted for ever.
pub fn scan_all(driver: &Driver) {
    let mut buffer = Vec::new();
    let mut walker: Option<Walker> = None;
    loop {
        let wait = if walker.is_some() { Duration::from_millis(5) } else { IDLE };
        match driver.background.next_wanted(wait) {
            Some(Wanted::File { handle, purpose, unwritten }) => {
                scan_file(driver, handle, purpose, unwritten, &mut buffer);
                driver.background.sent();
            }
            Some(Wanted::Walk(mounts)) => {
                walker = Some(Walker { mounts, walk: None, missed: 0 });
            }
            None => (),
        }
        if let Some(going) = &mut walker
            && !going.go_on(driver, &mut buffer)
        {
            driver.background.lock().walked = Some(going.missed);
            walker = None;
        }
    }
}

fn scan_file(
    driver: &Driver,
    handle: FileHandle,
    purpose: Purpose,
    unwritten: bool,
    buffer: &mut Vec<u8>,
) {
    let Some(path) = driver.coverage.path_on(handle.device) else { return };
    let file = match open_handle(&handle, &path) {
        Ok(file) => file,
        Err(error) => {
            let is_gone = error.kind() == std::io::ErrorKind::StaleNetworkFileHandle;
            match purpose {
                Purpose::Exposure(exposed) if is_gone => {
                    driver.background.lock().gone.push(exposed);
                }
                _ => tracing::debug!(%error, "a file cannot be reached now"),
            }
            return;
        }
    };
    if unwritten && seawall_fanotify::is_open_for_writing(file.as_fd()).unwrap_or(false) {
        return;
    }
    let subject = Subject::Background { handle, file: Some(Arc::new(file)), purpose };
    scan::scan(driver, Job::new(subject), buffer);
}

/// Goes through mounts.
struct Walker {
    /// Those that it has not come to yet.
    mounts: Vec<(u64, PathBuf)>,
    walk: Option<Walk>,
    /// What it could not look at.
    missed: u64,
}

impl Walker {
    /// Goes on as long as the host takes more. `false`: it is at its end.
    fn go_on(&mut self, driver: &Driver, buffer: &mut Vec<u8>) -> bool {
        loop {
            let Some(session) = driver.session() else { return true };
            if session.under_way(Operation::Background) >= AT_ONCE
                || driver.background.sending() > 0
            {
                return true;
            }
            let Some(walk) = &mut self.walk else {
                let Some((device, path)) = self.mounts.pop() else { return false };
                match Walk::begin(device, &path) {
                    Ok(walk) => {
                        tracing::info!(mount = %path.display(), "all its files are scanned");
                        self.walk = Some(walk);
                    }
                    Err(error) => {
                        tracing::warn!(%error, mount = %path.display(), "cannot be gone through");
                        self.missed += 1;
                    }
                }
                continue;
            };
            match walk.step() {
                Step::File(file) => self.missed += u64::from(!scan_found(driver, file, buffer)),
                Step::Other => (),
                Step::Missed(_) => self.missed += 1,
                Step::End => self.walk = None,
            }
        }
    }
}

/// `false`: the file has no handle.
fn scan_found(driver: &Driver, file: File, buffer: &mut Vec<u8>) -> bool {
    let Ok(look) = Look::at(&file) else { return false };
    if driver.memory.known(&look.identity, process::now_ms()).is_some() {
        return true;
    }
    let Ok(handle) = FileHandle::of(file.as_fd(), look.identity.device) else { return false };
    let file = Some(Arc::new(file));
    let subject = Subject::Background { handle, file, purpose: Purpose::Walk };
    scan::scan(driver, Job::new(subject), buffer);
    true
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
    /// The records that the walk under way settles.
    walk: Option<Vec<Exposed>>,
    /// When the last walk ended.
    walked_ms: Option<u64>,
    /// Whether the next scan is of an exposure rather than of a closed file.
    exposure_next: bool,
    /// Which session this was last.
    session: usize,
    busy: bool,
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
            exposure_next: false,
            session: 0,
            busy: false,
        }
    }

    fn turn(&mut self, driver: &Driver) {
        let now_ms = process::now_ms();
        self.open(driver, now_ms);
        // What was settled may have been noted once more since.
        let (settled, judged, gone, written, walked, lost) = {
            let mut inner = driver.background.lock();
            let settled = std::mem::take(&mut inner.settled);
            let gone = std::mem::take(&mut inner.gone);
            let judged = std::mem::take(&mut inner.judged);
            let written = std::mem::take(&mut inner.written);
            let lost = std::mem::take(&mut inner.lost);
            (settled, judged, gone, written, inner.walked.take(), lost)
        };
        if lost {
            self.expose_mount(driver, b"");
        }
        let judged = judged.iter().filter_map(|handle| self.journal.find(handle));
        let settled: Vec<_> = settled.into_iter().chain(judged).collect();
        settled.into_iter().for_each(|exposed| self.journal.remove(exposed));
        gone.into_iter().for_each(|exposed| self.give_up(driver, exposed));
        if let Some(missed) = walked {
            self.end_walk(missed);
        }
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
        // With a new session nothing has to wait for its next try.
        let number = Arc::as_ptr(&session) as usize;
        if std::mem::replace(&mut self.session, number) != number {
            self.journal.all_due();
        }
        while session.under_way(Operation::Background) + driver.background.sending() < AT_ONCE
            && driver.session().is_some_and(|now| Arc::ptr_eq(&now, &session))
            && self.start_next(driver, now_ms)
        {}
        self.busy = session.under_way(Operation::Background) + driver.background.sending() > 0;
    }

    fn end_walk(&mut self, missed: u64) {
        let Some(walk) = self.walk.take() else { return };
        self.walked_ms = Some(process::now_ms());
        if missed > 0 {
            tracing::warn!(missed, "files and folders could not be looked at");
            self.unknown += missed;
        }
        walk.into_iter().for_each(|exposed| self.journal.remove(exposed));
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
            let all = journal.add_all(&self.journal)?;
            Ok((journal, damaged, all))
        });
        match opened {
            Ok((journal, damaged, all)) => {
                self.journal = journal;
                self.in_memory = None;
                if damaged > 0 {
                    tracing::warn!(damaged, "the journal of exposures is damaged; all is scanned");
                }
                if damaged > 0 || !all {
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
                return self.leave_file(&error);
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
        if let Some(mount_point) = driver.coverage.path_on(handle.device) {
            // The path is for people; finding it out waits for nothing.
            if let Ok(file) = open_handle(handle, &mount_point)
                && let Ok(look) = Look::at(&file)
            {
                let shown = truth::shown_path(&file, look.identity.device, look.identity.inode);
                record.path = if shown.is_true { shown.path.into() } else { record.path };
            }
            record.file_system = file_system(&mount_point).unwrap_or_default();
            record.mount_point = mount_point.into_os_string().into_vec().into();
        }
        if self.journal.add(&record)? == Added::Full && reason != ExposureReason::HeldByWriter {
            self.expose_mount(driver, &record.mount_point);
        }
        Ok(())
    }

    /// The file cannot be written any more: what it holds goes on in memory, until one can be opened again.
    fn leave_file(&mut self, error: &std::io::Error) {
        if self.in_memory.is_some() {
            return;
        }
        tracing::warn!(%error, "the journal of exposures cannot be written; it goes on in memory");
        self.in_memory = Some(format!("{}: {error}", self.path.display()));
        if let Ok(mut journal) = Journal::in_memory() {
            let _what_can_be_read = journal.add_all(&self.journal);
            self.journal = journal;
        }
    }

    /// What a record is about is gone: what it was will never be known. One that somebody wrote had been
    /// scanned. Where the report finds no room, the record is looked at again later.
    fn give_up(&mut self, driver: &Driver, exposed: Exposed) {
        let Some(record) = self.journal.record(exposed) else { return };
        if record.reason != ExposureReason::HeldByWriter {
            let path = if record.handle().is_some() { &record.path } else { &record.mount_point };
            let (path, reason) = (path.clone(), record.reason);
            if !driver.notice(Notice::ExposureGone { path, reason }) {
                return;
            }
            self.unknown += 1;
        }
        self.journal.remove(exposed);
    }

    fn expose_mount(&mut self, driver: &Driver, mount_point: &[u8]) {
        let mut record = Record::of_mount(mount_point, ExposureReason::Overload);
        record.boot_id = self.boot_id;
        match self.journal.add(&record) {
            Ok(Added::New) => {
                self.untold.push(mount_point.to_vec());
                self.tell(driver);
            }
            // A walk may have been where this was let through: it does not settle the record any more.
            Ok(Added::Known) => (),
            Ok(Added::Full) if mount_point.is_empty() => (),
            // There is always room for one more that stands for all.
            Ok(Added::Full) => self.expose_mount(driver, b""),
            Err(error) => self.leave_file(&error),
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

    /// Says what is to be scanned next. `false`: nothing is due.
    fn start_next(&mut self, driver: &Driver, now_ms: u64) -> bool {
        // In turn: whoever writes much must not keep what was let through from its scan.
        self.exposure_next = !self.exposure_next;
        self.exposure_next && self.start_exposure(driver, now_ms)
            || self.start_closed(driver, now_ms)
            || self.start_exposure(driver, now_ms)
    }

    fn start_closed(&mut self, driver: &Driver, now_ms: u64) -> bool {
        let Some(handle) = driver.background.take_closed(now_ms) else { return false };
        if is_being_scanned(driver, &handle) {
            // It may have been closed since that scan began.
            let _room = driver.background.add_closed(handle, now_ms);
            return true;
        }
        let purpose = self.journal.find(&handle).map_or(Purpose::Close, Purpose::Exposure);
        driver.background.want(Wanted::File { handle, purpose, unwritten: false });
        true
    }

    fn start_exposure(&mut self, driver: &Driver, now_ms: u64) -> bool {
        let Some(exposed) = self.journal.next_due(now_ms, RETRY_MS) else { return false };
        if let Some(record) = self.journal.record(exposed) {
            self.start(driver, exposed, &record, now_ms);
        }
        true
    }

    fn start(&mut self, driver: &Driver, exposed: Exposed, record: &Record, now_ms: u64) {
        let Some(handle) = record.handle() else { return self.start_mounts(driver, now_ms) };
        match self.device(driver, record, &handle) {
            // One scan at a time, however long it takes: two copies of a large file are too many.
            Some(device) if is_being_scanned(driver, &handle.on(device)) => {
                self.journal.not_tried(exposed);
            }
            Some(device) => {
                let purpose = Purpose::Exposure(exposed);
                // It is scanned at its last close; until then it would be read again and again.
                let unwritten = record.reason == ExposureReason::HeldByWriter;
                let handle = handle.on(device);
                if let Some(mount_point) = driver.coverage.path_on(device) {
                    make_path_known(&mount_point, record);
                }
                driver.background.want(Wanted::File { handle, purpose, unwritten });
            }
            None if self.may_be_mounted_yet(exposed, record, now_ms) => (),
            None => self.give_up(driver, exposed),
        }
    }

    /// The device of the record's file system now. It may have been mounted anew since, and its device
    /// be another's.
    fn device(&self, driver: &Driver, record: &Record, handle: &FileHandle) -> Option<u64> {
        let is_it = |path: &Path| file_system(path) == Some(record.file_system);
        let has_number = record.file_system.1 != 0;
        if record.boot_id == self.boot_id {
            let path = driver.coverage.path_on(handle.device);
            if path.is_some_and(|path| !has_number || is_it(&path)) {
                return Some(handle.device);
            }
        }
        // Copies of a disk have the same number, and some file systems have none.
        let is_there = |path: &Path| path.as_os_str().as_bytes() == record.mount_point.as_slice();
        let mut found = driver.coverage.reached();
        found.retain(|(_, path)| (has_number || is_there(path)) && is_it(path));
        let exact = found.iter().find(|(_, path)| is_there(path));
        exact.or(found.first()).map(|(device, _)| *device)
    }

    /// After a boot file systems come one by one, and one may be out of sight for a moment.
    fn may_be_mounted_yet(&self, exposed: Exposed, record: &Record, now_ms: u64) -> bool {
        let is_of_another_boot = record.boot_id != self.boot_id;
        if is_of_another_boot && IN_MEMORY.contains(&record.file_system.0) {
            return false;
        }
        is_of_another_boot && now_ms < self.started_ms + MOUNTED_MS
            || self.journal.tries(exposed) < LOOKS
    }

    /// Has all files of all mounts scanned of which that is to be done, together.
    fn start_mounts(&mut self, driver: &Driver, now_ms: u64) {
        let too_early = self.walked_ms.is_some_and(|at| now_ms < at + WALK_PAUSE_MS);
        if self.walk.is_some() || too_early {
            return;
        }
        let reached = driver.coverage.reached();
        let (mut exposed, mut mounts) = (Vec::new(), Vec::new());
        for one in self.journal.mount_records() {
            let Some(record) = self.journal.record(one) else { continue };
            let is_it = |path: &Path| {
                record.mount_point.is_empty()
                    || path.as_os_str().as_bytes() == record.mount_point.as_slice()
            };
            let found: Vec<_> = reached.iter().filter(|(_, path)| is_it(path)).cloned().collect();
            if !found.is_empty() {
                mounts.extend(found);
                exposed.push(one);
            } else if !self.may_be_mounted_yet(one, &record, now_ms) {
                self.give_up(driver, one);
            }
        }
        mounts.sort();
        mounts.dedup();
        if !mounts.is_empty() {
            self.walk = Some(exposed);
            driver.background.want(Wanted::Walk(mounts));
        }
    }
}

/// Whether a scan of this file for which nobody waits has begun.
fn is_being_scanned(driver: &Driver, file: &FileHandle) -> bool {
    let is_it = |wanted: &Wanted| matches!(wanted, Wanted::File { handle, .. } if handle == file);
    let inner = driver.background.lock();
    let begins = inner.sent_now == Some(*file) || inner.wanted.iter().any(is_it);
    drop(inner);
    begins || driver.session().is_some_and(|session| session.scans(file))
}

/// Has the kernel look the record's path up. A file that is opened by its handle has a path only where the
/// kernel knows the folders above it, and after a reboot or a new mount it does not. What a path leads to
/// by now is another's affair: the handle says which file is meant.
fn make_path_known(mount_point: &Path, record: &Record) {
    use rustix::fs::{Mode, OFlags, ResolveFlags};
    let (path, above) = (OsStr::from_bytes(&record.path), OsStr::from_bytes(&record.mount_point));
    let Ok(beneath) = Path::new(path).strip_prefix(above) else { return };
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let folder = rustix::fs::open(mount_point, flags | OFlags::DIRECTORY, Mode::empty());
    // Users may have put links and mounts there.
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let _found = folder
        .and_then(|folder| rustix::fs::openat2(folder, beneath, flags, Mode::empty(), resolve));
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
