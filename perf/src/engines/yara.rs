//! `engines-yara`: the YARA-X engine beside the `yr` command.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use seawall_engine::host::SharedContent;
use seawall_lab::workspace;

use super::Bench;
use super::api::{Api, copy_file, open_file};
use super::made::{self, Corpus};
use super::rounds::{Case, Goal, Row, measure};

const NAME: &str = "engines-yara";
/// One leaves a CPU to the service on the smallest machine that this runs on; with two, whatever the service does is taken
/// from what it is compared with.
const THREADS: [u32; 2] = [1, 2];
/// What a run takes at least: no difference is divided by that is nothing but noise.
const SHORTEST: Duration = Duration::from_millis(1);
/// How often each file is scanned in a pass: else it is over before it has begun.
const TIMES: usize = 4;
/// Of the throughput of `yr`.
const GOAL: Goal = Goal::AtLeast(0.95);

pub fn run(bench: &mut Bench) -> anyhow::Result<Vec<Row>> {
    let (count, most) = if bench.quick { (50, 4 << 20) } else { (1_000, 256 << 20) };
    let rules = bench.folder("yara-rules");
    made::write_rules(&rules, count)?;
    let corpus = Corpus::copy(&bench.folder("yara-files"), most)?;
    let program = bench.program("seawall-engine-yara")?;
    let command = [program.display().to_string(), "--rules".into(), rules.display().to_string()];
    let bytes = corpus.bytes * TIMES as u64;
    let rate = |time: Duration| bytes as f64 / 1e6 / time.as_secs_f64();
    let files: Vec<PathBuf> = (0..TIMES).flat_map(|_| corpus.files.iter().cloned()).collect();
    let found = Cell::new(None);

    let mut buffer = vec![0; 256 << 10];
    let sealed = corpus.files.iter().map(|path| copy_file(path, &mut buffer));
    let sealed = sealed.collect::<anyhow::Result<Vec<_>>>()?;
    let apis =
        THREADS.map(|threads| anyhow::Ok((threads, Api::start(command.to_vec(), threads, 4096)?)));
    let apis = apis.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
    let yr = Yr::prepare(bench, &rules, &files);
    let mut cases = Vec::new();
    for (threads, api) in &apis {
        let pass = |contents: Contents<'_>| {
            let pass = match contents {
                Contents::Copied => api.pass_files(&files)?,
                Contents::Opened => api.pass(files.iter().map(open_file))?,
                Contents::Ready(ready) => {
                    api.pass((0..TIMES).flat_map(|_| ready.iter().cloned().map(Ok)))?
                }
            };
            same(&found, pass.infected / TIMES)?;
            anyhow::Ok(rate(pass.time))
        };
        let name = |what: &str| format!("{what}, {threads} at a time");
        let peer = name("yr, without its start");
        let ready = &sealed;
        let mut own = vec![
            Case::new(name("API, files read and copied"), "MB/s", move || pass(Contents::Copied)),
            Case::new(name("API, files opened"), "MB/s", move || pass(Contents::Opened)),
            Case::new(name("API, copied before"), "MB/s", move || pass(Contents::Ready(ready))),
        ];
        if let Ok(yr) = &yr {
            own = own.into_iter().map(|case| case.over(&peer).goal(GOAL)).collect();
            let found = &found;
            let whole = move || {
                let run = yr.scan(&yr.all, *threads)?;
                same(found, run.infected)?;
                anyhow::Ok(run.time)
            };
            let without_start = move || {
                // The shortest of some: what disturbs only makes it longer, and it is taken off.
                let starts = (0..3).map(|_| Ok(yr.scan(&yr.nothing, *threads)?.time));
                let starts = starts.collect::<anyhow::Result<Vec<_>>>()?;
                let start = starts.into_iter().min().unwrap_or_default();
                Ok(rate(whole()?.saturating_sub(start).max(SHORTEST)))
            };
            cases.push(Case::new(peer, "MB/s", without_start));
            cases.push(Case::new(name("yr, the whole run"), "MB/s", move || Ok(rate(whole()?))));
        }
        cases.extend(own);
    }
    if let Err(error) = &yr {
        bench.fail(NAME, &anyhow::anyhow!("yr: {error:#}"));
    }
    let rows = measure(NAME, cases, bench.rounds, !bench.quick)?;
    bench.note(format!(
        "{NAME}: {count} rules, {}, each {TIMES} times, {} of them found by both. `yr scan -f` with rules \
         compiled before; its start (loading them, measured on an empty file in the same round) is in one row \
         and out of the other. The engine is running and has compiled its rules",
        corpus.describe(),
        found.get().unwrap_or_default(),
    ));
    Ok(rows)
}

