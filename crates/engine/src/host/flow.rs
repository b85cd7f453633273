//! The scans of one engine: what waits, what is at which process, what each has been through.
//!
//! Owns the queues, the table of scans in flight and the link to the process in use. Knows nothing
//! of processes beyond that link: the supervisor says when one comes, dies or is suspected.
//!
//! ```text
//!            submit            pump                 Started             Report
//!  caller ──────────► queued ───────► sent, waiting ───────► in work ──────────► answered
//!                       ▲                   │                   │
//!                       └── process gone ───┴── process gone ───┘
//! ```
//!
//! Which scan killed a process cannot be seen from outside when several are in work, so all of them
//! are suspects. Suspects are fed again one at a time with nothing beside them: when the next process dies,
//! too, it is the culprit, and the innocent have lost nothing but time. Others wait no longer than a moment for that:
//! a suspect that takes long gets company, counts less for what happens then, and is alone for longer the next time.
//! A scan that was only waiting is never suspected.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::fair::{Costs, Fair};
use super::process::{Link, ProcessId};
use super::{EngineConfig, Lane, Metadata, Reply, ScanError, ScanReport, SharedContent, Turn};
use crate::protocol::{Answer, Scan, ToEngine, encode_to_engine};
use crate::report::Generation;

/// How long a suspect is at a process alone the first time; then twice as long, and so on.
const ALONE: Duration = Duration::from_millis(200);
/// For so long others wait for suspects once there is another process, and no longer.
const TRIAL: Duration = Duration::from_secs(1);
/// What a crash counts for a scan in work, and for a suspect that had company; and from which sum on a scan is not fed to a
/// process again.
const BLAMED: u8 = 3;
const IN_COMPANY: u8 = 1;
const MOST_BLAME: u8 = 2 * BLAMED;
/// More than this would be noticed late: others are sent so long after a suspect was alone.
const LATER: Duration = Duration::from_millis(20);
/// Processes that a scan is fed to at most, when it is not to blame for their ends.
const MOST_SENDS: u8 = 8;
/// A process with a free worker that does not take a waiting scan for this long has hung.
pub(super) const STALL: Duration = Duration::from_secs(10);

/// For how long after an access more are expected, of its client and at all.
const BUSY: Duration = Duration::from_secs(10);

/// How soon a send is tried again that failed for want of memory or descriptors.
const SEND_AGAIN: Duration = Duration::from_millis(50);

/// The worker threads of a process. All take from one socket, so that some stay free is a matter of what is sent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Workers {
    /// At least 1.
    threads: u32,
    kept: u32,
}

impl Workers {
    pub(super) fn of(config: &EngineConfig) -> Self {
        Self { threads: config.threads.max(1), kept: config.kept }
    }

    pub(super) fn all(self) -> u32 {
        self.threads.saturating_add(self.kept)
    }

    /// How many scans a process may have: twice as many as workers, so that one finds its next scan waiting,
    /// while a later on-access scan still overtakes on-demand ones.
    pub(super) fn in_hand(self) -> usize {
        2 * self.all() as usize
    }

    /// How many of one client's accesses a process may have while others have some too.
    fn of_one(self) -> usize {
        (self.all().saturating_sub(1)).max(1) as usize
    }

    /// How many of them may be on demand. The kept threads stay free at all times: a scan may take long. While
    /// accesses come, so do half of the others, for the sake of the CPUs.
    fn on_demand(self, accesses_come: bool) -> usize {
        match (self.kept, accesses_come) {
            (0, _) => self.in_hand(),
            (_, false) => self.threads as usize,
            (_, true) => self.threads.div_ceil(2) as usize,
        }
    }
}

/// One scan, from the request to the reply.
pub(super) struct Job {
    /// 0 until it is queued.
    id: u64,
    content: SharedContent,
    metadata: Metadata,
    lane: Lane,
    client: u64,
    timeout: Duration,
    reply: Reply,
    submitted: Instant,
    /// What the deaths of processes count that it was in work at.
    blame: u8,
    /// At how many of these it was a suspect that was not alone.
    company: u8,
    sends: u8,
    cancelled: bool,
}

impl Costs for Job {
    fn client(&self) -> u64 {
        self.client
    }

    fn give_to(&mut self, client: u64) {
        self.client = client;
    }

    fn bytes(&self) -> u64 {
        self.content.len()
    }
}

