//! What the driver remembers of files: that they are clean, or that they were looked at lately while
//! somebody was writing them.
//!
//! A table of fixed size, one file to a place; a file that comes to a taken place replaces what was
//! there. Forgetting costs a scan, nothing else. Readers take the lock for some nanoseconds; nobody
//! does anything slow under it.

use crate::file::Identity;
use std::sync::{Mutex, PoisonError};

/// Places in the table, of 72 bytes each.
const PLACES: usize = 3072;

/// How long a file that a writer holds open is let through after a scan, in milliseconds.
pub const HELD_BY_WRITER_MS: u64 = 10_000;

#[derive(Debug, Clone, Copy)]
enum Note {
    Clean {
        identity: Identity,
        unopened: bool,
    },
    /// A writer held it when it was scanned; its content may be another by now.
    Exposed {
        device: u64,
        inode: u64,
        until_ms: u64,
    },
}

/// What is known of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// Scanned clean by the current generation, and unchanged since.
    Clean {
        /// It is an archive that nobody has looked into.
        unopened: bool,
    },
    /// Scanned clean a moment ago, while a writer held it.
    Exposed,
}

#[derive(Debug)]
pub struct Memory {
    places: Mutex<Vec<Option<Note>>>,
}

impl Memory {
    pub fn new() -> Self {
        Self { places: Mutex::new(vec![None; PLACES]) }
    }

    fn with<T>(&self, device: u64, inode: u64, then: impl FnOnce(&mut Option<Note>) -> T) -> T {
        let mixed = (device.rotate_left(32) ^ inode).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let place = usize::try_from(mixed >> 32).unwrap_or(0) % PLACES;
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        then(&mut places[place])
    }

    /// What is known of a file that looks like this now.
    pub fn known(&self, identity: &Identity, now_ms: u64) -> Option<Known> {
        self.with(identity.device, identity.inode, |place| match place {
            Some(Note::Clean { identity: noted, unopened }) if noted == identity => {
                Some(Known::Clean { unopened: *unopened })
            }
            Some(Note::Exposed { device, inode, until_ms })
                if (*device, *inode) == (identity.device, identity.inode) && now_ms < *until_ms =>
            {
                Some(Known::Exposed)
            }
            _ => None,
        })
    }

    pub fn remember_clean(&self, identity: &Identity, unopened: bool) {
        let note = Note::Clean { identity: *identity, unopened };
        self.with(identity.device, identity.inode, |place| *place = Some(note));
    }

    pub fn remember_exposed(&self, identity: &Identity, now_ms: u64) {
        let Identity { device, inode, .. } = *identity;
        let until_ms = now_ms + HELD_BY_WRITER_MS;
        self.with(device, inode, |place| *place = Some(Note::Exposed { device, inode, until_ms }));
    }

    pub fn forget(&self, device: u64, inode: u64) {
        self.with(device, inode, |place| *place = None);
    }

    /// A file system is gone: its device number may come to belong to another one.
    pub fn forget_device(&self, gone: u64) {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let is_on_it = |note: &mut Note| match note {
            Note::Clean { identity: Identity { device, .. }, .. }
            | Note::Exposed { device, .. } => *device == gone,
        };
        for place in places.iter_mut() {
            let _forgotten = place.take_if(is_on_it);
        }
    }

    pub fn forget_all(&self) {
        self.places.lock().unwrap_or_else(PoisonError::into_inner).fill(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::Look;
    use std::io::Write;

    #[test]
    fn a_changed_file_is_not_known_any_more() {
        let mut file = tempfile::tempfile().unwrap();
        let memory = Memory::new();
        let before = Look::at(&file).unwrap().identity;
        for unopened in [true, false] {
            memory.remember_clean(&before, unopened);
            assert_eq!(memory.known(&before, 0), Some(Known::Clean { unopened }));
        }
        file.write_all(b"x").unwrap();
        assert_eq!(memory.known(&Look::at(&file).unwrap().identity, 0), None);
        memory.forget_all();
        assert_eq!(memory.known(&before, 0), None);
    }

    #[test]
    fn a_file_that_a_writer_holds_is_let_through_for_a_while_whatever_its_size() {
        let mut file = tempfile::tempfile().unwrap();
        let memory = Memory::new();
        memory.remember_exposed(&Look::at(&file).unwrap().identity, 1000);
        file.write_all(b"x").unwrap();
        let now = Look::at(&file).unwrap().identity;
        assert_eq!(memory.known(&now, 1000 + HELD_BY_WRITER_MS - 1), Some(Known::Exposed));
        assert_eq!(memory.known(&now, 1000 + HELD_BY_WRITER_MS), None);
        memory.forget(now.device, now.inode);
        assert_eq!(memory.known(&now, 1000), None);
    }
}
