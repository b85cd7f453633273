//! Archives: when engines look into them, and what is remembered of that.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Driver, Engine, Service, Setup, block_on, seawall, wait_for};
use seawall_client::EventKind;
use seawall_proto::{Decision, Operation, ToHost, Verdict, VerdictKind};
use std::fs;
use std::io::Write;

fn setup(archives: &str) -> Setup {
    Setup {
        engine: Engine::Yara,
        guests: vec!["web", "db"],
        more: format!("[policy.archives]\n{archives}\n"),
        ..Setup::default()
    }
}

/// A compressed tar: no rule finds anything in it as a whole.
fn archive(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in members {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        builder.append_data(&mut header, name, *bytes).unwrap();
    }
    let tar = builder.into_inner().unwrap();
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    out.write_all(&tar).unwrap();
    out.finish().unwrap()
}

fn evil() -> Vec<u8> {
    archive(&[("readme", b"harmless"), ("bin/evil", &common::eicar())])
}

fn judge(driver: &mut Driver, operation: Operation, content: &[u8]) -> Verdict {
    let (slots, refs) = driver.fill(content);
    let mut request = driver.request(refs, true);
    request.operation = operation;
    let id = request.id;
    driver.say(ToHost::ScanRequest(request));
    let verdict = driver.verdict(id);
    drop(slots);
    verdict
}

fn kind(driver: &mut Driver, operation: Operation, content: &[u8]) -> VerdictKind {
    judge(driver, operation, content).kind
}

#[test]
fn an_archive_is_looked_into_on_demand_and_what_is_found_counts_from_then_on() {
    let mut service = Service::start(setup(""));
    let evil = evil();
    let (mut web, mut db) = (service.driver("web"), service.driver("db"));
    assert_eq!(kind(&mut web, Operation::Open, &evil), VerdictKind::Unopened);
    assert_eq!(kind(&mut db, Operation::Open, &evil), VerdictKind::Unopened, "as remembered");
    assert_eq!(kind(&mut db, Operation::Background, &evil), VerdictKind::Unopened, "nor then");
    assert_eq!(kind(&mut web, Operation::Open, b"no archive"), VerdictKind::Clean);
    assert_eq!(kind(&mut web, Operation::OnDemand, b"no archive"), VerdictKind::Clean);
    let found = judge(&mut web, Operation::OnDemand, &evil);
    assert_eq!((found.kind, found.decision), (VerdictKind::Infected, Some(Decision::Deny)));
    for operation in [Operation::Open, Operation::Background, Operation::OnDemand] {
        assert_eq!(kind(&mut db, operation, &evil), VerdictKind::Infected, "{operation:?}");
    }
    let good = archive(&[("readme", b"harmless")]);
    assert_eq!(kind(&mut web, Operation::Open, &good), VerdictKind::Unopened);
    // A hash alone does not hide that nobody has looked into it.
    let hash = *blake3::hash(&good).as_bytes();
    let named = db.name(Operation::Open, hash).unwrap();
    assert_eq!(named.kind, VerdictKind::Unopened);
    assert!(db.name(Operation::OnDemand, hash).is_none());
    assert_eq!(kind(&mut web, Operation::OnDemand, &good), VerdictKind::Clean);
    for operation in [Operation::OnDemand, Operation::Open] {
        assert_eq!(db.name(operation, hash).unwrap().kind, VerdictKind::Clean);
    }
    assert!(db.name(Operation::OnDemand, *blake3::hash(&evil).as_bytes()).is_none());
    let event = wait_for("an event with the member", || {
        service
            .events()
            .into_iter()
            .find(|event| event.kind == EventKind::Verdict && event.member.is_some())
    });
    assert_eq!(event.member.as_deref(), Some("bin/evil"));
    drop((web, db));
    service.restart("KILL");
    let mut web = service.driver("web");
    let scans = service.status().counters.scans;
    for (operation, content, expected) in [
        (Operation::Open, &evil, VerdictKind::Infected),
        (Operation::OnDemand, &evil, VerdictKind::Infected),
        (Operation::OnDemand, &good, VerdictKind::Clean),
        (Operation::Open, &good, VerdictKind::Unopened),
    ] {
        assert_eq!(kind(&mut web, operation, content), expected, "{operation:?}");
    }
    assert_eq!(service.status().counters.scans, scans, "all of it is remembered over a crash");
}

#[test]
fn policy_says_when_and_how_far() {
    let service = Service::start(setup("on_access = true\nmembers = 2"));
    fs::create_dir_all(service.path("policy.d")).unwrap();
    let (mut web, mut db) = (service.driver("web"), service.driver("db"));
    let off = "[[group]]\nname = \"g\"\nguests = [\"db\"]\n[group.policy.archives]\non_access = false\non_demand = false\n";
    fs::write(service.path("policy.d/a.toml"), off).unwrap();
    assert!(block_on(service.client().reload()).unwrap().taken);
    let evil = evil();
    assert_eq!(kind(&mut db, Operation::OnDemand, &evil), VerdictKind::Clean, "never");
    assert_eq!(kind(&mut web, Operation::Open, &evil), VerdictKind::Infected, "on access");
    let much = archive(&[("a", b"a"), ("b", b"b"), ("c", b"c")]);
    let verdict = judge(&mut web, Operation::OnDemand, &much);
    assert_eq!(verdict.kind, VerdictKind::Error);
    let why = verdict.detail.unwrap();
    assert!(why.contains("more than 2 members"), "{why}");
    assert_eq!(kind(&mut db, Operation::Open, &much), VerdictKind::Clean);
    // Whoever asks the service itself is told the member.
    fs::write(service.path("evil.tgz"), &evil).unwrap();
    let output = seawall(&service, &["scan", service.path("evil.tgz").to_str().unwrap()]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains(" in bin/evil (severity"), "{text}");
}
