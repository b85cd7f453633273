//! A compiled file in use: an index in memory, the rest read when it is asked for.
//!
//! In memory are the first eight bytes of each digest, sorted, and a table that narrows a search to
//! some eight of them: together about 8.4 bytes for an entry. Content that is in no list is answered
//! from there. Where eight bytes agree, the record is read from the file and says whether the whole
//! digest and the size do: nothing is denied or allowed on less.
//!
//! The descriptor is opened before the sandbox and only read at offsets. The file must not be
//! changed in place while it is in use, only replaced; a record that no longer is what the index
//! says is an error of that scan, not a clean one.

use std::cmp::Ordering;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use seawall_engine::Severity;

use crate::digest::{Digest, Kind, key};
use crate::format::{
    ANY_SIZE, HEADER, Header, LONGEST_RECORD, SetError, Tail, Verdict, checked, checksum,
    decode_lists, identity_length, record_length,
};
use crate::parse::readable;

/// Bytes read from a file at a time while it is loaded.
const PIECE: usize = 2 << 20;
/// Records that are read at once rather than searched.
const FEW: usize = 8;
/// Entries that a search is narrowed to, on average, as a power of two.
const NARROW: u32 = 3;

/// Entries ready to be asked.
pub struct Set {
    file: File,
    indexes: [Index; 3],
    lists: Vec<String>,
    text: u64,
    text_length: u64,
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
        let text = header.places().1;
        Ok(Self { file, indexes, lists, text, text_length: header.text, checksum: sum })
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
        if end - first <= FEW {
            return self.find_among(index, digest, size, (first, end), hits);
        }
        for size in [size, ANY_SIZE] {
            self.find_sized(index, digest, size, (first, end), hits)?;
        }
        Ok(())
    }

    /// Looks through few records whose eight first bytes agree, which is nearly always one: a read
    /// costs far more than a search in memory.
    fn find_among(
        &self,
        index: &Index,
        digest: &Digest,
        size: u64,
        (first, end): (usize, usize),
        hits: &mut Vec<Hit>,
    ) -> io::Result<()> {
        let length = record_length(index.kind);
        let mut buffer = [0; FEW * LONGEST_RECORD];
        let records = &mut buffer[..(end - first) * length];
        self.file.read_exact_at(records, index.place + (first * length) as u64)?;
        for record in records.chunks_exact(length) {
            let tail = self.checked(record, digest.key())?;
            if record.starts_with(digest.bytes()) && [size, ANY_SIZE].contains(&tail.size) {
                hits.push(self.hit(digest, &tail)?);
            }
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
        hits: &mut Vec<Hit>,
    ) -> io::Result<()> {
        let wanted = (digest.bytes(), size);
        let mut buffer = [0; LONGEST_RECORD];
        let record = &mut buffer[..record_length(index.kind)];
        let mut read = |at: usize| {
            self.file.read_exact_at(record, index.place + (at * record.len()) as u64)?;
            let tail = self.checked(record, digest.key())?;
            let order = (&record[..index.kind.length()], tail.size).cmp(&wanted);
            Ok::<_, io::Error>((order, tail))
        };
        let mut high = end;
        while low < high {
            let middle = low.midpoint(high);
            if read(middle)?.0 == Ordering::Less {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        // One that allows and one that denies.
        for at in low..end.min(low + 2) {
            match read(at)? {
                (Ordering::Equal, tail) => hits.push(self.hit(digest, &tail)?),
                _ => break,
            }
        }
        Ok(())
    }

    /// What a record says that was read anew and whose digest should begin with `key`.
    fn checked(&self, record: &[u8], key: u64) -> io::Result<Tail> {
        Tail::decode(record)
            .filter(|tail| {
                crate::digest::key(record) == key
                    && tail.is_sound(self.lists.len(), self.text_length)
            })
            .ok_or_else(|| io::Error::other("the compiled list was changed while in use"))
    }

    fn hit(&self, digest: &Digest, tail: &Tail) -> io::Result<Hit> {
        let mut text = [0; 2 * u8::MAX as usize];
        let (name, family) = (usize::from(tail.name), usize::from(tail.family));
        let name = if let Some((list, line)) = tail.line() {
            let list = self.lists.get(list as usize).map_or("", String::as_str);
            format!("{list}:{line}")
        } else {
            self.file.read_exact_at(&mut text[..name + family], self.text + tail.text)?;
            match name {
                0 => format!("Hash.{}.{:016x}", digest.kind(), digest.key()),
                _ => readable(&text[..name]),
            }
        };
        let family = (family > 0).then(|| readable(&text[usize::from(tail.name)..][..family]));
        Ok(Hit { verdict: tail.verdict, name, family, severity: tail.severity })
    }
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
    let (places, _) = header.places();
    let mut read = |kind: Kind| {
        let (place, count) = (places[kind as usize], header.records[kind as usize]);
        Index::read(reader, kind, place, count, &|tail| tail.is_sound(lists.len(), header.text))
    };
    let indexes = [read(Kind::Md5)?, read(Kind::Sha1)?, read(Kind::Sha256)?];
    if reader.skip(header.text)? != header.text {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
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

/// The records of one kind, as far as they are in memory.
struct Index {
    kind: Kind,
    /// Where the records begin in the file.
    place: u64,
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
    /// Reads `count` records and checks them: in order, each only once, each `sound`.
    fn read(
        reader: &mut Hashing<'_>,
        kind: Kind,
        place: u64,
        count: u64,
        sound: &dyn Fn(&Tail) -> bool,
    ) -> Result<Self, SetError> {
        let memory = || SetError::Memory { entries: count };
        let entries = usize::try_from(count).map_err(|_| memory())?;
        let bits = count.max(1).ilog2().saturating_sub(NARROW);
        let mut index = Self {
            kind,
            place,
            keys: Vec::new(),
            starts: Vec::new(),
            shift: 64 - bits,
            sizes: Sizes::none(),
            allowed: 0,
        };
        index.keys.try_reserve_exact(entries).map_err(|_| memory())?;
        index.starts.try_reserve_exact((1 << bits) + 1).map_err(|_| memory())?;
        let (length, identity) = (record_length(kind), identity_length(kind));
        let mut buffer = vec![0; (PIECE / length).min(entries) * length];
        let mut before = [0; LONGEST_RECORD];
        let mut left = entries;
        while left > 0 {
            let piece = left.min(buffer.len() / length);
            reader.read_exact(&mut buffer[..piece * length])?;
            for record in buffer[..piece * length].chunks_exact(length) {
                let first = index.keys.is_empty();
                if !first && before[..identity] >= record[..identity] {
                    return Err(SetError::Content { what: "its records are not in order" });
                }
                before[..length].copy_from_slice(record);
                let tail = Tail::decode(record).filter(|tail| sound(tail));
                let tail = tail.ok_or(SetError::Content { what: "a record makes no sense" })?;
                index.push(key(record), &tail);
            }
            left -= piece;
        }
        let all = index.keys.len() as u32;
        index.starts.resize((1 << bits) + 1, all);
        Ok(index)
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
