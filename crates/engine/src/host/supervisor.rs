//! The life of one engine's processes. One thread runs it and alone changes what is here.
//!
//! ```text
//!                 Ready
//!   Starting ───────────────► Ready ◄──────────────────────────┐
//!      │                        │ crash, broken protocol,      │ Ready
//!      │ Failed, or three       │ scan past its limit, hung    │
//!      │ starts in vain         ▼                              │
//!      │                   Restarting ─────────────────────────┤
//!      ▼                        │ Failed, or three in vain     │
//!   Failed ◄────────────────────┘                              │
//!      └──── tried again, 100 ms doubling to 5 s ──────────────┘
//! ```
//!
//! Owned here: the process in use (`current`), the one that is loading (`starting`), a second one that is
//! ready to take over where the configuration wants it (`spare`), and killed ones that are not reaped yet
//! (`corpses`). A lost process's place is taken by the spare at once, else by the next that is ready. What
//! the scans go through is in `flow`.
//!
//! The first start may be strict: then an error in the signatures refuses them. A restart loads leniently:
//! the files that load are used, and `diagnostics` name the others.

use std::io::Read;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::time::{Duration, Instant};

use super::flow::{Blame, Finished, NotYours, STALL};
use super::process::{Corpse, Event, Process, ProcessId, Ready};
use super::{EngineState, ScanError, Shared, lock};
use crate::protocol::{ProtocolError, ToEngine, ToHost, encode_to_engine};
use crate::report::{Description, Diagnostic, Level};
use crate::sys::{self, Wait};

/// First wait before another start, and the longest.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Starts in vain after which waiting scans are refused.
const STARTS_IN_VAIN: u32 = 3;
/// Ready for this long, a process counts as good, and the next restart is quick again.
const PROVEN: Duration = Duration::from_secs(10);
/// An idle process is pinged when it was silent for this long, and killed after as long again.
const SILENCE: Duration = Duration::from_secs(10);
/// Longest sleep, for the checks that have no deadline of their own.
const TICK: Duration = Duration::from_secs(5);
/// Diagnostics of one process that go to the log.
const MOST_LOGGED: usize = 20;
/// Most messages taken from one process before the others get their turn.
const MOST_MESSAGES: usize = 256;

/// What became of a process after its messages were read.
enum Turn {
    Lives,
    /// It said Ready.
    Loaded(Description),
    /// It said Failed.
    Refused(Vec<Diagnostic>),
    /// It is dead or closed its socket.
    Closed,
    /// It broke the protocol.
    Violation(Violation),
}

/// What no engine may do.
#[derive(Debug, thiserror::Error)]
enum Violation {
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    #[error(transparent)]
    NotYours(#[from] NotYours),
    #[error("it sent a message out of turn")]
    OutOfTurn,
}

/// Where a process stands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Slot {
    Current,
    Starting,
    Spare,
}

/// Gets each change of state.
type Listener = Box<dyn Fn(EngineState) + Send>;

/// See the module.
pub(super) struct Supervisor {
    shared: Arc<Shared>,
    listener: Listener,
    processes: u64,
    /// A process has been ready.
    was_ready: bool,
    current: Option<Process>,
    starting: Option<Process>,
    spare: Option<Process>,
    corpses: Vec<Corpse>,
    retry_at: Option<Instant>,
    back_off: Duration,
    /// When the process in use said Ready.
    ready_at: Instant,
    in_vain: u32,
}

impl Supervisor {
    pub(super) fn new(shared: Arc<Shared>, listener: Listener) -> Self {
        Self {
            shared,
            listener,
            processes: 0,
            was_ready: false,
            current: None,
            starting: None,
            spare: None,
            corpses: Vec::new(),
            retry_at: Some(Instant::now()),
            back_off: BACK_OFF.0,
            ready_at: Instant::now(),
            in_vain: 0,
        }
    }

    /// The thread's body.
    pub(super) fn run(mut self) {
        while !self.shared.stop.load(Acquire) {
            self.keep_time(Instant::now());
            self.wait_and_read();
        }
        self.stop();
    }

    // Time

    /// Everything that happens because time has passed.
    fn keep_time(&mut self, now: Instant) {
        self.kill_late_loader(now);
        self.kill_overdue(now);
        self.kill_silent(now);
        self.corpses.retain_mut(|corpse| !corpse.reap());
        if self.wants_process() && self.retry_at.is_none_or(|at| at <= now) {
            self.start();
        }
    }

    /// Whether a process is missing that nobody loads.
    fn wants_process(&self) -> bool {
        let is_whole =
            self.current.is_some() && (self.spare.is_some() || !self.shared.config.spare);
        self.starting.is_none() && !is_whole
    }

