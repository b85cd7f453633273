//! Processes that run what is found to be infected, on this machine's kernel.

#![allow(clippy::unwrap_used)] // A test says what it expects by unwrapping it.

mod common;

use common::{Native, Reply, eventually, is_denied};
use seawall_proto::{Mapper, MapperEnd, Notice, Policy, Running, ScanRequest, ToHost};
use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A driver, and a program that is clean at first.
struct Case {
    native: Native,
    program: PathBuf,
    is_evil: Arc<AtomicBool>,
}

impl Case {
    fn start(running: Running) -> Self {
        let is_evil = Arc::new(AtomicBool::new(false));
        let known = Arc::clone(&is_evil);
        let rule = move |_: &ScanRequest, content: &[u8]| {
            let found = content.ends_with(b"evil") && known.load(Ordering::Relaxed);
            if found { Reply::Running(running) } else { Reply::Clean }
        };
        let native = Native::start(Policy::default(), rule);
        let mut content = std::fs::read("/bin/sleep").unwrap();
        content.extend_from_slice(b"evil");
        let program = native.write("program", &content);
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        native.settle();
        Self { native, program, is_evil }
    }

    fn run(&self, program: &Path) -> Child {
        let mut child = Command::new(program);
        child.arg("1000").stdin(File::open(&self.program).unwrap());
        let child = child.spawn().unwrap();
        // The new program is mapped a little later than spawn comes back.
        let exe = format!("/proc/{}/exe", child.id());
        assert!(eventually(|| std::fs::read_link(&exe).is_ok_and(|exe| exe != *"/proc/self/exe")));
        child
    }

    /// It is found to be infected, at an open; what the driver tells of it.
    fn find(&self) -> (Vec<u8>, Vec<Mapper>) {
        self.is_evil.store(true, Ordering::Relaxed);
        self.native.host.renew();
        let denied = || is_denied(&std::fs::read(&self.program));
        assert!(eventually(denied));
        self.native.host.heard(|message| match message {
            ToHost::Notice(Notice::Mapped { path, mappers, more: 0 }) => {
                Some((path.to_vec(), mappers.clone()))
            }
            _ => None,
        })
    }
}

fn state(child: &Child) -> char {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
    stat[stat.rfind(')').unwrap()..].chars().nth(2).unwrap()
}

fn end(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn those_who_run_it_are_named() {
    let case = Case::start(Running::Report);
    let (child, other) = (case.run(&case.program), case.run(Path::new("/bin/sleep")));
    let (path, mappers) = case.find();
    assert_eq!(path, case.program.as_os_str().as_encoded_bytes());
    let [one] = &mappers[..] else { panic!("{mappers:?}") };
    assert_eq!((one.pid, one.end, one.process.uid), (child.id(), MapperEnd::Left, Some(0)));
    assert_eq!(&**one.process.name, b"program");
    assert_eq!((state(&child), state(&other)), ('S', 'S'));
    end(child);
    end(other);
}

#[test]
fn those_who_run_it_are_killed_and_nobody_else() {
    let case = Case::start(Running::Kill);
    // The other one only has it open.
    let (mut child, other) = (case.run(&case.program), case.run(Path::new("/bin/sleep")));
    let mappers = case.find().1;
    let [one] = &mappers[..] else { panic!("{mappers:?}") };
    assert_eq!((one.pid, one.end), (child.id(), MapperEnd::Killed));
    assert_eq!(child.wait().unwrap().signal(), Some(9));
    assert_eq!(state(&other), 'S');
    end(other);
    assert!(is_denied(&Command::new(&case.program).spawn()));
}

#[test]
fn those_who_run_it_are_stopped_though_its_name_is_gone() {
    let case = Case::start(Running::Stop);
    let child = case.run(&case.program);
    let other_name = case.native.path("other-name");
    std::fs::hard_link(&case.program, &other_name).unwrap();
    std::fs::remove_file(&case.program).unwrap();
    let case = Case { program: other_name, ..case };
    case.native.settle();
    let mappers = case.find().1;
    let [one] = &mappers[..] else { panic!("{mappers:?}") };
    assert_eq!((one.pid, one.end), (child.id(), MapperEnd::Stopped));
    assert!(eventually(|| state(&child) == 'T'));
    end(child);
}
