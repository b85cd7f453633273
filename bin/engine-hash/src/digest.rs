//! The three digests that lists know content by.

use std::fmt;
use std::sync::LazyLock;

use md5::Md5;
use sha1::Sha1;
use sha2::{Digest as _, Sha256};

/// Longest digest, in bytes.
pub const LONGEST: usize = 32;

/// Which digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// 16 bytes. Two contents with one digest can be made at will.
    Md5,
    /// 20 bytes. Two contents with one digest can be made, at a price.
    Sha1,
    /// 32 bytes.
    Sha256,
}

impl Kind {
    /// All of them, in the order in which everything here keeps them.
    pub const ALL: [Self; 3] = [Self::Md5, Self::Sha1, Self::Sha256];

    /// Bytes of a digest.
    pub const fn length(self) -> usize {
        match self {
            Self::Md5 => 16,
            Self::Sha1 => 20,
            Self::Sha256 => 32,
        }
    }

    /// Whether someone can make two contents that have the same digest.
    pub fn is_weak(self) -> bool {
        self != Self::Sha256
    }

    /// The kind whose digests have so many bytes.
    fn of_length(bytes: usize) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.length() == bytes)
    }
}

/// As default names of detections show it.
impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Md5 => "MD5",
            Self::Sha1 => "SHA1",
            Self::Sha256 => "SHA256",
        })
    }
}

/// One digest of content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest {
    kind: Kind,
    /// Zero after the digest's own length.
    bytes: [u8; LONGEST],
}

/// Why a word is no digest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoDigest {
    /// A character that is no hex digit.
    #[error("a digest consists of hex digits")]
    Digit {
        /// Bytes before it.
        at: usize,
    },
    /// Not as long as any digest.
    #[error(
        "{digits} hex digits are no digest: MD5 has 32, SHA-1 40, SHA-256 64; correct or remove \
         the line"
    )]
    Length {
        /// Digits found.
        digits: usize,
    },
}

impl Digest {
    /// A digest of this kind from its bytes. None when there are too few or too many.
    pub fn new(kind: Kind, digest: &[u8]) -> Option<Self> {
        let mut bytes = [0; LONGEST];
        if digest.len() != kind.length() {
            return None;
        }
        bytes[..digest.len()].copy_from_slice(digest);
        Some(Self { kind, bytes })
    }

    /// Reads hex digits, large or small; their number tells the kind.
    pub fn from_hex(word: &[u8]) -> Result<Self, NoDigest> {
        let digit = |at: usize| {
            let value = char::from(word[at]).to_digit(16).ok_or(NoDigest::Digit { at })?;
            // A hex digit is below 16.
            Ok(value as u8)
        };
        if let Some(at) = word.iter().position(|byte| !byte.is_ascii_hexdigit()) {
            return Err(NoDigest::Digit { at });
        }
        let kind = Some(word.len()).filter(|digits| digits % 2 == 0);
        let kind = kind.and_then(|digits| Kind::of_length(digits / 2));
        let kind = kind.ok_or(NoDigest::Length { digits: word.len() })?;
        let mut bytes = [0; LONGEST];
        for (at, byte) in bytes[..kind.length()].iter_mut().enumerate() {
            *byte = digit(2 * at)? << 4 | digit(2 * at + 1)?;
        }
        Ok(Self { kind, bytes })
    }

    /// Which digest it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its bytes, [`Kind::length`] of them.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.kind.length()]
    }

    /// The first eight bytes as a number: sorts as the digest does.
    pub fn key(&self) -> u64 {
        key(&self.bytes)
    }

    /// Whether it is the digest of content of zero bytes.
    pub fn is_of_nothing(&self) -> bool {
        static OF_NOTHING: LazyLock<Vec<Digest>> =
            LazyLock::new(|| Hashers::new([true; 3]).finish());
        OF_NOTHING.contains(self)
    }
}

