//! C programs built against the header and the static library, and run under a real handle.
#![allow(dead_code, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use seawall_engine::host::{
    EngineConfig, EngineHandle, EngineState, Lane, Metadata, Operation, Outcome, ScanId,
    ScanReport, SharedContent,
};

/// Far longer than anything here takes; a test that needs it has failed.
pub const LONG: Duration = Duration::from_secs(60);

/// What `rustc --print native-static-libs` names, as the guide does.
pub const LIBRARIES: &[&str] = &["-lgcc_s", "-lutil", "-lrt", "-lpthread", "-lm", "-ldl"];

/// The static library, built now: cargo makes none for the tests, which do not link to it.
pub fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let words = ["build", "--release", "--locked", "--message-format=json"];
        let output = Command::new(env!("CARGO"))
            .args(words)
            .arg("--manifest-path")
            .arg(own("Cargo.toml"))
            // Where the tests themselves are: the same libraries serve both.
            .arg("--target-dir")
            .arg(Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .flat_map(|message| message["filenames"].as_array().cloned().unwrap_or_default())
            .filter_map(|name| name.as_str().map(PathBuf::from))
            .find(|path| path.ends_with("libseawall_engine.a"))
            .expect("cargo built no static library")
    })
}

/// A path within this crate.
pub fn own(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Compiles a C source of this crate, once for each run of a test program. Every warning is an error.
pub fn compile(source: &str) -> PathBuf {
    static DONE: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
    let mut done = DONE.lock().unwrap();
    let program =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(Path::new(source).file_stem().unwrap());
    if done.contains(&program) {
        return program;
    }
    // Renamed to its place: another run may be using the one that is there.
    let new = program.with_extension(std::process::id().to_string());
    let output = Command::new("cc")
        .args(["-Wall", "-Wextra", "-Werror", "-std=c11", "-O2", "-I"])
        .arg(own("include"))
        .arg(own(source))
        .arg(library())
        .args(LIBRARIES)
        // Symbols are looked up at their first use, many of them inside the sandbox.
        .arg("-Wl,-z,lazy")
        .arg("-o")
        .arg(&new)
        .output()
        .expect("no cc: cargo xtask setup installs it");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::rename(new, &program).unwrap();
    done.push(program.clone());
    program
}

/// A handle with what the stories need around it.
pub struct Engine {
    pub handle: EngineHandle,
    pub states: Receiver<EngineState>,
}

pub fn start(program: &Path, arguments: &[&str]) -> Engine {
    let program = program.to_str().unwrap().to_owned();
    let command =
        [program].into_iter().chain(arguments.iter().map(|&one| one.to_owned())).collect();
    let config = EngineConfig { memory_mib: 256, ..EngineConfig::new("test", command) };
    let (tell, states) = mpsc::channel();
    let handle = EngineHandle::start(config, move |state| drop(tell.send(state))).unwrap();
    Engine { handle, states }
}

impl Engine {
    pub fn ready(self) -> Self {
        assert!(self.handle.wait_ready(LONG), "not ready: {:?}", self.handle.state());
        self
    }

    /// Why it does not run.
    pub fn refusal(self) -> Vec<String> {
        loop {
            match self.states.recv_timeout(LONG).unwrap() {
                EngineState::Failed { diagnostics } => {
                    return diagnostics.iter().map(ToString::to_string).collect();
                }
                EngineState::Ready { description } => {
                    panic!("ready: {description:?}")
                }
                _ => {}
            }
        }
    }

    pub fn send(&self, content: SharedContent) -> (ScanId, Receiver<ScanReport>) {
        let metadata = Metadata {
            path: b"/tmp/\xff".to_vec(),
            guest: "g1".into(),
            operation: Operation::Exec,
            size: 4711,
            archives: None,
        };
        let (tell, reply) = mpsc::channel();
        let tell = move |report| drop(tell.send(report));
        let id = self.handle.scan(content, metadata, Lane::OnAccess, LONG, tell);
        (id.unwrap(), reply)
    }

    pub fn scan(&self, content: &[u8]) -> ScanReport {
        self.send(SharedContent::new(content).unwrap()).1.recv_timeout(LONG).unwrap()
    }

    /// The family of the one detection, in which the test engine tells what it saw.
    pub fn told(&self, content: &[u8]) -> String {
        match self.scan(content).result {
            Ok(Outcome::Infected(found)) => found[0].family.clone().unwrap(),
            other => panic!("{other:?}"),
        }
    }

    /// Waits until a scan is at the process.
    pub fn wait_in_flight(&self) {
        while self.handle.status().in_flight == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
