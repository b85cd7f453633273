//! Scans of guests' files on demand, in real guests: everything is found, nothing twice, and a scan goes on where it
//! was whoever is killed.
#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::time::Duration;

use seawall_client::{EventKind, GuestScan, GuestScanState};
use seawall_lab::wire::AgentPart;
use seawall_lab::{Guest, Kernel, Lab, LabOptions, Link, eicar};
use seawall_tests::{Checks, ask, has_event, kernel_complaints, options, up};

const SOON: Duration = Duration::from_secs(90);

#[test]
fn a_guest_is_scanned_on_demand_on_kernel_6_12() {
    story(Kernel::V6_12, Link::Vsock);
}

#[test]
fn a_guest_is_scanned_on_demand_on_kernel_6_1() {
    story(Kernel::V6_1, Link::Serial);
}

fn story(kernel: Kernel, link: Link) {
    let mut checks = Checks::of(format!("scans, kernel {kernel} over {link}"));
    // Nothing is looked at when it is written, and what is found by a scan goes to quarantine. The emulated machine
    // is always busy.
    let config = "[policy]\nmode = \"open\"\naction.infected = \"quarantine\"\nexclude.paths = [\"/data/excluded\"]\n\
                  [on_demand]\npressure_percent = 0\nmib_per_second = 1\nfile_limit_mib = 1\nguests_at_once = 2\n";
    let lab = up(LabOptions { config: config.into(), ..options(2, kernel, link) }).unwrap();
    let (g1, g2) = (lab.guest("g1").unwrap(), lab.guest("g2").unwrap());
    let run = |guest: &Guest, script: &str| drop(guest.sh(script).unwrap().ok().unwrap());
    // 400 small files of which each is new to the host, and what is special.
    let many = "mkdir -p /data/many/a/b && cd /data/many && for n in $(seq 400); do \
                head -c 6000 /dev/urandom >a/f$n; done; mv a/f1* a/b/";
    for guest in [&g1, &g2] {
        run(guest, many);
    }
    let evil = |guest: &Guest, path: &str| {
        run(guest, &format!("mkdir -p $(dirname {path})"));
        guest.push_bytes(&eicar(), path, 0o644).unwrap();
    };
    evil(&g1, "/data/many/a/b/evil");
    evil(&g1, "/data/excluded/evil");
    evil(&g1, "/data/other/evil");
    run(
        &g1,
        "cd /data/many && ln a/f2 linked && truncate -s 3000000 large && ln -s /data/other to-other && mkfifo fifo && \
         mkdir -p /data/many/bound /data/many/other && mount --bind /data/many/a /data/many/bound",
    );

    // A part of a guest.
    let (code, scan) = scan(&lab, &["g1:/data/many"]);
    checks.that("a part of a guest", scan.state == GuestScanState::Done, &scan);
    checks.that("its end is told by the exit code", code == Some(1), code);
    let found: Vec<_> =
        scan.found.iter().map(|one| (one.path.as_str(), one.action.as_str())).collect();
    checks.that("the evil is found", found == [("/data/many/a/b/evil", "quarantine")], &scan.found);
    // 400, the evil, the large one; no link, no FIFO, no second name, nothing through the bind mount.
    checks.that("each file once", scan.files == 402 && scan.missed == 1, (scan.files, scan.missed));
    let left: Vec<_> = scan.left_out.iter().map(|one| one.path.as_str()).collect();
    checks.that("what is left out is named", left == ["/data/many/large"], &scan.left_out);
    checks.soon("it goes to quarantine", SOON, || {
        !g1.exec(["test", "-e", "/data/many/a/b/evil"]).unwrap().success()
    });
    checks.soon("an event tells of the end", SOON, || {
        has_event(&lab, EventKind::ScanEnded, |event| event.guest.as_deref() == Some("g1"))
    });

    // An archive in an archive, which was opened and is clean for accesses: a scan looks into it, and names the member.
    run(&g1, "mkdir -p /data/packed");
    let archive = "/data/packed/backup.tar.gz";
    g1.push_bytes(&packed(), archive, 0o644).unwrap();
    run(&g1, &format!("cat {archive} >/dev/null"));
    let (_, packed) = self::scan(&lab, &["g1:/data/packed"]);
    let found: Vec<_> =
        packed.found.iter().map(|one| (one.path.as_str(), one.member.as_deref())).collect();
    let member = Some("inner.tar!/bin/eicar.com");
    checks.that("in an archive", found == [(archive, member)], &packed.found);
    checks.soon("the archive goes to quarantine", SOON, || {
        !g1.exec(["test", "-e", archive]).unwrap().success()
    });

    // Everything in both, while it is paused, while the service and the drivers die.
    let ids = begin(&lab, &["--all"]);
    checks.that("one scan for each guest", ids.len() == 2, &ids);
    let [one, two] = [ids[0], ids[1]];
    // What was scanned before is known to the driver of g1: that of g2 takes longer.
    checks.soon("they are under way", SOON, || show(&lab, two).files > 20);
    let paused = order(&lab, "pause", two);
    checks.that("one is paused", paused.state == GuestScanState::Paused, &paused.reason);
    std::thread::sleep(Duration::from_secs(2));
    let still = show(&lab, two);
    checks.that("it stands still", still.files == paused.files, (still.files, paused.files));
    order(&lab, "resume", two);
    checks.soon("it goes on", SOON, || show(&lab, two).files > paused.files);
    // The guest is reset, without a word to anybody; what its disk has not is lost.
    let boot = || g2.read("/proc/sys/kernel/random/boot_id").ok();
    run(&g2, "sync");
    let before = (boot(), show(&lab, two));
    g2.reset().unwrap();
    checks.that("in the midst of it", before.1.state == GuestScanState::Running, &before.1);
    checks.soon("the guest starts anew", SOON, || boot().is_some_and(|new| before.0 != Some(new)));
    checks.soon("its scan goes on where it was", SOON, || {
        let now = show(&lab, two);
        now.state == GuestScanState::Running && now.files > before.1.files
    });
    lab.kill_daemon().unwrap();
    lab.start_daemon().unwrap();
    checks.soon("the service knows where it was", SOON, || {
        let known = ask::<GuestScan>(&lab, &["scans", "show", &two.to_string()]);
        known.is_ok_and(|known| known.files >= paused.files)
    });
    g2.kill_agent(AgentPart::Worker).unwrap();
    g1.wait_protected(SOON).unwrap();
    for (id, guest) in [(one, "g1"), (two, "g2")] {
        checks.soon(&format!("the scan of {guest} ends"), SOON * 2, || {
            show(&lab, id).state == GuestScanState::Done
        });
    }
    let ended = show(&lab, one);
    let found: Vec<_> = ended.found.iter().map(|one| one.path.as_str()).collect();
    checks.that("it found the rest", found == ["/data/other/evil"], &ended.found);
    checks.that("and left out what is excluded", ended.excluded == 1, ended.excluded);
    // The files of the system come to the 400; a scan that nobody disturbs comes to the same.
    let second = show(&lab, two);
    let (_, undisturbed) = self::scan(&lab, &["g2"]);
    let same = second.files.abs_diff(undisturbed.files) <= 2 && second.files > 400;
    checks.that("no file was left out or counted twice", same, (second.files, undisturbed.files));
    checks.that("and none failed", ended.errors + second.errors == 0, (&ended, &second));

    // Cancelled, and what is not there.
    let id = begin(&lab, &["g2"])[0];
    let cancelled = order(&lab, "cancel", id);
    checks.that("it is cancelled", cancelled.state == GuestScanState::Cancelled, &cancelled);
    let refused = lab.cli(["scans", "resume", &id.to_string()]).unwrap();
    checks.that("and cannot go on", refused.status.code() == Some(4), refused.status);
    let (_, nothing) = self::scan(&lab, &["g2:/data/nothing"]);
    let why = nothing.left_out.first().map(|one| one.path.as_str());
    checks.that("what is not there is named", why == Some("/data/nothing"), &nothing);
    let (code, quick) = self::scan(&lab, &["g2", "--quick"]);
    let is_quick = code == Some(0) && quick.files > 0;
    checks.that("a quick scan", is_quick, (quick.files, second.files));
    for guest in [&g1, &g2] {
        let complaints = kernel_complaints(guest).unwrap();
        checks.that("the kernel complains of nothing", complaints.is_empty(), complaints);
    }
    checks.end();
}

