//! Real guests on every kind of link, with a region, without one, and with one that comes and goes.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use seawall_client::{EventKind, LinkKind};
use seawall_lab::{Guest, Kernel, Lab, LabOptions, Link, eicar};
use seawall_tests::{
    Checks, driver_number, driver_status, events, guest_view, infected_script, kernel_complaints,
    options, shown, up,
};

/// Bounds for what happens by itself within a second or two on an idle machine.
const SOON: Duration = Duration::from_secs(30);

/// Opens files again and again until told to stop; says how many opens did not go as they should.
const LOAD: &str = "\
    bad=0; n=0; \
    while [ ! -e /tmp/stop ]; do \
        n=$((n+1)); \
        echo plain words $n >/tmp/load-$((n%8)) || bad=$((bad+1)); \
        grep -q \"words $n\\$\" /tmp/load-$((n%8)) || bad=$((bad+1)); \
        if cat /tmp/large >/dev/null 2>&1; then :; else bad=$((bad+1)); fi; \
        echo x >>/tmp/large; \
        if cat /data/eicar >/dev/null 2>&1; then bad=$((bad+1)); fi; \
    done; \
    echo $n rounds, $bad bad";

/// An access without a verdict is denied, so that a story sees each one.
const CLOSED: &str = "[policy.fail_mode]\nopen = \"closed\"\n";

fn is_inline(guest: &Guest) -> bool {
    let status = driver_status(guest).unwrap();
    status["content"].as_str().is_some_and(|way| way.starts_with("on the link"))
}

fn files_have_their_verdicts(checks: &mut Checks, guest: &Guest, when: &str) {
    let name = when.replace(' ', "-");
    let clean = format!("/data/clean-{name}");
    guest.push_bytes(format!("plain words {when}\n").as_bytes(), &clean, 0o644).unwrap();
    let output = guest.exec(["cat", &clean]).unwrap();
    checks.that(&format!("a clean file opens {when}"), output.success(), shown(&output));
    let script = format!("head -c 3000000 /dev/urandom >/tmp/{name} && wc -c </tmp/{name}");
    let output = guest.sh(&script).unwrap();
    checks.that(&format!("and a large one {when}"), output.text() == "3000000", shown(&output));
    let evil = format!("/data/eicar-{name}");
    guest.push_bytes(&eicar(), &evil, 0o644).unwrap();
    checks.denied(&format!("EICAR {when}"), &guest.exec(["cat", &evil]).unwrap());
    let script = format!("/data/script-{name}");
    guest.push_bytes(&infected_script(), &script, 0o755).unwrap();
    checks.denied(&format!("an infected script {when}"), &guest.exec([&script]).unwrap());
}

fn is_on(checks: &mut Checks, lab: &Lab, kind: LinkKind) {
    let link = guest_view(lab, "g1").unwrap().session.map(|session| session.link);
    checks.that(&format!("the session is on {kind:?}"), link == Some(kind), link);
}

fn costs_little_and_is_well(checks: &mut Checks, lab: &Lab, guest: &Guest) {
    let mut kib = 0;
    checks.soon("the driver has measured itself", SOON, || {
        kib = guest_view(lab, "g1").unwrap().session.map_or(0, |it| it.counters.memory_kib);
        kib > 0
    });
    checks.that(&format!("it takes at most 4 MiB ({kib} KiB)"), kib <= 4096, kib);
    let complaints = kernel_complaints(guest).unwrap();
    checks.that("the kernel complains of nothing", complaints.is_empty(), complaints);
}

#[test]
fn a_serial_channel_carries_everything_and_survives_both_ends() {
    let mut checks = Checks::of("virtio-serial, with a region and without");
    let lab = up(options(1, Kernel::V6_12, Link::Serial)).unwrap();
    let guest = lab.guest("g1").unwrap();
    is_on(&mut checks, &lab, LinkKind::Serial);
    checks.that("content goes through the region", !is_inline(&guest), "inline");
    files_have_their_verdicts(&mut checks, &guest, "at first");

    lab.kill_daemon().unwrap();
    let output = guest.exec(["cat", "/data/clean-at-first"]).unwrap();
    checks.that("a file opens without the service", output.success(), shown(&output));
    lab.start_daemon().unwrap();
    guest.wait_protected(SOON).unwrap();
    files_have_their_verdicts(&mut checks, &guest, "with a new service");

    guest.kill_agent(seawall_lab::wire::AgentPart::Worker).unwrap();
    guest.wait_protected(SOON).unwrap();
    files_have_their_verdicts(&mut checks, &guest, "with a new worker");

    guest.link_reset().unwrap();
    guest.link_up().unwrap();
    checks.soon("the link is back", SOON, || guest_view(&lab, "g1").unwrap().session.is_some());
    guest.wait_protected(SOON).unwrap();
    files_have_their_verdicts(&mut checks, &guest, "after a cut");

    guest.unplug_region().unwrap();
    files_have_their_verdicts(&mut checks, &guest, "without its region");
    checks.soon("content is inline", SOON, || is_inline(&guest));
    costs_little_and_is_well(&mut checks, &lab, &guest);
    checks.end();
}

