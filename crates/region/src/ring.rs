//! The ring: short questions and their answers in the region, for moments in which both sides are awake.
//!
//! | offset | bytes | what | written by |
//! |---|---|---|---|
//! | 8,192 | 64 places of 128 | a [`Query`] of 64 bytes; a word that says how much of its content is there; a word that says whether the driver looks for the reply | driver |
//! | 16,384 | 64 places of 64 | a [`Reply`] | host |
//! | 24,576 | 8 | whether the host looks for queries, and how often it has begun and ended that | host |
//!
//! Queries are numbered from 0 in each session, and number N stands in place N mod 64: neither side tells the other where
//! to look. Query and reply end with a digest that is keyed by the session's [`RingKey`], so what is torn, is of another
//! session or never was one is not there.
//!
//! Nobody waits in the ring. Each side says in it whether it looks; who does not is told on the link. Whoever is about to
//! look no longer says so, then looks once more, and whoever has written looks who looks afterwards, each with a full fence
//! between: one of the two sees the other's word (the pattern of Dekker's algorithm).

use crate::layout::{HEADER_LEN, SLOT_LEN};
use seawall_proto::{ContentHash, Fingerprint, Generation, RingKey};

/// How many queries may be under way.
pub const PLACES: u64 = 64;
/// Of how many slots the content of a query may be.
pub const QUERY_SLOTS: usize = 16;
/// How much of a content is filled in and read at a time, in bytes: what a CPU's first cache holds, and as much as
/// BLAKE3 hashes at once. Slots are whole pieces, but for the last one.
pub const PIECE_LEN: u32 = 16 * 1024;

const QUERIES_AT: u64 = 8 * 1024;
const QUERY_STRIDE: u64 = 128;
const REPLIES_AT: u64 = 16 * 1024;
/// Where the host says whether it looks.
pub(crate) const HOST_LOOKS_AT: u64 = 24 * 1024;

/// Bytes of an encoded query or reply.
pub(crate) const ENTRY_LEN: usize = 64;
const DIGEST_AT: usize = 56;

/// Where it is in a region.
pub(crate) const START: u64 = QUERIES_AT;
pub(crate) const END: u64 = HOST_LOOKS_AT + 8;

const _: () = assert!(END <= HEADER_LEN);
const _: () = assert!(QUERY_SLOTS as u32 * SLOT_LEN / PIECE_LEN < u8::MAX as u32);
const _: () = assert!(QUERIES_AT + PLACES * QUERY_STRIDE <= REPLIES_AT);
const _: () = assert!(REPLIES_AT + PLACES * ENTRY_LEN as u64 <= HOST_LOOKS_AT);

/// Where query `number` is.
pub(crate) fn query_at(number: u64) -> u64 {
    QUERIES_AT + number % PLACES * QUERY_STRIDE
}

/// Where the driver says how many slots of its content are filled.
pub(crate) fn filled_at(number: u64) -> u64 {
    query_at(number) + 64
}

/// Where the driver says whether it looks for its reply.
pub(crate) fn watched_at(number: u64) -> u64 {
    query_at(number) + 72
}

/// Where reply `number` is.
pub(crate) fn reply_at(number: u64) -> u64 {
    REPLIES_AT + number % PLACES * ENTRY_LEN as u64
}

/// A word about query `number` of the session with this key; it says nothing of any other.
pub(crate) fn word(key: &RingKey, number: u64, says: u8) -> u64 {
    about(key, number) << 8 | u64::from(says)
}

fn about(key: &RingKey, number: u64) -> u64 {
    number.wrapping_add(entry_number(&key.0[8..])) & (u64::MAX >> 8)
}

/// What a word says of query `number`.
pub(crate) fn says(key: &RingKey, word: u64, number: u64) -> Option<u8> {
    (word >> 8 == about(key, number)).then_some(word as u8)
}

/// Whether the host looks for queries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostLooks {
    /// It will see what was asked before this was read.
    Now,
    /// It is to be told on the link; so often has it begun and ended to look.
    Away(u32),
}

/// The word of a host that has begun and ended to look so often: it looks where that is odd.
pub(crate) fn looks(key: &RingKey, times: u32) -> u64 {
    entry_number(&key.0[16..]) << 32 | u64::from(times)
}

/// What such a word says. One of another session is that of a host that has never looked.
pub(crate) fn host_looks(key: &RingKey, word: u64) -> HostLooks {
    let times = word as u32;
    match looks(key, times) == word {
        true if times % 2 == 1 => HostLooks::Now,
        true => HostLooks::Away(times),
        false => HostLooks::Away(0),
    }
}

