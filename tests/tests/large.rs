//! Files larger than the region, than what is scanned on access, and than the host's memory for them.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use seawall_client::{EventKind, Verdict};
use seawall_lab::{Kernel, LabOptions, Link, eicar};
use seawall_tests::{
    Checks, events, exposed, guest_view, kernel_complaints, options, service_status, shown, up,
};

/// Eight GiB through emulated guests.
const LONG: Duration = Duration::from_secs(600);
const MIB: u64 = 1 << 20;
const GUESTS: u32 = 8;
const BUDGET_MIB: u64 = 256;

#[test]
fn eight_guests_stream_a_gib_each_through_little_memory() {
    let mut checks = Checks::of("eight guests, a GiB each");
    let config = format!("[limits]\nprivate_copies_mib = {BUDGET_MIB}\n");
    let lab = up(LabOptions { config, ..options(GUESTS, Kernel::V6_12, Link::Vsock) }).unwrap();
    let guests = lab.guests().unwrap();
    // Each content is another one, and its evil is at the end.
    for guest in &guests {
        let make = format!(
            "printf {} >/tmp/large && truncate -s 1073741824 /tmp/large && cat >>/tmp/large",
            guest.name()
        );
        let output = guest.command(["sh", "-c", &make]).stdin(eicar()).run().unwrap();
        output.ok().unwrap();
    }
    let opened: Vec<_> = guests
        .iter()
        .map(|guest| guest.spawn(["head", "-c", "2", "/tmp/large"]).unwrap())
        .collect();
    let (mut memory, mut disk, mut resident) = (0, 0, 0);
    let until = Instant::now() + LONG;
    let found = loop {
        let status = service_status(&lab).unwrap();
        memory = memory.max(status.private_copies.memory_bytes);
        disk = disk.max(status.private_copies.spooled_bytes);
        resident = resident.max(status.resources.resident_kib);
        let found = found(&events(&lab).unwrap());
        if found.len() == guests.len() || Instant::now() > until {
            break found;
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    checks.that("each of them is found infected", found.len() == guests.len(), &found);
    for (guest, opened) in guests.iter().zip(opened) {
        let output = opened.wait().unwrap();
        let told = format!("{}: too large to be held, it opened", guest.name());
        checks.that(&told, output.text() == guest.name(), shown(&output));
    }
    let told = format!("the copies took at most {BUDGET_MIB} MiB of memory ({} MiB)", memory / MIB);
    checks.that(&told, memory <= BUDGET_MIB * MIB, memory);
    checks.that(&format!("the rest was on disk ({} MiB)", disk / MIB), disk > 1024 * MIB, disk);
    let told = format!("the service took no more than that and itself ({} MiB)", resident / 1024);
    checks.that(&told, resident <= (BUDGET_MIB + 64) * 1024, resident);
    checks.soon("and gave all of it back", LONG, || {
        let copies = service_status(&lab).unwrap().private_copies;
        (copies.memory_bytes, copies.spooled_bytes) == (0, 0)
    });
    for guest in &guests {
        let name = guest.name();
        checks.soon(&format!("{name}: nothing waits"), LONG, || exposed(guest).unwrap() == 0);
        let counters = guest_view(&lab, name).unwrap().session.unwrap().counters;
        let kib = counters.memory_kib;
        checks.that(&format!("{name}: the driver did not grow ({kib} KiB)"), kib <= 4096, kib);
        let complaints = kernel_complaints(guest).unwrap();
        checks.that(&format!("{name}: its kernel is well"), complaints.is_empty(), complaints);
    }
    checks.end();
}

/// The guests whose file was found infected, with nobody waiting for it.
fn found(events: &[seawall_client::Event]) -> BTreeSet<String> {
    let is_it = |event: &&seawall_client::Event| {
        event.kind == EventKind::Verdict
            && event.verdict == Some(Verdict::Infected)
            && event.operation.as_deref() == Some("background")
            && event.path.as_deref() == Some("/tmp/large")
    };
    events.iter().filter(is_it).filter_map(|event| event.guest.clone()).collect()
}
