//! What the service remembers over a restart: verdicts, and which guests it has seen.
//!
//! A thread of its own owns the file. Who has something to remember leaves it in a bounded queue and
//! goes on; what does not fit is forgotten, which costs a later scan and nothing else. Verdicts are
//! kept under the digest of the engines' signature sets: generations are numbers of one run of the
//! service. When a set comes into use, its verdicts are put back into the cache.
//!
//! ```text
//! pipeline ──a verdict──► queue ──batches──► state.db
//! engines ──a set is in use──► queue ──► its verdicts ──► pipeline's cache
//! watch thread ──a guest lives──► sightings ──queue──► state.db
//! ```

mod store;

use crate::database::{Database, Problem};
use crate::events::{self, Events};
use crate::generation::SetDigest;
use crate::pipeline::{Known, Pipeline};
use jiff::Timestamp;
use seawall_proto::{ContentHash, Generation};
use std::collections::HashMap;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use store::FORMAT;

/// What waits for the thread.
const QUEUE: usize = 16_384;
/// Written in one transaction: what comes within this time, at most so much.
const GATHER: Duration = Duration::from_millis(200);
const BATCH: usize = 4096;
/// How exactly the last sign of life of a guest is remembered.
const SEEN_EVERY: Duration = Duration::from_secs(30);
/// Verdicts of so many signature sets are kept: of the one in use and the last ones before it.
const SETS_KEPT: u32 = 4;
/// How often too many verdicts are looked for.
const TRIM_EVERY: Duration = Duration::from_secs(10);
/// Verdicts put back into the cache between two looks whether their set is still in use.
const PAGE: u32 = 2000;

/// Hands over what is to be remembered.
#[derive(Clone)]
pub struct State(Arc<Inner>);

struct Inner {
    queue: SyncSender<Message>,
    guests: Mutex<HashMap<String, Sighting>>,
    problem: Problem,
}

/// When a guest's driver was there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sighting {
    pub first: Timestamp,
    /// To about [`SEEN_EVERY`].
    pub last: Timestamp,
    /// When `last` was taken, in this run of the service.
    taken: Option<Instant>,
}

/// A verdict to be kept.
struct Verdict {
    set: SetDigest,
    hash: ContentHash,
    known: Known,
}

enum Message {
    Verdict(Verdict),
    InUse(SetDigest, Generation),
    Seen(String, Timestamp, Timestamp),
    Forget(String),
    /// Written so far: tell whoever asked.
    Flush(SyncSender<()>),
}

/// The thread's part, until [`Keeper::run`] takes it there.
pub struct Keeper {
    database: Database,
    messages: Receiver<Message>,
    state: State,
    events: Events,
    /// Verdicts that are kept at most.
    most: u64,
    /// When too many were last looked for; `None` while there are more to drop.
    trimmed: Option<Instant>,
}

impl State {
    /// Reads which guests were seen. A file that cannot be used is told of and costs what it held.
    pub fn open(path: &Path, most: u64, events: Events) -> (Self, Keeper) {
        let mut database = Database::new(path.to_owned(), &FORMAT);
        let mut read = database.write(store::guests);
        if read.is_err() && database.was_set_aside() {
            read = database.write(store::guests);
        }
        let guests = read
            .unwrap_or_default()
            .into_iter()
            .map(|(name, first, last)| (name, Sighting { first, last, taken: None }));
        let (queue, messages) = sync_channel(QUEUE);
        let inner =
            Inner { queue, guests: Mutex::new(guests.collect()), problem: database.problem() };
        let state = Self(Arc::new(inner));
        let keeper =
            Keeper { database, messages, state: state.clone(), events, most, trimmed: None };
        (state, keeper)
    }

    /// One that keeps nothing.
    pub fn nowhere() -> Self {
        let (queue, _nobody) = sync_channel(0);
        let (guests, problem) = Default::default();
        Self(Arc::new(Inner { queue, guests, problem }))
    }

    fn guests(&self) -> MutexGuard<'_, HashMap<String, Sighting>> {
        self.0.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a verdict of engines that really looked. Never waits.
    pub fn keep(&self, set: SetDigest, hash: ContentHash, known: Known) {
        // No room: the content is scanned again after a restart.
        let _ = self.0.queue.try_send(Message::Verdict(Verdict { set, hash, known }));
    }

    /// These signature sets are in use from now on, under this generation. Never waits.
    pub fn in_use(&self, set: SetDigest, generation: Generation) {
        let _ = self.0.queue.try_send(Message::InUse(set, generation));
    }

    /// The guest's driver is there now. Never waits; cheap enough for every look of the watch thread.
    pub fn seen(&self, guest: &str) {
        let mut guests = self.guests();
        let (now, time) = (Instant::now(), Timestamp::now());
        let sighting = guests.entry(guest.to_owned()).or_insert(Sighting {
            first: time,
            last: time,
            taken: None,
        });
        if sighting.taken.is_some_and(|taken| now.duration_since(taken) < SEEN_EVERY) {
            return;
        }
        // With a full queue it is tried again at the next look.
        let message = Message::Seen(guest.to_owned(), sighting.first, time);
        if self.0.queue.try_send(message).is_ok() {
            (sighting.last, sighting.taken) = (time, Some(now));
        }
    }

