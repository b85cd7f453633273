//! The short way: whether the host knows a content to be clean, asked and answered in the region.
//!
//! ```text
//!   reader: held ──► in the page cache, no writer? ──► host looks? else its doorbell rings ──► hash or slots, query
//!                        │ no, or it does not fit                                                   │
//!                        ▼                                        looks for the reply, for a moment ▼
//!                    the long way ◄── unknown, late ───────────────────────────────────────────── clean ──► marked,
//!                                                                                       remembered, answered
//! ```
//!
//! What is small is hashed here: that takes no longer than to hand it over does, and the host's doorbell rings before. What
//! is larger the host hashes piece by piece while the next one is read, where it is in memory.
//!
//! A reader asks itself, and hands nothing to anybody: that is what makes it short. So it does nothing here that may
//! wait: content comes from the page cache or not at all. RWF_NOWAIT (preadv2(2)) alone does not say so: it begins
//! read-ahead, which may wait for a disk. So it is asked before whether all of it is there (cachestat(2)); kernels before 6.5
//! cannot tell. What a reader cannot ask a filler does, which may wait: contents on a disk or of such a kernel, execs, and
//! where policy asks which file it is. The doorbell rings only where the link takes it at once. It only ever lets through.
//! Whatever the host does not know to be clean, is not asked in time or has no answer in time is queued as if it had never
//! been asked.
//!
//! Slots of a query that was given up are free at once. The host may still read them, and hash what another request has in
//! them by then; but nobody listens to what it says of that query any more.

use crate::content::{Reads, hash_of};
use crate::driver::{Ask, Driver, Job, Subject, count};
use crate::event::HeldEvent;
use crate::file::Look;
use crate::golden;
use crate::remember::When;
use crate::session::Session;
use crate::verdict;
use seawall_fanotify::process;
use seawall_proto::{Clean, Fingerprint, Operation, RingKey};
use seawall_region::layout::SLOT_LEN;
use seawall_region::ring::{PIECE_LEN, PLACES, QUERY_SLOTS};
use seawall_region::{Filled, GuestRegion, GuestRing, HostLooks, Query, Reply, Slot};
use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The largest content that is asked for so.
pub const LEN_MAX: u64 = QUERY_SLOTS as u64 * SLOT_LEN as u64;
/// The largest content that a reader hashes itself.
const HASHED_MAX: u64 = 64 * 1024;
/// How long a reader looks for its reply; one that comes later comes on the link.
const LOOK: Duration = Duration::from_micros(150);
/// How long a reply may take, in milliseconds. It is looked for now and then.
const LATE_MS: u64 = 200;
/// So many queries without a reply, one after the other, and the session's ring is used no longer.
const UNANSWERED_MAX: u32 = 8;

/// How often something came to nothing lately.
#[derive(Debug, Default)]
pub struct InVain(AtomicU32);

impl InVain {
    /// After so many times in a row it is tried now and then only.
    const MOST: u32 = 4;
    const TRY_EVERY: u32 = 4;

    /// Whether it is to be tried.
    pub fn is_worth_it(&self) -> bool {
        let times = self.0.load(Ordering::Relaxed);
        if times < Self::MOST {
            return true;
        }
        self.0.store(times.wrapping_add(1).max(Self::MOST), Ordering::Relaxed);
        times.is_multiple_of(Self::TRY_EVERY)
    }

    /// What came of it, where it was tried.
    fn was_if(&self, tried: bool, in_vain: bool) {
        if tried {
            self.was(in_vain);
        }
    }

    /// What came of it.
    pub fn was(&self, in_vain: bool) {
        let times = self.0.load(Ordering::Relaxed);
        match (in_vain, times) {
            (false, 0) => (),
            (false, _) => self.0.store(0, Ordering::Relaxed),
            (true, ..Self::MOST) => self.0.store(times + 1, Ordering::Relaxed),
            (true, _) => (),
        }
    }
}

/// Whether asking and looking pay.
#[derive(Debug, Default)]
pub struct Patience {
    asked: InVain,
    looked: InVain,
    /// Telling the host that it is about to be asked.
    rung: InVain,
    /// Asking by a file's fingerprint.
    pub golden: InVain,
    /// Asking by the hash of what is too large for the ring.
    pub large: InVain,
}

