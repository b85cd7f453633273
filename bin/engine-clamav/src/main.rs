//! ClamAV as an engine: `seawall-engine-clamav --database DIR`, or with a clamd that runs already `--socket FILE`.
//!
//! ```text
//!  seawalld ──► this process ──► clamd, in a sandbox of its own
//!               one session for each worker, content as a descriptor (FILDES)
//! ```
//!
//! libclamav is GPL and parses hostile content in C, so it stays in a process of its own. [`clamd`] starts that
//! and ends with it; [`system`] is about one that somebody else has started; [`session`] is the protocol;
//! [`engine`] turns answers into reports.

mod clamd;
mod engine;
mod session;
mod system;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use crate::engine::Clamav;

/// Scans content with ClamAV's clamd, in a sandbox, for seawalld.
#[derive(Debug, Clone, Parser)]
#[command(
    version,
    after_help = "Started by the service: name it in an [[engine]] section of its configuration.\n\
    Exit status: 0 = ended by the service; 1 = could not start, or clamd ended; 2 = wrong arguments."
)]
pub struct Arguments {
    /// Folder with ClamAV's signatures (*.cvd, *.cld, *.ndb, *.hdb and so on), as freshclam keeps it
    #[arg(long, value_name = "DIR", default_value = "/var/lib/clamav")]
    database: PathBuf,
    /// Ask the clamd that listens on this socket, such as /run/clamav/clamd.ctl, and start none. Its sandbox,
    /// limits, time limit and memory of clean files (by MD5) are then its own; without `AlertExceedsMax yes`
    /// what goes beyond its limits counts as clean; and of its signatures only those of daily.cvd are noticed
    /// when they change. Whoever controls that clamd controls the verdicts
    #[arg(long, value_name = "FILE", conflicts_with_all = ["database", "clamd", "temporary", "scan_size", "recursion", "files"])]
    socket: Option<PathBuf>,
    /// The program
    #[arg(long, value_name = "FILE", default_value = "/usr/sbin/clamd")]
    clamd: PathBuf,
    /// Where clamd unpacks: a private folder is made in it
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    temporary: PathBuf,
    /// Most bytes that are unpacked and scanned of one content, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 4000, value_parser = clap::value_parser!(u32).range(1..=4000))]
    scan_size: u32,
    /// Most levels of archives in one another
    #[arg(long, value_name = "COUNT", default_value_t = 17, value_parser = clap::value_parser!(u32).range(1..=100))]
    recursion: u32,
    /// Most files in one archive
    #[arg(long, value_name = "COUNT", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    files: u32,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    seawall_engine::runtime::run(|start| Clamav::load(&arguments, start))
}
