//! Filling: what needs a scan is read into free slots and sent to the host.
//!
//! ```text
//!   job ──► excluded, remembered, too large: answered here
//!     └──► content into slots ──► ScanRequest, Content… ──► waits in the session for its verdict
//! ```
//!
//! A filler may wait for a disk, for slots or for the link: the deadline answers meanwhile, and the
//! filler finds the claim taken. A file is read to the size that it had at the start; whether it is
//! still the same is looked at before an allow ([`crate::verdict`]).

use crate::coverage;
use crate::driver::{Driver, Job, Subject, count, metadata};
use crate::event::HeldEvent;
use crate::file::Look;
use crate::memory::Known;
use crate::session::{Opening, Session};
use crate::truth::{self, ShownPath};
use seawall_fanotify::{Answer, process};
use seawall_proto::{ExposureReason, Operation};
use seawall_region::{GuestRegion, Slot, layout::SLOT_LEN};
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Slots filled before a part of a long content is sent.
const PART: usize = 16;
/// How long a scan for which nobody waits may take, in milliseconds, and how much longer for each MiB.
const BACKGROUND_MS: u64 = 60_000;
const BACKGROUND_MS_PER_MIB: u64 = 250;

/// Works on accesses for ever.
pub fn fill(driver: &Driver) {
    loop {
        scan(driver, driver.next_job());
    }
}

/// Brings one job as far as it goes without a verdict.
pub fn scan(driver: &Driver, job: Job) {
    let Ok(mut look) = Look::at(job.subject.file()) else {
        return abandon(driver, &job.subject, ExposureReason::Unreadable);
    };
    // What is written through a mapping that exists already need not change the times.
    look.written =
        seawall_fanotify::is_open_for_writing(job.subject.file().as_fd()).unwrap_or(true);
    let identity = look.identity;
    let shown = truth::shown_path(job.subject.file(), identity.device, identity.inode);
    if let Subject::Access(event) = &job.subject
        && answered_here(driver, event, &shown)
    {
        return;
    }
    if let Subject::Access(event) = &job.subject
        && identity.size > driver.policy().whole_file_limit
    {
        return too_large(driver, event, &look);
    }
    let Some(session) = driver.wait_session() else {
        return abandon(driver, &job.subject, ExposureReason::LinkDown);
    };
    send(driver, &session, job, look, shown);
}

/// Answers what needs no content. `true`: nothing is left to do.
fn answered_here(driver: &Driver, event: &HeldEvent, shown: &ShownPath) -> bool {
    if !driver.ledger.is_held(event.claim) {
        driver.note_lost(event);
        return true;
    }
    if event.operation == Operation::Exec {
        coverage::before_exec(driver, event.pid);
    }
    let known = driver.memory.known(&event.look.identity, process::now_ms());
    let answer = if let Some(answer) = driver.exec_answer(event) {
        count(&driver.counters.remembered);
        answer
    } else if known == Some(Known::Clean)
        // Exec has a fail mode of its own, and nobody writes a program that runs.
        || known == Some(Known::Exposed) && event.operation == Operation::Open
    {
        count(&driver.counters.remembered);
        Answer::Allow
    } else if truth::is_under(shown, &driver.policy().exclude_paths) {
        count(&driver.counters.passed);
        Answer::Allow
    } else {
        return false;
    };
    driver.note_exec(event, answer);
    driver.answer(event.claim, answer);
    true
}

/// Too large to hold a process for: it goes on, and the file is scanned in the background.
fn too_large(driver: &Driver, event: &HeldEvent, look: &Look) {
    let handle = driver.ledger.handle(event.claim);
    driver.ledger.expose(handle.as_ref(), ExposureReason::TooLarge as u32);
    driver.memory.remember_exposed(&look.identity, process::now_ms());
    driver.note_exec(event, Answer::Allow);
    if driver.answer(event.claim, Answer::Allow) {
        count(&driver.counters.unscanned);
        driver.note_unscanned(event, ExposureReason::TooLarge, Answer::Allow);
    }
}

/// Nothing can be scanned now. A background scan keeps its exposure and is tried again later.
pub fn abandon(driver: &Driver, subject: &Subject, reason: ExposureReason) {
    if let Subject::Access(event) = subject {
        driver.give_up(event, reason);
    }
}

fn send(driver: &Driver, session: &Session, job: Job, look: Look, shown: ShownPath) {
    let now_ms = process::now_ms();
    let deadline_ms = match &job.subject {
        Subject::Access(event) => event.deadline_ms,
        Subject::Background { .. } => {
            now_ms + BACKGROUND_MS + (look.identity.size >> 20) * BACKGROUND_MS_PER_MIB
        }
    };
    let until = Instant::now() + Duration::from_millis(deadline_ms.saturating_sub(now_ms));
    let Some(region) = driver.region() else {
        return abandon(driver, &job.subject, ExposureReason::LinkDown);
    };
    let file = metadata(shown, &look.identity, job.subject.pid());
    let subject = job.subject.clone();
    let part = match read_part(&region, subject.file(), 0, look.identity.size, until) {
        Ok(part) => part,
        Err(reason) => return abandon(driver, &subject, reason),
    };
    count(&driver.counters.requests);
    region.publish();
    let (mut offset, mut last) = (part.len, part.last);
    let opening = Opening { job: job.clone(), look, file, deadline_ms };
    let Ok(id) = session.open(opening, part.slots, last) else {
        session.end();
        return try_again(driver, job);
    };
    while !last {
        let part = match read_part(&region, subject.file(), offset, look.identity.size, until) {
            Ok(part) => part,
            Err(reason) => {
                if session.withdraw(id).is_some() {
                    abandon(driver, &subject, reason);
                }
                return;
            }
        };
        region.publish();
        (offset, last) = (offset + part.len, part.last);
        match session.more(id, part.slots, last) {
            Ok(true) => (),
            Ok(false) => return,
            Err(_) => return session.end(),
        }
    }
}

/// The link broke under a request: it has its chance with the next session.
fn try_again(driver: &Driver, job: Job) {
    if let Subject::Access(_) = job.subject {
        // Until the session's thread has seen it too.
        std::thread::sleep(Duration::from_millis(10));
        driver.push_job(job);
    }
}

struct Part {
    slots: Vec<(Slot, u32)>,
    len: u64,
    last: bool,
}

/// Reads the next part of a content of `size` bytes. Waits for at least one slot.
fn read_part(
    region: &GuestRegion,
    file: &std::fs::File,
    start: u64,
    size: u64,
    until: Instant,
) -> Result<Part, ExposureReason> {
    let mut part = Part { slots: Vec::new(), len: 0, last: false };
    while !part.last && part.slots.len() < PART {
        let slot = match region.take_slot() {
            Some(slot) => Some(slot),
            None if part.slots.is_empty() => region.wait_slot(until),
            None => break,
        };
        let mut slot = slot.ok_or(ExposureReason::Deadline)?;
        let filled = slot.fill(file, start + part.len);
        let filled = filled.map_err(|_: io::Error| ExposureReason::Unreadable)?;
        part.len += u64::from(filled);
        part.last = filled < SLOT_LEN || start + part.len >= size;
        part.slots.push((slot, filled));
    }
    Ok(part)
}
