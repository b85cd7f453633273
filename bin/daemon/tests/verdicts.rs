//! A driver asks, the service answers: what is found, what is remembered, what is told.

mod common;

use common::{Engine, PATIENCE, Service, Setup, eicar, wait_for};
use seawall_client::{EventKind, Verdict};
use seawall_proto::{
    Content, ContentHash, Decision, Notice, Operation, Outcome, Part, Process, RequestId, SlotRef,
    ToGuest, ToHost, VerdictKind,
};
use std::collections::HashMap;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

fn yara() -> Service {
    Service::start(Setup { engine: Engine::Yara, ..Setup::default() })
}

#[test]
fn an_infected_file_is_denied_and_a_clean_one_is_not() {
    let service = yara();
    let mut driver = service.driver("g1");
    assert_eq!(driver.attached.guest, "g1");
    assert_eq!(driver.attached.heartbeat_ms, 1000);

    let clean = driver.scan(b"nothing to see");
    assert_eq!((clean.kind, clean.decision), (VerdictKind::Clean, Some(Decision::Allow)));
    assert_eq!(clean.hash.unwrap().0, *blake3::hash(b"nothing to see").as_bytes());
    assert_eq!(clean.generation, driver.attached.generation);

    let infected = driver.scan(&eicar());
    assert_eq!((infected.kind, infected.decision), (VerdictKind::Infected, Some(Decision::Deny)));
    assert_eq!(infected.detail.as_deref(), Some("Eicar"));

    driver.say(ToHost::Notice(Notice::Outcome(Outcome {
        id: infected.id,
        decision: Some(Decision::Deny),
        process: Process { name: serde_bytes::ByteBuf::from(b"cat\n".to_vec()), uid: Some(1000) },
    })));
    let event = service.wait_event(EventKind::Verdict, "g1");
    assert_eq!(event.verdict, Some(Verdict::Infected));
    assert_eq!(event.decision.as_deref(), Some("deny"));
    assert_eq!(event.detection.as_deref(), Some("Eicar"));
    assert_eq!(event.engine.as_deref(), Some("first"));
    assert_eq!(event.path.as_deref(), Some(r"/data/\x1b[2Jfile\xff"));
    assert_eq!(event.path_hex.as_deref(), Some("2f646174612f1b5b324a66696c65ff"));
    assert_eq!((event.process.as_deref(), event.uid), (Some(r"cat\n"), Some(1000)));
    assert_eq!((event.pid, event.operation.as_deref()), (Some(77), Some("open")));
    assert_eq!(event.hash, infected.hash.map(|hash| hash.to_string()));
}

fn hash_of(content: &[u8]) -> Option<ContentHash> {
    Some(ContentHash(*blake3::hash(content).as_bytes()))
}

#[test]
fn one_content_is_scanned_once_however_many_ask() {
    let service = Service::start(Setup::default());
    let (mut one, mut two) = (service.driver("g1"), service.driver("g2"));
    let content = b"SEAWALL-FAULT sleep=700";
    let (_slots_one, refs) = one.fill(content);
    let (_slots_two, refs_two) = two.fill(content);
    let mut ids = Vec::new();
    for _ in 0..2 {
        let request = one.request(refs.clone(), true);
        ids.push(request.id);
        one.say(ToHost::ScanRequest(request));
    }
    let request = two.request(refs_two, true);
    let id_two = request.id;
    two.say(ToHost::ScanRequest(request));
    for id in ids {
        assert_eq!(one.verdict(id).kind, VerdictKind::Clean);
    }
    assert_eq!(two.verdict(id_two).kind, VerdictKind::Clean);
    let counters = service.status().counters;
    assert_eq!((counters.scans, counters.joined, counters.cache_hits), (1, 2, 0));

    // Known now: the verdict comes alone, and gives the slots back by itself.
    let copied = (one.copied.len(), two.copied.len());
    assert_eq!(copied, (2, 1), "a scan that takes time gives the slots back first");
    assert_eq!(one.scan(content).kind, VerdictKind::Clean);
    assert_eq!(two.scan(content).kind, VerdictKind::Clean);
    assert_eq!((one.copied.len(), two.copied.len()), copied);
    let counters = service.status().counters;
    assert_eq!((counters.scans, counters.cache_hits), (1, 2));
}

