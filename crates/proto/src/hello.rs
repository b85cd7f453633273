//! The fixed-layout bytes at the start of a connection; their layout never changes.
//!
//! Hello, 56 bytes, both sides send it first (inside the Noise channel where there is one):
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | magic `SEAWALL\0` |
//! | 8 | 2 | lowest protocol version spoken, little endian |
//! | 10 | 2 | highest protocol version spoken |
//! | 12 | 4 | reserved, zero |
//! | 16 | 8 | feature bits; none is defined yet, unknown ones are ignored |
//! | 24 | 32 | nonce, random for each connection |
//!
//! Preface, 24 bytes, sent by the driver before the Noise handshake on a TCP link: magic
//! `SEAWALLN`, then the region's public name (16 bytes).

use crate::RegionId;

const MAGIC: [u8; 8] = *b"SEAWALL\0";
const PREFACE_MAGIC: [u8; 8] = *b"SEAWALLN";

/// Length of an encoded [`Preface`] in bytes.
pub const PREFACE_LEN: usize = 24;

/// What each side says first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// The lowest protocol version that the sender speaks.
    pub lowest: u16,
    /// The highest protocol version that the sender speaks.
    pub highest: u16,
    /// Optional abilities; unknown bits are ignored.
    pub features: u64,
    /// Random for each connection; goes into the [`Proof`](crate::Proof).
    pub nonce: [u8; 32],
}

/// Why a peer's first bytes were refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum HelloError {
    /// The peer is not a Seawall part.
    #[error("the peer does not speak the Seawall protocol (its first bytes are {found:02x?})")]
    Magic {
        /// The bytes where the magic should be.
        found: [u8; 8],
    },
    /// The two sides have no version in common.
    #[error(
        "no common protocol version: this side speaks {our_lowest} to {our_highest}, \
         the peer {peer_lowest} to {peer_highest}"
    )]
    Version {
        /// The lowest version of this side.
        our_lowest: u16,
        /// The highest version of this side.
        our_highest: u16,
        /// The lowest version of the peer.
        peer_lowest: u16,
        /// The highest version of the peer.
        peer_highest: u16,
    },
}

impl Hello {
    /// Length of an encoded hello in bytes.
    pub const LEN: usize = 56;

    /// This build's hello with the given nonce.
    #[must_use]
    pub fn new(nonce: [u8; 32]) -> Self {
        Self { lowest: crate::LOWEST_VERSION, highest: crate::VERSION, features: 0, nonce }
    }

    /// The bytes to send.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[0..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&self.lowest.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.highest.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.features.to_le_bytes());
        bytes[24..56].copy_from_slice(&self.nonce);
        bytes
    }

    /// Reads a peer's hello.
    ///
    /// # Errors
    /// [`HelloError::Magic`] when the peer is something else.
    pub fn parse(bytes: &[u8; Self::LEN]) -> Result<Self, HelloError> {
        let mut magic = [0; 8];
        magic.copy_from_slice(&bytes[..8]);
        if magic != MAGIC {
            return Err(HelloError::Magic { found: magic });
        }
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let mut features = [0; 8];
        features.copy_from_slice(&bytes[16..24]);
        let mut nonce = [0; 32];
        nonce.copy_from_slice(&bytes[24..56]);
        Ok(Self {
            lowest: u16_at(8),
            highest: u16_at(10),
            features: u64::from_le_bytes(features),
            nonce,
        })
    }

    /// The highest version that both sides speak.
    ///
    /// # Errors
    /// [`HelloError::Version`] when there is none.
    pub fn agree(&self, peer: &Self) -> Result<u16, HelloError> {
        let version = self.highest.min(peer.highest);
        if version >= self.lowest && version >= peer.lowest {
            return Ok(version);
        }
        Err(HelloError::Version {
            our_lowest: self.lowest,
            our_highest: self.highest,
            peer_lowest: peer.lowest,
            peer_highest: peer.highest,
        })
    }
}

/// What a driver sends before the Noise handshake of a TCP link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preface {
    /// The region whose key the handshake uses.
    pub region: RegionId,
}

impl Preface {
    /// The bytes to send.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; PREFACE_LEN] {
        let mut bytes = [0; PREFACE_LEN];
        bytes[..8].copy_from_slice(&PREFACE_MAGIC);
        bytes[8..].copy_from_slice(&self.region.0);
        bytes
    }

    /// Reads a driver's preface.
    ///
    /// # Errors
    /// [`HelloError::Magic`] when the peer is something else.
    pub fn parse(bytes: &[u8; PREFACE_LEN]) -> Result<Self, HelloError> {
        let (mut magic, mut region) = ([0; 8], [0; 16]);
        magic.copy_from_slice(&bytes[..8]);
        region.copy_from_slice(&bytes[8..]);
        if magic != PREFACE_MAGIC {
            return Err(HelloError::Magic { found: magic });
        }
        Ok(Self { region: RegionId(region) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_pinned() {
        let hello = Hello { lowest: 1, highest: 0x0203, features: 4, nonce: [9; 32] };
        let bytes = hello.to_bytes();
        assert_eq!(&bytes[..24], b"SEAWALL\0\x01\0\x03\x02\0\0\0\0\x04\0\0\0\0\0\0\0");
        assert_eq!(&bytes[24..], &[9; 32]);
        assert_eq!(Hello::parse(&bytes), Ok(hello));
    }

    #[test]
    fn a_foreign_peer_is_named_by_its_first_bytes() {
        let mut bytes = [0; Hello::LEN];
        bytes[..8].copy_from_slice(b"GET / HT");
        assert_eq!(Hello::parse(&bytes), Err(HelloError::Magic { found: *b"GET / HT" }));
        let mut preface = [0; PREFACE_LEN];
        preface[..8].copy_from_slice(b"SSH-2.0-");
        assert_eq!(Preface::parse(&preface), Err(HelloError::Magic { found: *b"SSH-2.0-" }));
    }

    #[test]
    fn neighbouring_versions_agree_and_distant_ones_say_what_came() {
        let hello = |lowest, highest| Hello { lowest, highest, features: 0, nonce: [0; 32] };
        assert_eq!(hello(2, 3).agree(&hello(1, 2)), Ok(2));
        assert_eq!(hello(1, 2).agree(&hello(2, 3)), Ok(2));
        assert_eq!(
            hello(1, 1).agree(&hello(2, 3)),
            Err(HelloError::Version {
                our_lowest: 1,
                our_highest: 1,
                peer_lowest: 2,
                peer_highest: 3
            })
        );
    }
}
