//! How much of something clients may have, all together and each of them.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError};

/// Who is at the other end, as far as the system knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Peer {
    /// A process of this user.
    User(u32),
    /// Somebody on the network.
    Address(IpAddr),
}

/// A number of places, of which one peer gets a part.
#[derive(Debug)]
pub struct Places {
    all: Arc<Semaphore>,
    /// One peer's part.
    part: usize,
    by_peer: Mutex<HashMap<Peer, Arc<Semaphore>>>,
}

/// A place that is taken, until this is dropped.
#[derive(Debug)]
pub struct Place {
    _own: OwnedSemaphorePermit,
    _one: OwnedSemaphorePermit,
}

impl Places {
    /// `all` places, of which one peer gets `part` at most.
    pub fn new(all: usize, part: usize) -> Self {
        Self { all: Arc::new(Semaphore::new(all)), part: part.max(1), by_peer: Mutex::default() }
    }

    fn peers(&self) -> MutexGuard<'_, HashMap<Peer, Arc<Semaphore>>> {
        self.by_peer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn of(&self, peer: Peer) -> Arc<Semaphore> {
        let mut peers = self.peers();
        // Those who have nothing and wait for nothing are forgotten.
        peers.retain(|_, places| Arc::strong_count(places) > 1);
        let places = peers.entry(peer).or_insert_with(|| Arc::new(Semaphore::new(self.part)));
        Arc::clone(places)
    }

    /// Waits for a place.
    pub async fn take(&self, peer: Peer) -> Place {
        const OPEN: &str = "it is never closed";
        // What one waits for beyond its part keeps no place from others.
        let own = self.of(peer).acquire_owned().await.expect(OPEN);
        let one = Arc::clone(&self.all).acquire_owned().await.expect(OPEN);
        Place { _own: own, _one: one }
    }

    /// A place now, or none.
    pub fn try_take(&self, peer: Peer) -> Result<Place, TryAcquireError> {
        let own = self.of(peer).try_acquire_owned()?;
        let one = Arc::clone(&self.all).try_acquire_owned()?;
        Ok(Place { _own: own, _one: one })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_peer_gets_its_part_and_leaves_nothing_behind() {
        let places = Places::new(3, 2);
        let (one, two) = (Peer::User(1), Peer::Address(IpAddr::from([127, 0, 0, 1])));
        let held = [places.try_take(one).unwrap(), places.try_take(one).unwrap()];
        assert!(places.try_take(one).is_err());
        let other = places.try_take(two).unwrap();
        assert!(places.try_take(two).is_err(), "all are taken");
        drop(held);
        drop(other);
        assert!(places.try_take(two).is_ok());
        assert_eq!(places.peers().len(), 1, "who has nothing is forgotten");
    }
}
