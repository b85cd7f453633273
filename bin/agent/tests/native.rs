//! The driver on this machine's kernel, with a host that the test controls.

#![allow(clippy::unwrap_used)] // A test says what it expects by unwrapping it.

mod common;

use common::{Native, Reply, eventually, is_denied, read_in_thread};
use seawall_proto::{
    ExposureReason, FailMode, Notice, Operation, Policy, Process, ScanRequest, ToHost,
};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

fn by_content(_: &ScanRequest, content: &[u8]) -> Reply {
    if content.starts_with(b"evil") { Reply::Infected } else { Reply::Clean }
}

/// A deadline short enough for tests and long enough for a busy machine.
fn policy(fail_open: FailMode) -> Policy {
    Policy { fail_open, open_deadline_ms: 1500, exec_deadline_ms: 1500, ..Policy::default() }
}

#[test]
fn an_infected_file_is_denied_and_a_clean_one_opens() {
    let native = Native::start(Policy::default(), by_content);
    let (evil, good) = (native.write("evil", b"evil content"), native.write("good", b"good"));
    assert!(is_denied(&std::fs::read(&evil)));
    assert!(is_denied(&OpenOptions::new().write(true).truncate(true).open(&evil)), "O_TRUNC too");
    assert_eq!(std::fs::read(&good).unwrap(), b"good");
    assert!(native.stop());
    assert_eq!(std::fs::read(&evil).unwrap(), b"evil content", "the content is still there");
}

#[test]
fn a_clean_file_raises_no_event_until_it_changes() {
    marks_hold_until_a_change(&[]);
}

#[test]
fn the_same_with_the_marks_of_older_kernels() {
    marks_hold_until_a_change(&["--plain-marks"]);
}

fn marks_hold_until_a_change(options: &'static [&'static str]) {
    let native = Native::start_with(options, Policy::default(), by_content);
    let path = native.write("f", b"good");
    native.settle();
    std::fs::read(&path).unwrap();
    let before = (native.number("events"), native.host.requests());
    for _ in 0..10 {
        std::fs::read(&path).unwrap();
    }
    assert_eq!((native.number("events"), native.host.requests()), before, "marked clean");
    native.write("f", b"evil now");
    assert!(is_denied(&std::fs::read(&path)), "a change takes the mark away");
}

#[test]
fn new_signatures_take_all_marks_away() {
    let native = Native::start(Policy::default(), by_content);
    let path = native.write("f", b"good");
    native.settle();
    std::fs::read(&path).unwrap();
    let before = native.host.requests();
    std::fs::read(&path).unwrap();
    assert_eq!(native.host.requests(), before);
    native.host.renew();
    assert!(eventually(|| {
        std::fs::read(&path).unwrap();
        native.host.requests() > before
    }));
}

#[test]
fn a_file_written_through_a_mapping_is_scanned_after_its_close() {
    let native = Native::start(Policy::default(), by_content);
    let path = native.write("f", b"good content");
    native.settle();
    std::fs::read(&path).unwrap();
    // python3 maps, changes and closes it: no write(2), so the kernel leaves the mark alone.
    let script =
        "import mmap,sys; f=open(sys.argv[1],'r+b'); m=mmap.mmap(f.fileno(),0); m[0:4]=b'evil'";
    assert!(Command::new("python3").arg("-c").arg(script).arg(&path).status().unwrap().success());
    assert!(eventually(|| is_denied(&std::fs::read(&path))));
}

#[test]
fn an_execve_is_one_scan_though_the_kernel_asks_twice() {
    let native = Native::start(Policy::default(), by_content);
    let program = native.path("true");
    std::fs::copy("/bin/true", &program).unwrap();
    // So young that it may not be remembered; the scan after the close is not due yet either.
    assert!(Command::new(&program).status().unwrap().success());
    let on_access = |seen: &common::Seen| {
        let contents = seen.contents.lock().unwrap();
        contents.iter().filter(|(operation, _)| *operation != Operation::Background).count()
    };
    assert_eq!(on_access(&native.host.seen), 1);
    native.settle();
    assert!(Command::new(&program).status().unwrap().success());
    assert_eq!(on_access(&native.host.seen), 1, "remembered by now");
}

