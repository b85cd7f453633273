//! `cargo xtask docs`

use std::process::ExitCode;

use crate::tools::cargo;

/// Builds the documentation of our own crates.
pub fn run() -> anyhow::Result<ExitCode> {
    cargo(
        "docs",
        &["doc", "--locked", "--workspace", "--no-deps", "--quiet"],
        &[("RUSTDOCFLAGS", "-D warnings")],
    )?;
    Ok(ExitCode::SUCCESS)
}
