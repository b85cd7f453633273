//! The open requests of one session: content arrives, is copied once, and gets its verdict.
//!
//! Every slot that a message names, and whatever it brings inline, is copied while that message is
//! handled, so none stays the host's afterwards. Each request gets exactly one verdict for as long as the session lives.

use super::{Breach, Session};
use crate::copy::{CopyError, HEAP_MAX, PrivateCopy};
use crate::pipeline::{Answer, Archive, Asker, Content as Sealed, Finding, Request};
use crate::region::OpenRegion;
use seawall_engine::host::{Lane, Turn};
use seawall_engine::{ArchiveLimits, Metadata};
use seawall_proto::{
    Content, ContentHash, Ended, FileMetadata, Fingerprint, INLINE_MAX, Operation, Part, RequestId,
    ScanRequest, SlotRef, ToGuest,
};
use seawall_region::HostRegionError;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// Requests that wait for their verdict at the same time.
const OUTSTANDING_MAX: u32 = 1024;
/// Linux's PATH_MAX.
const PATH_MAX: usize = 4096;
/// Slots are given back after so many, while the rest of a message is copied.
const GIVE_BACK_EVERY: u32 = 16;
/// The shortest and longest time that a verdict is worked for.
const WAIT_MIN: Duration = Duration::from_secs(1);
const WAIT_MAX: Duration = Duration::from_secs(600);