#[test]
fn an_exec_that_the_deadline_allows_is_not_held_or_judged_twice() {
    let policy = Policy { exec_deadline_ms: 1000, ..policy(FailMode::Closed) };
    let native = Native::start(policy, |_, _| Reply::Silence);
    let program = native.path("true");
    std::fs::copy("/bin/true", &program).unwrap();
    let start = Instant::now();
    assert!(Command::new(&program).status().unwrap().success(), "exec fails open for root's files");
    assert!(start.elapsed() < Duration::from_millis(2400), "{:?}", start.elapsed());
    assert!(is_denied(&std::fs::read(&program)), "an open of its own fails closed");
}

#[test]
fn an_infected_program_does_not_run_in_any_way() {
    let native = Native::start(Policy::default(), |_, content| {
        let evil = content.windows(4).any(|bytes| bytes == b"evil");
        if evil { Reply::Infected } else { Reply::Clean }
    });
    let script = native.write("script", b"#!/bin/sh\n# evil\nexit 0\n");
    std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
    assert!(is_denied(&Command::new(&script).status()));
    assert!(!Command::new("sh").arg(&script).status().unwrap().success(), "as an argument");
    let program = native.path("program");
    let mut bytes = std::fs::read("/bin/true").unwrap();
    bytes.extend_from_slice(b"evil");
    std::fs::write(&program, bytes).unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    assert!(is_denied(&Command::new(&program).status()));
}

