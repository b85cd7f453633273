//! Log lines that a guest can cause at will, kept from flooding the log: the first is written at
//! once, those within the next ten seconds are counted and summed up in one line.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const SILENCE: Duration = Duration::from_secs(10);

/// Complaints about one guest.
#[derive(Debug, Default)]
pub struct Complaints(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    silent_until: Option<Instant>,
    held_back: u64,
    last: String,
}

impl Complaints {
    /// Says `what` about `guest`, now or with the next summary.
    pub fn say(&self, guest: &str, what: &str) {
        if self.admit(what, Instant::now()) {
            tracing::warn!(guest, "{what}");
        }
    }

    fn admit(&self, what: &str, now: Instant) -> bool {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.silent_until.is_some_and(|until| now < until) {
            state.held_back += 1;
            what.clone_into(&mut state.last);
            return false;
        }
        state.silent_until = Some(now + SILENCE);
        true
    }

    /// Writes the summary when it is due. Called about once a second.
    pub fn sum_up(&self, guest: &str) {
        if let Some((count, last)) = self.due(Instant::now()) {
            tracing::warn!(guest, count, "more of these in the last 10 s; the last one: {last}");
        }
    }

    fn due(&self, now: Instant) -> Option<(u64, String)> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.held_back == 0 || state.silent_until.is_some_and(|until| now < until) {
            return None;
        }
        state.silent_until = Some(now + SILENCE);
        Some((std::mem::take(&mut state.held_back), std::mem::take(&mut state.last)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_said_and_the_rest_is_summed_up() {
        let complaints = Complaints::default();
        let start = Instant::now();
        assert!(complaints.admit("a", start));
        assert!(!complaints.admit("b", start + Duration::from_secs(1)));
        assert!(!complaints.admit("c", start + Duration::from_secs(9)));
        assert_eq!(complaints.due(start + Duration::from_secs(9)), None);
        assert_eq!(complaints.due(start + Duration::from_secs(10)), Some((2, "c".into())));
        assert!(!complaints.admit("d", start + Duration::from_secs(19)));
        assert!(complaints.admit("e", start + Duration::from_secs(21)));
    }
}
