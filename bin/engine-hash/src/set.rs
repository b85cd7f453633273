//! A compiled file in use: an index in memory, the rest read when it is asked for.
//!
//! In memory are the first eight bytes of each digest, sorted, a table that narrows a search to some
//! eight of them, and where each record lies: together about 12.5 bytes for an entry. Content that is in no
//! list is answered from there. Where eight bytes agree, the record is read from the file, with its name,
//! and says whether the whole digest and the size agree too: nothing is denied or allowed on less.
//!
//! The file is mapped before the sandbox, and stays in the page cache, which the kernel takes back when it needs
//! memory. It must not be changed in place while it is in use, only replaced; a record that no longer is what the
//! index says, or is gone, is an error of that scan, not a clean one.

use std::cmp::Ordering;
use std::fs::File;
use std::hint::black_box;
use std::io::{self, Read};

use seawall_engine::Severity;

use crate::digest::{Digest, Kind, key};
use crate::format::{
    ANY_SIZE, HEADER, Header, LONGEST_RECORD, SetError, Tail, Verdict, checked, checksum,
    decode_line, decode_lists, fixed_length, identity_length,
};
use crate::mapped::{Mapped, in_huge_pages};
use crate::parse::readable;

/// Bytes read from a file at a time while it is loaded.
const PIECE: usize = 2 << 20;
/// Records with one digest's beginning that are read one by one rather than searched.
const FEW: usize = 8;
/// Records whose places are counted from the first of them: four bytes each are enough.
const BLOCK: usize = 4096;
/// Entries that a search is narrowed to, on average, as a power of two.
const NARROW: u32 = 3;

/// Entries ready to be asked.
pub struct Set {
    file: Mapped,
    indexes: [Index; 3],
    lists: Vec<String>,
    checksum: [u8; 32],
}

/// What an entry says of content that it knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hit {
    /// Allowed or denied.
    pub verdict: Verdict,
    /// Name of the entry; of one that has none, its list and line if it allows, else a name made
    /// from the digest.
    pub name: String,
    /// Malware family.
    pub family: Option<String>,
    /// How bad it is.
    pub severity: Severity,
}

impl Set {
    /// Reads and checks a whole compiled file.
    pub fn load(file: File) -> Result<Self, SetError> {
        let length = file.metadata()?.len();
        let mut bytes = [0; HEADER];
        if length < HEADER as u64 {
            let mut start = Vec::new();
            (&file).take(4).read_to_end(&mut start)?;
            return Err(match start == crate::format::MAGIC {
                true => SetError::Length { expected: HEADER as u64, got: length },
                false => SetError::Magic,
            });
        }
        let mut reader = Hashing { file: &file, hasher: blake3::Hasher::new() };
        (&file).read_exact(&mut bytes)?;
        let header = Header::decode(&bytes, length)?;
        reader.hasher.update(checked(&bytes));
        // Damage shows best in the checksum: whatever else is wrong is told only when that is right.
        let parsed = read_all(&mut reader, &header);
        let (lists, indexes) = match parsed {
            Err(SetError::Content { what }) => {
                reader.skip(length)?;
                return Err(match reader.hasher.finalize().as_bytes() == checksum(&bytes) {
                    true => SetError::Content { what },
                    false => SetError::Checksum,
                });
            }
            other => other?,
        };
        let sum = *reader.hasher.finalize().as_bytes();
        if sum != checksum(&bytes) {
            return Err(SetError::Checksum);
        }
        Ok(Self { file: Mapped::new(file)?, indexes, lists, checksum: sum })
    }

