//! The framing of a virtio-serial channel, which has no connections: records that end with a zero
//! byte and hold none.
//!
//! A record is a kind byte and what belongs to it, stuffed by COBS (Cheshire and Baker, "Consistent
//! Overhead Byte Stuffing", 1999), then a zero byte:
//!
//! | kind | what follows | meaning |
//! |---|---|---|
//! | 1 | 16 bytes | sync: the driver begins anew; the host repeats it, then both say hello |
//! | 2 | bytes | a piece of what any other link carries |
//! | 3 | nothing | the host has no session on this channel: the driver must begin anew |
//!
//! What an earlier driver or service left in the channel, half a record too, ends at the next zero
//! byte, and both sides skip what comes before the sync. No content can pass for a sync, since it
//! cannot hold the zero byte before it. The random 16 bytes tell this beginning from earlier ones. No
//! I/O here.

/// Most bytes of the link in one record.
const PIECE_MAX: usize = 16 * 1024;
/// The longest record as it travels, without its zero byte: one byte more for each 254 (COBS).
const RECORD_MAX: usize = 1 + PIECE_MAX + PIECE_MAX / 254 + 2;
/// The longest run between two code bytes, and the code that says so.
const RUN_MAX: usize = 254;

const SYNC: u8 = 1;
const PIECE: u8 = 2;
const LOST: u8 = 3;

/// Random for each beginning.
pub type Token = [u8; 16];

/// What came on a channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// A beginning; what came before belongs to nobody.
    Sync(Token),
    /// Bytes of the link.
    Piece(Vec<u8>),
    /// The host has no session.
    Lost,
}

/// Appends a beginning. The zero byte before it ends whatever was left half said.
pub fn encode_sync(token: &Token, out: &mut Vec<u8>) {
    out.push(0);
    stuff([SYNC].iter().chain(token), out);
}

/// Appends the word that there is no session.
pub fn encode_lost(out: &mut Vec<u8>) {
    stuff([LOST].iter(), out);
}

/// Appends `bytes` of the link as records.
pub fn encode(bytes: &[u8], out: &mut Vec<u8>) {
    for piece in bytes.chunks(PIECE_MAX) {
        stuff([PIECE].iter().chain(piece), out);
    }
}

fn stuff<'a>(bytes: impl Iterator<Item = &'a u8>, out: &mut Vec<u8>) {
    let mut code_at = out.len();
    out.push(0);
    let mut run = 0;
    for byte in bytes {
        if *byte != 0 {
            out.push(*byte);
            run += 1;
        }
        if *byte == 0 || run == RUN_MAX {
            out[code_at] = u8::try_from(run + 1).unwrap_or(u8::MAX);
            code_at = out.len();
            out.push(0);
            run = 0;
        }
    }
    out[code_at] = u8::try_from(run + 1).unwrap_or(u8::MAX);
    out.push(0);
}

/// Takes the stuffing out. `None` when a run ends behind the record.
fn unstuff(mut record: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(record.len());
    while let Some((code, rest)) = record.split_first() {
        let run = usize::from(*code).checked_sub(1)?;
        let (literal, after) = rest.split_at_checked(run)?;
        bytes.extend_from_slice(literal);
        if run < RUN_MAX && !after.is_empty() {
            bytes.push(0);
        }
        record = after;
    }
    Some(bytes)
}

/// Collects bytes as they arrive and gives whole records. Holds at most one record and what came
/// behind it in the same read; what is no record, or too long for one, is skipped.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    taken: usize,
    /// In the midst of something too long: nothing counts until the next zero byte.
    skipping: bool,
}

