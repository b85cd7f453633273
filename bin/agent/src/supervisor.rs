//! The supervisor: one thread, no allocation on its way to an answer.
//!
//! ```text
//!   start ──► worker runs ──(it ends by itself)──► end
//!               │    ▲
//!      (it dies) ▼    │ (pause over)
//!       orphans answered ──► supervisor reads and answers by fail mode
//! ```
//!
//! Owns the groups (the worker inherits them), so that the kernel does not allow everything when a
//! worker dies. It reads the group only while there is no worker. While there is one it looks after
//! it: an event well past its deadline is answered here, and a worker that no longer beats is killed.
//! Its log lines are written only when that cannot block.

use crate::RunArgs;
use crate::file::{Look, fails_open, mode_from_number};
use crate::record::Recording;
use crate::worker;
use anyhow::Context;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, WaitOptions, WaitStatus};
use seawall_fanotify::ledger::{Ledger, READERS_MAX};
use seawall_fanotify::probe::{self, OverlayView};
use seawall_fanotify::{Answer, EventKind, FileHandle, Group, Purpose, process};
use seawall_proto::{ExposureReason, FailMode, Policy};
use std::os::fd::{AsFd, AsRawFd};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// In [`Ledger::overlay`]: the worker has met an overlay and asks for the probe.
pub const PROBE_OVERLAY: u32 = 100;

/// How often the worker is looked after while it holds something, and while it does not.
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
const IDLE: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// An event is answered here when it is this far past its deadline, in milliseconds.
const LATE_MS: u64 = 300;
/// A worker that has not beaten for this long is killed, in milliseconds.
const STUCK_MS: u64 = 10_000;
/// How long the supervisor reads itself before it starts another worker.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// A worker that ran this long was not a failed start.
const RAN_WELL: Duration = Duration::from_secs(10);

/// What worker and supervisor share. Made before the first fork.
pub struct Shared {
    pub args: RunArgs,
    pub groups: crate::driver::Groups,
    pub ledger: Ledger,
    pub recording: Option<Recording>,
}

/// Runs supervisor and worker until stopped.
pub fn run(args: &RunArgs) -> anyhow::Result<ExitCode> {
    if let Some(log) = &args.log {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(log);
        let file = file.with_context(|| format!("{}: the log cannot be opened", log.display()))?;
        nix::unistd::dup2_stderr(file).context("the log cannot be attached")?;
    }
    for missing in process::harden() {
        say(&format!("running without {missing}"));
    }
    let ignore = probe::ignore_mark().context(
        "this kernel does not let us hold file accesses (fanotify permission events); \
         the driver needs root and Linux 5.1 or newer",
    )?;
    let ignore = if args.plain_marks { seawall_fanotify::IgnoreMark::Plain } else { ignore };
    let ledger = Ledger::new().context("no memory for the ledger")?;
    if ignored_overlay(&args.only_mount) {
        ledger.overlay().store(OverlayView::Beneath.number(), Ordering::Relaxed);
    } else {
        ledger.overlay().store(probe::overlay().number(), Ordering::Relaxed);
    }
    let recording = args.record.as_deref().map(Recording::begin).transpose()?;
    let groups = crate::driver::Groups {
        permission: Group::new(Purpose::Permission).context("fanotify_init")?,
        close_write: Group::new(Purpose::CloseWrite).context("fanotify_init")?,
        record: recording.is_some().then(|| Group::new(Purpose::Record)).transpose()?,
        ignore,
    };
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD] {
        signals.add(signal);
    }
    signals.thread_block().context("signals cannot be blocked")?;
    let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
    let signals = SignalFd::with_flags(&signals, flags).context("signalfd")?;
    let shared = Shared { args: args.clone(), groups, ledger, recording };
    // What the worker has not, too, is not copied for it.
    process::let_go_of_the_start();
    supervise(&shared, &signals)
}

/// With given folders overlays play no part: what is named is marked.
fn ignored_overlay(only_mount: &[std::path::PathBuf]) -> bool {
    !only_mount.is_empty()
}

fn supervise(shared: &Shared, signals: &SignalFd) -> anyhow::Result<ExitCode> {
    let mut pause = PAUSE_MIN;
    loop {
        let started = Instant::now();
        let now_ms = process::now_ms();
        shared.ledger.beat(now_ms);
        (0..READERS_MAX).for_each(|number| shared.ledger.beat_reader(number, now_ms));
        let supervisor = std::process::id();
        let pid = match process::fork(|| worker::run(shared, supervisor)) {
            Ok(pid) => pid,
            Err(error) => {
                say(&format!("no worker can be started now: {error}; trying again"));
                stand_in(shared, PAUSE_MAX);
                continue;
            }
        };
        say(&format!("worker {pid} started"));
        // From here on it waits.
        process::let_go_of_the_start();
        let ended = look_after(shared, signals, pid)?;
        if ended.exit_status() == Some(0) {
            say("ended");
            return Ok(ExitCode::SUCCESS);
        }
        let orphans = shared
            .ledger
            .answer_orphans(&shared.groups.permission, ExposureReason::WorkerDied.number());
        say(&format!(
            "worker {pid} died ({}); {} held accesses were answered by fail mode, {} more by sweep",
            describe(ended),
            orphans.entered,
            orphans.swept
        ));
        pause = if started.elapsed() > RAN_WELL { PAUSE_MIN } else { (pause * 2).min(PAUSE_MAX) };
        stand_in(shared, pause);
    }
}

