//! The watched folders: whether they became another than they were, and are at rest.
//!
//! They are looked at by name, size and times every few seconds. freshclam(1) and packages replace several files
//! one after the other: only what was the same twice in a row is read.

use super::book::Seen;
use super::set::files_of;
use crate::config::EngineConfig;
use crate::events::hex;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How often they are looked at.
const EVERY: Duration = Duration::from_secs(3);
/// How long after a failure, the first time and at most.
const AGAIN: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(3600));

/// See the module.
#[derive(Debug, Default)]
pub struct Watch {
    /// As it was at the last look.
    last: Option<String>,
    /// As it was when it was last read.
    read: Option<String>,
    next: Option<Instant>,
    /// Failures one after the other.
    failures: u32,
}

impl Watch {
    /// Begins with what an earlier service saw, unless other engines took it.
    pub fn begin(&mut self, seen: &Option<Seen>, engines: &[EngineConfig]) {
        let seen = seen.as_ref().filter(|seen| seen.takers == takers(engines));
        self.read = seen.map(|seen| seen.stamp.clone());
    }

    /// Whether it is time for a look.
    pub fn is_due(&self) -> bool {
        self.next.is_none_or(|next| next <= Instant::now())
    }

    /// Gives a stamp when the folders are another than when they were last read, and at rest.
    pub fn look(&mut self, folders: &[PathBuf], at_once: bool) -> Option<String> {
        self.next = Some(Instant::now() + EVERY);
        let stamp = stamp(folders)?;
        let at_rest = at_once || self.last.as_ref() == Some(&stamp);
        self.last = Some(stamp.clone());
        if !at_rest || self.read.as_ref() == Some(&stamp) {
            return None;
        }
        self.read = Some(stamp.clone());
        Some(stamp)
    }

    /// What was read made no set for a reason that may pass: it is read again, though it stays as it is, ever more
    /// seldom.
    pub fn again(&mut self) {
        self.read = None;
        let pause = AGAIN.0.saturating_mul(1 << self.failures.min(10));
        self.failures += 1;
        self.next = Some(Instant::now() + pause.min(AGAIN.1));
    }

    /// What was read is dealt with.
    pub fn done(&mut self) {
        self.failures = 0;
    }
}

/// Digest of names, sizes and times. `None` where they cannot be read now, or there is nothing.
pub fn stamp(folders: &[PathBuf]) -> Option<String> {
    let mut hasher = blake3::Hasher::new();
    let mut count = 0;
    for folder in folders {
        for path in files_of(folder).ok()? {
            let about = std::fs::metadata(&path).ok()?;
            let name = path.as_os_str().as_encoded_bytes();
            hasher.update(&(name.len() as u64).to_le_bytes()).update(name);
            hasher.update(&about.ino().to_le_bytes()).update(&about.len().to_le_bytes());
            for time in [about.mtime(), about.mtime_nsec(), about.ctime(), about.ctime_nsec()] {
                hasher.update(&time.to_le_bytes());
            }
            count += 1;
        }
    }
    (count > 0).then(|| hex(hasher.finalize().as_bytes()))
}

/// Those of the folders that exist.
pub fn that_are_there(folders: &[PathBuf]) -> Vec<PathBuf> {
    folders.iter().filter(|folder| folder.is_dir()).cloned().collect()
}

/// Digest of the engines and what they take: a change of these makes other sets of the same files.
pub fn takers(engines: &[EngineConfig]) -> String {
    let mut hasher = blake3::Hasher::new();
    for engine in engines.iter().filter(|engine| !engine.signatures.is_nothing()) {
        hasher.update(engine.name.as_bytes()).update(b"\0");
        for ending in engine.signatures.endings() {
            hasher.update(ending.as_bytes()).update(b"\0");
        }
    }
    hex(hasher.finalize().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_new_and_at_rest_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let folders = [folder.path().to_owned()];
        let mut watch = Watch::default();
        assert_eq!(watch.look(&folders, true), None, "nothing is there");
        std::fs::write(folder.path().join("a"), "1").unwrap();
        assert_eq!(watch.look(&folders, false), None, "it may still be written");
        std::fs::write(folder.path().join("b"), "1").unwrap();
        assert_eq!(watch.look(&folders, false), None, "it is");
        assert!(watch.look(&folders, false).is_some());
        assert_eq!(watch.look(&folders, false), None, "it was read");
        watch.again();
        assert!(watch.look(&folders, false).is_some());
        std::fs::write(folder.path().join("a"), "22").unwrap();
        assert!(watch.look(&folders, true).is_some(), "somebody says that it is complete");
    }
}
