//! The short way: what the driver asks in the ring, and that everything else goes the long way.

#![allow(clippy::unwrap_used)] // A test says what it expects by unwrapping it.

mod common;

use common::{Native, Reply, RingMode, eventually, is_denied, read_in_thread};
use rustix::fs::{Advice, fadvise};
use seawall_proto::{ContentHash, Exclude, FailMode, Mode, Policy, ScanRequest};
use seawall_region::Query;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

fn by_content(_: &ScanRequest, content: &[u8]) -> Reply {
    if content.starts_with(b"evil") { Reply::Infected } else { Reply::Clean }
}

/// What is written is not scanned for its own sake.
fn policy() -> Policy {
    Policy { mode: Mode::Open, fail_open: FailMode::Closed, ..Policy::default() }
}

fn start(ring: RingMode) -> Native {
    Native::start_in_ring(ring, policy(), by_content)
}

/// The host knows these contents.
fn knows(native: &Native, contents: &[&[u8]]) {
    let hashes = contents.iter().map(|content| ContentHash(*blake3::hash(content).as_bytes()));
    native.host.seen.known.lock().unwrap().extend(hashes);
}

fn asked(native: &Native) -> Vec<Query> {
    native.host.seen.asked.lock().unwrap().clone()
}

fn by_hash(content: &[u8]) -> Query {
    Query::Hash(ContentHash(*blake3::hash(content).as_bytes()))
}

/// By its hash, or piece by piece where it is longer than a reader hashes.
fn is_about(query: &Query, content: &[u8]) -> bool {
    match query {
        Query::Content { len, .. } => content.len() > 65_536 && *len as usize == content.len(),
        _ => content.len() <= 65_536 && *query == by_hash(content),
    }
}

#[test]
fn known_content_is_let_through_marked_and_remembered() {
    for mode in [RingMode::Looks, RingMode::Sleeps, RingMode::Late(Duration::from_millis(20))] {
        let native = start(mode);
        let contents: Vec<Vec<u8>> =
            [1, 4096, 16_384, 65_536, 65_537, 900_000].map(|len| vec![len as u8; len]).to_vec();
        for content in &contents {
            native.write(&content.len().to_string(), content);
            knows(&native, &[content]);
        }
        native.settle();
        let files = || contents.iter().map(|content| native.path(&content.len().to_string()));
        let all_are_read = || {
            let read = files().map(|path| fs::read(path).unwrap());
            assert_eq!(read.collect::<Vec<_>>(), contents);
        };
        all_are_read();
        let seen = asked(&native);
        assert_eq!(seen.len(), contents.len(), "{mode:?}");
        assert!(seen.iter().zip(&contents).all(|(query, content)| is_about(query, content)));
        assert_eq!(native.host.requests(), 0, "{mode:?}");
        assert_eq!(native.number("requests"), contents.len() as u64);
        assert_eq!(native.number("in_ring"), contents.len() as u64);
        let rings = native.host.seen.doorbells.load(Ordering::Relaxed);
        assert_eq!(rings > 0, mode == RingMode::Sleeps);
        // Marked: nobody hears of the next opens.
        let events = native.number("events");
        all_are_read();
        assert_eq!(native.number("events"), events);
        // Remembered, and with the hash: new signatures have each asked for by it alone.
        native.host.renew();
        native.settle();
        all_are_read();
        let again: Vec<_> = asked(&native).split_off(contents.len());
        let hashes = contents.iter().map(|content| by_hash(content));
        assert_eq!(again, hashes.collect::<Vec<_>>(), "{mode:?}");
        assert_eq!(native.host.requests(), 0);
    }
}

