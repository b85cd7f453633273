//! Engines in C under a real handle: the one of the guide, and one that misbehaves.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::Write;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use common::{Engine, LONG, compile, start};
use seawall_engine::host::{EngineState, Outcome, ScanError, SharedContent};
use seawall_engine::{Cleaning, Detection, Level, Severity};

fn fault(mode: &str) -> Engine {
    start(&compile("tests/fault.c"), &[mode])
}

fn ready() -> Engine {
    fault("").ready()
}

/// The guide's engine with a word of its own.
struct Word {
    file: tempfile::NamedTempFile,
    program: PathBuf,
}

impl Word {
    fn new(word: &[u8]) -> Self {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(word).unwrap();
        Self { file, program: compile("examples/word.c") }
    }

    fn start(&self) -> Engine {
        start(&self.program, &[self.file.path().to_str().unwrap()])
    }
}

#[test]
fn the_word_is_found_with_its_offset_and_all_else_is_clean() {
    let engine = Word::new(b"evil\n").start().ready();
    let report = engine.scan(b"some evil words");
    let found = Detection { offset: Some(5), ..Detection::new("Word") };
    assert_eq!(report.result, Ok(Outcome::Infected(vec![found])));
    assert_eq!(report.generation, engine.handle.generation());
    for clean in [&b"some words"[..], b"", b"evi", b"evi l"] {
        assert_eq!(engine.scan(clean).result, Ok(Outcome::Clean));
    }
    let at_the_end = [vec![b'.'; 200_000], b"evil".to_vec()].concat();
    let Ok(Outcome::Infected(found)) = engine.scan(&at_the_end).result else { panic!() };
    assert_eq!(found[0].offset, Some(200_000));
}

#[test]
fn another_word_is_another_generation() {
    let generation = |word| Word::new(word).start().ready().handle.generation().unwrap();
    let evil = generation(b"evil");
    assert_eq!(generation(b"evil\nthe rest is not read"), evil);
    assert_ne!(generation(b"evils"), evil);
    // Not one number in 32 bytes of zeros.
    assert!(evil.0.iter().filter(|byte| **byte != 0).count() > 16, "{evil}");
}

#[test]
fn a_refused_load_shows_its_reason() {
    let program = compile("examples/word.c");
    let missing = start(&program, &["/nonexistent"]).refusal();
    assert_eq!(missing, ["/nonexistent: error[word-file]: cannot open it"]);
    let none = start(&program, &[]).refusal();
    assert_eq!(none, ["error[word-file]: give the file with the word as argument"]);
    let told = fault("refuses").refusal();
    let reason = "/etc/licence:3:1: error[e]: no licen\u{fffd}se";
    assert_eq!(told, ["warning[w]: odd", reason]);
    let silent = fault("refuses-silently").refusal();
    assert_eq!(silent, ["error[engine-load]: load failed and says not why"]);
}

#[test]
fn a_description_needs_name_generation_and_scanner() {
    assert_eq!(fault("nameless").refusal(), ["error[engine-load]: load has set no name"]);
    assert_eq!(
        fault("no-generation").refusal(),
        ["error[engine-load]: load has set no generation"]
    );
    let scannerless = fault("scannerless").refusal();
    assert_eq!(scannerless, ["error[engine-scanner]: scanner_new returned NULL"]);
}

#[test]
fn a_description_arrives() {
    let engine = fault("half").ready();
    let EngineState::Ready { description } = engine.handle.state() else { panic!() };
    assert_eq!((&*description.name, &*description.version), ("fault\u{fffd}", ""));
    assert_eq!(description.generation.0, [7; 32]);
    assert!(description.by_name);
    // Two threads, not strict, 256 MiB.
    assert_eq!(description.rules, 2056);
    let half = description.diagnostics.last().unwrap();
    assert_eq!((half.level, &*half.code), (Level::Error, "half"));
}

#[test]
fn a_table_that_is_not_ours_is_refused_by_name() {
    for (mode, reason) in [
        ("abi", "the engine is made for version 2 of the C interface, this library has 1"),
        ("short", "set it to sizeof(struct seawall_engine)"),
        ("huge", "struct_size is 4294967295"),
        ("newer", "callbacks behind byte 48"),
        ("scanless", "load and scan must not be NULL"),
        ("null", "got NULL instead of a table"),
    ] {
        let told = fault(mode).refusal();
        assert!(told[0].starts_with("error[engine-abi]") && told[0].contains(reason), "{told:?}");
    }
}

#[test]
fn a_longer_table_with_nothing_new_in_it_is_accepted() {
    assert_eq!(fault("longer").ready().scan(b"").result, Ok(Outcome::Clean));
}

