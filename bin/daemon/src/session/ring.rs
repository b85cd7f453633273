//! The short way: what a driver asks in the ring, answered at once from what is known, or not at all.
//!
//! The session's own thread answers. It copies a query's content piece by piece into one buffer, hashes it there while the
//! driver fills in the next, and keeps nothing. Only that a content is clean is ever said; all else the driver asks again as
//! a request. After an answer, and when it was told that there will be a query, the thread looks for the next one for a
//! moment, if a CPU is free for that; then it says that it looks no longer, and waits for the link.

use super::Session;
use crate::link::{LinkReader, ReadError};
use crate::region::{OpenRegion, random};
use seawall_engine::Metadata;
use seawall_engine::archive;
use seawall_proto::frame::Decoder;
use seawall_proto::{Clean, ContentHash, RingKey, ToGuest};
use seawall_region::layout::SLOT_LEN;
use seawall_region::ring::PIECE_LEN;
use seawall_region::{Filled, HostRing, LayoutError, Query, Reply};
use std::sync::Arc;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// How long is looked for the next query.
const LOOK: Duration = Duration::from_micros(100);
/// The link is looked at after so many looks at the ring, and after so many turns.
const LINK_EVERY: u32 = 8;
/// So many queries are answered before the link is looked at.
const AT_ONCE: u32 = 16;
/// How long a content is waited for that the driver is filling in.
const FILLING_MAX: Duration = Duration::from_micros(500);
/// So many bytes are hashed at a time: in pieces of 16 KiB BLAKE3 takes a quarter longer (with AVX-512).
const HASHED_LEN: u32 = 64 * 1024;
const _: () = assert!(HASHED_LEN.is_multiple_of(PIECE_LEN));
/// So often a driver may ask what makes no sense.
const FAULTS_MAX: u32 = 16;

/// How many sessions look now, and how many may.
static LOOKING: AtomicUsize = AtomicUsize::new(0);
static LOOKING_MAX: LazyLock<usize> = LazyLock::new(|| cpus() / 2);

