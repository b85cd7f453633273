//! Running cargo and git.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use seawall_lab::workspace;

/// A step that takes longer than this hangs; the machine that builds everything from nothing needs a
/// third of it.
const STEP_LIMIT: Duration = Duration::from_secs(45 * 60);
/// All benchmarks at once may take longer; each of them ends by itself where it stands still.
const BENCH_LIMIT: Duration = Duration::from_secs(6 * 3600);

/// Runs cargo in the workspace with its output shown, and says the step's name and time.
pub fn cargo(step: &str, arguments: &[&str], environment: &[(&str, &str)]) -> anyhow::Result<()> {
    let started = Instant::now();
    let limit = if step == "bench" { BENCH_LIMIT } else { STEP_LIMIT };
    eprintln!("==> {step}");
    let mut child = cargo_command()
        .args(arguments)
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .spawn()
        .context("cannot run cargo")?;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if started.elapsed() > limit {
            kill_tree(child.id());
            child.wait()?;
            bail!("{step} hangs: it was ended after {} minutes", limit.as_secs() / 60);
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    ensure!(status.success(), "{step} failed: cargo {}", arguments.join(" "));
    eprintln!("==> {step}: good, {:.0} s", started.elapsed().as_secs_f64());
    Ok(())
}

/// Kills a process of ours and all that it started. They share the terminal's process group with us, so
/// that an interrupt ends them too; a signal to the group would end us as well.
fn kill_tree(pid: u32) {
    // proc_pid_task(5): each thread lists the children that it started.
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let children: String = tasks
        .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok())
        .collect();
    if let Ok(pid) = i32::try_from(pid) {
        let pid = nix::unistd::Pid::from_raw(pid);
        let _gone = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
    }
    children.split_ascii_whitespace().filter_map(|child| child.parse().ok()).for_each(kill_tree);
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