/// A guest is moved to another host while it is scanned, and comes back later: here it is gone without a word.
#[test]
fn a_scan_waits_for_a_guest_that_is_moved_away() {
    let mut checks = Checks::of("scans, a guest is moved away and back");
    let config =
        "[policy]\nmode = \"open\"\n[on_demand]\npressure_percent = 0\nmib_per_second = 1\n";
    let (region, key) = (false, true);
    let options = options(2, Kernel::V6_12, Link::Tcp);
    let lab = up(LabOptions { config: config.into(), region, key, ..options }).unwrap();
    let (g1, g2) = (lab.guest("g1").unwrap(), lab.guest("g2").unwrap());
    // Each is new to the host, and they take twenty seconds at least.
    let fill = |guest: &Guest, folder: &str| {
        let name = guest.name();
        let files = format!(
            "mkdir {folder}; for n in $(seq 20); do \
             {{ echo {name} {folder} $n; head -c 1000000 /dev/zero; }} >{folder}/$n; done"
        );
        guest.sh(&files).unwrap().ok().unwrap();
    };
    fill(&g1, "/data/many");
    fill(&g2, "/data/many");
    fill(&g1, "/data/more");
    let ids = begin(&lab, &["g1:/data/many", "g2:/data/many"]);
    let [one, two] = [ids[0], ids[1]];
    checks
        .soon("they are under way", SOON, || [one, two].iter().all(|id| show(&lab, *id).files > 2));
    g1.migrate_away().unwrap();
    let left = show(&lab, one);
    checks.that("it leaves in the midst of it", !left.state.has_ended(), &left);
    checks.soon("that is an alarm", SOON, || {
        has_event(&lab, EventKind::GuestUnprotected, |event| event.guest.as_deref() == Some("g1"))
    });
    checks.soon("the other one comes to its end", SOON, || {
        let other = show(&lab, two);
        (other.state, other.files, other.errors) == (GuestScanState::Done, 20, 0)
    });
    let stands = show(&lab, one);
    checks.that("the scan stands", !stands.state.has_ended() && stands.files < 20, &stands);
    g1.migrate_back().unwrap();
    checks.soon("it goes on and comes to its end", SOON, || {
        show(&lab, one).state == GuestScanState::Done
    });
    let ended = show(&lab, one);
    let (files, failed) = (ended.files, ended.missed + ended.errors);
    checks.that("each file once", (files, failed) == (20, 0), &ended);
    checks.that("it is protected", g1.wait_protected(SOON).is_ok(), "not so");
    // What does not come back can be ended.
    let id = begin(&lab, &["g1:/data/more"])[0];
    g1.migrate_away().unwrap();
    let cancelled = order(&lab, "cancel", id);
    checks.that("it is cancelled", cancelled.state.has_ended(), &cancelled);
    checks.end();
}