impl Job {
    pub(super) fn new(
        content: SharedContent,
        metadata: Metadata,
        turn: Turn,
        timeout: Duration,
        reply: Reply,
    ) -> Self {
        let submitted = Instant::now();
        let Turn { lane, client } = turn;
        Self {
            id: 0,
            content,
            metadata,
            lane,
            client,
            timeout,
            reply,
            submitted,
            blame: 0,
            company: 0,
            sends: 0,
            cancelled: false,
        }
    }

    /// The message; a limit above 49 days is cut to that.
    fn message(&self) -> ToEngine {
        ToEngine::Scan(Scan {
            id: self.id,
            length: self.content.len(),
            limit_ms: u32::try_from(self.timeout.as_millis()).unwrap_or(u32::MAX),
            metadata: self.metadata.clone(),
        })
    }

    fn refuse(self, error: ScanError) -> Finished {
        let queued = self.submitted.elapsed();
        self.finish(Err(error), None, queued, Duration::ZERO)
    }

    fn finish(
        self,
        result: Result<super::Outcome, ScanError>,
        generation: Option<Generation>,
        queued: Duration,
        scanned: Duration,
    ) -> Finished {
        let report = ScanReport { result, generation, queued, scanned };
        Finished { reply: self.reply, report }
    }
}

/// A scan with its report; delivered after the lock on the flow is given back.
#[must_use]
pub(super) struct Finished {
    reply: Reply,
    report: ScanReport,
}

impl Finished {
    /// Calls the reply. Its panic must not take the supervisor with it.
    pub(super) fn deliver(self) {
        if catch_unwind(AssertUnwindSafe(|| (self.reply)(self.report))).is_err() {
            tracing::error!("the receiver of a scan report panicked");
        }
    }
}

/// A scan that is at a process.
struct Flight {
    job: Job,
    process: ProcessId,
    link: Arc<Link>,
    sent: Instant,
    started: Option<Instant>,
    suspect: bool,
}

impl Flight {
    fn finish(self, result: Result<super::Outcome, ScanError>, by: Option<Generation>) -> Finished {
        let started = self.started.unwrap_or_else(Instant::now);
        let queued = started.saturating_duration_since(self.job.submitted);
        self.job.finish(result, by, queued, started.elapsed())
    }
}

/// A message from an engine about a scan that it does not have, or has started already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it reports on scan {id}, which it does not have or has reported on before")]
pub(super) struct NotYours {
    id: u64,
}

/// Why a process is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Blame {
    /// It crashed or broke the protocol: whatever was in work may be the cause.
    InWork,
    /// It was killed for the scans past their limit.
    Overdue,
    /// It was killed though nothing in work was to blame.
    Nobody,
}

/// The process that takes new scans.
struct Current {
    process: ProcessId,
    link: Arc<Link>,
    /// Whether it wants every content as a descriptor.
    by_descriptor: bool,
}

/// See the module.
pub(super) struct Flow {
    workers: Workers,
    queue_limit: usize,
    next_id: u64,
    on_access: Fair<Job>,
    on_demand: Fair<Job>,
    /// Were in work when a process died; fed again one at a time, before the others.
    suspects: VecDeque<Job>,
    /// Until when others wait for these.
    trial_until: Option<Instant>,
    /// When a client last had an access, for those that had one lately.
    accesses: HashMap<u64, Instant>,
    flights: HashMap<u64, Flight>,
    current: Option<Current>,
    /// Scans are refused with this instead of being queued.
    closed: Option<ScanError>,
    /// The socket took no more; the supervisor tells when it does.
    blocked: bool,
    /// A send failed for another reason than that.
    send_again_at: Option<Instant>,
}

impl Flow {
    pub(super) fn new(workers: Workers, queue_limit: usize) -> Self {
        Self {
            workers,
            queue_limit,
            next_id: 1,
            on_access: Fair::default(),
            on_demand: Fair::default(),
            suspects: VecDeque::new(),
            trial_until: None,
            accesses: HashMap::new(),
            flights: HashMap::new(),
            current: None,
            closed: None,
            blocked: false,
            send_again_at: None,
        }
    }

    /// Waiting, and at a process.
    pub(super) fn counts(&self) -> (usize, usize) {
        let queued = self.on_access.len() + self.on_demand.len() + self.suspects.len();
        (queued, self.flights.len())
    }

