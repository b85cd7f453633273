//! `memory`: what protecting guests takes beside a clamd in each, with signatures of the official size, and what a service
//! takes that remembers a million verdicts.
//!
//! Native drivers share their program's pages, which guests do not. So one driver is measured alone and counts once for
//! each guest.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};

use crate::cpu;
use crate::engines::clamav::Clamd;
use crate::engines::database;
use crate::engines::made::content;
use crate::engines::report::Results;
use crate::engines::rounds::{Goal, Row};
use crate::fleet::{Engine, Host, memory_of_all};
use crate::html::{Axis, Line, Plot};
use crate::machine;
use crate::outputs::Outputs;
use crate::stage::{self, SHARED_MEMORY, Stage};
use crate::watchdog::{clear, start as start_watchdog, step};

const NAME: &str = "memory";
/// Commands that a session may have under way.
const AT_ONCE: u64 = 8;
const SESSIONS: u64 = 4;
/// All of a million but what a cache that is full has thrown out.
const REMEMBERED: f64 = 0.98;
/// A cache of fewer places than this throws more out.
const FEW: u64 = 100_000;

/// How much is measured.
struct Amounts {
    signatures: u64,
    guests: [usize; 3],
    verdicts: u64,
}

/// One guest comes first: its driver is measured.
const FULL: Amounts =
    Amounts { signatures: database::OFFICIAL, guests: [1, 4, 16], verdicts: 1_000_000 };
const QUICK: Amounts = Amounts { signatures: 2_000, guests: [1, 2, 3], verdicts: 2_000 };

/// Measures and reports, as the first process of new namespaces.
pub fn run(quick: bool, outputs: &Outputs) -> anyhow::Result<ExitCode> {
    stage::settle_in()?;
    start_watchdog();
    let load_before = machine::load();
    let amounts = if quick { QUICK } else { FULL };
    let base = Path::new(SHARED_MEMORY).join(NAME);
    fs::create_dir_all(&base)?;
    let mut rows = vec![verdicts(&base, amounts.verdicts)?];
    let (more, plot) = beside_clamd(&base, &amounts)?;
    rows.extend(more);
    clear();
    let notes = vec![format!(
        "{NAME}: {} made signatures; PSS, without regions of 16 MiB a guest (resident memory where verdicts are counted); one \
         driver, with threads as on this machine's CPUs, was measured and counts for each guest",
        amounts.signatures
    )];
    let results = Results::new(quick, load_before, rows, vec![plot], notes, Vec::new());
    println!("{}", results.to_text());
    outputs.keep(&results.to_json()?, &results.file_name().replace("engines", NAME), quick)?;
    Ok(ExitCode::SUCCESS)
}

fn mib(kib: u64) -> f64 {
    (kib as f64 / 1024.0 * 100.0).round() / 100.0
}

/// A service with its engine for guests, and the clamd that each of them would have.
fn beside_clamd(base: &Path, amounts: &Amounts) -> anyhow::Result<(Vec<Row>, Plot)> {
    step("signatures");
    let database = base.join("database");
    database::write(&database, amounts.signatures)?;
    let most = amounts.guests.into_iter().max().unwrap_or(1);
    let mut stages = Vec::new();
    for guest in 0..most {
        let stage = Stage::mount(&format!("memory-{guest}"), 1 << 20)?;
        fs::write(stage.folder.join("file"), content(16 << 10, 5))?;
        stage.sync()?;
        stages.push(stage);
    }
    let engine = Engine::ClamAv { database };
    let (mut rows, mut ours) = (Vec::new(), Vec::new());
    let (mut driver, mut settings) = (None, String::new());
    for count in amounts.guests {
        step(format!("{count} guests"));
        let folders: Vec<_> = stages[..count].iter().map(|stage| stage.folder.as_path()).collect();
        let host = Host::start(&base.join("host"), &engine, "", &folders)?;
        for folder in folders {
            fs::read(folder.join("file"))?;
        }
        settings = host.clamd_settings()?;
        let [drivers, service] = host.processes()?;
        let driver = *driver.get_or_insert_with(|| cpu::memory_kib(&drivers));
        let kib = cpu::memory_kib(&service) + driver * count as u64;
        rows.push(Row::single(NAME, format!("memory of Seawall, {count} guests"), "MiB", mib(kib)));
        ours.push((count, kib));
        drop(host);
        fs::remove_dir_all(base.join("host"))?;
    }
    let plain = driver.filter(|kib| *kib > 0).context("a driver's memory cannot be read")?;
    rows.push(
        Row::single(NAME, "driver and supervisor, plain", "MiB", mib(plain)).aim(Goal::AtMost(2.0)),
    );
    step("a clamd of the guest's own");
    let clamd = Clamd::start(&base.join("peer"), &settings)?;
    let own = memory_of_all();
    drop(clamd);
    rows.push(Row::single(NAME, "memory of a clamd in one guest", "MiB", mib(own)));
    for (count, kib) in &ours {
        let name = format!("memory of Seawall over a clamd in each, {count} guests");
        let row = Row::single(NAME, name, "x", *kib as f64 / (own * *count as u64) as f64);
        rows.push(if *count == 16 { row.aim(Goal::AtMost(0.1)) } else { row });
    }
    let line = |name: &str, of: &dyn Fn(usize, u64) -> u64| Line {
        name: name.into(),
        points: ours.iter().map(|(count, kib)| [*count as f64, mib(of(*count, *kib))]).collect(),
    };
    let plot = Plot {
        title: "Memory over guests".into(),
        says: format!(
            "{} signatures (ClamAV's official database has some {}). One clamd was measured and is multiplied by \
             the guests, since nothing is shared between them. Seawall's line is one service with one engine, and a \
             driver in each guest, without the regions that share content.",
            amounts.signatures,
            database::OFFICIAL
        ),
        x: Axis::linear("guests"),
        y: Axis::linear("MiB"),
        lines: vec![
            line("a clamd in each guest", &|count, _| own * count as u64),
            line("Seawall, one service", &|_, kib| kib),
        ],
    };
    Ok((rows, plot))
}

