//! Carrying out what the host decided.
//!
//! An allow counts only while the file is as it was at the start of its read. If not it is read
//! again, [`READS_MAX`] times in all; then fail mode decides. A file is marked clean before the
//! answer, see [`Driver::remember_clean`].

use crate::driver::{Ask, Driver, Job, Purpose, Subject, count, decision};
use crate::event::HeldEvent;
use crate::file::Look;
use crate::hunt::{self, Hunted};
use crate::on_demand::Judging;
use crate::remedy::Task;
use crate::remember::When;
use crate::scan;
use crate::session::{Pending, Session};
use crate::truth::{self, Born, ShownPath};
use seawall_fanotify::{Answer, FileHandle};
use seawall_proto::{
    Clean, Decision, ExposureReason, Mode, Notice, Operation, Outcome, Process, Remediation,
    Running, ToHost, Verdict, VerdictKind,
};
use std::os::fd::AsFd;
use std::sync::Arc;

/// How often a content that changes under the read is read.
pub const READS_MAX: u8 = 3;

/// Carries out one verdict. Runs on the session's thread: it must not wait, so what nobody waits for is
/// left to another.
pub fn take(
    driver: &Driver,
    session: &Arc<Session>,
    pending: Pending,
    verdict: Verdict,
    judging: Judging,
) {
    let asked = pending.job.as_ref().filter(|job| job.ask != Ask::Content);
    asked.into_iter().for_each(|job| learn(driver, job, false));
    match &pending.job {
        Some(Job { subject: Subject::Background { .. }, ask, .. }) => {
            let is_on_demand = pending.operation() == Some(Operation::OnDemand);
            if is_on_demand && *ask == Ask::Hash {
                driver.on_demand.knew(true);
            }
            if is_on_demand && verdict.decision == Some(Decision::Allow) && pending.look.steady {
                return allow_unopened(driver, &pending.look, &verdict);
            }
            let (pending, verdict) = (Box::new(pending), Box::new(verdict));
            let judged =
                Task::Judged { pending, verdict, _judging: is_on_demand.then_some(judging) };
            driver.remedy(session, judged);
        }
        _ => carry_out(driver, session, pending, verdict),
    }
}

/// What came of asking without the content.
fn learn(driver: &Driver, job: &Job, in_vain: bool) {
    let is_access = matches!(job.subject, Subject::Access(_));
    if job.fingerprint.is_some() {
        driver.patience.golden.was(in_vain);
    } else if is_access && job.ask == Ask::Hash {
        driver.patience.large.was(in_vain);
    }
}

/// The host wants the content itself. Never waits.
pub fn send_content(driver: &Driver, pending: Pending) {
    let Some(job) = pending.job else { return };
    learn(driver, &job, true);
    let job = Job { ask: Ask::Content, ..job };
    match &job.subject {
        Subject::Access(_) => driver.push_job(job),
        Subject::Background { purpose: Purpose::OnDemand, .. } => driver.on_demand.unknown(job),
        Subject::Background { .. } => {
            scan::abandon(driver, &job.subject, ExposureReason::HostError);
        }
    }
}

/// The same for a file that is closed and may be gone. May wait for a disk.
pub fn take_later(driver: &Driver, session: &Arc<Session>, pending: Pending, verdict: Verdict) {
    let Pending { job: Some(job), look, .. } = pending else { return };
    let Some(subject) = job.subject.clone().opened(driver) else { return };
    carry_out(driver, session, Pending::of(Job { subject, ..job }, look), verdict);
}

fn carry_out(driver: &Driver, session: &Arc<Session>, pending: Pending, verdict: Verdict) {
    let Pending { job: Some(job), look, .. } = pending else { return };
    match verdict.decision {
        Some(Decision::Allow) => {
            let when = When { epoch: driver.epoch(), unwritten: false };
            allow(driver, job, &look, clean(&verdict), when);
        }
        Some(Decision::Deny) => deny(driver, session, job, look, &verdict),
        None => {
            let late = verdict.kind == VerdictKind::TimedOut;
            let reason = if late { ExposureReason::Deadline } else { ExposureReason::HostError };
            // The host knows what it had no verdict on.
            if job.subject.operation() != Operation::OnDemand {
                scan::abandon(driver, &job.subject, reason);
            }
        }
    }
}

/// Lets an access go on whose content is clean, or allowed all the same.
pub fn allow(driver: &Driver, job: Job, look: &Look, clean: Option<Clean>, when: When) {
    // Before it is marked, too: what has changed shall not have a mark for a moment.
    match job.subject.file().map(Look::at) {
        Some(Ok(now)) if now.identity == look.identity => (),
        // Of a file that is gone what it held is known.
        None => (),
        Some(Ok(now)) if is_written(driver, &job, look, clean) => {
            return allow_written(driver, &job, &now);
        }
        _ => return read_again(driver, job),
    }
    // Before it is remembered: what somebody writes is noted anew then.
    if let Subject::Background { purpose, .. } = &job.subject {
        driver.done(*purpose);
    }
    if let Some((file, clean)) = job.subject.file().zip(remembered(driver, look, clean)) {
        // What was written until a moment ago is scanned after its close; that counts, not this.
        let file = file.as_fd();
        if !look.written || seawall_fanotify::is_open_for_writing(file).unwrap_or(false) {
            driver.remember_clean(file, look, when, clean);
        }
    }
    if let Subject::Access(event) = &job.subject {
        driver.note_exec(event, Answer::Allow);
        driver.answer(event.claim, Answer::Allow);
        event.end_turn();
    }
}