#[test]
fn metadata_arrives() {
    let content = b"metadata\n";
    assert_eq!(
        ready().told(content),
        format!("/tmp/\u{fffd}|6|g1|1|4711|{}|{}", content.len(), LONG.as_millis())
    );
}

#[test]
fn content_is_read_by_offset() {
    // "reads\n.z": four from 1, two at the end, none behind it.
    assert_eq!(ready().told(b"reads\n.z"), "4 2 e.zs 0 0 -1");
}

#[test]
fn a_detection_tells_all_that_is_known() {
    let Ok(Outcome::Infected(found)) = ready().scan(b"details").result else { panic!() };
    assert_eq!(found.len(), 64);
    let first = Detection {
        name: "first\u{fffd}".into(),
        severity: Severity::Critical,
        family: Some("family".into()),
        offset: Some(u64::MAX),
        cleaning: Some(Cleaning::Cut { offset: 4, length: 5 }),
        member: None,
    };
    let second = Detection { cleaning: Some(Cleaning::Delete), ..Detection::new("") };
    let third = Detection { severity: Severity::Low, ..Detection::new("third") };
    assert_eq!(found[..3], [first, second, third]);
    assert_eq!(found[63].family.as_deref(), Some("m"));
}

#[test]
fn every_result_arrives_and_a_contradiction_is_never_clean() {
    let engine = ready();
    let allowed = Outcome::Allowed { name: "good.txt:3".into() };
    assert_eq!(engine.scan(b"allowed").result, Ok(allowed));
    assert_eq!(engine.scan(b"time").result, Err(ScanError::TimedOut));
    let slow = ScanError::TimedOutIn { what: "rule_x".into() };
    assert_eq!(engine.scan(b"slow").result, Err(slow));
    for (order, reason) in [
        ("error", "asked to\u{fffd}"),
        ("allowed-bare", "it says allowed and names no entry of a list"),
        ("infected-bare", "it says infected and names no detection"),
        ("clean-but", "it names a detection and does not say infected"),
        ("no-result", "scan returned 99, which is no result"),
    ] {
        let failed = ScanError::Failed { reason: reason.into() };
        assert_eq!(engine.scan(order.as_bytes()).result, Err(failed), "{order}");
    }
}

#[test]
fn content_that_cannot_be_read_is_never_clean() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"unread\n").unwrap();
    // Longer than the file, as one that was truncated meanwhile.
    let content = SharedContent::from_spool(file, 100).unwrap();
    let report = ready().send(content).1.recv_timeout(LONG).unwrap();
    let reason = "the content ended after 7 of 100 bytes".into();
    assert_eq!(report.result, Err(ScanError::Failed { reason }));
}

#[test]
fn null_is_nothing_in_every_function() {
    assert_eq!(ready().scan(b"nulls").result, Ok(Outcome::Clean));
}

#[test]
fn a_cancelled_scan_ends_where_it_is() {
    let engine = ready();
    let (id, reply) = engine.send(SharedContent::new(b"until-cancelled").unwrap());
    engine.wait_in_flight();
    assert!(reply.recv_timeout(Duration::from_millis(50)).is_err(), "nobody cancelled it");
    engine.handle.cancel(id);
    assert_eq!(reply.recv_timeout(LONG).unwrap().result, Err(ScanError::Cancelled));
    assert_eq!(engine.handle.status().restarts, 0);
}

#[test]
fn a_crash_costs_that_scan_alone() {
    let engine = ready();
    let (_, crash) = engine.send(SharedContent::new(b"crash").unwrap());
    let beside: Vec<_> =
        (0..10).map(|_| engine.send(SharedContent::new(b"good").unwrap()).1).collect();
    assert_eq!(crash.recv_timeout(LONG).unwrap().result, Err(ScanError::KilledTwice));
    for reply in beside {
        assert_eq!(reply.recv_timeout(LONG).unwrap().result, Ok(Outcome::Clean));
    }
    assert_eq!(engine.scan(b"good").result, Ok(Outcome::Clean));
    assert_eq!(engine.handle.status().restarts, 2);
}

#[test]
fn after_load_nothing_outside_can_be_reached_and_no_new_code_runs() {
    let told = ready().told(b"escape");
    let calls =
        "open socket fork kill ptrace process_vm_readv process_vm_writev pidfd_open mmap mprotect";
    // Landlock says EACCES, the filter, which comes first, EPERM.
    let refused: String = calls.split(' ').map(|call| format!("{call} EPERM, ")).collect();
    assert_eq!(told, refused + "dlopen NULL");
}

#[test]
fn started_by_hand_it_says_what_it_is_for() {
    let output = Command::new(compile("tests/fault.c")).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("an engine is started by the service"), "{text}");
}
