//! Guests share the engines: one that has very much to scan costs another little.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Driver, Engine, Service, Setup, wait_for};
use seawall_proto::{ContentHash, Operation, Part, RequestId, ScanRequest, ToHost, VerdictKind};

const FLOOD: u64 = 400;

/// What takes 20 ms to scan.
fn content(whose: &str, n: u64) -> Vec<u8> {
    format!("SEAWALL-FAULT sleep=20 {whose} {n}").into_bytes()
}

fn ask(driver: &mut Driver, operation: Operation, part: Part) -> RequestId {
    let request = ScanRequest { operation, part, ..driver.request(Vec::new(), true) };
    let id = request.id;
    driver.say(ToHost::ScanRequest(request));
    id
}

/// Asks for very many scans, all at once.
fn flood(driver: &mut Driver, operation: Operation, whose: &str) {
    for n in 0..FLOOD {
        ask(driver, operation, Part::Inline(content(whose, n).into()));
    }
}

/// Takes all verdicts of a flood, the last thing that its driver asked for.
fn all_clean(driver: &mut Driver) {
    for id in (driver.next_id - FLOOD..driver.next_id).map(RequestId) {
        assert_eq!(driver.verdict_in_any_order(id).kind, VerdictKind::Clean);
    }
}

fn clean(service: &Service, guest: &str) -> u64 {
    service.guest(guest).verdicts.clean
}

#[test]
fn a_guest_with_very_much_to_scan_leaves_the_others_their_turn() {
    let service = Service::start(Setup { engine: Engine::Patient, ..Setup::default() });
    let (mut greedy, mut modest) = (service.driver("g1"), service.driver("g2"));
    for operation in [Operation::Open, Operation::Background] {
        flood(&mut greedy, operation, &format!("{operation:?}"));
        wait_for("the flood", || (service.status().engines[0].queued > FLOOD / 2).then_some(()));
        let before = clean(&service, "g1");
        for n in 0..10 {
            let own = content(&format!("modest {operation:?}"), n);
            let id = ask(&mut modest, operation, Part::Inline(own.into()));
            assert_eq!(modest.verdict(id).kind, VerdictKind::Clean);
        }
        // Each of the ten has waited for a few of the others; behind all of them it would have been hundreds.
        let meanwhile = clean(&service, "g1") - before;
        assert!(meanwhile < FLOOD / 4, "{meanwhile}");
        // And nothing of the greedy one is lost.
        all_clean(&mut greedy);
    }
}

#[test]
fn what_a_greedy_guest_waits_for_comes_in_the_turn_of_another_that_waits_for_it_too() {
    let service = Service::start(Setup { engine: Engine::Patient, ..Setup::default() });
    let (mut greedy, mut modest) = (service.driver("g1"), service.driver("g2"));
    let operations = [
        (Operation::Open, Operation::Open),
        (Operation::Background, Operation::Open),
        (Operation::Background, Operation::Background),
    ];
    for (flooded, own) in operations {
        let whose = format!("{flooded:?} {own:?}");
        flood(&mut greedy, flooded, &whose);
        wait_for("the flood", || (service.status().engines[0].queued > FLOOD / 2).then_some(()));
        let before = service.status().engines[0].queued;
        // The last ones of the flood, sent and named by their hash.
        for n in 0..10 {
            let wanted = content(&whose, FLOOD - 1 - n);
            let part = match n % 2 {
                0 => Part::Inline(wanted.into()),
                _ => Part::Hash(ContentHash(*blake3::hash(&wanted).as_bytes())),
            };
            let id = ask(&mut modest, own, part);
            assert_eq!(modest.verdict(id).kind, VerdictKind::Clean);
        }
        let meanwhile = before - service.status().engines[0].queued;
        assert!(meanwhile < FLOOD / 4, "{meanwhile}");
        all_clean(&mut greedy);
    }
    // Nothing was scanned twice for that.
    assert_eq!(service.status().counters.scans, 3 * FLOOD);
    assert_eq!(service.status().engines[0].scans, 3 * FLOOD);
}
