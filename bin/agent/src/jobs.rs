//! Accesses that wait for a filler, and those that wait for another one of the same file.
//!
//! A file is read for one access at a time: whoever comes meanwhile waits, and is queued again once that one is answered.
//! Then the file is known, most likely; if not, the next of them is read for.

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
    waiting: Mutex<HashMap<Key, Vec<Arc<HeldEvent>>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The right to read a file for an access. Whoever waited for it is queued when it goes.
#[derive(Debug)]
pub struct Turn {
    jobs: Arc<Jobs>,
    key: Key,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let waiting = lock(&self.jobs.waiting).remove(&self.key);
        for event in waiting.into_iter().flatten() {
            self.jobs.push(Job::new(Subject::Access(event)));
        }
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

    /// Whether the file may be read for this access now. Else it is queued again when that may be.
    pub fn take_turn(self: &Arc<Self>, event: &Arc<HeldEvent>) -> bool {
        let mut waiting = lock(&self.waiting);
        if event.has_turn() {
            return true;
        }
        let Identity { device, inode, .. } = event.look.identity;
        let key = (device, inode);
        match waiting.entry(key) {
            Entry::Occupied(mut others) => {
                others.get_mut().push(Arc::clone(event));
                false
            }
            Entry::Vacant(none) => {
                none.insert(Vec::new());
                event.give_turn(Turn { jobs: Arc::clone(self), key });
                true
            }
        }
    }

    /// What waits and is to be picked.
    pub fn events(&self, pick: impl Fn(&HeldEvent) -> bool) -> Vec<Arc<HeldEvent>> {
        let mut found = Vec::new();
        for job in &*lock(&self.queue) {
            if let Subject::Access(event) = &job.subject {
                found.extend(pick(event).then(|| Arc::clone(event)));
            }
        }
        for others in lock(&self.waiting).values() {
            found.extend(others.iter().filter(|event| pick(event)).map(Arc::clone));
        }
        found
    }

    /// Drops those whose access was answered meanwhile, so that their files do not stay open. Gives these accesses.
    pub fn purge(&self, ledger: &Ledger) -> Vec<Arc<HeldEvent>> {
        let is_held = |event: &HeldEvent| ledger.is_held(event.claim);
        // They are dropped after the locks: a turn that goes with one queues others.
        let mut lost = Vec::new();
        let keep = |job: &Job| match &job.subject {
            Subject::Access(event) => is_held(event),
            Subject::Background { .. } => true,
        };
        let gone: Vec<Job> = {
            let mut queue = lock(&self.queue);
            let (kept, gone) = queue.drain(..).partition(keep);
            *queue = kept;
            Vec::from(gone)
        };
        for others in lock(&self.waiting).values_mut() {
            lost.extend(others.extract_if(.., |event| !is_held(event)));
        }
        lost.extend(gone.into_iter().filter_map(|job| match job.subject {
            Subject::Access(event) => Some(event),
            Subject::Background { .. } => None,
        }));
        lost
    }
}
