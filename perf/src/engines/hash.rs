//! `engines-hash`: what ten million entries of hash lists cost.

use std::cell::RefCell;
use std::fs::{self, File};
use std::hint::black_box;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, ensure};
use seawall_engine_hash::digest::{Digest, Kind};
use seawall_engine_hash::lists::{self, Lists};

use super::Bench;
use super::api::Api;
use super::rounds::{Case, Goal, Row, measure};
use crate::watchdog::step;

const NAME: &str = "engines-hash";
const ENTRIES: u64 = 10_000_000;
/// Entries with `--quick`.
const FEW: u64 = 20_000;
/// Nanoseconds of a lookup that finds.
const HIT: f64 = 1000.0;
/// Bytes of memory for each entry.
const MEMORY: f64 = 24.0;

pub fn run(bench: &mut Bench) -> anyhow::Result<Vec<Row>> {
    let entries = if bench.quick { FEW } else { ENTRIES };
    let (sources, compiled) = (bench.folder("hash-lists"), bench.folder("hash-compiled"));
    fs::create_dir_all(&sources)?;
    fs::create_dir_all(&compiled)?;
    step(format!("{NAME}: writing {entries} entries"));
    write(&sources, entries)?;
    let row = |name: &str, unit, value| Row::single(NAME, name, unit, value);
    let mut rows = vec![row("lists", "MiB", mib(&sources)?)];

    step(format!("{NAME}: compiling"));
    let since = Instant::now();
    let (count, _) = lists::compile(&sources, &compiled.join("all.swhash"))
        .map_err(|found| anyhow::anyhow!("{found:?}"))?;
    rows.push(row("compiling them", "s", since.elapsed().as_secs_f64()));
    ensure!(count == entries, "{count} entries were compiled");
    fs::remove_dir_all(&sources)?;
    rows.push(row("compiled", "MiB", mib(&compiled)?));

    let one = bench.folder("hash-one");
    fs::create_dir_all(&one)?;
    fs::write(one.join("one.sha256"), made(0)?.to_string())?;
    let (_, small) = engine(bench, &one)?;
    let (ready, large) = engine(bench, &compiled)?;
    rows.push(row("engine, until ready", "s", ready));
    let each = (large.saturating_sub(small)) as f64 * 1024.0 / entries as f64;
    let goal = Goal::AtMost(MEMORY);
    rows.push(Row {
        goal: Some(goal),
        met: Some(each <= MEMORY),
        ..row("memory for each entry", "B", (each * 100.0).round() / 100.0)
    });

    let since = Instant::now();
    let loaded = Lists::load(&compiled, true).map_err(|found| anyhow::anyhow!("{found:?}"))?;
    rows.push(row("loading, in this process", "s", since.elapsed().as_secs_f64()));
    let asked = if bench.quick { 1000 } else { 500_000 };
    let misses = digests(entries..entries + asked)?;
    let hits = digests((0..asked).map(|at| at.wrapping_mul(7919) % entries))?;
    let lists = RefCell::new(loaded);
    let ask = |digests: &[(Digest, u64)], wanted: usize| {
        let lists = lists.borrow();
        let since = Instant::now();
        for (digest, size) in digests {
            let found = lists.find(std::slice::from_ref(digest), *size)?;
            ensure!(black_box(found).len() == wanted, "{digest} was not found as it should be");
        }
        Ok(since.elapsed().as_nanos() as f64 / digests.len() as f64)
    };
    let cases = vec![
        Case::new("lookup of what is in no list", "ns", || ask(&misses, 0)),
        Case::new("lookup of what is in a list", "ns", || ask(&hits, 1)).goal(Goal::AtMost(HIT)),
    ];
    rows.extend(measure(NAME, cases, bench.rounds, !bench.quick)?);
    fs::remove_dir_all(&compiled)?;
    bench.note(format!(
        "{NAME}: {entries} entries, two fifths SHA-256, the rest MD5 and SHA-1 in halves; each {asked} lookups, all \
         of other digests, the file in the page cache"
    ));
    Ok(rows)
}

/// Entry number `at`.
fn made(at: u64) -> anyhow::Result<Digest> {
    let kind = match at % 5 {
        0 | 1 => Kind::Sha256,
        2 => Kind::Md5,
        3 => Kind::Sha1,
        _ if at.is_multiple_of(2) => Kind::Md5,
        _ => Kind::Sha1,
    };
    let bytes = blake3::hash(&at.to_le_bytes());
    Digest::new(kind, &bytes.as_bytes()[..kind.length()]).context("a digest")
}

/// These entries' digests and sizes.
fn digests(numbers: impl Iterator<Item = u64>) -> anyhow::Result<Vec<(Digest, u64)>> {
    numbers.map(|at| Ok((made(at)?, 100 + at % 300_000))).collect()
}

/// Of each ten entries: named, without a name, with a size, with columns, allowed.
fn write(folder: &Path, entries: u64) -> anyhow::Result<()> {
    let open = |name| Ok::<_, std::io::Error>(BufWriter::new(File::create(folder.join(name))?));
    let (mut named, mut plain, mut clam) = (open("a.txt")?, open("b.txt")?, open("c.hsb")?);
    let (mut columns, mut allowed) = (open("d.csv")?, open("allow.txt")?);
    writeln!(columns, "md5,sha1,sha256,name,family,severity")?;
    for at in 0..entries {
        let digest = made(at)?;
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
        }?;
    }
    for mut file in [named, plain, clam, columns, allowed] {
        file.flush()?;
    }
    Ok(())
}

fn mib(folder: &Path) -> anyhow::Result<f64> {
    let sizes = fs::read_dir(folder)?.map(|one| Ok(one?.metadata()?.len()));
    Ok((sizes.sum::<std::io::Result<u64>>()? >> 20) as f64)
}

/// Seconds until an engine is ready, and its private memory in KiB.
fn engine(bench: &Bench, folder: &Path) -> anyhow::Result<(f64, u64)> {
    let program = bench.program("seawall-engine-hash")?;
    let command = [&program, Path::new("--lists"), folder].map(|word| word.display().to_string());
    let api = Api::start(command.to_vec(), 2, 2048)?;
    let status = fs::read_to_string(format!("/proc/{}/status", api.process()?.pid))?;
    let line = status.lines().find(|line| line.starts_with("RssAnon:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
    Ok((api.loading.as_secs_f64(), kib.context("no RssAnon")?))
}
