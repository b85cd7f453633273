//! One run: prepare, measure in rounds, report.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use seawall_lab::Process;

use crate::clamonacc::Clamonacc;
use crate::cpu::{self, Cpus};
use crate::files::Files;
use crate::html::Plot;
use crate::listener::Listener;
use crate::machine::{self, Machine};
use crate::ours::{Ours, astray};
use crate::outputs::Outputs;
use crate::plan::{Amounts, Case, Pace, Random, SIZES, Setup, What};
use crate::report::{Failure, Figure, Results, Row, distribution};
use crate::sample::{Times, Use, time_opens};
use crate::stage::{self, Stage};
use crate::watchdog::{clear, start as start_watchdog, step};

/// Everything that takes part runs at this priority, so that other work on the machine disturbs less.
pub const NICE: i32 = -15;
/// Longer than two clock ticks at 100 Hz: what was written before may be remembered.
const SETTLED: Duration = Duration::from_millis(60);
/// The scheduler comes to rest after what was done between two cases.
const REST: Duration = Duration::from_millis(5);
/// More than this part of a case's opens that went another way, and the case counts as failed.
const ASTRAY_MAX: f64 = 0.05;

/// What one case came to in one round.
#[derive(Debug)]
pub struct Round {
    pub times: Times,
    /// CPU time for each open in microseconds, by part.
    pub cpu_us: BTreeMap<&'static str, f64>,
}

