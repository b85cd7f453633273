//! Whatever fails, no guest hangs, and nothing that was let through is forgotten.
//!
//! Waits are measured in the guest by the program that waits (`opener`). A guest is emulated, so the
//! deadlines here leave room for that; the bound is always the deadline and one second.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use rustix::process::Signal;
use seawall_client::{EngineState, EventKind, GuestState, Verdict};
use seawall_lab::wire::AgentPart;
use seawall_lab::{Guest, Kernel, Lab, Link, eicar};
use seawall_tests::{
    Checks, driver_number, driver_status, engine_fault, events, eventually, exposed, guest_view,
    has_event, infected_script, kernel_complaints, opener, options, service_status, shown, up,
};
use serde_json::Value;

const OPENER: &str = "/usr/local/sbin/opener";
/// Bound for what happens by itself within a few seconds on an idle machine.
const SOON: Duration = Duration::from_secs(60);
/// Deadline of opens and execs in milliseconds, where no other is named.
const DEADLINE_MS: u64 = 3_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Open,
    Closed,
}

/// The service's configuration: fail mode, deadline, and the engine that misbehaves beside YARA.
fn config(lab: &Lab, mode: Mode, deadline_ms: u64) -> String {
    let mode = if mode == Mode::Open { "open" } else { "closed" };
    let rules = lab.state().unwrap().rules;
    format!(
        "[policy.fail_mode]\nopen = \"{mode}\"\n\
         [policy.deadline]\nopen_ms = {deadline_ms}\nexec_ms = {deadline_ms}\n\
         [alarm]\nunprotected_after_ms = 3000\n\
         [[engine]]\nname = \"yara\"\ncommand = [\"seawall-engine-yara\", \"--rules\", {rules:?}]\n\
         [[engine]]\nname = \"fault\"\ncommand = [{fault:?}]\nscan_timeout_ms = 20000\n",
        fault = engine_fault().unwrap()
    )
}

/// Gives the service another configuration.
fn configure(lab: &Lab, mode: Mode, deadline_ms: u64) {
    lab.set_config(&config(lab, mode, deadline_ms)).unwrap();
    lab.stop_daemon().unwrap();
    lab.start_daemon().unwrap();
    let ready = || {
        let status = service_status(lab).unwrap();
        status.engines.iter().all(|engine| engine.state == EngineState::Ready)
    };
    assert!(eventually(SOON, ready), "the engines do not start");
    lab.wait_ready().unwrap();
}

fn start(kernel: Kernel, mode: Mode, deadline_ms: u64) -> (Lab, Guest) {
    let lab = up(options(1, kernel, Link::Vsock)).unwrap();
    let guest = lab.guest("g1").unwrap();
    guest.push(&opener().unwrap(), OPENER).unwrap();
    configure(&lab, mode, deadline_ms);
    (lab, guest)
}

fn number(result: &Value, field: &str) -> u64 {
    result[field].as_u64().unwrap_or_else(|| panic!("no `{field}` in {result}"))
}

fn json(text: &[u8]) -> Value {
    serde_json::from_slice(text)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(text)))
}

/// Runs `meanwhile` while the guest writes and opens one new file after another.
fn under_load(guest: &Guest, folder: &str, seconds: u32, meanwhile: impl FnOnce()) -> Value {
    let words = [OPENER, "load", folder, "8", &seconds.to_string()];
    let limit = Duration::from_secs(u64::from(seconds) + 120);
    let load = guest.command(words).stdin(eicar()).timeout(limit).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(2));
    meanwhile();
    json(&load.wait().unwrap().ok().unwrap().stdout)
}

