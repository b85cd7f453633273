//! Heartbeats, notices, and dropping what nobody waits for any more.

use crate::driver::{Driver, Subject, Waiting};
use crate::link::LinkError;
use crate::region;
use crate::ring;
use crate::scan;
use seawall_fanotify::process;
use seawall_proto::{ExposureReason, Notice, ToHost};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

const TICK: Duration = Duration::from_millis(250);
/// How often the region is looked for.
const LOOK: Duration = Duration::from_secs(1);
/// How often memory is measured; it takes the kernel a while to add up.
const MEASURE: Duration = Duration::from_secs(5);

/// Keeps house for ever.
pub fn keep(driver: &Driver, notices: &Receiver<Waiting>) {
    let mut beat = Instant::now();
    let mut looked = Instant::now();
    let mut measured: Option<(Instant, u32)> = None;
    loop {
        pass_on(driver, notices);
        purge(driver);
        driver.look_up_waiting();
        let Some(session) = driver.session() else { continue };
        if session.is_silent(process::now_ms()) {
            tracing::warn!("the host owes an answer and is silent; the link is given up");
            session.end();
            continue;
        }
        if looked.elapsed() >= LOOK {
            looked = Instant::now();
            region::look(driver, &session);
        }
        if beat.elapsed() < session.heartbeat {
            continue;
        }
        beat = Instant::now();
        if measured.is_none_or(|(at, _)| at.elapsed() > MEASURE) {
            measured = Some((Instant::now(), memory_kib(driver)));
            let lost = driver.counters.notices_lost.swap(0, Ordering::Relaxed);
            if lost > 0 {
                tracing::warn!(lost, "reports to the host found no room in their queue");
            }
            if let Some(orphans) = driver.ledger.take_orphans()
                && !driver.notice(Notice::WorkerRestarted { orphans })
            {
                driver.ledger.give_back_orphans(orphans);
            }
        }
        let memory = measured.map_or(0, |(_, kib)| kib);
        let heartbeat = driver.heartbeat(memory, cpu_ms(driver.supervisor));
        if session.send(&ToHost::Heartbeat(heartbeat)).is_err() {
            session.end();
        }
    }
}

/// Sends notices for one tick. Without a session they wait in their queue, which is bounded; so they do
/// while the host says nothing: what was sent to one that is gone would be lost.
fn pass_on(driver: &Driver, notices: &Receiver<Waiting>) {
    let session = driver.session().filter(|session| session.hears(process::now_ms()));
    let Some(session) = session else { return std::thread::sleep(TICK) };
    let until = Instant::now() + TICK;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match notices.recv_timeout(left) {
            Ok((since_ms, mut notice)) => {
                if let Notice::Unscanned { age_ms, .. } = &mut notice {
                    *age_ms = process::now_ms().saturating_sub(since_ms);
                }
                match session.send(&ToHost::Notice(notice)) {
                    Ok(()) => (),
                    // It would not fit the next session either.
                    Err(LinkError::Frame(error)) => tracing::warn!(%error, "a report is left out"),
                    Err(_) => return session.end(),
                }
            }
            Err(RecvTimeoutError::Timeout) => return,
            Err(RecvTimeoutError::Disconnected) => return std::thread::sleep(left),
        }
    }
}

/// Closes the files of accesses that the deadline answered, wherever they still wait.
fn purge(driver: &Driver) {
    for event in driver.jobs.purge(&driver.ledger) {
        driver.note_lost(&event);
    }
    let Some(session) = driver.session() else { return };
    ring::give_up_late(driver, &session);
    for id in session.stale(driver, process::now_ms()) {
        match session.withdraw(id).map(|job| job.subject) {
            Some(Subject::Access(event)) => driver.note_lost(&event),
            Some(subject) => scan::abandon(driver, &subject, ExposureReason::Deadline),
            None => (),
        }
    }
}

/// Proportional memory of both processes in KiB, without the region: mapped device memory does not
/// count, and where the region is an ordinary file it is the only shared memory of any size.
fn memory_kib(driver: &Driver) -> u32 {
    let counted: &[&str] =
        if driver.region.is_device() { &["Pss:"] } else { &["Pss_Anon:", "Pss_File:"] };
    let of = |pid: u32| -> u32 {
        let path = format!("/proc/{pid}/smaps_rollup");
        let rollup = std::fs::read_to_string(path).unwrap_or_default();
        let value = |line: &str| line.split_ascii_whitespace().nth(1)?.parse::<u32>().ok();
        let counts = |line: &&str| counted.iter().any(|name| line.starts_with(name));
        rollup.lines().filter(counts).filter_map(value).sum()
    };
    of(std::process::id()) + of(driver.supervisor)
}

/// CPU time of both processes in milliseconds.
fn cpu_ms(supervisor: u32) -> u64 {
    [std::process::id(), supervisor].into_iter().map(process_cpu_ms).sum()
}

fn process_cpu_ms(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in parentheses may hold spaces; utime and stime are the 14th and 15th field
    // (proc_pid_stat(5)), the 12th and 13th after the name.
    let after = stat.rsplit_once(") ").map_or("", |(_, after)| after);
    let ticks: u64 =
        after.split(' ').skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    ticks * 1000 / rustix::param::clock_ticks_per_second().max(1)
}
