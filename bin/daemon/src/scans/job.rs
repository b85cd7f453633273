//! One scan of a guest.

use super::say;
use crate::events::format_time;
use crate::golden::{FILES_MAX, Learned};
use crate::pipeline::Tenant;
use crate::session::Session;
use seawall_client::{FoundFile, GuestScan, GuestScanState, LeftOut};
use seawall_proto::walk::{PLACE_MAX, WalkOrder, WalkProgress};
use seawall_proto::{ContentHash, Fingerprint};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// A driver tells of a walk once a second, but for the time that one file takes.
const SILENCE: Duration = Duration::from_secs(900);
/// Infected files that are named.
const FOUND_MAX: usize = 1000;
/// Files left out that are named.
const LEFT_OUT_MAX: usize = 200;
/// Infected files that are known apart, so that none counts twice.
const KNOWN_MAX: usize = 100_000;

/// What the file of a scan holds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Kept {
    pub scan: GuestScan,
    /// Where it goes on, in the driver's own words; hexadecimal.
    pub place: Option<String>,
    /// When it may run.
    #[serde(default)]
    pub window: Window,
}

/// When a scan may run, in seconds since 1970.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    pub opens: i64,
    pub closes: Option<i64>,
}

/// A scan, and what is under way of it.
pub struct Job {
    /// As of the last word of the driver.
    pub shown: GuestScan,
    place: Option<Vec<u8>>,
    pub window: Window,
    /// What was counted when the walk in this session began.
    base: GuestScan,
    /// Since the driver's last word.
    errors: u64,
    session: Weak<Session>,
    since: Instant,
    held: bool,
    /// Digests of path and content.
    known: HashSet<[u8; 16]>,
    /// Names the walk under way: what an earlier one says is not counted.
    pub run: u64,
    /// When the driver last said something of it.
    word: Instant,
    changed: bool,
    /// Files of the template; kept nowhere else, so after a restart of the service it begins anew.
    learned: Vec<(Fingerprint, ContentHash)>,
    learned_all: bool,
    /// Whose guests may use what is learned.
    tenant: Tenant,
}

impl Job {
    pub fn new(id: u64, guest: String, paths: Vec<String>, quick: bool) -> Self {
        let shown = GuestScan {
            id,
            guest,
            paths,
            schedule: None,
            learns: None,
            quick,
            state: GuestScanState::Queued,
            reason: String::new(),
            asked: format_time(jiff::Timestamp::now()),
            started: None,
            ended: None,
            took_ms: 0,
            files: 0,
            expected: 0,
            bytes: 0,
            known: 0,
            excluded: 0,
            missed: 0,
            errors: 0,
            infected: 0,
            found: Vec::new(),
            left_out: Vec::new(),
        };
        let window = Window::default();
        Self { changed: true, ..Self::of(Kept { scan: shown, place: None, window }) }
    }

    /// One that the service knew when it ended.
    pub fn of(kept: Kept) -> Self {
        let Kept { scan: mut shown, mut place, window } = kept;
        if shown.learns.is_some() && !shown.state.has_ended() {
            place = None;
            (shown.files, shown.bytes, shown.known, shown.excluded) = Default::default();
            (shown.missed, shown.errors, shown.took_ms) = Default::default();
        }
        if shown.state == GuestScanState::Running {
            shown.state = GuestScanState::Waiting;
            shown.reason = "the service was started again".into();
        }
        let known = shown.found.iter().map(digest).collect();
        Self {
            base: shown.clone(),
            shown,
            place: place.and_then(|place| unhex(&place)),
            window,
            errors: 0,
            session: Weak::new(),
            since: Instant::now(),
            held: false,
            run: 0,
            word: Instant::now(),
            known,
            changed: false,
            learned: Vec::new(),
            learned_all: false,
            tenant: None,
        }
    }

