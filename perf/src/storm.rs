//! `storm`: what it costs to scan all files of many guests at once, beside a clamd in each.
//!
//! Each guest is a file system of its own with a driver of its own; there is one service with one ClamAV engine. They
//! share most of their content, as guests of one distribution do: files of a Debian, in their folders. The peer is what each guest would have: a clamd that
//! has loaded the same signatures, and `clamdscan --multiscan --fdpass`. Everything that takes part counts: drivers,
//! service, engine, clamd, command line.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::Value;
use walkdir::WalkDir;

use crate::engines::clamav::{Clamd, clamdscan};
use crate::engines::database;
use crate::engines::made::{Corpus, by_chance};
use crate::engines::report::Results;
use crate::engines::rounds::{Goal, Row};
use crate::fleet::{Engine, Host, cpu_of_all, memory_of_all};
use crate::html::{Axis, Line, Plot};
use crate::machine;
use crate::outputs::Outputs;
use crate::sample::Times;
use crate::stage::{self, SHARED_MEMORY, Stage, text_of};
use crate::watchdog::{clear, start as start_watchdog, step};

const NAME: &str = "storm";
/// Larger files of a guest are left out, in bytes.
const LARGEST: u64 = 32 << 20;
/// Of ten files that a guest has, so many are the same in all.
const SHARED: usize = 7;

/// Measures and reports, as the first process of new namespaces.
pub fn run(quick: bool, outputs: &Outputs, debian: Option<&Path>) -> anyhow::Result<ExitCode> {
    stage::settle_in()?;
    start_watchdog();
    let load_before = machine::load();
    let (counts, bytes, signatures) =
        if quick { (vec![1, 2], 4 << 20, 2_000) } else { (vec![1, 4, 16], 256 << 20, 1_000_000) };
    let base = Path::new(SHARED_MEMORY).join("storm");
    fs::create_dir_all(&base)?;
    step("signatures");
    let database = base.join("database");
    database::write(&database, signatures)?;
    step("files");
    let content = match debian {
        Some(image) => Content::of_image(image, &base.join("debian"), bytes)?,
        None => Content::of_this_machine(bytes)?,
    };
    let most = counts.iter().copied().max().unwrap_or(1);
    let mut roots = Vec::new();
    for number in 0..most {
        step(format!("guest {number}"));
        roots.push(root(&format!("g{number}"), &content, number)?);
    }
    // One that is the same as the first.
    let clone = root("clone", &content, 0)?;

    let mut rows = Vec::new();
    let mut settings = String::new();
    let mut ours = Vec::new();
    for count in &counts {
        let folders: Vec<_> = roots[..*count].iter().map(|root| root.folder.as_path()).collect();
        let host = start(&base.join(format!("host-{count}")), &database, &folders)?;
        settings = host.clamd_settings()?;
        step(format!("{count} guests"));
        let cost = measured(|| scan(&host, &["--all"]))?;
        rows.extend(cost.rows(&format!("ours, {count} guests")));
        ours.push((*count, cost));
    }
    let folders = [roots[0].folder.as_path(), clone.folder.as_path()];
    let host = start(&base.join("host-clones"), &database, &folders)?;
    step("clones");
    let [first, second] = ["g0", "g1"].map(|guest| measured(|| scan(&host, &[guest])));
    let speed = |cost: &Cost| cost.files as f64 * 1000.0 / cost.took_ms.max(1) as f64;
    let (first, second) = (first?, second?);
    rows.push(row("clone after its original", "files/s", speed(&second)));
    let ratio = speed(&second) / speed(&first);
    rows.push(goal("clone over original", "×", ratio, Goal::AtLeast(20.0)));
    drop(host);

    step("a guest beside three that are scanned");
    rows.extend(beside(&base, &database, &roots, quick)?);

    step("a clamd of the guest's own");
    let clamd = Clamd::start(&base.join("peer"), &settings)?;
    let program = clamdscan(quick)?;
    let peer = measured(|| {
        let run = clamd.scan(&program, &roots[0].folder)?;
        let took_ms = u64::try_from(run.time.as_millis())?;
        Ok(Came { files: 0, infected: run.infected, took_ms })
    })?;
    rows.extend(peer.rows("clamd and clamdscan, one guest"));
    drop(clamd);
    for (count, cost) in &ours {
        let cpu = cost.cpu.as_secs_f64() / (peer.cpu.as_secs_f64() * *count as f64);
        let memory = cost.memory_kib as f64 / (peer.memory_kib as f64 * *count as f64);
        let (most_cpu, most_memory) = match count {
            1 => (Some(1.2), None),
            16 => (Some(0.25), Some(0.10)),
            _ => (None, None),
        };
        let one = |name: &str, value: f64, most: Option<f64>| {
            let name = format!("{name}, {count} guests, over as many clamd");
            most.map_or(row(&name, "×", value), |most| goal(&name, "×", value, Goal::AtMost(most)))
        };
        rows.push(one("CPU", cpu, most_cpu));
        rows.push(one("memory", memory, most_memory));
    }
    clear();
    let note = format!(
        "{NAME}: each guest {}, {SHARED} of 10 the same in all; {signatures} made signatures; both clamd had loaded \
         them; CPU time and memory (PSS) of everything that took part; found {} by ours and {} by clamdscan in one",
        content.describe(),
        ours[0].1.infected,
        peer.infected
    );
    let results =
        Results::new(quick, load_before, rows, plots(&ours, &peer), vec![note], Vec::new());
    println!("{}", results.to_text());
    outputs.keep(&results.to_json()?, &results.file_name().replace("engines", NAME), quick)?;
    Ok(ExitCode::SUCCESS)
}

