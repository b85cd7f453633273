//! The lab itself, on both kernels, without driver and service: a test that fails on Seawall must not
//! have failed on the lab.

#![allow(clippy::unwrap_used, reason = "a test says what it expects by unwrapping it")]

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use seawall_lab::wire::AgentPids;
use seawall_lab::{Kernel, Lab, LabOptions, Link, Process, eicar};

/// What one boot can show is shown in one test: an emulated guest takes its time.
fn story(kernel: Kernel) {
    let lab = Lab::up(LabOptions { guests: 2, kernel, ..LabOptions::bare() }).unwrap();
    let (g1, g2) = (lab.guest("g1").unwrap(), lab.guest("g2").unwrap());

    let release = g1.exec(["uname", "-r"]).unwrap().ok().unwrap().text();
    assert!(release.starts_with(&format!("{kernel}.")), "booted {release}");

    // Status, both outputs, input, user, environment.
    let output = g1.sh("echo out; echo err >&2; exit 3").unwrap();
    assert_eq!(
        (output.status, output.text(), output.error_text()),
        (3, "out".into(), "err".into())
    );
    assert_eq!(g1.sh("kill -SEGV $$").unwrap().status, 128 + 11);
    let input: Vec<u8> = (0..1_000_000u32).flat_map(u32::to_le_bytes).collect();
    assert_eq!(g1.command(["cat"]).stdin(input.clone()).run().unwrap().stdout, input);
    assert_eq!(g1.command(["id", "-u"]).as_user(1000).run().unwrap().text(), "1000");
    assert_eq!(
        g1.command(["sh", "-c", "echo $WORD; pwd"])
            .env("WORD", "w")
            .cwd("/data")
            .run()
            .unwrap()
            .text(),
        "w\n/data"
    );
    assert_eq!(g1.exec(["/no/such/program"]).unwrap().status, 127);

    // A command that never ends is killed with its children; one that was let go of too.
    let started = Instant::now();
    let output = g1
        .command(["sh", "-c", "sleep 1000 & sleep 1000"])
        .timeout(Duration::from_secs(1))
        .run()
        .unwrap();
    assert!(output.timed_out && started.elapsed() < Duration::from_secs(10), "{output:?}");
    g1.spawn(["sleep", "2000"]).unwrap().kill();
    let gone = "for i in $(seq 50); do pgrep sleep || exit 0; sleep 0.1; done; exit 1";
    g1.sh(gone).unwrap().ok().unwrap();

    // Files in both directions, with their modes, and the guest's own error numbers.
    let folder = std::env::temp_dir().join(format!("seawall-lab-test-{}", lab.name()));
    std::fs::create_dir_all(&folder).unwrap();
    let (here, back) = (folder.join("here"), folder.join("back"));
    std::fs::write(&here, &input).unwrap();
    set_mode(&here, 0o751);
    g1.push(&here, "/data/new/folder/file").unwrap();
    assert_eq!(
        g1.exec(["stat", "-c", "%a %s", "/data/new/folder/file"]).unwrap().text(),
        "751 4000000"
    );
    g1.pull("/data/new/folder/file", &back).unwrap();
    assert_eq!(std::fs::read(&back).unwrap(), input);
    assert_eq!(mode(&back), 0o751);
    std::fs::remove_dir_all(&folder).unwrap();
    g1.push_bytes(b"", "/data/empty", 0o600).unwrap();
    assert_eq!(g1.read("/data/empty").unwrap(), b"");
    assert_eq!(g1.read("/data/none").unwrap_err().errno(), Some(2));
    assert_eq!(g1.write(b"x", "/proc/none", 0o600, None).unwrap_err().errno(), Some(2));
    g1.write(b"mine", "/data/mine", 0o640, Some(1000)).unwrap();
    assert_eq!(g1.exec(["stat", "-c", "%u:%g", "/data/mine"]).unwrap().text(), "1000:1000");
    // Nothing protects this guest.
    g1.push_bytes(&eicar(), "/data/eicar", 0o644).unwrap();
    assert_eq!(g1.exec(["cat", "/data/eicar"]).unwrap().stdout, eicar());

    // Many commands at once, on both guests.
    std::thread::scope(|scope| {
        for number in 0..20 {
            let guest = if number % 2 == 0 { &g1 } else { &g2 };
            scope.spawn(move || {
                let output = guest.sh(&format!("sleep 0.2; echo {number}")).unwrap();
                assert_eq!(output.text(), number.to_string());
            });
        }
    });

    // The parts that Seawall will use.
    assert_eq!(g1.sh("ls /sys/bus/pci/devices/*/resource2_wc | wc -l").unwrap().text(), "1");
    assert_eq!(
        g1.exec(["stat", "-c", "%F", "/dev/vsock"]).unwrap().text(),
        "character special file"
    );
    g1.exec(["ping", "-c", "1", "-W", "2", "10.77.0.12"]).unwrap().ok().unwrap();
    g1.exec(["ping", "-c", "1", "-W", "2", "10.77.0.1"]).unwrap().ok().unwrap();
    assert_eq!(g1.agent_pids().unwrap(), AgentPids::default());

    // Off and on again: the data disk stays, the region is a new file.
    let inode =
        |path: &Path| std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path).unwrap());
    let region = g1.state().unwrap().region;
    let before = inode(&region);
    g1.sh("sync").unwrap();
    g1.power_off().unwrap();
    assert!(!g1.is_running());
    let error = g1.exec(["true"]).unwrap_err().to_string();
    assert!(error.contains("is off"), "{error}");
    g1.boot().unwrap();
    g1.wait_exec(Duration::from_secs(60)).unwrap();
    assert_eq!(g1.read("/data/mine").unwrap(), b"mine");
    assert_ne!(inode(&region), before);

    leaves_nothing(lab);
}