/// What holds whatever happens.
fn nobody_waited_or_was_wronged(checks: &mut Checks, what: &str, mode: Mode, result: &Value) {
    println!("  {what}: {result}");
    let longest = number(result, "longest_ms");
    let bound = DEADLINE_MS + 1000;
    checks.that(&format!("{what}: no open took longer than {bound} ms"), longest <= bound, result);
    checks.that(&format!("{what}: files are what they are"), number(result, "wrong") == 0, result);
    let errors = result["errors"].as_array().unwrap().is_empty();
    checks.that(&format!("{what}: no other error"), errors, result);
    checks.that(&format!("{what}: there was a load"), number(result, "opens") >= 50, result);
    let denied = number(result, "evil_denied");
    checks.that(&format!("{what}: infected files were denied"), denied >= 10, result);
    match mode {
        Mode::Open => {
            let told = format!("{what}: failing open, no clean file was denied");
            let denied = number(result, "good_denied") + number(result, "create_denied");
            checks.that(&told, denied == 0, result);
        }
        Mode::Closed => {
            let told = format!("{what}: failing closed, no infected file was read");
            checks.that(&told, number(result, "evil_read") == 0, result);
            // A worker that dies with events in its hand that nobody has looked at: those that wait for
            // empty files are denied with the rest, a batch of each reader at most.
            let most = if what.contains("KilledWorker") { 16 } else { 0 };
            let told = format!("{what}: at most {most} new files could not be made");
            checks.that(&told, number(result, "create_denied") <= most, result);
        }
    }
}

/// What fail mode let through gets its scan: nothing waits any more, and what is infected is denied.
fn nothing_is_forgotten(checks: &mut Checks, what: &str, lab: &Lab, guest: &Guest, folder: &str) {
    lab.wait_ready().unwrap();
    checks.soon(&format!("{what}: all that was let through is scanned"), SOON, || {
        exposed(guest).is_ok_and(|exposed| exposed == 0)
    });
    let left = json(&guest.exec([OPENER, "each", folder]).unwrap().ok().unwrap().stdout);
    let left = left.as_array().unwrap();
    let denied = left.iter().all(|one| one["got"] == "denied");
    checks.that(&format!("{what}: {} let through, now denied", left.len()), denied, left);
    let infected = |path: &str| {
        has_event(lab, EventKind::Verdict, |event| {
            event.path.as_deref() == Some(path)
                && event.operation.as_deref() == Some("background")
                && event.verdict == Some(Verdict::Infected)
        })
    };
    if let Some(one) = left.first() {
        let path = format!("{folder}/{}", one["name"].as_str().unwrap());
        checks.that(&format!("{what}: {path} was found in the background"), infected(&path), ());
    }
}

fn guest_is_well(checks: &mut Checks, guest: &Guest) {
    let complaints = kernel_complaints(guest).unwrap();
    checks.that("the guest's kernel complains of nothing", complaints.is_empty(), complaints);
}

#[test]
fn parts_die_under_load_on_kernel_6_12() {
    parts_die(Kernel::V6_12, &FAULTS);
}

#[test]
fn parts_die_under_load_on_kernel_6_1() {
    parts_die(Kernel::V6_1, &FAULTS[..FAULTS_OF_THE_DRIVER]);
}

fn parts_die(kernel: Kernel, faults: &[Fault]) {
    let mut checks = Checks::of(format!("kernel {kernel}: parts die under load"));
    let (lab, guest) = start(kernel, Mode::Open, DEADLINE_MS);
    for mode in [Mode::Open, Mode::Closed] {
        if mode == Mode::Closed {
            configure(&lab, mode, DEADLINE_MS);
        }
        for fault in faults.iter().copied() {
            let (what, folder) =
                (format!("fail {mode:?}, {fault:?}"), format!("/data/{fault:?}-{mode:?}"));
            let result =
                under_load(&guest, &folder, fault.load_seconds(), || strike(&lab, &guest, fault));
            nobody_waited_or_was_wronged(&mut checks, &what, mode, &result);
            nothing_is_forgotten(&mut checks, &what, &lab, &guest, &folder);
        }
        user_programs_do_not_run_unscanned(&mut checks, &lab, &guest, mode);
        worker_dies_with_many_outstanding(&mut checks, &lab, &guest, mode);
    }
    let kinds: Vec<EventKind> = events(&lab).unwrap().iter().map(|event| event.kind).collect();
    for kind in [EventKind::WorkerRestarted, EventKind::Unscanned] {
        checks.that(&format!("the events tell of it: {kind:?}"), kinds.contains(&kind), ());
    }
    guest_is_well(&mut checks, &guest);
    checks.end();
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    KilledWorker,
    KilledSupervisor,
    KilledEngines,
    KilledService,
    StoppedService,
}

