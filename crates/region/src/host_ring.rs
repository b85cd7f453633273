//! The host's side of the ring.
//!
//! All that a driver wrote is copied once before it is looked at. What makes no sense is not there. It is mapped, and
//! guarded as the driver's side is: looking at it asks the kernel nothing. Where its file was cut short nothing is asked, and
//! what is copied is not whole.

use crate::guest_ring::is_watched;
use crate::host::{HostRegion, HostRegionError};
use crate::layout::{Geometry, LayoutError};
use crate::mapping::Mapping;
use crate::ring::{self, Filled, Query, Reply};
use seawall_proto::{RingKey, SlotRef};
use std::sync::atomic::{Ordering, fence};

/// A session's ring, as the host has it. Nothing here waits.
#[derive(Debug)]
pub struct HostRing {
    mapping: Mapping,
    geometry: Geometry,
    key: RingKey,
    /// How often it began and ended to look.
    looked: u32,
}

impl HostRing {
    /// An empty ring in this region, for the session with this key.
    ///
    /// # Errors
    /// [`HostRegionError::Io`].
    pub fn new(region: &HostRegion, key: RingKey) -> Result<Self, HostRegionError> {
        // So that there is memory behind all of it.
        region.clear_ring()?;
        Ok(Self { mapping: region.map()?, geometry: region.geometry(), key, looked: 0 })
    }

    /// Query `number`, if it was asked.
    #[must_use]
    pub fn query(&self, number: u64) -> Option<Query> {
        let at = ring::query_at(number);
        if self.mapping.word(at).load(Ordering::Relaxed) != number {
            return None;
        }
        Query::of_bytes(&self.mapping.load(at), &self.key, number)
    }

    /// How much of the content of query `number` is there.
    #[must_use]
    pub fn filled(&self, number: u64) -> Filled {
        let word = self.mapping.word(ring::filled_at(number)).load(Ordering::Relaxed);
        // What is copied next was written before that word.
        fence(Ordering::SeqCst);
        Filled::of_word(&self.key, word, number)
    }

    /// Copies bytes of a slot from `at` on, a multiple of eight, once. [`Self::is_whole`] says whether they were there.
    ///
    /// # Errors
    /// [`LayoutError::Slot`] when the guest named bytes outside the slots.
    ///
    /// # Panics
    /// When `at` is no multiple of eight.
    pub fn copy_piece(&self, index: u16, at: u32, copy: &mut [u8]) -> Result<(), LayoutError> {
        let len = u32::try_from(copy.len()).unwrap_or(u32::MAX).saturating_add(at);
        let offset = self.geometry.offset(SlotRef { index, len })? + u64::from(at);
        self.mapping.copy(offset, copy);
        Ok(())
    }

