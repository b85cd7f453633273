//! Several engines: whatever the order in which they work, the same outcome; and who is spared what.

#![allow(clippy::unwrap_used)] // A test says what it expects by unwrapping it.

mod common;

use common::{Engine, Service, Setup, block_on, seawall, wait_for};
use seawall_client::{ScanReport, Verdict};
use seawall_proto::VerdictKind;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

fn service(scan: &str) -> Service {
    let more = format!("[scan]\n{scan}\n");
    Service::start(Setup { engine: Engine::Three, more, ..Setup::default() })
}

const ORDERS: [&str; 4] = [
    "engines = \"in-order\"",
    "engines = \"side-by-side\"",
    "engines = \"in-order\"\nearly_exit = false",
    "engines = \"side-by-side\"\nearly_exit = false",
];

fn scan(service: &Service, orders: &str) -> ScanReport {
    service.scan("x", format!("SEAWALL-FAULT {orders}\n").as_bytes())
}

/// Names of what was found, in the report's order.
fn found(report: &ScanReport) -> Vec<&str> {
    report.detections.iter().map(|found| found.name.as_str()).collect()
}

fn asked(report: &ScanReport) -> Vec<&str> {
    report.engines.iter().map(|engine| engine.engine.as_str()).collect()
}

#[test]
fn the_outcome_is_the_same_in_every_order() {
    for order in ORDERS {
        let service = service(order);
        let verdict = |orders: &str| scan(&service, orders).verdict;
        assert_eq!(verdict("nothing"), Verdict::Clean, "{order}");
        assert_eq!(verdict("three:found=A"), Verdict::Infected, "{order}");
        assert_eq!(verdict("one:error,three:found=B"), Verdict::Infected, "{order}");
        assert_eq!(verdict("two:error"), Verdict::Error, "{order}: never clean");
        // Known to be good: slower than the others, and still it counts.
        let report = scan(&service, "one:slow-allow=good.list:7,two:found=C,three:error");
        assert_eq!(report.verdict, Verdict::Clean, "{order}");
        assert_eq!(report.engines[0].allowed.as_deref(), Some("good.list:7"), "{order}");
        // An engine that may not say so is one that found nothing.
        let report = scan(&service, "two:allow=mine,three:found=D");
        assert_eq!(report.verdict, Verdict::Infected, "{order}");
        assert!(report.engines.iter().all(|engine| engine.allowed.is_none()), "{order}");
        assert_eq!(verdict("two:allow=mine,three:error"), Verdict::Error, "{order}");
        // Last: an engine that has to be started anew is late for what comes next.
        assert_eq!(verdict("two:hang"), Verdict::TimedOut, "{order}");
        assert_eq!(verdict("two:crash"), Verdict::Error, "{order}");
    }
}

#[test]
fn the_report_says_what_each_engine_found_and_who_was_spared() {
    let in_order = service(ORDERS[0]);
    let report = scan(&in_order, "two:found=A,three:found=B");
    assert_eq!((found(&report), asked(&report)), (vec!["A"], vec!["one", "two"]));
    assert_eq!(report.engines[1].detections[0].name, "A");
    let report = scan(&in_order, "one:allow=list:1,two:found=C");
    assert_eq!(asked(&report), ["one"]);
    let report = scan(&in_order, "two:error,three:found=E");
    assert!(report.engines[1].reason.as_ref().unwrap().contains("asked to"), "{report:?}");
    let file = in_order.path("content");
    std::fs::write(&file, "SEAWALL-FAULT one:allow=list:1,two:found=F\n").unwrap();
    let output = seawall(&in_order, &["scan", file.to_str().unwrap()]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("one: clean in ") && text.contains("known to be good by list:1"),
        "{text}"
    );

    let all = service(ORDERS[3]);
    let report = scan(&all, "one:found=A,two:sleep=200,three:found=B");
    assert_eq!((found(&report), asked(&report)), (vec!["A", "B"], vec!["one", "two", "three"]));
    let slow = &report.engines[1];
    assert!(slow.queued_us + slow.scanned_us >= 200_000, "{report:?}");
}

#[test]
fn a_detection_cancels_what_the_others_still_do() {
    let service = service(ORDERS[1]);
    let report = scan(&service, "one:nothing,two:until-cancelled,three:found=A");
    assert_eq!((report.verdict, found(&report)), (Verdict::Infected, vec!["A"]));
    let idle = || service.status().engines.iter().all(|engine| engine.in_flight == 0);
    wait_for("the others to give up", || idle().then_some(()));
    assert!(
        service.status().engines.iter().all(|engine| engine.restarts == 0),
        "nobody was killed"
    );
    service.wait_no_copies();
}

#[test]
fn content_that_killed_an_engine_twice_is_not_fed_to_it_again() {
    let service = service(ORDERS[0]);
    let restarts = || service.status().engines[1].restarts;
    let report = scan(&service, "two:crash,three:found=A");
    assert_eq!((report.verdict, restarts()), (Verdict::Infected, 2));
    let error = scan(&service, "two:crash");
    assert_eq!((error.verdict, restarts()), (Verdict::Error, 4));
    for _ in 0..3 {
        let again = scan(&service, "two:crash");
        assert_eq!(again.verdict, Verdict::Error);
        let reason = again.engines[1].reason.as_deref().unwrap();
        assert!(reason.contains("killed the engine twice"), "{reason}");
    }
    assert_eq!(restarts(), 4, "spared");
    assert_eq!(scan(&service, "two:found=B").verdict, Verdict::Infected, "other content is not");
}

