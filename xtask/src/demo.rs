//! `cargo xtask demo`: the main job on real guests, told in plain words with the real output.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use seawall_lab::{Guest, Lab, LabOptions, Need, Output, eicar, ensure_binaries, ensure_setup};
use serde_json::Value;

#[derive(clap::Args)]
pub struct Arguments {
    /// The guests' kernel
    #[arg(long, default_value = "6.12")]
    kernel: seawall_lab::Kernel,
    /// The guests' link to the service
    #[arg(long, default_value = "vsock")]
    link: seawall_lab::Link,
}

const POLICY: &str = "[policy.deadline]\nopen_ms = 3000\nexec_ms = 3000\n";

/// Writes EICAR at `$1`, from two halves, so that no file but that one holds it.
const WRITE_EICAR: &str = r#"eicar() { printf '%s' "$A" > "$1"; printf '%s' "$B" >> "$1"; }"#;

/// Tells the story; fails at the first step that is not as told.
pub fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let start = Instant::now();
    println!("Seawall: one antivirus for all guests of a KVM host.\n");
    println!("Setting up: packages, kernels, and a release build (the first time takes a while) …");
    ensure_setup()?;
    ensure_binaries(Need::ALL)?;
    println!("Booting two guests with kernel {} on one bridge …", arguments.kernel.as_str());
    let lab = Lab::up(LabOptions {
        guests: 2,
        kernel: arguments.kernel,
        link: arguments.link,
        config: POLICY.into(),
        ..LabOptions::for_test()
    })?;
    let (g1, g2) = (lab.guest("g1")?, lab.guest("g2")?);
    println!("They are up, and each runs the driver over {}.", arguments.link.as_str());

    clean(&g1)?;
    infected(&g1)?;
    shared(&lab, &g1, &g2)?;
    service_killed(&lab, &g1)?;
    stopped(&g1)?;
    quarantined(&lab, &g1)?;
    costs(&lab)?;
    drop(lab);
    println!("\nAll of it was as told, in {} s.", start.elapsed().as_secs());
    Ok(ExitCode::SUCCESS)
}

fn told(text: &str) {
    println!("\n── {text}");
}

/// Shows a command of a guest and what came of it.
fn show(guest: &Guest, what: &str, script: &str) -> anyhow::Result<Output> {
    let (first, second) = halves()?;
    let script = format!("A='{first}'\nB='{second}'\n{WRITE_EICAR}\n{script}");
    let output = guest.sh(&script)?;
    println!("   {} $ {what}", guest.name());
    let text = output.text() + &output.error_text();
    for line in text.lines().filter(|line| !line.trim().is_empty()).take(3) {
        println!("      {}", line.replace(char::is_control, "?"));
    }
    Ok(output)
}

fn halves() -> anyhow::Result<(String, String)> {
    let text = String::from_utf8(eicar()).context("EICAR is plain text")?;
    let (first, second) = text.split_at(34);
    Ok((first.to_owned(), second.to_owned()))
}

fn expect_denied(output: &Output, way: &str) -> anyhow::Result<()> {
    let text = output.error_text();
    ensure!(!output.success(), "EICAR could be read {way}");
    ensure!(
        text.contains("Operation not permitted") || text.contains("Permission denied"),
        "{way} failed for another reason: {text}"
    );
    Ok(())
}

fn clean(guest: &Guest) -> anyhow::Result<()> {
    told("A clean file opens as ever.");
    let output =
        show(guest, "cat /data/letter", "echo 'Dear reader' > /data/letter; cat /data/letter")?;
    ensure!(
        output.success() && output.text().contains("Dear reader"),
        "the clean file: {output:?}"
    );
    Ok(())
}

