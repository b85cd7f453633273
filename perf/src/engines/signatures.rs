//! `engines-signatures`: what a ClamAV database of official size takes, and what its change does.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use seawall_lab::Process;

use super::clamav::{Clamd, start};
use super::rounds::{Row, median_us};
use super::{Bench, database, made};
use crate::cpu;
use crate::watchdog::step;

/// Threads of the engine.
const THREADS: u32 = 2;
const NAME: &str = "engines-signatures";
/// Signatures with `--quick`.
const FEW: u64 = 20_000;
/// How often memory is looked at while it grows.
const LOOK: Duration = Duration::from_millis(50);

pub fn run(bench: &mut Bench) -> anyhow::Result<Vec<Row>> {
    let count = if bench.quick { FEW } else { database::OFFICIAL };
    let row = |name: &str, unit, value| Row::single(NAME, name, unit, value);
    let (old, new) = (bench.folder("signatures"), bench.folder("signatures-new"));
    step(format!("{NAME}: writing {count} signatures"));
    let bytes = database::write(&old, count)?;
    // The next day's set: all of the old, and one more.
    fs::create_dir_all(&new)?;
    for entry in fs::read_dir(&old)? {
        let path = entry?.path();
        fs::hard_link(&path, new.join(path.file_name().unwrap_or_default()))?;
    }
    fs::write(new.join("more.hdb"), "44d88612fea8a8f36de82e1278abb02f:68:Test.More-1\n")?;
    let mut rows = vec![row("database on the disk", "MiB", mib(bytes >> 10))];

    step(format!("{NAME}: loading"));
    let first = start(bench, &old, "signatures-temporary", THREADS)?;
    rows.push(row("engine and its clamd, until ready", "s", first.api.loading.as_secs_f64()));
    let one = cpu::tree(&first.api.process()?);
    rows.push(row("engine and its clamd, PSS", "MiB", mib(cpu::memory_kib(&one))));
    let content = made::content(16 << 10, 1);
    let scans = |count: u32| {
        let times = (0..count).map(|_| first.api.copy_and_scan(&content));
        median_us(times.collect::<anyhow::Result<Vec<_>>>()?)
    };
    rows.push(row("scan of 16 KiB, one process", "us", scans(50)?));

    step(format!("{NAME}: loading a new set beside the old one"));
    let (peak, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let own = Process::current().ok_or_else(|| anyhow::anyhow!("no /proc"))?;
    let begin = Instant::now();
    let (second, beside) = thread::scope(|scope| {
        let (peak, done) = (&peak, &done);
        scope.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                // All that this process has started, not itself.
                let started: Vec<Process> = cpu::tree(&own).into_iter().skip(1).collect();
                peak.fetch_max(cpu::memory_kib(&started), Ordering::Relaxed);
                thread::sleep(LOOK);
            }
        });
        let scanning = scope.spawn(|| {
            let mut times = Vec::new();
            while !done.load(Ordering::Relaxed) {
                times.push(first.api.copy_and_scan(&content)?);
                thread::sleep(LOOK);
            }
            median_us(times)
        });
        let second = start(bench, &new, "signatures-temporary-new", THREADS);
        done.store(true, Ordering::Relaxed);
        (second, scanning.join())
    });
    let (second, took) = (second?, begin.elapsed());
    rows.push(row("new set beside the old one, until ready", "s", took.as_secs_f64()));
    let peak = peak.into_inner();
    rows.push(row("both together while it loads, PSS at most", "MiB", mib(peak)));
    let beside = beside.map_err(|_| anyhow::anyhow!("the scans beside panicked"))??;
    rows.push(row("scan of 16 KiB while it loads", "us", beside));

    let settings = second.settings()?;
    drop((first, second));
    step(format!("{NAME}: loading in a bare clamd"));
    let bare = Clamd::start(&bench.folder("signatures-peer"), &settings)?;
    rows.push(row("a bare clamd, until it answers", "s", bare.loading.as_secs_f64()));
    let process: Vec<Process> = Process::from_pid(bare.pid()).into_iter().collect();
    rows.push(row("a bare clamd, PSS", "MiB", mib(cpu::memory_kib(&process))));
    drop(bare);
    for folder in [&old, &new] {
        fs::remove_dir_all(folder)?;
    }
    bench.note(format!(
        "{NAME}: {count} made signatures: half of sections' MD5, 24 % of files' MD5, 21 % of SHA-256, 1.5 % \
         patterns, 3.5 % logical ones; measured once; the old process scans while the new one loads"
    ));
    Ok(rows)
}

fn mib(kib: u64) -> f64 {
    (kib as f64 / 102.4).round() / 10.0
}
