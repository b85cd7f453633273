//! What policy has held, scanned and left alone, on this machine's kernel: each kind of exclusion excludes, no
//! unprivileged user can make a file look excluded, and each mode does what it says.

#![allow(clippy::unwrap_used)] // A test says what it expects by unwrapping it.

mod common;

use common::{Native, Reply, eventually, is_denied};
use seawall_proto::{
    Exclude, ExcludedProcess, FailMode, FailPath, Mode, Operation, Policy, ScanRequest, ToHost,
};
use serde_bytes::ByteBuf;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

/// Nobody in particular.
const USER: u32 = 4242;

fn by_content(_: &ScanRequest, content: &[u8]) -> Reply {
    if content.starts_with(b"evil") || content.ends_with(b"evil") {
        Reply::Infected
    } else {
        Reply::Clean
    }
}

/// A driver, and a mount that everybody may look into.
fn start(policy: Policy) -> Native {
    let native = Native::start(policy, by_content);
    let open = |path: &Path| {
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
    };
    open(&native.path(""));
    open(native.path("").parent().unwrap().parent().unwrap());
    open(native.path("").parent().unwrap());
    native
}

/// A file that nobody has looked at: what is written is scanned at its close.
fn put(native: &Native, path: &Path, content: &[u8]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, content).unwrap();
    native.settle();
}

fn pattern(path: &Path) -> ByteBuf {
    ByteBuf::from(path.as_os_str().as_bytes())
}

fn excluding(exclude: Exclude) -> Policy {
    Policy { exclude, ..Policy::default() }
}

/// Takes another policy into use, and waits until the driver goes by it.
fn set(native: &Native, policy: Policy) {
    native.host.set_policy(policy.clone());
    let has_it = eventually(|| native.policy().as_ref() == Some(&policy));
    assert!(has_it, "{:?}", native.policy());
    // Marks follow with the next look.
    std::thread::sleep(Duration::from_millis(1300));
}

fn as_user(script: &str, arguments: &[&Path]) -> Output {
    let mut command = Command::new("setpriv");
    let user = [format!("--reuid={USER}"), format!("--regid={USER}"), "--clear-groups".into()];
    command.args(user).args(["sh", "-c", script, "sh"]).args(arguments);
    command.output().unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[output.stdout.as_slice(), output.stderr.as_slice()].concat()).into()
}

/// Shown the evil only by a driver that looked away.
fn is_kept_from(output: &Output) -> bool {
    !output.stdout.windows(4).any(|bytes| bytes == b"evil")
        && text(output).contains("not permitted")
}

#[test]
fn each_kind_of_exclusion_excludes_and_nothing_of_it_is_remembered() {
    let native = start(Policy::default());
    let plain = native.path("data/plain");
    let owned = native.path("data/owned");
    let iso = native.path("data/x.ISO");
    let cache = native.path("home/a/.cache/x");
    let all = [&plain, &owned, &iso, &cache];
    for path in all {
        put(&native, path, b"evil content");
    }
    chown(&owned, Some(USER), None).unwrap();
    // A program of the test's own: what every test runs must not be excluded.
    let folder = tempfile::tempdir().unwrap();
    let cat = folder.path().join("cat");
    std::fs::copy("/bin/cat", &cat).unwrap();
    let reads = |path: &Path| std::fs::read(path).is_ok();
    let cat_reads = |path: &Path| Command::new(&cat).arg(path).output().unwrap().status.success();
    assert!(!all.iter().any(|path| reads(path)) && !cat_reads(&plain), "nothing is excluded");

    let home = native.path("home");
    let by_path = Exclude { paths: vec![pattern(&home.join("*/.cache"))], ..Exclude::default() };
    let by_extension = Exclude { extensions: vec![ByteBuf::from("iso")], ..Exclude::default() };
    let by_owner = Exclude { owners: vec![USER], ..Exclude::default() };
    let program = ExcludedProcess { path: pattern(&cat), user: 0 };
    let by_process = Exclude { processes: vec![program], ..Exclude::default() };
    for (exclude, excluded) in [(by_path, &cache), (by_extension, &iso), (by_owner, &owned)] {
        let before = native.host.requests();
        set(&native, excluding(exclude.clone()));
        for _ in 0..2 {
            for path in all {
                assert_eq!(reads(path), path == excluded, "{exclude:?} {}", path.display());
            }
        }
        assert!(native.host.requests() > before);
    }
    set(&native, excluding(by_process));
    for path in all {
        assert!(!reads(path) && cat_reads(path), "{}", path.display());
    }
    // What was let through was not marked.
    assert!(!reads(&plain));
    set(&native, Policy::default());
    assert!(!all.iter().any(|path| reads(path) || cat_reads(path)), "excluded no longer");
}

