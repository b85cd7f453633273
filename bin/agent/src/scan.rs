//! Filling: what needs a scan is read into free slots and sent to the host.
//!
//! ```text
//!   job ──► excluded, remembered, too large: answered here
//!     └──► content into slots ──► ScanRequest, Content… ──► waits in the session for its verdict
//!          or, without a region, into the message
//! ```
//!
//! A region that goes away takes the part with it that was being filled: the job is begun again and
//! goes inline. What the host was told of before is in the region's file, where the host reads it.
//!
//! A filler may wait for a disk, for slots or for the link: the deadline answers meanwhile, and the
//! filler finds the claim taken. A file is read to the size that it had at the start; whether it is
//! still the same is looked at before an allow ([`crate::verdict`]).

use crate::content::{Reads, hash_of};
use crate::coverage;
use crate::driver::{Ask, Driver, Job, Purpose, Subject, count};
use crate::event::HeldEvent;
use crate::file::{Look, metadata};
use crate::golden;
use crate::memory::Known;
use crate::region;
use crate::ring;
use crate::session::{Filled, Opening, Session};
use crate::truth::{self, ShownPath};
use seawall_fanotify::{Answer, process};
use seawall_proto::{
    Ended, ExposureReason, Facts, Fingerprint, Golden, INLINE_MAX, Mode, Operation, RequestId,
    Rules,
};
use seawall_region::{FillError, GuestRegion, layout::SLOT_LEN};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// Slots filled before a part of a long content is sent.
const PART: usize = 16;
/// Bytes of content in one message where it goes inline: each filler has a buffer of this, and so has
/// the link, twice where it encrypts.
const PIECE: usize = 8 * 1024;
const _: () = assert!(PIECE <= INLINE_MAX);
/// How long a scan for which nobody waits may take, in milliseconds, and how much longer for each MiB.
const BACKGROUND_MS: u64 = 60_000;
const BACKGROUND_MS_PER_MIB: u64 = 250;

/// Works on accesses for ever.
pub fn fill(driver: &Driver) {
    let mut buffer = Vec::new();
    loop {
        scan(driver, driver.jobs.next(), &mut buffer);
    }
}

/// Brings one job as far as it goes without a verdict. `buffer` is for content that is hashed or goes inline.
pub fn scan(driver: &Driver, mut job: Job, buffer: &mut Vec<u8>) {
    let Some(file) = job.subject.file() else { return };
    let Ok(mut look) = Look::at(file) else {
        return abandon(driver, &job.subject, ExposureReason::Unreadable);
    };
    // What is written through a mapping that exists already need not change the times.
    look.written = seawall_fanotify::is_open_for_writing(file.as_fd()).unwrap_or(true);
    let identity = look.identity;
    let shown = truth::shown_path(file, identity.device, identity.inode);
    let rules = driver.policy();
    if let Subject::Background { purpose, .. } = job.subject
        && (rules.mode == Mode::Off || rules.exclusion(&facts(&shown, &look)).is_some())
    {
        return driver.done(purpose);
    }
    if let Subject::Access(event) = &job.subject
        && answered_here(driver, &rules, event, &shown)
    {
        return;
    }
    if let Subject::Access(event) = &job.subject
        && let Some((_, mode)) = shown.if_true().and_then(|path| rules.fail_mode(path))
    {
        driver.fails_by_path(event, mode);
    }
    if let Subject::Access(event) = &job.subject {
        if identity.size > rules.whole_file_limit {
            return driver.give_up(event, ExposureReason::TooLarge);
        }
        // Once it is this one's turn another may have found out just before.
        if !driver.jobs.take_turn(event, &job) || answered_from_memory(driver, event) {
            return;
        }
    }
    let Some(session) = driver.wait_session() else {
        return abandon(driver, &job.subject, ExposureReason::LinkDown);
    };
    if job.ask == Ask::Ring
        && let Subject::Access(event) = &job.subject
        && ring::ask_and_look(driver, &session, event, look, buffer)
    {
        return;
    }
    job.ask = by_hash(driver, &job, &look);
    let Ok((filled, fingerprint)) = way(driver, &session, &job, file, &look, buffer) else {
        return abandon(driver, &job.subject, ExposureReason::Unreadable);
    };
    let job = Job { fingerprint, ..job };
    match filled {
        Some(filled) => ask(driver, &session, job, look, shown, filled),
        None => send(driver, &session, job, look, shown, buffer),
    }
}