#[test]
fn odd_files_have_their_stated_answers() {
    let native = Native::start(Policy::default(), by_content);
    // Empty: allowed at once, not a request.
    let before = native.host.requests();
    std::fs::read(native.write("empty", b"")).unwrap();
    assert_eq!(native.host.requests(), before);
    // Sparse: read as the zeros that it is.
    let sparse = native.path("sparse");
    File::create(&sparse).unwrap().set_len(3 << 20).unwrap();
    assert_eq!(std::fs::read(&sparse).unwrap().len(), 3 << 20);
    let whole = |(_, content): &(Operation, Vec<u8>)| content.len() == 3 << 20;
    assert!(native.host.seen.contents.lock().unwrap().iter().any(whole), "through a 1 MiB region");
    // A FIFO: nobody is held, nothing is read.
    let fifo = native.path("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let reader = read_in_thread(fifo.clone());
    let mut writer = OpenOptions::new().write(true).open(&fifo).unwrap();
    writer.write_all(b"through").unwrap();
    drop(writer);
    assert_eq!(reader.join().unwrap().0.unwrap(), b"through");
    // A device node.
    let null = native.path("null");
    let device = nix::sys::stat::makedev(1, 3);
    nix::sys::stat::mknod(
        &null,
        nix::sys::stat::SFlag::S_IFCHR,
        nix::sys::stat::Mode::S_IRWXU,
        device,
    )
    .unwrap();
    File::open(&null).unwrap();
    // A folder.
    assert!(std::fs::read_dir(native.path("")).unwrap().count() >= 4);
    // O_PATH opens nothing.
    let evil = native.write("evil", b"evil");
    OpenOptions::new().read(true).custom_flags(nix::libc::O_PATH).open(&evil).unwrap();
}

#[test]
fn a_file_that_a_writer_holds_is_scanned_and_not_remembered_as_clean() {
    let native = Native::start(Policy::default(), by_content);
    let path = native.write("log", b"good");
    native.settle();
    let mut writer = OpenOptions::new().append(true).open(&path).unwrap();
    writer.write_all(b" line").unwrap();
    native.settle();
    let before = native.host.requests();
    std::fs::read(&path).unwrap();
    assert_eq!(native.host.requests(), before + 1);
    writer.write_all(b" line").unwrap();
    std::fs::read(&path).unwrap();
    assert_eq!(native.host.requests(), before + 1, "let through for a while");
    let waits = || (native.number("exposed"), native.number("held_by_writer"));
    assert!(eventually(|| waits() == (1, 1)), "{}", native.status());
    drop(writer);
    assert!(eventually(|| native.host.requests() > before + 1), "scanned at the last close");
    assert!(eventually(|| waits() == (0, 0)), "{}", native.status());
}

#[test]
fn without_a_verdict_the_deadline_and_fail_mode_decide() {
    for (mode, denied) in [(FailMode::Open, false), (FailMode::Closed, true)] {
        let native = std::thread::spawn(move || {
            let native = Native::start(policy(mode), |_, _| Reply::Silence);
            let path = native.write("f", b"good");
            let (result, took) = read_in_thread(path).join().unwrap();
            assert_eq!(is_denied(&result), denied, "{mode:?}: {result:?}");
            assert!(took >= Duration::from_millis(1400), "{took:?}");
            assert!(took <= Duration::from_millis(2500), "{took:?}");
            assert_eq!(native.number("unscanned"), 1, "the worker keeps it, not its supervisor");
            let (process, waited_ms) = told_unscanned(&native, ExposureReason::Deadline);
            assert_eq!(process.name, own_name(), "looked up while it waited");
            assert_eq!(process.uid, Some(0));
            assert!((1400..=1600).contains(&waited_ms), "{waited_ms}");
            // What fail mode let through waits for its scan; what it denied does not.
            assert_eq!(native.number("exposed"), u64::from(!denied));
        });
        native.join().unwrap();
    }
}

fn own_name() -> Vec<u8> {
    std::fs::read("/proc/self/comm").unwrap().trim_ascii_end().to_vec()
}

/// Who waited, and how many milliseconds, as the host is told of an access without a verdict.
fn told_unscanned(native: &Native, why: ExposureReason) -> (Process, u32) {
    native.host.heard(|message| match message {
        ToHost::Notice(Notice::Unscanned { process, waited_ms, reason, .. }) if *reason == why => {
            Some((process.clone(), *waited_ms))
        }
        _ => None,
    })
}

#[test]
fn a_host_without_an_answer_is_fail_mode_too() {
    let native = Native::start(policy(FailMode::Closed), |_, _| Reply::Error);
    let path = native.write("f", b"good");
    let start = Instant::now();
    assert!(is_denied(&std::fs::read(&path)));
    assert!(start.elapsed() < Duration::from_millis(1400), "at once, not at the deadline");
}

#[test]
fn what_was_let_through_while_the_link_was_down_is_scanned_when_it_is_back() {
    let native = Native::start(Policy::default(), by_content);
    let path = native.write("evil", b"evil");
    native.settle();
    native.host.down();
    assert_eq!(std::fs::read(&path).unwrap(), b"evil", "fail open");
    assert_eq!(native.number("exposed"), 1);
    std::thread::sleep(Duration::from_millis(1100));
    native.host.up();
    native.wait_protected();
    let told = native.host.heard(|message| match message {
        ToHost::Notice(Notice::Unscanned { process, age_ms, .. }) => {
            Some((process.clone(), *age_ms))
        }
        _ => None,
    });
    assert_eq!(told.0.name, own_name());
    assert!((1_100..20_000).contains(&told.1), "{} ms ago", told.1);
    assert!(eventually(|| native.number("exposed") == 0));
    let contents = native.host.seen.contents.lock().unwrap();
    assert!(contents.contains(&(Operation::Background, b"evil".to_vec())));
}

/// Reads a file while the link is down, which lets it through.
fn let_through(native: &Native, name: &str, content: &[u8]) {
    native.host.down();
    assert!(eventually(|| !native.status()["protected"].as_bool().unwrap()));
    let path = native.write(name, content);
    assert_eq!(std::fs::read(path).unwrap(), content);
    assert!(eventually(|| native.number("exposed") == 1), "{}", native.status());
}

#[test]
fn what_was_let_through_is_known_after_worker_and_supervisor_have_died() {
    let mut native = Native::start(policy(FailMode::Open), by_content);
    let_through(&native, "f", b"evil");
    assert_eq!(native.status()["journal_in_memory"], serde_json::Value::Null);
    native.settle();
    let worker = native.number("worker");
    native.kill_supervisor();
    common::kill(worker);
    native.start_again();
    assert!(eventually(|| native.number("exposed") == 1), "{}", native.status());
    native.host.up();
    let scanned = (Operation::Background, b"evil".to_vec());
    assert!(eventually(|| native.host.seen.contents.lock().unwrap().contains(&scanned)));
    assert!(eventually(|| native.number("exposed") == 0), "{}", native.status());
}

/// An ext4 in a file.
struct Disk(tempfile::NamedTempFile);

impl Disk {
    fn make() -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8 << 20).unwrap();
        run(Command::new("mkfs.ext4").arg("-q").arg("-F").arg(file.path()));
        Self(file)
    }

    /// Mounts it on the first loop device that is free. Its device number.
    fn mount(&self, at: &Path) -> u64 {
        run(Command::new("mount").args(["-o", "loop"]).arg(self.0.path()).arg(at));
        std::fs::metadata(at).unwrap().dev()
    }

    /// Takes the first loop device that is free.
    fn attach(&self) -> Attached {
        let output = run(Command::new("losetup").args(["--find", "--show"]).arg(self.0.path()));
        Attached(String::from_utf8(output.stdout).unwrap().trim().to_owned())
    }
}