fn describe(status: WaitStatus) -> String {
    match (status.terminating_signal(), status.exit_status()) {
        (Some(signal), _) => format!("signal {signal}"),
        (None, Some(code)) => format!("exit status {code}"),
        (None, None) => "stopped".into(),
    }
}

/// Until the worker ends.
fn look_after(shared: &Shared, signals: &SignalFd, pid: u32) -> anyhow::Result<WaitStatus> {
    let worker = Pid::from_raw(pid.cast_signed()).context("a process id is positive")?;
    loop {
        let waited = rustix::process::waitpid(Some(worker), WaitOptions::NOHANG)?;
        if let Some((_, status)) = waited {
            return Ok(status);
        }
        let mut fds = [PollFd::new(signals, PollFlags::IN)];
        let tick = if shared.ledger.outstanding() > 0 { &TICK } else { &IDLE };
        let _again = rustix::event::poll(&mut fds, Some(tick));
        while let Ok(Some(signal)) = signals.read_signal() {
            let signal = i32::try_from(signal.ssi_signo).unwrap_or(0);
            if signal == Signal::SIGTERM as i32 || signal == Signal::SIGINT as i32 {
                let _gone = rustix::process::kill_process(worker, rustix::process::Signal::TERM);
            }
        }
        answer_late(shared);
        let beat = shared.ledger.last_beat().min(shared.ledger.last_reader_beat());
        let silent_ms = process::now_ms().saturating_sub(beat);
        if silent_ms > STUCK_MS {
            say(&format!("worker {pid} has not moved for {silent_ms} ms; it is killed"));
            let _gone = rustix::process::kill_process(worker, rustix::process::Signal::KILL);
            // Killed once; it is gone when the kernel has let go of it.
            let now_ms = process::now_ms();
            shared.ledger.beat(now_ms);
            shared.ledger.beat_reader(0, now_ms);
        }
        if shared.ledger.overlay().load(Ordering::Relaxed) == PROBE_OVERLAY {
            shared.ledger.overlay().store(probe::overlay().number(), Ordering::Relaxed);
        }
    }
}

/// A second pair of eyes on the deadlines, in case the worker is stopped or starved. Claims make it
/// safe: an event is answered once, whoever does it.
fn answer_late(shared: &Shared) {
    let late_ms = process::now_ms().saturating_sub(LATE_MS);
    for claim in shared.ledger.overdue(late_ms) {
        let handle = shared.ledger.handle(claim);
        let group = &shared.groups.permission;
        let answer =
            match (shared.ledger.later_fail(claim), crate::driver::late_mode(&shared.ledger)) {
                (Some(answer), _) => answer,
                (None, Some(FailMode::Open)) => Answer::Allow,
                (None, Some(FailMode::Closed)) => Answer::Deny,
                _ => claim.fail(),
            };
        let answered = shared.ledger.answer(group, claim, answer).unwrap_or(false);
        if answered && answer == Answer::Allow {
            shared.ledger.expose(handle.as_ref(), ExposureReason::Deadline.number());
        }
    }
}

/// While there is no worker: every access gets its fail mode at once.
fn stand_in(shared: &Shared, pause: Duration) {
    let until = Instant::now() + pause;
    let group = &shared.groups.permission;
    while Instant::now() < until {
        if group.read(8, |event| answer_alone(shared, &event)).is_err() {
            let mut fds = [PollFd::new(group, PollFlags::IN)];
            let tick = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
            let _again = rustix::event::poll(&mut fds, Some(&tick));
        }
    }
}

fn answer_alone(shared: &Shared, event: &seawall_fanotify::Event) {
    let Some(fd) = &event.fd else { return };
    let defaults = Policy::default();
    let (place, default) = match event.kind {
        EventKind::Exec => (1, defaults.fail_exec),
        _ => (0, defaults.fail_open),
    };
    let mode = shared.ledger.left_behind()[place].load(Ordering::Relaxed);
    let mode = mode_from_number(mode, default);
    let look = Look::at(fd).ok().filter(|look| look.is_regular && look.identity.size > 0);
    let opens = look.is_none_or(|look| fails_open(mode, &look));
    let answer = if opens { Answer::Allow } else { Answer::Deny };
    if let (Answer::Allow, Some(look)) = (answer, look) {
        let handle = FileHandle::of(fd.as_fd(), look.identity.device).ok();
        shared.ledger.expose(handle.as_ref(), ExposureReason::WorkerDied.number());
    }
    let _gone = shared.groups.permission.answer(fd.as_raw_fd(), answer);
}

/// Writes a line to the log if that can be done without waiting: what reads it may be held by us.
fn say(text: &str) {
    let stderr = rustix::stdio::stderr();
    let mut fds = [PollFd::new(&stderr, PollFlags::OUT)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    if rustix::event::poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0) {
        let line = format!("seawall-agent supervisor: {text}\n");
        let _lost = rustix::io::write(stderr, line.as_bytes());
    }
}