impl Fault {
    /// How long the load lasts; a service that stands still takes the longest to be given up.
    fn load_seconds(self) -> u32 {
        if self == Self::StoppedService { 12 } else { 7 }
    }
}

/// What differs from kernel to kernel first: on the older one only these are tried.
const FAULTS: [Fault; 5] = [
    Fault::KilledWorker,
    Fault::KilledSupervisor,
    Fault::StoppedService,
    Fault::KilledService,
    Fault::KilledEngines,
];
const FAULTS_OF_THE_DRIVER: usize = 3;

/// Lets one part die, or stand still, and waits until it is back.
fn strike(lab: &Lab, guest: &Guest, fault: Fault) {
    match fault {
        Fault::KilledWorker => guest.kill_agent(AgentPart::Worker).unwrap(),
        Fault::KilledSupervisor => {
            guest.kill_agent(AgentPart::Supervisor).unwrap();
            let supervised = || driver_status(guest).is_ok_and(|one| one["supervised"] == true);
            assert!(eventually(SOON, supervised), "nobody watches over the worker");
        }
        Fault::KilledEngines => assert_eq!(lab.kill_engines().unwrap(), 2),
        Fault::KilledService => {
            lab.kill_daemon().unwrap();
            std::thread::sleep(Duration::from_secs(3));
            lab.start_daemon().unwrap();
        }
        Fault::StoppedService => {
            let service = lab.daemon().unwrap().unwrap();
            assert!(service.signal(Signal::STOP));
            std::thread::sleep(Duration::from_secs(8));
            assert!(service.signal(Signal::CONT));
        }
    }
    let protected = || driver_status(guest).is_ok_and(|status| status["protected"] == true);
    assert!(eventually(SOON, protected), "not protected after: {fault:?}");
}

/// Exec fails closed for files that a user may write, whatever opens do; programs of the system run.
fn user_programs_do_not_run_unscanned(checks: &mut Checks, lab: &Lab, guest: &Guest, mode: Mode) {
    lab.stop_daemon().unwrap();
    let script = format!("/tmp/script-{mode:?}");
    guest.write(&infected_script(), &script, 0o755, Some(1000)).unwrap();
    let output = guest.command([&script]).as_user(1000).run().unwrap();
    checks.denied("a user's program while there is no service", &output);
    let output = guest.exec(["echo", "runs"]).unwrap();
    checks.that(
        "a program of the system runs all the same",
        output.text() == "runs",
        shown(&output),
    );
    lab.start_daemon().unwrap();
    lab.wait_ready().unwrap();
    checks.soon("the events tell who it was, though there was no service", SOON, || {
        has_event(lab, EventKind::Unscanned, |event| {
            let who = (event.uid, event.operation.as_deref(), event.decision.as_deref());
            event.path.as_deref() == Some(&script)
                && who == (Some(1000), Some("exec"), Some("deny"))
                && event.process.is_some()
        })
    });
}

