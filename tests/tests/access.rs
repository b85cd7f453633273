//! One file access after another in real guests: what is clean opens, what is infected does not,
//! whichever way a process takes to it, and the operator sees it.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use seawall_client::{Event, EventKind, Verdict};
use seawall_lab::{Guest, Kernel, Lab, Link, Output, eicar};
use seawall_tests::{
    Checks, UNMOUNT, ask, driver_number, events, guest_view, has_event, infected_program,
    infected_script, is_reported, kernel_complaints, options, service_status, shown, up,
};

/// Bounds for what happens by itself within a second or two on an idle machine.
const SOON: Duration = Duration::from_secs(30);

#[test]
fn infected_files_stay_shut_on_kernel_6_12() {
    story(Kernel::V6_12, Link::Vsock);
}

#[test]
fn infected_files_stay_shut_on_kernel_6_1() {
    story(Kernel::V6_1, Link::Vsock);
}

#[test]
fn infected_files_stay_shut_over_tcp() {
    let mut checks = Checks::of("kernel 6.12 over tcp");
    let lab = up(options(2, Kernel::V6_12, Link::Tcp)).unwrap();
    let (g1, g2) = (lab.guest("g1").unwrap(), lab.guest("g2").unwrap());
    let link = guest_view(&lab, "g1").unwrap().session.map(|session| session.link);
    checks.that("the session is on TCP", link == Some(seawall_client::LinkKind::Tcp), link);
    let before = events_of_the_boot(&lab);
    clean_files_open(&mut checks, &g1);
    infected_files_are_denied(&mut checks, &lab, &g1);
    one_scan_serves_all_guests(&mut checks, &lab, &g1, &g2);
    every_access_had_its_verdict(&mut checks, &lab, before);
    guests_are_well(&mut checks, &[&g1, &g2]);
    checks.end();
}

fn story(kernel: Kernel, link: Link) {
    let mut checks = Checks::of(format!("kernel {kernel} over {link}"));
    let lab = up(options(2, kernel, link)).unwrap();
    let (g1, g2) = (lab.guest("g1").unwrap(), lab.guest("g2").unwrap());
    let before = events_of_the_boot(&lab);
    clean_files_open(&mut checks, &g1);
    infected_files_are_denied(&mut checks, &lab, &g1);
    infected_files_are_denied_wherever_they_appear(&mut checks, &lab, &g1);
    one_scan_serves_all_guests(&mut checks, &lab, &g1, &g2);
    a_change_is_never_missed(&mut checks, &g1);
    a_clean_file_raises_no_second_event(&mut checks, &g1);
    every_access_had_its_verdict(&mut checks, &lab, before);
    protection_ends_and_begins_with_the_driver(&mut checks, &lab, &g1);
    it_costs_little(&mut checks, &lab);
    guests_are_well(&mut checks, &[&g1, &g2]);
    checks.end();
}

fn cat(guest: &Guest, path: &str) -> Output {
    guest.exec(["cat", path]).unwrap()
}

fn sh(guest: &Guest, script: &str) -> Output {
    guest.sh(script).unwrap()
}

fn clean_files_open(checks: &mut Checks, guest: &Guest) {
    guest.push_bytes(b"plain words\n", "/data/clean", 0o644).unwrap();
    let output = cat(guest, "/data/clean");
    checks.that("a clean file opens", output.text() == "plain words", shown(&output));
    guest.push_bytes(b"#!/bin/sh\necho ran\n", "/data/script", 0o755).unwrap();
    let output = guest.exec(["/data/script"]).unwrap();
    checks.that("a clean script runs", output.text() == "ran", shown(&output));
    // Larger than the region: it goes through in parts.
    let output = sh(guest, "head -c 20000000 /dev/urandom >/tmp/large && wc -c </tmp/large");
    checks.that("a file larger than the region opens", output.text() == "20000000", shown(&output));
}

