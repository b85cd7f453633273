//! From entries to the compiled form.
//!
//! A [`Builder`] keeps drafts of the records, 37, 41 or 53 bytes each, and their text apart from them, so that
//! drafts can be sorted. Each is its record without text, and between what the record knows content by and the
//! rest: 1 byte that says whether it has no name, and 8 that say where its text begins. Of entries that say the same (digest, size, verdict) one stays: one with a name before one
//! without, then the first.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};

use crate::digest::Kind;
use crate::format::{
    ANY_SIZE, HEADER, Header, LONGEST_FIXED, SetError, Tail, Verdict, checked, checksum_mut,
    encode_line, encode_lists, fixed_length, identity_length,
};
use crate::parse::Entry;

/// Bytes written at a time: what is written in large pieces lies in large ones in the page cache too, and a
/// lookup finds them faster.
const PIECE: usize = 4 << 20;
/// Bytes that a draft has and its record has not.
const EXTRA: usize = 9;

/// Bytes of a draft of this kind.
const fn draft_length(kind: Kind) -> usize {
    fixed_length(kind) + EXTRA
}

/// Collects entries, and writes them.
#[derive(Default)]
pub struct Builder {
    /// Drafts of each kind, one after the other.
    drafts: [Vec<u8>; 3],
    text: Vec<u8>,
    lists: Vec<String>,
}

impl Builder {
    /// Without an entry.
    pub fn new() -> Self {
        Self::default()
    }

    /// Names the list that the following entries come from.
    pub fn list(&mut self, name: String) {
        self.lists.push(name);
    }

    /// Adds what line `line` of the current list says.
    pub fn add(&mut self, entry: &Entry, verdict: Verdict, line: u32) -> Result<(), SetError> {
        let kind = entry.digest.kind();
        let drafts = &mut self.drafts[kind as usize];
        let count = (drafts.len() / draft_length(kind)) as u64;
        // What is allowed belongs to no family.
        let family = if verdict == Verdict::Allowed { "" } else { &entry.family };
        let length = |text: &str| u8::try_from(text.len()).unwrap_or(u8::MAX);
        let tail = Tail {
            size: entry.size.unwrap_or(ANY_SIZE),
            verdict,
            severity: entry.severity,
            name: length(&entry.name),
            family: length(family),
        };
        let memory = |_| SetError::Memory { entries: count + 1 };
        drafts.try_reserve(draft_length(kind)).map_err(memory)?;
        self.text.try_reserve(tail.text_length()).map_err(memory)?;
        let place = self.text.len() as u64;
        if tail.is_line() {
            let list = u32::try_from(self.lists.len().saturating_sub(1)).unwrap_or(u32::MAX);
            self.text.extend_from_slice(&encode_line(list, line));
        } else {
            self.text.extend_from_slice(&entry.name.as_bytes()[..usize::from(tail.name)]);
            self.text.extend_from_slice(&family.as_bytes()[..usize::from(tail.family)]);
        }
        let mut record = Vec::with_capacity(LONGEST_FIXED);
        tail.encode(entry.digest.bytes(), &mut record);
        let (known_by, rest) = record.split_at(identity_length(kind));
        drafts.extend_from_slice(known_by);
        drafts.push(u8::from(tail.name == 0));
        drafts.extend_from_slice(&place.to_be_bytes());
        drafts.extend_from_slice(rest);
        Ok(())
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.drafts.iter().all(Vec::is_empty)
    }

    /// Writes the compiled form to an empty file, and tells the number of its records.
    pub fn write(mut self, file: &mut File) -> Result<u64, SetError> {
        for (kind, drafts) in Kind::ALL.into_iter().zip(&mut self.drafts) {
            normalise(kind, drafts);
        }
        let lists = encode_lists(&self.lists);
        let count = |kind: Kind| (self.drafts[kind as usize].len() / draft_length(kind)) as u64;
        let header = Header {
            records: Kind::ALL.map(count),
            lists: lists.len() as u64,
            text: self.records().map(|(_, _, text)| text.len() as u64).sum(),
        };
        let mut bytes = header.encode();
        let mut hasher = blake3::Hasher::new();
        hasher.update(checked(&bytes));
        file.seek(SeekFrom::Start(HEADER as u64))?;
        let mut out = BufWriter::with_capacity(PIECE, Hashed { file, hasher, length: 0 });
        out.write_all(&lists)?;
        for (known_by, rest, text) in self.records() {
            out.write_all(known_by)?;
            out.write_all(rest)?;
            out.write_all(text)?;
        }
        let out = out.into_inner().map_err(|error| error.into_error())?;
        checksum_mut(&mut bytes).copy_from_slice(out.hasher.finalize().as_bytes());
        // What could not be read again is no compiled list: without its header it is none.
        Header::decode(&bytes, out.length + HEADER as u64)?;
        out.file.seek(SeekFrom::Start(0))?;
        out.file.write_all(&bytes)?;
        Ok(header.records.iter().sum())
    }

    /// The records in their order: what each knows content by, the rest, the text.
    fn records(&self) -> impl Iterator<Item = (&[u8], &[u8], &[u8])> {
        Kind::ALL.into_iter().zip(&self.drafts).flat_map(move |(kind, drafts)| {
            drafts.chunks_exact(draft_length(kind)).map(move |draft| self.record(kind, draft))
        })
    }

    fn record<'b>(&'b self, kind: Kind, draft: &'b [u8]) -> (&'b [u8], &'b [u8], &'b [u8]) {
        let (known_by, extra) = draft.split_at(identity_length(kind));
        let (extra, rest) = extra.split_at(EXTRA);
        let place = crate::digest::key(&extra[1..]) as usize;
        let fixed = [known_by, rest].concat();
        let length = Tail::decode(kind, &fixed).map_or(0, |tail| tail.text_length());
        (known_by, rest, &self.text[place..][..length])
    }
}

/// Writes a file, and hashes what it writes.
struct Hashed<'f> {
    file: &'f mut File,
    hasher: blake3::Hasher,
    length: u64,
}

impl Write for Hashed<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        self.length += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

/// Sorts drafts, and keeps one of those that say the same.
fn normalise(kind: Kind, drafts: &mut Vec<u8>) {
    match kind {
        Kind::Md5 => sort::<{ draft_length(Kind::Md5) }>(drafts),
        Kind::Sha1 => sort::<{ draft_length(Kind::Sha1) }>(drafts),
        Kind::Sha256 => sort::<{ draft_length(Kind::Sha256) }>(drafts),
    }
    let (length, identity) = (draft_length(kind), identity_length(kind));
    let mut kept = 0;
    for at in (0..drafts.len()).step_by(length) {
        let same = kept > 0 && drafts[kept - length..][..identity] == drafts[at..][..identity];
        if !same {
            drafts.copy_within(at..at + length, kept);
            kept += length;
        }
    }
    drafts.truncate(kept);
}

fn sort<const LENGTH: usize>(drafts: &mut [u8]) {
    drafts.as_chunks_mut::<LENGTH>().0.sort_unstable();
}
