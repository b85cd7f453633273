//! `guests`: what a further guest costs, and whether guests leave each other their share.
//!
//! All guests have the same files, as clones have, and a driver each; the service has one engine. Each opens all of them,
//! one guest after the other: the first pays for the scans. Then many open known content at once, and one opens new files
//! as fast as it can beside another.

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use crate::cpu;
use crate::engines::database;
use crate::engines::made::{content, write_rules};
use crate::engines::report::Results;
use crate::engines::rounds::{Goal, Row};
use crate::fleet::{Engine, Host, cpu_of_host};
use crate::html::{Axis, Line, Plot};
use crate::machine;
use crate::outputs::Outputs;
use crate::plan::Pace;
use crate::sample::{Median, Times, Use, time_opens};
use crate::stage::{self, SHARED_MEMORY, Stage};
use crate::watchdog::{clear, start as start_watchdog, step};

const NAME: &str = "guests";
/// CPU time is counted in ticks: of few opens there may be none.
const A_LITTLE: f64 = 0.1;

/// How much is measured.
struct Amounts {
    guests: usize,
    files: u32,
    signatures: u64,
    rules: usize,
    /// How many open at once, the fewer and the more.
    crowds: [usize; 2],
    crowd_files: u32,
    /// Files that two guests remember, of so many contents.
    remembered: [u32; 2],
    /// New files beside a guest that opens as fast as it can.
    beside: u32,
}

const FULL: Amounts = Amounts {
    guests: 16,
    files: 2_000,
    signatures: 1_000_000,
    rules: 1_000,
    crowds: [8, 64],
    crowd_files: 400,
    remembered: [100_000, 1_000],
    beside: 1_000,
};
const QUICK: Amounts = Amounts {
    guests: 3,
    files: 50,
    signatures: 2_000,
    rules: 20,
    crowds: [2, 4],
    crowd_files: 20,
    remembered: [400, 20],
    beside: 50,
};

/// Measures and reports, as the first process of new namespaces.
pub fn run(quick: bool, outputs: &Outputs) -> anyhow::Result<ExitCode> {
    stage::settle_in()?;
    start_watchdog();
    let load_before = machine::load();
    let amounts = if quick { QUICK } else { FULL };
    let base = Path::new(SHARED_MEMORY).join(NAME);
    fs::create_dir_all(&base)?;
    step("signatures");
    database::write(&base.join("database"), amounts.signatures)?;
    write_rules(&base.join("rules"), amounts.rules)?;
    let clamav = Engine::ClamAv { database: base.join("database") };
    let yara = Engine::Yara { rules: base.join("rules") };
    let yara_name = format!("{} YARA rules", amounts.rules);
    let (mut rows, mut lines) = (Vec::new(), Vec::new());
    for (name, engine, most) in [("ClamAV", &clamav, 0.1), (yara_name.as_str(), &yara, 0.5)] {
        let (more, cost) = clones(&base, name, engine, most, &amounts)?;
        rows.extend(more);
        lines.push(sum_of(name, &cost, amounts.files));
    }
    let first = format!("{yara_name}, the first guest: CPU for an open");
    let first = rows.iter().find(|row| row.name == first).context("it was measured")?.value;
    let (more, cost) = golden(&base, &yara, first, &amounts)?;
    rows.extend(more);
    lines.push(sum_of("clones of a golden image", &cost, amounts.files));
    rows.extend(crowds(&base, &yara, &amounts)?);
    rows.extend(remembered(&base, &amounts)?);
    rows.extend(beside(&base, &yara, &amounts)?);
    clear();
    let plot = Plot {
        title: "Host CPU of guests that open the same files".into(),
        says: format!(
            "Each guest opens {} files for the first time, one guest after the other. The first pays for the scans. \
             What was learned of a golden image, even the first clone does not send.",
            amounts.files
        ),
        x: Axis::linear("guests"),
        y: Axis::linear("seconds of CPU, service and engine"),
        lines,
    };
    let note = format!(
        "{NAME}: {} files of 4 to 64 KiB in each guest, all the same; CPU is that of the service and its engine",
        amounts.files
    );
    let results = Results::new(quick, load_before, rows, vec![plot], vec![note], Vec::new());
    println!("{}", results.to_text());
    outputs.keep(&results.to_json()?, &results.file_name().replace("engines", NAME), quick)?;
    Ok(ExitCode::SUCCESS)
}

/// What so many guests cost together, in seconds; `cost` is that of an open in each, in microseconds.
fn sum_of(name: &str, cost: &[f64], files: u32) -> Line {
    let mut sum = 0.0;
    let points = (1..).zip(cost).map(|(guests, cost)| {
        sum += cost * f64::from(files) / 1e6;
        [f64::from(guests), sum]
    });
    Line { name: name.to_owned(), points: points.collect() }
}