/// 160 opens wait for a service that does not move, half of them for infected files, when the worker
/// dies. An answer that reached another's event would be seen.
fn worker_dies_with_many_outstanding(checks: &mut Checks, lab: &Lab, guest: &Guest, mode: Mode) {
    // Longer than it takes to look and to kill in an emulated guest.
    configure(lab, mode, 15_000);
    let what = format!("fail {mode:?}, 160 outstanding");
    let folder = format!("/data/many-{mode:?}");
    // Written while nobody looks: otherwise each file is scanned after its close.
    guest.stop_agent().unwrap();
    let write = format!(
        "mkdir {folder} && cd {folder} && bad=$(cat) && for i in $(seq 80); do \
         echo \"evil {mode:?} $i $bad\" >evil-$i; echo \"good {mode:?} $i\" >good-$i; done"
    );
    guest.command(["sh", "-c", &write]).stdin(eicar()).run().unwrap().ok().unwrap();
    guest.start_agent().unwrap();
    guest.wait_protected(SOON).unwrap();
    // The programs that are needed now are known before the service stands still.
    guest.exec([OPENER, "each", "/mnt"]).unwrap().ok().unwrap();
    driver_status(guest).unwrap();
    let service = lab.daemon().unwrap().unwrap();
    assert!(service.signal(Signal::STOP));
    let burst = guest.spawn([OPENER, "burst", &folder]).unwrap();
    let mut most = 0;
    let reached = eventually(Duration::from_secs(10), || {
        most = most.max(driver_number(guest, "outstanding").unwrap_or(0));
        most >= 100
    });
    checks.that(&format!("{what}: at least 100 at once"), reached, most);
    let killed = Instant::now();
    guest.kill_agent(AgentPart::Worker).unwrap();
    assert!(service.signal(Signal::CONT));
    let results = json(&burst.wait().unwrap().ok().unwrap().stdout);
    println!("  {what}: {most} seen, all answered {:?} after the kill", killed.elapsed());
    let results = results.as_array().unwrap();
    let got = |name: &str, got: &str| {
        results
            .iter()
            .filter(|one| one["name"].as_str().unwrap().starts_with(name) && one["got"] == got)
            .count()
    };
    let tally =
        [got("good", "good"), got("good", "denied"), got("evil", "evil"), got("evil", "denied")];
    checks.that(
        &format!("{what}: every open got an answer"),
        tally.iter().sum::<usize>() == 160,
        results,
    );
    let longest = results.iter().map(|one| number(one, "ms")).max().unwrap();
    checks.that(
        &format!("{what}: no wait beyond deadline and a second"),
        longest <= 16_000,
        longest,
    );
    let told =
        format!("{what}: each by its fail mode (good read, denied, evil read, denied {tally:?})");
    checks.that(&told, if mode == Mode::Open { tally[1] == 0 } else { tally[2] == 0 }, tally);
    lab.wait_ready().unwrap();
    checks.soon(&format!("{what}: all that was let through is scanned"), SOON, || {
        exposed(guest).is_ok_and(|exposed| exposed == 0)
    });
    let results = json(&guest.exec([OPENER, "each", &folder]).unwrap().ok().unwrap().stdout);
    let right = results.as_array().unwrap().iter().all(|one| {
        let evil = one["name"].as_str().unwrap().starts_with("evil");
        one["got"] == if evil { "denied" } else { "good" }
    });
    checks.that(&format!("{what}: with the worker back each gets its verdict"), right, results);
    configure(lab, mode, DEADLINE_MS);
}

#[test]
fn engines_misbehave() {
    let mut checks = Checks::of("engines that misbehave");
    let (lab, guest) = start(Kernel::V6_12, Mode::Open, 40_000);
    one_slow_scan_holds_up_nobody(&mut checks, &lab, &guest);
    for mode in [Mode::Open, Mode::Closed] {
        configure(&lab, mode, DEADLINE_MS);
        for fault in ["hang", "crash", "error"] {
            an_engine_fails(&mut checks, &lab, &guest, mode, fault);
        }
    }
    checks.soon("the engines are ready again", SOON, || {
        let engines = service_status(&lab).unwrap().engines;
        engines.iter().all(|engine| engine.state == EngineState::Ready)
    });
    let told = has_event(&lab, EventKind::EngineRestarting, |event| {
        event.engine.as_deref() == Some("fault")
    });
    checks.that("the events tell that the engine was replaced", told, ());
    guest_is_well(&mut checks, &guest);
    checks.end();
}

