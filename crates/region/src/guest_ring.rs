//! The driver's side of the ring.

use crate::guest::GuestRegion;
use crate::ring::{self, Filled, HostLooks, Query, Reply};
use seawall_proto::RingKey;
use std::sync::atomic::{AtomicU64, Ordering};

const LOOKS: u8 = 1;
const LOOKS_AWAY: u8 = 0;

/// A session's ring, as the driver has it. Nothing here waits. Where the region is gone nobody looks and no reply comes;
/// that it is there is said by a reply.
#[derive(Debug)]
pub struct GuestRing {
    region: GuestRegion,
    key: RingKey,
}

impl GuestRing {
    /// The ring in this region, with the key that the host gave the session.
    #[must_use]
    pub fn new(region: GuestRegion, key: RingKey) -> Self {
        Self { region, key }
    }

    /// The region, whose slots are the content's.
    #[must_use]
    pub fn region(&self) -> &GuestRegion {
        &self.region
    }

    fn word(&self, at: u64) -> &AtomicU64 {
        self.region.mapping().word(at)
    }

    /// Asks. Queries are to be asked in the order of their numbers, one behind the other; the reply to query `number` - 64
    /// is no longer of interest. The driver looks for the reply, as far as the host knows.
    pub fn ask(&self, number: u64, query: &Query, filled: Filled) {
        let looks = ring::word(&self.key, number, LOOKS);
        self.word(ring::watched_at(number)).store(looks, Ordering::Relaxed);
        let filled = filled.to_word(&self.key, number);
        self.word(ring::filled_at(number)).store(filled, Ordering::Relaxed);
        // What it is about before it is asked.
        self.region.publish();
        let bytes = query.to_bytes(&self.key, number);
        self.region.mapping().store(ring::query_at(number), &bytes);
        self.region.publish();
    }

    /// Says how much of the content is there now.
    pub fn fill(&self, number: u64, filled: Filled) {
        self.region.publish();
        let filled = filled.to_word(&self.key, number);
        self.word(ring::filled_at(number)).store(filled, Ordering::Relaxed);
        self.region.publish();
    }

    /// Whether the host will see what was asked before this. If it is away with the count that it had when it was told, it
    /// has not heard that yet, and will look.
    #[must_use]
    pub fn host_looks(&self) -> HostLooks {
        ring::host_looks(&self.key, self.word(ring::HOST_LOOKS_AT).load(Ordering::Relaxed))
    }

    /// The reply, if it is there.
    #[must_use]
    pub fn reply(&self, number: u64) -> Option<Reply> {
        let at = ring::reply_at(number);
        if self.word(at).load(Ordering::Relaxed) != number {
            return None;
        }
        Reply::of_bytes(&self.region.mapping().load(at), &self.key, number)
    }

    /// Looks for this reply no longer. It may have come just before; if not it comes on the link.
    pub fn look_away(&self, number: u64) {
        let word = ring::word(&self.key, number, LOOKS_AWAY);
        self.word(ring::watched_at(number)).store(word, Ordering::Relaxed);
        self.region.publish();
    }
}

/// Whether the driver looks for reply `number`.
pub(crate) fn is_watched(key: &RingKey, word: u64, number: u64) -> bool {
    ring::says(key, word, number) == Some(LOOKS)
}
