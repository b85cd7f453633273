//! The engine as the service runs it: a process, lists in a folder.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use seawall_engine::host::{
    EngineConfig, EngineHandle, EngineState, Lane, Metadata, Operation, Outcome, ScanError,
    ScanReport, Severity, SharedContent,
};
use seawall_engine::{ArchiveLimits, Cleaning, Description, Detection, Diagnostic};
use seawall_engine_hash::digest::{Digest, Hashers, Kind};
use seawall_engine_hash::lists::Lists;

const LONG: Duration = Duration::from_secs(60);
const PROGRAM: &str = env!("CARGO_BIN_EXE_seawall-engine-hash");

fn digest(kind: Kind, content: &[u8]) -> Digest {
    let mut hashers = Hashers::new(Kind::ALL.map(|one| one == kind));
    hashers.update(content);
    hashers.finish()[0]
}

fn md5(content: &[u8]) -> String {
    digest(Kind::Md5, content).to_string()
}

fn sha1(content: &[u8]) -> String {
    digest(Kind::Sha1, content).to_string()
}

fn sha256(content: &[u8]) -> String {
    digest(Kind::Sha256, content).to_string()
}

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        write(folder.path(), name, text);
    }
    folder
}

fn write(folder: &Path, name: &str, text: &str) {
    let path = folder.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn config(folder: &Path) -> EngineConfig {
    let command = vec![PROGRAM.to_owned(), "--lists".to_owned(), folder.display().to_string()];
    EngineConfig::new("hash", command)
}

fn handle(folder: &Path) -> EngineHandle {
    EngineHandle::start(config(folder), |state| eprintln!("{state:?}")).unwrap()
}

/// One that refuses what has an error; nobody waits for it yet.
fn start_strict(folder: &Path) -> EngineHandle {
    let config = EngineConfig { strict: true, ..config(folder) };
    EngineHandle::start(config, |state| eprintln!("{state:?}")).unwrap()
}

fn start(folder: &Path) -> EngineHandle {
    let handle = handle(folder);
    assert!(handle.wait_ready(LONG), "{:?}", handle.state());
    handle
}

fn description(engine: &EngineHandle) -> Description {
    match engine.state() {
        EngineState::Ready { description } => description,
        other => panic!("{other:?}"),
    }
}

fn metadata() -> Metadata {
    Metadata {
        path: Vec::new(),
        guest: "g1".into(),
        operation: Operation::Open,
        size: 0,
        archives: None,
    }
}

fn scan_fd(handle: &EngineHandle, content: SharedContent) -> Result<Outcome, ScanError> {
    let (tell, reply) = mpsc::channel();
    handle.scan(content, metadata(), Lane::OnAccess, LONG, move |report| drop(tell.send(report)));
    reply.recv_timeout(LONG).unwrap().result
}

fn scan(handle: &EngineHandle, content: &[u8]) -> Result<Outcome, ScanError> {
    scan_fd(handle, SharedContent::new(content).unwrap())
}

/// What was said, in a word.
fn said(handle: &EngineHandle, content: &[u8]) -> String {
    match scan(handle, content).unwrap() {
        Outcome::Clean => "clean".into(),
        Outcome::Infected(found) => {
            found.iter().map(|one| one.name.as_str()).collect::<Vec<_>>().join(" ")
        }
        Outcome::Allowed { name } => format!("allowed by {name}"),
    }
}

/// A tar of these members.
fn tar(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in members {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        builder.append_data(&mut header, name, *bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

#[test]
fn the_members_of_an_archive_are_looked_up_where_that_is_wanted_and_are_named() {
    let lists = folder(&[
        ("a.hdb", &format!("{}:4:Evil\n", md5(b"evil"))),
        ("allow.sha256", &sha256(b"good")),
    ]);
    let engine = start(lists.path());
    let limits = ArchiveLimits { depth: 4, members: 3, member: 1 << 20, unpacked: 4 << 20 };
    let judged = |content: &[u8], archives| {
        let (tell, reply) = mpsc::channel();
        let metadata = Metadata { archives, ..metadata() };
        let content = SharedContent::new(content).unwrap();
        engine.scan(content, metadata, Lane::OnDemand, LONG, move |report| {
            drop(tell.send(report));
        });
        reply.recv_timeout(LONG).unwrap().result
    };
    let archive = tar(&[("good", b"good"), ("bin/evil", b"evil")]);
    assert_eq!(judged(&archive, None), Ok(Outcome::Clean));
    match judged(&archive, Some(limits)).unwrap() {
        Outcome::Infected(found) => {
            let names: Vec<_> =
                found.iter().map(|one| (one.name.as_str(), one.member.as_deref())).collect();
            assert_eq!(names, [("Evil", Some("bin/evil"))]);
        }
        // One good member does not make the others good.
        other => panic!("{other:?}"),
    }
    let allowed = tar(&[("good", b"good"), ("other", b"other")]);
    assert_eq!(judged(&allowed, Some(limits)), Ok(Outcome::Clean));
}

#[test]
fn every_format_denies() {
    let sample = |number: u8| vec![number; 10 + usize::from(number)];
    let files = [
        ("a.md5", format!("# bad\n\n{}  Plain.A\n", md5(&sample(1)))),
        ("b.sha1", format!("{},Plain.B\r\n", sha1(&sample(2)))),
        ("sub/c.sha256", sha256(&sample(3)).to_uppercase()),
        ("d.txt", format!("\u{feff}{}\n{} Plain.D\n", md5(&sample(4)), sha256(&sample(5)))),
        ("e.hdb", format!("{}:16:Clam.E\n{}:*:Clam.F:73\n", md5(&sample(6)), md5(&sample(7)))),
        ("F.HSB", format!("{}:18:Clam.G\n{}:*:Clam.H:73\n", sha1(&sample(8)), sha256(&sample(9)))),
        ("g.csv", format!("name,SHA1,md5\nCsv.I,{},{}\n", sha1(&sample(10)), md5(&sample(11)))),
    ];
    let files: Vec<(&str, &str)> =
        files.iter().map(|(name, text)| (*name, text.as_str())).collect();
    let lists = folder(&files);
    let engine = start(lists.path());
    assert_eq!(description(&engine).diagnostics, []);
    assert_eq!((description(&engine).rules, description(&engine).name.as_str()), (11, "hash"));
    let unnamed = |kind, content: &[u8]| {
        let digest = digest(kind, content);
        format!("Hash.{kind}.{}", &digest.to_string()[..16])
    };
    for (number, name) in [
        (1, "Plain.A".to_owned()),
        (2, "Plain.B".into()),
        (3, unnamed(Kind::Sha256, &sample(3))),
        (4, unnamed(Kind::Md5, &sample(4))),
        (5, "Plain.D".into()),
        (6, "Clam.E".into()),
        (7, "Clam.F".into()),
        (8, "Clam.G".into()),
        (9, "Clam.H".into()),
        (10, "Csv.I".into()),
        (11, "Csv.I".into()),
        (12, "clean".into()),
    ] {
        assert_eq!(said(&engine, &sample(number)), name, "sample {number}");
        let mut other = sample(number);
        other[3] ^= 1;
        assert_eq!(said(&engine, &other), "clean", "sample {number}, changed");
        other[3] ^= 1;
        other.push(0);
        assert_eq!(said(&engine, &other), "clean", "sample {number}, longer");
    }
    assert_eq!(engine.status().restarts, 0);
}

#[test]
fn a_detection_says_all_that_is_known() {
    let text = format!("sha256,name,family,severity\n{},Evil,Fam,low\n", sha256(b"evil"));
    let engine = start(folder(&[("a.csv", &text)]).path());
    let detection = Detection {
        severity: Severity::Low,
        family: Some("Fam".into()),
        cleaning: Some(Cleaning::Delete),
        ..Detection::new("Evil")
    };
    assert_eq!(scan(&engine, b"evil"), Ok(Outcome::Infected(vec![detection])));
    let engine = start(folder(&[("a.txt", &format!("{} Evil", md5(b"evil")))]).path());
    let detection = Detection { cleaning: Some(Cleaning::Delete), ..Detection::new("Evil") };
    assert_eq!(scan(&engine, b"evil"), Ok(Outcome::Infected(vec![detection])));
}

#[test]
fn names_of_files_and_folders_tell_what_allows() {
    let line = |content: &str| format!("# one\n{}\n", sha256(content.as_bytes()));
    let lists = folder(&[
        ("a.fp", &format!("{}:1:Good.A\n", md5(b"a"))),
        ("b.sfp", &format!("{}:*:Good.B:73\n", sha256(b"b"))),
        ("allowed.sha256", &line("c")),
        ("Allow/deep/d.sha256", &line("d")),
        ("disallow.sha256", &line("e")),
        ("allowed/f.sha256", &line("f")),
        ("allow/g.csv", &format!("sha256,name\n{},Good.G\n", sha256(b"g"))),
    ]);
    let engine = start(lists.path());
    for (content, outcome) in [
        ("a", "allowed by Good.A"),
        ("b", "allowed by Good.B"),
        ("c", "allowed by allowed.sha256:2"),
        ("d", "allowed by Allow/deep/d.sha256:2"),
        ("g", "allowed by Good.G"),
        ("h", "clean"),
    ] {
        assert_eq!(said(&engine, content.as_bytes()), outcome);
    }
    for content in [b"e", b"f"] {
        assert!(said(&engine, content).starts_with("Hash.SHA256."));
    }
    let weak: Vec<Diagnostic> = description(&engine).diagnostics;
    assert_eq!((weak.len(), weak[0].code.as_str()), (1, "hash-weak"), "{weak:?}");
    // The folder of lists itself counts.
    let lists = folder(&[("allow/c.sha256", &line("c"))]);
    let engine = start(&lists.path().join("allow"));
    assert_eq!(said(&engine, b"c"), "allowed by c.sha256:2");
}

#[test]
fn what_one_list_allows_no_other_denies() {
    let lists = folder(&[
        ("bad.txt", &format!("{} Evil\n{} Evil\n", sha256(b"x"), md5(b"x"))),
        ("z.fp", &format!("{}:1:Good\n", md5(b"x"))),
    ]);
    assert_eq!(said(&start(lists.path()), b"x"), "allowed by Good");
    fs::remove_file(lists.path().join("z.fp")).unwrap();
    assert_eq!(said(&start(lists.path()), b"x"), "Evil");
    // Also when they are in two compiled files.
    let good = folder(&[("z.fp", &format!("{}:1:Good\n", md5(b"x")))]);
    let both = folder(&[]);
    assert_eq!(run_compile(lists.path(), &both.path().join("a.swhash")).1, 0);
    assert_eq!(run_compile(good.path(), &both.path().join("b.swhash")).1, 0);
    assert_eq!(said(&start(both.path()), b"x"), "allowed by Good");
}

#[test]
fn a_wrong_size_is_another_content() {
    let text = format!("{}:5:Wrong\n{}:4:Right\n", md5(b"evil"), md5(b"good"));
    let engine = start(folder(&[("a.hdb", &text)]).path());
    assert_eq!(said(&engine, b"evil"), "clean");
    assert_eq!(said(&engine, b"good"), "Right");
}

#[test]
fn large_and_empty_and_random_content_is_answered() {
    let large: Vec<u8> =
        (0..5 << 20).map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let text = format!("{} Large\n{} Nothing\n", sha256(&large), sha256(b""));
    let lists = folder(&[("a.txt", &text)]);
    let engine = start(lists.path());
    assert_eq!(said(&engine, &large), "Large");
    assert_eq!(said(&engine, &large[..1 << 20]), "clean");
    assert_eq!(said(&engine, b""), "clean", "an empty file can do no harm");
    assert!(description(&engine).diagnostics[0].reason.contains("empty file"));
    let mut file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut file, &large).unwrap();
    let spooled = SharedContent::from_spool(file, large.len() as u64).unwrap();
    assert!(matches!(scan_fd(&engine, spooled), Ok(Outcome::Infected(_))));
    assert_eq!(engine.status().restarts, 0);
}

/// Content that does not fit into the engine's memory is hashed as it is read.
#[test]
fn spooled_content_larger_than_the_memory_is_answered() {
    let content = vec![7; 96 << 20];
    let lists = folder(&[("a.txt", &format!("{} Large\n", sha256(&content)))]);
    let command = vec![PROGRAM.into(), "--lists".into(), lists.path().display().to_string()];
    let config = EngineConfig { memory_mib: 64, ..EngineConfig::new("hash", command) };
    let engine = EngineHandle::start(config, |_| ()).unwrap();
    assert!(engine.wait_ready(LONG), "{:?}", engine.state());
    let mut file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut file, &content).unwrap();
    let spooled = SharedContent::from_spool(file, content.len() as u64).unwrap();
    assert!(matches!(scan_fd(&engine, spooled), Ok(Outcome::Infected(_))));
    assert_eq!(engine.status().restarts, 0);
}

/// Both ways in which content is hashed, in place and as it is read, look for it.
#[test]
fn a_scan_ends_when_it_is_cancelled_or_late_and_the_process_stays() {
    let lists = folder(&[("a.txt", &format!("{}\n{}\n", md5(b"x"), sha256(b"x")))]);
    let engine = start(lists.path());
    let file = tempfile::tempfile().unwrap();
    // Holes: seconds to hash, nothing to write. Larger than what the process may copy.
    file.set_len(16 << 30).unwrap();
    let spooled = SharedContent::from_spool(file, 16 << 30).unwrap();
    let sealed = SharedContent::new(vec![7; 512 << 20]).unwrap();
    for content in [spooled, sealed] {
        let (tell, reply) = mpsc::channel();
        let late = tell.clone();
        let limit = Duration::from_millis(400);
        let send = |limit, tell: mpsc::Sender<_>| {
            let tell = move |report: ScanReport| drop(tell.send(report.result));
            engine.scan(content.clone(), metadata(), Lane::OnAccess, limit, tell).unwrap()
        };
        send(limit, late);
        assert_eq!(reply.recv_timeout(LONG).unwrap(), Err(ScanError::TimedOut));
        let id = send(LONG, tell);
        while engine.status().in_flight == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(20));
        engine.cancel(id);
        assert_eq!(reply.recv_timeout(LONG).unwrap(), Err(ScanError::Cancelled));
    }
    assert_eq!(engine.status().restarts, 0);
}

/// Lists that do not fit are refused with a word, and fit once they are compiled.
#[test]
fn lists_larger_than_the_memory_are_refused_until_they_are_compiled() {
    let lines = |number: u32| format!("{}\n", md5(&number.to_le_bytes()));
    let sources = folder(&[("a.md5", &(0..1_000_000).map(lines).collect::<String>())]);
    let start = |folder: &Path| {
        let command = vec![PROGRAM.into(), "--lists".into(), folder.display().to_string()];
        let config = EngineConfig { memory_mib: 28, ..EngineConfig::new("hash", command) };
        EngineHandle::start(config, |_| ()).unwrap()
    };
    let engine = start(sources.path());
    let since = Instant::now();
    let diagnostics = loop {
        match engine.state() {
            EngineState::Failed { diagnostics } => break diagnostics,
            other => assert!(since.elapsed() < LONG, "{other:?}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(diagnostics[0].code, "hash-memory", "{diagnostics:?}");
    let compiled = folder(&[]);
    assert_eq!(run_compile(sources.path(), &compiled.path().join("a.swhash")).1, 0);
    let engine = start(compiled.path());
    assert!(engine.wait_ready(LONG), "{:?}", engine.state());
    assert_eq!(description(&engine).rules, 1_000_000);
    assert!(said(&engine, &999_999u32.to_le_bytes()).starts_with("Hash.MD5."));
    assert_eq!(said(&engine, &1_000_000u32.to_le_bytes()), "clean");
}

#[test]
fn wrong_lines_are_named_and_the_others_are_used() {
    let lists = folder(&[
        ("a.md5", &format!("{} Evil\n\n  12x4\n{}\n", md5(b"evil"), sha1(b"evil"))),
        ("b.hdb", &format!("{}:*:NoLevel\n", md5(b"no level"))),
        ("c.csv", "name,hash\nx,y\n"),
        ("d.csv", &format!("é,md5\né,z\n\"{}\n", md5(b"x"))),
        ("e.zip", "?"),
        ("f.txt", &format!("{}\n{}\n", "a".repeat(5000), md5(b"after"))),
        ("g.txt", &"wrong\n".repeat(1000)),
    ]);
    let engine = start(lists.path());
    assert_eq!(said(&engine, b"evil"), "Evil");
    assert_ne!(said(&engine, b"after"), "clean");
    let Description { diagnostics, rules, .. } = description(&engine);
    assert_eq!(rules, 2);
    let places: Vec<(String, u32, u32, &str)> = diagnostics
        .iter()
        .filter(|one| !one.file.ends_with("g.txt"))
        .map(|one| {
            let file = Path::new(&one.file).file_name().unwrap().display().to_string();
            (file, one.line, one.column, one.code.as_str())
        })
        .collect();
    let expected = [
        ("a.md5", 3, 5, "hash-line"),
        ("a.md5", 4, 1, "hash-line"),
        ("b.hdb", 1, 34, "hash-line"),
        ("c.csv", 1, 1, "hash-line"),
        ("d.csv", 2, 3, "hash-line"),
        ("d.csv", 3, 1, "hash-line"),
        ("f.txt", 1, 1, "hash-line"),
        ("e.zip", 0, 0, "hash-name"),
    ];
    let expected = expected.map(|(file, line, column, code)| (file.to_owned(), line, column, code));
    assert_eq!(places, expected);
    let many: Vec<_> = diagnostics.iter().filter(|one| one.file.ends_with("g.txt")).collect();
    assert_eq!(many.len(), 17);
    assert_eq!(many[16].reason, "984 more wrong lines");
    let refused = Lists::load(lists.path(), true).map(drop).unwrap_err();
    assert_eq!(refused.errors(), 1007);
}

#[test]
fn a_set_with_an_error_is_refused_where_all_is_wanted() {
    let lists = folder(&[("a.md5", &format!("{} Evil\n", md5(b"evil")))]);
    write(lists.path(), "b.md5", "nonsense\n");
    let engine = start_strict(lists.path());
    assert!(engine.wait_loaded(LONG));
    let EngineState::Failed { diagnostics } = engine.state() else { panic!("not refused") };
    assert!(diagnostics[0].file.ends_with("b.md5"), "{diagnostics:?}");
    assert_eq!((diagnostics[0].line, diagnostics[0].column), (1, 1));
    write(lists.path(), "b.md5", &format!("{} New\n", md5(b"new")));
    let engine = start_strict(lists.path());
    assert!(engine.wait_ready(LONG));
    assert_eq!((said(&engine, b"evil"), said(&engine, b"new")), ("Evil".into(), "New".into()));
}

#[test]
fn the_generation_is_of_what_decides() {
    let line = format!("{}  Evil\n", md5(b"evil"));
    let generation = |files: &[(&str, &str)]| start(folder(files).path()).generation().unwrap();
    let one = generation(&[("a.md5", &line)]);
    assert_eq!(
        generation(&[(
            "a.md5",
            &format!("# comment\n{}", line.to_uppercase().replace("EVIL", "Evil"))
        )]),
        one
    );
    assert_ne!(generation(&[("a.md5", &line.replace("Evil", "Other"))]), one);
    assert_ne!(generation(&[("allow.md5", &line)]), one);
    assert_ne!(generation(&[("a.md5", &line), ("b.md5", &md5(b"other"))]), one);
    let (plain, compiled) = (folder(&[("a.md5", &line)]), folder(&[]));
    assert_eq!(run_compile(plain.path(), &compiled.path().join("x.swhash")).1, 0);
    assert_eq!(start(compiled.path()).generation(), Some(one), "compiled or not");
}

#[test]
fn a_compiled_list_says_the_same_as_its_sources() {
    let sources = folder(&[
        ("a.hdb", &format!("{}:4:Evil\n", md5(b"evil"))),
        ("b.csv", &format!("sha1,family\n{},Fam\n", sha1(b"worse"))),
        ("allow/c.sha256", &sha256(b"good")),
    ]);
    let lists = folder(&[("d.txt", &format!("{} Plain\n", sha256(b"plain")))]);
    let out = lists.path().join("all.swhash");
    let (text, status) = run_compile(sources.path(), &out);
    assert_eq!((text.as_str(), status), ("3 entries compiled, 0 errors, 0 warnings\n", 0));
    let engine = start(lists.path());
    assert_eq!(description(&engine).rules, 4);
    assert_eq!(said(&engine, b"evil"), "Evil");
    assert!(said(&engine, b"worse").starts_with("Hash.SHA1."));
    assert_eq!(said(&engine, b"good"), "allowed by allow/c.sha256:1");
    assert_eq!(said(&engine, b"plain"), "Plain");
    assert_eq!(said(&engine, b"other"), "clean");
    // A new one takes the old one's place while that is in use.
    write(sources.path(), "a.hdb", &format!("{}:5:Newer\n", md5(b"newer")));
    assert_eq!(run_compile(sources.path(), &out).1, 0);
    assert_eq!(said(&engine, b"evil"), "Evil");
    let engine = start(lists.path());
    assert_eq!((said(&engine, b"evil"), said(&engine, b"newer")), ("clean".into(), "Newer".into()));
    assert_eq!(fs::read_dir(lists.path()).unwrap().count(), 2, "nothing else is left behind");
}

#[test]
fn a_list_with_an_error_is_not_compiled() {
    let sources = folder(&[("a.md5", &md5(b"evil"))]);
    let out = folder(&[]);
    let file = out.path().join("all.swhash");
    assert_eq!(run_compile(sources.path(), &file).1, 0);
    let before = fs::read(&file).unwrap();
    write(sources.path(), "b.md5", "nonsense");
    let (text, status) = run_compile(sources.path(), &file);
    assert_eq!(status, 1);
    assert!(
        text.contains("b.md5:1:1: error[hash-line]: a digest consists of hex digits"),
        "{text}"
    );
    assert!(text.ends_with("0 entries compiled, 1 errors, 0 warnings\n"), "{text}");
    assert_eq!(fs::read(&file).unwrap(), before);
    fs::remove_file(sources.path().join("b.md5")).unwrap();
    let (text, status) = run_compile(sources.path(), &out.path().join("all.txt"));
    assert_eq!(status, 1);
    assert!(text.contains("error[hash-out]"), "{text}");
    assert_eq!(run_compile(out.path(), &out.path().join("b.swhash")).1, 1, "compiled already");
}

fn run_compile(folder: &Path, out: &Path) -> (String, i32) {
    run(&["--compile", &folder.display().to_string(), "--out", &out.display().to_string()])
}

fn run(arguments: &[&str]) -> (String, i32) {
    let output = Command::new(PROGRAM).args(arguments).output().unwrap();
    (String::from_utf8(output.stdout).unwrap(), output.status.code().unwrap())
}

#[test]
fn a_damaged_compiled_list_is_named_and_the_others_are_used() {
    let sources = folder(&[("a.md5", &format!("{} Evil\n", md5(b"evil")))]);
    let lists = folder(&[("b.md5", &format!("{} Other\n", md5(b"other")))]);
    let out = lists.path().join("a.swhash");
    run_compile(sources.path(), &out);
    let good = fs::read(&out).unwrap();
    for (at, reason) in [(0, "not a compiled list"), (5, "version 2 expected"), (90, "checksum")] {
        let mut bytes = good.clone();
        bytes[at] ^= 2;
        fs::write(&out, &bytes).unwrap();
        let engine = start(lists.path());
        let one = &description(&engine).diagnostics[0];
        assert!(one.file.ends_with("a.swhash") && one.code == "hash-compiled", "{one}");
        assert!(one.reason.contains(reason), "{one}");
        assert_eq!(
            (said(&engine, b"evil"), said(&engine, b"other")),
            ("clean".into(), "Other".into())
        );
    }
}

/// Cut short while it is in use: what it would have been found in is an error, and the engine lives on in its sandbox.
#[test]
fn a_compiled_list_that_is_cut_short_costs_a_scan_and_not_the_engine() {
    let contents: Vec<String> = (0..4000).map(|at| format!("evil {at}")).collect();
    let mut known: Vec<(String, &String)> =
        contents.iter().map(|one| (sha256(one.as_bytes()), one)).collect();
    known.sort();
    let list: String = known.iter().map(|(digest, _)| format!("{digest}\n")).collect();
    let (sources, lists) = (folder(&[("a.sha256", &list)]), folder(&[]));
    let out = lists.path().join("a.swhash");
    assert_eq!(run_compile(sources.path(), &out).1, 0);
    write(lists.path(), "b.md5", &format!("{} Other\n", md5(b"other")));
    let engine = start(lists.path());
    let process = engine.status().pid;
    let file = fs::OpenOptions::new().write(true).open(&out).unwrap();
    file.set_len(4096).unwrap();
    let (_, last) = known.last().unwrap();
    for _ in 0..2 {
        match scan(&engine, last.as_bytes()) {
            Err(ScanError::Failed { reason }) => assert!(reason.contains("cut short"), "{reason}"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((said(&engine, b"other"), said(&engine, b"none")), ("Other".into(), "clean".into()));
    assert_eq!((engine.status().pid, engine.status().restarts), (process, 0));
}

#[test]
fn only_so_many_compiled_lists_are_opened() {
    let sources = folder(&[("a.md5", &md5(b"evil"))]);
    let lists = folder(&[]);
    for number in 0..5 {
        run_compile(sources.path(), &lists.path().join(format!("{number}.swhash")));
    }
    let (text, status) = run(&["--check", "--lists", &lists.path().display().to_string()]);
    assert_eq!(status, 1);
    assert!(text.contains("4.swhash: error[hash-compiled]: one compiled file too many"), "{text}");
    assert!(text.ends_with("4 entries can be used, 1 errors, 0 warnings\n"), "{text}");
    fs::remove_file(lists.path().join("4.swhash")).unwrap();
    let engine = start(lists.path());
    let found = (0..64).map(|_| said(&engine, b"evil")).collect::<Vec<_>>();
    assert!(found.iter().all(|one| one.starts_with("Hash.MD5.")), "{found:?}");
}

#[test]
fn no_usable_entry_is_no_engine() {
    for files in [&[][..], &[("a.md5", "nonsense")], &[("a.md5", "# none\n")], &[("a.zip", "")]] {
        let lists = folder(files);
        let engine = handle(lists.path());
        assert!(!engine.wait_ready(Duration::from_millis(500)), "{files:?}");
        let (text, status) = run(&["--check", "--lists", &lists.path().display().to_string()]);
        assert_eq!(status, 1);
        assert!(text.contains("error[hash-empty]: no usable entry in "), "{text}");
    }
    assert_eq!(run(&["--check", "--lists", "/nonexistent/lists"]).1, 1);
}

#[test]
fn check_prints_what_is_wrong_and_its_status_tells() {
    let lists = folder(&[("a.md5", &md5(b"evil"))]);
    let path = lists.path().display().to_string();
    let golden = "1 entries can be used, 0 errors, 0 warnings\n".to_owned();
    assert_eq!(run(&["--check", "--lists", &path]), (golden, 0));
    write(lists.path(), "b.hdb", "12:3:Evil\n");
    let golden = format!(
        "{path}/b.hdb:1:1: error[hash-line]: 2 hex digits are no digest: MD5 has 32, SHA-1 40, \
         SHA-256 64; correct or remove the line\n\
         1 entries can be used, 1 errors, 0 warnings\n"
    );
    assert_eq!(run(&["--check", "--lists", &path]), (golden, 1));
    assert_eq!(run(&[]).1, 2);
    assert_eq!(run(&["--compile", &path]).1, 2);
    assert_eq!(run(&["--check", "--compile", &path, "--out", "x.swhash"]).1, 2);
}

#[test]
fn started_by_hand_it_says_what_it_is_for() {
    let lists = folder(&[("a.md5", &md5(b"evil"))]);
    let output = Command::new(PROGRAM).arg("--lists").arg(lists.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("started by the service"), "{text}");
}
