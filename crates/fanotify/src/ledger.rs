//! Which events are held, in memory that worker and supervisor share.
//!
//! Each held event has the entry of its descriptor's number. The entry's word moves so:
//!
//! ```text
//!   empty ──hold──► held ──answer: claim──► claimed ──written to the kernel──► empty
//!                     │                        │
//!                     └── worker dies ─────────┴──► the supervisor answers: by fail mode when
//!                                                   held, as decided when claimed
//! ```
//!
//! [`Ledger::answer`] is the only place that answers an event of a live worker, and it answers for
//! whoever takes the claim: the verdict, the deadline and the overload check race, and one wins. The
//! loser may be done with the file while the winner has not written its answer yet, so the descriptor
//! belongs to a [`HeldFile`], which closes it only when the entry is empty again: closed earlier, its
//! number would be given to the next event, which the late answer would then wipe from the ledger.
//! Only one process at a time reads the group.
//!
//! What was let through unscanned is noted here too ([`Ledger::expose`]), so that the next worker
//! still knows of it.

use crate::group::{Answer, Group};
use crate::handle::FileHandle;
use std::cell::UnsafeCell;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

/// Descriptor numbers from here on cannot be entered; also the worker's RLIMIT_NOFILE.
pub const NUMBERS: usize = 8192;
/// How many files let through unscanned are remembered until somebody takes them over.
pub const EXPOSURES: usize = 1024;

const HELD: u64 = 1;
const CLAIMED: u64 = 2;
const DENY: u64 = 4;
const SEQUENCE_SHIFT: u32 = 3;

/// The low bits of an exposure's state; the others count how often its entry was filled. A held event's handle has these
/// states alone.
const KIND: u64 = 3;
const FREE: u64 = 0;
const FILLING: u64 = 1;
const FULL: u64 = 2;

/// Threads that read events, at most.
pub const READERS_MAX: usize = 8;

#[repr(C)]
struct Entry {
    word: AtomicU64,
    deadline_ms: AtomicU64,
    /// What fail mode makes of it by more than was known when it was entered: the sequence, shifted by one, and whether that is
    /// a denial. Of another sequence, nothing.
    later: AtomicU64,
    /// [`FREE`], [`FILLING`] or [`FULL`].
    handle_state: AtomicU64,
    handle: UnsafeCell<FileHandle>,
}

#[repr(C)]
struct ExposureEntry {
    state: AtomicU64,
    reason: AtomicU32,
    handle: UnsafeCell<FileHandle>,
}

#[repr(C)]
struct Shared {
    outstanding: AtomicU32,
    high: AtomicU32,
    sequence: AtomicU64,
    unknown_denies: AtomicU32,
    left_behind: [AtomicU32; 3],
    overlay: AtomicU32,
    exposures_lost: [AtomicU32; 2],
    orphans: AtomicU32,
    deaths: AtomicU32,
    beat_ms: AtomicU64,
    reader_beats_ms: [AtomicU64; READERS_MAX],
    entries: [Entry; NUMBERS],
    exposures: [ExposureEntry; EXPOSURES],
}

/// The ledger. Make one before forking; both processes then see the same.
#[derive(Debug)]
pub struct Ledger {
    shared: NonNull<Shared>,
}

// SAFETY: everything in Shared is atomic, but for the handles. A handle is written only by whoever
// has the entry alone (state FILLING) and read only after the release store that follows.
unsafe impl Send for Ledger {}
// SAFETY: as above.
unsafe impl Sync for Ledger {}

/// What is entered for a held event.
#[derive(Debug, Clone, Copy)]
pub struct Held {
    /// When it must be answered at the latest, in milliseconds of [`crate::process::now_ms`].
    pub deadline_ms: u64,
    /// What fail mode makes of it.
    pub fail: Answer,
}

/// The file of a held event. Dropping it closes the descriptor, and waits until the event has been
/// answered if somebody is about to: no longer than another thread's write(2).
#[derive(Debug)]
pub struct HeldFile {
    file: ManuallyDrop<File>,
    claim: Claim,
    ledger: Ledger,
}

impl HeldFile {
    /// The right to answer the event.
    #[must_use]
    pub fn claim(&self) -> Claim {
        self.claim
    }

