//! Scans on demand while the host is busy. The only test of its file: the pressure is that of the whole machine.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Driver, Engine, Service, Setup, block_on};
use seawall_client::{ScanTarget, ScansRequest};
use seawall_proto::walk::WalkOrder;
use seawall_proto::{ToGuest, VerdictKind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The kernel's average is over ten seconds.
const PATIENCE: Duration = Duration::from_secs(120);

fn hear_order(driver: &mut Driver, wanted: WalkOrder) {
    let until = Instant::now() + PATIENCE;
    while Instant::now() < until {
        // A driver that says nothing for too long is taken for gone.
        driver.heartbeat();
        match driver.connection.hear().expect("the session stands") {
            ToGuest::WalkOrder(_, order) if order == wanted => return,
            _ => std::thread::sleep(Duration::from_millis(50)),
        }
    }
    panic!("no {wanted:?}");
}

#[test]
fn scans_stand_still_while_the_host_is_busy() {
    let service = Service::start(Setup {
        engine: Engine::Three,
        guests: vec!["web"],
        more: "[on_demand]\npressure_percent = 30\n".into(),
        ..Setup::default()
    });
    let mut driver = service.driver("web");
    let target = ScanTarget { guest: "web".into(), paths: Vec::new() };
    let wanted = ScansRequest { targets: vec![target], ..ScansRequest::default() };
    let begun = block_on(service.client().scan_guests(&wanted)).unwrap();
    let id = begun[0].id;
    while !matches!(driver.connection.hear().expect("a walk"), ToGuest::Walk(_)) {
        driver.heartbeat();
    }
    let busy = AtomicBool::new(true);
    std::thread::scope(|scope| {
        let ends = Ends(&busy);
        for _ in 0..4 * std::thread::available_parallelism().unwrap().get() {
            scope.spawn(|| {
                let until = Instant::now() + PATIENCE;
                while busy.load(Ordering::Relaxed) && Instant::now() < until {
                    std::hint::spin_loop();
                }
            });
        }
        hear_order(&mut driver, WalkOrder::Hold);
        let shown = block_on(service.client().guest_scan(id)).unwrap();
        assert!(shown.reason.contains("busy"), "{shown:?}");
        // An access does not stand still.
        assert_eq!(driver.scan(b"clean").kind, VerdictKind::Clean);
        drop(ends);
    });
    hear_order(&mut driver, WalkOrder::GoOn);
}

/// Ends the load with the test.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}
