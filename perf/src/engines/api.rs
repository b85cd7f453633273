//! An engine behind the security API, as the service has it.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use seawall_engine::Outcome;
use seawall_engine::host::{
    ContentWriter, EngineConfig, EngineHandle, Lane, Metadata, Operation, ScanReport, SharedContent,
};
use seawall_lab::Process;

/// No engine takes longer to load, on any machine that is used for this.
const READY_MAX: Duration = Duration::from_secs(600);
/// No scan takes longer.
const SCAN_MAX: Duration = Duration::from_secs(60);
/// Scans under way at a time: enough that no worker waits for its next one.
const OUTSTANDING: usize = 32;
/// A copy up to this length is made on the heap, in bytes.
const ON_HEAP: u64 = 1 << 20;
/// Bytes read from a file at a time.
const PIECE: usize = 256 << 10;

pub struct Api {
    handle: EngineHandle,
    /// From the call until the engine was ready.
    pub loading: Duration,
}

/// What a pass over many contents came to.
#[derive(Debug, Clone, Copy)]
pub struct Pass {
    pub time: Duration,
    pub infected: usize,
}

type Answer = (Instant, ScanReport);

impl Api {
    /// Starts an engine and waits until it is ready.
    pub fn start(command: Vec<String>, threads: u32, memory_mib: u64) -> anyhow::Result<Self> {
        let config = EngineConfig {
            threads,
            memory_mib,
            ready_timeout: READY_MAX,
            ..EngineConfig::new("bench", command)
        };
        let begin = Instant::now();
        let handle = EngineHandle::start(config, |_| ())?;
        ensure!(handle.wait_ready(READY_MAX), "the engine is not ready: {:?}", handle.state());
        Ok(Self { handle, loading: begin.elapsed() })
    }

    /// The engine's process.
    pub fn process(&self) -> anyhow::Result<Process> {
        let pid = self.handle.status().pid.context("the engine has no process")?;
        Process::from_pid(pid).context("the engine's process is gone")
    }

    fn send(&self, content: SharedContent, tell: mpsc::Sender<Answer>, gate: Option<Arc<Gate>>) {
        let metadata = Metadata {
            path: Vec::new(),
            guest: "bench".into(),
            operation: Operation::Open,
            size: content.len(),
            archives: None,
        };
        self.handle.scan(content, metadata, Lane::OnAccess, SCAN_MAX, move |report| {
            let _gone = tell.send((Instant::now(), report));
            gate.iter().for_each(|gate| gate.leave(OUTSTANDING / 2));
        });
    }

    /// Scans one content. The time ends when the service has the report.
    pub fn scan(&self, content: SharedContent) -> anyhow::Result<Duration> {
        let (tell, reply) = mpsc::channel();
        let begin = Instant::now();
        self.send(content, tell, None);
        Ok(take(&reply)?.0.duration_since(begin))
    }

    /// Copies and scans one content.
    pub fn copy_and_scan(&self, bytes: &[u8]) -> anyhow::Result<Duration> {
        let begin = Instant::now();
        let copy = SharedContent::new(bytes)?;
        let copying = begin.elapsed();
        Ok(copying + self.scan(copy)?)
    }

    /// Scans many contents, made one after the other while the engine works on those before. Like a walk over many files
    /// it goes on when some have been answered, not after each.
    pub fn pass(
        &self,
        contents: impl IntoIterator<Item = anyhow::Result<SharedContent>>,
    ) -> anyhow::Result<Pass> {
        let (tell, reply) = mpsc::channel();
        let (mut under_way, mut infected) = (0, 0);
        let gate = Arc::new(Gate::default());
        let begin = Instant::now();
        for content in contents {
            if under_way == OUTSTANDING {
                gate.wait(OUTSTANDING / 2);
                for report in reply.try_iter() {
                    infected += usize::from(is_infected(report)?);
                    under_way -= 1;
                }
                ensure!(under_way < OUTSTANDING, "no report came");
            }
            gate.enter();
            self.send(content?, tell.clone(), Some(Arc::clone(&gate)));
            under_way += 1;
        }
        for _ in 0..under_way {
            infected += usize::from(take(&reply)?.1);
        }
        Ok(Pass { time: begin.elapsed(), infected })
    }

    /// The same with files.
    pub fn pass_files(&self, files: &[PathBuf]) -> anyhow::Result<Pass> {
        let mut buffer = vec![0; PIECE];
        self.pass(files.iter().map(|path| copy_file(path, &mut buffer)))
    }
}

/// A file as it lies there, for the engine to read.
pub fn open_file(path: &PathBuf) -> anyhow::Result<SharedContent> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    Ok(SharedContent::from_spool(file, length)?)
}

/// A private copy of a file, as the service makes one of what a guest sends: on the heap until it is long.
pub fn copy_file(path: &PathBuf, buffer: &mut [u8]) -> anyhow::Result<SharedContent> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    if length <= ON_HEAP {
        let mut copy = Vec::with_capacity(usize::try_from(length)?);
        file.read_to_end(&mut copy)?;
        return Ok(SharedContent::new(copy)?);
    }
    let mut writer = ContentWriter::new(length)?;
    loop {
        match file.read(buffer)? {
            0 => return Ok(writer.seal()?),
            count => writer.append(&buffer[..count])?,
        }
    }
}

/// How many scans are under way; wakes who waits for fewer once, not for each.
#[derive(Default)]
struct Gate {
    inside: Mutex<usize>,
    fewer: Condvar,
}

impl Gate {
    fn inside(&self) -> MutexGuard<'_, usize> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self) {
        *self.inside() += 1;
    }

    fn leave(&self, low: usize) {
        let mut inside = self.inside();
        *inside -= 1;
        if *inside == low {
            self.fewer.notify_one();
        }
    }

    /// Until there are no more than `low`, or for as long as a scan may take.
    fn wait(&self, low: usize) {
        let enough = self.fewer.wait_timeout_while(self.inside(), 2 * SCAN_MAX, |n| *n > low);
        drop(enough);
    }
}

/// When the report came, and whether it says that something was found.
fn take(reply: &Receiver<Answer>) -> anyhow::Result<(Instant, bool)> {
    let answer = reply.recv_timeout(2 * SCAN_MAX).context("no report came")?;
    Ok((answer.0, is_infected(answer)?))
}

fn is_infected((_, report): Answer) -> anyhow::Result<bool> {
    match report.result {
        Ok(Outcome::Clean) => Ok(false),
        Ok(Outcome::Infected(_)) => Ok(true),
        Ok(Outcome::Allowed { name }) => bail!("allowed as {name}"),
        Err(error) => bail!("{error}"),
    }
}
