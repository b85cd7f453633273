//! From a private copy to a verdict: cache, single flight, engines.
//!
//! Owns the verdict cache and the flights. A flight is one scan of one content under one
//! generation; whoever asks for the same content meanwhile waits for the same flight. What the engines
//! said so far, and what that means, is [`progress`]'s. A scan goes to the engines that are in use when it
//! begins, whichever come after. Only clean and infected are remembered, and only
//! under the generation whose engines really looked.
//!
//! ```text
//! lookup ──hit──► answer                      report ──► decided? ──yes──► cache, answer everyone who waits,
//!   │miss                                                  │no             cancel what still looks
//!   ▼                                                      ▼
//! flight there? ──yes──► wait with it                ask the next engine, or wait for the others
//!   │no
//!   ▼ seal the copy, ask the first engine, or all of them
//! ```
//!
//! Nothing here waits: engines report on their supervisors' threads, answers go to outboxes that
//! never block, and a thread of its own ends the wait of those whose time is over and cancels scans that
//! nobody waits for any more.

mod place;
mod progress;

pub use place::Archive;

use crate::config::{EngineConfig, ScanOrder};
use crate::copy::{Charge, PrivateCopy};
use crate::engines::{Refused, Running};
use crate::generation::{Generations, Loaded};
use crate::metrics::Metrics;
use crate::state::State;
use place::{Key, Place};
use progress::{Ended, Progress, Reported, Step};
use quick_cache::OptionsBuilder;
use quick_cache::sync::Cache;
use seawall_client::{Detection, EngineReport, Verdict};
use seawall_engine::content::SharedContent;
use seawall_engine::host::{Lane, ScanError, ScanId, ScanReport, Turn};
use seawall_engine::{Metadata, Outcome};
use seawall_proto::{ContentHash, Generation};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

/// Scans that wait for one engine.
pub const ENGINE_QUEUE: usize = 4096;
/// Of these, so many may be one guest's.
const GUEST_SCANS_MAX: u32 = ENGINE_QUEUE as u32 / 2;
/// Contents remembered that killed an engine.
const KILLERS: usize = 1024;
/// For how long. It may have been in work by chance when others killed the process.
const KILLER_FOR: Duration = Duration::from_secs(600);
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

/// A private copy; its part of the budget is held as long as this lives.
#[derive(Debug)]
pub struct Content {
    pub bytes: SharedContent,
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

/// Whoever waits for an answer.
pub trait Reply: Send {
    /// Takes it. Called at most once; never waits.
    fn answer(self: Box<Self>, answer: Answer);

    /// Whether nobody wants it any more.
    fn is_gone(&self) -> bool {
        false
    }
}

impl<F: FnOnce(Answer) + Send> Reply for F {
    fn answer(self: Box<Self>, answer: Answer) {
        self(answer);
    }
}

/// With whom verdicts are shared: all that have the same name, `None` for all that have none.
pub type Tenant = Option<Arc<str>>;

/// A content that is to be scanned, and for whom.
pub struct Request {
    pub hash: ContentHash,
    pub copy: PrivateCopy,
    pub meta: Metadata,
    pub tenant: Tenant,
    pub lane: Lane,
    /// How long the answer is waited for.
    pub until: Instant,
    pub reply: Box<dyn Reply>,
}

/// Who would wait for a scan that is under way.
pub struct Asker {
    pub tenant: Tenant,
    pub turn: Turn,
    pub until: Instant,
    pub reply: Box<dyn Reply>,
}

/// One configured engine, whichever process runs it.
pub struct EngineSlot {
    pub name: String,
    pub scan_timeout: Duration,
    /// Whether it may say that content is known to be good, which spares the engines after it.
    pub may_allow: bool,
    pub scans: AtomicU64,
    pub failures: AtomicU64,
    /// Processes lost by those that ran it before.
    pub restarts_before: AtomicU64,
    /// New signatures are being loaded.
    pub loading: AtomicBool,
    pub refused: Refused,
}

impl EngineSlot {
    /// As it is configured, with nothing counted.
    pub fn new(wanted: &EngineConfig) -> Self {
        Self::named(wanted.name.clone(), wanted.scan_timeout(), wanted.may_allow)
    }

    fn named(name: String, scan_timeout: Duration, may_allow: bool) -> Self {
        let (scans, failures, restarts_before, loading, refused) = Default::default();
        Self { name, scan_timeout, may_allow, scans, failures, restarts_before, loading, refused }
    }

