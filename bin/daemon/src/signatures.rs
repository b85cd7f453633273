//! Signature sets: from a folder to what all engines use, checked before, and back.
//!
//! One thread makes all changes, one after the other; whoever wants one leaves an order and waits.
//!
//! ```text
//!  folder ──► set on disk ──► new engines beside the old ──► trial ──► book ──► in use, all at once
//!              (copied)         (strict: no error)             │                   │
//!                                                              ▼                   ▼
//!                                                           refused: the      the old ones: stand by for
//!                                                           old set stays     a while, or end with their
//!                                                                             last scan
//! ```
//!
//! What is on disk is [`set`]'s, what is remembered [`book`]'s, what a set must show [`trial`]'s, and the end of
//! old engines [`retired`]'s.

pub mod book;
mod reload;
mod retired;
pub mod set;
mod trial;
mod watch;

use crate::config::EngineConfig;
use crate::engines::{Origin, Running, Trust, lines};
use crate::events::now;
use crate::host::Host;
use book::{Book, Seen};
use retired::Retired;
use seawall_client::{
    ChangeKind, Event, EventKind, ReloadedEngine, SetEngine, SignatureChange, SignatureSet,
};
use seawall_engine::host::EngineState;
use set::{Gathered, Manifest, SetError, Store};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use watch::Watch;

/// Orders that wait.
const ORDERS: usize = 32;
/// How often the thread looks what became due.
const TICK: Duration = Duration::from_millis(500);
/// A process that loads is given up so long after its own limit.
const GRACE: Duration = Duration::from_secs(10);
/// Codes of diagnostics that say nothing about the signatures: it was slow, died, or could not be started.
const PASSES: [&str; 3] = ["engine-slow", "engine-start", "engine-spawn"];
/// Diagnostics of an engine that are kept in the history.
const MOST_DIAGNOSTICS: usize = 50;

/// Gets the end of a change.
type Told = Box<dyn FnOnce(SignatureChange) + Send>;

/// What the thread is asked to do.
enum Order {
    Apply { folder: PathBuf, check: bool, told: Told },
    Rollback { set: Option<String>, told: Told },
    Reload { told: Box<dyn FnOnce(Vec<ReloadedEngine>) + Send> },
}

/// Why an order was not taken.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("too many changes of signatures wait already; try again when they are done")]
pub struct Busy;

/// What the service knows of its signature sets.
pub struct Signatures {
    store: Store,
    book: Mutex<Book>,
    /// The set in use.
    current: Mutex<Option<Arc<Manifest>>>,
    /// What is being loaded and tried, for people.
    loading: Mutex<Option<String>>,
    /// Why the last new set was refused.
    refused: Mutex<Option<String>>,
    /// The set whose engines stand by.
    standby: Mutex<Option<String>>,
    orders: SyncSender<Order>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The thread's part.
pub struct Keeper {
    orders: Receiver<Order>,
    watch: Watch,
    retired: Retired,
}

/// An engine with the new set.
struct Candidate {
    number: usize,
    running: Arc<Running>,
    /// It has the same files as the engine that is in use, which has failed.
    is_same: bool,
}

/// Why a set is not taken.
#[derive(Debug)]
enum Failure {
    /// It is wrong, and will be the next time.
    Set(String),
    /// It may be right: a full disk, a crash, an engine that is too busy.
    Circumstances(String),
}

/// What is to become of a set.
struct Wish {
    kind: ChangeKind,
    set: Arc<Manifest>,
    seen: Option<Seen>,
    /// The kept set that it stands for, with what others had for the engines that it left out.
    completes: Option<String>,
}

impl Signatures {
    /// Opens what is kept in `folder`. Where no set is in use yet, the watched folders make the first one.
    pub fn open(
        folder: &Path,
        engines: &[EngineConfig],
        watched: &[PathBuf],
    ) -> Result<(Self, Keeper), SetError> {
        let store = Store::open(folder)?;
        let mut book = Book::open(folder);
        if book.is_empty() {
            // New, or set aside because it was damaged: what is on the disk is better than nothing.
            for set in store.all() {
                let change = SignatureChange {
                    engines: engines.iter().filter_map(|one| part(&set, &one.name)).collect(),
                    taken: true,
                    ..change(ChangeKind::First, Some(&set))
                };
                book.take(&set.id, &change, usize::MAX);
            }
        }
        let mut current = book.in_use.clone().and_then(|id| store.read(&id).ok());
        if current.is_none() && book.in_use.is_some() {
            tracing::error!(
                set = book.in_use,
                "the signature set in use is lost; an earlier one is used"
            );
            let earlier = book.kept.iter().rev().filter(|one| !one.undone);
            current = earlier.filter_map(|one| store.read(&one.set).ok()).next();
            book.in_use = current.as_ref().map(|set| set.id.clone());
        }
        if current.is_none() && engines.iter().any(|engine| !engine.signatures.is_nothing()) {
            current = Self::first(&store, &mut book, engines, watched);
        }
        let kept: Vec<_> = book.kept.iter().map(|one| one.set.clone()).collect();
        store.keep_only(&kept);
        let (orders, waiting) = sync_channel(ORDERS);
        let (loading, refused, standby) = Default::default();
        let current = Mutex::new(current.map(Arc::new));
        let all =
            Self { store, book: Mutex::new(book), current, loading, refused, standby, orders };
        let (watch, retired) = Default::default();
        let keeper = Keeper { orders: waiting, watch, retired };
        Ok((all, keeper))
    }

