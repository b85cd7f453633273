//! `replay`: a trace of opens and writes, replayed beside nothing, a bare listener, ours, and clamonacc.
//!
//! Each guest has its own file system with the trace's files, and four threads that do what the trace says at its times,
//! or as soon after as they can. Guests, listeners and drivers share one CPU; service, engine and clamd have another one.
//! What is opened is timed; how far a setup comes in the time that it has says whether it can follow at all.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::fs::{Mode, OFlags};
use seawall_lab::Process;

use crate::clamonacc::Clamonacc;
use crate::cpu::{self, Cpus};
use crate::engines::made::{content, write_rules};
use crate::engines::report::Results;
use crate::engines::rounds::{Goal, Row};
use crate::fleet::{Engine, Host};
use crate::html::{Axis, Line, Plot};
use crate::listener::Listener;
use crate::machine;
use crate::outputs::Outputs;
use crate::report::Failure;
use crate::sample::{Median, PERCENTS, Times};
use crate::stage::{self, SHARED_MEMORY, Stage};
use crate::trace::{Act, Before, Busy, Step, Trace};
use crate::watchdog::{clear, start as start_watchdog, step};

const NAME: &str = "replay";
/// Threads of a guest.
const THREADS: u32 = 4;
/// A part may take so many times as long as it is; then the rest of it is left out.
const BEHIND_MAX: u32 = 2;
/// A part is not taken for shorter than this.
const PART_MIN: Duration = Duration::from_millis(100);
/// What a driver puts off it has done by then: the second scan of a file that is written all the time.
const PUT_OFF: Duration = Duration::from_secs(12);
/// Of a larger file only so much is content, in bytes; the rest is a hole.
const CONTENT_MAX: u64 = 1 << 20;
/// How long it may take until what was opened before needs no look.
const SETTLE_MAX: Duration = Duration::from_secs(30);
/// Longer than two clock ticks at 100 Hz: what was written before may be remembered.
const SETTLED: Duration = Duration::from_millis(60);

const FULL: Busy =
    Busy { parts: 3, seconds: 5.0, opens_per_second: 16_000, writes_per_second: 300 };
const QUICK: Busy = Busy { parts: 1, seconds: 0.5, opens_per_second: 2_000, writes_per_second: 20 };

/// What to replay, and how often.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Replayed {
    /// replay: what a driver has recorded (seawall-agent run --record) instead of a made trace of a busy host
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// replay: so many guests do the same at once
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=60))]
    pub guests: Option<u32>,
}

impl Replayed {
    /// As the first process of new namespaces is told them.
    pub fn arguments(&self) -> anyhow::Result<Vec<PathBuf>> {
        let mut arguments = Vec::new();
        if let Some(trace) = &self.trace {
            let trace = std::path::absolute(trace)?;
            ensure!(!trace.starts_with(SHARED_MEMORY), "--trace cannot be in {SHARED_MEMORY}");
            Trace::read(&trace)?;
            arguments.extend(["--trace".into(), trace]);
        }
        if let Some(guests) = self.guests {
            arguments.extend(["--guests".into(), guests.to_string().into()]);
        }
        Ok(arguments)
    }
}

/// What an act was, for whoever waited for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    /// Opened before, and not changed since.
    Again,
    /// Opened for the first time, or for the first time since it was written.
    First,
    /// Somebody has it open for writing.
    Held,
    Write,
}

impl Class {
    const ALL: [Self; 4] = [Self::Again, Self::First, Self::Held, Self::Write];

    fn name(self) -> &'static str {
        match self {
            Self::Again => "opened again",
            Self::First => "opened first",
            Self::Held => "opened beside a writer",
            Self::Write => "opened and written",
        }
    }
}

/// Who watches.
enum Side {
    Unprotected,
    Listener(Vec<Listener>),
    Ours(Host),
    Clamonacc(Vec<Clamonacc>),
}

const SIDES: [&str; 4] = ["unprotected", "listener", "ours", "clamonacc"];

