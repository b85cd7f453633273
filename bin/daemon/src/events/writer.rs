//! The thread that writes events, in batches, and tells those who follow.

use super::store::{self, FORMAT, Line, Retention};
use crate::clock;
use crate::database::{Database, DatabaseError};
use crate::metrics::Metrics;
use jiff::Timestamp;
use seawall_client::{Event, EventKind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use std::time::{Duration, Instant};
use tokio::sync::broadcast;

/// Events written in one transaction.
const BATCH: usize = 512;
/// How often it is tried to tell of lost events.
const TELL_EVERY: Duration = Duration::from_secs(1);
/// How often old events are looked for, while none are too many.
const TRIM_EVERY: Duration = Duration::from_secs(30);
/// After so many bytes of events they are looked for earlier.
const TRIM_AFTER: usize = 1 << 20;

/// What the writer is asked.
pub enum Message {
    Event(Box<Event>),
    /// Written so far: tell whoever asked.
    Flush(SyncSender<()>),
    /// Somebody who reads found damage: look whether it is so.
    Check,
}

/// What the writer shares with those who ask it.
pub struct Shared {
    pub followers: broadcast::Sender<Arc<Line>>,
    /// Events for which the queue had no room, and of which the log does not tell yet.
    pub overflowed: AtomicU64,
}

pub struct Writer {
    database: Database,
    keep: Retention,
    shared: Arc<Shared>,
    metrics: Arc<Metrics>,
    next_id: Option<u64>,
    /// Events that the disk refused, and of which the log does not tell yet.
    refused: u64,
    /// When losses were last looked at.
    told: Option<Instant>,
    trimmed: Option<Instant>,
    /// Bytes of events since then.
    written_since: usize,
}

impl Writer {
    pub fn new(path: PathBuf, keep: Retention, shared: Arc<Shared>, metrics: Arc<Metrics>) -> Self {
        let database = Database::new(path, &FORMAT);
        Self {
            database,
            keep,
            shared,
            metrics,
            next_id: None,
            refused: 0,
            told: None,
            trimmed: None,
            written_since: 0,
        }
    }

    pub fn problem(&self) -> crate::database::Problem {
        self.database.problem()
    }

    /// Runs for as long as somebody can ask.
    pub fn run(mut self, messages: &Receiver<Message>) {
        loop {
            let (mut events, mut asked) = (Vec::new(), Vec::new());
            match messages.recv_timeout(Duration::from_secs(1)) {
                Ok(first) => {
                    for message in std::iter::once(first).chain(messages.try_iter()).take(BATCH) {
                        match message {
                            Message::Event(event) => events.push(*event),
                            Message::Flush(done) => asked.push(done),
                            Message::Check => self.database.check(),
                        }
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.batch(events);
            self.tell_losses();
            self.trim();
            // Whoever asked may have gone.
            for done in asked {
                let _ = done.send(());
            }
        }
    }

    fn batch(&mut self, mut events: Vec<Event>) {
        events.extend(self.database.take_set_aside().iter().map(super::set_aside));
        let count = events.len() as u64;
        if !self.write(events) {
            self.refused += count;
            self.metrics.events_dropped.fetch_add(count, Relaxed);
        }
    }

    /// Tells of events that were lost, as soon as that can be written.
    fn tell_losses(&mut self) {
        if self.told.is_some_and(|at| at.elapsed() < TELL_EVERY) {
            return;
        }
        self.told = Some(Instant::now());
        let overflowed = self.shared.overflowed.load(Relaxed);
        if overflowed > 0
            && self.write(vec![lost(overflowed, "they came faster than they can be written")])
        {
            self.shared.overflowed.fetch_sub(overflowed, Relaxed);
        }
        if self.refused > 0 && self.write(vec![lost(self.refused, "the disk could not take them")])
        {
            self.refused = 0;
        }
    }

    /// Writes events and tells those who follow, whether or not the disk took them.
    fn write(&mut self, events: Vec<Event>) -> bool {
        if events.is_empty() {
            return true;
        }
        self.find_id();
        let lines: Vec<_> = events.into_iter().filter_map(|event| self.line(event)).collect();
        let mut written =
            self.database.write(|transaction| store::append(transaction, &lines)).is_ok();
        if !written && self.database.was_set_aside() {
            written = self.database.write(|transaction| store::append(transaction, &lines)).is_ok();
        }
        self.written_since += lines.iter().map(|line| line.text.len()).sum::<usize>();
        for line in lines {
            // Nobody follows: fine.
            let _ = self.shared.followers.send(line);
        }
        written
    }

    /// Ids go on where the database ends. A new database begins with the time in milliseconds: above
    /// the ids of the one before it, unless that had more than a thousand events a second for long.
    fn find_id(&mut self) {
        if self.next_id.is_some() && self.database.is_open() {
            return;
        }
        let kept = self.database.write(store::last_id);
        let now = u64::try_from(Timestamp::now().as_millisecond()).unwrap_or(1);
        let start = match kept {
            Ok(Some(last)) => last + 1,
            _ => now,
        };
        self.next_id = Some(self.next_id.map_or(start, |next| next.max(start)));
    }

    fn line(&mut self, mut event: Event) -> Option<Arc<Line>> {
        let id = self.next_id?;
        let at = event.time.parse::<Timestamp>().map_or(0, Timestamp::as_millisecond);
        event.id = Some(id);
        match serde_json::to_string(&event) {
            Ok(text) => {
                self.next_id = Some(id + 1);
                Some(Arc::new(Line { id, at, event, text }))
            }
            Err(error) => {
                tracing::error!(%error, "an event cannot be written");
                None
            }
        }
    }

    fn trim(&mut self) {
        if self.trimmed.is_some_and(|at| at.elapsed() < TRIM_EVERY)
            && self.written_since < TRIM_AFTER
        {
            return;
        }
        self.written_since = 0;
        let now = clock::steady_now_ms();
        let keep = self.keep;
        let more: Result<bool, DatabaseError> =
            self.database.write(|transaction| store::trim(transaction, keep, now));
        // With more to drop, the next turn goes on.
        self.trimmed = if matches!(more, Ok(true)) { None } else { Some(Instant::now()) };
    }
}

fn lost(count: u64, why: &str) -> Event {
    let mut event = Event::new(EventKind::EventsDropped).reason(why);
    event.time = super::now();
    event.count = Some(count);
    event
}
