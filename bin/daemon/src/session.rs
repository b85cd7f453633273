//! A guest's session: from the proof of its driver to the end of its connection.
//!
//! One thread reads what the driver says, copies content and looks up verdicts; it alone changes
//! the open requests. Verdicts of scans come from engines' threads through [`Session::answer`].
//! Whatever the driver says that the protocol does not allow ends this session and nothing else.

mod notices;
mod remedies;
mod requests;
mod ring;

use crate::config::{Action, PolicyConfig};
use crate::guest::Guest;
use crate::host::Host;
use crate::link::{LinkReader, ReadError, Socket};
use crate::metrics::Metrics;
use crate::outbox::Outbox;
use crate::pipeline::{Answer, Finding};
use crate::region::OpenRegion;
use notices::Waiting;
use remedies::{Remedy, Wanted};
use requests::{Asked, Requests};
use ring::Ring;
use seawall_client::text::escape_short;
use seawall_client::{
    Coverage, Driver, DriverCounters, EngineReport, Event, EventKind, FoundFile, LinkKind, Verdict,
};
use seawall_proto::frame::{Decoder, FrameError, decode};
use seawall_proto::serial::Token;
use seawall_proto::{
    ContentHash, Decision, Fingerprint, Generation, Golden, Heartbeat, Operation, Remediation,
    Running, ToGuest, ToHost, Verdict as ProtoVerdict, VerdictKind,
};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long the reader waits for bytes before it gives back memory that it keeps for reuse.
const IDLE: Duration = Duration::from_secs(1);

/// What the driver did that ends its session.
#[derive(Debug, thiserror::Error)]
enum Breach {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("a second attach message")]
    AttachedTwice,
    #[error("request {id} does not follow request {highest}: numbers must grow")]
    Order { id: u64, highest: u64 },
    #[error("content for request {id}, which was never begun")]
    UnknownRequest { id: u64 },
    #[error("a path of {len} bytes; the most is 4096")]
    PathTooLong { len: usize },
}

/// What other threads see of a session.
pub struct Session {
    pub guest: Arc<Guest>,
    pub link: LinkKind,
    pub started: jiff::Timestamp,
    pub driver: Driver,
    pub outbox: Outbox,
    /// Requests that wait for their verdict.
    pub outstanding: AtomicU32,
    life: Mutex<Life>,
    /// Verdict events that wait for what the driver made of them.
    pending: Mutex<Waiting>,
    /// What the driver knows of what is done with fingerprints.
    golden: Mutex<Golden>,
    /// What the driver was told to offer for quarantine, and has not yet.
    wanted: Mutex<Wanted>,
    host: Arc<Host>,
}

/// The driver's last heartbeat and coverage.
struct Life {
    heartbeat: Instant,
    counters: DriverCounters,
    coverage: Coverage,
}

impl Session {
    pub fn new(
        host: Arc<Host>,
        guest: Arc<Guest>,
        link: LinkKind,
        driver: Driver,
        outbox: Outbox,
    ) -> Arc<Self> {
        let life = Life {
            heartbeat: Instant::now(),
            counters: DriverCounters::default(),
            coverage: Coverage::default(),
        };
        Arc::new(Self {
            guest,
            link,
            started: jiff::Timestamp::now(),
            driver,
            outbox,
            outstanding: AtomicU32::new(0),
            life: Mutex::new(life),
            pending: Mutex::new(Waiting::Open(HashMap::new())),
            golden: Mutex::default(),
            wanted: Mutex::default(),
            host,
        })
    }

    /// Ends the session; `why` stands in the log.
    pub fn end(&self, why: &str) {
        self.outbox.end(why);
    }

    /// Says what the driver is to do. Held back by nothing but the outbox: whoever calls it holds what keeps the
    /// order of such news.
    pub fn tell_policy(&self, policy: &PolicyConfig) {
        for part in policy.to_proto().to_parts() {
            self.outbox.push(&ToGuest::Policy(part));
        }
    }

    fn golden(&self) -> MutexGuard<'_, Golden> {
        self.golden.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says what is known of golden images, where the driver does not know it.
    pub fn tell_golden(&self) {
        self.tell(None);
    }