    /// When the guest's driver was there, as far as is known.
    pub fn sighting(&self, guest: &str) -> Option<Sighting> {
        self.guests().get(guest).copied()
    }

    /// Forgets the guests for which `stays` does not hold: whoever gets their name is new.
    pub fn keep_guests(&self, stays: impl Fn(&str) -> bool) {
        self.guests().retain(|name, _| {
            // With a full queue it is forgotten at the next start.
            stays(name) || self.0.queue.try_send(Message::Forget(name.clone())).is_err()
        });
    }

    /// Why nothing can be kept now.
    pub fn problem(&self) -> Option<String> {
        self.0.problem.get()
    }

    /// Waits until what was handed over so far is written, at most `patience`.
    pub fn flush(&self, patience: Duration) {
        let (done, wait) = sync_channel(1);
        if self.0.queue.try_send(Message::Flush(done)).is_ok() {
            // No answer in time: the disk is stuck, and the service ends all the same.
            let _ = wait.recv_timeout(patience);
        }
    }
}

impl Keeper {
    /// Writes, and fills the cache of `pipeline`, for as long as the service lives.
    pub fn run(mut self, pipeline: &Pipeline) {
        loop {
            self.tell_set_aside();
            let Some((messages, asked)) = self.gather() else { return };
            let mut in_use = None;
            let mut writes = Vec::new();
            for message in messages {
                match message {
                    Message::InUse(set, generation) => in_use = Some((set, generation)),
                    Message::Flush(_) => {}
                    other => writes.push(other),
                }
            }
            self.write(&writes);
            if let Some((set, generation)) = in_use {
                self.load(pipeline, set, generation);
            }
            self.trim();
            // Whoever asked may have gone.
            for done in asked {
                let _ = done.send(());
            }
        }
    }

    /// What comes within [`GATHER`] of the first message, and who waits for it to be written.
    fn gather(&self) -> Option<(Vec<Message>, Vec<SyncSender<()>>)> {
        let mut messages = match self.messages.recv_timeout(Duration::from_secs(1)) {
            Ok(first) => vec![first],
            Err(RecvTimeoutError::Timeout) => return Some((Vec::new(), Vec::new())),
            Err(RecvTimeoutError::Disconnected) => return None,
        };
        let until = Instant::now() + GATHER;
        let in_no_hurry =
            |message: &Message| !matches!(message, Message::Flush(_) | Message::InUse(..));
        while messages.len() < BATCH && messages.last().is_some_and(in_no_hurry) {
            match self.messages.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(message) => messages.push(message),
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
        let asked = messages.iter().filter_map(|message| match message {
            Message::Flush(done) => Some(done.clone()),
            _ => None,
        });
        let asked = asked.collect();
        Some((messages, asked))
    }

    fn tell_set_aside(&mut self) {
        for what in self.database.take_set_aside() {
            self.events.emit(events::set_aside(&what));
        }
    }

    fn write(&mut self, messages: &[Message]) {
        if messages.is_empty() {
            return;
        }
        let write = |transaction: &rusqlite::Transaction<'_>| {
            let mut verdicts = store::Writer::new(transaction)?;
            for message in messages {
                match message {
                    Message::Verdict(Verdict { set, hash, known }) => {
                        verdicts.put(*set, *hash, known)?;
                    }
                    Message::Seen(guest, first, last) => {
                        store::see(transaction, guest, *first, *last)?;
                    }
                    Message::Forget(guest) => store::forget(transaction, guest)?,
                    Message::InUse(..) | Message::Flush(_) => {}
                }
            }
            Ok(())
        };
        let written = self.database.write(write);
        if written.is_err() && self.database.was_set_aside() {
            // The new file gets what the old one could not take, and all the guests.
            let guests = self.state.guests().clone();
            let again = self.database.write(|transaction| {
                guests.iter().try_for_each(|(name, seen)| {
                    store::see(transaction, name, seen.first, seen.last)
                })?;
                write(transaction)
            });
            drop(again);
        }
    }

    /// Puts the verdicts of a set into the cache, the newest first, as long as it is in use.
    fn load(&mut self, pipeline: &Pipeline, set: SetDigest, generation: Generation) {
        let mut below = i64::MAX;
        let mut count = 0;
        let Ok(Some(id)) = self.database.write(|transaction| store::use_set(transaction, set))
        else {
            return;
        };
        loop {
            let page =
                self.database.write(|transaction| store::page(transaction, id, set, below, PAGE));
            let Ok(page) = page else { break };
            let (Some(last), true) = (page.last, pipeline.generations.current() == generation)
            else {
                break;
            };
            below = last;
            count += page.verdicts.len();
            for (hash, known) in page.verdicts {
                pipeline.recall(hash, generation, known);
            }
        }
        tracing::info!(count, "verdicts of these signatures are known from before");
    }

    fn trim(&mut self) {
        if self.trimmed.is_some_and(|at| at.elapsed() < TRIM_EVERY) {
            return;
        }
        let most = self.most;
        let more = self.database.write(|transaction| store::trim(transaction, SETS_KEPT, most));
        self.trimmed = if matches!(more, Ok(true)) { None } else { Some(Instant::now()) };
    }
}

#[cfg(test)]
mod tests;