#[test]
fn what_is_excluded_is_not_scanned_after_its_close_either() {
    let native = start(Policy::default());
    let paths = vec![pattern(&native.path("quiet"))];
    set(&native, excluding(Exclude { paths, ..Exclude::default() }));
    let scanned = |content: &[u8]| {
        let contents = native.host.seen.contents.lock().unwrap();
        contents.iter().any(|(_, seen)| seen == content)
    };
    put(&native, &native.path("loud/x"), b"loud");
    put(&native, &native.path("quiet/x"), b"quiet");
    assert!(eventually(|| scanned(b"loud")));
    native.settle();
    assert!(!scanned(b"quiet"));
}

#[test]
fn a_type_of_file_systems_is_not_watched() {
    let native = start(Policy::default());
    let evil = native.write("evil", b"evil");
    assert!(is_denied(&std::fs::read(&evil)));
    let types = |name: &str| Exclude { file_systems: vec![name.into()], ..Exclude::default() };
    set(&native, excluding(types("tmpfs")));
    assert!(eventually(|| native.number("covered") == 0), "{}", native.status());
    let is_held = || {
        let events = native.number("events");
        std::fs::read(&evil).is_err() || native.number("events") > events
    };
    assert!(eventually(|| !is_held()), "the kernel holds nothing: {}", native.status());
    let reason = native.status()["not_covered"][0]["reason"].to_string();
    assert!(reason.contains("policy excludes"), "{reason}");
    set(&native, excluding(types("squashfs")));
    assert!(eventually(|| is_denied(&std::fs::read(&evil))), "{}", native.status());
}