    /// The first set is used with whatever of it loads: there is nothing better.
    fn first(
        store: &Store,
        book: &mut Book,
        engines: &[EngineConfig],
        watched: &[PathBuf],
    ) -> Option<Manifest> {
        let began = Instant::now();
        let there = watch::that_are_there(watched);
        let stamp = watch::stamp(&there);
        let gathered = store.gather(&there, engines, None);
        let Gathered { set, source, left_out, left_out_count } = match gathered {
            Ok(gathered) => gathered,
            Err(error) => {
                tracing::warn!("there are no signatures yet: {error}");
                return None;
            }
        };
        let mut change = change(ChangeKind::First, Some(&set));
        (change.left_out, change.left_out_count) = (left_out, left_out_count as u64);
        (change.taken, change.took_ms) = (true, millis(began));
        change.engines = engines.iter().filter_map(|one| part(&set, &one.name)).collect();
        book.seen = stamp.map(|stamp| Seen { stamp, source, takers: watch::takers(engines) });
        book.take(&set.id, &change, usize::MAX);
        book.note(change);
        if let Err(error) = book.save() {
            tracing::warn!(%error, "what signatures are in use cannot be written down");
        }
        Some(set)
    }

    /// The part of the set in use that an engine gets. `None` where it takes nothing of any.
    pub fn origin(&self, engine: &EngineConfig) -> Option<Origin> {
        if engine.signatures.is_nothing() {
            return None;
        }
        let set = lock(&self.current).clone();
        // A folder that is not there: the engine says so, and runs as soon as there is a set.
        let set = set.unwrap_or_else(|| Arc::new(Manifest::nothing()));
        Some(self.origin_in(&set, &engine.name))
    }

    fn origin_in(&self, set: &Arc<Manifest>, engine: &str) -> Origin {
        let folder = self.store.folder(&set.id, engine);
        Origin { set: Arc::clone(set), folder, engine: engine.to_owned() }
    }

    /// Has a folder become the set in use, or tells what would become of it. `told` is called at the end, on
    /// the thread that makes changes.
    ///
    /// # Errors
    /// [`Busy`].
    pub fn apply(
        &self,
        folder: PathBuf,
        check: bool,
        told: impl FnOnce(SignatureChange) + Send + 'static,
    ) -> Result<(), Busy> {
        self.order(Order::Apply { folder, check, told: Box::new(told) })
    }

    /// Goes back to an earlier set: to this one, or to that before.
    ///
    /// # Errors
    /// [`Busy`].
    pub fn rollback(
        &self,
        set: Option<String>,
        told: impl FnOnce(SignatureChange) + Send + 'static,
    ) -> Result<(), Busy> {
        self.order(Order::Rollback { set, told: Box::new(told) })
    }

