//! The compiled form: how entries lie in a file.
//!
//! All numbers are big endian, so that records sort as bytes. Nothing is aligned.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | magic `SWHL` |
//! | 4 | 2 | version |
//! | 6 | 2 | feature bits; none is defined, a reader refuses those it does not know |
//! | 8 | 3 × 8 | number of MD5, SHA-1 and SHA-256 records |
//! | 32 | 8 | bytes of list names, at most [`MOST_LISTS`] |
//! | 40 | 8 | bytes of text in all records |
//! | 48 | 32 | BLAKE3 digest of the bytes before it and of all after it |
//! | 80 | – | list names: each a 2-byte length and the path below the folder of lists |
//! | – | – | MD5 records, SHA-1 records, SHA-256 records, each kind in ascending order |
//!
//! A record, with its text behind it: who finds one has read all of it at once.
//!
//! | size | field |
//! |---|---|
//! | 16, 20 or 32 | digest |
//! | 8 | size of the content in bytes; all ones = any |
//! | 1 | 0 = allowed, 1 = denied |
//! | 1 | severity: 0 low, 1 medium, 2 high, 3 critical |
//! | 1 | bytes of its name; 0 = it has none |
//! | 1 | bytes of its family |
//! | – | text: the name, then the family; of an allowed one without both: number of its list and line, 4 bytes each |
//!
//! Digest, size and verdict are what a record knows content by: no two records share all three.

use seawall_engine::Severity;

use crate::digest::{Kind, LONGEST};
use crate::parse::readable;

/// Version of the layout above.
///
/// 1: the first one. 2: a record's text lies behind it.
pub const VERSION: u16 = 2;
/// First four bytes of a compiled file.
pub const MAGIC: [u8; 4] = *b"SWHL";
/// Bytes before the list names.
pub const HEADER: usize = 80;
/// Bytes of the header that come before its checksum.
const CHECKED: usize = 48;
/// Most bytes of list names.
pub const MOST_LISTS: u64 = 16 << 20;
/// Bytes kept of a list's name, from its end: with a line behind it, it still fits a report.
const LONGEST_LIST: usize = 240;
/// Stands for any size.
pub const ANY_SIZE: u64 = u64::MAX;
/// Bytes of a record between its digest and its text.
const TAIL: usize = 12;
/// Most bytes of a record without its text.
pub const LONGEST_FIXED: usize = LONGEST + TAIL;
/// Most bytes of a record.
pub const LONGEST_RECORD: usize = LONGEST_FIXED + LONGEST_TEXT;
/// Most bytes of a record's text: a name and a family.
const LONGEST_TEXT: usize = 2 * u8::MAX as usize;
/// Bytes of the tail that belong to what a record knows content by.
const KNOWN_BY: usize = 9;
/// Bytes that name a list and a line.
const LINE: usize = 8;

/// Bytes of a record of this kind without its text.
pub const fn fixed_length(kind: Kind) -> usize {
    kind.length() + TAIL
}

/// Bytes of a record of this kind that no other one shares.
pub const fn identity_length(kind: Kind) -> usize {
    kind.length() + KNOWN_BY
}

/// What an entry says of its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// Known to be good.
    Allowed,
    /// Known to be bad.
    Denied,
}

/// Why a file is not used.
#[derive(Debug, thiserror::Error)]
pub enum SetError {
    /// The system said no.
    #[error("cannot read or write the compiled form: {0}")]
    Io(#[from] std::io::Error),
    /// Not ours.
    #[error("not a compiled list: it does not begin with SWHL; remove it or compile it anew")]
    Magic,
    /// Another version.
    #[error("version {VERSION} expected, {got} found; compile the lists anew with this program")]
    Version {
        /// The version found.
        got: u16,
    },
    /// Feature bits nobody defined.
    #[error("unknown feature bits {got:#06x}; compile the lists anew with this program")]
    Features {
        /// The bits found.
        got: u16,
    },
    /// Cut off, or with something after its end.
    #[error("{expected} bytes expected, {got} found: it is damaged; compile the lists anew")]
    Length {
        /// Bytes that the header announces; the largest number where it announces even more.
        expected: u64,
        /// Bytes of the file.
        got: u64,
    },
    /// Changed since it was written.
    #[error("its checksum is wrong: it is damaged; compile the lists anew")]
    Checksum,
    /// Whole, but not written by this program.
    #[error("{what}; compile the lists anew with this program")]
    Content {
        /// What is wrong.
        what: &'static str,
    },
    /// More than fits.
    #[error("no memory for {entries} entries; allow the engine more, or compile the lists first")]
    Memory {
        /// Entries that were to be kept.
        entries: u64,
    },
}

/// The header, without its checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Records of each kind.
    pub records: [u64; 3],
    /// Bytes of list names.
    pub lists: u64,
    /// Bytes of text.
    pub text: u64,
}