/// A guest's files.
struct Guest {
    stage: Stage,
    paths: Vec<CString>,
    /// Whether the next open of a file is the first since it changed.
    changed: Vec<AtomicBool>,
    /// Kept open for writing.
    _held: Vec<File>,
}

/// What one side came to in one part.
#[derive(Default)]
struct Part {
    times: BTreeMap<Class, Vec<f64>>,
    done: f64,
    /// In parts of a core.
    driver: f64,
    service: f64,
}

/// Measures and reports, as the first process of new namespaces.
pub fn run(quick: bool, outputs: &Outputs, replayed: &Replayed) -> anyhow::Result<ExitCode> {
    stage::settle_in()?;
    start_watchdog();
    let load_before = machine::load();
    step("the trace");
    let trace = match &replayed.trace {
        Some(path) => Trace::read(path)?,
        None => Trace::busy(if quick { &QUICK } else { &FULL }),
    };
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let most = rustix::process::Rlimit { current: files.maximum, ..files };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, most)?;
    let cpus = Cpus::choose()?;
    let base = Path::new(SHARED_MEMORY).join(NAME);
    fs::create_dir_all(&base)?;
    write_rules(&base.join("rules"), 100)?;
    let count = replayed.guests.unwrap_or(1);
    let (mut measured, mut failed) = (BTreeMap::new(), Vec::new());
    let mut ready = Vec::new();
    for name in SIDES {
        match prepare(&base, name, &trace, count, cpus) {
            Ok(side) => ready.push((name, side)),
            Err(error) => {
                failed.push(Failure { name: name.into(), reason: format!("{error:#}") });
            }
        }
    }
    for (number, part) in trace.parts.iter().enumerate() {
        for (name, (side, guests)) in &ready {
            step(format!("part {} of {}: {name}", number + 1, trace.parts.len()));
            cpu::pin_self(cpus.guest)?;
            let put_off = if quick || *name != "ours" { Duration::ZERO } else { PUT_OFF };
            let part = play(side, guests, &trace, part, put_off)?;
            measured.entry(*name).or_insert_with(Vec::new).push(part);
        }
    }
    clear();
    let is_goal = replayed.trace.is_none() && count == 1;
    let rows = rows(&measured, is_goal);
    let mut notes = vec![
        format!("{NAME}: {}; {count} guests, all on one CPU; the service on another", trace.name),
        "clamonacc: a clamd for each guest with few signatures, on the service's CPU".into(),
    ];
    if trace.is_longer {
        notes.push("of the trace the first two and a half minutes were replayed".into());
    }
    if trace.lost > 0 {
        notes.push(format!("the recorder of the trace lost events {} times", trace.lost));
    }
    let plots = vec![plot(&measured, &trace)];
    let results = Results::new(quick, load_before, rows, plots, notes, failed);
    println!("{}", results.to_text());
    outputs.keep(&results.to_json()?, &results.file_name().replace("engines", NAME), quick)?;
    Ok(if results.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn prepare(
    base: &Path,
    name: &str,
    trace: &Trace,
    count: u32,
    cpus: Cpus,
) -> anyhow::Result<(Side, Vec<Guest>)> {
    let guest = |number: u32| {
        step(format!("{name}: files of guest {}", number + 1));
        write_files(&format!("{name}-{number}"), trace)
    };
    let guests: Vec<Guest> = (0..count).map(guest).collect::<anyhow::Result<_>>()?;
    thread::sleep(SETTLED);
    step(format!("{name}: starting"));
    let folders: Vec<&Path> = guests.iter().map(|guest| guest.stage.folder.as_path()).collect();
    cpu::pin_self(cpus.guest)?;
    let side = match name {
        "listener" => Side::Listener(
            folders
                .iter()
                .map(|folder| Listener::start(folder, false))
                .collect::<anyhow::Result<_>>()?,
        ),
        "clamonacc" => {
            let start = |(number, folder): (usize, &&Path)| {
                step(format!("clamonacc {}", number + 1));
                Clamonacc::start(folder, &base.join(format!("clamonacc-{number}")), cpus)
            };
            Side::Clamonacc(folders.iter().enumerate().map(start).collect::<anyhow::Result<_>>()?)
        }
        "ours" => {
            let engine = Engine::Yara { rules: base.join("rules") };
            cpu::unpin_self()?;
            let host = Host::start(&base.join("ours"), &engine, "", &folders)?;
            host.pin(cpus)?;
            learn(base, &host, trace)?;
            Side::Ours(host)
        }
        _ => Side::Unprotected,
    };
    cpu::pin_self(cpus.guest)?;
    step(format!("{name}: what was opened before"));
    open_before(&side, &guests, trace)?;
    Ok((side, guests))
}

fn write_files(name: &str, trace: &Trace) -> anyhow::Result<Guest> {
    let filled = |size: u64| size.min(CONTENT_MAX);
    // ext4 has an inode for each 16 KiB.
    let bytes = trace.files.iter().map(|file| filled(file.size).next_multiple_of(16 << 10)).sum();
    let stage = Stage::mount(name, bytes)?;
    let (mut paths, mut held) = (Vec::new(), Vec::new());
    for (number, file) in trace.files.iter().enumerate() {
        let folder = stage.folder.join((number / 1000).to_string());
        fs::create_dir_all(&folder)?;
        let path = folder.join(number.to_string());
        let out = OpenOptions::new().create_new(true).write(true).open(&path)?;
        let head = content(usize::try_from(filled(file.size))?, file.content);
        out.write_all_at(&head, 0)?;
        out.set_len(file.size)?;
        paths.push(CString::new(path.as_os_str().as_bytes())?);
        if file.before == Before::Held {
            held.push(out);
        }
    }
    stage.sync()?;
    let changed = trace.files.iter().map(|_| AtomicBool::new(true)).collect();
    Ok(Guest { stage, paths, changed, _held: held })
}

/// The host learns the contents that it is to know, from elsewhere.
fn learn(base: &Path, host: &Host, trace: &Trace) -> anyhow::Result<()> {
    let known = trace.files.iter().filter(|file| file.before == Before::Known);
    let known: BTreeMap<u64, u64> = known.map(|file| (file.content, file.size)).collect();
    let path = base.join("known");
    for (number, size) in known {
        step(format!("ours: the host learns a content of {size} bytes"));
        fs::write(&path, content(usize::try_from(size)?, number))?;
        host.ask(&["scan", path.to_str().context("the benchmark's own paths are text")?])?;
    }
    Ok(())
}

/// Opens what was opened before, until nothing of it is looked at any more.
fn open_before(side: &Side, guests: &[Guest], trace: &Trace) -> anyhow::Result<()> {
    let before = |file: &usize| matches!(trace.files[*file].before, Before::Opened | Before::Held);
    let open_all = || -> anyhow::Result<()> {
        for guest in guests {
            for file in (0..trace.files.len()).filter(before) {
                drop(open(&guest.paths[file])?);
                guest.changed[file].store(false, Ordering::Relaxed);
            }
        }
        Ok(())
    };
    open_all()?;
    let Side::Ours(host) = side else { return Ok(()) };
    let until = Instant::now() + SETTLE_MAX;
    loop {
        let scanned = || host.ask(&["status"]).map(|status| status["counters"]["requests"].clone());
        let asked = scanned()?;
        open_all()?;
        if scanned()? == asked {
            return Ok(());
        }
        ensure!(Instant::now() < until, "files that were opened again are still asked for");
        thread::sleep(Duration::from_millis(100));
    }
}

fn open(path: &CString) -> anyhow::Result<std::os::fd::OwnedFd> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("{path:?} cannot be opened"))
}