/// How the host is asked for what is too large for the ring. To send it takes twice as long as to work out its hash, and the
/// host keeps it until there is a verdict: where it knows most of them, it is asked by the hash first.
fn by_hash(driver: &Driver, job: &Job, look: &Look) -> Ask {
    let is_large = look.identity.size > ring::LEN_MAX && job.ask != Ask::Content;
    match &job.subject {
        Subject::Access(_) if is_large && driver.patience.large.is_worth_it() => Ask::Hash,
        _ => job.ask,
    }
}

/// By what the host is asked; `None` is the content itself. And the file's fingerprint, where the host is to know that.
fn way(
    driver: &Driver,
    session: &Session,
    job: &Job,
    file: &File,
    look: &Look,
    buffer: &mut Vec<u8>,
) -> io::Result<(Option<Filled<'static>>, Option<Fingerprint>)> {
    let golden = session.golden();
    let fingerprint = || golden::fingerprint(driver, file.as_fd(), look).filter(|_| !look.written);
    // It may have changed since.
    let wants = golden != Golden::default();
    let own = job.fingerprint.filter(|own| wants && fingerprint() == Some(*own));
    if job.ask == Ask::Content {
        return Ok((None, own));
    }
    // It may have been clean before there were new signatures. Of a template is learned what is read.
    if own.is_none()
        && let Some(hash) = driver.memory.hash_of(&look.identity)
    {
        return Ok((Some(Filled::Hash(hash)), own));
    }
    if golden.is_asked()
        && driver.patience.golden.is_worth_it()
        && let Some(fingerprint) = fingerprint()
    {
        return Ok((Some(Filled::Fingerprint), Some(fingerprint)));
    }
    let goes_on = || match &job.subject {
        Subject::Access(event) => driver.ledger.is_held(event.claim),
        Subject::Background { .. } => true,
    };
    let hash = match job.ask {
        Ask::Hash => match hash_of(file, look.identity.size, Reads::Waiting, buffer, goes_on)? {
            Some(hash) => Some(Filled::Hash(hash)),
            None => return Ok((None, own)),
        },
        Ask::Ring | Ask::Known | Ask::Content => None,
    };
    // Of what was read while somebody wrote it, it is nobody's.
    let own = own.filter(|_| hash.is_none() || look.again(file).steady);
    Ok((hash, own))
}

/// Asks for the verdict on content that the host may know by its hash or its file's fingerprint.
fn ask(
    driver: &Driver,
    session: &Session,
    job: Job,
    look: Look,
    shown: ShownPath,
    filled: Filled<'_>,
) {
    count(&driver.counters.requests);
    let look = after_read(&job, look);
    let file = metadata(shown, &look.identity, job.subject.pid());
    let deadline_ms = deadline_ms(&job, &look);
    let asked = Job { subject: job.subject.clone().closed(), ..job };
    let opening = Opening { job: asked, look, file, deadline_ms };
    if session.open(opening, filled, true).is_err() {
        session.end();
        try_again(driver, job);
    }
}

/// What can be said already of a file that is closed now, and would be opened anew for its verdict.
fn after_read(job: &Job, look: Look) -> Look {
    match (job.subject.operation(), job.subject.file()) {
        (Operation::OnDemand, Some(file)) => look.again(file),
        _ => look,
    }
}

/// Until when the verdict is waited for.
fn deadline_ms(job: &Job, look: &Look) -> u64 {
    match &job.subject {
        Subject::Access(event) => event.deadline_ms,
        Subject::Background { .. } => {
            let more = (look.identity.size >> 20) * BACKGROUND_MS_PER_MIB;
            process::now_ms() + BACKGROUND_MS + more
        }
    }
}

/// What policy goes by that a file itself shows. Its file system has no marks where policy excludes its type.
fn facts<'a>(shown: &'a ShownPath, look: &Look) -> Facts<'a> {
    Facts { path: shown.if_true(), owner: Some(look.owner), ..Facts::default() }
}

fn is_excluded(rules: &Rules, event: &HeldEvent, shown: &ShownPath) -> bool {
    let of_file = facts(shown, &event.look);
    if rules.exclusion(&of_file).is_some() {
        return true;
    }
    if event.operation != Operation::Open || !rules.ask_who_opens() {
        return false;
    }
    let is_in_list = |program: &[u8], user| {
        rules.exclusion(&Facts { process: Some((program, user)), ..Facts::default() }).is_some()
    };
    truth::program_of(event.pid, is_in_list).is_some()
}

