//! `cargo xtask`: the one door to everything a developer does. One file for each subcommand.

mod bench;
mod build;
mod demo;
mod docs;
mod lab;
mod setup;
mod test;
mod tidy;
mod tools;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Everything a developer of Seawall does")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what building and testing need on this machine; quiet when nothing is missing
    Setup(setup::Arguments),
    /// Show on two real guests what Seawall does; fails when a step is not as told
    Demo(demo::Arguments),
    /// Build every program, the guests' ones as static binaries
    Build,
    /// Set up, build, check form and lints, and run every test
    Test(test::Arguments),
    /// Measure what an open costs: unprotected, under a bare listener, and under Seawall
    Bench(bench::Arguments),
    /// Boot guests and work with them
    Lab(lab::Arguments),
    /// Check what the compiler does not: dependency direction, file names in documents, stray samples
    Tidy,
    /// Build the crates' documentation and fail on broken links
    Docs,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Setup(arguments) => setup::run(&arguments),
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Build => build::run(),
        Command::Test(arguments) => test::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Lab(arguments) => lab::run(arguments),
        Command::Tidy => tidy::run(),
        Command::Docs => docs::run(),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
