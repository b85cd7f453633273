//! The service's side: one [`EngineHandle`] per configured engine.
//!
//! - [`EngineHandle`] is what the service holds: scans go in, reports come back, the state is asked.
//! - `flow` owns the scans: what waits, what is at which process, what each has been through.
//! - `process` owns one engine process: its start, its socket, its standard error, its end.
//! - `supervisor` owns the life of the processes, on one thread per engine; its header draws the
//!   states.
//!
//! A scan costs two thread switches: [`EngineHandle::scan`] sends to the engine from the caller's
//! thread, and the supervisor's thread takes the report and calls `reply`.

mod fair;
mod flow;
mod process;
mod supervisor;

use std::io::{self, Write};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use self::flow::{Flow, Job, Workers};
use self::supervisor::Supervisor;
pub use crate::content::{ContentWriter, SharedContent};
pub use crate::report::{
    Cleaning, Description, Detection, Diagnostic, Generation, Level, Metadata, Operation, Outcome,
    Severity,
};
use crate::sys;

/// How one engine is run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Name in configuration, status and log.
    pub name: String,
    /// Program and arguments. A program without `/` is looked up beside the running program first,
    /// then in PATH.
    pub command: Vec<String>,
    /// Worker threads, that is scans at a time. A scan that hangs holds one until its limit.
    pub threads: u32,
    /// Further ones, which [`Lane::OnDemand`] leaves free: an access finds one whatever is scanned on demand.
    /// With any, no scan on demand is sent ahead, and for ten seconds after an access they have half of `threads`.
    pub kept: u32,
    /// Private memory of the process, signatures included, in MiB.
    pub memory_mib: u64,
    /// Longest time from the start of a process to its Ready.
    pub ready_timeout: Duration,
    /// Most scans that wait; further ones are refused with [`ScanError::QueueFull`].
    pub queue_limit: usize,
    /// Keep a second process that is ready, to take over at once when the one in use is lost. It costs as
    /// much memory again.
    pub spare: bool,
    /// Whether signatures that have an error are refused, until a process was ready. Later ones use what loads.
    pub strict: bool,
}

impl EngineConfig {
    /// Two threads, none kept, 2 GiB, two minutes to load, 4,096 waiting scans, no spare process, not strict.
    pub fn new(name: impl Into<String>, command: Vec<String>) -> Self {
        Self {
            name: name.into(),
            command,
            threads: 2,
            kept: 0,
            memory_mib: 2048,
            ready_timeout: Duration::from_secs(120),
            queue_limit: 4096,
            spare: false,
            strict: false,
        }
    }
}

/// Names one scan of one [`EngineHandle`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ScanId(u64);

/// Which scans go first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    /// Somebody is held until the verdict: before everything else.
    OnAccess,
    /// Nobody waits in a system call.
    OnDemand,
}

/// When a scan has its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Turn {
    /// Before or behind others.
    pub lane: Lane,
    /// Whose it is: clients share an engine fairly, by bytes and scans.
    pub client: u64,
}

impl From<Lane> for Turn {
    /// That of a caller that is alone.
    fn from(lane: Lane) -> Self {
        Self { lane, client: 0 }
    }
}

/// The end of a scan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScanReport {
    /// What was found, or why nothing is known.
    pub result: Result<Outcome, ScanError>,
    /// Signatures of the process that made the result; None when no process did.
    pub generation: Option<Generation>,
    /// From the request until a worker took the scan for the last time.
    pub queued: Duration,
    /// From then to the end.
    pub scanned: Duration,
}

