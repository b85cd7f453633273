//! The journal of exposures: what was let through unscanned, kept until it is scanned.
//!
//! The ledger notes an exposure at once, in memory, whoever lets the file through; from there it comes
//! here ([`crate::background`]) and stays through the end of the driver and a reboot of the guest.
//! Nothing on the way to an answer touches the journal: it is a file, and a file may wait for a disk.
//!
//! ```text
//!   header │ place 0 │ place 1 │ …          each of 512 bytes, reserved on the disk when it is made
//!            └─ length, record (postcard), the first 8 bytes of its BLAKE3; length 0: free
//! ```
//!
//! In memory are 24 bytes for each place in use. Without a file (a read-only disk, a guest that boots)
//! the same is kept in a memfd, and told.

use seawall_fanotify::FileHandle;
use seawall_proto::ExposureReason;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::collections::BTreeSet;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// Files that have room.
pub const FILES_MAX: usize = 10_000;
/// Mounts that have room besides, whose files are all to be scanned.
const MOUNTS_MAX: usize = 64;
const PLACES: usize = FILES_MAX + MOUNTS_MAX;
/// Of the files, how many may be there only because somebody writes them.
const WRITTEN_MAX: usize = 2_000;

/// So many times a record is tried again after one pause.
const EQUAL_PAUSES: u8 = 3;
/// A record is tried again after at most so many pauses.
const PAUSES_MAX: u64 = 256;

const PLACE_LEN: usize = 512;
const DIGEST_LEN: usize = 8;
const MAGIC: &[u8] = b"Seawall exposures 1\n";

/// What is to be scanned: a file, or all files of a mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The file ([`FileHandle::to_bytes`]); none for all files of the mount.
    handle: Option<ByteBuf>,
    /// The boot in which the handle's device number was this file system's.
    pub boot_id: [u8; 16],
    /// The file system in any boot: type and number as statfs(2) gives them.
    pub file_system: (u64, u64),
    /// Where it was mounted; empty where the name is too long. For all files: empty means everywhere.
    pub mount_point: ByteBuf,
    /// The file's path if it is true, for people; empty where there is none or the name is too long.
    pub path: ByteBuf,
    /// Why it was let through.
    pub reason: ExposureReason,
    /// When, in seconds since 1970.
    pub since_s: u64,
}

impl Record {
    /// For one file; whoever makes it fills in the rest.
    pub fn of(handle: &FileHandle, reason: ExposureReason) -> Self {
        Self { handle: Some(handle.to_bytes().into()), ..Self::of_mount(b"", reason) }
    }

    /// For all files of a mount.
    pub fn of_mount(mount_point: &[u8], reason: ExposureReason) -> Self {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            handle: None,
            boot_id: [0; 16],
            file_system: (0, 0),
            mount_point: mount_point.to_vec().into(),
            path: ByteBuf::new(),
            reason,
            since_s: since.map_or(0, |since| since.as_secs()),
        }
    }

    /// The file; none for all files of the mount.
    pub fn handle(&self) -> Option<FileHandle> {
        FileHandle::from_bytes(self.handle.as_ref()?)
    }

    /// One place's bytes. Names that do not fit are left out: the handle finds the file.
    fn to_place(&self) -> Option<[u8; PLACE_LEN]> {
        let no_path = || Self { path: ByteBuf::new(), ..self.clone() };
        let no_names = || Self { mount_point: ByteBuf::new(), ..no_path() };
        self.encode().or_else(|| no_path().encode()).or_else(|| no_names().encode())
    }

    fn encode(&self) -> Option<[u8; PLACE_LEN]> {
        let mut place = [0; PLACE_LEN];
        let room = &mut place[2..PLACE_LEN - DIGEST_LEN];
        let len = postcard::to_slice(self, room).ok()?.len();
        place[..2].copy_from_slice(&u16::try_from(len).ok()?.to_le_bytes());
        let digest = blake3::hash(&place[..2 + len]);
        place[2 + len..][..DIGEST_LEN].copy_from_slice(&digest.as_bytes()[..DIGEST_LEN]);
        Some(place)
    }

    /// The record in one place; none where it is damaged.
    fn decode(place: &[u8; PLACE_LEN]) -> Option<Self> {
        let len = usize::from(u16::from_le_bytes([place[0], place[1]]));
        let digest = place.get(2 + len..2 + len + DIGEST_LEN)?;
        let whole = blake3::hash(&place[..2 + len]).as_bytes()[..DIGEST_LEN] == *digest;
        whole.then(|| postcard::from_bytes(&place[2..2 + len]).ok())?
    }
}

/// Names one record as long as it is in the journal, and nothing afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exposed {
    at: usize,
    key: u64,
    /// A scan that began before the file was let through once more does not settle that.
    serial: u32,
}