fn goal(name: impl Into<String>, unit: &'static str, value: f64, goal: Goal) -> Row {
    let rounded = (value * 1000.0).round() / 1000.0;
    let row = Row::single(NAME, name, unit, rounded);
    Row { goal: Some(goal), met: Some(goal.is_met(value)), ..row }
}

fn row(name: impl Into<String>, unit: &'static str, value: f64) -> Row {
    Row::single(NAME, name, unit, (value * 1000.0).round() / 1000.0)
}

/// Files of 4 to 64 KiB; the same `seed` gives the same ones.
fn files(name: &str, count: u32, seed: u64) -> anyhow::Result<(Stage, Vec<CString>)> {
    let size = |n: u32| 4096_u32 << (n % 5);
    let bytes = (0..count).map(|n| u64::from(size(n))).sum();
    let stage = Stage::mount(name, bytes)?;
    let mut paths = Vec::new();
    for n in 0..count {
        let path = stage.folder.join(n.to_string());
        fs::write(&path, content(size(n) as usize, seed + u64::from(n)))?;
        paths.push(CString::new(path.as_os_str().as_bytes())?);
    }
    stage.sync()?;
    Ok((stage, paths))
}

/// What the service has counted under this name.
fn counted(host: &Host, name: &str) -> anyhow::Result<u64> {
    let status = host.ask(&["status"])?;
    status["counters"][name].as_u64().with_context(|| format!("no counter {name}"))
}

fn clones(
    base: &Path,
    name: &str,
    engine: &Engine,
    most: f64,
    amounts: &Amounts,
) -> anyhow::Result<(Vec<Row>, Vec<f64>)> {
    step(format!("{name}: files"));
    let guests = (0..amounts.guests)
        .map(|guest| files(&format!("clone-{guest}"), amounts.files, 1))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let folders: Vec<_> = guests.iter().map(|(stage, _)| stage.folder.as_path()).collect();
    let host = Host::start(&base.join("clones"), engine, "", &folders)?;
    let mut cost = Vec::new();
    for (guest, (_, paths)) in guests.iter().enumerate() {
        step(format!("{name}: guest {guest}"));
        let before = cpu_of_host(&host);
        time_opens(paths, amounts.files, Pace::BackToBack, Use::Nothing)?;
        cost.push((cpu_of_host(&host) - before).as_secs_f64() * 1e6 / f64::from(amounts.files));
    }
    let scans = counted(&host, "scans")? as f64;
    drop(host);
    fs::remove_dir_all(base.join("clones"))?;
    let (first, further) = cost.split_first().context("no guest")?;
    let further = Median::of(further.iter().copied()).context("one guest alone")?;
    let wanted = f64::from(amounts.files);
    let rows = vec![
        goal(format!("{name}, {} guests: scans", amounts.guests), "", scans, Goal::AtMost(wanted)),
        row(format!("{name}, the first guest: CPU for an open"), "us", *first),
        row(format!("{name}, a further guest: CPU for an open"), "us", further.median),
        goal(
            format!("{name}, CPU of a further guest over the first"),
            "x",
            further.median / first.max(A_LITTLE),
            Goal::AtMost(most),
        ),
    ];
    Ok((rows, cost))
}

/// Clones of a golden image. `first` is what an open costs the host that has scanned nothing yet, in microseconds.
fn golden(
    base: &Path,
    engine: &Engine,
    first: f64,
    amounts: &Amounts,
) -> anyhow::Result<(Vec<Row>, Vec<f64>)> {
    step("golden image: files");
    let (template, _) = files("template", amounts.files, 1)?;
    let clones = (1..amounts.guests)
        .map(|clone| template.copy(&format!("golden-{clone}")))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let mut folders = vec![template.folder.as_path()];
    folders.extend(clones.iter().map(|stage| stage.folder.as_path()));
    let config = "[on_demand]\npressure_percent = 0\n";
    let host = Host::start(&base.join("golden"), engine, config, &folders)?;
    step("golden image: the template is learned");
    host.ask(&["golden", "learn", "g0", "--name", "template"])?;
    // A driver looks once a second which file systems it can go by.
    thread::sleep(Duration::from_millis(2500));
    let (scans, mut cost, mut sent) = (counted(&host, "scans")?, Vec::new(), Vec::new());
    for (number, clone) in clones.iter().enumerate() {
        step(format!("golden image: clone {number}"));
        let path = |n: u32| CString::new(clone.folder.join(n.to_string()).as_os_str().as_bytes());
        let paths = (0..amounts.files).map(path).collect::<Result<Vec<_>, _>>()?;
        // In the kernel's memory, as those of the others are that have just been written.
        for path in &paths {
            rustix::fs::stat(path)?;
        }
        let before = (cpu_of_host(&host), counted(&host, "bytes_copied")?);
        time_opens(&paths, amounts.files, Pace::BackToBack, Use::Nothing)?;
        let after = (cpu_of_host(&host), counted(&host, "bytes_copied")?);
        cost.push((after.0 - before.0).as_secs_f64() * 1e6 / f64::from(amounts.files));
        let all: u64 = (0..amounts.files).map(|n| 4096 << (n % 5)).sum();
        sent.push((after.1 - before.1) as f64 / all as f64);
    }
    let scans = (counted(&host, "scans")? - scans) as f64;
    drop(host);
    fs::remove_dir_all(base.join("golden"))?;
    let further = Median::of(cost.iter().copied()).context("no clone")?.median;
    let sent = sent.iter().sum::<f64>() / sent.len() as f64;
    let name = format!("golden image, {} clones", clones.len());
    let rows = vec![
        goal(format!("{name}: scans"), "", scans, Goal::AtMost(0.0)),
        goal(format!("{name}: content sent, of all"), "x", sent, Goal::AtMost(0.03)),
        row("golden image, a clone: CPU for an open", "us", further),
        goal(
            "golden image, CPU of a clone over the first guest",
            "x",
            further / first.max(A_LITTLE),
            Goal::AtMost(0.05),
        ),
    ];
    Ok((rows, cost))
}

