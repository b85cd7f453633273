//! The engine as the service runs it, with Debian's clamd and signatures of one line.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{Engine, LONG, WORD, daily, database, gzip, noise, start_command};
use seawall_engine::Diagnostic;
use seawall_engine::host::{EngineState, Outcome, ScanError};

struct Own {
    engine: Engine,
    temporary: tempfile::TempDir,
}

impl std::ops::Deref for Own {
    type Target = Engine;

    fn deref(&self) -> &Engine {
        &self.engine
    }
}

fn start_with(database: &Path, more: &[&str]) -> Own {
    start_in(&[], database, more)
}

/// The same with `before` in front of the command; `{tmp}` in it is the temporary folder.
fn start_in(before: &[&str], database: &Path, more: &[&str]) -> Own {
    let temporary = tempfile::tempdir().unwrap();
    let shown = temporary.path().to_str().unwrap();
    let mut command: Vec<_> = before.iter().map(|word| word.replace("{tmp}", shown)).collect();
    command.push(env!("CARGO_BIN_EXE_seawall-engine-clamav").to_owned());
    for word in ["--database", database.to_str().unwrap(), "--temporary"] {
        command.push(word.to_owned());
    }
    command.push(shown.to_owned());
    command.extend(more.iter().map(|word| (*word).to_owned()));
    Own { engine: start_command(command), temporary }
}

fn start(database: &Path) -> Own {
    let own = start_with(database, &[]);
    assert!(own.handle.wait_ready(LONG), "{:?}", own.handle.state());
    own
}

impl Own {
    /// The process id of its clamd.
    fn clamd(&self) -> u32 {
        let engine = self.handle.status().pid.unwrap();
        let children = format!("/proc/{engine}/task/{engine}/children");
        fs::read_to_string(children).unwrap().trim().parse().unwrap()
    }