/// Lower-case hex digits.
impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.bytes().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The first eight bytes as a number; missing ones count as zero.
pub fn key(bytes: &[u8]) -> u64 {
    let mut first = [0; 8];
    let count = bytes.len().min(8);
    first[..count].copy_from_slice(&bytes[..count]);
    u64::from_be_bytes(first)
}

/// Computes the digests that are wanted in one pass.
pub struct Hashers {
    md5: Option<Md5>,
    sha1: Option<Sha1>,
    sha256: Option<Sha256>,
}

impl Hashers {
    /// Wanted are those that are true, in the order of [`Kind::ALL`].
    pub fn new([md5, sha1, sha256]: [bool; 3]) -> Self {
        Self {
            md5: md5.then(Md5::new),
            sha1: sha1.then(Sha1::new),
            sha256: sha256.then(Sha256::new),
        }
    }

    /// Takes the next bytes. Pieces that fit a core's cache are read from memory once for all.
    pub fn update(&mut self, piece: &[u8]) {
        if let Some(md5) = &mut self.md5 {
            md5.update(piece);
        }
        if let Some(sha1) = &mut self.sha1 {
            sha1.update(piece);
        }
        if let Some(sha256) = &mut self.sha256 {
            sha256.update(piece);
        }
    }

    /// The digests wanted.
    pub fn finish(self) -> Vec<Digest> {
        let md5 = self.md5.and_then(|md5| Digest::new(Kind::Md5, &md5.finalize()));
        let sha1 = self.sha1.and_then(|sha1| Digest::new(Kind::Sha1, &sha1.finalize()));
        let sha256 = self.sha256.and_then(|sha256| Digest::new(Kind::Sha256, &sha256.finalize()));
        [md5, sha1, sha256].into_iter().flatten().collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// FIPS 180-4 and RFC 1321 examples.
    const ABC: [&str; 3] = [
        "900150983cd24fb0d6963f7d28e17f72",
        "a9993e364706816aba3e25717850c26c9cd0d89d",
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    ];

    #[test]
    fn the_digests_of_abc_are_those_of_the_standards() {
        for wanted in 0..8 {
            let wanted = [wanted & 1 != 0, wanted & 2 != 0, wanted & 4 != 0];
            let mut hashers = Hashers::new(wanted);
            hashers.update(b"a");
            hashers.update(b"bc");
            let got: Vec<String> = hashers.finish().iter().map(Digest::to_string).collect();
            let golden: Vec<&str> = ABC
                .into_iter()
                .zip(wanted)
                .filter(|(_, wanted)| *wanted)
                .map(|(abc, _)| abc)
                .collect();
            assert_eq!(got, golden);
        }
    }

    #[test]
    fn hex_is_read_as_it_is_written_and_nothing_else_is() {
        for (abc, kind) in ABC.into_iter().zip(Kind::ALL) {
            let digest = Digest::from_hex(abc.as_bytes()).unwrap();
            assert_eq!((digest.kind(), digest.to_string().as_str()), (kind, abc));
            assert_eq!(Digest::from_hex(abc.to_uppercase().as_bytes()), Ok(digest));
            assert_eq!(digest.key(), u64::from_str_radix(&abc[..16], 16).unwrap());
            let long = format!("{abc}0");
            assert_eq!(
                Digest::from_hex(long.as_bytes()),
                Err(NoDigest::Length { digits: abc.len() + 1 })
            );
        }
        assert_eq!(Digest::from_hex(b"12g4"), Err(NoDigest::Digit { at: 2 }));
        assert_eq!(Digest::from_hex("12é4".as_bytes()), Err(NoDigest::Digit { at: 2 }));
        assert_eq!(Digest::from_hex(b""), Err(NoDigest::Length { digits: 0 }));
    }

    #[test]
    fn the_digests_of_nothing_are_known() {
        assert!(Digest::from_hex(b"d41d8cd98f00b204e9800998ecf8427e").unwrap().is_of_nothing());
        assert!(!Digest::from_hex(ABC[0].as_bytes()).unwrap().is_of_nothing());
    }
}
