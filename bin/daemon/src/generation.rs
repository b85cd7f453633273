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

#[derive(Debug)]
pub struct Generations(Mutex<State>);

#[derive(Debug)]
struct State {
    current: u64,
    /// Which engines may call content good, in order.
    may_allow: Vec<bool>,
    /// What each engine uses now, in order; `None` before it was ready for the first time.
    engines: Vec<Option<Signatures>>,
    earlier: VecDeque<(u64, Vec<Option<Signatures>>)>,
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
    pub fn engine_has(&self, engine: usize, signatures: Signatures) -> Option<Generation> {
        let mut state = self.lock();
        if state.engines[engine] == Some(signatures) {
            return None;
        }
        let before = (state.current, state.engines.clone());
        state.earlier.push_front(before);
        state.earlier.truncate(REMEMBERED);
        state.engines[engine] = Some(signatures);
        state.current += 1;
        Some(Generation(state.current))
    }

    /// What the engines of a generation use. `None` where one was not ready yet, or where the
    /// generation is long gone.
    pub fn set_of(&self, generation: Generation) -> Option<SetDigest> {
        let state = self.lock();
        let engines = if state.current == generation.0 {
            &state.engines
        } else {
            &state.earlier.iter().find(|(number, _)| *number == generation.0)?.1
        };
        let mut hasher = blake3::Hasher::new_derive_key(
            "seawall 2026 signature sets of all engines, and who may allow",
        );
        for (signatures, may_allow) in engines.iter().zip(&state.may_allow) {
            hasher.update(&(*signatures)?.0);
            hasher.update(&[u8::from(*may_allow)]);
        }
        Some(SetDigest(*hasher.finalize().as_bytes()))
    }

    /// The newest generation in which these engines used just these signatures. `None` when there was
    /// none: the engines that looked were never in use together, or one could not look.
    pub fn of(&self, used: &[(usize, Option<Signatures>)]) -> Option<Generation> {
        let state = self.lock();
        let is_it = |set: &[Option<Signatures>]| {
            used.iter().all(|(engine, signatures)| {
                signatures.is_some() && set.get(*engine) == Some(signatures)
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

    #[test]
    fn only_another_signature_set_is_a_new_generation() {
        let generations = Generations::new(10, vec![false; 2]);
        assert_eq!(generations.engine_has(0, A), Some(Generation(11)));
        assert_eq!(generations.engine_has(1, A), Some(Generation(12)));
        assert_eq!(generations.engine_has(0, A), None, "a restart");
        assert_eq!(generations.engine_has(0, B), Some(Generation(13)));
        assert_eq!(generations.current(), Generation(13));
    }

    #[test]
    fn a_scan_belongs_to_the_set_that_made_it() {
        let generations = Generations::new(10, vec![false; 2]);
        generations.engine_has(0, A);
        generations.engine_has(1, A);
        generations.engine_has(0, B);
        assert_eq!(generations.of(&[(0, Some(B)), (1, Some(A))]), Some(Generation(13)));
        assert_eq!(generations.of(&[(0, Some(B))]), Some(Generation(13)), "the first one found it");
        assert_eq!(generations.of(&[(1, Some(A))]), Some(Generation(13)), "the second one did");
        let before = [(1, Some(A)), (0, Some(A))];
        assert_eq!(generations.of(&before), Some(Generation(12)), "queued before");
        assert_eq!(generations.of(&[(0, Some(A)), (1, Some(B))]), None, "never in use together");
        assert_eq!(generations.of(&[(0, Some(B)), (1, None)]), None);
    }

    #[test]
    fn the_same_sets_have_the_same_digest_in_every_run() {
        let one = Generations::new(10, vec![false; 2]);
        one.engine_has(0, A);
        assert_eq!(one.set_of(one.current()), None, "an engine is not ready");
        one.engine_has(1, B);
        let digest = one.set_of(one.current()).unwrap();
        let other = Generations::new(99, vec![false; 2]);
        other.engine_has(1, B);
        other.engine_has(0, A);
        assert_eq!(other.set_of(other.current()), Some(digest));
        other.engine_has(1, A);
        assert_ne!(other.set_of(other.current()), Some(digest));
        assert_eq!(other.set_of(Generation(other.current().0 - 1)), Some(digest), "an earlier one");
        other.engine_has(0, B);
        assert_ne!(other.set_of(other.current()), Some(digest), "the order counts");
        let trusting = Generations::new(10, vec![true, false]);
        trusting.engine_has(0, A);
        trusting.engine_has(1, B);
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