/// What a driver names by its hash is answered where it is known to be clean. All else is to be sent, and nothing is
/// known by a name alone.
#[test]
fn a_known_content_is_answered_by_its_hash() {
    let service = yara();
    let (mut first, mut second) = (service.driver("g1"), service.driver("g2"));
    let [clean, infected] = clean_and_infected(7);
    let hash = |content: &[u8]| *blake3::hash(content).as_bytes();
    for _ in 0..2 {
        assert!(first.name(Operation::OnDemand, hash(&clean)).is_none(), "nobody knows it");
    }
    assert_eq!(first.scan(&clean).kind, VerdictKind::Clean);
    let copied = service.status().counters.bytes_copied;
    for (driver, operation) in [(&mut first, Operation::OnDemand), (&mut second, Operation::Open)] {
        let verdict = driver.name(operation, hash(&clean)).expect("it is known");
        assert_eq!((verdict.kind, verdict.decision), (VerdictKind::Clean, Some(Decision::Allow)));
        assert_eq!(verdict.hash, hash_of(&clean));
        assert_eq!(verdict.generation, driver.attached.generation);
    }
    assert_eq!(service.status().counters.bytes_copied, copied);
    // It may have to go to quarantine.
    assert_eq!(first.scan(&infected).kind, VerdictKind::Infected);
    assert!(second.name(Operation::OnDemand, hash(&infected)).is_none());
    // A hash is all that a request brings.
    let mut request = first.request(Vec::new(), false);
    (request.part, request.last) = (Part::Hash(ContentHash(hash(&clean))), false);
    let id = request.id;
    first.say(ToHost::ScanRequest(request));
    assert_eq!(first.verdict(id).kind, VerdictKind::Error);
    let (slots, refs) = first.fill(&clean);
    let request = first.request(refs, false);
    let id = request.id;
    first.say(ToHost::ScanRequest(request));
    let part = Part::Hash(ContentHash(hash(&clean)));
    first.say(ToHost::Content(Content { id, part, last: true }));
    assert_eq!(first.verdict(id).kind, VerdictKind::Error);
    drop(slots);
    assert_eq!(first.scan(&clean).kind, VerdictKind::Clean);
    // More than may be under way at once: each is over when it is answered.
    for n in 0..1500_u32 {
        assert!(first.name(Operation::OnDemand, hash(&n.to_le_bytes())).is_none());
    }
}

/// Guests that are scanned at the same time come to the same contents at the same time.
#[test]
fn a_content_that_is_being_scanned_is_waited_for_by_its_hash() {
    let service = Service::start(Setup::default());
    for (content, is_clean) in [("SEAWALL-FAULT sleep=1500", true), ("SEAWALL-FAULT keep", false)] {
        let (mut first, mut second) = (service.driver("g1"), service.driver("g2"));
        let (slots, refs) = first.fill(content.as_bytes());
        let request = first.request(refs, true);
        let id = request.id;
        let before = service.status().counters.scans;
        first.say(ToHost::ScanRequest(request));
        wait_for("the scan", || (service.status().counters.scans > before).then_some(()));
        let hash = *blake3::hash(content.as_bytes()).as_bytes();
        let named = second.name(Operation::OnDemand, hash);
        assert_eq!(named.map(|verdict| verdict.kind), is_clean.then_some(VerdictKind::Clean));
        assert_eq!(first.verdict(id).kind == VerdictKind::Clean, is_clean);
        assert_eq!(service.status().counters.scans, before + 1);
        drop(slots);
    }
}

#[test]
fn long_content_is_streamed_through_few_slots() {
    let service = yara();
    let mut driver = service.driver("g1");
    let mut content: Vec<u8> = (0..3_000_000_u32).map(|n| (n / 5) as u8).collect();
    content.splice(2_000_000..2_000_000, eicar());
    let id = RequestId(driver.next_id);
    let pieces: Vec<_> = content.chunks(3 * 65_536).collect();
    let mut sent = 0;
    for (n, piece) in pieces.iter().enumerate() {
        let last = n + 1 == pieces.len();
        let (slots, refs) = driver.fill(piece);
        sent += refs.len() as u32;
        if n == 0 {
            let request = driver.request(refs, last);
            driver.say(ToHost::ScanRequest(request));
        } else {
            driver.say(ToHost::Content(Content { id, part: Part::Slots(refs), last }));
        }
        // Waits for the slots before it uses them again.
        let until = Instant::now() + PATIENCE;
        while driver.copied.last() != Some(&(id, sent)) {
            assert!(Instant::now() < until);
            match driver.connection.hear() {
                Some(ToGuest::Copied { id, slots }) => driver.copied.push((id, slots)),
                other => panic!("{other:?}"),
            }
        }
        drop(slots);
    }
    let verdict = driver.verdict(id);
    assert_eq!((verdict.kind, verdict.hash), (VerdictKind::Infected, hash_of(&content)));
    service.wait_no_copies();
}

