//! When guests are scanned without anybody who asks.

use super::{Config, GuestName, simple_name, within};
use cronexpr::{Crontab, FallbackTimezoneOption, MakeTimestamp, ParseOptions};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use toml::Spanned;

/// Scans of guests at certain times.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    pub name: Spanned<ScheduleName>,
    pub cron: Cron,
    #[serde(default)]
    pub guests: Vec<GuestName>,
    #[serde(default)]
    pub groups: Vec<String>,
    #[serde(default)]
    pub all: bool,
    #[serde(default)]
    pub quick: bool,
    #[serde(default, deserialize_with = "within::<_, u32, 0, 10080>")]
    pub window_minutes: u32,
    #[serde(default, deserialize_with = "within::<_, u32, 0, 10080>")]
    pub spread_minutes: u32,
    #[serde(default = "yes")]
    pub catch_up: bool,
}

fn yes() -> bool {
    true
}

impl Schedule {
    pub fn is_named(&self, name: &str) -> bool {
        self.name.get_ref().0 == name
    }

    /// The guests that it is for.
    pub fn guests_of(&self, config: &Config) -> Vec<String> {
        let is_meant = |guest: &&super::GuestConfig| {
            let group = config.governed(guest).group.map(|group| group.name.as_str());
            self.all
                || self.guests.contains(guest.name.get_ref())
                || group.is_some_and(|group| self.groups.iter().any(|named| named == group))
        };
        let meant = config.guests.iter().filter(is_meant);
        meant.map(|guest| guest.name.get_ref().0.clone()).collect()
    }
}

/// A schedule's name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct ScheduleName(pub String);

impl<'de> Deserialize<'de> for ScheduleName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        simple_name(deserializer, "a schedule's name").map(Self)
    }
}

/// Minute, hour, day, month, day of the week (crontab(5)), and a time zone; the host's if there is none.
#[derive(Debug, Clone)]
pub struct Cron {
    text: String,
    parsed: Crontab,
}

impl Cron {
    /// As it was written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The next time after this one, in seconds since 1970; None where there is none.
    pub fn next(&self, after: i64) -> Option<i64> {
        let after = MakeTimestamp::from_second(after).ok()?;
        Some(self.parsed.find_next(after).ok()?.timestamp().as_second())
    }
}

impl PartialEq for Cron {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Serialize for Cron {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for Cron {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let mut options = ParseOptions::default();
        options.fallback_timezone_option = FallbackTimezoneOption::System;
        match cronexpr::parse_crontab_with(&text, options) {
            Ok(parsed) => Ok(Self { text, parsed }),
            Err(_) => Err(de::Error::custom(format!(
                "`{text}` is no time: it must be minute, hour, day, month and day of the week, like \"30 2 * * 1-5\", \
                 and may name a time zone behind them"
            ))),
        }
    }
}
