//! What the driver remembers of files: that they are clean and what hash the host gave their content, or that they were
//! looked at lately while somebody was writing them.
//!
//! Forgetting costs a scan, nothing else, so there is a bound, and at it an eighth is forgotten. What was clean for an
//! earlier generation of signatures is clean no more; its hash is still that of its content. Files are compared by keyed
//! hashes of inode (32 bits) and identity (62), whose keys nobody knows. They lie one behind the other, and a table has their
//! places: a table of the files themselves would be a third larger. What is done under the lock is short, but for making
//! room, growing and growing old: a millisecond or two, once in thousands of files or with new signatures.

use crate::file::Identity;
use hashbrown::HashTable;
use seawall_proto::ContentHash;
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How many clean files are remembered, with 44 bytes each.
const MOST: usize = 100_000;
/// For so many more there is room made at a time.
const STEP: usize = 4_096;
/// How many files with writers.
const EXPOSED_MOST: usize = 512;

/// How long a file that a writer holds open is let through after a scan, in milliseconds.
pub const HELD_BY_WRITER_MS: u64 = 10_000;

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

/// A clean file. In words of 32 bits, for there may be very many.
struct Note {
    /// Half of its inode's hash. Of two inodes that share it one is remembered.
    inode: u32,
    /// Its identity's, but for the last two bits: [`CURRENT`] and [`UNOPENED`].
    identity: [u32; 2],
    hash: ContentHash,
}

const _: () = assert!(size_of::<Note>() == 44);

/// It was clean for the current signatures.
const CURRENT: u32 = 1;
/// It is an archive that nobody has looked into.
const UNOPENED: u32 = 2;

fn identity_words(hash: u64) -> [u32; 2] {
    [(hash >> 32) as u32, hash as u32 & !(CURRENT | UNOPENED)]
}

impl Note {
    fn identity(&self) -> [u32; 2] {
        let [high, low] = self.identity;
        [high, low & !(CURRENT | UNOPENED)]
    }

    fn has(&self, flag: u32) -> bool {
        self.identity[1] & flag != 0
    }
}

/// The table goes by both ends of a hash.
fn place_hash(inode: u32) -> u64 {
    u64::from(inode) << 32 | u64::from(inode)
}

#[derive(Default)]
struct Notes {
    clean: Vec<Note>,
    /// Where in `clean` each is.
    places: HashTable<u32>,
    /// How often room was made.
    rounds: u32,
    /// File systems that are there, each with a number of its own.
    devices: HashMap<u64, u64>,
    next_device: u64,
    /// Device and inode number of files with writers, and until when that counts.
    exposed: HashMap<(u64, u64), u64>,
    keys: RandomState,
}

impl Notes {
    fn inode(&self, device: u64, inode: u64) -> Option<u32> {
        Some(self.keys.hash_one((self.devices.get(&device)?, inode)) as u32)
    }

    /// With the file system's own number: what another one had under the same device number is not its.
    fn identity(&self, identity: &Identity) -> Option<[u32; 2]> {
        let device = self.devices.get(&identity.device)?;
        Some(identity_words(self.keys.hash_one((device, identity))))
    }

    fn find(&self, identity: &Identity) -> Option<&Note> {
        let inode = self.inode(identity.device, identity.inode)?;
        let is_its = |place: &u32| self.clean[*place as usize].inode == inode;
        let place = self.places.find(place_hash(inode), is_its)?;
        let note = &self.clean[*place as usize];
        (note.identity() == self.identity(identity)?).then_some(note)
    }

    fn forget(&mut self, device: u64, inode: u64) {
        self.exposed.remove(&(device, inode));
        let Some(inode) = self.inode(device, inode) else { return };
        let Self { clean, places, .. } = self;
        let is_its = |place: &u32| clean[*place as usize].inode == inode;
        let found = places.find_entry(place_hash(inode), is_its);
        let Ok((place, _)) = found.map(hashbrown::hash_table::OccupiedEntry::remove) else {
            return;
        };
        clean.swap_remove(place as usize);
        // The last one is where it was.
        if let Some(moved) = clean.get(place as usize) {
            let before = clean.len() as u32;
            let its = places.find_mut(place_hash(moved.inode), |other| *other == before);
            its.into_iter().for_each(|its| *its = place);
        }
    }