    /// Why it could not start.
    fn refusal(&self) -> Diagnostic {
        let until = Instant::now() + LONG;
        loop {
            match self.handle.state() {
                EngineState::Failed { diagnostics } => return diagnostics[0].clone(),
                EngineState::Ready { description } => panic!("ready: {description:?}"),
                state => assert!(Instant::now() < until, "{state:?}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn what_the_signatures_name_is_found_also_in_archives() {
    let database = database();
    let engine = start(database.path());
    let mut content = vec![b'.'; 100_000];
    content.extend_from_slice(WORD);
    let name = ["Test.Seawall.Word-1.UNOFFICIAL"];
    assert_eq!(engine.names(WORD), name);
    assert_eq!(engine.names(&content), name);
    assert_eq!(engine.names(&gzip(&content)), name, "unpacked");
    assert_eq!(engine.scan(b""), Ok(Outcome::Clean));
    assert_eq!(engine.scan(b"harmless"), Ok(Outcome::Clean));
    let EngineState::Ready { description } = engine.handle.state() else { panic!("ready") };
    assert_eq!((description.name.as_str(), description.rules), ("clamav", 1));
    assert!(description.version.starts_with("1."), "{}", description.version);
    // Many at a time on few sessions: each gets its own answer.
    let all: Vec<_> =
        (0..60).map(|n| (n, engine.send(if n % 3 == 0 { WORD } else { b"clean" }, LONG))).collect();
    for (n, reply) in all {
        let infected = matches!(reply.recv_timeout(LONG).unwrap().result, Ok(Outcome::Infected(_)));
        assert_eq!(infected, n % 3 == 0, "{n}");
    }
    assert_eq!(engine.handle.status().restarts, 0);
}

#[test]
fn content_beyond_a_limit_is_an_error_and_never_clean() {
    let database = database();
    let engine = start_with(database.path(), &["--scan-size", "1", "--recursion", "3"]);
    assert!(engine.handle.wait_ready(LONG), "{:?}", engine.handle.state());
    let mut noise = noise(2 << 20);
    noise.extend_from_slice(WORD);
    let bomb = gzip(&noise);
    let mut deep = WORD.to_vec();
    (0..6).for_each(|_| deep = gzip(&deep));
    for content in [bomb, deep] {
        match engine.scan(&content) {
            Err(ScanError::Failed { reason }) => {
                assert!(reason.contains("not all of it was looked at"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(engine.scan(b"harmless"), Ok(Outcome::Clean));
}

#[test]
fn a_bomb_is_unpacked_within_the_limits_and_told_beyond_them() {
    let database = database();
    let mut large = vec![b'.'; 100 << 20];
    large.extend_from_slice(WORD);
    let bomb = gzip(&gzip(&large));
    assert!(bomb.len() < 16 << 10, "{}", bomb.len());
    let folder = tempfile::tempdir().unwrap();
    for number in 0..50 {
        let text = format!("number {number}, long enough to be looked at");
        fs::write(folder.path().join(number.to_string()), text).unwrap();
    }
    let packed =
        Command::new("tar").arg("-C").arg(folder.path()).args(["-c", "."]).output().unwrap();
    let engine = start(database.path());
    assert_eq!(engine.names(&bomb).len(), 1);
    assert_eq!(engine.scan(&packed.stdout), Ok(Outcome::Clean));
    let engine = start_with(database.path(), &["--scan-size", "50", "--files", "10"]);
    for content in [&bomb, &packed.stdout] {
        match engine.scan(content) {
            Err(ScanError::Failed { reason }) => {
                assert!(reason.contains("not all of it was looked at"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(engine.handle.status().restarts, 0);
}

#[test]
fn content_that_keeps_clamd_busy_beyond_its_limit_costs_that_scan_alone() {
    let database = database();
    let engine = start(database.path());
    let first = engine.clamd();
    let busy = engine.send(&noise(300 << 20), Duration::from_millis(300));
    let beside: Vec<_> = (0..4).map(|_| engine.send(WORD, LONG)).collect();
    assert_eq!(busy.recv_timeout(LONG).unwrap().result, Err(ScanError::TimedOut));
    for reply in beside {
        let result = reply.recv_timeout(LONG).unwrap().result;
        assert!(matches!(result, Ok(Outcome::Infected(_))), "{result:?}");
    }
    assert_eq!(engine.names(WORD).len(), 1);
    assert_ne!(engine.clamd(), first, "it is not left to scan on");
}

/// Where there is no room to unpack, nobody has looked at what is inside.
#[test]
fn a_full_temporary_folder_is_an_error_and_never_clean() {
    let database = database();
    let script = "mount -t tmpfs -o size=1m none {tmp} && exec \"$@\"";
    let engine = start_in(&["unshare", "--mount", "sh", "-c", script, "sh"], database.path(), &[]);
    assert!(engine.handle.wait_ready(LONG), "{:?}", engine.handle.state());
    let mut large = vec![b'.'; 8 << 20];
    large.extend_from_slice(WORD);
    let report = engine.scan(&gzip(&large));
    assert!(matches!(report, Err(ScanError::Failed { .. })), "{report:?}");
    assert_eq!(engine.names(WORD).len(), 1, "it goes on");
}

#[test]
fn clamd_killed_in_the_midst_costs_no_scan_and_nothing_is_left_behind() {
    let database = database();
    let engine = start(database.path());
    let big = vec![b'.'; 40 << 20];
    let first = engine.clamd();
    let under_way = engine.send(&big, LONG);
    std::thread::sleep(Duration::from_millis(20));
    assert!(Command::new("kill").args(["-9", &first.to_string()]).status().unwrap().success());
    assert_eq!(under_way.recv_timeout(LONG).unwrap().result, Ok(Outcome::Clean), "scanned anew");
    assert_eq!(engine.names(WORD).len(), 1);
    let second = engine.clamd();
    assert_ne!(first, second);
    let folders = fs::read_dir(engine.temporary.path()).unwrap().count();
    assert_eq!(folders, 1, "the folder of the first was removed");
    let pid = engine.handle.status().pid.unwrap();
    drop(engine.engine);
    let gone = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z ")
    };
    let until = Instant::now() + Duration::from_secs(10);
    while !(gone(pid) && gone(second)) {
        assert!(Instant::now() < until, "clamd outlives its engine");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_stopped_clamd_is_killed_at_the_limit_and_replaced() {
    let database = database();
    let engine = start(database.path());
    let clamd = engine.clamd().to_string();
    assert!(Command::new("kill").args(["-STOP", &clamd]).status().unwrap().success());
    let report =
        engine.send(b"some content", Duration::from_millis(500)).recv_timeout(LONG).unwrap();
    assert_eq!(report.result, Err(ScanError::TimedOut));
    assert_eq!(engine.names(WORD).len(), 1, "the next one answers");
}

/// The engine has one content more in hand than clamd works on. The time that it waits there is not its own.
#[test]
fn content_that_waits_for_clamd_does_not_use_up_its_limit() {
    let database = database();
    let engine = start(database.path());
    let clamd = engine.clamd().to_string();
    let signal = |name: &str| {
        assert!(Command::new("kill").args([name, &clamd]).status().unwrap().success());
    };
    signal("-STOP");
    let in_work = [b"one".as_slice(), b"two"].map(|content| engine.send(content, LONG));
    std::thread::sleep(Duration::from_millis(100));
    let waits = engine.send(WORD, Duration::from_millis(300));
    std::thread::sleep(Duration::from_secs(1));
    signal("-CONT");
    for reply in in_work {
        assert_eq!(reply.recv_timeout(LONG).unwrap().result, Ok(Outcome::Clean));
    }
    let report = waits.recv_timeout(LONG).unwrap();
    assert!(matches!(report.result, Ok(Outcome::Infected(_))), "{report:?}");
    assert!(report.queued >= Duration::from_secs(1), "{report:?}");
    assert_eq!(engine.handle.status().restarts, 0);
}

#[test]
fn clamd_lives_in_a_sandbox() {
    let database = database();
    let engine = start(database.path());
    let clamd = engine.clamd();
    let status = fs::read_to_string(format!("/proc/{clamd}/status")).unwrap();
    for wanted in ["NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0000000000000000"] {
        assert!(status.contains(wanted), "{wanted} is missing in\n{status}");
    }
    let limits = fs::read_to_string(format!("/proc/{clamd}/limits")).unwrap();
    let data = limits.lines().find(|line| line.starts_with("Max data size")).unwrap();
    assert!(data.contains(&(2048_u64 << 20).to_string()), "{data}");
}

/// What stands for clamd tries to get out; it tells what worked in its log, which ends
/// up in the refusal.
#[test]
fn what_stands_in_for_clamd_cannot_reach_out() {
    let database = database();
    let stand_in = database.path().join("stand-in");
    let script = r#"#!/usr/bin/perl
        use Socket; use Fcntl; use POSIX;
        my ($folder) = $ARGV[0] =~ m{--config-file=(.*)/clamd.conf$};
        open(my $log, ">", "$folder/log");
        sub told { my ($what, $did) = @_; print $log "$what\n" if $did; }
        told("PERL", 1);
        told("READ", open(my $a, "<", "/etc/passwd"));
        told("WROTE", open(my $b, ">", "/etc/seawall-was-here"));
        told("WROTE", open(my $c, ">", "/tmp/seawall-was-here"));
        told("SOCKET", socket(my $d, PF_UNIX, SOCK_STREAM, 0));
        told("FORKED", defined(fork()));
        told("CHMOD", chmod(0644, "$folder/clamd.conf"));
        told("TIMES", utime(1, 1, "$folder/clamd.conf"));
        told("CUT", sysopen(my $e, "$folder/clamd.conf", O_RDONLY | O_TRUNC));
        told("CUT", truncate("$folder/clamd.conf", 0));
        told("SIGNAL", kill(0, getppid()));
        told("SESSION", POSIX::setsid() > 0);
        told("OWN-FOLDER", open(my $f, ">", "$folder/own"));
        close($log);
        POSIX::_exit(3);
"#;
    fs::write(&stand_in, script).unwrap();
    fs::set_permissions(&stand_in, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let engine = start_with(database.path(), &["--clamd", stand_in.to_str().unwrap()]);
    let reason = engine.refusal().reason;
    assert!(reason.ends_with("clamd ended (exit status: 3): PERL; OWN-FOLDER"), "{reason}");
}

/// Its socket is closed well before it ends: connecting may be refused, or a session end.
#[test]
fn a_clamd_that_closes_its_socket_is_heard_out() {
    let database = database();
    let stand_in = database.path().join("stand-in");
    let script = r#"#!/usr/bin/perl
        use POSIX;
        POSIX::close(3);
        sleep(1);
        my ($folder) = $ARGV[0] =~ m{--config-file=(.*)/clamd.conf$};
        open(my $log, ">", "$folder/log");
        print $log "no room for words\n";
        close($log);
        POSIX::_exit(3);
"#;
    fs::write(&stand_in, script).unwrap();
    fs::set_permissions(&stand_in, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let engine = start_with(database.path(), &["--clamd", stand_in.to_str().unwrap()]);
    let reason = engine.refusal().reason;
    assert!(reason.ends_with("clamd ended (exit status: 3): no room for words"), "{reason}");
}

#[test]
fn a_broken_database_is_told_in_clamd_s_words() {
    let folder = tempfile::tempdir().unwrap();
    daily(folder.path(), 1, WORD);
    let whole = fs::read(folder.path().join("daily.cud")).unwrap();
    let cut = &whole[..whole.len() / 3];
    for (name, text) in [
        ("broken.ndb", &b"this is no signature\n"[..]),
        ("rubbish.ndb", b"\x00\xff\xfe::::\x1b[31m:*:{{{{\n"),
        ("hostile.ndb", b"A:0:*:{0-99999999999999999999}(((((((((((((((((((((\n"),
        ("empty.hdb", b""),
        ("daily.cvd", cut),
        // Whole, and signed by nobody.
        ("main.cvd", &whole),
    ] {
        for entry in fs::read_dir(folder.path()).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
        fs::write(folder.path().join(name), text).unwrap();
        let engine = start_with(folder.path(), &[]);
        let told = engine.refusal().to_string();
        assert!(told.contains("clamav-start") && told.contains("clamd ended"), "{name}: {told}");
    }
    let gone = start_with(Path::new("/nonexistent/clamav"), &[]);
    assert!(!gone.handle.wait_ready(Duration::from_secs(3)));
}

/// Debian's test files: the payload in every container that ClamAV knows, found with one line.
#[test]
fn every_test_file_of_debian_is_found() {
    let folder = Path::new("/usr/share/clamav-testfiles");
    let files: Vec<_> = fs::read_dir(folder).unwrap().map(|one| one.unwrap().path()).collect();
    assert!(files.len() > 40, "{}", files.len());
    let database = tempfile::tempdir().unwrap();
    let line = "aa15bcf478d165efd2065190eb473bcb:544:Clamav.Test.File-6\n";
    fs::write(database.path().join("test.hdb"), line).unwrap();
    let engine = start(database.path());
    let missed: Vec<_> = files
        .iter()
        .filter(|file| {
            let content = fs::read(file).unwrap();
            engine.names(&content).is_empty()
        })
        .collect();
    assert!(missed.is_empty(), "{missed:#?}");
}