/// A bind mount, an overlay, a chroot, a rename and a hard link: whatever an unprivileged user does with names, the
/// evil file is not excluded.
#[test]
fn no_user_makes_a_file_look_excluded() {
    let native = start(Policy::default());
    let excluded = native.path("excluded");
    put(&native, &excluded.join("evil"), b"fine for now");
    put(&native, &native.path("mine/evil"), b"evil content");
    put(&native, &native.path("root/excluded/evil"), b"evil content");
    let mine = native.path("mine");
    for path in [&mine, &mine.join("evil")] {
        chown(path, Some(USER), Some(USER)).unwrap();
    }
    // The driver's path for the chroot's file, as the process in it would name it, too.
    let paths = vec![pattern(&excluded), ByteBuf::from("/excluded")];
    set(&native, excluding(Exclude { paths, ..Exclude::default() }));
    assert!(std::fs::read(excluded.join("evil")).is_ok());
    let evil = mine.join("evil");
    assert!(is_denied(&std::fs::read(&evil)));

    // In a user namespace an unprivileged user mounts what he likes.
    let in_namespace = |script: &str, arguments: &[&Path]| {
        let script = format!("unshare -Urm sh -c '{script}' sh \"$@\"");
        as_user(&script, arguments)
    };
    let works = in_namespace("mount -t tmpfs none /mnt && echo works", &[]);
    assert!(works.status.success(), "user namespaces: {}", text(&works));
    let bind = in_namespace("mount --bind $1 $2 && cat $2", &[&evil, &excluded.join("evil")]);
    assert!(is_kept_from(&bind), "bind: {}", text(&bind));
    let folder = in_namespace("mount --bind $1 $2 && cat $2/evil", &[&mine, &excluded]);
    assert!(is_kept_from(&folder), "bind of a folder: {}", text(&folder));
    let overlay = in_namespace(
        "mount -t tmpfs none /mnt && mkdir /mnt/up /mnt/work && mount -t overlay -o \
         lowerdir=$1,upperdir=/mnt/up,workdir=/mnt/work,userxattr none $2 && cat $2/evil",
        &[&mine, &excluded],
    );
    assert!(is_kept_from(&overlay), "overlay: {}", text(&overlay));
    let root = native.path("root");
    std::fs::create_dir_all(root.join("bin")).unwrap();
    let chroot = "mount --bind / /mnt; mkdir -p $1 2>/dev/null; python3 -c \"import os,sys; os.chroot(sys.argv[1]); \
                  os.chdir(chr(47)); print(open(chr(47)+sys.argv[2]).read())\" $1 excluded/evil";
    let chroot = in_namespace(chroot, &[&root]);
    assert!(is_kept_from(&chroot), "chroot: {}", text(&chroot));
    // Neither may he put it there, nor move the folder away and his own in its place.
    let moved = as_user(
        "mv $1 $2/ || ln $1 $2/evil2 || mv $2 $2.old || ln -s $1 $2/link; cat $1",
        &[&evil, &excluded],
    );
    assert!(is_kept_from(&moved), "{}", text(&moved));
    // A symbolic link of his own that leads into the folder reaches what is there; one with its name does not.
    let link = as_user("ln -s $1 $2/excluded && cat $2/excluded", &[&evil, &mine]);
    assert!(is_kept_from(&link), "{}", text(&link));

    // What root has there under two names is excluded by one of them, and no mark of that helps the other.
    put(&native, &excluded.join("two"), b"content that is evil");
    let other = native.path("mine/two");
    std::fs::hard_link(excluded.join("two"), &other).unwrap();
    for _ in 0..2 {
        assert!(std::fs::read(excluded.join("two")).is_ok());
        assert!(is_denied(&std::fs::read(&other)));
    }
}

/// Whoever runs an excluded program as somebody else, or something else under its name, is not excluded.
#[test]
fn a_program_is_excluded_as_its_user_and_as_itself() {
    let native = start(Policy::default());
    let evil = native.write("evil", b"evil");
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let [program, other] = ["program", "other"].map(|name| folder.path().join(name));
    std::fs::copy("/bin/cat", &program).unwrap();
    std::fs::copy("/bin/cat", &other).unwrap();
    let process = |user| ExcludedProcess { path: pattern(&program), user };
    set(&native, excluding(Exclude { processes: vec![process(0)], ..Exclude::default() }));
    let run = |program: &Path| Command::new(program).arg(&evil).output().unwrap();
    assert!(run(&program).status.success());
    assert!(is_kept_from(&run(&other)));
    let as_user_of = |program: &Path| as_user("exec $1 $2", &[program, &evil]);
    assert!(is_kept_from(&as_user_of(&program)));
    // Whoever runs a set-user-id program is still the same.
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o4755)).unwrap();
    assert!(is_kept_from(&as_user_of(&program)));
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();

    set(&native, excluding(Exclude { processes: vec![process(USER)], ..Exclude::default() }));
    assert!(as_user_of(&program).status.success());
    assert!(is_kept_from(&run(&program)));
    // In a user namespace of his own he has another program there.
    let faked = as_user(
        "unshare -Um sh -c 'mount --bind $1 $2 && exec $2 $3' sh \"$@\"",
        &[&other, &program, &evil],
    );
    assert!(!faked.status.success(), "he may not mount there: {}", text(&faked));
    let mounted = Command::new("unshare")
        .args(["-m", "sh", "-c"])
        .arg(format!(
            "mount --bind $1 $2 && exec setpriv --reuid={USER} --regid={USER} --clear-groups $2 $3"
        ))
        .arg("sh")
        .args([&other, &program, &evil])
        .output()
        .unwrap();
    assert!(is_kept_from(&mounted), "{}", text(&mounted));
}

