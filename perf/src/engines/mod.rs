//! What engines, the security API and policy cost: `cargo xtask bench engines-…` and `exclusions`.
//!
//! Each scenario compares within one run: the engine behind the API with the same library or program
//! alone, in rounds of a new order. Nothing here is pinned or marked but where a scenario says so.

mod api;
pub mod clamav;
mod cost;
pub mod database;
mod exclusions;
mod hash;
pub mod made;
mod many;
pub mod null;
pub mod report;
pub mod rounds;
mod signatures;
mod yara;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use seawall_lab::{Need, ensure_binaries};

use self::report::Results;
use crate::machine;
use crate::outputs::Outputs;
use crate::report::Failure;
use crate::watchdog::clear;

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Scenario {
    /// What an open costs: unprotected, under a bare listener, and under Seawall
    Open,
    /// What single files cost: large, growing, mapped ones, and first opens with many rules
    Files,
    /// What a further guest costs, and whether guests leave each other their share
    Guests,
    /// Memory beside a clamd of the official size in each guest, and of a service with a million verdicts
    Memory,
    /// A trace of opens and writes, replayed under Seawall, a bare listener, clamonacc, and unprotected
    Replay,
    /// Full scans of many guests at once beside a clamd in each
    Storm,
    /// The YARA-X engine beside the yr command
    EnginesYara,
    /// The ClamAV engine beside clamdscan
    EnginesClamav,
    /// The security API's own cost for a scan
    EnginesCost,
    /// Ten, a thousand and ten thousand YARA rules on small files
    EnginesRules,
    /// Loading and changing a ClamAV database of official size
    EnginesSignatures,
    /// Lookups among ten million hashes
    EnginesHash,
    /// Decisions over ten thousand exclusions
    Exclusions,
}

impl Scenario {
    /// What an access costs, and what memory it takes: all that is measured when nothing is named.
    pub const ACCESS: [Self; 5] =
        [Self::Open, Self::Files, Self::Guests, Self::Memory, Self::Replay];

    /// Whether it needs the machine for itself, in namespaces of its own.
    pub fn is_alone(self) -> bool {
        Self::ACCESS.contains(&self) || self == Self::Storm
    }

    /// As on the command line.
    pub fn word(self) -> String {
        let word = clap::ValueEnum::to_possible_value(&self);
        word.map_or_else(String::new, |word| word.get_name().to_owned())
    }
}

/// What a scenario works with.
pub struct Bench {
    pub quick: bool,
    pub rounds: u32,
    folder: tempfile::TempDir,
    programs: BTreeMap<&'static str, PathBuf>,
    notes: Vec<String>,
    failed: Vec<Failure>,
}

impl Bench {
    /// A folder of this name, which goes with the run. It has to be made.
    pub fn folder(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A program of ours.
    pub fn program(&self, package: &str) -> anyhow::Result<PathBuf> {
        self.programs.get(package).cloned().with_context(|| format!("{package} was not built"))
    }

    pub fn note(&mut self, note: String) {
        self.notes.push(note);
    }

    /// A part of a scenario could not be measured; the rest goes on.
    pub fn fail(&mut self, name: &str, error: &anyhow::Error) {
        self.failed.push(Failure { name: name.to_owned(), reason: format!("{error:#}") });
    }
}

/// Runs scenarios one after the other, and reports; fails when something could not be measured.
pub fn run(
    scenarios: &[Scenario],
    rounds: Option<u32>,
    quick: bool,
    outputs: &Outputs,
) -> anyhow::Result<ExitCode> {
    let load_before = machine::load();
    // All that the lab builds, in one build: one for each program has features of its own and compiles YARA-X again.
    let made = ensure_binaries(Need::ALL)?;
    let programs = BTreeMap::from([
        ("seawall-engine-yara", made.engine_yara),
        ("seawall-engine-clamav", made.engine_clamav),
        ("seawall-engine-hash", made.engine_hash),
    ]);
    // So that other work on the machine disturbs less; only root may.
    let _refused = rustix::process::setpriority_process(None, crate::run::NICE);
    let mut bench = Bench {
        quick,
        rounds: rounds.unwrap_or(if quick { 2 } else { 7 }),
        folder: tempfile::Builder::new().prefix("seawall-bench-").tempdir()?,
        programs,
        notes: Vec::new(),
        failed: Vec::new(),
    };
    let mut rows = Vec::new();
    for scenario in scenarios {
        let (name, measured) = match scenario {
            Scenario::Open
            | Scenario::Files
            | Scenario::Guests
            | Scenario::Memory
            | Scenario::Replay
            | Scenario::Storm => continue,
            Scenario::EnginesYara => ("engines-yara", yara::run(&mut bench)),
            Scenario::EnginesClamav => ("engines-clamav", clamav::run(&mut bench)),
            Scenario::EnginesCost => ("engines-cost", cost::run(&mut bench)),
            Scenario::EnginesRules => ("engines-rules", many::run(&mut bench)),
            Scenario::EnginesSignatures => ("engines-signatures", signatures::run(&mut bench)),
            Scenario::EnginesHash => ("engines-hash", hash::run(&mut bench)),
            Scenario::Exclusions => ("exclusions", exclusions::run(&mut bench)),
        };
        match measured {
            Ok(more) => rows.extend(more),
            Err(error) => bench.fail(name, &error),
        }
    }
    clear();
    let results = Results::new(quick, load_before, rows, Vec::new(), bench.notes, bench.failed);
    println!("{}", results.to_text());
    outputs.keep(&results.to_json()?, &results.file_name(), quick)?;
    Ok(if results.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