/// Two contents of one length that were never seen before, by round.
fn clean_and_infected(round: u64) -> [Vec<u8>; 2] {
    let infected = eicar();
    let clean = vec![b'c'; infected.len()];
    [clean, infected].map(|content| [&content[..], &round.to_le_bytes()[..]].concat())
}

#[test]
fn slots_that_change_change_no_verdict() {
    let service = yara();
    let mut driver = service.driver("g1");
    let slot = driver.region.take_slot().expect("a free slot");
    let len = clean_and_infected(0)[0].len() as u32;
    let named = SlotRef { index: slot.index(), len };
    // A hostile guest writes to the slot all the time, as it may.
    let offset = seawall_region::layout::HEADER_LEN + u64::from(named.index) * 65_536;
    let file = std::fs::File::options().write(true).open(service.path("g1.region")).unwrap();
    let round = Arc::new(AtomicU64::new(1));
    let round_of_changer = Arc::clone(&round);
    let changer = std::thread::spawn(move || {
        loop {
            let now = round_of_changer.load(Ordering::Relaxed);
            if now == 0 {
                return;
            }
            for content in &clean_and_infected(now) {
                std::os::unix::fs::FileExt::write_all_at(&file, content, offset).unwrap();
            }
        }
    });
    let mut seen: HashMap<_, usize> = HashMap::new();
    let until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < until {
        let [clean, infected] = clean_and_infected(round.load(Ordering::Relaxed));
        let request = driver.request(vec![named], true);
        let id = request.id;
        driver.say(ToHost::ScanRequest(request));
        let verdict = driver.verdict(id);
        let expected = match verdict.hash {
            hash if hash == hash_of(&clean) => VerdictKind::Clean,
            hash if hash == hash_of(&infected) => VerdictKind::Infected,
            _ => continue,
        };
        assert_eq!(verdict.kind, expected, "the verdict is about what was hashed");
        *seen.entry(expected).or_default() += 1;
        round.fetch_add(1, Ordering::Relaxed);
    }
    round.store(0, Ordering::Relaxed);
    changer.join().unwrap();
    assert!(seen.len() == 2 && seen.values().all(|count| *count > 10), "{seen:?}");
    println!("{seen:?}");
}

#[test]
fn slots_that_change_during_the_scan_change_nothing() {
    let service = Service::start(Setup::default());
    let mut driver = service.driver("g1");
    let content = b"SEAWALL-FAULT sleep=500";
    let (slots, refs) = driver.fill(content);
    let request = driver.request(refs, true);
    let id = request.id;
    driver.say(ToHost::ScanRequest(request));
    let Some(ToGuest::Copied { .. }) = driver.connection.hear() else { panic!("not copied") };
    drop(slots);
    let _other = driver.fill(b"SEAWALL-FAULT crash and more");
    let verdict = driver.verdict(id);
    assert_eq!((verdict.kind, verdict.hash), (VerdictKind::Clean, hash_of(content)));
}