#[test]
fn the_doorbell_rings_before_it_is_asked() {
    const FILES: usize = 50;
    let native = start(RingMode::Sleeps);
    let content = |n: usize| vec![n as u8; 65_536];
    for n in 0..FILES {
        native.write(&n.to_string(), &content(n));
        knows(&native, &[&content(n)]);
    }
    native.settle();
    // On one CPU, where whoever is rung for runs at once.
    let cpus = rustix::thread::sched_getaffinity(None).unwrap();
    let cpu = (0..1024).find(|cpu| cpus.is_set(*cpu)).unwrap().to_string();
    let host = native.host.seen.thread.load(Ordering::Relaxed).to_string();
    let driver = native.number("worker").to_string();
    for (program, arguments) in [
        ("taskset", ["--cpu-list", "--pid", &cpu, &host].as_slice()),
        ("taskset", &["--all-tasks", "--cpu-list", "--pid", &cpu, &driver]),
        ("renice", &["-n", "-20", "-p", &host]),
    ] {
        let output = Command::new(program).args(arguments).output().unwrap();
        assert!(output.status.success(), "{program}: {output:?}");
    }
    // Another's turn may come first; were it rung later, the query would always be there.
    let is_early = |n: usize| {
        let before = asked(&native).len();
        assert_eq!(fs::read(native.path(&n.to_string())).unwrap(), content(n));
        assert!(eventually(|| asked(&native).len() > before), "it is asked in the ring");
        // The host does not look any more.
        std::thread::sleep(Duration::from_millis(5));
        native.host.seen.rung_at.lock().unwrap().contains(&(before, false))
    };
    assert!((0..FILES).any(is_early), "{:?}", native.host.seen.rung_at.lock().unwrap());
}

#[test]
fn what_the_host_does_not_know_to_be_clean_goes_the_long_way() {
    let native = start(RingMode::Looks);
    for n in 0..40 {
        native.write(&format!("new {n}"), format!("new {n}").as_bytes());
    }
    native.write("evil", b"evil");
    native.settle();
    assert!(is_denied(&fs::read(native.path("evil"))));
    for n in 0..40 {
        assert_eq!(
            fs::read(native.path(&format!("new {n}"))).unwrap(),
            format!("new {n}").as_bytes()
        );
    }
    assert_eq!(native.host.requests(), 41);
    // Where nothing is known asking is tried now and then only.
    let tries = asked(&native).len();
    assert!((4..20).contains(&tries), "{tries}");
    // Once something is known again it is asked each time.
    knows(&native, &[b"known"]);
    for n in 0..40 {
        native.write(&format!("known {n}"), b"known");
    }
    native.settle();
    for n in 0..40 {
        fs::read(native.path(&format!("known {n}"))).unwrap();
    }
    let tries = asked(&native).len() - tries;
    assert!(tries > 30, "{tries}");
}