/// How much of a content is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filled {
    /// So many pieces of [`PIECE_LEN`] bytes.
    Pieces(u8),
    /// There will be no more.
    GivenUp,
}

impl Filled {
    const GIVEN_UP: u8 = u8::MAX;

    pub(crate) fn to_word(self, key: &RingKey, number: u64) -> u64 {
        let says = match self {
            Self::Pieces(pieces) => pieces,
            Self::GivenUp => Self::GIVEN_UP,
        };
        word(key, number, says)
    }

    pub(crate) fn of_word(key: &RingKey, word: u64, number: u64) -> Self {
        match says(key, word, number) {
            Some(Self::GIVEN_UP) => Self::GivenUp,
            Some(pieces) => Self::Pieces(pieces),
            None => Self::Pieces(0),
        }
    }
}

/// What the driver wants to know: whether the host knows a content to be clean.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Query {
    /// That of so many bytes in these slots, which may be filled while the host reads them already.
    Content {
        /// How long it is in bytes; all slots but the last are full.
        len: u32,
        /// The slots, at most [`QUERY_SLOTS`].
        slots: Vec<u16>,
    },
    /// That with this hash.
    Hash(ContentHash),
    /// That of the file with this fingerprint, of a golden image.
    Fingerprint(Fingerprint),
}

impl Query {
    pub(crate) fn to_bytes(&self, key: &RingKey, number: u64) -> [u8; ENTRY_LEN] {
        let mut bytes = [0; ENTRY_LEN];
        match self {
            Self::Content { len, slots } => {
                bytes[8] = 1;
                let taken = slots.len().min(QUERY_SLOTS);
                bytes[9] = taken as u8;
                bytes[12..16].copy_from_slice(&len.to_le_bytes());
                for (place, slot) in bytes[16..48].chunks_exact_mut(2).zip(&slots[..taken]) {
                    place.copy_from_slice(&slot.to_le_bytes());
                }
            }
            Self::Hash(hash) => {
                bytes[8] = 2;
                bytes[16..48].copy_from_slice(&hash.0);
            }
            Self::Fingerprint(fingerprint) => {
                bytes[8] = 3;
                bytes[16..32].copy_from_slice(&fingerprint.0);
            }
        }
        seal(bytes, key, number)
    }

    pub(crate) fn of_bytes(bytes: &[u8; ENTRY_LEN], key: &RingKey, number: u64) -> Option<Self> {
        open(bytes, key, number)?;
        match bytes[8] {
            1 => {
                let len = u32::from_le_bytes(bytes[12..16].try_into().ok()?);
                let taken = usize::from(bytes[9]).min(QUERY_SLOTS);
                let slot = |place: &[u8]| u16::from_le_bytes([place[0], place[1]]);
                let slots = bytes[16..48].chunks_exact(2).take(taken).map(slot).collect();
                Some(Self::Content { len, slots })
            }
            2 => Some(Self::Hash(ContentHash(bytes[16..48].try_into().ok()?))),
            3 => Some(Self::Fingerprint(Fingerprint(bytes[16..32].try_into().ok()?))),
            _ => None,
        }
    }
}

/// What the host knows of a content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// Nothing, or nothing good: the driver asks in the long way.
    Unknown,
    /// It is clean.
    Clean(seawall_proto::Clean),
}

impl Reply {
    pub(crate) fn to_bytes(self, key: &RingKey, number: u64) -> [u8; ENTRY_LEN] {
        let mut bytes = [0; ENTRY_LEN];
        bytes[8] = 17;
        if let Self::Clean(clean) = self {
            bytes[8] = if clean.unopened { 19 } else { 18 };
            bytes[16..24].copy_from_slice(&clean.generation.0.to_le_bytes());
            bytes[24..56].copy_from_slice(&clean.hash.0);
        }
        seal(bytes, key, number)
    }

    pub(crate) fn of_bytes(bytes: &[u8; ENTRY_LEN], key: &RingKey, number: u64) -> Option<Self> {
        open(bytes, key, number)?;
        match bytes[8] {
            17 => Some(Self::Unknown),
            kind @ (18 | 19) => Some(Self::Clean(seawall_proto::Clean {
                unopened: kind == 19,
                generation: Generation(u64::from_le_bytes(bytes[16..24].try_into().ok()?)),
                hash: ContentHash(bytes[24..56].try_into().ok()?),
            })),
            _ => None,
        }
    }
}

/// The number at the beginning of an entry.
pub(crate) fn entry_number(bytes: &[u8]) -> u64 {
    bytes.first_chunk().map_or(u64::MAX, |number| u64::from_le_bytes(*number))
}

