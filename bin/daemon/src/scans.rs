//! Scans of guests' files that somebody asked for: which wait, run and have ended.
//!
//! ```text
//!   queued ──► running ◄──► waiting (the driver is away)
//!     ▲          │  └─► done, failed
//!     └─ paused ◄┘            cancelled ◄── from any
//! ```
//!
//! The driver walks and keeps nothing; it says now and then where it is, when none of the walk's verdicts is under way.
//! What is counted between two such words is counted for good with the second: a walk that breaks off goes on at the
//! last word, and nothing counts twice. Each scan is a file, written anew by the thread that also says whose turn it is;
//! nothing here waits for a disk while somebody waits for an answer.

mod job;
mod schedules;
mod store;

use crate::config::{Config, OnDemand, Schedule};
use crate::events::Events;
use crate::golden::GoldenError;
use crate::host::Host;
use crate::session::Session;
use job::{Job, Kept, Window};
use schedules::Schedules;
use seawall_client::{
    Event, EventKind, FoundFile, GuestScan, GuestScanState, LeftOut, ScheduleReport,
};
use seawall_proto::walk::{Walk, WalkMissed, WalkOrder, WalkProgress};
use seawall_proto::{ContentHash, Fingerprint, ToGuest};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use store::Store;

/// How often it is looked whose turn it is, if nothing happens.
const TICK: Duration = Duration::from_millis(500);
/// Scans that have ended and are remembered.
const ENDED_MAX: usize = 500;
/// Scans that have not ended.
const OPEN_MAX: usize = 10_000;

/// Why a scan waits whose schedule gave it no more time.
const CLOSED: &str = "its window is closed; it goes on at the schedule's next time";

/// Why something is not done.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ScansError {
    #[error("no scan has the number {0}; `seawall scans` shows all")]
    Unknown(u64),
    #[error("scan {id} is {state}")]
    State { id: u64, state: &'static str },
    #[error("{OPEN_MAX} scans wait already")]
    TooMany,
}

/// What the operator wants of a scan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    Pause,
    Resume,
    Cancel,
}

/// All scans.
pub struct Scans {
    jobs: Mutex<BTreeMap<u64, Job>>,
    changed: Condvar,
    schedules: Mutex<Schedules>,
    store: Store,
    /// The number of the next walk.
    runs: AtomicU64,
    events: Events,
}

