//! The host's side of the ring.
//!
//! All that a driver wrote is copied once before it is looked at. What makes no sense is not there.

use crate::guest_ring::is_watched;
use crate::host::{HostRegion, HostRegionError};
use crate::ring::{self, ENTRY_LEN, Filled, Query, Reply};
use seawall_proto::RingKey;
use std::sync::atomic::{Ordering, fence};

impl HostRegion {
    /// Query `number` of the session with this key, if it was asked.
    ///
    /// # Errors
    /// [`HostRegionError::Io`].
    pub fn query(&self, key: &RingKey, number: u64) -> Result<Option<Query>, HostRegionError> {
        let mut bytes = [0; ENTRY_LEN];
        self.peek(&mut bytes, ring::query_at(number))?;
        Ok(Query::of_bytes(&bytes, key, number))
    }

    /// How much of the content of query `number` is there.
    ///
    /// # Errors
    /// [`HostRegionError::Io`].
    pub fn filled(&self, key: &RingKey, number: u64) -> Result<Filled, HostRegionError> {
        let word = self.word(ring::filled_at(number))?;
        // What is copied next was written before that word.
        fence(Ordering::SeqCst);
        Ok(Filled::of_word(key, word, number))
    }

    /// Answers query `number`. `false`: the driver does not look for the answer, it is to be told on the link too.
    ///
    /// # Errors
    /// [`HostRegionError::Io`].
    pub fn reply(&self, key: &RingKey, number: u64, reply: Reply) -> Result<bool, HostRegionError> {
        self.poke(&reply.to_bytes(key, number), ring::reply_at(number))?;
        fence(Ordering::SeqCst);
        Ok(is_watched(key, self.word(ring::watched_at(number))?, number))
    }

    /// Says whether the host looks for queries from now on. Whoever stops has to look once more afterwards.
    ///
    /// # Errors
    /// [`HostRegionError::Io`].
    pub fn look(&self, key: &RingKey, looks: bool) -> Result<(), HostRegionError> {
        let word = if looks { ring::looks(key) } else { 0 };
        self.poke(&word.to_le_bytes(), ring::HOST_LOOKS_AT)?;
        fence(Ordering::SeqCst);
        Ok(())
    }

    fn word(&self, at: u64) -> Result<u64, HostRegionError> {
        let mut bytes = [0; 8];
        self.peek(&mut bytes, at)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{LEN_MIN, SLOT_LEN};
    use crate::ring::PIECE_LEN;
    use crate::{GuestRegion, GuestRing};
    use proptest::prelude::*;
    use seawall_proto::{Clean, ContentHash, Generation};
    use std::io::{Read, Write};
    use std::os::unix::fs::FileExt;
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

    const KEY: RingKey = RingKey([9; 32]);

    fn both(key: RingKey) -> (tempfile::NamedTempFile, HostRegion, GuestRing) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(LEN_MIN).unwrap();
        let host = HostRegion::open(file.path()).unwrap();
        let region = GuestRegion::open_file(file.path()).unwrap();
        (file, host, GuestRing::new(region, key))
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
        let (_file, host, guest) = both(KEY);
        for number in [0, 1, 63, 64, 1 << 40] {
            assert_eq!(host.query(&KEY, number).unwrap(), None);
            let query = Query::Content { len: 70_000, slots: vec![2, 1] };
            guest.ask(number, &query, Filled::Pieces(1));
            assert_eq!(host.query(&KEY, number).unwrap(), Some(query));
            assert_eq!(host.query(&RingKey([8; 32]), number).unwrap(), None, "another session's");
            assert_eq!(host.filled(&KEY, number).unwrap(), Filled::Pieces(1));
            guest.fill(number, Filled::Pieces(2));
            assert_eq!(host.filled(&KEY, number).unwrap(), Filled::Pieces(2));
            guest.fill(number, Filled::GivenUp);
            assert_eq!(host.filled(&KEY, number).unwrap(), Filled::GivenUp);
            assert_eq!(guest.reply(number), None);
            assert!(host.reply(&KEY, number, clean(number)).unwrap(), "it looks");
            assert_eq!(guest.reply(number), Some(clean(number)));
            guest.look_away(number);
            assert!(!host.reply(&KEY, number, Reply::Unknown).unwrap());
            assert_eq!(guest.reply(number), Some(Reply::Unknown));
        }
        assert!(!guest.host_looks());
        host.look(&KEY, true).unwrap();
        assert!(guest.host_looks());
        host.look(&KEY, false).unwrap();
        assert!(!guest.host_looks());
        host.look(&RingKey([8; 32]), true).unwrap();
        assert!(!guest.host_looks(), "it looks for another session");
    }

    #[test]
    fn where_the_region_is_gone_nobody_answers_and_nobody_dies() {
        let (file, host, guest) = both(KEY);
        host.look(&KEY, true).unwrap();
        guest.ask(0, &Query::Hash(hash(1)), Filled::Pieces(0));
        host.reply(&KEY, 0, clean(1)).unwrap();
        assert!(guest.host_looks() && guest.reply(0).is_some());
        file.as_file().set_len(0).unwrap();
        assert!(!guest.host_looks());
        assert_eq!(guest.reply(0), None);
        guest.ask(1, &Query::Hash(hash(1)), Filled::Pieces(0));
        guest.look_away(1);
        assert!(!guest.region().is_there());
        assert!(host.query(&KEY, 1).is_err());
        let mut content = tempfile::tempfile().unwrap();
        content.write_all(b"words").unwrap();
        let mut slot = guest.region().take_slot().unwrap();
        assert!(slot.fill(&content, 0).is_err(), "its slots are not guarded");
        // Another that is there is as it was.
        let (_file, host, guest) = both(KEY);
        guest.ask(0, &Query::Hash(hash(1)), Filled::Pieces(0));
        assert!(host.query(&KEY, 0).unwrap().is_some());
    }

    proptest! {
        #[test]
        fn whatever_a_driver_writes_into_the_ring_the_host_takes_a_query_or_nothing(
            bytes in prop::collection::vec(any::<u8>(), 16 * 1024), number: u64
        ) {
            let (file, host, _guest) = both(KEY);
            file.as_file().write_all_at(&bytes, 8192).unwrap();
            prop_assert_eq!(host.query(&KEY, number).unwrap(), None);
            let _any = host.filled(&KEY, number).unwrap();
            host.reply(&KEY, number, Reply::Unknown).unwrap();
        }
    }

    /// Two threads that look for a short while and then sleep on a socket, as driver and host do. A wake that is lost is
    /// a wait without end.
    #[test]
    fn no_wake_is_lost() {
        const QUERIES: u64 = 20_000;
        let (_file, host, guest) = both(KEY);
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
                    asked = host.query(&KEY, number).unwrap().is_some();
                }
                if !asked {
                    host.look(&KEY, false).unwrap();
                    while host.query(&KEY, number).unwrap().is_none() {
                        from_guest.read_exact(&mut bell).expect("the doorbell rings");
                    }
                    host.look(&KEY, true).unwrap();
                }
                if !host.reply(&KEY, number, clean(number)).unwrap() {
                    to_guest.write_all(&number.to_le_bytes()).unwrap();
                }
                number += 1;
            }
        });
        let mut told = None;
        for number in 0..QUERIES {
            guest.ask(number, &Query::Hash(hash(number)), Filled::Pieces(0));
            if !guest.host_looks() {
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
            assert_eq!(host.filled(&KEY, 0).unwrap(), Filled::Pieces(piece));
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
