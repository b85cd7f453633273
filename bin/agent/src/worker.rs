//! The worker: starts its threads in the order in which they may be needed.
//!
//! The readers run before the first mark is set, so that nothing is ever held without somebody to
//! take it. A panic anywhere ends the process: the supervisor answers what it held and starts another.

use crate::background;
use crate::coverage::{self, Coverage};
use crate::driver::{Driver, Groups};
use crate::region::Region;
use crate::sole::{self, SoleError};
use crate::supervisor::Shared;
use crate::{
    control, deadline, event, housekeeping, hunt, on_demand, record, remedy, scan, session,
};
use nix::sys::signal::{SigSet, Signal};
use seawall_fanotify::ledger::READERS_MAX;
use seawall_fanotify::{Group, process};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

/// Notices that wait for the link.
const NOTICES: usize = 256;
/// Log lines that wait for whoever reads them; each place takes 32 bytes from the start.
const LOG_LINES: usize = 512;
/// The stack of a thread, in bytes; only what is touched takes memory.
const STACK: usize = 256 * 1024;
/// How long held accesses get their verdict when the driver ends.
const DRAIN: Duration = Duration::from_secs(2);

/// Runs in the process that the supervisor forked; returns its exit status.
pub fn run(shared: &Shared, supervisor: u32) -> u8 {
    // The log is written by a thread of its own, and lines are dropped when it cannot follow.
    let (writer, _flushes_at_the_end) =
        tracing_appender::non_blocking::NonBlockingBuilder::default()
            .buffered_lines_limit(LOG_LINES)
            .finish(std::io::stderr());
    tracing_subscriber::fmt().with_writer(writer).with_ansi(false).with_target(false).init();
    if let Err(error) = process::lock_memory() {
        tracing::warn!(%error, "memory is not locked; under memory pressure answers may be late");
    }
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
    match start(shared, supervisor) {
        Ok(driver) => wait_for_the_end(&driver),
        Err(StartError::Sole(SoleError::GiveWay)) => {
            tracing::info!("another driver has taken over");
            0
        }
        Err(error) => {
            tracing::error!(%error, "the worker cannot start");
            1
        }
    }
}

/// Threads that take events, and hash what is small: one for two CPUs, since whoever opens needs one, too. See [`event`] for
/// why there are two at least.
fn readers(cpus: usize) -> usize {
    (cpus / 2).clamp(2, READERS_MAX)
}

/// Threads that read files. Each may wait for a disk.
fn fillers(cpus: usize) -> usize {
    cpus.clamp(6, 16)
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    let builder = std::thread::Builder::new().name(name.into()).stack_size(STACK);
    builder.spawn(body).map(drop)
}

/// Why a worker does not start.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Sole(#[from] SoleError),
}

fn start(shared: &Shared, supervisor: u32) -> Result<Arc<Driver>, StartError> {
    let args = shared.args.clone();
    let groups = Groups {
        permission: shared.groups.permission.try_clone()?,
        close_write: shared.groups.close_write.try_clone()?,
        record: shared.groups.record.as_ref().map(Group::try_clone).transpose()?,
        ignore: shared.groups.ignore,
    };
    let (notices, noticed) = sync_channel(NOTICES);
    let (remedies, wanted) = sync_channel(remedy::TASKS);
    let coverage = Coverage::new(args.only_mount.clone());
    let ledger = shared.ledger.again();
    let region = Region::new(args.region.clone(), args.key.clone());
    let driver =
        Arc::new(Driver::new(groups, ledger, coverage, supervisor, region, notices, remedies));
    // Ignore marks of the last worker's session count no more.
    driver.forget_all();

    let with = |body: fn(&Driver)| {
        let driver = Arc::clone(&driver);
        move || body(&driver)
    };
    let keeper = Arc::clone(&driver);
    let keeper = std::thread::Builder::new()
        .name("deadline".into())
        .stack_size(STACK)
        .spawn(move || deadline::keep(&keeper))?;
    driver.set_deadline_keeper(keeper.thread().clone());
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    for number in 0..readers(cpus) {
        let driver = Arc::clone(&driver);
        spawn("reader", move || event::read_events(&driver, number))?;
    }
    for _ in 0..fillers(cpus) {
        spawn("filler", with(scan::fill))?;
    }
    spawn("closes", with(background::watch_closes))?;
    if let Some(recording) = &shared.recording {
        let (driver, recording) = (Arc::clone(&driver), recording.try_clone()?);
        spawn("record", move || record::keep(&driver, recording))?;
    }
    let scanner = Arc::clone(&driver);
    spawn("journal", move || background::work(&scanner, &args.journal))?;
    spawn("background", with(background::scan_all))?;
    spawn("on demand", with(on_demand::work))?;
    if let Some(policy) = control::policy_of_other(&args.control) {
        driver.renew(Some(policy), None);
    }
    coverage::look(&driver);
    let sole = sole::become_sole(&driver, &args.control)?;
    driver.took_over();
    let (link, address) = (args.link.to_string(), args.link.clone());
    match control::bind(&args.control) {
        Ok(listener) => {
            let driver = Arc::clone(&driver);
            spawn("control", move || control::serve(&driver, &listener, &link))?;
        }
        Err(error) => {
            let path = args.control.display();
            tracing::error!(%error, %path, "the control socket cannot be made; `status` will not work");
        }
    }
    spawn("coverage", with(coverage::keep))?;
    let housekeeper = Arc::clone(&driver);
    let doctor = Arc::clone(&driver);
    spawn("remedy", move || remedy::work(&doctor, &wanted))?;
    spawn("hunt", with(hunt::work))?;
    spawn("housekeeping", move || housekeeping::keep(&housekeeper, &noticed))?;
    let keeper = Arc::clone(&driver);
    spawn("session", move || {
        let _held_for_ever = sole;
        session::keep(&keeper, &address);
    })?;
    Ok(driver)
}

fn wait_for_the_end(driver: &Driver) -> u8 {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    while signals.wait().is_err() {}
    tracing::info!("told to end");
    unmark(driver);
    end(driver)
}

/// Takes all marks away: from here on no access is held.
pub fn unmark(driver: &Driver) {
    for group in driver.groups.all() {
        if let Err(error) = group.flush_filesystems() {
            tracing::error!(%error, "marks cannot be taken away");
        }
    }
}

/// Lets held accesses finish, answers the rest by fail mode, and ends the process.
pub fn end(driver: &Driver) -> ! {
    let until = Instant::now() + DRAIN;
    while driver.ledger.outstanding() > 0 && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
    }
    for claim in driver.ledger.overdue(u64::MAX) {
        driver.answer_unscanned(claim, seawall_proto::ExposureReason::WorkerDied);
    }
    // What was let through goes on to the journal, if that can be had.
    let until = Instant::now() + DRAIN;
    driver.background.wake();
    while driver.ledger.exposures().next().is_some() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
    }
    // What is queued in the group and was never read is allowed by the kernel when the supervisor
    // ends too and the group closes.
    std::process::exit(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_follow_the_cpus() {
        let all = [1, 2, 5, 8, 16, 64].map(|cpus| (readers(cpus), fillers(cpus)));
        assert_eq!(all, [(2, 6), (2, 6), (2, 6), (4, 8), (8, 16), (8, 16)]);
    }
}