    /// For the operator; with what was found and left out by name, or without.
    pub fn shown(&self, whole: bool) -> GuestScan {
        let (found, left_out) = (Vec::new(), Vec::new());
        let mut shown = if whole {
            self.shown.clone()
        } else {
            // What is not named is not copied either.
            let GuestScan { guest, paths, schedule, learns, reason, asked, started, ended, .. } =
                &self.shown;
            GuestScan {
                guest: guest.clone(),
                paths: paths.clone(),
                schedule: schedule.clone(),
                learns: learns.clone(),
                reason: reason.clone(),
                asked: asked.clone(),
                started: started.clone(),
                ended: ended.clone(),
                found,
                left_out,
                ..self.shown
            }
        };
        if shown.state == GuestScanState::Running {
            shown.took_ms = self.took_ms();
        }
        shown
    }

    fn took_ms(&self) -> u64 {
        let now = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.base.took_ms.saturating_add(now)
    }

    /// Where it goes on.
    pub fn place(&self) -> Option<Vec<u8>> {
        self.place.clone()
    }

    pub fn runs_in(&self, session: &Session) -> bool {
        self.shown.state == GuestScanState::Running && std::ptr::eq(self.session.as_ptr(), session)
    }

    /// A schedule has it run within this window.
    pub fn scheduled(&mut self, schedule: &str, window: Window) {
        self.shown.schedule = Some(schedule.to_owned());
        self.window = window;
        self.changed = true;
    }

    /// Its walk begins, or goes on, in this session.
    pub fn run(&mut self, session: Arc<Session>, run: u64) {
        self.run = run;
        self.word = Instant::now();
        self.session = Arc::downgrade(&session);
        self.tenant = session.guest.policy().tenant();
        self.since = Instant::now();
        self.held = false;
        self.base = self.shown(false);
        self.set(GuestScanState::Running, "");
        if self.shown.started.is_none() {
            self.shown.started = Some(format_time(jiff::Timestamp::now()));
        }
    }

    /// The driver says how far it is; nothing of the walk is under way.
    pub fn progress(&mut self, progress: &WalkProgress) {
        let base = &self.base;
        let shown = &mut self.shown;
        let sum = |base: u64, more: u64| base.saturating_add(more);
        shown.files = sum(base.files, progress.files);
        shown.bytes = sum(base.bytes, progress.bytes);
        shown.known = sum(base.known, progress.known);
        shown.excluded = sum(base.excluded, progress.excluded);
        shown.missed = sum(base.missed, progress.missed);
        shown.errors = sum(shown.errors, std::mem::take(&mut self.errors));
        self.word = Instant::now();
        shown.expected = progress.expected;
        if !self.held {
            let why = if progress.pressed { "the guest is busy; it waits" } else { "" };
            shown.reason = why.into();
        }
        if (1..=PLACE_MAX).contains(&progress.place.len()) {
            self.place = Some(progress.place.to_vec());
        }
        self.shown.took_ms = self.took_ms();
        self.changed = true;
    }

    pub fn learn(&mut self, fingerprint: Fingerprint, hash: ContentHash) {
        // One more than there may be, so that it is told.
        if self.shown.learns.is_some() && self.learned.len() <= FILES_MAX {
            self.learned.push((fingerprint, hash));
        }
    }

    /// Its walk is at its end; `true` where what was learned is still to be taken.
    pub fn has_learned_all(&mut self) -> bool {
        self.learned_all = self.shown.learns.is_some();
        self.learn_no_more();
        self.learned_all
    }

    /// Whether its walk is at its end, and what was learned is still to be taken.
    pub fn is_learned(&self) -> bool {
        self.learned_all && !self.shown.state.has_ended()
    }

    fn learn_no_more(&self) {
        if let Some(session) = self.session.upgrade().filter(|_| self.shown.learns.is_some()) {
            session.learn(false);
        }
    }

    /// All that was learned, once.
    pub fn take_learned(&mut self) -> Option<Learned> {
        if !self.is_learned() {
            return None;
        }
        Some(Learned {
            name: self.shown.learns.clone()?,
            source: format!("guest {}", self.shown.guest),
            tenant: self.tenant.clone(),
            for_all: false,
            files: std::mem::take(&mut self.learned),
        })
    }

