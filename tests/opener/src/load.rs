//! Opens files and says what became of each.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::io::Errno;
use serde_json::{Value, json};

use crate::ms;

/// Between two files of one thread: the load is to be there, not to take the whole machine.
const PAUSE: Duration = Duration::from_millis(10);

/// What became of an open.
enum Got {
    Content(Vec<u8>),
    Denied,
    Else(io::Error),
}

/// Opens and reads; the time is that of the open.
fn open(path: &Path) -> (Got, u64) {
    let start = Instant::now();
    let opened = File::open(path);
    let took = ms(start);
    let mut content = Vec::new();
    let got = match opened.and_then(|mut file| file.read_to_end(&mut content)) {
        Ok(_) => Got::Content(content),
        Err(error) if Errno::from_io_error(&error) == Some(Errno::PERM) => Got::Denied,
        Err(error) => Got::Else(error),
    };
    (got, took)
}

#[derive(Default)]
struct Tally {
    opens: u64,
    evil_read: u64,
    evil_denied: u64,
    good_read: u64,
    good_denied: u64,
    create_denied: u64,
    /// Read, but not what stands in the file.
    wrong: u64,
    longest_ms: u64,
    longest: String,
    errors: Vec<String>,
}

impl Tally {
    fn took(&mut self, what: &str, took_ms: u64) {
        if took_ms >= self.longest_ms {
            (self.longest_ms, self.longest) = (took_ms, what.to_owned());
        }
    }

    fn error(&mut self, what: &str, error: &io::Error) {
        if self.errors.len() < 10 {
            self.errors.push(format!("{what}: {error}"));
        }
    }

    fn add(&mut self, other: Self) {
        self.opens += other.opens;
        self.evil_read += other.evil_read;
        self.evil_denied += other.evil_denied;
        self.good_read += other.good_read;
        self.good_denied += other.good_denied;
        self.create_denied += other.create_denied;
        self.wrong += other.wrong;
        self.took(&other.longest, other.longest_ms);
        self.errors.extend(other.errors);
    }
}

/// Until the time is over each thread writes a file whose content nobody has seen, opens it, and
/// removes it, unless it is infected and was let through: then it stays, for its scan.
pub fn run(folder: &Path, threads: u32, length: Duration, evil: &[u8]) -> anyhow::Result<Value> {
    ensure!(!evil.is_empty(), "standard input does not say what is infected");
    fs::create_dir_all(folder)?;
    let until = Instant::now() + length;
    // Content differs from run to run too.
    let run = std::time::SystemTime::now();
    let mut tally = Tally::default();
    thread::scope(|scope| {
        let work = |thread: u32| {
            let mut tally = Tally::default();
            let mut number = 0;
            while Instant::now() < until {
                number += 1;
                let name = if number % 2 == 0 { "good" } else { "evil" };
                let name = format!("{name}-{thread}-{number}");
                let mut content = format!("{name} {run:?}\n").into_bytes();
                if number % 2 != 0 {
                    content.extend_from_slice(evil);
                }
                one(&mut tally, &folder.join(&name), &name, &content);
                thread::sleep(PAUSE);
            }
            tally
        };
        let threads: Vec<_> = (0..threads).map(|n| scope.spawn(move || work(n))).collect();
        for thread in threads {
            match thread.join() {
                Ok(part) => tally.add(part),
                Err(_) => tally.errors.push("a thread panicked".into()),
            }
        }
    });
    Ok(json!({
        "opens": tally.opens,
        "evil_read": tally.evil_read,
        "evil_denied": tally.evil_denied,
        "good_read": tally.good_read,
        "good_denied": tally.good_denied,
        "create_denied": tally.create_denied,
        "wrong": tally.wrong,
        "longest_ms": tally.longest_ms,
        "longest": tally.longest,
        "errors": tally.errors,
    }))
}

fn one(tally: &mut Tally, path: &Path, name: &str, content: &[u8]) {
    let start = Instant::now();
    let written = File::create(path).map(|file| (file, ms(start)));
    let written = written.and_then(|(mut file, took)| file.write_all(content).map(|()| took));
    match written {
        Ok(took) => tally.took(&format!("create {name}"), took),
        // The open that makes a file is held like any other. The file is there then, and empty.
        Err(error) if error.raw_os_error() == Some(1) => {
            tally.create_denied += 1;
            let _there = fs::remove_file(path);
            return;
        }
        Err(error) => return tally.error(&format!("create {name}"), &error),
    }
    let (got, took) = open(path);
    tally.opens += 1;
    tally.took(name, took);
    let is_evil = name.starts_with("evil");
    let mut keep = false;
    match (got, is_evil) {
        (Got::Content(read), _) if read != content => tally.wrong += 1,
        (Got::Content(_), true) => {
            tally.evil_read += 1;
            keep = true;
        }
        (Got::Content(_), false) => tally.good_read += 1,
        (Got::Denied, true) => tally.evil_denied += 1,
        (Got::Denied, false) => tally.good_denied += 1,
        (Got::Else(error), _) => tally.error(name, &error),
    }
    if !keep && let Err(error) = fs::remove_file(path) {
        tally.error(&format!("remove {name}"), &error);
    }
}

fn files_of(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    Ok(paths)
}

fn describe(path: &Path, order: u64) -> Value {
    let (got, took) = open(path);
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let got = match got {
        Got::Content(content) if content.starts_with(b"evil") => "evil".into(),
        Got::Content(_) => "good".into(),
        Got::Denied => "denied".into(),
        Got::Else(error) => error.to_string(),
    };
    json!({ "name": name, "got": got, "ms": took, "order": order })
}

/// Opens all files of a folder, one after the other.
pub fn each(folder: &Path) -> anyhow::Result<Value> {
    let paths = files_of(folder)?;
    Ok(paths.iter().zip(0..).map(|(path, order)| describe(path, order)).collect())
}

/// Opens all files of a folder at once. `order` counts them as they come back.
pub fn burst(folder: &Path) -> anyhow::Result<Value> {
    let paths = files_of(folder)?;
    let (all, done) = (Barrier::new(paths.len()), AtomicU64::new(0));
    let results = thread::scope(|scope| {
        let open_one = |path: &Path| {
            all.wait();
            let mut result = describe(path, 0);
            result["order"] = done.fetch_add(1, Ordering::Relaxed).into();
            result
        };
        let threads: Vec<_> =
            paths.iter().map(|path| scope.spawn(move || open_one(path))).collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).collect::<Vec<_>>()
    });
    ensure!(results.len() == paths.len(), "a thread panicked");
    Ok(Value::Array(results))
}