/// Who watches in the guests, and what serves them.
fn processes(side: &Side) -> anyhow::Result<[Vec<Process>; 2]> {
    Ok(match side {
        Side::Unprotected => Default::default(),
        Side::Listener(all) => {
            [all.iter().map(Listener::process).collect::<anyhow::Result<_>>()?, Vec::new()]
        }
        Side::Ours(host) => host.processes()?,
        Side::Clamonacc(all) => {
            let mut found = [Vec::new(), Vec::new()];
            for both in all {
                for (at, process) in [1, 0].into_iter().zip(both.processes()?) {
                    found[at].push(process);
                }
            }
            found
        }
    })
}

/// How many accesses ours let through unscanned so far.
fn unscanned(side: &Side) -> anyhow::Result<u64> {
    let Side::Ours(host) = side else { return Ok(0) };
    let guests = host.ask(&["guests"])?;
    let counters =
        guests.as_array().into_iter().flatten().map(|guest| &guest["session"]["counters"]);
    counters.map(|of| of["unscanned"].as_u64().context("unscanned is counted")).sum()
}

/// One part, in all guests at once.
fn play(
    side: &Side,
    guests: &[Guest],
    trace: &Trace,
    steps: &[Step],
    put_off: Duration,
) -> anyhow::Result<Part> {
    let parts = processes(side)?;
    let used = || -> anyhow::Result<[u64; 2]> {
        let is_there =
            |process: &Process| Path::new("/proc").join(process.pid.to_string()).exists();
        ensure!(parts.iter().flatten().all(is_there), "a process has ended");
        Ok(parts.each_ref().map(|part| cpu::used_ns(part).unwrap_or(0)))
    };
    let (unscanned_before, before) = (unscanned(side)?, used()?);
    let since = Instant::now();
    let length = Duration::from_micros(steps.last().map_or(0, |step| step.at_us));
    let until = since + length.max(PART_MIN) * BEHIND_MAX;
    let all: Vec<Vec<(Class, f64)>> = thread::scope(|scope| {
        let threads = guests.iter().flat_map(|guest| (0..THREADS).map(move |own| (guest, own)));
        let threads: Vec<_> = threads
            .map(|(guest, own)| scope.spawn(move || follow(guest, trace, steps, own, since, until)))
            .collect();
        let joined = threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow::anyhow!("an opener panicked"))?);
        joined.collect::<anyhow::Result<_>>()
    })?;
    let took = since.elapsed().as_nanos() as f64;
    // Its work counts for this part, and not for the next one's.
    thread::sleep(put_off);
    let (after, unscanned_after) = (used()?, unscanned(side)?);
    ensure!(unscanned_after == unscanned_before, "accesses were let through unscanned");
    let share = |at: usize| after[at].saturating_sub(before[at]) as f64 / took;
    let mut part = Part { driver: share(0), service: share(1), ..Part::default() };
    let done: usize = all.iter().map(Vec::len).sum();
    part.done = done as f64 / (steps.len() * guests.len()) as f64;
    for (class, time) in all.into_iter().flatten() {
        part.times.entry(class).or_default().push(time);
    }
    Ok(part)
}

