//! Processes that the lab starts: in the lab's network namespace, logged, and never mistaken for others.

use std::ffi::{OsStr, OsString};
use std::fs::{self, OpenOptions};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};
use serde::{Deserialize, Serialize};

/// A process as the lab remembers it. Its start time tells it from a later one with the same number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Process number.
    pub pid: u32,
    /// Start in clock ticks since boot: proc(5), /proc/pid/stat, field 22.
    pub start: u64,
}

impl Process {
    /// The process that has this number now.
    pub fn from_pid(pid: u32) -> Option<Self> {
        let (state, start) = stat(pid)?;
        (state != 'Z').then_some(Self { pid, start })
    }

    /// Our own.
    pub fn current() -> Option<Self> {
        Self::from_pid(std::process::id())
    }

    /// Whether it still runs. Buries it when it is a dead child of ours.
    pub fn is_alive(&self) -> bool {
        if let Some(pid) = self.raw() {
            let _ = rustix::process::waitpid(Some(pid), WaitOptions::NOHANG);
        }
        matches!(stat(self.pid), Some((state, start)) if start == self.start && state != 'Z')
    }

    /// Sends a signal; false when the process is gone.
    pub fn signal(&self, signal: Signal) -> bool {
        self.handle()
            .is_some_and(|handle| rustix::process::pidfd_send_signal(handle, signal).is_ok())
    }

    /// Waits for its end.
    pub fn wait_gone(&self, timeout: Duration) -> bool {
        let until = Instant::now() + timeout;
        while self.is_alive() {
            if Instant::now() >= until {
                return false;
            }
            thread::sleep(Duration::from_millis(5));
        }
        true
    }

    /// Stops it, and waits until it has: the signal takes effect when the process next runs.
    pub fn stop(&self) -> anyhow::Result<()> {
        anyhow::ensure!(self.signal(Signal::STOP), "process {} is gone", self.pid);
        let until = Instant::now() + Duration::from_secs(10);
        while !matches!(stat(self.pid), Some(('T', _))) {
            anyhow::ensure!(Instant::now() < until, "process {} does not stop", self.pid);
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Lets a stopped process run on; false when it is gone.
    pub fn resume(&self) -> bool {
        self.signal(Signal::CONT)
    }

    /// Kills it and waits until it is gone.
    pub fn kill(&self) -> anyhow::Result<()> {
        if self.signal(Signal::KILL) {
            anyhow::ensure!(
                self.wait_gone(Duration::from_secs(10)),
                "process {} outlives its SIGKILL",
                self.pid
            );
        }
        Ok(())
    }

    /// Asks it to end, and kills it when it does not.
    pub fn terminate(&self, patience: Duration) -> anyhow::Result<()> {
        self.signal(Signal::TERM);
        if self.wait_gone(patience) { Ok(()) } else { self.kill() }
    }

    /// Its living children.
    pub fn children(&self) -> Vec<Process> {
        if !self.is_alive() {
            return Vec::new();
        }
        all_pids().filter(|pid| parent(*pid) == Some(self.pid)).filter_map(Self::from_pid).collect()
    }

    /// The program's name as the kernel keeps it, at most 15 bytes.
    pub fn name(&self) -> Option<String> {
        fs::read_to_string(format!("/proc/{}/comm", self.pid))
            .ok()
            .map(|name| name.trim().to_owned())
    }

    fn raw(&self) -> Option<Pid> {
        Pid::from_raw(self.pid as i32)
    }

    /// A handle to exactly this process: taken first, then compared, so that the number cannot be reused between.
    fn handle(&self) -> Option<OwnedFd> {
        let handle = rustix::process::pidfd_open(self.raw()?, PidfdFlags::empty()).ok()?;
        self.is_alive().then_some(handle)
    }
}

/// State and start time.
fn stat(pid: u32) -> Option<(char, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; what follows the last one is fixed, from field 3 on.
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

fn parent(pid: u32) -> Option<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    text.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

fn all_pids() -> impl Iterator<Item = u32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Every process inside a network namespace, known by its name.
pub(crate) fn in_netns(netns: &str) -> Vec<Process> {
    use std::os::unix::fs::MetadataExt;
    let Ok(wanted) = fs::metadata(Path::new("/run/netns").join(netns)) else { return Vec::new() };
    let same = |pid: &u32| {
        fs::metadata(format!("/proc/{pid}/ns/net"))
            .is_ok_and(|found| found.ino() == wanted.ino() && found.dev() == wanted.dev())
    };
    let own = std::process::id();
    all_pids().filter(|pid| *pid != own).filter(same).filter_map(Process::from_pid).collect()
}

/// A process to be started in the background.
pub(crate) struct Background<'a> {
    pub program: &'a OsStr,
    pub arguments: Vec<OsString>,
    /// Receives output and errors.
    pub log: &'a Path,
    /// Network namespace to run in.
    pub netns: Option<&'a str>,
    /// Dies with our process.
    pub bound: bool,
}

impl Background<'_> {
    /// Starts it. The helpers before it (setsid, nsenter, setpriv) become it by exec, so the number stays.
    pub fn start(&self) -> anyhow::Result<Process> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log)
            .with_context(|| format!("cannot write {}", self.log.display()))?;
        let mut words: Vec<OsString> = vec!["setsid".into()];
        if let Some(netns) = self.netns {
            words.extend([
                "nsenter".into(),
                format!("--net=/run/netns/{netns}").into(),
                "--".into(),
            ]);
        }
        if self.bound {
            words.extend(["setpriv", "--pdeathsig", "KILL", "--"].map(OsString::from));
        }
        words.push(self.program.to_owned());
        words.extend(self.arguments.iter().cloned());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let pid = spawn(command)
            .with_context(|| format!("cannot start {}", self.program.to_string_lossy()))?;
        Process::from_pid(pid).with_context(|| {
            format!("{} ended at once; see {}", self.program.to_string_lossy(), self.log.display())
        })
    }
}

