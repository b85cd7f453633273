//! `cargo xtask test`

use std::process::ExitCode;

use seawall_lab::{BUILT, Need, ensure_binaries, ensure_setup};

use crate::tools::cargo;

#[derive(clap::Args)]
pub struct Arguments {
    /// Leave out the tests that boot guests
    #[arg(long)]
    no_guests: bool,
    /// Only the end-to-end tests whose name contains this
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
}

/// Packages whose tests boot guests. They run one test at a time: each boots as many guests as the
/// machine carries.
const GUEST_TESTS: [&str; 2] = ["seawall-lab", "seawall-tests"];

/// From the cheap checks to the slow ones.
pub fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    if arguments.only.is_none() {
        cargo("form", &["fmt", "--all", "--check"], &[])?;
        crate::tidy::run()?;
        cargo(
            "lints",
            &[
                "clippy",
                "--release",
                "--locked",
                "--workspace",
                "--all-targets",
                "--quiet",
                "--",
                "-D",
                "warnings",
            ],
            &[],
        )?;
    }
    if !arguments.no_guests {
        ensure_setup()?;
        ensure_binaries(Need::ALL)?;
    }
    if arguments.only.is_none() {
        let mut common = vec!["--release", "--locked", "--workspace", "--quiet"];
        common.extend(GUEST_TESTS.iter().flat_map(|package| ["--exclude", package]));
        // Tests run programs of other packages, which `cargo test` alone leaves out where a package has
        // no integration test.
        cargo("programs", &[&["build", "--all-targets"], &common[..]].concat(), &[])?;
        cargo("unit tests", &[&["test"], &common[..]].concat(), &[])?;
        cargo(
            "unit tests of the lab",
            &["test", "--release", "--locked", "-p", "seawall-lab", "--lib", "--bins"],
            &[],
        )?;
    }
    if !arguments.no_guests {
        for package in GUEST_TESTS {
            let mut words =
                vec!["test", "--release", "--locked", "--package", package, "--test", "*", "--"];
            words.push("--test-threads=1");
            words.extend(arguments.only.as_deref());
            cargo(&format!("guest tests of {package}"), &words, &[(BUILT, "1")])?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
