//! `cargo xtask bench`: what an access costs, what memory it takes, and what engines do.
//!
//! Within one run it times open(2) and close(2) under five setups, each on a file system of its own:
//!
//! - **unprotected**: nobody watches.
//! - **listener**: a bare program that allows every open at once; no product on fanotify can be faster
//!   on a file that it has to look at.
//! - **marks only**: a bare program with the same marks as the driver, on files that it marked as
//!   ignored; what the kernel takes for a file that needs no look.
//! - **ours**: driver and service on this machine, as two processes;
//! - **clamonacc**: what a guest would have instead, see [`clamonacc`].
//!
//! The opener, the listeners and the driver share one CPU, as in a guest; the service and its engine
//! have another one, as on the host. In each round every case runs once, in a new order, and ratios
//! are taken within a round: this kind of machine changes its speed while one looks on.
//!
//! ```text
//!   outside ── new mount and PID namespace ──► inside (PID 1): file systems, processes, rounds, report
//! ```
//!
//! The namespaces end with PID 1, whatever ends it, and every process, mount and loop device with them.
//! The machine's own file systems are never marked.
//!
//! What engines and the security API cost is measured without all that, see [`engines`].

mod clamonacc;
mod cpu;
mod engines;
mod files;
mod fleet;
mod guests;
mod html;
mod listener;
mod machine;
mod memory;
mod ours;
mod outputs;
mod plan;
mod replay;
mod report;
mod run;
mod sample;
mod single;
mod stage;
mod storm;
mod trace;
mod watchdog;

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, bail, ensure};
use clap::{Parser, Subcommand};
use rustix::process::Signal;
use seawall_lab::{Need, ensure_binaries, ensure_debian_image};
use serde_json::Value;

use crate::engines::Scenario;
use crate::outputs::Outputs;
use crate::plan::{Amounts, Case};
use crate::replay::Replayed;
use crate::report::Failure;

#[derive(Parser)]
#[command(name = "seawall-perf", about = "Measures what accesses and scans cost")]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    /// What to measure; open, files, guests, memory and replay when nothing is named
    #[arg(value_enum, value_name = "SCENARIO")]
    scenarios: Vec<Scenario>,
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(clap::Args)]
struct Options {
    /// How often every case is measured
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: Option<u32>,
    /// open: only cases whose name has this in it, and what they are compared with
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Two rounds of few samples: shows that the benchmark works, tells nothing about time
    #[arg(long)]
    quick: bool,
    /// End with the process that started this one
    #[arg(long, hide = true)]
    with_parent: bool,
    #[command(flatten)]
    replayed: Replayed,
    #[command(flatten)]
    outputs: Outputs,
}

impl Options {
    fn amounts(&self) -> Amounts {
        let mut amounts = if self.quick { Amounts::quick() } else { Amounts::full() };
        amounts.rounds = self.rounds.unwrap_or(amounts.rounds);
        amounts
    }
}

