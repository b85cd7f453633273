//! Processes that run what is found to be infected, on this machine's kernel.

#![allow(clippy::unwrap_used)] // A test says what it expects by unwrapping it.

mod common;

use common::{Native, Reply, eventually, is_denied};
use seawall_proto::{Mapper, MapperEnd, Notice, Policy, Running, ScanRequest, ToHost};
use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A program whose first thread ends, and another goes on.
const HEADLESS: &str = "#include <pthread.h>\n#include <unistd.h>\n\
    static void *go_on(void *none) { sleep(60); return none; }\n\
    int main(void) { pthread_t other; pthread_create(&other, 0, go_on, 0); pthread_exit(0); }\n";

/// A process that ends with its test.
struct Runs(Child);

impl Drop for Runs {
    fn drop(&mut self) {
        let _gone = (self.0.kill(), self.0.wait());
    }
}

/// A driver, and a program that is clean at first.
struct Case {
    native: Native,
    program: PathBuf,
    is_evil: Arc<AtomicBool>,
}

impl Case {
    fn start(running: Running) -> Self {
        Self::with(&std::fs::read("/bin/sleep").unwrap(), running)
    }

    fn with(program: &[u8], running: Running) -> Self {
        let is_evil = Arc::new(AtomicBool::new(false));
        let known = Arc::clone(&is_evil);
        let rule = move |_: &ScanRequest, content: &[u8]| {
            let found = content.ends_with(b"evil") && known.load(Ordering::Relaxed);
            if found { Reply::Running(running) } else { Reply::Clean }
        };
        let native = Native::start(Policy::default(), rule);
        let program = native.write("program", &[program, b"evil"].concat());
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        native.settle();
        Self { native, program, is_evil }
    }

    fn run(&self, program: &Path) -> Runs {
        let mut child = Command::new(program);
        child.arg("60").stdin(File::open(&self.program).unwrap()).stdout(Stdio::null());
        let child = child.spawn().unwrap();
        let child = Runs(child);
        // The new program is there a little later than spawn comes back.
        let name = format!("/proc/{}/comm", child.0.id());
        let program = program.file_name().unwrap().as_encoded_bytes();
        assert!(eventually(|| std::fs::read(&name).unwrap().trim_ascii_end() == program));
        child
    }

    /// It is found to be infected, at an open; what the driver tells of it.
    fn find(&self) -> (Vec<u8>, Vec<Mapper>) {
        self.is_evil.store(true, Ordering::Relaxed);
        self.native.host.renew();
        let denied = || is_denied(&std::fs::read(&self.program));
        assert!(eventually(denied));
        self.native.host.heard(|message| match message {
            ToHost::Notice(Notice::Mapped { path, path_is_true: true, mappers, more: 0 }) => {
                Some((path.to_vec(), mappers.clone()))
            }
            _ => None,
        })
    }
}

fn state(Runs(child): &Runs) -> char {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
    stat[stat.rfind(')').unwrap()..].chars().nth(2).unwrap()
}

#[test]
fn those_who_run_it_are_named() {
    let case = Case::start(Running::Report);
    let (child, other) = (case.run(&case.program), case.run(Path::new("/bin/sleep")));
    let (path, mappers) = case.find();
    assert_eq!(path, case.program.as_os_str().as_encoded_bytes());
    let [one] = &mappers[..] else { panic!("{mappers:?}") };
    assert_eq!((one.pid, one.end, one.process.uid), (child.0.id(), MapperEnd::Left, Some(0)));
    assert_eq!(&**one.process.name, b"program");
    assert_eq!((state(&child), state(&other)), ('S', 'S'));
}

#[test]
fn those_who_run_it_are_killed_and_nobody_else() {
    let case = Case::start(Running::Kill);
    // The other one only has it open.
    let (mut child, other) = (case.run(&case.program), case.run(Path::new("/bin/sleep")));
    let mappers = case.find().1;
    let [one] = &mappers[..] else { panic!("{mappers:?}") };
    assert_eq!((one.pid, one.end), (child.0.id(), MapperEnd::Killed));
    assert_eq!(child.0.wait().unwrap().signal(), Some(9));
    assert_eq!(state(&other), 'S');
    assert!(is_denied(&Command::new(&case.program).spawn()));
}

/// Such a process shows nothing mapped, but its other threads do.
#[test]
fn one_whose_first_thread_has_ended_does_not_get_away() {
    let folder = tempfile::tempdir().unwrap();
    let (source, built) = (folder.path().join("headless.c"), folder.path().join("headless"));
    std::fs::write(&source, HEADLESS).unwrap();
    let compiled =
        Command::new("cc").arg(&source).arg("-o").arg(&built).arg("-lpthread").status().unwrap();
    assert!(compiled.success());
    let case = Case::with(&std::fs::read(&built).unwrap(), Running::Kill);
    let mut child = case.run(&case.program);
    assert!(eventually(|| state(&child) == 'Z'));
    let mappers = case.find().1;
    let [one] = &mappers[..] else { panic!("{mappers:?}") };
    assert_eq!((one.pid, one.end), (child.0.id(), MapperEnd::Killed));
    assert_eq!(child.0.wait().unwrap().signal(), Some(9));
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
    assert_eq!((one.pid, one.end), (child.0.id(), MapperEnd::Stopped));
    assert!(eventually(|| state(&child) == 'T'));
}

/// Its file waits to be looked for once more; nothing keeps its file system busy meanwhile.
#[test]
fn a_file_system_can_be_unmounted_after_a_denial() {
    let case = Case::start(Running::Report);
    let child = case.run(&case.program);
    case.find();
    drop(child);
    assert!(is_denied(&std::fs::read(&case.program)));
    let mount = case.native.path("");
    let unmounted = || {
        std::thread::sleep(std::time::Duration::from_millis(50));
        nix::mount::umount(&mount).is_ok()
    };
    assert!(std::iter::repeat_with(unmounted).take(10).any(|unmounted| unmounted));
}
