//! Scans of guests on demand, as the service keeps them: whose turn it is, what is counted, where they go on.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Driver, Engine, Service, Setup, block_on, seawall, wait_for};
use seawall_client::{ClientError, EventKind, GuestScan, GuestScanState, ScanTarget, ScansRequest};
use seawall_proto::walk::{PLACE_MAX, Walk, WalkMissed, WalkOrder, WalkProgress};
use seawall_proto::{Operation, ToGuest, ToHost, VerdictKind};
use std::fs;

fn setup(more: &str) -> Setup {
    let calm = "[on_demand]\npressure_percent = 0\n";
    Setup {
        engine: Engine::Three,
        guests: vec!["web", "db", "mail"],
        of_guests: vec![("db", "tags = [\"sql\"]")],
        more: format!("{calm}{more}"),
        ..Setup::default()
    }
}

fn of(guest: &str) -> ScansRequest {
    let targets = vec![ScanTarget { guest: guest.into(), paths: Vec::new() }];
    ScansRequest { targets, ..ScansRequest::default() }
}

fn begin(service: &Service, wanted: &ScansRequest) -> Vec<GuestScan> {
    block_on(service.client().scan_guests(wanted)).unwrap()
}

fn show(service: &Service, id: u64) -> GuestScan {
    block_on(service.client().guest_scan(id)).unwrap()
}

fn order(service: &Service, id: u64, order: &str) -> GuestScan {
    block_on(service.client().order_scan(id, order)).unwrap()
}

fn until(service: &Service, id: u64, state: GuestScanState) -> GuestScan {
    wait_for(&format!("{state:?}"), || Some(show(service, id)).filter(|scan| scan.state == state))
}

/// What the driver is told next of walks.
fn hear_walk(driver: &mut Driver) -> Walk {
    loop {
        match driver.connection.hear().expect("a walk") {
            ToGuest::Walk(walk) => return walk,
            _ => continue,
        }
    }
}

fn hear_order(driver: &mut Driver) -> (u64, WalkOrder) {
    loop {
        match driver.connection.hear().expect("an order") {
            ToGuest::WalkOrder(id, order) => return (id, order),
            _ => continue,
        }
    }
}

fn tell(driver: &mut Driver, progress: WalkProgress) {
    driver.say(ToHost::WalkProgress(progress));
}

fn at(id: u64, place: &[u8], files: u64) -> WalkProgress {
    let place = place.to_vec().into();
    WalkProgress { id, place, files, bytes: files * 10, expected: 100, ..WalkProgress::default() }
}

/// Has a content judged as one of a walk's.
fn judge(driver: &mut Driver, path: &str, content: &str) -> VerdictKind {
    let (slots, refs) = driver.fill(content.as_bytes());
    let mut request = driver.request(refs, true);
    request.operation = Operation::OnDemand;
    request.file.path = path.as_bytes().to_vec().into();
    driver.say(ToHost::ScanRequest(request));
    let kind = loop {
        match driver.connection.hear().expect("a verdict") {
            ToGuest::Verdict(verdict) => break verdict.kind,
            _ => continue,
        }
    };
    drop(slots);
    kind
}

/// As many as the engine has threads are under way, and take long.
#[test]
fn an_access_waits_for_no_scan_on_demand() {
    let guests = vec!["web", "db"];
    let service = Service::start(Setup { engine: Engine::Patient, guests, ..Setup::default() });
    let (mut web, mut db) = (service.driver("web"), service.driver("db"));
    let mut held = Vec::new();
    for number in 0..4 {
        let (slots, refs) = web.fill(format!("SEAWALL-FAULT sleep={}", 20_000 + number).as_bytes());
        let mut request = web.request(refs, true);
        request.operation = Operation::OnDemand;
        web.say(ToHost::ScanRequest(request));
        held.push(slots);
    }
    wait_for("the scans", || (service.status().counters.scans == 4).then_some(()));
    assert_eq!(db.scan(b"clean").kind, VerdictKind::Clean);
    assert_eq!(service.status().counters.verdicts.clean, 1, "the others take longer");
}

