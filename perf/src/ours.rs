//! Driver and service under measurement: where they run, what they counted, what they cost.

use std::ffi::CString;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use seawall_lab::{Binaries, Native, NativeOptions, Process};
use serde::Serialize;
use serde_json::Value;

use crate::cpu::{self, Cpus};
use crate::plan::{Case, Pace, Setup, What};
use crate::sample::{Use, time_opens};
use crate::stage::text_of;

/// How long it may take until all files to be repeated are marked.
const MARKED_MAX: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub struct Ours {
    native: Native,
    binaries: Binaries,
    cpus: Cpus,
}

/// Processes by what they are.
#[derive(Debug)]
pub struct Parts {
    pub driver: Vec<Process>,
    pub service: Vec<Process>,
    pub engine: Vec<Process>,
}

/// What driver and service have counted since their start.
#[derive(Debug, Clone, Copy)]
pub struct Counts {
    events: u64,
    requests: u64,
    cache_hits: u64,
    scans: u64,
}

/// What the host's side takes, in KiB. A driver shares its program's pages with others here, so that is measured where
/// there is one alone.
#[derive(Debug, Serialize)]
pub struct Memory {
    /// Without its engine, region and private copies.
    pub service_kib: u64,
    pub engine_kib: u64,
}

impl Ours {
    /// Starts both. The calling thread is on the host's CPU then.
    pub fn start(mount: &Path, cpus: Cpus, config: &str) -> anyhow::Result<Self> {
        cpu::pin_self(cpus.host)?;
        let (mount, config) = (mount.to_owned(), config.to_owned());
        let options = NativeOptions { mount, config, ..NativeOptions::default() };
        let native = Native::start(&options)?;
        let ours = Self { native, binaries: Binaries::locate(), cpus };
        cpu::pin_tree(ours.agent()?, cpus.guest)?;
        ours.check()?;
        Ok(ours)
    }

    fn agent(&self) -> anyhow::Result<&Process> {
        self.native.agent.as_ref().context("the driver was not started")
    }

    fn daemon(&self) -> anyhow::Result<&Process> {
        self.native.daemon.as_ref().context("the service was not started")
    }

    /// Fails when a part has died, or runs where it should not.
    pub fn check(&self) -> anyhow::Result<()> {
        ensure!(self.native.is_whole(), "driver or service has died");
        cpu::check_tree(self.agent()?, self.cpus.guest)?;
        cpu::check_tree(self.daemon()?, self.cpus.host)
    }

    /// Lets the host learn the contents of these files, the driver that they are clean and, where they are `marked`, the
    /// kernel too.
    pub fn teach<'a>(
        &self,
        sizes: impl Iterator<Item = &'a [CString]>,
        marked: bool,
    ) -> anyhow::Result<()> {
        let all: Vec<CString> = sizes.flatten().cloned().collect();
        let count = u32::try_from(all.len())?;
        let until = Instant::now() + MARKED_MAX;
        loop {
            let before = self.counts()?;
            time_opens(&all, count, Pace::BackToBack, Use::Nothing)?;
            let after = self.counts()?;
            let is_learned = if marked {
                after.events == before.events
            } else {
                after.requests == before.requests
            };
            if is_learned {
                return Ok(());
            }
            ensure!(Instant::now() < until, "files that were opened again are still asked for");
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Gives the service new signatures, and lets it learn that these contents are clean for them too.
    pub fn renew(&self, contents: &[CString]) -> anyhow::Result<()> {
        let rules = self.native.folder.join("rules");
        let number = std::fs::read_dir(&rules)?.count();
        let rule =
            format!("rule Never{number} {{ strings: $a = \"zq-never-{number}\" condition: $a }}\n");
        std::fs::write(rules.join(format!("never-{number}.yar")), rule)?;
        self.seawall(&["reload"])?;
        for content in contents {
            let path = content.to_str().context("the benchmark's own paths are text")?;
            self.seawall(&["scan", path])?;
        }
        Ok(())
    }

    fn seawall(&self, arguments: &[&str]) -> anyhow::Result<()> {
        let mut command = Command::new("timeout");
        command.arg("60").arg(&self.binaries.cli).arg("--socket").arg(&self.native.api_socket);
        text_of(command.args(arguments)).map(drop)
    }

    /// Asks both what they have counted.
    pub fn counts(&self) -> anyhow::Result<Counts> {
        let bounded = |program: &Path| {
            let mut command = Command::new("timeout");
            command.arg("10").arg(program);
            command
        };
        let mut driver = bounded(&self.binaries.agent);
        let driver = driver.args(["status", "--json", "--control"]).arg(&self.native.control);
        let driver: Value = serde_json::from_str(&text_of(driver)?)?;
        let mut service = bounded(&self.binaries.cli);
        let service =
            service.arg("--socket").arg(&self.native.api_socket).args(["--json", "status"]);
        // Its exit status tells of health, which is not asked here.
        let output = service.output().context("the command line cannot be started")?;
        let service: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
        let number = |from: &Value, key: &str| {
            from[key].as_u64().with_context(|| format!("`{key}` is not in the status"))
        };
        let counters = &service["counters"];
        Ok(Counts {
            events: number(&driver, "events")?,
            requests: number(&driver, "requests")?,
            cache_hits: number(counters, "cache_hits")?,
            scans: number(counters, "scans")?,
        })
    }

    /// The processes as they are now.
    pub fn parts(&self) -> anyhow::Result<Parts> {
        let daemon = self.daemon()?;
        let mut engine = cpu::tree(daemon);
        let service = vec![engine.remove(0)];
        Ok(Parts { driver: cpu::tree(self.agent()?), service, engine })
    }

    pub fn memory(&self) -> anyhow::Result<Memory> {
        let parts = self.parts()?;
        Ok(Memory {
            service_kib: cpu::memory_kib(&parts.service),
            engine_kib: cpu::memory_kib(&parts.engine),
        })
    }
}

/// How many opens of a case went another way than the one that is to be measured.
pub fn astray(case: &Case, opens: u32, before: Counts, after: Counts) -> u64 {
    let opens = u64::from(opens);
    let requests = after.requests - before.requests;
    match case.what {
        What::Repeat | What::Read if case.setup == Setup::Unmarked => {
            opens.abs_diff(after.events - before.events).max(requests)
        }
        What::Repeat | What::Read => after.events - before.events,
        What::KnownContent | What::NewSignatures => {
            opens.abs_diff(requests).max(opens.abs_diff(after.cache_hits - before.cache_hits))
        }
        What::NewContent => {
            opens.abs_diff(requests).max(opens.abs_diff(after.scans - before.scans))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_that_went_another_way_are_counted() {
        let case = |what| Case { setup: Setup::Ours, what, pace: Pace::BackToBack, size: 4096 };
        let before = Counts { events: 5, requests: 5, cache_hits: 5, scans: 5 };
        let after = Counts { events: 15, requests: 14, cache_hits: 13, scans: 6 };
        assert_eq!(astray(&case(What::Repeat), 10, before, after), 10);
        assert_eq!(astray(&case(What::KnownContent), 10, before, after), 2);
        assert_eq!(astray(&case(What::NewContent), 10, before, after), 9);
        assert_eq!(astray(&case(What::Repeat), 10, before, before), 0);
    }
}
