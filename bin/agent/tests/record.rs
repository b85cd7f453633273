//! Recording what is opened and written, on this machine's kernel.

#![allow(clippy::unwrap_used)] // A test says what it expects by unwrapping it.

mod common;

use common::{Native, Reply, eventually};
use seawall_proto::Policy;
use serde_json::Value;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// A driver that records into this file.
fn recording(trace: &Path) -> Native {
    // Options are those of a test's whole run.
    let option: &'static str = Box::leak(format!("--record={}", trace.display()).into_boxed_str());
    let options: &'static [&'static str] = Box::leak(vec![option].into_boxed_slice());
    Native::start_with(options, Policy::default(), |_, _| Reply::Clean)
}

/// What was recorded: what, of which file, of what size and by which process.
fn lines(trace: &Path) -> Vec<(String, u64, u64, u64)> {
    let text = std::fs::read_to_string(trace).unwrap();
    let mut lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    assert_eq!(lines.next().unwrap()["seawall_trace"], 1);
    let (mut found, mut last) = (Vec::new(), 0);
    for line in lines {
        let number = |at: usize| line[at].as_u64().unwrap();
        assert!(number(0) >= last, "in the order of their times: {line}");
        last = number(0);
        found.push((line[1].as_str().unwrap().to_owned(), number(2), number(3), number(4)));
    }
    found
}

fn kinds(trace: &Path) -> Vec<String> {
    lines(trace).into_iter().map(|(kind, ..)| kind).collect()
}

#[test]
fn opens_of_marked_files_are_recorded_and_no_names() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace");
    let native = recording(&trace);
    let path = native.write("secret-name", b"some content");
    native.settle();
    let mut expected = vec!["open", "write"];
    // The first of these has it scanned and marked, the others raise no event that is held.
    for _ in 0..5 {
        drop(std::fs::File::open(&path).unwrap());
        expected.push("open");
        // Two that come faster than they are read are one.
        assert!(eventually(|| kinds(&trace) == expected), "{:?}", kinds(&trace));
    }
    assert!(native.number("events") < 6, "{}", native.status());
    let lines = lines(&trace);
    // The driver itself has opened it too, for the scan after its close.
    assert!(lines.iter().all(|line| line.3 == u64::from(std::process::id())), "{lines:?}");
    assert!(lines.iter().all(|line| line.1 == lines[0].1), "one file: {lines:?}");
    let sizes: Vec<u64> = lines.iter().map(|line| line.2).collect();
    assert_eq!(sizes[1..], [12; 6]);
    let text = std::fs::read_to_string(&trace).unwrap();
    assert!(!text.contains("secret-name"), "{text}");
    assert_eq!(std::fs::metadata(&trace).unwrap().permissions().mode() & 0o777, 0o600);
    let other = native.write("other", b"x");
    native.kill_worker();
    native.wait_protected();
    let before = kinds(&trace).len();
    std::fs::read(other).unwrap();
    assert!(eventually(|| kinds(&trace).len() > before), "another worker goes on");
}

/// A folder with little room.
struct Small(PathBuf);

impl Small {
    fn mount(path: PathBuf) -> Self {
        std::fs::create_dir(&path).unwrap();
        let (flags, size) = (nix::mount::MsFlags::empty(), Some("size=8k"));
        nix::mount::mount(Some("none"), &path, Some("tmpfs"), flags, size).unwrap();
        Self(path)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _gone = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_full_disk_ends_the_recording_and_nothing_else() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    let private = nix::mount::MsFlags::MS_PRIVATE | nix::mount::MsFlags::MS_REC;
    nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let small = Small::mount(folder.path().join("small"));
    let native = recording(&small.0.join("trace"));
    let ended = || native.log().contains("recording has ended");
    let mut opened = 0;
    assert!(eventually(|| {
        let path = native.write(&format!("file-{opened}"), b"some content");
        opened += 1;
        assert_eq!(std::fs::read(path).unwrap(), b"some content");
        ended()
    }));
    native.settle();
    let path = native.write("after", b"after that");
    assert_eq!(std::fs::read(path).unwrap(), b"after that");
    native.wait_protected();
    let unmounted = nix::mount::umount2(&native.path(""), nix::mount::MntFlags::empty());
    assert_eq!(unmounted, Ok(()), "nothing that was recorded keeps it busy");
}

#[test]
fn a_file_that_cannot_be_written_is_told_at_the_start() {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_seawall-agent"));
    let output = command.args(["run", "--record", "/proc/none", "--only-mount", "/proc"]).output();
    let output = output.unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("/proc/none: nothing can be recorded"), "{said}");
}