impl Header {
    /// As it lies in the file, with what is checked and the checksum's place left empty.
    pub fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_be_bytes());
        let numbers = self.records.iter().chain([&self.lists, &self.text]);
        for (place, number) in bytes[8..].chunks_exact_mut(8).zip(numbers) {
            place.copy_from_slice(&number.to_be_bytes());
        }
        bytes
    }

    /// Reads a header of a file of `length` bytes, and checks that both agree.
    pub fn decode(bytes: &[u8; HEADER], length: u64) -> Result<Self, SetError> {
        if bytes[..4] != MAGIC {
            return Err(SetError::Magic);
        }
        let got = u16::from_be_bytes([bytes[4], bytes[5]]);
        if got != VERSION {
            return Err(SetError::Version { got });
        }
        let got = u16::from_be_bytes([bytes[6], bytes[7]]);
        if got != 0 {
            return Err(SetError::Features { got });
        }
        let number = |at: usize| number(&bytes[at..at + 8]);
        let header = Self {
            records: [number(8), number(16), number(24)],
            lists: number(32),
            text: number(40),
        };
        let expected = header.file_length().unwrap_or(u64::MAX);
        if expected != length {
            return Err(SetError::Length { expected, got: length });
        }
        if header.lists > MOST_LISTS {
            return Err(SetError::Content { what: "too many list names" });
        }
        if header.records.iter().any(|records| *records > u64::from(u32::MAX)) {
            return Err(SetError::Content { what: "too many records" });
        }
        Ok(header)
    }

    /// Bytes of the whole file. None when that is more than a number can say.
    fn file_length(&self) -> Option<u64> {
        Kind::ALL.into_iter().try_fold(
            (HEADER as u64).checked_add(self.lists)?.checked_add(self.text)?,
            |sum, kind| sum.checked_add(self.records_length(kind)?),
        )
    }

    /// Bytes of all records. Only for a header that was decoded.
    pub fn body(&self) -> u64 {
        self.file_length().unwrap_or_default().saturating_sub(HEADER as u64 + self.lists)
    }

    /// Bytes of all records of a kind without their texts.
    fn records_length(&self, kind: Kind) -> Option<u64> {
        self.records[kind as usize].checked_mul(fixed_length(kind) as u64)
    }
}

/// The part of a header that its checksum covers.
pub fn checked(header: &[u8; HEADER]) -> &[u8] {
    &header[..CHECKED]
}

/// The checksum's place in a header.
pub fn checksum(header: &[u8; HEADER]) -> &[u8] {
    &header[CHECKED..]
}

/// The same, to write it.
pub fn checksum_mut(header: &mut [u8; HEADER]) -> &mut [u8] {
    &mut header[CHECKED..]
}

/// What a record says besides its digest, and how long its text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tail {
    /// Size of the content in bytes, or [`ANY_SIZE`].
    pub size: u64,
    /// What it says.
    pub verdict: Verdict,
    /// How bad it is.
    pub severity: Severity,
    /// Bytes of its name; 0 = it has none.
    pub name: u8,
    /// Bytes of its family.
    pub family: u8,
}

impl Tail {
    /// Appends a record without its text to `out`.
    pub fn encode(&self, digest: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(digest);
        out.extend_from_slice(&self.size.to_be_bytes());
        out.push(u8::from(self.verdict == Verdict::Denied));
        out.extend_from_slice(&[self.severity as u8, self.name, self.family]);
    }

    /// Reads a record that begins with a digest of this kind. None when it is cut off, or when no program
    /// writes such a one.
    pub fn decode(kind: Kind, record: &[u8]) -> Option<Self> {
        let tail = record.get(kind.length()..)?.first_chunk::<TAIL>()?;
        let verdict = match tail[8] {
            0 => Verdict::Allowed,
            1 => Verdict::Denied,
            _ => return None,
        };
        let severity = match tail[9] {
            0 => Severity::Low,
            1 => Severity::Medium,
            2 => Severity::High,
            3 => Severity::Critical,
            _ => return None,
        };
        let (name, family) = (tail[10], tail[11]);
        // What is allowed belongs to no family.
        let sound = verdict == Verdict::Denied || family == 0;
        sound.then_some(Self { size: number(&tail[..8]), verdict, severity, name, family })
    }

    /// Whether a list and line stand in for a name.
    pub fn is_line(&self) -> bool {
        self.verdict == Verdict::Allowed && self.name == 0
    }

    /// Bytes of its text.
    pub fn text_length(&self) -> usize {
        if self.is_line() { LINE } else { usize::from(self.name) + usize::from(self.family) }
    }
}

/// The text of a record whose name is a list and a line.
pub fn encode_line(list: u32, line: u32) -> [u8; LINE] {
    (u64::from(list) << 32 | u64::from(line)).to_be_bytes()
}

/// Number of the list, and the line.
pub fn decode_line(text: &[u8]) -> (u32, u32) {
    let both = number(text);
    // The upper and the lower half.
    ((both >> 32) as u32, both as u32)
}

/// Encodes the names of lists.
pub fn encode_lists(lists: &[String]) -> Vec<u8> {
    let mut out = Vec::new();
    for list in lists {
        // A path has at most PATH_MAX bytes.
        let list = &list.as_bytes()[..list.len().min(usize::from(u16::MAX))];
        out.extend_from_slice(&(list.len() as u16).to_be_bytes());
        out.extend_from_slice(list);
    }
    out
}

/// Reads the names of lists. None when the bytes do not end with one.
pub fn decode_lists(mut bytes: &[u8]) -> Option<Vec<String>> {
    let mut lists = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<2>() {
        let (list, rest) = rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))?;
        lists.push(readable(&list[list.len().saturating_sub(LONGEST_LIST)..]));
        bytes = rest;
    }
    bytes.is_empty().then_some(lists)
}

/// Eight bytes as a number; of fewer, as if zeroes followed.
fn number(bytes: &[u8]) -> u64 {
    crate::digest::key(bytes)
}