/// Not while somebody writes it, not what is too long. What is on a disk a reader may not ask for, nor an exec, nor where
/// policy asks which file it is: a filler does.
#[test]
fn what_a_reader_may_not_ask_for_a_filler_does() {
    let native = start(RingMode::Looks);
    let long = vec![7; (1 << 20) + 1];
    let program = fs::read("/bin/true").unwrap();
    native.write("long", &long);
    native.write("written", b"written");
    native.write("program", &program);
    fs::set_permissions(
        native.path("program"),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    for (name, byte) in [("on disk", 8), ("known on disk", 9)] {
        let mut on_disk = File::create(native.path(name)).unwrap();
        on_disk.write_all(&vec![byte; 150_000]).unwrap();
        on_disk.sync_all().unwrap();
        fadvise(&on_disk, 0, None, Advice::DontNeed).unwrap();
    }
    knows(&native, &[&vec![9; 150_000], &program]);
    native.settle();
    fs::read(native.path("long")).unwrap();
    assert_eq!((asked(&native).len(), native.host.requests()), (0, 1));
    assert_eq!(fs::read(native.path("on disk")).unwrap(), vec![8; 150_000]);
    assert_eq!((asked(&native).len(), native.host.requests()), (1, 2), "unknown");
    assert_eq!(fs::read(native.path("known on disk")).unwrap(), vec![9; 150_000]);
    assert_eq!((asked(&native).len(), native.host.requests()), (2, 2));
    assert_eq!(asked(&native), [8, 9].map(|byte| by_hash(&vec![byte; 150_000])));
    assert_eq!(native.number("in_ring"), 1);
    // To open it for writing is an access, too.
    let writer = OpenOptions::new().append(true).open(native.path("written")).unwrap();
    let before = asked(&native).len();
    fs::read(native.path("written")).unwrap();
    drop(writer);
    assert_eq!(asked(&native).len(), before);
    let requests = native.host.requests();
    let status = Command::new(native.path("program")).status().unwrap();
    assert!(status.success());
    assert_eq!((asked(&native).len(), native.host.requests()), (before + 1, requests));
    let events = native.number("remembered");
    assert!(Command::new(native.path("program")).status().unwrap().success());
    assert_eq!(native.number("remembered"), events + 1);

    native.write("excluded", b"evil, but excluded");
    native.write("other", b"evil");
    native.write("fine", b"fine");
    knows(&native, &[b"fine"]);
    let excluded = native.path("excluded").as_os_str().as_bytes().to_vec();
    let exclude = Exclude { paths: vec![excluded.into()], ..Exclude::default() };
    native.host.set_policy(Policy { exclude, ..policy() });
    native.settle();
    let before = asked(&native).len();
    fs::read(native.path("excluded")).unwrap();
    assert_eq!(asked(&native).len(), before);
    assert!(is_denied(&fs::read(native.path("other"))));
    let requests = native.host.requests();
    fs::read(native.path("fine")).unwrap();
    assert_eq!((asked(&native).len(), native.host.requests()), (before + 2, requests));
    native.host.set_policy(Policy { mode: Mode::Off, ..policy() });
    native.settle();
    fs::read(native.path("other")).unwrap();
}

/// A host that looks and never answers, as one that is stuck, or a doorbell that is lost.
#[test]
fn a_host_that_does_not_answer_is_asked_in_the_long_way_and_then_no_more() {
    for mode in [RingMode::Silent, RingMode::Sleeps] {
        let native = start(mode);
        if mode == RingMode::Sleeps {
            // It hears no doorbell any more.
            native.host.seen.deaf.store(true, Ordering::Relaxed);
        }
        for n in 0..10 {
            native.write(&n.to_string(), format!("{n}").as_bytes());
        }
        native.write("evil", b"evil");
        native.settle();
        for n in 0..10 {
            let (read, took) = read_in_thread(native.path(&n.to_string())).join().unwrap();
            assert_eq!(read.unwrap(), format!("{n}").as_bytes());
            assert!(took < Duration::from_secs(3), "{took:?}");
        }
        assert!(is_denied(&fs::read(native.path("evil"))));
        assert_eq!(native.host.requests(), 11);
        let told = || native.log().contains("the host does not answer in the ring");
        assert!(eventually(told), "{}", native.log());
        assert_eq!(native.number("unscanned"), 0);
    }
}

#[test]
fn a_link_that_is_lost_under_a_query() {
    let native = start(RingMode::Late(Duration::from_millis(150)));
    knows(&native, &[b"known"]);
    native.write("known", b"known");
    native.settle();
    let reader = read_in_thread(native.path("known"));
    assert!(eventually(|| !asked(&native).is_empty()));
    native.host.down();
    native.host.up();
    let (read, _) = reader.join().unwrap();
    assert_eq!(read.unwrap(), b"known", "the next session has it");
    native.wait_protected();
    assert_eq!(native.number("unscanned"), 0);
}

#[test]
fn a_worker_that_dies_under_a_query_leaves_nobody_waiting() {
    let native = start(RingMode::Silent);
    native.write("file", b"file");
    native.settle();
    let reader = read_in_thread(native.path("file"));
    assert!(eventually(|| !asked(&native).is_empty()));
    native.kill_worker();
    let (read, _) = reader.join().unwrap();
    // On a busy machine it was asked in the long way by then.
    assert!(is_denied(&read) || read.is_ok_and(|read| read == b"file"));
    native.wait_protected();
    assert_eq!(fs::read(native.path("file")).unwrap(), b"file");
}

/// A content that changes between the copy and the reply: cut off, without an open; also with its time set back.
#[test]
fn a_file_that_changes_under_a_query_is_looked_at_anew() {
    let native = start(RingMode::Late(Duration::from_millis(120)));
    let before: &[u8] = b"evil once more and then known";
    knows(&native, &[before]);
    for (n, sets_time) in [false, true].into_iter().enumerate() {
        let name = n.to_string();
        native.write(&name, before);
        native.settle();
        let path = native.path(&name);
        let modified = fs::metadata(&path).unwrap().modified().unwrap();
        let count = asked(&native).len();
        let reader = read_in_thread(path.clone());
        assert!(eventually(|| asked(&native).len() > count));
        nix::unistd::truncate(&path, 4).unwrap();
        if sets_time {
            set_modified(&path, modified);
        }
        let (read, _) = reader.join().unwrap();
        assert!(is_denied(&read), "{read:?}");
        assert_eq!(native.host.requests(), n as u64 + 1);
    }
}

fn set_modified(path: &Path, time: SystemTime) {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let time = rustix::fs::Timespec {
        tv_sec: since.as_secs().try_into().unwrap(),
        tv_nsec: since.subsec_nanos().into(),
    };
    let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
    let flags = rustix::fs::AtFlags::empty();
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, flags).unwrap();
}