fn infected_files_are_denied(checks: &mut Checks, lab: &Lab, guest: &Guest) {
    guest.write(&eicar(), "/data/eicar", 0o644, Some(1000)).unwrap();
    checks.denied("EICAR on read", &cat(guest, "/data/eicar"));
    let user = guest.command(["cat", "/data/eicar"]).as_user(1000).run().unwrap();
    checks.denied("to the user who owns it", &user);
    checks.denied("a copy of it", &sh(guest, "cp /data/eicar /data/copy"));
    checks.denied("a truncating write", &sh(guest, "echo x >/data/eicar"));

    guest.push_bytes(&infected_program().unwrap(), "/data/busybox-bad", 0o755).unwrap();
    checks
        .denied("an infected program", &guest.exec(["/data/busybox-bad", "echo", "ran"]).unwrap());
    guest.push_bytes(&infected_script(), "/data/bad-script", 0o755).unwrap();
    checks.denied("an infected script", &guest.exec(["/data/bad-script"]).unwrap());
    checks.denied("an infected script given to its shell", &sh(guest, "sh /data/bad-script"));

    // The operator sees it: which guest, which file, which process.
    let told = |event: &Event| {
        event.guest.as_deref() == Some(guest.name())
            && event.path.as_deref() == Some("/data/eicar")
            && event.path_is_true == Some(true)
            && event.verdict == Some(Verdict::Infected)
            && event.detection.as_deref() == Some("EICAR_Test_File")
            && event.decision.as_deref() == Some("deny")
            && event.operation.as_deref() == Some("open")
            && event.process.as_deref() == Some("cat")
    };
    checks.soon("the event names guest, path, detection, process and user", SOON, || {
        has_event(lab, EventKind::Verdict, |event| told(event) && event.uid == Some(1000))
            && has_event(lab, EventKind::Verdict, |event| told(event) && event.uid == Some(0))
    });
    let output = lab.cli(["events"]).unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let shown = text.contains("/data/eicar") && text.contains("EICAR_Test_File");
    checks.that("`seawall events` shows it", shown, &text);
    checks.soon("the program's exec is in the events", SOON, || {
        has_event(lab, EventKind::Verdict, |event| {
            event.path.as_deref() == Some("/data/busybox-bad")
                && event.operation.as_deref() == Some("exec")
                && event.decision.as_deref() == Some("deny")
        })
    });
    let denied = driver_number(guest, "denied").unwrap();
    checks.that("the driver has counted them", denied >= 6, denied);
    // What is denied is denied each time, and stays as it was.
    checks.denied("EICAR once more", &cat(guest, "/data/eicar"));
    let size = sh(guest, "stat -c %s /data/eicar").text();
    checks.that("the file was not changed", size == eicar().len().to_string(), size);
}

/// Runs a script in the guest with EICAR on its input.
fn with_eicar(guest: &Guest, words: &[&str], script: &str) -> Output {
    let shell = ["sh", "-c", script];
    guest.command(words.iter().chain(&shell)).stdin(eicar()).run().unwrap()
}