/// Why a scan has no outcome. Policy decides what follows; it never means clean.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScanError {
    /// Past its limit: the engine gave up, or was killed.
    #[error("the scan took longer than its limit")]
    TimedOut,
    /// The engine gave up, and knows what took the time.
    #[error("the scan took longer than its limit: {what}")]
    TimedOutIn {
        /// The engine's words.
        what: String,
    },
    /// The process died twice with this scan in work.
    #[error("killed the engine twice")]
    KilledTwice,
    /// The engine says it could not scan.
    #[error("the engine failed: {reason}")]
    Failed {
        /// The engine's words.
        reason: String,
    },
    /// The engine cannot run at present.
    #[error("the engine cannot run: {reason}")]
    Unavailable {
        /// First of the diagnostics.
        reason: String,
    },
    /// [`EngineHandle::cancel`] came before its end.
    #[error("nobody waits for the scan any more")]
    Cancelled,
    /// Too many scans wait.
    #[error("too many scans wait for the engine")]
    QueueFull,
    /// Lost its process again and again through the faults of other scans.
    #[error("the engine was replaced too often during this scan")]
    Replaced,
    /// The service is ending.
    #[error("the engine is being stopped")]
    Stopped,
}

/// Where an engine is in its life; the supervisor's module draws it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineState {
    /// The first process is loading. Scans wait.
    Starting,
    /// Scans are being answered.
    Ready {
        /// What the process in use said of itself.
        description: Description,
    },
    /// The process is gone, the next one is coming. Scans wait.
    Restarting {
        /// Why the last one is gone.
        reason: String,
    },
    /// No process can be started; tried again every few seconds. Scans are refused.
    Failed {
        /// Why.
        diagnostics: Vec<Diagnostic>,
    },
}

/// All that `status` shows of an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineStatus {
    /// Name in the configuration.
    pub name: String,
    /// Where it is in its life.
    pub state: EngineState,
    /// The process that takes new scans.
    pub pid: Option<u32>,
    /// The one that stands ready to take its place.
    pub spare_pid: Option<u32>,
    /// Processes lost since this handle was started: crashed, or killed for a time limit.
    pub restarts: u64,
    /// Scans that wait.
    pub queued: usize,
    /// Scans that are at a process.
    pub in_flight: usize,
}

/// Gets the report of one scan.
pub(crate) type Reply = Box<dyn FnOnce(ScanReport) + Send>;

/// What the supervisor tells everybody.
#[derive(Clone, Debug)]
struct Published {
    state: EngineState,
    pid: Option<u32>,
    spare_pid: Option<u32>,
    restarts: u64,
}

/// What the handle and the supervisor's thread share.
struct Shared {
    config: EngineConfig,
    flow: Mutex<Flow>,
    published: Mutex<Published>,
    changed: Condvar,
    /// The handle is gone.
    stop: AtomicBool,
    /// The process in use wants every content as a descriptor.
    by_descriptor: AtomicBool,
    wake: std::fs::File,
}

impl Shared {
    /// Makes the supervisor's thread look.
    fn wake(&self) {
        // Fails only when the counter is at its top, that is when a wake is pending anyway.
        let _ = (&self.wake).write(&1u64.to_ne_bytes());
    }
}

/// A panic elsewhere must not stop the answers: the data is consistent between statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One configured engine, supervised until this is dropped.
pub struct EngineHandle {
    shared: Arc<Shared>,
    supervisor: Option<JoinHandle<()>>,
}

