//! What it was measured on: a figure without its machine says nothing.

use std::fs;
use std::process::Command;

use seawall_lab::workspace;
use serde::Serialize;

use crate::stage::text_of;

#[derive(Debug, Serialize)]
pub struct Machine {
    pub cpu: String,
    pub cpus: usize,
    pub memory_mib: u64,
    pub kernel: String,
}

impl Machine {
    pub fn describe() -> Self {
        let text = |path| fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = text("/proc/cpuinfo");
        let models = || cpuinfo.lines().filter_map(|line| line.strip_prefix("model name"));
        let memory = text("/proc/meminfo");
        let memory = memory.lines().find_map(|line| line.strip_prefix("MemTotal:"));
        let kib = memory.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
        Self {
            cpu: models()
                .next()
                .unwrap_or_default()
                .trim_start_matches([' ', '\t', ':'])
                .to_owned(),
            cpus: models().count(),
            memory_mib: kib.unwrap_or(0) >> 10,
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        }
    }
}

/// How many processes wanted a CPU in the last minute: with more than one beside ours, times tell as
/// much of the others.
pub fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or(0.0)
}

/// The source's revision, with a `+` where it has changes; nothing where git knows none.
pub fn revision() -> Option<String> {
    let git = |arguments: &[&str]| {
        text_of(Command::new("timeout").args(["10", "git", "-C"]).arg(workspace()).args(arguments))
    };
    let revision = git(&["rev-parse", "--short=12", "HEAD"]).ok()?;
    let changes = git(&["status", "--porcelain", "--untracked-files=no"]).ok()?;
    Some(format!("{}{}", revision.trim(), if changes.is_empty() { "" } else { "+" }))
}
