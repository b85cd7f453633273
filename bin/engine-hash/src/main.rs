//! The hash-list engine: `seawall-engine-hash --lists DIR`. Started by the service; by hand
//! `--check` and `--compile` make sense.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use seawall_engine::runtime::LoadError;
use seawall_engine_hash::engine::Hash;
use seawall_engine_hash::lists::{self, Lists};
use seawall_engine_hash::report::Report;

/// Looks content up in lists of digests, in a sandbox, for seawalld.
#[derive(Parser)]
#[command(
    version,
    after_help = "What a file in DIR is, the end of its name tells:
  .md5 .sha1 .sha256   a line is a digest, then optionally a space or comma and a name
  .txt                 the same, of any of the three digests
  .hdb .hsb .fp .sfp   ClamAV's digest:size:name, or digest:*:name:73 for any size
  .csv                 a header with md5, sha1 or sha256, optionally name, family, severity
  .swhash              written by --compile; at most four
Empty lines and lines that begin with # say nothing. Hidden files are left out.

A list allows content when its name ends in .fp or .sfp or begins with `allow`, or when it lies in \
    a folder named `allow`; every other list denies. What one list allows, no other denies; that engines \
    after this one are spared it as well takes `may_allow = true` in seawalld.toml.

Exit status: 0 = ended by the service, or all lists are good; \
    1 = could not start, or --check or --compile found an error; 2 = wrong arguments."
)]
struct Arguments {
    /// Folder with lists, also in folders below it
    #[arg(long, value_name = "DIR", required_unless_present = "compile")]
    lists: Option<PathBuf>,
    /// Load the lists, print what is wrong with them, and exit
    #[arg(long, requires = "lists")]
    check: bool,
    /// Compile the lists in this folder into one file, which loads in seconds and takes little
    /// memory; nothing is written when a line is wrong
    #[arg(long, value_name = "DIR", requires = "out", conflicts_with_all = ["lists", "check"])]
    compile: Option<PathBuf>,
    /// The file that --compile writes, ending in .swhash; put it in another folder than the lists,
    /// or they are loaded twice
    #[arg(long, value_name = "FILE", requires = "compile")]
    out: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let told = match (&arguments.lists, &arguments.compile, &arguments.out) {
        (_, Some(folder), Some(out)) => compile(folder, out),
        (Some(folder), ..) if arguments.check => check(folder),
        (Some(folder), ..) => {
            return seawall_engine::runtime::run(|start| {
                let lists = Lists::load(folder, start.strict);
                lists.map(Hash::new).map_err(|report| LoadError::all(report.diagnostics().0))
            });
        }
        // The parser lets none of the other combinations through.
        _ => Ok(false),
    };
    match told {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("cannot write: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Prints what is wrong with the lists. True when there is no error.
fn check(folder: &Path) -> io::Result<bool> {
    match Lists::load(folder, false) {
        Ok(lists) => tell(&lists.report, lists.count, "can be used"),
        Err(report) => tell(&report, 0, "can be used"),
    }
}

/// Compiles the lists, and prints what is wrong with them. True when the file was written.
fn compile(folder: &Path, out: &Path) -> io::Result<bool> {
    match lists::compile(folder, out) {
        Ok((count, report)) => tell(&report, count, "compiled"),
        Err(report) => tell(&report, 0, "compiled"),
    }
}

/// Prints each diagnostic on a line of its own, then a summary. True when there is no error.
fn tell(report: &Report, entries: u64, what: &str) -> io::Result<bool> {
    let mut out = io::stdout().lock();
    let (diagnostics, omitted) = report.diagnostics();
    for one in &diagnostics {
        writeln!(out, "{one}")?;
    }
    if omitted > 0 {
        writeln!(out, "and {omitted} more like these")?;
    }
    let (errors, warnings) = (report.errors(), report.warnings());
    writeln!(out, "{entries} entries {what}, {errors} errors, {warnings} warnings")?;
    Ok(errors == 0)
}
