//! The control socket: one request line, one answer. Only root can open it.
//!
//! `status` answers with JSON; `stop` takes all marks away and ends worker and supervisor. `policy` and
//! `retire` are what a newly started driver says to one that it finds: before it sets marks, so that
//! its fail modes are right from the first access on, and once it has marks of its own.

use crate::driver::Driver;
use crate::status::Status;
use crate::worker;
use anyhow::Context;
use seawall_proto::Policy;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// How long a peer of the control socket may take for a step.
const STEP: Duration = Duration::from_secs(5);
/// How long a driver may take to end, in seconds.
const END: Duration = Duration::from_secs(10);

/// Answers requests for ever.
pub fn serve(driver: &Driver, listener: &UnixListener, link: &str) {
    for stream in listener.incoming().flatten() {
        let _told_in_vain = answer(driver, stream, link);
    }
}

/// Binds the control socket, readable by root alone.
pub fn bind(path: &Path) -> std::io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let _stale = std::fs::remove_file(path);
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o600))?;
    Ok(listener)
}

fn answer(driver: &Driver, mut stream: UnixStream, link: &str) -> std::io::Result<()> {
    stream.set_read_timeout(Some(STEP))?;
    stream.set_write_timeout(Some(STEP))?;
    let mut line = String::new();
    BufReader::new((&stream).take(64)).read_line(&mut line)?;
    match line.trim_end() {
        "status" => {
            serde_json::to_writer(&mut stream, &Status::of(driver, link))?;
            stream.write_all(b"\n")
        }
        "policy" => {
            serde_json::to_writer(&mut stream, &**driver.policy())?;
            stream.write_all(b"\n")
        }
        "stop" | "retire" => {
            worker::unmark(driver);
            stream.write_all(b"ok\n")?;
            worker::end(driver)
        }
        _ => stream.write_all(b"unknown request\n"),
    }
}

fn ask(path: &Path, request: &str, patience: Duration) -> std::io::Result<String> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(patience))?;
    stream.write_all(format!("{request}\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Asks another driver to end, and waits until it has. Returns whether one answered.
pub fn retire_other(path: &Path) -> bool {
    ask(path, "retire", END).is_ok_and(|answer| !answer.is_empty())
}

/// The policy of another driver, if there is one.
pub fn policy_of_other(path: &Path) -> Option<Policy> {
    serde_json::from_str(&ask(path, "policy", STEP).ok()?).ok()
}

/// `seawall-agent status`.
pub fn print_status(path: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let answer = ask(path, "status", STEP).with_context(|| {
        format!("no driver answers at {}; is `seawall-agent run` running?", path.display())
    })?;
    let status: Status = serde_json::from_str(&answer).context("the driver's answer is cut off")?;
    if json {
        println!("{}", serde_json::to_string_pretty(&status)?);
    } else {
        print!("{}", status.to_text());
    }
    Ok(ExitCode::from(u8::from(!status.protected)))
}

/// `seawall-agent stop`.
pub fn stop(path: &Path) -> anyhow::Result<ExitCode> {
    ask(path, "stop", END).with_context(|| format!("no driver answers at {}", path.display()))?;
    println!("stopped; files are no longer scanned");
    Ok(ExitCode::SUCCESS)
}
