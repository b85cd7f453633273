//! Quarantine in real guests: an infected file goes to the host and comes back with all that it had,
//! whoever is killed meanwhile, and what cannot go stays for a reason that the operator sees.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use seawall_client::{EventKind, GuestState, Quarantine, QuarantineEntry, QuarantineState};
use seawall_lab::wire::AgentPart;
use seawall_lab::{Guest, Kernel, Lab, LabOptions, Link, eicar};
use seawall_tests::{
    Checks, UNMOUNT, ask, driver_number, events, guest_view, has_event, infected_script, is_denied,
    kernel_complaints, opener, options, shown, up,
};
use serde_json::Value;

/// Bounds for what happens by itself within a second or two on an idle machine.
const SOON: Duration = Duration::from_secs(60);
const OPENER: &str = "/usr/local/sbin/opener";
/// Excluded: what is written here is not scanned when it is closed, and so is still there when a test comes to it.
const QUIET: [&str; 2] = ["/data/quiet", "/mnt/ro/quiet"];

#[test]
fn an_infected_file_goes_to_quarantine_and_comes_back_on_kernel_6_12() {
    story(Kernel::V6_12, Link::Vsock);
}

#[test]
fn an_infected_file_goes_to_quarantine_and_comes_back_on_kernel_6_1() {
    story(Kernel::V6_1, Link::Serial);
}

fn story(kernel: Kernel, link: Link) {
    let mut checks = Checks::of(format!("quarantine, kernel {kernel} over {link}"));
    let config = format!("[policy]\nexclude.paths = {QUIET:?}\naction.infected = \"quarantine\"\n");
    let lab = up(LabOptions { config, ..options(2, kernel, link) }).unwrap();
    let (g1, g2) = (lab.guest("g1").unwrap(), lab.guest("g2").unwrap());
    for guest in [&g1, &g2] {
        guest.push(&opener().unwrap(), OPENER).unwrap();
        guest.exec(["mkdir", QUIET[0]]).unwrap().ok().unwrap();
    }
    it_comes_back_with_all_that_it_had(&mut checks, &lab, &g1);
    it_goes_where_the_operator_says(&mut checks, &lab, &g1, &g2);
    what_cannot_go_stays(&mut checks, &lab, &g1);
    whoever_is_killed_nothing_is_lost(&mut checks, &lab, &g1);
    for guest in [&g1, &g2] {
        let complaints = kernel_complaints(guest).unwrap();
        checks.that("the kernel complains of nothing", complaints.is_empty(), complaints);
    }
    checks.end();
}

/// Makes a file that nobody has looked at, by writing it elsewhere on its file system.
fn put(guest: &Guest, content: &[u8], path: &str, mode: u32) {
    let quiet = if path.starts_with("/mnt/ro/") { QUIET[1] } else { QUIET[0] };
    let made = format!("{quiet}/made");
    unseen(guest, || guest.push_bytes(content, &made, mode).unwrap());
    guest.exec(["mv", made.as_str(), path]).unwrap().ok().unwrap();
}

/// Writes a file, and waits until the driver is done with its close: which file that is, and so whether it is
/// excluded, is looked at a moment later.
fn unseen(guest: &Guest, write: impl FnOnce()) {
    let closes = || driver_number(guest, "closes").unwrap();
    let before = closes();
    write();
    let until = Instant::now() + SOON;
    while closes() == before || driver_number(guest, "in_background").unwrap() > 0 {
        assert!(Instant::now() < until, "the driver is not done with it");
    }
}

fn list(lab: &Lab) -> Vec<QuarantineEntry> {
    let all: Quarantine = ask(lab, &["quarantine", "list"]).unwrap();
    all.entries
}

/// The entry about a path of this guest, once it is as far as `state`.
fn entry(
    checks: &mut Checks,
    lab: &Lab,
    guest: &Guest,
    path: &str,
    state: QuarantineState,
) -> QuarantineEntry {
    let mut found = None;
    checks.soon(&format!("{path} is {state:?}"), SOON, || {
        let of_it = |one: &QuarantineEntry| one.guest == guest.name() && one.path == path;
        found = list(lab).into_iter().find(|one| of_it(one) && one.state == state);
        found.is_some()
    });
    found.unwrap_or_else(|| panic!("{path}: {:#?}\n{}", list(lab), lab.daemon_log().unwrap()))
}

