//! What the driver reports, and the events made of it.
//!
//! The event of a verdict other than clean waits a little for the driver's word on what it did with
//! the access, so that one line tells the whole story.

use super::Session;
use crate::events::hex;
use crate::pipeline::{Answer, Finding};
use crate::session::requests::Asked;
use seawall_client::text::{escape, escape_short};
use seawall_client::{Coverage, Event, EventKind, Uncovered};
use seawall_proto::{
    ContentHash, Decision, ExposureReason, FileMetadata, Mapper, MapperEnd, Notice, Operation,
    Outcome, Process, RequestId,
};
use std::collections::HashMap;
use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a verdict's event waits for the driver's word.
const PATIENCE: Duration = Duration::from_secs(2);
/// Events of one session that wait; more are written without the driver's word.
const PENDING_MAX: usize = 2048;
/// File systems that are not watched, kept for one guest.
const UNCOVERED_MAX: usize = 256;
/// No report is older than this, in milliseconds: a year.
const OLDEST_MS: i64 = 365 * 24 * 3_600_000;
/// Characters kept of a text that the driver reports, but for paths.
const TEXT_MAX: usize = 128;

/// A verdict's event that waits for what the driver made of it.
pub struct Pending {
    until: Instant,
    event: Event,
}

/// The events that wait.
pub enum Waiting {
    Open(HashMap<RequestId, Pending>),
    /// The session is over: nothing more comes from the driver.
    Over,
}

impl Waiting {
    /// Takes the event, or gives it back when it need not wait.
    fn add(&mut self, id: RequestId, pending: Pending) -> Option<Pending> {
        match self {
            Self::Open(waiting) if waiting.len() < PENDING_MAX => waiting.insert(id, pending),
            _ => Some(pending),
        }
    }
}

impl Session {
    fn pending(&self) -> MutexGuard<'_, Waiting> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Prepares the event of a verdict that is not clean.
    pub fn expect_outcome(&self, asked: &Asked, hash: Option<ContentHash>, answer: &Answer) {
        let mut event = self.file_event(EventKind::Verdict, asked.operation, &asked.file);
        event.verdict = Some(answer.finding.verdict());
        event.hash = hash.map(|hash| hash.to_string());
        event.size = Some(asked.size);
        event.generation = Some(answer.generation.0);
        event.duration_us =
            Some(u64::try_from(asked.since.elapsed().as_micros()).unwrap_or(u64::MAX));
        match &answer.finding {
            Finding::Clean => {}
            Finding::Infected(found) => {
                if let Some(first) = found.first() {
                    event.detection = Some(escape_short(first.name.as_bytes(), 256));
                    event.engine = Some(first.engine.clone());
                    event.member = first.member.clone();
                }
            }
            Finding::Error(why) | Finding::TimedOut(why) => event.reason = Some(why.clone()),
        }
        let until = Instant::now() + PATIENCE;
        let at_once = self.pending().add(asked.id, Pending { until, event });
        if let Some(pending) = at_once {
            self.host.events.emit(pending.event);
        }
    }

    /// Writes the events whose driver has not spoken in time.
    pub fn flush_pending(&self, now: Instant) {
        let due = match &mut *self.pending() {
            Waiting::Open(waiting) => {
                waiting.extract_if(|_, waits| waits.until <= now).collect::<Vec<_>>()
            }
            Waiting::Over => return,
        };
        self.write(due);
    }

    /// Writes all events that wait; those of verdicts that come later wait no more.
    pub fn flush_all(&self) {
        if let Waiting::Open(waiting) = std::mem::replace(&mut *self.pending(), Waiting::Over) {
            self.write(waiting.into_iter().collect());
        }
    }

    fn write(&self, mut events: Vec<(RequestId, Pending)>) {
        events.sort_by_key(|(id, _)| *id);
        for (_, waited) in events {
            self.host.events.emit(waited.event);
        }
    }

    pub fn file_event(&self, kind: EventKind, operation: Operation, file: &FileMetadata) -> Event {
        let mut event = self.path_event(kind, &file.path);
        event.path_is_true = Some(file.path_is_true);
        event.operation = Some(operation_name(operation).to_owned());
        event.pid = (file.pid != 0).then_some(file.pid);
        event
    }

    /// An event about a path that the driver says.
    fn path_event(&self, kind: EventKind, path: &[u8]) -> Event {
        let path = &path[..path.len().min(4096)];
        let mut event = Event::new(kind).guest(self.guest.name());
        event.path = (!path.is_empty()).then(|| escape(path));
        event.path_hex = std::str::from_utf8(path).is_err().then(|| hex(path));
        event
    }

    /// The driver reports something.
    pub fn notice(&self, notice: Notice) {
        match notice {
            Notice::Outcome(outcome) => self.outcome(&outcome),
            Notice::Unscanned {
                mut file,
                operation,
                reason,
                decision,
                process,
                waited_ms,
                age_ms,
            } => {
                file.path.truncate(4096);
                let mut event = self.file_event(EventKind::Unscanned, operation, &file);
                event.decision = Some(decision_name(decision).to_owned());
                event.size = Some(file.size);
                event.reason = Some(exposure(reason).to_owned());
                event.duration_us = Some(u64::from(waited_ms) * 1000);
                event.occurred = before_now(age_ms);
                add_process(&mut event, &process);
                self.host.events.emit(event);
            }
            Notice::Coverage(coverage) => self.coverage(&coverage),
            Notice::ExposureGone { path, reason } => {
                let mut event = self.path_event(EventKind::ExposureGone, &path);
                event.reason = Some(exposure(reason).to_owned());
                self.host.events.emit(event);
            }
            Notice::MountExposed { mount_point } => {
                let all: &[u8] = if mount_point.is_empty() { b"/" } else { &mount_point };
                self.guest.complain("more files were let through unscanned than can be noted");
                self.host.events.emit(self.path_event(EventKind::MountExposed, all));
            }
            Notice::Mapped { path, path_is_true, mappers, more } => {
                self.mapped(&path, path_is_true, &mappers, more);
            }
            Notice::WorkerRestarted { orphans } => {
                self.guest.complain(&format!(
                    "the driver's worker died and was restarted; {orphans} accesses were answered by fail mode"
                ));
                let mut event = Event::new(EventKind::WorkerRestarted).guest(self.guest.name());
                event.count = Some(orphans.into());
                self.host.events.emit(event);
            }
        }
    }

