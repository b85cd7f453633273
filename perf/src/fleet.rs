//! Many guests on one host, natively: a service, and a driver for the file system of each.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use seawall_lab::{Binaries, Process};
use serde_json::Value;

use crate::cpu::{self, Cpus};
use crate::stage::text_of;

const REGION: u64 = 16 << 20;
const PATIENCE: Duration = Duration::from_secs(100);

/// What scans, and where its signatures are.
pub enum Engine {
    ClamAv { database: PathBuf },
    Yara { rules: PathBuf },
}

impl Engine {
    fn config(&self, binaries: &Binaries, folder: &Path) -> String {
        let (name, program, arguments) = match self {
            Self::ClamAv { database } => {
                let temporary = folder.join("engine").display().to_string();
                let database = database.display().to_string();
                let words =
                    ["--database".to_owned(), database, "--temporary".to_owned(), temporary];
                ("clamav", &binaries.engine_clamav, words.to_vec())
            }
            Self::Yara { rules } => {
                let words = ["--rules".to_owned(), rules.display().to_string()];
                ("yara", &binaries.engine_yara, words.to_vec())
            }
        };
        let words = [vec![program.display().to_string()], arguments].concat();
        format!("[[engine]]\nname = \"{name}\"\ncommand = {words:?}\nmemory_mib = 8192\n")
    }
}

/// CPU time of all processes of this PID namespace but this one, those too that have ended.
pub fn cpu_of_all() -> Duration {
    ticks(of_process(1, 2..4) + others().into_iter().map(|pid| of_process(pid, 0..4)).sum::<u64>())
}

/// utime, stime, and the same of children that have ended: fields 14 to 17 (proc_pid_stat(5)).
fn of_process(pid: u32, fields: std::ops::Range<usize>) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let rest = stat.rfind(')').map_or("", |at| &stat[at + 1..]);
    let numbers: Vec<u64> =
        rest.split_whitespace().skip(11).take(4).filter_map(|word| word.parse().ok()).collect();
    numbers.get(fields).into_iter().flatten().sum()
}

fn ticks(ticks: u64) -> Duration {
    Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
}

pub fn others() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| *pid != 1).collect()
}

/// Memory of the same processes in KiB, what is shared counted by parts, without the regions.
pub fn memory_of_all() -> u64 {
    let of = |pid: &u32| {
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        let value = |line: &str| line.split_whitespace().nth(1)?.parse::<u64>().ok();
        let counts = |line: &&str| ["Pss_Anon:", "Pss_File:"].iter().any(|n| line.starts_with(n));
        rollup.lines().filter(counts).filter_map(value).sum::<u64>()
    };
    others().iter().map(of).sum()
}

/// CPU time of the service and its engine, those of its processes too that have ended.
pub fn cpu_of_host(host: &Host) -> Duration {
    let mut all = vec![host.service()];
    let mut at = 0;
    while let Some(pid) = all.get(at).copied() {
        // A process is the child of the thread that made it.
        let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let of = |thread: fs::DirEntry| fs::read_to_string(thread.path().join("children")).ok();
        let texts: Vec<String> = threads.filter_map(of).collect();
        for child in texts.iter().flat_map(|text| text.split_whitespace()) {
            let child = child.parse().unwrap_or(0);
            if child > 0 && !all.contains(&child) {
                all.push(child);
            }
        }
        at += 1;
    }
    ticks(all.into_iter().map(|pid| of_process(pid, 0..4)).sum())
}

/// A service, and a driver for each guest.
pub struct Host {
    pub folder: PathBuf,
    cli: PathBuf,
    children: Vec<Child>,
}