    /// Whether all that was copied was there; what was not is zeros. A region's file that was cut short stays so.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.mapping.is_whole()
    }

    /// Answers query `number`. `false`: the driver does not look for the answer, it is to be told on the link too.
    #[must_use]
    pub fn reply(&self, number: u64, reply: Reply) -> bool {
        self.mapping.store(ring::reply_at(number), &reply.to_bytes(&self.key, number));
        fence(Ordering::SeqCst);
        let word = self.mapping.word(ring::watched_at(number)).load(Ordering::Relaxed);
        is_watched(&self.key, word, number)
    }

    /// Says whether the host looks for queries from now on. Whoever stops has to look once more afterwards.
    pub fn look(&mut self, looks: bool) {
        let is_new = (self.looked % 2 == 1) != looks;
        self.looked = self.looked.wrapping_add(is_new.into());
        let word = ring::looks(&self.key, self.looked);
        self.mapping.word(ring::HOST_LOOKS_AT).store(word, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{LEN_MIN, SLOT_LEN};
    use crate::ring::{HostLooks, PIECE_LEN};
    use crate::{GuestRegion, GuestRing};
    use proptest::prelude::*;
    use seawall_proto::{Clean, ContentHash, Generation};
    use std::io::{Read, Write};
    use std::os::unix::fs::FileExt;
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

    const KEY: RingKey = RingKey([9; 32]);

    fn both(key: RingKey) -> (tempfile::NamedTempFile, HostRing, GuestRing) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(LEN_MIN).unwrap();
        let host = HostRing::new(&HostRegion::open(file.path()).unwrap(), key.clone()).unwrap();
        let region = GuestRegion::open_file(file.path()).unwrap();
        (file, host, GuestRing::new(region, key))
    }

    /// The same ring for another session.
    fn other(file: &tempfile::NamedTempFile, key: RingKey) -> HostRing {
        let region = HostRegion::open(file.path()).unwrap();
        HostRing { mapping: region.map().unwrap(), geometry: region.geometry(), key, looked: 0 }
    }

    fn hash(n: u64) -> ContentHash {
        let mut hash = [0; 32];
        hash[..8].copy_from_slice(&n.to_le_bytes());
        ContentHash(hash)
    }

    fn clean(n: u64) -> Reply {
        Reply::Clean(Clean { unopened: false, generation: Generation(3), hash: hash(n) })
    }

    #[test]
    fn a_query_is_there_once_it_was_asked_and_so_is_its_reply() {
        let (file, mut host, guest) = both(KEY);
        let mut others = other(&file, RingKey([8; 32]));
        for number in [0, 1, 63, 64, 1 << 40] {
            assert_eq!(host.query(number), None);
            let query = Query::Content { len: 70_000, slots: vec![2, 1] };
            guest.ask(number, &query, Filled::Pieces(1));
            assert_eq!(host.query(number), Some(query));
            assert_eq!(others.query(number), None, "another session's");
            assert_eq!(host.filled(number), Filled::Pieces(1));
            guest.fill(number, Filled::Pieces(2));
            assert_eq!(host.filled(number), Filled::Pieces(2));
            guest.fill(number, Filled::GivenUp);
            assert_eq!(host.filled(number), Filled::GivenUp);
            assert_eq!(guest.reply(number), None);
            assert!(host.reply(number, clean(number)), "it looks");
            assert_eq!(guest.reply(number), Some(clean(number)));
            guest.look_away(number);
            assert!(!host.reply(number, Reply::Unknown));
            assert_eq!(guest.reply(number), Some(Reply::Unknown));
        }
        assert_eq!(guest.host_looks(), HostLooks::Away(0));
        for times in [2, 4] {
            host.look(true);
            assert_eq!(guest.host_looks(), HostLooks::Now);
            host.look(true);
            assert_eq!(guest.host_looks(), HostLooks::Now);
            host.look(false);
            assert_eq!(guest.host_looks(), HostLooks::Away(times));
        }
        others.look(true);
        assert_eq!(guest.host_looks(), HostLooks::Away(0), "it looks for another session");
    }

    #[test]
    fn where_the_region_is_gone_nobody_answers_and_nobody_dies() {
        let (file, mut host, guest) = both(KEY);
        host.look(true);
        guest.ask(0, &Query::Hash(hash(1)), Filled::Pieces(0));
        assert!(host.reply(0, clean(1)));
        assert!(guest.host_looks() == HostLooks::Now && guest.reply(0).is_some());
        file.as_file().set_len(0).unwrap();
        assert_ne!(guest.host_looks(), HostLooks::Now);
        assert_eq!(guest.reply(0), None);
        guest.ask(1, &Query::Hash(hash(1)), Filled::Pieces(0));
        guest.look_away(1);
        assert!(!guest.region().is_there());
        assert_eq!(host.query(1), None);
        let mut copy = [1; 64];
        host.copy_piece(0, 0, &mut copy).unwrap();
        assert!(copy == [0; 64] && !host.is_whole(), "zeros, and it says so");
        let mut content = tempfile::tempfile().unwrap();
        content.write_all(b"words").unwrap();
        let mut slot = guest.region().take_slot().unwrap();
        assert!(slot.fill(&content, 0).is_err(), "its slots are not guarded");
        // Another that is there is as it was.
        let (_file, host, guest) = both(KEY);
        guest.ask(0, &Query::Hash(hash(1)), Filled::Pieces(0));
        assert!(host.query(0).is_some());
    }

    proptest! {
        #[test]
        fn whatever_a_driver_writes_into_the_ring_the_host_takes_a_query_or_nothing(
            bytes in prop::collection::vec(any::<u8>(), 16 * 1024), number: u64
        ) {
            let (file, host, _guest) = both(KEY);
            file.as_file().write_all_at(&bytes, 8192).unwrap();
            prop_assert_eq!(host.query(number), None);
            let _any = host.filled(number);
            let _looks = host.reply(number, Reply::Unknown);
        }
    }

    /// Two threads that look for a short while and then sleep on a socket, as driver and host do. A wake that is lost is
    /// a wait without end.
    #[test]
    fn no_wake_is_lost() {
        const QUERIES: u64 = 20_000;
        let (_file, mut host, guest) = both(KEY);
        let (mut to_host, mut from_guest) = UnixStream::pair().unwrap();
        let (mut to_guest, mut from_host) = UnixStream::pair().unwrap();
        for stream in [&from_guest, &from_host] {
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        }
        let service = std::thread::spawn(move || {
            let (mut number, mut bell) = (0, [0; 1]);
            while number < QUERIES {
                // Some looks are longer than others, so that all orders come about.
                let until = Instant::now() + Duration::from_nanos(number * 7919 % 4000);
                let mut asked = false;
                while !asked && Instant::now() < until {
                    asked = host.query(number).is_some();
                }
                if !asked {
                    host.look(false);
                }
                // It looks once each time the bell rings, which may be before anything is asked.
                while host.query(number).is_none() {
                    from_guest.read_exact(&mut bell).expect("the doorbell rings");
                    host.look(true);
                    if host.query(number).is_none() {
                        host.look(false);
                    }
                }
                if !host.reply(number, clean(number)) {
                    to_guest.write_all(&number.to_le_bytes()).unwrap();
                }
                number += 1;
            }
        });
        let mut told = None;
        for number in 0..QUERIES {
            let mut rung = None;
            if number % 3 == 0
                && let HostLooks::Away(times) = guest.host_looks()
            {
                to_host.write_all(&[1]).unwrap();
                rung = Some(times);
                (0..number % 128).for_each(|_| std::hint::spin_loop());
            }
            guest.ask(number, &Query::Hash(hash(number)), Filled::Pieces(0));
            if let HostLooks::Away(times) = guest.host_looks()
                && rung != Some(times)
            {
                to_host.write_all(&[1]).unwrap();
            }
            let until = Instant::now() + Duration::from_nanos(number * 104_729 % 4000);
            let mut reply = None;
            while reply.is_none() && Instant::now() < until {
                reply = guest.reply(number);
            }
            if reply.is_none() {
                guest.look_away(number);
                reply = guest.reply(number);
            }
            while reply.is_none() {
                let mut bytes = [0; 8];
                from_host.read_exact(&mut bytes).expect("the answer is told");
                told = Some(u64::from_le_bytes(bytes));
                reply = guest.reply(number).filter(|_| told == Some(number));
            }
            assert_eq!(reply, Some(clean(number)));
        }
        assert!(told.is_some(), "it was never told on the link");
        service.join().unwrap();
    }

    #[test]
    fn content_is_read_while_it_is_filled() {
        let (_file, host, guest) = both(KEY);
        let mut content = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..3 * SLOT_LEN).map(|n| (n / 100) as u8).collect();
        content.write_all(&bytes).unwrap();
        let mut slots: Vec<_> = std::iter::from_fn(|| guest.region().take_slot()).take(3).collect();
        let query = Query::Content {
            len: 3 * SLOT_LEN,
            slots: slots.iter().map(crate::Slot::index).collect(),
        };
        guest.ask(0, &query, Filled::Pieces(0));
        let mut read = Vec::new();
        for (piece, start) in (0..).zip((0..3 * SLOT_LEN).step_by(PIECE_LEN as usize)) {
            assert_eq!(host.filled(0), Filled::Pieces(piece));
            let (slot, at) = (&mut slots[(start / SLOT_LEN) as usize], start % SLOT_LEN);
            assert!(slot.fill_now(at, &content, start.into(), PIECE_LEN).unwrap());
            guest.fill(0, Filled::Pieces(piece + 1));
            let mut copy = vec![0; PIECE_LEN as usize];
            host.copy_piece(slot.index(), at, &mut copy).unwrap();
            read.extend(copy);
        }
        assert_eq!(read, bytes);
        // No more than there is, and than a slot holds.
        assert!(!slots[0].fill_now(0, &content, 2 * 65_536 + 1, SLOT_LEN).unwrap());
        assert!(!slots[0].fill_now(0, &content, 3 * 65_536, 1).unwrap());
        let mut copy = vec![0; PIECE_LEN as usize];
        assert!(host.copy_piece(0, SLOT_LEN - PIECE_LEN + 1, &mut copy).is_err());
        assert!(host.copy_piece(u16::MAX, 0, &mut copy).is_err());
        assert!(host.copy_piece(0, u32::MAX, &mut copy).is_err());
    }
}
