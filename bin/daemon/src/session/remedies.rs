//! What policy wants done with an infected file besides denying it, and what the driver offers then.

use super::Session;
use super::requests::Asked;
use crate::config::Action;
use crate::pipeline::{Answer, Content, Finding};
use crate::quarantine::Suspect;
use seawall_client::{Event, EventKind, Verdict};
use seawall_proto::remedy::{Attributes, Offer, Offered};
use seawall_proto::{ContentHash, RequestId};
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// How long a copy is held for the driver's offer.
const PATIENCE: Duration = Duration::from_secs(30);
/// Copies held at once; with more the file is offered again when it is next opened.
const WANTED_MAX: usize = 64;
/// Contents let through of which the log tells once in a session.
const TOLD_MAX: usize = 4096;

/// What is done besides the usual decision.
pub enum Remedy {
    None,
    Quarantine,
    /// The operator or policy lets it pass.
    Allowed,
}

/// Copies of what the driver shall offer, and contents let through that the log knows of.
#[derive(Default)]
pub struct Wanted {
    by_request: HashMap<RequestId, Want>,
    told: HashSet<ContentHash>,
}

struct Want {
    until: Instant,
    hash: ContentHash,
    content: Arc<Content>,
    detection: String,
    engine: String,
    path: Vec<u8>,
    delete: bool,
}

impl Session {
    fn wanted(&self) -> std::sync::MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is done about a verdict besides the decision.
    pub fn remedy(&self, asked: &Asked, hash: Option<ContentHash>, answer: &Answer) -> Remedy {
        let (Finding::Infected(found), Some(hash)) = (&answer.finding, hash) else {
            return Remedy::None;
        };
        if self.host.quarantine.is_approved(hash, self.guest.name()) {
            self.tell_allowed(asked, hash, answer, "approved by the operator");
            return Remedy::Allowed;
        }
        let delete = match self.guest.policy().action.about(found) {
            (Action::Quarantine, _) => false,
            (Action::Delete, _) => true,
            (Action::Deny, _) => return Remedy::None,
            (Action::Allow, setting) => {
                self.tell_allowed(
                    asked,
                    hash,
                    answer,
                    &format!("policy lets it through ({setting})"),
                );
                return Remedy::Allowed;
            }
        };
        let Some(content) = &answer.content else { return Remedy::None };
        let mut wanted = self.wanted();
        if wanted.by_request.len() >= WANTED_MAX {
            return Remedy::None;
        }
        let first = found.first();
        let want = Want {
            until: Instant::now() + PATIENCE,
            hash,
            content: Arc::clone(content),
            detection: first.map(|found| found.name.clone()).unwrap_or_default(),
            engine: first.map(|found| found.engine.clone()).unwrap_or_default(),
            path: asked.file.path.to_vec(),
            delete,
        };
        wanted.by_request.insert(asked.id, want);
        Remedy::Quarantine
    }

    /// Told once in a session for each content.
    fn tell_allowed(&self, asked: &Asked, hash: ContentHash, answer: &Answer, why: &str) {
        let mut wanted = self.wanted();
        if wanted.told.len() >= TOLD_MAX || !wanted.told.insert(hash) {
            return;
        }
        drop(wanted);
        let mut event = self.file_event(EventKind::Verdict, asked.operation, &asked.file);
        event.verdict = Some(Verdict::Infected);
        event.decision = Some("allow".into());
        event.hash = Some(hash.to_string());
        event.size = Some(asked.size);
        if let Finding::Infected(found) = &answer.finding
            && let Some(first) = found.first()
        {
            event.detection = Some(seawall_client::text::escape_short(first.name.as_bytes(), 256));
            event.engine = Some(first.engine.clone());
            event.member = first.member.clone();
        }
        self.host.events.emit(event.reason(format!("{why}; told once in a session")));
    }

    /// The driver offers a file, or says why it stays.
    pub fn offered(self: &Arc<Self>, offer: Offer) {
        // Nobody asked, or too long ago.
        let Some(want) = self.wanted().by_request.remove(&offer.id) else { return };
        let Want { hash, content, detection, engine, path, delete, .. } = want;
        match offer.file {
            Ok(file) if is_sound(&file) => {
                let session = Arc::clone(self);
                let suspect = Suspect { session, hash, content, detection, engine, delete, file };
                if !self.host.quarantine.take(suspect) {
                    self.tell_stays(&path, hash, "the quarantine has too much to do");
                }
            }
            Ok(_) => {
                self.guest.complain("a file is offered for quarantine with impossible attributes")
            }
            Err(why) => self.host.quarantine.stays(self.guest.name(), path, hash, why),
        }
    }

    fn tell_stays(&self, path: &[u8], hash: ContentHash, why: &str) {
        let mut event = Event::new(EventKind::QuarantineStays).guest(self.guest.name());
        event.path = Some(seawall_client::text::escape(path));
        event.hash = Some(hash.to_string());
        self.host.events.emit(event.reason(why));
    }

    /// Lets go of copies that the driver has not offered in time.
    pub fn forget_wanted(&self, now: Instant) {
        self.wanted().by_request.retain(|_, want| want.until > now);
    }
}

/// What the frame's length does not bound.
fn is_sound(file: &Offered) -> bool {
    let Attributes { xattrs, extents, .. } = &file.attributes;
    (1..=4096).contains(&file.path.len())
        && !file.path.contains(&0)
        && extents.len() <= Attributes::EXTENTS_MAX
        && xattrs.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>()
            <= Attributes::XATTRS_MAX
}
