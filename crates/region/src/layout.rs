//! Where things are in a region.
//!
//! | offset | bytes | what | written by |
//! |---|---|---|---|
//! | 0 | 8 | magic `SEAWALLR` | host |
//! | 8 | 2 | layout version, little endian, 1 | host |
//! | 10 | 6 | reserved, zero | host |
//! | 16 | 16 | the region's public name | host |
//! | 32 | 32 | key | host |
//! | 64 | 32 | BLAKE3 of bytes 0..64, so that a half-written header is not taken for one | host |
//! | 8,192 | 16,392 | the [`ring`](crate::ring) | both |
//! | 65,536 | 65,536 each | slots of content, to the region's end | driver |
//!
//! Where the guest cannot map a region, the first 96 bytes reach it as a file instead (QEMU's fw_cfg),
//! with a name and key of their own.
//!
//! The geometry follows from the region's length alone, so neither side can tell the other a false
//! one. The guest can write every byte, the header too. That is why the host never reads the header.

use seawall_proto::{Key, RegionId, SlotRef};

/// Bytes before the first slot.
pub const HEADER_LEN: u64 = 64 * 1024;
/// Bytes in one slot.
pub const SLOT_LEN: u32 = 64 * 1024;
/// The length of a region unless configured otherwise, in bytes.
pub const DEFAULT_LEN: u64 = 16 << 20;
/// The shortest region: a header and three slots, in bytes.
pub const LEN_MIN: u64 = 256 * 1024;
/// The longest region, in bytes; slot numbers fit 16 bits with room to spare.
pub const LEN_MAX: u64 = 1 << 30;

pub(crate) const MAGIC: [u8; 8] = *b"SEAWALLR";
const VERSION: u16 = 1;

/// Length of an encoded [`Header`] in bytes.
pub const ENCODED_HEADER_LEN: usize = 96;

/// Why something is not a usable region.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LayoutError {
    /// The length is not a power of two in range (a PCI BAR always is one).
    #[error(
        "a region must be a power of two from {LEN_MIN} to {LEN_MAX} bytes long, not {len} bytes"
    )]
    Length {
        /// The length found, in bytes.
        len: u64,
    },
    /// There is no header: the host service has not written it yet.
    #[error("the region has no header yet; is the host service running and configured for it?")]
    NoHeader,
    /// The header has a layout that this build does not know.
    #[error("the region has layout version {found}; this build knows version {VERSION}")]
    Version {
        /// The version found.
        found: u16,
    },
    /// A slot reference points outside the region or beyond a slot.
    #[error("slot {index} with {len} bytes is not within {slots} slots of {SLOT_LEN} bytes")]
    Slot {
        /// The slot number named.
        index: u16,
        /// The length named, in bytes.
        len: u32,
        /// How many slots there are.
        slots: u16,
    },
}

/// How many slots a region of some length has, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    slots: u16,
}

impl Geometry {
    /// The geometry of a region of `len` bytes.
    ///
    /// # Errors
    /// [`LayoutError::Length`].
    pub fn of(len: u64) -> Result<Self, LayoutError> {
        if !(LEN_MIN..=LEN_MAX).contains(&len) || !len.is_power_of_two() {
            return Err(LayoutError::Length { len });
        }
        let slots = (len - HEADER_LEN) / u64::from(SLOT_LEN);
        Ok(Self { slots: u16::try_from(slots).expect("LEN_MAX has fewer than 65,536 slots") })
    }

    /// How many slots there are.
    #[must_use]
    pub fn slots(&self) -> u16 {
        self.slots
    }

    /// The region's length in bytes.
    pub(crate) fn len(&self) -> u64 {
        HEADER_LEN + u64::from(self.slots) * u64::from(SLOT_LEN)
    }

    /// The byte offset of what `slot` names.
    ///
    /// # Errors
    /// [`LayoutError::Slot`] when it is not wholly within one slot of this region.
    pub fn offset(&self, slot: SlotRef) -> Result<u64, LayoutError> {
        if slot.index >= self.slots || slot.len > SLOT_LEN {
            let SlotRef { index, len } = slot;
            return Err(LayoutError::Slot { index, len, slots: self.slots });
        }
        Ok(HEADER_LEN + u64::from(slot.index) * u64::from(SLOT_LEN))
    }
}

/// What the host writes at a region's start, or into a guest's key file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The region's public name.
    pub region: RegionId,
    /// The secret that only the guest's root can read.
    pub key: Key,
}

impl Header {
    /// The bytes to write.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; ENCODED_HEADER_LEN] {
        let mut bytes = [0; ENCODED_HEADER_LEN];
        bytes[0..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.region.0);
        bytes[32..64].copy_from_slice(&self.key.0);
        let digest = checksum(&bytes);
        bytes[64..96].copy_from_slice(&digest);
        bytes
    }

    /// Reads a header, as the driver does.
    ///
    /// # Errors
    /// [`LayoutError::NoHeader`] and [`LayoutError::Version`].
    pub fn parse(bytes: &[u8; ENCODED_HEADER_LEN]) -> Result<Self, LayoutError> {
        if bytes[0..8] != MAGIC || bytes[64..96] != checksum(bytes) {
            return Err(LayoutError::NoHeader);
        }
        let found = u16::from_le_bytes([bytes[8], bytes[9]]);
        if found != VERSION {
            return Err(LayoutError::Version { found });
        }
        let (mut region, mut key) = ([0; 16], [0; 32]);
        region.copy_from_slice(&bytes[16..32]);
        key.copy_from_slice(&bytes[32..64]);
        Ok(Self { region: RegionId(region), key: Key(key) })
    }
}

fn checksum(bytes: &[u8; ENCODED_HEADER_LEN]) -> [u8; 32] {
    *blake3::hash(&bytes[..64]).as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lengths_that_are_no_bar_are_refused() {
        for len in [0, LEN_MIN / 2, LEN_MIN + 1, DEFAULT_LEN - 4096, LEN_MAX * 2] {
            assert_eq!(Geometry::of(len), Err(LayoutError::Length { len }));
        }
        assert_eq!(Geometry::of(DEFAULT_LEN).map(|g| g.slots()), Ok(255));
    }

    #[test]
    fn a_header_with_any_bit_changed_is_none() {
        let header = Header { region: RegionId([1; 16]), key: Key([2; 32]) };
        let bytes = header.to_bytes();
        assert_eq!(Header::parse(&bytes), Ok(header));
        for at in 0..ENCODED_HEADER_LEN {
            let mut changed = bytes;
            changed[at] ^= 0x10;
            assert_eq!(Header::parse(&changed), Err(LayoutError::NoHeader), "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn whatever_a_guest_names_stays_within_the_region(
            power in 18_u32..=30, index: u16, len: u32
        ) {
            let total = 1_u64 << power;
            let geometry = Geometry::of(total).unwrap();
            if let Ok(offset) = geometry.offset(SlotRef { index, len }) {
                prop_assert!(offset >= HEADER_LEN);
                prop_assert!(offset + u64::from(len) <= total);
            }
        }
    }
}