/// A compressed tar with a tar in which the payload is.
fn packed() -> Vec<u8> {
    let tar = |name: &str, bytes: &[u8]| {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        builder.append_data(&mut header, name, bytes).unwrap();
        builder.into_inner().unwrap()
    };
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    out.write_all(&tar("inner.tar", &tar("bin/eicar.com", &eicar()))).unwrap();
    out.finish().unwrap()
}

fn show(lab: &Lab, id: u64) -> GuestScan {
    ask(lab, &["scans", "show", &id.to_string()]).unwrap()
}

fn order(lab: &Lab, what: &str, id: u64) -> GuestScan {
    ask(lab, &["scans", what, &id.to_string()]).unwrap()
}

/// Scans, and waits for the end.
fn scan(lab: &Lab, words: &[&str]) -> (Option<i32>, GuestScan) {
    let output = lab.cli([["--json", "scan"].as_slice(), words].concat()).unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let scans: Vec<GuestScan> = serde_json::from_slice(&output.stdout).expect(&text);
    (output.status.code(), scans.into_iter().next().unwrap())
}

/// Begins scans.
fn begin(lab: &Lab, words: &[&str]) -> Vec<u64> {
    let words = [["scan", "--detach"].as_slice(), words].concat();
    let scans: Vec<GuestScan> = ask(lab, &words).unwrap();
    scans.iter().map(|scan| scan.id).collect()
}
