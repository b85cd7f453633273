//! Accesses that wait for a filler, and those that wait for another one of the same file.
//!
//! A file is read for one access at a time: whoever comes meanwhile waits. Once that one is answered it is the turn of who
//! came next, and so on: most find the file known then, and are through at once.

use crate::driver::{Job, Subject};
use crate::event::HeldEvent;
use crate::file::Identity;
use seawall_fanotify::ledger::Ledger;
use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A file's device and inode number.
type Key = (u64, u64);

#[derive(Debug, Default)]
pub struct Jobs {
    queue: Mutex<VecDeque<Job>>,
    added: Condvar,
    /// Files that are read for an access, and who waits for that.
    waiting: Mutex<HashMap<Key, VecDeque<Job>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The right to read a file for an access. Whoever waited for it first has it next.
#[derive(Debug)]
pub struct Turn {
    jobs: Arc<Jobs>,
    key: Key,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut waiting = lock(&self.jobs.waiting);
        let next = waiting.get_mut(&self.key).and_then(VecDeque::pop_front);
        let Some(job) = next else {
            waiting.remove(&self.key);
            return;
        };
        if let Subject::Access(event) = &job.subject {
            event.give_turn(Self { jobs: Arc::clone(&self.jobs), key: self.key });
        }
        drop(waiting);
        // It has waited already.
        lock(&self.jobs.queue).push_front(job);
        self.jobs.added.notify_one();
    }
}

impl Jobs {
    pub fn push(&self, job: Job) {
        lock(&self.queue).push_back(job);
        self.added.notify_one();
    }

    /// The next access to scan. Looks again now and then, in case a wake went missing.
    pub fn next(&self) -> Job {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(job) = queue.pop_front() {
                return job;
            }
            let tick = Duration::from_secs(2);
            queue = self.added.wait_timeout(queue, tick).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Whether the file may be read for this access now. Else its job is queued again when that may be.
    pub fn take_turn(self: &Arc<Self>, event: &HeldEvent, job: &Job) -> bool {
        let mut waiting = lock(&self.waiting);
        if event.has_turn() {
            return true;
        }
        let Identity { device, inode, .. } = event.look.identity;
        let key = (device, inode);
        match waiting.entry(key) {
            Entry::Occupied(mut others) => {
                others.get_mut().push_back(job.clone());
                false
            }
            Entry::Vacant(none) => {
                none.insert(VecDeque::new());
                event.give_turn(Turn { jobs: Arc::clone(self), key });
                true
            }
        }
    }

    /// What waits and is to be picked.
    pub fn events(&self, pick: impl Fn(&HeldEvent) -> bool) -> Vec<Arc<HeldEvent>> {
        let pick = |job: &Job| match &job.subject {
            Subject::Access(event) => pick(event).then(|| Arc::clone(event)),
            Subject::Background { .. } => None,
        };
        let mut found: Vec<_> = lock(&self.queue).iter().filter_map(pick).collect();
        found.extend(lock(&self.waiting).values().flatten().filter_map(pick));
        found
    }

    /// Drops those whose access was answered meanwhile, so that their files do not stay open. Gives these accesses.
    pub fn purge(&self, ledger: &Ledger) -> Vec<Arc<HeldEvent>> {
        let keep = |job: &Job| match &job.subject {
            Subject::Access(event) => ledger.is_held(event.claim),
            Subject::Background { .. } => true,
        };
        let split = |all: &mut VecDeque<Job>| {
            let (kept, gone): (_, VecDeque<Job>) = std::mem::take(all).into_iter().partition(keep);
            *all = kept;
            gone
        };
        // They are dropped after the locks: a turn that goes with one queues another.
        let mut gone = split(&mut lock(&self.queue));
        gone.extend(lock(&self.waiting).values_mut().flat_map(split));
        let event = |job: Job| match job.subject {
            Subject::Access(event) => Some(event),
            Subject::Background { .. } => None,
        };
        gone.into_iter().filter_map(event).collect()
    }
}
