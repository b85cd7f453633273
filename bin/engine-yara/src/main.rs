//! YARA-X as an engine: `seawall-engine-yara --rules DIR`.
//!
//! [`rules`] turns a folder into one compiled set and says what in it is wrong; [`engine`] scans
//! with it; [`slow`] names those that take too long. Process, sandbox and protocol are `seawall-engine`'s. Started by the service; by hand
//! only `--check` makes sense.

mod engine;
mod meta;
mod rules;
mod slow;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use seawall_engine::Level;
use seawall_engine::runtime::LoadError;

use crate::engine::Yara;
use crate::rules::RuleSet;

/// Scans content with YARA rules, in a sandbox, for seawalld.
#[derive(Parser)]
#[command(
    version,
    after_help = "Exit status: 0 = ended by the service, or all rules are good; \
    1 = could not start, or --check found an error; 2 = wrong arguments."
)]
struct Arguments {
    /// Folder with rules: *.yar and *.yara, also in folders below it; hidden names are left out
    #[arg(long, value_name = "DIR")]
    rules: PathBuf,
    /// Compile the rules, print what is wrong with them, and exit
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.check {
        return match check(&arguments.rules) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::FAILURE,
            Err(error) => {
                eprintln!("cannot write: {error}");
                ExitCode::FAILURE
            }
        };
    }
    seawall_engine::runtime::run(|start| {
        RuleSet::load(&arguments.rules, start.strict).map(Yara::new).map_err(LoadError::all)
    })
}

/// Prints each diagnostic on a line of its own, then a summary. True when there is no error.
fn check(folder: &std::path::Path) -> io::Result<bool> {
    let mut out = io::stdout().lock();
    let (diagnostics, rules) = match RuleSet::load(folder, false) {
        Ok(set) => (set.diagnostics, set.count),
        Err(diagnostics) => (diagnostics, 0),
    };
    for one in &diagnostics {
        writeln!(out, "{one}")?;
    }
    let errors = diagnostics.iter().filter(|one| one.level == Level::Error).count();
    let warnings = diagnostics.len() - errors;
    writeln!(out, "{rules} rules can be used, {errors} errors, {warnings} warnings")?;
    Ok(errors == 0)
}
