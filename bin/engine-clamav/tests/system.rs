//! The engine with a clamd that somebody else has started.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Engine, LONG, WORD, daily, gzip, noise, start_command};
use seawall_engine::host::{Description, EngineState, Outcome, ScanError};

const OTHER: &[u8] = b"seawall-clamav-other-word";

/// A clamd as a distribution would run it.
struct Clamd {
    folder: tempfile::TempDir,
    process: Child,
}

impl Clamd {
    fn start(more: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        // Readable for whoever else is to connect.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(folder.path(), open).unwrap();
        let database = folder.path().join("database");
        fs::create_dir(&database).unwrap();
        let config = format!(
            "Foreground yes\nLocalSocket {0}/socket\nDatabaseDirectory {0}/database\n\
             LocalSocketMode 600\nSelfCheck 0\n{more}",
            folder.path().display()
        );
        fs::write(folder.path().join("clamd.conf"), config).unwrap();
        daily(&database, 27_001, WORD);
        let process = Self::spawn(folder.path());
        Self { folder, process }
    }

    fn spawn(folder: &Path) -> Child {
        let child = Command::new("/usr/sbin/clamd")
            .arg(format!("--config-file={}/clamd.conf", folder.display()))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let until = Instant::now() + LONG;
        while UnixStream::connect(folder.join("socket")).is_err() {
            assert!(Instant::now() < until, "clamd does not start");
            std::thread::sleep(Duration::from_millis(10));
        }
        child
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    /// Has it load what is in its folder now.
    fn reload(&self) {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        stream.write_all(b"zRELOAD\0").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "RELOADING\0");
    }