/// An exec is held whoever does it.
#[test]
fn an_excluded_program_executes_nothing_unscanned() {
    let native = start(Policy::default());
    let folder = tempfile::tempdir().unwrap();
    let shell = folder.path().join("shell");
    std::fs::copy("/bin/sh", &shell).unwrap();
    let program = native.path("program");
    let mut bytes = std::fs::read("/bin/true").unwrap();
    bytes.extend_from_slice(b"evil");
    std::fs::write(&program, bytes).unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    let process = ExcludedProcess { path: pattern(&shell), user: 0 };
    set(&native, excluding(Exclude { processes: vec![process], ..Exclude::default() }));
    let run = |script: &str| {
        Command::new(&shell).args(["-c", script]).arg(&program).status().unwrap().success()
    };
    assert!(run("read -r line < $0; true"), "its opens are not held");
    assert!(!run("exec $0"));
}

/// What a driver does in a mode.
#[derive(Debug, PartialEq)]
struct Does {
    deny_open: bool,
    deny_exec: bool,
    scan_written: bool,
}

#[test]
fn each_mode_holds_and_scans_what_it_says() {
    let native = start(Policy::default());
    let evil = native.write("evil", b"evil");
    let program = native.path("program");
    let mut bytes = std::fs::read("/bin/true").unwrap();
    bytes.extend_from_slice(b"evil");
    let mut number = 0;
    // Marks follow a policy with the driver's next look: it is looked until they have.
    let mut does = |mode: Mode, expected: &Does| {
        set(&native, Policy { mode, ..Policy::default() });
        number += 1;
        let written = format!("written {number}").into_bytes();
        native.write(&format!("new {number}"), &written);
        native.settle();
        let is_it = |(operation, seen): &(Operation, Vec<u8>)| {
            *operation == Operation::Background && *seen == written
        };
        let look = || {
            let scan_written = native.host.seen.contents.lock().unwrap().iter().any(is_it);
            let events = native.number("events");
            let deny_open = is_denied(&std::fs::read(&evil));
            let is_held = native.number("events") > events;
            let ran = Command::new(&program).status();
            let deny_exec = ran.is_err_and(|error| error.raw_os_error() == Some(1));
            (Does { deny_open, deny_exec, scan_written }, is_held)
        };
        let mut last = look();
        let fits = eventually(|| {
            last = look();
            last.0 == *expected && last.1 == mode.holds_open()
        });
        assert!(fits, "{mode}: {last:?}");
    };
    let all = |deny_open, deny_exec, scan_written| Does { deny_open, deny_exec, scan_written };
    set(&native, Policy { mode: Mode::Off, ..Policy::default() });
    std::fs::write(&program, &bytes).unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    for (mode, expected) in [
        (Mode::Off, all(false, false, false)),
        (Mode::Smart, all(true, true, true)),
        (Mode::Exec, all(false, true, false)),
        (Mode::Open, all(true, true, false)),
        (Mode::Write, all(false, false, true)),
        (Mode::Strict, all(true, true, true)),
        (Mode::Off, all(false, false, false)),
    ] {
        does(mode, &expected);
        let status = native.status();
        assert_eq!(status["mode"], mode.to_string());
        assert_eq!(status["protected"], mode != Mode::Off, "{status}");
    }
    // And it is there when the driver dies and comes back.
    does(Mode::Exec, &all(false, true, false));
    native.kill_worker();
    native.wait_protected();
    assert!(std::fs::read(&evil).is_ok());
    assert!(Command::new(&program).status().is_err());
}