/// Changed after it was let through in the short way: as after any other verdict.
#[test]
fn a_file_that_changes_after_the_reply_is_not_remembered() {
    let native = start(RingMode::Looks);
    knows(&native, &[b"known and good"]);
    for (n, sets_time) in [false, true].into_iter().enumerate() {
        let name = n.to_string();
        let path = native.write(&name, b"known and good");
        native.settle();
        let modified = fs::metadata(&path).unwrap().modified().unwrap();
        fs::read(&path).unwrap();
        let mut writer = OpenOptions::new().write(true).open(&path).unwrap();
        writer.write_all(b"evil! and good").unwrap();
        drop(writer);
        if sets_time {
            set_modified(&path, modified);
        }
        assert!(is_denied(&fs::read(&path)), "{sets_time}");
    }
}

/// It may be written through a mapping without a change of its times: the query is given up.
#[test]
fn what_is_remembered_and_open_for_writing_goes_the_long_way() {
    let native = start(RingMode::Looks);
    knows(&native, &[b"good"]);
    let path = native.write("file", b"good");
    native.settle();
    fs::read(&path).unwrap();
    let writer = OpenOptions::new().append(true).open(&path).unwrap();
    native.host.renew();
    native.settle();
    let (in_ring, hashes) = (native.number("in_ring"), &native.host.seen.hashes);
    assert_eq!(fs::read(&path).unwrap(), b"good");
    assert_eq!(native.number("in_ring"), in_ring);
    assert_eq!(hashes.lock().unwrap().len(), 1, "it is asked for by its hash on the link");
    // It is let through for a while and not marked: each open is heard of.
    let remembered = native.number("remembered");
    fs::read(&path).unwrap();
    assert_eq!(native.number("remembered"), remembered + 1);
    drop(writer);
}

#[test]
fn a_region_that_is_unplugged_and_plugged_in_again() {
    let native = start(RingMode::Looks);
    let names: Vec<_> = (0..30).map(|n| n.to_string()).collect();
    for name in &names {
        native.write(name, name.as_bytes());
        knows(&native, &[name.as_bytes()]);
    }
    native.settle();
    let read = |names: &[String]| {
        for name in names {
            assert_eq!(fs::read(native.path(name)).unwrap(), name.as_bytes());
        }
    };
    read(&names[..10]);
    assert_eq!((asked(&native).len(), native.host.requests()), (10, 0));
    native.unplug();
    read(&names[10..20]);
    assert_eq!(asked(&native).len(), 10);
    assert_eq!(native.host.requests(), 10);
    native.plug();
    let sessions = native.host.seen.sessions.load(Ordering::Relaxed);
    assert!(eventually(|| native.host.seen.sessions.load(Ordering::Relaxed) > sessions));
    native.wait_protected();
    // It is told of the ring just after that.
    native.settle();
    read(&names[20..]);
    assert_eq!((asked(&native).len(), native.host.requests()), (20, 10));
    assert_eq!(native.number("unscanned"), 0);
}

/// Many at once, some known and some not, and one after the other from several processes.
#[test]
fn many_at_once_each_get_their_own_answer() {
    let native = start(RingMode::Looks);
    for n in 0..200 {
        let content = if n % 5 == 0 { format!("evil {n}") } else { format!("{n}").repeat(3000) };
        native.write(&n.to_string(), content.as_bytes());
        if n % 2 == 0 && n % 5 != 0 {
            knows(&native, &[content.as_bytes()]);
        }
    }
    native.settle();
    std::thread::scope(|scope| {
        for start in 0..8 {
            let native = &native;
            scope.spawn(move || {
                for n in (0..200).map(|n| (n + start * 25) % 200) {
                    let read = fs::read(native.path(&n.to_string()));
                    assert_eq!(is_denied(&read), n % 5 == 0, "{n}: {read:?}");
                }
            });
        }
    });
    assert_eq!(native.number("unscanned"), 0);
    assert!(!asked(&native).is_empty());
    assert_eq!(native.number("outstanding"), 0);
}
