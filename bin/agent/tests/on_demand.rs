//! Scans on demand by the driver, on this machine's kernel, for a host that the test controls.

#![allow(clippy::unwrap_used)] // A test says what it expects by unwrapping it.

mod common;

use common::{Native, Reply, eventually};
use seawall_proto::walk::{Walk, WalkOrder, WalkProgress};
use seawall_proto::{ContentHash, Exclude, Mode, Operation, Policy, ScanRequest, ToGuest, ToHost};
use serde_bytes::ByteBuf;
use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

fn by_content(_: &ScanRequest, content: &[u8]) -> Reply {
    if content.starts_with(b"evil") { Reply::Infected } else { Reply::Clean }
}

/// Nothing is scanned but on demand.
fn start() -> Native {
    Native::start(Policy { mode: Mode::Exec, ..Policy::default() }, by_content)
}

fn walk(id: u64, roots: &[&Path]) -> Walk {
    Walk {
        id,
        roots: roots.iter().map(|root| ByteBuf::from(root.as_os_str().as_bytes())).collect(),
        quick: false,
        place: None,
        bytes_per_second: 0,
        file_limit: 1 << 30,
        pressure_percent: 0,
    }
}

fn progress(native: &Native, id: u64, wanted: impl Fn(&WalkProgress) -> bool) -> WalkProgress {
    native.host.heard(|message| match message {
        ToHost::WalkProgress(progress) if progress.id == id && wanted(progress) => {
            Some(progress.clone())
        }
        _ => None,
    })
}

fn done(native: &Native, id: u64) -> WalkProgress {
    progress(native, id, |progress| progress.done)
}

/// The contents that came for scans on demand.
fn contents(native: &Native) -> Vec<Vec<u8>> {
    let seen = native.host.seen.contents.lock().unwrap();
    let on_demand = seen.iter().filter(|(operation, _)| *operation == Operation::OnDemand);
    on_demand.map(|(_, content)| content.clone()).collect()
}

fn missed(native: &Native) -> Vec<(String, String)> {
    let messages = native.host.seen.messages.lock().unwrap();
    let all = messages.iter().filter_map(|message| match message {
        ToHost::WalkMissed(missed) => {
            let path = String::from_utf8_lossy(&missed.path).into_owned();
            Some((path, missed.reason.clone()))
        }
        _ => None,
    });
    all.collect()
}

#[test]
fn every_file_comes_once_and_what_is_special_has_its_place() {
    let native = start();
    for name in ["one", "two", "a/three", "a/b/four"] {
        let path = native.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, name).unwrap();
    }
    std::fs::write(native.path("empty"), "").unwrap();
    std::fs::hard_link(native.path("one"), native.path("a/one again")).unwrap();
    std::os::unix::fs::symlink("/etc", native.path("etc")).unwrap();
    nix::unistd::mkfifo(&native.path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    std::fs::File::create(native.path("holes")).unwrap().set_len(3 << 20).unwrap();
    std::fs::File::create(native.path("vast")).unwrap().set_len(5 << 40).unwrap();
    std::fs::create_dir(native.path("excluded")).unwrap();
    std::fs::write(native.path("excluded/x"), "excluded").unwrap();
    let excluded = ByteBuf::from(native.path("excluded").as_os_str().as_bytes());
    native.host.set_policy(Policy {
        mode: Mode::Exec,
        exclude: Exclude { paths: vec![excluded], ..Exclude::default() },
        ..Policy::default()
    });
    native.settle();
    native.host.say(&ToGuest::Walk(walk(1, &[])));
    let told = done(&native, 1);
    let seen = contents(&native);
    let short: BTreeSet<_> = seen.iter().filter(|content| content.len() < 100).cloned().collect();
    let expected = ["one", "two", "a/three", "a/b/four"].map(|name| name.as_bytes().to_vec());
    assert_eq!(short, BTreeSet::from(expected));
    assert!(seen.iter().any(|content| content.len() == 3 << 20), "a file with holes is read");
    assert_eq!(seen.len(), 5);
    assert_eq!((told.files, told.excluded, told.missed), (7, 1, 1), "{told:?}");
    let left_out = missed(&native);
    assert_eq!(left_out[0].1, "larger than 1024 MiB");
    assert!(left_out[0].0.ends_with("/vast"), "{left_out:?}");
    // What is known to be clean is not sent again, what changed is.
    native.settle();
    native.write("two", b"two, changed");
    native.settle();
    native.host.say(&ToGuest::Walk(walk(2, &[])));
    let again = done(&native, 2);
    assert_eq!(again.known, 4, "{again:?}");
    assert!(contents(&native).contains(&b"two, changed".to_vec()));
}