/// Why a request ends without a scan. The session goes on.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error("slot {index} is named twice before it was given back")]
    Overlap { index: u16 },
    #[error("slots are named in a session that has no region")]
    NoRegion,
    #[error("{len} bytes came inline; the most is {INLINE_MAX}")]
    InlineTooLong { len: usize },
    #[error("one content came in more than one way")]
    Mixed,
    #[error(transparent)]
    Region(#[from] HostRegionError),
    #[error(transparent)]
    Copy(#[from] CopyError),
}

/// What was asked, as far as the answer and its event need it.
pub struct Asked {
    pub id: RequestId,
    pub operation: Operation,
    pub file: FileMetadata,
    pub since: Instant,
    /// Bytes copied.
    pub size: u64,
    /// It is an archive that this scan does not look into, and a scan on demand would.
    pub unopened: bool,
    /// Its file's, as the driver says.
    pub fingerprint: Option<Fingerprint>,
}

impl Asked {
    /// What engines hear of it, and behind whom it waits.
    fn kind(&self) -> (seawall_engine::Operation, Lane) {
        match self.operation {
            Operation::Open => (seawall_engine::Operation::Open, Lane::OnAccess),
            Operation::Exec => (seawall_engine::Operation::Exec, Lane::OnAccess),
            Operation::Background => (seawall_engine::Operation::Rescan, Lane::OnDemand),
            Operation::OnDemand => (seawall_engine::Operation::OnDemand, Lane::OnDemand),
        }
    }
}

/// A request whose content has not ended yet.
struct Open {
    asked: Asked,
    until: Instant,
    copy: PrivateCopy,
    slots: u32,
    /// Something came inline.
    inline: bool,
}

pub struct Requests {
    session: Arc<Session>,
    region: Arc<OpenRegion>,
    open: HashMap<RequestId, Open>,
    highest: Option<RequestId>,
    /// A buffer to use again.
    spare: Vec<u8>,
    scratch: Vec<u8>,
}

impl Session {
    /// What is known of a content to this guest's tenant, and whether it is an archive that this scan does not look into
    /// and a scan on demand would. Whether it is an archive at all need not be known.
    pub(super) fn known(
        &self,
        hash: ContentHash,
        is_archive: Option<bool>,
        meta: &Metadata,
    ) -> Option<(Answer, bool)> {
        let policy = self.guest.policy();
        let tenant = policy.tenant();
        let look = |archive| self.host.pipeline.lookup(hash, archive, meta, &tenant);
        let opens = policy.archives.opens(meta.operation);
        let unopened = policy.archives.opens(seawall_engine::Operation::OnDemand);
        let closed = || look(Archive::Closed).map(|answer| (answer, unopened));
        let opened = || look(Archive::Opened).map(|answer| (answer, false));
        let none = || look(Archive::No).map(|answer| (answer, false));
        match (is_archive, opens) {
            (Some(false), _) => none(),
            (Some(true), true) => opened(),
            (Some(true), false) => closed(),
            // Of one into which nobody looked that is known.
            (None, true) => none().or_else(opened),
            (None, false) => none().or_else(opened).or_else(closed),
        }
    }
}

impl Requests {
    pub fn new(session: Arc<Session>, region: Arc<OpenRegion>) -> Self {
        let (open, spare, scratch) = Default::default();
        Self { session, region, open, highest: None, spare, scratch }
    }

    /// A file access waits for a verdict.
    pub fn begin(
        &mut self,
        request: ScanRequest,
        fingerprint: Option<Fingerprint>,
    ) -> Result<(), Breach> {
        let ScanRequest { id, operation, deadline_ms, file, part, last } = request;
        if let Some(highest) = self.highest.filter(|highest| id <= *highest) {
            return Err(Breach::Order { id: id.0, highest: highest.0 });
        }
        if file.path.len() > PATH_MAX {
            return Err(Breach::PathTooLong { len: file.path.len() });
        }
        self.highest = Some(id);
        self.session.metrics().requests.fetch_add(1, Relaxed);
        self.session.guest.requests.fetch_add(1, Relaxed);
        // Of a content that it comes with, it would be said too early.
        let fingerprint = fingerprint.filter(|_| matches!(part, Part::Hash(_) | Part::Fingerprint));
        let now = Instant::now();
        let open = Open {
            copy: self.new_copy(operation, file.size, last),
            asked: Asked { id, operation, file, since: now, size: 0, unopened: false, fingerprint },
            until: now + Duration::from_millis(deadline_ms.into()).clamp(WAIT_MIN, WAIT_MAX),
            slots: 0,
            inline: false,
        };
        if self.session.outstanding.fetch_add(1, Relaxed) >= OUTSTANDING_MAX {
            let why = format!("more than {OUTSTANDING_MAX} requests wait for their verdict");
            self.refuse(open, &why);
            return Ok(());
        }
        match (part, fingerprint) {
            (Part::Hash(hash), _) if last => self.take_hash(open, hash),
            (Part::Fingerprint, Some(fingerprint)) if last => {
                match self.session.golden_hash(fingerprint) {
                    Some(hash) => self.take_hash(open, hash),
                    None => {
                        self.keep(open.copy.into_spare());
                        self.session.want_content(id);
                    }
                }
            }
            (part, _) => self.take(open, &part, last),
        }
        Ok(())
    }

    /// Answers from what is known of the content that the driver says it has. It may say what it likes: the verdict is
    /// for this guest alone, which could as well have been sent content that it never opens.
    fn take_hash(&mut self, open: Open, hash: ContentHash) {
        let Open { mut asked, until, copy, .. } = open;
        self.keep(copy.into_spare());
        asked.size = asked.file.size;
        let policy = self.session.guest.policy();
        let pipeline = &self.session.host.pipeline;
        if policy.excludes(hash) {
            return self.session.exclude(&asked, Some(hash), pipeline.generations.current());
        }
        let (operation, lane) = asked.kind();
        let meta = self.metadata(&asked, operation, None);
        let known = self.session.known(hash, None, &meta);
        asked.unopened = known.as_ref().is_some_and(|(_, unopened)| *unopened);
        // What was found in it may want the content, as quarantine does.
        let (session, id) = (Arc::clone(&self.session), asked.id);
        let reply = move |answer: Answer| match answer.finding {
            Finding::Clean => session.answer(&asked, Some(hash), &answer),
            _ => session.want_content(asked.id),
        };
        if let Some((answer, _)) = known {
            return reply(answer);
        }
        // Another guest may just have sent it.
        let tenant = policy.tenant();
        let turn = Turn { lane, client: self.session.guest.share.client };
        let asker = Asker { tenant, turn, until, reply: Box::new(reply) };
        let joined = pipeline.join(hash, Archive::No, &meta, asker);
        let joined = joined.or_else(|asker| pipeline.join(hash, Archive::Opened, &meta, asker));
        if joined.is_err() {
            self.session.want_content(id);
        }
    }

    fn metadata(
        &self,
        asked: &Asked,
        operation: seawall_engine::Operation,
        archives: Option<ArchiveLimits>,
    ) -> Metadata {
        Metadata {
            path: asked.file.path.to_vec(),
            guest: self.session.guest.name().to_owned(),
            operation,
            size: asked.size,
            archives,
        }
    }

    /// On access a file has the whole-file limit; what nobody waits for may be as long as announced.
    fn new_copy(&mut self, operation: Operation, announced: u64, last: bool) -> PrivateCopy {
        let usual = self.session.guest.policy().whole_file_limit();
        let limit = match operation {
            Operation::Open | Operation::Exec => usual,
            Operation::Background => usual.max(announced),
            Operation::OnDemand => self.session.host.config().on_demand.file_limit_mib << 20,
        };
        let share = Arc::clone(&self.session.guest.share);
        // The budget knows only what was copied: a request that stays open must not hold a buffer
        // that nobody is charged for.
        let spare = if last { std::mem::take(&mut self.spare) } else { Vec::new() };
        PrivateCopy::new(share, limit, usual, spare)
    }

    /// More content of an open request. One that this side has ended already, or that the driver
    /// cancelled, may still have content on the way: its slots came back with the verdict.
    pub fn go_on(&mut self, content: Content) -> Result<(), Breach> {
        let Content { id, part, last } = content;
        if let Some(open) = self.open.remove(&id) {
            self.take(open, &part, last);
            return Ok(());
        }
        if self.highest.is_none_or(|highest| id > highest) {
            return Err(Breach::UnknownRequest { id: id.0 });
        }
        Ok(())
    }

    /// The content of an open request ends, and the driver may say whose it is.
    pub fn ended(&mut self, ended: Ended) -> Result<(), Breach> {
        let Ended { id, fingerprint } = ended;
        if let Some(mut open) = self.open.remove(&id) {
            open.asked.fingerprint = fingerprint;
            self.complete(open);
            return Ok(());
        }
        if self.highest.is_none_or(|highest| id > highest) {
            return Err(Breach::UnknownRequest { id: id.0 });
        }
        Ok(())
    }

    /// The driver waits no longer. What is being scanned is scanned to the end, for the next one.
    pub fn cancel(&mut self, id: RequestId) {
        if let Some(open) = self.open.remove(&id) {
            self.refuse(open, "the driver cancelled the request");
        }
    }

    /// Copies what a message brought, and ends the request where the content ends.
    fn take(&mut self, mut open: Open, part: &Part, last: bool) {
        let copied = match part {
            Part::Slots(slots) => self.copy(&mut open, slots, last),
            Part::Inline(bytes) => self.copy_inline(&mut open, bytes),
            Part::Hash(_) | Part::Fingerprint => Err(Fault::Mixed),
        };
        match copied {
            Err(fault) => {
                // A budget that is used up is no fault of the driver's.
                if !matches!(fault, Fault::Copy(_)) {
                    self.session.guest.complain(&format!("a request ends: {fault}"));
                }
                self.refuse(open, &fault.to_string());
            }
            Ok(()) if last => self.complete(open),
            Ok(()) => {
                let (id, slots) = (open.asked.id, open.slots);
                if slots > 0 {
                    self.session.outbox.push(&ToGuest::Copied { id, slots });
                }
                self.open.insert(open.asked.id, open);
            }
        }
    }

    fn copy(&mut self, open: &mut Open, slots: &[SlotRef], last: bool) -> Result<(), Fault> {
        if open.inline && !slots.is_empty() {
            return Err(Fault::Mixed);
        }
        let region = Arc::clone(&self.region);
        let mut named = Bitmap::default();
        for (nth, slot) in (1_u32..).zip(slots) {
            if !named.insert(slot.index) {
                return Err(Fault::Overlap { index: slot.index });
            }
            let len = slot.len as usize;
            // Checked before room is made for it.
            let region = region.slots.as_ref().ok_or(Fault::NoRegion)?;
            region.geometry().offset(*slot).map_err(HostRegionError::from)?;
            open.copy.append(len, &mut self.scratch, |to| {
                region.copy_slot(*slot, to).map_err(Fault::from)
            })?;
            open.slots += 1;
            if !last && nth % GIVE_BACK_EVERY == 0 {
                self.session.outbox.push(&ToGuest::Copied { id: open.asked.id, slots: open.slots });
            }
            self.session.metrics().bytes_copied.fetch_add(u64::from(slot.len), Relaxed);
        }
        Ok(())
    }

    fn copy_inline(&mut self, open: &mut Open, bytes: &[u8]) -> Result<(), Fault> {
        if open.slots > 0 {
            return Err(Fault::Mixed);
        }
        open.inline = true;
        let len = bytes.len();
        if len > INLINE_MAX {
            return Err(Fault::InlineTooLong { len });
        }
        open.copy.append(len, &mut self.scratch, |to| {
            to.copy_from_slice(bytes);
            Ok::<_, Fault>(())
        })?;
        self.session.metrics().bytes_copied.fetch_add(len as u64, Relaxed);
        Ok(())
    }

    /// The content is whole: known, or given to the pipeline.
    fn complete(&mut self, open: Open) {
        let Open { mut asked, until, copy, slots, .. } = open;
        asked.size = copy.len();
        let hash = copy.hash();
        if let Some(fingerprint) = asked.fingerprint {
            self.session.compare_golden(fingerprint, hash, &asked.file.path);
        }
        let policy = self.session.guest.policy();
        if policy.excludes(hash) {
            let generation = self.session.host.pipeline.generations.current();
            self.session.exclude(&asked, Some(hash), generation);
            self.keep(copy.into_spare());
            return;
        }
        let (operation, lane) = asked.kind();
        let archives = policy.archives.limits(operation, &copy);
        asked.unopened = archives.is_none()
            && policy.archives.limits(seawall_engine::Operation::OnDemand, &copy).is_some();
        let archive = Archive::of(&copy, archives.is_some());
        let meta = self.metadata(&asked, operation, archives);
        let tenant = policy.tenant();
        if let Some(mut answer) = self.session.host.pipeline.lookup(hash, archive, &meta, &tenant) {
            if matches!(answer.finding, Finding::Infected(_)) {
                // It may go to quarantine; without the copy it is denied all the same.
                answer.content = Sealed::seal(copy).ok();
                self.session.answer(&asked, Some(hash), &answer);
                return;
            }
            self.session.answer(&asked, Some(hash), &answer);
            self.keep(copy.into_spare());
            return;
        }
        if slots > 0 {
            self.session.outbox.push(&ToGuest::Copied { id: asked.id, slots });
        }
        let session = Arc::clone(&self.session);
        let reply = move |answer: Answer| session.answer(&asked, Some(hash), &answer);
        self.session.host.pipeline.scan(Request {
            hash,
            copy,
            meta,
            tenant,
            lane,
            until,
            reply: Box::new(reply),
        });
    }

    /// Ends a request without a scan.
    fn refuse(&mut self, open: Open, why: &str) {
        let Open { mut asked, copy, .. } = open;
        asked.size = copy.len();
        let generation = self.session.host.pipeline.generations.current();
        let answer = Answer::new(Finding::Error(why.to_owned()), generation);
        self.session.answer(&asked, None::<ContentHash>, &answer);
        self.keep(copy.into_spare());
    }

    fn keep(&mut self, spare: Vec<u8>) {
        if spare.capacity() <= HEAP_MAX && spare.capacity() > self.spare.capacity() {
            self.spare = spare;
        }
    }

    /// Nothing came for a while: gives memory back.
    pub fn rest(&mut self) {
        self.spare = Vec::new();
        self.scratch = Vec::new();
    }

    /// The session is over: gives up what has not ended.
    pub fn abandon(mut self) {
        for (_, open) in self.open.drain() {
            self.session.outstanding.fetch_sub(1, Relaxed);
            drop(open);
        }
    }
}

/// Which slot numbers were named.
#[derive(Default)]
struct Bitmap(Vec<u64>);

impl Bitmap {
    /// Whether `index` is new.
    fn insert(&mut self, index: u16) -> bool {
        let (word, bit) = (usize::from(index / 64), 1_u64 << (index % 64));
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        let is_new = self.0[word] & bit == 0;
        self.0[word] |= bit;
        is_new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_number_is_new_once() {
        let mut named = Bitmap::default();
        for index in [0, 63, 64, u16::MAX] {
            assert!(named.insert(index));
            assert!(!named.insert(index));
        }
        assert!(named.insert(1));
    }
}