    /// Number of entries.
    pub fn len(&self) -> u64 {
        self.indexes.iter().map(|index| index.keys.len() as u64).sum()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The checksum of the file: equal where everything that a verdict depends on is.
    pub fn checksum(&self) -> &[u8; 32] {
        &self.checksum
    }

    /// Number of allowed ones among the entries of a kind.
    pub fn allowed(&self, kind: Kind) -> u64 {
        self.indexes[kind as usize].allowed
    }

    /// Whether a digest of this kind can be in the set, of content of `size` bytes.
    pub fn wants(&self, kind: Kind, size: u64) -> bool {
        self.indexes[kind as usize].sizes.may_hold(size)
    }

    /// Adds what the set says of content with this digest and `size` bytes to `hits`: at most four,
    /// since an entry may be of that size or of any, and allow or deny. An error says that the file
    /// changed or cannot be read.
    pub fn find(&self, digest: &Digest, size: u64, hits: &mut Vec<Hit>) -> io::Result<()> {
        let index = &self.indexes[digest.kind() as usize];
        let (first, end) = index.candidates(digest.key());
        if first == end {
            return Ok(());
        }
        let mut buffer = [0; LONGEST_RECORD];
        // Nearly always there is one.
        if end - first <= FEW {
            for at in first..end {
                let record = self.record(index, at, digest, &mut buffer)?;
                if record.digest == digest.bytes() && [size, ANY_SIZE].contains(&record.tail.size) {
                    hits.push(self.hit(digest, &record)?);
                }
            }
            return Ok(());
        }
        for size in [size, ANY_SIZE] {
            self.find_sized(index, digest, size, (first, end), &mut buffer, hits)?;
        }
        Ok(())
    }

    /// Searches among many records for those with exactly this digest and size.
    fn find_sized(
        &self,
        index: &Index,
        digest: &Digest,
        size: u64,
        (mut low, end): (usize, usize),
        buffer: &mut [u8],
        hits: &mut Vec<Hit>,
    ) -> io::Result<()> {
        let mut high = end;
        while low < high {
            let middle = low.midpoint(high);
            if self.record(index, middle, digest, buffer)?.cmp(digest, size) == Ordering::Less {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        // One that allows and one that denies.
        for at in low..end.min(low + 2) {
            let record = self.record(index, at, digest, buffer)?;
            if record.cmp(digest, size) != Ordering::Equal {
                break;
            }
            hits.push(self.hit(digest, &record)?);
        }
        Ok(())
    }

    /// Record number `at`, whose digest should begin as this one.
    fn record<'b>(
        &self,
        index: &Index,
        at: usize,
        digest: &Digest,
        buffer: &'b mut [u8],
    ) -> io::Result<Record<'b>> {
        let (start, end) = (index.place(at), index.place(at + 1));
        // What it was when it was loaded: no longer than the longest.
        let bytes = buffer.get_mut(..(end - start) as usize).ok_or_else(changed)?;
        self.file.read(start, bytes)?;
        match Record::split(index.kind, bytes) {
            Some((record, [])) if key(record.digest) == digest.key() => {
                // Nothing is allowed, and no digest another one, because zeros follow the end of a file that was cut
                // short: then there is nothing else behind them either.
                let may_be_cut = record.text.iter().all(|byte| *byte == 0);
                let is_allowed = record.tail.verdict == Verdict::Allowed;
                if is_allowed && may_be_cut || record.digest != digest.bytes() {
                    self.file.check()?;
                }
                Ok(record)
            }
            _ => Err(changed()),
        }
    }

    fn hit(&self, digest: &Digest, record: &Record<'_>) -> io::Result<Hit> {
        let Record { tail, text, .. } = record;
        let (name, family) = text.split_at_checked(usize::from(tail.name)).ok_or_else(changed)?;
        let name = if tail.is_line() {
            let (list, line) = decode_line(text);
            let list = self.lists.get(list as usize).ok_or_else(changed)?;
            format!("{list}:{line}")
        } else if name.is_empty() {
            format!("Hash.{}.{:016x}", digest.kind(), digest.key())
        } else {
            readable(name)
        };
        let family = (tail.family > 0).then(|| readable(family));
        Ok(Hit { verdict: tail.verdict, name, family, severity: tail.severity })
    }
}

/// One record as it lies in the file.
struct Record<'b> {
    /// What no other record shares; the digest first.
    known_by: &'b [u8],
    digest: &'b [u8],
    tail: Tail,
    text: &'b [u8],
}

impl<'b> Record<'b> {
    /// The record at the beginning of `bytes`, and what follows it. None when it is cut off or makes no sense.
    fn split(kind: Kind, bytes: &'b [u8]) -> Option<(Self, &'b [u8])> {
        let tail = Tail::decode(kind, bytes)?;
        let (fixed, rest) = bytes.split_at_checked(fixed_length(kind))?;
        let (text, rest) = rest.split_at_checked(tail.text_length())?;
        let (known_by, digest) = (&fixed[..identity_length(kind)], &fixed[..kind.length()]);
        Some((Self { known_by, digest, tail, text }, rest))
    }