type Job = (Command, mpsc::Sender<std::io::Result<u32>>);

/// Starts a command from a thread that never ends: the parent-death signal comes when the *thread* that
/// forked ends (prctl(2), PR_SET_PDEATHSIG), and a test's thread ends before its process does.
fn spawn(command: Command) -> anyhow::Result<u32> {
    static SPAWNER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, receiver) = mpsc::channel::<Job>();
        thread::spawn(move || {
            for (mut command, answer) in receiver {
                let _ = answer.send(command.spawn().map(|child| child.id()));
            }
        });
        sender
    });
    let (sender, receiver) = mpsc::channel();
    spawner.send((command, sender)).ok().context("the starting thread is gone")?;
    Ok(receiver.recv().context("the starting thread is gone")??)
}

/// Runs a tool to its end and returns its output; an error holds the tool's own words.
pub(crate) fn run_tool<S: AsRef<OsStr>>(
    words: impl IntoIterator<Item = S>,
) -> anyhow::Result<String> {
    run_tool_with_input(words, "")
}

/// The same with text on its standard input.
pub(crate) fn run_tool_with_input<S: AsRef<OsStr>>(
    words: impl IntoIterator<Item = S>,
    input: &str,
) -> anyhow::Result<String> {
    use std::io::Write;
    let words: Vec<OsString> = words.into_iter().map(|word| word.as_ref().to_owned()).collect();
    let shown = || words.join(OsStr::new(" ")).to_string_lossy().into_owned();
    let mut child = Command::new(&words[0])
        .args(&words[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run `{}`", shown()))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A tool that reads no input may be gone already.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        anyhow::bail!("`{}` failed ({}): {}", shown(), output.status, words.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The last lines of a text file, for error messages.
pub(crate) fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> = text.lines().map(|line| line.trim_end_matches('\r')).collect();
    let shown = all[all.len().saturating_sub(lines)..].join("\n");
    format!("--- {} (last {lines} lines)\n{shown}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper(bound: bool) -> Process {
        let arguments = vec!["60".into()];
        Background {
            program: OsStr::new("sleep"),
            arguments,
            log: Path::new("/dev/null"),
            netns: None,
            bound,
        }
        .start()
        .unwrap()
    }

    #[test]
    fn a_background_process_is_known_and_dies() {
        let process = sleeper(true);
        assert!(process.is_alive());
        process.kill().unwrap();
        assert!(!process.is_alive());
    }

    #[test]
    fn a_reused_number_is_not_the_same_process() {
        let process = sleeper(false);
        let earlier = Process { start: process.start - 1, ..process.clone() };
        assert!(!earlier.is_alive());
        assert!(!earlier.signal(Signal::KILL));
        assert!(process.is_alive());
        process.kill().unwrap();
    }
}