    fn add(&mut self, note: Note) {
        if self.clean.len() >= MOST {
            self.make_room();
        }
        if self.clean.len() == self.clean.capacity() {
            self.clean.reserve_exact(STEP);
        }
        let (hash, place) = (place_hash(note.inode), self.clean.len() as u32);
        self.clean.push(note);
        let clean = &self.clean;
        let hash_of = |place: &u32| place_hash(clean[*place as usize].inode);
        self.places.insert_unique(hash, place, hash_of);
    }

    fn make_room(&mut self) {
        // Another one each time, or there would soon be nothing left of it.
        let eighth = self.rounds & 7;
        self.rounds = self.rounds.wrapping_add(1);
        self.clean.retain(|note| note.inode & 7 != eighth);
        let clean = &self.clean;
        let hash_of = |place: &u32| place_hash(clean[*place as usize].inode);
        self.places.clear();
        for (place, note) in (0..).zip(clean) {
            self.places.insert_unique(place_hash(note.inode), place, hash_of);
        }
    }
}

pub struct Memory(Mutex<Notes>);

impl Memory {
    pub fn new() -> Self {
        Self(Mutex::default())
    }

    fn lock(&self) -> MutexGuard<'_, Notes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of a file that looks like this now.
    pub fn known(&self, identity: &Identity, now_ms: u64) -> Option<Known> {
        let notes = self.lock();
        if let Some(note) = notes.find(identity).filter(|note| note.has(CURRENT)) {
            return Some(Known::Clean { unopened: note.has(UNOPENED) });
        }
        let until_ms = notes.exposed.get(&(identity.device, identity.inode))?;
        (now_ms < *until_ms).then_some(Known::Exposed)
    }

    /// The hash of its content, where it was clean for earlier signatures and is unchanged.
    pub fn hash_of(&self, identity: &Identity) -> Option<ContentHash> {
        self.lock().find(identity).map(|note| note.hash)
    }

    pub fn remember_clean(&self, identity: &Identity, unopened: bool, hash: ContentHash) {
        let mut notes = self.lock();
        let next = notes.next_device;
        if *notes.devices.entry(identity.device).or_insert(next) == next {
            notes.next_device += 1;
        }
        // Whatever has its inode's hash: there is one at most.
        notes.forget(identity.device, identity.inode);
        let inode = notes.inode(identity.device, identity.inode);
        let Some((inode, [high, low])) = inode.zip(notes.identity(identity)) else { return };
        let flags = if unopened { CURRENT | UNOPENED } else { CURRENT };
        notes.add(Note { inode, identity: [high, low | flags], hash });
    }

    pub fn remember_exposed(&self, identity: &Identity, now_ms: u64) {
        let Identity { device, inode, .. } = *identity;
        let mut notes = self.lock();
        notes.forget(device, inode);
        if notes.exposed.len() >= EXPOSED_MOST {
            notes.exposed.retain(|_, until_ms| now_ms < *until_ms);
        }
        if notes.exposed.len() < EXPOSED_MOST {
            notes.exposed.insert((device, inode), now_ms + HELD_BY_WRITER_MS);
        }
    }

    pub fn forget(&self, device: u64, inode: u64) {
        self.lock().forget(device, inode);
    }

    /// A file system is gone: its device number may come to belong to another one.
    pub fn forget_device(&self, gone: u64) {
        let mut notes = self.lock();
        notes.devices.remove(&gone);
        notes.exposed.retain(|(device, _), _| *device != gone);
    }

    /// There are new signatures: nothing is clean any more.
    pub fn grow_old(&self) {
        let mut notes = self.lock();
        notes.clean.iter_mut().for_each(|note| note.identity[1] &= !CURRENT);
        notes.exposed.clear();
    }

