//! Which process runs on which CPU, and how much of it each takes.

use std::fs;

use anyhow::{Context, bail, ensure};
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use seawall_lab::Process;

/// The two CPUs that are measured on.
#[derive(Debug, Clone, Copy)]
pub struct Cpus {
    /// For the opener, the listeners and the driver.
    pub guest: usize,
    /// For the service and its engines.
    pub host: usize,
}

impl Cpus {
    /// The first two that we may use.
    pub fn choose() -> anyhow::Result<Self> {
        let allowed = sched_getaffinity(None)?;
        let mut allowed = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu));
        match (allowed.next(), allowed.next()) {
            (Some(guest), Some(host)) => Ok(Self { guest, host }),
            _ => bail!("two CPUs are needed: one as the guest's, one as the host's"),
        }
    }
}

fn only(cpu: usize) -> CpuSet {
    let mut set = CpuSet::new();
    set.set(cpu);
    set
}

/// Pins this thread, and what it starts from now on.
pub fn pin_self(cpu: usize) -> anyhow::Result<()> {
    sched_setaffinity(None, &only(cpu)).with_context(|| format!("cannot move to CPU {cpu}"))
}

/// Lets this thread run on all CPUs again.
pub fn unpin_self() -> anyhow::Result<()> {
    let mut all = CpuSet::new();
    (0..CpuSet::MAX_CPU).for_each(|cpu| all.set(cpu));
    sched_setaffinity(None, &all).context("cannot move to all CPUs")
}

/// Pins all threads of a process and its descendants, those too that begin meanwhile.
pub fn pin_tree(root: &Process, cpu: usize) -> anyhow::Result<()> {
    // A new thread inherits its maker's CPUs: once a pass finds nothing to do, all are pinned.
    for _ in 0..20 {
        let strays = strays(&tree(root), cpu);
        if strays.is_empty() {
            return Ok(());
        }
        for thread in strays {
            // It may have ended.
            let _ = sched_setaffinity(Some(thread), &only(cpu));
        }
    }
    bail!("the threads of process {} cannot all be kept on CPU {cpu}", root.pid)
}

/// Fails when a thread of a process or its descendants may run elsewhere.
pub fn check_tree(root: &Process, cpu: usize) -> anyhow::Result<()> {
    let strays = strays(&tree(root), cpu);
    ensure!(strays.is_empty(), "{} threads of {} left CPU {cpu}", strays.len(), root.pid);
    Ok(())
}

fn strays(processes: &[Process], cpu: usize) -> Vec<Pid> {
    let wanted = only(cpu);
    let is_stray = |thread: &Pid| sched_getaffinity(Some(*thread)).is_ok_and(|now| now != wanted);
    processes.iter().flat_map(threads).filter(is_stray).collect()
}

/// A process and its descendants.
pub fn tree(root: &Process) -> Vec<Process> {
    let mut all = vec![root.clone()];
    let mut at = 0;
    while let Some(process) = all.get(at) {
        let children = process.children();
        all.extend(children);
        at += 1;
    }
    all
}

fn threads(process: &Process) -> Vec<Pid> {
    let folder = fs::read_dir(format!("/proc/{}/task", process.pid));
    let names = folder.into_iter().flatten().flatten();
    names.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)).collect()
}

/// CPU time that the threads of these processes have used, in nanoseconds. Nothing where the kernel
/// does not count it (/proc/PID/schedstat, Documentation/scheduler/sched-stats.rst).
pub fn used_ns(processes: &[Process]) -> Option<u64> {
    let of = |process: &Process, thread: Pid| {
        let path = format!("/proc/{}/task/{}/schedstat", process.pid, thread.as_raw_nonzero());
        fs::read_to_string(path).ok()?.split_whitespace().next()?.parse::<u64>().ok()
    };
    processes
        .iter()
        .flat_map(|process| threads(process).into_iter().map(move |thread| of(process, thread)))
        .sum()
}

/// Memory of these processes in KiB, what is shared counted by parts. Without shared memory: that is
/// the region and, in the service, private copies under way.
pub fn memory_kib(processes: &[Process]) -> u64 {
    let of = |process: &Process| {
        let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", process.pid));
        let rollup = rollup.unwrap_or_default();
        let value = |line: &str| line.split_whitespace().nth(1)?.parse::<u64>().ok();
        let counts = |line: &&str| ["Pss_Anon:", "Pss_File:"].iter().any(|n| line.starts_with(n));
        rollup.lines().filter(counts).filter_map(value).sum::<u64>()
    };
    processes.iter().map(of).sum()
}