fn infected_files_are_denied_wherever_they_appear(checks: &mut Checks, lab: &Lab, guest: &Guest) {
    let run = |script: &str| drop(sh(guest, script).ok().unwrap());

    run("mkdir /mnt/bind && mount --bind /data /mnt/bind");
    checks.denied("through a bind mount", &cat(guest, "/mnt/bind/eicar"));

    run("cd /data && mkdir low up work && mount -t tmpfs none /opt && mkdir /mnt/over");
    guest.push_bytes(&eicar(), "/data/low/eicar", 0o644).unwrap();
    guest.push_bytes(&infected_program().unwrap(), "/data/low/busybox", 0o755).unwrap();
    guest.push_bytes(b"fine", "/data/low/clean", 0o644).unwrap();
    let options = "lowerdir=/data/low,upperdir=/data/up,workdir=/data/work";
    run(&format!("mount -t overlay overlay -o {options} /mnt/over"));
    let output = cat(guest, "/mnt/over/clean");
    checks.that("a clean file opens in an overlay", output.stdout == b"fine", shown(&output));
    checks.denied("in an overlay, from below", &cat(guest, "/mnt/over/eicar"));
    let program = guest.exec(["/mnt/over/busybox", "echo", "ran"]).unwrap();
    checks.denied("a program in an overlay, from below", &program);
    guest.push_bytes(&eicar(), "/mnt/over/written", 0o644).unwrap();
    checks.denied("written in an overlay", &cat(guest, "/mnt/over/written"));
    guest.push_bytes(&infected_program().unwrap(), "/mnt/over/busybox-new", 0o755).unwrap();
    let program = guest.exec(["/mnt/over/busybox-new", "echo", "ran"]).unwrap();
    checks.denied("a program written in an overlay", &program);
    run("echo words >/mnt/over/mine && cat /mnt/over/mine && rm /mnt/over/mine");

    // In a mount namespace of its own: nothing of it is in the guest's own table of mounts.
    let tmpfs = "mount -t tmpfs none /mnt && cat >/mnt/file && cat /mnt/file";
    let output = with_eicar(guest, &["unshare", "-m"], tmpfs);
    checks.denied("on a tmpfs of a new mount namespace", &output);
    let run_it = "mount -t tmpfs none /mnt && cat >/mnt/file && chmod 755 /mnt/file && /mnt/file";
    let command = guest.command(["unshare", "-m", "sh", "-c", run_it]);
    let output = command.stdin(infected_program().unwrap()).run().unwrap();
    checks.denied("a program on a tmpfs of a new mount namespace", &output);
    let over = "mount -t tmpfs none /mnt && cd /mnt && mkdir u w m && \
                mount -t overlay none -o lowerdir=/data/low,upperdir=u,workdir=w m && cat m/eicar";
    let output = with_eicar(guest, &["unshare", "-m"], over);
    checks.denied("in an overlay of a new mount namespace", &output);
    // The same by a user who is root only in a user namespace of his own, where the kernel lets him.
    let allowed = guest.command(["unshare", "-Urm", "true"]).as_user(1000).run().unwrap();
    if allowed.success() {
        let command = guest.command(["unshare", "-Urm", "sh", "-c", tmpfs]);
        let output = command.as_user(1000).stdin(eicar()).run().unwrap();
        checks.denied("on a tmpfs of a user's own namespace", &output);
    } else {
        println!("  skipped: this kernel gives a user no namespace: {}", allowed.error_text());
    }

    // A file system that is mounted while the driver runs, with the file already in it.
    run(
        "head -c 8388608 /dev/zero >/tmp/disk && losetup /dev/loop0 /tmp/disk && mke2fs /dev/loop0",
    );
    run("mkdir /mnt/disk && mount -t ext4 /dev/loop0 /mnt/disk");
    guest.push_bytes(&eicar(), "/mnt/disk/eicar", 0o644).unwrap();
    checks.denied("on a file system mounted later", &cat(guest, "/mnt/disk/eicar"));
    run(&format!("{UNMOUNT}; unmount /mnt/disk && mount -t ext4 /dev/loop0 /mnt/disk"));
    checks.denied("on a disk that brought it along", &cat(guest, "/mnt/disk/eicar"));
    checks.soon("the event names its path there", SOON, || {
        is_reported(lab, guest, "/mnt/disk/eicar")
    });
    run(&format!(
        "{UNMOUNT}; unmount /mnt/disk && losetup -d /dev/loop0 && unmount /mnt/over && unmount /mnt/bind"
    ));
}

fn one_scan_serves_all_guests(checks: &mut Checks, lab: &Lab, g1: &Guest, g2: &Guest) {
    let content = format!("known nowhere else {:?}", std::time::SystemTime::now());
    let scans = || {
        let status = service_status(lab).unwrap();
        (status.counters.scans, status.engines.iter().map(|engine| engine.scans).sum::<u64>())
    };
    let before = scans();
    g1.push_bytes(content.as_bytes(), "/data/shared", 0o644).unwrap();
    checks.that("the first guest opens it", cat(g1, "/data/shared").text() == content, ());
    let first = scans();
    checks.that(
        "new content is scanned",
        first.0 > before.0 && first.1 > before.1,
        (before, first),
    );
    let requests = guest_view(lab, "g2").unwrap().requests;
    g2.push_bytes(content.as_bytes(), "/data/shared", 0o644).unwrap();
    checks.that("the second guest opens it", cat(g2, "/data/shared").text() == content, ());
    let asked = guest_view(lab, "g2").unwrap().requests;
    checks.that("the second guest asks for it", asked > requests, (requests, asked));
    checks.that("the engine's counter does not move", scans() == first, (first, scans()));
}

