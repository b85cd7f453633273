//! Golden images: what a driver says of a template's files, and asks of a clone's.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Native, Reply, RingMode};
use seawall_proto::walk::Walk;
use seawall_proto::{ContentHash, Fingerprint, Golden, Mode, Policy, ToGuest, ToHost};
use seawall_region::Query;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

const LEARNS: ToGuest = ToGuest::Golden(Golden { knows: false, learns: true });
const KNOWS: ToGuest = ToGuest::Golden(Golden { knows: true, learns: false });

/// Longer than what a message in the region may be.
const LARGE: usize = 3 << 20;

fn policy() -> Policy {
    Policy { mode: Mode::Open, ..Policy::default() }
}

const EXT4: &[&str] = &["mkfs.ext4", "-q", "-F"];

fn new_image(folder: &Path, make: &[&str]) -> PathBuf {
    let image = folder.join("template");
    std::fs::File::create(&image).unwrap().set_len(400 << 20).unwrap();
    let made = Command::new(make[0]).args(&make[1..]).arg(&image).status();
    assert!(made.unwrap().success());
    image
}

fn content(number: usize) -> Vec<u8> {
    if number == 0 { vec![7; LARGE] } else { format!("file {number}").into_bytes() }
}

fn hash(content: &[u8]) -> ContentHash {
    ContentHash(*blake3::hash(content).as_bytes())
}

fn walk(native: &Native, id: u64) {
    begin_walk(native, id, 0);
    await_walk(native, id);
}

fn begin_walk(native: &Native, id: u64, bytes_per_second: u64) {
    native.host.say(&ToGuest::Walk(Walk {
        id,
        roots: Vec::new(),
        quick: false,
        place: None,
        bytes_per_second,
        file_limit: 1 << 30,
        pressure_percent: 0,
    }));
}

fn await_walk(native: &Native, id: u64) {
    native.host.heard(|message| match message {
        ToHost::WalkProgress(progress) if progress.id == id && progress.done => Some(()),
        _ => None,
    });
}

fn named(native: &Native) -> HashMap<Fingerprint, ContentHash> {
    native.host.seen.named.lock().unwrap().iter().copied().collect()
}

/// A template of ten files that is learned, and copied as a storage system does while it runs. Some of it is remembered by
/// then, and what is asked for by its hash is known.
fn template(folder: &Path) -> (PathBuf, HashMap<Fingerprint, ContentHash>) {
    template_on(folder, EXT4)
}

fn template_on(folder: &Path, make: &[&str]) -> (PathBuf, HashMap<Fingerprint, ContentHash>) {
    let image = new_image(folder, make);
    let native = Native::start_on(&image, policy(), |_, _| Reply::Clean);
    for number in 0..10 {
        native.write(&format!("f{number}"), &content(number));
    }
    native.write("empty", b"");
    native.settle();
    std::fs::read(native.path("f1")).unwrap();
    native.host.seen.known.lock().unwrap().push(hash(&content(2)));
    native.host.say(&LEARNS);
    walk(&native, 1);
    let learned = named(&native);
    let mut hashes: Vec<_> = learned.values().map(|hash| hash.0).collect();
    let mut expected: Vec<_> = (0..10).map(|number| hash(&content(number)).0).collect();
    hashes.sort_unstable();
    expected.sort_unstable();
    assert_eq!(hashes, expected);
    let clone = folder.join("clone");
    std::fs::copy(&image, &clone).unwrap();
    // XFS and btrfs are mounted once on a machine.
    assert!(native.stop());
    drop(native);
    (clone, learned)
}

/// A driver on a clone, whose host knows what was learned.
fn clone_of(
    image: &Path,
    options: &str,
    ring: RingMode,
    policy: Policy,
    learned: &HashMap<Fingerprint, ContentHash>,
) -> Native {
    let native = Native::start_on_with(image, options, ring, policy, |_, _| Reply::Clean);
    native.host.seen.golden.lock().unwrap().clone_from(learned);
    native.host.say(&KNOWS);
    // It looks at what is mounted once a second.
    std::thread::sleep(std::time::Duration::from_millis(1500));
    native
}