/// Answers what needs no content. `true`: nothing is left to do.
fn answered_here(driver: &Driver, rules: &Rules, event: &HeldEvent, shown: &ShownPath) -> bool {
    if !driver.ledger.is_held(event.claim) {
        driver.note_lost(event);
        return true;
    }
    if event.operation == Operation::Exec {
        coverage::before_exec(driver, event.pid);
    }
    if answered_from_memory(driver, event) {
        return true;
    }
    if !is_excluded(rules, event, shown) {
        return false;
    }
    count(&driver.counters.passed);
    driver.note_exec(event, Answer::Allow);
    driver.answer(event.claim, Answer::Allow);
    true
}

/// Answers what is remembered.
fn answered_from_memory(driver: &Driver, event: &HeldEvent) -> bool {
    // It may have changed while it waited.
    let identity = Look::at(&*event.file).map_or(event.look.identity, |look| look.identity);
    let known = driver.memory.known(&identity, process::now_ms());
    let answer = if let Some(answer) = driver.exec_answer(event) {
        answer
    } else if matches!(known, Some(Known::Clean { .. }))
        // Exec has a fail mode of its own, and nobody writes a program that runs.
        || known == Some(Known::Exposed) && event.operation == Operation::Open
    {
        Answer::Allow
    } else {
        return false;
    };
    count(&driver.counters.remembered);
    driver.note_exec(event, answer);
    driver.answer(event.claim, answer);
    true
}

/// Nothing can be scanned now. A background scan keeps its exposure and is tried again later; one of a
/// walk becomes one.
pub fn abandon(driver: &Driver, subject: &Subject, reason: ExposureReason) {
    match subject {
        Subject::Access(event) => driver.give_up(event, reason),
        Subject::Background { handle, purpose: Purpose::Walk, .. } => {
            driver.ledger.expose(Some(handle), reason.number());
        }
        Subject::Background { purpose: Purpose::OnDemand, file, .. } => {
            let path = file.as_ref().and_then(truth::path_of).unwrap_or_default();
            driver.on_demand.missed(driver.session().as_ref(), &path, word(reason));
        }
        // Where nothing is held, no open has it scanned later.
        Subject::Background { handle, purpose: Purpose::Close, .. }
            if !driver.policy().mode.holds_open() =>
        {
            driver.ledger.expose(Some(handle), reason.number());
        }
        Subject::Background { .. } => (),
    }
}

fn send(
    driver: &Driver,
    session: &Session,
    job: Job,
    look: Look,
    shown: ShownPath,
    buffer: &mut Vec<u8>,
) {
    let deadline_ms = deadline_ms(&job, &look);
    let left = deadline_ms.saturating_sub(process::now_ms());
    let until = Instant::now() + Duration::from_millis(left);
    let file = metadata(shown, &look.identity, job.subject.pid());
    let subject = job.subject.clone();
    let Some(content) = subject.file() else { return };
    let region = session.region();
    let source = Source { region, file: content, size: look.identity.size, until };
    let part = match source.read(0, buffer) {
        Ok(part) => part,
        Err(Stop::RegionGone) => {
            region::lose(driver, session);
            return again(driver, job);
        }
        Err(Stop::Reason(reason)) => return abandon(driver, &subject, reason),
    };
    count(&driver.counters.requests);
    let look = if part.last { after_read(&job, look) } else { look };
    let (mut offset, mut last) = (part.len, part.last);
    let asked = Job { subject: job.subject.clone().closed(), ..job };
    let opening = Opening { job: asked, look, file, deadline_ms };
    // Whether it is the file's is known after the last part.
    let is_last = |last| last && job.fingerprint.is_none();
    let Ok(id) = session.open(opening, part.filled, is_last(last)) else {
        session.end();
        return try_again(driver, job);
    };
    while !last {
        let part = match source.read(offset, buffer) {
            Ok(part) => part,
            Err(stop) => return give_up(driver, session, id, stop),
        };
        (offset, last) = (offset + part.len, part.last);
        match session.more(id, part.filled, is_last(last)) {
            Ok(true) => (),
            Ok(false) => return,
            Err(_) => return session.end(),
        }
    }
    if job.fingerprint.is_some() {
        let fingerprint = job.fingerprint.filter(|_| look.again(content).steady);
        if session.ended(Ended { id, fingerprint }).is_err() {
            session.end();
        }
    }
}