/// Takes the lab down and looks for whatever it had.
fn leaves_nothing(lab: Lab) {
    let state = lab.state().unwrap();
    let processes = state.processes();
    assert!(processes.iter().filter(|process| process.is_alive()).count() >= state.guests.len());
    drop(lab);
    assert_eq!(processes.iter().filter(|process| process.is_alive()).count(), 0);
    assert!(!state.state_dir.exists());
    assert!(!state.run_dir.exists());
    assert!(!Path::new("/run/netns").join(&state.netns).exists());
    Lab::down(&state.name).unwrap();
}

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
}

fn mode(path: &Path) -> u32 {
    std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(path).unwrap().permissions())
        & 0o7777
}

#[test]
fn a_guest_of_kernel_6_1_is_at_our_command() {
    story(Kernel::V6_1);
}

#[test]
fn a_guest_of_kernel_6_12_is_at_our_command() {
    story(Kernel::V6_12);
}

#[test]
fn a_tcp_link_is_cut_and_restored_while_commands_still_run() {
    let lab = Lab::up(LabOptions { link: Link::Tcp, ..LabOptions::bare() }).unwrap();
    let guest = lab.guest("g1").unwrap();
    let reaches_host =
        || guest.exec(["ping", "-c", "1", "-W", "1", "10.77.0.1"]).unwrap().success();
    assert!(reaches_host());
    guest.link_down().unwrap();
    assert!(!reaches_host());
    guest.link_up().unwrap();
    let until = Instant::now() + Duration::from_secs(10);
    while !reaches_host() {
        assert!(Instant::now() < until, "the link does not come back");
    }
    leaves_nothing(lab);
}

#[test]
fn a_vsock_link_is_silenced_reset_and_restored() {
    let lab = Lab::up(LabOptions::bare()).unwrap();
    let guest = lab.guest("g1").unwrap();
    let relay = || guest.state().unwrap().relay.unwrap();
    let state_letter = |process: &Process| {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid)).unwrap();
        stat.rsplit_once(") ").unwrap().1.chars().next().unwrap()
    };
    guest.link_down().unwrap();
    assert_eq!(state_letter(&relay()), 'T');
    guest.link_up().unwrap();
    assert_ne!(state_letter(&relay()), 'T');
    let first = relay();
    guest.link_reset().unwrap();
    assert!(!first.is_alive());
    guest.link_up().unwrap();
    assert!(relay().is_alive());
    assert_ne!(relay(), first);
    // A guest whose link is silent can still be switched off.
    guest.link_down().unwrap();
    guest.power_off().unwrap();
    leaves_nothing(lab);
}

#[test]
fn a_lab_that_came_only_half_way_is_taken_down() {
    let lab = Lab::up(LabOptions::bare()).unwrap();
    let state = lab.state().unwrap();
    // As if the process had died between the start of QEMU and the note of it.
    let qemu = state.guests[0].qemu.clone().unwrap();
    let file = state.state_dir.join("state.json");
    let mut json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    json["guests"][0]["qemu"] = serde_json::Value::Null;
    std::fs::write(&file, json.to_string()).unwrap();
    assert!(qemu.is_alive());
    drop(lab);
    assert!(!qemu.is_alive());
    assert!(!state.run_dir.exists() && !state.state_dir.exists());
}

#[test]
fn a_lab_dies_with_its_owner_and_is_swept() {
    // The owner: a process that makes a lab and is killed.
    let mut owner = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "owner_of_a_lab_that_never_ends", "--nocapture"])
        .env("SEAWALL_LAB_TEST_OWNER", "1")
        .spawn()
        .unwrap();
    let name = format!("t{}-1", owner.id());
    let until = Instant::now() + Duration::from_secs(120);
    let state = loop {
        if let Some(state) =
            Lab::open(&name).ok().and_then(|lab| lab.state().ok()).filter(|state| state.ready)
        {
            break state;
        }
        assert!(Instant::now() < until, "the owner made no lab");
        std::thread::sleep(Duration::from_millis(100));
    };
    let qemu = state.guests[0].qemu.clone().unwrap();
    Process::from_pid(owner.id()).unwrap().signal(Signal::KILL);
    owner.wait().unwrap();
    assert!(qemu.wait_gone(Duration::from_secs(10)), "QEMU outlives its owner");
    // The next lab clears what a killed process cannot.
    assert!(state.run_dir.exists());
    let next = Lab::up(LabOptions::bare()).unwrap();
    assert!(!state.run_dir.exists() && !state.state_dir.exists());
    assert!(!Path::new("/run/netns").join(&state.netns).exists());
    leaves_nothing(next);
}

/// Not a test of its own: the body of the process above.
#[test]
fn owner_of_a_lab_that_never_ends() {
    if std::env::var_os("SEAWALL_LAB_TEST_OWNER").is_some() {
        let _lab = Lab::up(LabOptions::bare()).unwrap();
        std::thread::sleep(Duration::from_secs(600));
    }
}

#[test]
fn what_cannot_be_is_refused_in_words() {
    let refused = |options: LabOptions| Lab::up(options).unwrap_err().to_string();
    let without_service = LabOptions { region: false, ..LabOptions::bare() };
    assert!(refused(without_service).contains("need the service"));
    assert!(refused(LabOptions { name: "a/b".into(), ..LabOptions::bare() }).contains("no name"));
    assert!(refused(LabOptions { guests: 0, ..LabOptions::bare() }).contains("1 to 200"));
}
