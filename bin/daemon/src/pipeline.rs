//! From a private copy to a verdict: cache, single flight, engines.
//!
//! Owns the verdict cache and the flights. A flight is one scan of one content under one
//! generation; whoever asks for the same content meanwhile waits for the same flight. Engines are
//! asked in order; one that finds something ends the flight. Only clean and infected are
//! remembered, and only under the generation whose engines really looked.
//!
//! ```text
//! lookup ──hit──► answer                      report: clean ──► next engine, or end
//!   │miss                                             infected ──► end
//!   ▼                                                 failed ──► next engine; the end is no verdict
//! flight there? ──yes──► wait with it         end ──► cache, answer everyone who waits
//!   │no
//!   ▼ seal the copy, ask the first engine
//! ```
//!
//! Nothing here waits: engines report on their supervisors' threads, answers go to outboxes that
//! never block, and a thread of its own ends the wait of those whose time is over.

use crate::copy::{Charge, PrivateCopy};
use crate::generation::Generations;
use crate::metrics::Metrics;
use crate::state::State;
use quick_cache::OptionsBuilder;
use quick_cache::sync::Cache;
use seawall_client::{Detection, EngineReport, Verdict};
use seawall_engine::content::ContentFd;
use seawall_engine::host::{EngineHandle, Lane, ScanError, ScanReport};
use seawall_engine::{Generation as Signatures, Metadata, Outcome};
use seawall_proto::{ContentHash, Generation};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Scans that wait for one engine.
pub const ENGINE_QUEUE: usize = 4096;
/// Of these, so many may be one guest's.
const GUEST_SCANS_MAX: u32 = ENGINE_QUEUE as u32 / 2;
/// How often waits that are over are ended.
const SWEEP: Duration = Duration::from_millis(100);

/// What is known of a content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    Clean,
    /// Never empty.
    Infected(Arc<Vec<Detection>>),
    Error(String),
    TimedOut(String),
}

impl Finding {
    pub fn verdict(&self) -> Verdict {
        match self {
            Self::Clean => Verdict::Clean,
            Self::Infected(_) => Verdict::Infected,
            Self::Error(_) => Verdict::Error,
            Self::TimedOut(_) => Verdict::TimedOut,
        }
    }
}

/// What whoever asked gets.
#[derive(Debug, Clone)]
pub struct Answer {
    pub finding: Finding,
    pub generation: Generation,
    pub cached: bool,
    pub engines: Arc<[EngineReport]>,
    /// What was judged, where it is infected and at hand.
    pub content: Option<Arc<Content>>,
}

impl Answer {
    /// An answer without engines' reports.
    pub fn new(finding: Finding, generation: Generation) -> Self {
        let (cached, engines, content) = Default::default();
        Self { finding, generation, cached, engines, content }
    }
}

/// A sealed private copy; its part of the budget is held as long as this lives.
#[derive(Debug)]
pub struct Content {
    pub bytes: ContentFd,
    charge: Charge,
}

impl Content {
    /// Seals a copy.
    ///
    /// # Errors
    /// What the system says.
    pub fn seal(copy: PrivateCopy) -> std::io::Result<Arc<Self>> {
        let (bytes, charge) = copy.seal()?;
        Ok(Arc::new(Self { bytes, charge }))
    }
}

type Reply = Box<dyn FnOnce(Answer) + Send>;

/// A content that is to be scanned, and for whom.
pub struct Request {
    pub hash: ContentHash,
    pub copy: PrivateCopy,
    pub meta: Metadata,
    pub lane: Lane,
    /// How long the answer is waited for.
    pub until: Instant,
    pub reply: Reply,
}

/// One configured engine.
pub struct EngineSlot {
    pub handle: EngineHandle,
    pub scan_timeout: Duration,
    pub scans: AtomicU64,
    pub failures: AtomicU64,
}

pub struct Pipeline {
    engines: OnceLock<Vec<EngineSlot>>,
    cache: Cache<(ContentHash, Generation), Known>,
    flights: Mutex<Flights>,
    pub generations: Generations,
    state: State,
    metrics: Arc<Metrics>,
}

