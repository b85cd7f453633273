//! A minimal client of QEMU's control protocol (docs/interop/qmp-spec.txt).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::{Value, json};

/// Runs one command and returns its result.
pub fn execute(socket: &Path, command: &str, arguments: Value) -> anyhow::Result<Value> {
    let stream = UnixStream::connect(socket)
        .with_context(|| format!("QEMU does not answer at {}", socket.display()))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut greeting = String::new();
    reader.read_line(&mut greeting)?;
    ask(&stream, &mut reader, "qmp_capabilities", &json!({}))?;
    ask(&stream, &mut reader, command, &arguments)
}

/// Asks the QEMU guest agent inside a Debian guest; it sends no greeting.
pub fn ask_guest_agent(socket: &Path, command: &str, arguments: Value) -> anyhow::Result<Value> {
    let stream = UnixStream::connect(socket)
        .with_context(|| format!("no guest agent at {}", socket.display()))?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    ask(&stream, &mut BufReader::new(stream.try_clone()?), command, &arguments)
}

fn ask(
    mut stream: &UnixStream,
    reader: &mut impl BufRead,
    command: &str,
    arguments: &Value,
) -> anyhow::Result<Value> {
    writeln!(stream, "{}", json!({ "execute": command, "arguments": arguments }))?;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            bail!("QEMU closed its control socket during {command}");
        }
        let mut answer: Value = serde_json::from_str(&line)?;
        if let Some(error) = answer.get("error") {
            bail!(
                "QEMU refuses {command}: {}",
                error["desc"].as_str().unwrap_or("without a reason")
            );
        }
        // Events come between.
        if let Some(result) = answer.get_mut("return") {
            return Ok(result.take());
        }
    }
}