    /// Looks into the watched folders now, and has engines with signatures of their own load these again.
    ///
    /// # Errors
    /// [`Busy`].
    pub fn reload(
        &self,
        told: impl FnOnce(Vec<ReloadedEngine>) + Send + 'static,
    ) -> Result<(), Busy> {
        self.order(Order::Reload { told: Box::new(told) })
    }

    fn order(&self, order: Order) -> Result<(), Busy> {
        self.orders.try_send(order).map_err(|_| Busy)
    }

    /// The set that engines use. The book names it a moment before, so that a restart finds it.
    fn in_use(&self) -> Option<String> {
        lock(&self.current).as_ref().map(|set| set.id.clone())
    }

    /// As `status` tells it.
    pub fn report(&self) -> seawall_client::Signatures {
        seawall_client::Signatures {
            set: self.in_use(),
            refused: lock(&self.refused).clone(),
            loading: lock(&self.loading).clone(),
        }
    }

    /// Whether the set in use has files for the engine.
    pub fn has_files_for(&self, engine: &str) -> bool {
        lock(&self.current).as_ref().is_some_and(|set| !set.files(engine).is_empty())
    }

    /// The sets that are kept, the newest last.
    pub fn list(&self) -> Vec<SignatureSet> {
        let (in_use, standby) = (self.in_use(), lock(&self.standby).clone());
        let book = lock(&self.book);
        let sets = book.kept.iter().map(|one| SignatureSet {
            set: one.set.clone(),
            in_use: Some(&one.set) == in_use.as_ref(),
            standby: Some(&one.set) == standby.as_ref(),
            taken: one.taken.clone(),
            from: one.change.from.clone(),
            engines: one.change.engines.clone(),
        });
        sets.collect()
    }