impl EngineHandle {
    /// Starts the supervisor's thread and returns at once; the engine gets ready in the background.
    ///
    /// `listener` runs on that thread with each change of the state: it must be quick, and block on nothing.
    /// A Ready with another generation than the last one means that remembered verdicts are of old
    /// signatures.
    ///
    /// New signatures are a new handle: started beside the one in use, it takes the scans once it is ready,
    /// and the old one is dropped when its last scan is answered.
    pub fn start(
        config: EngineConfig,
        listener: impl Fn(EngineState) + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            flow: Mutex::new(Flow::new(Workers::of(&config), config.queue_limit)),
            published: Mutex::new(Published {
                state: EngineState::Starting,
                pid: None,
                spare_pid: None,
                restarts: 0,
            }),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
            by_descriptor: AtomicBool::new(false),
            wake: sys::event_fd()?,
            config,
        });
        let supervisor = Supervisor::new(Arc::clone(&shared), Box::new(listener));
        let thread = thread::Builder::new()
            .name(format!("engine-{}", shared.config.name))
            .spawn(move || supervisor.run())?;
        Ok(Self { shared, supervisor: Some(thread) })
    }

    /// Name in the configuration.
    pub fn name(&self) -> &str {
        &self.shared.config.name
    }

    /// Asks for a scan. Never blocks.
    ///
    /// `reply` is called exactly once, whatever happens: on the supervisor's thread, or on the
    /// caller's when the scan is refused at once. It must be quick; it may call `scan`. `timeout`
    /// runs from the moment a worker takes the scan: the wait before that is the caller's to bound.
    /// Gives what [`EngineHandle::cancel`] needs; nothing where the scan was refused.
    pub fn scan(
        &self,
        content: SharedContent,
        metadata: Metadata,
        turn: impl Into<Turn>,
        timeout: Duration,
        reply: impl FnOnce(ScanReport) + Send + 'static,
    ) -> Option<ScanId> {
        if self.shared.by_descriptor.load(Acquire) {
            // Here, where nobody waits for it. Should it fail, it is tried again when it is sent.
            let _made = content.descriptor();
        }
        let job = Job::new(content, metadata, turn.into(), timeout, Box::new(reply));
        let mut flow = lock(&self.shared.flow);
        let submitted = flow.submit(job);
        let wake = flow.pump();
        drop(flow);
        if wake {
            self.shared.wake();
        }
        submitted.map(ScanId).map_err(|refused| refused.deliver()).ok()
    }

    /// Somebody else waits for this scan, too, and would have had it at `turn`: while it waits, it takes that turn where it
    /// comes sooner. Never blocks. One that an engine has, or that has ended, is left alone.
    pub fn hasten(&self, scan: ScanId, turn: Turn) {
        let mut flow = lock(&self.shared.flow);
        flow.hasten(scan.0, turn);
        let wake = flow.pump();
        drop(flow);
        if wake {
            self.shared.wake();
        }
    }

    /// Nobody wants this report any more. A scan that waits ends at once, on the caller's thread; one that
    /// an engine has in work as soon as that looks; one that has ended is left alone.
    pub fn cancel(&self, scan: ScanId) {
        let cancelled = lock(&self.shared.flow).cancel(scan.0);
        if let Some(cancelled) = cancelled {
            cancelled.deliver();
        }
    }

    /// Everything that `status` shows.
    pub fn status(&self) -> EngineStatus {
        let (queued, in_flight) = lock(&self.shared.flow).counts();
        let Published { state, pid, spare_pid, restarts } = lock(&self.shared.published).clone();
        EngineStatus {
            name: self.name().to_owned(),
            state,
            pid,
            spare_pid,
            restarts,
            queued,
            in_flight,
        }
    }

    /// Where the engine is in its life.
    pub fn state(&self) -> EngineState {
        lock(&self.shared.published).state.clone()
    }

    /// Signatures of the process that takes new scans; None while there is none.
    pub fn generation(&self) -> Option<Generation> {
        match &lock(&self.shared.published).state {
            EngineState::Ready { description } => Some(description.generation),
            _ => None,
        }
    }

    /// Waits until the engine is ready; false when the time was too short.
    pub fn wait_ready(&self, timeout: Duration) -> bool {
        self.wait(timeout, |state| matches!(state, EngineState::Ready { .. }))
    }

    /// Waits until the engine is ready or has failed for the first time; false when the time was too short.
    pub fn wait_loaded(&self, timeout: Duration) -> bool {
        self.wait(timeout, |state| !matches!(state, EngineState::Starting))
    }

    fn wait(&self, timeout: Duration, enough: impl Fn(&EngineState) -> bool) -> bool {
        let deadline = Instant::now() + timeout;
        let mut published = lock(&self.shared.published);
        while !enough(&published.state) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.shared.changed.wait_timeout(published, left);
            published = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Kills the processes and answers everything that waits with [`ScanError::Stopped`]. Dropping
    /// the handle does the same.
    pub fn stop(self) {}
}

impl Drop for EngineHandle {
    fn drop(&mut self) {
        self.shared.stop.store(true, Release);
        self.shared.wake();
        if let Some(thread) = self.supervisor.take() {
            // A reply may own the last handle: then this is the supervisor's own thread.
            if thread.thread().id() != thread::current().id() && thread.join().is_err() {
                tracing::error!(engine = self.name(), "the engine's supervisor panicked");
            }
        }
    }
}