/// The rest of a content cannot be sent.
fn give_up(driver: &Driver, session: &Session, id: RequestId, stop: Stop) {
    let job = session.withdraw(id);
    match (stop, job) {
        (Stop::RegionGone, job) => {
            region::lose(driver, session);
            job.into_iter().for_each(|job| again(driver, job));
        }
        (Stop::Reason(reason), Some(job)) => abandon(driver, &job.subject, reason),
        (Stop::Reason(_), None) => (),
    }
}

/// The region went under a request: an access goes inline, what nobody waits for is tried again later.
fn again(driver: &Driver, job: Job) {
    match job.subject {
        Subject::Access(_) => driver.push_job(job),
        Subject::Background { .. } => abandon(driver, &job.subject, ExposureReason::LinkDown),
    }
}

/// The link broke under a request: it has its chance with the next session.
fn try_again(driver: &Driver, job: Job) {
    if let Subject::Background { .. } = job.subject {
        return abandon(driver, &job.subject, ExposureReason::LinkDown);
    }
    // Until the session's thread has seen it too.
    std::thread::sleep(Duration::from_millis(10));
    driver.push_job(job);
}

/// Why the next part of a content is not there.
enum Stop {
    RegionGone,
    Reason(ExposureReason),
}

struct Part<'a> {
    filled: Filled<'a>,
    len: u64,
    last: bool,
}

/// A content of `size` bytes, and what takes it.
struct Source<'a> {
    region: Option<GuestRegion>,
    file: &'a File,
    size: u64,
    until: Instant,
}

impl Source<'_> {
    /// Reads the next part.
    fn read<'b>(&self, start: u64, buffer: &'b mut Vec<u8>) -> Result<Part<'b>, Stop> {
        match &self.region {
            Some(region) => self.fill_slots(region, start),
            None => self.fill_buffer(start, buffer),
        }
    }

    /// Waits for at least one slot.
    fn fill_slots(&self, region: &GuestRegion, start: u64) -> Result<Part<'static>, Stop> {
        let (mut slots, mut len, mut last) = (Vec::new(), 0, false);
        while !last && slots.len() < PART {
            let slot = match region.take_slot() {
                Some(slot) => Some(slot),
                None if slots.is_empty() => region.wait_slot(self.until),
                None => break,
            };
            let mut slot = slot.ok_or(Stop::Reason(ExposureReason::Deadline))?;
            let filled = slot.fill(self.file, start + len).map_err(|error| match error {
                FillError::Gone => Stop::RegionGone,
                FillError::File(_) => Stop::Reason(ExposureReason::Unreadable),
            })?;
            len += u64::from(filled);
            last = filled < SLOT_LEN || start + len >= self.size;
            slots.push((slot, filled));
        }
        region.publish();
        // Behind a device that was pulled, stores go nowhere and fail nowhere: the host would judge
        // what was in these slots before.
        if !region.is_there() {
            return Err(Stop::RegionGone);
        }
        Ok(Part { filled: Filled::Slots(slots), len, last })
    }

    fn fill_buffer<'b>(&self, start: u64, buffer: &'b mut Vec<u8>) -> Result<Part<'b>, Stop> {
        buffer.resize(PIECE, 0);
        let mut done = 0;
        while done < PIECE {
            match self.file.read_at(&mut buffer[done..], start + done as u64) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(_) => return Err(Stop::Reason(ExposureReason::Unreadable)),
            }
        }
        buffer.truncate(done);
        let len = done as u64;
        let last = done < PIECE || start + len >= self.size;
        Ok(Part { filled: Filled::Inline(buffer), len, last })
    }
}

/// For people.
pub fn word(reason: ExposureReason) -> &'static str {
    match reason {
        ExposureReason::LinkDown => "no link to the host",
        ExposureReason::Deadline => "no verdict in time",
        ExposureReason::TooLarge => "too large",
        ExposureReason::HostError => "the host had no verdict",
        ExposureReason::Overload => "too many accesses at once",
        ExposureReason::Changing => "it changed while it was read",
        ExposureReason::Unreadable => "it cannot be read",
        ExposureReason::WorkerDied => "the driver was restarted",
        ExposureReason::HeldByWriter => "somebody writes it",
        ExposureReason::RanBefore => "it ran before it was watched",
    }
}