/// A remembered verdict: nothing was found, or these.
pub type Known = Option<Arc<Vec<Detection>>>;

#[derive(Default)]
struct Flights {
    by_content: HashMap<(ContentHash, Generation), Flight>,
    next_id: u64,
}

struct Flight {
    /// Tells this flight from a later one of the same content.
    id: u64,
    waiters: Vec<Waiter>,
    lane: Lane,
    /// There once the copy is sealed.
    scan: Option<Arc<Scan>>,
}

struct Waiter {
    until: Instant,
    reply: Reply,
}

/// What the engines get.
struct Scan {
    key: (ContentHash, Generation),
    flight: u64,
    content: Arc<Content>,
    meta: Metadata,
}

impl Drop for Scan {
    fn drop(&mut self) {
        self.content.charge.share().scans.fetch_sub(1, Relaxed);
    }
}

/// What the engines said so far.
#[derive(Default)]
struct Progress {
    reports: Vec<EngineReport>,
    signatures: Vec<Option<Signatures>>,
    failure: Option<Finding>,
}

fn cache_of(entries: u64) -> Cache<(ContentHash, Generation), Known> {
    let options = OptionsBuilder::new()
        .estimated_items_capacity(usize::try_from(entries).unwrap_or(usize::MAX))
        .weight_capacity(entries)
        // Traces of what was dropped take as much memory as entries do; the default is a half.
        .ghost_allocation(0.1)
        .build()
        .expect("both capacities are set");
    let (weighter, hasher, lifecycle) = Default::default();
    Cache::with_options(options, weighter, hasher, lifecycle)
}

impl Pipeline {
    /// A pipeline without engines yet; they need its generations to report to.
    pub fn new(
        generations: Generations,
        cache_entries: u64,
        state: State,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        Arc::new(Self {
            engines: OnceLock::new(),
            cache: cache_of(cache_entries),
            flights: Mutex::default(),
            generations,
            state,
            metrics,
        })
    }

    /// Gives the pipeline its engines, once.
    pub fn set_engines(&self, engines: Vec<EngineSlot>) {
        assert!(self.engines.set(engines).is_ok(), "engines are set once, at the start");
    }

    pub fn engines(&self) -> &[EngineSlot] {
        self.engines.get().map_or(&[], Vec::as_slice)
    }

    pub fn cached_verdicts(&self) -> u64 {
        self.cache.len() as u64
    }

    /// An engine takes scans with these signatures. Gives the new generation when that is news;
    /// no verdict of an earlier one is asked for again.
    pub fn engine_has(&self, engine: usize, signatures: Signatures) -> Option<Generation> {
        let new = self.generations.engine_has(engine, signatures)?;
        self.cache.clear();
        if let Some(set) = self.generations.set_of(new) {
            self.state.in_use(set, new);
        }
        Some(new)
    }

    /// Puts a verdict into the cache that was found before this start, by engines that used the same
    /// as those of `generation`.
    pub fn recall(&self, hash: ContentHash, generation: Generation, known: Known) {
        if self.cache.peek(&(hash, generation)).is_none() {
            self.cache.insert((hash, generation), known);
        }
    }

    fn flights(&self) -> MutexGuard<'_, Flights> {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The verdict, if it is known.
    pub fn lookup(&self, hash: ContentHash) -> Option<Answer> {
        let answer = self.known(hash, self.generations.current())?;
        self.metrics.cache_hits.fetch_add(1, Relaxed);
        Some(answer)
    }

    fn known(&self, hash: ContentHash, generation: Generation) -> Option<Answer> {
        let finding = match self.cache.get(&(hash, generation))? {
            None => Finding::Clean,
            Some(detections) => Finding::Infected(detections),
        };
        Some(Answer { cached: true, ..Answer::new(finding, generation) })
    }