    /// Whether it has a handle, or is given one.
    #[must_use]
    pub fn is_named(&self) -> bool {
        let entry = self.ledger.entry(self.claim.number);
        entry.is_some_and(|entry| entry.handle_state.load(Ordering::Acquire) != FREE)
    }

    /// Enters its handle, for whoever answers the event without having the file. Only the first one counts.
    pub fn name(&self, handle: &FileHandle) {
        let Some(entry) = self.ledger.entry(self.claim.number) else { return };
        let order = (Ordering::Acquire, Ordering::Relaxed);
        let free = entry.handle_state.compare_exchange(FREE, FILLING, order.0, order.1);
        if free.is_ok() {
            // SAFETY: as long as this file is open no other event has the entry, FILLING gives the handle to us alone, and
            // nobody reads it before the release store below.
            unsafe { *entry.handle.get() = *handle };
            entry.handle_state.store(FULL, Ordering::Release);
        }
    }
}

impl std::ops::Deref for HeldFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.file
    }
}

impl Drop for HeldFile {
    fn drop(&mut self) {
        let mut patience = CLOSE_PATIENCE;
        while !self.ledger.is_answered(self.claim) {
            // Nobody answers it now, or whoever does is stopped: the number must stay taken, and one
            // descriptor too many is the smaller harm.
            if self.ledger.is_held(self.claim) || patience.is_zero() {
                return;
            }
            std::thread::sleep(CLOSE_TICK);
            patience = patience.saturating_sub(CLOSE_TICK);
        }
        // SAFETY: `file` is not used again: this is its owner's drop.
        unsafe { ManuallyDrop::drop(&mut self.file) };
    }
}

/// How long a file waits to be closed for the answer that somebody has begun to write.
const CLOSE_PATIENCE: Duration = Duration::from_secs(1);
const CLOSE_TICK: Duration = Duration::from_micros(50);

/// The right to try to answer one event. Copies race; one wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    number: RawFd,
    word: u64,
}

impl Claim {
    /// What fail mode makes of the event.
    #[must_use]
    pub fn fail(&self) -> Answer {
        answer_in(self.word)
    }
}

fn answer_in(word: u64) -> Answer {
    if word & DENY == 0 { Answer::Allow } else { Answer::Deny }
}

/// A file that was let through unscanned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exposure {
    /// The file.
    pub handle: FileHandle,
    /// Why, in the driver's own encoding.
    pub reason: u32,
    at: usize,
    state: u64,
}

/// How many exposures could not be noted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Lost {
    /// All places were taken.
    pub without_room: u32,
    /// The file has no handle.
    pub without_handle: u32,
}

/// What a supervisor did for a dead worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Orphans {
    /// Events in the ledger that it answered.
    pub entered: u32,
    /// Events that the worker had read and not entered yet.
    pub swept: u32,
}

impl Ledger {
    /// Maps an empty ledger.
    ///
    /// # Errors
    /// What mmap(2) says.
    pub fn new() -> io::Result<Self> {
        // SAFETY: a new anonymous mapping at an address of the kernel's choice; it is never unmapped,
        // since both processes use it as long as they live.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<Shared>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // All-zero is a valid Shared: empty words, free exposures, and handles that nobody reads yet.
        let shared = NonNull::new(start.cast()).expect("mmap never returns null on success");
        Ok(Self { shared })
    }

    fn shared(&self) -> &Shared {
        // SAFETY: the mapping is as large as Shared, zero-initialised, and lives for ever.
        unsafe { self.shared.as_ref() }
    }

    fn entry(&self, number: RawFd) -> Option<&Entry> {
        self.shared().entries.get(usize::try_from(number).ok()?)
    }