/// What was asked, and for whom.
#[derive(Debug)]
struct Asked {
    event: Arc<HeldEvent>,
    look: Look,
    by: By,
    when: When,
    /// Given back with the reply.
    slots: Vec<Slot>,
    since_ms: u64,
}

/// By what it was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    /// The hash that is remembered of the file: costs next to nothing.
    Memory,
    Fingerprint(Fingerprint),
    /// What was read.
    Content,
}

/// What a reader looks for.
pub struct Asking {
    session: Arc<Session>,
    number: u64,
    asked: Asked,
    since: Instant,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// A bit for each place that is in use.
    used: u64,
    /// Of these, those whose query was given up: the host has still to come by.
    given_up: u64,
    /// Queries for whose reply no reader looks.
    away: HashMap<u64, Asked>,
    unanswered: u32,
    over: bool,
}

const _: () = assert!(PLACES == u64::BITS as u64);

impl State {
    /// `has_answered`: whether the host has, though nobody wanted to know.
    fn take_number(&mut self, has_answered: impl FnOnce(u64) -> bool) -> Option<u64> {
        let bit = 1 << (self.next % PLACES);
        // It reads them in order: what was overwritten before it was read it would wait for.
        if self.given_up & bit != 0 && has_answered(self.next - PLACES) {
            self.give_back(self.next);
        }
        if self.over || self.used & bit != 0 {
            return None;
        }
        self.used |= bit;
        self.next += 1;
        Some(self.next - 1)
    }

    fn give_back(&mut self, number: u64) {
        let others = !(1 << (number % PLACES));
        self.used &= others;
        self.given_up &= others;
    }

    fn give_up(&mut self, number: u64) {
        self.given_up |= 1 << (number % PLACES);
    }
}

/// A session's ring.
#[derive(Debug)]
pub struct Ring {
    desk: GuestRing,
    /// How often the host had begun and ended to look when its bell was rung last.
    rung_at: AtomicU64,
    state: Mutex<State>,
}

impl Ring {
    pub fn new(region: GuestRegion, key: RingKey) -> Self {
        let (desk, rung_at) = (GuestRing::new(region, key), AtomicU64::new(u64::MAX));
        Self { desk, rung_at, state: Mutex::default() }
    }