    pub fn find(&mut self, found: FoundFile) {
        let digest = digest(&found);
        if self.known.contains(&digest) {
            return;
        }
        if self.known.len() < KNOWN_MAX {
            self.known.insert(digest);
        }
        self.shown.infected += 1;
        if self.shown.found.len() < FOUND_MAX {
            self.shown.found.push(found);
        }
        self.changed = true;
    }

    pub fn leave_out(&mut self, left_out: LeftOut) {
        let all = &mut self.shown.left_out;
        if all.len() < LEFT_OUT_MAX && !all.contains(&left_out) {
            all.push(left_out);
            self.changed = true;
        }
    }

    pub fn fail_on(&mut self, left_out: LeftOut) {
        self.errors += 1;
        self.leave_out(left_out);
    }

    /// The host is busy, or is no longer.
    pub fn hold(&mut self, held: bool) {
        if self.shown.state != GuestScanState::Running || self.held == held {
            return;
        }
        self.held = held;
        self.shown.reason = if held { "the host is busy; it waits".into() } else { String::new() };
        if let Some(session) = self.session.upgrade() {
            let order = if held { WalkOrder::Hold } else { WalkOrder::GoOn };
            say(&session, self.run, order);
        }
    }

    /// It goes on when its guest's driver is there again.
    pub fn wait(&mut self, why: &str) {
        self.shown.took_ms = self.took_ms();
        self.set(GuestScanState::Waiting, why);
    }

    /// It is to go on when it is its turn.
    pub fn queue(&mut self) {
        self.set(GuestScanState::Queued, "");
    }

    /// It stops, and its driver hears so.
    pub fn stop(&mut self, state: GuestScanState, why: &str) {
        if self.shown.state == GuestScanState::Running {
            self.shown.took_ms = self.took_ms();
            if let Some(session) = self.session.upgrade() {
                say(&session, self.run, WalkOrder::End);
            }
        }
        if state.has_ended() {
            self.end(state, why);
        } else {
            self.set(state, why);
        }
    }

    pub fn end(&mut self, state: GuestScanState, why: &str) {
        self.set(state, why);
        self.shown.ended = Some(format_time(jiff::Timestamp::now()));
        self.known = HashSet::new();
        (self.learned, self.learned_all) = (Vec::new(), false);
    }

    /// Why it is not its turn.
    pub fn say_why(&mut self, why: &str) {
        if self.shown.reason != why {
            self.shown.reason = why.to_owned();
        }
    }

    fn set(&mut self, state: GuestScanState, why: &str) {
        if state != GuestScanState::Running {
            self.learn_no_more();
        }
        self.shown.state = state;
        self.shown.reason = why.to_owned();
        self.changed = true;
        // Counts since the driver's last word are of files that it comes to again.
        self.errors = 0;
    }

    /// Whether its driver has said nothing of it for so long that nothing more is to be expected.
    pub fn is_silent(&self) -> bool {
        self.shown.state == GuestScanState::Running && self.word.elapsed() > SILENCE
    }

    /// It was not written after all.
    pub fn not_written(&mut self) {
        self.changed = true;
    }

    /// What is to be written of it, if anything is.
    pub fn take_change(&mut self) -> Option<Kept> {
        let place = self.place.as_deref().map(hex);
        std::mem::take(&mut self.changed).then(|| Kept {
            scan: self.shown.clone(),
            place,
            window: self.window,
        })
    }
}

/// By which a file that is found again is known.
fn digest(found: &FoundFile) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(found.hash.as_bytes()).update(found.path.as_bytes());
    let mut digest = [0; 16];
    hasher.finalize_xof().fill(&mut digest);
    digest
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _infallible = write!(text, "{byte:02x}");
        text
    })
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes().chunks(2);
    digits.map(|two| u8::from_str_radix(std::str::from_utf8(two).ok()?, 16).ok()).collect()
}
