//! Many opens of one file at once, on this machine's kernel.

#![allow(clippy::unwrap_used)] // A test says what it expects by unwrapping it.

mod common;

use common::{Native, Reply, eventually, is_denied, read_in_thread};
use seawall_proto::{ContentHash, FailMode, Policy, ScanRequest};
use std::fs::OpenOptions;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A host that takes a while, and calls contents that begin so infected.
fn slow(_: &ScanRequest, content: &[u8]) -> Reply {
    std::thread::sleep(Duration::from_millis(300));
    if content.starts_with(b"evil") { Reply::Infected } else { Reply::Clean }
}

/// What was written has been scanned after its close, and is old enough to be remembered.
fn scanned(native: &Native) {
    assert!(eventually(|| native.host.requests() > 0), "{}", native.status());
    // The host takes a third of that.
    std::thread::sleep(Duration::from_secs(1));
}

/// Larger than what is asked for in the ring.
fn content(start: &[u8]) -> Vec<u8> {
    let mut content = vec![7; 3 << 20];
    content[..start.len()].copy_from_slice(start);
    content
}

#[test]
fn many_openers_have_a_file_read_once() {
    let native = Native::start(Policy::default(), slow);
    let path = native.write("large", &content(b"good"));
    scanned(&native);
    // Forgotten: nobody has looked at it since.
    native.host.renew();
    std::thread::sleep(Duration::from_millis(100));
    let before = native.host.requests();
    let readers: Vec<_> = (0..20).map(|_| read_in_thread(path.clone())).collect();
    for reader in readers {
        assert_eq!(reader.join().unwrap().0.unwrap().len(), 3 << 20);
    }
    assert_eq!(native.host.requests() - before, 1, "{}", native.status());
}

#[test]
fn a_large_content_that_the_host_knows_is_not_sent() {
    let native = Native::start(Policy::default(), |_, _| Reply::Clean);
    let known = content(b"known");
    let hash = ContentHash(*blake3::hash(&known).as_bytes());
    native.host.seen.known.lock().unwrap().push(hash);
    let path = native.write("known", &known);
    // Its scan after the close. Under another policy nothing of it is remembered.
    scanned(&native);
    native.host.set_policy(Policy { open_deadline_ms: 6_000, ..Policy::default() });
    std::thread::sleep(Duration::from_millis(100));
    let before = native.parts();
    assert_eq!(std::fs::read(&path).unwrap(), known);
    assert_eq!(native.parts(), before, "{}", native.status());
    assert_eq!(*native.host.seen.hashes.lock().unwrap(), [hash]);
    // What it does not know is sent, and one that is never known is hashed now and then only.
    for n in 0..20 {
        let new = content(&[n]);
        let path = native.write(&format!("new-{n}"), &new);
        assert_eq!(std::fs::read(path).unwrap(), new);
    }
    assert!(native.parts() > before);
    let hashes = native.host.seen.hashes.lock().unwrap().len();
    assert!((5..10).contains(&hashes), "{hashes}");
}

#[test]
fn each_of_many_openers_is_denied() {
    let policy = Policy { open_deadline_ms: 20_000, ..Policy::default() };
    let native = Native::start(policy, slow);
    let path = native.write("large", &content(b"evil"));
    let readers: Vec<_> = (0..8).map(|_| read_in_thread(path.clone())).collect();
    for reader in readers {
        assert!(is_denied(&reader.join().unwrap().0));
    }
}

#[test]
fn who_waits_for_another_is_answered_at_its_deadline() {
    let policy = Policy {
        open_deadline_ms: 600,
        fail_open: FailMode::Open,
        most_deadline_ms: 600,
        ..Policy::default()
    };
    let native =
        Native::start(
            policy,
            |_, content: &[u8]| {
                if content.len() > 1 << 20 { Reply::Silence } else { Reply::Clean }
            },
        );
    let path = native.write("large", &content(b"good"));
    let readers: Vec<_> = (0..8).map(|_| read_in_thread(path.clone())).collect();
    for reader in readers {
        let (read, took) = reader.join().unwrap();
        assert!(read.is_ok() && took < Duration::from_secs(3), "{took:?}");
    }
    // Nothing of them is open any more.
    let none = nix::mount::MntFlags::empty();
    assert!(eventually(|| nix::mount::umount2(&native.path(""), none).is_ok()));
}

#[test]
fn a_file_that_grows_under_the_read_is_read_once_and_let_through_for_a_while() {
    let native = Native::start(Policy::default(), slow);
    let path = native.write("grows", &content(b"good"));
    scanned(&native);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (stop, path) = (&stop, &path);
        scope.spawn(move || {
            let mut file = OpenOptions::new().append(true).open(path).unwrap();
            while !stop.load(Ordering::Relaxed) {
                file.write_all(b"more").unwrap();
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        std::thread::sleep(Duration::from_millis(100));
        let before = native.host.requests();
        for _ in 0..10 {
            let readers: Vec<_> = (0..4).map(|_| read_in_thread(path.clone())).collect();
            readers.into_iter().for_each(|reader| drop(reader.join().unwrap().0.unwrap()));
        }
        let asked = native.host.requests() - before;
        stop.store(true, Ordering::Relaxed);
        assert_eq!(asked, 1, "{}", native.status());
    });
    // What was written is scanned after the close.
    let status = native.status();
    assert_eq!((&status["unscanned"], &status["denied"]), (&0.into(), &0.into()), "{status}");
}

/// Who makes a file longer while it is hashed keeps nobody busy with it.
#[test]
fn a_file_that_becomes_huge_under_the_read_is_read_as_far_as_it_went() {
    let policy = Policy { open_deadline_ms: 3_000, most_deadline_ms: 3_000, ..Policy::default() };
    let native = Native::start(policy, |_, _| Reply::Clean);
    // Six at once: as many as there are fillers.
    let paths: Vec<_> =
        (0..6).map(|n| native.write(&format!("grows-{n}"), &vec![n; 40 << 20])).collect();
    let readers: Vec<_> = paths
        .iter()
        .map(|path| {
            let file = OpenOptions::new().write(true).open(path).unwrap();
            let open = std::thread::spawn({
                let path = path.clone();
                move || std::fs::File::open(path).map(drop)
            });
            std::thread::sleep(Duration::from_millis(3));
            file.set_len(1 << 42).unwrap();
            open
        })
        .collect();
    readers.into_iter().for_each(|reader| reader.join().unwrap().unwrap());
    let other = native.write("other", &content(b"other"));
    let begin = std::time::Instant::now();
    assert_eq!(std::fs::read(other).unwrap().len(), 3 << 20);
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    assert_eq!(native.number("outstanding"), 0);
}
