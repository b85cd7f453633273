//! `seawall-agent`: the guest driver.
//!
//! A supervisor process holds the fanotify groups and forks one worker ([`supervisor`]). The worker's
//! threads ([`worker`]) share one [`driver::Driver`]: readers take permission events and enter them
//! in the ledger ([`event`]), fillers put content into region slots and send requests ([`scan`]), the
//! session answers what the host decided ([`session`], [`verdict`]), and a thread of its own keeps
//! the deadlines ([`deadline`]). The driver never scans.

mod background;
mod content;
mod control;
mod coverage;
mod deadline;
mod driver;
mod event;
mod file;
mod golden;
mod housekeeping;
mod hunt;
mod jobs;
mod journal;
mod link;
mod memory;
mod mounts;
mod on_demand;
mod record;
mod region;
mod remedy;
mod remember;
mod ring;
mod running;
mod scan;
mod serial;
mod session;
mod sole;
mod status;
mod supervisor;
mod truth;
mod verdict;
mod walk;
mod worker;

use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

/// Holds each file access in this guest until the host has scanned the file.
#[derive(Debug, Parser)]
#[command(version, about, long_about = None, after_help = "\
Exit status of `status`: 0 protected, 1 not protected, 2 no driver answers.

Examples:
  seawall-agent run                          vsock link, region on the PCI bus
  seawall-agent run --link tcp:10.77.0.1:7325
  seawall-agent run --link serial            virtio-serial port org.seawall.0
  seawall-agent status --json")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Protect this guest; runs in the foreground until stopped.
    Run(RunArgs),
    /// Tell whether this guest is protected, and if not, why.
    Status {
        /// Print JSON.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Take all marks away and end the driver. Files are no longer scanned then.
    Stop {
        #[command(flatten)]
        control: ControlArgs,
    },
}

#[derive(Debug, Clone, Args)]
struct ControlArgs {
    /// The running driver's control socket.
    #[arg(long, value_name = "PATH", default_value = "/run/seawall/agent.sock")]
    control: PathBuf,
}

/// What `run` was told.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// How to reach the host: vsock[:PORT], tcp:ADDRESS:PORT, serial[:PATH] or unix:PATH.
    #[arg(long, default_value = "vsock", value_parser = link::Address::parse)]
    link: link::Address,
    /// The shared memory: `auto` (ivshmem on the PCI bus) or an ordinary file. Without it content
    /// travels on the link.
    #[arg(long, value_name = "auto|FILE", default_value = "auto")]
    region: PathBuf,
    /// Where QEMU's fw_cfg shows the key, for a guest without a region (module qemu_fw_cfg).
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/sys/firmware/qemu_fw_cfg/by_name/opt/seawall/key/raw"
    )]
    key: PathBuf,
    /// Watch only the file systems mounted at these folders instead of all.
    #[arg(long, value_name = "DIR")]
    only_mount: Vec<PathBuf>,
    /// Where to listen for `status` and `stop`; root only.
    #[arg(long, value_name = "PATH", default_value = "/run/seawall/agent.sock")]
    control: PathBuf,
    /// Where files that were let through unscanned are noted until they are scanned.
    #[arg(long, value_name = "FILE", default_value = "/var/lib/seawall/exposures")]
    journal: PathBuf,
    /// Use the clean marks of kernels that have no evictable ones.
    #[arg(long, hide = true)]
    plain_marks: bool,
    /// Record what is opened and written into this file, for `bench replay`: times, numbers and sizes, no names.
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// Append the log to this file instead of standard error.
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(args) => supervisor::run(&args),
        Command::Status { json, control } => control::print_status(&control.control, json),
        Command::Stop { control } => control::stop(&control.control),
    };
    result.unwrap_or_else(|error| {
        eprintln!("seawall-agent: {error:#}");
        ExitCode::from(2)
    })
}
