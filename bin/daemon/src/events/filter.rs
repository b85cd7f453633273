//! Which events are wanted: told the same way to SQLite and to what comes live.

use jiff::Timestamp;
use rusqlite::types::Value;
use seawall_client::{Event, EventKind, Verdict};
use serde::de::DeserializeOwned;

/// What a request names; everything that is named must hold.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Filter {
    pub guest: Option<String>,
    /// Any of these; empty for all.
    pub kinds: Vec<EventKind>,
    /// Not before, in milliseconds since the epoch.
    pub since: Option<i64>,
    /// Before, in milliseconds since the epoch.
    pub until: Option<i64>,
    /// The content's hash begins with this, in hexadecimal.
    pub hash: Option<String>,
    /// The escaped path holds this.
    pub path: Option<String>,
    pub verdict: Option<Verdict>,
}

/// What is wrong with a filter.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    #[error("`{0}` is no kind of event; docs/events.md lists them")]
    Kind(String),
    #[error("`{0}` is no verdict; it is one of clean, infected, error, timed_out")]
    Verdict(String),
    #[error("`{0}` is no time; write it as in 2026-11-23T10:00:00Z (RFC 3339)")]
    Time(String),
    #[error("`{0}` is no hash; it is 4 to 64 hexadecimal digits")]
    Hash(String),
    #[error("no event can be: `since` is not before `until`")]
    Range,
    #[error("`follow` waits for events that `until` excludes; leave one of them out")]
    Follow,
}

impl Filter {
    /// Several kinds, separated by commas.
    pub fn kinds(text: &str) -> Result<Vec<EventKind>, FilterError> {
        text.split(',')
            .map(|word| match named(word) {
                None | Some(EventKind::Unknown) => Err(FilterError::Kind(word.into())),
                Some(kind) => Ok(kind),
            })
            .collect()
    }

    pub fn verdict(text: &str) -> Result<Verdict, FilterError> {
        named(text).ok_or_else(|| FilterError::Verdict(text.into()))
    }

    /// RFC 3339 to milliseconds since the epoch.
    pub fn time(text: &str) -> Result<i64, FilterError> {
        let time: Timestamp = text.parse().map_err(|_| FilterError::Time(text.into()))?;
        Ok(time.as_millisecond())
    }

    pub fn hash(text: &str) -> Result<String, FilterError> {
        let right = (4..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
        if right { Ok(text.to_ascii_lowercase()) } else { Err(FilterError::Hash(text.into())) }
    }

    /// What one value alone does not tell.
    pub fn check(&self, follow: bool) -> Result<(), FilterError> {
        if follow && self.until.is_some() {
            return Err(FilterError::Follow);
        }
        match (self.since, self.until) {
            (Some(since), Some(until)) if since >= until => Err(FilterError::Range),
            _ => Ok(()),
        }
    }

    /// Whether `event`, which happened at `at` milliseconds since the epoch, is wanted.
    pub fn fits(&self, event: &Event, at: i64) -> bool {
        let holds = |wanted: &Option<String>, is: &Option<String>, how: fn(&str, &str) -> bool| {
            wanted.as_ref().is_none_or(|wanted| is.as_ref().is_some_and(|is| how(is, wanted)))
        };
        holds(&self.guest, &event.guest, |is, wanted| is == wanted)
            && holds(&self.hash, &event.hash, |is, wanted| is.starts_with(wanted))
            && holds(&self.path, &event.path, |is, wanted| is.contains(wanted))
            && (self.kinds.is_empty() || self.kinds.contains(&event.kind))
            && self.verdict.is_none_or(|verdict| event.verdict == Some(verdict))
            && self.since.is_none_or(|since| at >= since)
            && self.until.is_none_or(|until| at < until)
    }

    /// The same as a condition over the table of events, and its values in order.
    pub fn sql(&self) -> (String, Vec<Value>) {
        let mut condition = String::from("1");
        let mut values = Vec::new();
        let mut and = |term: &str, value: Value| {
            condition.push_str(" AND ");
            condition.push_str(term);
            values.push(value);
        };
        if let Some(guest) = &self.guest {
            and("guest = ?", guest.clone().into());
        }
        if let Some(verdict) = self.verdict {
            and("verdict = ?", name(&verdict).into());
        }
        if let Some(since) = self.since {
            and("at_ms >= ?", since.into());
        }
        if let Some(until) = self.until {
            and("at_ms < ?", until.into());
        }
        if let Some(hash) = &self.hash {
            and("hash >= ?", hash.clone().into());
            // `g` comes after every hexadecimal digit.
            and("hash < ?", format!("{hash}g").into());
        }
        if let Some(path) = &self.path {
            and("instr(line ->> '$.path', ?) > 0", path.clone().into());
        }
        if !self.kinds.is_empty() {
            let marks = vec!["?"; self.kinds.len()].join(", ");
            condition.push_str(&format!(" AND kind IN ({marks})"));
            values.extend(self.kinds.iter().map(|kind| Value::from(name(kind))));
        }
        (condition, values)
    }
}

/// The value that has this name in JSON.
fn named<T: DeserializeOwned>(name: &str) -> Option<T> {
    serde_json::from_value(serde_json::Value::String(name.to_owned())).ok()
}

/// The name that a kind or verdict has in JSON.
pub fn name(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(name)) => name,
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(
            Filter::kinds("verdict,unscanned"),
            Ok(vec![EventKind::Verdict, EventKind::Unscanned])
        );
        assert_eq!(Filter::kinds("verdict,x"), Err(FilterError::Kind("x".into())));
        assert_eq!(Filter::kinds("unknown"), Err(FilterError::Kind("unknown".into())));
        assert_eq!(Filter::verdict("timed_out"), Ok(Verdict::TimedOut));
        assert!(Filter::verdict("bad").unwrap_err().to_string().contains("clean, infected"));
        assert_eq!(Filter::time("1970-01-01T00:00:01.5Z"), Ok(1500));
        assert!(Filter::time("yesterday").is_err());
        assert_eq!(Filter::hash("ABCD"), Ok("abcd".into()));
        assert!(Filter::hash("abc").is_err() && Filter::hash("xyzw").is_err());
        let range = Filter { since: Some(5), until: Some(5), ..Filter::default() };
        assert_eq!(range.check(false), Err(FilterError::Range));
        let until = Filter { until: Some(5), ..Filter::default() };
        assert_eq!((until.check(false), until.check(true)), (Ok(()), Err(FilterError::Follow)));
    }
}