    /// Has a content scanned, or joins a scan of it that is under way. Replies exactly once.
    pub fn scan(self: &Arc<Self>, request: Request) {
        let Request { hash, copy, meta, lane, until, reply } = request;
        let generation = self.generations.current();
        let key = (hash, generation);
        let id = {
            let mut flights = self.flights();
            let id = flights.next_id;
            match flights.by_content.entry(key) {
                Entry::Occupied(mut entry) => {
                    self.metrics.joined.fetch_add(1, Relaxed);
                    let flight = entry.get_mut();
                    flight.waiters.push(Waiter { until, reply });
                    let hurry = flight.hurry(lane);
                    drop(flights);
                    if let Some(scan) = hurry {
                        self.ask(0, &scan, Lane::OnAccess, Progress::default());
                    }
                    return;
                }
                Entry::Vacant(entry) => {
                    // It may have landed since the lookup.
                    if let Some(answer) = self.known(hash, generation) {
                        drop(flights);
                        self.metrics.cache_hits.fetch_add(1, Relaxed);
                        reply(answer);
                        return;
                    }
                    if copy.share().scans.load(Relaxed) >= GUEST_SCANS_MAX {
                        drop(flights);
                        let why = "this guest fills its half of the engine's queue";
                        reply(Answer::new(Finding::Error(why.into()), generation));
                        return;
                    }
                    let waiters = vec![Waiter { until, reply }];
                    entry.insert(Flight { id, waiters, lane, scan: None });
                    flights.next_id += 1;
                    id
                }
            }
        };
        self.take_off(key, id, copy, meta);
    }

    fn take_off(
        self: &Arc<Self>,
        key: (ContentHash, Generation),
        id: u64,
        copy: PrivateCopy,
        meta: Metadata,
    ) {
        let content = match Content::seal(copy) {
            Ok(sealed) => sealed,
            Err(error) => {
                let why = format!("the private copy cannot be sealed: {error}");
                self.land(key, id, Answer::new(Finding::Error(why), key.1));
                return;
            }
        };
        content.charge.share().scans.fetch_add(1, Relaxed);
        let scan = Arc::new(Scan { key, flight: id, content, meta });
        let lane = {
            let mut flights = self.flights();
            // Only its own landing removes a flight.
            let Some(flight) = flights.by_content.get_mut(&key) else { return };
            flight.scan = Some(Arc::clone(&scan));
            flight.lane
        };
        self.metrics.scans.fetch_add(1, Relaxed);
        self.ask(0, &scan, lane, Progress::default());
    }

    /// Asks the engine of that number, or ends the flight after the last one.
    fn ask(self: &Arc<Self>, number: usize, scan: &Arc<Scan>, lane: Lane, mut progress: Progress) {
        let Some(engine) = self.engines().get(number) else {
            let finding = progress.failure.take().unwrap_or(if number == 0 {
                Finding::Error("no engine is configured".into())
            } else {
                Finding::Clean
            });
            self.conclude(scan, finding, progress);
            return;
        };
        engine.scans.fetch_add(1, Relaxed);
        let (pipeline, scan_again) = (Arc::clone(self), Arc::clone(scan));
        let reply = move |report: ScanReport| {
            pipeline.reported(number, &scan_again, lane, progress, report);
        };
        engine.handle.scan(
            scan.content.bytes.clone(),
            scan.meta.clone(),
            lane,
            engine.scan_timeout,
            reply,
        );
    }

    fn reported(
        self: &Arc<Self>,
        number: usize,
        scan: &Arc<Scan>,
        lane: Lane,
        mut progress: Progress,
        report: ScanReport,
    ) {
        let engine = &self.engines()[number];
        let name = engine.handle.name();
        progress.signatures.push(report.generation);
        let finding = finding_of(name, report.result);
        progress.reports.push(EngineReport {
            engine: name.to_owned(),
            verdict: finding.verdict(),
            queued_us: micros(report.queued),
            scanned_us: micros(report.scanned),
        });
        match finding {
            Finding::Clean => self.ask(number + 1, scan, lane, progress),
            Finding::Infected(_) => self.conclude(scan, finding, progress),
            failure => {
                engine.failures.fetch_add(1, Relaxed);
                progress.failure.get_or_insert(failure);
                self.ask(number + 1, scan, lane, progress);
            }
        }
    }