fn exists(guest: &Guest, path: &str) -> bool {
    guest.exec(["test", "-e", path]).unwrap().success()
}

fn described(guest: &Guest, command: &str, path: &str) -> Value {
    let output = guest.exec([OPENER, command, path]).unwrap().ok().unwrap();
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Says something to the command line, and whether it went well.
fn says(lab: &Lab, words: &[&str]) -> (bool, String) {
    let output = lab.cli(words).unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

fn it_comes_back_with_all_that_it_had(checks: &mut Checks, lab: &Lab, guest: &Guest) {
    let path = "/data/report";
    // A hole of a MiB behind the script.
    let made = format!("{}/report", QUIET[0]);
    let make = format!("truncate -s 1048576 {made} && dd of={made} conv=notrunc");
    let shell = guest.command(["sh", "-c", &make]).stdin(infected_script());
    let mut before = Value::Null;
    unseen(guest, || {
        shell.run().unwrap().ok().unwrap();
        before = described(guest, "dress", &made);
    });
    guest.exec(["mv", made.as_str(), path]).unwrap().ok().unwrap();
    checks.that("it has holes and more", before["sparse"] == true, &before);
    checks.denied("the file that goes", &guest.exec(["cat", path]).unwrap());
    let one = entry(checks, lab, guest, path, QuarantineState::Quarantined);
    checks.that("it is gone from the guest", !exists(guest, path), path);
    checks.soon("the event says so", SOON, || {
        has_event(lab, EventKind::Quarantined, |event| {
            event.path.as_deref() == Some(path) && event.ticket.as_deref() == Some(&one.id)
        })
    });
    let status = guest.agent_status().unwrap();
    let told = String::from_utf8_lossy(&status.stdout).contains("moved to the host's quarantine");
    checks.that("the guest's driver says so", told, shown(&status));

    guest.push_bytes(b"another one", path, 0o600).unwrap();
    let (done, text) = says(lab, &["quarantine", "restore", &one.id]);
    let refused = !done && text.contains("--overwrite");
    checks.that("a restore replaces nothing unasked", refused, text);
    let (done, text) = says(lab, &["quarantine", "restore", &one.id, "--overwrite"]);
    checks.that("it is restored", done, text);
    let after = described(guest, "describe", path);
    checks.that("owner, mode, ACL, times, attributes and holes", after == before, (&before, after));
    let output = guest.exec(["head", "-c", "20", path]).unwrap();
    checks.that("it is not caught again", output.success(), shown(&output));
    let script = infected_script();
    let same = guest.read(path).unwrap().starts_with(&script);
    checks.that("and has its content", same, "another one");
    checks.that("it is restored in the list", list(lab)[0].state == QuarantineState::Restored, ());
}

fn it_goes_where_the_operator_says(checks: &mut Checks, lab: &Lab, g1: &Guest, g2: &Guest) {
    put(g1, &eicar(), "/data/eicar", 0o644);
    checks.denied("EICAR", &g1.exec(["cat", "/data/eicar"]).unwrap());
    let one = entry(checks, lab, g1, "/data/eicar", QuarantineState::Quarantined);
    let (done, text) = says(lab, &["quarantine", "restore", &one.id, "--to", "g2:/data/sample"]);
    checks.that("it is restored to another guest", done, text);
    let output = g2.exec(["cat", "/data/sample"]).unwrap();
    checks.that("where it can be read", output.stdout == eicar(), shown(&output));
    put(g1, &eicar(), "/data/again", 0o644);
    checks.denied("and in the first one it cannot", &g1.exec(["cat", "/data/again"]).unwrap());
    entry(checks, lab, g1, "/data/again", QuarantineState::Quarantined);

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("sample");
    let name = file.to_str().unwrap();
    let (done, text) = says(lab, &["quarantine", "export", &one.id, name]);
    checks.that("it is exported", done && std::fs::read(&file).unwrap() == eicar(), text);
    let (done, text) = says(lab, &["quarantine", "restore", &one.id, "--to", "g9:"]);
    checks.that("no guest of that name", !done && text.contains("g9"), text);
    g2.stop_agent().unwrap();
    checks.soon("its silence is noticed", SOON, || {
        guest_view(lab, "g2").unwrap().state == GuestState::Unprotected
    });
    let (done, text) = says(lab, &["quarantine", "restore", &one.id, "--to", "g2:/data/second"]);
    checks.that("a guest without its driver is told", !done && text.contains("g2"), text);
    g2.start_agent().unwrap();
    g2.wait_protected(SOON).unwrap();

    put(g1, &eicar(), "/data/fine", 0o644);
    let (done, text) = says(lab, &["quarantine", "approve", &one.hash, "--guest", "g1"]);
    checks.that("it is approved", done, text);
    let mut output = None;
    checks.soon("what is approved opens", SOON, || {
        output = Some(g1.exec(["cat", "/data/fine"]).unwrap());
        output.as_ref().is_some_and(|output| output.stdout == eicar())
    });
    let (done, text) = says(lab, &["quarantine", "revoke", &one.hash, "--guest", "g1"]);
    checks.that("that is taken back", done, text);
    checks.soon("and it is denied", SOON, || is_denied(&g1.exec(["cat", "/data/fine"]).unwrap()));
    entry(checks, lab, g1, "/data/fine", QuarantineState::Quarantined);
    let (done, text) = says(lab, &["quarantine", "delete", &one.id, "--yes"]);
    let gone = !list(lab).iter().any(|left| left.id == one.id);
    checks.that("it is deleted", done && gone, text);
}

fn what_cannot_go_stays(checks: &mut Checks, lab: &Lab, guest: &Guest) {
    let run = |script: &str| drop(guest.sh(script).unwrap().ok().unwrap());
    let write = |path: &str| put(guest, &infected_script(), path, 0o755);
    let stays = |checks: &mut Checks, path: &str, why: &str| {
        checks.denied(path, &guest.exec(["cat", path]).unwrap());
        checks.soon(&format!("{path} stays: {why}"), SOON, || {
            has_event(lab, EventKind::QuarantineStays, |event| {
                event.path.as_deref() == Some(path)
                    && event.reason.as_ref().is_some_and(|reason| reason.contains(why))
            })
        });
        checks.that(&format!("{path} is still there"), exists(guest, path), path);
    };
    run("mkdir /data/stay");
    let fixed = "/data/stay/immutable";
    guest.command([OPENER, "fixed", fixed]).stdin(infected_script()).run().unwrap().ok().unwrap();
    stays(checks, fixed, "immutable");
    // Lifting that takes an open, which is denied; so the operator allows it for a moment.
    checks.denied("lifting that", &guest.exec([OPENER, "unfixed", fixed]).unwrap());
    let event = events(lab).unwrap().into_iter().rfind(|event| {
        event.kind == EventKind::QuarantineStays && event.path.as_deref() == Some(fixed)
    });
    let hash = event.unwrap().hash.unwrap();
    let (done, text) = says(lab, &["quarantine", "approve", &hash, "--guest", "g1"]);
    checks.that("it is approved", done, text);
    checks.soon("and lifted", SOON, || guest.exec([OPENER, "unfixed", fixed]).unwrap().success());
    let (done, text) = says(lab, &["quarantine", "revoke", &hash, "--guest", "g1"]);
    checks.that("no longer approved", done, text);
    checks.soon("it is denied", SOON, || is_denied(&guest.exec(["cat", fixed]).unwrap()));
    entry(checks, lab, guest, fixed, QuarantineState::Quarantined);

    run(
        "head -c 4194304 /dev/zero >/tmp/disk && losetup /dev/loop0 /tmp/disk && mke2fs /dev/loop0",
    );
    run("mkdir -p /mnt/ro && mount -t ext4 /dev/loop0 /mnt/ro && mkdir /mnt/ro/quiet");
    write("/mnt/ro/script");
    run("mount -o remount,ro /mnt/ro");
    stays(checks, "/mnt/ro/script", "read-only");

    write("/data/stay/mounted");
    run("cp /bin/busybox /data/stay/fine && mount --bind /data/stay/fine /data/stay/mounted");
    let unshared = "umount /data/stay/mounted && cat /data/stay/mounted";
    let output = guest.exec(["unshare", "-m", "sh", "-c", unshared]).unwrap();
    checks.denied("beneath a mount", &output);
    run(&format!("{UNMOUNT}; unmount /data/stay/mounted"));

    // Other names of the same file: this one goes, and they are denied until they go too.
    write("/data/stay/one");
    run("ln /data/stay/one /data/stay/two");
    checks.denied("one of two names", &guest.exec(["cat", "/data/stay/one"]).unwrap());
    let one = entry(checks, lab, guest, "/data/stay/one", QuarantineState::Quarantined);
    let told = one.detail.contains("1 other name");
    checks.that("the operator hears of the other name", told, &one.detail);
    let output = guest.exec(["cat", "/data/stay/two"]).unwrap();
    let is_refused = is_denied(&output) || !exists(guest, "/data/stay/two");
    checks.that("the other name cannot be read", is_refused, shown(&output));
    entry(checks, lab, guest, "/data/stay/two", QuarantineState::Quarantined);

    // Where no path of the guest's own leads.
    let tmpfs = "mount -t tmpfs none /mnt && cat >/mnt/hidden && cat /mnt/hidden";
    let command = guest.command(["unshare", "-m", "sh", "-c", tmpfs]).stdin(infected_script());
    checks.denied("in a mount namespace of its own", &command.run().unwrap());
    checks.soon("it is reported with its reason", SOON, || {
        has_event(lab, EventKind::QuarantineStays, |event| {
            event.reason.as_ref().is_some_and(|reason| reason.contains("no path"))
        })
    });
}

/// Each of the two ends is killed while files go, and while they come back.
fn whoever_is_killed_nothing_is_lost(checks: &mut Checks, lab: &Lab, guest: &Guest) {
    const FILES: usize = 24;
    let mut content = infected_script();
    for (round, who) in ["service", "worker", "both"].into_iter().enumerate() {
        let folder = format!("/data/many-{who}");
        guest.exec(["mkdir", &folder]).unwrap().ok().unwrap();
        let path = |number: usize| format!("{folder}/{number}");
        for number in 0..FILES {
            let bytes = [content.clone(), format!("{round} {number}").into_bytes()].concat();
            guest.push_bytes(&bytes, &path(number), 0o700).unwrap();
        }
        // The close after write has them scanned; whoever opens them hastens it.
        let all = guest.spawn(["sh", "-c", &format!("cat {folder}/* >/dev/null 2>&1")]).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        if who != "worker" {
            lab.kill_daemon().unwrap();
        }
        if who != "service" {
            guest.kill_agent(AgentPart::Worker).unwrap();
        }
        if who != "worker" {
            lab.start_daemon().unwrap();
        }
        guest.wait_protected(SOON).unwrap();
        all.wait().unwrap();
        let kept = |number: usize| {
            list(lab)
                .iter()
                .any(|one| one.path == path(number) && one.state == QuarantineState::Quarantined)
        };
        checks.soon(&format!("{who} killed: all are in quarantine or in the guest"), SOON, || {
            (0..FILES).all(|number| kept(number) || exists(guest, &path(number)))
        });
        // Whatever is left is caught by its next opening.
        checks.soon(&format!("{who} killed: a second try completes"), SOON * 2, || {
            let _denied = guest.sh(&format!("cat {folder}/* >/dev/null 2>&1; true")).unwrap();
            (0..FILES).all(|number| kept(number) && !exists(guest, &path(number)))
        });
        let left = guest.sh(&format!("ls -A {folder}")).unwrap().text();
        checks.that(&format!("{who} killed: nothing is left behind"), left.is_empty(), left);
        content.push(b'#');
    }
}