struct Attached(String);

impl Drop for Attached {
    fn drop(&mut self) {
        run(Command::new("losetup").arg("--detach").arg(&self.0));
    }
}

fn run(command: &mut Command) -> std::process::Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    output
}

/// Its number on disk counts, not where the kernel happened to attach it.
#[test]
fn what_was_let_through_is_known_where_its_file_system_comes_back_under_another_device_number() {
    let paths = Arc::new(Mutex::new(Vec::new()));
    let asked = Arc::clone(&paths);
    let mut native = Native::start(policy(FailMode::Open), move |request, content| {
        asked.lock().unwrap().push((request.file.path.to_vec(), request.file.path_is_true));
        by_content(request, content)
    });
    let disk = Disk::make();
    let first = disk.mount(&native.path(""));
    // Once it is watched, to write it anew is denied as well.
    let watched = || {
        let _denied = std::fs::write(native.path("watched"), b"evil");
        native.path("watched")
    };
    assert!(eventually(|| is_denied(&std::fs::read(watched()))), "{}", native.status());
    let_through(&native, "f", b"evil");
    native.settle();
    let worker = native.number("worker");
    native.kill_supervisor();
    common::kill(worker);
    run(Command::new("umount").arg(native.path("")));
    let other = Disk::make();
    let _in_its_place = other.attach();
    paths.lock().unwrap().clear();
    assert_ne!(disk.mount(&native.path("")), first, "another device number");
    native.start_again();
    assert!(eventually(|| native.number("exposed") == 1), "{}", native.status());
    native.host.up();
    let scanned = (Operation::Background, b"evil".to_vec());
    assert!(eventually(|| native.host.seen.contents.lock().unwrap().contains(&scanned)));
    assert!(eventually(|| native.number("exposed") == 0), "{}", native.status());
    let path = native.path("f").into_os_string().into_encoded_bytes();
    assert_eq!(*paths.lock().unwrap(), [(path, true)], "opened by its handle, it has its path");
}

#[test]
fn what_was_let_through_and_is_gone_counts_as_unknown() {
    let native = Native::start(policy(FailMode::Open), by_content);
    let_through(&native, "f", b"good");
    let path = native.path("f");
    // By now its path is in the journal.
    std::thread::sleep(Duration::from_secs(1));
    std::fs::remove_file(&path).unwrap();
    assert_eq!(native.number("unknown"), 0);
    native.host.up();
    let told = native.host.heard(|message| match message {
        ToHost::Notice(Notice::ExposureGone { path, reason }) => Some((path.to_vec(), *reason)),
        _ => None,
    });
    let path = path.into_os_string().into_encoded_bytes();
    assert_eq!(told, (path, ExposureReason::LinkDown));
    assert!(eventually(|| native.number("exposed") == 0 && native.number("unknown") == 1));
}

#[test]
fn where_more_is_let_through_than_has_room_all_files_are_scanned() {
    let native = Native::start(policy(FailMode::Open), by_content);
    native.host.down();
    assert!(eventually(|| !native.status()["protected"].as_bool().unwrap()));
    for number in 0..10_100 {
        let path = native.path(&format!("{number}"));
        // What is scanned after its close is no exposure.
        std::fs::write(&path, if number == 7 { "evil".into() } else { format!("{number}") })
            .unwrap();
        std::fs::read(path).unwrap();
    }
    let all = || native.status()["mounts_exposed"].as_array().unwrap().len();
    assert!(eventually(|| all() == 1), "{}", native.status());
    assert!(native.number("exposed") <= 10_000 + 1024);
    native.host.up();
    let mount = native.host.heard(|message| match message {
        ToHost::Notice(Notice::MountExposed { mount_point }) => Some(mount_point.to_vec()),
        _ => None,
    });
    let folder = native.path("").into_os_string().into_encoded_bytes();
    assert!(mount.is_empty() || folder.starts_with(&mount), "{mount:?}");
    let done = || all() == 0 && native.number("exposed") == 0;
    assert!((0..12).any(|_| eventually(done)), "{}", native.status());
    let contents = native.host.seen.contents.lock().unwrap();
    let scanned: std::collections::HashSet<_> =
        contents.iter().map(|(_, content)| content).collect();
    assert_eq!(scanned.len(), 10_100);
}

