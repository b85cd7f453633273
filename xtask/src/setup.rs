//! `cargo xtask setup`

use std::process::ExitCode;

#[derive(clap::Args)]
pub struct Arguments {
    /// Build the full Debian image too, which `lab up --image debian` otherwise does when first used
    #[arg(long)]
    debian: bool,
}

/// Brings in packages, kernels and tools.
pub fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    seawall_lab::setup()?;
    if arguments.debian {
        seawall_lab::ensure_debian_image()?;
    }
    Ok(ExitCode::SUCCESS)
}