impl Decoder {
    /// An empty decoder.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes that arrived.
    pub fn extend(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole record, or `None` until more bytes arrive.
    pub fn next_record(&mut self) -> Option<Record> {
        loop {
            let pending = &self.buffer[self.taken..];
            let Some(end) = pending.iter().position(|byte| *byte == 0) else {
                if pending.len() > RECORD_MAX {
                    self.buffer.clear();
                    self.taken = 0;
                    self.skipping = true;
                }
                return None;
            };
            let record = &pending[..end];
            let usable = !std::mem::take(&mut self.skipping) && record.len() <= RECORD_MAX;
            let bytes = usable.then(|| unstuff(record)).flatten();
            self.taken += end + 1;
            if let Some(record) = bytes.and_then(parse) {
                return Some(record);
            }
        }
    }
}

fn parse(mut bytes: Vec<u8>) -> Option<Record> {
    match *bytes.first()? {
        SYNC => Token::try_from(&bytes[1..]).ok().map(Record::Sync),
        PIECE => {
            bytes.remove(0);
            Some(Record::Piece(bytes))
        }
        LOST if bytes.len() == 1 => Some(Record::Lost),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn records(wire: &[u8], cut: usize) -> Vec<Record> {
        let (mut decoder, mut found) = (Decoder::new(), Vec::new());
        for bytes in wire.chunks(cut) {
            decoder.extend(bytes);
            found.extend(std::iter::from_fn(|| decoder.next_record()));
        }
        found
    }

    fn pieces(found: Vec<Record>) -> Vec<u8> {
        let piece = |record| match record {
            Record::Piece(bytes) => bytes,
            other => panic!("{other:?}"),
        };
        found.into_iter().flat_map(piece).collect()
    }

    #[test]
    fn the_layout_is_pinned() {
        let mut wire = Vec::new();
        encode_sync(&[7; 16], &mut wire);
        assert_eq!(wire, [&[0, 18, 1][..], &[7; 16], &[0]].concat());
        wire.clear();
        encode(&[5, 0, 6], &mut wire);
        assert_eq!(wire, [3, 2, 5, 2, 6, 0]);
        wire.clear();
        encode_lost(&mut wire);
        assert_eq!(wire, [2, 3, 0]);
        assert_eq!(records(&wire, 1), [Record::Lost]);
    }

    #[test]
    fn a_beginning_is_found_behind_half_a_record() {
        let mut wire = Vec::new();
        // A content that would like to be a beginning.
        let mut evil = Vec::new();
        encode_sync(&[1; 16], &mut evil);
        encode(&evil.repeat(1000), &mut wire);
        wire.truncate(wire.len() / 2);
        encode_sync(&[2; 16], &mut wire);
        let found = records(&wire, 100);
        let syncs: Vec<_> =
            found.iter().filter(|record| matches!(record, Record::Sync(_))).collect();
        assert_eq!(syncs, [&Record::Sync([2; 16])]);
    }

    #[test]
    fn what_is_too_long_is_skipped_and_not_kept() {
        let mut decoder = Decoder::new();
        for _ in 0..1000 {
            decoder.extend(&[1; 4096]);
            assert_eq!(decoder.next_record(), None);
            assert!(decoder.buffer.len() <= RECORD_MAX + 4096);
        }
        let mut wire = Vec::new();
        encode_sync(&[3; 16], &mut wire);
        decoder.extend(&wire);
        assert_eq!(decoder.next_record(), Some(Record::Sync([3; 16])));
    }

    proptest! {
        #[test]
        fn bytes_come_back_whatever_they_are_and_however_cut(
            bytes in prop::collection::vec(prop_oneof![Just(0_u8), any::<u8>()], 0..40_000),
            cut in 1_usize..5_000,
        ) {
            let mut wire = Vec::new();
            encode(&bytes, &mut wire);
            prop_assert_eq!(pieces(records(&wire, cut)), bytes);
        }

        #[test]
        fn long_runs_come_back(lens in prop::collection::vec(250_usize..520, 0..8)) {
            let mut bytes = Vec::new();
            for len in lens {
                bytes.extend(std::iter::repeat_n(9, len));
                bytes.push(0);
            }
            let mut wire = Vec::new();
            encode(&bytes, &mut wire);
            prop_assert_eq!(pieces(records(&wire, 77)), bytes);
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..3_000)) {
            records(&bytes, 100);
        }
    }
}
