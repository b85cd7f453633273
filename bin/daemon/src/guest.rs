//! One configured guest: its region, its session if it has one, and how it is.

use crate::alarm::Watch;
use crate::config::{Config, GuestConfig, PolicyConfig};
use crate::copy::{Budget, Share};
use crate::key::KeyFile;
use crate::link::Socket;
use crate::metrics::VerdictMetrics;
use crate::quiet::Complaints;
use crate::region::{GuestRegion, OpenRegion};
use crate::session::Session;
use seawall_proto::{ContentHash, RegionId};
use std::collections::{HashSet, VecDeque};
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// Why a session of a guest ends that was taken out of the configuration.
const NOT_CONFIGURED: &str = "the guest is no longer configured";

/// Connections of one guest that are not a session yet. One more ends the oldest: whoever holds
/// them open without a word cannot keep the driver out.
const HALF_OPEN_MAX: usize = 8;

/// The policy of one guest.
pub struct OwnPolicy {
    config: PolicyConfig,
    excluded: HashSet<ContentHash>,
}

impl OwnPolicy {
    /// Whether this content is not scanned.
    pub fn excludes(&self, hash: ContentHash) -> bool {
        self.excluded.contains(&hash)
    }
}

impl From<PolicyConfig> for OwnPolicy {
    fn from(config: PolicyConfig) -> Self {
        let excluded = config.exclude.hashes.iter().map(|hash| hash.0).collect();
        Self { config, excluded }
    }
}

impl Deref for OwnPolicy {
    type Target = PolicyConfig;

    fn deref(&self) -> &PolicyConfig {
        &self.config
    }
}

pub struct Guest {
    pub config: GuestConfig,
    pub region: Option<GuestRegion>,
    pub key: Option<KeyFile>,
    pub complaints: Complaints,
    pub share: Arc<Share>,
    pub watch: Mutex<Watch>,
    pub requests: AtomicU64,
    pub verdicts: VerdictMetrics,
    policy: RwLock<Arc<OwnPolicy>>,
    session: Mutex<Option<Arc<Session>>>,
    half_open: Mutex<VecDeque<(u64, Socket)>>,
    channel: Mutex<Option<Socket>>,
    next_half_open: AtomicU64,
    removed: AtomicBool,
}

impl Guest {
    pub fn new(config: GuestConfig, policy: PolicyConfig, budget: &Arc<Budget>) -> Arc<Self> {
        Arc::new(Self {
            policy: RwLock::new(Arc::new(policy.into())),
            region: config.region.as_ref().map(|path| GuestRegion::new(path.get_ref().0.clone())),
            key: config.key_file.as_ref().map(|path| KeyFile::new(path.get_ref().0.clone())),
            config,
            complaints: Complaints::default(),
            share: budget.share(),
            watch: Mutex::default(),
            requests: AtomicU64::new(0),
            verdicts: VerdictMetrics::default(),
            session: Mutex::default(),
            half_open: Mutex::default(),
            channel: Mutex::default(),
            next_half_open: AtomicU64::new(0),
            removed: AtomicBool::new(false),
        })
    }

    pub fn name(&self) -> &str {
        &self.config.name.get_ref().0
    }