fn infected(guest: &Guest) -> anyhow::Result<()> {
    told("EICAR, the test virus, cannot be opened, whichever way it is tried.");
    let ways: [(&str, &str, &str); 7] = [
        ("by reading it", "cat /data/eicar", "eicar /data/eicar; cat /data/eicar"),
        ("as a program", "/data/eicar", "chmod 755 /data/eicar; /data/eicar"),
        ("as a script", "sh /data/eicar", "sh /data/eicar"),
        (
            "through a bind mount",
            "mount --bind /data /mnt; cat /mnt/eicar",
            "mount --bind /data /mnt; cat /mnt/eicar; status=$?; umount /mnt; exit $status",
        ),
        (
            "in an overlay's lower layer",
            "mount -t overlay …; cat /run/merged/eicar",
            "mkdir -p /run/merged /data/upper /data/work /data/lower; eicar /data/lower/eicar
             mount -t overlay none -o lowerdir=/data/lower,upperdir=/data/upper,workdir=/data/work /run/merged || exit 0
             cat /run/merged/eicar",
        ),
        (
            "written into an overlay",
            "cat /run/merged/new",
            "eicar /run/merged/new; cat /run/merged/new; status=$?; umount /run/merged; exit $status",
        ),
        (
            "on a tmpfs in a new mount namespace",
            "unshare -m sh -c 'mount -t tmpfs none /mnt; …; cat /mnt/eicar'",
            "export A B; unshare -m sh -c 'mount -t tmpfs none /mnt; sh -c \"printf %s%s \\\"\\$A\\\" \\\"\\$B\\\" > /mnt/eicar\"; cat /mnt/eicar'",
        ),
    ];
    for (way, what, script) in ways {
        let output = show(guest, what, script)?;
        expect_denied(&output, way)?;
    }
    Ok(())
}