#[test]
fn new_signatures_are_a_new_generation_and_old_verdicts_count_no_more() {
    let service = yara();
    let mut driver = service.driver("g1");
    let before = driver.scan(b"harmless until today");
    assert_eq!(before.kind, VerdictKind::Clean);
    std::fs::write(
        service.path("rules/new.yar"),
        "rule Today { strings: $a = \"harmless until today\" condition: $a }\n",
    )
    .unwrap();
    let reload = common::block_on(service.client().reload()).unwrap();
    assert!(reload.taken, "{reload:?}");
    let after = driver.scan(b"harmless until today");
    assert_eq!((after.kind, after.detail.as_deref()), (VerdictKind::Infected, Some("Today")));
    assert!(after.generation > before.generation);
    let told = driver
        .said
        .iter()
        .any(|said| matches!(said, ToGuest::Generation(new) if *new == after.generation));
    assert!(told, "the driver was told before: {:?}", driver.said);

    std::fs::write(service.path("rules/new.yar"), "rule Broken { condition: nonsense }\n").unwrap();
    let reload = common::block_on(service.client().reload()).unwrap();
    assert!(!reload.taken);
    let found = &reload.engines[0].diagnostics[0];
    assert!(found.file.ends_with("new.yar") && found.line == 1, "{found:?}");
    assert_eq!(driver.scan(b"harmless until today").generation, after.generation);
    let status = service.status();
    assert!(!status.healthy && status.engines[0].refused == vec![found.clone()], "{status:?}");
    service.wait_log("new signatures are refused, the last good set stays");
}

#[test]
fn an_engine_that_fails_is_an_error_and_never_remembered() {
    let service = Service::start(Setup::default());
    let mut driver = service.driver("g1");
    for round in 1..=2 {
        let verdict = driver.scan(b"SEAWALL-FAULT error");
        assert_eq!((verdict.kind, verdict.decision), (VerdictKind::Error, None));
        assert!(verdict.detail.is_some_and(|why| why.starts_with("engine first: ")));
        assert_eq!(service.status().counters.scans, round);
    }
    let verdict = driver.scan(b"SEAWALL-FAULT crash");
    assert_eq!((verdict.kind, verdict.decision), (VerdictKind::Error, None));
    let verdict = driver.scan(b"SEAWALL-FAULT hang");
    assert_eq!((verdict.kind, verdict.decision), (VerdictKind::TimedOut, None));
    assert_eq!(driver.scan(b"all is well again").kind, VerdictKind::Clean);
    assert_eq!(service.status().cached_verdicts, 1);
    assert_eq!(service.status().engines[0].failures, 4);
    // The driver said nothing of what it did, so the events come without it.
    let event = service.wait_event(EventKind::Verdict, "g1");
    assert_eq!((event.verdict, event.decision), (Some(Verdict::Error), None));
}

#[test]
fn what_is_found_after_the_session_has_ended_is_in_the_events() {
    let service = Service::start(Setup::default());
    let mut driver = service.driver("g1");
    let (_slots, refs) = driver.fill(b"SEAWALL-FAULT hang");
    let request = driver.request(refs, true);
    driver.say(ToHost::ScanRequest(request));
    wait_for("the scan", || (service.status().counters.scans == 1).then_some(()));
    drop(driver);
    service.wait_event(EventKind::SessionEnded, "g1");
    let event = service.wait_event(EventKind::Verdict, "g1");
    assert_eq!((event.verdict, event.decision), (Some(Verdict::TimedOut), None));
}

#[test]
fn an_engine_killed_in_mid_scan_is_replaced_and_the_scan_done() {
    let service = Service::start(Setup::default());
    let mut driver = service.driver("g1");
    let (_slots, refs) = driver.fill(b"SEAWALL-FAULT sleep=1000");
    let request = driver.request(refs, true);
    let id = request.id;
    driver.say(ToHost::ScanRequest(request));
    let pid = wait_for("the scan to begin", || {
        let engine = service.status().engines.remove(0);
        (engine.in_flight > 0).then_some(engine.pid).flatten()
    });
    let killed = Command::new("kill").arg("-9").arg(pid.to_string()).status().unwrap();
    assert!(killed.success());
    assert_eq!(driver.verdict(id).kind, VerdictKind::Clean);
    let status = service.status();
    assert_ne!(status.engines[0].pid, Some(pid));
    assert_eq!(status.engines[0].restarts, 1);
    assert_eq!(status.generation, driver.attached.generation.0, "the same signatures");
}