/// The machine's CPUs: whoever looks is moved off a busy one.
fn cpus() -> usize {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let is_cpu = |line: &&str| {
        line.strip_prefix("cpu").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    stat.lines().filter(is_cpu).count()
}

/// The right to look.
struct Looker;

impl Looker {
    fn new() -> Option<Self> {
        let looker = Self;
        (LOOKING.fetch_add(1, Relaxed) < *LOOKING_MAX).then_some(looker)
    }
}

impl Drop for Looker {
    fn drop(&mut self) {
        LOOKING.fetch_sub(1, Relaxed);
    }
}

/// Why a query has no answer.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error("a query names {slots} slots for {len} bytes")]
    Slots { slots: usize, len: u32 },
    #[error("the region's file was cut short")]
    Gone,
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

pub struct Ring {
    session: Arc<Session>,
    desk: HostRing,
    next: u64,
    /// As the driver knows it.
    looks: bool,
    /// There will be a query, says the driver.
    is_expected: bool,
    turns: u32,
    faults: u32,
    scratch: Vec<u8>,
}

impl Ring {
    /// Tells the driver that there is a ring, where there is a region.
    pub fn begin(session: &Arc<Session>, region: &Arc<OpenRegion>) -> Option<Self> {
        let slots = region.slots.as_ref()?;
        let key = RingKey(random().ok()?);
        let desk = match HostRing::new(slots, key.clone()) {
            Ok(desk) => desk,
            Err(error) => {
                session.guest.complain(&format!("it has no ring: {error}"));
                return None;
            }
        };
        session.outbox.push(&ToGuest::Ring(key));
        let session = Arc::clone(session);
        let (next, looks, is_expected, turns, faults, scratch) = Default::default();
        Some(Self { session, desk, next, looks, is_expected, turns, faults, scratch })
    }

    /// The driver has asked something or is about to, and saw that nobody looks.
    pub fn rung(&mut self) {
        if self.faults < FAULTS_MAX {
            self.is_expected = true;
            self.set_looks(true);
        }
    }

    /// Answers what was asked. `true`: there may be more, or something came on the link; `false`: nothing will come but on
    /// the link.
    pub fn turn(
        &mut self,
        link: &mut LinkReader,
        decoder: &mut Decoder,
    ) -> Result<bool, ReadError> {
        if !self.looks {
            return Ok(false);
        }
        if !self.desk.is_whole() {
            self.blame(&Fault::Gone);
            return Ok(false);
        }
        self.turns = self.turns.wrapping_add(1);
        if self.turns.is_multiple_of(LINK_EVERY) && link.read_now(|bytes| decoder.extend(bytes))? {
            return Ok(true);
        }
        let is_expected = std::mem::take(&mut self.is_expected);
        if (self.serve() > 0 || is_expected)
            && let Some(_looker) = Looker::new()
        {
            let until = Instant::now() + LOOK;
            for looks in 1_u32.. {
                if self.is_asked() {
                    return Ok(true);
                }
                if looks.is_multiple_of(LINK_EVERY) {
                    if link.read_now(|bytes| decoder.extend(bytes))? {
                        return Ok(true);
                    }
                    if Instant::now() >= until {
                        break;
                    }
                }
                std::hint::spin_loop();
            }
        }
        self.set_looks(false);
        // Asked by one who saw the word as it was before.
        if self.is_asked() {
            self.set_looks(true);
            return Ok(true);
        }
        Ok(false)
    }

    /// Gives memory back that is kept for reuse.
    pub fn rest(&mut self) {
        self.scratch = Vec::new();
    }

    fn set_looks(&mut self, looks: bool) {
        self.looks = looks;
        self.desk.look(looks);
    }

    fn is_asked(&self) -> bool {
        self.next_query().is_some()
    }

    fn next_query(&self) -> Option<Query> {
        (self.faults < FAULTS_MAX).then(|| self.desk.query(self.next)).flatten()
    }

    fn blame(&mut self, fault: &Fault) {
        self.faults += 1;
        // A region that is gone does not come back for this session.
        if matches!(fault, Fault::Gone) {
            self.faults = FAULTS_MAX;
        }
        if self.faults == FAULTS_MAX {
            self.set_looks(false);
            self.session.guest.complain(&format!("its ring is looked at no longer: {fault}"));
        }
    }

    /// How many it answered.
    fn serve(&mut self) -> u32 {
        let mut answered = 0;
        while answered < AT_ONCE
            && let Some(query) = self.next_query()
        {
            let reply = self.judge(&query).unwrap_or_else(|fault| {
                self.blame(&fault);
                Reply::Unknown
            });
            let number = self.next;
            self.next += 1;
            answered += 1;
            if !self.desk.reply(number, reply) {
                let clean = match reply {
                    Reply::Clean(clean) => Some(clean),
                    Reply::Unknown => None,
                };
                self.session.outbox.push(&ToGuest::Answered { number, clean });
            }
        }
        answered
    }

    fn judge(&mut self, query: &Query) -> Result<Reply, Fault> {
        let (hash, is_archive) = match query {
            Query::Hash(hash) => (*hash, None),
            Query::Fingerprint(fingerprint) => match self.session.golden_hash(*fingerprint) {
                Some(hash) => (hash, None),
                None => return Ok(Reply::Unknown),
            },
            Query::Content { len, slots } => {
                let Some((hash, is_archive)) = self.hash(*len, slots)? else {
                    return Ok(Reply::Unknown);
                };
                (hash, Some(is_archive))
            }
        };
        Ok(self.session.known_clean(hash, is_archive).map_or(Reply::Unknown, Reply::Clean))
    }

    /// Hashes a content as it is filled in, and says whether it is an archive. `None` where it does not come.
    fn hash(&mut self, len: u32, slots: &[u16]) -> Result<Option<(ContentHash, bool)>, Fault> {
        if len == 0 || slots.len() != len.div_ceil(SLOT_LEN) as usize {
            return Err(Fault::Slots { slots: slots.len(), len });
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.resize(HASHED_LEN as usize, 0);
        let hashed = self.hash_with(&mut scratch, len, slots);
        self.scratch = scratch;
        hashed
    }

    fn hash_with(
        &self,
        scratch: &mut [u8],
        len: u32,
        slots: &[u16],
    ) -> Result<Option<(ContentHash, bool)>, Fault> {
        let (mut hasher, mut is_archive, mut filled) = (blake3::Hasher::new(), false, 0);
        let until = Instant::now() + FILLING_MAX;
        for (before, start) in (0..).zip((0..len).step_by(PIECE_LEN as usize)) {
            while filled <= before {
                match self.desk.filled(self.next) {
                    Filled::GivenUp => return Ok(None),
                    Filled::Pieces(pieces) => filled = pieces,
                }
                // Its CPU may be another's for a while.
                if filled <= before && Instant::now() > until {
                    return Ok(None);
                }
            }
            let end = (start + PIECE_LEN).min(len);
            let at = (start % HASHED_LEN) as usize;
            let copy = &mut scratch[at..at + (end - start) as usize];
            let index = slots[(start / SLOT_LEN) as usize];
            self.desk.copy_piece(index, start % SLOT_LEN, copy)?;
            if start == 0 {
                is_archive = archive::kind(&copy[..copy.len().min(archive::HEAD)]).is_some();
            }
            if end == len || end.is_multiple_of(HASHED_LEN) {
                hasher.update(&scratch[..at + (end - start) as usize]);
            }
        }
        if !self.desk.is_whole() {
            return Err(Fault::Gone);
        }
        self.session.metrics().bytes_copied.fetch_add(len.into(), Relaxed);
        Ok(Some((ContentHash(*hasher.finalize().as_bytes()), is_archive)))
    }
}

impl Session {
    /// Whether an open of this content is allowed because it is known to be clean: counted as a request then.
    fn known_clean(&self, hash: ContentHash, is_archive: Option<bool>) -> Option<Clean> {
        let policy = self.guest.policy();
        let generations = &self.host.pipeline.generations;
        // What depends on the name is not known of the content.
        if policy.excludes(hash) || generations.is_by_name(generations.current()) {
            return None;
        }
        let operation = seawall_engine::Operation::Open;
        let meta =
            Metadata { path: Vec::new(), guest: String::new(), operation, size: 0, archives: None };
        let (answer, unopened) = self.known(hash, is_archive, &meta)?;
        if !matches!(answer.finding, crate::pipeline::Finding::Clean) {
            return None;
        }
        self.metrics().requests.fetch_add(1, Relaxed);
        self.guest.requests.fetch_add(1, Relaxed);
        self.metrics().verdicts.count(seawall_client::Verdict::Clean);
        self.guest.verdicts.count(seawall_client::Verdict::Clean);
        Some(Clean { unopened, generation: answer.generation, hash })
    }
}