/// Opens of known content in many guests at once.
fn crowds(base: &Path, engine: &Engine, amounts: &Amounts) -> anyhow::Result<Vec<Row>> {
    let [few, many] = amounts.crowds;
    step("many guests: files");
    // As many opens in all where guests are few: what takes a fifth of a second tells little.
    let each = |count: usize| amounts.crowd_files * u32::try_from(many / count).unwrap_or(1);
    let guests = (0..many)
        .map(|guest| {
            let count = each(if guest < few { few } else { many });
            files(&format!("crowd-{guest}"), count, 9_000_000)
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    // The host learns what all of them have.
    let (_learned, paths) = files("crowd-known", each(few), 9_000_000)?;
    let mut rates = Vec::new();
    let mut rows = Vec::new();
    for count in [few, many] {
        step(format!("{count} guests at once"));
        let folders: Vec<_> =
            guests[..count].iter().map(|(stage, _)| stage.folder.as_path()).collect();
        let host = Host::start(&base.join("crowd"), engine, "", &folders)?;
        // A driver takes two of the 128 groups that a user may have (fanotify(7)): none is left for one more.
        for (number, path) in paths[..each(count) as usize].iter().enumerate() {
            if number % 100 == 0 {
                step(format!("{count} guests at once: the host learns {number}"));
            }
            host.ask(&["scan", path.to_str()?])?;
        }
        step(format!("{count} guests at once, opening"));
        let since = Instant::now();
        let took: Vec<Duration> = thread::scope(|scope| {
            let open = |paths: &'_ [CString]| -> anyhow::Result<Duration> {
                time_opens(paths, each(count), Pace::BackToBack, Use::Nothing)?;
                Ok(since.elapsed())
            };
            let threads: Vec<_> =
                guests[..count].iter().map(|(_, paths)| scope.spawn(move || open(paths))).collect();
            let joined = threads
                .into_iter()
                .map(|thread| thread.join().map_err(|_| anyhow::anyhow!("an opener panicked"))?);
            joined.collect::<anyhow::Result<_>>()
        })?;
        let all = f64::from(each(count)) * count as f64;
        let last = took.iter().max().context("no guest")?.as_secs_f64();
        let first = took.iter().min().context("no guest")?.as_secs_f64();
        rates.push(all / last);
        rows.push(row(format!("{count} guests at once: opens of known content"), "/s", all / last));
        rows.push(row(
            format!("{count} guests at once: first to end over last"),
            "x",
            first / last,
        ));
        drop(host);
        fs::remove_dir_all(base.join("crowd"))?;
    }
    let ratio = rates[1] / rates[0];
    rows.push(goal(
        format!("throughput of {many} guests over {few}"),
        "x",
        ratio,
        Goal::AtLeast(0.9),
    ));
    Ok(rows)
}

/// Two clones that remember as many files as a driver can, and new signatures.
fn remembered(base: &Path, amounts: &Amounts) -> anyhow::Result<Vec<Row>> {
    let [count, contents] = amounts.remembered;
    let rules = base.join("few-rules");
    write_rules(&rules, 10)?;
    let make = |name: &str| -> anyhow::Result<(Stage, Vec<CString>)> {
        step(format!("{count} files of {name}"));
        // ext4 has an inode for each 16 KiB.
        let stage = Stage::mount(name, u64::from(count) << 14)?;
        let mut paths = Vec::new();
        for n in 0..count {
            let folder = stage.folder.join((n / 1000).to_string());
            fs::create_dir_all(&folder)?;
            let path = folder.join(n.to_string());
            fs::write(&path, format!("content {}\n", n % contents))?;
            paths.push(CString::new(path.as_os_str().as_bytes())?);
        }
        stage.sync()?;
        Ok((stage, paths))
    };
    let (one, two) = (make("remembers-1")?, make("remembers-2")?);
    let excluded: Vec<_> = (0..1000).map(|n| format!("\"/srv/excluded-{n}/*.tmp\"")).collect();
    let config = format!("[policy]\nexclude.paths = [{}]\n", excluded.join(", "));
    let start = |folders: &[&Path]| {
        let engine = Engine::Yara { rules: rules.clone() };
        Host::start(&base.join("remembered"), &engine, &config, folders)
    };
    let open_all = |guest: &(Stage, Vec<CString>)| {
        time_opens(&guest.1, count, Pace::BackToBack, Use::Nothing).map(drop)
    };
    // Two drivers share their program's pages, which guests do not.
    step("a guest remembers them");
    let host = start(&[one.0.folder.as_path()])?;
    open_all(&one)?;
    let [drivers, _] = host.processes()?;
    let memory = cpu::memory_kib(&drivers) as f64 / 1024.0;
    ensure!(memory > 0.0, "the driver's memory cannot be read");
    drop(host);
    fs::remove_dir_all(base.join("remembered"))?;
    step("two guests remember them");
    let host = start(&[one.0.folder.as_path(), two.0.folder.as_path()])?;
    open_all(&one)?;
    open_all(&two)?;
    step("new signatures");
    fs::write(
        rules.join("never.yar"),
        "rule Never { strings: $a = \"zq-never\" condition: $a }\n",
    )?;
    host.ask(&["reload"])?;
    let mut sent = Vec::new();
    for guest in [&one, &two] {
        step("they are opened again");
        let before = (counted(&host, "bytes_copied")?, counted(&host, "scans")?);
        open_all(guest)?;
        sent.push((
            counted(&host, "bytes_copied")? - before.0,
            counted(&host, "scans")? - before.1,
        ));
    }
    drop(host);
    fs::remove_dir_all(base.join("remembered"))?;
    let name = format!("{count} known files of {contents} contents, new signatures");
    Ok(vec![
        goal(
            format!("driver and supervisor with {count} files and 1000 exclusions"),
            "MiB",
            memory,
            Goal::AtMost(8.0),
        ),
        row(format!("{name}: scans for the first guest"), "", sent[0].1 as f64),
        goal(format!("{name}: bytes sent by the second"), "B", sent[1].0 as f64, Goal::AtMost(0.0)),
    ])
}

/// New files in one guest, alone and beside one that opens new files as fast as it can.
fn beside(base: &Path, engine: &Engine, amounts: &Amounts) -> anyhow::Result<Vec<Row>> {
    step("a greedy guest: files");
    let (modest, paths) = files("modest", 2 * amounts.beside, 20_000_000)?;
    let (greedy, flood) = files("greedy", 20 * amounts.beside.max(250), 40_000_000)?;
    let folders = [modest.folder.as_path(), greedy.folder.as_path()];
    let host = Host::start(&base.join("beside"), engine, "", &folders)?;
    let (alone, beside) = paths.split_at(amounts.beside as usize);
    step("a modest guest alone");
    let times = |paths: &[CString]| {
        Times::of(time_opens(paths, amounts.beside, Pace::OnePerMs, Use::Nothing)?)
            .context("no samples")
    };
    let alone = times(alone)?;
    step("a modest guest beside a greedy one");
    let (stop, opened) = (AtomicBool::new(false), AtomicU64::new(0));
    let next = AtomicU64::new(0);
    let beside = thread::scope(|scope| {
        let openers = 4;
        for _ in 0..openers {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let at = next.fetch_add(1, Ordering::Relaxed) as usize;
                    let Some(path) = flood.get(at) else { break };
                    let flags = rustix::fs::OFlags::RDONLY;
                    if rustix::fs::open(path, flags, rustix::fs::Mode::empty()).is_ok() {
                        opened.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        thread::sleep(Duration::from_millis(100));
        let beside = times(beside);
        stop.store(true, Ordering::Relaxed);
        beside
    })?;
    ensure!(
        (next.load(Ordering::Relaxed) as usize) < flood.len(),
        "the greedy guest came to its end"
    );
    drop(host);
    let ratio = beside.p99 / alone.p99;
    Ok(vec![
        row("a modest guest alone: p50 of new files", "us", alone.p50),
        row("a modest guest alone: p99 of new files", "us", alone.p99),
        row("beside a greedy one: p50", "us", beside.p50),
        row("beside a greedy one: p99", "us", beside.p99),
        row("what the greedy one opened meanwhile", "", opened.load(Ordering::Relaxed) as f64),
        goal("p99 beside a greedy guest over alone", "x", ratio, Goal::AtMost(2.0)),
    ])
}
