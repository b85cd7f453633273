//! A queue in which clients take turns.
//!
//! Deficit round robin (Shreedhar and Varghese, "Efficient Fair Queueing using Deficit Round Robin", SIGCOMM 1995): each
//! client in turn is granted so many bytes, and served as long as what it has saved up pays for its oldest scan. A scan
//! costs its bytes and something for itself. Who has nothing waiting saves nothing.

use std::collections::{HashMap, VecDeque};

/// What a turn grants, and what a scan costs besides its bytes, in bytes.
const QUANTUM: u64 = 64 * 1024;
/// The most that one scan costs, so that no turn is waited for too often.
const COST_MAX: u64 = 256 * QUANTUM;

/// Something that waits for its turn.
pub(super) trait Costs {
    /// Whose it is.
    fn client(&self) -> u64;

    /// It is this client's from now on.
    fn give_to(&mut self, client: u64);

    /// How many bytes it is about.
    fn bytes(&self) -> u64;
}

#[derive(Debug)]
struct Waiting<T> {
    queue: VecDeque<T>,
    saved: u64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Fair<T> {
    clients: HashMap<u64, Waiting<T>>,
    /// Those who have something waiting, whose turn it is in front.
    turns: VecDeque<u64>,
}

impl<T> Default for Fair<T> {
    fn default() -> Self {
        Self { clients: HashMap::new(), turns: VecDeque::new() }
    }
}

fn cost(item: &impl Costs) -> u64 {
    item.bytes().saturating_add(QUANTUM).min(COST_MAX)
}

impl<T: Costs> Fair<T> {
    pub(super) fn len(&self) -> usize {
        self.clients.values().map(|waiting| waiting.queue.len()).sum()
    }

    /// The client's queue; its turn is the last one if it had nothing waiting.
    fn of(&mut self, client: u64) -> &mut Waiting<T> {
        let turns = &mut self.turns;
        self.clients.entry(client).or_insert_with(|| {
            turns.push_back(client);
            Waiting { queue: VecDeque::new(), saved: QUANTUM }
        })
    }

    /// Behind what its client has waiting.
    pub(super) fn push_back(&mut self, item: T) {
        self.of(item.client()).queue.push_back(item);
    }

    /// Before it, and next of all: it has had its turn and was not served.
    pub(super) fn push_front(&mut self, item: T) {
        let (client, cost) = (item.client(), cost(&item));
        let waiting = self.of(client);
        waiting.saved = waiting.saved.saturating_add(cost);
        waiting.queue.push_front(item);
        self.turns.retain(|other| *other != client);
        self.turns.push_front(client);
    }

    /// The next one, of a client that may have one now.
    pub(super) fn pop(&mut self, may: impl Fn(u64) -> bool) -> Option<T> {
        // Without others nobody is to be fair to.
        let alone = match self.turns.iter().filter(|client| may(**client)).count() {
            0 => return None,
            eligible => eligible == 1,
        };
        loop {
            let client = *self.turns.front()?;
            let waiting = self.clients.get_mut(&client)?;
            let cost = waiting.queue.front().map_or(0, cost);
            let may = may(client);
            if may && (alone || cost <= waiting.saved) {
                waiting.saved = waiting.saved.saturating_sub(cost);
                let item = waiting.queue.pop_front();
                self.leave(client);
                return item;
            }
            waiting.saved = if may { waiting.saved.saturating_add(QUANTUM) } else { waiting.saved };
            self.turns.rotate_left(1);
        }
    }

    /// The first one that `is_it`: whose, and how many of that client's are before it.
    fn find(&self, is_it: impl Fn(&T) -> bool) -> Option<(u64, usize)> {
        let find = |waiting: &Waiting<T>| waiting.queue.iter().position(&is_it);
        self.clients.iter().find_map(|(client, waiting)| Some((*client, find(waiting)?)))
    }

    /// Another client waits for the first one that `is_it`, too: it becomes that one's where less is before it then.
    pub(super) fn share(&mut self, client: u64, is_it: impl Fn(&T) -> bool) {
        let Some((owner, at)) = self.find(&is_it).filter(|(owner, _)| *owner != client) else {
            return;
        };
        let before = |client: u64, most: usize| {
            let queue = self.clients.get(&client).map(|waiting| waiting.queue.iter().take(most));
            queue.into_iter().flatten().map(cost).sum::<u64>()
        };
        if before(client, usize::MAX) < before(owner, at)
            && let Some(mut item) = self.remove(is_it)
        {
            item.give_to(client);
            self.push_back(item);
        }
    }

    /// Takes out the first one that `is_it`.
    pub(super) fn remove(&mut self, is_it: impl Fn(&T) -> bool) -> Option<T> {
        let (client, at) = self.find(is_it)?;
        let item = self.clients.get_mut(&client)?.queue.remove(at);
        self.leave(client);
        item
    }

    /// All of it.
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = T> + use<T> {
        self.turns.clear();
        std::mem::take(&mut self.clients).into_values().flat_map(|waiting| waiting.queue)
    }