    /// Says whether a walk through a template is under way.
    pub fn learn(&self, learns: bool) {
        self.tell(Some(learns));
    }

    fn tell(&self, learns: Option<bool>) {
        let mut told = self.golden();
        let knows = self.host.golden.knows(self.guest.name(), &self.guest.policy().tenant());
        let now = Golden { knows, learns: learns.unwrap_or(told.learns) };
        if std::mem::replace(&mut *told, now) != now {
            self.outbox.push(&ToGuest::Golden(now));
        }
    }

    /// The content that the file with this fingerprint has as far as is known, and it need not be looked at.
    fn golden_hash(&self, fingerprint: Fingerprint) -> Option<ContentHash> {
        let tenant = self.guest.policy().tenant();
        self.host.golden.hash_of(self.guest.name(), &tenant, fingerprint)
    }

    /// It has this content.
    fn compare_golden(&self, fingerprint: Fingerprint, hash: ContentHash, path: &[u8]) {
        let (golden, guest) = (&self.host.golden, self.guest.name());
        if !self.golden().learns
            && golden.compare(guest, &self.guest.policy().tenant(), fingerprint, hash, path)
        {
            self.tell_golden();
        }
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The age of the last heartbeat, what it said, and the coverage.
    pub fn report(&self) -> (Duration, DriverCounters, Coverage) {
        let life = self.life();
        (life.heartbeat.elapsed(), life.counters.clone(), life.coverage.clone())
    }

    fn metrics(&self) -> &Metrics {
        &self.host.metrics
    }

    fn heartbeat(&self, beat: &Heartbeat) {
        let mut life = self.life();
        life.heartbeat = Instant::now();
        life.counters = DriverCounters {
            events: beat.events,
            passed: beat.passed,
            remembered: beat.remembered,
            requests: beat.requests,
            denied: beat.denied,
            unscanned: beat.unscanned,
            overloaded: beat.overloaded,
            exposed: beat.exposed,
            held_by_writer: beat.held_by_writer,
            unknown: beat.unknown,
            mounts_exposed: beat.mounts_exposed,
            outstanding: beat.outstanding,
            supervised: beat.supervised,
            memory_kib: beat.memory_kib,
            cpu_ms: beat.cpu_ms,
        };
        drop(life);
        self.alive();
        self.outbox.push(&ToGuest::Alive);
    }

    fn alive(&self) {
        self.guest.watch.lock().unwrap_or_else(PoisonError::into_inner).alive();
    }

    /// Sends the verdict for a request, once. Comes from any thread; never waits.
    fn answer(&self, asked: &Asked, hash: Option<ContentHash>, answer: &Answer) {
        let rest = self.without_excluded(answer);
        let answer = rest.as_ref().unwrap_or(answer);
        let is_nothing = matches!(&answer.finding, Finding::Infected(found) if found.is_empty());
        // Who had no verdict might have found something else.
        let has_failed =
            |report: &&EngineReport| matches!(report.verdict, Verdict::Error | Verdict::TimedOut);
        if is_nothing && let Some(report) = answer.engines.iter().find(has_failed) {
            let why =
                format!("all that was found is excluded, and {} had no verdict", report.engine);
            let failed = Answer::new(Finding::Error(why), answer.generation);
            return self.answer(asked, hash, &failed);
        }
        if is_nothing || hash.is_some_and(|hash| self.guest.policy().excludes(hash)) {
            return self.exclude(asked, hash, answer.generation);
        }
        let verdict = answer.finding.verdict();
        self.metrics().verdicts.count(verdict);
        self.guest.verdicts.count(verdict);
        let (kind, decision, detail) = match &answer.finding {
            Finding::Clean if asked.unopened => {
                (VerdictKind::Unopened, Some(Decision::Allow), None)
            }
            Finding::Clean => (VerdictKind::Clean, Some(Decision::Allow), None),
            Finding::Infected(found) => (
                VerdictKind::Infected,
                Some(Decision::Deny),
                found.first().map(|detection| detection.name.clone()),
            ),
            Finding::Error(why) => (VerdictKind::Error, None, Some(why.clone())),
            Finding::TimedOut(why) => (VerdictKind::TimedOut, None, Some(why.clone())),
        };
        let (decision, remediation) = match self.remedy(asked, hash, answer) {
            Remedy::None => (decision, Remediation::None),
            Remedy::Quarantine => (decision, Remediation::Quarantine),
            Remedy::Allowed => (Some(Decision::Allow), Remediation::None),
        };
        if verdict != Verdict::Clean && decision != Some(Decision::Allow) {
            // Before the verdict goes: the driver may answer at once.
            self.expect_outcome(asked, hash, answer);
        }
        if verdict == Verdict::Clean
            && asked.operation == Operation::OnDemand
            && let (Some(fingerprint), Some(hash)) = (asked.fingerprint, hash)
            && self.golden().learns
        {
            self.host.scans.learned(self, fingerprint, hash);
        }
        if asked.operation == Operation::OnDemand {
            self.count_on_demand(asked, hash, answer, decision, remediation);
        }
        let running = match (kind, decision) {
            (VerdictKind::Infected, Some(Decision::Deny)) => {
                self.guest.policy().action.running.into()
            }
            _ => Running::Leave,
        };
        self.say_verdict(ProtoVerdict {
            id: asked.id,
            kind,
            decision,
            generation: answer.generation,
            hash,
            detail,
            remediation,
            running,
        });
    }

    /// What the scan of this guest's files is told of one of them.
    fn count_on_demand(
        &self,
        asked: &Asked,
        hash: Option<ContentHash>,
        answer: &Answer,
        decision: Option<Decision>,
        remediation: Remediation,
    ) {
        let path = asked.file.path.as_slice();
        match &answer.finding {
            Finding::Clean => (),
            Finding::Infected(found) => {
                let Some(first) = found.first() else { return };
                let deletes = self.guest.policy().action.about(found).0 == Action::Delete;
                let action = match (decision, remediation) {
                    (_, Remediation::Quarantine) if deletes => "delete",
                    (_, Remediation::Quarantine) => "quarantine",
                    (Some(Decision::Allow), _) => "allow",
                    _ => "deny",
                };
                let found = FoundFile {
                    path: crate::scans::short(path),
                    detection: escape_short(first.name.as_bytes(), 256),
                    severity: first.severity.clone(),
                    engine: first.engine.clone(),
                    member: first.member.clone(),
                    hash: hash.map(|hash| hash.to_string()).unwrap_or_default(),
                    action: action.to_owned(),
                };
                self.host.scans.found(self, found);
            }
            Finding::Error(why) | Finding::TimedOut(why) => {
                self.host.scans.no_verdict(self, path, why);
            }
        }
    }

    /// The answer without the detections that policy excludes, where there are any.
    fn without_excluded(&self, answer: &Answer) -> Option<Answer> {
        let Finding::Infected(found) = &answer.finding else { return None };
        let exclude = &self.guest.policy().exclude;
        let rest: Vec<_> =
            found.iter().filter(|one| exclude.detection(&one.name).is_none()).cloned().collect();
        (rest.len() < found.len())
            .then(|| Answer { finding: Finding::Infected(rest.into()), ..answer.clone() })
    }

    /// Lets through what policy excludes. No driver remembers it as clean.
    fn exclude(&self, asked: &Asked, hash: Option<ContentHash>, generation: Generation) {
        self.metrics().excluded.fetch_add(1, Relaxed);
        self.say_verdict(ProtoVerdict {
            id: asked.id,
            kind: VerdictKind::Excluded,
            decision: Some(Decision::Allow),
            generation,
            hash,
            detail: None,
            remediation: Remediation::None,
            running: Running::Leave,
        });
    }

    /// A request that named a hash is over: nothing, or nothing good, is known of it.
    fn want_content(&self, id: seawall_proto::RequestId) {
        self.outstanding.fetch_sub(1, Relaxed);
        self.outbox.push(&ToGuest::SendContent(id));
    }

    fn say_verdict(&self, verdict: ProtoVerdict) {
        self.outstanding.fetch_sub(1, Relaxed);
        self.outbox.push(&ToGuest::Verdict(verdict));
    }

    /// Reads what the driver says until the session ends. Runs on the session's own thread. Where the
    /// driver begins anew on the same connection, gives what was not read yet.
    pub fn run(
        self: &Arc<Self>,
        socket: &Socket,
        mut reader: LinkReader,
        mut decoder: Decoder,
        region: Arc<OpenRegion>,
    ) -> Option<(LinkReader, Token)> {
        self.alive();
        self.host.quarantine.attached(self);
        let mut ring = Ring::begin(self, &region);
        let mut requests = Requests::new(Arc::clone(self), region);
        let breach = loop {
            if let Err(breach) = self.handle_all(&mut decoder, &mut requests, ring.as_mut()) {
                break breach;
            }
            match ring.as_mut().map_or(Ok(false), |ring| ring.turn(&mut reader, &mut decoder)) {
                Ok(true) => continue,
                Ok(false) => {}
                Err(error) => break error.into(),
            }
            match reader.read(|bytes| decoder.extend(bytes)) {
                Ok(true) => {}
                Ok(false) => {
                    requests.rest();
                    ring.iter_mut().for_each(Ring::rest);
                }
                Err(error) => break error.into(),
            }
        };
        let renewed = match &breach {
            Breach::Read(ReadError::Renewed(token)) => Some(*token),
            _ => None,
        };
        match renewed {
            Some(_) => socket.retire(),
            None => socket.end(),
        }
        self.host.guest_left(self, &breach);
        requests.abandon();
        self.flush_all();
        renewed.map(|token| (reader, token))
    }

    /// Prepares the socket for [`Session::run`].
    pub fn patience() -> Duration {
        IDLE
    }

    fn handle_all(
        self: &Arc<Self>,
        decoder: &mut Decoder,
        requests: &mut Requests,
        mut ring: Option<&mut Ring>,
    ) -> Result<(), Breach> {
        while let Some(payload) = decoder.next_payload()? {
            // A message of a later version is skipped.
            let Some(message) = decode::<ToHost>(payload)? else { continue };
            match message {
                ToHost::Attach(_) => return Err(Breach::AttachedTwice),
                ToHost::ScanRequest(request) => requests.begin(request, None)?,
                ToHost::Fingerprinted(fingerprint, request) => {
                    requests.begin(request, Some(fingerprint))?;
                }
                ToHost::Ended(ended) => requests.ended(ended)?,
                ToHost::Content(content) => requests.go_on(content)?,
                ToHost::Cancel(id) => requests.cancel(id),
                ToHost::Doorbell => ring.iter_mut().for_each(|ring| ring.rung()),
                ToHost::Heartbeat(beat) => self.heartbeat(&beat),
                ToHost::Notice(notice) => self.notice(notice),
                ToHost::Offer(offer) => self.offered(offer),
                ToHost::Removed(removed) => {
                    self.host.quarantine.removed(self.guest.name(), removed);
                }
                ToHost::RestoreProgress(progress) => {
                    self.host.quarantine.restore_progress(self.guest.name(), progress);
                }
                ToHost::Restored(restored) => {
                    self.host.quarantine.restore_done(self.guest.name(), restored);
                }
                ToHost::WalkProgress(progress) => self.host.scans.progress(self, &progress),
                ToHost::WalkMissed(missed) => self.host.scans.missed(self, &missed),
            }
        }
        Ok(())
    }
}

impl Host {
    /// A session is over: says so once, and who ended it.
    fn guest_left(&self, session: &Arc<Session>, breach: &Breach) {
        let guest = &session.guest;
        let reason = match (session.outbox.ended(), breach) {
            (Some(why), _) => {
                tracing::warn!(guest = guest.name(), "the session ends: {why}");
                why
            }
            (None, Breach::Read(ReadError::Ended | ReadError::Renewed(_))) => {
                tracing::info!(guest = guest.name(), "the session ends: {breach}");
                breach.to_string()
            }
            (None, _) => {
                let why = breach.to_string();
                guest.complain(&format!("the session ends: {why}"));
                session.end(&why);
                why
            }
        };
        // The sending thread must end in every case.
        session.end(&reason);
        self.events.emit(Event::new(EventKind::SessionEnded).guest(guest.name()).reason(reason));
        guest.end_session(session);
    }
}
