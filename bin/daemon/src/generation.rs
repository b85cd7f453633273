//! The generation: which set of engines and signatures a verdict belongs to.
//!
//! Owns the number that drivers see and the signature sets of all engines that it stands for. It
//! grows by one whenever an engine comes with another signature set than before; an engine that
//! restarts with the same one changes nothing. It starts from the time, and above everything that
//! this host ever used, so that nothing a driver remembers of an earlier service counts.

use seawall_engine::Generation as Signatures;
use seawall_proto::Generation;
use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// How many earlier sets are known: a scan may have been queued under one of them.
const REMEMBERED: usize = 8;
/// Left between the starts of two services whose clock went backwards.
const GAP: u64 = 1 << 20;

/// Digest of what all engines use, in order: what a verdict depends on, whatever the number of its
/// generation was in that run of the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SetDigest(pub [u8; 32]);

/// What one engine has loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loaded {
    pub signatures: Signatures,
    /// Whether a verdict depends on path and guest besides the content.
    pub by_name: bool,
}

#[derive(Debug)]
pub struct Generations(Mutex<State>);

#[derive(Debug)]
struct State {
    current: u64,
    /// Which engines may call content good, in order.
    may_allow: Vec<bool>,
    /// What each engine uses now, in order; `None` before it was ready for the first time.
    engines: Vec<Option<Loaded>>,
    earlier: VecDeque<(u64, Vec<Option<Loaded>>)>,
}

impl State {
    fn engines_of(&self, generation: Generation) -> Option<&[Option<Loaded>]> {
        if self.current == generation.0 {
            return Some(&self.engines);
        }
        let earlier = self.earlier.iter().find(|(number, _)| *number == generation.0);
        earlier.map(|(_, engines)| engines.as_slice())
    }
}

