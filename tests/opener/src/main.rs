//! Makes load and trouble in a guest, for the end-to-end tests; static, since a guest may have no libc.
//!
//! | command | does |
//! |---|---|
//! | `load DIR THREADS SECONDS` | writes and opens one new file after another, `good…` and `evil…` |
//! | `burst DIR` | opens all files of a folder at once, each in a thread of its own |
//! | `each DIR` | opens all files of a folder, one after the other |
//! | `exhaust FILE` | opens a file until this process may open no more |
//! | `hoard FILE COUNT` | opens a file so often, and holds them until its input ends |
//! | `fuse DIR` | mounts a file system there whose server never answers an open |
//! | `dress FILE` | gives a file an owner, a mode, an ACL, an extended attribute and times |
//! | `fixed FILE` | makes a file of its input that is immutable from the start |
//! | `unfixed FILE` | what chattr(1) does with `-i` |
//! | `describe FILE` | tells what a file has besides its content |
//! | `squat SECONDS` | takes the driver's port on the host with connections that say nothing or garbage |
//!
//! What makes a file infected comes on standard input. Results are JSON on standard output; waits are
//! measured here, by the guest's monotonic clock.

mod dress;
mod fuse;
mod load;
mod squat;

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::process::{Resource, Rlimit, setrlimit};
use serde_json::json;

fn main() -> anyhow::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["load", folder, threads, seconds] => {
            let length = Duration::from_secs(seconds.parse()?);
            load::run(Path::new(folder), threads.parse()?, length, &input()?)?
        }
        ["burst", folder] => load::burst(Path::new(folder))?,
        ["each", folder] => load::each(Path::new(folder))?,
        ["exhaust", file] => exhaust(Path::new(file))?,
        ["hoard", file, count] => hoard(Path::new(file), count.parse()?)?,
        ["dress", file] => dress::dress(Path::new(file))?,
        ["fixed", file] => dress::fixed(Path::new(file), &input()?)?,
        ["unfixed", file] => dress::unfixed(Path::new(file))?,
        ["describe", file] => dress::describe(Path::new(file))?,
        ["fuse", folder] => return fuse::serve(Path::new(folder)),
        ["squat", seconds] => squat::run(Duration::from_secs(seconds.parse()?)),
        _ => bail!("usage: see the source"),
    };
    println!("{result}");
    Ok(())
}

fn input() -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::io::stdin().read_to_end(&mut bytes).context("standard input")?;
    Ok(bytes)
}

/// Opens a file as often as `count` allows; says how often, and why not once more.
fn open_many(file: &Path, count: usize) -> (Vec<File>, Option<i32>) {
    let mut files = Vec::new();
    while files.len() < count {
        match File::open(file) {
            Ok(file) => files.push(file),
            Err(error) => return (files, error.raw_os_error()),
        }
    }
    (files, None)
}

fn exhaust(file: &Path) -> anyhow::Result<serde_json::Value> {
    let limit = Rlimit { current: Some(64), maximum: Some(64) };
    setrlimit(Resource::Nofile, limit).context("the limit cannot be set")?;
    let start = Instant::now();
    let (files, errno) = open_many(file, 1000);
    let opened = files.len();
    drop(files);
    let again = File::open(file).is_ok();
    Ok(json!({ "opened": opened, "errno": errno, "again": again, "ms": ms(start) }))
}

fn hoard(file: &Path, count: usize) -> anyhow::Result<serde_json::Value> {
    let limit = Rlimit { current: Some(count as u64 + 16), maximum: Some(count as u64 + 16) };
    setrlimit(Resource::Nofile, limit).context("the limit cannot be set")?;
    let (files, errno) = open_many(file, count);
    println!("{}", json!({ "opened": files.len(), "errno": errno }));
    input()?;
    Ok(json!({ "held": files.len() }))
}

fn ms(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}
