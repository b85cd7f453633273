//! The time by which things are deleted for their age.
//!
//! A clock that is wrong after a start, or jumps, would make everything old at once. So age counts only
//! while the wall clock has gone along with the monotonic one for an hour; until then nothing is too
//! old. What is deleted by size needs no clock.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long the clock must have been steady.
const STEADY: Duration = Duration::from_secs(3600);
/// How far it may stray meanwhile, in milliseconds: a clock that is being slewed strays by seconds.
const STRAY_MS: i64 = 60_000;

/// Watches the wall clock.
#[derive(Debug, Default)]
struct Clock {
    /// Since when it has been steady, on both clocks.
    since: Option<(Instant, i64)>,
}

impl Clock {
    fn look(&mut self, monotonic: Instant, wall_ms: i64) -> Option<i64> {
        let (began, began_ms) = *self.since.get_or_insert((monotonic, wall_ms));
        let passed = monotonic.saturating_duration_since(began);
        let passed_ms = i64::try_from(passed.as_millis()).unwrap_or(i64::MAX);
        if (wall_ms - began_ms - passed_ms).abs() > STRAY_MS {
            tracing::warn!("the clock jumped; for an hour nothing is deleted for its age");
            self.since = Some((monotonic, wall_ms));
            return None;
        }
        (passed >= STEADY).then_some(wall_ms)
    }
}

static CLOCK: Mutex<Clock> = Mutex::new(Clock { since: None });

/// Milliseconds since 1970; none while the clock cannot be relied on.
pub fn steady_now_ms() -> Option<i64> {
    let mut clock = CLOCK.lock().unwrap_or_else(PoisonError::into_inner);
    clock.look(Instant::now(), jiff::Timestamp::now().as_millisecond())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_counts_after_an_hour_without_a_jump() {
        let mut clock = Clock::default();
        let start = Instant::now();
        let mut look = |minutes: u64, wall_minutes: i64| {
            let monotonic = start + Duration::from_secs(minutes * 60);
            clock.look(monotonic, 1_000_000_000_000 + wall_minutes * 60_000)
        };
        assert_eq!(look(0, 0), None);
        assert_eq!(look(59, 59), None);
        assert!(look(60, 60).is_some());
        assert!(look(90, 91).is_some(), "it may stray a little");
        let year = 365 * 24 * 60;
        assert_eq!(look(91, 91 + year), None, "it jumped ahead");
        assert_eq!(look(150, 150 + year), None);
        assert!(look(151, 151 + year).is_some(), "it stays there, so it is right");
        assert_eq!(look(152, 152), None, "and back");
    }
}
