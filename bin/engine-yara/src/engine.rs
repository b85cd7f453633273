//! Scanning with a compiled rule set.

use std::time::Duration;

use seawall_engine::runtime::{Engine, LoadError, Request, ScanError, Scanner};
use seawall_engine::{Description, Detection, Metadata, Outcome};

use crate::meta;
use crate::rules::RuleSet;
use crate::slow;

/// yara-x counts whole seconds, and a limit of n ends a scan between n - 1 and n seconds after its
/// start. Below this hard limit its own would come far too early, so the hard one must do.
const SHORTEST_LIMIT: Duration = Duration::from_secs(3);
/// What yara-x's own limit stays below the hard one, at least: the report still has to travel.
const HEAD_START: Duration = Duration::from_millis(500);
/// From here on a part is kept for naming slow rules, and at most so much.
const LONG_LIMIT: Duration = Duration::from_secs(10);
const LONGEST_RESERVE: Duration = Duration::from_secs(4);
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
        Description::new("yara-x", yara_x::VERSION, self.set.generation)
            .with_by_name(self.set.by_name())
            .with_rules(self.set.count.into())
            .with_diagnostics(self.set.diagnostics.clone())
    }

    fn scanner(&self) -> Result<Box<dyn Scanner + '_>, LoadError> {
        let mut scanner = yara_x::Scanner::new(&self.set.rules);
        // One match decides; later ones of a pattern whose number no rule asks for are not counted.
        scanner.fast_scan(true);
        Ok(Box::new(YaraScanner { scanner, set: &self.set }))
    }
}

/// One worker's scanner, reused: a new one costs half a millisecond.
struct YaraScanner<'r> {
    scanner: yara_x::Scanner<'r>,
    set: &'r RuleSet,
}

impl Scanner for YaraScanner<'_> {
    fn scan(&mut self, request: &Request<'_>) -> Result<Outcome, ScanError> {
        set_variables(&mut self.scanner, self.set, request.metadata)
            .map_err(|error| ScanError::Failed { reason: error.to_string() })?;
        let whole = self.look(request, request.content.bytes()?)?;
        seawall_unpack::look_into(request, whole, |member| self.look(request, member))
    }
}

impl YaraScanner<'_> {
    /// The whole content, or a member of the archive that it is.
    fn look(&mut self, request: &Request<'_>, content: &[u8]) -> Result<Outcome, ScanError> {
        self.scanner.set_timeout(own_limit(request.left()));
        match self.scanner.scan(content) {
            Ok(results) => {
                let detections: Vec<Detection> =
                    results.matching_rules().map(|rule| meta::detection(&rule)).collect();
                Ok(if detections.is_empty() {
                    Outcome::Clean
                } else {
                    Outcome::Infected(detections)
                })
            }
            Err(yara_x::errors::ScanError::Timeout) => Err(self.too_slow(request, content)),
            Err(other) => Err(ScanError::Failed { reason: other.to_string() }),
        }
    }

    /// Names the rules that took the time, if there is any left.
    fn too_slow(&self, request: &Request<'_>, content: &[u8]) -> ScanError {
        let left = || {
            if request.is_cancelled() {
                return Duration::ZERO;
            }
            request.left().saturating_sub(HEAD_START)
        };
        let named = slow::name(&self.set.suspects, content, left, |scanner| {
            // It has been set for the whole set before.
            let _same = set_variables(scanner, self.set, request.metadata);
        });
        named.map_or(ScanError::TimedOut, |what| {
            eprintln!("a scan took too long: {what}");
            ScanError::TimedOutIn { what }
        })
    }
}

/// Tells the rules what they ask of the file. Bytes that are no UTF-8 become U+FFFD.
fn set_variables(
    scanner: &mut yara_x::Scanner<'_>,
    set: &RuleSet,
    metadata: &Metadata,
) -> Result<(), yara_x::errors::VariableError> {
    if set.variables.is_empty() {
        return Ok(());
    }
    let path = String::from_utf8_lossy(&metadata.path);
    let name = path.rsplit('/').next().unwrap_or_default();
    let dot = name.rfind('.').filter(|dot| *dot > 0);
    for variable in &set.variables {
        match *variable {
            "path" | "filepath" => scanner.set_global(variable, path.as_ref()),
            "name" | "filename" => scanner.set_global(variable, name),
            "extension" => scanner.set_global(variable, dot.map_or("", |dot| &name[dot..])),
            "guest" => scanner.set_global(variable, metadata.guest.as_str()),
            "size" => {
                let size = i64::try_from(metadata.size).unwrap_or(i64::MAX);
                scanner.set_global(variable, size)
            }
            _ => continue,
        }?;
    }
    Ok(())
}

/// The largest whole number of seconds that ends before the hard limit, and leaves time to find out what took
/// so long.
fn own_limit(hard: Duration) -> Duration {
    if hard < SHORTEST_LIMIT {
        return FOREVER;
    }
    Duration::from_secs((hard - HEAD_START - reserve(hard)).as_secs())
}

/// What is kept of a limit for naming slow rules. Of a short one nothing: every second of it counts.
fn reserve(hard: Duration) -> Duration {
    if hard < LONG_LIMIT { Duration::ZERO } else { (hard / 6).min(LONGEST_RESERVE) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_limit_ends_before_the_hard_one_and_never_far_too_early() {
        for (millis, kept) in [
            (3000, 0),
            (3499, 0),
            (3500, 0),
            (4000, 0),
            (9999, 0),
            (10_000, 1666),
            (29_999, 4000),
            (30_000, 4000),
            (90_600, 4000),
        ] {
            let hard = Duration::from_millis(millis);
            let own = own_limit(hard);
            let kept = Duration::from_millis(kept) + HEAD_START;
            assert_eq!(own.subsec_nanos(), 0);
            assert!(own + kept <= hard, "{hard:?} {own:?}");
            assert!(own + kept + Duration::from_millis(1001) > hard, "{hard:?} {own:?}");
        }
        assert_eq!(own_limit(Duration::from_millis(2999)), FOREVER);
    }
}