/// What became of a record that was to be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Added {
    New,
    /// The same file is there already.
    Known,
    /// There is no room.
    Full,
}

#[derive(Debug, Clone, Copy, Default)]
struct Place {
    /// Digest of what the record is about; 0 for a free place.
    key: u64,
    /// When it is tried next, in milliseconds, and how often it was.
    due_ms: u64,
    tries: u8,
    /// It waits for whoever writes the file.
    is_written: bool,
    serial: u32,
}

impl Place {
    fn named(&self, at: usize) -> Exposed {
        Exposed { at, key: self.key, serial: self.serial }
    }
}

/// The journal. One thread has it.
#[derive(Debug)]
pub struct Journal {
    file: File,
    places: Vec<Place>,
    salt: RandomState,
    is_dirty: bool,
}

impl Journal {
    /// Opens the journal in a file of its own, or makes it. The second value counts damaged places: what
    /// was in them is not known.
    ///
    /// # Errors
    /// What the file system says; WouldBlock while another driver has it open.
    pub fn open(path: &Path) -> io::Result<(Self, u32)> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let flags = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(flags)
            .open(path)?;
        file.try_lock()?;
        let len = ((PLACES + 1) * PLACE_LEN) as u64;
        let before = file.metadata()?.len();
        if before != len {
            file.set_len(len)?;
        }
        reserve(&file, len)?;
        let mut header = [0; MAGIC.len()];
        file.read_exact_at(&mut header, 0)?;
        let mut journal = Self::on(file);
        if header == *MAGIC {
            let damaged = journal.load()? + u32::from(before != len);
            return Ok((journal, damaged));
        }
        let damaged = u32::from(header != [0; MAGIC.len()]);
        if damaged > 0 {
            journal.file.set_len(0)?;
            journal.file.set_len(len)?;
            reserve(&journal.file, len)?;
        }
        journal.file.write_all_at(MAGIC, 0)?;
        journal.is_dirty = true;
        Ok((journal, damaged))
    }

    /// One that lasts as long as the process.
    ///
    /// # Errors
    /// What memfd_create(2) says.
    pub fn in_memory() -> io::Result<Self> {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        Ok(Self::on(File::from(rustix::fs::memfd_create("seawall-exposures", flags)?)))
    }

    fn on(file: File) -> Self {
        Self { file, places: Vec::new(), salt: RandomState::new(), is_dirty: false }
    }

    fn load(&mut self) -> io::Result<u32> {
        let mut damaged = 0;
        let mut bytes = [0; PLACE_LEN];
        for at in 0..PLACES {
            self.file.read_exact_at(&mut bytes, offset(at))?;
            if bytes[..2] == [0, 0] {
                continue;
            }
            match Record::decode(&bytes) {
                Some(record) => self.set(at, &record),
                None => {
                    damaged += 1;
                    self.clear(at)?;
                }
            }
        }
        Ok(damaged)
    }

    fn key_of(&self, record: &Record) -> u64 {
        let about = match &record.handle {
            Some(handle) => (1, handle),
            None => (2, &record.mount_point),
        };
        self.salt.hash_one(about).max(1)
    }

    fn set(&mut self, at: usize, record: &Record) {
        let key = self.key_of(record);
        let is_written = record.reason == ExposureReason::HeldByWriter;
        if self.places.len() <= at {
            self.places.resize(at + 1, Place::default());
        }
        let serial = self.places[at].serial.wrapping_add(1);
        self.places[at] = Place { key, due_ms: 0, tries: 0, is_written, serial };
    }

    fn clear(&mut self, at: usize) -> io::Result<()> {
        self.is_dirty = true;
        self.file.write_all_at(&[0, 0], offset(at))
    }

    /// Adds a record, unless there is one about the same file.
    ///
    /// # Errors
    /// What the file system says.
    pub fn add(&mut self, record: &Record) -> io::Result<Added> {
        let key = self.key_of(record);
        let is_written = record.reason == ExposureReason::HeldByWriter;
        if let Some(at) = self.places.iter().position(|place| place.key == key) {
            // Let through once more: a scan that is under way does not settle that, nor does it wait for a
            // writer then.
            if !is_written {
                if self.places[at].is_written
                    && let Some(place) = record.to_place()
                {
                    self.file.write_all_at(&place, offset(at))?;
                    self.is_dirty = true;
                }
                self.set(at, record);
            }
            return Ok(Added::Known);
        }
        if is_written && self.written() >= WRITTEN_MAX {
            return Ok(Added::Full);
        }
        // Mounts come behind the files: there is room for them when there is none for files. The last place
        // is for all mounts.
        let room = match (&record.handle, record.mount_point.is_empty()) {
            (Some(_), _) => 0..FILES_MAX,
            (None, false) => FILES_MAX..PLACES - 1,
            (None, true) => PLACES - 1..PLACES,
        };
        let is_free = |at: &usize| self.places.get(*at).is_none_or(|place| place.key == 0);
        let Some(at) = room.clone().find(is_free) else { return Ok(Added::Full) };
        let place = record.to_place().ok_or(io::ErrorKind::InvalidData)?;
        self.file.write_all_at(&place, offset(at))?;
        self.is_dirty = true;
        self.set(at, record);
        Ok(Added::New)
    }

    /// Takes over all that another one has. `false`: not all of it found room.
    ///
    /// # Errors
    /// What the file system says.
    pub fn add_all(&mut self, other: &Self) -> io::Result<bool> {
        let mut all = true;
        for exposed in other.all() {
            if let Some(record) = other.record(exposed) {
                all &= self.add(&record)? != Added::Full;
            }
        }
        Ok(all)
    }

    fn all(&self) -> impl Iterator<Item = Exposed> + '_ {
        let places = self.places.iter().enumerate();
        places.filter(|(_, place)| place.key != 0).map(|(at, place)| place.named(at))
    }

    fn has(&self, exposed: Exposed) -> bool {
        let place = self.places.get(exposed.at);
        place.is_some_and(|place| place.named(exposed.at) == exposed)
    }

    /// How often a record was tried; none that is not there.
    pub fn tries(&self, exposed: Exposed) -> u8 {
        self.places.get(exposed.at).map_or(u8::MAX, |place| place.tries)
    }

    /// The records about mounts.
    pub fn mount_records(&self) -> Vec<Exposed> {
        self.all().filter(|exposed| exposed.at >= FILES_MAX).collect()
    }

    /// What is written of it; none when it is there no longer.
    pub fn record(&self, exposed: Exposed) -> Option<Record> {
        let mut bytes = [0; PLACE_LEN];
        // A memfd ends with the last place that was written.
        let mut read = 0;
        while read < PLACE_LEN {
            match self.file.read_at(&mut bytes[read..], offset(exposed.at) + read as u64) {
                Ok(0) => break,
                Ok(more) => read += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(_) => return None,
            }
        }
        self.has(exposed).then(|| Record::decode(&bytes))?
    }

    /// The record about a file, if there is one.
    pub fn find(&self, handle: &FileHandle) -> Option<Exposed> {
        let key = self.key_of(&Record::of(handle, ExposureReason::LinkDown));
        self.all().find(|exposed| exposed.key == key)
    }

    /// The next record that is due. It is due again after `pause_ms`; from the [`EQUAL_PAUSES`]th time on
    /// after twice as long each time, up to [`PAUSES_MAX`] times that: what can never be scanned must not
    /// keep the host busy.
    pub fn next_due(&mut self, now_ms: u64, pause_ms: u64) -> Option<Exposed> {
        let is_due = |place: &&mut Place| place.key != 0 && place.due_ms <= now_ms;
        let (at, place) = self.places.iter_mut().enumerate().find(|(_, place)| is_due(place))?;
        let pauses = 1 << place.tries.saturating_sub(EQUAL_PAUSES);
        place.due_ms = now_ms + pause_ms * pauses.min(PAUSES_MAX);
        place.tries = place.tries.saturating_add(1).min(62);
        Some(place.named(at))
    }

    /// It was not tried after all.
    pub fn not_tried(&mut self, exposed: Exposed) {
        if self.has(exposed) {
            let place = &mut self.places[exposed.at];
            place.tries = place.tries.saturating_sub(1);
        }
    }

    /// Has all files tried at once.
    pub fn all_due(&mut self) {
        for place in self.places.iter_mut().take(FILES_MAX) {
            (place.due_ms, place.tries) = (0, 0);
        }
    }

    /// Forgets a record: what it is about was scanned, or is gone.
    pub fn remove(&mut self, exposed: Exposed) {
        if !self.has(exposed) {
            return;
        }
        // What cannot be written is scanned once more by the next driver.
        if let Err(error) = self.clear(exposed.at) {
            tracing::warn!(%error, "the journal of exposures cannot be written");
        }
        let serial = self.places[exposed.at].serial;
        self.places[exposed.at] = Place { serial, ..Place::default() };
    }

    /// How many files wait.
    pub fn files(&self) -> usize {
        self.all().filter(|exposed| exposed.at < FILES_MAX).count()
    }

    /// How many of them wait for whoever writes them.
    pub fn written(&self) -> usize {
        self.places.iter().filter(|place| place.key != 0 && place.is_written).count()
    }

    /// Mounts whose files are all to be scanned.
    pub fn mounts(&self) -> BTreeSet<Vec<u8>> {
        let mounts = self.mount_records().into_iter();
        mounts.filter_map(|one| Some(self.record(one)?.mount_point.into_vec())).collect()
    }

    /// Makes what was written outlast a loss of power.
    pub fn sync(&mut self) {
        if std::mem::take(&mut self.is_dirty)
            && let Err(error) = self.file.sync_data()
        {
            tracing::warn!(%error, "the journal of exposures may not outlast a loss of power");
        }
    }
}