#[test]
fn a_scan_is_counted_and_ends_with_a_report() {
    let service = Service::start(setup(""));
    let mut web = service.driver("web");
    let wanted = ScansRequest {
        targets: vec![ScanTarget {
            guest: "web".into(),
            paths: vec!["/srv".into(), "/home".into()],
        }],
        quick: true,
        ..ScansRequest::default()
    };
    let id = begin(&service, &wanted)[0].id;
    let walk = hear_walk(&mut web);
    assert_eq!((walk.quick, walk.place), (true, None));
    let run = walk.id;
    assert_eq!(walk.roots, [b"/srv".to_vec(), b"/home".to_vec()]);
    assert_eq!((walk.file_limit, walk.bytes_per_second), (1 << 30, 0));
    let kind = judge(&mut web, "/srv/evil\x1b[2J", "SEAWALL-FAULT two:found=Evil/critical");
    assert_eq!(kind, VerdictKind::Infected);
    assert_eq!(judge(&mut web, "/srv/fine", "fine"), VerdictKind::Clean);
    assert_eq!(judge(&mut web, "/srv/odd", "SEAWALL-FAULT two:error=no"), VerdictKind::Error);
    web.say(ToHost::WalkMissed(WalkMissed {
        id: run,
        path: b"/srv/locked".to_vec().into(),
        reason: "unreadable".into(),
    }));
    let end = WalkProgress { known: 7, excluded: 2, missed: 1, done: true, ..at(run, b"", 12) };
    tell(&mut web, end);
    let scan = until(&service, id, GuestScanState::Done);
    assert_eq!((scan.files, scan.known, scan.excluded, scan.missed), (12, 7, 2, 1));
    assert_eq!((scan.infected, scan.errors, scan.bytes), (1, 1, 120));
    let found = &scan.found[0];
    assert_eq!((found.path.as_str(), found.detection.as_str()), (r"/srv/evil\x1b[2J", "Evil"));
    assert_eq!((found.severity.as_str(), found.action.as_str()), ("critical", "deny"));
    let mut left: Vec<_> = scan.left_out.iter().map(|one| one.path.as_str()).collect();
    left.sort_unstable();
    assert_eq!(left, ["/srv/locked", "/srv/odd"]);
    assert!(scan.started.is_some() && scan.ended.is_some());
    let ended = wait_for("the event", || {
        service.events().into_iter().find(|event| event.kind == EventKind::ScanEnded)
    });
    let reason = ended.reason.unwrap();
    assert_eq!(reason, format!("scan {id} is done: 12 files, 1 infected, 2 without a verdict"));
    let text =
        String::from_utf8(seawall(&service, &["scans", "show", &id.to_string()]).stdout).unwrap();
    for line in [
        "/srv, /home (quick): done",
        "1 infected, 1 left out, 1 without a verdict",
        "left out: /srv/locked: unreadable",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
    let list = String::from_utf8(seawall(&service, &["scans"]).stdout).unwrap();
    assert!(list.contains("done") && list.contains("100 %"), "{list}");
}

/// The driver's last word counts, and what came after it is done again.
#[test]
fn it_goes_on_where_it_was_after_any_restart_and_counts_nothing_twice() {
    let mut service = Service::start(setup(""));
    let mut web = service.driver("web");
    let id = begin(&service, &of("web"))[0].id;
    let run = hear_walk(&mut web).id;
    judge(&mut web, "/evil", "SEAWALL-FAULT two:found=Evil");
    tell(&mut web, at(run, b"here", 10));
    wait_for("its word", || (show(&service, id).files == 10).then_some(()));
    // Not told of any more: the driver goes away.
    assert_eq!(judge(&mut web, "/odd", "SEAWALL-FAULT two:error=no"), VerdictKind::Error);
    drop(web);
    let scan = until(&service, id, GuestScanState::Waiting);
    assert_eq!((scan.files, scan.infected, scan.errors), (10, 1, 0));
    let mut web = service.driver("web");
    let walk = hear_walk(&mut web);
    assert_eq!(walk.place, Some(b"here".to_vec().into()));
    judge(&mut web, "/odd", "SEAWALL-FAULT two:error=no");
    judge(&mut web, "/evil", "SEAWALL-FAULT two:found=Evil");
    tell(&mut web, at(walk.id, b"there", 5));
    // What an earlier walk still had to say is not counted.
    tell(&mut web, at(run + 1000, b"nowhere", 99));
    wait_for("its word", || (show(&service, id).files == 15).then_some(()));
    // The service is killed.
    std::thread::sleep(std::time::Duration::from_millis(1200));
    service.restart("KILL");
    let scan = show(&service, id);
    assert_eq!((scan.files, scan.infected, scan.errors), (15, 1, 1));
    let mut web = service.driver("web");
    let walk = hear_walk(&mut web);
    assert_eq!(walk.place, Some(b"there".to_vec().into()));
    tell(&mut web, WalkProgress { done: true, ..at(walk.id, b"", 5) });
    let scan = until(&service, id, GuestScanState::Done);
    assert_eq!((scan.files, scan.infected, scan.found.len()), (20, 1, 1));
    service.restart("TERM");
    assert_eq!(show(&service, id), scan);
}

#[test]
fn so_many_guests_at_once_and_one_scan_of_each() {
    let service = Service::start(setup("guests_at_once = 2\nmib_per_second = 8\n"));
    fs::create_dir_all(service.path("policy.d")).unwrap();
    fs::write(service.path("policy.d/a.toml"), "[[group]]\nname = \"sql\"\ntags = [\"sql\"]\n")
        .unwrap();
    assert!(block_on(service.client().reload()).unwrap().taken);
    let [mut web, mut db, mut mail] = ["web", "db", "mail"].map(|guest| service.driver(guest));
    let all = begin(&service, &ScansRequest { all: true, ..ScansRequest::default() });
    assert_eq!(
        all.iter().map(|scan| scan.guest.as_str()).collect::<Vec<_>>(),
        ["db", "mail", "web"]
    );
    let again =
        begin(&service, &ScansRequest { groups: vec!["sql".into()], ..ScansRequest::default() });
    assert_eq!(again.iter().map(|scan| scan.guest.as_str()).collect::<Vec<_>>(), ["db"]);
    let walk = hear_walk(&mut db);
    assert_eq!(walk.bytes_per_second, 4 << 20, "its share");
    let of_mail = hear_walk(&mut mail).id;
    let waits = wait_for("why it waits", || {
        Some(show(&service, all[2].id)).filter(|scan| !scan.reason.is_empty())
    });
    assert_eq!(waits.state, GuestScanState::Queued);
    assert_eq!(waits.reason, "as many guests are being scanned as may be at once");
    wait_for("why the second one waits", || {
        let second = show(&service, again[0].id);
        (second.reason == "another scan of this guest is under way").then_some(())
    });
    // A pause makes room.
    assert_eq!(order(&service, all[1].id, "pause").state, GuestScanState::Paused);
    assert_eq!(hear_order(&mut mail), (of_mail, WalkOrder::End));
    let of_web = hear_walk(&mut web).id;
    tell(&mut db, WalkProgress { done: true, ..at(walk.id, b"", 1) });
    assert_ne!(hear_walk(&mut db).id, walk.id);
    until(&service, again[0].id, GuestScanState::Running);
    tell(&mut web, WalkProgress { done: true, ..at(of_web, b"", 1) });
    order(&service, all[1].id, "resume");
    let resumed = hear_walk(&mut mail).id;
    assert_ne!(resumed, of_mail);
    order(&service, all[1].id, "cancel");
    assert_eq!(hear_order(&mut mail), (resumed, WalkOrder::End));
    let refused = block_on(service.client().order_scan(all[1].id, "pause")).unwrap_err();
    assert!(matches!(refused, ClientError::Refused(fault) if fault.code == "wrong-state"));
}

#[test]
fn a_guest_that_lies_about_its_scan_hurts_nobody() {
    let service = Service::start(setup(""));
    let [mut web, mut db] = ["web", "db"].map(|guest| service.driver(guest));
    let (of_web, of_db) = (begin(&service, &of("web"))[0].id, begin(&service, &of("db"))[0].id);
    let (run, other) = (hear_walk(&mut web).id, hear_walk(&mut db).id);
    // About another's, about none, with a place that is too long, and numbers that are too large.
    tell(&mut web, WalkProgress { done: true, ..at(other, b"x", 9) });
    tell(&mut web, WalkProgress { done: true, ..at(77, b"x", 9) });
    tell(
        &mut web,
        WalkProgress { files: u64::MAX, missed: u64::MAX, ..at(run, &vec![1; PLACE_MAX + 1], 0) },
    );
    for n in 0..5000 {
        let path = format!("/lie/{n}{}", "x".repeat(9000)).into_bytes().into();
        web.say(ToHost::WalkMissed(WalkMissed { id: run, path, reason: "\x1b[2Jno".into() }));
    }
    tell(&mut web, at(run, b"", u64::MAX));
    let scan = wait_for("its lies", || {
        Some(show(&service, of_web)).filter(|scan| scan.left_out.len() >= 200)
    });
    assert_eq!((scan.state, scan.left_out.len()), (GuestScanState::Running, 200));
    assert_eq!(scan.files, u64::MAX);
    assert!(!scan.left_out[0].reason.contains('\x1b') && scan.left_out[0].path.len() == 1024);
    assert_eq!(show(&service, of_db).state, GuestScanState::Running);
    assert_eq!(judge(&mut db, "/x", "fine"), VerdictKind::Clean);
    let shown = seawall(&service, &["scans", "show", &of_web.to_string()]);
    assert!(shown.status.success());
    drop(web);
    let mut web = service.driver("web");
    assert_eq!(hear_walk(&mut web).place, None, "what was too long was not kept");
    // No scan was asked for: what it sends for one is judged, and belongs to none.
    order(&service, of_web, "cancel");
    assert_eq!(judge(&mut web, "/x", "SEAWALL-FAULT two:found=Evil"), VerdictKind::Infected);
    assert_eq!(show(&service, of_web).infected, 0);
}

#[test]
fn what_cannot_be_scanned_is_refused() {
    let service = Service::start(setup(""));
    let refused =
        |wanted: &ScansRequest| match block_on(service.client().scan_guests(wanted)).unwrap_err() {
            ClientError::Refused(fault) => fault.code,
            other => panic!("{other}"),
        };
    assert_eq!(refused(&of("nobody")), "no-such-guest");
    assert_eq!(refused(&ScansRequest::default()), "no-target");
    let groups = vec!["nobody".into()];
    assert_eq!(refused(&ScansRequest { groups, ..ScansRequest::default() }), "no-such-group");
    let targets = vec![ScanTarget { guest: "web".into(), paths: vec!["srv".into()] }];
    assert_eq!(refused(&ScansRequest { targets, ..ScansRequest::default() }), "bad-path");
    let long = (0..20).map(|n| format!("/{n}{}", "x".repeat(2000))).collect();
    let targets = vec![ScanTarget { guest: "web".into(), paths: long }];
    assert_eq!(refused(&ScansRequest { targets, ..ScansRequest::default() }), "too-many");
    // Somebody wants all of it, and a part.
    let targets = vec![ScanTarget { guest: "web".into(), paths: vec!["/srv".into()] }];
    let all = begin(&service, &ScansRequest { targets, all: true, ..ScansRequest::default() });
    assert!(all.iter().all(|scan| scan.paths.is_empty()), "{all:?}");
    for scan in all {
        order(&service, scan.id, "cancel");
    }
    for (arguments, code, text) in [
        (["scan", "web:srv"].as_slice(), 4, "`srv` is no absolute path"),
        (&["scan", "web", "nobody"], 4, "no guest is named `nobody`"),
        (&["scan", "web", "web:/srv"], 4, "web is named as a whole and in parts"),
        (&["scan", "--quick", "/etc/hosts"], 4, "is no guest"),
        (&["scan"], 2, "required"),
        (&["scans", "show", "9"], 4, "no scan has the number 9"),
    ] {
        let output = seawall(&service, arguments);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{error}");
        assert!(error.contains(text), "{arguments:?}: {error}");
    }
    // A guest that is taken out of the configuration.
    let id = begin(&service, &of("mail"))[0].id;
    let mut service = service;
    service.setup.guests = vec!["web", "db"];
    service.configure();
    assert!(block_on(service.client().reload()).unwrap().taken);
    let scan = until(&service, id, GuestScanState::Failed);
    assert_eq!(scan.reason, "the guest is no longer configured");
}

/// A schedule's guests are scanned by scans of its own, within its window, and go on in the next one.
#[test]
fn a_schedule_has_its_guests_scanned_within_its_window() {
    let more = "[[schedule]]\nname = \"monthly\"\ncron = \"0 2 1 * *\"\nguests = [\"web\"]\ngroups = [\"sql\"]\nquick = true\n\
                window_minutes = 30\nspread_minutes = 10\n[[schedule]]\nname = \"yearly\"\ncron = \"0 2 1 1 * UTC\"\nall = true\n";
    let mut service = Service::start(setup(more));
    fs::create_dir_all(service.path("policy.d")).unwrap();
    fs::write(service.path("policy.d/a.toml"), "[[group]]\nname = \"sql\"\ntags = [\"sql\"]\n")
        .unwrap();
    assert!(block_on(service.client().reload()).unwrap().taken);
    let schedules = block_on(service.client().schedules()).unwrap();
    assert_eq!(schedules[0].guests, ["web", "db"]);
    assert_eq!(schedules[1].guests, ["web", "db", "mail"]);
    assert!(schedules[1].next.as_deref().unwrap().ends_with("-01-01T02:00:00Z"), "{schedules:?}");
    assert!(schedules.iter().all(|one| one.last.is_none() && !one.skip));
    let skipped = seawall(&service, &["schedule", "skip", "yearly"]);
    assert!(String::from_utf8(skipped.stdout).unwrap().contains("(one left out)"));

    let mut web = service.driver("web");
    let run = |service: &Service| block_on(service.client().run_schedule("monthly")).unwrap();
    let begun = run(&service);
    assert_eq!(begun.iter().map(|scan| scan.guest.as_str()).collect::<Vec<_>>(), ["web", "db"]);
    assert!(begun.iter().all(|scan| scan.quick && scan.schedule.as_deref() == Some("monthly")));
    let id = begun[0].id;
    let walk = hear_walk(&mut web);
    tell(&mut web, at(walk.id, b"half-way", 3));
    wait_for("its word", || (show(&service, id).files == 3).then_some(()));
    // Run again while it is under way: it goes on.
    assert_eq!(run(&service)[0].id, id);
    drop(web);
    until(&service, id, GuestScanState::Waiting);
    // As if half an hour had passed.
    service.restart_after("TERM", |service| {
        let path = service.path(&format!("state/scans/{id}.json"));
        let mut kept: serde_json::Value =
            serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let [opens, closes] = ["opens", "closes"].map(|end| kept["window"][end].as_i64().unwrap());
        assert_eq!(closes - opens, 1800);
        kept["window"]["closes"] = (closes - 3600).into();
        fs::write(&path, kept.to_string()).unwrap();
    });
    let mut web = service.driver("web");
    let waits = wait_for("why it waits", || {
        Some(show(&service, id)).filter(|scan| scan.reason.contains("window"))
    });
    assert_eq!(waits.state, GuestScanState::Waiting);
    let known = block_on(service.client().schedules()).unwrap();
    assert!(known[0].last.is_some() && known[1].skip, "{known:?}");
    assert_eq!(run(&service)[0].id, id, "no second one");
    let again = hear_walk(&mut web);
    assert_eq!(again.place, Some(b"half-way".to_vec().into()));
    tell(&mut web, WalkProgress { done: true, ..at(again.id, b"", 4) });
    assert_eq!(until(&service, id, GuestScanState::Done).files, 7);
    assert_ne!(run(&service)[0].id, id, "that one has ended");
    let refused = seawall(&service, &["schedule", "run", "nightly"]);
    assert_eq!(refused.status.code(), Some(4));
}

/// Two schedules that are due at the same time, with a guest that both name: each scans it, one after the other.
#[test]
fn two_schedules_at_once() {
    let more = "[[schedule]]\nname = \"one\"\ncron = \"0 2 * * *\"\nguests = [\"web\", \"db\"]\n\
                [[schedule]]\nname = \"two\"\ncron = \"0 2 * * *\"\nguests = [\"web\"]\nquick = true\n";
    let mut service = Service::start(setup(&format!("guests_at_once = 2\n{more}")));
    let all = |service: &Service| block_on(service.client().scans()).unwrap();
    let known = |service: &Service| block_on(service.client().schedules()).unwrap();
    wait_for("the schedules are known", || {
        service.path("state/scans/schedules").exists().then_some(())
    });
    assert_eq!(all(&service).len(), 0);
    // As if their time had come while the service was not there.
    service.restart_after("TERM", |service| {
        let path = service.path("state/scans/schedules");
        let mut kept: serde_json::Value =
            serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        for one in kept.as_object_mut().unwrap().values_mut() {
            one["handled"] = (one["handled"].as_i64().unwrap() - 2 * 24 * 3600).into();
        }
        fs::write(&path, kept.to_string()).unwrap();
    });
    let scans = wait_for("both begin", || Some(all(&service)).filter(|scans| scans.len() == 3));
    let of = |guest: &str, schedule: &str| {
        let is_it =
            |scan: &&GuestScan| scan.guest == guest && scan.schedule.as_deref() == Some(schedule);
        scans.iter().find(is_it).unwrap().id
    };
    let (first, second, other) = (of("web", "one"), of("web", "two"), of("db", "one"));
    assert!(known(&service).iter().all(|schedule| schedule.last.is_some()));
    let [mut web, mut db] = ["web", "db"].map(|guest| service.driver(guest));
    let walk = hear_walk(&mut web);
    assert!(!walk.quick, "the first one's turn");
    let of_db = hear_walk(&mut db);
    wait_for("why the second one waits", || {
        (show(&service, second).reason == "another scan of this guest is under way").then_some(())
    });
    // Run by hand while they are under way, neither begins again.
    for (name, id) in [("one", first), ("two", second)] {
        assert_eq!(block_on(service.client().run_schedule(name)).unwrap()[0].id, id);
    }
    assert_eq!(order(&service, first, "cancel").state, GuestScanState::Cancelled);
    let walk = hear_walk(&mut web);
    assert!(walk.quick, "the second one's turn");
    tell(&mut web, WalkProgress { done: true, ..at(walk.id, b"", 5) });
    tell(&mut db, WalkProgress { done: true, ..at(of_db.id, b"", 7) });
    assert_eq!(until(&service, second, GuestScanState::Done).files, 5);
    assert_eq!(until(&service, other, GuestScanState::Done).files, 7);
    assert_eq!(show(&service, first).state, GuestScanState::Cancelled);
    assert_eq!(all(&service).len(), 3);
}