#[test]
fn a_scan_that_its_asker_left_is_given_up_and_the_next_one_begins_anew() {
    let service = service("engines = \"in-order\"");
    let content = "SEAWALL-FAULT two:until-cancelled\n";
    let left = block_on(async {
        let body = http_body_util::Full::new(bytes::Bytes::from_static(content.as_bytes()));
        tokio::time::timeout(Duration::from_millis(500), service.client().scan("x", body)).await
    });
    assert!(left.is_err(), "it goes on until somebody hangs up");
    let idle = || service.status().engines.iter().all(|engine| engine.in_flight == 0);
    wait_for("the scan to be given up", || idle().then_some(()));
    assert_eq!(service.status().engines[1].restarts, 0, "before its limit, at which it is killed");
    service.wait_no_copies();
    // Somebody who stays has it to its end.
    assert_eq!(service.scan("x", content.as_bytes()).verdict, Verdict::TimedOut);
}

#[test]
fn a_trust_that_is_taken_back_takes_its_verdicts_along() {
    let mut service = service(ORDERS[0]);
    let orders = "one:allow=list:1,two:found=A";
    assert_eq!(scan(&service, orders).verdict, Verdict::Clean);
    assert!(scan(&service, orders).cached);
    service.restart("TERM");
    wait_for("the verdict to be known again", || scan(&service, orders).cached.then_some(()));
    service.setup.engine = Engine::ThreeWithoutTrust;
    service.restart("TERM");
    let report = scan(&service, orders);
    assert_eq!((report.verdict, report.cached), (Verdict::Infected, false));
}

/// A rule that asks for the name is answered for each name; one that does not, once for all.
#[test]
fn verdicts_are_kept_by_name_only_where_rules_ask_for_it() {
    let service = Service::start(Setup { engine: Engine::Yara, ..Setup::default() });
    let ends = |name: &str| service.scan(name, b"some content");
    assert!(!ends("/srv/a.exe").cached && ends("/srv/b.txt").cached);
    let rule = "rule Program { condition: extension == \".exe\" and guest != \"g2\" }\n";
    std::fs::write(service.path("rules/name.yar"), rule).unwrap();
    let output = seawall(&service, &["reload"]);
    assert!(output.status.success(), "{output:?}");
    let told = |report: ScanReport| (report.verdict, report.cached);
    assert_eq!(told(ends("/srv/a.exe")), (Verdict::Infected, false));
    assert_eq!(told(ends("/srv/b.txt")), (Verdict::Clean, false));
    assert_eq!(told(ends("/srv/a.exe")), (Verdict::Infected, true));
    assert_eq!(told(ends("/srv/b.txt")), (Verdict::Clean, true));
    // The guest is part of it, and the driver's path is what counts.
    let mut first = service.driver("g1");
    let mut second = service.driver("g2");
    assert_eq!(first.scan_as("/x.exe", b"some content").kind, VerdictKind::Infected);
    assert_eq!(first.scan_as("/x", b"some content").kind, VerdictKind::Clean);
    assert_eq!(second.scan_as("/x.exe", b"some content").kind, VerdictKind::Clean);
    std::fs::remove_file(service.path("rules/name.yar")).unwrap();
    assert!(seawall(&service, &["reload"]).status.success());
    assert_eq!(ends("/srv/a.exe").verdict, Verdict::Clean);
    assert!(ends("/srv/b.txt").cached, "once for all again");
}

/// The service takes its engines along, however it ends, and an engine what it has started.
#[test]
fn no_clamd_outlives_the_service() {
    let folder = tempfile::tempdir().unwrap();
    let (database, temporary) = (folder.path().join("database"), folder.path().join("temporary"));
    for folder in [&database, &temporary] {
        std::fs::create_dir(folder).unwrap();
    }
    std::fs::write(database.join("x.ndb"), "Test.Sig-1:0:*:deadbeefdeadbeef\n").unwrap();
    let program = common::program("seawall-engine-clamav");
    let words =
        [&program, Path::new("--database"), &database, Path::new("--temporary"), &temporary];
    let command: Vec<_> = words.iter().map(|word| word.display().to_string()).collect();
    let more = format!("[[engine]]\nname = \"clamav\"\ncommand = {command:?}\n");
    let mut service = Service::start(Setup { more, ..Setup::default() });
    // Its configuration names a folder that nobody else's does.
    let clamd = || {
        let output =
            Command::new("pgrep").args(["-f", temporary.to_str().unwrap()]).output().unwrap();
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect::<Vec<_>>()
    };
    for signal in ["TERM", "KILL"] {
        wait_for("engine and clamd", || (clamd().len() >= 2).then_some(()));
        service.restart_after(signal, |_| {
            let gone = || clamd().is_empty().then_some(());
            wait_for("their end", gone);
        });
    }
}
