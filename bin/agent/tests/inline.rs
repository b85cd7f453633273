//! Content without a region: from the start, and from one moment to the next.

#![allow(clippy::unwrap_used)] // A test says what it expects by unwrapping it.

mod common;

use common::{Native, Reply, eventually, is_denied};
use seawall_proto::{FailMode, INLINE_MAX, Operation, Policy, ScanRequest};

fn by_content(_: &ScanRequest, content: &[u8]) -> Reply {
    // At the end: what was lost on the way would not be found.
    if content.ends_with(b"evil") { Reply::Infected } else { Reply::Clean }
}

/// An access without a verdict is denied, so that none goes unnoticed.
fn policy() -> Policy {
    Policy { fail_open: FailMode::Closed, ..Policy::default() }
}

fn content_way(native: &Native) -> String {
    native.status()["content"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn without_a_region_content_travels_on_the_link() {
    let native = Native::start_with(&["--region=/nonexistent"], policy(), by_content);
    let way = content_way(&native);
    assert!(way.starts_with("on the link: ") && way.contains("/nonexistent"), "{way}");
    let lens = [1, INLINE_MAX - 1, INLINE_MAX, INLINE_MAX + 1, 3 * INLINE_MAX, 5_000_000];
    for (n, len) in lens.into_iter().enumerate() {
        let mut content: Vec<u8> = (0..len).map(|at| (at / 3 + n) as u8).collect();
        let good = native.write(&format!("good{n}"), &content);
        assert_eq!(std::fs::read(&good).unwrap(), content);
        content.extend_from_slice(b"evil");
        assert!(is_denied(&std::fs::read(native.write(&format!("evil{n}"), &content))), "{len}");
        let came = |(operation, bytes): &(Operation, Vec<u8>)| {
            *operation == Operation::Open && *bytes == content
        };
        assert!(native.host.seen.contents.lock().unwrap().iter().any(came), "{len} came whole");
    }
    let (slots, inline) = native.parts();
    assert_eq!(slots, 0);
    assert!(inline > 2 * 5_000_000 / INLINE_MAX as u64, "{inline}");
    assert_eq!(native.number("unscanned"), 0);
}

#[test]
fn without_region_and_key_there_is_no_session_and_the_reason_is_told() {
    let native = Native::start(Policy::default(), by_content);
    std::fs::remove_file(native.region()).unwrap();
    std::fs::remove_file(native.region().with_file_name("key")).unwrap();
    native.kill_worker();
    let reason = || native.status()["reason"].as_str().unwrap_or_default().to_owned();
    assert!(eventually(|| reason().contains("no key comes by fw_cfg")), "{}", reason());
}

#[test]
fn a_region_that_goes_and_comes_back_costs_no_open() {
    let native = Native::start(policy(), by_content);
    let (mut round, mut sessions) = (0, 1);
    let mut open_some = |native: &Native| {
        for n in 0..20 {
            round += 1;
            let good = native.write(&format!("good{round}"), format!("good {round}").as_bytes());
            assert!(std::fs::read(&good).is_ok(), "open {n}: {}", native.log());
            let mut evil = vec![round as u8; 200_000];
            evil.extend_from_slice(b"evil");
            let evil = native.write(&format!("evil{round}"), &evil);
            assert!(is_denied(&std::fs::read(evil)), "open {n}");
        }
    };
    for _ in 0..3 {
        assert_eq!(content_way(&native), "through the region");
        let before = native.parts();
        open_some(&native);
        let after = native.parts();
        assert!(after.0 > before.0 && after.1 == before.1, "slots alone: {before:?} {after:?}");

        // Background scans may be under way; the test's host would lose their slots too.
        native.settle();
        native.unplug();
        open_some(&native);
        assert!(native.parts().1 > after.1, "inline now");
        assert_eq!(content_way(&native), "on the link: the region is gone");

        native.plug();
        assert!(eventually(|| content_way(&native) == "through the region"));
        sessions += 1;
        let seen = native.host.seen.sessions.load(std::sync::atomic::Ordering::Relaxed);
        assert_eq!(seen, sessions, "one new session, with the region");
    }
    assert_eq!(native.number("unscanned"), 0);
}

#[test]
fn a_region_that_vanishes_while_nobody_opens_is_noticed() {
    let native = Native::start(policy(), by_content);
    native.unplug();
    assert!(eventually(|| content_way(&native).starts_with("on the link")));
    // A link that is lost then comes back with the key file.
    native.host.down();
    native.host.up();
    native.wait_protected();
    assert!(content_way(&native).starts_with("on the link"));
    assert!(is_denied(&std::fs::read(native.write("evil", b"evil"))));
}

#[test]
fn a_device_that_swallows_what_is_written_is_taken_for_gone() {
    let native = Native::start(policy(), by_content);
    assert!(std::fs::read(native.write("good", b"good")).is_ok());
    native.settle();
    let before = native.parts();
    // Reads as ones, as the bus does where no device is; the mapping still works.
    let region = std::fs::OpenOptions::new().write(true).open(native.region()).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&region, &[0xff; 96], 0).unwrap();
    assert!(is_denied(&std::fs::read(native.write("evil", b"evil"))));
    let after = native.parts();
    assert!(after.0 == before.0 && after.1 > before.1, "{before:?} {after:?}");
}
