//! Reading permission events.
//!
//! A reader does nothing but read, answer what needs no scan, enter the rest in the ledger, and ask for it in
//! the ring or queue it. It opens no file, resolves no path, writes no log, waits for no disk and takes no lock
//! under which anything slow happens. There are two or more, because reading an event of an overlay can raise another one that only
//! another reader can take.

use crate::driver::{Driver, OUTSTANDING_MAX, count};
use crate::file::{Look, fails_open};
use crate::jobs::Turn;
use crate::memory::Known;
use crate::ring;
use crate::truth;
use rustix::event::{PollFd, PollFlags, epoll};
use seawall_fanotify::ledger::{Claim, Held, HeldFile, READERS_MAX};
use seawall_fanotify::{Answer, Event, EventKind, FileHandle, Group, process};
use seawall_proto::{ExposureReason, Operation, Policy, Process};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// Events read at once. What waits in a reader's hand is not seen by the others.
const BATCH: usize = 8;
/// No more event files than this are open at once; beyond it the answer comes at once, by fail mode.
const LIVE_MAX: u32 = 3 * OUTSTANDING_MAX;

/// Who waits is looked up when it has waited this long, in milliseconds: nearly all have their verdict
/// before.
const LONG_MS: u64 = 500;

static LIVE: AtomicU32 = AtomicU32::new(0);

/// An access that waits for its answer.
#[derive(Debug)]
pub struct HeldEvent {
    pub claim: Claim,
    pub file: HeldFile,
    pub operation: Operation,
    pub pid: u32,
    pub look: Look,
    pub since_ms: u64,
    pub deadline_ms: u64,
    process: OnceLock<Process>,
    /// While its file is read for it.
    turn: Mutex<Option<Turn>>,
}

impl HeldEvent {
    fn new(
        file: HeldFile,
        operation: Operation,
        pid: u32,
        look: Look,
        since_ms: u64,
        deadline_ms: u64,
    ) -> Arc<Self> {
        LIVE.fetch_add(1, Ordering::Relaxed);
        let (claim, process, turn) = (file.claim(), OnceLock::new(), Mutex::default());
        Arc::new(Self { claim, file, operation, pid, look, since_ms, deadline_ms, process, turn })
    }

    fn turn(&self) -> MutexGuard<'_, Option<Turn>> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters the file's handle in the ledger, for whoever lets it through unscanned. The first time alone counts.
    pub fn name(&self) {
        name(&self.file, &self.look);
    }

    /// Whether the file is read for this access, and others of it wait.
    pub fn has_turn(&self) -> bool {
        self.turn().is_some()
    }

    pub fn give_turn(&self, turn: Turn) {
        *self.turn() = Some(turn);
    }

    /// It is answered: the others need not wait for what else is done with it.
    pub fn end_turn(&self) {
        let turn = self.turn().take();
        drop(turn);
    }

    /// Who waits. To be asked before the answer: afterwards the process may be gone. It waits in open(2),
    /// and reading its name and owner takes no lock that it could hold.
    pub fn process(&self) -> &Process {
        self.process.get_or_init(|| process_of(self.pid))
    }

    /// Whether it has waited for long and nobody has asked who waits.
    pub fn is_to_be_looked_up(&self, now_ms: u64) -> bool {
        self.process.get().is_none() && self.since_ms + LONG_MS <= now_ms
    }
}

fn name(file: &HeldFile, look: &Look) {
    if !file.is_named()
        && let Ok(handle) = FileHandle::of(file.as_fd(), look.identity.device)
    {
        file.name(&handle);
    }
}

/// A process as the operator gets to see it.
pub fn process_of(pid: u32) -> Process {
    let mut name = std::fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
    name.truncate(name.trim_ascii_end().len());
    Process { name: serde_bytes::ByteBuf::from(name), uid: truth::user_of(pid) }
}