/// Measures and reports; fails when something could not be measured.
pub fn run(
    amounts: Amounts,
    quick: bool,
    outputs: &Outputs,
    without_ours: Option<String>,
    only: Option<&str>,
) -> anyhow::Result<ExitCode> {
    stage::settle_in()?;
    start_watchdog();
    rustix::process::setpriority_process(None, NICE).context("priority")?;
    let load_before = machine::load();
    let mut bench = Bench::prepare(amounts, without_ours)?;
    let mut random = Random(u64::from_le_bytes(seed()?));
    for round in 0..amounts.rounds {
        let mut cases: Vec<Case> = Case::named(only).collect();
        random.shuffle(&mut cases);
        for (n, case) in cases.iter().enumerate() {
            let of = (round + 1, amounts.rounds, n + 1, cases.len());
            step(format!("round {} of {}, case {} of {}: {}", of.0, of.1, of.2, of.3, case.name()));
            bench.measure(case, round);
        }
    }
    step("report");
    let results = bench.finish(quick, load_before);
    clear();
    println!("{}", results.to_text());
    outputs.keep(&results.to_json()?, &results.file_name(), quick)?;
    Ok(if results.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn seed() -> anyhow::Result<[u8; 8]> {
    use std::io::Read;
    let mut seed = [0; 8];
    fs::File::open("/dev/urandom")?.read_exact(&mut seed)?;
    Ok(seed)
}

/// One setup, ready to be measured.
struct Ready {
    files: Files,
    watcher: Watcher,
}

enum Watcher {
    Nobody,
    Listener(Listener),
    Ours(Box<Ours>),
    Clamonacc(Clamonacc),
}

struct Bench {
    amounts: Amounts,
    cpus: Cpus,
    file_system: String,
    ready: BTreeMap<Setup, Ready>,
    rounds: BTreeMap<Case, Vec<Round>>,
    failed: BTreeMap<String, String>,
    notes: Vec<String>,
    /// Kept mounted.
    _stages: Vec<Stage>,
}

impl Bench {
    fn prepare(amounts: Amounts, without_ours: Option<String>) -> anyhow::Result<Self> {
        let cpus = Cpus::choose()?;
        let (mut stages, mut files) = (Vec::new(), Vec::new());
        for setup in Setup::ALL {
            step(format!("writing the files for `{}`", setup.name()));
            let stage = Stage::mount(setup.folder(), amounts.bytes(setup))?;
            files.push((setup, Files::write(&stage.folder, setup, &amounts)?));
            stage.sync()?;
            stages.push(stage);
        }
        let mut kinds: Vec<String> = stages.iter().map(|stage| stage.kind.clone()).collect();
        kinds.dedup();
        thread::sleep(SETTLED);
        let mut bench = Self {
            amounts,
            cpus,
            file_system: kinds.join("; "),
            ready: BTreeMap::new(),
            rounds: BTreeMap::new(),
            failed: BTreeMap::new(),
            notes: Vec::new(),
            _stages: stages,
        };
        for ((setup, files), stage) in files.into_iter().zip(&bench._stages) {
            step(format!("starting `{}`", setup.name()));
            let without = without_ours.clone().filter(|_| is_ours(setup));
            match start(setup, &files, &stage.folder, cpus, without) {
                Ok(watcher) => drop(bench.ready.insert(setup, Ready { files, watcher })),
                Err(error) => drop(bench.failed.insert(setup.name().into(), format!("{error:#}"))),
            }
        }
        cpu::pin_self(cpus.guest)?;
        Ok(bench)
    }

    fn measure(&mut self, case: &Case, round: u32) {
        let Some(ready) = self.ready.get(&case.setup) else { return };
        let contents = self
            .ready
            .get(&Setup::Unprotected)
            .map_or(&[][..], |ready| ready.files.again(case.size));
        let opens = self.amounts.opens(case);
        match measure(ready, case, contents, round, opens, &mut self.notes) {
            Ok(measured) => self.rounds.entry(*case).or_default().push(measured),
            Err(error) => {
                let why = format!("round {}: {error:#}", round + 1);
                self.failed.entry(case.name()).or_insert(why);
            }
        }
    }

    fn finish(mut self, quick: bool, load_before: f64) -> Results {
        let mut memory = None;
        if let Some(Ready { watcher: Watcher::Ours(ours), .. }) = self.ready.get(&Setup::Ours) {
            let measured = ours.check().and_then(|()| ours.memory());
            let failed = measured.map(|found| memory = Some(found)).err();
            let failed = failed.map(|error| ("ours, at the end".into(), format!("{error:#}")));
            self.failed.extend(failed);
        }
        let row = |case: &Case| Some((*case, Row::of(case, &self.rounds)?));
        let cases: Vec<(Case, Row)> = Case::all().iter().filter_map(row).collect();
        let mut rows: Vec<Figure> = cases.iter().flat_map(|(c, row)| Figure::of(c, row)).collect();
        rows.extend(cases.iter().flat_map(|(case, _)| Figure::of_rivals(case, &self.rounds)));
        let cases: Vec<Row> = cases.into_iter().map(|(_, row)| row).collect();
        let failed = self.failed.into_iter().map(|(name, reason)| Failure { name, reason });
        Results {
            date: jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            revision: machine::revision(),
            programs_from: std::env::var("SEAWALL_BIN_DIR").map_or("built here", |_| "elsewhere"),
            quick,
            machine: Machine::describe(),
            load: [load_before, machine::load()],
            file_system: self.file_system,
            guest_cpu: self.cpus.guest,
            host_cpu: self.cpus.host,
            rounds: self.amounts.rounds,
            rows,
            plots: plots(&cases),
            cases,
            memory,
            notes: self.notes,
            failed: failed.collect(),
        }
    }
}

/// What one looks at first.
fn plots(cases: &[Row]) -> Vec<Plot> {
    let size = SIZES[1];
    let case = |setup, what| Case { setup, what, pace: Pace::BackToBack, size };
    let again = [
        (case(Setup::Unprotected, What::Repeat), "unprotected"),
        (case(Setup::MarksOnly, What::Repeat), "the same marks alone"),
        (case(Setup::Ours, What::Repeat), "Seawall"),
        (case(Setup::Unmarked, What::Repeat), "Seawall, strict (no marks)"),
        (case(Setup::Listener, What::Repeat), "a listener that allows all"),
        (case(Setup::Clamonacc, What::Repeat), "clamonacc"),
    ];
    let first = [
        (case(Setup::Listener, What::Repeat), "a listener that allows all"),
        (case(Setup::Ours, What::KnownContent), "Seawall, content that the host knows"),
        (case(Setup::Ours, What::NewContent), "Seawall, new content, scanned"),
        (case(Setup::Clamonacc, What::NewContent), "clamonacc, new content, scanned"),
    ];
    vec![
        distribution(
            "Opening a file again, 64 KiB",
            "A file that was found clean is marked in the guest's kernel: its next open asks nobody. To the left is faster.",
            cases,
            &again,
        ),
        distribution(
            "Opening a file for the first time, 64 KiB",
            "The first open of a file asks the host. Content that it knows, from whatever guest, is not scanned again.",
            cases,
            &first,
        ),
    ]
}

fn is_ours(setup: Setup) -> bool {
    matches!(setup, Setup::Ours | Setup::Unmarked)
}

fn start(
    setup: Setup,
    files: &Files,
    folder: &Path,
    cpus: Cpus,
    without: Option<String>,
) -> anyhow::Result<Watcher> {
    cpu::pin_self(cpus.guest)?;
    Ok(match setup {
        Setup::Unprotected => Watcher::Nobody,
        Setup::Listener => Watcher::Listener(Listener::start(folder, false)?),
        Setup::MarksOnly => Watcher::Listener(Listener::start(folder, true)?),
        Setup::Clamonacc => {
            let own = Path::new(stage::SHARED_MEMORY).join("clamonacc");
            Watcher::Clamonacc(Clamonacc::start(folder, &own, cpus)?)
        }
        Setup::Ours | Setup::Unmarked => {
            if let Some(why) = without {
                bail!("{why}");
            }
            let marked = setup == Setup::Ours;
            // A strict policy marks no file.
            let config = if marked { "" } else { "[policy]\nmode = \"strict\"\n" };
            let ours = Ours::start(folder, cpus, config)?;
            cpu::pin_self(cpus.guest)?;
            ours.teach(SIZES.iter().map(|size| files.again(*size)), marked)?;
            Watcher::Ours(Box::new(ours))
        }
    })
}

fn measure(
    ready: &Ready,
    case: &Case,
    contents: &[CString],
    round: u32,
    opens: u32,
    notes: &mut Vec<String>,
) -> anyhow::Result<Round> {
    let parts: Vec<(&'static str, Vec<Process>)> = match &ready.watcher {
        Watcher::Nobody => Vec::new(),
        Watcher::Listener(listener) => vec![("listener", vec![listener.process()?])],
        Watcher::Clamonacc(both) => vec![("clamonacc and clamd", both.processes()?)],
        Watcher::Ours(ours) => {
            let parts = ours.parts()?;
            vec![("driver", parts.driver), ("service", parts.service), ("engine", parts.engine)]
        }
    };
    let counts = || match &ready.watcher {
        Watcher::Ours(ours) => ours.counts().map(Some),
        _ => Ok(None),
    };
    if let (What::NewSignatures, Watcher::Ours(ours)) = (case.what, &ready.watcher) {
        ours.renew(contents)?;
    }
    let before = counts()?;
    thread::sleep(REST);
    let used = |parts: &[(&'static str, Vec<Process>)]| -> Vec<Option<u64>> {
        parts.iter().map(|(_, processes)| cpu::used_ns(processes)).collect()
    };
    let used_before = used(&parts);
    let with = if case.what == What::Read { Use::Read } else { Use::Nothing };
    let times = time_opens(ready.files.of(case, round), opens, case.pace, with)?;
    let used_after = used(&parts);
    let after = counts()?;
    if let (What::NewSignatures, Watcher::Ours(ours)) = (case.what, &ready.watcher) {
        // The next case finds all as it was.
        ours.teach(SIZES.iter().map(|size| ready.files.again(*size)), true)?;
    }
    if let (Some(before), Some(after)) = (before, after) {
        let astray = astray(case, opens, before, after);
        ensure!(
            astray as f64 <= ASTRAY_MAX * f64::from(opens),
            "{astray} of {opens} opens went another way"
        );
        if astray > 0 {
            let (name, round) = (case.name(), round + 1);
            notes.push(format!("{name}: in round {round} {astray} of {opens} went another way"));
        }
    }
    let each = parts.iter().zip(used_before).zip(used_after);
    let cpu_us = each.filter_map(|(((part, _), before), after)| {
        let used = after?.saturating_sub(before?);
        Some((*part, used as f64 / 1e3 / f64::from(opens)))
    });
    Ok(Round { times: Times::of(times).context("no samples")?, cpu_us: cpu_us.collect() })
}