#[test]
fn a_file_above_the_limit_goes_on_and_is_scanned_in_the_background() {
    let policy = Policy { whole_file_limit: 64 * 1024, ..Policy::default() };
    let native = Native::start(policy, |_, _| Reply::Clean);
    let path = native.write("large", &vec![b'x'; 3 << 20]);
    assert_eq!(std::fs::read(&path).unwrap().len(), 3 << 20);
    let scanned = || {
        let contents = native.host.seen.contents.lock().unwrap();
        let all = contents.iter().map(|(operation, content)| (*operation, content.len()));
        all.filter(|found| *found == (Operation::Background, 3 << 20)).count() >= 1
    };
    assert!(eventually(|| scanned() && native.number("exposed") == 0));
    let contents = native.host.seen.contents.lock().unwrap();
    assert!(contents.iter().all(|(operation, _)| *operation == Operation::Background));
}

/// Unchanged since it was clean: after new signatures it is asked for by the hash that the host gave it.
#[test]
fn after_new_signatures_what_the_host_knows_is_not_sent_again() {
    let native = Native::start(Policy::default(), |_, content| {
        if content == b"changed" { Reply::Infected } else { Reply::Clean }
    });
    let paths = ["known", "unknown", "changes"].map(|name| native.write(name, name.as_bytes()));
    native.settle();
    paths.iter().for_each(|path| drop(std::fs::read(path).unwrap()));
    let hash = |content: &[u8]| seawall_proto::ContentHash(*blake3::hash(content).as_bytes());
    native.host.seen.known.lock().unwrap().push(hash(b"known"));
    native.write("changes", b"changed");
    native.settle();
    assert!(eventually(|| is_denied(&std::fs::read(&paths[2]))));
    let before = native.host.requests();
    native.host.renew();
    native.settle();
    for _ in 0..2 {
        assert_eq!(std::fs::read(&paths[0]).unwrap(), b"known");
        assert_eq!(std::fs::read(&paths[1]).unwrap(), b"unknown");
    }
    assert!(is_denied(&std::fs::read(&paths[2])));
    // The second one comes whole, and so does what was never clean as it is.
    assert_eq!(native.host.requests(), before + 2);
    let asked = native.host.seen.hashes.lock().unwrap().clone();
    assert_eq!(asked, [hash(b"known"), hash(b"unknown")]);
    assert_eq!(native.number("unscanned"), 0);
}

#[test]
fn a_file_system_can_be_unmounted_while_its_files_are_scanned_in_the_background() {
    let (asked, requests) = std::sync::mpsc::channel();
    let native = Native::start(Policy::default(), move |request, _| {
        asked.send((request.operation, request.file.path.to_vec())).unwrap();
        Reply::Silence
    });
    let path = native.write("f", b"content").into_os_string().into_encoded_bytes();
    let first = requests.recv_timeout(Duration::from_secs(10)).unwrap();
    assert_eq!(first, (Operation::Background, path), "though it is opened through another mount");
    // The host may have the content a moment before the driver closes the file.
    assert!(eventually(|| nix::mount::umount(&native.path("")).is_ok()));
    native.host.heard(|message| matches!(message, ToHost::Cancel(_)).then_some(()));
}

