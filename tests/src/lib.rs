//! What the end-to-end stories share: what was seen so far, the service's and the driver's own view,
//! and the programs that are built for these tests alone.
//!
//! A story boots its guests once and looks at many things. [`Checks`] notes each one, goes on after
//! one that is not as told, and fails the test at the end with all of them.

use std::fmt::Debug;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use seawall_client::{Event, EventKind, Status, Verdict};
use seawall_lab::{Guest, Kernel, Lab, LabOptions, Link, Output, eicar};
use serde::de::DeserializeOwned;

/// EPERM, errno(3).
pub const EPERM: i32 = 1;

/// What a story has seen.
#[derive(Debug)]
pub struct Checks {
    story: String,
    since: Instant,
    failures: Vec<String>,
    done: bool,
}

impl Checks {
    /// Begins a story.
    pub fn of(story: impl Into<String>) -> Self {
        let story = story.into();
        println!("--- {story}");
        Self { story, since: Instant::now(), failures: Vec::new(), done: false }
    }

    /// Notes one thing; `seen` is shown when it is not as told.
    pub fn that(&mut self, told: &str, is_so: bool, seen: impl Debug) {
        let at = self.since.elapsed().as_secs_f32();
        if is_so {
            println!("{at:6.1} s  ok      {told}");
        } else {
            println!("{at:6.1} s  NOT SO  {told}: {seen:?}");
            self.failures.push(format!("{told}: {seen:?}"));
        }
    }

    /// Waits until it is so.
    pub fn soon(&mut self, told: &str, within: Duration, mut look: impl FnMut() -> bool) {
        let so = eventually(within, &mut look);
        self.that(told, so, format_args!("not within {within:?}"));
    }

    /// The access was refused with EPERM.
    pub fn denied(&mut self, told: &str, output: &Output) {
        self.that(&format!("denied: {told}"), is_denied(output), shown(output));
    }

    /// Ends the story.
    ///
    /// # Panics
    /// When anything was not as told.
    pub fn end(mut self) {
        self.done = true;
        println!("--- {:.1} s: {}", self.since.elapsed().as_secs_f32(), self.story);
        assert!(
            self.failures.is_empty(),
            "{}: {} not as told\n{}",
            self.story,
            self.failures.len(),
            self.failures.join("\n")
        );
    }
}

impl Drop for Checks {
    fn drop(&mut self) {
        // A story that broke off shows what it had found by then.
        if !self.done {
            eprintln!("{} broke off; not as told: {:#?}", self.story, self.failures);
        }
    }
}

/// Whether a command was refused with EPERM, and got nothing.
pub fn is_denied(output: &Output) -> bool {
    let says_so = String::from_utf8_lossy(&output.stderr).contains("Operation not permitted");
    !output.success()
        && !output.timed_out
        && output.stdout.is_empty()
        && (says_so || output.errno == Some(EPERM))
}

/// A command's end in words.
pub fn shown(output: &Output) -> String {
    let Output { status, timed_out, errno, .. } = output;
    let (out, err) = (output.text(), output.error_text());
    format!("status {status}, timed out {timed_out}, errno {errno:?}; stdout: {out}; stderr: {err}")
}

