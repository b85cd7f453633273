//! `engines-clamav`: the ClamAV engine beside clamdscan.

use std::cell::Cell;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use seawall_lab::workspace;

use super::api::{Api, Pass, copy_file, open_file};
use super::made::Corpus;
use super::rounds::{Case, Goal, Row, measure};
use super::{Bench, database};
use crate::stage::text_of;

const NAME: &str = "engines-clamav";
/// One, as many as the smallest machine that this runs on has CPUs, and twice as many: then no CPU waits for the next scan.
const THREADS: [u32; 3] = [1, 2, 4];
/// What a run takes at least: no difference is divided by that is nothing but noise.
const SHORTEST: Duration = Duration::from_millis(1);
/// Of the throughput of clamdscan.
const GOAL: Goal = Goal::AtLeast(0.95);
const PROGRAM: &str = "/usr/sbin/clamd";

pub fn run(bench: &mut Bench) -> anyhow::Result<Vec<Row>> {
    let (signatures, most) = if bench.quick { (2_000, 2 << 20) } else { (200_000, 64 << 20) };
    let folder = bench.folder("clamav-database");
    database::write(&folder, signatures)?;
    let corpus = Corpus::copy(&bench.folder("clamav-files"), most)?;
    let rate = |time: Duration| corpus.bytes as f64 / 1e6 / time.as_secs_f64();
    let found = Cell::new(None);
    let mut buffer = vec![0; 256 << 10];
    let ready = corpus.files.iter().map(|path| copy_file(path, &mut buffer));
    let ready = ready.collect::<anyhow::Result<Vec<_>>>()?;
    let empty = bench.folder("clamav-nothing");
    fs::create_dir_all(&empty)?;
    fs::write(empty.join("empty"), "x")?;
    let engines = THREADS.map(|threads| {
        let engine = start(bench, &folder, &format!("clamav-temporary-{threads}"), threads)?;
        let peer = engine.settings().and_then(|settings| {
            let place = bench.folder(&format!("clamav-peer-{threads}"));
            let clamd = Clamd::start(&place, &settings)?;
            Ok((clamd, clamdscan(bench.quick)?))
        });
        anyhow::Ok((threads, engine, peer))
    });
    let engines = engines.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
    let mut cases = Vec::new();
    for (threads, engine, peer) in &engines {
        let rated = |pass: anyhow::Result<Pass>| {
            let pass = pass?;
            same(&found, pass.infected)?;
            anyhow::Ok(rate(pass.time))
        };
        let (corpus, ready, found) = (&corpus, &ready, &found);
        let copied = move || rated(engine.api.pass_files(&corpus.files));
        let opened = move || rated(engine.api.pass(corpus.files.iter().map(open_file)));
        let ready_made = move || rated(engine.api.pass(ready.iter().cloned().map(Ok)));
        let name = |what: &str| format!("{what}, {threads} at a time");
        let mut own = vec![
            Case::new(name("API, files read and copied"), "MB/s", copied),
            Case::new(name("API, files opened"), "MB/s", opened),
            Case::new(name("API, copied before"), "MB/s", ready_made),
        ];
        match peer {
            Ok((clamd, program)) => {
                let other = name("clamdscan, without its start");
                own = own.into_iter().map(|case| case.over(&other).goal(GOAL)).collect();
                let empty = &empty;
                let whole = move || {
                    let run = clamd.scan(program, &corpus.folder)?;
                    same(found, run.infected)?;
                    anyhow::Ok(run.time)
                };
                let without_start = move || {
                    let starts = (0..3).map(|_| Ok(clamd.scan(program, empty)?.time));
                    let starts = starts.collect::<anyhow::Result<Vec<_>>>()?;
                    let start = starts.into_iter().min().unwrap_or_default();
                    Ok(rate(whole()?.saturating_sub(start).max(SHORTEST)))
                };
                cases.push(Case::new(other, "MB/s", without_start));
                let name = name("clamdscan, the whole run");
                cases.push(Case::new(name, "MB/s", move || Ok(rate(whole()?))));
            }
            Err(error) => bench.fail(NAME, &anyhow::anyhow!("clamdscan: {error:#}")),
        }
        cases.extend(own);
    }
    let rows = measure(NAME, cases, bench.rounds, !bench.quick)?;
    bench.note(format!(
        "{NAME}: {signatures} made signatures, {}, {} of them found by both. `clamdscan --fdpass --multiscan` on \
         a clamd with the engine's own clamd.conf but for paths; both clamd run and have loaded. Its start (measured on one byte in the same round) is in one row and out of the other",
        corpus.describe(),
        found.get().unwrap_or_default(),
    ));
    Ok(rows)
}

fn same(found: &Cell<Option<usize>>, now: usize) -> anyhow::Result<()> {
    let before = found.replace(Some(now)).unwrap_or(now);
    ensure!(before == now, "{before} files were found by one and {now} by another");
    Ok(())
}