fn without_a_region(link: Link, kind: LinkKind, kernel: Kernel) {
    let mut checks = Checks::of(format!("no region, link {link}, kernel {kernel}"));
    let config = CLOSED.into();
    let lab = up(LabOptions { region: false, config, ..options(1, kernel, link) }).unwrap();
    let guest = lab.guest("g1").unwrap();
    is_on(&mut checks, &lab, kind);
    let view = guest_view(&lab, "g1").unwrap();
    checks.that("the service knows of no region", view.region.is_none(), view.region);
    checks.that("content is inline", is_inline(&guest), "through the region");
    let keys =
        guest.sh("stat -c %a /sys/firmware/qemu_fw_cfg/by_name/opt/seawall/key/raw").unwrap();
    checks.that("the key is root's alone", keys.text() == "400", shown(&keys));
    let before = driver_number(&guest, "unscanned").unwrap();
    files_have_their_verdicts(&mut checks, &guest, "inline");
    // More at once than the link holds.
    let many = "for n in 1 2 3 4 5 6; do                 (head -c 1000000 /dev/urandom >/tmp/many-$n && cat /tmp/many-$n >/dev/null || echo bad) &                 done; wait; echo done";
    let output = guest.sh(many).unwrap();
    checks.that("six large files at once", output.text() == "done", shown(&output));
    let after = driver_number(&guest, "unscanned").unwrap();
    checks.that("every access had its verdict", after == before, (before, after));
    costs_little_and_is_well(&mut checks, &lab, &guest);
    checks.end();
}

#[test]
fn a_guest_without_a_region_on_tcp() {
    without_a_region(Link::Tcp, LinkKind::Tcp, Kernel::V6_12);
}

#[test]
fn a_guest_without_a_region_on_serial() {
    without_a_region(Link::Serial, LinkKind::Serial, Kernel::V6_1);
}

#[test]
fn a_guest_without_a_region_on_vsock_with_kernel_6_12() {
    without_a_region(Link::Vsock, LinkKind::Unix, Kernel::V6_12);
}

#[test]
fn a_guest_without_a_region_on_vsock_with_kernel_6_1() {
    without_a_region(Link::Vsock, LinkKind::Unix, Kernel::V6_1);
}

#[test]
fn a_locked_down_kernel_6_12_forbids_the_region_and_is_protected() {
    locked_down(Kernel::V6_12);
}

#[test]
fn a_locked_down_kernel_6_1_forbids_the_region_and_is_protected() {
    locked_down(Kernel::V6_1);
}

fn locked_down(kernel: Kernel) {
    let mut checks = Checks::of(format!("kernel {kernel} with lockdown=integrity"));
    let kernel_arguments = "lockdown=integrity".into();
    let options = options(1, kernel, Link::Serial);
    let lab = up(LabOptions { key: true, kernel_arguments, ..options }).unwrap();
    let guest = lab.guest("g1").unwrap();
    let lockdown = guest.sh("mount -t securityfs none /mnt; cat /mnt/lockdown").unwrap();
    checks.that("it is locked down", lockdown.text().contains("[integrity]"), shown(&lockdown));
    let way = driver_status(&guest).unwrap()["content"].as_str().unwrap_or_default().to_owned();
    let told = way.starts_with("on the link") && way.contains("Operation not permitted");
    checks.that("the driver says that it may not map the region", told, way);
    files_have_their_verdicts(&mut checks, &guest, "locked down");
    costs_little_and_is_well(&mut checks, &lab, &guest);
    checks.end();
}

#[test]
fn the_region_goes_and_comes_back_under_load_and_no_open_fails() {
    let mut checks = Checks::of("the region is unplugged and plugged in under load");
    let lab_options = options(1, Kernel::V6_12, Link::Serial);
    let lab = up(LabOptions { key: true, config: CLOSED.into(), ..lab_options }).unwrap();
    let guest = lab.guest("g1").unwrap();
    guest.push_bytes(&eicar(), "/data/eicar", 0o644).unwrap();
    guest.sh("head -c 600000 /dev/urandom >/tmp/large; sleep 1").unwrap().ok().unwrap();
    let before = driver_number(&guest, "unscanned").unwrap();
    let load = guest.spawn(["sh", "-c", LOAD]).unwrap();
    for round in 1..=3 {
        checks.soon(&format!("through the region, round {round}"), SOON, || !is_inline(&guest));
        std::thread::sleep(Duration::from_secs(1));
        guest.unplug_region().unwrap();
        checks.soon("inline without it", SOON, || is_inline(&guest));
        std::thread::sleep(Duration::from_secs(1));
        guest.plug_region().unwrap();
    }
    checks.soon("through the region at last", SOON, || !is_inline(&guest));
    guest.sh(": >/tmp/stop").unwrap();
    let output = load.wait().unwrap();
    let well = output.text().ends_with(" 0 bad") && !output.text().starts_with("0 ");
    checks.that(&format!("no open failed: {}", output.text()), well, shown(&output));
    let after = driver_number(&guest, "unscanned").unwrap();
    checks.that("every access had its verdict", after == before, (before, after));
    let restarts = events(&lab).unwrap();
    let restarted = restarts.iter().any(|event| event.kind == EventKind::WorkerRestarted);
    checks.that("the worker lived on", !restarted, "it was restarted");
    costs_little_and_is_well(&mut checks, &lab, &guest);
    checks.end();
}