#[test]
fn whoever_waits_goes_before_those_who_do_not() {
    let service = Service::start(Setup::default());
    let mut driver = service.driver("g1");
    let mut held = Vec::new();
    let mut ask = |driver: &mut common::Driver, content: &str, operation| {
        let (slots, refs) = driver.fill(content.as_bytes());
        held.push(slots);
        let request = seawall_proto::ScanRequest { operation, ..driver.request(refs, true) };
        let id = request.id;
        driver.say(ToHost::ScanRequest(request));
        id
    };
    // Two engine threads, so these keep it busy for two seconds and more.
    let mut behind = Vec::new();
    for n in 0..12 {
        let content = format!("SEAWALL-FAULT sleep=400 {n}");
        behind.push(ask(&mut driver, &content, Operation::Background));
    }
    let content = "SEAWALL-FAULT sleep=1 held";
    let first = ask(&mut driver, content, Operation::Open);
    // Asked for in the background first, then by one who waits.
    let hurried = ask(&mut driver, "SEAWALL-FAULT sleep=400 11", Operation::Exec);
    let mut order = Vec::new();
    while order.len() < 14 {
        match driver.connection.hear().expect("the session stands") {
            ToGuest::Verdict(verdict) => order.push(verdict.id),
            ToGuest::Copied { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    let place = |id| order.iter().position(|other| *other == id).unwrap();
    // What the engine already has cannot be overtaken: its threads, and as many in its socket.
    assert!(place(first) <= 6, "{order:?}");
    assert!(place(hurried) <= 8, "{order:?}");
    assert!(place(behind[10]) > place(first) && place(behind[10]) > place(hurried), "{order:?}");
}

#[test]
fn the_operator_scans_what_a_guest_then_need_not_have_scanned() {
    let service = yara();
    let report = service.scan("x\ny", &eicar());
    assert_eq!((report.verdict, report.cached), (Verdict::Infected, false));
    assert_eq!((report.name.as_str(), report.size), (r"x\ny", 68));
    assert_eq!(report.detections[0].name, "Eicar");
    assert_eq!(report.engines[0].engine, "first");
    assert!(service.scan("again", &eicar()).cached);
    assert_eq!(service.driver("g1").scan(&eicar()).kind, VerdictKind::Infected);
    assert_eq!(service.status().counters.scans, 1);
}

#[test]
fn content_above_the_limits_ends_as_an_error_and_the_next_is_fine() {
    let more = "[policy]\nwhole_file_limit_mib = 1\n[limits]\nprivate_copies_mib = 4\n";
    let service = Service::start(Setup { more: more.into(), ..Setup::default() });
    let mut driver = service.driver("g1");
    let (slots, refs) = driver.fill(&[1; 600_000]);
    let request = driver.request(refs.clone(), false);
    let id = request.id;
    driver.say(ToHost::ScanRequest(request));
    driver.say(ToHost::Content(Content { id, part: Part::Slots(refs.clone()), last: false }));
    // On its way when the verdict goes.
    driver.say(ToHost::Content(Content { id, part: Part::Slots(refs), last: true }));
    let verdict = driver.verdict(id);
    assert_eq!((verdict.kind, verdict.decision, verdict.hash), (VerdictKind::Error, None, None));
    assert!(verdict.detail.is_some_and(|why| why.contains("longer than the 1048576 bytes")));
    drop(slots);
    assert_eq!(driver.scan(&[1; 600_000]).kind, VerdictKind::Clean);

    // In the background a file may be longer, and goes to disk above the guest's quarter of 4 MiB.
    let (_slots, refs) = driver.fill(&[2; 900_000]);
    let mut request = driver.request(refs.clone(), false);
    request.operation = Operation::Background;
    request.file.size = 1_800_000;
    let id = request.id;
    driver.say(ToHost::ScanRequest(request));
    driver.say(ToHost::Content(Content { id, part: Part::Slots(refs), last: true }));
    let verdict = driver.verdict(id);
    assert_eq!((verdict.kind, verdict.hash), (VerdictKind::Clean, hash_of(&[2; 1_800_000])));
}

#[test]
fn a_cancelled_request_gets_its_one_verdict() {
    let service = Service::start(Setup::default());
    let mut driver = service.driver("g1");
    let (_slots, refs) = driver.fill(b"half");
    let request = driver.request(refs.clone(), false);
    let id = request.id;
    driver.say(ToHost::ScanRequest(request));
    driver.say(ToHost::Cancel(id));
    driver.say(ToHost::Content(Content { id, part: Part::Slots(refs), last: true }));
    assert_eq!(driver.verdict(id).kind, VerdictKind::Error);
    driver.say(ToHost::Cancel(id));
    assert_eq!(driver.scan(b"next").kind, VerdictKind::Clean);
    assert_eq!(service.guest("g1").session.expect("it stands").outstanding, 0);
}