/// Whether an access is to a file that has changed under the read since somebody has it open for writing, and fail mode
/// would let it through.
fn is_written(driver: &Driver, job: &Job, look: &Look, clean: Option<Clean>) -> bool {
    let Subject::Access(event) = &job.subject else { return false };
    look.written
        && clean.is_some_and(|clean| clean.generation == driver.generation())
        && event.operation == Operation::Open
        && driver.fails(event.claim, Some(&event.look), ExposureReason::Changing) == Answer::Allow
        && seawall_fanotify::is_open_for_writing(event.file.as_fd()).unwrap_or(false)
}

/// Lets it through as one that is written a moment after the read: to read it again would find the same, for ever.
fn allow_written(driver: &Driver, job: &Job, now: &Look) {
    let Subject::Access(event) = &job.subject else { return };
    let mode = driver.policy().mode;
    // In strict mode nobody is let through for what another's file was a moment ago.
    if mode != Mode::Strict || !now.user_changeable {
        driver.remember_exposed(event.file.as_fd(), now);
    }
    if driver.answer(event.claim, Answer::Allow) && !mode.scans_written() {
        // Nobody scans it when it is closed.
        let handle = FileHandle::of(event.file.as_fd(), now.identity.device).ok();
        driver.ledger.expose(handle.as_ref(), ExposureReason::Changing.number());
    }
    event.end_turn();
}

/// The same for a file that was as it was read, after the read: it need not be opened for that.
fn allow_unopened(driver: &Driver, look: &Look, verdict: &Verdict) {
    let epoch = driver.epoch();
    if let Some(clean) = remembered(driver, look, clean(verdict)) {
        driver.remember_unmarked(look, epoch, clean.unopened, clean.hash);
    }
    driver.done(Purpose::OnDemand);
}

/// What a verdict says of a content that it found clean.
fn clean(verdict: &Verdict) -> Option<Clean> {
    let unopened = verdict.kind == VerdictKind::Unopened;
    let is_clean = unopened || verdict.kind == VerdictKind::Clean;
    let hash = verdict.hash.filter(|_| is_clean)?;
    Some(Clean { unopened, generation: verdict.generation, hash })
}

/// Whether that is to be remembered of a file that looked so.
fn remembered(driver: &Driver, look: &Look, clean: Option<Clean>) -> Option<Clean> {
    clean.filter(|clean| clean.generation == driver.generation() && look.settled)
}

fn read_again(driver: &Driver, job: Job) {
    let reads = job.reads + 1;
    let Subject::Access(event) = &job.subject else {
        return scan::abandon(driver, &job.subject, ExposureReason::Changing);
    };
    if reads < READS_MAX {
        return driver.push_job(Job { reads, ..job });
    }
    driver.give_up(event, ExposureReason::Changing);
}

fn deny(driver: &Driver, session: &Arc<Session>, job: Job, look: Look, verdict: &Verdict) {
    let process = match &job.subject {
        Subject::Access(event) => event.process().clone(),
        Subject::Background { .. } => Process::default(),
    };
    // It may have been found clean before it changed in a way that its times do not show.
    if let Some(file) = job.subject.file() {
        driver.forget(file, &look.identity);
    }
    let decided = match &job.subject {
        Subject::Access(event) => deny_access(driver, event),
        Subject::Background { purpose, .. } => {
            driver.done(*purpose);
            None
        }
    };
    let detail = verdict.detail.clone().unwrap_or_default();
    let mut known_path = ShownPath::default();
    if let Some(file) = job.subject.file() {
        // What it was that was let through before is known now.
        if let Ok(handle) = FileHandle::of(file.as_fd(), look.identity.device) {
            driver.background.judged(handle);
        }
        let shown = truth::shown_path(file, look.identity.device, look.identity.inode);
        let path = String::from_utf8_lossy(&shown.path).escape_debug().to_string();
        let done = if decided.is_some() { "denied" } else { "nobody waited for it" };
        driver.note_verdict(path, format!("{} ({detail}), {done}", word(verdict.kind)));
        known_path = shown;
    }
    tell_outcome(session, Outcome { id: verdict.id, decision: decided, process });
    if verdict.running != Running::Leave {
        let gone = Born { device: look.identity.device, inode: look.identity.inode, at: None };
        let key = job.subject.file().and_then(|file| truth::born(file, "")).unwrap_or(gone);
        hunt::begin(driver, key, Hunted { path: known_path, running: verdict.running });
    }
    if verdict.remediation == Remediation::Quarantine {
        let Job { subject, .. } = job;
        driver.remedy(session, Task::Offer { id: verdict.id, subject, look });
    }
}

fn word(kind: VerdictKind) -> &'static str {
    match kind {
        VerdictKind::Clean | VerdictKind::Unopened => "clean",
        VerdictKind::Infected => "infected",
        VerdictKind::Error => "error",
        VerdictKind::TimedOut => "timed out",
        VerdictKind::Excluded => "excluded",
    }
}

fn deny_access(driver: &Driver, event: &HeldEvent) -> Option<Decision> {
    driver.note_exec(event, Answer::Deny);
    let is_first = driver.answer(event.claim, Answer::Deny);
    event.end_turn();
    if !is_first {
        driver.note_lost(event);
        return None;
    }
    count(&driver.counters.denied);
    Some(decision(Answer::Deny))
}

fn tell_outcome(session: &Session, outcome: Outcome) {
    if session.send(&ToHost::Notice(Notice::Outcome(outcome))).is_err() {
        session.end();
    }
}