/// In an emulated guest two hundred files take some seconds, so the slow scan takes more than five.
fn one_slow_scan_holds_up_nobody(checks: &mut Checks, lab: &Lab, guest: &Guest) {
    // Written while nobody looks: otherwise each file is scanned after its close.
    guest.stop_agent().unwrap();
    let write = "mkdir /data/burst && cd /data/burst && \
                 { echo 'SEAWALL-FAULT sleep=15000 '; head -c 65000 /dev/zero; } >slow && \
                 for i in $(seq 200); do head -c 65536 /dev/urandom >file-$i; done";
    guest.sh(write).unwrap().ok().unwrap();
    guest.start_agent().unwrap();
    guest.wait_protected(SOON).unwrap();
    let before = events(lab).unwrap().len();
    let words = [OPENER, "burst", "/data/burst"];
    let output = guest.command(words).timeout(SOON * 2).run().unwrap().ok().unwrap();
    let results = json(&output.stdout);
    let results = results.as_array().unwrap();
    let slow = results.iter().find(|one| one["name"] == "slow").unwrap();
    let others = results.iter().filter(|one| one["name"] != "slow");
    let longest = others.clone().map(|one| number(one, "ms")).max().unwrap();
    println!("  slow scan {} ms, longest of the others {longest} ms", slow["ms"]);
    checks.that("200 files open beside a slow scan", results.len() == 201, results.len());
    let opened = results.iter().all(|one| one["got"] == "good");
    checks.that("all of them, and the slow one too", opened, results);
    checks.that("the slow one waits for its own scan", number(slow, "ms") >= 15_000, slow);
    checks.that("all others were done before it", number(slow, "order") == 200, slow);
    let ended = events(lab).unwrap().split_off(before);
    let ended: Vec<_> =
        ended.into_iter().filter(|event| event.kind == EventKind::SessionEnded).collect();
    checks.that("a slow scan does not cost the session", ended.is_empty(), ended);
}

fn an_engine_fails(checks: &mut Checks, lab: &Lab, guest: &Guest, mode: Mode, fault: &str) {
    let what = format!("fail {mode:?}, an engine with {fault}");
    let folder = format!("/data/{fault}-{mode:?}");
    // Both bad files are opened at once with clean and infected ones that nobody has seen.
    let write = format!(
        "mkdir {folder} && cd {folder} && bad=$(cat) && \
         echo 'SEAWALL-FAULT {fault} ' >fault-1; echo 'SEAWALL-FAULT {fault} 2' >fault-2; \
         for i in $(seq 10); do echo \"evil {what} $i $bad\" >evil-$i; echo \"good {what} $i\" >good-$i; done"
    );
    guest.command(["sh", "-c", &write]).stdin(eicar()).run().unwrap().ok().unwrap();
    let results = json(&guest.exec([OPENER, "burst", &folder]).unwrap().ok().unwrap().stdout);
    let results = results.as_array().unwrap();
    let longest = results.iter().map(|one| number(one, "ms")).max().unwrap();
    let bound = DEADLINE_MS + 1000;
    checks.that(&format!("{what}: no open took longer than {bound} ms"), longest <= bound, results);
    let got = |name: &str| {
        let of_name = results.iter().filter(|one| one["name"].as_str().unwrap().starts_with(name));
        of_name.map(|one| one["got"].as_str().unwrap()).collect::<Vec<_>>()
    };
    let by_mode = if mode == Mode::Open { "good" } else { "denied" };
    let told = format!("{what}: what it cannot scan gets fail mode");
    checks.that(&told, got("fault") == [by_mode; 2], got("fault"));
    // With fail open an infected file may pass, and with fail closed a clean one may not, where its
    // scan was in the same engine: but never the other way round.
    match mode {
        Mode::Open => checks.that(
            &format!("{what}: clean files open"),
            got("good") == ["good"; 10],
            got("good"),
        ),
        Mode::Closed => checks.that(
            &format!("{what}: infected ones do not"),
            got("evil") == ["denied"; 10],
            got("evil"),
        ),
    }
    guest.exec(["rm", "-r", &folder]).unwrap().ok().unwrap();
    let works = || {
        let output = guest.sh("echo $RANDOM $RANDOM >/data/probe && cat /data/probe").unwrap();
        output.success() && service_status(lab).unwrap().engines[1].state == EngineState::Ready
    };
    checks.soon(&format!("{what}: it is replaced and new files open"), SOON, works);
}