    /// Queues a scan and gives its id, or gives it back refused.
    pub(super) fn submit(&mut self, mut job: Job) -> Result<u64, Box<Finished>> {
        if let Some(error) = &self.closed {
            return Err(Box::new(job.refuse(error.clone())));
        }
        if self.counts().0 >= self.queue_limit {
            return Err(Box::new(job.refuse(ScanError::QueueFull)));
        }
        let id = self.next_id;
        job.id = id;
        self.next_id += 1;
        if job.lane == Lane::OnAccess {
            self.has_access(job.client, job.submitted);
        }
        self.lane(job.lane).push_back(job);
        Ok(id)
    }

    fn has_access(&mut self, client: u64, now: Instant) {
        if self.accesses.insert(client, now).is_none() {
            self.accesses.retain(|_, at| *at + BUSY > now);
        }
    }

    /// Somebody else waits for this scan, too, who would have had it at this turn: while it waits, it takes that one where
    /// it comes sooner.
    pub(super) fn hasten(&mut self, id: u64, turn: Turn) {
        let is_it = |job: &Job| job.id == id;
        let Turn { lane, client } = turn;
        if lane == Lane::OnAccess {
            self.has_access(client, Instant::now());
            if let Some(job) = self.suspects.iter_mut().find(|job| is_it(job)) {
                job.lane = lane;
            } else if let Some(job) = self.on_demand.remove(is_it) {
                self.on_access.push_back(Job { lane, client, ..job });
                return;
            }
        }
        self.lane(lane).share(client, is_it);
    }

    /// Nobody wants this scan any more. One that waits here ends at once; one at a process when the
    /// engine looks, or when that process is gone.
    pub(super) fn cancel(&mut self, id: u64) -> Option<Finished> {
        if let Some(flight) = self.flights.get_mut(&id) {
            flight.job.cancelled = true;
            flight.link.cancel(id);
            return None;
        }
        let is_it = |job: &Job| job.id == id;
        let at = self.suspects.iter().position(is_it);
        let job = at
            .and_then(|at| self.suspects.remove(at))
            .or_else(|| self.on_access.remove(is_it))
            .or_else(|| self.on_demand.remove(is_it))?;
        Some(job.refuse(ScanError::Cancelled))
    }

    fn lane(&mut self, lane: Lane) -> &mut Fair<Job> {
        match lane {
            Lane::OnAccess => &mut self.on_access,
            Lane::OnDemand => &mut self.on_demand,
        }
    }

    /// Sends what the process in use may have. True when the supervisor must look after what could not be sent.
    pub(super) fn pump(&mut self) -> bool {
        let Some(current) = &self.current else { return false };
        if self.blocked || self.send_again_at.is_some_and(|at| at > Instant::now()) {
            return false;
        }
        self.send_again_at = None;
        let (process, by_descriptor) = (current.process, current.by_descriptor);
        let link = Arc::clone(&current.link);
        let on_demand = |flight: &&Flight| flight.job.lane == Lane::OnDemand;
        let lately = self.accesses.iter().filter(|(_, at)| at.elapsed() < BUSY);
        let lately: Vec<u64> = lately.map(|(client, _)| *client).collect();
        let most_on_demand = self.workers.on_demand(!lately.is_empty());
        let mut here = self.of(process).count();
        let mut here_on_demand = self.of(process).filter(on_demand).count();
        while here < self.workers.in_hand() {
            let room_on_demand = here_on_demand < most_on_demand;
            let Some((job, suspect)) = self.next(process, here == 0, room_on_demand, &lately)
            else {
                return false;
            };
            match send(&link, &job, by_descriptor) {
                Ok(()) => {
                    here += 1;
                    here_on_demand += usize::from(job.lane == Lane::OnDemand);
                    self.fly(job, process, Arc::clone(&link), suspect);
                }
                Err(error) => {
                    self.put_back(job, suspect);
                    if error.kind() == io::ErrorKind::WouldBlock {
                        self.blocked = true;
                    } else {
                        self.send_again_at = Some(Instant::now() + SEND_AGAIN);
                    }
                    tracing::debug!(%error, "a scan cannot be sent to the engine now");
                    return true;
                }
            }
        }
        false
    }

