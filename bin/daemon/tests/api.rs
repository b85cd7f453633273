//! The REST interface: its document, its errors, and the command line on top of it.

mod common;

use common::{Engine, Service, Setup, block_on, eicar, program, wait_for};
use seawall_client::ClientError;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

#[test]
fn the_committed_document_is_current() {
    let output = Command::new(env!("CARGO_BIN_EXE_seawalld")).arg("--openapi").output().unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/openapi.json");
    let committed = std::fs::read_to_string(path).unwrap();
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        committed,
        "write it again: seawalld --openapi > docs/openapi.json"
    );
}

#[test]
fn a_wrong_configuration_is_told_with_its_place_and_code_1() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.toml");
    std::fs::write(&path, "[limits]\nprivate_copies_mib = 1\n").unwrap();
    let check = || {
        Command::new(env!("CARGO_BIN_EXE_seawalld"))
            .args(["--check", "--config"])
            .arg(&path)
            .output()
    };
    let output = check().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("c.toml:2:22: error[E-VALUE]: 1 is not from 4 to 1048576"), "{said}");
    std::fs::write(&path, "").unwrap();
    assert!(check().unwrap().status.success());
}

#[test]
fn content_over_the_limit_is_refused_with_a_reason() {
    let more = "[policy]\nwhole_file_limit_mib = 1\n";
    let service = Service::start(Setup { more: more.into(), ..Setup::default() });
    let body = http_body_util::Full::new(bytes::Bytes::from(vec![0; (1 << 20) + 1]));
    let error = block_on(service.client().scan("big", body)).unwrap_err();
    let ClientError::Refused(fault) = error else { panic!("{error}") };
    assert_eq!(fault.code, "too-long");
    let output = seawall(&service, &["scan", "-"], &vec![0; 3 << 20]);
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    assert!(text(&output.stderr).contains("longer than the 1048576 bytes"), "{output:?}");
}

#[test]
fn only_the_services_user_may_open_its_socket() {
    use std::os::unix::fs::PermissionsExt;
    let service = Service::start(Setup::default());
    for name in ["api.sock", "state/events.db", "state/state.db"] {
        let mode = std::fs::metadata(service.path(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{name}: {mode:o}");
    }
}

fn seawall(service: &Service, arguments: &[&str], input: &[u8]) -> Output {
    let mut child = Command::new(program("seawall"))
        .env("SEAWALL_SOCKET", service.path("api.sock"))
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("seawall runs");
    // It may have read enough before the end.
    let _ = child.stdin.take().expect("it is piped").write_all(input);
    child.wait_with_output().expect("it ends")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

#[test]
fn the_operator_sees_what_happened() {
    let service = Service::start(Setup { engine: Engine::Yara, ..Setup::default() });
    let mut driver = service.driver("g1");
    driver.scan(&eicar());
    driver.heartbeat();
    wait_for("the event", || {
        service.events().iter().any(|event| event.detection.is_some()).then_some(())
    });

    let status = text(&seawall(&service, &["status"], b"").stdout);
    assert!(status.contains("is healthy") && status.contains("1 infected"), "{status}");
    let guests = text(&seawall(&service, &["guests"], b"").stdout);
    assert!(
        guests.lines().any(|line| line.contains("g1") && line.contains("protected")),
        "{guests}"
    );
    assert!(guests.contains(r"6.1\x1b[2J") && !guests.contains('\x1b'), "{guests:?}");
    assert!(guests.contains("g2: no driver has connected"), "{guests}");
    let events = text(&seawall(&service, &["events"], b"").stdout);
    assert!(
        events.contains(r"infected Eicar in a scan for open of /data/\x1b[2Jfile\xff"),
        "{events}"
    );

    let json = seawall(&service, &["--json", "guests"], b"");
    let guests: Vec<seawall_client::Guest> = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(guests.len(), 2);
    let json = text(&seawall(&service, &["events", "--json", "--limit", "2"], b"").stdout);
    assert_eq!(json.lines().count(), 2, "{json}");
    for line in json.lines() {
        serde_json::from_str::<seawall_client::Event>(line).unwrap();
    }
}

#[test]
fn a_scan_by_the_operator_has_its_exit_codes() {
    let service = Service::start(Setup { engine: Engine::Yara, ..Setup::default() });
    let file = service.path("sample\u{1b}[31m");
    std::fs::write(&file, eicar()).unwrap();
    let output = seawall(&service, &["scan", file.to_str().unwrap()], b"");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = text(&output.stdout);
    assert!(said.contains(r"sample\x1b[31m: infected"), "{said}");
    assert!(said.contains("Eicar (severity high, engine first)"), "{said}");
    let output = seawall(&service, &["scan", "-"], &vec![b'x'; 5 << 20]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(text(&output.stdout).contains("-: clean"), "{output:?}");

    let service = Service::start(Setup::default());
    let output = seawall(&service, &["scan", "-"], b"SEAWALL-FAULT error");
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    assert!(text(&output.stdout).contains("-: error"), "{output:?}");
    assert_eq!(seawall(&service, &["reload"], b"").status.code(), Some(0));
}

#[test]
fn events_are_followed_as_they_come() {
    use std::io::BufRead;
    let service = Service::start(Setup::default());
    let mut child = Command::new(program("seawall"))
        .env("SEAWALL_SOCKET", service.path("api.sock"))
        .args(["events", "--follow", "--limit", "0"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("seawall runs");
    let mut lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
    // Sessions until the follower has connected and shows one.
    let (seen, shown) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || drop(seen.send(lines.next())));
    let line = wait_for("a line", || {
        drop(service.driver("g1"));
        shown.try_recv().ok()
    });
    let line = line.unwrap().unwrap();
    assert!(line.contains("g1") && line.contains("session"), "{line}");
    child.kill().unwrap();
    child.wait().unwrap();
    reader.join().unwrap();
}