/// What the host knows is answered from its hash; what it does not know comes whole. Where it knows little, it is asked
/// so now and then only.
#[test]
fn content_that_the_host_knows_is_not_sent() {
    let native = start();
    let content = |n: u32| format!("content {n} ").repeat(20_000).into_bytes();
    for n in 0..100 {
        native.write(&format!("f{n:02}"), &content(n));
    }
    let hash = |n| ContentHash(*blake3::hash(&content(n)).as_bytes());
    native.host.seen.known.lock().unwrap().extend((0..100).filter(|n| n % 4 != 0).map(hash));
    native.settle();
    native.host.say(&ToGuest::Walk(walk(1, &[])));
    let told = done(&native, 1);
    assert_eq!((told.files, told.missed), (100, 0));
    let asked: BTreeSet<_> =
        native.host.seen.hashes.lock().unwrap().iter().map(|hash| hash.0).collect();
    let sent: BTreeSet<_> = contents(&native).into_iter().collect();
    for n in 0..100 {
        assert_ne!(asked.contains(&hash(n).0) && n % 4 != 0, sent.contains(&content(n)), "{n}");
    }
    assert!(asked.len() > 80, "most by their hash: {}", asked.len());
    // When it knows nothing of them any more, it is asked by the hashes that it gave, which costs no read.
    let forget = || {
        native.host.seen.known.lock().unwrap().clear();
        native.host.seen.hashes.lock().unwrap().clear();
    };
    forget();
    native.host.renew();
    native.settle();
    native.host.say(&ToGuest::Walk(walk(2, &[])));
    assert_eq!(done(&native, 2).missed, 0);
    let sent: BTreeSet<_> = contents(&native).into_iter().collect();
    assert_eq!(sent.len(), 100);
    assert_eq!(native.host.seen.hashes.lock().unwrap().len(), 100);
    // Of new files few are read twice.
    forget();
    std::fs::create_dir(native.path("new")).unwrap();
    for n in 100..200 {
        native.write(&format!("new/f{n}"), &content(n));
    }
    native.settle();
    native.host.say(&ToGuest::Walk(walk(3, &[&native.path("new")])));
    assert_eq!(done(&native, 3).files, 100);
    let asked = native.host.seen.hashes.lock().unwrap().len();
    assert!((5..50).contains(&asked), "{asked}");
}

#[test]
fn parts_are_named_and_what_is_not_there_is_told() {
    let native = start();
    for folder in ["a", "b"] {
        std::fs::create_dir(native.path(folder)).unwrap();
        std::fs::write(native.path(folder).join("x"), folder).unwrap();
    }
    native.settle();
    let (folder, file) = (native.path("a"), native.path("b/x"));
    let nothing = native.path("nothing");
    native.host.say(&ToGuest::Walk(walk(1, &[&folder, &file, &nothing, Path::new("/dev/null")])));
    let told = done(&native, 1);
    assert_eq!((told.files, told.missed), (2, 2), "{told:?}");
    let left_out: Vec<_> = missed(&native).into_iter().map(|(path, _)| path).collect();
    assert_eq!(left_out, ["/dev/null".to_owned(), nothing.display().to_string()]);
}