    /// The next scan to send, and whether it is a suspect. `idle`: whether the process has none; `on_demand`: whether there
    /// is room for such a one; `lately`: whose accesses came lately.
    fn next(
        &mut self,
        process: ProcessId,
        idle: bool,
        on_demand: bool,
        lately: &[u64],
    ) -> Option<(Job, bool)> {
        let now = Instant::now();
        let in_trial = self.trial_until.is_some_and(|until| until > now);
        match self.alone_until() {
            Some(until) if until > now => return None,
            Some(_) => (),
            None => {
                let is_access = |job: &Job| job.lane == Lane::OnAccess;
                let first = self.suspects.iter().position(is_access).or(on_demand.then_some(0));
                let first = first.filter(|at| *at < self.suspects.len());
                if first.is_some() && !idle && in_trial {
                    return None;
                }
                if let Some(job) = first.and_then(|at| self.suspects.remove(at)) {
                    return Some((job, true));
                }
            }
        }
        // Where others come too, nobody has all workers: whoever has an access finds one free.
        let most = self.workers.of_one();
        let flights = &self.flights;
        let may = |client: u64| {
            let is_its = |flight: &&Flight| {
                let job = &flight.job;
                flight.process == process && job.client == client && job.lane == Lane::OnAccess
            };
            let alone = lately.iter().all(|other| *other == client);
            alone || flights.values().filter(is_its).count() < most
        };
        let job = self.on_access.pop(may);
        let job = job.or_else(|| if on_demand { self.on_demand.pop(|_| true) } else { None })?;
        Some((job, false))
    }

    /// Until when the suspect that is at a process is to be alone.
    fn alone_until(&self) -> Option<Instant> {
        let suspect = self.flights.values().find(|flight| flight.suspect)?;
        let until = suspect.sent + ALONE * (1 << suspect.job.company.min(4));
        self.trial_until.map(|most| until.min(most))
    }

    fn fly(&mut self, mut job: Job, process: ProcessId, link: Arc<Link>, suspect: bool) {
        job.sends += 1;
        let sent = Instant::now();
        let id = job.id;
        self.flights.insert(id, Flight { job, process, link, sent, started: None, suspect });
    }

    fn put_back(&mut self, job: Job, suspect: bool) {
        if suspect {
            self.suspects.push_front(job);
        } else {
            self.lane(job.lane).push_front(job);
        }
    }

    /// The socket of the process in use has room again.
    pub(super) fn unblock(&mut self) {
        self.blocked = false;
    }

    /// True while the supervisor must wait for room in the socket.
    pub(super) fn is_blocked(&self) -> bool {
        self.blocked && self.current.is_some()
    }

    /// A ready process takes all new scans from now on.
    pub(super) fn open(&mut self, process: ProcessId, link: Arc<Link>, by_descriptor: bool) {
        self.current = Some(Current { process, link, by_descriptor });
        self.trial_until = Some(Instant::now() + TRIAL);
        self.closed = None;
        self.blocked = false;
        self.send_again_at = None;
    }

    /// Refuses what waits and what comes, until [`Flow::open`].
    pub(super) fn close(&mut self, error: ScanError) -> Vec<Finished> {
        self.closed = Some(error.clone());
        let suspects = self.suspects.drain(..);
        suspects
            .chain(self.on_access.take_all())
            .chain(self.on_demand.take_all())
            .map(|job| job.refuse(error.clone()))
            .collect()
    }

    /// A worker took the scan.
    pub(super) fn started(&mut self, process: ProcessId, id: u64) -> Result<(), NotYours> {
        match self.flights.get_mut(&id) {
            Some(flight) if flight.process == process && flight.started.is_none() => {
                flight.started = Some(Instant::now());
                Ok(())
            }
            _ => Err(NotYours { id }),
        }
    }

    /// A worker finished the scan.
    pub(super) fn reported(
        &mut self,
        process: ProcessId,
        id: u64,
        answer: Answer,
        generation: Generation,
    ) -> Result<Finished, NotYours> {
        let known = self.flights.get(&id);
        if !known.is_some_and(|flight| flight.process == process && flight.started.is_some()) {
            return Err(NotYours { id });
        }
        let Some(flight) = self.flights.remove(&id) else { return Err(NotYours { id }) };
        let result = match answer {
            Answer::Done(outcome) => Ok(outcome),
            Answer::Error { reason } => Err(ScanError::Failed { reason }),
            Answer::TimedOut { what } if what.is_empty() => Err(ScanError::TimedOut),
            Answer::TimedOut { what } => Err(ScanError::TimedOutIn { what }),
            Answer::Cancelled if flight.job.cancelled => Err(ScanError::Cancelled),
            // It would leave somebody who waits without a verdict.
            Answer::Cancelled => {
                Err(ScanError::Failed { reason: "it gave up a scan that is wanted".into() })
            }
        };
        Ok(flight.finish(result, Some(generation)))
    }