/// A service that remembers so many verdicts, without its engine.
fn verdicts(base: &Path, count: u64) -> anyhow::Result<Row> {
    let (rules, folder) = (base.join("rules"), base.join("verdicts"));
    fs::create_dir_all(&rules)?;
    fs::write(rules.join("never.yar"), "rule Never { condition: false }\n")?;
    let socket = folder.join("clamd");
    let config = format!(
        "[limits]\nverdict_cache_entries = {}\n[clamd]\nsocket = \"{}\"\n",
        count.max(FEW),
        socket.display()
    );
    step("a service");
    let host = Host::start(&folder, &Engine::Yara { rules }, &config, &[])?;
    step("verdicts");
    let part = count / SESSIONS;
    thread::scope(|scope| {
        let all: Vec<_> = (0..SESSIONS)
            .map(|session| {
                let range = session * part..(session + 1) * part;
                scope.spawn(|| scan_numbers(&socket, range))
            })
            .collect();
        all.into_iter()
            .try_for_each(|one| one.join().map_err(|_| anyhow::anyhow!("a session panicked"))?)
    })?;
    let status = host.ask(&["status"])?;
    let number = |of: &serde_json::Value, key: &str| {
        of[key].as_u64().with_context(|| format!("no {key} in the status"))
    };
    let remembered = number(&status, "cached_verdicts")?;
    ensure!(remembered as f64 >= count as f64 * REMEMBERED, "{remembered} are remembered");
    let resident = number(&status["resources"], "resident_kib")?;
    drop(host);
    fs::remove_dir_all(folder)?;
    let name = format!("service with {count} verdicts, without its engine");
    Ok(Row::single(NAME, name, "MiB", mib(resident)).aim(Goal::AtMost(170.0)))
}

/// Has contents of eight bytes scanned, a number in digits each (clamd(8), INSTREAM in a session).
fn scan_numbers(socket: &Path, numbers: std::ops::Range<u64>) -> anyhow::Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    stream.write_all(b"zIDSESSION\0")?;
    let (mut commands, mut answers) = (Vec::new(), [0; 4096]);
    let mut next = numbers.start;
    while next < numbers.end {
        let until = numbers.end.min(next + AT_ONCE);
        commands.clear();
        for number in next..until {
            // Text: a number as it is may begin like an archive.
            commands.extend_from_slice(b"zINSTREAM\0\0\0\0\x08");
            commands.extend_from_slice(format!("{number:08x}").as_bytes());
            commands.extend_from_slice(&[0; 4]);
        }
        stream.write_all(&commands)?;
        let mut left = until - next;
        while left > 0 {
            let read = stream.read(&mut answers)?;
            ensure!(read > 0, "the session was ended");
            let answers = &answers[..read];
            let text = String::from_utf8_lossy(answers);
            let failed = text.split('\0').find(|answer| answer.ends_with("ERROR"));
            ensure!(failed.is_none(), "a scan failed: {}", failed.unwrap_or_default());
            left -= answers.iter().filter(|byte| **byte == 0).count() as u64;
        }
        next = until;
        if next.is_multiple_of(AT_ONCE * 1000) {
            step(format!("verdicts: {next}"));
        }
    }
    stream.write_all(b"zEND\0")?;
    Ok(())
}
