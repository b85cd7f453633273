//! Running cargo and git.

use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};
use seawall_lab::workspace;

/// Runs cargo in the workspace with its output shown, and says the step's name and time.
pub fn cargo(step: &str, arguments: &[&str], environment: &[(&str, &str)]) -> anyhow::Result<()> {
    let started = Instant::now();
    eprintln!("==> {step}");
    let status = cargo_command()
        .args(arguments)
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "{step} failed: cargo {}", arguments.join(" "));
    eprintln!("==> {step}: good, {:.0} s", started.elapsed().as_secs_f64());
    Ok(())
}

/// Runs cargo and returns what it prints.
pub fn cargo_output(arguments: &[&str]) -> anyhow::Result<String> {
    text(cargo_command().args(arguments))
}

/// Runs git in the workspace and returns what it prints.
pub fn git(arguments: &[&str]) -> anyhow::Result<String> {
    text(Command::new("git").current_dir(workspace()).args(arguments))
}

fn cargo_command() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    command
}

fn text(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}