#[test]
fn a_guest_runs_out_of_everything() {
    let mut checks = Checks::of("a guest in trouble");
    let (lab, guest) = start(Kernel::V6_12, Mode::Closed, DEADLINE_MS);
    guest.push_bytes(&eicar(), "/data/eicar", 0o644).unwrap();
    guest.push_bytes(b"clean\n", "/data/clean", 0o644).unwrap();
    out_of_descriptors(&mut checks, &guest);
    a_file_system_that_hangs(&mut checks, &lab, &guest);
    full_disks(&mut checks, &guest);
    a_user_on_the_drivers_port(&mut checks, &lab, &guest);
    guest_is_well(&mut checks, &guest);
    checks.end();
}

/// Protection is there and the guest is usable.
fn all_is_well(checks: &mut Checks, what: &str, guest: &Guest) {
    checks.denied(&format!("{what}: EICAR"), &guest.exec(["cat", "/data/eicar"]).unwrap());
    let output = guest.exec(["cat", "/data/clean"]).unwrap();
    checks.that(&format!("{what}: a clean file opens"), output.text() == "clean", shown(&output));
    let script = "n=/tmp/new-$$; date >$n && cat $n && rm $n";
    let output = guest.sh(script).unwrap();
    checks.that(&format!("{what}: a new file opens"), output.success(), shown(&output));
}

fn out_of_descriptors(checks: &mut Checks, guest: &Guest) {
    let result =
        json(&guest.exec([OPENER, "exhaust", "/data/clean"]).unwrap().ok().unwrap().stdout);
    // EMFILE, errno(3), and no time lost over it.
    checks.that("a process without descriptors is told so", result["errno"] == 24, &result);
    checks.that("and opens again once it has some", result["again"] == true, &result);
    let limit = guest.sh("cat /proc/sys/fs/file-max").unwrap().text();
    // Root is not bound by this limit; a user takes what is left of it and holds it.
    let hoard = "echo $(($(cut -f1 /proc/sys/fs/file-nr) + 100)) >/proc/sys/fs/file-max; \
                 sleep 6 | setpriv --nnp su user -c '/usr/local/sbin/opener hoard /data/clean 500'";
    let hoard = guest.spawn(["sh", "-c", hoard]).unwrap();
    let none_left = || {
        let output = guest.command(["cat", "/data/clean"]).as_user(1000).run();
        !output.is_ok_and(|output| output.success())
    };
    let told = "the guest runs out of descriptors for users";
    checks.that(told, eventually(Duration::from_secs(5), none_left), ());
    all_is_well(checks, "out of descriptors", guest);
    let output = hoard.wait().unwrap();
    // ENFILE, errno(3).
    checks.that(
        "a user takes the last of them",
        output.text().contains("\"errno\":23"),
        shown(&output),
    );
    guest.sh(&format!("echo {limit} >/proc/sys/fs/file-max")).unwrap().ok().unwrap();
    all_is_well(checks, "with descriptors again", guest);
}