    fn kill_late_loader(&mut self, now: Instant) {
        let limit = self.shared.config.ready_timeout;
        if let Some(process) = self.starting.take_if(|process| process.since + limit <= now) {
            self.corpses.push(process.kill());
            let reason = format!("not ready within {limit:?}");
            self.start_failed(vec![Diagnostic::error("engine-slow", reason)], true);
        }
    }

    fn kill_overdue(&mut self, now: Instant) {
        let overdue = |process: &mut Process| lock(&self.shared.flow).is_overdue(process.id, now);
        if let Some(process) = self.current.take_if(overdue) {
            let reason = "a scan passed its time limit".to_owned();
            self.lose_current(process, reason, Blame::Overdue);
        }
    }

    /// A process that no longer takes messages, though it has a worker free to do it.
    fn kill_silent(&mut self, now: Instant) {
        let stalled = |process: &mut Process| {
            process.heard + STALL <= now && lock(&self.shared.flow).is_stalled(process.id, now)
        };
        if let Some(process) = self.current.take_if(stalled) {
            let reason = "it takes no scans though a worker is free".to_owned();
            self.lose_current(process, reason, Blame::Nobody);
        }
        self.ping(now);
    }

    fn ping(&mut self, now: Instant) {
        let Some(process) = &mut self.current else { return };
        if !lock(&self.shared.flow).is_idle(process.id) || process.heard + SILENCE > now {
            return;
        }
        match process.pinged {
            None => {
                if let Ok(bytes) = encode_to_engine(ToEngine::Ping)
                    && process.link.send([&bytes, &[]], None).is_ok()
                {
                    process.pinged = Some(now);
                }
            }
            Some(at) if at + SILENCE <= now => {
                if let Some(process) = self.current.take() {
                    let reason = "it does not answer a ping".to_owned();
                    self.lose_current(process, reason, Blame::Nobody);
                }
            }
            Some(_) => {}
        }
    }

    // Events

    /// Sleeps until something happens, and takes the messages of those it happened to.
    fn wait_and_read(&mut self) {
        let blocked = lock(&self.shared.flow).is_blocked();
        let mut waits = vec![Wait { fd: self.shared.wake.as_fd(), write: false }];
        let mut owners = Vec::with_capacity(3);
        for (slot, process) in self.slots() {
            let first = waits.len();
            waits.extend(process.waits(blocked && slot == Slot::Current));
            owners.push((slot, first..waits.len()));
        }
        waits.extend(self.corpses.iter().map(Corpse::wait));
        let ready = match sys::poll(&waits, self.sleep(Instant::now())) {
            Ok(ready) => ready,
            Err(error) => {
                // Not seen to fail; without a pause it would be a busy loop.
                tracing::error!(%error, "the engine's supervisor cannot poll");
                std::thread::sleep(BACK_OFF.0);
                vec![true; waits.len()]
            }
        };
        drop(waits);
        if ready[0] {
            // Only the wake matters, not the count.
            let _ = (&self.shared.wake).read(&mut [0; 8]);
        }
        for (slot, at) in owners {
            let Some(ready) = Ready::of(&ready[at]) else { continue };
            if blocked && slot == Slot::Current {
                lock(&self.shared.flow).unblock();
            }
            self.read(slot, ready);
        }
        lock(&self.shared.flow).pump();
    }

    fn slots(&self) -> impl Iterator<Item = (Slot, &Process)> {
        let one = |slot| move |process| (slot, process);
        self.current
            .iter()
            .map(one(Slot::Current))
            .chain(self.starting.iter().map(one(Slot::Starting)))
            .chain(self.spare.iter().map(one(Slot::Spare)))
    }

    /// How long nothing will happen by itself.
    fn sleep(&self, now: Instant) -> Duration {
        let limit = self.shared.config.ready_timeout;
        let retry = self.retry_at.filter(|_| self.wants_process());
        lock(&self.shared.flow)
            .next_deadline()
            .into_iter()
            .chain(retry)
            .chain(self.starting.iter().map(|process| process.since + limit))
            .map(|at| at.saturating_duration_since(now))
            .fold(TICK, Duration::min)
    }

    /// Takes the messages of one process, and does what follows.
    fn read(&mut self, slot: Slot, ready: Ready) {
        let taken = match slot {
            Slot::Current => self.current.take(),
            Slot::Starting => self.starting.take(),
            Slot::Spare => self.spare.take(),
        };
        let Some(mut process) = taken else { return };
        if ready.stderr {
            process.log_stderr();
        }
        match self.turn(&mut process, ready) {
            Turn::Lives => self.put_back(slot, process),
            Turn::Loaded(description) => self.loaded(process, description),
            Turn::Refused(diagnostics) => {
                self.corpses.push(process.kill());
                self.start_failed(diagnostics, true);
            }
            Turn::Closed => {
                let id = process.id;
                let (reason, corpse) = process.end();
                self.corpses.extend(corpse);
                self.gone(slot, id, reason);
            }
            Turn::Violation(violation) => {
                let id = process.id;
                self.corpses.push(process.kill());
                self.gone(slot, id, format!("it broke the protocol: {violation}"));
            }
        }
    }