/// Where the contents of a pass come from.
#[derive(Clone, Copy)]
enum Contents<'a> {
    /// Read and copied on the way.
    Copied,
    /// Opened on the way.
    Opened,
    /// Copied before.
    Ready(&'a [SharedContent]),
}

/// Both have to find the same, or they did not do the same.
fn same(found: &Cell<Option<usize>>, now: usize) -> anyhow::Result<()> {
    let before = found.replace(Some(now)).unwrap_or(now);
    ensure!(before == now, "{before} files were found by one and {now} by another");
    Ok(())
}

/// The command of the very YARA-X that the engine is built with.
#[derive(Debug, Clone)]
struct Yr {
    program: PathBuf,
    compiled: PathBuf,
    /// Lists of what is scanned.
    all: PathBuf,
    nothing: PathBuf,
}

struct Run {
    time: Duration,
    infected: usize,
}

impl Yr {
    fn prepare(bench: &Bench, rules: &Path, files: &[PathBuf]) -> anyhow::Result<Self> {
        let folder = bench.folder("yr");
        fs::create_dir_all(&folder)?;
        let at = |name: &str| folder.join(name);
        let yr = Self {
            program: program(bench.quick)?,
            compiled: at("rules.yarc"),
            all: at("all"),
            nothing: at("nothing"),
        };
        let list: Vec<String> = files.iter().map(|path| path.display().to_string()).collect();
        fs::write(&yr.all, list.join("\n") + "\n")?;
        fs::write(at("empty"), "")?;
        fs::write(&yr.nothing, format!("{}\n", at("empty").display()))?;
        let mut compile = Command::new(&yr.program);
        compile.args(["compile", "-o"]).arg(&yr.compiled).arg(rules.join("made.yar"));
        crate::stage::text_of(&mut compile)?;
        Ok(yr)
    }

    fn scan(&self, list: &Path, threads: u32) -> anyhow::Result<Run> {
        let mut command = Command::new(&self.program);
        command.args(["scan", "-f", "-C", "-p", &threads.to_string()]).arg("--scan-list");
        command.arg(&self.compiled).arg(list).stdin(Stdio::null());
        let begin = Instant::now();
        let output = command.output().context("yr cannot be started")?;
        let time = begin.elapsed();
        let words = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "yr: {}, {}", output.status, words.trim());
        // One line for each rule that matches: its name and the file.
        let lines = String::from_utf8_lossy(&output.stdout);
        let files = lines.lines().filter_map(|line| line.split_once(' ').map(|(_, file)| file));
        Ok(Run { time, infected: files.collect::<BTreeSet<_>>().len() })
    }
}

/// Installs it where it is not there yet, unless it has to go quickly.
fn program(quick: bool) -> anyhow::Result<PathBuf> {
    let version = yara_x::VERSION;
    let root = workspace().join(format!("target/bench/yr-{version}"));
    let program = root.join("bin/yr");
    if program.exists() {
        return Ok(program);
    }
    ensure!(!quick, "{} is not there; a run without --quick installs it", program.display());
    eprintln!("installing yara-x-cli {version}; this takes minutes, once");
    let mut install = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    install.args(["install", "--locked", "yara-x-cli", "--version", version, "--root"]).arg(&root);
    install.arg("--target-dir").arg(root.join("build"));
    crate::stage::text_of(&mut install)?;
    // What it was built from takes gigabytes.
    fs::remove_dir_all(root.join("build"))?;
    Ok(program)
}
