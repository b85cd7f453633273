//! `cargo xtask bench`

use std::path::PathBuf;
use std::process::ExitCode;

use crate::tools::cargo;

#[derive(clap::Args)]
pub struct Arguments {
    /// open, files, guests, memory, replay (these when nothing is named), storm, engines-yara, engines-clamav, engines-cost,
    /// engines-rules, engines-signatures, engines-hash, exclusions
    #[arg(value_name = "SCENARIO")]
    scenarios: Vec<String>,
    /// How often every case is measured; when not given 9 for open and 7 for engines, the only ones that go by it
    #[arg(long)]
    rounds: Option<u32>,
    /// Few samples: shows that the benchmark works, tells nothing about time
    #[arg(long)]
    quick: bool,
    /// open: only cases whose name has this in it, and what they are compared with
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// replay: what a driver has recorded (seawall-agent run --record) instead of a made trace of a busy host
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// replay: so many guests do the same at once
    #[arg(long, value_name = "COUNT")]
    guests: Option<u32>,
    /// Write the results to this file too; without --quick they are kept under perf/results in any case
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write them to this file as a page with plots
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// Builds the benchmark as a program of its own, which makes namespaces for itself, and runs it.
pub fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let mut words: Vec<String> =
        ["run", "--release", "--locked", "--quiet", "--package", "seawall-perf", "--"]
            .map(str::to_owned)
            .to_vec();
    words.extend(arguments.scenarios.iter().cloned());
    if let Some(rounds) = arguments.rounds {
        words.extend(["--rounds".to_owned(), rounds.to_string()]);
    }
    if arguments.quick {
        words.push("--quick".to_owned());
    }
    if let Some(only) = &arguments.only {
        words.extend(["--only".to_owned(), only.clone()]);
    }
    if let Some(guests) = arguments.guests {
        words.extend(["--guests".to_owned(), guests.to_string()]);
    }
    let paths =
        [("--trace", &arguments.trace), ("--json", &arguments.json), ("--html", &arguments.html)];
    for (name, path) in paths {
        let Some(path) = path else { continue };
        // Cargo runs in the workspace's folder, the caller may be elsewhere.
        let path = std::path::absolute(path)?;
        words.extend([name.to_owned(), path.display().to_string()]);
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    cargo("bench", &words, &[])?;
    Ok(ExitCode::SUCCESS)
}