#[test]
fn one_slow_scan_holds_up_nobody_else() {
    static SLOW: Reply = Reply::Clean;
    let native = Native::start(Policy::default(), |_, content| {
        if content.starts_with(b"slow") {
            Reply::After(Duration::from_secs(3), &SLOW)
        } else {
            Reply::Clean
        }
    });
    let mut slow_content = vec![b'x'; 64 * 1024];
    slow_content[..4].copy_from_slice(b"slow");
    let slow = native.write("slow", &slow_content);
    let paths: Vec<_> =
        (0_u8..200).map(|n| native.write(&format!("f{n}"), &vec![n; 64 * 1024])).collect();
    let slow = read_in_thread(slow);
    let others: Vec<_> = paths.into_iter().map(read_in_thread).collect();
    for other in others {
        other.join().unwrap().0.unwrap();
    }
    assert!(!slow.is_finished(), "two hundred were done before the slow one");
    slow.join().unwrap().0.unwrap();
}

#[test]
fn a_slow_scan_does_not_cost_the_session() {
    static CLEAN: Reply = Reply::Clean;
    let policy = Policy { open_deadline_ms: 15_000, ..Policy::default() };
    let native = Native::start(policy, |_, _| Reply::After(Duration::from_secs(8), &CLEAN));
    let path = native.write("f", b"good");
    std::fs::read(&path).unwrap();
    let sessions = &native.host.seen.sessions;
    assert_eq!(sessions.load(std::sync::atomic::Ordering::Relaxed), 1);
    assert_eq!(native.number("unscanned"), 0);
}

/// Half of the contents are infected. Whatever dies meanwhile: with fail closed nothing infected is
/// ever read, with fail open nothing clean is ever denied. Each would be seen if an answer reached
/// another event than its own.
#[test]
fn a_worker_that_dies_is_told_though_nobody_waited() {
    let native = Native::start(Policy::default(), by_content);
    native.kill_worker();
    let orphans = native.host.heard(|message| match message {
        ToHost::Notice(Notice::WorkerRestarted { orphans }) => Some(*orphans),
        _ => None,
    });
    assert_eq!(orphans, 0);
}

fn worker_dies_under_load(mode: FailMode) {
    static CLEAN: Reply = Reply::Clean;
    static INFECTED: Reply = Reply::Infected;
    let native = Native::start(policy(mode), |request, content| {
        let waits = request.operation != Operation::Background;
        let pause = Duration::from_millis(if waits { request.id.0 * 37 % 900 } else { 0 });
        Reply::After(pause, if content.starts_with(b"evil") { &INFECTED } else { &CLEAN })
    });
    let files: Vec<_> = (0..160)
        .map(|n| {
            let kind = if n % 2 == 0 { "evil" } else { "good" };
            native.write(&format!("{kind}{n}"), format!("{kind} {n}").as_bytes())
        })
        .collect();
    for round in 0..3 {
        let readers: Vec<_> = files.iter().cloned().map(read_in_thread).collect();
        assert!(eventually(|| native.number("outstanding") >= 100), "round {round}");
        native.kill_worker();
        for (path, reader) in files.iter().zip(readers) {
            let (result, took) = reader.join().unwrap();
            assert!(took <= Duration::from_millis(2500), "{path:?} was held for {took:?}");
            let name = path.file_name().unwrap().to_string_lossy();
            match (mode, name.starts_with("evil")) {
                (FailMode::Closed, true) => assert!(is_denied(&result), "{name} was read"),
                (FailMode::Open, false) => assert!(result.is_ok(), "{name}: {result:?}"),
                _ => (),
            }
        }
        native.wait_protected();
    }
    // From the ledger, not by the sweep: that knows nothing of the accesses it answers.
    let log = native.log();
    let entered = log.lines().filter_map(|line| {
        let (_, line) = line.split_once("); ")?;
        line.split_once(" held accesses were answered by fail mode")?.0.parse::<u32>().ok()
    });
    assert_eq!(entered.filter(|entered| *entered >= 100).count(), 3, "{log}");
    if mode == FailMode::Open {
        assert!(eventually(|| native.number("exposed") == 0), "what was let through is rescanned");
    }
}

#[test]
fn a_worker_that_dies_leaves_nobody_hanging_fail_open() {
    worker_dies_under_load(FailMode::Open);
}

#[test]
fn a_worker_that_dies_leaves_nobody_hanging_fail_closed() {
    worker_dies_under_load(FailMode::Closed);
}