/// What the program does when it starts itself.
#[derive(Subcommand)]
enum Role {
    /// Measure, as the first process of new namespaces
    #[command(hide = true)]
    Inside {
        /// Why driver and service cannot run
        #[arg(long)]
        without_ours: Option<String>,
        /// What to measure
        #[arg(long, value_enum, default_value = "open")]
        scenario: Scenario,
        /// They have the files of this image of a Debian
        #[arg(long)]
        debian: Option<PathBuf>,
        #[command(flatten)]
        options: Options,
    },
    /// Watch a file system and allow everything
    #[command(hide = true)]
    Listener {
        /// Its mount point
        #[arg(long)]
        mount: PathBuf,
        /// Hold the same marks as the driver, with every file marked as ignored
        #[arg(long)]
        marks: bool,
    },
    /// Be an engine that finds nothing
    #[command(hide = true)]
    NullEngine,
    /// Send back what comes from standard input, a socket
    #[command(hide = true)]
    Echo,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match arguments.role {
        None => measure(&arguments.scenarios, &arguments.options),
        Some(Role::Inside { scenario, without_ours, debian, options }) => {
            let (quick, outputs) = (options.quick, &options.outputs);
            match scenario {
                Scenario::Storm => storm::run(quick, outputs, debian.as_deref()),
                Scenario::Guests => guests::run(quick, outputs),
                Scenario::Files => single::run(quick, outputs),
                Scenario::Memory => memory::run(quick, outputs),
                Scenario::Replay => replay::run(quick, outputs, &options.replayed),
                _ => run::run(
                    options.amounts(),
                    quick,
                    outputs,
                    without_ours,
                    options.only.as_deref(),
                ),
            }
        }
        Some(Role::Listener { mount, marks }) => listener::listen(&mount, marks),
        Some(Role::NullEngine) => Ok(engines::null::engine()),
        Some(Role::Echo) => engines::null::echo(),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(scenarios: &[Scenario], options: &Options) -> anyhow::Result<ExitCode> {
    if options.with_parent {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    }
    let scenarios = if scenarios.is_empty() { &Scenario::ACCESS } else { scenarios };
    match scenarios {
        [one] if one.is_alone() => outside(options, *one),
        all if all.iter().any(|one| one.is_alone()) => each_alone(options, all),
        all => engines::run(all, options.rounds, options.quick, &options.outputs),
    }
}

/// Runs this program again for each scenario that needs the machine for itself, and once for the others.
fn each_alone(options: &Options, scenarios: &[Scenario]) -> anyhow::Result<ExitCode> {
    options.outputs.arguments()?;
    ensure!(rustix::process::geteuid().is_root(), "fanotify and mounts need root");
    ensure!(
        options.only.is_none() && options.replayed.arguments()?.is_empty(),
        "--only, --trace and --guests are for one scenario: name it"
    );
    let scenarios: BTreeSet<_> = scenarios.iter().copied().collect();
    let (alone, others): (Vec<_>, Vec<_>) =
        scenarios.into_iter().partition(|scenario| scenario.is_alone());
    let mut runs: Vec<Vec<Scenario>> = alone.into_iter().map(|scenario| vec![scenario]).collect();
    runs.extend((!others.is_empty()).then_some(others));
    let (mut all, mut failed) = (Vec::new(), Vec::new());
    for scenarios in runs {
        let names: Vec<String> = scenarios.iter().map(|scenario| scenario.word()).collect();
        let name = names.join(" ");
        println!("# {name}\n");
        match run_alone(options, &names) {
            Ok((results, succeeded)) => {
                all.push(results);
                failed.extend((!succeeded).then_some(name));
            }
            Err(error) => {
                eprintln!("error: {name}: {error:#}");
                let reason = format!("{error:#}");
                all.push(serde_json::json!({ "failed": [Failure { name: name.clone(), reason }] }));
                failed.push(name);
            }
        }
    }
    // One that could not be measured has nothing to tell but that.
    all.sort_by_key(|run| run["machine"].is_null());
    let together = report::together(all).context("nothing was measured")?;
    options.outputs.write(&report::lines(together)?)?;
    Ok(if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs this program for these scenarios. Its results, and whether all of them could be measured.
fn run_alone(options: &Options, names: &[String]) -> anyhow::Result<(Value, bool)> {
    let folder = tempfile::tempdir()?;
    let json = folder.path().join("results.json");
    // Also where it was built anew meanwhile.
    let mut run = Command::new("/proc/self/exe");
    run.args(names);
    if let Some(rounds) = options.rounds {
        run.args(["--rounds", &rounds.to_string()]);
    }
    if options.quick {
        run.arg("--quick");
    }
    let status = run.args(["--with-parent", "--json"]).arg(&json).status()?;
    let text = fs::read_to_string(&json).ok().filter(|text| !text.is_empty());
    let text = text.with_context(|| format!("it was not measured ({status})"))?;
    Ok((serde_json::from_str(&text)?, status.success()))
}

/// Builds what is measured, then starts this program again inside new namespaces.
fn outside(options: &Options, scenario: Scenario) -> anyhow::Result<ExitCode> {
    ensure!(rustix::process::geteuid().is_root(), "fanotify and mounts need root");
    let (outputs, replayed) = (options.outputs.arguments()?, options.replayed.arguments()?);
    ensure!(
        replayed.is_empty() || scenario == Scenario::Replay,
        "--trace and --guests are for replay"
    );
    let without_ours = ensure_binaries(Need::ALL).err().map(|error| format!("{error:#}"));
    if let Some(why) = without_ours.as_ref().filter(|_| scenario != Scenario::Open) {
        bail!("{why}");
    }

    let mut inside = Command::new(std::env::current_exe()?);
    inside.args(["inside", "--scenario", &scenario.word()]);
    if scenario == Scenario::Storm && !options.quick {
        inside.arg("--debian").arg(ensure_debian_image()?);
    }
    if let Some(rounds) = options.rounds {
        inside.args(["--rounds", &rounds.to_string()]);
    }
    if let Some(only) = &options.only {
        ensure!(scenario == Scenario::Open, "--only is for open");
        ensure!(Case::named(Some(only)).next().is_some(), "no case has `{only}` in its name");
        inside.args(["--only", only]);
    }
    if options.quick {
        inside.arg("--quick");
    }
    inside.args(outputs).args(replayed);
    if let Some(why) = without_ours {
        inside.arg("--without-ours").arg(why);
    }
    stage::new_namespaces()?;
    // Unbounded on purpose: the watchdog inside ends a run that stands still.
    let status = inside.status().context("this program cannot start itself")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
