//! The host's quarantine: infected files of all guests, and their way back.
//!
//! One thread takes what guests offer, makes it durable, has the guest's file removed and notes what
//! became of it; [`Quarantine`] is what everybody else sees. Content and entry are on disk, read back
//! and compared, before a guest hears that its file may go. Whoever dies in between leaves a file that
//! is in the guest, or here, or in both: an entry whose removal was not confirmed is asked for again
//! when the guest's driver comes back.
//!
//! Owns the store, its index and the approvals. It must not own anything that an access waits for.

mod entry;
mod index;
mod restore;
mod store;

pub use entry::{Entry, State, stays as told_stays};
pub use index::Line;
pub use restore::{RestoreError, Target};
pub use store::{StoreError, parse_hash};

use crate::clock;
use crate::config::{Config, GuestConfig, QuarantineConfig, QuarantineShare};
use crate::events::Events;
use crate::pipeline::Content;
use crate::session::Session;
use entry::VERSION;
use index::Index;
use restore::Reply;
use seawall_client::{Approval, Event, EventKind};
use seawall_proto::remedy::{Offered, Remove, Removed, Stays};
use seawall_proto::{ContentHash, Ticket, ToGuest};
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;
use store::{Store, write_durably};

/// Offers and answers that wait for the thread.
const QUEUE: usize = 256;
/// How often old entries are looked for.
const TICK: Duration = Duration::from_secs(60);
/// From this part of the limit on the operator is warned, in percent.
const WARN_PERCENT: u64 = 80;

