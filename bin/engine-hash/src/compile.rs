//! From entries to the compiled form.
//!
//! A [`Builder`] keeps the records as they will lie in the file: 37, 41 or 53 bytes each, and their
//! text. Of entries that say the same (digest, size, verdict) one stays: one with a name before one
//! without, then the first.

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};

use crate::digest::Kind;
use crate::format::{
    ANY_SIZE, HEADER, Header, SetError, Tail, Verdict, checked, checksum_mut, encode_lists,
    identity_length, record_length,
};
use crate::parse::Entry;

/// Collects entries, and writes them.
#[derive(Default)]
pub struct Builder {
    /// Records of each kind, one after the other.
    records: [Vec<u8>; 3],
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
        let records = &mut self.records[entry.digest.kind() as usize];
        let count = (records.len() / record_length(entry.digest.kind())) as u64;
        // What is allowed belongs to no family.
        let family = if verdict == Verdict::Allowed { "" } else { &entry.family };
        let memory = |_| SetError::Memory { entries: count + 1 };
        records.try_reserve(record_length(entry.digest.kind())).map_err(memory)?;
        self.text.try_reserve(entry.name.len() + family.len()).map_err(memory)?;
        let text = if !entry.name.is_empty() || !family.is_empty() {
            self.text.len() as u64
        } else if verdict == Verdict::Allowed {
            (self.lists.len().saturating_sub(1) as u64) << 32 | u64::from(line)
        } else {
            0
        };
        self.text.extend_from_slice(entry.name.as_bytes());
        self.text.extend_from_slice(family.as_bytes());
        let length = |text: &str| u8::try_from(text.len()).unwrap_or(u8::MAX);
        let tail = Tail {
            size: entry.size.unwrap_or(ANY_SIZE),
            verdict,
            text,
            severity: entry.severity,
            name: length(&entry.name),
            family: length(family),
        };
        tail.encode(&entry.digest, records);
        Ok(())
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.records.iter().all(Vec::is_empty)
    }

    /// Writes the compiled form to an empty file, and tells the number of its records.
    pub fn write(mut self, file: &mut File) -> Result<u64, SetError> {
        for (kind, records) in Kind::ALL.into_iter().zip(&mut self.records) {
            normalise(kind, records);
        }
        let lists = encode_lists(&self.lists);
        let count = |kind: Kind| (self.records[kind as usize].len() / record_length(kind)) as u64;
        let header = Header {
            records: Kind::ALL.map(count),
            lists: lists.len() as u64,
            text: self.text.len() as u64,
        };
        let mut bytes = header.encode();
        let mut hasher = blake3::Hasher::new();
        hasher.update(checked(&bytes));
        let [md5, sha1, sha256] = &self.records;
        let parts = [&lists, md5, sha1, sha256, &self.text];
        for part in parts {
            hasher.update(part);
        }
        checksum_mut(&mut bytes).copy_from_slice(hasher.finalize().as_bytes());
        // What could not be read again is not written.
        let length = parts.iter().map(|part| part.len() as u64).sum::<u64>() + HEADER as u64;
        Header::decode(&bytes, length)?;
        write_all(file, &bytes, &parts)?;
        Ok(header.records.iter().sum())
    }
}

fn write_all(file: &mut File, header: &[u8], parts: &[&Vec<u8>]) -> io::Result<()> {
    file.seek(SeekFrom::Start(0))?;
    let mut out = BufWriter::new(file);
    out.write_all(header)?;
    parts.iter().try_for_each(|part| out.write_all(part))?;
    out.flush()
}

/// Sorts records, and keeps one of those that say the same.
fn normalise(kind: Kind, records: &mut Vec<u8>) {
    match kind {
        Kind::Md5 => sort::<{ record_length(Kind::Md5) }>(records),
        Kind::Sha1 => sort::<{ record_length(Kind::Sha1) }>(records),
        Kind::Sha256 => sort::<{ record_length(Kind::Sha256) }>(records),
    }
    let (length, identity) = (record_length(kind), identity_length(kind));
    let mut kept = 0;
    for at in (0..records.len()).step_by(length) {
        let same = kept > 0 && records[kept - length..][..identity] == records[at..][..identity];
        if !same {
            records.copy_within(at..at + length, kept);
            kept += length;
        }
    }
    records.truncate(kept);
}

fn sort<const LENGTH: usize>(records: &mut [u8]) {
    records.as_chunks_mut::<LENGTH>().0.sort_unstable();
}