/// Where no open has a file scanned, what was written is scanned all the same when its scan came to nothing.
#[test]
fn what_was_written_is_scanned_again_where_no_open_is_held() {
    static FIRST: AtomicBool = AtomicBool::new(true);
    let policy = Policy { mode: Mode::Write, ..Policy::default() };
    let native = Native::start(policy, |_, content| {
        let is_it = content == b"written";
        if is_it && FIRST.swap(false, Ordering::Relaxed) { Reply::Silence } else { Reply::Clean }
    });
    native.write("f", b"written");
    let scans = || {
        let contents = native.host.seen.contents.lock().unwrap();
        contents.iter().filter(|(_, content)| content == b"written").count()
    };
    assert!(eventually(|| scans() == 1));
    // The link is lost while the host looks.
    native.host.down();
    native.host.up();
    assert!(eventually(|| scans() == 2), "{}", native.status());
}

/// Strict remembers nothing that another user than root could change, and all else as ever.
#[test]
fn strict_remembers_only_what_root_alone_can_change() {
    let native = start(Policy { mode: Mode::Strict, ..Policy::default() });
    let file = |name: &str, owner, mode| {
        let path = native.write(name, name.as_bytes());
        chown(&path, Some(owner), Some(0)).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        path
    };
    let roots = file("roots", 0, 0o755);
    let others = [file("owned", USER, 0o444), file("group", 0, 0o664), file("world", 0, 0o646)];
    native.settle();
    let asks = |path: &PathBuf| {
        let before = native.host.requests();
        std::fs::read(path).unwrap();
        native.host.requests() > before
    };
    asks(&roots);
    let events = native.number("events");
    assert!(!asks(&roots), "known");
    assert!(
        native.number("events") > events,
        "by the driver's memory, which compares, and not by a mark"
    );
    for path in &others {
        asks(path);
        assert!(asks(path) && asks(path), "{}", path.display());
    }
    set(&native, Policy::default());
    for path in &others {
        asks(path);
        assert!(!asks(path), "{}: as in the mode smart", path.display());
    }
}

/// What was under way when the mode changed is answered.
#[test]
fn a_mode_that_changes_under_load_leaves_nobody_waiting() {
    let native = start(Policy::default());
    let paths: Vec<_> = (0..40).map(|n| native.write(&format!("f{n}"), b"content")).collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let mut reads = 0_u64;
                    while !stop.load(Ordering::Relaxed) {
                        for path in &paths {
                            assert_eq!(std::fs::read(path).unwrap(), b"content");
                            reads += 1;
                        }
                    }
                    reads
                })
            })
            .collect();
        let modes = [Mode::Exec, Mode::Off, Mode::Smart, Mode::Write, Mode::Strict, Mode::Open];
        for mode in modes.into_iter().cycle().take(18) {
            native.host.set_policy(Policy { mode, ..Policy::default() });
            std::thread::sleep(Duration::from_millis(150));
        }
        stop.store(true, Ordering::Relaxed);
        assert!(readers.into_iter().all(|reader| reader.join().unwrap() > 100));
    });
    assert!(eventually(|| native.number("outstanding") == 0));
    assert_eq!(native.number("unscanned"), 0, "nothing was left to the fail mode");
    set(&native, Policy::default());
    let evil = native.write("evil", b"evil");
    assert!(is_denied(&std::fs::read(&evil)));
}