/// Why the quarantine cannot do it.
#[derive(Debug, thiserror::Error)]
pub enum QuarantineError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the index of the quarantine: {0}")]
    Index(#[from] rusqlite::Error),
    #[error("the quarantine holds at most {limit} bytes, and this file alone takes more")]
    TooLarge { limit: u64 },
    #[error("no entry of the quarantine begins with `{0}`; `seawall quarantine list` shows them")]
    NoSuch(String),
    #[error("more than one entry of the quarantine begins with `{0}`; give more digits")]
    Ambiguous(String),
    #[error("the approvals cannot be kept: {0}")]
    Approvals(#[source] std::io::Error),
}

/// An infected file that a driver offers, with the copy that was judged.
pub struct Suspect {
    pub session: Arc<Session>,
    pub hash: ContentHash,
    pub content: Arc<Content>,
    /// Policy wants it deleted, not kept.
    pub delete: bool,
    pub detection: String,
    pub engine: String,
    pub file: Offered,
}

enum Job {
    Take(Box<Suspect>),
    Removed { guest: String, removed: Removed },
    Attached(Arc<Session>),
    Stays { guest: String, path: Vec<u8>, hash: ContentHash, why: Stays },
}

pub struct Quarantine {
    jobs: SyncSender<Job>,
    state: Mutex<Held>,
    approvals: RwLock<HashSet<(ContentHash, Option<String>)>>,
    restores: Mutex<HashMap<Ticket, (String, Sender<Reply>)>>,
    folder: PathBuf,
    limits: QuarantineConfig,
    /// Of guests whose policy has limits of their own.
    shares: RwLock<HashMap<String, QuarantineShare>>,
    events: Events,
}

/// What one at a time changes.
struct Held {
    store: Store,
    index: Index,
    approvals: Vec<Approval>,
    /// Bytes of all contents on disk.
    used: u64,
    warned: bool,
}

impl Quarantine {
    /// Opens the quarantine in `folder` and starts its thread.
    ///
    /// # Errors
    /// When the folder, the key or a new index cannot be made.
    pub fn start(
        folder: &Path,
        limits: QuarantineConfig,
        events: Events,
    ) -> Result<Arc<Self>, QuarantineError> {
        let store = Store::open(folder)?;
        let told = |what: &str| {
            tracing::warn!("{what}");
            events.emit(Event::new(EventKind::QuarantineDamaged).reason(what));
        };
        let index = Index::open(&folder.join("index.db"), &store, told)?;
        let used = store.contents()?.into_iter().map(|hash| store.stored_size(hash)).sum();
        let approvals = read_approvals(&folder.join("approvals.json"))?;
        let pairs = approvals
            .iter()
            .filter_map(|approval| Some((parse_hash(&approval.hash)?, approval.guest.clone())));
        let (jobs, taken) = sync_channel(QUEUE);
        let quarantine = Arc::new(Self {
            jobs,
            approvals: RwLock::new(pairs.collect()),
            state: Mutex::new(Held { store, index, approvals, used, warned: false }),
            restores: Mutex::default(),
            folder: folder.to_owned(),
            limits,
            shares: RwLock::default(),
            events,
        });
        let keeper = Arc::clone(&quarantine);
        std::thread::Builder::new()
            .name("quarantine".into())
            .spawn(move || keeper.keep(&taken))
            .map_err(|reason| StoreError::Io { path: folder.to_owned(), reason })?;
        Ok(quarantine)
    }

    /// What guests' policies say from now on. What is older than that goes soon, what is more with the next file.
    pub fn set_shares(&self, config: &Config) {
        let of = |guest: &GuestConfig| {
            let share = config.governed(guest).policy.quarantine;
            (share != QuarantineShare::default()).then(|| (guest.name.get_ref().0.clone(), share))
        };
        let shares = config.guests.iter().filter_map(of).collect();
        *self.shares.write().unwrap_or_else(PoisonError::into_inner) = shares;
    }

    fn shares(&self) -> RwLockReadGuard<'_, HashMap<String, QuarantineShare>> {
        self.shares.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands an offered file over. Never waits. `false`: there is no room; it is offered again when it
    /// is next opened.
    pub fn take(&self, suspect: Suspect) -> bool {
        self.jobs.try_send(Job::Take(Box::new(suspect))).is_ok()
    }

    /// A driver says what became of a removal. Never waits.
    pub fn removed(&self, guest: &str, removed: Removed) {
        // Without room the guest is asked again when it comes back.
        let _ = self.jobs.try_send(Job::Removed { guest: guest.to_owned(), removed });
    }

    /// A driver says why it does not offer a file. Never waits.
    pub fn stays(&self, guest: &str, path: Vec<u8>, hash: ContentHash, why: Stays) {
        let guest = guest.to_owned();
        if let Err(error) = self.jobs.try_send(Job::Stays { guest, path, hash, why })
            && let TrySendError::Full(Job::Stays { guest, path, hash, why })
            | TrySendError::Disconnected(Job::Stays { guest, path, hash, why }) = error
        {
            self.tell_stays(&guest, &path, hash, why);
        }
    }

    fn tell_stays(&self, guest: &str, path: &[u8], hash: ContentHash, why: Stays) {
        let mut event = Event::new(EventKind::QuarantineStays).guest(guest);
        event.path = Some(seawall_client::text::escape(path));
        event.hash = Some(hash.to_string());
        self.events.emit(event.reason(told_stays(why)));
    }

    /// A file that was found more than once may have gone here by now: then nothing stays.
    fn note_stays(&self, guest: &str, path: &[u8], hash: ContentHash, why: Stays) {
        let lines = self.list(Some(guest)).unwrap_or_default();
        let has_gone = matches!(why, Stays::Gone | Stays::Changed)
            && lines.iter().any(|line| line.hash == hash && line.path == path);
        if !has_gone {
            self.tell_stays(guest, path, hash, why);
        }
    }

    /// A driver is there: it is asked again for what it has not confirmed. Never waits.
    pub fn attached(&self, session: &Arc<Session>) {
        let _ = self.jobs.try_send(Job::Attached(Arc::clone(session)));
    }

    /// Whether the operator lets this content pass in this guest.
    pub fn is_approved(&self, hash: ContentHash, guest: &str) -> bool {
        let approvals = self.approvals.read().unwrap_or_else(PoisonError::into_inner);
        !approvals.is_empty()
            && (approvals.contains(&(hash, None))
                || approvals.contains(&(hash, Some(guest.to_owned()))))
    }

    /// Bytes of all contents on disk, and the most that they may be.
    pub fn usage(&self) -> (u64, u64) {
        (self.held().used, self.limits.most())
    }

    fn keep(&self, jobs: &Receiver<Job>) {
        loop {
            match jobs.recv_timeout(TICK) {
                Ok(Job::Take(suspect)) => self.store(*suspect),
                Ok(Job::Removed { guest, removed }) => self.note_removed(&guest, removed),
                Ok(Job::Attached(session)) => self.ask_again(&session),
                Ok(Job::Stays { guest, path, hash, why }) => {
                    self.note_stays(&guest, &path, hash, why);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.drop_old();
        }
    }

    /// Makes a file durable here, then has the guest's own removed.
    fn store(&self, suspect: Suspect) {
        let guest = suspect.session.guest.name().to_owned();
        match self.store_entry(&suspect, &guest) {
            Ok(entry) => {
                let Entry { ticket, path, identity, .. } = entry;
                let remove = Remove { ticket, path: path.into(), identity };
                suspect.session.outbox.push(&ToGuest::Remove(remove));
            }
            Err(error) => {
                tracing::error!(guest, %error, "an infected file cannot be quarantined; it stays in the guest and is denied");
                let mut event = Event::new(EventKind::QuarantineFailed).guest(&guest);
                event.path = Some(seawall_client::text::escape(&suspect.file.path));
                event.hash = Some(suspect.hash.to_string());
                self.events.emit(event.reason(error.to_string()));
            }
        }
    }

    fn store_entry(&self, suspect: &Suspect, guest: &str) -> Result<Entry, QuarantineError> {
        let Suspect { hash, content, detection, engine, delete, file, .. } = suspect;
        let mut held = self.held();
        let before = held.index.of_file(guest, &file.path, *hash)?;
        let ticket = match before {
            Some(ticket) => ticket,
            None => Ticket(random_number()?),
        };
        let entry = Entry {
            version: VERSION,
            ticket,
            hash: *hash,
            size: content.bytes.len(),
            guest: guest.to_owned(),
            path: file.path.to_vec(),
            identity: file.identity,
            attributes: file.attributes.clone(),
            detection: detection.clone(),
            engine: engine.clone(),
            stored_ms: jiff::Timestamp::now().as_millisecond(),
            state: State::Stored,
            delete: *delete,
        };
        if before.is_none() {
            self.make_room_in_share(&mut held, guest, entry.size)?;
        }
        self.make_room(&mut held, *hash, entry.size)?;
        let on_disk = held.store.stored_size(*hash);
        let now = held.store.keep(*hash, &content.bytes)?;
        held.used = held.used - on_disk.min(held.used) + now;
        let noted = held.store.write_entry(&entry);
        if let Err(error) = noted {
            self.forget_content(&mut held, *hash)?;
            return Err(error.into());
        }
        held.index.put(&entry)?;
        self.warn(&mut held);
        Ok(entry)
    }

    fn note_removed(&self, guest: &str, removed: Removed) {
        let Removed { ticket, result } = removed;
        let mut held = self.held();
        // A guest speaks for its own files alone.
        let Ok(mut entry) = held.store.read_entry(ticket) else { return };
        if entry.guest != guest || !matches!(entry.state, State::Stored | State::Stays(_)) {
            return;
        }
        entry.state = match result {
            Ok(links) => State::Quarantined { links },
            // An earlier try removed it and its answer was lost, or its owner did.
            Err(Stays::Gone) => State::Quarantined { links: 0 },
            Err(why) => State::Stays(why),
        };
        let is_gone = matches!(entry.state, State::Quarantined { .. });
        let noted = if entry.delete && is_gone {
            self.remove_entry(&mut held, entry.ticket, entry.hash)
        } else {
            let noted = held.store.write_entry(&entry).map_err(QuarantineError::from);
            noted.and_then(|()| Ok(held.index.put(&entry)?))
        };
        drop(held);
        if let Err(error) = noted {
            tracing::error!(guest, %error, "what became of a quarantined file cannot be noted");
        }
        let kind = match &entry.state {
            State::Stays(_) => EventKind::QuarantineStays,
            _ if entry.delete => EventKind::FileDeleted,
            _ => EventKind::Quarantined,
        };
        self.events.emit(event_of(kind, &entry));
    }

    fn ask_again(&self, session: &Arc<Session>) {
        let held = self.held();
        let lines = held.index.list(Some(session.guest.name())).unwrap_or_default();
        for line in lines.into_iter().filter(|line| line.state == State::Stored.word()) {
            if let Ok(Entry { ticket, path, identity, .. }) = held.store.read_entry(line.ticket) {
                let remove = Remove { ticket, path: path.into(), identity };
                session.outbox.push(&ToGuest::Remove(remove));
            }
        }
    }

    /// Drops old entries of this guest until `size` bytes more are within its policy.
    fn make_room_in_share(
        &self,
        held: &mut Held,
        guest: &str,
        size: u64,
    ) -> Result<(), QuarantineError> {
        let Some(limit) = self.shares().get(guest).and_then(|share| share.most()) else {
            return Ok(());
        };
        if size > limit {
            return Err(QuarantineError::TooLarge { limit });
        }
        while held.index.size_of(guest)? + size > limit {
            let Some(oldest) = held.index.next_to_drop(Some(guest))? else { break };
            self.drop_entry(held, &oldest, "its guest has more than policy lets it have")?;
        }
        Ok(())
    }

    /// Drops old entries until a content of `size` bytes has room: those of the guest that has the
    /// most, so that one guest's flood costs no other its files.
    fn make_room(
        &self,
        held: &mut Held,
        hash: ContentHash,
        size: u64,
    ) -> Result<(), QuarantineError> {
        let limit = self.limits.most();
        if held.store.stored_size(hash) > 0 {
            return Ok(());
        }
        if size > limit {
            return Err(QuarantineError::TooLarge { limit });
        }
        while held.used + size > limit {
            let Some(oldest) = held.index.next_to_drop(None)? else {
                return Err(QuarantineError::TooLarge { limit });
            };
            self.drop_entry(held, &oldest, "the quarantine is full")?;
        }
        Ok(())
    }

    fn drop_old(&self) {
        let Some(now_ms) = clock::steady_now_ms() else { return };
        let shares = self.shares().clone();
        let own: Vec<_> =
            shares.iter().filter_map(|(guest, share)| Some((guest, share.keep_ms()?))).collect();
        let names: Vec<_> = own.iter().map(|(guest, _)| guest.as_str()).collect();
        let mut held = self.held();
        let mut drop_before =
            |until: i64, oldest: &dyn Fn(&Index) -> rusqlite::Result<Option<Line>>| {
                while let Ok(Some(oldest)) = oldest(&held.index)
                    && oldest.stored_ms < until
                {
                    if let Err(error) =
                        self.drop_entry(&mut held, &oldest, "it is older than is kept")
                    {
                        tracing::error!(%error, "an old entry of the quarantine cannot be dropped");
                        return;
                    }
                }
            };
        drop_before(now_ms - self.limits.keep_ms(), &|index| index.oldest_but(&names));
        for (guest, keep_ms) in &own {
            drop_before(now_ms - keep_ms, &|index| index.oldest_of(guest));
        }
    }

    fn drop_entry(&self, held: &mut Held, line: &Line, why: &str) -> Result<(), QuarantineError> {
        let mut event = Event::new(EventKind::QuarantineDropped).guest(&line.guest);
        event.path = Some(seawall_client::text::escape(&line.path));
        event.hash = Some(line.hash.to_string());
        event.ticket = Some(line.ticket.to_string());
        self.remove_entry(held, line.ticket, line.hash)?;
        self.events.emit(event.reason(why));
        Ok(())
    }

    fn remove_entry(
        &self,
        held: &mut Held,
        ticket: Ticket,
        hash: ContentHash,
    ) -> Result<(), QuarantineError> {
        held.store.remove_entry(ticket)?;
        held.index.remove(ticket)?;
        self.forget_content(held, hash)
    }

    /// Removes a content that no entry has any more.
    fn forget_content(&self, held: &mut Held, hash: ContentHash) -> Result<(), QuarantineError> {
        if held.index.uses(hash)? == 0 {
            held.used = held.used.saturating_sub(held.store.stored_size(hash));
            held.store.remove_content(hash)?;
        }
        Ok(())
    }

    fn warn(&self, held: &mut Held) {
        let limit = self.limits.most();
        let full = held.used >= limit / 100 * WARN_PERCENT;
        if full && !held.warned {
            let reason = format!(
                "{} of {limit} bytes are used; beyond that the oldest entries are dropped",
                held.used
            );
            tracing::warn!("the quarantine fills: {reason}");
            self.events.emit(Event::new(EventKind::QuarantineFilling).reason(reason));
        }
        held.warned = full;
    }

    // --- what the operator asks for -------------------------------------------------------------

    /// The listing, newest first.
    ///
    /// # Errors
    /// What the index says.
    pub fn list(&self, guest: Option<&str>) -> Result<Vec<Line>, QuarantineError> {
        Ok(self.held().index.list(guest)?)
    }

    /// The entry whose ticket begins with these digits.
    ///
    /// # Errors
    /// [`QuarantineError::NoSuch`], [`QuarantineError::Ambiguous`], or a damaged entry.
    pub fn find(&self, digits: &str) -> Result<Entry, QuarantineError> {
        let held = self.held();
        let digits = digits.to_ascii_lowercase();
        match held.index.find(&digits)?.as_slice() {
            [one] if !digits.is_empty() => Ok(held.store.read_entry(*one)?),
            [] => Err(QuarantineError::NoSuch(digits)),
            _ => Err(QuarantineError::Ambiguous(digits)),
        }
    }

    /// Reads the content of an entry; see [`Store::read`].
    ///
    /// # Errors
    /// As there.
    pub fn read(
        &self,
        hash: ContentHash,
        each: impl FnMut(&[u8]) -> Result<(), String>,
    ) -> Result<(), StoreError> {
        // Nobody else waits while a large content is read.
        let store = self.held().store.clone();
        store.read(hash, each)
    }

    /// Deletes an entry, and its content if it was the last one.
    ///
    /// # Errors
    /// What disk or index say.
    pub fn delete(&self, entry: &Entry) -> Result<(), QuarantineError> {
        self.remove_entry(&mut self.held(), entry.ticket, entry.hash)?;
        self.events.emit(event_of(EventKind::QuarantineDeleted, entry));
        Ok(())
    }

    /// Lets a content pass, in one guest or in all. `false`: it did already.
    ///
    /// # Errors
    /// When that cannot be kept.
    pub fn approve(&self, hash: ContentHash, guest: Option<&str>) -> Result<bool, QuarantineError> {
        let guest = guest.map(str::to_owned);
        let mut held = self.held();
        let pair = (hash, guest.clone());
        if self.approvals.read().unwrap_or_else(PoisonError::into_inner).contains(&pair) {
            return Ok(false);
        }
        let mut all = held.approvals.clone();
        let since = crate::events::now();
        all.push(Approval { hash: hash.to_string(), guest: guest.clone(), since });
        self.write_approvals(&all)?;
        held.approvals = all;
        self.approvals.write().unwrap_or_else(PoisonError::into_inner).insert(pair);
        let mut event = Event::new(EventKind::Approved);
        event.guest = guest;
        event.hash = Some(hash.to_string());
        self.events.emit(event);
        Ok(true)
    }

    /// Takes approvals of a content back: that of one guest, or all. Gives how many.
    ///
    /// # Errors
    /// When that cannot be kept.
    pub fn revoke(&self, hash: ContentHash, guest: Option<&str>) -> Result<usize, QuarantineError> {
        let mut held = self.held();
        let text = hash.to_string();
        let goes = |approval: &Approval| {
            approval.hash == text && (guest.is_none() || approval.guest.as_deref() == guest)
        };
        let (gone, left): (Vec<_>, Vec<_>) = held.approvals.iter().cloned().partition(goes);
        if gone.is_empty() {
            return Ok(0);
        }
        self.write_approvals(&left)?;
        held.approvals = left;
        let mut pairs = self.approvals.write().unwrap_or_else(PoisonError::into_inner);
        for approval in &gone {
            pairs.remove(&(hash, approval.guest.clone()));
        }
        let mut event = Event::new(EventKind::ApprovalRevoked);
        event.guest = guest.map(str::to_owned);
        event.hash = Some(text);
        self.events.emit(event);
        Ok(gone.len())
    }

    /// All approvals.
    pub fn approvals(&self) -> Vec<Approval> {
        self.held().approvals.clone()
    }

    fn write_approvals(&self, all: &[Approval]) -> Result<(), QuarantineError> {
        let text = serde_json::to_vec_pretty(all).map_err(std::io::Error::from);
        text.and_then(|text| {
            write_durably(&self.folder.join("approvals.json"), |file| {
                std::io::Write::write_all(file, &text)
            })
        })
        .map_err(QuarantineError::Approvals)
    }
}

/// A file that cannot be read must not silently approve nothing: the operator would wonder.
fn read_approvals(path: &Path) -> Result<Vec<Approval>, QuarantineError> {
    match std::fs::read(path) {
        Ok(text) => serde_json::from_slice(&text)
            .map_err(|error| QuarantineError::Approvals(std::io::Error::from(error))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(QuarantineError::Approvals(error)),
    }
}

fn random_number() -> Result<u64, StoreError> {
    getrandom::u64().map_err(|error| StoreError::Io {
        path: PathBuf::from("/dev/urandom"),
        reason: error.into(),
    })
}

/// An event about an entry.
fn event_of(kind: EventKind, entry: &Entry) -> Event {
    let mut event = Event::new(kind).guest(&entry.guest);
    event.path = Some(seawall_client::text::escape(&entry.path));
    event.hash = Some(entry.hash.to_string());
    event.size = Some(entry.size);
    event.detection = Some(entry.detection.clone());
    event.engine = Some(entry.engine.clone());
    event.ticket = Some(entry.ticket.to_string());
    let detail = entry.state.detail();
    event.reason = (!detail.is_empty()).then_some(detail);
    event
}