fn a_file_system_that_hangs(checks: &mut Checks, lab: &Lab, guest: &Guest) {
    guest.exec(["mkdir", "/mnt/fuse"]).unwrap().ok().unwrap();
    let server = guest.spawn([OPENER, "fuse", "/mnt/fuse"]).unwrap();
    let mounted = || guest.sh("grep -q /mnt/fuse /proc/mounts").unwrap().success();
    assert!(eventually(SOON, mounted), "the FUSE server does not mount");
    let hangs =
        guest.command(["cat", "/mnt/fuse/file"]).timeout(Duration::from_secs(8)).spawn().unwrap();
    let named = |status: &Value| {
        let uncovered = status["not_covered"].as_array().cloned().unwrap_or_default();
        uncovered.iter().any(|one| one["mount_point"] == "/mnt/fuse" && one["fs_type"] == "fuse")
    };
    checks.soon("`status` names the file system as not watched", SOON, || {
        driver_status(guest).is_ok_and(|status| named(&status))
    });
    checks.soon("the operator sees it too", SOON, || {
        let session = guest_view(lab, "g1").unwrap().session;
        let uncovered = session.map(|session| session.coverage.uncovered).unwrap_or_default();
        uncovered.iter().any(|one| one.mount_point == "/mnt/fuse")
    });
    all_is_well(checks, "a file system hangs", guest);
    let output = hangs.wait().unwrap();
    checks.that("its open hung meanwhile", output.timed_out, shown(&output));
    all_is_well(checks, "after an open that hung", guest);
    server.kill();
    let _ = guest.exec(["umount", "/mnt/fuse"]).unwrap();
}

fn full_disks(checks: &mut Checks, guest: &Guest) {
    let fill = "head -c 8388608 /dev/zero >/tmp/disk && losetup /dev/loop0 /tmp/disk && \
                mke2fs /dev/loop0 && mkdir -p /mnt/disk && mount -t ext4 /dev/loop0 /mnt/disk";
    guest.sh(fill).unwrap().ok().unwrap();
    guest.push_bytes(&eicar(), "/mnt/disk/eicar", 0o644).unwrap();
    // The driver's own log is on /run.
    let fill = "mount -o remount,size=1m /run; head -c 9000000 /dev/zero >/run/fill; \
                head -c 9000000 /dev/zero >/mnt/disk/fill; ! echo x >>/mnt/disk/fill && ! echo x >>/run/fill";
    let output = guest.sh(fill).unwrap();
    checks.that("the disks are full", output.success(), shown(&output));
    checks.denied("EICAR on a full disk", &guest.exec(["cat", "/mnt/disk/eicar"]).unwrap());
    all_is_well(checks, "full disks", guest);
    guest.kill_agent(AgentPart::Worker).unwrap();
    checks.soon("with its log full the driver starts again", SOON, || {
        driver_status(guest).is_ok_and(|status| status["protected"] == true)
    });
    all_is_well(checks, "full disks and a new worker", guest);
    let free =
        "rm /run/fill; umount /mnt/disk; losetup -d /dev/loop0; mount -o remount,size=50% /run";
    guest.sh(free).unwrap().ok().unwrap();
}

fn a_user_on_the_drivers_port(checks: &mut Checks, lab: &Lab, guest: &Guest) {
    let session = || guest_view(lab, "g1").unwrap().session.map(|session| session.started);
    let before = session();
    let words = [OPENER, "squat", "16"];
    let squat = guest.command(words).as_user(1000).timeout(SOON * 2).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(7));
    checks.that("a user on the driver's port does not displace it", session() == before, session());
    all_is_well(checks, "a user on the driver's port", guest);
    // Nor does he keep it away once its connection is lost.
    guest.link_reset().unwrap();
    guest.link_up().unwrap();
    checks.soon("the driver comes back past him", Duration::from_secs(15), || {
        session().is_some_and(|started| Some(started) != before)
    });
    guest.wait_protected(SOON).unwrap();
    all_is_well(checks, "with the user still there", guest);
    let result = json(&squat.wait().unwrap().ok().unwrap().stdout);
    let busy = number(&result, "connected") >= 20 && number(&result, "garbage_bytes") > 0;
    checks.that("he kept at it", busy, &result);
    checks.that("and the service goes on", lab.daemon().unwrap().is_some(), ());
    let log = lab.daemon_log().unwrap();
    checks.that("its log names the guest", log.contains("g1"), log);
}