#[test]
fn what_is_too_large_changes_or_comes_late_has_a_fail_mode_of_its_own() {
    // What was let through is not found clean later: then it would open.
    let native = Native::start(Policy::default(), |request, content| match content {
        [b's', ..] => Reply::Silence,
        _ if request.operation == Operation::Background => Reply::Silence,
        _ => Reply::Clean,
    });
    let base = Policy { open_deadline_ms: 1000, mode: Mode::Open, ..Policy::default() };
    let large = native.write("large", &[b'x'; 2000]);
    let silent = native.write("silent", b"silence");
    let opens = |policy: &Policy, path: &PathBuf| {
        set(&native, policy.clone());
        match std::fs::read(path) {
            Ok(_) => true,
            denied => {
                assert!(is_denied(&denied), "{denied:?}");
                false
            }
        }
    };
    let small = Policy { whole_file_limit: 1000, ..base.clone() };
    for (fail_too_large, fail_open, expected) in [
        (Some(FailMode::Open), FailMode::Closed, true),
        (Some(FailMode::Closed), FailMode::Open, false),
        (None, FailMode::Open, true),
        (None, FailMode::Closed, false),
    ] {
        let policy = Policy { fail_too_large, fail_open, ..small.clone() };
        assert_eq!(opens(&policy, &large), expected, "too large: {fail_too_large:?} {fail_open:?}");
    }
    for (fail_timed_out, fail_open, expected) in [
        (Some(FailMode::Open), FailMode::Closed, true),
        (Some(FailMode::Closed), FailMode::Open, false),
        (None, FailMode::Open, true),
        (None, FailMode::Closed, false),
    ] {
        let policy = Policy { fail_timed_out, fail_open, ..base.clone() };
        assert_eq!(opens(&policy, &silent), expected, "late: {fail_timed_out:?} {fail_open:?}");
    }
}

/// The path counts before operation and reason, whoever answers: the worker, or the supervisor where that is stopped.
#[test]
fn a_path_has_a_fail_mode_of_its_own() {
    let native = Native::start(Policy::default(), |_, _| Reply::Silence);
    for folder in ["closed/deep", "open", "other"] {
        std::fs::create_dir_all(native.path(folder)).unwrap();
    }
    let [closed, open, other] =
        ["closed/deep/f", "open/f", "other/f"].map(|name| native.write(name, b"content"));
    let bytes = |path: &Path| ByteBuf::from(path.as_os_str().as_bytes());
    let fail_paths = vec![
        FailPath { path: bytes(&native.path("closed")), mode: FailMode::Closed },
        FailPath { path: bytes(&native.path("o*/f")), mode: FailMode::Open },
        FailPath { path: bytes(&native.path("open")), mode: FailMode::Closed },
    ];
    let base = Policy { open_deadline_ms: 700, mode: Mode::Open, fail_paths, ..Policy::default() };
    let late = Policy { fail_timed_out: Some(FailMode::Closed), ..base.clone() };
    set(&native, late.clone());
    assert!(is_denied(&std::fs::read(&closed)));
    assert!(std::fs::read(&open).is_ok(), "the first that holds counts");
    assert!(std::fs::read(&other).is_ok(), "by a pattern");
    let large =
        Policy { whole_file_limit: 3, fail_too_large: Some(FailMode::Open), ..base.clone() };
    set(&native, large);
    assert!(is_denied(&std::fs::read(&closed)));
    let large = Policy {
        whole_file_limit: 3,
        fail_too_large: Some(FailMode::Closed),
        fail_open: FailMode::Closed,
        ..base
    };
    set(&native, large);
    assert!(std::fs::read(&open).is_ok());
    // Another name of the file counts as what it is: one that leads to it.
    set(&native, late);
    let link = native.path("link");
    std::os::unix::fs::symlink(&open, &link).unwrap();
    assert!(std::fs::read(&link).is_ok());
    let pid = i32::try_from(native.number("worker")).unwrap();
    let worker = nix::unistd::Pid::from_raw(pid);
    for (path, is_open) in [(&closed, false), (&open, true)] {
        let reader = common::read_in_thread(path.clone());
        assert!(eventually(|| native.number("outstanding") == 1));
        // The worker has looked at the path by now: it has asked the host.
        std::thread::sleep(Duration::from_millis(200));
        nix::sys::signal::kill(worker, nix::sys::signal::Signal::SIGSTOP).unwrap();
        let (result, _) = reader.join().unwrap();
        nix::sys::signal::kill(worker, nix::sys::signal::Signal::SIGCONT).unwrap();
        assert_eq!(result.is_ok(), is_open, "{result:?}");
    }
}

