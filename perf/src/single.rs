//! `files`: what single files cost: a first one with many rules, a large one, one that grows while many open it, one that is
//! written through a mapping.
//!
//! Openers and the driver share one CPU, service and engine have another one, as everywhere here.

#![allow(unsafe_code)] // A mapping of a file; see the SAFETY comments.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::mm::{MapFlags, ProtFlags};
use seawall_lab::Process;

use crate::cpu::{self, Cpus};
use crate::engines::made::{content, write_rules};
use crate::engines::null::Echo;
use crate::engines::report::Results;
use crate::engines::rounds::{Goal, Row};
use crate::fleet::{Engine, Host};
use crate::listener::Listener;
use crate::machine;
use crate::outputs::Outputs;
use crate::plan::{Pace, size_name};
use crate::sample::{Times, Use, time_opens};
use crate::stage::{self, SHARED_MEMORY, Stage};
use crate::watchdog::{clear, start as start_watchdog, step};

const NAME: &str = "files";
/// Longer than two clock ticks at 100 Hz: what was written before may be remembered.
const SETTLED: Duration = Duration::from_millis(60);
/// Of the large file and the growing one, in bytes.
const LARGE: u32 = 64 << 20;
const GROWING: u64 = 1 << 30;
const OPENERS: usize = 50;

/// How much is measured.
struct Amounts {
    rounds: u32,
    rules: usize,
    /// New files of a size in a round.
    new: u32,
    growing: Duration,
    unmapped: u32,
}

const FULL: Amounts =
    Amounts { rounds: 7, rules: 1_000, new: 30, growing: Duration::from_secs(25), unmapped: 200 };
const QUICK: Amounts =
    Amounts { rounds: 1, rules: 20, new: 4, growing: Duration::from_secs(2), unmapped: 5 };

/// Measures and reports, as the first process of new namespaces.
pub fn run(quick: bool, outputs: &Outputs) -> anyhow::Result<ExitCode> {
    stage::settle_in()?;
    start_watchdog();
    let load_before = machine::load();
    let amounts = if quick { QUICK } else { FULL };
    let base = Path::new(SHARED_MEMORY).join(NAME);
    fs::create_dir_all(&base)?;
    write_rules(&base.join("rules"), amounts.rules)?;
    fs::create_dir_all(base.join("one-rule"))?;
    fs::write(base.join("one-rule/never.yar"), "rule Never { condition: false }\n")?;
    let cpus = Cpus::choose()?;
    let mut rows = first(&base, cpus, &amounts)?;
    rows.extend(large(&base, cpus, &amounts)?);
    rows.extend(growing(&base, cpus, &amounts)?);
    rows.extend(unmapped(&base, cpus, &amounts)?);
    clear();
    let notes =
        vec![format!("{NAME}: openers and the driver on one CPU, service and engine on another")];
    let results = Results::new(quick, load_before, rows, Vec::new(), notes, Vec::new());
    println!("{}", results.to_text());
    outputs.keep(&results.to_json()?, &results.file_name().replace("engines", NAME), quick)?;
    Ok(ExitCode::SUCCESS)
}

fn row(name: impl Into<String>, unit: &'static str, rounds: Vec<f64>) -> anyhow::Result<Row> {
    Row::of_rounds(NAME, name, unit, rounds).context("nothing was measured")
}

/// A service and a driver on their CPUs; the calling thread is on the guest's then.
fn start(
    base: &Path,
    rules: &str,
    config: &str,
    stage: &Stage,
    cpus: Cpus,
) -> anyhow::Result<Host> {
    cpu::unpin_self()?;
    let engine = Engine::Yara { rules: base.join(rules) };
    let host = Host::start(&base.join("host"), &engine, config, &[stage.folder.as_path()])?;
    host.pin(cpus)?;
    cpu::pin_self(cpus.guest)?;
    Ok(host)
}

fn stop(base: &Path, host: Host) -> anyhow::Result<()> {
    drop(host);
    Ok(fs::remove_dir_all(base.join("host"))?)
}

fn named(path: &Path) -> anyhow::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