    /// Enters an event that was just read.
    ///
    /// # Errors
    /// Gives the descriptor back when its number is out of range; the event must be answered at once
    /// then.
    pub fn hold(&self, fd: OwnedFd, held: &Held) -> Result<HeldFile, OwnedFd> {
        let shared = self.shared();
        let number = fd.as_raw_fd();
        let Some(entry) = self.entry(number) else { return Err(fd) };
        let sequence = shared.sequence.fetch_add(1, Ordering::Relaxed) + 1;
        let deny = if held.fail == Answer::Deny { DENY } else { 0 };
        let word = (sequence << SEQUENCE_SHIFT) | HELD | deny;
        entry.deadline_ms.store(held.deadline_ms, Ordering::Relaxed);
        entry.handle_state.store(FREE, Ordering::Relaxed);
        let above = u32::try_from(number).unwrap_or(0) + 1;
        shared.high.fetch_max(above, Ordering::Relaxed);
        // Before it can be answered.
        shared.outstanding.fetch_add(1, Ordering::Relaxed);
        entry.word.store(word, Ordering::Release);
        let (file, claim) = (ManuallyDrop::new(File::from(fd)), Claim { number, word });
        Ok(HeldFile { file, claim, ledger: self.again() })
    }

    /// Answers an event if its claim is still free. `Ok(false)`: somebody else has answered it.
    ///
    /// # Errors
    /// What the kernel says; the claim is free again then, and the deadline tries once more.
    pub fn answer(&self, group: &Group, claim: Claim, answer: Answer) -> io::Result<bool> {
        let Some(entry) = self.take(claim, answer) else { return Ok(false) };
        if let Err(error) = group.answer(claim.number, answer) {
            entry.word.store(claim.word, Ordering::Release);
            return Err(error);
        }
        self.put_down(entry);
        Ok(true)
    }

    /// Takes the claim: from here on nobody else answers the event.
    fn take(&self, claim: Claim, answer: Answer) -> Option<&Entry> {
        let entry = self.entry(claim.number)?;
        let deny = if answer == Answer::Deny { DENY } else { 0 };
        let claimed = (claim.word & !(HELD | DENY)) | CLAIMED | deny;
        let order = (Ordering::AcqRel, Ordering::Relaxed);
        let taken = entry.word.compare_exchange(claim.word, claimed, order.0, order.1);
        taken.is_ok().then_some(entry)
    }

    /// The answer is written: the entry is empty again.
    fn put_down(&self, entry: &Entry) {
        entry.word.store(0, Ordering::Release);
        self.shared().outstanding.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether the kernel has the answer, so that the number may be used again.
    fn is_answered(&self, claim: Claim) -> bool {
        self.entry(claim.number).is_none_or(|entry| {
            entry.word.load(Ordering::Acquire) >> SEQUENCE_SHIFT != claim.word >> SEQUENCE_SHIFT
        })
    }

    /// Whether nobody has answered the event yet.
    #[must_use]
    pub fn is_held(&self, claim: Claim) -> bool {
        self.entry(claim.number)
            .is_some_and(|entry| entry.word.load(Ordering::Acquire) == claim.word)
    }

    /// How many events are held.
    #[must_use]
    pub fn outstanding(&self) -> u32 {
        self.shared().outstanding.load(Ordering::Relaxed)
    }

    /// How many events were ever entered.
    #[must_use]
    pub fn entered(&self) -> u64 {
        self.shared().sequence.load(Ordering::Relaxed)
    }

    fn held(&self) -> impl Iterator<Item = (Claim, u64)> + '_ {
        let high = self.shared().high.load(Ordering::Relaxed) as usize;
        self.shared().entries[..high.min(NUMBERS)].iter().enumerate().filter_map(|(at, entry)| {
            let word = entry.word.load(Ordering::Acquire);
            let number = RawFd::try_from(at).ok()?;
            let deadline = entry.deadline_ms.load(Ordering::Relaxed);
            (word & HELD != 0).then_some((Claim { number, word }, deadline))
        })
    }