    fn put_back(&mut self, slot: Slot, process: Process) {
        match slot {
            Slot::Current => self.current = Some(process),
            Slot::Starting => self.starting = Some(process),
            Slot::Spare => self.spare = Some(process),
        }
    }

    /// Reads what a process has sent, and answers scans as their reports come.
    fn turn(&mut self, process: &mut Process, ready: Ready) -> Turn {
        if !(ready.socket || ready.ended) {
            return Turn::Lives;
        }
        for _ in 0..MOST_MESSAGES {
            let message = match process.receive() {
                Event::Message(message) => message,
                // It ended before this was read: what it has sent is complete.
                Event::Nothing if ready.ended => return Turn::Closed,
                Event::Nothing => return Turn::Lives,
                Event::Closed => return Turn::Closed,
                Event::Violation(error) => return Turn::Violation(error.into()),
            };
            let handled = match message {
                ToHost::Ready(description) if process.description.is_none() => {
                    return Turn::Loaded(description);
                }
                ToHost::Failed { diagnostics, .. } if process.description.is_none() => {
                    return Turn::Refused(diagnostics);
                }
                other => self.at_work(process, other),
            };
            if let Err(violation) = handled {
                return Turn::Violation(violation);
            }
        }
        Turn::Lives
    }

    /// A message of a process that is ready.
    fn at_work(&mut self, process: &mut Process, message: ToHost) -> Result<(), Violation> {
        let Some(description) = &process.description else { return Err(Violation::OutOfTurn) };
        match message {
            ToHost::Started { id } => lock(&self.shared.flow).started(process.id, id)?,
            ToHost::Report { id, answer, next } => {
                let mut flow = lock(&self.shared.flow);
                let finished = flow.reported(process.id, id, answer, description.generation)?;
                let started = next.map_or(Ok(()), |next| flow.started(process.id, next));
                flow.pump();
                drop(flow);
                self.back_off = BACK_OFF.0;
                finished.deliver();
                started?;
            }
            ToHost::Pong => drop(process.pinged.take().ok_or(Violation::OutOfTurn)?),
            ToHost::Ready(_) | ToHost::Failed { .. } => return Err(Violation::OutOfTurn),
        }
        Ok(())
    }

    // Changes of state

    /// Starts a process.
    fn start(&mut self) {
        self.retry_at = None;
        self.processes += 1;
        let config = &self.shared.config;
        // Who asked for new signatures wants all of them or nothing.
        let strict = config.strict && !self.was_ready;
        match Process::spawn(config, ProcessId(self.processes), strict) {
            Ok(process) => self.starting = Some(process),
            Err(error) => {
                let program = config.command.first().map_or("", String::as_str);
                let reason = format!("cannot start `{program}`: {error}");
                self.start_failed(vec![Diagnostic::error("engine-spawn", reason)], true);
            }
        }
    }

    /// A process said Ready.
    fn loaded(&mut self, mut process: Process, description: Description) {
        if self.shared.config.strict && !self.was_ready && description.has_errors() {
            self.corpses.push(process.kill());
            return self.start_failed(description.diagnostics, true);
        }
        process.description = Some(description);
        self.was_ready = true;
        self.in_vain = 0;
        self.retry_at = None;
        if self.current.is_some() {
            tracing::debug!(engine = self.shared.config.name, "a spare process is ready");
            lock(&self.shared.published).spare_pid = Some(process.pid());
            self.spare = Some(process);
        } else {
            self.take_into_use(process);
        }
    }

    /// A process that is ready gets the scans.
    fn take_into_use(&mut self, process: Process) {
        let Some(description) = process.description.clone() else { return };
        self.ready_at = Instant::now();
        let link = Arc::clone(&process.link);
        self.shared.by_descriptor.store(description.by_descriptor, Release);
        lock(&self.shared.flow).open(process.id, link, description.by_descriptor);
        lock(&self.shared.published).pid = Some(process.pid());
        self.current = Some(process);
        self.publish(EngineState::Ready { description });
        lock(&self.shared.flow).pump();
    }

    /// A process ended that nobody killed on purpose, or one that broke the protocol.
    fn gone(&mut self, slot: Slot, id: ProcessId, reason: String) {
        match slot {
            Slot::Current => self.current_is_gone(id, reason, Blame::InWork),
            Slot::Starting => {
                let reason = format!("before it was ready, the engine was gone: {reason}");
                self.start_failed(vec![Diagnostic::error("engine-start", reason)], false);
            }
            Slot::Spare => {
                tracing::warn!(
                    engine = self.shared.config.name,
                    reason,
                    "the spare process is gone"
                );
                lock(&self.shared.published).spare_pid = None;
                self.schedule_retry();
            }
        }
    }

