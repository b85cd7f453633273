//! Every engine on files that a guest opens: YARA-X, ClamAV, hash lists, and one in C that is not ours.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use seawall_client::{EngineState, EventKind, Verdict};
use seawall_lab::{Engine, Guest, Kernel, Lab, LabOptions, Link, eicar};
use seawall_tests::{Checks, events, options, service_status, shown, up};

const SOON: Duration = Duration::from_secs(60);
/// MD5, size and name of the payload in all of Debian's clamav-testfiles.
const PAYLOAD: &str = "aa15bcf478d165efd2065190eb473bcb:544:Clamav.Test.File-6\n";

/// The guide's engine in C, built as the guide says.
fn word_engine(folder: &Path) -> PathBuf {
    let library = seawall_lab::build_program("seawall-engine-c", false).unwrap();
    let library = library.with_file_name("libseawall_engine.a");
    let source = seawall_lab::workspace().join("crates/engine-c");
    let program = folder.join("word");
    let output = Command::new("cc")
        .args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-I"])
        .arg(source.join("include"))
        .arg("-o")
        .arg(&program)
        .arg(source.join("examples/word.c"))
        .arg(library)
        .args(["-lpthread", "-ldl", "-lm"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    program
}

fn wait_ready(lab: &Lab, checks: &mut Checks, what: &str) {
    checks.soon(what, SOON, || {
        let status = service_status(lab).unwrap();
        status.engines.iter().all(|engine| engine.state == EngineState::Ready)
    });
}

/// The engine that found the file, as the events tell.
fn found_by(lab: &Lab, path: &str) -> Option<String> {
    let events = events(lab).unwrap();
    let is_it = |event: &&seawall_client::Event| {
        event.kind == EventKind::Verdict
            && event.path.as_deref() == Some(path)
            && event.verdict == Some(Verdict::Infected)
    };
    events.iter().find(is_it).and_then(|event| event.engine.clone())
}

#[test]
fn every_engine_denies_what_it_knows() {
    let mut checks = Checks::of("all engines together");
    let engines = vec![Engine::Hash, Engine::Yara, Engine::Clamav];
    let lab = up(LabOptions { engines, ..options(1, Kernel::V6_12, Link::Vsock) }).unwrap();
    let guest = lab.guest("g1").unwrap();
    wait_ready(&lab, &mut checks, "all engines are ready");
    guest.write(&eicar(), "/data/eicar", 0o644, None).unwrap();
    checks.denied("EICAR", &guest.exec(["cat", "/data/eicar"]).unwrap());
    checks.soon("by the first that knows it", SOON, || {
        found_by(&lab, "/data/eicar").as_deref() == Some("hash")
    });
    all_test_files_are_denied(&mut checks, &lab, &guest);
    one_killed_engine_costs_nothing_else(&mut checks, &lab, &guest);
    an_engine_that_is_not_ours(&mut checks, &lab, &guest);
    checks.end();
}

/// With one line for the payload, every container of it.
fn all_test_files_are_denied(checks: &mut Checks, lab: &Lab, guest: &Guest) {
    let set = lab.state().unwrap().state_dir.join("payload");
    std::fs::create_dir_all(&set).unwrap();
    std::fs::write(set.join("payload.hdb"), PAYLOAD).unwrap();
    let set = set.to_str().unwrap();
    let checked = lab.cli(["signatures", "check", set]).unwrap();
    checks.that("the new signature is right", checked.status.success(), &checked);
    let applied = lab.cli(["signatures", "apply", set]).unwrap();
    checks.that("the new signature is taken", applied.status.success(), &applied);
    guest.exec(["mkdir", "/data/files"]).unwrap().ok().unwrap();
    let mut opened = Vec::new();
    let folder = Path::new("/usr/share/clamav-testfiles");
    let mut files: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    checks.that("there are the files", files.len() > 40, files.len());
    for file in &files {
        let name = format!("/data/files/{}", file.file_name().unwrap().to_str().unwrap());
        guest.push_bytes(&std::fs::read(file).unwrap(), &name, 0o644).unwrap();
    }
    let script = "for f in /data/files/*; do cat $f >/dev/null 2>&1 && echo $f; done; true";
    let output =
        guest.command(["sh", "-c", script]).timeout(Duration::from_secs(240)).run().unwrap();
    checks.that("the guest got through", output.success(), shown(&output));
    opened.extend(output.text().lines().map(str::to_owned));
    checks.that("every test file is denied", opened.is_empty(), opened);
    let by = found_by(lab, "/data/files/clam.zip");
    checks.that("ClamAV finds what is in an archive", by.as_deref() == Some("clamav"), by);
    guest.write(b"harmless", "/data/files/harmless", 0o644, None).unwrap();
    let output = guest.exec(["cat", "/data/files/harmless"]).unwrap();
    checks.that("and nothing else", output.text() == "harmless", shown(&output));
    clamdscan_reports_the_same(checks, lab, folder, files.len());
    let back = lab.cli(["signatures", "rollback"]).unwrap();
    checks.that("the set before is back", back.status.success(), &back);
    // The driver hears of it with the next heartbeat at the latest, and asks again.
    checks.soon("what only the new one knew opens again", SOON, || {
        guest.exec(["cat", "/data/files/clam.zip"]).unwrap().success()
    });
    let forth = lab.cli(["signatures", "apply", set]).unwrap();
    checks.that("and the new one", forth.status.success(), &forth);
    checks.denied("the archive", &guest.exec(["cat", "/data/files/clam.zip"]).unwrap());
}

/// Debian's client on the host, at the service's socket.
fn clamdscan_reports_the_same(checks: &mut Checks, lab: &Lab, folder: &Path, files: usize) {
    let state = lab.state().unwrap();
    let config = state.state_dir.join("clamdscan.conf");
    std::fs::write(&config, format!("LocalSocket {}\n", state.clamd_socket.display())).unwrap();
    let output = Command::new("clamdscan")
        .args(["--fdpass", "--no-summary", "--config-file"])
        .arg(&config)
        .arg(folder)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let found = text.lines().filter(|line| line.ends_with(" FOUND")).count();
    checks.that("clamdscan reports every test file", found == files, &text);
    checks.that("and says so", output.status.code() == Some(1), &output);
}

fn one_killed_engine_costs_nothing_else(checks: &mut Checks, lab: &Lab, guest: &Guest) {
    let restarts = |name: &str| {
        let status = service_status(lab).unwrap();
        status.engines.iter().find(|engine| engine.name == name).map(|engine| engine.restarts)
    };
    for name in ["hash", "yara", "clamav"] {
        let before = restarts(name);
        let load = "mkdir -p /data/load; for i in $(seq 60); do echo $0 $i >/data/load/$0-$i; done; sleep 1; \
                    for i in $(seq 60); do cat /data/load/$0-$i >/dev/null || echo refused $i; done";
        let running = guest.command(["sh", "-c", load, name]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(1500));
        let status = service_status(lab).unwrap();
        let pid = status.engines.iter().find(|engine| engine.name == name).unwrap().pid.unwrap();
        let killed = Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
        assert!(killed.success());
        let output = running.wait().unwrap();
        checks.that(
            &format!("{name} killed: no open fails"),
            output.text().is_empty() && output.success(),
            shown(&output),
        );
        checks.soon(&format!("{name} is replaced"), SOON, || restarts(name) > before);
        wait_ready(lab, checks, &format!("{name} is ready again"));
    }
    guest.write(&eicar(), "/data/eicar-again", 0o644, None).unwrap();
    checks.denied("EICAR after all that", &guest.exec(["cat", "/data/eicar-again"]).unwrap());
}

/// A program in C that the configuration names, and nothing else.
fn an_engine_that_is_not_ours(checks: &mut Checks, lab: &Lab, guest: &Guest) {
    let state = lab.state().unwrap();
    let word = state.state_dir.join("word.txt");
    std::fs::write(&word, "petrichor\n").unwrap();
    let program = word_engine(&state.state_dir);
    let config = format!(
        "[[engine]]\nname = \"yara\"\ncommand = [\"seawall-engine-yara\", \"--rules\", {:?}]\n\
         [[engine]]\nname = \"word\"\ncommand = [{program:?}, {word:?}]\nmemory_mib = 64\n",
        state.rules
    );
    lab.set_config(&config).unwrap();
    lab.stop_daemon().unwrap();
    lab.start_daemon().unwrap();
    wait_ready(lab, checks, "the engine in C is ready");
    lab.wait_ready().unwrap();
    guest.write(b"the smell is called petrichor", "/data/rain", 0o644, None).unwrap();
    guest.write(b"the smell has no name", "/data/sun", 0o644, None).unwrap();
    checks.denied("what the engine in C looks for", &guest.exec(["cat", "/data/rain"]).unwrap());
    let output = guest.exec(["cat", "/data/sun"]).unwrap();
    checks.that("and nothing else", output.success(), shown(&output));
    checks.soon("the event names it", SOON, || {
        found_by(lab, "/data/rain").as_deref() == Some("word")
    });
    let status = service_status(lab).unwrap();
    let pid = status.engines.iter().find(|engine| engine.name == "word").unwrap().pid.unwrap();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    for wanted in ["NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0000000000000000"] {
        checks.that(&format!("the same sandbox: {wanted}"), status.contains(wanted), &status);
    }
}