fn seal(mut bytes: [u8; ENTRY_LEN], key: &RingKey, number: u64) -> [u8; ENTRY_LEN] {
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    let digest = digest(&bytes, key);
    bytes[DIGEST_AT..].copy_from_slice(&digest);
    bytes
}

fn open(bytes: &[u8; ENTRY_LEN], key: &RingKey, number: u64) -> Option<()> {
    (entry_number(bytes) == number && bytes[DIGEST_AT..] == digest(bytes, key)).then_some(())
}

fn digest(bytes: &[u8; ENTRY_LEN], key: &RingKey) -> [u8; ENTRY_LEN - DIGEST_AT] {
    let digest = blake3::keyed_hash(&key.0, &bytes[..DIGEST_AT]);
    let mut short = [0; ENTRY_LEN - DIGEST_AT];
    short.copy_from_slice(&digest.as_bytes()[..ENTRY_LEN - DIGEST_AT]);
    short
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use seawall_proto::Clean;

    fn queries() -> impl Strategy<Value = Query> {
        let slots = prop::collection::vec(any::<u16>(), 0..=QUERY_SLOTS);
        let content = (any::<u32>(), slots).prop_map(|(len, slots)| Query::Content { len, slots });
        let hash = any::<[u8; 32]>().prop_map(|hash| Query::Hash(ContentHash(hash)));
        let fingerprint = any::<[u8; 16]>().prop_map(|own| Query::Fingerprint(Fingerprint(own)));
        prop_oneof![content, hash, fingerprint]
    }

    fn replies() -> impl Strategy<Value = Reply> {
        let clean = any::<(bool, u64, [u8; 32])>().prop_map(|(unopened, generation, hash)| {
            let (generation, hash) = (Generation(generation), ContentHash(hash));
            Reply::Clean(Clean { unopened, generation, hash })
        });
        prop_oneof![Just(Reply::Unknown), clean]
    }

    proptest! {
        #[test]
        fn an_entry_is_read_as_it_was_written_and_by_nobody_else(
            query in queries(), reply in replies(), number: u64, key: [u8; 32], flip in 0..512_usize
        ) {
            let key = RingKey(key);
            let bytes = query.to_bytes(&key, number);
            prop_assert_eq!(Query::of_bytes(&bytes, &key, number), Some(query));
            prop_assert_eq!(Query::of_bytes(&bytes, &key, number ^ 64), None);
            prop_assert_eq!(Reply::of_bytes(&bytes, &key, number), None, "a query is no reply");
            let mut other = key.clone();
            other.0[3] ^= 1;
            prop_assert_eq!(Query::of_bytes(&bytes, &other, number), None);
            let mut torn = bytes;
            torn[flip / 8] ^= 1 << (flip % 8);
            prop_assert_eq!(Query::of_bytes(&torn, &key, number), None);
            let bytes = reply.to_bytes(&key, number);
            prop_assert_eq!(Reply::of_bytes(&bytes, &key, number), Some(reply));
            prop_assert_eq!(Query::of_bytes(&bytes, &key, number), None, "a reply is no query");
        }

        #[test]
        fn whatever_stands_there_is_an_entry_or_none(bytes: [u8; 64], key: [u8; 32], number: u64) {
            let key = RingKey(key);
            prop_assert_eq!(Query::of_bytes(&bytes, &key, number), None);
            // Even where the digest fits, no more slots are named than there may be.
            let sealed = seal(bytes, &key, number);
            if let Some(Query::Content { slots, .. }) = Query::of_bytes(&sealed, &key, number) {
                prop_assert!(slots.len() <= QUERY_SLOTS);
            }
            let _any = Reply::of_bytes(&sealed, &key, number);
        }

        #[test]
        fn a_word_speaks_of_one_query_of_one_session(
            number in 0..u64::MAX >> 8, pieces in 0..=64_u8, key: [u8; 32]
        ) {
            let key = RingKey(key);
            let mut other = key.clone();
            other.0[9] ^= 1;
            let filled = Filled::Pieces(pieces).to_word(&key, number);
            prop_assert_eq!(Filled::of_word(&key, filled, number), Filled::Pieces(pieces));
            prop_assert_eq!(Filled::of_word(&key, filled, number + 1), Filled::Pieces(0));
            prop_assert_eq!(Filled::of_word(&other, filled, number), Filled::Pieces(0));
            let given_up = Filled::GivenUp.to_word(&key, number);
            prop_assert_eq!(Filled::of_word(&key, given_up, number), Filled::GivenUp);
        }
    }
}