/// A file that was clean, and was opened so, is not clean any more, whichever way it changed.
fn a_change_is_never_missed(checks: &mut Checks, guest: &Guest) {
    let length = eicar().len();
    // As long as what comes in its place.
    let clean = format!("printf '%-{length}s' clean");
    let prepare = format!(
        "mkdir -p /data/ways /data/ways-bound; mount --bind /data/ways /data/ways-bound; cd /data/ways; {clean} >ref"
    );
    sh(guest, &prepare).ok().unwrap();
    let ways = [
        ("written over", "dd of=FILE conv=notrunc"),
        ("written anew", "cat >FILE"),
        ("written over, with its time set back", "dd of=FILE conv=notrunc && touch -r ref FILE"),
        ("grown, then written over", "truncate -s 500 FILE && dd of=FILE conv=notrunc"),
        ("cut off, then written", "truncate -s 0 FILE && dd of=FILE conv=notrunc"),
        ("another renamed over it", "cat >new && mv new FILE"),
        ("another linked in its place", "cat >other && rm FILE && ln other FILE && rm other"),
        ("written through another name", "ln FILE name && dd of=name conv=notrunc && rm name"),
        ("written through a bind mount", "dd of=/data/ways-bound/FILE conv=notrunc"),
        ("moved away, and another in its place", "mv FILE away && cat >FILE && rm away"),
    ];
    // Remembered, and marked; and too young for that.
    let all: Vec<String> = (0..ways.len()).map(|n| format!("settled-{n}")).collect();
    let all = all.join(" ");
    let make = format!(
        "cd /data/ways; for f in {all}; do {clean} >$f; done; sleep 1; cat {all} >/dev/null && cat {all} >/dev/null"
    );
    sh(guest, &make).ok().unwrap();
    for (n, (way, change)) in ways.into_iter().enumerate() {
        for (age, open) in [("settled", ":"), ("young", "cat FILE >/dev/null")] {
            let file = format!("{age}-{n}");
            let make = if age == "young" { format!("{clean} >FILE;") } else { String::new() };
            let script = format!(
                "cd /data/ways && {make} {open} && touch -r FILE ref && {{ {change}; }} 2>&1"
            );
            let output = with_eicar(guest, &[], &script.replace("FILE", &file));
            checks.that(&format!("{age}: {way}"), output.success(), shown(&output));
            checks.denied(&format!("{age}: {way}"), &cat(guest, &format!("/data/ways/{file}")));
        }
    }
    sh(guest, "umount /data/ways-bound; rm -rf /data/ways").ok().unwrap();
}

fn a_clean_file_raises_no_second_event(checks: &mut Checks, guest: &Guest) {
    let events = || driver_number(guest, "events").unwrap();
    // One process that opens the file again and again: it raises none but the file's own events.
    let opens = |count: u32| {
        let before = events();
        let script = format!("for i in $(seq {count}); do read -r word </data/clean || :; done");
        sh(guest, &script).ok().unwrap();
        events() - before
    };
    // The mark is set once the file's times are settled.
    sh(guest, "sleep 1; cat /data/clean").ok().unwrap();
    let (none, many) = (opens(0), opens(200));
    checks.that("200 more opens of a clean file raise no event", many < none + 20, (none, many));
    let requests = driver_number(guest, "requests").unwrap();
    sh(guest, "echo other >>/data/clean").ok().unwrap();
    sh(guest, "cat /data/clean").ok().unwrap();
    let asked = driver_number(guest, "requests").unwrap();
    checks.that("a change is looked at again", asked > requests, (requests, asked));
}

