//! Whether a guest is protected, and the alarm when it no longer is.
//!
//! ```text
//!               sign of life                late                  late for too long
//! NeverSeen ───────────────────► Protected ──────► Silent ───────────────────────────► Unprotected
//!                                    ▲  sign of life │          event, error log           │
//!                                    ├───────────────┘            sign of life: event      │
//!                                    └─────────────────────────────────────────────────────┘
//! ```
//!
//! A guest that had a driver before this start of the service begins as if it had just fallen silent.
//! The watch thread alone changes the state ([`Watch::look`]); sessions only leave the time of
//! their last sign of life.

use seawall_client::GuestState;
use std::time::{Duration, Instant};

/// How often the watch thread looks.
pub const TICK: Duration = Duration::from_millis(100);
/// So many heartbeats may be missing before a guest counts as silent.
const LATE_HEARTBEATS: u32 = 3;

/// How one guest is.
#[derive(Debug, Clone)]
pub struct Watch {
    pub state: GuestState,
    /// When it came to be so.
    pub since: jiff::Timestamp,
    /// The last sign of life.
    seen: Option<Instant>,
    /// There was one since [`Watch::take_news`] was asked last.
    news: bool,
}

impl Default for Watch {
    fn default() -> Self {
        Self {
            state: GuestState::NeverSeen,
            since: jiff::Timestamp::now(),
            seen: None,
            news: false,
        }
    }
}

/// What to tell.
#[derive(Debug, PartialEq, Eq)]
pub enum Change {
    /// Nobody stands between the guest's processes and malware; silent for so long.
    Unprotected { silent_for: Duration },
    /// The driver is back.
    Protected,
}

impl Watch {
    /// The guest's driver has attached or sent a heartbeat.
    pub fn alive(&mut self) {
        self.seen = Some(Instant::now());
        self.news = true;
    }

    /// Whether there was a sign of life since this was asked last.
    pub fn take_news(&mut self) -> bool {
        std::mem::take(&mut self.news)
    }

    /// The guest had a driver before this start of the service: its silence counts from now.
    pub fn seen_before(&mut self) {
        self.seen.get_or_insert_with(Instant::now);
    }

    /// Looks at the state now.
    pub fn look(
        &mut self,
        now: Instant,
        has_session: bool,
        heartbeat: Duration,
        patience: Duration,
    ) -> Option<Change> {
        let silent_for = now.saturating_duration_since(self.seen?);
        let late = !has_session || silent_for > heartbeat * LATE_HEARTBEATS;
        let state = match self.state {
            _ if silent_for > patience => GuestState::Unprotected,
            GuestState::Unprotected if late => GuestState::Unprotected,
            _ if late => GuestState::Silent,
            _ => GuestState::Protected,
        };
        let before = std::mem::replace(&mut self.state, state);
        if before != state {
            self.since = jiff::Timestamp::now();
        }
        match (before, state) {
            (GuestState::Unprotected, GuestState::Protected) => Some(Change::Protected),
            (GuestState::Unprotected, _) => None,
            (_, GuestState::Unprotected) => Some(Change::Unprotected { silent_for }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEAT: Duration = Duration::from_secs(1);
    const PATIENCE: Duration = Duration::from_secs(5);

    #[test]
    fn the_alarm_is_raised_once_and_ends_with_the_next_sign_of_life() {
        let mut watch = Watch::default();
        let later = |seconds| Instant::now() + Duration::from_secs(seconds);
        assert_eq!(watch.look(later(100), false, BEAT, PATIENCE), None);
        assert_eq!(watch.state, GuestState::NeverSeen);

        watch.alive();
        assert_eq!(watch.look(later(0), true, BEAT, PATIENCE), None);
        assert_eq!(watch.state, GuestState::Protected);
        assert_eq!(watch.look(later(4), true, BEAT, PATIENCE), None);
        assert_eq!(watch.state, GuestState::Silent);
        let change = watch.look(later(6), true, BEAT, PATIENCE);
        assert!(
            matches!(change, Some(Change::Unprotected { silent_for }) if silent_for > PATIENCE)
        );
        assert_eq!(watch.look(later(7), true, BEAT, PATIENCE), None, "told once");

        watch.alive();
        assert_eq!(watch.look(later(0), false, BEAT, PATIENCE), None, "gone again at once");
        assert_eq!(watch.state, GuestState::Unprotected);
        assert_eq!(watch.look(later(0), true, BEAT, PATIENCE), Some(Change::Protected));
    }

    #[test]
    fn a_guest_that_was_seen_before_the_start_is_missed() {
        let mut watch = Watch::default();
        watch.seen_before();
        let later = |seconds| Instant::now() + Duration::from_secs(seconds);
        assert_eq!(watch.look(later(1), false, BEAT, PATIENCE), None);
        assert_eq!(watch.state, GuestState::Silent);
        let change = watch.look(later(6), false, BEAT, PATIENCE);
        assert!(matches!(change, Some(Change::Unprotected { .. })), "{change:?}");
    }

    #[test]
    fn a_session_that_ended_is_silent_at_once_and_alarming_later() {
        let mut watch = Watch::default();
        watch.alive();
        assert_eq!(watch.look(Instant::now(), false, BEAT, PATIENCE), None);
        assert_eq!(watch.state, GuestState::Silent);
        assert_eq!(watch.look(Instant::now(), true, BEAT, PATIENCE), None);
        assert_eq!(watch.state, GuestState::Protected);
    }
}