    /// One event for each process; the last tells how many more there are.
    fn mapped(&self, path: &[u8], path_is_true: bool, mappers: &[Mapper], more: u32) {
        let mappers = &mappers[..mappers.len().min(Mapper::MOST)];
        for (number, mapper) in mappers.iter().enumerate() {
            let mut event = self.path_event(EventKind::Mapped, path);
            event.path_is_true = Some(path_is_true);
            event.pid = Some(mapper.pid);
            add_process(&mut event, &mapper.process);
            event.reason = Some(mapper_end(mapper.end));
            event.count = (more > 0 && number + 1 == mappers.len()).then_some(more.into());
            self.host.events.emit(event);
        }
    }

    fn outcome(&self, outcome: &Outcome) {
        let waited = match &mut *self.pending() {
            Waiting::Open(waiting) => waiting.remove(&outcome.id),
            Waiting::Over => None,
        };
        let mut event = waited.map_or_else(
            || Event::new(EventKind::Outcome).guest(self.guest.name()),
            |waited| waited.event,
        );
        event.decision = outcome.decision.map(|decision| decision_name(decision).to_owned());
        add_process(&mut event, &outcome.process);
        self.host.events.emit(event);
    }

    fn coverage(&self, said: &seawall_proto::Coverage) {
        let uncovered = said.uncovered.iter().take(UNCOVERED_MAX).map(|system| Uncovered {
            mount_point: escape_short(&system.mount_point, 4096),
            fs_type: escape_short(system.fs_type.as_bytes(), TEXT_MAX),
            reason: escape_short(system.reason.as_bytes(), TEXT_MAX),
        });
        let coverage = Coverage { covered: said.covered, uncovered: uncovered.collect() };
        let mut life = self.life();
        if life.coverage == coverage {
            return;
        }
        life.coverage = coverage.clone();
        drop(life);
        let mut event = Event::new(EventKind::Coverage).guest(self.guest.name());
        event.count = Some(said.uncovered.len() as u64);
        let first: Vec<_> = coverage
            .uncovered
            .iter()
            .take(8)
            .map(|system| format!("{} ({}): {}", system.mount_point, system.fs_type, system.reason))
            .collect();
        event.reason = Some(format!(
            "{} file systems are watched, {} are not{}{}",
            coverage.covered,
            said.uncovered.len(),
            if first.is_empty() { "" } else { ": " },
            first.join("; ")
        ));
        self.host.events.emit(event);
    }
}

/// Who waited, as far as the driver knows.
fn add_process(event: &mut Event, process: &Process) {
    event.process = (!process.name.is_empty()).then(|| escape_short(&process.name, TEXT_MAX));
    event.uid = process.uid;
}

/// When it was so many milliseconds ago; `None` for just now and for what cannot be.
fn before_now(age_ms: u64) -> Option<String> {
    let age = i64::try_from(age_ms).ok().filter(|age| (1_000..=OLDEST_MS).contains(age))?;
    let then = jiff::Timestamp::now().checked_sub(jiff::SignedDuration::from_millis(age)).ok()?;
    Some(crate::events::format_time(then))
}

fn operation_name(operation: Operation) -> &'static str {
    match operation {
        Operation::Open => "open",
        Operation::Exec => "exec",
        Operation::Background => "background",
        Operation::OnDemand => "on_demand",
    }
}

fn decision_name(decision: Decision) -> &'static str {
    match decision {
        Decision::Allow => "allow",
        Decision::Deny => "deny",
    }
}

fn mapper_end(end: MapperEnd) -> String {
    match end {
        MapperEnd::Left => "it runs on, as policy says".to_owned(),
        MapperEnd::Stopped => "it was stopped".to_owned(),
        MapperEnd::Killed => "it was killed".to_owned(),
        MapperEnd::Spared => {
            "it runs on: the guest's first process has the file mapped, too".to_owned()
        }
        MapperEnd::Failed { errno } => {
            format!("it runs on: {}", std::io::Error::from_raw_os_error(errno))
        }
    }
}

fn exposure(reason: ExposureReason) -> &'static str {
    match reason {
        ExposureReason::LinkDown => "no session with the host",
        ExposureReason::Deadline => "the deadline passed",
        ExposureReason::TooLarge => "larger than the whole-file limit",
        ExposureReason::HostError => "the host had no verdict",
        ExposureReason::Overload => "too many accesses were outstanding",
        ExposureReason::Changing => "the content changed each time it was read",
        ExposureReason::Unreadable => "the driver could not read the file",
        ExposureReason::WorkerDied => "the worker that held the access died",
        ExposureReason::HeldByWriter => "somebody had it open for writing",
        ExposureReason::RanBefore => "it ran before the driver watched it",
    }
}
