//! What all threads of the worker share.
//!
//! Owns the groups, the ledger, what is remembered, the policy, the queues and the counters. It must
//! not own anything slow: no thread holds one of its locks while it waits for a file, a path or the
//! link.

use crate::background::Queue;
use crate::coverage::Coverage;
use crate::event::HeldEvent;
use crate::file::{
    Identity, Look, fails_open, metadata, mode_from_number, mode_number, open_handle,
};
use crate::golden::FileSystems;
use crate::hunt::Hunts;
use crate::jobs::Jobs;
use crate::journal::Exposed;
use crate::memory::Memory;
use crate::on_demand::OnDemand;
use crate::region::Region;
use crate::remedy::Task;
use crate::ring::Patience;
use crate::scan::word;
use crate::session::Session;
use crate::truth;
use seawall_fanotify::ledger::{Claim, Ledger};
use seawall_fanotify::{Answer, FileHandle, Group, IgnoreMark, process};
use seawall_proto::{
    Decision, ExposureReason, FailMode, Fingerprint, Generation, Heartbeat, Notice, Operation,
    Policy, Rules,
};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// More held events than this, and the oldest is answered by fail mode.
pub const OUTSTANDING_MAX: u32 = 1024;
/// How long accesses wait for a link that was lost, counted from the loss.
const LINK_GRACE: Duration = Duration::from_secs(1);
/// How long they wait for the first session, counted from the driver's start: a guest that boots has
/// more to open than it should open unscanned.
const START_GRACE: Duration = Duration::from_secs(5);
/// How many verdicts `status` shows.
const LAST_VERDICTS: usize = 16;

/// How many answered execs are remembered for the open that follows each.
const LAST_EXECS: usize = 64;
/// The open that belongs to an exec follows within this, in milliseconds.
const SAME_EXEC_MS: u64 = 1_000;

/// Counts since the worker's start. Most fields are those of [`Heartbeat`].
#[derive(Debug, Default)]
pub struct Counters {
    pub events: AtomicU64,
    pub passed: AtomicU64,
    pub remembered: AtomicU64,
    pub requests: AtomicU64,
    /// Of these, asked and answered in the ring.
    pub in_ring: AtomicU64,
    pub denied: AtomicU64,
    pub unscanned: AtomicU64,
    pub overloaded: AtomicU64,
    /// Closes after writing.
    pub closes: AtomicU64,
    /// Notices for which the queue had no room.
    pub notices_lost: AtomicU64,
}

/// Adds one to a counter.
pub fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// The groups, and how clean inodes are marked.
#[derive(Debug)]
pub struct Groups {
    pub permission: Group,
    pub close_write: Group,
    /// Where opens are recorded.
    pub record: Option<Group>,
    pub ignore: IgnoreMark,
}

impl Groups {
    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &Group> {
        [&self.close_write, &self.permission].into_iter().chain(&self.record)
    }
}

/// A verdict or a file let through, for `status`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LastVerdict {
    pub path: String,
    pub result: String,
}

/// Why a file is scanned for which nobody waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// It was closed after writing.
    Close,
    /// It was let through; the scan settles this record of the journal.
    Exposure(Exposed),
    /// All files of its mount are scanned.
    Walk,
    /// The host asked for it.
    OnDemand,
}

/// What a scan is for.
#[derive(Debug, Clone)]
pub enum Subject {
    /// An access that waits.
    Access(Arc<HeldEvent>),
    /// Nobody waits. The file is open while its content is sent, and no longer: nobody shall be told
    /// that its file system is busy. It is opened anew for the verdict.
    Background { handle: FileHandle, file: Option<Arc<File>>, purpose: Purpose },
}

impl Subject {
    /// The file, as long as it is open.
    pub fn file(&self) -> Option<&File> {
        match self {
            Self::Access(event) => Some(&event.file),
            Self::Background { file, .. } => file.as_deref(),
        }
    }