impl Scans {
    /// With those that the service knew when it ended last.
    pub fn open(folder: PathBuf, events: Events) -> Self {
        let schedules = Mutex::new(Schedules::open(folder.join("schedules")));
        let store = Store::open(folder);
        let jobs = store.read().into_iter().map(|job| (job.shown.id, job)).collect();
        // Numbers of one run of the service alone, and none of an earlier one's sessions are left.
        let (jobs, runs) = (Mutex::new(jobs), AtomicU64::new(1));
        Self { jobs, changed: Condvar::new(), schedules, store, runs, events }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Job>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All, without what they found and left out by name, the newest last.
    pub fn list(&self) -> Vec<GuestScan> {
        self.lock().values().map(|job| job.shown(false)).collect()
    }

    /// One.
    pub fn show(&self, id: u64) -> Result<GuestScan, ScansError> {
        self.lock().get(&id).map(|job| job.shown(true)).ok_or(ScansError::Unknown(id))
    }

    /// Has these guests scanned, each by a scan of its own, and perhaps a golden image learned by it.
    pub fn add(
        &self,
        wanted: Vec<(String, Vec<String>)>,
        quick: bool,
        learns: Option<&str>,
    ) -> Result<Vec<GuestScan>, ScansError> {
        let mut jobs = self.lock();
        let open = jobs.values().filter(|job| !job.shown.state.has_ended()).count();
        if open + wanted.len() > OPEN_MAX {
            return Err(ScansError::TooMany);
        }
        let mut added = Vec::new();
        for (guest, paths) in wanted {
            let id = jobs.last_key_value().map_or(1, |(id, _)| id + 1);
            let mut job = Job::new(id, guest, paths, quick);
            job.shown.learns = learns.map(ToOwned::to_owned);
            added.push(job.shown(true));
            jobs.insert(id, job);
        }
        drop(jobs);
        self.changed.notify_all();
        Ok(added)
    }

    /// What the operator wants of one.
    pub fn order(&self, id: u64, order: Order) -> Result<GuestScan, ScansError> {
        let mut jobs = self.lock();
        let job = jobs.get_mut(&id).ok_or(ScansError::Unknown(id))?;
        let state = job.shown.state;
        let fits = match order {
            Order::Pause => !state.has_ended() && state != GuestScanState::Paused,
            Order::Resume => state == GuestScanState::Paused,
            Order::Cancel => !state.has_ended(),
        };
        if !fits {
            return Err(ScansError::State { id, state: state.word() });
        }
        match order {
            Order::Pause => job.stop(GuestScanState::Paused, "by the operator"),
            Order::Resume => job.queue(),
            Order::Cancel => {
                job.stop(GuestScanState::Cancelled, "by the operator");
                self.tell_end(job);
            }
        }
        let shown = job.shown(true);
        drop(jobs);
        self.changed.notify_all();
        Ok(shown)
    }

    // --- schedules ------------------------------------------------------------------------------

    fn schedules(&self) -> MutexGuard<'_, Schedules> {
        self.schedules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All schedules of this configuration.
    pub fn list_schedules(&self, config: &Config) -> Vec<ScheduleReport> {
        let schedules = self.schedules();
        let report = |one: &Schedule| schedules.report(one, one.guests_of(config), now());
        config.schedules.iter().map(report).collect()
    }

    /// The schedule's next time is left out.
    pub fn skip_schedule(&self, config: &Config, schedule: &Schedule) -> ScheduleReport {
        let mut schedules = self.schedules();
        schedules.skip(&schedule.name.get_ref().0);
        schedules.report(schedule, schedule.guests_of(config), now())
    }

    /// The operator has it run now, all guests at once.
    pub fn run_schedule(&self, config: &Config, schedule: &Schedule) -> Vec<GuestScan> {
        self.schedules().ran(&schedule.name.get_ref().0, now());
        let begun = self.begin(config, schedule, now(), 0);
        self.changed.notify_all();
        begun
    }

    /// Each of its guests is scanned, or goes on being scanned where it was when the window closed.
    fn begin(
        &self,
        config: &Config,
        schedule: &Schedule,
        since: i64,
        spread_minutes: u32,
    ) -> Vec<GuestScan> {
        let name = &schedule.name.get_ref().0;
        let mut jobs = self.lock();
        let mut begun = Vec::new();
        for guest in schedule.guests_of(config) {
            let is_it = |job: &&mut Job| {
                let shown = &job.shown;
                !shown.state.has_ended()
                    && shown.guest == guest
                    && shown.schedule.as_ref() == Some(name)
            };
            let open = jobs.values_mut().find(is_it).map(|job| job.shown.id);
            let id = match open {
                Some(id) => id,
                None if jobs.len() >= OPEN_MAX => continue,
                None => {
                    let id = jobs.last_key_value().map_or(1, |(id, _)| id + 1);
                    jobs.insert(id, Job::new(id, guest.clone(), Vec::new(), schedule.quick));
                    id
                }
            };
            if let Some(job) = jobs.get_mut(&id) {
                let opens = since + spread(&guest, since, spread_minutes);
                let closes = i64::from(schedule.window_minutes) * 60;
                let closes = (closes > 0).then_some(since + closes);
                job.scheduled(name, Window { opens, closes });
                begun.push(job.shown(false));
            }
        }
        begun
    }

    // --- what sessions say ----------------------------------------------------------------------

    fn with_running(&self, session: &Session, run: Option<u64>, with: impl FnOnce(&mut Job)) {
        let mut jobs = self.lock();
        let is_it = |job: &&mut Job| job.runs_in(session) && run.is_none_or(|run| job.run == run);
        if let Some(job) = jobs.values_mut().find(is_it) {
            with(job);
        }
    }

    /// A driver says how far it is.
    pub fn progress(&self, session: &Session, progress: &WalkProgress) {
        let done = progress.done;
        self.with_running(session, Some(progress.id), |job| {
            job.progress(progress);
            if done && !job.has_learned_all() {
                job.end(GuestScanState::Done, "");
                self.tell_end(job);
            }
        });
        if done {
            self.changed.notify_all();
        }
    }

    /// A driver left something out.
    pub fn missed(&self, session: &Session, missed: &WalkMissed) {
        let path = short(&missed.path);
        let reason = seawall_client::text::escape_short(missed.reason.as_bytes(), 256);
        self.with_running(session, Some(missed.id), |job| job.leave_out(LeftOut { path, reason }));
    }

    /// Something was found in one of its files.
    pub fn found(&self, session: &Session, found: FoundFile) {
        self.with_running(session, None, |job| job.find(found));
    }

    /// A file of this content, which is clean, has this fingerprint.
    pub fn learned(&self, session: &Session, fingerprint: Fingerprint, hash: ContentHash) {
        self.with_running(session, None, |job| job.learn(fingerprint, hash));
    }

    /// The engines came to no verdict on one of its files.
    pub fn no_verdict(&self, session: &Session, path: &[u8], reason: &str) {
        let path = short(path);
        let reason = seawall_client::text::escape_short(reason.as_bytes(), 256);
        self.with_running(session, None, |job| job.fail_on(LeftOut { path, reason }));
    }

    // --- whose turn it is -----------------------------------------------------------------------

    /// Says whose turn it is and keeps the files, for as long as the service lives.
    pub fn keep(&self, host: &Host) {
        loop {
            self.take_learned(host);
            let whole = host.config();
            let due = self.schedules().due(&whole.schedules, now());
            for due in due {
                let schedule = &whole.schedules[due.number];
                let begun = self.begin(&whole, schedule, due.since, schedule.spread_minutes);
                let name = &schedule.name.get_ref().0;
                tracing::info!(schedule = name, guests = begun.len(), "its time has come");
            }
            let config = &whole.on_demand;
            let (unwritten, gone) = {
                let mut jobs = self.lock();
                let pressed = config.pressure_percent > 0
                    && pressure().is_some_and(|now| now > config.pressure_percent.into());
                self.look(host, config, pressed, &mut jobs);
                let gone = forget(&mut jobs);
                let changed = jobs.values_mut().filter_map(Job::take_change);
                (changed.collect::<Vec<_>>(), gone)
            };
            self.write(&unwritten, &gone);
            let jobs = self.lock();
            let waited = self.changed.wait_timeout(jobs, TICK);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// What was learned is taken into use; then the scan has ended.
    fn take_learned(&self, host: &Host) {
        let learned: Vec<_> = {
            let mut jobs = self.lock();
            let of =
                |job: &mut Job| Some((job.shown.id, job.shown.guest.clone(), job.take_learned()?));
            jobs.values_mut().filter_map(of).collect()
        };
        for (id, guest, learned) in learned {
            let now = host.guests.find(|one| one.name() == guest);
            let put = match now.map(|guest| guest.policy().tenant()) {
                Some(tenant) if tenant == learned.tenant => host.golden.put(learned),
                _ => Err(GoldenError::Moved),
            };
            // It may have been cancelled meanwhile.
            let mut jobs = self.lock();
            if let Some(job) = jobs.get_mut(&id).filter(|job| !job.shown.state.has_ended()) {
                match &put {
                    Ok(list) => {
                        job.end(GuestScanState::Done, &format!("{} files are known", list.files));
                    }
                    Err(error) => job.end(GuestScanState::Failed, &error.to_string()),
                }
                self.tell_end(job);
            }
            drop(jobs);
            host.tell_golden();
        }
    }

    /// Writes what has changed: the service ends.
    pub fn flush(&self) {
        let unwritten: Vec<_> = self.lock().values_mut().filter_map(Job::take_change).collect();
        self.write(&unwritten, &[]);
    }

    fn write(&self, changed: &[Kept], gone: &[u64]) {
        for id in self.store.write(changed, gone) {
            if let Some(job) = self.lock().get_mut(&id) {
                job.not_written();
            }
        }
    }

    fn look(&self, host: &Host, config: &OnDemand, pressed: bool, jobs: &mut BTreeMap<u64, Job>) {
        let now = now();
        let guests = host.guests.all();
        let session_of = |name: &str| {
            guests.iter().find(|guest| guest.name() == name).map(|guest| guest.session())
        };
        let is_open = |job: &&mut Job| !job.shown.state.has_ended() && !job.is_learned();
        for job in jobs.values_mut().filter(is_open) {
            let Some(session) = session_of(&job.shown.guest) else {
                job.stop(GuestScanState::Failed, "the guest is no longer configured");
                self.tell_end(job);
                continue;
            };
            if job.shown.state == GuestScanState::Running
                && !session.is_some_and(|session| job.runs_in(&session))
            {
                job.wait("its driver is away");
            }
            if job.shown.state == GuestScanState::Running
                && job.window.closes.is_some_and(|closes| closes <= now)
            {
                job.stop(GuestScanState::Waiting, CLOSED);
            }
            if job.is_silent() {
                job.stop(GuestScanState::Failed, "its driver says nothing of it any more");
                self.tell_end(job);
            }
            job.hold(pressed);
        }
        let mut running: Vec<_> = jobs
            .values()
            .filter(|job| job.shown.state == GuestScanState::Running)
            .map(|job| job.shown.guest.clone())
            .collect();
        for job in jobs.values_mut() {
            let may = matches!(job.shown.state, GuestScanState::Queued | GuestScanState::Waiting);
            if !may || pressed || job.is_learned() {
                continue;
            }
            if job.window.closes.is_some_and(|closes| closes <= now) {
                job.say_why(CLOSED);
                continue;
            }
            if job.window.opens > now {
                let at = time(job.window.opens).unwrap_or_default();
                job.say_why(&format!("it begins at {at}"));
                continue;
            }
            if running.contains(&job.shown.guest) {
                job.say_why("another scan of this guest is under way");
                continue;
            }
            if running.len() >= config.guests_at_once {
                job.say_why("as many guests are being scanned as may be at once");
                continue;
            }
            let Some(session) = session_of(&job.shown.guest).flatten() else {
                job.say_why("its driver is not connected");
                continue;
            };
            running.push(job.shown.guest.clone());
            let run = self.runs.fetch_add(1, Relaxed);
            let share = (config.mib_per_second << 20) / config.guests_at_once as u64;
            let walk = Walk {
                id: run,
                roots: job
                    .shown
                    .paths
                    .iter()
                    .map(|path| path.clone().into_bytes().into())
                    .collect(),
                quick: job.shown.quick,
                place: job.place().map(Into::into),
                bytes_per_second: share,
                file_limit: config.file_limit_mib << 20,
                pressure_percent: config.pressure_percent,
            };
            session.learn(job.shown.learns.is_some());
            session.outbox.push(&ToGuest::Walk(walk));
            job.run(session, run);
        }
    }

    fn tell_end(&self, job: &Job) {
        let GuestScan { id, guest, files, infected, missed, errors, state, .. } = &job.shown;
        let summary = format!(
            "scan {id} is {}: {files} files, {infected} infected, {} without a verdict",
            state.word(),
            missed.saturating_add(*errors)
        );
        self.events.emit(Event::new(EventKind::ScanEnded).guest(guest).reason(summary));
    }
}

/// A path as it is kept and shown: guests name them, and many are kept.
pub fn short(path: &[u8]) -> String {
    seawall_client::text::escape(&path[..path.len().min(1024)])
}

/// In seconds since 1970.
fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}

/// For people and programs.
fn time(seconds: i64) -> Option<String> {
    jiff::Timestamp::from_second(seconds).ok().map(|time| time.to_string())
}

/// How much later this guest begins, in seconds: chance, but the same if the service is started again.
fn spread(guest: &str, since: i64, minutes: u32) -> i64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(guest.as_bytes()).update(&since.to_le_bytes());
    let mut first = [0; 4];
    hasher.finalize_xof().fill(&mut first);
    i64::from(u32::from_le_bytes(first)) % (i64::from(minutes) * 60 + 1)
}

/// The oldest that have ended go; gives their numbers.
fn forget(jobs: &mut BTreeMap<u64, Job>) -> Vec<u64> {
    let ended = jobs.values().filter(|job| job.shown.state.has_ended());
    let ended: Vec<_> = ended.map(|job| job.shown.id).collect();
    let gone = ended[..ended.len().saturating_sub(ENDED_MAX)].to_vec();
    gone.iter().for_each(|id| drop(jobs.remove(id)));
    gone
}

/// For how much of the last ten seconds something on this host waited for a disk or a CPU, in percent; None where the
/// kernel does not tell.
fn pressure() -> Option<f64> {
    let of = |what: &str| {
        let text = std::fs::read_to_string(format!("/proc/pressure/{what}")).ok()?;
        let some = text.lines().find_map(|line| line.strip_prefix("some "))?;
        let value = some.split_ascii_whitespace().find_map(|word| word.strip_prefix("avg10="))?;
        value.parse::<f64>().ok()
    };
    of("io").into_iter().chain(of("cpu")).reduce(f64::max)
}

/// Orders a walk, if its session is still there.
fn say(session: &Session, id: u64, order: WalkOrder) {
    session.outbox.push(&ToGuest::WalkOrder(id, order));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn scans(folder: &std::path::Path) -> Scans {
        let events = Events::start(
            &folder.join("events.db"),
            crate::events::store::Retention { days: 1, most: 1 << 20 },
            Arc::default(),
        )
        .unwrap();
        Scans::open(folder.join("scans"), events)
    }

    fn added(scans: &Scans) -> u64 {
        scans.add(vec![("web".into(), Vec::new())], false, None).unwrap()[0].id
    }

    #[test]
    fn orders_fit_the_state_or_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let scans = scans(folder.path());
        let id = added(&scans);
        let state = |order| scans.order(id, order).map(|scan| scan.state);
        assert_eq!(state(Order::Resume), Err(ScansError::State { id, state: "queued" }));
        assert_eq!(state(Order::Pause), Ok(GuestScanState::Paused));
        assert_eq!(state(Order::Pause), Err(ScansError::State { id, state: "paused" }));
        assert_eq!(state(Order::Resume), Ok(GuestScanState::Queued));
        assert_eq!(state(Order::Cancel), Ok(GuestScanState::Cancelled));
        assert_eq!(state(Order::Cancel), Err(ScansError::State { id, state: "cancelled" }));
        assert_eq!(scans.show(99).unwrap_err(), ScansError::Unknown(99));
    }