impl Drop for HeldEvent {
    fn drop(&mut self) {
        LIVE.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Wakes one reader for one event, where poll(2) would wake all of them.
struct Queue(OwnedFd);

impl Queue {
    fn of(group: &Group) -> rustix::io::Result<Self> {
        let queue = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::EXCLUSIVE;
        epoll::add(&queue, group, epoll::EventData::new_u64(0), flags)?;
        Ok(Self(queue))
    }

    /// Waits for an event, or a second.
    fn wait(&self) {
        let second = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
        let mut ready = [epoll::Event {
            flags: epoll::EventFlags::empty(),
            data: epoll::EventData::new_u64(0),
        }];
        let _or_not = epoll::wait(&self.0, &mut ready[..], Some(&second));
    }
}

/// Reads events for ever. Reader `number` says at each turn that it is not stuck.
pub fn read_events(driver: &Driver, number: usize) {
    let group = &driver.groups.permission;
    let queue = Queue::of(group).ok();
    let (mut held, mut asking) = (Vec::with_capacity(BATCH), Vec::with_capacity(BATCH));
    let (mut is_alone, mut buffer) = (true, Vec::new());
    loop {
        driver.ledger.beat_reader(number, process::now_ms());
        match group.read(BATCH, |event| held.extend(take(driver, event))) {
            // Where one came alone there is most likely no other yet.
            Ok(came) => is_alone = came == 1,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => is_alone = true,
            // The kernel has denied what it could not hand out. Out of descriptors is bounded away;
            // should it happen all the same, a pause lets others close theirs.
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
        // One alone is named while the host works; the last of many would wait for its name.
        if held.len() > 1 {
            held.iter().for_each(|event| event.name());
        }
        // All are asked for before the first reply is looked for.
        asking.extend(held.drain(..).filter_map(|event| ring::ask(driver, event, &mut buffer)));
        asking.drain(..).for_each(|asking| ring::look(driver, asking));
        if is_alone {
            match &queue {
                Some(queue) => queue.wait(),
                None => drop(wait_readable(group)),
            }
        }
    }
}

/// Waits until there is something to read, or a while has passed. Whether there is.
pub fn wait_readable(file: impl AsFd) -> bool {
    let mut fds = [PollFd::new(&file, PollFlags::IN)];
    let second = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
    rustix::event::poll(&mut fds, Some(&second)).is_ok_and(|ready| ready > 0)
}

/// Answers an event, or gives it back where it is held.
fn take(driver: &Driver, event: Event) -> Option<Arc<HeldEvent>> {
    let fd = event.fd?;
    let operation = if event.kind == EventKind::Exec { Operation::Exec } else { Operation::Open };
    count(&driver.counters.events);
    if is_own(driver, event.pid) {
        return pass(driver, &fd);
    }
    let Ok(look) = Look::at(&fd) else { return pass(driver, &fd) };
    if !look.is_regular || look.identity.size == 0 {
        return pass(driver, &fd);
    }
    let now_ms = process::now_ms();
    // An exec is looked at by a filler in any case: the process may be in a mount namespace whose
    // file systems are not watched yet.
    if operation == Operation::Open
        && let Some(known) = driver.memory.known(&look.identity, now_ms)
    {
        return pass_known(driver, &fd, &look, known);
    }
    hold(driver, fd, operation, event.pid, look, now_ms)
}

/// Our own processes must not wait for themselves. The number of a supervisor that died may belong to
/// anybody by now.
fn is_own(driver: &Driver, pid: u32) -> bool {
    pid == driver.worker || (pid == driver.supervisor && driver.is_supervised())
}

fn answer_now(driver: &Driver, fd: &OwnedFd, answer: Answer) -> Option<Arc<HeldEvent>> {
    let _gone = driver.groups.permission.answer(fd.as_raw_fd(), answer);
    None
}

fn pass(driver: &Driver, fd: &OwnedFd) -> Option<Arc<HeldEvent>> {
    count(&driver.counters.passed);
    answer_now(driver, fd, Answer::Allow)
}

fn pass_known(driver: &Driver, fd: &OwnedFd, look: &Look, known: Known) -> Option<Arc<HeldEvent>> {
    count(&driver.counters.remembered);
    if matches!(known, Known::Clean { .. }) {
        // The kernel adds nothing while a writer holds the file.
        driver.mark_again(fd, &look.identity);
    }
    answer_now(driver, fd, Answer::Allow)
}

/// Enters an access in the ledger; gives it back unless it was answered.
fn hold(
    driver: &Driver,
    fd: OwnedFd,
    operation: Operation,
    pid: u32,
    look: Look,
    now_ms: u64,
) -> Option<Arc<HeldEvent>> {
    let policy = driver.policy();
    // Until the marks fit the mode.
    let is_held = match operation {
        Operation::Exec => policy.mode.holds_exec(),
        _ => policy.mode.holds_open(),
    };
    if !is_held {
        return pass(driver, &fd);
    }
    let deadline_ms = now_ms + deadline(&policy, operation, look.identity.size);
    let mode = if operation == Operation::Exec { policy.fail_exec } else { policy.fail_open };
    let fail = if fails_open(mode, &look) { Answer::Allow } else { Answer::Deny };
    let file = match driver.ledger.hold(fd, &Held { deadline_ms, fail }) {
        Ok(file) => file,
        Err(fd) => {
            count(&driver.counters.unscanned);
            return answer_now(driver, &fd, fail);
        }
    };
    // All readers may enter their first events at once.
    if driver.ledger.outstanding() as usize <= READERS_MAX {
        driver.wake_deadline_keeper();
    }
    if LIVE.load(Ordering::Relaxed) >= LIVE_MAX {
        count(&driver.counters.overloaded);
        name(&file, &look);
        driver.answer_unscanned(file.claim(), ExposureReason::Overload);
        return None;
    }
    // Several readers may pick the same one: then they look again.
    while driver.ledger.outstanding() > OUTSTANDING_MAX
        && let Some(oldest) = driver.ledger.oldest()
    {
        if driver.answer_unscanned(oldest, ExposureReason::Overload) {
            count(&driver.counters.overloaded);
        }
    }
    let event = HeldEvent::new(file, operation, pid, look, now_ms, deadline_ms);
    driver.expect_exec(&event);
    Some(event)
}

/// How long an access to a file of `size` bytes is held at most, in milliseconds.
pub fn deadline(policy: &Policy, operation: Operation, size: u64) -> u64 {
    let base = match operation {
        Operation::Exec => policy.exec_deadline_ms,
        _ => policy.open_deadline_ms,
    };
    let more = (size >> 26).saturating_mul(policy.deadline_per_64_mib_ms.into());
    u64::from(base).saturating_add(more).min(policy.most_deadline_ms.max(base).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_grow_with_the_size_up_to_a_bound() {
        let policy = Policy::default();
        for (operation, size, expected) in [
            (Operation::Open, 0, 5_000),
            (Operation::Open, (64 << 20) - 1, 5_000),
            (Operation::Open, 128 << 20, 7_000),
            (Operation::Exec, 64 << 20, 11_000),
            (Operation::Open, u64::MAX, 30_000),
        ] {
            assert_eq!(deadline(&policy, operation, size), expected, "{operation:?} {size}");
        }
    }
}