fn asked(native: &Native) -> usize {
    native.host.seen.fingerprints.lock().unwrap().len()
}

#[test]
fn a_clone_sends_nothing_that_the_template_has() {
    let folder = tempfile::tempdir().unwrap();
    let (image, learned) = template(folder.path());
    let native = clone_of(&image, "rw", RingMode::Off, policy(), &learned);
    for number in 0..10 {
        assert_eq!(std::fs::read(native.path(&format!("f{number}"))).unwrap(), content(number));
    }
    assert_eq!((native.host.requests(), asked(&native)), (0, 10));
    // It is clean like any other.
    let requests = native.number("requests");
    for number in 0..10 {
        std::fs::read(native.path(&format!("f{number}"))).unwrap();
    }
    assert_eq!(native.number("requests"), requests, "remembered");
    // After new signatures it is asked for by the hash that the host told.
    native.host.renew();
    native.host.seen.known.lock().unwrap().push(hash(&content(3)));
    std::thread::sleep(std::time::Duration::from_millis(100));
    std::fs::read(native.path("f3")).unwrap();
    assert_eq!(native.host.seen.hashes.lock().unwrap().as_slice(), [hash(&content(3))]);
    assert_eq!((native.host.requests(), asked(&native)), (0, 10));
    // What is changed is another file.
    native.write("f4", b"changed");
    native.settle();
    std::fs::read(native.path("f4")).unwrap();
    let contents = native.host.seen.contents.lock().unwrap().clone();
    assert!(contents.iter().any(|(_, content)| content == b"changed"));
}

#[test]
fn the_same_on_xfs_and_btrfs() {
    for make in [&["mkfs.xfs", "-q"], &["mkfs.btrfs", "-q"]] {
        let folder = tempfile::tempdir().unwrap();
        let (image, learned) = template_on(folder.path(), make);
        let native = clone_of(&image, "rw", RingMode::Off, policy(), &learned);
        for number in 0..10 {
            std::fs::read(native.path(&format!("f{number}"))).unwrap();
        }
        assert_eq!((native.host.requests(), asked(&native)), (0, 10), "{make:?}");
        assert!(native.stop());
    }
}

#[test]
fn what_is_not_known_is_sent_with_its_fingerprint() {
    let folder = tempfile::tempdir().unwrap();
    let (image, learned) = template(folder.path());
    let mut known = learned.clone();
    known.retain(|_, known| *known != hash(&content(0)) && *known != hash(&content(5)));
    let native = clone_of(&image, "rw", RingMode::Off, policy(), &known);
    for number in 0..10 {
        std::fs::read(native.path(&format!("f{number}"))).unwrap();
    }
    assert_eq!((native.host.requests(), asked(&native)), (2, 10));
    let sent = named(&native);
    assert_eq!(sent.len(), 2);
    assert!(sent.iter().all(|(own, hash)| learned[own] == *hash), "{sent:?}");
}

#[test]
fn a_walk_through_a_clone_reads_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (image, learned) = template(folder.path());
    let native = clone_of(&image, "rw", RingMode::Off, policy(), &learned);
    walk(&native, 1);
    assert_eq!((native.host.requests(), asked(&native)), (0, 10));
    assert_eq!(native.host.seen.hashes.lock().unwrap().len(), 0);
}

#[test]
fn it_is_asked_in_the_ring() {
    let folder = tempfile::tempdir().unwrap();
    let (image, learned) = template(folder.path());
    let native = clone_of(&image, "rw", RingMode::Looks, policy(), &learned);
    for number in 0..10 {
        std::fs::read(native.path(&format!("f{number}"))).unwrap();
    }
    let by_fingerprint = |query: &&Query| matches!(query, Query::Fingerprint(_));
    let in_ring = native.host.seen.asked.lock().unwrap().iter().filter(by_fingerprint).count();
    assert!(in_ring >= 5, "{in_ring}");
    assert_eq!((native.host.requests(), in_ring + asked(&native)), (0, 10));
    assert!(native.number("in_ring") >= 5);
}