impl Generations {
    /// Begins above `start`, for these engines: whether each may call content good.
    pub fn new(start: u64, may_allow: Vec<bool>) -> Self {
        let engines = vec![None; may_allow.len()];
        Self(Mutex::new(State { current: start, may_allow, engines, earlier: VecDeque::new() }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn current(&self) -> Generation {
        Generation(self.lock().current)
    }

    /// An engine takes scans with these signatures. Gives the new generation when that is news.
    pub fn engine_has(&self, engine: usize, loaded: Loaded) -> Option<Generation> {
        let mut state = self.lock();
        if state.engines[engine] == Some(loaded) {
            return None;
        }
        let before = (state.current, state.engines.clone());
        state.earlier.push_front(before);
        state.earlier.truncate(REMEMBERED);
        state.engines[engine] = Some(loaded);
        state.current += 1;
        Some(Generation(state.current))
    }

    /// What the engines of a generation use. `None` where one was not ready yet, or where the
    /// generation is long gone.
    pub fn set_of(&self, generation: Generation) -> Option<SetDigest> {
        let state = self.lock();
        let engines = state.engines_of(generation)?;
        let mut hasher = blake3::Hasher::new_derive_key(
            "seawall 2026 signature sets of all engines, and who may allow",
        );
        for (loaded, may_allow) in engines.iter().zip(&state.may_allow) {
            hasher.update(&(*loaded)?.signatures.0);
            hasher.update(&[u8::from(*may_allow)]);
        }
        Some(SetDigest(*hasher.finalize().as_bytes()))
    }

    /// Whether a verdict of this generation depends on path and guest besides the content.
    pub fn is_by_name(&self, generation: Generation) -> bool {
        let state = self.lock();
        let engines = state.engines_of(generation);
        engines.is_some_and(|engines| engines.iter().flatten().any(|loaded| loaded.by_name))
    }

    /// The newest generation in which these engines used just these signatures. `None` when there was
    /// none: the engines that looked were never in use together, or one could not look.
    pub fn of(&self, used: &[(usize, Option<Signatures>)]) -> Option<Generation> {
        if used.is_empty() {
            return None;
        }
        let state = self.lock();
        let is_it = |set: &[Option<Loaded>]| {
            used.iter().all(|(engine, signatures)| {
                let known = set.get(*engine).copied().flatten().map(|loaded| loaded.signatures);
                signatures.is_some() && known == *signatures
            })
        };
        if is_it(&state.engines) {
            return Some(Generation(state.current));
        }
        let earlier = state.earlier.iter().find(|(_, set)| is_it(set));
        earlier.map(|(number, _)| Generation(*number))
    }
}

/// The number to start from: the time in milliseconds, or what is kept in `folder` if that is more.
/// A file that cannot be read or written costs the protection against a clock that went backwards,
/// and nothing else.
pub fn start_number(folder: &Path) -> u64 {
    let path = folder.join("generation");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis());
    let kept = std::fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok());
    let start =
        u64::try_from(now).unwrap_or(0).max(kept.map_or(0, |kept: u64| kept.saturating_add(GAP)));
    let new = folder.join("generation.new");
    let written =
        std::fs::write(&new, format!("{start}\n")).and_then(|()| std::fs::rename(&new, &path));
    if let Err(error) = written {
        tracing::warn!(path = %path.display(), %error, "the generation cannot be kept; a clock that goes backwards would not be noticed");
    }
    start
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Signatures = Signatures([1; 32]);
    const B: Signatures = Signatures([2; 32]);

    fn has(signatures: Signatures) -> Loaded {
        Loaded { signatures, by_name: false }
    }

    #[test]
    fn one_engine_that_looks_at_names_makes_the_whole_generation_one_of_names() {
        let generations = Generations::new(10, vec![false; 2]);
        let before = generations.engine_has(0, has(A)).unwrap();
        let after = generations.engine_has(1, Loaded { signatures: B, by_name: true }).unwrap();
        assert!(!generations.is_by_name(before) && generations.is_by_name(after));
        assert!(!generations.is_by_name(Generation(5)));
    }

    #[test]
    fn only_another_signature_set_is_a_new_generation() {
        let generations = Generations::new(10, vec![false; 2]);
        assert_eq!(generations.engine_has(0, has(A)), Some(Generation(11)));
        assert_eq!(generations.engine_has(1, has(A)), Some(Generation(12)));
        assert_eq!(generations.engine_has(0, has(A)), None, "a restart");
        assert_eq!(generations.engine_has(0, has(B)), Some(Generation(13)));
        assert_eq!(generations.current(), Generation(13));
    }

    #[test]
    fn a_scan_belongs_to_the_set_that_made_it() {
        let generations = Generations::new(10, vec![false; 2]);
        generations.engine_has(0, has(A));
        generations.engine_has(1, has(A));
        generations.engine_has(0, has(B));
        assert_eq!(generations.of(&[(0, Some(B)), (1, Some(A))]), Some(Generation(13)));
        assert_eq!(generations.of(&[(0, Some(B))]), Some(Generation(13)), "the first one found it");
        assert_eq!(generations.of(&[(1, Some(A))]), Some(Generation(13)), "the second one did");
        let before = [(1, Some(A)), (0, Some(A))];
        assert_eq!(generations.of(&before), Some(Generation(12)), "queued before");
        assert_eq!(generations.of(&[(0, Some(A)), (1, Some(B))]), None, "never in use together");
        assert_eq!(generations.of(&[(0, Some(B)), (1, None)]), None);
        assert_eq!(generations.of(&[]), None, "nobody looked");
    }

    #[test]
    fn the_same_sets_have_the_same_digest_in_every_run() {
        let one = Generations::new(10, vec![false; 2]);
        one.engine_has(0, has(A));
        assert_eq!(one.set_of(one.current()), None, "an engine is not ready");
        one.engine_has(1, has(B));
        let digest = one.set_of(one.current()).unwrap();
        let other = Generations::new(99, vec![false; 2]);
        other.engine_has(1, has(B));
        other.engine_has(0, has(A));
        assert_eq!(other.set_of(other.current()), Some(digest));
        other.engine_has(1, has(A));
        assert_ne!(other.set_of(other.current()), Some(digest));
        assert_eq!(other.set_of(Generation(other.current().0 - 1)), Some(digest), "an earlier one");
        other.engine_has(0, has(B));
        assert_ne!(other.set_of(other.current()), Some(digest), "the order counts");
        let trusting = Generations::new(10, vec![true, false]);
        trusting.engine_has(0, has(A));
        trusting.engine_has(1, has(B));
        assert_ne!(trusting.set_of(trusting.current()), Some(digest), "and who may allow");
        assert_eq!(other.set_of(Generation(5)), None);
    }

    #[test]
    fn a_start_is_above_every_earlier_one() {
        let folder = tempfile::tempdir().unwrap();
        let first = start_number(folder.path());
        assert!(first > 1_700_000_000_000);
        let future = first + (1 << 40);
        std::fs::write(folder.path().join("generation"), future.to_string()).unwrap();
        assert!(start_number(folder.path()) > future);
        std::fs::write(folder.path().join("generation"), "nonsense").unwrap();
        assert!(start_number(folder.path()) >= first);
    }
}
