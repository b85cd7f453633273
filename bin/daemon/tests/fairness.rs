//! Guests share the engines: one that has very much to scan costs another little.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Driver, Engine, Service, Setup, wait_for};
use seawall_proto::{Operation, Part, RequestId, ToHost, VerdictKind};

const FLOOD: u64 = 400;

/// Asks for scans that take 20 ms each, all at once.
fn flood(driver: &mut Driver, operation: Operation) {
    for n in 0..FLOOD {
        let mut request = driver.request(Vec::new(), true);
        request.operation = operation;
        request.part =
            Part::Inline(format!("SEAWALL-FAULT sleep=20 {operation:?} {n}").into_bytes().into());
        driver.say(ToHost::ScanRequest(request));
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
        flood(&mut greedy, operation);
        wait_for("the flood", || (service.status().engines[0].queued > FLOOD / 2).then_some(()));
        let before = clean(&service, "g1");
        for n in 0..10 {
            let mut request = modest.request(Vec::new(), true);
            request.operation = operation;
            let content = format!("SEAWALL-FAULT sleep=20 modest {operation:?} {n}");
            request.part = Part::Inline(content.into_bytes().into());
            let id = request.id;
            modest.say(ToHost::ScanRequest(request));
            assert_eq!(modest.verdict(id).kind, VerdictKind::Clean);
        }
        // Each of the ten has waited for a few of the others; behind all of them it would have been hundreds.
        let meanwhile = clean(&service, "g1") - before;
        assert!(meanwhile < FLOOD / 4, "{meanwhile}");
        // And nothing of the greedy one is lost.
        for id in (greedy.next_id - FLOOD..greedy.next_id).map(RequestId) {
            assert_eq!(greedy.verdict_in_any_order(id).kind, VerdictKind::Clean);
        }
    }
}
