//! The engine as the service runs it: a process, rules in a folder.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use seawall_engine::ArchiveLimits;
use seawall_engine::host::{
    Cleaning, Detection, EngineConfig, EngineHandle, EngineState, Lane, Metadata, Operation,
    Outcome, ScanError, ScanReport, Severity, SharedContent,
};

const LONG: Duration = Duration::from_secs(60);

/// The EICAR test file, put together here so that the repository holds no complete one.
fn eicar() -> Vec<u8> {
    [r"X5O!P%@AP[4\PZX54(P^)7CC)7}$", "EICAR-STANDARD-ANTIVIRUS", "-TEST-FILE!$H+H*"]
        .concat()
        .into_bytes()
}

/// A rule that finds it, written with an escape for the same reason.
fn eicar_rule() -> String {
    let text = String::from_utf8(eicar()).unwrap();
    let hex: Vec<String> = text.bytes().map(|byte| format!("{byte:02x}")).collect();
    format!(
        "rule Eicar {{ meta: severity = \"medium\" family = \"test\" \
         strings: $a = {{ {} }} condition: $a }}",
        hex.join(" ")
    )
}

fn rules(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::write(folder.path().join(name), text).unwrap();
    }
    folder
}

fn config(folder: &Path) -> EngineConfig {
    let program = env!("CARGO_BIN_EXE_seawall-engine-yara").to_owned();
    let command = vec![program, "--rules".to_owned(), folder.display().to_string()];
    EngineConfig::new("yara", command)
}

fn start(folder: &Path) -> EngineHandle {
    let handle = EngineHandle::start(config(folder), |state| eprintln!("{state:?}")).unwrap();
    assert!(handle.wait_ready(LONG), "{:?}", handle.state());
    handle
}

/// One that refuses what has an error; nobody waits for it yet.
fn start_strict(folder: &Path) -> EngineHandle {
    let config = EngineConfig { strict: true, ..config(folder) };
    EngineHandle::start(config, |state| eprintln!("{state:?}")).unwrap()
}

fn send(handle: &EngineHandle, content: &[u8], limit: Duration) -> mpsc::Receiver<ScanReport> {
    send_with(handle, content, limit, None)
}

fn send_with(
    handle: &EngineHandle,
    content: &[u8],
    limit: Duration,
    archives: Option<ArchiveLimits>,
) -> mpsc::Receiver<ScanReport> {
    let (tell, reply) = mpsc::channel();
    let metadata = Metadata {
        path: Vec::new(),
        guest: "g1".into(),
        operation: Operation::Open,
        size: 0,
        archives,
    };
    let content = SharedContent::new(content).unwrap();
    handle.scan(content, metadata, Lane::OnAccess, limit, move |report| drop(tell.send(report)));
    reply
}

fn scan(handle: &EngineHandle, content: &[u8]) -> Result<Outcome, ScanError> {
    send(handle, content, LONG).recv_timeout(LONG).unwrap().result
}

fn names(outcome: Result<Outcome, ScanError>) -> Vec<String> {
    match outcome.unwrap() {
        Outcome::Clean => Vec::new(),
        Outcome::Infected(found) => found.into_iter().map(|one| one.name).collect(),
        Outcome::Allowed { name } => panic!("allowed by {name}"),
    }
}