    /// A client that has nothing waiting has no turn.
    fn leave(&mut self, client: u64) {
        if self.clients.get(&client).is_some_and(|waiting| waiting.queue.is_empty()) {
            self.clients.remove(&client);
            self.turns.retain(|other| *other != client);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    struct Item(u64, u64, u32);

    impl Costs for Item {
        fn client(&self) -> u64 {
            self.0
        }

        fn give_to(&mut self, client: u64) {
            self.0 = client;
        }

        fn bytes(&self) -> u64 {
            self.1
        }
    }

    fn any(_: u64) -> bool {
        true
    }

    #[test]
    fn who_has_little_waits_for_one_turn_of_each_other() {
        let mut fair = Fair::default();
        (0..100).for_each(|n| fair.push_back(Item(1, 10, n)));
        (0..3).for_each(|n| assert_eq!(fair.pop(any), Some(Item(1, 10, n))));
        fair.push_back(Item(2, 10, 0));
        fair.push_back(Item(3, 10, 0));
        let next: Vec<_> = (0..6).map(|_| fair.pop(any).unwrap().0).collect();
        let place = |client| next.iter().position(|one| *one == client).unwrap();
        assert!(place(2) < 4 && place(3) < 5, "{next:?}");
        assert_eq!(fair.len(), 93);
    }

    #[test]
    fn bytes_count_as_well_as_scans() {
        let mut fair = Fair::default();
        for n in 0..400 {
            fair.push_back(Item(1, 10 * QUANTUM, n));
            fair.push_back(Item(2, 0, n));
        }
        let first: Vec<_> = (0..110).map(|_| fair.pop(any).unwrap().0).collect();
        let large = first.iter().filter(|client| **client == 1).count();
        assert!((8..=12).contains(&large), "{large}");
    }

    #[test]
    fn what_is_put_back_is_next() {
        let mut fair = Fair::default();
        for n in 0..4 {
            fair.push_back(Item(1, COST_MAX * 9, n));
            fair.push_back(Item(2, 5, n));
        }
        for _ in 0..5 {
            let item = fair.pop(any).unwrap();
            fair.push_front(item);
            assert_eq!(fair.pop(any), Some(item));
        }
        assert_eq!(fair.remove(|item| item.0 == 1 && item.2 == 3), Some(Item(1, COST_MAX * 9, 3)));
        assert_eq!(fair.remove(|item| item.2 == 9), None);
        fair.push_back(Item(7, 1, 1));
        assert_eq!(fair.pop(|client| client == 7), Some(Item(7, 1, 1)));
        assert_eq!(fair.pop(|client| client == 7), None, "nobody else may");
        let len = fair.len();
        assert_eq!(fair.take_all().count(), len);
        assert_eq!((fair.len(), fair.pop(any)), (0, None));
    }

    #[test]
    fn what_another_waits_for_comes_in_whichever_turn_is_sooner() {
        let mut fair = Fair::default();
        (0..100).for_each(|n| fair.push_back(Item(1, 10, n)));
        (0..3).for_each(|n| fair.push_back(Item(2, 10, 200 + n)));
        // Behind three of the second's own, and so behind six; and one that comes before those.
        fair.share(2, |item| item.2 == 50);
        fair.share(2, |item| item.2 == 1);
        // Of a third that has nothing; and of one that it has already, or nobody.
        fair.share(3, |item| item.2 == 99);
        fair.share(3, |item| item.2 == 99);
        fair.share(3, |item| item.2 == 1000);
        assert_eq!(fair.len(), 103);
        let next: Vec<_> = std::iter::from_fn(|| fair.pop(any)).collect();
        let place = |n| next.iter().position(|item| item.2 == n).unwrap();
        assert!(place(99) < 4 && (6..12).contains(&place(50)) && place(1) < 6, "{next:?}");
        assert_eq!((next[place(99)].0, next[place(50)].0, next[place(1)].0), (3, 2, 1));
        assert_eq!(next.len(), 103);
    }

    #[test]
    fn bytes_count_for_what_is_sooner() {
        let mut fair = Fair::default();
        (0..4).for_each(|n| fair.push_back(Item(1, 10, n)));
        fair.push_back(Item(2, 8 * QUANTUM, 5));
        fair.share(2, |item| item.2 == 3);
        assert_eq!(fair.remove(|item| item.2 == 3), Some(Item(1, 10, 3)));
    }

    proptest! {
        /// Nothing is lost or comes twice, and each client's own come in their order.
        #[test]
        fn each_comes_once_in_its_clients_order(
            items in prop::collection::vec((0..5_u64, 0..COST_MAX * 2), 0..60), pops in 0..60_usize
        ) {
            let mut fair = Fair::default();
            let all: Vec<_> = (0..).zip(&items).map(|(n, (client, len))| Item(*client, *len, n)).collect();
            let mut taken = Vec::new();
            for (n, item) in all.iter().enumerate() {
                fair.push_back(*item);
                if n % 3 == 0 && n < pops {
                    taken.extend(fair.pop(|client| client % 2 == 0));
                }
            }
            taken.extend(std::iter::from_fn(|| fair.pop(any)));
            prop_assert_eq!(fair.len(), 0);
            for client in 0..5 {
                let of = |all: &[Item]| all.iter().filter(|item| item.0 == client).copied().collect::<Vec<_>>();
                prop_assert_eq!(of(&taken), of(&all));
            }
        }
    }
}