    /// The same for other processes.
    fn like(&self) -> Self {
        Self::named(self.name.clone(), self.scan_timeout, self.may_allow)
    }
}

/// What runs the engines, in the configured order. A scan holds the ones that it began with.
pub type InUse = Arc<Vec<Arc<Running>>>;

pub struct Pipeline {
    engines: OnceLock<Vec<EngineSlot>>,
    in_use: RwLock<InUse>,
    order: ScanOrder,
    cache: Cache<Key, Known>,
    /// Contents that killed an engine twice.
    killers: Cache<(Key, usize), Instant>,
    flights: Mutex<Flights>,
    pub generations: Generations,
    state: State,
    metrics: Arc<Metrics>,
}

/// A remembered verdict: nothing was found, or these.
pub type Known = Option<Arc<Vec<Detection>>>;

#[derive(Default)]
struct Flights {
    by_content: HashMap<Key, Flight>,
    next_id: u64,
}

struct Flight {
    /// Tells this flight from a later one of the same content.
    id: u64,
    waiters: Vec<Waiter>,
    /// When those who wait would have it by themselves, each once. In the first it is queued; it comes in whichever is
    /// sooner.
    turns: Vec<Turn>,
    /// There once the copy is sealed.
    scan: Option<Arc<Scan>>,
}

struct Waiter {
    until: Instant,
    reply: Box<dyn Reply>,
}

/// What the engines get.
struct Scan {
    key: Key,
    flight: u64,
    turn: Turn,
    content: Arc<Content>,
    named: Named,
    engines: InUse,
    progress: Mutex<Progress>,
}

impl Drop for Scan {
    fn drop(&mut self) {
        self.content.charge.share().scans.fetch_sub(1, Relaxed);
    }
}

impl Scan {
    /// These need not look any more.
    fn cancel(&self, scans: Vec<(usize, ScanId)>) {
        for (number, id) in scans {
            self.engines[number].handle.cancel(id);
        }
    }

