//! Engines that are no longer in use: those of the set before stand by for a while, the others end when their
//! last scan is answered.

use super::set::Manifest;
use crate::engines::Running;
use crate::pipeline::InUse;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// See the module.
#[derive(Default)]
pub struct Retired {
    standby: Option<Standby>,
    ending: Vec<Arc<Running>>,
}

struct Standby {
    set: String,
    engines: HashMap<usize, Arc<Running>>,
    until: Instant,
}

impl Retired {
    /// These end when nobody holds them any more.
    pub fn end(&mut self, old: impl IntoIterator<Item = Arc<Running>>) {
        for running in old {
            // Twice in the list, it would be held for ever by its other self.
            if !self.ending.iter().any(|one| Arc::ptr_eq(one, &running)) {
                self.ending.push(running);
            }
        }
    }

    /// The engines that were in use until now stand by as those of `set`, in place of those that did before.
    pub fn stand_by(
        &mut self,
        set: Option<String>,
        old: Vec<(usize, Arc<Running>)>,
        for_how_long: Duration,
        in_use: &InUse,
    ) {
        if old.is_empty() {
            return;
        }
        if let Some(earlier) = self.standby.take() {
            let is_used =
                |running: &Arc<Running>| in_use.iter().any(|used| Arc::ptr_eq(used, running));
            self.end(earlier.engines.into_values().filter(|running| !is_used(running)));
        }
        // One that cannot run is nothing to go back to.
        let (old, lame): (Vec<_>, Vec<_>) =
            old.into_iter().partition(|(_, running)| running.description().is_some());
        self.end(lame.into_iter().map(|(_, running)| running));
        match set {
            Some(set) if !for_how_long.is_zero() && !old.is_empty() => {
                let until = Instant::now() + for_how_long;
                self.standby = Some(Standby { set, engines: old.into_iter().collect(), until });
            }
            _ => self.end(old.into_iter().map(|(_, running)| running)),
        }
    }

    /// The set whose engines stand by.
    pub fn set(&self) -> Option<&str> {
        self.standby.as_ref().map(|standby| standby.set.as_str())
    }

    /// An engine that stands by with what this set has for it.
    pub fn with(&self, set: &Manifest, number: usize, engine: &str) -> Option<Arc<Running>> {
        let running = self.standby.as_ref()?.engines.get(&number)?;
        let has_it = |set: &Manifest, other: &Manifest| set.is_same_for(engine, other);
        let origin = running.origin.as_ref()?;
        (has_it(set, &origin.set) && running.description().is_some()).then(|| Arc::clone(running))
    }

    /// Ends the engine that stands by for this one: another is to be loaded, and three at once are too many.
    pub fn make_room(&mut self, number: usize) {
        let old = self.standby.as_mut().and_then(|standby| standby.engines.remove(&number));
        self.end(old);
        self.standby.take_if(|standby| standby.engines.is_empty());
        self.ending.retain(|running| Arc::strong_count(running) > 1);
    }

    /// The sets that these engines would load again.
    pub fn sets(&self) -> Vec<String> {
        let standing_by = self.standby.iter().flat_map(|standby| standby.engines.values());
        let origins = standing_by.chain(&self.ending).filter_map(|one| one.origin.as_ref());
        origins.map(|origin| origin.set.id.clone()).collect()
    }

    /// Ends what nobody needs any more, and tells whether there was any. It may take a moment.
    pub fn tidy(&mut self, for_how_long: Duration) -> bool {
        let is_over =
            |standby: &mut Standby| for_how_long.is_zero() || standby.until <= Instant::now();
        if let Some(over) = self.standby.take_if(is_over) {
            self.end(over.engines.into_values());
        }
        // Scans hold theirs; where nobody but this list does, the last one is answered.
        let before = self.ending.len();
        self.ending.retain(|running| Arc::strong_count(running) > 1);
        self.ending.len() < before
    }
}
