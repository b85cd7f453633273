//! The event log: a SQLite file, written by a thread of its own.
//!
//! [`Events::emit`] never waits: the queue is bounded, and what does not fit is counted and told in
//! an event of its own. A guest that causes more events than its rate loses its own and nobody
//! else's. The [`writer`] owns the file and gives each event its id; those who ask read the
//! [`store`] through connections of their own and get what comes after it was written.

pub mod filter;
pub mod store;
mod writer;

use crate::database::{DatabaseError, Problem, SetAside};
use crate::metrics::Metrics;
use filter::Filter;
use seawall_client::{Event, EventKind};
use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use store::{Line, Reader, Retention};
use tokio::sync::broadcast;
use writer::{Message, Shared, Writer};

/// Events that wait for the writer.
const QUEUE: usize = 4096;
/// Events that a follower may be behind before it reads them from the disk.
const FOLLOWER_LAG: usize = 256;
/// A guest may cause so many events at once, and then so many each second.
const GUEST_BURST: f64 = 2000.0;
const GUEST_RATE: f64 = 50.0;
/// What a guest lost is told this often.
const LOST_EVERY: Duration = Duration::from_secs(1);

/// Where events go.
#[derive(Clone)]
pub struct Events(Arc<Inner>);

struct Inner {
    path: PathBuf,
    queue: SyncSender<Message>,
    shared: Arc<Shared>,
    problem: Problem,
    rates: Mutex<HashMap<(String, Class), Rate>>,
    metrics: Arc<Metrics>,
}

/// Events of one guest that share a rate: a flood of one class costs nothing of the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Class {
    /// What was found.
    Verdict,
    /// Everything else that a guest can cause at will.
    Report,
}

impl Class {
    /// `None` for what the service itself observes; no guest may drown an alarm.
    fn of(kind: EventKind) -> Option<Self> {
        match kind {
            EventKind::GuestUnprotected | EventKind::GuestProtected => None,
            EventKind::Verdict
            | EventKind::Mapped
            | EventKind::Quarantined
            | EventKind::QuarantineStays
            | EventKind::QuarantineFailed => Some(Self::Verdict),
            _ => Some(Self::Report),
        }
    }
}

/// How fast one guest may cause events, and how many it lost.
struct Rate {
    tokens: f64,
    filled: Instant,
    lost: u64,
    /// When the loss was last told.
    told: Instant,
}

impl Events {
    /// Starts the writer. A file that cannot be opened is the writer's to try again: nothing of
    /// what the service does for guests depends on it.
    pub fn start(path: &Path, keep: Retention, metrics: Arc<Metrics>) -> io::Result<Self> {
        let (queue, messages) = sync_channel(QUEUE);
        let (followers, _) = broadcast::channel(FOLLOWER_LAG);
        let shared = Arc::new(Shared { followers, overflowed: AtomicU64::new(0) });
        let (file, of_writer) = (path.to_owned(), Arc::clone(&shared));
        let writer = Writer::new(file, keep, of_writer, Arc::clone(&metrics));
        let inner = Inner {
            path: path.to_owned(),
            queue,
            shared,
            problem: writer.problem(),
            rates: Mutex::default(),
            metrics,
        };
        std::thread::Builder::new().name("events".into()).spawn(move || writer.run(&messages))?;
        Ok(Self(Arc::new(inner)))
    }

    /// Hands `event` to the writer. Never waits.
    pub fn emit(&self, mut event: Event) {
        event.time = now();
        if let Some(guest) = &event.guest
            && let Some(class) = Class::of(event.kind)
            && !self.admit(guest, class)
        {
            return;
        }
        if self.0.queue.try_send(Message::Event(Box::new(event))).is_err() {
            self.0.shared.overflowed.fetch_add(1, Relaxed);
            self.0.metrics.events_dropped.fetch_add(1, Relaxed);
        }
    }

