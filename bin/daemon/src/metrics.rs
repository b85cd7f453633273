//! What is counted, and what processes cost.

use seawall_client::{Counters, Resources, Verdict, VerdictCounts};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Verdicts by kind.
#[derive(Debug, Default)]
pub struct VerdictMetrics {
    clean: AtomicU64,
    infected: AtomicU64,
    error: AtomicU64,
    timed_out: AtomicU64,
}

impl VerdictMetrics {
    pub fn count(&self, verdict: Verdict) {
        let counter = match verdict {
            Verdict::Clean => &self.clean,
            Verdict::Infected => &self.infected,
            Verdict::Error => &self.error,
            Verdict::TimedOut => &self.timed_out,
        };
        counter.fetch_add(1, Relaxed);
    }

    pub fn read(&self) -> VerdictCounts {
        VerdictCounts {
            clean: self.clean.load(Relaxed),
            infected: self.infected.load(Relaxed),
            error: self.error.load(Relaxed),
            timed_out: self.timed_out.load(Relaxed),
        }
    }
}

/// What the service did since it started.
#[derive(Debug, Default)]
pub struct Metrics {
    pub requests: AtomicU64,
    pub bytes_copied: AtomicU64,
    pub scans: AtomicU64,
    pub cache_hits: AtomicU64,
    pub joined: AtomicU64,
    pub verdicts: VerdictMetrics,
    /// Contents and detections that policy excludes.
    pub excluded: AtomicU64,
    pub events_dropped: AtomicU64,
}

impl Metrics {
    pub fn read(&self) -> Counters {
        Counters {
            requests: self.requests.load(Relaxed),
            bytes_copied: self.bytes_copied.load(Relaxed),
            scans: self.scans.load(Relaxed),
            cache_hits: self.cache_hits.load(Relaxed),
            joined: self.joined.load(Relaxed),
            verdicts: self.verdicts.read(),
            excluded: self.excluded.load(Relaxed),
            events_dropped: self.events_dropped.load(Relaxed),
        }
    }
}

/// What a process and those that it started cost; `None` when it is gone.
pub fn resources_of_all(pid: u32) -> Option<Resources> {
    let mut all = resources(pid)?;
    for child in children(pid) {
        if let Some(one) = resources_of_all(child) {
            all.resident_kib += one.resident_kib;
            all.threads += one.threads;
            all.cpu_ms += one.cpu_ms;
        }
    }
    Some(all)
}

/// Processes that this one started (proc_pid_task_children(5)).
fn children(pid: u32) -> Vec<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| {
            list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()
        })
        .collect()
}

/// What a process costs; `None` when it is gone.
pub fn resources(pid: u32) -> Option<Resources> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let field = |name: &str| -> Option<u64> {
        let rest = status.lines().find_map(|line| line.strip_prefix(name))?;
        rest.trim_start_matches(':').split_whitespace().next()?.parse().ok()
    };
    Some(Resources {
        resident_kib: field("VmRSS")?,
        threads: u32::try_from(field("Threads")?).ok()?,
        cpu_ms: cpu_ticks(&stat)? * 1000 / rustix::param::clock_ticks_per_second(),
    })
}

/// utime and stime, fields 14 and 15 (proc_pid_stat(5)); the command, field 2, may hold anything and
/// ends at the last parenthesis.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat[stat.rfind(')')? + 1..].split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(next()? + next()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_costs_something_and_one_that_is_gone_nothing() {
        let ours = resources(std::process::id()).unwrap();
        assert!(ours.resident_kib > 100 && ours.threads > 0, "{ours:?}");
        assert_eq!(resources(u32::MAX), None);
        assert_eq!(cpu_ticks("1 (a b) c) S 1 1 1 0 -1 4194560 1 0 0 0 7 5 0 0 20"), Some(12));
    }
}
