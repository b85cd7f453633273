//! The guide's example in Rust, under a real handle.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{OnceLock, mpsc};
use std::time::Duration;

use seawall_engine::host::{EngineConfig, EngineHandle, EngineState, Lane, SharedContent};
use seawall_engine::{Detection, Metadata, Operation, Outcome};

/// Far longer than anything here takes; a test that needs it has failed.
const LONG: Duration = Duration::from_secs(60);

/// The example, built now: `cargo test --test word` alone would leave an old one.
fn example() -> &'static Path {
    static EXAMPLE: OnceLock<PathBuf> = OnceLock::new();
    EXAMPLE.get_or_init(|| {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
        let output = Command::new(env!("CARGO"))
            .args(["build", "--release", "--locked", "--example", "word", "--manifest-path"])
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml"))
            .arg("--target-dir")
            .arg(target)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        target.join("release/examples/word")
    })
}

fn config(argument: &str) -> EngineConfig {
    EngineConfig::new("word", vec![example().to_str().unwrap().into(), argument.into()])
}

fn ready(word: &str) -> EngineHandle {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("word");
    std::fs::write(&file, word).unwrap();
    let handle = EngineHandle::start(config(file.to_str().unwrap()), |_| ()).unwrap();
    assert!(handle.wait_ready(LONG), "{:?}", handle.state());
    handle
}

fn scan(handle: &EngineHandle, content: &[u8]) -> Outcome {
    let metadata = Metadata {
        path: Vec::new(),
        guest: "g".into(),
        operation: Operation::Open,
        size: 0,
        archives: None,
    };
    let (tell, reply) = mpsc::channel();
    let tell = move |report| drop(tell.send(report));
    handle.scan(SharedContent::new(content).unwrap(), metadata, Lane::OnAccess, LONG, tell);
    reply.recv_timeout(LONG).unwrap().result.unwrap()
}

#[test]
fn the_word_is_found_with_its_offset_and_all_else_is_clean() {
    let handle = ready("evil\n");
    let found = Detection { offset: Some(5), ..Detection::new("Word") };
    assert_eq!(scan(&handle, b"some evil words"), Outcome::Infected(vec![found]));
    assert_eq!(scan(&handle, b"some words"), Outcome::Clean);
    assert_eq!(scan(&handle, b""), Outcome::Clean);
}

#[test]
fn another_word_is_another_generation() {
    assert_ne!(ready("evil").generation(), ready("good").generation());
}

#[test]
fn a_missing_file_is_a_reason() {
    let (tell, events) = mpsc::channel();
    let tell = move |event| drop(tell.send(event));
    let _handle = EngineHandle::start(config("/nonexistent"), tell).unwrap();
    loop {
        if let EngineState::Failed { diagnostics } = events.recv_timeout(LONG).unwrap() {
            assert!(diagnostics[0].to_string().contains("/nonexistent: No such file"));
            return;
        }
    }
}
