//! What the service remembers of signature sets: which is in use, which are kept, and the history.
//!
//! `state_dir/signatures/book.json`, replaced as a whole and durable before anything follows from it.

use seawall_client::SignatureChange;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Changes that are remembered.
const HISTORY: usize = 200;

/// See the module.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Book {
    /// The set in use.
    pub in_use: Option<String>,
    /// Those that are kept, in the order in which they were first taken.
    pub kept: Vec<Kept>,
    /// Digest of what the watched folders held when they were last looked into, and whether that became a set.
    pub seen: Option<Seen>,
    /// The oldest first.
    pub history: Vec<SignatureChange>,
    #[serde(skip)]
    path: PathBuf,
}

/// A set that is kept.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Kept {
    pub set: String,
    /// When it was last taken into use, in UTC.
    pub taken: String,
    /// The change that brought it: what its engines loaded.
    pub change: SignatureChange,
    /// Somebody went back from it: going back does not lead to it.
    #[serde(default)]
    pub undone: bool,
}

/// A look at the watched folders.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Of names, sizes and times.
    pub stamp: String,
    /// Of names and contents.
    pub source: String,
    /// Of the engines and what they take.
    pub takers: String,
}

impl Book {
    /// Opens the book in `folder`. One that cannot be read is set aside, and a new one is empty.
    pub fn open(folder: &Path) -> Self {
        let path = folder.join("book.json");
        let read = match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map_err(|error| error.to_string()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error.to_string()),
        };
        let book = read.unwrap_or_else(|error| {
            let aside = folder.join("book.damaged.json");
            tracing::error!(path = %path.display(), error, aside = %aside.display(), "the signature sets' history cannot be read; it is set aside and begun anew");
            let _kept = fs::rename(&path, aside);
            Self::default()
        });
        Self { path, ..book }
    }

    /// Replaces the file.
    pub fn save(&self) -> io::Result<()> {
        let folder = self.path.parent().unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        serde_json::to_writer_pretty(&mut file, self)?;
        file.flush()?;
        file.as_file().sync_all()?;
        file.persist(&self.path).map_err(|error| error.error)?;
        File::open(folder)?.sync_all()
    }

    /// Adds to the history.
    pub fn note(&mut self, change: SignatureChange) {
        self.history.push(change);
        let excess = self.history.len().saturating_sub(HISTORY);
        self.history.drain(..excess);
    }

    /// A set is taken into use. At most `keep` are kept, this one among them.
    pub fn take(&mut self, set: &str, change: &SignatureChange, keep: usize) {
        self.in_use = Some(set.to_owned());
        match self.kept.iter_mut().find(|one| one.set == set) {
            Some(known) => {
                (known.taken, known.undone) = (change.at.clone(), false);
                // Brought anew, it comes after those that were before it.
                if change.kind != seawall_client::ChangeKind::Rollback {
                    known.change = change.clone();
                    let at = self.kept.iter().position(|one| one.set == set).unwrap_or_default();
                    let one = self.kept.remove(at);
                    self.kept.push(one);
                }
            }
            None => self.kept.push(Kept {
                set: set.to_owned(),
                taken: change.at.clone(),
                change: change.clone(),
                undone: false,
            }),
        }
        while self.kept.len() > keep {
            let oldest = self.kept.iter().position(|one| one.set != set).unwrap_or_default();
            self.kept.remove(oldest);
        }
    }

    /// The set that was in use before the one that is.
    pub fn before(&self) -> Option<&str> {
        let now = self.kept.iter().position(|one| Some(&one.set) == self.in_use.as_ref());
        let earlier = &self.kept[..now.unwrap_or(self.kept.len())];
        earlier.iter().rev().find(|one| !one.undone).map(|one| one.set.as_str())
    }

    /// The set whose name begins so, where that is one.
    pub fn find(&self, digits: &str) -> Option<&str> {
        let sets = self.kept.iter().map(|one| one.set.as_str());
        let mut found = sets.filter(|set| !digits.is_empty() && set.starts_with(digits));
        match (found.next(), found.next()) {
            (Some(one), None) => Some(one),
            _ => None,
        }
    }

    /// Whether it knows of no set.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty() && self.history.is_empty()
    }

    /// Somebody goes back from the set in use, to an earlier one: forth it is no going back.
    pub fn undo(&mut self, to: &str) {
        let now = self.in_use.clone();
        let at = |set: Option<&str>| self.kept.iter().position(|one| Some(one.set.as_str()) == set);
        if at(Some(to)).is_some_and(|to| Some(to) > at(now.as_deref())) {
            return;
        }
        if let Some(now) = now {
            self.leave(&now);
        }
    }

    /// Going back does not lead to this set any more.
    pub fn leave(&mut self, set: &str) {
        if let Some(one) = self.kept.iter_mut().find(|one| one.set == set) {
            one.undone = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use seawall_client::ChangeKind;

    fn change(kind: ChangeKind) -> SignatureChange {
        SignatureChange {
            at: "2026-01-01T00:00:00Z".into(),
            kind,
            set: None,
            from: Vec::new(),
            taken: true,
            reason: None,
            engines: Vec::new(),
            left_out: Vec::new(),
            left_out_count: 0,
            known_bad: 0,
            known_good: 0,
            took_ms: 0,
        }
    }

    #[test]
    fn going_back_leads_further_back_and_never_to_what_was_undone() {
        let folder = tempfile::tempdir().unwrap();
        let mut book = Book::open(folder.path());
        assert_eq!(book.before(), None);
        for set in ["a", "b", "c"] {
            book.take(set, &change(ChangeKind::Apply), 10);
        }
        for expected in ["b", "a"] {
            let before = book.before().unwrap().to_owned();
            assert_eq!(before, expected);
            book.undo(&before);
            book.take(&before, &change(ChangeKind::Rollback), 10);
        }
        assert_eq!(book.before(), None);
        book.take("d", &change(ChangeKind::Apply), 10);
        assert_eq!(book.before(), Some("a"), "b and c were undone");
        book.take("c", &change(ChangeKind::Apply), 10);
        assert_eq!(book.before(), Some("d"), "c was applied anew");
        book.undo("d");
        book.take("d", &change(ChangeKind::Rollback), 10);
        book.undo("c");
        book.take("c", &change(ChangeKind::Rollback), 10);
        assert_eq!(book.before(), Some("d"), "forth is no going back");
        book.save().unwrap();
        let again = Book::open(folder.path());
        assert_eq!((again.in_use.as_deref(), again.before()), (Some("c"), Some("d")));
        assert_eq!((again.find("c"), again.find(""), again.find("x")), (Some("c"), None, None));
    }

    #[test]
    fn few_are_kept_and_always_the_one_in_use() {
        let folder = tempfile::tempdir().unwrap();
        let mut book = Book::open(folder.path());
        for set in ["a", "b", "c"] {
            book.take(set, &change(ChangeKind::Apply), 2);
        }
        assert_eq!(book.kept.iter().map(|one| one.set.as_str()).collect::<Vec<_>>(), ["b", "c"]);
        book.undo("b");
        book.take("b", &change(ChangeKind::Rollback), 1);
        assert_eq!(book.kept.iter().map(|one| one.set.as_str()).collect::<Vec<_>>(), ["b"]);
    }

    #[test]
    fn a_damaged_book_is_set_aside() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("book.json"), "{ half").unwrap();
        assert!(Book::open(folder.path()).in_use.is_none());
        assert!(folder.path().join("book.damaged.json").exists());
    }
}
