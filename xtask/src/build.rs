//! `cargo xtask build`

use std::process::ExitCode;

use seawall_lab::{Need, ensure_binaries};

/// Builds all programs and says where they are.
pub fn run() -> anyhow::Result<ExitCode> {
    let binaries = ensure_binaries(Need::ALL)?;
    let all = [
        &binaries.agent,
        &binaries.daemon,
        &binaries.cli,
        &binaries.engine_yara,
        &binaries.engine_clamav,
        &binaries.engine_hash,
        &binaries.lab_guest,
    ];
    for path in all {
        println!("{}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}
