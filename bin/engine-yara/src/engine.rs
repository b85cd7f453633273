//! Scanning with a compiled rule set.

use std::time::Duration;

use seawall_engine::runtime::{Engine, Request, ScanError, Scanner};
use seawall_engine::{Description, Detection, Metadata, Outcome};

use crate::meta;
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
            by_name: self.set.by_name(),
            rules: self.set.count,
            diagnostics: self.set.diagnostics.clone(),
            omitted: 0,
        }
    }

    fn scanner(&self) -> Box<dyn Scanner + '_> {
        let mut scanner = yara_x::Scanner::new(&self.set.rules);
        // One match decides; later ones of a pattern whose number no rule asks for are not counted.
        scanner.fast_scan(true);
        Box::new(YaraScanner { scanner, set: &self.set })
    }
}

/// One worker's scanner, reused: a new one costs half a millisecond.
struct YaraScanner<'r> {
    scanner: yara_x::Scanner<'r>,
    set: &'r RuleSet,
}

impl Scanner for YaraScanner<'_> {
    fn scan(&mut self, request: &Request<'_>) -> Result<Outcome, ScanError> {
        self.scanner.set_timeout(own_limit(request.limit));
        self.set_variables(request.metadata)?;
        let results = self.scanner.scan(request.content.bytes()?).map_err(|error| match error {
            yara_x::errors::ScanError::Timeout => ScanError::TimedOut,
            other => ScanError::Failed { reason: other.to_string() },
        })?;
        let detections: Vec<Detection> =
            results.matching_rules().map(|rule| meta::detection(&rule)).collect();
        Ok(if detections.is_empty() { Outcome::Clean } else { Outcome::Infected(detections) })
    }
}

impl YaraScanner<'_> {
    /// Tells the rules what they ask of the file. Bytes that are no UTF-8 become U+FFFD.
    fn set_variables(&mut self, metadata: &Metadata) -> Result<(), ScanError> {
        if self.set.variables.is_empty() {
            return Ok(());
        }
        let path = String::from_utf8_lossy(&metadata.path).into_owned();
        let name = path.rsplit('/').next().unwrap_or_default().to_owned();
        let dot = name.rfind('.').filter(|dot| *dot > 0);
        let extension = dot.map(|dot| name[dot..].to_owned()).unwrap_or_default();
        for variable in &self.set.variables {
            let set = match *variable {
                "path" | "filepath" => self.scanner.set_global(variable, path.as_str()),
                "name" | "filename" => self.scanner.set_global(variable, name.as_str()),
                "extension" => self.scanner.set_global(variable, extension.as_str()),
                "guest" => self.scanner.set_global(variable, metadata.guest.as_str()),
                "size" => {
                    let size = i64::try_from(metadata.size).unwrap_or(i64::MAX);
                    self.scanner.set_global(variable, size)
                }
                _ => continue,
            };
            set.map_err(|error| ScanError::Failed { reason: error.to_string() })?;
        }
        Ok(())
    }
}

/// The largest whole number of seconds that ends before the hard limit.
fn own_limit(hard: Duration) -> Duration {
    if hard < SHORTEST_LIMIT { FOREVER } else { Duration::from_secs((hard - HEAD_START).as_secs()) }
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
