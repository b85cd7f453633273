//! The two bare programs that ours is compared with.
//!
//! Both are as simple as fanotify allows: one thread that reads, allows and closes.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use rustix::fs::OFlags;
use seawall_fanotify::{Answer, Group, Holds, IgnoreMark, Purpose};
use seawall_lab::Process;

/// What a listener says when it watches.
const READY: &str = "ready";
/// How long that may take.
const READY_MAX: Duration = Duration::from_secs(20);

/// Events read at once; the driver's own reader takes as many.
const BATCH: usize = 8;

/// Watches the file system mounted at `mount` for ever and allows everything. With `marks` it holds
/// the driver's marks too, and an ignore mark on every file.
pub fn listen(mount: &Path, marks: bool) -> anyhow::Result<ExitCode> {
    let device = |path: &Path| rustix::fs::stat(path).map(|stat| stat.st_dev);
    ensure!(device(mount)? != device(Path::new("/"))?, "never the machine's root");
    let group = Group::new(Purpose::Permission).context("no permission events")?;
    // Held open for its marks; nothing is written here while it is measured.
    let closes = marks.then(|| Group::new(Purpose::CloseWrite)).transpose()?;
    if marks {
        // Before the file system is watched: nobody would answer our own opens.
        for entry in fs::read_dir(mount)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                let file = File::open(entry.path())?;
                group
                    .ignore_opens(file.as_fd(), IgnoreMark::Evictable)
                    .context("this kernel has no evictable ignore marks")?;
            }
        }
    }
    if let Some(closes) = &closes {
        closes.mark_filesystem(mount, Holds::OpenAndExec)?;
    }
    group.mark_filesystem(mount, Holds::OpenAndExec)?;
    // Waits in read(2) itself, one system call less for each event than poll(2) before it.
    let flags = rustix::fs::fcntl_getfl(&group)?;
    rustix::fs::fcntl_setfl(&group, flags - OFlags::NONBLOCK)?;
    println!("{READY}");
    std::io::stdout().flush()?;
    loop {
        group.read(BATCH, |event| {
            if let Some(fd) = event.fd {
                // A refused answer shows as an open that stands still, which the watchdog ends.
                let _ = group.answer(fd.as_raw_fd(), Answer::Allow);
            }
        })?;
    }
}

/// A listener that runs. It ends with its value.
#[derive(Debug)]
pub struct Listener(Child);

impl Listener {
    /// Starts one on the CPU that this thread is on, and waits until it watches.
    pub fn start(mount: &Path, marks: bool) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("listener").arg("--mount").arg(mount);
        if marks {
            command.arg("--marks");
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let output = child.stdout.take();
        let listener = Self(child);
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            let line = output.and_then(|output| BufReader::new(output).lines().next());
            let _ = sender.send(line);
        });
        match receiver.recv_timeout(READY_MAX) {
            Ok(Some(Ok(line))) if line == READY => Ok(listener),
            Ok(_) => anyhow::bail!("the listener ended while it started; see its words above"),
            Err(_) => anyhow::bail!("the listener is not ready after {} s", READY_MAX.as_secs()),
        }
    }

    /// The process.
    pub fn process(&self) -> anyhow::Result<Process> {
        Process::from_pid(self.0.id()).context("the listener has ended")
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // With its last descriptor the kernel allows what it still held.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
