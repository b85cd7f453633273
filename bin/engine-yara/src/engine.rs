//! Scanning with a compiled rule set.

use std::time::Duration;

use seawall_engine::runtime::{Engine, Request, ScanError, Scanner};
use seawall_engine::{Cleaning, Description, Detection, Outcome};
use yara_x::{MetaValue, Rule};

use crate::rules::RuleSet;

/// yara-x counts whole seconds, and a limit of n ends a scan between n - 1 and n seconds after its
/// start. Below this hard limit its own would come far too early, so the hard one must do.
const SHORTEST_LIMIT: Duration = Duration::from_secs(3);
/// What yara-x's own limit stays below the hard one, at least: the report still has to travel.
const HEAD_START: Duration = Duration::from_millis(500);
/// No limit of its own: yara-x cannot forget one that was set.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// A rule set as an engine.
pub struct Yara {
    set: RuleSet,
}

impl Yara {
    /// Takes the set.
    pub fn new(set: RuleSet) -> Self {
        Self { set }
    }
}

impl Engine for Yara {
    fn describe(&self) -> Description {
        Description {
            name: "yara-x".into(),
            version: yara_x::VERSION.into(),
            generation: self.set.generation,
            rules: self.set.count,
            diagnostics: self.set.diagnostics.clone(),
            omitted: 0,
        }
    }

    fn scanner(&self) -> Box<dyn Scanner + '_> {
        let mut scanner = yara_x::Scanner::new(&self.set.rules);
        // One match decides; later ones of a pattern whose number no rule asks for are not counted.
        scanner.fast_scan(true);
        Box::new(YaraScanner { scanner })
    }
}

/// One worker's scanner, reused: a new one costs half a millisecond.
struct YaraScanner<'r> {
    scanner: yara_x::Scanner<'r>,
}

impl Scanner for YaraScanner<'_> {
    fn scan(&mut self, request: &Request<'_>) -> Result<Outcome, ScanError> {
        self.scanner.set_timeout(own_limit(request.limit));
        let results = self.scanner.scan(request.content.bytes()?).map_err(|error| match error {
            yara_x::errors::ScanError::Timeout => ScanError::TimedOut,
            other => ScanError::Failed { reason: other.to_string() },
        })?;
        let detections: Vec<Detection> =
            results.matching_rules().map(|rule| detection(&rule)).collect();
        Ok(if detections.is_empty() { Outcome::Clean } else { Outcome::Infected(detections) })
    }
}

/// The largest whole number of seconds that ends before the hard limit.
fn own_limit(hard: Duration) -> Duration {
    if hard < SHORTEST_LIMIT { FOREVER } else { Duration::from_secs((hard - HEAD_START).as_secs()) }
}

fn detection(rule: &Rule<'_, '_>) -> Detection {
    let mut found = Detection::new(rule.identifier());
    let first = rule.patterns().filter_map(|pattern| pattern.matches().next());
    let first = first.map(|found| found.range()).min_by_key(|range| range.start);
    found.offset = first.as_ref().map(|range| range.start as u64);
    for (key, value) in rule.metadata() {
        match (key, value) {
            // An unknown word was reported when the rules were loaded.
            ("severity", MetaValue::String(word)) => {
                found.severity = word.parse().unwrap_or(found.severity);
            }
            ("family", MetaValue::String(name)) => found.family = Some(name.to_owned()),
            ("cleaning", MetaValue::String("delete")) => found.cleaning = Some(Cleaning::Delete),
            ("cleaning", MetaValue::String("cut")) => {
                found.cleaning = first.as_ref().map(|range| Cleaning::Cut {
                    offset: range.start as u64,
                    length: range.len() as u64,
                });
            }
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_limit_ends_before_the_hard_one_and_never_far_too_early() {
        for millis in [3000, 3499, 3500, 4000, 29_999, 30_000, 30_600] {
            let hard = Duration::from_millis(millis);
            let own = own_limit(hard);
            assert_eq!(own.subsec_nanos(), 0);
            assert!(own + HEAD_START <= hard, "{hard:?} {own:?}");
            assert!(own + HEAD_START + Duration::from_secs(1) > hard, "{hard:?} {own:?}");
        }
        assert_eq!(own_limit(Duration::from_millis(2999)), FOREVER);
    }
}
