//! What all parts of the service share.

use crate::alarm::{self, Change};
use crate::config::Config;
use crate::copy::Budget;
use crate::events::Events;
use crate::golden::Golden;
use crate::guest::{Guest, Guests};
use crate::metrics::Metrics;
use crate::pipeline::Pipeline;
use crate::quarantine::Quarantine;
use crate::scans::Scans;
use crate::signatures::Signatures;
use crate::state::State;
use seawall_client::{Event, EventKind};
use seawall_proto::ToGuest;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

pub struct Host {
    pub config: RwLock<Arc<Config>>,
    /// That of the service's start; what it says of some sections holds until the end.
    pub first_config: Arc<Config>,
    pub guests: Guests,
    pub pipeline: Arc<Pipeline>,
    pub events: Events,
    pub state: State,
    pub metrics: Arc<Metrics>,
    pub budget: Arc<Budget>,
    pub quarantine: Arc<Quarantine>,
    pub signatures: Signatures,
    pub scans: Scans,
    pub golden: Golden,
    pub started: jiff::Timestamp,
    pub telling: Mutex<()>,
}

impl Host {
    /// Held by whoever changes policy or generation until every session was told, and by a session
    /// that begins while it is told what they are: so all hear of changes in the order in which they
    /// came.
    pub fn telling(&self) -> MutexGuard<'_, ()> {
        self.telling.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn config(&self) -> Arc<Config> {
        Arc::clone(&self.config.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub fn set_config(&self, config: Config) {
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
    }

    /// Says `message` to every guest that has a session.
    pub fn broadcast(&self, message: &ToGuest) {
        for guest in self.guests.all() {
            if let Some(session) = guest.session() {
                session.outbox.push(message);
            }
        }
    }

    /// Says to every guest that has a session what is known of golden images.
    pub fn tell_golden(&self) {
        let _telling = self.telling();
        for session in self.guests.all().iter().filter_map(|guest| guest.session()) {
            session.tell_golden();
        }
    }

    /// Watches over guests and what became due, for as long as the service lives.
    pub fn watch(&self) {
        loop {
            let config = self.config();
            let now = Instant::now();
            for guest in self.guests.all() {
                let session = guest.session();
                let mut watch = guest.watch.lock().unwrap_or_else(PoisonError::into_inner);
                let is_there = watch.take_news();
                let change = watch.look(
                    now,
                    session.is_some(),
                    Duration::from_millis(config.alarm.heartbeat_ms.into()),
                    Duration::from_millis(config.alarm.unprotected_after_ms.into()),
                );
                drop(watch);
                if is_there {
                    self.state.seen(guest.name());
                }
                if let Some(change) = change {
                    self.tell(guest.name(), session.is_some(), &change);
                }
                if let Some(session) = session {
                    session.flush_pending(now);
                    session.forget_wanted(now);
                }
                guest.complaints.sum_up(guest.name());
            }
            self.events.report_lost();
            std::thread::sleep(alarm::TICK);
        }
    }

    /// Gives new region files their header, writes key files anew, and which guests are not believed, for as long as the
    /// service lives. On a thread of its own: a file system that hangs must not delay an alarm.
    pub fn keep_regions(&self) {
        loop {
            for guest in self.guests.all() {
                guest.headers();
            }
            self.golden.flush();
            std::thread::sleep(Duration::from_secs(1));
        }
    }

    fn tell(&self, guest: &str, has_session: bool, change: &Change) {
        match change {
            Change::Unprotected { silent_for } => {
                let why = if has_session {
                    "its driver is connected but sends no heartbeat"
                } else {
                    "its driver is not connected"
                };
                let silent_ms = silent_for.as_millis();
                tracing::error!(guest, silent_ms, "the guest is unprotected: {why}");
                let reason = format!("{why}; silent for {silent_ms} ms");
                self.events
                    .emit(Event::new(EventKind::GuestUnprotected).guest(guest).reason(reason));
            }
            Change::Protected => {
                tracing::info!(guest, "the guest is protected again");
                self.events.emit(Event::new(EventKind::GuestProtected).guest(guest));
            }
        }
    }
}

impl Host {
    /// Brings the running service in line with `config`: guests, policy, alarm. Gives the sections
    /// whose changes count only after a restart.
    pub fn take_over(self: &Arc<Self>, config: Config) -> Vec<String> {
        let first = &self.first_config;
        let fixed = [
            ("[service]", first.service != config.service),
            ("[[engine]]", first.engines != config.engines),
            ("[scan]", first.order != config.order),
            ("[limits]", first.limits != config.limits),
            ("[quarantine]", first.quarantine != config.quarantine),
            ("[events]", first.events != config.events),
            ("[clamd]", first.clamd != config.clamd),
        ];
        let restart_needed: Vec<_> = fixed
            .iter()
            .filter(|(_, changed)| *changed)
            .map(|(name, _)| (*name).to_owned())
            .collect();
        for section in &restart_needed {
            tracing::warn!("changes in {section} count after a restart of the service");
        }
        let new = self.guests.configure(&config, &self.budget);
        self.state.keep_guests(|name| config.guests.iter().any(|guest| guest.is_named(name)));
        for warning in &config.warnings {
            tracing::warn!("{warning}");
        }
        self.quarantine.set_shares(&config);
        let new_policies = {
            let _telling = self.telling();
            self.set_config(config);
            self.tell_policies()
        };
        self.serve(&new);
        tracing::info!(new_guests = new.len(), new_policies, "the configuration was read again");
        let reason = match restart_needed.as_slice() {
            [] => String::new(),
            sections => format!("a restart is needed for {}", sections.join(", ")),
        };
        self.events.emit(Event::new(EventKind::ConfigReloaded).reason(reason));
        restart_needed
    }

    /// Tells each guest its policy whose policy is another now; gives how many these are.
    fn tell_policies(&self) -> usize {
        let config = self.config();
        let mut told = 0;
        for guest in self.guests.all() {
            let Some(own) = config.guest(guest.name()) else { continue };
            let policy = config.governed(own).policy;
            if guest.set_policy(policy) {
                told += 1;
                if let Some(session) = guest.session() {
                    session.tell_policy(policy);
                    // Another tenant's are others.
                    session.tell_golden();
                }
            }
        }
        told
    }

    /// Prepares the regions of guests that are new, and listens for them.
    pub fn serve(self: &Arc<Self>, new: &[Arc<Guest>]) {
        for guest in new {
            if self.state.sighting(guest.name()).is_some() {
                guest.watch.lock().unwrap_or_else(PoisonError::into_inner).seen_before();
            }
            guest.headers();
            if let Err(error) = crate::listen::serve_guest(self, guest) {
                tracing::error!(guest = guest.name(), %error, "no thread to listen for the guest");
            }
        }
    }
}
