//! Who is on the other end of a link.
//!
//! The host knows a guest by the socket on which it arrives. That does not tell the guest's driver
//! from any other program in the guest, so the driver also proves that it can read the [`Key`] in
//! the region's header, which only the guest's root can.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A region's public name, new whenever the host writes a new header. It says which key a TCP
/// link uses and proves nothing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RegionId(pub [u8; 16]);

impl fmt::Debug for RegionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The secret in a region's header, new whenever the host writes one. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Key(pub [u8; 32]);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

/// Keys the digests in the ring of one session: tells its entries from those of other sessions, and from what is torn.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingKey(pub [u8; 32]);

impl fmt::Debug for RingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RingKey(..)")
    }
}

/// Shows that its maker knows the region's key, for this one connection.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Proof([u8; 32]);

impl Proof {
    /// The proof for the connection whose hellos carried these nonces.
    #[must_use]
    pub fn new(key: &Key, host_nonce: &[u8; 32], guest_nonce: &[u8; 32]) -> Self {
        let mut hasher = blake3::Hasher::new_keyed(&key.0);
        hasher.update(b"seawall attach 1");
        hasher.update(host_nonce);
        hasher.update(guest_nonce);
        Self(*hasher.finalize().as_bytes())
    }

    /// Compares in constant time, so that a wrong proof tells nothing about the right one.
    #[must_use]
    pub fn matches(&self, expected: &Self) -> bool {
        blake3::Hash::from_bytes(self.0) == blake3::Hash::from_bytes(expected.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_holds_for_one_key_and_one_pair_of_nonces() {
        let (key, other) = (Key([1; 32]), Key([2; 32]));
        let proof = Proof::new(&key, &[3; 32], &[4; 32]);
        assert!(proof.matches(&Proof::new(&key, &[3; 32], &[4; 32])));
        assert!(!proof.matches(&Proof::new(&other, &[3; 32], &[4; 32])));
        assert!(!proof.matches(&Proof::new(&key, &[5; 32], &[4; 32])));
        assert!(!proof.matches(&Proof::new(&key, &[3; 32], &[5; 32])));
        assert!(!proof.matches(&Proof::new(&key, &[4; 32], &[3; 32])));
    }
}