    fn cmp(&self, digest: &Digest, size: u64) -> Ordering {
        (self.digest, self.tail.size).cmp(&(digest.bytes(), size))
    }
}

/// What was read anew is not what the index says.
fn changed() -> io::Error {
    io::Error::other("the compiled list was changed while in use")
}

/// Everything after the header, in its order.
fn read_all(
    reader: &mut Hashing<'_>,
    header: &Header,
) -> Result<(Vec<String>, [Index; 3]), SetError> {
    // At most MOST_LISTS bytes, as the header's decoder saw to.
    let mut names = vec![0; usize::try_from(header.lists).unwrap_or_default()];
    reader.read_exact(&mut names)?;
    let lists = decode_lists(&names).ok_or(SetError::Content { what: "list names are cut off" })?;
    let place = HEADER as u64 + header.lists;
    let mut walk = Walk { reader, window: Vec::new(), at: 0, place, left: header.body(), text: 0 };
    let mut read =
        |kind: Kind| Index::read(&mut walk, kind, header.records[kind as usize], lists.len());
    let indexes = [read(Kind::Md5)?, read(Kind::Sha1)?, read(Kind::Sha256)?];
    if walk.text != header.text {
        return Err(SetError::Content { what: "its texts are not as long as it says" });
    }
    Ok((lists, indexes))
}

/// Reads a file, and hashes what it reads.
struct Hashing<'f> {
    file: &'f File,
    hasher: blake3::Hasher,
}

impl Hashing<'_> {
    /// Hashes the next `most` bytes, or all that are left, and tells how many they were.
    fn skip(&mut self, most: u64) -> io::Result<u64> {
        let mut buffer = vec![0; PIECE.min(usize::try_from(most).unwrap_or(PIECE))];
        let mut done = 0;
        while done < most {
            let wanted = (buffer.len() as u64).min(most - done) as usize;
            match self.read(&mut buffer[..wanted])? {
                0 => break,
                count => done += count as u64,
            }
        }
        Ok(done)
    }
}

impl Read for Hashing<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        Ok(count)
    }
}

const _: () = assert!(BLOCK * LONGEST_RECORD < u32::MAX as usize);

const NO_SENSE: SetError = SetError::Content { what: "a record makes no sense" };

/// Goes through the records of a file from the first to the last.
struct Walk<'r, 'f> {
    reader: &'r mut Hashing<'f>,
    /// A part of the file.
    window: Vec<u8>,
    /// Where the next record begins in it.
    at: usize,
    /// Where it begins in the file.
    place: u64,
    /// Bytes that are not in the window yet.
    left: u64,
    /// Bytes of text in the records so far.
    text: u64,
}

impl Walk<'_, '_> {
    /// The next record, which is of this kind.
    fn next(&mut self, kind: Kind) -> Result<Record<'_>, SetError> {
        if self.window.len() - self.at < LONGEST_RECORD && self.left > 0 {
            self.window.drain(..self.at);
            self.at = 0;
            let kept = self.window.len();
            let more = self.left.min(PIECE as u64);
            self.window.resize(kept + more as usize, 0);
            self.reader.read_exact(&mut self.window[kept..])?;
            self.left -= more;
        }
        let bytes = &self.window[self.at..];
        let (record, rest) = Record::split(kind, bytes).ok_or(NO_SENSE)?;
        let length = bytes.len() - rest.len();
        self.at += length;
        self.place += length as u64;
        self.text += record.text.len() as u64;
        Ok(record)
    }
}

/// The records of one kind, as far as they are in memory.
struct Index {
    kind: Kind,
    /// Where each block begins in the file.
    blocks: Vec<u64>,
    /// Where each record begins, counted from its block; then where the last one ends.
    places: Vec<u32>,
    /// The first eight bytes of each record's digest, in the records' order.
    keys: Vec<u64>,
    /// For each value of a key's upper bits, the number of keys that are below it; then of all.
    starts: Vec<u32>,
    /// How far a key is shifted to get its upper bits.
    shift: u32,
    sizes: Sizes,
    allowed: u64,
}