/// Ours beside a clamd in each guest.
fn plots(ours: &[(usize, Cost)], peer: &Cost) -> Vec<Plot> {
    let plot = |title: &str, y: &str, of: fn(&Cost) -> f64| {
        let own = ours.iter().map(|(count, cost)| [*count as f64, of(cost)]);
        let other = ours.iter().map(|(count, _)| [*count as f64, *count as f64 * of(peer)]);
        Plot {
            title: title.into(),
            says: "All files of all guests are scanned. One clamd was measured and is multiplied by the guests, since \
                   nothing is shared between them."
                .into(),
            x: Axis::linear("guests"),
            y: Axis::linear(y),
            lines: vec![
                Line { name: "a clamd in each guest".into(), points: other.collect() },
                Line { name: "Seawall, one service".into(), points: own.collect() },
            ],
        }
    };
    vec![
        plot("Memory of full scans", "MiB", |cost| cost.memory_kib as f64 / 1024.0),
        plot("CPU of full scans", "seconds", |cost| cost.cpu.as_secs_f64()),
    ]
}

fn row(name: &str, unit: &'static str, value: f64) -> Row {
    Row::single(NAME, name, unit, (value * 1000.0).round() / 1000.0)
}

fn goal(name: &str, unit: &'static str, value: f64, goal: Goal) -> Row {
    Row { goal: Some(goal), met: Some(goal.is_met(value)), ..row(name, unit, value) }
}

/// How long opens of new small files take in a guest while others are scanned, and while they are not.
fn beside(base: &Path, database: &Path, roots: &[Stage], quick: bool) -> anyhow::Result<Vec<Row>> {
    let own = Stage::mount("beside", 96 << 20)?;
    let count: u32 = if quick { 150 } else { 2000 };
    let mut batches = Vec::new();
    for batch in ["quiet", "busy"] {
        let folder = own.folder.join(batch);
        fs::create_dir_all(&folder)?;
        let make = |at: u32| -> anyhow::Result<PathBuf> {
            let path = folder.join(at.to_string());
            let text = format!("new content {batch} {at}\n");
            fs::write(&path, text.repeat(8192 / text.len()))?;
            Ok(path)
        };
        batches.push((0..count).map(make).collect::<anyhow::Result<Vec<_>>>()?);
    }
    own.sync()?;
    let mut folders = vec![own.folder.as_path()];
    folders.extend(roots.iter().take(3).map(|root| root.folder.as_path()));
    let host = start(&base.join("host-beside"), database, &folders)?;
    let scanned: Vec<_> = (1..folders.len()).map(|number| format!("g{number}")).collect();
    // As many as there are, or as long as `more` says.
    let timed = |paths: &[PathBuf], more: &dyn Fn() -> bool| {
        let mut times = Vec::new();
        for path in paths.iter().take_while(|_| more()) {
            let since = Instant::now();
            drop(fs::File::open(path)?);
            times.push(since.elapsed().as_nanos() as f64 / 1e3);
            thread::sleep(Duration::from_millis(1));
        }
        Times::of(times).context("no open was timed")
    };
    let quiet = timed(&batches[0], &|| true)?;
    let names: Vec<_> = scanned.iter().map(String::as_str).collect();
    let busy = thread::scope(|scope| {
        let scan = scope.spawn(|| scan(&host, &names));
        thread::sleep(Duration::from_millis(300));
        let busy = timed(&batches[1], &|| !scan.is_finished());
        let scan = scan.join().map_err(|_| anyhow::anyhow!("the scan panicked"))?;
        ensure!(scan?.files > 0, "nothing was scanned");
        busy
    })?;
    let millis = |microseconds: f64| (microseconds / 1000.0).max(0.001);
    Ok(vec![
        row("opens of new files, quiet: p50", "ms", millis(quiet.p50)),
        row("opens of new files, quiet: p99", "ms", millis(quiet.p99)),
        row("beside a full scan of three: opens", "", busy.samples as f64),
        row("beside a full scan of three: p50", "ms", millis(busy.p50)),
        row("beside a full scan of three: p99", "ms", millis(busy.p99)),
        goal("p99 beside over quiet", "×", busy.p99 / quiet.p99, Goal::AtMost(1.5)),
    ])
}

/// What guests have: files, and where in a guest each lies.
struct Content {
    files: Vec<(PathBuf, PathBuf)>,
    bytes: u64,
    what: String,
}

