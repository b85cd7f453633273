//! The session with the host: who waits for which verdict, and the thread that keeps the link.
//!
//! ```text
//!   no key ──► key ──► connected ──► attached ──► (link lost) ──► again after a pause
//! ```
//!
//! Owns the requests under way and the slots that the host may still read. A slot goes back to the
//! pool only when the host says that it has copied it, when the verdict comes, or when the session
//! ends. Requests that were under way when the link was lost are queued again.

use crate::driver::{Driver, Job, Subject};
use crate::file::Look;
use crate::link::{self, Address, LinkError, Sender, Shutter};
use crate::region::{Credentials, NoKey};
use crate::remedy::Task;
use crate::ring::{self, Ring};
use crate::scan;
use crate::verdict;
use seawall_fanotify::{FileHandle, process};
use seawall_proto::{
    Attach, Attached, Content, ContentHash, Ended, ExposureReason, FileMetadata, Golden, Operation,
    Part, PolicyError, PolicyParts, Proof, Refusal, RegionId, RequestId, RingKey, ScanRequest,
    SlotRef, ToGuest, ToHost,
};
use seawall_region::{GuestRegion, Slot};
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// Pauses between attempts to connect.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// A host that owes a verdict and has said nothing for this long, not even to heartbeats, is taken for
/// gone.
const SILENCE_MS: u64 = 5_000;

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error(transparent)]
    NoKey(#[from] NoKey),
    #[error("link: {0}")]
    Link(#[from] LinkError),
    #[error("the host refused the session: {0:?}")]
    Refused(Refusal),
    #[error("the host answered out of order")]
    Order,
    #[error("the host sent {0}")]
    Policy(#[from] PolicyError),
}

/// A scan under way.
#[derive(Debug)]
pub struct Pending {
    /// The job; none once nobody waits for it.
    pub job: Option<Job>,
    /// The file when its read began.
    pub look: Look,
    deadline_ms: u64,
    sent_ms: u64,
    slots: VecDeque<Slot>,
    copied: u32,
}

impl Pending {
    /// A request whose content was taken, for its verdict alone.
    pub fn of(job: Job, look: Look) -> Self {
        let (slots, copied) = Default::default();
        Self { job: Some(job), look, deadline_ms: 0, sent_ms: 0, slots, copied }
    }

    /// What it is for; none once nobody waits for it.
    pub fn operation(&self) -> Option<Operation> {
        self.job.as_ref().map(|job| job.subject.operation())
    }

    /// The file of a scan for which nobody waits.
    fn in_background(&self) -> Option<&FileHandle> {
        match &self.job {
            Some(Job { subject: Subject::Background { handle, .. }, .. }) => Some(handle),
            _ => None,
        }
    }
}

/// What opens a request, before the host has heard of it.
pub struct Opening {
    pub job: Job,
    pub look: Look,
    pub file: FileMetadata,
    pub deadline_ms: u64,
}

/// Content on its way to the host: slots that hold it, or the bytes in a filler's own buffer.
pub enum Filled<'a> {
    Slots(Vec<(Slot, u32)>),
    Inline(&'a mut Vec<u8>),
    /// None of it: the host may know it.
    Hash(ContentHash),
    /// Nor this: the host may know it by the file's fingerprint, which the job has.
    Fingerprint,
}

impl Filled<'_> {
    /// What the host is told; takes the buffer until [`Self::keep`] gives it back.
    fn part(&mut self) -> Part {
        match self {
            Self::Slots(slots) => {
                let slot = |(slot, len): &(Slot, u32)| SlotRef { index: slot.index(), len: *len };
                Part::Slots(slots.iter().map(slot).collect())
            }
            Self::Inline(bytes) => Part::Inline(std::mem::take(*bytes).into()),
            Self::Hash(hash) => Part::Hash(*hash),
            Self::Fingerprint => Part::Fingerprint,
        }
    }

    fn keep(&mut self, part: Part) {
        if let (Self::Inline(buffer), Part::Inline(bytes)) = (self, part) {
            **buffer = bytes.into_vec();
        }
    }

    fn take_slots(&mut self) -> VecDeque<Slot> {
        match self {
            Self::Slots(slots) => slots.drain(..).map(|(slot, _)| slot).collect(),
            Self::Inline(_) | Self::Hash(_) | Self::Fingerprint => VecDeque::new(),
        }
    }
}

pub struct Session {
    pub guest: String,
    pub heartbeat: Duration,
    /// The region by whose header it was attached, until that is gone.
    region: Mutex<Option<GuestRegion>>,
    /// Why it has none.
    why_inline: String,
    sender: Mutex<Sender>,
    shutter: Shutter,
    pending: Mutex<HashMap<RequestId, Pending>>,
    next: AtomicU64,
    received_ms: AtomicU64,
    ring: OnceLock<Ring>,
    golden: Mutex<Golden>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Session {
    /// Sends a request with the first part of its content. Numbers go up in the order of sending.
    pub fn open(
        &self,
        opening: Opening,
        mut filled: Filled<'_>,
        last: bool,
    ) -> Result<RequestId, LinkError> {
        let Opening { job, look, file, deadline_ms } = opening;
        let now_ms = process::now_ms();
        let (fingerprint, part) = (job.fingerprint, filled.part());
        let mut sender = lock(&self.sender);
        let id = RequestId(self.next.fetch_add(1, Ordering::Relaxed));
        let request = ScanRequest {
            id,
            operation: job.subject.operation(),
            deadline_ms: u32::try_from(deadline_ms.saturating_sub(now_ms)).unwrap_or(u32::MAX),
            file,
            part,
            last,
        };
        let slots = filled.take_slots();
        let pending =
            Pending { job: Some(job), look, deadline_ms, sent_ms: now_ms, slots, copied: 0 };
        lock(&self.pending).insert(id, pending);
        let named = fingerprint.filter(|_| matches!(filled, Filled::Hash(_) | Filled::Fingerprint));
        let message = match named {
            Some(fingerprint) => ToHost::Fingerprinted(fingerprint, request),
            None => ToHost::ScanRequest(request),
        };
        let sent = sender.send(&message);
        if let ToHost::ScanRequest(request) = message {
            filled.keep(request.part);
        }
        if let Err(error) = sent {
            // The caller still has the job. The thread that cleans up may have been here already.
            lock(&self.pending).remove(&id);
            return Err(error);
        }
        Ok(id)
    }

    /// Sends another part. `Ok(false)`: nobody waits for this request any more.
    pub fn more(
        &self,
        id: RequestId,
        mut filled: Filled<'_>,
        last: bool,
    ) -> Result<bool, LinkError> {
        let mut sender = lock(&self.sender);
        let part = {
            let mut all = lock(&self.pending);
            let Some(pending) = all.get_mut(&id).filter(|pending| pending.job.is_some()) else {
                return Ok(false);
            };
            let part = filled.part();
            pending.slots.extend(filled.take_slots());
            part
        };
        let message = ToHost::Content(Content { id, part, last });
        let sent = sender.send(&message);
        if let ToHost::Content(content) = message {
            filled.keep(content.part);
        }
        sent.map(|()| true)
    }

    /// Ends a content of which no part was the last.
    pub fn ended(&self, ended: Ended) -> Result<(), LinkError> {
        let is_wanted = lock(&self.pending).get(&ended.id).is_some_and(|it| it.job.is_some());
        if is_wanted { self.send(&ToHost::Ended(ended)) } else { Ok(()) }
    }

    /// What the host does with fingerprints.
    pub fn golden(&self) -> Golden {
        *lock(&self.golden)
    }

    /// The region to fill, if this session has one.
    pub fn region(&self) -> Option<GuestRegion> {
        lock(&self.region).clone()
    }

    /// From here on content goes inline. `false`: it does already.
    pub fn lose_region(&self) -> bool {
        lock(&self.region).take().is_some()
    }

    /// The ring, while it can be used.
    pub fn ring(&self) -> Option<&Ring> {
        self.ring.get().filter(|ring| !ring.is_over())
    }

    /// The ring, also when it is used no longer.
    pub fn ring_even_over(&self) -> Option<&Ring> {
        self.ring.get()
    }

    fn begin_ring(&self, key: RingKey) {
        if let Some(region) = self.region() {
            let _once = self.ring.set(Ring::new(region, key));
        }
    }

    /// Tells the host to look at the ring. `false` where that would have to wait.
    pub fn ring_doorbell(&self) -> bool {
        let Ok(mut sender) = self.sender.try_lock() else { return false };
        if !sender.takes_now() {
            return false;
        }
        let rung = sender.send(&ToHost::Doorbell).is_ok();
        if !rung {
            // Part of it may have gone out.
            self.end();
        }
        rung
    }

    /// How content travels, in words.
    pub fn content_way(&self) -> String {
        match (self.region(), self.why_inline.as_str()) {
            (Some(_), _) => "through the region".into(),
            (None, "") => "on the link: the region is gone".into(),
            (None, why) => format!("on the link: {why}"),
        }
    }

    /// Sends anything that is no request.
    pub fn send(&self, message: &ToHost) -> Result<(), LinkError> {
        lock(&self.sender).send(message)
    }

    /// Ends the session; the thread that receives sees it and cleans up.
    pub fn end(&self) {
        self.shutter.shut();
    }

    /// Gives up a request; its slots stay the host's until it answers. Returns the job.
    pub fn withdraw(&self, id: RequestId) -> Option<Job> {
        let job = lock(&self.pending).get_mut(&id)?.job.take();
        if self.send(&ToHost::Cancel(id)).is_err() {
            self.end();
        }
        job
    }

    fn copied(&self, id: RequestId, slots: u32) {
        if let Some(pending) = lock(&self.pending).get_mut(&id) {
            let now = slots.saturating_sub(pending.copied) as usize;
            pending.copied = pending.copied.max(slots);
            let now = now.min(pending.slots.len());
            pending.slots.drain(..now);
        }
    }

    fn finish(&self, id: RequestId) -> Option<Pending> {
        lock(&self.pending).remove(&id)
    }

    /// Whether a scan of this file for which nobody waits is under way.
    pub fn scans(&self, file: &FileHandle) -> bool {
        lock(&self.pending).values().any(|pending| pending.in_background() == Some(file))
    }

    /// How many scans for this operation are under way.
    pub fn under_way(&self, operation: Operation) -> usize {
        let is_it = |pending: &&Pending| pending.operation() == Some(operation);
        lock(&self.pending).values().filter(is_it).count()
    }

    /// The scans for which nobody waits of files on this device.
    pub fn in_background_on(&self, device: u64) -> Vec<RequestId> {
        let is_on_it = |pending: &Pending| {
            pending.look.identity.device == device && pending.in_background().is_some()
        };
        lock(&self.pending).iter().filter(|(_, p)| is_on_it(p)).map(|(id, _)| *id).collect()
    }

    /// What `pick` finds in the jobs that wait for their verdict.
    pub fn jobs<T>(&self, pick: impl Fn(&Job) -> Option<T>) -> Vec<T> {
        lock(&self.pending).values().filter_map(|p| pick(p.job.as_ref()?)).collect()
    }

    /// The requests whose access was answered meanwhile, that took too long, or that nobody wants any more.
    pub fn stale(&self, driver: &Driver, now_ms: u64) -> Vec<RequestId> {
        let ended = driver.on_demand.has_ended();
        let is_stale = |pending: &Pending| match &pending.job {
            Some(Job { subject: Subject::Access(event), .. }) => {
                !driver.ledger.is_held(event.claim)
            }
            Some(job) => {
                let is_unwanted = ended && job.subject.operation() == Operation::OnDemand;
                is_unwanted || pending.deadline_ms <= now_ms
            }
            None => false,
        };
        lock(&self.pending).iter().filter(|(_, p)| is_stale(p)).map(|(id, _)| *id).collect()
    }

    /// Whether the host has said something lately: it answers each heartbeat.
    pub fn hears(&self, now_ms: u64) -> bool {
        let lately = u64::try_from(self.heartbeat.as_millis()).unwrap_or(u64::MAX) * 5 / 2;
        self.received_ms.load(Ordering::Relaxed).saturating_add(lately.max(1_000)) >= now_ms
    }

    /// Whether the host owes an answer and has been silent for too long.
    pub fn is_silent(&self, now_ms: u64) -> bool {
        let owes = lock(&self.pending).values().any(|p| p.sent_ms + SILENCE_MS <= now_ms);
        owes && self.received_ms.load(Ordering::Relaxed) + SILENCE_MS <= now_ms
    }
}

/// Keeps a session for ever.
pub fn keep(driver: &Arc<Driver>, address: &Address) {
    let mut pause = PAUSE_MIN;
    let mut told = String::new();
    loop {
        let attached = attach(driver, address);
        let why = match attached {
            Ok((session, receiver)) => {
                pause = PAUSE_MIN;
                told.clear();
                let why = receive(driver, &session, receiver).to_string();
                // A filler that still has the session must not open a request in it.
                session.end();
                driver.clear_session(why.clone());
                requeue(driver, &session);
                tracing::warn!(%why, "the link was lost; accesses get fail mode until it is back");
                continue;
            }
            Err(error) => error.to_string(),
        };
        driver.clear_session(why.clone());
        if told != why {
            tracing::warn!(%why, link = %address, "no session with the host; trying on");
            told = why;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

fn attach(
    driver: &Driver,
    address: &Address,
) -> Result<(Arc<Session>, link::Receiver), SessionError> {
    let Credentials { region, header, why } = driver.region.credentials()?;
    let mut nonce = [0; 32];
    getrandom::fill(&mut nonce)
        .map_err(|error| LinkError::Io { action: "no random numbers", reason: error.into() })?;
    let link = link::connect(address, header.region, &header.key, nonce)?;
    let link::Connection { mut sender, mut receiver, shutter, host_nonce, guest_nonce } = link;
    let proof = Proof::new(&header.key, &host_nonce, &guest_nonce);
    sender.send(&attach_message(proof, header.region))?;
    let attached = match receiver.receive()? {
        ToGuest::Attached(attached) => attached,
        ToGuest::Refused(refusal) => {
            driver.region.refused(header.region);
            return Err(SessionError::Refused(refusal));
        }
        _ => return Err(SessionError::Order),
    };
    let mut parts = PolicyParts::default();
    let policy = loop {
        let ToGuest::Policy(part) = receiver.receive()? else { return Err(SessionError::Order) };
        if let Some(policy) = parts.add(&part)? {
            break policy;
        }
    };
    let Attached { guest, generation, heartbeat_ms } = attached;
    receiver.wait_for_ever()?;
    let inline = region.is_none();
    tracing::info!(%guest, link = %address, ?generation, inline, "attached to the host");
    let session = Arc::new(Session {
        guest,
        heartbeat: Duration::from_millis(heartbeat_ms.clamp(100, 60_000).into()),
        region: Mutex::new(region),
        why_inline: why,
        sender: Mutex::new(sender),
        shutter,
        pending: Mutex::default(),
        next: AtomicU64::new(1),
        received_ms: AtomicU64::new(process::now_ms()),
        ring: OnceLock::new(),
        golden: Mutex::default(),
    });
    driver.renew(Some(policy), Some(generation));
    driver.set_session(Arc::clone(&session));
    driver.coverage.tell_again();
    Ok((session, receiver))
}

fn attach_message(proof: Proof, region: RegionId) -> ToHost {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    ToHost::Attach(Attach {
        proof,
        region,
        driver_version: env!("CARGO_PKG_VERSION").into(),
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        boot_id: read("/proc/sys/kernel/random/boot_id"),
    })
}

/// Takes what the host says until the link ends; returns why.
fn receive(driver: &Driver, session: &Arc<Session>, mut receiver: link::Receiver) -> LinkError {
    let mut parts = PolicyParts::default();
    loop {
        let message = match receiver.receive() {
            Ok(message) => message,
            Err(error) => return error,
        };
        session.received_ms.store(process::now_ms(), Ordering::Relaxed);
        match message {
            ToGuest::Verdict(verdict) => {
                // Before it counts as under way no more.
                let judging = driver.on_demand.judging();
                if let Some(pending) = session.finish(verdict.id) {
                    verdict::take(driver, session, pending, verdict, judging);
                }
            }
            ToGuest::SendContent(id) => {
                let _judging = driver.on_demand.judging();
                if let Some(pending) = session.finish(id) {
                    verdict::send_content(driver, pending);
                }
            }
            ToGuest::Ring(key) => session.begin_ring(key),
            ToGuest::Golden(golden) => *lock(&session.golden) = golden,
            ToGuest::Answered { number, clean } => ring::answered(driver, session, number, clean),
            ToGuest::Copied { id, slots } => session.copied(id, slots),
            ToGuest::Policy(part) => match parts.add(&part) {
                Ok(Some(policy)) if **driver.policy() != policy => {
                    driver.renew(Some(policy), None);
                }
                Ok(_) => (),
                // What it is to do it does not know any more.
                Err(error) => {
                    tracing::error!(%error, "the host's policy");
                    return LinkError::Closed;
                }
            },
            ToGuest::Generation(generation) => driver.renew(None, Some(generation)),
            ToGuest::Alive => (),
            ToGuest::Remove(remove) => driver.remedy(session, Task::Remove(remove)),
            ToGuest::Restore(restore) => driver.remedy(session, Task::Restore(restore)),
            ToGuest::RestoreContent(content) => driver.remedy(session, Task::Content(content)),
            ToGuest::RestoreEnd(ticket) => driver.remedy(session, Task::End(ticket)),
            ToGuest::Walk(walk) => driver.on_demand.begin(walk, session),
            ToGuest::WalkOrder(id, order) => driver.on_demand.order(id, order),
            ToGuest::Attached(_) | ToGuest::Refused(_) => return LinkError::Closed,
        }
    }
}

/// Accesses that wait still get their chance with the next session; exposures are found again in the
/// journal.
fn requeue(driver: &Driver, session: &Session) {
    ring::end(driver, session);
    let all: Vec<Pending> = lock(&session.pending).drain().map(|(_, pending)| pending).collect();
    for job in all.into_iter().filter_map(|pending| pending.job) {
        match job.subject {
            Subject::Access(_) => driver.push_job(job),
            Subject::Background { .. } => {
                scan::abandon(driver, &job.subject, ExposureReason::LinkDown);
            }
        }
    }
}