/// The fail mode of what is late is the supervisor's too, which answers where the worker cannot.
#[test]
fn a_stopped_worker_changes_nothing_about_what_is_late() {
    let policy = Policy {
        open_deadline_ms: 1500,
        fail_timed_out: Some(FailMode::Closed),
        ..Policy::default()
    };
    let native = Native::start(policy, |_, _| Reply::Silence);
    let path = native.write("f", b"content");
    let reader = common::read_in_thread(path);
    assert!(eventually(|| native.number("outstanding") == 1));
    let worker = nix::unistd::Pid::from_raw(i32::try_from(native.number("worker")).unwrap());
    nix::sys::signal::kill(worker, nix::sys::signal::Signal::SIGSTOP).unwrap();
    let (result, _) = reader.join().unwrap();
    nix::sys::signal::kill(worker, nix::sys::signal::Signal::SIGCONT).unwrap();
    assert!(is_denied(&result), "{result:?}");
}

#[test]
fn a_file_that_changes_has_a_fail_mode_of_its_own() {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    static LEN: AtomicI64 = AtomicI64::new(1000);
    // It is changed while it is judged, each time; truncate(2) opens nothing.
    let base = Policy { mode: Mode::Open, ..Policy::default() };
    let native = Native::start(base.clone(), |_, content| {
        if content.starts_with(b"changing") {
            let len = LEN.fetch_add(1, Ordering::Relaxed);
            nix::unistd::truncate(PATH.get().unwrap(), len).unwrap();
        }
        Reply::Clean
    });
    let path = PATH.get_or_init(|| native.write("changing", b"changing content"));
    for (fail_changing, fail_open, expected) in [
        (Some(FailMode::Open), FailMode::Closed, true),
        (Some(FailMode::Closed), FailMode::Open, false),
        (None, FailMode::Open, true),
        (None, FailMode::Closed, false),
    ] {
        set(&native, Policy { fail_changing, fail_open, ..base.clone() });
        let read = std::fs::read(path);
        assert_eq!(read.is_ok(), expected, "{fail_changing:?} {fail_open:?}");
        assert!(expected || is_denied(&read));
    }
}

/// Ten thousand exclusions of every kind: they hold, and the driver stays small.
#[test]
fn ten_thousand_exclusions_fit_a_small_driver() {
    let native = start(Policy::default());
    let evil = native.path("srv/9999/data/evil");
    put(&native, &evil, b"evil");
    assert!(is_denied(&std::fs::read(&evil)));
    let srv = native.path("srv");
    let names = |count: usize, name: fn(usize) -> String| (0..count).map(name);
    let exclude = Exclude {
        paths: (0..9_000).chain([9_999]).map(|n| pattern(&srv.join(format!("{n}/*")))).collect(),
        extensions: names(500, |n| format!("ext{n}"))
            .map(|name| ByteBuf::from(name.into_bytes()))
            .collect(),
        owners: (10_000..10_300).collect(),
        processes: names(199, |n| format!("/usr/bin/program{n}"))
            .map(|path| ExcludedProcess { path: ByteBuf::from(path.into_bytes()), user: 0 })
            .collect(),
        ..Exclude::default()
    };
    let policy = excluding(exclude);
    for _ in 0..3 {
        set(&native, policy.clone());
        assert!(std::fs::read(&evil).is_ok());
        set(&native, Policy::default());
        assert!(is_denied(&std::fs::read(&evil)));
    }
    set(&native, policy);
    // What it measures is up to five seconds old.
    std::thread::sleep(Duration::from_secs(6));
    native.host.seen.messages.lock().unwrap().clear();
    let kib = native.host.heard(|message| match message {
        ToHost::Heartbeat(beat) => Some(beat.memory_kib),
        _ => None,
    });
    println!("driver with 10,000 exclusions: {kib} KiB");
    assert!(kib < 8 * 1024, "{kib} KiB");
}
