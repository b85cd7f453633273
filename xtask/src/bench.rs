//! `cargo xtask bench`

use std::path::PathBuf;
use std::process::ExitCode;

use crate::tools::cargo;

#[derive(clap::Args)]
pub struct Arguments {
    /// open (when nothing is given), guests, storm, engines-yara, engines-clamav, engines-cost, engines-rules,
    /// engines-signatures, engines-hash, exclusions
    #[arg(value_name = "SCENARIO")]
    scenarios: Vec<String>,
    /// How often every case is measured; when not given 9 for open, 7 for others
    #[arg(long)]
    rounds: Option<u32>,
    /// Few samples: shows that the benchmark works, tells nothing about time
    #[arg(long)]
    quick: bool,
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
    for (name, path) in [("--json", &arguments.json), ("--html", &arguments.html)] {
        let Some(path) = path else { continue };
        // Cargo runs in the workspace's folder, the caller may be elsewhere.
        let path = std::path::absolute(path)?;
        words.extend([name.to_owned(), path.display().to_string()]);
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    cargo("bench", &words, &[])?;
    Ok(ExitCode::SUCCESS)
}