#[test]
fn a_supervisor_that_dies_is_replaced_without_a_gap() {
    let mut native = Native::start(policy(FailMode::Closed), by_content);
    let evil = native.write("evil", b"evil");
    native.kill_supervisor();
    assert!(is_denied(&std::fs::read(&evil)), "the worker goes on");
    assert_eq!(native.status()["supervised"], false);
    native.start_again();
    assert!(eventually(|| native.status()["supervised"] == true));
    native.wait_protected();
    assert!(is_denied(&std::fs::read(&evil)));
}

/// Nothing infected is read and nothing is judged by another's content, however two drivers meet.
#[test]
fn drivers_that_meet_leave_one() {
    let mut native = Native::start(policy(FailMode::Closed), by_content);
    let evil = native.write("evil", b"evil");
    for round in 0..3 {
        // The worker first, so that its supervisor is about to fork another one when it dies.
        native.kill_worker();
        std::thread::sleep(Duration::from_millis(40 * round));
        native.kill_supervisor();
        native.start_again();
        assert!(eventually(|| native.status()["supervised"] == true), "{}", native.status());
        native.wait_protected();
        let sessions = native.host.seen.sessions.load(std::sync::atomic::Ordering::Relaxed);
        assert!(is_denied(&std::fs::read(&evil)));
        std::thread::sleep(Duration::from_millis(1500));
        let now = native.host.seen.sessions.load(std::sync::atomic::Ordering::Relaxed);
        assert_eq!(now, sessions, "one driver keeps its session");
        assert_eq!(native.status()["supervised"], true);
    }
}

/// Between the old driver's end and the new one's session the old policy holds.
#[test]
fn no_driver_begins_with_another_policy_than_the_last_one_had() {
    let mut native = Native::start(policy(FailMode::Closed), by_content);
    let evil = native.write("evil", b"evil");
    native.kill_supervisor();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let readers: Vec<_> = (0..4)
        .map(|_| {
            let (stop, evil) = (Arc::clone(&stop), evil.clone());
            std::thread::spawn(move || {
                let mut denied = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    assert!(is_denied(&std::fs::read(&evil)), "after {denied} denials");
                    denied += 1;
                }
                denied
            })
        })
        .collect();
    std::thread::sleep(Duration::from_millis(200));
    native.start_again();
    assert!(eventually(|| native.status()["supervised"] == true));
    native.wait_protected();
    std::thread::sleep(Duration::from_millis(500));
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    for reader in readers {
        assert!(reader.join().expect("an infected file was read") > 0);
    }
}

#[test]
fn a_stopped_worker_is_answered_for_by_its_supervisor() {
    let native = Native::start(policy(FailMode::Open), |_, _| Reply::Silence);
    let path = native.write("f", b"good");
    let reader = read_in_thread(path);
    assert!(eventually(|| native.number("outstanding") == 1));
    let worker = nix::unistd::Pid::from_raw(i32::try_from(native.number("worker")).unwrap());
    nix::sys::signal::kill(worker, nix::sys::signal::Signal::SIGSTOP).unwrap();
    let (result, took) = reader.join().unwrap();
    assert!(result.is_ok() && took < Duration::from_millis(2600), "{result:?} {took:?}");
    nix::sys::signal::kill(worker, nix::sys::signal::Signal::SIGCONT).unwrap();
}

#[test]
fn more_than_may_be_held_is_answered_by_fail_mode() {
    let policy = Policy { open_deadline_ms: 20_000, ..policy(FailMode::Open) };
    let native = Native::start(policy, |_, _| Reply::Silence);
    let paths: Vec<_> = (0..1100).map(|n| native.write(&format!("f{n}"), b"good")).collect();
    // Slowly enough that descriptors of answered accesses are closed while further ones arrive.
    let readers: Vec<_> = paths
        .into_iter()
        .map(|path| {
            std::thread::sleep(Duration::from_millis(1));
            read_in_thread(path)
        })
        .collect();
    assert!(eventually(|| native.number("overloaded") >= 60), "{}", native.status());
    let outstanding = native.number("outstanding");
    assert!(
        outstanding <= 1024 + 2,
        "{outstanding}: the bound, and one in the hand of each reader"
    );
    native.host.down();
    for reader in readers {
        let (result, took) = reader.join().unwrap();
        assert!(result.is_ok() && took < Duration::from_secs(15), "{result:?} {took:?}");
    }
}