fn protection_ends_and_begins_with_the_driver(checks: &mut Checks, lab: &Lab, guest: &Guest) {
    guest.stop_agent().unwrap();
    let output = cat(guest, "/data/eicar");
    checks.that("without the driver EICAR is read", output.stdout == eicar(), shown(&output));
    let output = guest.exec(["/data/busybox-bad", "echo", "ran"]).unwrap();
    checks.that("and the infected program runs", output.text() == "ran", shown(&output));
    // The host knows this content, and the guest has it in memory. One question may come too late on a busy machine.
    sh(guest, "for n in $(seq 32); do cp /data/clean /data/again-$n; done; sleep 1").ok().unwrap();
    let output = guest.exec(["/data/bad-script"]).unwrap();
    checks.that("and the infected script", output.text() == "ran", shown(&output));
    // One infected program runs already when the driver starts.
    guest.push_bytes(&infected_program().unwrap(), "/data/busybox-runs", 0o755).unwrap();
    let running = guest.spawn(["/data/busybox-runs", "sleep", "600"]).unwrap();
    let shown = "for i in $(seq 100); do grep -ls /data/busybox-runs /proc/[0-9]*/maps && exit; done; exit 1";
    sh(guest, shown).ok().unwrap();
    guest.start_agent().unwrap();
    guest.wait_protected(SOON * 2).unwrap();
    checks.denied("EICAR with the driver back", &cat(guest, "/data/eicar"));
    sh(guest, "cat /data/again-*").ok().unwrap();
    let in_ring = driver_number(guest, "in_ring").unwrap();
    // Also on older kernels, which do not tell what they have in memory: by a filler.
    checks.that("known content is asked for in the ring", in_ring > 0, in_ring);
    checks.soon("what ran already is scanned and reported", SOON, || {
        has_event(lab, EventKind::Verdict, |event| {
            event.path.as_deref() == Some("/data/busybox-runs")
                && event.operation.as_deref() == Some("background")
                && event.verdict == Some(Verdict::Infected)
        })
    });
    running.kill();
    let kinds: Vec<EventKind> = events(lab).unwrap().iter().map(|event| event.kind).collect();
    let told = kinds.contains(&EventKind::SessionEnded);
    checks.that("the end of the session is in the events", told, kinds);
}

fn it_costs_little(checks: &mut Checks, lab: &Lab) {
    // The driver measures itself every five seconds.
    std::thread::sleep(Duration::from_secs(6));
    let guests: Vec<seawall_client::Guest> = ask(lab, &["guests"]).unwrap();
    for guest in guests {
        let kib = guest.session.map_or(u32::MAX, |session| session.counters.memory_kib);
        let told =
            format!("driver and supervisor of {} take at most 4 MiB ({kib} KiB)", guest.name);
        checks.that(&told, (1..=4096).contains(&kib), kib);
    }
    let kib = service_status(lab).unwrap().resources.resident_kib;
    let told = format!("the service takes at most 64 MiB ({kib} KiB)");
    checks.that(&told, (1..=65536).contains(&kib), kib);
}

/// How many events the boot has left. An access may come before the link then.
fn events_of_the_boot(lab: &Lab) -> usize {
    std::thread::sleep(Duration::from_secs(2));
    events(lab).unwrap().len()
}

fn every_access_had_its_verdict(checks: &mut Checks, lab: &Lab, before: usize) {
    let mut unscanned = events(lab).unwrap().split_off(before);
    unscanned.retain(|event| event.kind == EventKind::Unscanned);
    checks.that("every access had its verdict", unscanned.is_empty(), unscanned);
}

fn guests_are_well(checks: &mut Checks, guests: &[&Guest]) {
    for guest in guests {
        let complaints = kernel_complaints(guest).unwrap();
        let told = format!("the kernel of {} complains of nothing", guest.name());
        checks.that(&told, complaints.is_empty(), complaints);
    }
}
