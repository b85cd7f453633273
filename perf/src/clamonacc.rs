//! The antivirus that a guest would have: Debian's clamd, and clamonacc with prevention, which passes it open files.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use seawall_lab::Process;

use crate::cpu::{self, Cpus};
use crate::engines::database;

/// Few for ClamAV, in whose favour that is: a scan of a small file takes longer with more.
const SIGNATURES: u64 = 20_000;
/// What a file is denied for.
const WORD: &str = "zq-this-is-watched";
/// How long both may take to start.
const READY_MAX: Duration = Duration::from_secs(60);

/// Both of them. They end with it.
#[derive(Debug)]
pub struct Clamonacc {
    children: Vec<Child>,
}

impl Clamonacc {
    /// Starts clamonacc beside whoever opens and clamd on the host's CPU, as if that cost the guest nothing, and waits until
    /// `watched` is.
    pub fn start(watched: &Path, folder: &Path, cpus: Cpus) -> anyhow::Result<Self> {
        fs::create_dir_all(folder)?;
        let at = |name: &str| folder.join(name).display().to_string();
        database::write(&folder.join("database"), SIGNATURES)?;
        let digits: String = WORD.bytes().map(|byte| format!("{byte:02x}")).collect();
        fs::write(folder.join("database/word.ndb"), format!("Test.Word-1:0:*:{digits}\n"))?;
        let clamd = format!(
            "LocalSocket {}\nDatabaseDirectory {}\nTemporaryDirectory {}\nForeground yes\n",
            at("clamd.sock"),
            at("database"),
            folder.display()
        );
        fs::write(folder.join("clamd.conf"), clamd)?;
        let onacc = format!(
            "LocalSocket {}\nOnAccessIncludePath {}\nOnAccessPrevention yes\nOnAccessExcludeUname clamav\n",
            at("clamd.sock"),
            watched.display()
        );
        fs::write(folder.join("onacc.conf"), onacc)?;
        // What says that it watches: this is denied then.
        let infected = watched.join("infected");
        fs::write(&infected, WORD)?;
        let mut both = Self { children: Vec::new() };
        cpu::pin_self(cpus.host)?;
        both.spawn("clamd", &[&format!("--config-file={}", at("clamd.conf"))], folder)?;
        let since = Instant::now();
        while !folder.join("clamd.sock").exists() {
            both.wait(since, "clamd", folder)?;
        }
        cpu::pin_self(cpus.guest)?;
        let config = format!("--config-file={}", at("onacc.conf"));
        both.spawn("clamonacc", &["--foreground", "--fdpass", &config], folder)?;
        while File::open(&infected).is_ok() {
            both.wait(since, "clamonacc", folder)?;
        }
        Ok(both)
    }

    fn spawn(&mut self, program: &str, arguments: &[&str], folder: &Path) -> anyhow::Result<()> {
        let log = File::create(folder.join(format!("{program}.log")))?;
        let child = Command::new(program)
            .args(arguments)
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("{program} cannot be started"))?;
        self.children.push(child);
        Ok(())
    }

    fn wait(&mut self, since: Instant, program: &str, folder: &Path) -> anyhow::Result<()> {
        let ended = self.children.iter_mut().any(|child| !matches!(child.try_wait(), Ok(None)));
        let log = || fs::read_to_string(folder.join(format!("{program}.log"))).unwrap_or_default();
        ensure!(!ended && since.elapsed() < READY_MAX, "{program} does not watch\n{}", log());
        thread::sleep(Duration::from_millis(50));
        Ok(())
    }

    /// clamd, and clamonacc.
    pub fn processes(&self) -> anyhow::Result<Vec<Process>> {
        let process = |child: &Child| Process::from_pid(child.id()).context("it has ended");
        self.children.iter().map(process).collect()
    }
}

impl Drop for Clamonacc {
    fn drop(&mut self) {
        // clamonacc first: it lets go of what it holds while clamd still answers.
        for child in self.children.iter_mut().rev() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
