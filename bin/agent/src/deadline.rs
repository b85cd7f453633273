//! The thread that keeps the deadlines, and nothing else.
//!
//! It shares no lock with anybody: it walks the ledger and answers what is overdue by fail mode. It
//! also beats in the ledger, so that the supervisor knows that this process still runs.

use crate::driver::Driver;
use seawall_fanotify::process;
use seawall_proto::ExposureReason;
use std::time::Duration;

/// How often the ledger is walked while something is held; deadlines are kept to this.
const TICK: Duration = Duration::from_millis(50);
/// How often this thread beats while nothing is held.
const IDLE: Duration = Duration::from_secs(1);

/// Keeps deadlines for ever.
pub fn keep(driver: &Driver) {
    let mut seen = 0;
    loop {
        let now_ms = process::now_ms();
        driver.ledger.beat(now_ms);
        let entered = driver.ledger.entered();
        // Where events come all the time none of them has to wake it.
        if driver.ledger.outstanding() == 0 && entered == seen {
            // A reader wakes it with the first event that it holds after a pause.
            std::thread::park_timeout(IDLE);
            continue;
        }
        seen = entered;
        for claim in driver.ledger.overdue(now_ms) {
            driver.answer_unscanned(claim, ExposureReason::Deadline);
        }
        std::thread::sleep(TICK);
    }
}