#[test]
fn eicar_is_found_wherever_it_stands_and_nothing_else_is() {
    let folder = rules(&[("eicar.yar", &eicar_rule())]);
    let engine = start(folder.path());
    let detection = |offset| {
        Ok(Outcome::Infected(vec![Detection {
            severity: Severity::Medium,
            family: Some("test".to_owned()),
            offset: Some(offset),
            ..Detection::new("Eicar")
        }]))
    };
    assert_eq!(scan(&engine, &eicar()), detection(0));
    let mut deep = vec![b'.'; 3 << 20];
    deep.extend(eicar());
    assert_eq!(scan(&engine, &deep), detection(3 << 20));
    assert_eq!(scan(&engine, b""), Ok(Outcome::Clean));
    assert_eq!(scan(&engine, b"harmless"), Ok(Outcome::Clean));
    assert_eq!(scan(&engine, &eicar()[1..]), Ok(Outcome::Clean));
    assert_eq!(engine.status().restarts, 0);
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

/// Compressed, a rule does not find it; the engine unpacks in its sandbox.
#[test]
fn the_members_of_an_archive_are_looked_at_where_that_is_wanted_and_are_named() {
    let folder = rules(&[("eicar.yar", &eicar_rule())]);
    let engine = start(folder.path());
    let archive = |members: &[(&str, &[u8])]| {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        out.write_all(&tar(members)).unwrap();
        out.finish().unwrap()
    };
    let limits = ArchiveLimits { depth: 4, members: 3, member: 1 << 20, unpacked: 4 << 20 };
    let judged = |content: &[u8], archives| {
        send_with(&engine, content, LONG, archives).recv_timeout(LONG).unwrap().result
    };
    let evil = archive(&[("readme", b"harmless"), ("bin/eicar.com", &eicar())]);
    assert_eq!(judged(&evil, None), Ok(Outcome::Clean));
    assert_eq!(
        judged(&evil, Some(limits)),
        Ok(Outcome::Infected(vec![Detection {
            severity: Severity::Medium,
            family: Some("test".to_owned()),
            member: Some("bin/eicar.com".to_owned()),
            ..Detection::new("Eicar")
        }]))
    );
    assert_eq!(judged(&archive(&[("a", b"harmless")]), Some(limits)), Ok(Outcome::Clean));
    let zeros = vec![0; 1 << 20];
    let bomb = archive(&[("a", &zeros), ("b", &zeros), ("c", &zeros)]);
    match judged(&bomb, Some(limits)) {
        Err(ScanError::Failed { reason }) => assert!(reason.contains("4 MiB"), "{reason}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(engine.status().restarts, 0);
}

/// Each module parses real files of this machine inside the sandbox: none of them may need
/// anything that the sandbox forbids.
#[test]
fn all_modules_work_inside_the_sandbox() {
    let rule = r#"
        import "elf" import "pe" import "macho" import "dotnet" import "dex" import "lnk"
        import "hash" import "math" import "string" import "time" import "console" import "zip"
        rule Program { condition: elf.number_of_sections > 5 and math.entropy(0, filesize) > 1.0
            and time.now() > 1000 and hash.sha256(0, 4) != "" and console.log("seen")
            and not pe.is_pe }
        rule Loop { condition: for any i in (0..100) : ( uint8(i) == 0x7f ) }
        rule Pattern { strings: $a = /main[a-z_]{3,20}/ nocase $b = "libc" wide ascii xor
            condition: any of them }
    "#;
    let folder = rules(&[("modules.yar", rule)]);
    let engine = start(folder.path());
    let program = fs::read(env!("CARGO_BIN_EXE_seawall-engine-yara")).unwrap();
    let found = names(scan(&engine, &program[..program.len().min(32 << 20)]));
    assert!(
        found.contains(&"Program".to_owned()) && found.contains(&"Loop".to_owned()),
        "{found:?}"
    );
    assert_eq!(engine.status().restarts, 0);
}

#[test]
fn a_broken_rule_is_named_and_refused_where_all_are_wanted() {
    let folder = rules(&[("eicar.yar", &eicar_rule())]);
    fs::write(folder.path().join("new.yar"), "rule new {\n  condition:\n    nothing_known\n}\n")
        .unwrap();
    let engine = start_strict(folder.path());
    assert!(engine.wait_loaded(LONG));
    let EngineState::Failed { diagnostics } = engine.state() else { panic!("not refused") };
    let one = &diagnostics[0];
    assert!(one.file.ends_with("new.yar"), "{one}");
    assert_eq!((one.line, one.column, one.code.as_str()), (3, 5, "E009"));
    fs::write(folder.path().join("new.yar"), "rule new { condition: filesize == 3 }").unwrap();
    let engine = start_strict(folder.path());
    assert!(engine.wait_ready(LONG));
    assert_eq!(names(scan(&engine, b"abc")), ["new"]);
    assert_eq!(names(scan(&engine, &eicar())), ["Eicar"]);
}

#[test]
fn a_first_start_leaves_the_broken_file_out_and_says_so() {
    let folder = rules(&[("bad.yar", "rule bad {"), ("eicar.yar", &eicar_rule())]);
    let engine = start(folder.path());
    let EngineState::Ready { description } = engine.state() else { panic!("not ready") };
    assert_eq!(description.rules, 1);
    assert!(description.diagnostics.iter().any(|one| one.file.ends_with("bad.yar")));
    assert_eq!(names(scan(&engine, &eicar())), ["Eicar"]);
}

/// A rule that takes minutes on this content: yara-x's own limit ends it, or the process's end does.
#[test]
fn a_slow_rule_ends_at_its_limit_and_others_are_answered() {
    let slow = "rule slow { condition: for all i in (0..2000000000) : ( \
                uint8(i % filesize) + uint8((i * 7) % filesize) != 1000 ) }";
    let folder = rules(&[("slow.yar", slow)]);
    let engine = start(folder.path());
    let content = vec![b'.'; 1 << 20];
    for (limit, restarts) in [(Duration::from_secs(6), 0), (Duration::from_millis(500), 1)] {
        let report = send(&engine, &content, limit).recv_timeout(LONG).unwrap();
        let timed_out =
            matches!(report.result, Err(ScanError::TimedOut | ScanError::TimedOutIn { .. }));
        assert!(timed_out, "{report:?}");
        assert!(report.scanned < limit + Duration::from_secs(5), "{report:?}");
        assert_eq!(engine.status().restarts, restarts, "{limit:?}");
    }
}

/// By its condition or by its pattern, among others that are not.
#[test]
fn the_rule_that_made_a_scan_time_out_is_named() {
    let condition = "rule crawls { condition: for all i in (0..2000000000) : ( \
                     uint8(i % filesize) + uint8((i * 7) % filesize) != 1000 ) }";
    let pattern = "rule crawls { strings: $a = /aa([ab]{1,40}c?){1,40}d/ condition: $a }";
    let others = "rule fine { condition: for any i in (0..9) : (uint8(i) == 1) }\n\
                  rule good { strings: $a = /ab+c/ condition: $a }";
    for slow in [condition, pattern] {
        let folder = rules(&[("others.yar", others), ("slow.yar", slow)]);
        let engine = start(folder.path());
        let limit = Duration::from_secs(12);
        let report = send(&engine, &vec![b'a'; 64 << 20], limit).recv_timeout(LONG).unwrap();
        let Err(ScanError::TimedOutIn { what }) = report.result else { panic!("{report:?}") };
        assert!(what.starts_with("slowest: rule crawls (slow.yar) more than "), "{what}");
        assert_eq!(engine.status().restarts, 0);
    }
}

/// What they can do to whoever loads them: they are taken or named, and the others are used.
#[test]
fn hostile_rules_end_as_errors_of_their_own() {
    let deep = format!(
        "rule deep {{ condition: {}filesize == 1{} }}",
        "(".repeat(20_000),
        ")".repeat(20_000)
    );
    let huge = format!(
        "rule huge {{ strings: $a = /a{}/ condition: $a }}",
        "(b{1,1000}){1,1000}".repeat(20)
    );
    let text = format!("rule text {{ strings: $a = \"{}", "x".repeat(1 << 20));
    let circle = "include \"circle.yar\"\nrule circle { condition: false }";
    let files =
        [("deep.yar", &*deep), ("huge.yar", &*huge), ("text.yar", &*text), ("circle.yar", circle)];
    let folder = rules(&files);
    fs::write(folder.path().join("eicar.yar"), eicar_rule()).unwrap();
    let engine = start(folder.path());
    let EngineState::Ready { description } = engine.state() else { panic!("not ready") };
    for (name, _) in &files[1..] {
        let told = description.diagnostics.iter().any(|one| one.file.ends_with(name));
        assert!(told, "{name}: {:?}", description.diagnostics);
    }
    assert_eq!(names(scan(&engine, &eicar())), ["Eicar"]);
}

#[test]
fn many_scans_at_a_time_get_their_own_answers() {
    let folder = rules(&[("eicar.yar", &eicar_rule())]);
    let engine = start(folder.path());
    let mut infected = vec![b'.'; 100_000];
    infected.extend(eicar());
    let clean = vec![b'.'; 100_000];
    let replies: Vec<_> = (0..400)
        .map(|number| send(&engine, if number % 3 == 0 { &infected } else { &clean }, LONG))
        .collect();
    for (number, reply) in replies.into_iter().enumerate() {
        let found = names(reply.recv_timeout(LONG).unwrap().result);
        assert_eq!(found.len(), usize::from(number % 3 == 0), "scan {number}");
    }
}

#[test]
fn check_prints_what_is_wrong_and_its_status_tells() {
    let good = rules(&[("eicar.yar", &eicar_rule())]);
    let (text, status) = check(good.path());
    assert_eq!((text.as_str(), status), ("1 rules can be used, 0 errors, 0 warnings\n", 0));
    let bad = rules(&[("bad.yar", "rule bad {\n  condition:\n    nothing_known\n}\n")]);
    let (text, status) = check(bad.path());
    let file = bad.path().join("bad.yar").display().to_string();
    let golden = format!(
        "{file}:3:5: error[E009]: rule bad: unknown identifier `nothing_known`: this identifier has not been \
         declared\n"
    );
    let (first, rest) = text.split_once('\n').unwrap();
    assert_eq!((format!("{first}\n"), status), (golden, 1));
    assert!(rest.contains("no usable rule in "), "{rest}");
    assert!(rest.ends_with("0 rules can be used, 2 errors, 0 warnings\n"), "{rest}");
}

fn check(folder: &Path) -> (String, i32) {
    let output = Command::new(env!("CARGO_BIN_EXE_seawall-engine-yara"))
        .args(["--check", "--rules"])
        .arg(folder)
        .output()
        .unwrap();
    (String::from_utf8(output.stdout).unwrap(), output.status.code().unwrap())
}

#[test]
fn started_by_hand_it_says_what_it_is_for() {
    let folder = rules(&[("eicar.yar", &eicar_rule())]);
    let output = Command::new(env!("CARGO_BIN_EXE_seawall-engine-yara"))
        .arg("--rules")
        .arg(folder.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("started by the service"), "{text}");
}

#[test]
fn rules_see_the_file_s_name_guest_and_size() {
    let rule = |name: &str, condition: &str| format!("rule {name} {{ condition: {condition} }}\n");
    let text = [
        rule("Path", "path == \"/srv/a.b.exe\" and filepath == path"),
        rule("Name", "name == \"a.b.exe\" and filename == name"),
        rule("Extension", "extension == \".exe\""),
        rule("Guest", "guest == \"g7\""),
        rule("Size", "size == 12345 and filesize == 3"),
        rule("Unknown", "filetype == \"\" and owner == \"\""),
    ];
    let folder = rules(&[("a.yar", &text.concat())]);
    let engine = start(folder.path());
    let scan_as = |path: &[u8], guest: &str| {
        let (tell, reply) = mpsc::channel();
        let guest = guest.to_owned();
        let metadata = Metadata {
            path: path.to_vec(),
            guest,
            operation: Operation::Open,
            size: 12_345,
            archives: None,
        };
        let content = SharedContent::new(b"abc").unwrap();
        engine.scan(content, metadata, Lane::OnAccess, LONG, move |report| drop(tell.send(report)));
        names(reply.recv_timeout(LONG).unwrap().result)
    };
    let all = ["Path", "Name", "Extension", "Guest", "Size", "Unknown"];
    assert_eq!(scan_as(b"/srv/a.b.exe", "g7"), all);
    assert_eq!(
        scan_as(b"/srv/.hidden", "g8"),
        ["Size", "Unknown"],
        "nothing is left of the last scan"
    );
    assert_eq!(scan_as(b"/srv/\xff.exe", ""), ["Extension", "Size", "Unknown"]);
    let EngineState::Ready { description } = engine.state() else { panic!("it is ready") };
    assert!(description.by_name);
}

#[test]
fn tags_and_metadata_become_severity_family_and_cleaning() {
    let text = r#"
        rule Plain { condition: true }
        rule Word { meta: severity = "low" score = 95 condition: true }
        rule Score { meta: score = 95 malware_family = "Worm" condition: true }
        rule Tagged : apt CRITICAL { condition: true }
        rule Gone { meta: cleaning = "delete" condition: true }
        rule Cut { meta: cleaning = "cut" strings: $a = "evil" condition: $a }"#;
    let folder = rules(&[("a.yar", text)]);
    let engine = start(folder.path());
    let Ok(Outcome::Infected(found)) = scan(&engine, b"some evil bytes") else {
        panic!("infected")
    };
    let told: Vec<_> =
        found.iter().map(|one| (one.severity, one.family.as_deref(), one.cleaning)).collect();
    let cut = Some(Cleaning::Cut { offset: 5, length: 4 });
    assert_eq!(
        told,
        [
            (Severity::High, None, None),
            (Severity::Low, None, None),
            (Severity::Critical, Some("Worm"), None),
            (Severity::Critical, None, None),
            (Severity::High, None, Some(Cleaning::Delete)),
            (Severity::High, None, cut),
        ]
    );
}