/// Held, gone on with, ended and begun at the place where it was; in the same session and in another one.
#[test]
fn it_stands_goes_on_and_begins_where_it_was() {
    let native = start();
    for n in 0..60 {
        std::fs::write(native.path(&format!("f{n}")), format!("{n} {}", "x".repeat(20_000)))
            .unwrap();
    }
    native.settle();
    let slow = Walk { bytes_per_second: 300_000, ..walk(1, &[]) };
    native.host.say(&ToGuest::Walk(slow.clone()));
    let first = progress(&native, 1, |told| told.files >= 5);
    native.host.say(&ToGuest::WalkOrder(1, WalkOrder::Hold));
    std::thread::sleep(Duration::from_millis(700));
    let held = contents(&native).len();
    std::thread::sleep(Duration::from_millis(700));
    assert_eq!(contents(&native).len(), held, "it stands");
    native.host.say(&ToGuest::WalkOrder(2, WalkOrder::End));
    native.host.say(&ToGuest::WalkOrder(1, WalkOrder::GoOn));
    let second =
        progress(&native, 1, |told| told.files > first.files + 5 && !told.place.is_empty());
    assert!(!second.done, "{second:?}");
    // Another session: the driver has forgotten, the host says where it was.
    native.host.down();
    native.host.up();
    native.wait_protected();
    native.host.seen.contents.lock().unwrap().clear();
    native.host.seen.messages.lock().unwrap().clear();
    // Nothing is known to be clean any more either.
    native.host.renew();
    let rest = Walk { place: Some(second.place.clone()), ..walk(3, &[]) };
    native.host.say(&ToGuest::Walk(rest));
    let told = done(&native, 3);
    assert_eq!(second.files + told.files, 60, "each once: {second:?} {told:?}");
    // The file that was under way when the session ended is asked about in the new one, too: perhaps twice.
    let read: BTreeSet<_> = contents(&native).into_iter().collect();
    assert_eq!(read.len() as u64, told.files);
    // A place of another tree, and rubbish, are where it can begin.
    for place in [b"rubbish".to_vec(), vec![0xff; 5000], Vec::new()] {
        let walk = Walk { place: Some(place.into()), ..walk(4, &[]) };
        native.host.say(&ToGuest::Walk(walk));
        assert_eq!(done(&native, 4).files, 60);
    }
}

#[test]
fn it_ends_in_the_midst_of_a_file_and_the_driver_goes_on() {
    let native = Native::start(Policy { mode: Mode::Exec, ..Policy::default() }, |request, _| {
        if request.operation == Operation::OnDemand { Reply::Silence } else { Reply::Clean }
    });
    std::fs::write(native.path("large"), vec![7; 8 << 20]).unwrap();
    native.settle();
    native.host.say(&ToGuest::Walk(walk(1, &[])));
    assert!(eventually(|| !contents(&native).is_empty()));
    native.host.say(&ToGuest::WalkOrder(1, WalkOrder::End));
    let cancelled = native.host.heard(|message| match message {
        ToHost::Cancel(id) => Some(*id),
        _ => None,
    });
    assert!(cancelled.0 > 0);
    native.host.say(&ToGuest::Walk(walk(2, &[&native.path("nothing")])));
    assert!(done(&native, 2).missed == 1);
}

/// A tree that changes under the walk: it comes to its end, and the driver is fine.
#[test]
fn a_tree_that_changes_while_it_is_walked() {
    let native = start();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let root = native.path("tree");
    let fill = |round: u32| {
        for n in 0..20 {
            let folder = root.join(format!("d{}/e{}", n % 5, round % 3));
            let _made = std::fs::create_dir_all(&folder);
            let _written = std::fs::write(folder.join(format!("f{n}")), format!("{round} {n}"));
        }
    };
    fill(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut round = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                round += 1;
                let _gone = std::fs::rename(root.join("d1"), root.join(format!("moved{round}")));
                let _gone = std::fs::remove_dir_all(root.join(format!("d{}", round % 5)));
                fill(round);
            }
        });
        for id in 1..6 {
            native.host.say(&ToGuest::Walk(walk(id, &[])));
            assert!(done(&native, id).files > 0);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert!(native.status()["protected"] == true);
}

/// A folder of a million files takes no memory for each, and a path is as deep as it likes to be.
#[test]
fn a_folder_of_a_million_files_and_paths_that_are_too_long() {
    let native = start();
    let many = native.path("many");
    std::fs::create_dir(&many).unwrap();
    // All of one inode: a file's name is what a folder costs.
    std::fs::write(native.path("one"), "one").unwrap();
    for n in 0..1_000_000 {
        std::fs::hard_link(native.path("one"), many.join(format!("{n:06}-{}", "x".repeat(180))))
            .unwrap();
    }
    // Longer than a path may be, though each step is not.
    let mut at =
        rustix::fs::open(native.path(""), rustix::fs::OFlags::DIRECTORY, rustix::fs::Mode::empty())
            .unwrap();
    for _ in 0..25 {
        let name = "d".repeat(200);
        rustix::fs::mkdirat(&at, &name, rustix::fs::Mode::RWXU).unwrap();
        at = rustix::fs::openat(
            &at,
            &name,
            rustix::fs::OFlags::DIRECTORY,
            rustix::fs::Mode::empty(),
        )
        .unwrap();
    }
    let flags = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY;
    let deep = rustix::fs::openat(&at, "deep", flags, rustix::fs::Mode::RWXU).unwrap();
    rustix::io::write(&deep, b"deep content").unwrap();
    drop((deep, at));
    native.settle();
    native.host.say(&ToGuest::Walk(walk(1, &[])));
    let told = done(&native, 1);
    assert_eq!(told.files, 2, "{told:?}");
    assert!(contents(&native).contains(&b"deep content".to_vec()));
    std::thread::sleep(Duration::from_secs(6));
    native.host.seen.messages.lock().unwrap().clear();
    let kib = native.host.heard(|message| match message {
        ToHost::Heartbeat(beat) => Some(beat.memory_kib),
        _ => None,
    });
    println!("driver after a folder of a million long names: {kib} KiB");
    assert!(kib < 8 * 1024, "{kib} KiB");
}