impl Index {
    /// Reads `count` records and checks them: in order, each only once, each of them with sense.
    fn read(
        walk: &mut Walk<'_, '_>,
        kind: Kind,
        count: u64,
        lists: usize,
    ) -> Result<Self, SetError> {
        let memory = || SetError::Memory { entries: count };
        let entries = usize::try_from(count).map_err(|_| memory())?;
        let bits = count.max(1).ilog2().saturating_sub(NARROW);
        let mut index = Self {
            kind,
            blocks: Vec::new(),
            places: Vec::new(),
            keys: Vec::new(),
            starts: Vec::new(),
            shift: 64 - bits,
            sizes: Sizes::none(),
            allowed: 0,
        };
        index.keys.try_reserve_exact(entries).map_err(|_| memory())?;
        index.starts.try_reserve_exact((1 << bits) + 1).map_err(|_| memory())?;
        index.places.try_reserve_exact(entries + 1).map_err(|_| memory())?;
        in_huge_pages(&index.keys);
        in_huge_pages(&index.places);
        let mut before = [0; LONGEST_RECORD];
        let before = &mut before[..identity_length(kind)];
        for at in 0..entries {
            index.push_place(at, walk.place);
            let record = walk.next(kind)?;
            if at > 0 && *before >= *record.known_by {
                return Err(SetError::Content { what: "its records are not in order" });
            }
            before.copy_from_slice(record.known_by);
            if record.tail.is_line() && decode_line(record.text).0 as usize >= lists {
                return Err(NO_SENSE);
            }
            index.push(key(record.digest), &record.tail);
        }
        index.push_place(entries, walk.place);
        let all = index.keys.len() as u32;
        index.starts.resize((1 << bits) + 1, all);
        Ok(index)
    }

    fn push_place(&mut self, at: usize, place: u64) {
        if at.is_multiple_of(BLOCK) {
            self.blocks.push(place);
        }
        self.places.push((place - self.blocks[at / BLOCK]) as u32);
    }

    /// Where record number `at` begins, and the one before it ends.
    fn place(&self, at: usize) -> u64 {
        self.blocks[at / BLOCK] + u64::from(self.places[at])
    }

    fn push(&mut self, key: u64, tail: &Tail) {
        let below = self.keys.len() as u32;
        let upper = self.upper(key);
        if self.starts.len() <= upper {
            self.starts.resize(upper + 1, below);
        }
        self.keys.push(key);
        self.sizes.add(tail.size);
        self.allowed += u64::from(tail.verdict == Verdict::Allowed);
    }

    /// A key's upper bits.
    fn upper(&self, key: u64) -> usize {
        key.checked_shr(self.shift).unwrap_or_default() as usize
    }

    /// The first of the records whose digest begins with `key`, and the one after the last.
    fn candidates(&self, key: u64) -> (usize, usize) {
        let upper = self.upper(key);
        let (start, end) = (self.starts[upper] as usize, self.starts[upper + 1] as usize);
        // Fetched while the keys are: nothing waits for it.
        black_box(self.places[start]);
        let keys = &self.keys[start..end];
        let first = keys.partition_point(|one| *one < key);
        let count = keys[first..].partition_point(|one| *one == key);
        (start + first, start + first + count)
    }
}

/// The sizes that entries ask for, roughly: what is not among them needs no digest.
struct Sizes {
    any: bool,
    /// One bit for all sizes with the same [`Self::place`]; none while no entry has a size.
    bits: Vec<u64>,
}

impl Sizes {
    /// 2^20 bits: 128 KiB.
    const BITS: u32 = 20;

    fn none() -> Self {
        Self { any: false, bits: Vec::new() }
    }

    /// Sizes close to each other lie far from each other, and so seldom share a bit.
    fn place(size: u64) -> (usize, u64) {
        // 2^64 divided by the golden ratio (Knuth, volume 3, 6.4).
        let place = size.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - Self::BITS);
        ((place / 64) as usize, 1 << (place % 64))
    }

    fn add(&mut self, size: u64) {
        if size == ANY_SIZE {
            self.any = true;
            return;
        }
        if self.bits.is_empty() {
            self.bits.resize(1 << (Self::BITS - 6), 0);
        }
        let (word, bit) = Self::place(size);
        self.bits[word] |= bit;
    }

    fn may_hold(&self, size: u64) -> bool {
        let (word, bit) = Self::place(size);
        self.any || self.bits.get(word).is_some_and(|word| word & bit != 0)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