fn status(lab: &Lab) -> anyhow::Result<Value> {
    let output = lab.cli(["--json", "status"])?;
    ensure!(output.status.success(), "seawall status: {}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn scans(lab: &Lab) -> anyhow::Result<u64> {
    status(lab)?["counters"]["scans"].as_u64().context("the service counts its scans")
}

fn shared(lab: &Lab, g1: &Guest, g2: &Guest) -> anyhow::Result<()> {
    told("What one guest's content was found to be, the next guest need not ask again.");
    let content: Vec<u8> = (0..300_000_u32).map(|n| (n * 7 % 251) as u8).collect();
    let mut counts = vec![scans(lab)?];
    for guest in [g1, g2] {
        guest.push_bytes(&content, "/data/manual.pdf", 0o644)?;
        let output = guest.sh("wc -c < /data/manual.pdf")?.ok()?;
        ensure!(output.text().trim() == "300000", "{output:?}");
        counts.push(scans(lab)?);
        println!(
            "   {} opened a file of 300,000 bytes; scans so far: {}",
            guest.name(),
            counts[counts.len() - 1]
        );
    }
    ensure!(counts[1] > counts[0], "the first guest's new content was not scanned");
    ensure!(counts[2] == counts[1], "the second guest's content was scanned again");
    Ok(())
}

fn exposed(guest: &Guest) -> anyhow::Result<u64> {
    let status = guest.exec(["/usr/lib/seawall/seawall-agent", "status", "--json"])?;
    let status: Value = serde_json::from_slice(&status.stdout)?;
    let number = |key: &str| status[key].as_u64().context("the driver counts what it let through");
    Ok(number("exposed")? - number("held_by_writer")?)
}

fn service_killed(lab: &Lab, guest: &Guest) -> anyhow::Result<()> {
    told("The service is killed. Nothing hangs: the fail modes hold.");
    guest.sh(
        "cp /bin/busybox /data/tool; chmod 777 /data/tool; echo new > /data/note; echo x > /data/y",
    )?;
    lab.kill_daemon()?;
    // An access waits a moment for a lost link to come back.
    let output = show(guest, "cat /data/note      (an open fails open)", "cat /data/note")?;
    ensure!(output.success(), "an open must go on: {output:?}");
    let script = "/data/tool true";
    let output = show(
        guest,
        "/data/tool          (a program that any user may write fails closed)",
        script,
    )?;
    ensure!(!output.success(), "a program that any user may write must not run");
    let let_through = exposed(guest)?;
    println!("   {} files were let through unscanned and wait for their scan.", let_through);
    ensure!(let_through > 0, "what was let through must be noted");
    lab.start_daemon()?;
    guest.wait_protected(Duration::from_secs(30))?;
    let until = Instant::now() + Duration::from_secs(60);
    while exposed(guest)? > 0 {
        ensure!(Instant::now() < until, "what was let through was not scanned");
        std::thread::sleep(Duration::from_millis(500));
    }
    println!("   The service is back; all of them have been scanned.");
    Ok(())
}

fn stopped(guest: &Guest) -> anyhow::Result<()> {
    told(
        "Only when the driver is stopped can EICAR be read; that it was there all along shows that",
    );
    println!("   Seawall denied it, and nothing else did.");
    guest.stop_agent()?;
    let output = show(guest, "wc -c < /data/eicar", "wc -c < /data/eicar")?;
    ensure!(output.success() && output.text().trim() == "68", "{output:?}");
    guest.start_agent()?;
    guest.wait_protected(Duration::from_secs(30))?;
    expect_denied(
        &show(guest, "cat /data/eicar     (driver started again)", "cat /data/eicar")?,
        "again",
    )
}

/// Shows a command of the operator's and what came of it.
fn operator(lab: &Lab, words: &[&str]) -> anyhow::Result<()> {
    println!("   host $ seawall {}", words.join(" "));
    let output = lab.cli(words)?;
    print!("{}", indent(indent(&output.stdout).as_bytes()));
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn quarantined(lab: &Lab, guest: &Guest) -> anyhow::Result<()> {
    told("Where policy says so, what is infected goes to the host's quarantine, and comes back.");
    let look = "stat -c '%A %u:%g %s bytes, %y' /data/report";
    let make = "eicar /data/report; chown 1000:100 /data/report; chmod 640 /data/report
                touch -d '2001-09-09 01:46:40' /data/report";
    let before = show(guest, look, &format!("{make}; {look}"))?;
    lab.set_config(&format!("{POLICY}[policy.action]\ninfected = \"quarantine\"\n"))?;
    operator(lab, &["reload"])?;
    expect_denied(&show(guest, "cat /data/report", "cat /data/report")?, "in the end")?;
    let until = Instant::now() + Duration::from_secs(30);
    while guest.exec(["test", "-e", "/data/report"])?.success() {
        ensure!(Instant::now() < until, "the file did not go");
        std::thread::sleep(Duration::from_millis(100));
    }
    show(guest, "ls /data/report", "ls /data/report")?;
    operator(lab, &["quarantine", "list"])?;
    let list: Value = serde_json::from_slice(&lab.cli(["--json", "quarantine", "list"])?.stdout)?;
    let ours = list["entries"].as_array().into_iter().flatten();
    let id =
        ours.filter(|entry| entry["path"] == "/data/report").find_map(|one| one["id"].as_str());
    operator(lab, &["quarantine", "restore", id.context("it is in the list")?])?;
    let after = show(guest, look, look)?;
    ensure!(before.success() && after.stdout == before.stdout, "{before:?}\n{after:?}");
    let read = "wc -c < /data/report   (what was restored is approved for this guest)";
    let output = show(guest, read, "wc -c < /data/report")?;
    ensure!(output.success() && output.text().trim() == "68", "{output:?}");
    Ok(())
}

fn costs(lab: &Lab) -> anyhow::Result<()> {
    told("What it costs:");
    // The driver measures its memory every five seconds.
    std::thread::sleep(Duration::from_secs(7));
    let guests = lab.cli(["guests"])?;
    print!("{}", indent(&guests.stdout));
    let status = lab.cli(["status"])?;
    print!("{}", indent(&status.stdout));
    let output = lab.cli(["--json", "guests"])?;
    let guests: Value = serde_json::from_slice(&output.stdout)?;
    for guest in guests.as_array().context("a list of guests")? {
        let driver = &guest["session"]["counters"];
        let memory = driver["memory_kib"].as_u64().context("the driver tells its memory")?;
        let cpu = driver["cpu_ms"].as_u64().unwrap_or(0);
        println!(
            "   driver and supervisor in {}: {memory} KiB, {cpu} ms of CPU",
            guest["name"].as_str().unwrap_or_default()
        );
        ensure!(memory > 0 && memory <= 4096, "the driver takes {memory} KiB, more than 4 MiB");
    }
    Ok(())
}

fn indent(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).lines().map(|line| format!("   {line}\n")).collect()
}
