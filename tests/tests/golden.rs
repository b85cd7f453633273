//! Golden images, in real guests: what was learned of a template is known in its clone, and a clone that was tampered
//! with is found out.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use seawall_client::{EventKind, GoldenReport};
use seawall_lab::{Guest, Kernel, LabOptions, Link, eicar};
use seawall_tests::{Checks, ask, has_event, kernel_complaints, options, service_status, up};

const SOON: Duration = Duration::from_secs(90);
/// So many files that one in a hundred is among them: all but once in three thousand times.
const FILES: u64 = 800;

#[test]
fn a_clone_is_known_by_its_template_on_kernel_6_12() {
    story(Kernel::V6_12, Link::Vsock);
}

#[test]
fn a_clone_is_known_by_its_template_on_kernel_6_1() {
    story(Kernel::V6_1, Link::Tcp);
}

fn story(kernel: Kernel, link: Link) {
    let mut checks = Checks::of(format!("golden images, kernel {kernel} over {link}"));
    let config = "[policy]\nmode = \"open\"\n[on_demand]\npressure_percent = 0\n";
    let lab = up(LabOptions { config: config.into(), ..options(2, kernel, link) }).unwrap();
    let (template, clone) = (lab.guest("g1").unwrap(), lab.guest("g2").unwrap());
    let run = |guest: &Guest, script: &str| guest.sh(script).unwrap().ok().unwrap().text();
    let made = format!(
        "mkdir -p /data/files && cd /data/files && for n in $(seq {FILES}); do echo \"ORIGINAL $n\" >f$n; done; \
         cp /bin/busybox busybox; sleep 1"
    );
    run(&template, &made);
    let learned = lab.cli(["golden", "learn", "g1", "--name", "base"]).unwrap();
    let said = String::from_utf8_lossy(&learned.stdout).into_owned();
    checks.that("the template is learned", learned.status.code() == Some(0), &said);
    let report = || ask::<GoldenReport>(&lab, &["golden", "list"]).unwrap();
    let files = report().lists.first().map_or(0, |list| list.files);
    checks.that("all of its files", files > FILES, files);
    checks.soon("an event tells so", SOON, || has_event(&lab, EventKind::GoldenLearned, |_| true));

    // Its disk is copied while it runs, as a storage system does.
    clone.cut_power().unwrap();
    let (from, to) = (template.state().unwrap().data_disk, clone.state().unwrap().data_disk);
    std::fs::copy(from, &to).unwrap();
    let start = || {
        clone.boot().unwrap();
        clone.wait_exec(SOON).unwrap();
        clone.wait_protected(SOON).unwrap();
        // It looks once a second which file systems it can go by.
        std::thread::sleep(Duration::from_secs(4));
    };
    start();
    let count = |guest: &Guest, word: &str| {
        let script = format!("cd /data/files && cat f* | grep -c {word}");
        run(guest, &script).trim().parse::<u64>().unwrap_or(0)
    };
    // What is on the guest's other file systems is known by its content.
    run(&clone, "cat /proc/version | grep -c Linux");
    let before = service_status(&lab).unwrap().counters;
    let read = count(&clone, "ORIGINAL");
    checks.that("the clone reads its files", read == FILES, read);
    let list = report().lists.remove(0);
    let after = service_status(&lab).unwrap().counters;
    let known = list.known + list.sampled;
    checks.that("they are known", known >= FILES && list.sampled < 50, &list);
    let copied = after.bytes_copied - before.bytes_copied;
    checks.that("no content but of samples came", copied < 100_000, copied);
    let scans = after.scans - before.scans;
    checks.that("and none was scanned", scans < 20, scans);
    let ran = clone.exec(["/data/files/busybox", "true"]).unwrap();
    checks.that("a program of the template runs", ran.success(), ran.status);

    // What is the clone's own is scanned.
    clone.push_bytes(&eicar(), "/data/files/evil", 0o644).unwrap();
    checks.denied("what is infected", &clone.exec(["cat", "/data/files/evil"]).unwrap());
    run(
        &clone,
        "rm -f /data/files/evil; cd /data/files; cp f7 f8; cp -p f7 f9; touch -r f9 f8; sleep 1",
    );
    let before = report().lists.remove(0).known;
    let text = run(&clone, "cat /data/files/f8 /data/files/f9");
    checks.that("a changed file", text == "ORIGINAL 7\nORIGINAL 7", text);
    let known = report().lists.remove(0).known;
    checks.that("is not the template's", known == before, (before, known));

    // Its disk is another's now, with inodes and times as they were.
    clone.cut_power().unwrap();
    let mut disk = std::fs::read(&to).unwrap();
    let places: Vec<_> =
        disk.windows(9).enumerate().filter(|(_, it)| it == b"ORIGINAL ").map(|it| it.0).collect();
    checks.that("it has its files", places.len() as u64 >= FILES, places.len());
    for place in places {
        disk[place..place + 8].copy_from_slice(b"TAMPERED");
    }
    std::fs::write(&to, disk).unwrap();
    start();
    let before = service_status(&lab).unwrap().counters;
    let read = count(&clone, "TAMPERED");
    checks.that("they are read", read >= FILES - 2, read);
    checks.soon("it is found out", SOON, || {
        has_event(&lab, EventKind::GoldenDistrusted, |event| event.guest.as_deref() == Some("g2"))
    });
    let believed = report().distrusted.iter().all(|one| one.guest != "g2");
    checks.that("and not believed any more", !believed, report());
    let after = service_status(&lab).unwrap().counters;
    let scans = after.scans - before.scans;
    checks.that("what it has is scanned", scans > 0, scans);
    let text = String::from_utf8(lab.cli(["golden", "list"]).unwrap().stdout).unwrap();
    checks.that("the operator is told", text.contains("g2 is no clone of base"), &text);
    for guest in [&template, &clone] {
        let complaints = kernel_complaints(guest).unwrap();
        checks.that("the kernel complains of nothing", complaints.is_empty(), complaints);
    }
    checks.end();
}