    /// No process came of a start. `certain`: another try would most likely end the same.
    fn start_failed(&mut self, diagnostics: Vec<Diagnostic>, certain: bool) {
        self.in_vain += 1;
        self.schedule_retry();
        if self.current.is_some() || !certain && self.in_vain < STARTS_IN_VAIN {
            let reason = diagnostics.first().map_or_else(String::new, ToString::to_string);
            tracing::warn!(engine = self.shared.config.name, reason, "a start failed");
            return;
        }
        let reason =
            diagnostics.first().map_or_else(|| "no reason given".into(), |d| d.reason.clone());
        let refused = lock(&self.shared.flow).close(ScanError::Unavailable { reason });
        self.publish(EngineState::Failed { diagnostics });
        deliver(refused);
    }

    fn schedule_retry(&mut self) {
        self.retry_at = Some(Instant::now() + self.back_off);
        self.back_off = (self.back_off * 2).min(BACK_OFF.1);
    }

    fn lose_current(&mut self, process: Process, reason: String, blame: Blame) {
        let id = process.id;
        self.corpses.push(process.kill());
        self.current_is_gone(id, reason, blame);
    }

    fn current_is_gone(&mut self, id: ProcessId, reason: String, blame: Blame) {
        if self.ready_at.elapsed() >= PROVEN {
            self.back_off = BACK_OFF.0;
        }
        self.schedule_retry();
        {
            let mut published = lock(&self.shared.published);
            published.restarts += 1;
            published.pid = None;
        }
        self.publish(EngineState::Restarting { reason });
        self.give_back(id, blame);
        if let Some(spare) = self.spare.take() {
            lock(&self.shared.published).spare_pid = None;
            self.take_into_use(spare);
        }
    }

    /// Takes the scans of a process that is gone.
    fn give_back(&mut self, id: ProcessId, blame: Blame) {
        let mut flow = lock(&self.shared.flow);
        let ended = flow.lost(id, blame);
        flow.pump();
        drop(flow);
        deliver(ended);
    }

    fn publish(&self, state: EngineState) {
        let engine = &self.shared.config.name;
        match &state {
            EngineState::Starting => {}
            EngineState::Ready { description } => {
                let generation = description.generation.short();
                tracing::info!(engine, rules = description.rules, generation, "ready");
                log_diagnostics(engine, description);
            }
            EngineState::Restarting { reason } => {
                tracing::warn!(engine, reason, "the engine is replaced");
            }
            EngineState::Failed { diagnostics } => {
                for one in diagnostics {
                    tracing::error!(engine, "{one}");
                }
            }
        }
        lock(&self.shared.published).state = state.clone();
        self.shared.changed.notify_all();
        guarded(|| (self.listener)(state));
    }

    /// The end: nothing is left running, nothing unanswered.
    fn stop(mut self) {
        let waiting = lock(&self.shared.flow).close(ScanError::Stopped);
        deliver(waiting);
        let current = self.current.take();
        let at_work = current.as_ref().map(|process| process.id);
        for process in [current, self.starting.take(), self.spare.take()].into_iter().flatten() {
            self.corpses.push(process.kill());
        }
        if let Some(id) = at_work {
            self.give_back(id, Blame::Nobody);
        }
        let deadline = Instant::now() + BACK_OFF.1;
        while !self.corpses.is_empty() && Instant::now() < deadline {
            let waits: Vec<Wait<'_>> = self.corpses.iter().map(Corpse::wait).collect();
            if sys::poll(&waits, BACK_OFF.0).is_err() {
                break;
            }
            self.corpses.retain_mut(|corpse| !corpse.reap());
        }
    }
}

/// An error means that signatures are missing. All of them are in the status.
fn log_diagnostics(engine: &str, description: &Description) {
    for one in description.diagnostics.iter().take(MOST_LOGGED) {
        match one.level {
            Level::Error => tracing::warn!(engine, "{one}"),
            Level::Warning => tracing::info!(engine, "{one}"),
        }
    }
    let rest = description.diagnostics.len().saturating_sub(MOST_LOGGED);
    if rest + description.omitted as usize > 0 {
        tracing::info!(engine, rest, omitted = description.omitted, "further diagnostics");
    }
}

fn deliver(finished: Vec<Finished>) {
    finished.into_iter().for_each(Finished::deliver);
}

/// Calls code of the service; its panic must not end the supervisor.
fn guarded(call: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(call)).is_err() {
        tracing::error!("a listener of an engine panicked");
    }
}