    /// All changes, and tries, that are remembered, the newest last.
    pub fn history(&self) -> Vec<SignatureChange> {
        lock(&self.book).history.clone()
    }
}

impl Keeper {
    /// Makes changes for as long as the service lives.
    pub fn run(mut self, host: &Arc<Host>) {
        self.watch.begin(&lock(&host.signatures.book).seen, &host.first_config.engines.0);
        // What changed while no service ran is there as a whole, most likely.
        self.look(host, true);
        loop {
            match self.orders.recv_timeout(TICK) {
                Ok(Order::Apply { folder, check, told }) => {
                    let kind = if check { ChangeKind::Check } else { ChangeKind::Apply };
                    let change = self.apply(host, kind, &[folder]);
                    self.end_old(host);
                    told(change);
                }
                Ok(Order::Rollback { set, told }) => {
                    let change = self.rollback(host, set.as_deref());
                    self.end_old(host);
                    told(change);
                }
                Ok(Order::Reload { told }) => told(self.reload(host)),
                Err(RecvTimeoutError::Timeout) => {
                    if self.watch.is_due() {
                        self.look(host, false);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.end_old(host);
        }
    }

    /// On this thread: ending an engine may take a moment.
    fn end_old(&mut self, host: &Host) {
        if self.retired.tidy(host.config().signatures.standby()) {
            self.tidy(host);
        }
        *lock(&host.signatures.standby) = self.retired.set().map(str::to_owned);
    }

    /// Looks whether the watched folders became another set.
    fn look(&mut self, host: &Arc<Host>, at_once: bool) {
        let config = host.config();
        let watched: Vec<_> =
            config.signatures.watch.iter().map(|path| path.as_path().to_owned()).collect();
        let there = watch::that_are_there(&watched);
        let Some(stamp) = self.watch.look(&there, at_once) else { return };
        let engines = &host.first_config.engines.0;
        let began = Instant::now();
        let base = lock(&host.signatures.current).clone();
        // A file system that is not mounted must not make the set smaller.
        let was_there = |path: &Path| {
            let name = path.display().to_string();
            base.as_ref().is_some_and(|base| base.from.contains(&name))
        };
        if let Some(gone) = watched.iter().find(|path| was_there(path) && !there.contains(path)) {
            let why = format!(
                "{} is not there and was part of the set in use; take it out of `watch`, or bring it back",
                gone.display()
            );
            return self.look_again(host, &there, began, why);
        }
        let gathered = match host.signatures.store.gather(&there, engines, base.as_deref()) {
            Ok(gathered) => gathered,
            Err(SetError::Empty { .. } | SetError::NoTaker) => return,
            Err(error) => {
                // Most often somebody is still writing.
                return self.look_again(host, &there, began, error.to_string());
            }
        };
        let seen = Seen { stamp, source: gathered.source.clone(), takers: watch::takers(engines) };
        let (known, was_undone) = {
            let book = lock(&host.signatures.book);
            let undone = book.kept.iter().any(|one| one.undone && one.set == gathered.set.id);
            (book.seen.clone(), undone)
        };
        let is_known =
            known.is_some_and(|known| known.source == seen.source && known.takers == seen.takers);
        if was_undone {
            let set = &gathered.set.id;
            tracing::info!(
                set,
                "the watched folders hold a set that was rolled back; it is left alone"
            );
        }
        if is_known || was_undone {
            // Touched, or what was refused or rolled back before.
            let mut book = lock(&host.signatures.book);
            book.seen = Some(seen);
            let _next_time = book.save();
            drop(book);
            self.tidy(host);
            return;
        }
        self.make(host, ChangeKind::Watch, gathered, Some(seen), began);
    }

    /// The watched folders make no set for a reason that may pass.
    fn look_again(&mut self, host: &Host, there: &[PathBuf], began: Instant, why: String) {
        self.watch.again();
        let mut change = change(ChangeKind::Watch, None);
        change.from = there.iter().map(|path| path.display().to_string()).collect();
        self.refuse(host, change, began, why);
    }

    fn apply(&mut self, host: &Arc<Host>, kind: ChangeKind, from: &[PathBuf]) -> SignatureChange {
        let began = Instant::now();
        let base = lock(&host.signatures.current).clone();
        let engines = &host.first_config.engines.0;
        match host.signatures.store.gather(from, engines, base.as_deref()) {
            Ok(gathered) => self.make(host, kind, gathered, None, began),
            Err(error) => {
                let mut change = change(kind, None);
                change.from = from.iter().map(|path| path.display().to_string()).collect();
                self.refuse(host, change, began, error.to_string())
            }
        }
    }

    fn rollback(&mut self, host: &Arc<Host>, set: Option<&str>) -> SignatureChange {
        let began = Instant::now();
        let mut change = change(ChangeKind::Rollback, None);
        let wanted = {
            let book = lock(&host.signatures.book);
            match set {
                Some(digits) => {
                    let found = book.find(digits).map(str::to_owned);
                    found.ok_or_else(|| SetError::Unknown(digits.to_owned()))
                }
                None => book.before().map(str::to_owned).ok_or(SetError::NoEarlier),
            }
        };
        let read = wanted.and_then(|id| {
            let set = host.signatures.store.read(&id)?;
            let current = lock(&host.signatures.current).clone();
            let complete = host.signatures.store.complete(set, current.as_deref())?;
            let completes = (complete.id != id).then_some(id);
            Ok((complete, completes))
        });
        let read = read.map_err(|error| error.to_string());
        match read {
            Ok((set, completes)) => {
                change.set = Some(set.id.clone());
                change.from.clone_from(&set.from);
                let (kind, set) = (ChangeKind::Rollback, Arc::new(set));
                let wish = Wish { kind, set, seen: None, completes };
                self.take(host, &wish, change, began)
            }
            Err(why) => self.refuse(host, change, began, why),
        }
    }

    fn make(
        &mut self,
        host: &Arc<Host>,
        kind: ChangeKind,
        gathered: Gathered,
        seen: Option<Seen>,
        began: Instant,
    ) -> SignatureChange {
        let Gathered { set, left_out, left_out_count, .. } = gathered;
        let mut change = change(kind, Some(&set));
        (change.left_out, change.left_out_count) = (left_out, left_out_count as u64);
        let wish = Wish { kind, set: Arc::new(set), seen, completes: None };
        self.take(host, &wish, change, began)
    }

    /// Loads a set, tries it, and takes it into use.
    fn take(
        &mut self,
        host: &Arc<Host>,
        wish: &Wish,
        mut change: SignatureChange,
        began: Instant,
    ) -> SignatureChange {
        let signatures = &host.signatures;
        *lock(&signatures.loading) = Some(change.from.join(", "));
        let loaded = self.load(host, &wish.set, &mut change);
        let tried = loaded.and_then(|candidates| {
            if wish.kind == ChangeKind::Rollback {
                // It has shown what it can.
                return Ok((candidates, trial::Tried::default()));
            }
            let tried = try_out(host, &candidates);
            match tried {
                Ok(tried) => Ok((candidates, tried)),
                Err(why) => {
                    self.retired.end(candidates.into_iter().map(|one| one.running));
                    Err(why)
                }
            }
        });
        let ended = tried.and_then(|(candidates, tried)| {
            (change.known_bad, change.known_good) = (tried.known_bad, tried.known_good);
            if wish.kind == ChangeKind::Check {
                self.retired.end(candidates.into_iter().map(|one| one.running));
                return Ok(());
            }
            self.commit(host, wish, candidates, &mut change, began)
        });
        *lock(&signatures.loading) = None;
        for engine in host.pipeline.engines() {
            engine.loading.store(false, Relaxed);
        }
        if let Err(failure) = ended {
            let why = match failure {
                Failure::Set(why) => {
                    if let Some(seen) = &wish.seen {
                        // Not tried again before it is another.
                        let mut book = lock(&signatures.book);
                        book.seen = Some(seen.clone());
                        let _next_time = book.save();
                    }
                    why
                }
                Failure::Circumstances(why) => {
                    if wish.kind == ChangeKind::Watch {
                        self.watch.again();
                    }
                    why
                }
            };
            let change = self.refuse(host, change, began, why);
            self.tidy(host);
            return change;
        }
        if wish.kind == ChangeKind::Watch {
            self.watch.done();
        }
        change.taken = true;
        change.took_ms = millis(began);
        self.tidy(host);
        change
    }

    /// Starts the engines that the set changes, and waits until all of them are ready.
    fn load(
        &mut self,
        host: &Arc<Host>,
        set: &Arc<Manifest>,
        change: &mut SignatureChange,
    ) -> Result<Vec<Candidate>, Failure> {
        let current = lock(&host.signatures.current).clone();
        let in_use = host.pipeline.in_use();
        let mut candidates = Vec::new();
        let mut failure = None;
        let began = Instant::now();
        for (number, wanted) in host.first_config.engines.0.iter().enumerate() {
            let Some(mut part) = part(set, &wanted.name) else { continue };
            let is_same =
                current.as_ref().is_some_and(|current| set.is_same_for(&wanted.name, current));
            let state = in_use[number].handle.state();
            // One that loads or restarts gets there by itself.
            let has_failed = matches!(state, EngineState::Failed { .. });
            part.changed = !is_same || has_failed && part.files > 0;
            part.rules = in_use[number].description().map(|description| description.rules);
            if part.changed {
                part.rules = None;
                host.pipeline.engines()[number].loading.store(true, Relaxed);
                match self.begin(host, number, wanted, set) {
                    Ok(running) => candidates.push(Candidate { number, running, is_same }),
                    Err(error) => {
                        let why = format!("engine {}: {error}", wanted.name);
                        failure = failure.or(Some(Failure::Circumstances(why)));
                    }
                }
            }
            change.engines.push(part);
        }
        let mut lame = Vec::new();
        for candidate in &candidates {
            let wanted = &host.first_config.engines.0[candidate.number];
            let waited = candidate.running.wait(wanted.load_timeout() + GRACE);
            let Some(part) = change.engines.iter_mut().find(|part| part.engine == wanted.name)
            else {
                continue;
            };
            part.load_ms = Some(millis(began));
            match waited {
                Ok(description) => {
                    part.rules = Some(description.rules);
                    part.resident_bytes =
                        candidate.running.resources().map(|used| used.resident_kib << 10);
                    part.diagnostics = candidate.running.tell(&description.diagnostics);
                }
                Err(diagnostics) => {
                    let why = format!("engine {}: {}", wanted.name, lines(&diagnostics));
                    let passes = diagnostics.iter().any(|one| PASSES.contains(&one.code.as_str()));
                    if candidate.is_same {
                        // It could not run before: no reason against the signatures of another.
                        lame.push(candidate.number);
                    } else if passes {
                        failure = failure.or(Some(Failure::Circumstances(why)));
                    } else {
                        failure = Some(Failure::Set(why));
                    }
                    part.diagnostics = diagnostics;
                }
            }
            part.diagnostics.truncate(MOST_DIAGNOSTICS);
        }
        let (lame, candidates): (Vec<_>, Vec<_>) =
            candidates.into_iter().partition(|one| lame.contains(&one.number));
        self.retired.end(lame.into_iter().map(|one| one.running));
        match failure {
            None => Ok(candidates),
            Some(why) => {
                self.retired.end(candidates.into_iter().map(|one| one.running));
                Err(why)
            }
        }
    }

    /// An engine with the set: one that stands by, or a new one.
    fn begin(
        &mut self,
        host: &Arc<Host>,
        number: usize,
        wanted: &EngineConfig,
        set: &Arc<Manifest>,
    ) -> std::io::Result<Arc<Running>> {
        match self.retired.with(set, number, &wanted.name) {
            Some(running) => Ok(running),
            None => {
                self.retired.make_room(number);
                let origin = host.signatures.origin_in(set, &wanted.name);
                Running::start(host, number, wanted, Some(origin), Trust::Candidate)
            }
        }
    }

    /// Writes down that the set is in use, and uses it.
    fn commit(
        &mut self,
        host: &Arc<Host>,
        wish: &Wish,
        candidates: Vec<Candidate>,
        change: &mut SignatureChange,
        began: Instant,
    ) -> Result<(), Failure> {
        let signatures = &host.signatures;
        let keep = host.config().signatures.keep as usize;
        let before = lock(&signatures.current).clone();
        let is_new = before.as_ref().is_none_or(|before| before.id != wish.set.id);
        if !is_new && candidates.is_empty() {
            change.reason = Some("this set is in use already".to_owned());
        }
        change.taken = true;
        change.took_ms = millis(began);
        let old_book = lock(&signatures.book).clone();
        {
            let mut book = lock(&signatures.book);
            if wish.kind == ChangeKind::Rollback && is_new {
                book.undo(wish.completes.as_ref().unwrap_or(&wish.set.id));
            }
            if let Some(set) = &wish.completes {
                book.leave(set);
            }
            if let Some(seen) = &wish.seen {
                book.seen = Some(seen.clone());
            }
            if is_new {
                book.take(&wish.set.id, change, keep);
            }
            book.note(change.clone());
            if let Err(error) = book.save() {
                *book = old_book;
                change.taken = false;
                drop(book);
                self.retired.end(candidates.into_iter().map(|one| one.running));
                // It may be on the disk all the same.
                let _as_before = lock(&signatures.book).save();
                let why = format!("that it is in use cannot be written down: {error}");
                return Err(Failure::Circumstances(why));
            }
        }
        let new: Vec<_> = candidates.into_iter().map(|one| (one.number, one.running)).collect();
        let old = match host.use_engines(&new) {
            Ok(old) => old,
            Err(why) => {
                *lock(&signatures.book) = old_book;
                let _next_time = lock(&signatures.book).save();
                self.retired.end(new.into_iter().map(|(_, running)| running));
                return Err(Failure::Circumstances(why));
            }
        };
        *lock(&signatures.current) = Some(Arc::clone(&wish.set));
        *lock(&signatures.refused) = None;
        let before = before.filter(|_| is_new).map(|set| set.id.clone());
        let for_how_long = host.config().signatures.standby();
        self.retired.stand_by(before, old, for_how_long, &host.pipeline.in_use());
        let (set, from) = (&wish.set.id, change.from.join(", "));
        tracing::info!(set, from, kind = ?wish.kind, took_ms = change.took_ms, "the signature set is in use");
        if is_new || !new.is_empty() {
            let mut event = Event::new(EventKind::SignaturesTaken);
            event.generation = Some(host.pipeline.generations.current().0);
            let how = if wish.kind == ChangeKind::Rollback { "back to set" } else { "set" };
            host.events.emit(event.reason(format!("{how} {set} from {from}")));
        }
        Ok(())
    }

    fn refuse(
        &mut self,
        host: &Host,
        mut change: SignatureChange,
        began: Instant,
        why: String,
    ) -> SignatureChange {
        change.taken = false;
        change.took_ms = millis(began);
        change.reason = Some(why.clone());
        if change.kind == ChangeKind::Check {
            return change;
        }
        if change.kind != ChangeKind::Rollback {
            let known = lock(&host.signatures.refused).replace(why.clone());
            if change.kind == ChangeKind::Watch && known.as_ref() == Some(&why) {
                return change;
            }
        }
        let from = change.from.join(", ");
        let told = if why.starts_with(&from) { why } else { format!("{from}: {why}") };
        host.tell_refused(None, &told);
        let mut book = lock(&host.signatures.book);
        book.note(change.clone());
        if let Err(error) = book.save() {
            tracing::warn!(%error, "the refusal cannot be written down");
        }
        change
    }

    /// Removes sets that nobody needs from the disk. What an engine would load again after a crash is needed, however
    /// old the set is that it came with.
    fn tidy(&self, host: &Host) {
        let mut needed: Vec<String> =
            lock(&host.signatures.book).kept.iter().map(|one| one.set.clone()).collect();
        needed.extend(self.retired.set().map(str::to_owned));
        needed.extend(self.retired.sets());
        let in_use = host.pipeline.in_use();
        let origins = in_use.iter().filter_map(|running| running.origin.as_ref());
        needed.extend(origins.map(|origin| origin.set.id.clone()));
        host.signatures.store.keep_only(&needed);
    }
}

/// Has the new engines show what they find, together with those that stay.
fn try_out(host: &Arc<Host>, candidates: &[Candidate]) -> Result<trial::Tried, Failure> {
    let in_use = host.pipeline.in_use();
    let of = |number: usize| {
        let new = candidates.iter().find(|one| one.number == number).map(|one| &one.running);
        Arc::clone(new.unwrap_or(&in_use[number]))
    };
    let all: Vec<_> = (0..in_use.len()).map(|number| (number, of(number))).collect();
    for (number, running) in &all {
        let patience = host.first_config.engines.0[*number].load_timeout() + GRACE;
        // At the service's start it may still be loading.
        running.handle.wait_loaded(patience);
    }
    // One that cannot run is no reason against the signatures of another.
    let ready = all.into_iter().filter(|(_, running)| running.description().is_some()).collect();
    trial::run(&host.pipeline.trial(ready), &host.budget, &host.config())
}

fn change(kind: ChangeKind, set: Option<&Manifest>) -> SignatureChange {
    SignatureChange {
        at: now(),
        kind,
        set: set.map(|set| set.id.clone()),
        from: set.map(|set| set.from.clone()).unwrap_or_default(),
        taken: false,
        reason: None,
        engines: Vec::new(),
        left_out: Vec::new(),
        left_out_count: 0,
        known_bad: 0,
        known_good: 0,
        took_ms: 0,
    }
}

/// An engine's part of a set, where it has one.
fn part(set: &Manifest, engine: &str) -> Option<SetEngine> {
    let files = set.engines.get(engine)?;
    Some(SetEngine {
        engine: engine.to_owned(),
        files: files.len() as u64,
        bytes: files.iter().map(|file| file.size).sum(),
        changed: true,
        rules: None,
        load_ms: None,
        resident_bytes: None,
        diagnostics: Vec::new(),
    })
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}