    pub fn forget_all(&self) {
        let mut notes = self.lock();
        notes.clean = Vec::new();
        notes.places = HashTable::new();
        notes.devices.clear();
        notes.exposed.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::Look;
    use std::io::Write;

    const HASH: ContentHash = ContentHash([7; 32]);

    #[test]
    fn a_changed_file_is_not_known_any_more() {
        let mut file = tempfile::tempfile().unwrap();
        let memory = Memory::new();
        let before = Look::at(&file).unwrap().identity;
        for unopened in [true, false] {
            memory.remember_clean(&before, unopened, HASH);
            assert_eq!(memory.known(&before, 0), Some(Known::Clean { unopened }));
            assert_eq!(memory.hash_of(&before), Some(HASH));
        }
        file.write_all(b"x").unwrap();
        let now = Look::at(&file).unwrap().identity;
        assert_eq!((memory.known(&now, 0), memory.hash_of(&now)), (None, None));
        memory.forget_all();
        assert_eq!((memory.known(&before, 0), memory.hash_of(&before)), (None, None));
    }

    #[test]
    fn new_signatures_leave_a_file_its_hash_alone() {
        let file = tempfile::tempfile().unwrap();
        let memory = Memory::new();
        let identity = Look::at(&file).unwrap().identity;
        memory.remember_clean(&identity, false, HASH);
        memory.grow_old();
        assert_eq!((memory.known(&identity, 0), memory.hash_of(&identity)), (None, Some(HASH)));
        memory.remember_clean(&identity, true, HASH);
        assert_eq!(memory.known(&identity, 0), Some(Known::Clean { unopened: true }));
        // Another file system may come to have its device number.
        memory.forget_device(identity.device);
        assert_eq!((memory.known(&identity, 0), memory.hash_of(&identity)), (None, None));
        memory.remember_clean(&identity, false, HASH);
        memory.forget(identity.device, identity.inode);
        assert_eq!(memory.hash_of(&identity), None);
    }

    #[test]
    fn a_file_that_a_writer_holds_is_let_through_for_a_while_whatever_its_size() {
        let mut file = tempfile::tempfile().unwrap();
        let memory = Memory::new();
        let before = Look::at(&file).unwrap().identity;
        memory.remember_clean(&before, false, HASH);
        memory.remember_exposed(&before, 1000);
        assert_eq!(memory.known(&before, 1000), Some(Known::Exposed), "not as clean");
        file.write_all(b"x").unwrap();
        let now = Look::at(&file).unwrap().identity;
        assert_eq!(memory.known(&now, 1000 + HELD_BY_WRITER_MS - 1), Some(Known::Exposed));
        assert_eq!(memory.known(&now, 1000 + HELD_BY_WRITER_MS), None);
        memory.remember_exposed(&now, 1000);
        memory.forget(now.device, now.inode);
        assert_eq!(memory.known(&now, 1000), None);
    }

    #[test]
    fn forgetting_one_leaves_the_others() {
        let file = tempfile::tempfile().unwrap();
        let memory = Memory::new();
        let one = Look::at(&file).unwrap().identity;
        let of = |inode| {
            let mut other = one;
            other.inode = inode;
            other
        };
        let mut expected = std::collections::BTreeSet::new();
        for turn in 0..20_000_u64 {
            // In an order without a pattern, each now remembered and now forgotten.
            let inode = turn.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56;
            if expected.remove(&inode) {
                memory.forget(one.device, inode);
            } else {
                memory.remember_clean(&of(inode), false, ContentHash([inode as u8; 32]));
                expected.insert(inode);
            }
        }
        assert!((30..256).contains(&expected.len()), "{}", expected.len());
        for inode in 0..256 {
            let hash = expected.contains(&inode).then_some(ContentHash([inode as u8; 32]));
            assert_eq!(memory.hash_of(&of(inode)), hash, "{inode}");
        }
    }

    #[test]
    fn a_hundred_thousand_files_are_remembered_and_no_more() {
        let file = tempfile::tempfile().unwrap();
        let memory = Memory::new();
        let one = Look::at(&file).unwrap().identity;
        let of = |inode| {
            let mut other = one;
            other.inode = inode;
            other
        };
        for inode in 0..MOST as u64 {
            memory.remember_clean(&of(inode), false, HASH);
        }
        // One pair in a hundred thousand shares its place on average.
        let known = (0..MOST as u64).filter(|inode| memory.known(&of(*inode), 0).is_some()).count();
        assert!((MOST - 10..=MOST).contains(&known), "{known}");
        for inode in 0..3 * MOST as u64 {
            memory.remember_clean(&of(inode), false, HASH);
            assert!(memory.known(&of(inode), 0).is_some());
        }
        let notes = memory.lock();
        let left = notes.clean.len();
        assert_eq!(notes.places.len(), left);
        assert!((MOST * 3 / 4..=MOST).contains(&left), "{left}");
        // Each time there is room for thousands.
        assert!((1..60).contains(&notes.rounds), "{}", notes.rounds);
        let bytes = notes.places.allocation_size() + notes.clean.capacity() * size_of::<Note>();
        assert!(bytes < 5 << 20, "{bytes}");
    }
}