    /// The events whose deadline is at or before `now_ms`.
    pub fn overdue(&self, now_ms: u64) -> impl Iterator<Item = Claim> + '_ {
        self.held().filter(move |(_, deadline)| *deadline <= now_ms).map(|(claim, _)| claim)
    }

    /// The event that has been held longest.
    #[must_use]
    pub fn oldest(&self) -> Option<Claim> {
        self.held().map(|(claim, _)| claim).min_by_key(|claim| claim.word >> SEQUENCE_SHIFT)
    }

    /// Says what fail mode makes of a held event, now that more is known of it.
    pub fn set_fail(&self, claim: Claim, answer: Answer) {
        if let Some(entry) = self.entry(claim.number).filter(|_| self.is_held(claim)) {
            let later = (claim.word >> SEQUENCE_SHIFT) << 1 | u64::from(answer == Answer::Deny);
            entry.later.store(later, Ordering::Release);
        }
    }

    /// What [`Self::set_fail`] said of this event.
    #[must_use]
    pub fn later_fail(&self, claim: Claim) -> Option<Answer> {
        let later = self.entry(claim.number)?.later.load(Ordering::Acquire);
        let is_its = later >> 1 == claim.word >> SEQUENCE_SHIFT;
        is_its.then_some(if later & 1 == 1 { Answer::Deny } else { Answer::Allow })
    }

    /// The file of a held event, once it has its name.
    #[must_use]
    pub fn handle(&self, claim: Claim) -> Option<FileHandle> {
        let entry = self.entry(claim.number)?;
        if !self.is_held(claim) || entry.handle_state.load(Ordering::Acquire) != FULL {
            return None;
        }
        // SAFETY: the state was stored after the handle was written. Should the event be answered and
        // the number used again meanwhile, the check below throws the copy away.
        let handle = unsafe { std::ptr::read_volatile(entry.handle.get()) };
        fence(Ordering::Acquire);
        self.is_held(claim).then_some(handle)
    }

    /// What the supervisor answers for events that a dead worker had read and not entered.
    pub fn set_unknown(&self, answer: Answer) {
        self.shared().unknown_denies.store(u32::from(answer == Answer::Deny), Ordering::Relaxed);
    }

    /// What [`Self::set_unknown`] said; allow before it did.
    #[must_use]
    pub fn unknown(&self) -> Answer {
        let denies = self.shared().unknown_denies.load(Ordering::Relaxed) != 0;
        if denies { Answer::Deny } else { Answer::Allow }
    }

    /// Another handle to the same ledger.
    #[must_use]
    pub fn again(&self) -> Self {
        Self { shared: self.shared }
    }

    /// Answers everything that a dead worker left: what is in the ledger by fail mode (or as it had
    /// decided), then every number, since it may have died between reading an event and entering it.
    /// Files that are let through go into the exposures with `reason`.
    ///
    /// Call it only after the worker has ended and before anybody else reads the group: numbers of a
    /// new reader would be taken for the dead one's.
    pub fn answer_orphans(&self, group: &Group, reason: u32) -> Orphans {
        let shared = self.shared();
        let mut orphans = Orphans::default();
        let high = (shared.high.load(Ordering::Relaxed) as usize).min(NUMBERS);
        for (at, entry) in shared.entries[..high].iter().enumerate() {
            let word = entry.word.swap(0, Ordering::AcqRel);
            let Ok(number) = RawFd::try_from(at) else { break };
            if word == 0 {
                continue;
            }
            let answer = answer_in(word);
            orphans.entered += u32::from(group.answer(number, answer).unwrap_or(false));
            let exposed = word & HELD != 0 && answer == Answer::Allow;
            if exposed && entry.handle_state.load(Ordering::Acquire) == FULL {
                // SAFETY: the worker that wrote it has ended.
                self.expose(Some(unsafe { &*entry.handle.get() }), reason);
            } else if exposed {
                self.expose(None, reason);
            }
        }
        let unknown = self.unknown();
        for number in 0..RawFd::try_from(NUMBERS).unwrap_or(RawFd::MAX) {
            orphans.swept += u32::from(group.answer(number, unknown).unwrap_or(false));
        }
        shared.outstanding.store(0, Ordering::Relaxed);
        shared.orphans.fetch_add(orphans.entered + orphans.swept, Ordering::Relaxed);
        shared.deaths.fetch_add(1, Ordering::Relaxed);
        orphans
    }

    /// Events answered for dead workers since this was last asked; none when no worker died.
    #[must_use]
    pub fn take_orphans(&self) -> Option<u32> {
        let shared = self.shared();
        let died = shared.deaths.swap(0, Ordering::Relaxed) > 0;
        died.then(|| shared.orphans.swap(0, Ordering::Relaxed))
    }

    /// It could not be told: the next one who asks is told.
    pub fn give_back_orphans(&self, orphans: u32) {
        self.shared().orphans.fetch_add(orphans, Ordering::Relaxed);
        self.shared().deaths.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes a file that was let through unscanned. `false`: there was no room, it has no handle, or it
    /// is noted already.
    pub fn expose(&self, handle: Option<&FileHandle>, reason: u32) -> bool {
        let [without_room, without_handle] = &self.shared().exposures_lost;
        let Some(handle) = handle else {
            without_handle.fetch_add(1, Ordering::Relaxed);
            return false;
        };
        if self.exposures().any(|noted| noted.handle == *handle) {
            return false;
        }
        for entry in &self.shared().exposures {
            let before = entry.state.load(Ordering::Relaxed);
            if before & KIND != FREE {
                continue;
            }
            let sequence = (before & !KIND).wrapping_add(KIND + 1);
            let order = (Ordering::Acquire, Ordering::Relaxed);
            let filling = sequence | FILLING;
            if entry.state.compare_exchange(before, filling, order.0, order.1).is_err() {
                continue;
            }
            // SAFETY: FILLING gives this entry to us alone.
            unsafe { *entry.handle.get() = *handle };
            entry.reason.store(reason, Ordering::Relaxed);
            entry.state.store(sequence | FULL, Ordering::Release);
            return true;
        }
        without_room.fetch_add(1, Ordering::Relaxed);
        false
    }

    /// The files let through unscanned.
    pub fn exposures(&self) -> impl Iterator<Item = Exposure> + '_ {
        self.shared().exposures.iter().enumerate().filter_map(|(at, entry)| {
            let state = entry.state.load(Ordering::Acquire);
            if state & KIND != FULL {
                return None;
            }
            // SAFETY: FULL was stored after the handle was written. Should the entry be emptied and
            // filled again meanwhile, its state is another, and the copy is thrown away.
            let handle = unsafe { std::ptr::read_volatile(entry.handle.get()) };
            let reason = entry.reason.load(Ordering::Relaxed);
            fence(Ordering::Acquire);
            let same = entry.state.load(Ordering::Relaxed) == state;
            same.then_some(Exposure { handle, reason, at, state })
        })
    }

    /// Forgets an exposure: it was scanned, or is gone. Another one in its place stays.
    pub fn settle(&self, exposure: &Exposure) {
        if let Some(entry) = self.shared().exposures.get(exposure.at) {
            let free = exposure.state & !KIND | FREE;
            let order = (Ordering::Release, Ordering::Relaxed);
            let _another = entry.state.compare_exchange(exposure.state, free, order.0, order.1);
        }
    }

    /// Exposures that are not noted, since this was last asked.
    #[must_use]
    pub fn take_exposures_lost(&self) -> Lost {
        let [without_room, without_handle] =
            self.shared().exposures_lost.each_ref().map(|lost| lost.swap(0, Ordering::Relaxed));
        Lost { without_room, without_handle }
    }

    /// The worker still runs.
    pub fn beat(&self, now_ms: u64) {
        self.shared().beat_ms.store(now_ms, Ordering::Relaxed);
    }

    /// When the worker last said so, in milliseconds of [`crate::process::now_ms`]; 0 for never.
    #[must_use]
    pub fn last_beat(&self) -> u64 {
        self.shared().beat_ms.load(Ordering::Relaxed)
    }

    /// A reader of events still runs. `number` is below [`READERS_MAX`].
    pub fn beat_reader(&self, number: usize, now_ms: u64) {
        self.shared().reader_beats_ms[number].store(now_ms, Ordering::Relaxed);
    }

    /// When any reader last said so. While they are stuck nobody takes events, and none of those that
    /// wait is in the ledger.
    #[must_use]
    pub fn last_reader_beat(&self) -> u64 {
        let beats = self.shared().reader_beats_ms.iter();
        beats.map(|beat| beat.load(Ordering::Relaxed)).max().unwrap_or(0)
    }

    /// Three numbers that the worker leaves for its supervisor: the fail modes of open, of exec and of what is late, in
    /// the driver's own encoding; 0 until it has said, and for none of its own.
    #[must_use]
    pub fn left_behind(&self) -> &[AtomicU32; 3] {
        &self.shared().left_behind
    }

    /// A number that the supervisor writes and the worker reads, or the other way round: the state
    /// of the overlay probe.
    #[must_use]
    pub fn overlay(&self) -> &AtomicU32 {
        &self.shared().overlay
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_open(number: RawFd) -> bool {
        // SAFETY: no pointers; the call changes nothing.
        unsafe { libc::fcntl(number, libc::F_GETFD) >= 0 }
    }

    fn held(ledger: &Ledger) -> HeldFile {
        let fd = OwnedFd::from(tempfile::tempfile().unwrap());
        let held = Held { deadline_ms: 0, fail: Answer::Allow };
        ledger.hold(fd, &held).unwrap()
    }

    #[test]
    fn a_number_is_not_free_before_its_event_is_answered() {
        let ledger = Ledger::new().unwrap();
        let file = held(&ledger);
        let (claim, number) = (file.claim(), file.as_raw_fd());
        // The deadline, say, has the claim and is about to write its answer. Whoever had the file
        // sees that it lost, and is done with it.
        let entry = ledger.take(claim, Answer::Deny).unwrap();
        assert!(!ledger.is_held(claim));
        let loser = std::thread::spawn(move || drop(file));
        std::thread::sleep(Duration::from_millis(50));
        assert!(is_open(number), "another event would get this number");
        ledger.put_down(entry);
        loser.join().unwrap();
        assert!(!is_open(number));
        assert_eq!(ledger.outstanding(), 0);
    }

    #[test]
    fn settling_an_exposure_spares_another_one_in_its_place() {
        let ledger = Ledger::new().unwrap();
        let handle = || {
            let file = tempfile::tempfile_in("/dev/shm").unwrap();
            FileHandle::of(std::os::fd::AsFd::as_fd(&file), 1).unwrap()
        };
        let (first, second) = (handle(), handle());
        assert!(ledger.expose(Some(&first), 1));
        assert!(!ledger.expose(Some(&first), 1), "noted already");
        let noted = ledger.exposures().next().unwrap();
        ledger.settle(&noted);
        assert!(ledger.expose(Some(&second), 2), "it takes the same place");
        ledger.settle(&noted);
        let left: Vec<_> = ledger.exposures().map(|one| (one.handle, one.reason)).collect();
        assert_eq!(left, [(second, 2)]);
        assert!(!ledger.expose(None, 1));
        let lost = Lost { without_room: 0, without_handle: 1 };
        assert_eq!(ledger.take_exposures_lost(), lost, "without a handle it is at least counted");
    }

    #[test]
    fn a_held_event_has_the_first_name_that_it_is_given() {
        let ledger = Ledger::new().unwrap();
        let file = held(&ledger);
        let claim = file.claim();
        let name = |device| FileHandle::of(std::os::fd::AsFd::as_fd(&*file), device).unwrap();
        assert_eq!(ledger.handle(claim), None, "it has none yet");
        assert!(!file.is_named());
        file.name(&name(1));
        assert!(file.is_named());
        file.name(&name(2));
        assert_eq!(ledger.handle(claim), Some(name(1)));
        let number = file.as_raw_fd();
        ledger.put_down(ledger.take(claim, Answer::Allow).unwrap());
        assert_eq!(ledger.handle(claim), None);
        drop(file);
        let next = std::iter::repeat_with(|| held(&ledger)).take(64);
        let next = next.collect::<Vec<_>>();
        let same = next.iter().find(|file| file.as_raw_fd() == number).unwrap();
        assert_eq!(ledger.handle(same.claim()), None, "its number's last event had another");
        next.iter().for_each(|file| {
            ledger.put_down(ledger.take(file.claim(), Answer::Allow).unwrap());
        });
    }

    #[test]
    fn a_file_that_is_let_go_unanswered_keeps_its_number() {
        let ledger = Ledger::new().unwrap();
        let file = held(&ledger);
        let number = file.as_raw_fd();
        drop(file);
        assert!(is_open(number));
        assert_eq!(ledger.overdue(0).count(), 1, "the deadline still answers it");
    }
}
