//! A full Debian without driver and service: what the tests of Seawall rely on is there.

#![allow(clippy::unwrap_used, reason = "a test says what it expects by unwrapping it")]

use std::time::Duration;

use seawall_lab::{Image, Kernel, Lab, LabOptions};
use serde_json::json;

#[test]
fn a_full_debian_installs_compiles_freezes_and_shuts_down() {
    let options = LabOptions { image: Image::Debian, kernel: Kernel::V6_1, ..LabOptions::bare() };
    let lab = Lab::up(options).unwrap();
    let guest = lab.guest("g1").unwrap();
    let run = |script: &str| guest.sh(script).unwrap().ok().unwrap().text();
    assert_eq!(run("systemctl --failed --quiet | wc -l"), "0");
    assert!(run("uname -r").starts_with("6.1."));
    assert!(
        run("apt-get -q update && apt-get -q -y install hello && hello").ends_with("Hello, world!")
    );
    assert_eq!(
        run("cd /data && printf 'int main(){return 0;}' >a.c && gcc a.c && ./a.out && echo good"),
        "good"
    );
    run("journalctl --sync; ls /var/log/journal/*/system.journal");
    // A process that dies leaves its core.
    run(
        "sh -c 'kill -SEGV $$' || true; for i in $(seq 100); do ls /var/lib/systemd/coredump/* && exit 0; sleep 0.2; done; exit 1",
    );
    guest.guest_agent("guest-fsfreeze-freeze", json!({})).unwrap();
    let frozen = guest
        .command(["sh", "-c", "echo x >/data/frozen"])
        .timeout(Duration::from_secs(2))
        .run()
        .unwrap();
    assert!(frozen.timed_out);
    guest.guest_agent("guest-fsfreeze-thaw", json!({})).unwrap();
    run("echo x >/data/thawed");
    guest.shut_down(Duration::from_secs(120)).unwrap();
    guest.boot().unwrap();
    lab.wait_ready().unwrap();
    assert_eq!(run("cat /data/thawed; which hello"), "x\n/usr/bin/hello");
}