    /// The same with the file open, where it is still there. May wait for a disk.
    pub fn opened(self, driver: &Driver) -> Option<Self> {
        let Self::Background { handle, purpose, .. } = self else { return None };
        let path = driver.coverage.path_on(handle.device);
        let file = path.and_then(|path| open_handle(&handle, &path).ok()).map(Arc::new);
        Some(Self::Background { handle, file, purpose })
    }

    /// The same without what can be opened anew.
    pub fn closed(self) -> Self {
        match self {
            Self::Background { handle, purpose, .. } => {
                Self::Background { handle, file: None, purpose }
            }
            access => access,
        }
    }

    pub fn operation(&self) -> Operation {
        match self {
            Self::Access(event) => event.operation,
            Self::Background { purpose: Purpose::OnDemand, .. } => Operation::OnDemand,
            Self::Background { .. } => Operation::Background,
        }
    }

    pub fn pid(&self) -> u32 {
        match self {
            Self::Access(event) => event.pid,
            Self::Background { .. } => 0,
        }
    }
}

/// A scan to be done.
#[derive(Debug, Clone)]
pub struct Job {
    pub subject: Subject,
    /// How often the content was read already and had changed.
    pub reads: u8,
    pub ask: Ask,
    /// The file's, where the host is to know it.
    pub fingerprint: Option<Fingerprint>,
}

impl Job {
    /// One that has not begun.
    pub fn new(subject: Subject) -> Self {
        let ask = match &subject {
            Subject::Access(_) | Subject::Background { purpose: Purpose::OnDemand, .. } => {
                Ask::Known
            }
            // Others are tried again later where they come to nothing, which would be the same then.
            Subject::Background { .. } => Ask::Content,
        };
        Self { subject, reads: 0, ask, fingerprint: None }
    }
}

/// How the host is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// In the ring, where that can be; else as [`Self::Known`].
    Ring,
    /// By the content's hash where that is remembered, or by the file's fingerprint, else with the content.
    Known,
    /// By its hash, which is worked out where it is not remembered, or by the file's fingerprint: the host may know it.
    Hash,
    /// With the content: the host does not know its hash.
    Content,
}

/// A notice, and when it was made: milliseconds of CLOCK_MONOTONIC.
pub type Waiting = (u64, Notice);

/// How an exec was answered, or will be by whoever keeps its deadline.
#[derive(Debug)]
struct ExecAnswer {
    pid: u32,
    identity: Identity,
    answer: Answer,
    /// In milliseconds; it holds for a moment from here on.
    at_ms: u64,
    /// It counts once this event is held no longer.
    unless_held: Option<Claim>,
}

/// The session and since when there has been none.
struct Link {
    session: Option<Arc<Session>>,
    /// Another driver still has the session: accesses wait for ours.
    taking_over: bool,
    grace: Duration,
    lost: Instant,
    why: String,
}