    fn admit(&self, guest: &str, class: Class) -> bool {
        let mut rates = self.0.rates.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let rate = rates.entry((guest.to_owned(), class)).or_insert(Rate {
            tokens: GUEST_BURST,
            filled: now,
            lost: 0,
            told: now,
        });
        let earned = now.duration_since(rate.filled).as_secs_f64() * GUEST_RATE;
        rate.tokens = (rate.tokens + earned).min(GUEST_BURST);
        rate.filled = now;
        if rate.tokens < 1.0 {
            rate.lost += 1;
            self.0.metrics.events_dropped.fetch_add(1, Relaxed);
            return false;
        }
        rate.tokens -= 1.0;
        true
    }

    /// Tells of the events that guests lost. Called often.
    pub fn report_lost(&self) {
        let lost: Vec<_> = {
            let mut rates = self.0.rates.lock().unwrap_or_else(PoisonError::into_inner);
            let due = |rate: &Rate| rate.lost > 0 && rate.told.elapsed() >= LOST_EVERY;
            let lost = rates.iter_mut().filter(|(_, rate)| due(rate)).map(|((guest, _), rate)| {
                rate.told = Instant::now();
                (guest.clone(), std::mem::take(&mut rate.lost))
            });
            lost.collect()
        };
        for (guest, count) in lost {
            tracing::warn!(guest, count, "events were left out: the guest causes too many");
            let mut event = Event::new(EventKind::EventsDropped)
                .guest(&guest)
                .reason("the guest causes more events than its rate allows");
            event.count = Some(count);
            event.time = now();
            // A full queue: the loss stands in the status all the same.
            let _ = self.0.queue.try_send(Message::Event(Box::new(event)));
        }
    }

    /// Waits until everything emitted so far is written, at most `patience`.
    pub fn flush(&self, patience: Duration) {
        let (done, wait) = sync_channel(1);
        let until = Instant::now() + patience;
        let mut message = Message::Flush(done);
        while let Err(error) = self.0.queue.try_send(message) {
            let std::sync::mpsc::TrySendError::Full(back) = error else { return };
            if Instant::now() > until {
                return;
            }
            message = back;
            std::thread::sleep(Duration::from_millis(5));
        }
        // No answer in time: the disk is stuck, and the service ends all the same.
        let _ = wait.recv_timeout(until.saturating_duration_since(Instant::now()));
    }

    /// Those that are wanted, as far as they are written. Reads the disk.
    pub fn read(&self, filter: Filter) -> Result<Reader, DatabaseError> {
        Reader::open(&self.0.path, filter)
    }

    /// Whether any event that is written is about a guest of this name. Reads the disk.
    pub fn knows_guest(&self, name: &str) -> Result<bool, DatabaseError> {
        let filter = Filter { guest: Some(name.to_owned()), ..Filter::default() };
        Ok(!self.read(filter)?.page(0, 1)?.is_empty())
    }

    /// All that come from now on.
    pub fn follow(&self) -> broadcast::Receiver<Arc<Line>> {
        self.0.shared.followers.subscribe()
    }

    /// Somebody who read found damage: the writer looks for itself.
    pub fn suspect(&self) {
        // With a full queue the next one who finds it says so again.
        let _ = self.0.queue.try_send(Message::Check);
    }

    /// Why events cannot be written now.
    pub fn problem(&self) -> Option<String> {
        self.0.problem.get()
    }
}

/// The warning that a database was set aside.
pub fn set_aside(what: &SetAside) -> Event {
    let SetAside { from, to, why } = what;
    let mut event = Event::new(EventKind::DatabaseSetAside).reason(format!(
        "{} could not be used ({why}); it is now {}, and a new one was begun",
        from.display(),
        to.display()
    ));
    event.time = now();
    event
}

/// RFC 3339, UTC, milliseconds.
pub fn now() -> String {
    format_time(jiff::Timestamp::now())
}

pub fn format_time(time: jiff::Timestamp) -> String {
    format!("{time:.3}")
}

/// Bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
#[path = "events/tests.rs"]
mod tests;