#[test]
fn the_link_is_cut_and_then_the_power_over_vsock() {
    cut(Link::Vsock);
}

#[test]
fn the_link_is_cut_and_then_the_power_over_tcp() {
    cut(Link::Tcp);
}

fn cut(link: Link) {
    let mut checks = Checks::of(format!("{link}: the link is cut, then the power"));
    let lab = up(options(1, Kernel::V6_12, link)).unwrap();
    let guest = lab.guest("g1").unwrap();
    configure(&lab, Mode::Open, DEADLINE_MS);
    // Silence first; then, where the link can, a reset.
    let cuts: &[&str] = if link == Link::Vsock { &["silent", "reset"] } else { &["silent"] };
    for how in cuts {
        let before = events(&lab).unwrap().len();
        let since = |kind: EventKind| {
            let all = events(&lab).unwrap_or_default();
            all.iter().skip(before).any(|e| e.kind == kind && e.guest.as_deref() == Some("g1"))
        };
        let path = format!("/data/eicar-{how}");
        guest.push_bytes(&eicar(), &path, 0o644).unwrap();
        if *how == "silent" { guest.link_down() } else { guest.link_reset() }.unwrap();
        checks
            .soon(&format!("{how}: the alarm comes"), SOON, || since(EventKind::GuestUnprotected));
        let state = guest_view(&lab, "g1").unwrap().state;
        checks.that(&format!("{how}: `guests` shows it"), state == GuestState::Unprotected, state);
        let output = guest.exec(["cat", &path]).unwrap();
        checks.that(
            &format!("{how}: failing open EICAR is read"),
            output.stdout == eicar(),
            shown(&output),
        );
        checks.soon(&format!("{how}: the guest knows that it is not protected"), SOON, || {
            guest.agent_status().is_ok_and(|output| output.status == 1)
        });
        let waiting = exposed(&guest).unwrap();
        checks.that(&format!("{how}: the driver keeps it in mind"), waiting >= 1, waiting);
        guest.link_up().unwrap();
        checks.soon(&format!("{how}: the alarm ends"), SOON, || since(EventKind::GuestProtected));
        guest.wait_protected(SOON).unwrap();
        checks.soon(&format!("{how}: what was let through is scanned and reported"), SOON, || {
            exposed(&guest).is_ok_and(|exposed| exposed == 0)
                && has_event(&lab, EventKind::Verdict, |event| {
                    event.path.as_deref() == Some(&path)
                        && event.operation.as_deref() == Some("background")
                })
        });
        checks.denied(&format!("{how}: EICAR again"), &guest.exec(["cat", &path]).unwrap());
    }
    guest.exec(["sync"]).unwrap().ok().unwrap();
    let boot_id = || guest_view(&lab, "g1").unwrap().session.map(|session| session.driver.boot_id);
    let first = boot_id();
    guest.cut_power().unwrap();
    checks.soon("without power the guest is reported", SOON, || {
        guest_view(&lab, "g1").unwrap().state == GuestState::Unprotected
    });
    guest.boot().unwrap();
    lab.wait_ready().unwrap();
    checks.that("it boots protected, as another boot", boot_id() != first, (first, boot_id()));
    let output = guest.exec(["cat", "/data/eicar-silent"]).unwrap();
    checks.denied("EICAR that was on its disk", &output);
    guest_is_well(&mut checks, &guest);
    checks.end();
}