    /// The policy that it has now.
    pub fn policy(&self) -> Arc<OwnPolicy> {
        Arc::clone(&self.policy.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Gives it another policy; false where it is the same.
    pub fn set_policy(&self, policy: &PolicyConfig) -> bool {
        let mut own = self.policy.write().unwrap_or_else(PoisonError::into_inner);
        let is_other = own.config != *policy;
        if is_other {
            *own = Arc::new(policy.clone().into());
        }
        is_other
    }

    /// Says something that the guest can cause at will.
    pub fn complain(&self, what: &str) {
        self.complaints.say(self.name(), what);
    }

    /// What a driver of this guest may prove that it can read, as it is now: the header of its region,
    /// and that in its key file.
    pub fn headers(&self) -> Vec<Arc<OpenRegion>> {
        let region = self.region.as_ref().map(|it| it.refresh(self.name(), &self.complaints));
        let key = self.key.as_ref().map(|it| it.refresh(self.name(), &self.complaints));
        [region, key].into_iter().flatten().flatten().collect()
    }

    /// The one of this name.
    pub fn header(&self, region: RegionId) -> Option<Arc<OpenRegion>> {
        self.headers().into_iter().find(|open| open.header.region == region)
    }

    /// Why its region or its key cannot be used, if so.
    pub fn fault(&self) -> Option<String> {
        let region = self.region.as_ref().and_then(GuestRegion::fault);
        region.or_else(|| self.key.as_ref().and_then(KeyFile::fault))
    }

    /// Takes `socket` for this guest's virtio-serial channel; QEMU has one, so an older one ends.
    pub fn take_channel(&self, socket: Socket) {
        let mut channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(before) = channel.replace(socket) {
            before.end();
        }
        if self.is_removed()
            && let Some(socket) = channel.take()
        {
            socket.end();
        }
    }

    pub fn session(&self) -> Option<Arc<Session>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes `session` this guest's only one; it has proved that it is the driver.
    pub fn begin_session(&self, session: &Arc<Session>) {
        let before = self
            .session
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .replace(Arc::clone(session));
        if let Some(before) = before {
            before.end("a new session of the same guest takes its place");
        }
        if self.is_removed() {
            session.end(NOT_CONFIGURED);
        }
    }

    /// Forgets `session`, unless another has taken its place.
    pub fn end_session(&self, session: &Arc<Session>) {
        let mut current = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        if current.as_ref().is_some_and(|current| Arc::ptr_eq(current, session)) {
            *current = None;
        }
    }

    /// Its session ends for this reason, and its listener stops.
    pub fn remove(&self, why: &str) {
        self.removed.store(true, Relaxed);
        if let Some(session) = self.session() {
            session.end(why);
        }
        if let Some(socket) = self.channel.lock().unwrap_or_else(PoisonError::into_inner).take() {
            socket.end();
        }
    }

    pub fn is_removed(&self) -> bool {
        self.removed.load(Relaxed)
    }

    /// Notes a connection that is not a session yet.
    pub fn half_open(self: &Arc<Self>, socket: Socket) -> HalfOpen {
        let id = self.next_half_open.fetch_add(1, Relaxed);
        let mut all = self.half_open.lock().unwrap_or_else(PoisonError::into_inner);
        all.push_back((id, socket));
        if all.len() > HALF_OPEN_MAX
            && let Some((_, oldest)) = all.pop_front()
        {
            oldest.end();
        }
        HalfOpen { guest: Arc::clone(self), id }
    }
}

/// A place among a guest's half-open connections, given back on drop.
pub struct HalfOpen {
    guest: Arc<Guest>,
    id: u64,
}

impl Drop for HalfOpen {
    fn drop(&mut self) {
        let mut all = self.guest.half_open.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|(id, _)| *id != self.id);
    }
}

/// All configured guests.
#[derive(Default)]
pub struct Guests(RwLock<Vec<Arc<Guest>>>);

impl Guests {
    pub fn all(&self) -> Vec<Arc<Guest>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn find(&self, is_it: impl Fn(&Guest) -> bool) -> Option<Arc<Guest>> {
        let all = self.0.read().unwrap_or_else(PoisonError::into_inner);
        all.iter().find(|guest| is_it(guest)).cloned()
    }

    /// Brings the guests in line with `wanted`: those that are reached just as before stay as
    /// they are. Gives those that are new.
    pub fn configure(&self, wanted: &Config, budget: &Arc<Budget>) -> Vec<Arc<Guest>> {
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let (stay, go): (Vec<_>, Vec<_>) = all.drain(..).partition(|guest| {
            wanted.guests.iter().any(|config| config.is_reached_as(&guest.config))
        });
        go.iter().for_each(|guest| guest.remove(NOT_CONFIGURED));
        let mut new = Vec::new();
        for config in &wanted.guests {
            let guest = stay.iter().find(|guest| guest.config.is_reached_as(config)).cloned();
            all.push(guest.unwrap_or_else(|| {
                let policy = wanted.governed(config).policy.clone();
                let guest = Guest::new(config.clone(), policy, budget);
                new.push(Arc::clone(&guest));
                guest
            }));
        }
        new
    }
}