/// Our engine with its clamd.
pub struct Engine {
    pub api: Api,
    temporary: PathBuf,
}

/// Starts it on a database; its private folder is below one called `temporary`.
pub fn start(
    bench: &Bench,
    database: &Path,
    temporary: &str,
    threads: u32,
) -> anyhow::Result<Engine> {
    ensure!(Path::new(PROGRAM).exists(), "{PROGRAM} is not there: install clamav-daemon");
    let temporary = bench.folder(temporary);
    fs::create_dir_all(&temporary)?;
    let program = bench.program("seawall-engine-clamav")?;
    let words = [Path::new("--database"), database, Path::new("--temporary"), &temporary];
    let words = [program.as_path()].into_iter().chain(words);
    let command = words.map(|word| word.display().to_string()).collect();
    Ok(Engine { api: Api::start(command, threads, 8192)?, temporary })
}

impl Engine {
    /// The configuration that it has given its clamd.
    pub fn settings(&self) -> anyhow::Result<String> {
        for entry in fs::read_dir(&self.temporary)? {
            let path = entry?.path().join("clamd.conf");
            if let Ok(text) = fs::read_to_string(&path) {
                return Ok(text);
            }
        }
        bail!("no clamd.conf below {}", self.temporary.display())
    }
}

/// A clamd that is nobody's engine.
pub struct Clamd {
    child: Child,
    config: PathBuf,
    /// From its start to its first answer.
    pub loading: Duration,
}

pub struct Run {
    pub time: Duration,
    pub infected: usize,
}

impl Clamd {
    /// With these settings, but paths of its own.
    pub fn start(folder: &Path, settings: &str) -> anyhow::Result<Self> {
        fs::create_dir_all(folder.join("unpacked"))?;
        let (config, socket) = (folder.join("clamd.conf"), folder.join("socket"));
        let place = |line: &str| match line.split_once(' ') {
            Some(("LocalSocket", _)) => format!("LocalSocket {}\n", socket.display()),
            Some(("TemporaryDirectory", _)) => {
                format!("TemporaryDirectory {}\n", folder.join("unpacked").display())
            }
            Some(("LogFile", _)) => format!("LogFile {}\n", folder.join("log").display()),
            _ => format!("{line}\n"),
        };
        fs::write(&config, settings.lines().map(place).collect::<String>())?;
        let begin = Instant::now();
        let child = Command::new(PROGRAM)
            .arg(format!("--config-file={}", config.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("clamd cannot be started")?;
        let mut clamd = Self { child, config, loading: Duration::ZERO };
        while !answers(&socket) {
            let ended = clamd.child.try_wait()?;
            ensure!(ended.is_none(), "clamd ended while it loaded");
            ensure!(begin.elapsed() < Duration::from_secs(600), "clamd does not answer");
            thread::sleep(Duration::from_millis(20));
        }
        clamd.loading = begin.elapsed();
        Ok(clamd)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Scans a folder.
    pub fn scan(&self, program: &Path, folder: &Path) -> anyhow::Result<Run> {
        let mut command = Command::new(program);
        command.arg("--config-file").arg(&self.config);
        command.args(["--fdpass", "--multiscan", "--infected"]).arg(folder).stdin(Stdio::null());
        let begin = Instant::now();
        let output = command.output().context("clamdscan cannot be started")?;
        let time = begin.elapsed();
        let text = String::from_utf8_lossy(&output.stdout);
        let infected = text.lines().find_map(|line| line.strip_prefix("Infected files: "));
        // 1 means that something was found.
        let fine = matches!(output.status.code(), Some(0 | 1)) && !text.contains("Total errors");
        match infected.and_then(|number| number.trim().parse().ok()) {
            Some(infected) if fine => Ok(Run { time, infected }),
            _ => bail!("clamdscan: {}, {}", output.status, text.trim()),
        }
    }
}

impl Drop for Clamd {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn answers(socket: &Path) -> bool {
    let ask = || -> std::io::Result<bool> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(600)))?;
        stream.write_all(b"zPING\0")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer.starts_with("PONG"))
    };
    ask().unwrap_or(false)
}

/// Debian's clamdscan: the system's, or its package's files in a folder of ours.
pub fn clamdscan(quick: bool) -> anyhow::Result<PathBuf> {
    let folder = workspace().join("target/bench/clamdscan");
    let unpacked = folder.join("usr/bin/clamdscan");
    let system = PathBuf::from("/usr/bin/clamdscan");
    if let Some(found) = [system, unpacked.clone()].into_iter().find(|path| path.exists()) {
        return Ok(found);
    }
    ensure!(!quick, "it is not there; a run without --quick fetches it");
    fs::create_dir_all(&folder)?;
    text_of(Command::new("apt-get").args(["download", "clamdscan"]).current_dir(&folder))?;
    for entry in fs::read_dir(&folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|end| end == "deb") {
            text_of(Command::new("dpkg-deb").arg("-x").arg(&path).arg(&folder))?;
        }
    }
    Ok(unpacked)
}