    /// Whether it is used no longer.
    pub fn is_over(&self) -> bool {
        self.state().over
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether an access is for a filler to ask for: a reader may not look at which file it is.
fn is_for_filler(driver: &Driver, event: &HeldEvent) -> bool {
    event.operation == Operation::Exec || driver.policy().asks_which_file()
}

/// Asks for an access, or queues it. Never waits: what would take a disk, or a look at which file it is, is left to a
/// filler.
pub fn ask(driver: &Driver, event: Arc<HeldEvent>, buffer: &mut Vec<u8>) -> Option<Asking> {
    let size = event.look.identity.size;
    let ask = if is_for_filler(driver, &event) {
        Ask::Ring
    } else if size > driver.policy().whole_file_limit {
        Ask::Known
    } else {
        let session = driver.session();
        let ask = |session| try_ask(driver, &session, &event, event.look, Reads::Now, buffer);
        match session.map(ask) {
            Some(Ok(asking)) => {
                // While the host works.
                event.name();
                return Some(asking);
            }
            Some(Err(NotAsked::Waits)) => Ask::Ring,
            Some(Err(NotAsked::Never)) | None => Ask::Known,
        }
    };
    event.name();
    driver.push_job(Job { ask, ..Job::new(Subject::Access(event)) });
    None
}

/// The same by a filler, who may wait for a disk, and has looked at the file.
pub fn ask_and_look(
    driver: &Driver,
    session: &Arc<Session>,
    event: &Arc<HeldEvent>,
    look: Look,
    buffer: &mut Vec<u8>,
) -> bool {
    let asking = try_ask(driver, session, event, look, Reads::Waiting, buffer);
    asking.map(|asking| self::look(driver, asking)).is_ok()
}

/// Why nothing was asked.
enum NotAsked {
    /// The content is not in memory, as far as the kernel tells.
    Waits,
    Never,
}

fn try_ask(
    driver: &Driver,
    session: &Arc<Session>,
    event: &Arc<HeldEvent>,
    look: Look,
    reads: Reads,
    buffer: &mut Vec<u8>,
) -> Result<Asking, NotAsked> {
    let (file, size) = (&event.file, look.identity.size);
    let ring = session.ring().filter(|_| size <= LEN_MAX).ok_or(NotAsked::Never)?;
    let epoch = driver.epoch();
    let (by, query) = match short(driver, session, file, &look) {
        Some((by, query)) => (by, Some(query)),
        None => (By::Content, None),
    };
    if by == By::Content {
        // Where a reader left it to a filler it has asked this already.
        let is_tried = reads == Reads::Now || is_for_filler(driver, event);
        if is_tried && !driver.patience.asked.is_worth_it() {
            return Err(NotAsked::Never);
        }
        let is_cached = |file| seawall_fanotify::is_cached(file, size).unwrap_or(false);
        if reads == Reads::Now && !is_cached(file.as_fd()) {
            return Err(NotAsked::Waits);
        }
    }
    // What is written through a mapping that exists already need not change the times. Where nothing is read it is asked
    // while the host works.
    let is_written = || seawall_fanotify::is_open_for_writing(file.as_fd()).unwrap_or(true);
    if by != By::Memory && is_written() {
        return Err(NotAsked::Never);
    }
    let (number, slots) = match query {
        Some(query) => (ring.put(session, &query, Filled::Pieces(0))?, Vec::new()),
        None if size <= HASHED_MAX || reads == Reads::Waiting => {
            // It wakes while the content is read; from a disk that may take long.
            let early = reads == Reads::Now && ring.ring_early(driver, session);
            let is_held = || driver.ledger.is_held(event.claim);
            let hash = hash_of(file, size, reads, buffer, is_held).ok().flatten();
            driver.patience.rung.was_if(early, hash.is_none() || ring.host_is_away());
            let not = if reads == Reads::Now { NotAsked::Waits } else { NotAsked::Never };
            let query = Query::Hash(hash.ok_or(not)?);
            (ring.put(session, &query, Filled::Pieces(0))?, Vec::new())
        }
        None => {
            event.name();
            let early = ring.ring_early(driver, session);
            let put = ring.put_content(session, file, size);
            driver.patience.rung.was_if(early, put.is_err());
            put?
        }
    };
    if by == By::Memory && is_written() {
        ring.give_up(number);
        return Err(NotAsked::Never);
    }
    let (event, since_ms) = (Arc::clone(event), process::now_ms());
    let when = When { epoch, unwritten: !look.written };
    let asked = Asked { event, look, by, when, slots, since_ms };
    Ok(Asking { session: Arc::clone(session), number, asked, since: Instant::now() })
}

/// What can be asked without reading the content.
fn short(driver: &Driver, session: &Session, file: &File, look: &Look) -> Option<(By, Query)> {
    if let Some(hash) = driver.memory.hash_of(&look.identity) {
        return Some((By::Memory, Query::Hash(hash)));
    }
    if !session.golden().is_asked() || !driver.patience.golden.is_worth_it() {
        return None;
    }
    let fingerprint = golden::fingerprint(driver, file.as_fd(), look)?;
    Some((By::Fingerprint(fingerprint), Query::Fingerprint(fingerprint)))
}

impl Ring {
    /// Tells a host that does not look that there will be a query. Whether it did.
    fn ring_early(&self, driver: &Driver, session: &Session) -> bool {
        self.host_is_away() && driver.patience.rung.is_worth_it() && self.ring_bell(session)
    }

    /// Whether the host will see no query that is asked now: it does not look, and no bell is still to be heard.
    fn host_is_away(&self) -> bool {
        match self.desk.host_looks() {
            HostLooks::Now => false,
            HostLooks::Away(times) => self.rung_at.load(Ordering::SeqCst) != u64::from(times),
        }
    }

    /// Rings unless the host looks, or is away as often as it was when its bell was rung last: then it has still to hear
    /// that, and looks. Whether it will look.
    fn ring_bell(&self, session: &Session) -> bool {
        let HostLooks::Away(times) = self.desk.host_looks() else { return true };
        let is_rung = self.rung_at.load(Ordering::SeqCst) == u64::from(times);
        is_rung
            || session.ring_doorbell() && {
                self.rung_at.store(times.into(), Ordering::SeqCst);
                true
            }
    }

    /// Asks, and has the host look.
    fn put(&self, session: &Session, query: &Query, filled: Filled) -> Result<u64, NotAsked> {
        let number = {
            let mut state = self.state();
            let number = state.take_number(|before| self.desk.reply(before).is_some());
            // In the order of their numbers.
            number.iter().for_each(|number| self.desk.ask(*number, query, filled));
            number
        };
        // Also where there is no place: the host has to come by what was given up.
        let is_seen = self.ring_bell(session);
        let number = number.ok_or(NotAsked::Never)?;
        if is_seen {
            return Ok(number);
        }
        self.give_up(number);
        Err(NotAsked::Never)
    }

    fn put_content(
        &self,
        session: &Session,
        file: &File,
        size: u64,
    ) -> Result<(u64, Vec<Slot>), NotAsked> {
        let len = u32::try_from(size).map_err(|_| NotAsked::Never)?;
        let take = |_| self.desk.region().take_slot().ok_or(NotAsked::Never);
        let mut slots = (0..len.div_ceil(SLOT_LEN)).map(take).collect::<Result<Vec<_>, _>>()?;
        let query = Query::Content { len, slots: slots.iter().map(Slot::index).collect() };
        let mut fill = |start: u32| {
            let (slot, at) = (&mut slots[(start / SLOT_LEN) as usize], start % SLOT_LEN);
            slot.fill_now(at, file, start.into(), (len - start).min(PIECE_LEN)).unwrap_or(false)
        };
        if !fill(0) {
            return Err(NotAsked::Waits);
        }
        let number = self.put(session, &query, Filled::Pieces(1))?;
        for (before, start) in (1..).zip((PIECE_LEN..len).step_by(PIECE_LEN as usize)) {
            if !fill(start) {
                self.give_up(number);
                return Err(NotAsked::Waits);
            }
            self.desk.fill(number, Filled::Pieces(before + 1));
        }
        Ok((number, slots))
    }

    fn look_until(&self, number: u64, until: Instant) -> Option<Reply> {
        loop {
            let reply = self.desk.reply(number);
            if reply.is_some() || Instant::now() >= until {
                return reply;
            }
            std::hint::spin_loop();
        }
    }

    fn has_answered(&self, number: u64) {
        let mut state = self.state();
        state.give_back(number);
        state.unanswered = 0;
    }

    /// Nobody wants to know any more.
    fn give_up(&self, number: u64) {
        self.desk.fill(number, Filled::GivenUp);
        self.desk.look_away(number);
        self.state().give_up(number);
    }
}

/// Looks for the reply for a moment. What comes later is [`answered`].
pub fn look(driver: &Driver, asking: Asking) {
    let Asking { session, number, asked, since } = asking;
    let Some(ring) = session.ring_even_over() else { return lost(driver, asked) };
    if driver.patience.looked.is_worth_it() {
        let reply = ring.look_until(number, since + LOOK);
        driver.patience.looked.was(reply.is_none());
        if let Some(reply) = reply {
            ring.has_answered(number);
            return settle(driver, asked, reply);
        }
    }
    let mut state = ring.state();
    if state.over {
        drop(state);
        return lost(driver, asked);
    }
    state.away.insert(number, asked);
    ring.desk.look_away(number);
    if let Some(reply) = ring.desk.reply(number)
        && let Some(asked) = state.away.remove(&number)
    {
        state.give_back(number);
        drop(state);
        settle(driver, asked, reply);
    }
}

/// The host has answered on the link.
pub fn answered(driver: &Driver, session: &Session, number: u64, clean: Option<Clean>) {
    let Some(ring) = session.ring_even_over() else { return };
    let mut state = ring.state();
    let Some(asked) = state.away.remove(&number) else { return };
    state.give_back(number);
    state.unanswered = 0;
    drop(state);
    settle(driver, asked, clean.map_or(Reply::Unknown, Reply::Clean));
}

/// Queues what has had no answer for too long.
pub fn give_up_late(driver: &Driver, session: &Session) {
    let Some(ring) = session.ring_even_over() else { return };
    let now_ms = process::now_ms();
    let mut late = Vec::new();
    {
        let mut state = ring.state();
        let is_late = |asked: &Asked| asked.since_ms + LATE_MS <= now_ms;
        let numbers = state.away.iter().filter(|(_, asked)| is_late(asked));
        for number in numbers.map(|(number, _)| *number).collect::<Vec<_>>() {
            ring.desk.fill(number, Filled::GivenUp);
            late.extend(state.away.remove(&number));
            state.give_up(number);
            state.unanswered += 1;
        }
        if state.unanswered >= UNANSWERED_MAX && !state.over {
            state.over = true;
            tracing::warn!("the host does not answer in the ring; it is asked on the link alone");
        }
    }
    late.into_iter().for_each(|asked| lost(driver, asked));
}

/// The session or its region is gone: what was asked is queued.
pub fn end(driver: &Driver, session: &Session) {
    let Some(ring) = session.ring_even_over() else { return };
    let mut state = ring.state();
    state.over = true;
    let all: Vec<_> = state.away.drain().map(|(_, asked)| asked).collect();
    drop(state);
    all.into_iter().for_each(|asked| lost(driver, asked));
}

fn lost(driver: &Driver, asked: Asked) {
    // Not in the ring once more.
    driver.push_job(Job::new(Subject::Access(asked.event)));
}

fn settle(driver: &Driver, asked: Asked, reply: Reply) {
    let Asked { event, look, by, when, slots, .. } = asked;
    drop(slots);
    let fingerprint = match by {
        By::Fingerprint(fingerprint) => Some(fingerprint),
        By::Memory | By::Content => None,
    };
    let job = Job { fingerprint, ..Job::new(Subject::Access(event)) };
    let patience = &driver.patience;
    let tried = match by {
        By::Memory => None,
        By::Fingerprint(_) => Some(&patience.golden),
        By::Content => Some(&patience.asked),
    };
    tried.into_iter().for_each(|tried| tried.was(reply == Reply::Unknown));
    match reply {
        Reply::Clean(clean) => {
            count(&driver.counters.requests);
            count(&driver.counters.in_ring);
            verdict::allow(driver, job, &look, Some(clean), when);
        }
        Reply::Unknown => driver.push_job(Job { ask: Ask::Content, ..job }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_always_in_vain_is_tried_now_and_then() {
        let asked = InVain::default();
        for _ in 0..InVain::MOST {
            assert!(asked.is_worth_it());
            asked.was(true);
        }
        let mut tried = 0;
        for _ in 0..80 {
            if asked.is_worth_it() {
                tried += 1;
                asked.was(true);
            }
        }
        assert_eq!(tried, 20);
        asked.was(false);
        assert!((0..80).all(|_| asked.is_worth_it()));
    }

    #[test]
    fn a_place_is_taken_by_one_query_at_a_time() {
        let mut state = State::default();
        let silent = |_| false;
        let all: Vec<_> = std::iter::from_fn(|| state.take_number(silent)).collect();
        assert_eq!(all, (0..PLACES).collect::<Vec<_>>());
        state.give_back(1);
        // Its turn comes after that of place 0.
        assert_eq!(state.take_number(silent), None);
        state.give_back(0);
        assert_eq!((state.take_number(silent), state.take_number(silent)), (Some(64), Some(65)));
        // One that was given up is the host's until it has come by.
        state.give_up(2);
        assert_eq!(state.take_number(silent), None);
        assert_eq!(state.take_number(|before| before == 2), Some(66));
        assert_eq!(state.given_up, 0);
        state.over = true;
        (state.used, state.given_up) = (0, 0);
        assert_eq!(state.take_number(silent), None);
    }
}