    #[test]
    fn what_is_written_is_there_again_and_numbers_are_not_used_twice() {
        let folder = tempfile::tempdir().unwrap();
        let first = scans(folder.path());
        let (one, two) = (added(&first), added(&first));
        first.order(one, Order::Pause).unwrap();
        first.flush();
        std::fs::write(folder.path().join("scans/7.json"), "{").unwrap();
        let second = scans(folder.path());
        assert_eq!(second.list(), first.list());
        assert_eq!(second.show(one).unwrap().state, GuestScanState::Paused);
        assert!(added(&second) > two);
    }

    #[test]
    fn guests_begin_at_times_of_their_own_within_the_spread() {
        let at = |guest: usize, since| spread(&format!("g{guest}"), since, 10);
        let all: Vec<_> = (0..200).map(|guest| at(guest, 5)).collect();
        assert!(all.iter().all(|later| (0..=600).contains(later)));
        let (early, late) = all.iter().fold((0, 0), |(early, late), later| {
            (early + u32::from(*later < 200), late + u32::from(*later > 400))
        });
        assert!(early > 30 && late > 30, "{all:?}");
        assert_eq!(at(1, 5), all[1], "the same after a restart");
        assert!((0..50).any(|guest| at(guest, 6) != all[guest]), "and not the same every time");
        assert_eq!(spread("g", 5, 0), 0);
    }

    #[test]
    fn the_oldest_that_have_ended_go() {
        let folder = tempfile::tempdir().unwrap();
        let scans = scans(folder.path());
        let open = added(&scans);
        for _ in 0..ENDED_MAX + 5 {
            scans.order(added(&scans), Order::Cancel).unwrap();
        }
        let gone = forget(&mut scans.lock());
        assert_eq!(gone.len(), 5);
        assert_eq!(scans.list().len(), ENDED_MAX + 1);
        assert!(scans.show(open).is_ok());
    }
}