#[test]
fn on_what_a_user_may_have_mounted_inodes_and_times_say_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (image, learned) = template(folder.path());
    let native = clone_of(&image, "nosuid,nodev", RingMode::Looks, policy(), &learned);
    for number in 1..10 {
        std::fs::read(native.path(&format!("f{number}"))).unwrap();
    }
    assert_eq!(asked(&native), 0);
    let asked = native.host.seen.asked.lock().unwrap().clone();
    assert!(!asked.iter().any(|query| matches!(query, Query::Fingerprint(_))), "{asked:?}");
    assert_eq!(native.host.requests(), 9);
}

#[test]
fn nor_do_those_of_a_file_that_somebody_writes_or_others_than_root_may_change() {
    let folder = tempfile::tempdir().unwrap();
    let (image, learned) = template(folder.path());
    let native = clone_of(&image, "rw", RingMode::Off, policy(), &learned);
    // To open it for writing is an access, too.
    let writer = std::fs::OpenOptions::new().write(true).open(native.path("f1")).unwrap();
    std::fs::read(native.path("f1")).unwrap();
    assert_eq!(asked(&native), 0);
    drop(writer);
    std::os::unix::fs::chown(native.path("f3"), Some(1000), None).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    std::fs::set_permissions(native.path("f4"), mode).unwrap();
    native.settle();
    for file in ["f3", "f4"] {
        std::fs::read(native.path(file)).unwrap();
    }
    assert_eq!(asked(&native), 0);
    std::fs::read(native.path("f2")).unwrap();
    assert_eq!(asked(&native), 1, "root's own");
}

/// It is to be seen as it is.
#[test]
fn while_a_template_is_learned_nothing_is_asked_by_fingerprint() {
    let folder = tempfile::tempdir().unwrap();
    let (image, learned) = template(folder.path());
    let native = clone_of(&image, "rw", RingMode::Looks, policy(), &learned);
    native.host.say(&ToGuest::Golden(Golden { knows: true, learns: true }));
    std::thread::sleep(std::time::Duration::from_millis(200));
    for number in 0..5 {
        std::fs::read(native.path(&format!("f{number}"))).unwrap();
    }
    walk(&native, 1);
    let queries = native.host.seen.asked.lock().unwrap().clone();
    assert!(!queries.iter().any(|query| matches!(query, Query::Fingerprint(_))), "{queries:?}");
    assert_eq!(asked(&native), 0);
    assert_eq!(named(&native), learned);
}

/// What somebody writes while it is learned is nobody's, and what was changed since it began is not on the disk yet.
#[test]
fn a_template_is_not_learned_of_what_changes() {
    let folder = tempfile::tempdir().unwrap();
    let image = new_image(folder.path(), EXT4);
    let native = Native::start_on(&image, policy(), |_, _| Reply::Clean);
    let before: Vec<_> = (0..40).map(|number| vec![number; 5000]).collect();
    for (number, content) in before.iter().enumerate() {
        native.write(&format!("f{number}"), content);
    }
    native.write("held", b"held");
    native.settle();
    let writer = std::fs::OpenOptions::new().write(true).open(native.path("held")).unwrap();
    native.host.say(&LEARNS);
    begin_walk(&native, 1, 100_000);
    std::thread::sleep(std::time::Duration::from_millis(700));
    for number in 0..40 {
        native.write(&format!("f{number}"), &vec![number + 100; 5000]);
    }
    await_walk(&native, 1);
    let hashes: Vec<_> = before.iter().map(|content| hash(content)).collect();
    let named = named(&native);
    assert!((1..40).contains(&named.len()), "{}", named.len());
    assert!(named.values().all(|own| hashes.contains(own)));
    drop(writer);
}