fn p50_of_opens(paths: &[CString]) -> anyhow::Result<f64> {
    let count = u32::try_from(paths.len())?;
    let times = time_opens(paths, count, Pace::BackToBack, Use::Nothing)?;
    Ok(Times::of(times).context("no samples")?.p50)
}

/// First opens of new content with many rules, beside what cannot be saved: the scan, the way of known content, and a round
/// trip between two processes.
fn first(base: &Path, cpus: Cpus, amounts: &Amounts) -> anyhow::Result<Vec<Row>> {
    const SIZES: [u32; 2] = [64 << 10, 1 << 20];
    let each = amounts.new;
    step("first opens: files");
    let bytes = SIZES.map(|size| u64::from(size) * u64::from(2 * each * amounts.rounds));
    let stage = Stage::mount("first", bytes.iter().sum())?;
    let path = |size: u32, kind: &str, round: u32, n: u32| {
        stage.folder.join(format!("{kind}-{size}-{round}-{n}"))
    };
    let seed = |size: u32, round: u32, n: u32| u64::from(size) << 20 | u64::from(round << 10 | n);
    for size in SIZES {
        for (round, n) in (0..amounts.rounds).flat_map(|round| (0..each).map(move |n| (round, n))) {
            let content = content(size as usize, seed(size, round, n));
            fs::write(path(size, "new", round, n), &content)?;
            fs::write(path(size, "known", round, n), &content)?;
        }
    }
    stage.sync()?;
    thread::sleep(SETTLED);
    step("first opens: rules");
    let mut compiler = yara_x::Compiler::new();
    compiler.add_source(fs::read_to_string(base.join("rules/made.yar"))?.as_str())?;
    let rules = compiler.build();
    let host = start(base, "rules", "", &stage, cpus)?;
    let echo = Echo::start()?;
    cpu::pin_tree(&Process::from_pid(echo.pid()).context("the echo is gone")?, cpus.host)?;
    let mut rows = Vec::new();
    for size in SIZES {
        let (mut new, mut bare, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..amounts.rounds {
            step(format!("first opens of {}, round {}", size_name(size), round + 1));
            let paths = |kind| {
                (0..each).map(|n| named(&path(size, kind, round, n))).collect::<Result<Vec<_>, _>>()
            };
            let first = p50_of_opens(&paths("new")?)?;
            let known = p50_of_opens(&paths("known")?)?;
            let trips = (0..200).map(|_| echo.round_trip()).collect::<Result<Vec<_>, _>>()?;
            let trip = crate::engines::rounds::median_us(trips)?;
            cpu::pin_self(cpus.host)?;
            let mut scanner = yara_x::Scanner::new(&rules);
            scanner.fast_scan(true);
            let mut scans = Vec::new();
            for n in 0..each {
                let content = content(size as usize, seed(size, round, n));
                let begin = Instant::now();
                std::hint::black_box(scanner.scan(&content)?.matching_rules().len());
                scans.push(begin.elapsed());
            }
            cpu::pin_self(cpus.guest)?;
            let scan = crate::engines::rounds::median_us(scans)?;
            new.push(first);
            bare.push(scan + known + trip);
            ratios.push(first / (scan + known + trip));
        }
        let name = format!("new content of {}, {} rules", size_name(size), amounts.rules);
        rows.push(row(format!("{name}: first open"), "us", new)?);
        rows.push(row(format!("{name}: bare scan, known content and a round trip"), "us", bare)?);
        rows.push(
            row(format!("{name}: first open over these"), "x", ratios)?.aim(Goal::AtMost(1.1)),
        );
    }
    stop(base, host)?;
    Ok(rows)
}

/// A large file whose content the host knows, beside BLAKE3 alone over as much memory.
fn large(base: &Path, cpus: Cpus, amounts: &Amounts) -> anyhow::Result<Vec<Row>> {
    step("large files");
    let count = amounts.rounds + 1;
    let stage = Stage::mount("large", u64::from(LARGE) * u64::from(count))?;
    let content = content(LARGE as usize, 77);
    let path = |n: u32| stage.folder.join(n.to_string());
    (0..count).try_for_each(|n| fs::write(path(n), &content))?;
    stage.sync()?;
    thread::sleep(SETTLED);
    let host = start(base, "one-rule", "", &stage, cpus)?;
    // Scanned once.
    time_large(&path(0))?;
    let (mut opens, mut hashes, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for n in 1..count {
        step(format!("large files, round {n}"));
        let open = time_large(&path(n))?;
        cpu::pin_self(cpus.host)?;
        let begin = Instant::now();
        std::hint::black_box(blake3::hash(&content));
        let hash = begin.elapsed().as_secs_f64() * 1e3;
        cpu::pin_self(cpus.guest)?;
        opens.push(open);
        hashes.push(hash);
        ratios.push(hash / open);
    }
    stop(base, host)?;
    Ok(vec![
        row("known content of 64 MiB: first open", "ms", opens)?,
        row("BLAKE3 of 64 MiB of memory, one core", "ms", hashes)?,
        row("known content of 64 MiB: throughput over BLAKE3", "x", ratios)?
            .aim(Goal::AtLeast(1.0)),
    ])
}

fn time_large(path: &Path) -> anyhow::Result<f64> {
    let begin = Instant::now();
    drop(File::open(path)?);
    Ok(begin.elapsed().as_secs_f64() * 1e3)
}

/// Many open a file of a gibibyte that somebody appends to.
fn growing(base: &Path, cpus: Cpus, amounts: &Amounts) -> anyhow::Result<Vec<Row>> {
    step("a file that grows: files");
    let make = |name: &str| -> anyhow::Result<(Stage, PathBuf)> {
        let stage = Stage::mount(name, 256 << 20)?;
        let path = stage.folder.join("grows");
        // A hole: its pages are in memory once it was read.
        File::create(&path)?.set_len(GROWING)?;
        stage.sync()?;
        std::io::copy(&mut File::open(&path)?, &mut std::io::sink())?;
        thread::sleep(SETTLED);
        Ok((stage, path))
    };
    let (bare_stage, bare_path) = make("grows-bare")?;
    cpu::pin_self(cpus.guest)?;
    let listener = Listener::start(&bare_stage.folder, false)?;
    step("a file that grows: listener");
    let bare = open_while_it_grows(&bare_path, amounts.growing / 5)?;
    drop(listener);
    let (stage, path) = make("grows")?;
    let host = start(base, "one-rule", "[policy]\nwhole_file_limit_mib = 2048\n", &stage, cpus)?;
    let scans = || -> anyhow::Result<u64> {
        host.ask(&["status"])?["counters"]["scans"].as_u64().context("scans are counted")
    };
    // The first of all is not one of the rest.
    drop(File::open(&path)?);
    step("a file that grows: ours");
    let before = scans()?;
    let begin = Instant::now();
    let ours = open_while_it_grows(&path, amounts.growing)?;
    let seconds = begin.elapsed().as_secs_f64();
    let scans = (scans()? - before) as f64;
    // The one that was opened first is not among them, but lets all through for ten seconds at most.
    ensure!(scans > 0.0 || seconds < 20.0, "what grows was not scanned again");
    stop(base, host)?;
    let name = format!("1 GiB that grows, {OPENERS} openers");
    Ok(vec![
        // One in each ten seconds that have begun.
        row(format!("{name}: scans in {seconds:.0} s"), "", vec![scans])?
            .aim(Goal::AtMost((seconds / 10.0).ceil())),
        row(format!("{name}: opens, p50"), "us", vec![ours.p50])?,
        row(format!("{name}: opens, p99"), "us", vec![ours.p99])?,
        row(format!("{name}: listener, p50"), "us", vec![bare.p50])?,
        row(format!("{name}: opens over listener, p50"), "x", vec![ours.p50 / bare.p50])?
            .aim(Goal::AtMost(1.2)),
    ])
}

fn open_while_it_grows(path: &Path, time: Duration) -> anyhow::Result<Times> {
    let stop = AtomicBool::new(false);
    let until = Instant::now() + time;
    let times: Vec<f64> = thread::scope(|scope| {
        let appends = scope.spawn(|| -> anyhow::Result<()> {
            let mut file = OpenOptions::new().append(true).open(path)?;
            while !stop.load(Ordering::Relaxed) {
                file.write_all(&[7; 512])?;
                thread::sleep(Duration::from_millis(5));
            }
            Ok(())
        });
        let open = || -> anyhow::Result<Vec<f64>> {
            let mut times = Vec::new();
            while Instant::now() < until {
                let begin = Instant::now();
                drop(File::open(path)?);
                times.push(begin.elapsed().as_nanos() as f64 / 1e3);
                thread::sleep(Duration::from_millis(20));
            }
            Ok(times)
        };
        let openers: Vec<_> = (0..OPENERS).map(|_| scope.spawn(open)).collect();
        let mut all = Vec::new();
        for opener in openers {
            all.extend(opener.join().map_err(|_| anyhow::anyhow!("an opener panicked"))??);
        }
        stop.store(true, Ordering::Relaxed);
        appends.join().map_err(|_| anyhow::anyhow!("who appends panicked"))??;
        anyhow::Ok(all)
    })?;
    Times::of(times).context("nothing was opened")
}

/// A file that is written through a shared mapping: from the last unmap until its clean mark is gone.
fn unmapped(base: &Path, cpus: Cpus, amounts: &Amounts) -> anyhow::Result<Vec<Row>> {
    step("mapped files: files");
    let stage = Stage::mount("mapped", u64::from(amounts.unmapped) << 14)?;
    let path = |n: u32| stage.folder.join(n.to_string());
    (0..amounts.unmapped).try_for_each(|n| fs::write(path(n), content(4096, n.into())))?;
    stage.sync()?;
    thread::sleep(SETTLED);
    let host = start(base, "one-rule", "", &stage, cpus)?;
    let [drivers, _] = host.processes()?;
    let mut times = Vec::new();
    for n in 0..amounts.unmapped {
        step(format!("mapped files: {n}"));
        let path = path(n);
        drop(File::open(&path)?);
        let inode = fs::metadata(&path)?.ino();
        let mark = Mark::find(&drivers, inode)?;
        let file = OpenOptions::new().read(true).write(true).open(&path)?;
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping of a file that nobody makes shorter, at an address of the kernel's choice.
        let mapping = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), 4096, access, flags, file.as_fd(), 0)?
        };
        drop(file);
        // SAFETY: a byte of the mapping, which is 4,096 long and no reference leads into; then it is unmapped once.
        unsafe {
            mapping.cast::<u8>().write_volatile(7);
            ensure!(mark.is_there()?, "it is marked as long as it is mapped");
            rustix::mm::munmap(mapping, 4096)?;
        }
        let begin = Instant::now();
        while mark.is_there()? {
            ensure!(begin.elapsed() < Duration::from_secs(10), "its mark stays");
            thread::sleep(Duration::from_micros(5));
        }
        times.push(begin.elapsed().as_secs_f64() * 1e6);
    }
    stop(base, host)?;
    let times = Times::of(times).context("nothing was measured")?;
    Ok(vec![
        row("from the last unmap to the mark's removal, p50", "us", vec![times.p50])?,
        row("from the last unmap to the mark's removal, p99", "us", vec![times.p99])?,
    ])
}

/// A clean mark, as the kernel shows it (proc_pid_fdinfo(5)).
struct Mark {
    info: PathBuf,
    line: String,
}

impl Mark {
    fn find(drivers: &[Process], inode: u64) -> anyhow::Result<Self> {
        let line = format!("fanotify ino:{inode:x} ");
        for driver in drivers {
            let infos = fs::read_dir(format!("/proc/{}/fdinfo", driver.pid))?;
            for info in infos.flatten() {
                let mark = Self { info: info.path(), line: line.clone() };
                if mark.is_there().unwrap_or(false) {
                    return Ok(mark);
                }
            }
        }
        anyhow::bail!("an open file has no mark")
    }

    fn is_there(&self) -> anyhow::Result<bool> {
        Ok(fs::read_to_string(&self.info)?.contains(&self.line))
    }
}