pub struct Driver {
    pub groups: Groups,
    pub ledger: Ledger,
    pub memory: Memory,
    pub coverage: Coverage,
    pub background: Queue,
    pub on_demand: OnDemand,
    pub hunts: Hunts,
    pub patience: Patience,
    pub file_systems: FileSystems,
    pub counters: Counters,
    /// This process.
    pub worker: u32,
    pub supervisor: u32,
    pub region: Region,
    policy: RwLock<Arc<Rules>>,
    generation: AtomicU64,
    /// Counts how often all that is clean was forgotten.
    epoch: AtomicU64,
    link: Mutex<Link>,
    link_changed: Condvar,
    pub jobs: Arc<Jobs>,
    notices: SyncSender<Waiting>,
    remedies: SyncSender<(Arc<Session>, Task)>,
    last_verdicts: Mutex<VecDeque<LastVerdict>>,
    execs: Mutex<VecDeque<ExecAnswer>>,
    deadline_keeper: OnceLock<Thread>,
    pub plain_marks: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Driver {
    pub fn new(
        groups: Groups,
        ledger: Ledger,
        coverage: Coverage,
        supervisor: u32,
        region: Region,
        notices: SyncSender<Waiting>,
        remedies: SyncSender<(Arc<Session>, Task)>,
    ) -> Self {
        Self {
            groups,
            ledger,
            memory: Memory::new(),
            coverage,
            background: Queue::default(),
            on_demand: OnDemand::default(),
            hunts: Hunts::default(),
            patience: Patience::default(),
            file_systems: FileSystems::default(),
            counters: Counters::default(),
            worker: std::process::id(),
            supervisor,
            region,
            policy: RwLock::default(),
            generation: AtomicU64::new(0),
            epoch: AtomicU64::new(0),
            link: Mutex::new(Link {
                session: None,
                taking_over: true,
                grace: START_GRACE,
                lost: Instant::now(),
                why: "not connected yet".into(),
            }),
            link_changed: Condvar::new(),
            jobs: Arc::default(),
            notices,
            remedies,
            last_verdicts: Mutex::default(),
            execs: Mutex::default(),
            deadline_keeper: OnceLock::new(),
            plain_marks: AtomicU64::new(0),
        }
    }

    pub fn policy(&self) -> Arc<Rules> {
        Arc::clone(&self.policy.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub fn generation(&self) -> Generation {
        Generation(self.generation.load(Ordering::Acquire))
    }

    /// A new session, policy or generation: nothing is known to be clean any more.
    pub fn renew(&self, policy: Option<Policy>, generation: Option<Generation>) {
        // Under another policy not even a hash is remembered.
        let same = policy.as_ref().is_none_or(|policy| **self.policy() == *policy);
        if let Some(policy) = policy {
            let unknown =
                if policy.fail_open == FailMode::Open { Answer::Allow } else { Answer::Deny };
            self.ledger.set_unknown(unknown);
            let late = policy.fail_timed_out.map_or(0, mode_number);
            let modes = [mode_number(policy.fail_open), mode_number(policy.fail_exec), late];
            for (place, mode) in self.ledger.left_behind().iter().zip(modes) {
                place.store(mode, Ordering::Relaxed);
            }
            *self.policy.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(policy.into());
        }
        if let Some(Generation(generation)) = generation {
            self.generation.store(generation, Ordering::Release);
        }
        self.forget_with(|memory| if same { memory.grow_old() } else { memory.forget_all() });
    }

    /// Forgets all clean files, here and in the kernel.
    pub fn forget_all(&self) {
        self.forget_with(Memory::forget_all);
    }

    fn forget_with(&self, forget: impl FnOnce(&Memory)) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
        forget(&self.memory);
        if let Err(error) = self.groups.permission.flush_ignored() {
            tracing::error!(%error, "clean marks cannot be flushed");
        }
    }

    /// To be asked for before it is decided that a file is clean.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// A scan for which nobody waited has its verdict. Never waits.
    pub fn done(&self, purpose: Purpose) {
        match purpose {
            Purpose::OnDemand => self.on_demand.wake(),
            _ => self.background.done(purpose),
        }
    }

    // --- the link -------------------------------------------------------------------------------

    /// From here on this driver looks for its session, and an access waits no more than a moment.
    pub fn took_over(&self) {
        let mut link = lock(&self.link);
        link.taking_over = false;
        link.lost = Instant::now();
    }

    /// Whether no other driver is left.
    pub fn has_taken_over(&self) -> bool {
        !lock(&self.link).taking_over
    }

    pub fn set_session(&self, session: Arc<Session>) {
        lock(&self.link).session = Some(session);
        self.link_changed.notify_all();
    }

    pub fn clear_session(&self, why: String) {
        let mut link = lock(&self.link);
        if link.session.take().is_some() {
            link.lost = Instant::now();
            link.grace = LINK_GRACE;
        }
        link.why = why;
    }

    pub fn session(&self) -> Option<Arc<Session>> {
        lock(&self.link).session.clone()
    }

    pub fn why_no_session(&self) -> String {
        lock(&self.link).why.clone()
    }

    /// The session; while the link has been gone for less than a moment, waits for it to come back.
    pub fn wait_session(&self) -> Option<Arc<Session>> {
        let mut link = lock(&self.link);
        loop {
            if let Some(session) = &link.session {
                return Some(Arc::clone(session));
            }
            let left = link.grace.checked_sub(link.lost.elapsed());
            let left = if link.taking_over { link.grace } else { left? };
            let wait = left.min(Duration::from_millis(100));
            let waited = self.link_changed.wait_timeout(link, wait);
            link = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub fn push_job(&self, job: Job) {
        self.jobs.push(job);
    }

    // --- answers --------------------------------------------------------------------------------

    pub fn set_deadline_keeper(&self, keeper: Thread) {
        let _once = self.deadline_keeper.set(keeper);
    }

    /// Something is held now: its deadline must be kept.
    pub fn wake_deadline_keeper(&self) {
        if let Some(keeper) = self.deadline_keeper.get() {
            keeper.unpark();
        }
    }

    /// Answers a held event. `false`: somebody else was first.
    pub fn answer(&self, claim: Claim, answer: Answer) -> bool {
        self.ledger.answer(&self.groups.permission, claim, answer).unwrap_or_else(|error| {
            tracing::error!(%error, "an answer was refused by the kernel; the deadline tries again");
            false
        })
    }

    /// What fail mode answers an access with that gets no verdict for this reason.
    pub fn fails(&self, claim: Claim, look: Option<&Look>, reason: ExposureReason) -> Answer {
        if let Some(answer) = self.ledger.later_fail(claim) {
            return answer;
        }
        let mode = match reason {
            ExposureReason::Deadline => late_mode(&self.ledger),
            ExposureReason::TooLarge => self.policy().fail_too_large,
            ExposureReason::Changing => self.policy().fail_changing,
            _ => None,
        };
        match (mode, look) {
            (Some(FailMode::Open), _) => Answer::Allow,
            (Some(FailMode::Closed), _) => Answer::Deny,
            (Some(mode), Some(look)) if fails_open(mode, look) => Answer::Allow,
            (Some(_), Some(_)) => Answer::Deny,
            _ => claim.fail(),
        }
    }

    /// What the path says that an access gets without a verdict: before everything else that policy says of that.
    pub fn fails_by_path(&self, event: &HeldEvent, mode: FailMode) {
        let answer = if fails_open(mode, &event.look) { Answer::Allow } else { Answer::Deny };
        self.ledger.set_fail(event.claim, answer);
        let mut execs = lock(&self.execs);
        let expected = execs.iter_mut().filter(|known| known.unless_held == Some(event.claim));
        expected.for_each(|known| known.answer = answer);
    }

    /// Answers a held event by fail mode. `false`: somebody else was first.
    pub fn answer_unscanned(&self, claim: Claim, reason: ExposureReason) -> bool {
        let answer = self.fails(claim, None, reason);
        if reason != ExposureReason::Deadline {
            // What was expected was the deadline's answer.
            let mut execs = lock(&self.execs);
            let expected = execs.iter_mut().find(|known| known.unless_held == Some(claim));
            if let Some(known) = expected {
                known.answer = answer;
            }
        }
        self.answer_fail(claim, answer, reason)
    }

    fn answer_fail(&self, claim: Claim, answer: Answer, reason: ExposureReason) -> bool {
        let handle = self.ledger.handle(claim);
        if !self.answer(claim, answer) {
            return false;
        }
        count(&self.counters.unscanned);
        if answer == Answer::Allow {
            self.ledger.expose(handle.as_ref(), reason.number());
        }
        true
    }

    /// Gives an access up: answers it by fail mode and tells the host.
    pub fn give_up(&self, event: &HeldEvent, reason: ExposureReason) {
        let answer = self.fails(event.claim, Some(&event.look), reason);
        let wait = [ExposureReason::TooLarge, ExposureReason::Changing].contains(&reason);
        if wait && answer == Answer::Allow {
            // It would be read again at each open.
            self.memory.remember_exposed(&event.look.identity, process::now_ms());
        }
        self.note_exec(event, answer);
        event.process();
        let is_first = self.answer_fail(event.claim, answer, reason);
        event.end_turn();
        if is_first {
            self.note_unscanned(event, reason, answer);
        } else {
            self.note_lost(event);
        }
    }

    /// An access was answered by the deadline or the overload check while it was worked on.
    pub fn note_lost(&self, event: &HeldEvent) {
        let late = process::now_ms() >= event.deadline_ms;
        let reason = if late { ExposureReason::Deadline } else { ExposureReason::Overload };
        self.note_unscanned(event, reason, self.fails(event.claim, None, reason));
    }

    /// Tells the host and `status` of an access that no verdict decided.
    pub fn note_unscanned(&self, event: &HeldEvent, reason: ExposureReason, answer: Answer) {
        let identity = event.look.identity;
        let shown = truth::shown_path(&*event.file, identity.device, identity.inode);
        let file = metadata(shown, &identity, event.pid);
        let path = String::from_utf8_lossy(&file.path).escape_debug().to_string();
        let decision = decision(answer);
        let done = if answer == Answer::Allow { "let through" } else { "denied" };
        self.note_verdict(path, format!("not scanned ({}), {done}", word(reason)));
        // What the deadline answered is found a little later.
        let answered_ms = process::now_ms().min(event.deadline_ms);
        let waited_ms = answered_ms.saturating_sub(event.since_ms).try_into().unwrap_or(u32::MAX);
        self.notice(Notice::Unscanned {
            file,
            operation: event.operation,
            reason,
            decision,
            process: event.process().clone(),
            waited_ms,
            age_ms: 0,
        });
    }

    /// What waits for long may be answered by the deadline, which knows nothing of processes: who it is
    /// that waits is looked up before.
    pub fn look_up_waiting(&self) {
        let now_ms = process::now_ms();
        let long = |job: &Job| match &job.subject {
            Subject::Access(event) if event.is_to_be_looked_up(now_ms) => Some(Arc::clone(event)),
            _ => None,
        };
        let mut waiting = self.jobs.events(|event| event.is_to_be_looked_up(now_ms));
        if let Some(session) = self.session() {
            waiting.extend(session.jobs(long));
        }
        for event in waiting {
            event.process();
        }
    }

    /// Sends a notice when there is a link and room for it; never waits. `false`: there is no room.
    pub fn notice(&self, notice: Notice) -> bool {
        let sent = self.notices.try_send((process::now_ms(), notice)).is_ok();
        if !sent {
            count(&self.counters.notices_lost);
        }
        sent
    }

    /// A file system was unmounted: its device will be another's.
    pub fn forget_device(&self, device: u64) {
        self.memory.forget_device(device);
        self.file_systems.forget(device);
        if let Some(session) = self.session() {
            let scans = session.in_background_on(device);
            scans.into_iter().for_each(|id| drop(session.withdraw(id)));
        }
    }

    /// Has something done with an infected file, after its access was answered; never waits. The host
    /// asks again for what found no room.
    pub fn remedy(&self, session: &Arc<Session>, task: Task) {
        if self.remedies.try_send((Arc::clone(session), task)).is_err() {
            tracing::warn!("too many infected files at once; the host asks for some of them again");
        }
    }

    /// Remembers how an exec is answered: the kernel asks once more, for the open that belongs to it.
    /// Called before the answer, since that second event follows it at once.
    pub fn note_exec(&self, event: &HeldEvent, answer: Answer) {
        if event.operation != Operation::Exec {
            return;
        }
        self.push_exec(event, answer, process::now_ms(), None);
    }

    /// What holds when the deadline, the overload check or the supervisor answers an exec: they know
    /// the event's number and nothing else.
    pub fn expect_exec(&self, event: &HeldEvent) {
        if event.operation == Operation::Exec {
            let answer = self.fails(event.claim, None, ExposureReason::Deadline);
            self.push_exec(event, answer, event.deadline_ms, Some(event.claim));
        }
    }

    fn push_exec(&self, event: &HeldEvent, answer: Answer, at_ms: u64, unless_held: Option<Claim>) {
        let (pid, identity) = (event.pid, event.look.identity);
        let mut execs = lock(&self.execs);
        // Whoever answers says more than what was expected.
        execs.retain(|known| known.unless_held != Some(event.claim));
        execs.truncate(LAST_EXECS - 1);
        execs.push_front(ExecAnswer { pid, identity, answer, at_ms, unless_held });
    }

    /// How the exec that this open belongs to was answered, if it is one.
    pub fn exec_answer(&self, event: &HeldEvent) -> Option<Answer> {
        let since = process::now_ms().saturating_sub(SAME_EXEC_MS);
        let execs = lock(&self.execs);
        let known = execs.iter().find(|known| {
            let same = known.pid == event.pid && known.identity == event.look.identity;
            event.operation == Operation::Open && same && known.at_ms >= since
        })?;
        let held = known.unless_held.is_some_and(|claim| self.ledger.is_held(claim));
        (!held).then_some(known.answer)
    }

    // --- what `status` and the heartbeat show ---------------------------------------------------

    pub fn note_verdict(&self, path: String, result: String) {
        let mut last = lock(&self.last_verdicts);
        last.truncate(LAST_VERDICTS - 1);
        last.push_front(LastVerdict { path, result });
    }

    pub fn last_verdicts(&self) -> Vec<LastVerdict> {
        lock(&self.last_verdicts).iter().cloned().collect()
    }

    pub fn heartbeat(&self, memory_kib: u32, cpu_ms: u64) -> Heartbeat {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let journal = self.background.shown();
        Heartbeat {
            events: get(&self.counters.events),
            passed: get(&self.counters.passed),
            remembered: get(&self.counters.remembered),
            requests: get(&self.counters.requests),
            denied: get(&self.counters.denied),
            unscanned: get(&self.counters.unscanned),
            overloaded: get(&self.counters.overloaded),
            exposed: journal.files + self.ledger.exposures().count() as u64,
            held_by_writer: journal.written,
            unknown: journal.unknown,
            mounts_exposed: u32::try_from(journal.mounts.len()).unwrap_or(u32::MAX),
            outstanding: self.ledger.outstanding(),
            supervised: self.is_supervised(),
            memory_kib,
            cpu_ms,
        }
    }

    /// Whether the supervisor that forked this worker still lives.
    pub fn is_supervised(&self) -> bool {
        let parent = rustix::process::getppid().map(rustix::process::Pid::as_raw_nonzero);
        parent.is_some_and(|parent| parent.get().unsigned_abs() == self.supervisor)
    }
}

/// What policy has an access answered with whose verdict does not come in time; none goes by the operation. It is in the
/// ledger, for the supervisor and for the deadline's keeper, which shares no lock.
pub fn late_mode(ledger: &Ledger) -> Option<FailMode> {
    match ledger.left_behind()[2].load(Ordering::Relaxed) {
        0 => None,
        number => Some(mode_from_number(number, FailMode::Open)),
    }
}

/// The decision that an answer carries out.
pub fn decision(answer: Answer) -> Decision {
    match answer {
        Answer::Allow => Decision::Allow,
        Answer::Deny => Decision::Deny,
    }
}
