//! Which schedules are due.

use crate::config::Schedule;
use seawall_client::ScheduleReport;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

/// A time that is further back than this was missed: the service was not there, in seconds.
const MISSED: i64 = 90;
/// Of the times that were missed those of the last days are looked for, in seconds.
const LOOK_BACK: i64 = 8 * 24 * 3600;

/// What is remembered of schedules, by their names.
#[derive(Debug, Default)]
pub struct Schedules {
    path: PathBuf,
    known: BTreeMap<String, Known>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Known {
    cron: String,
    /// The last time that was dealt with, in seconds since 1970.
    handled: i64,
    /// When it last ran.
    ran: Option<i64>,
    /// The next time is left out.
    skip: bool,
}

/// A schedule whose time has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Due {
    /// Its number among the schedules.
    pub number: usize,
    /// Since when, in seconds since 1970.
    pub since: i64,
}

impl Schedules {
    /// As they were when the service ended.
    pub fn open(path: PathBuf) -> Self {
        let read = fs::read(&path).ok();
        let known = read.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        Self { path, known }
    }

    /// Those that are due at this time. A schedule that is new begins with its next time; of several that were missed
    /// the last one counts.
    pub fn due(&mut self, schedules: &[Schedule], now: i64) -> Vec<Due> {
        let before = self.known.clone();
        self.known.retain(|name, _| schedules.iter().any(|one| one.is_named(name)));
        let mut due = Vec::new();
        for (number, schedule) in schedules.iter().enumerate() {
            let new = || Known {
                cron: schedule.cron.text().to_owned(),
                handled: now,
                ran: None,
                skip: false,
            };
            let name = schedule.name.get_ref().0.clone();
            let known = self.known.entry(name.clone()).or_insert_with(new);
            if known.cron != schedule.cron.text() || known.handled > now {
                *known = Known { ran: known.ran, ..new() };
            }
            let Some(mut latest) = schedule.cron.next(known.handled).filter(|next| *next <= now)
            else {
                continue;
            };
            let mut from = latest.max(now - LOOK_BACK);
            while let Some(next) = schedule.cron.next(from).filter(|next| *next <= now) {
                (latest, from) = (next, next);
            }
            known.handled = latest;
            if std::mem::take(&mut known.skip) {
                tracing::info!(schedule = name, "left out, as the operator said");
                continue;
            }
            let missed = now - latest > MISSED;
            if missed && !schedule.catch_up {
                tracing::warn!(schedule = name, "its time was missed, and it is not caught up");
                continue;
            }
            known.ran = Some(now);
            due.push(Due { number, since: if missed { now } else { latest } });
        }
        if self.known != before {
            self.write();
        }
        due
    }

    /// The next time is left out.
    pub fn skip(&mut self, name: &str) {
        if let Some(known) = self.known.get_mut(name) {
            known.skip = true;
            self.write();
        }
    }

    /// The operator has it run now.
    pub fn ran(&mut self, name: &str, now: i64) {
        if let Some(known) = self.known.get_mut(name) {
            known.ran = Some(now);
            self.write();
        }
    }

    fn write(&self) {
        let new = self.path.with_extension("new");
        let text = serde_json::to_vec(&self.known).unwrap_or_default();
        if let Err(error) = fs::write(&new, text).and_then(|()| fs::rename(&new, &self.path)) {
            tracing::error!(%error, "what schedules did is not kept over a restart");
        }
    }

    pub fn report(&self, schedule: &Schedule, guests: Vec<String>, now: i64) -> ScheduleReport {
        let name = &schedule.name.get_ref().0;
        let known = self.known.get(name);
        let after = known.map_or(now, |known| known.handled.max(now));
        let mut next = schedule.cron.next(after);
        let skip = known.is_some_and(|known| known.skip);
        if skip {
            next = next.and_then(|next| schedule.cron.next(next));
        }
        ScheduleReport {
            name: name.clone(),
            cron: schedule.cron.text().to_owned(),
            next: next.and_then(super::time),
            last: known.and_then(|known| known.ran).and_then(super::time),
            skip,
            guests,
            quick: schedule.quick,
            window_minutes: schedule.window_minutes,
            spread_minutes: schedule.spread_minutes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-11-28T00:00:00Z
    const MIDNIGHT: i64 = 1_795_824_000;
    const HOUR: i64 = 3600;

    fn schedule(name: &str, cron: &str, more: &str) -> Schedule {
        toml::from_str(&format!("name = \"{name}\"\ncron = \"{cron}\"\nall = true\n{more}"))
            .unwrap()
    }

    #[test]
    fn a_schedule_is_due_once_at_its_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("schedules");
        let mut schedules = Schedules::open(path.clone());
        let all =
            [schedule("nightly", "0 2 * * * UTC", ""), schedule("often", "0 */6 * * * UTC", "")];
        assert_eq!(schedules.due(&all, MIDNIGHT + 60), [], "they are new");
        assert_eq!(schedules.due(&all, MIDNIGHT + 2 * HOUR - 1), []);
        let at = MIDNIGHT + 2 * HOUR;
        assert_eq!(schedules.due(&all, at + 1), [Due { number: 0, since: at }]);
        assert_eq!(schedules.due(&all, at + 2), []);
        // Known over a restart, and both at the same time.
        let mut schedules = Schedules::open(path);
        assert_eq!(schedules.due(&all, at + 3), []);
        let both =
            [schedule("nightly", "0 2 * * * UTC", ""), schedule("often", "0 2 * * * UTC", "")];
        assert_eq!(schedules.due(&both, at + 4), [], "another time, from now on");
        let next = at + 24 * HOUR;
        let due = [Due { number: 0, since: next }, Due { number: 1, since: next }];
        assert_eq!(schedules.due(&both, next), due);
    }

    #[test]
    fn what_was_missed_is_caught_up_once_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let mut schedules = Schedules::open(folder.path().join("schedules"));
        let all = [
            schedule("caught", "0 2 * * * UTC", ""),
            schedule("left", "0 2 * * * UTC", "catch_up = false"),
            schedule("minutes", "* * * * * UTC", ""),
        ];
        assert_eq!(schedules.due(&all, MIDNIGHT), []);
        let later = MIDNIGHT + 30 * 24 * HOUR + 5 * HOUR + 30;
        let due = schedules.due(&all, later);
        assert_eq!(due, [Due { number: 0, since: later }, Due { number: 2, since: later - 30 }]);
        assert_eq!(schedules.due(&all, later + 1), []);
        // A clock that went back does not have it run twice, nor never again.
        assert_eq!(schedules.due(&all, later - 3 * 24 * HOUR), []);
        let again = MIDNIGHT + 28 * 24 * HOUR + 2 * HOUR;
        assert_eq!(schedules.due(&all[..1], again), [Due { number: 0, since: again }]);
    }

    #[test]
    fn one_that_is_skipped_runs_the_time_after() {
        let folder = tempfile::tempdir().unwrap();
        let mut schedules = Schedules::open(folder.path().join("schedules"));
        let all = [schedule("nightly", "0 2 * * * UTC", "")];
        schedules.due(&all, MIDNIGHT);
        schedules.skip("nightly");
        let report = schedules.report(&all[0], Vec::new(), MIDNIGHT);
        assert!(
            report.skip && report.next.as_deref() == Some("2026-11-29T02:00:00Z"),
            "{report:?}"
        );
        assert_eq!(schedules.due(&all, MIDNIGHT + 2 * HOUR), []);
        assert_eq!(schedules.due(&all, MIDNIGHT + 26 * HOUR).len(), 1);
    }
}