    /// Takes back all scans of a process that is gone: ends those to blame, queues the others again
    /// in front, in their old order.
    pub(super) fn lost(&mut self, process: ProcessId, blame: Blame) -> Vec<Finished> {
        if self.current.as_ref().is_some_and(|current| current.process == process) {
            self.current = None;
            self.blocked = false;
        }
        let now = Instant::now();
        let mut gone: Vec<Flight> = self
            .flights
            .extract_if(|_, flight| flight.process == process)
            .map(|(_, f)| f)
            .collect();
        // Each is put in front of the one before, so the oldest comes last.
        gone.sort_by_key(|flight| std::cmp::Reverse(flight.job.id));
        let alone = gone.iter().filter(|flight| flight.started.is_some()).count() == 1;
        gone.into_iter().filter_map(|flight| self.judge(flight, blame, alone, now)).collect()
    }

    /// One scan of a process that is gone.
    fn judge(
        &mut self,
        mut flight: Flight,
        blame: Blame,
        alone: bool,
        now: Instant,
    ) -> Option<Finished> {
        let in_work = flight.started.is_some();
        let mut suspect = flight.suspect;
        match blame {
            Blame::Overdue if deadline(&flight).is_some_and(|at| at <= now) => {
                return Some(flight.finish(Err(ScanError::TimedOut), None));
            }
            Blame::InWork if in_work => {
                let had_company = flight.suspect && !alone;
                flight.job.company += u8::from(had_company);
                flight.job.blame += if had_company { IN_COMPANY } else { BLAMED };
                suspect = true;
                if flight.job.blame >= MOST_BLAME {
                    return Some(flight.finish(Err(ScanError::KilledTwice), None));
                }
            }
            Blame::Overdue | Blame::InWork | Blame::Nobody => {}
        }
        if flight.job.cancelled {
            return Some(flight.finish(Err(ScanError::Cancelled), None));
        }
        if flight.job.sends >= MOST_SENDS {
            return Some(flight.finish(Err(ScanError::Replaced), None));
        }
        if let Some(error) = &self.closed {
            return Some(flight.job.refuse(error.clone()));
        }
        self.put_back(flight.job, suspect);
        None
    }

    /// True when nothing is at the process.
    pub(super) fn is_idle(&self, process: ProcessId) -> bool {
        !self.flights.values().any(|flight| flight.process == process)
    }

    /// True when a scan of the process is past its limit.
    pub(super) fn is_overdue(&self, process: ProcessId, now: Instant) -> bool {
        self.of(process).filter_map(deadline).any(|at| at <= now)
    }

    /// True when the process has a free worker and leaves a scan waiting. Means something only when
    /// the process was silent for as long: a worker may have got free this moment.
    pub(super) fn is_stalled(&self, process: ProcessId, now: Instant) -> bool {
        let in_work = self.of(process).filter(|flight| flight.started.is_some()).count();
        in_work < self.workers.all() as usize
            && self.of(process).any(|flight| flight.started.is_none() && flight.sent + STALL <= now)
    }

    /// The next moment at which a scan passes its limit, or is to be sent again.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let send_again = self.current.as_ref().and(self.send_again_at);
        let until = self.alone_until().or(self.trial_until.filter(|_| !self.suspects.is_empty()));
        let company = until.map(|until| until + LATER).filter(|until| *until > Instant::now());
        self.flights.values().filter_map(deadline).chain(send_again).chain(company).min()
    }

    fn of(&self, process: ProcessId) -> impl Iterator<Item = &Flight> {
        self.flights.values().filter(move |flight| flight.process == process)
    }
}

/// Small content goes with the message, unless the engine wants a descriptor.
fn send(link: &Link, job: &Job, by_descriptor: bool) -> io::Result<()> {
    let bytes = encode_to_engine(job.message()).map_err(io::Error::other)?;
    match job.content.inline() {
        Some(content) if !by_descriptor => link.send([&bytes, content], None),
        _ => link.send([&bytes, &[]], Some(job.content.descriptor()?)),
    }
}

/// When the scan passes its limit; None until a worker took it.
fn deadline(flight: &Flight) -> Option<Instant> {
    flight.started.map(|started| started + flight.job.timeout)
}