    /// Remembers what the engines found, under the generation that really looked, and answers.
    fn conclude(&self, scan: &Scan, finding: Finding, progress: Progress) {
        let generation = self.generations.of(&progress.signatures);
        let known = match &finding {
            Finding::Clean => Some(None),
            Finding::Infected(found) => Some(Some(Arc::clone(found))),
            _ => None,
        };
        let found = known.zip(generation);
        if let Some((known, generation)) = &found {
            self.cache.insert((scan.key.0, *generation), known.clone());
        }
        // Generation 0 is older than every other: a driver remembers nothing of it.
        let generation = generation.unwrap_or_default();
        let content = match &finding {
            Finding::Infected(_) => Some(Arc::clone(&scan.content)),
            _ => None,
        };
        let engines = progress.reports.into();
        let answer = Answer { engines, content, ..Answer::new(finding, generation) };
        self.land(scan.key, scan.flight, answer);
        if let Some((known, generation)) = found
            && let Some(set) = self.generations.set_of(generation)
        {
            self.state.keep(set, scan.key.0, known);
        }
    }

    fn land(&self, key: (ContentHash, Generation), id: u64, answer: Answer) {
        let flight = match self.flights().by_content.entry(key) {
            Entry::Occupied(entry) if entry.get().id == id => entry.remove(),
            _ => return,
        };
        for waiter in flight.waiters {
            (waiter.reply)(answer.clone());
        }
    }

    /// Ends the wait of those whose time is over, for as long as the service lives. The scan goes
    /// on: its verdict is remembered.
    pub fn sweep(&self) {
        loop {
            std::thread::sleep(SWEEP);
            let now = Instant::now();
            let mut late = Vec::new();
            for flight in self.flights().by_content.values_mut() {
                late.extend(flight.waiters.extract_if(.., |waiter| waiter.until <= now));
            }
            for waiter in late {
                (waiter.reply)(Answer::new(
                    Finding::TimedOut("the scan is not done in time".into()),
                    self.generations.current(),
                ));
            }
        }
    }
}

impl Flight {
    /// Someone who holds an access waits for a scan that was queued for nobody: it is queued once
    /// more in front, and whichever ends first counts.
    fn hurry(&mut self, lane: Lane) -> Option<Arc<Scan>> {
        if !matches!((self.lane, lane), (Lane::OnDemand, Lane::OnAccess)) {
            return None;
        }
        self.lane = Lane::OnAccess;
        self.scan.clone()
    }
}

fn finding_of(engine: &str, result: Result<Outcome, ScanError>) -> Finding {
    match result {
        Ok(Outcome::Clean) => Finding::Clean,
        Ok(Outcome::Infected(found)) => {
            let found = found.into_iter().map(|detection| Detection {
                name: detection.name,
                severity: detection.severity.to_string(),
                family: detection.family,
                engine: engine.to_owned(),
            });
            Finding::Infected(Arc::new(found.collect()))
        }
        Err(error @ ScanError::TimedOut) => Finding::TimedOut(format!("engine {engine}: {error}")),
        Err(error) => Finding::Error(format!("engine {engine}: {error}")),
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The service has 64 MiB without engines and private copies, and needs about 12 for the rest.
    #[test]
    fn a_full_cache_of_the_default_size_leaves_room_in_what_the_service_may_have() {
        let entries = crate::config::Limits::default().verdict_cache_entries;
        let cache = cache_of(entries);
        for n in 0..2 * entries {
            let hash = ContentHash(*blake3::hash(&n.to_le_bytes()).as_bytes());
            cache.insert((hash, Generation(n)), None);
        }
        let used = cache.memory_used().total();
        println!("{} verdicts take {used} bytes", cache.len());
        assert!(cache.len() as u64 > entries * 9 / 10, "{}", cache.len());
        assert!(used < 44 << 20, "{used}");
    }
}