    /// Somebody waits for it, too, who would have it in this turn.
    fn hasten(&self, turn: Turn) {
        let asked = self.progress().asked_now();
        for (number, id) in asked {
            self.engines[number].handle.hasten(id, turn);
        }
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the engines are told of the file, and whether the verdict is for that name alone.
struct Named {
    meta: Metadata,
    by_name: bool,
    /// Where the verdict on an archive is kept into which nobody looked, when this one is looked into.
    closed: Option<ContentHash>,
}

fn cache_of(entries: u64) -> Cache<Key, Known> {
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
        order: ScanOrder,
        state: State,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        Arc::new(Self {
            engines: OnceLock::new(),
            in_use: RwLock::default(),
            order,
            cache: cache_of(cache_entries),
            killers: Cache::new(KILLERS),
            flights: Mutex::default(),
            generations,
            state,
            metrics,
        })
    }

    /// Gives the pipeline its engines, once.
    pub fn set_engines(&self, engines: Vec<EngineSlot>, running: Vec<Arc<Running>>) {
        assert!(self.engines.set(engines).is_ok(), "engines are set once, at the start");
        *self.in_use.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(running);
    }

    pub fn engines(&self) -> &[EngineSlot] {
        self.engines.get().map_or(&[], Vec::as_slice)
    }

    /// What runs the engines now.
    pub fn in_use(&self) -> InUse {
        Arc::clone(&self.in_use.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Has these run their engines from now on, all at once. Scans that are under way stay where they are.
    pub fn take_into_use(&self, new: &[(usize, Arc<Running>)]) {
        let mut in_use = self.in_use.write().unwrap_or_else(PoisonError::into_inner);
        let mut changed = in_use.to_vec();
        for (number, running) in new {
            changed[*number] = Arc::clone(running);
        }
        *in_use = Arc::new(changed);
    }

    /// A pipeline that does as this one with these engines, remembers nothing, and counts nothing here.
    pub fn trial(&self, engines: Vec<(usize, Arc<Running>)>) -> Arc<Self> {
        let (numbers, running): (Vec<_>, Vec<_>) = engines.into_iter().unzip();
        let slots = numbers.iter().map(|number| &self.engines()[*number]);
        let slots: Vec<_> = slots.map(EngineSlot::like).collect();
        let may_allow = slots.iter().map(|slot| slot.may_allow).collect();
        let generations = Generations::new(0, may_allow);
        for (number, running) in running.iter().enumerate() {
            if let Some(loaded) = running.loaded() {
                generations.engine_has(number, loaded);
            }
        }
        let metrics = Arc::<Metrics>::default();
        let trial = Self::new(generations, KILLERS as u64, self.order, State::nowhere(), metrics);
        trial.set_engines(slots, running);
        trial
    }

    pub fn cached_verdicts(&self) -> u64 {
        self.cache.len() as u64
    }

    /// An engine takes scans with these signatures. Gives the new generation when that is news;
    /// no verdict of an earlier one is asked for again.
    pub fn engine_has(&self, engine: usize, loaded: Loaded) -> Option<Generation> {
        let new = self.generations.engine_has(engine, loaded)?;
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

    /// The verdict, if it is known to this tenant.
    pub fn lookup(
        &self,
        hash: ContentHash,
        archive: Archive,
        meta: &Metadata,
        tenant: &Tenant,
    ) -> Option<Answer> {
        let (hash, generation) = Place::of(&self.generations, hash, archive, meta, tenant).key;
        let answer = self.known(hash, generation)?;
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

    /// Joins a scan of a content that is under way.
    ///
    /// # Errors
    /// There is none; gives the asker back.
    pub fn join(
        self: &Arc<Self>,
        hash: ContentHash,
        archive: Archive,
        meta: &Metadata,
        asker: Asker,
    ) -> Result<(), Asker> {
        let key = Place::of(&self.generations, hash, archive, meta, &asker.tenant).key;
        let mut flights = self.flights();
        let Some(flight) = flights.by_content.get_mut(&key) else { return Err(asker) };
        let Asker { turn, until, reply, .. } = asker;
        let scan = flight.wait_with(turn, Waiter { until, reply });
        drop(flights);
        self.joined(scan, turn);
        Ok(())
    }

    fn joined(&self, hasten: Option<Arc<Scan>>, turn: Turn) {
        self.metrics.joined.fetch_add(1, Relaxed);
        if let Some(scan) = hasten {
            scan.hasten(turn);
        }
    }

    /// Has a content scanned, or joins a scan of it that is under way. Replies exactly once, unless whoever
    /// asked is gone.
    pub fn scan(self: &Arc<Self>, request: Request) {
        let Request { hash, copy, mut meta, tenant, lane, until, reply } = request;
        let archive = Archive::of(&copy, meta.archives.is_some());
        let Place { key, by_name, closed } =
            Place::of(&self.generations, hash, archive, &meta, &tenant);
        let closed = (archive == Archive::Opened).then_some(closed);
        let (hash, generation) = key;
        if !by_name {
            // The verdict is remembered for the content, whatever any guest calls it: no engine may be
            // moved by a name that a guest made up.
            meta.path = Vec::new();
            meta.guest = String::new();
        }
        let turn = Turn { lane, client: copy.share().client };
        let id = {
            let mut flights = self.flights();
            let id = flights.next_id;
            match flights.by_content.entry(key) {
                Entry::Occupied(mut entry) => {
                    let scan = entry.get_mut().wait_with(turn, Waiter { until, reply });
                    drop(flights);
                    return self.joined(scan, turn);
                }
                Entry::Vacant(entry) => {
                    // It may have landed since the lookup.
                    if let Some(answer) = self.known(hash, generation) {
                        drop(flights);
                        self.metrics.cache_hits.fetch_add(1, Relaxed);
                        reply.answer(answer);
                        return;
                    }
                    if copy.share().scans.load(Relaxed) >= GUEST_SCANS_MAX {
                        drop(flights);
                        let why = "this guest fills its half of the engine's queue";
                        reply.answer(Answer::new(Finding::Error(why.into()), generation));
                        return;
                    }
                    let waiters = vec![Waiter { until, reply }];
                    entry.insert(Flight { id, waiters, turns: vec![turn], scan: None });
                    flights.next_id += 1;
                    id
                }
            }
        };
        self.take_off((key, id), turn, copy, Named { meta, by_name, closed });
    }

    fn take_off(
        self: &Arc<Self>,
        (key, flight): (Key, u64),
        turn: Turn,
        copy: PrivateCopy,
        named: Named,
    ) {
        let content = match Content::seal(copy) {
            Ok(sealed) => sealed,
            Err(error) => {
                let why = format!("the private copy cannot be sealed: {error}");
                self.land(key, flight, Answer::new(Finding::Error(why), key.1));
                return;
            }
        };
        content.charge.share().scans.fetch_add(1, Relaxed);
        let progress = Mutex::new(Progress::new(self.engines().len()));
        let engines = self.in_use();
        let scan = Arc::new(Scan { key, flight, turn, content, named, engines, progress });
        {
            let mut flights = self.flights();
            // It may have been given up meanwhile.
            let Some(flight) = flights.of(&scan) else { return };
            flight.scan = Some(Arc::clone(&scan));
        }
        self.metrics.scans.fetch_add(1, Relaxed);
        self.go_on(&scan);
    }

    /// Asks engines as far as the order goes now, or ends the flight.
    fn go_on(self: &Arc<Self>, scan: &Arc<Scan>) {
        loop {
            let may_allow = |number: usize| self.engines()[number].may_allow;
            let step = scan.progress().next(self.order, may_allow);
            match step {
                Step::Ask(number) if self.is_killer(number, scan) => self.spare(number, scan),
                Step::Ask(number) => self.ask(number, scan),
                Step::Wait => return,
                Step::End(end) => return self.conclude(scan, end),
            }
        }
    }

    /// Whether this content has killed this engine, with the signatures of that generation.
    fn is_killer(&self, number: usize, scan: &Scan) -> bool {
        let killed = self.killers.get(&(scan.key, number));
        killed.is_some_and(|at| at.elapsed() < KILLER_FOR)
    }

    /// Content that killed an engine twice is not fed to it a third time, for a while.
    fn spare(&self, number: usize, scan: &Scan) {
        let engine = &self.engines()[number];
        let report = ScanReport {
            result: Err(ScanError::KilledTwice),
            generation: None,
            queued: Duration::ZERO,
            scanned: Duration::ZERO,
        };
        let (reported, _) = reported_by(engine, &report);
        scan.progress().reported(number, reported, None);
    }

    fn ask(self: &Arc<Self>, number: usize, scan: &Arc<Scan>) {
        let engine = &self.engines()[number];
        engine.scans.fetch_add(1, Relaxed);
        let (pipeline, scan_again) = (Arc::clone(self), Arc::clone(scan));
        let reply = move |report: ScanReport| pipeline.reported(number, &scan_again, report);
        let handle = &scan.engines[number].handle;
        let id = handle.scan(
            scan.content.bytes.clone(),
            scan.named.meta.clone(),
            scan.turn,
            engine.scan_timeout,
            reply,
        );
        let Some(id) = id else { return };
        let is_late = scan.progress().asked(number, id);
        if is_late {
            return handle.cancel(id);
        }
        // Whoever joins from here on finds that it is asked.
        let turns = self.flights().of(scan).map(|flight| flight.turns[1..].to_vec());
        turns.into_iter().flatten().for_each(|turn| handle.hasten(id, turn));
    }

    fn reported(self: &Arc<Self>, number: usize, scan: &Arc<Scan>, report: ScanReport) {
        let engine = &self.engines()[number];
        if report.result == Err(ScanError::Cancelled) {
            return;
        }
        if report.result == Err(ScanError::KilledTwice) {
            self.killers.insert((scan.key, number), Instant::now());
        }
        let (reported, failed) = reported_by(engine, &report);
        if failed {
            engine.failures.fetch_add(1, Relaxed);
        }
        let counts = scan.progress().reported(number, reported, report.generation);
        if counts {
            self.go_on(scan);
        }
    }

    /// Ends the scan for its engines; nothing comes of it.
    fn stop(scan: &Scan) {
        let cancel = scan.progress().stop();
        scan.cancel(cancel);
    }

    /// Remembers what the engines found, under the generation that really looked, and answers.
    fn conclude(&self, scan: &Arc<Scan>, end: Ended) {
        let Ended { finding, cancel, reports, used } = end;
        scan.cancel(cancel);
        let generation = self.generations.of(&used);
        // Between the question and the report another set may have come, which looks at names or does not.
        let by_name = scan.named.by_name;
        let generation = generation.filter(|one| self.generations.is_by_name(*one) == by_name);
        let known = match &finding {
            Finding::Clean => Some(None),
            Finding::Infected(found) => Some(Some(Arc::clone(found))),
            _ => None,
        };
        let found = known.zip(generation);
        // What was found in an archive meanwhile by a scan that looked into it is not forgotten for one that did not.
        let found = found.filter(|(known, generation)| {
            let before = self.cache.peek(&(scan.key.0, *generation));
            known.is_some() || !matches!(before, Some(Some(_)))
        });
        if let Some((known, generation)) = &found {
            self.cache.insert((scan.key.0, *generation), known.clone());
        }
        // Generation 0 is older than every other: a driver remembers nothing of it.
        let generation = generation.unwrap_or_default();
        let content = match &finding {
            Finding::Infected(_) => Some(Arc::clone(&scan.content)),
            _ => None,
        };
        let answer =
            Answer { engines: reports.into(), content, ..Answer::new(finding, generation) };
        self.land(scan.key, scan.flight, answer);
        let Some((known, generation)) = found else { return };
        // What lies in an archive is known from then on, also where nobody would look into it.
        let closed = scan.named.closed.filter(|_| known.is_some());
        if let Some(closed) = closed {
            self.cache.insert((closed, generation), known.clone());
        }
        if let Some(set) = self.generations.set_of(generation) {
            for hash in [Some(scan.key.0), closed].into_iter().flatten() {
                self.state.keep(set, hash, known.clone());
            }
        }
    }

    fn land(&self, key: Key, id: u64, answer: Answer) {
        let flight = match self.flights().by_content.entry(key) {
            Entry::Occupied(entry) if entry.get().id == id => entry.remove(),
            _ => return,
        };
        for waiter in flight.waiters {
            // Whoever cannot take it must not keep it from the others.
            let told = AssertUnwindSafe(|| waiter.reply.answer(answer.clone()));
            if catch_unwind(told).is_err() {
                tracing::error!("the receiver of a verdict panicked");
            }
        }
    }

    /// Ends the wait of those whose time is over, for as long as the service lives. The scan goes
    /// on: its verdict is remembered. Where all who asked are gone, nobody wants it.
    pub fn sweep(&self) {
        loop {
            std::thread::sleep(SWEEP);
            let now = Instant::now();
            let (mut late, mut unwanted) = (Vec::new(), Vec::new());
            self.flights().by_content.retain(|_, flight| {
                late.extend(flight.waiters.extract_if(.., |waiter| waiter.until <= now));
                let gone = flight.waiters.extract_if(.., |waiter| waiter.reply.is_gone()).count();
                let is_wanted = gone == 0 || !flight.waiters.is_empty();
                if !is_wanted {
                    unwanted.extend(flight.scan.take());
                }
                is_wanted
            });
            unwanted.iter().for_each(|scan| Self::stop(scan));
            for waiter in late {
                waiter.reply.answer(Answer::new(
                    Finding::TimedOut("the scan is not done in time".into()),
                    self.generations.current(),
                ));
            }
        }
    }
}

impl Flights {
    /// The flight of a scan, unless it has landed.
    fn of(&mut self, scan: &Scan) -> Option<&mut Flight> {
        self.by_content.get_mut(&scan.key).filter(|flight| flight.id == scan.flight)
    }
}

impl Flight {
    /// One more waits. Gives what is to be hastened for it; a scan that has not begun will be.
    fn wait_with(&mut self, turn: Turn, waiter: Waiter) -> Option<Arc<Scan>> {
        self.waiters.push(waiter);
        if self.turns.contains(&turn) {
            return None;
        }
        self.turns.push(turn);
        self.scan.clone()
    }
}

/// What an engine's report means, and whether it failed.
fn reported_by(engine: &EngineSlot, report: &ScanReport) -> (Reported, bool) {
    let name = engine.name.as_str();
    let (finding, allowed) = match &report.result {
        Ok(Outcome::Clean) => (Finding::Clean, None),
        Ok(Outcome::Allowed { name }) if engine.may_allow => (Finding::Clean, Some(name.clone())),
        // Whoever took an engine over must not speak for the others.
        Ok(Outcome::Allowed { .. }) => (Finding::Clean, None),
        Ok(Outcome::Infected(found)) => {
            let found = found.iter().map(|detection| Detection {
                name: detection.name.clone(),
                severity: detection.severity.to_string(),
                family: detection.family.clone(),
                cleaning: detection.cleaning.map(|cleaning| cleaning.to_string()),
                engine: name.to_owned(),
                member: detection.member.as_deref().map(shown),
            });
            (Finding::Infected(Arc::new(found.collect())), None)
        }
        Err(error @ (ScanError::TimedOut | ScanError::TimedOutIn { .. })) => {
            (Finding::TimedOut(format!("engine {name}: {error}")), None)
        }
        Err(error) => (Finding::Error(format!("engine {name}: {error}")), None),
    };
    let reason = match &finding {
        Finding::Error(why) | Finding::TimedOut(why) => Some(why.clone()),
        _ => None,
    };
    let failed = reason.is_some();
    let told = EngineReport {
        engine: name.to_owned(),
        verdict: finding.verdict(),
        detections: match &finding {
            Finding::Infected(found) => found.to_vec(),
            _ => Vec::new(),
        },
        allowed,
        reason,
        queued_us: micros(report.queued),
        scanned_us: micros(report.scanned),
    };
    (Reported { finding, told }, failed)
}

/// A member's name as whoever made the archive chose it, and as an engine told it: nothing that a terminal obeys.
fn shown(member: &str) -> String {
    member.replace(char::is_control, "\u{fffd}")
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
