//! A scan on demand under pressure. The only test of its file: the pressure is that of the whole machine.

#![allow(clippy::unwrap_used)] // A test says what it expects by unwrapping it.

mod common;

use common::{Native, Reply};
use seawall_proto::walk::{Walk, WalkProgress};
use seawall_proto::{Mode, Policy, ToGuest, ToHost};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// More than what a driver and its host cause, in percent.
const MOST: u8 = 30;
/// The kernel's average is over ten seconds.
const PATIENCE: Duration = Duration::from_secs(120);

fn progress(native: &Native) -> WalkProgress {
    native.host.heard(|message| match message {
        ToHost::WalkProgress(progress) => Some(progress.clone()),
        _ => None,
    })
}

#[test]
fn a_scan_stands_still_while_the_guest_is_busy() {
    let policy = Policy { mode: Mode::Exec, ..Policy::default() };
    let native = Native::start(policy, |_, _| Reply::Clean);
    let file = vec![b'x'; 100_000];
    for n in 0..200_u8 {
        native.write(&format!("f{n}"), &[&file[..], &[n]].concat());
    }
    native.settle();
    let busy = AtomicBool::new(true);
    std::thread::scope(|scope| {
        for _ in 0..4 * std::thread::available_parallelism().unwrap().get() {
            scope.spawn(|| {
                let until = Instant::now() + PATIENCE;
                while busy.load(Ordering::Relaxed) && Instant::now() < until {
                    std::hint::spin_loop();
                }
            });
        }
        let ends = Ends(&busy);
        // Slow enough not to be done before the average has risen.
        native.host.say(&ToGuest::Walk(Walk {
            id: 1,
            roots: Vec::new(),
            quick: false,
            place: None,
            bytes_per_second: 500_000,
            file_limit: 1 << 30,
            pressure_percent: MOST,
        }));
        let until = Instant::now() + PATIENCE;
        let stands = loop {
            let told = progress(&native);
            assert!(!told.done, "it goes on under pressure");
            if told.pressed {
                break told;
            }
            assert!(Instant::now() < until);
        };
        for _ in 0..3 {
            let still = progress(&native);
            assert!(still.pressed);
            assert_eq!((still.files, still.bytes), (stands.files, stands.bytes));
        }
        drop(ends);
        while progress(&native).pressed {
            assert!(Instant::now() < until + PATIENCE);
        }
    });
    // It goes on.
    let files = progress(&native).files;
    while progress(&native).files == files {}
}

/// Ends the load with the test.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}