/// Looks again and again.
pub fn eventually(within: Duration, mut look: impl FnMut() -> bool) -> bool {
    let until = Instant::now() + within;
    loop {
        if look() {
            return true;
        }
        if Instant::now() >= until {
            return false;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Options of a lab for one story. With `SEAWALL_TESTS_KEEP` set the lab stays up, to be looked at with
/// `cargo xtask lab --name NAME`.
pub fn options(guests: u32, kernel: Kernel, link: Link) -> LabOptions {
    let keep = std::env::var_os("SEAWALL_TESTS_KEEP").is_some();
    LabOptions { guests, kernel, link, keep, ..LabOptions::for_test() }
}

/// Boots a lab. An emulated machine with two processors now and then does not survive that its kernel
/// patches its own code while it boots; it gets another chance, and nothing else does.
pub fn up(options: LabOptions) -> anyhow::Result<Lab> {
    for _ in 0..3 {
        match Lab::up(options.clone()) {
            Err(error) if format!("{error:#}").contains("Kernel panic") => {
                println!("  a kernel did not come up; again: {error:#}");
                Lab::down(&options.name)?;
            }
            result => return result,
        }
    }
    Lab::up(options)
}

/// A shell script that EICAR is part of; it prints `ran` if it runs.
pub fn infected_script() -> Vec<u8> {
    [b"#!/bin/sh\necho ran\n# ".as_slice(), &eicar(), b"\n"].concat()
}

/// A program that EICAR is part of: busybox, which runs in every guest, and the bytes behind it.
pub fn infected_program() -> anyhow::Result<Vec<u8>> {
    let mut program = std::fs::read("/bin/busybox").context("cannot read /bin/busybox")?;
    program.extend_from_slice(&eicar());
    Ok(program)
}

/// Asks the operator's command line, as a program does.
pub fn ask<T: DeserializeOwned>(lab: &Lab, words: &[&str]) -> anyhow::Result<T> {
    let output = lab.cli(["--json"].iter().chain(words))?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "seawall {words:?}: {}\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_str(&text).with_context(|| format!("seawall {words:?}: {text}"))
}

/// `seawall --json status`.
pub fn service_status(lab: &Lab) -> anyhow::Result<Status> {
    // Unhealthy has an exit status of its own; the tests look at the fields.
    let output = lab.cli(["--json", "status"])?;
    serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())
}

/// One guest as `seawall --json guests` shows it.
pub fn guest_view(lab: &Lab, name: &str) -> anyhow::Result<seawall_client::Guest> {
    let guests: Vec<seawall_client::Guest> = ask(lab, &["guests"])?;
    guests.into_iter().find(|guest| guest.name == name).with_context(|| format!("no {name}"))
}

/// All events since the lab began, as the operator sees them.
pub fn events(lab: &Lab) -> anyhow::Result<Vec<Event>> {
    let output = lab.cli(["--json", "events", "--limit", "100000"])?;
    let text = String::from_utf8(output.stdout)?;
    ensure!(output.status.success(), "seawall events: {}", String::from_utf8_lossy(&output.stderr));
    text.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
}

/// Whether an event of this kind is there for which `fits` holds.
pub fn has_event(lab: &Lab, kind: EventKind, fits: impl Fn(&Event) -> bool) -> bool {
    let events = events(lab).unwrap_or_default();
    events.iter().any(|event| event.kind == kind && fits(event))
}

/// Whether a file was found infected in a guest.
pub fn is_reported(lab: &Lab, guest: &Guest, path: &str) -> bool {
    has_event(lab, EventKind::Verdict, |event| {
        event.guest.as_deref() == Some(guest.name())
            && event.path.as_deref() == Some(path)
            && event.verdict == Some(Verdict::Infected)
    })
}

/// The driver's own view, `seawall-agent status --json`; its exit status is not looked at.
pub fn driver_status(guest: &Guest) -> anyhow::Result<serde_json::Value> {
    let output = guest.agent_status()?;
    serde_json::from_slice(&output.stdout)
        .with_context(|| format!("seawall-agent status: {output:?}"))
}

/// A number out of the driver's own view.
pub fn driver_number(guest: &Guest, field: &str) -> anyhow::Result<u64> {
    let status = driver_status(guest)?;
    status[field].as_u64().with_context(|| format!("no number `{field}` in {status}"))
}

/// How many files that were let through unscanned wait for a scan that nothing keeps from coming.
pub fn exposed(guest: &Guest) -> anyhow::Result<u64> {
    Ok(driver_number(guest, "exposed")? - driver_number(guest, "held_by_writer")?)
}

/// Defines `unmount DIR` in a shell: as long as a file's content is being sent after its close, umount(8) says
/// that its file system is busy.
pub const UNMOUNT: &str = "unmount() { for n in $(seq 100); do umount \"$1\" 2>/dev/null && return; \
                           sleep 0.1; done; umount \"$1\"; }";

/// What the guest's kernel complains of: a permission event that nobody answers, a task that hangs.
pub fn kernel_complaints(guest: &Guest) -> anyhow::Result<Vec<String>> {
    let words = ["fanotify", "blocked for more than", "hung_task", "BUG:", "Oops", "out of memory"];
    let messages = guest.exec(["dmesg"])?.ok()?.text() + "\n" + &guest.console()?;
    // What the kernel says once of every user of permission events.
    let usual = "Using fanotify permission checks may lead to deadlock";
    let complains =
        |line: &&str| words.iter().any(|word| line.contains(word)) && !line.contains(usual);
    Ok(messages.lines().filter(complains).map(str::to_owned).collect())
}

/// The engine that misbehaves on demand.
pub fn engine_fault() -> anyhow::Result<PathBuf> {
    seawall_lab::build_program("seawall-engine-fault", false)
}

/// The program that makes load and trouble in a guest.
pub fn opener() -> anyhow::Result<PathBuf> {
    seawall_lab::build_program("seawall-opener", true)
}