/// An image whose files have not changed for years; no file system lets one set that.
fn old_image(folder: &Path, names: &[&str]) -> PathBuf {
    let (tree, image) = (folder.join("tree"), folder.join("image"));
    for name in names {
        let path = tree.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        match *name {
            "program" => drop(std::fs::copy("/bin/sleep", path).unwrap()),
            name => std::fs::write(path, name).unwrap(),
        }
    }
    let run = |command: &mut Command| assert!(command.status().unwrap().success(), "{command:?}");
    run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&tree).arg(&image).arg("16M"));
    for name in names {
        let order = format!("set_inode_field /{name} ctime 20200101000000");
        run(Command::new("debugfs").args(["-w", "-R", &order]).arg(&image));
    }
    image
}

#[test]
fn a_quick_scan_comes_to_what_runs_starts_or_changed() {
    let folder = tempfile::tempdir().unwrap();
    let starts = ["ann/.config/autostart/x.desktop", "ann/.bashrc", "root/.ssh/rc"];
    let image =
        old_image(folder.path(), &[&["program", "plain", "data/plain"], &starts[..]].concat());
    let native =
        Native::start_on(&image, Policy { mode: Mode::Exec, ..Policy::default() }, by_content);
    let quick = || {
        native.host.seen.contents.lock().unwrap().clear();
        native.host.seen.messages.lock().unwrap().clear();
        native.host.renew();
        native.host.say(&ToGuest::Walk(Walk { quick: true, ..walk(1, &[]) }));
        let files = done(&native, 1).files;
        let contents: BTreeSet<_> =
            contents(&native).into_iter().map(|content| content[..4].to_vec()).collect();
        (files, contents)
    };
    let first = |names: &[&str]| names.iter().map(|name| name.as_bytes()[..4].to_vec()).collect();
    assert_eq!(quick(), (3, first(&starts)));
    // A program that runs, and a file whose attributes changed.
    let mut child =
        Command::new(native.path("program")).arg("60").stdout(Stdio::null()).spawn().unwrap();
    let exe = format!("/proc/{}/exe", child.id());
    assert!(eventually(|| std::fs::read_link(&exe).is_ok_and(|exe| exe.ends_with("program"))));
    std::fs::set_permissions(native.path("data/plain"), PermissionsExt::from_mode(0o700)).unwrap();
    let all = ["ann/", "ann/", "root/", "data/", "\x7fELF"];
    let found = quick();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(found, (5, first(&all)));
}

/// An archive that was opened is clean for accesses; a scan on demand looks into it once more, and once only.
#[test]
fn an_archive_that_nobody_looked_into_is_sent_though_it_is_clean() {
    let by_content = |request: &ScanRequest, content: &[u8]| {
        let opened = request.operation == Operation::OnDemand;
        if content.starts_with(b"PK") && !opened { Reply::Unopened } else { Reply::Clean }
    };
    let native = Native::start(Policy::default(), by_content);
    std::fs::write(native.path("archive"), "PK").unwrap();
    std::fs::write(native.path("plain"), "plain").unwrap();
    for _ in 0..2 {
        native.settle();
        for name in ["archive", "plain"] {
            std::fs::read(native.path(name)).unwrap();
        }
    }
    let opens = native.host.seen.contents.lock().unwrap().len();
    std::fs::read(native.path("archive")).unwrap();
    let again = native.host.seen.contents.lock().unwrap().len();
    assert_eq!(again, opens, "it is remembered for accesses");
    native.host.say(&ToGuest::Walk(walk(1, &[])));
    let told = done(&native, 1);
    assert_eq!((told.files, told.known), (2, 1), "{told:?}");
    assert_eq!(contents(&native), [b"PK".to_vec()]);
    native.host.say(&ToGuest::Walk(walk(2, &[])));
    assert_eq!(done(&native, 2).known, 2);
    assert_eq!(contents(&native).len(), 1);
}