    fn signal(&self, name: &str) {
        let pid = self.process.id().to_string();
        assert!(Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap().success());
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Clamd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn command(socket: &Path) -> Vec<String> {
    let program = env!("CARGO_BIN_EXE_seawall-engine-clamav");
    [program, "--socket", socket.to_str().unwrap()].map(str::to_owned).to_vec()
}

fn start(clamd: &Clamd) -> Engine {
    let engine = start_command(command(&clamd.socket()));
    assert!(engine.handle.wait_ready(LONG), "{:?}", engine.handle.state());
    engine
}

fn description(engine: &Engine) -> Description {
    let EngineState::Ready { description } = engine.handle.state() else { panic!("ready") };
    description
}

/// Waits until it cannot start, and gives what it says.
fn failure(engine: &Engine) -> String {
    let until = Instant::now() + LONG;
    loop {
        if let EngineState::Failed { diagnostics } = engine.handle.state() {
            return diagnostics[0].to_string();
        }
        assert!(Instant::now() < until, "{:?}", engine.handle.state());
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_clamd_of_the_system_scans_and_says_which_one_it_is() {
    let clamd = Clamd::start("AlertExceedsMax yes\n");
    let engine = start(&clamd);
    assert_eq!(engine.names(WORD), ["Test.Seawall.Word-1.UNOFFICIAL"]);
    assert_eq!(engine.names(&gzip(WORD)).len(), 1, "unpacked");
    assert_eq!(engine.scan(b"harmless"), Ok(Outcome::Clean));
    assert_eq!(engine.scan(b""), Ok(Outcome::Clean));
    let described = description(&engine);
    assert!(described.version.contains("/27001/"), "{}", described.version);
    assert_eq!((described.rules, described.diagnostics), (0, Vec::new()));
    let all: Vec<_> =
        (0..60).map(|n| (n, engine.send(if n % 3 == 0 { WORD } else { b"clean" }, LONG))).collect();
    for (n, reply) in all {
        let infected = matches!(reply.recv_timeout(LONG).unwrap().result, Ok(Outcome::Infected(_)));
        assert_eq!(infected, n % 3 == 0, "{n}");
    }
    assert_eq!(engine.handle.status().restarts, 0);
}

/// What is called clean beyond its limits is said as a warning, and only then.
#[test]
fn a_clamd_that_is_silent_about_its_limits_is_told_from_one_that_is_not() {
    let mut deep = WORD.to_vec();
    (0..20).for_each(|_| deep = gzip(&deep));
    let clamd = Clamd::start("AlertExceedsMax no\n");
    let engine = start(&clamd);
    let warned = description(&engine);
    assert_eq!(warned.diagnostics.len(), 1);
    assert_eq!(warned.diagnostics[0].code, "clamav-limits");
    assert_eq!(engine.scan(&deep), Ok(Outcome::Clean), "as it says");
    let clamd = Clamd::start("AlertExceedsMax yes\n");
    let engine = start(&clamd);
    assert_ne!(description(&engine).generation, warned.generation);
    let Err(ScanError::Failed { reason }) = engine.scan(&deep) else { panic!("it is told") };
    assert!(reason.contains("not all of it was looked at"), "{reason}");
}

/// Of each verdict it is known which signatures looked, while they change under the scans.
#[test]
fn no_verdict_is_filed_under_signatures_that_did_not_look() {
    let clamd = Clamd::start("AlertExceedsMax yes\n");
    let engine = start(&clamd);
    let first = description(&engine).generation;
    let mut until = Instant::now() + LONG;
    let mut number = 27_001;
    let mut news = 0;
    let mut last = first;
    while news < 3 {
        number += 1;
        // It finds one word or the other.
        let (found, lost) = if number % 2 == 0 { (OTHER, WORD) } else { (WORD, OTHER) };
        daily(&clamd.folder.path().join("database"), number, found);
        clamd.reload();
        until = Instant::now().max(until) + LONG;
        loop {
            assert!(Instant::now() < until);
            let replies: Vec<_> = [found, lost, found, lost]
                .into_iter()
                .map(|word| (word == found, engine.send(word, LONG)))
                .collect();
            let mut done = false;
            for (newly, reply) in replies {
                let report = reply.recv_timeout(LONG).unwrap();
                let is_new = report.generation.unwrap() != last;
                let infected = matches!(report.result, Ok(Outcome::Infected(_)));
                assert!(report.result.is_ok(), "no scan is lost: {report:?}");
                assert_eq!(infected, is_new == newly, "{report:?}");
                done |= is_new;
            }
            if done {
                break;
            }
        }
        last = description(&engine).generation;
        news += 1;
    }
    assert_ne!(last, first);
}

#[test]
fn new_signatures_are_noticed_though_nobody_scans() {
    let clamd = Clamd::start("");
    let engine = start(&clamd);
    let first = engine.handle.generation();
    daily(&clamd.folder.path().join("database"), 27_002, OTHER);
    clamd.reload();
    let until = Instant::now() + LONG;
    while engine.handle.generation().is_none_or(|now| Some(now) == first) {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(engine.names(OTHER).len(), 1);
    assert_eq!(engine.handle.status().restarts, 1);
}

#[test]
fn a_clamd_that_goes_is_told_and_used_again_when_it_is_back() {
    let mut clamd = Clamd::start("");
    let engine = start(&clamd);
    assert_eq!(engine.names(WORD).len(), 1);
    clamd.kill();
    let told = failure(&engine);
    assert!(told.contains("error[clamav-socket]: nobody listens"), "{told}");
    let refused = engine.scan(WORD);
    assert!(matches!(refused, Err(ScanError::Unavailable { .. })), "{refused:?}");
    // Where it left its socket it makes a new one.
    clamd.process = Clamd::spawn(clamd.folder.path());
    assert!(engine.handle.wait_ready(LONG), "{:?}", engine.handle.state());
    assert_eq!(engine.names(WORD).len(), 1);
}

/// Killed in the midst of a scan, and at once started again: the scan is done by the next one.
#[test]
fn a_scan_is_not_lost_with_its_clamd() {
    let mut clamd = Clamd::start("");
    let engine = start(&clamd);
    let mut content = noise(40 << 20);
    content.extend_from_slice(WORD);
    let under_way = engine.send(&content, LONG);
    std::thread::sleep(Duration::from_millis(50));
    clamd.signal("STOP");
    let pid = clamd.process.id();
    fs::remove_file(clamd.socket()).unwrap();
    let next = Clamd::spawn(clamd.folder.path());
    clamd.kill();
    clamd.process = next;
    assert_ne!(clamd.process.id(), pid);
    let result = under_way.recv_timeout(LONG).unwrap().result;
    assert!(matches!(result, Ok(Outcome::Infected(_))), "{result:?}");
}

#[test]
fn a_stopped_clamd_costs_scans_until_it_goes_on() {
    let clamd = Clamd::start("");
    let engine = start(&clamd);
    clamd.signal("STOP");
    let report = engine.send(WORD, Duration::from_millis(500)).recv_timeout(LONG).unwrap();
    assert_eq!(report.result, Err(ScanError::TimedOut));
    let waits = engine.send(WORD, LONG);
    std::thread::sleep(Duration::from_millis(300));
    assert!(waits.try_recv().is_err());
    clamd.signal("CONT");
    let result = waits.recv_timeout(LONG).unwrap().result;
    assert!(matches!(result, Ok(Outcome::Infected(_))), "{result:?}");
}

/// clamd ends sessions that are silent, idle ones and those in a long scan.
#[test]
fn its_patience_with_silent_sessions_does_not_matter() {
    let clamd = Clamd::start(
        "CommandReadTimeout 3\nReadTimeout 3\nIdleTimeout 3\nMaxFileSize 1000M\nMaxScanSize 1000M\n",
    );
    let engine = start(&clamd);
    std::thread::sleep(Duration::from_secs(7));
    // As large as it takes for one scan to last longer than that.
    for size in [250 << 20, 500 << 20, 950 << 20] {
        let mut content = noise(size);
        content.extend_from_slice(WORD);
        let report = engine.send(&content, LONG).recv_timeout(LONG).unwrap();
        assert!(matches!(report.result, Ok(Outcome::Infected(_))), "{report:?}");
        if report.scanned > Duration::from_secs(5) {
            break;
        }
    }
    assert_eq!(engine.handle.status().restarts, 0);
}

#[test]
fn what_cannot_be_used_is_told_with_what_to_do() {
    let clamd = Clamd::start("");
    let file = clamd.folder.path().join("clamd.conf");
    let stranger = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    let stranger = stranger.map(str::to_owned).into_iter().chain(command(&clamd.socket()));
    for (command, words) in [
        (command(Path::new("/nonexistent/clamd.ctl")), "there is no such socket"),
        (command(&file), "this is no socket"),
        (stranger.collect(), "this user may not connect: see LocalSocketMode"),
    ] {
        let told = failure(&start_command(command));
        assert!(told.contains("error[clamav-socket]: ") && told.contains(words), "{told}");
    }
}
