//! What `seawall policy explain` says of an access is what happens in a real guest.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use seawall_client::{EventKind, PolicyExplanation};
use seawall_lab::{Guest, Kernel, Lab, LabOptions, Link};
use seawall_tests::{
    Checks, ask, driver_number, guest_view, has_event, infected_script, kernel_complaints, options,
    shown, up,
};

const SOON: Duration = Duration::from_secs(60);
/// A program whose opens are not held: busybox under another name.
const READER: &str = "/usr/local/sbin/busybox-reader";

/// One access: to this path, of an infected file that this user owns.
struct Access {
    path: &'static str,
    owner: u32,
    file_system: &'static str,
    by: By,
}

enum By {
    Open,
    Exec,
    Reader,
}

const fn open(path: &'static str) -> Access {
    Access { path, owner: 0, file_system: "ext4", by: By::Open }
}

fn rows() -> Vec<Access> {
    let exec = |path| Access { by: By::Exec, ..open(path) };
    let reader = |path| Access { by: By::Reader, ..open(path) };
    let owned = |path, owner| Access { owner, ..open(path) };
    let on_tmpfs = |path| Access { file_system: "tmpfs", ..open(path) };
    vec![
        open("/data/plain"),
        open("/data/excluded/x"),
        exec("/data/excluded/x"),
        open("/data/excluded-not/x"),
        open("/data/home/ann/.cache/deep/x"),
        open("/data/home/ann/own/.cache"),
        open("/data/x.LOG"),
        exec("/data/x.log"),
        open("/data/log"),
        owned("/data/owned", 113),
        owned("/data/owned-not", 112),
        reader("/data/plain"),
        exec("/data/plain"),
        on_tmpfs("/data/mounted/x"),
    ]
}

#[test]
fn what_is_explained_happens_on_kernel_6_12() {
    story(Kernel::V6_12, Link::Vsock);
}

#[test]
fn what_is_explained_happens_on_kernel_6_1() {
    story(Kernel::V6_1, Link::Serial);
}

fn story(kernel: Kernel, link: Link) {
    let mut checks = Checks::of(format!("policy, kernel {kernel} over {link}"));
    // What was written is not scanned at its close: the file is what the row says when it is opened.
    let config = format!(
        "[policy]\nmode = \"open\"\n[policy.exclude]\npaths = [\"/data/excluded\", \"/data/home/*/.cache\"]\n\
         extensions = [\"log\"]\nowners = [113]\nprocesses = [{{ path = \"{READER}\" }}]\n\
         file_systems = [\"tmpfs\"]\n[policy.action]\nrunning = \"kill\"\n"
    );
    let lab = up(LabOptions { config, ..options(1, kernel, link) }).unwrap();
    let guest = lab.guest("g1").unwrap();
    let run = |script: &str| drop(guest.sh(script).unwrap().ok().unwrap());
    run(&format!(
        "cp /bin/busybox {READER} && mkdir /data/mounted && mount -t tmpfs none /data/mounted"
    ));
    checks.soon("the tmpfs is not watched", SOON, || {
        let session = guest_view(&lab, "g1").unwrap().session;
        session.is_some_and(|session| {
            let mut not_watched = session.coverage.uncovered.iter();
            not_watched
                .any(|one| one.mount_point == "/data/mounted" && one.reason.contains("policy"))
        })
    });
    for access in rows() {
        agrees(&mut checks, &lab, &guest, &access);
    }

    what_runs_is_killed(&mut checks, &lab, &guest);
    let passed = driver_number(&guest, "passed").unwrap();
    checks.that("exclusions were answered by the driver", passed > 0, passed);
    let complaints = kernel_complaints(&guest).unwrap();
    checks.that("the kernel complains of nothing", complaints.is_empty(), complaints);
    checks.end();
}

/// A program that an exclusion let start, found by another name.
fn what_runs_is_killed(checks: &mut Checks, lab: &Lab, guest: &Guest) {
    let program = "/data/excluded/busybox-evil";
    guest.push_bytes(&infected_script(), "/data/excluded/tail", 0o644).unwrap();
    let start = format!(
        "cat /bin/busybox /data/excluded/tail >{program} && chmod 755 {program} && ln {program} /data/by-another-name && \
         {{ {program} sleep 3000 >/dev/null 2>&1 </dev/null & }} && {READER} sleep 3000 >/dev/null 2>&1 </dev/null & sleep 1"
    );
    guest.sh(&start).unwrap().ok().unwrap();
    let run = |program: &str| {
        let look = format!(
            "for p in /proc/[0-9]*; do [ \"$(readlink $p/exe)\" = {program} ] && exit 0; done; exit 1"
        );
        guest.sh(&look).unwrap().success()
    };
    checks.that("it runs before it is known", run(program) && run(READER), program);
    checks.denied(
        "it is found by another name",
        &guest.exec(["cat", "/data/by-another-name"]).unwrap(),
    );
    checks.soon("what runs it is killed", SOON, || !run(program));
    checks.that("nobody else is", run(READER), READER);
    checks.soon("an event tells who that was", SOON, || {
        has_event(lab, EventKind::Mapped, |event| {
            event.path.as_deref() == Some("/data/by-another-name")
                && event.process.as_deref() == Some("busybox-evil")
                && event.reason.as_deref() == Some("it was killed")
        })
    });
}

fn agrees(checks: &mut Checks, lab: &Lab, guest: &Guest, access: &Access) {
    let Access { path, owner, file_system, by } = access;
    guest.sh(&format!("rm -f {path}; mkdir -p $(dirname {path})")).unwrap().ok().unwrap();
    guest.push_bytes(&infected_script(), path, 0o755).unwrap();
    guest.sh(&format!("chown {owner} {path}")).unwrap().ok().unwrap();
    let owner = owner.to_string();
    let mut words =
        vec!["policy", "explain", "g1", path, "--owner", &owner, "--file-system", file_system];
    let output = match by {
        By::Open => guest.exec(["cat", path]),
        By::Exec => {
            words.push("--exec");
            guest.exec([*path])
        }
        By::Reader => {
            words.extend(["--process", READER]);
            guest.exec([READER, "cat", path])
        }
    };
    let output = output.unwrap();
    let told: PolicyExplanation = ask(lab, &words).unwrap();
    let said = told.steps.first().map(|step| format!("{}: {}", step.setting, step.what));
    let name = words[3..].join(" ");
    if told.scanned {
        checks.denied(&format!("{name}: scanned"), &output);
    } else {
        checks.that(&format!("{name}: not scanned"), output.success(), (said, shown(&output)));
    }
}