impl Content {
    /// At most `most` bytes of the files of a root file system.
    fn of_image(image: &Path, folder: &Path, most: u64) -> anyhow::Result<Self> {
        fs::create_dir_all(folder)?;
        let mount = ["mount", "-o", "loop,ro,noatime"].map(std::ffi::OsStr::new);
        let words = mount.into_iter().chain([image.as_os_str(), folder.as_os_str()]);
        text_of(Command::new("timeout").arg("60").args(words))?;
        let mut found = Vec::new();
        for entry in WalkDir::new(folder).same_file_system(true) {
            let entry = entry?;
            let length = entry.metadata()?.len();
            if entry.file_type().is_file() && (1..=LARGEST).contains(&length) {
                let inside = entry.path().strip_prefix(folder)?.to_owned();
                found.push((entry.into_path(), inside, length));
            }
        }
        found.sort_by_key(|(_, inside, _)| by_chance(inside.as_os_str()));
        let (mut files, mut bytes) = (Vec::new(), 0);
        for (path, inside, length) in found {
            if bytes + length <= most {
                bytes += length;
                files.push((path, inside));
            }
        }
        Ok(Self { files, bytes, what: "of a Debian with a compiler".into() })
    }

    fn of_this_machine(most: u64) -> anyhow::Result<Self> {
        let files = Corpus::find(most)?;
        let bytes = files.iter().map(|(_, length)| length).sum();
        let place = |(at, (path, _)): (usize, (PathBuf, u64))| {
            let inside = PathBuf::from(format!("d{}/e{}", at % 7, at % 3));
            let inside = inside.join(path.file_name().unwrap_or_default());
            (path, inside)
        };
        let files = files.into_iter().enumerate().map(place).collect();
        Ok(Self { files, bytes, what: "of this machine".into() })
    }

    fn describe(&self) -> String {
        format!("{} files {}, {} MiB", self.files.len(), self.what, self.bytes >> 20)
    }
}

/// A file system as a guest has it; `number` makes three of ten files its own.
fn root(name: &str, content: &Content, number: usize) -> anyhow::Result<Stage> {
    let stage = Stage::mount(name, content.bytes)?;
    for (at, (path, inside)) in content.files.iter().enumerate() {
        let to = stage.folder.join(inside);
        fs::create_dir_all(to.parent().context("a folder")?)?;
        fs::copy(path, &to)?;
        if at % 10 >= SHARED {
            let mut file = fs::File::options().append(true).open(&to)?;
            write!(file, "guest {number}")?;
        }
    }
    symlink("usr", stage.folder.join("link"))?;
    stage.sync()?;
    Ok(stage)
}

/// Four guests at a time, and nobody waits for a machine that is at rest.
const CONFIG: &str = "[on_demand]\nguests_at_once = 4\npressure_percent = 0";

fn start(folder: &Path, database: &Path, mounts: &[&Path]) -> anyhow::Result<Host> {
    let engine = Engine::ClamAv { database: database.to_owned() };
    Host::start(folder, &engine, CONFIG, mounts)
}

/// What something cost.
struct Cost {
    time: Duration,
    cpu: Duration,
    memory_kib: u64,
    files: u64,
    infected: usize,
    took_ms: u64,
}

impl Cost {
    fn rows(&self, name: &str) -> [Row; 3] {
        [
            row(&format!("{name}: time"), "s", self.time.as_secs_f64()),
            row(&format!("{name}: CPU"), "s", self.cpu.as_secs_f64()),
            row(&format!("{name}: memory"), "MiB", self.memory_kib as f64 / 1024.0),
        ]
    }
}

/// What scans came to.
struct Came {
    files: u64,
    infected: usize,
    /// By the service's own count: the command line asks twice a second.
    took_ms: u64,
}

/// Runs scans.
fn measured(work: impl FnOnce() -> anyhow::Result<Came>) -> anyhow::Result<Cost> {
    let (cpu, since) = (cpu_of_all(), Instant::now());
    let Came { files, infected, took_ms } = work()?;
    let time = since.elapsed();
    let cpu = cpu_of_all().saturating_sub(cpu);
    Ok(Cost { time, cpu, memory_kib: memory_of_all(), files, infected, took_ms })
}

/// Scans.
fn scan(host: &Host, words: &[&str]) -> anyhow::Result<Came> {
    let output = host.command().arg("scan").args(words).output()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let scans: Value = serde_json::from_slice(&output.stdout).context(text)?;
    let (mut files, mut infected, mut took_ms) = (0, 0, 0);
    for scan in scans.as_array().into_iter().flatten() {
        let number = |key: &str| scan[key].as_u64().unwrap_or(0);
        ensure!(
            scan["state"] == "done" && number("errors") + number("missed") == 0,
            "a scan did not come to its end: {scan}"
        );
        files += number("files");
        infected += usize::try_from(number("infected"))?;
        took_ms += number("took_ms");
    }
    Ok(Came { files, infected, took_ms })
}