/// One thread's steps; what they were, and what they took in microseconds.
fn follow(
    guest: &Guest,
    trace: &Trace,
    steps: &[Step],
    own: u32,
    since: Instant,
    until: Instant,
) -> anyhow::Result<Vec<(Class, f64)>> {
    let mut times = Vec::new();
    for (number, step) in steps.iter().enumerate() {
        if step.process % THREADS != own {
            continue;
        }
        let wait = Duration::from_micros(step.at_us).saturating_sub(since.elapsed());
        if since + Duration::from_micros(step.at_us) > until {
            break;
        }
        if !wait.is_zero() {
            thread::sleep(wait);
        }
        let begin = Instant::now();
        if begin > until {
            break;
        }
        let (path, changed) = (&guest.paths[step.file], &guest.changed[step.file]);
        let class = match step.act {
            Act::Open => {
                drop(open(path)?);
                let first = changed.swap(false, Ordering::Relaxed);
                let is_held = trace.files[step.file].before == Before::Held;
                if is_held {
                    Class::Held
                } else if first {
                    Class::First
                } else {
                    Class::Again
                }
            }
            Act::Write => {
                let flags = OFlags::WRONLY | OFlags::CLOEXEC;
                let file = rustix::fs::open(path, flags, Mode::empty())
                    .with_context(|| format!("{path:?} cannot be written"))?;
                File::from(file).write_all_at(&number.to_le_bytes(), 0)?;
                changed.store(true, Ordering::Relaxed);
                Class::Write
            }
        };
        times.push((class, begin.elapsed().as_nanos() as f64 / 1e3));
    }
    Ok(times)
}

