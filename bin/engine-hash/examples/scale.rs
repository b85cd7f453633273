//! What ten million entries cost: `cargo run --release -p seawall-engine-hash --example scale`.
//!
//! Makes lists of all formats in a temporary folder (set TMPDIR to a disk with 2 GiB free), compiles
//! them, loads them here and in an engine process, and asks. The engine's program has to lie
//! in target/release: build the package first. The number of entries may be given.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::hint::black_box;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use seawall_engine::host::{EngineConfig, EngineHandle};
use seawall_engine_hash::digest::{Digest, Kind};
use seawall_engine_hash::lists::{self, Lists};

/// Lookups that are measured.
const ASKED: u64 = 2_000_000;

fn main() {
    let entries = std::env::args().nth(1).map_or(10_000_000, |word| word.parse().unwrap());
    let (sources, compiled) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write(sources.path(), entries);
    println!("entries            {entries}");
    println!("lists              {} MiB", size(sources.path()) >> 20);

    let since = Instant::now();
    let (count, _) = lists::compile(sources.path(), &compiled.path().join("all.swhash")).unwrap();
    println!("compile            {:.2} s", since.elapsed().as_secs_f64());
    println!("compiled           {} MiB", size(compiled.path()) >> 20);
    assert_eq!(count, entries);

    engines(compiled.path(), entries);

    let since = Instant::now();
    let loaded = Lists::load(compiled.path(), true).unwrap();
    println!("load, in process   {:.2} s", since.elapsed().as_secs_f64());
    // Digests that are in no list, and ones that are.
    ask("miss", &loaded, entries.., 0);
    ask("hit", &loaded, (0..).map(|at: u64| at.wrapping_mul(7919) % entries), 1);

    let since = Instant::now();
    drop(Lists::load(sources.path(), true).unwrap());
    println!("load, not compiled {:.2} s", since.elapsed().as_secs_f64());
    let (ready, memory) = engine(sources.path());
    println!("engine, not comp.  {:.2} s, then {memory} KiB private", ready.as_secs_f64());
}

/// Entry number `at`: two fifths SHA-256, the others in halves.
fn made(at: u64) -> Digest {
    let kind = match at % 5 {
        0 | 1 => Kind::Sha256,
        2 => Kind::Md5,
        3 => Kind::Sha1,
        _ if at.is_multiple_of(2) => Kind::Md5,
        _ => Kind::Sha1,
    };
    let bytes = blake3::hash(&at.to_le_bytes());
    Digest::new(kind, &bytes.as_bytes()[..kind.length()]).unwrap()
}

/// Of each ten entries: named, without a name, with a size, with columns, allowed.
fn write(folder: &Path, entries: u64) {
    let open = |name| BufWriter::new(File::create(folder.join(name)).unwrap());
    let (mut named, mut plain, mut clam) = (open("a.txt"), open("b.txt"), open("c.hsb"));
    let (mut columns, mut allowed) = (open("d.csv"), open("allow.txt"));
    writeln!(columns, "md5,sha1,sha256,name,family,severity").unwrap();
    for at in 0..entries {
        let digest = made(at);
        match at / 5 % 10 {
            0..3 => writeln!(named, "{digest}  Trojan.Win32.Agent-{at}"),
            3..5 => writeln!(plain, "{digest}"),
            5..8 => writeln!(clam, "{digest}:{}:Win.Malware.Generic-{at}-0", 100 + at % 300_000),
            8 => {
                let mut cells = ["", "", ""];
                let text = digest.to_string();
                cells[digest.kind() as usize] = &text;
                let [md5, sha1, sha256] = cells;
                writeln!(columns, "{md5},{sha1},{sha256},Evil-{at},Agent,critical")
            }
            _ => writeln!(allowed, "{digest}"),
        }
        .unwrap();
    }
    for mut file in [named, plain, clam, columns, allowed] {
        file.flush().unwrap();
    }
}

fn size(folder: &Path) -> u64 {
    fs::read_dir(folder).unwrap().map(|one| one.unwrap().metadata().unwrap().len()).sum()
}

/// What an engine process with these lists takes, above one with a single entry.
fn engines(compiled: &Path, entries: u64) {
    let one = tempfile::tempdir().unwrap();
    fs::write(one.path().join("one.sha256"), made(0).to_string()).unwrap();
    let (_, small) = engine(one.path());
    let (ready, large) = engine(compiled);
    println!("engine ready after {:.2} s", ready.as_secs_f64());
    println!("engine's memory    {} KiB private, {small} KiB with one entry", large);
    let bytes = (large - small) as f64 * 1024.0 / entries as f64;
    println!("per entry          {bytes:.2} bytes");
}

/// Time until an engine is ready, and its private memory in KiB.
fn engine(folder: &Path) -> (Duration, u64) {
    let program = std::env::current_exe().unwrap();
    let program = program.parent().unwrap().parent().unwrap().join("seawall-engine-hash");
    let command = [&program, Path::new("--lists"), folder].map(|word| word.display().to_string());
    let since = Instant::now();
    let config = EngineConfig::new("hash", command.to_vec());
    let handle = EngineHandle::start(config, |_| ()).unwrap();
    assert!(handle.wait_ready(Duration::from_secs(120)), "{:?}", handle.state());
    let ready = since.elapsed();
    let pid = handle.status().pid.unwrap();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    (ready, line.split_whitespace().nth(1).unwrap().parse().unwrap())
}

fn ask(what: &str, lists: &Lists, numbers: impl Iterator<Item = u64>, hits: usize) {
    let digests: Vec<(Digest, u64)> =
        numbers.take(ASKED as usize).map(|at| (made(at), 100 + at % 300_000)).collect();
    let since = Instant::now();
    for (digest, size) in &digests {
        let found = lists.find(std::slice::from_ref(digest), *size).unwrap();
        assert_eq!(black_box(found).len(), hits);
    }
    let each = since.elapsed().as_nanos() as f64 / ASKED as f64;
    println!("lookup, {what:<10} {each:.0} ns");
}