impl Host {
    /// Starts them, a driver for each of these file systems. `config` is laid into the service's configuration.
    pub fn start(
        folder: &Path,
        engine: &Engine,
        config: &str,
        mounts: &[&Path],
    ) -> anyhow::Result<Self> {
        let binaries = Binaries::locate();
        fs::create_dir_all(folder.join("engine"))?;
        let at = |name: &str| folder.join(name).display().to_string();
        let mut config = format!(
            "[service]\napi_socket = \"{}\"\nstate_dir = \"{}\"\n{}\n{config}\n",
            at("api.sock"),
            at("state"),
            engine.config(&binaries, folder),
        );
        for number in 0..mounts.len() {
            let region = at(&format!("region-{number}"));
            fs::File::create(&region)?.set_len(REGION)?;
            config += &format!(
                "[[guest]]\nname = \"g{number}\"\nregion = \"{region}\"\nsocket = \"{}\"\n",
                at(&format!("link-{number}"))
            );
        }
        fs::write(folder.join("seawalld.toml"), config)?;
        let mut host = Self { folder: folder.to_owned(), cli: binaries.cli, children: Vec::new() };
        let config = at("seawalld.toml");
        host.spawn(&binaries.daemon, &["--config".into(), config], "seawalld")?;
        host.until("the engine", |host| Ok(host.ask(&["status"])?["healthy"] == true))?;
        for (number, mount) in mounts.iter().enumerate() {
            let arguments = [
                "run".to_owned(),
                format!("--link=unix:{}", at(&format!("link-{number}"))),
                format!("--region={}", at(&format!("region-{number}"))),
                format!("--only-mount={}", mount.display()),
                format!("--control={}", at(&format!("control-{number}"))),
                format!("--journal={}", at(&format!("journal-{number}"))),
            ];
            host.spawn(&binaries.agent, &arguments, &format!("agent-{number}"))?;
        }
        host.until("the drivers", |host| {
            let guests = host.ask(&["guests"])?;
            let watches = |guest: &Value| guest["session"]["coverage"]["covered"] == 1;
            Ok(guests.as_array().is_some_and(|guests| guests.iter().all(watches)))
        })?;
        Ok(host)
    }

    /// Keeps the drivers on the guests' CPU, and all else on the host's.
    pub fn pin(&self, cpus: Cpus) -> anyhow::Result<()> {
        let (service, drivers) = self.parts()?;
        cpu::pin_tree(&service, cpus.host)?;
        drivers.iter().try_for_each(|driver| cpu::pin_tree(driver, cpus.guest))
    }

    /// Those of the drivers, and those of the service and its engine.
    pub fn processes(&self) -> anyhow::Result<[Vec<Process>; 2]> {
        let (service, drivers) = self.parts()?;
        Ok([drivers.iter().flat_map(cpu::tree).collect(), cpu::tree(&service)])
    }

    fn parts(&self) -> anyhow::Result<(Process, Vec<Process>)> {
        let process = |child: &Child| Process::from_pid(child.id()).context("one has ended");
        let (service, drivers) = self.children.split_first().context("nothing was started")?;
        Ok((process(service)?, drivers.iter().map(process).collect::<anyhow::Result<_>>()?))
    }

    /// The configuration that the engine has given its clamd.
    pub fn clamd_settings(&self) -> anyhow::Result<String> {
        for entry in fs::read_dir(self.folder.join("engine"))? {
            if let Ok(text) = fs::read_to_string(entry?.path().join("clamd.conf")) {
                return Ok(text);
            }
        }
        anyhow::bail!("no clamd.conf of the engine")
    }

    fn service(&self) -> u32 {
        self.children.first().map_or(0, Child::id)
    }

    fn spawn(&mut self, program: &Path, arguments: &[String], log: &str) -> anyhow::Result<()> {
        let log = fs::File::create(self.folder.join(format!("{log}.log")))?;
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| program.display().to_string())?;
        self.children.push(child);
        Ok(())
    }

    /// The command line of this service; what it prints is JSON.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.cli);
        command.arg("--socket").arg(self.folder.join("api.sock")).arg("--json");
        command
    }

    /// What it prints.
    pub fn ask(&self, words: &[&str]) -> anyhow::Result<Value> {
        Ok(serde_json::from_str(&text_of(self.command().args(words))?)?)
    }

    /// Waits until something is so.
    pub fn until(
        &self,
        what: &str,
        is_so: impl Fn(&Self) -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        let until = Instant::now() + PATIENCE;
        while !is_so(self).unwrap_or(false) {
            let log = || fs::read_to_string(self.folder.join("seawalld.log")).unwrap_or_default();
            ensure!(Instant::now() < until, "{what}: not ready\n{}", log());
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The drivers first: they let go of their file systems while the service still answers.
        for child in self.children.iter_mut().rev() {
            let pid = rustix::process::Pid::from_child(child);
            let _gone = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            let _reaped = child.wait();
        }
        // The engine's clamd ends with it; what is not gone by then is no part of the next measurement.
        let until = Instant::now() + Duration::from_secs(10);
        while !others().is_empty() && Instant::now() < until {
            // We are the first process of the namespace: what loses its parent is ours.
            let options = rustix::process::WaitOptions::NOHANG;
            while let Ok(Some(_)) = rustix::process::wait(options) {}
            thread::sleep(Duration::from_millis(20));
        }
    }
}