fn rows(measured: &BTreeMap<&str, Vec<Part>>, is_goal: bool) -> Vec<Row> {
    let mut rows = Vec::new();
    let of = |name: String, unit, values: &mut dyn Iterator<Item = f64>| {
        Row::of_rounds(NAME, name, unit, values.collect())
    };
    let times = |part: &Part, class| part.times.get(&class).cloned().and_then(Times::of);
    for name in SIDES {
        let Some(parts) = measured.get(name) else { continue };
        let done = &mut parts.iter().map(|part| part.done);
        rows.extend(of(format!("{name}: done in time, of all"), "x", done));
        for class in Class::ALL {
            for (what, at) in [("p50", 0), ("p99", 1)] {
                let times = parts.iter().filter_map(|part| times(part, class));
                let times = &mut times.map(|times| [times.p50, times.p99][at]);
                rows.extend(of(format!("{name}: {}, {what}", class.name()), "us", times));
            }
        }
        if name != SIDES[0] {
            let driver = &mut parts.iter().map(|part| part.driver);
            let row = of(format!("{name}: CPU of who watches in guests"), "cores", driver);
            let is_goal = is_goal && name == "ours";
            rows.extend(row.map(|row| if is_goal { row.aim(Goal::AtMost(0.1)) } else { row }));
        }
        if ["ours", "clamonacc"].contains(&name) {
            let service = &mut parts.iter().map(|part| part.service);
            rows.extend(of(format!("{name}: CPU of the service"), "cores", service));
        }
    }
    let ratio = |ours: &Part, bare: &Part| {
        Some(times(ours, Class::Again)?.p99 / times(bare, Class::Again)?.p99)
    };
    if let (Some(ours), Some(bare)) = (measured.get("ours"), measured.get(SIDES[0])) {
        let name = "ours over unprotected: opened again, p99";
        let ratios = &mut ours.iter().zip(bare).filter_map(|(ours, bare)| ratio(ours, bare));
        let row = of(name.into(), "x", ratios);
        rows.extend(row.map(|row| if is_goal { row.aim(Goal::AtMost(1.3)) } else { row }));
    }
    rows
}

fn plot(measured: &BTreeMap<&str, Vec<Part>>, trace: &Trace) -> Plot {
    let line = |name: &&str| {
        let parts = measured.get(name)?;
        let opens = |part: &Part| {
            let opens = part.times.iter().filter(|(class, _)| **class != Class::Write);
            Times::of(opens.flat_map(|(_, times)| times.iter().copied()).collect())
        };
        let all: Vec<Times> = parts.iter().filter_map(opens).collect();
        let point = |(at, percent): (usize, usize)| {
            let us = Median::of(all.iter().map(|times| times.percentiles[at]))?.median;
            Some([us, percent as f64])
        };
        let points = PERCENTS.into_iter().enumerate().filter_map(point).collect();
        Some(Line { name: (*name).to_owned(), points })
    };
    Plot {
        title: "Opens of a replayed trace".into(),
        says: format!(
            "{}. Whoever cannot follow leaves opens out, which are not in its line; the table says how many.",
            trace.name
        ),
        x: Axis::log("microseconds"),
        y: Axis::linear("percent of opens that took no longer"),
        lines: SIDES.iter().filter_map(line).collect(),
    }
}