/// A clean verdict for what a mapping has changed meanwhile makes nothing clean.
#[test]
fn a_content_that_a_mapping_changes_while_it_is_scanned_is_not_remembered() {
    static CLEAN: Reply = Reply::Clean;
    let native = Native::start(Policy::default(), |request, content| match content {
        [b'e', ..] => Reply::Infected,
        [b's', ..] if request.operation == Operation::Open => {
            Reply::After(Duration::from_millis(2000), &CLEAN)
        }
        _ => Reply::Clean,
    });
    let path = native.write("f", b"good content");
    native.settle();
    // Mapped and stored to once, so that later stores change no times. Then somebody reads it, and the
    // evil is stored, unmapped and closed while that scan is under way.
    let script = "import mmap,sys,time\n\
        f=open(sys.argv[1],'r+b'); m=mmap.mmap(f.fileno(),0); m[0:4]=b'slow'\n\
        print('mapped',flush=True); time.sleep(1); m[0:4]=b'evil'; m.close(); f.close()";
    let mut writer = Command::new("python3");
    let writer = writer.arg("-c").arg(script).arg(&path).stdout(std::process::Stdio::piped());
    let mut writer = writer.spawn().unwrap();
    writer.stdout.take().unwrap().read_exact(&mut [0; 7]).unwrap();
    // Or the mark from before hides it: a stated limit while the mapping lives.
    native.host.renew();
    std::thread::sleep(Duration::from_millis(200));
    let reader = read_in_thread(path.clone());
    assert!(writer.wait().unwrap().success());
    let (result, took) = reader.join().unwrap();
    assert!(result.is_ok() && took > Duration::from_millis(1500), "{result:?} {took:?}");
    native.settle();
    assert!(is_denied(&std::fs::read(&path)), "it is evil by now");
}

/// How an exec was answered counts for the open that belongs to it, and for no later one.
#[test]
fn an_exec_that_was_denied_does_not_let_a_later_open_pass() {
    let policy = Policy { exec_deadline_ms: 4000, ..Policy::default() };
    let native = Native::start(policy, |_, content| {
        let evil = content.windows(4).any(|bytes| bytes == b"evil");
        if evil { Reply::Infected } else { Reply::Clean }
    });
    let program = native.path("program");
    let mut bytes = std::fs::read("/bin/true").unwrap();
    bytes.extend_from_slice(b"evil");
    std::fs::write(&program, bytes).unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    native.settle();
    // One process that executes it, and opens it when only the expected answer could still count.
    let script = "import os,sys,time\n\
        try: os.execv(sys.argv[1], ['x'])\n\
        except PermissionError: pass\n\
        for _ in range(16):\n \
          time.sleep(0.25)\n \
          try: open(sys.argv[1]).close(); sys.exit(9)\n \
          except PermissionError: pass";
    let status = Command::new("python3").arg("-c").arg(script).arg(&program).status().unwrap();
    assert_eq!(status.code(), Some(0), "an infected file was opened");
}

#[test]
fn a_file_into_which_another_is_cloned_is_looked_at_again() {
    for make in ["mkfs.xfs", "mkfs.btrfs"] {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        File::create(&image).unwrap().set_len(512 << 20).unwrap();
        assert!(Command::new(make).arg("-q").arg(&image).status().unwrap().success());
        let native = Native::start_on(&image, Policy::default(), |_, content| {
            if content.starts_with(b"evil") { Reply::Infected } else { Reply::Clean }
        });
        let bad = native.write("bad", &[b"evil", [7; 8188].as_slice()].concat());
        let path = native.write("good", &[b"good", [7; 8188].as_slice()].concat());
        native.settle();
        for _ in 0..3 {
            std::fs::read(&path).unwrap();
        }
        assert!(is_denied(&std::fs::read(&bad)), "{make}");
        // Who clones it has made it himself.
        let mut making = OpenOptions::new();
        let making = making.read(true).write(true).create_new(true);
        let mut source = making.open(native.path("source")).unwrap();
        source.write_all(&[b"evil", [7; 8188].as_slice()].concat()).unwrap();
        let target = OpenOptions::new().write(true).open(&path).unwrap();
        rustix::fs::ioctl_ficlone(&target, &source).unwrap();
        drop((source, target));
        assert!(is_denied(&std::fs::read(&path)), "{make}: {}", native.status());
    }
}
