//! The event log: JSON lines, written by a thread of its own.
//!
//! [`Events::emit`] never waits: the queue is bounded, and what does not fit is counted and told in
//! an event of its own. A guest that causes more events than its rate loses its own and nobody
//! else's. The writer owns the file; those who follow get the lines after they were written.

use crate::metrics::Metrics;
use seawall_client::{Event, EventKind};
use std::collections::{HashMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::broadcast;

/// Events that wait for the writer.
const QUEUE: usize = 4096;
/// A file that has grown to this many bytes becomes `FILE.1`.
const FILE_MAX: u64 = 64 << 20;
/// The last lines, kept for those who ask: at most so many, and so many bytes.
pub const RECENT_MAX: usize = 1000;
const RECENT_BYTES: usize = 1 << 20;
/// Lines that a follower may be behind.
const FOLLOWER_LAG: usize = 1024;
/// A guest may cause so many events at once, and then so many each second.
const GUEST_BURST: f64 = 2000.0;
const GUEST_RATE: f64 = 50.0;
/// What a guest lost is told this often.
const LOST_EVERY: Duration = Duration::from_secs(1);

/// Where events go.
#[derive(Clone)]
pub struct Events(Arc<Inner>);

struct Inner {
    queue: SyncSender<Message>,
    lines: Arc<Lines>,
    rates: Mutex<HashMap<(String, Class), Rate>>,
    metrics: Arc<Metrics>,
}

enum Message {
    Event(Box<Event>),
    /// Written so far: tell whoever asked.
    Flush(SyncSender<()>),
}

/// What was written last, and who waits for more.
struct Lines {
    recent: Mutex<Recent>,
    followers: broadcast::Sender<Arc<str>>,
    /// Events for which the queue had no room, and of which the log does not tell yet.
    overflowed: AtomicU64,
}

#[derive(Default)]
struct Recent {
    lines: VecDeque<Arc<str>>,
    bytes: usize,
}

impl Recent {
    fn push(&mut self, line: Arc<str>) {
        self.bytes += line.len();
        self.lines.push_back(line);
        while self.lines.len() > RECENT_MAX || self.bytes > RECENT_BYTES {
            self.bytes -= self.lines.pop_front().map_or(0, |line| line.len());
        }
    }
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
    /// Opens the log and starts its writer.
    pub fn start(path: &Path, metrics: Arc<Metrics>) -> io::Result<Self> {
        let mut recent = Recent::default();
        let log = Log::open(path, &mut recent)?;
        let (queue, messages) = sync_channel(QUEUE);
        let (followers, _) = broadcast::channel(FOLLOWER_LAG);
        let lines = Arc::new(Lines {
            recent: Mutex::new(recent),
            followers,
            overflowed: AtomicU64::new(0),
        });
        let inner = Arc::new(Inner { queue, lines, rates: Mutex::default(), metrics });
        let writer =
            Writer { log, lines: Arc::clone(&inner.lines), metrics: Arc::clone(&inner.metrics) };
        std::thread::Builder::new().name("events".into()).spawn(move || writer.run(&messages))?;
        Ok(Self(inner))
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
            self.0.lines.overflowed.fetch_add(1, Relaxed);
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

    /// The last `limit` lines, and with `follow` those that come.
    pub fn tail(&self, limit: usize) -> (Vec<Arc<str>>, broadcast::Receiver<Arc<str>>) {
        let recent = self.0.lines.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let skip = recent.lines.len().saturating_sub(limit);
        let last = recent.lines.iter().skip(skip).cloned().collect();
        (last, self.0.lines.followers.subscribe())
    }
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

struct Writer {
    log: Log,
    lines: Arc<Lines>,
    metrics: Arc<Metrics>,
}

impl Writer {
    fn run(mut self, messages: &Receiver<Message>) {
        loop {
            match messages.recv_timeout(Duration::from_secs(1)) {
                Ok(Message::Event(event)) => self.write(&event),
                // Whoever asked may have gone.
                Ok(Message::Flush(done)) => drop(done.send(())),
                Err(RecvTimeoutError::Timeout) => {
                    let count = self.lines.overflowed.swap(0, Relaxed);
                    if count > 0 {
                        self.report_overflow(count);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn report_overflow(&mut self, count: u64) {
        let mut event = Event::new(EventKind::EventsDropped)
            .reason("they came faster than they can be written");
        event.time = now();
        event.count = Some(count);
        self.write(&event);
    }

    fn write(&mut self, event: &Event) {
        let mut line = match serde_json::to_string(event) {
            Ok(line) => line,
            Err(error) => {
                tracing::error!(%error, "an event cannot be written");
                return;
            }
        };
        line.push('\n');
        if let Err(error) = self.log.append(line.as_bytes()) {
            self.metrics.events_dropped.fetch_add(1, Relaxed);
            if !std::mem::replace(&mut self.log.failing, true) {
                tracing::error!(path = %self.log.path.display(), %error, "events cannot be written");
            }
        } else if std::mem::take(&mut self.log.failing) {
            tracing::info!(path = %self.log.path.display(), "events can be written again");
        }
        let line: Arc<str> = line.into();
        let mut recent = self.lines.recent.lock().unwrap_or_else(PoisonError::into_inner);
        recent.push(Arc::clone(&line));
        // Nobody follows: fine.
        let _ = self.lines.followers.send(line);
    }
}

/// The file, its size bounded.
struct Log {
    path: PathBuf,
    file: File,
    len: u64,
    most: u64,
    failing: bool,
}

impl Log {
    fn open(path: &Path, recent: &mut Recent) -> io::Result<Self> {
        let mut file = open(path)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(RECENT_BYTES as u64)))?;
        let mut bytes = Vec::new();
        (&file).take(RECENT_BYTES as u64).read_to_end(&mut bytes)?;
        let text = String::from_utf8_lossy(&bytes);
        // The first line may be cut; a last one without its end was not written whole.
        let lines = text.split_inclusive('\n').skip(usize::from(len > RECENT_BYTES as u64));
        lines.filter(|line| line.ends_with('\n')).for_each(|line| recent.push(line.into()));
        if !text.is_empty() && !text.ends_with('\n') {
            file.write_all(b"\n")?;
        }
        Ok(Self { path: path.to_owned(), file, len, most: FILE_MAX, failing: false })
    }

    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        if self.len > 0 && self.len + line.len() as u64 > self.most {
            self.rotate()?;
        }
        self.file.write_all(line)?;
        self.len += line.len() as u64;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        let mut old = self.path.clone().into_os_string();
        old.push(".1");
        std::fs::rename(&self.path, old)?;
        self.file = open(&self.path)?;
        self.len = 0;
        Ok(())
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).append(true).create(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(path: &Path) -> Vec<Event> {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn events_are_lines_that_survive_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        let events = Events::start(&path, Arc::default()).unwrap();
        events.emit(Event::new(EventKind::ServiceStarted));
        events.emit(Event::new(EventKind::GuestUnprotected).guest("g1").reason("silent"));
        events.flush(Duration::from_secs(5));
        let written = lines(&path);
        assert_eq!(written[1].guest.as_deref(), Some("g1"));
        assert!(written[1].time.ends_with('Z') && written[1].time.len() == 24, "{:?}", written[1]);

        let events = Events::start(&path, Arc::default()).unwrap();
        let (last, mut follow) = events.tail(1);
        assert!(last[0].contains("guest_unprotected"));
        events.emit(Event::new(EventKind::ServiceStopped));
        assert!(follow.blocking_recv().unwrap().contains("service_stopped"));
        assert_eq!(events.tail(10).0.len(), 3);
    }

    #[test]
    fn a_guest_that_causes_too_many_loses_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        let metrics = Arc::<Metrics>::default();
        let events = Events::start(&path, Arc::clone(&metrics)).unwrap();
        for _ in 0..3000 {
            events.emit(Event::new(EventKind::Unscanned).guest("loud"));
            events.flush(Duration::from_secs(5));
        }
        events.emit(Event::new(EventKind::Unscanned).guest("quiet"));
        events.emit(Event::new(EventKind::Verdict).guest("loud"));
        events.emit(Event::new(EventKind::GuestUnprotected).guest("loud"));
        std::thread::sleep(LOST_EVERY);
        events.report_lost();
        events.flush(Duration::from_secs(5));
        let written = lines(&path);
        let of = |guest: &str, kind| {
            let is_it =
                |event: &&Event| event.guest.as_deref() == Some(guest) && event.kind == kind;
            written.iter().filter(is_it).count()
        };
        assert_eq!(of("quiet", EventKind::Unscanned), 1);
        assert_eq!(of("loud", EventKind::Verdict), 1);
        assert_eq!(of("loud", EventKind::GuestUnprotected), 1);
        let kept = of("loud", EventKind::Unscanned);
        assert!(kept < 2900, "{kept}");
        let told = written.iter().find(|event| event.kind == EventKind::EventsDropped).unwrap();
        assert_eq!(told.count.unwrap() + kept as u64, 3000);
    }

    #[test]
    fn the_file_stays_bounded_and_one_old_one_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("e");
        let mut log = Log::open(&path, &mut Recent::default()).unwrap();
        log.most = 100;
        for _ in 0..30 {
            log.append(&[b'x'; 40]).unwrap();
        }
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 80);
        assert_eq!(std::fs::metadata(folder.path().join("e.1")).unwrap().len(), 80);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
