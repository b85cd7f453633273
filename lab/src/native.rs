//! Service and driver on this machine, as two processes, for one file system: for timing and profiling.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use toml::{Table, Value};

use crate::binaries::{Need, ensure_binaries};
use crate::options::Engine;
use crate::process::{Background, Process, run_tool, tail};
use crate::{daemon, rules};

const REGION_BYTES: usize = 16 << 20;

/// What [`Native::start`] protects, and how.
#[derive(Debug, Clone, Default)]
pub struct NativeOptions {
    /// Where the file system is mounted. Never the machine's root.
    pub mount: PathBuf,
    /// Rules for the engine; a generated folder when absent.
    pub rules: Option<PathBuf>,
    /// TOML laid over the service's configuration, as in [`LabOptions`](crate::LabOptions).
    pub config: String,
}

/// Service and driver, natively. Dropping it stops both and removes their folder.
#[derive(Debug)]
pub struct Native {
    /// Logs, configuration, sockets and the region file.
    pub folder: PathBuf,
    /// The service's REST socket.
    pub api_socket: PathBuf,
    /// The driver's control socket.
    pub control: PathBuf,
    /// The service.
    pub daemon: Option<Process>,
    /// The driver's supervisor.
    pub agent: Option<Process>,
    agent_program: PathBuf,
}

impl Native {
    /// Starts both and waits until the driver says that it protects.
    pub fn start(options: &NativeOptions) -> anyhow::Result<Self> {
        let mount = check_mount(&options.mount)?;
        let binaries = ensure_binaries(Need::ALL)?;
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let (process, number) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let folder = Path::new("/dev/shm").join(format!("seawall-native-{process}-{number}"));
        fs::create_dir_all(&folder)?;
        let mut native = Self {
            api_socket: folder.join("api.sock"),
            control: folder.join("agent.sock"),
            folder,
            daemon: None,
            agent: None,
            agent_program: binaries.agent,
        };
        // A driver that holds its own log and region waits for itself.
        let (own, protected) = (fs::metadata(&native.folder)?.dev(), fs::metadata(&mount)?.dev());
        ensure!(own != protected, "{} holds the lab's own files", mount.display());
        native.start_daemon(options, &binaries.daemon)?;
        native.start_agent(&mount)?;
        Ok(native)
    }

    fn start_daemon(&mut self, options: &NativeOptions, program: &Path) -> anyhow::Result<()> {
        let region = self.folder.join("region");
        // Written, so that no page of it is made while somebody times what goes through it.
        let mut new = File::options();
        new.create(true).truncate(true).write(true).mode(0o600);
        new.open(&region)?.write_all(&vec![0; REGION_BYTES])?;
        let rules = options.rules.clone().unwrap_or_else(|| self.folder.join("rules"));
        if options.rules.is_none() {
            rules::write_rules(&rules)?;
        }
        let mut guest = Table::new();
        guest.insert("name".into(), "native".into());
        guest.insert("region".into(), region.display().to_string().into());
        guest.insert("socket".into(), self.folder.join("link").display().to_string().into());
        let service = self.folder.join("service");
        fs::create_dir_all(&service)?;
        let yara = daemon::engine(Engine::Yara);
        let mut config = daemon::base_config(
            &self.api_socket,
            &service,
            vec![yara],
            vec![Value::Table(guest)],
            "",
            &[&rules],
        );
        daemon::lay_over(
            &mut config,
            options.config.parse().context("NativeOptions::config is no valid TOML")?,
        );
        let path = self.folder.join("seawalld.toml");
        fs::write(&path, config.to_string())?;
        let log = self.daemon_log();
        let process = background(program, vec!["--config".into(), path.into()], &log)?;
        self.daemon = Some(process.clone());
        daemon::wait_ready(&self.api_socket, &process, &log)
    }

    fn start_agent(&mut self, mount: &Path) -> anyhow::Result<()> {
        let mut link = OsString::from("unix:");
        link.push(self.folder.join("link"));
        let arguments: Vec<OsString> = vec![
            "run".into(),
            "--link".into(),
            link,
            "--region".into(),
            self.folder.join("region").into(),
            "--only-mount".into(),
            mount.into(),
            "--control".into(),
            self.control.clone().into(),
        ];
        let process = background(&self.agent_program, arguments, &self.agent_log())?;
        self.agent = Some(process.clone());
        let until = Instant::now() + Duration::from_secs(20);
        while self.agent_command("status").is_err() {
            if !process.is_alive() || Instant::now() > until {
                bail!(
                    "the driver does not protect {}\n{}",
                    mount.display(),
                    tail(&self.agent_log(), 20)
                );
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn agent_command(&self, verb: &str) -> anyhow::Result<String> {
        let words = [
            self.agent_program.as_os_str(),
            verb.as_ref(),
            "--control".as_ref(),
            self.control.as_os_str(),
        ];
        // Bounded: a driver that hangs must not hang the lab.
        run_tool(["timeout".as_ref(), "10".as_ref()].into_iter().chain(words))
    }

    /// The service's log.
    pub fn daemon_log(&self) -> PathBuf {
        self.folder.join("seawalld.log")
    }

    /// The driver's log.
    pub fn agent_log(&self) -> PathBuf {
        self.folder.join("agent.log")
    }

    /// Whether both still run.
    pub fn is_whole(&self) -> bool {
        [&self.daemon, &self.agent]
            .into_iter()
            .all(|process| process.as_ref().is_some_and(Process::is_alive))
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // The driver first: it lets go of the file system while the service still answers.
        let stopped = self.agent.is_some() && self.agent_command("stop").is_ok();
        if let Some(agent) = &self.agent {
            let children = agent.children();
            if !stopped || !agent.wait_gone(Duration::from_secs(5)) {
                let _ = agent.terminate(Duration::from_secs(2));
            }
            for child in children {
                let _ = child.kill();
            }
        }
        if let Some(daemon) = &self.daemon {
            let children = daemon.children();
            let _ = daemon.terminate(Duration::from_secs(5));
            for child in children {
                let _ = child.kill();
            }
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn background(program: &Path, arguments: Vec<OsString>, log: &Path) -> anyhow::Result<Process> {
    Background { program: program.as_os_str(), arguments, log, netns: None, bound: true }.start()
}

/// Accepts only a place where a file system of its own is mounted: a driver that fails on the machine's
/// root freezes the machine.
fn check_mount(folder: &Path) -> anyhow::Result<PathBuf> {
    let folder =
        fs::canonicalize(folder).with_context(|| format!("cannot find {}", folder.display()))?;
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    // proc_pid_mountinfo(5): field 5 is the mount point, with octal escapes.
    let is_mount_point = table
        .lines()
        .filter_map(|line| line.split_whitespace().nth(4))
        .any(|point| OsStr::new(&point.replace("\\040", " ")) == folder.as_os_str());
    ensure!(
        is_mount_point,
        "{} is not a mount point; mount a file system there first",
        folder.display()
    );
    let same = fs::metadata(&folder)?.dev() == fs::metadata("/")?.dev();
    ensure!(
        !same,
        "{} is on the machine's root file system, which the lab never protects",
        folder.display()
    );
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::check_mount;
    use std::path::Path;

    #[test]
    fn root_and_plain_folders_are_refused() {
        assert!(check_mount(Path::new("/")).is_err());
        assert!(check_mount(Path::new("/etc")).is_err());
        assert!(check_mount(Path::new("/dev/shm")).is_ok());
    }
}