/// What has room now still has it when the disk is full. Not every file system can promise that.
fn reserve(file: &File, len: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, len) {
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(()),
        result => Ok(result?),
    }
}

fn offset(at: usize) -> u64 {
    ((at + 1) * PLACE_LEN) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn file_record(path: &str) -> Record {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        let handle = FileHandle::of(file.as_fd(), 1).unwrap();
        Record {
            path: path.as_bytes().to_vec().into(),
            ..Record::of(&handle, ExposureReason::LinkDown)
        }
    }

    fn paths(journal: &Journal) -> Vec<Vec<u8>> {
        journal.all().map(|one| journal.record(one).unwrap().path.into_vec()).collect()
    }

    #[test]
    fn what_was_written_is_there_after_a_restart_and_what_was_removed_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/exposures");
        let (mut journal, _) = Journal::open(&path).unwrap();
        assert_eq!(Journal::open(&path).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let records = ["/a", "/b", "/c"].map(file_record);
        for record in &records {
            assert_eq!(journal.add(record).unwrap(), Added::New);
            assert_eq!(journal.add(record).unwrap(), Added::Known);
        }
        let gone = journal.find(&records[1].handle().unwrap()).unwrap();
        journal.remove(gone);
        assert_eq!(journal.record(gone), None);
        drop(journal);
        let (mut journal, damaged) = Journal::open(&path).unwrap();
        assert_eq!((damaged, journal.files()), (0, 2));
        assert_eq!(paths(&journal), [b"/a".to_vec(), b"/c".to_vec()]);
        journal.remove(gone);
        assert_eq!(journal.files(), 2, "a name from before means nothing");
        let due = journal.next_due(0, 10).unwrap();
        assert_eq!(journal.record(due).unwrap(), records[0]);
        let next = journal.next_due(0, 10).unwrap();
        assert_eq!(journal.record(next).unwrap(), records[2]);
        assert_eq!(journal.next_due(9, 10), None);
        assert_eq!(journal.next_due(10, 10), Some(due));
        journal.remove(next);
        for now_ms in [20, 30, 40] {
            assert_eq!(journal.next_due(now_ms, 10), Some(due));
        }
        assert_eq!(journal.next_due(59, 10), None, "each pause is longer");
        assert_eq!(journal.next_due(60, 10), Some(due));
        for _ in 0..100 {
            journal.next_due(u64::MAX / 2, 10);
        }
    }

    #[test]
    fn it_is_bounded_and_a_full_one_still_takes_mounts() {
        let mut journal = Journal::in_memory().unwrap();
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        let handle = FileHandle::of(file.as_fd(), 1).unwrap();
        for device in 0..FILES_MAX as u64 {
            let record = Record::of(&handle.on(device), ExposureReason::Deadline);
            assert_eq!(journal.add(&record).unwrap(), Added::New);
        }
        assert_eq!(journal.add(&file_record("/more")).unwrap(), Added::Full);
        let mount = Record::of_mount(b"/srv", ExposureReason::LinkDown);
        assert_eq!(journal.add(&mount).unwrap(), Added::New);
        assert_eq!(journal.add(&mount).unwrap(), Added::Known);
        assert_eq!(journal.files(), FILES_MAX);
        assert_eq!(journal.mounts(), BTreeSet::from([b"/srv".to_vec()]));
        let folder = tempfile::tempdir().unwrap();
        let (mut on_disk, _) = Journal::open(&folder.path().join("exposures")).unwrap();
        on_disk.add_all(&journal).unwrap();
        assert_eq!((on_disk.files(), on_disk.mounts()), (FILES_MAX, journal.mounts()));
    }

    #[test]
    fn a_damaged_place_is_counted_and_a_name_too_long_is_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("exposures");
        let (mut journal, _) = Journal::open(&path).unwrap();
        journal.add(&file_record("/a")).unwrap();
        journal.add(&file_record(&"x".repeat(4096))).unwrap();
        assert_eq!(paths(&journal), [b"/a".to_vec(), Vec::new()]);
        drop(journal);
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(b"?", offset(0) + 20).unwrap();
        let (journal, damaged) = Journal::open(&path).unwrap();
        assert_eq!((damaged, journal.files()), (1, 1));
        drop(journal);
        file.write_all_at(b"another format", 0).unwrap();
        let (journal, damaged) = Journal::open(&path).unwrap();
        assert_eq!((damaged, journal.files()), (1, 0));
    }
}
