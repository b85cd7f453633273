//! Recording what is opened and written, for a benchmark that replays it.
//!
//! A group of its own is told of opens and closes, those too of marked files, and holds nothing. A trace is lines of JSON:
//!
//! ```text
//!   {"seawall_trace":1,"began":1790000000}
//!   [1208,"open",5012778843920176,4096,831]
//!   [1544,"write",5012778843920176,4210,831]
//! ```
//!
//! Each says when (microseconds since the boot), what, which file, its size in bytes and by which process. Files are keyed
//! hashes of device and inode, whose keys nobody knows: a trace may be shown to others. Two opens of a file by one process
//! that come faster than they are read are one (fanotify(7): identical events are merged).

use crate::driver::Driver;
use crate::event::wait_readable;
use crate::file::Look;
use anyhow::Context;
use seawall_fanotify::{Event, EventKind};
use std::fs::{File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

/// No more is written than this, in bytes: most of an hour of a busy guest.
const LEN_MAX: u64 = 1 << 30;
/// Events read at once.
const BATCH: usize = 32;
/// How often it is written out.
const FLUSH_EVERY: Duration = Duration::from_secs(1);
/// Numbers that JSON readers take as they are have so many bits.
const NUMBER_BITS: u32 = 53;

/// Where it is written, and by which keys files are named.
#[derive(Debug)]
pub struct Recording {
    file: File,
    keys: RandomState,
}

impl Recording {
    /// Begins a trace in a new file that only root reads. One that is there goes; a driver that still runs keeps that.
    pub fn begin(path: &Path) -> anyhow::Result<Self> {
        let name = || format!("{}: nothing can be recorded", path.display());
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(name);
            }
            _ => (),
        }
        let mut options = OpenOptions::new();
        let mut file =
            options.write(true).create_new(true).mode(0o600).open(path).with_context(name)?;
        let began = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let head = serde_json::json!({ "seawall_trace": 1, "began": began.as_secs() });
        writeln!(file, "{head}").with_context(name)?;
        Ok(Self { file, keys: RandomState::new() })
    }

    /// For a worker.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { file: self.file.try_clone()?, keys: self.keys.clone() })
    }

    fn number(&self, look: &Look) -> u64 {
        let identity = &look.identity;
        self.keys.hash_one((identity.device, identity.inode)) >> (u64::BITS - NUMBER_BITS)
    }
}

/// Records for ever, or until there is no room. Nobody waits for it.
pub fn keep(driver: &Driver, recording: Recording) {
    let Some(group) = &driver.groups.record else { return };
    let len = recording.file.metadata().map_or(0, |metadata| metadata.len());
    let Ok(file) = recording.file.try_clone() else { return };
    let mut out = Out { to: BufWriter::new(file), len, lines: String::new(), failed: None };
    let mut flushed = Instant::now();
    while out.failed.is_none() {
        if flushed.elapsed() >= FLUSH_EVERY {
            out.flush();
            flushed = Instant::now();
        }
        let read = group.read(BATCH, |event| out.take(driver, &recording, &event));
        // No file is open any more: a disk that stands still keeps none of them busy.
        out.write();
        match read {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // What there is stands in the file by the time that somebody looks.
                out.flush();
                wait_readable(group);
            }
            // A file that cannot be opened for us: as if it had not been.
            _ => (),
        }
    }
    out.flush();
    // Else its queue would keep file systems busy.
    let flushed = group.flush_filesystems();
    let why = out.failed.unwrap_or_default();
    tracing::warn!(why, ?flushed, "recording has ended");
    loop {
        wait_readable(group);
        let _rest = group.read(BATCH, drop);
    }
}

struct Out {
    to: BufWriter<File>,
    len: u64,
    /// Whole ones that are not written yet.
    lines: String,
    failed: Option<String>,
}

impl Out {
    fn take(&mut self, driver: &Driver, recording: &Recording, event: &Event) {
        if [driver.worker, driver.supervisor].contains(&event.pid) {
            return;
        }
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let now_us = now.tv_sec * 1_000_000 + now.tv_nsec / 1_000;
        let (file, size) = match event.fd.as_ref().map(Look::at) {
            Some(Ok(look)) if look.is_regular => (recording.number(&look), look.identity.size),
            None if event.kind == EventKind::Overflow => (0, 0),
            _ => return,
        };
        let kinds: &[&str] = match event.kind {
            EventKind::Opened => &["open"],
            EventKind::CloseWrite => &["write"],
            EventKind::OpenedAndWritten => &["open", "write"],
            _ => &["lost"],
        };
        for kind in kinds {
            self.lines += &serde_json::json!([now_us, kind, file, size, event.pid]).to_string();
            self.lines.push('\n');
        }
    }

    fn write(&mut self) {
        self.len += self.lines.len() as u64;
        if self.len > LEN_MAX {
            self.failed = Some("the trace is as long as may be".into());
        } else if let Err(error) = self.to.write_all(self.lines.as_bytes()) {
            self.failed = Some(error.to_string());
        }
        self.lines.clear();
    }

    fn flush(&mut self) {
        if let Err(error) = self.to.flush() {
            self.failed.get_or_insert(error.to_string());
        }
    }
}
