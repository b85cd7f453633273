//! seawall, the operator's command. It asks the host service over its REST interface and nothing
//! else; [`render`] makes the answers fit for people.

mod quarantine;
mod render;
mod scan;

use anyhow::Context;
use clap::{Parser, Subcommand};
use render::Style;
use seawall_client::{Client, ClientError, DEFAULT_SOCKET, Event, Verdict};
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

/// What went well.
const OK: u8 = 0;
/// `scan` found malware.
const INFECTED: u8 = 1;
/// Nobody answers at the service's socket.
const UNREACHABLE: u8 = 3;
/// Anything else that went wrong.
const FAILED: u8 = 4;

/// Asks the Seawall host service how it and its guests are, and has it scan files.
#[derive(Debug, Parser)]
#[command(
    name = "seawall",
    version,
    after_help = "\
Examples:
  seawall status                          is everything as it should be?
  seawall guests                          which guests are protected, and what their drivers say
  seawall events --follow                 what was denied or let through unscanned, as it happens
  seawall scan download.bin               is this file infected?
  curl -s URL | seawall scan -            the same for what comes through a pipe
  seawall --json guests | jq '.[].state'  for programs: the service's own answer

Exit codes: 0 all went well; 1 `scan` found malware; 2 wrong use; 3 the service cannot be reached;
4 something else went wrong (`scan` came to no verdict, `reload` was refused)."
)]
struct Arguments {
    /// The service's socket.
    #[arg(long, global = true, env = "SEAWALL_SOCKET", value_name = "PATH", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// Print the service's answer as JSON; events one object a line.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// How the service is: engines, guests, what was done, what it costs.
    Status,
    /// All configured guests: protected or not and why, their drivers, what is not watched.
    Guests,
    /// What happened: denials, accesses let through unscanned, alarms, engines.
    #[command(after_help = "\
Examples:
  seawall events                  the last 50
  seawall events --limit 1000     as many as the service keeps at hand; the events file has them all
  seawall events --follow         go on with those that come, until Ctrl-C
  seawall --json events --follow | jq 'select(.verdict == \"infected\")'")]
    Events {
        /// Go on with those that come.
        #[arg(long, short)]
        follow: bool,
        /// How many of the last ones, at most 1000.
        #[arg(long, short = 'n', value_name = "COUNT", default_value_t = 50,
              value_parser = clap::value_parser!(u16).range(0..=1000))]
        limit: u16,
    },
    /// Have the service scan a file: exit code 1 when it is infected.
    #[command(after_help = "\
Examples:
  seawall scan setup.exe && echo fine
  tar c folder | seawall scan -")]
    Scan {
        /// The file; `-` reads what comes through a pipe.
        file: PathBuf,
    },
    /// Infected files that were taken out of their guests: look, give back, delete, approve.
    #[command(after_help = "\
Examples:
  seawall quarantine list
  seawall quarantine show 3f              the first digits of an id are enough
  seawall quarantine restore 3f           asks before it replaces a file
  seawall quarantine approve HASH         a false alarm: let this content pass")]
    Quarantine {
        #[command(subcommand)]
        command: quarantine::Quarantine,
    },
    /// Have the service read its configuration and the engines' signatures again.
    Reload,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = runtime
        .context("the program cannot set itself up")
        .and_then(|runtime| runtime.block_on(run(&arguments)));
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) if is_closed_pipe(&error) => ExitCode::from(OK),
        Err(error) => {
            let (code, advice) = advise(&error);
            // What an error quotes may come from a file's name or from the service.
            eprintln!("seawall: {}", seawall_client::text::printable(&format!("{error:#}")));
            if let Some(advice) = advice {
                eprintln!("{advice}");
            }
            ExitCode::from(code)
        }
    }
}

/// Whoever read our output has seen enough.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn advise(error: &anyhow::Error) -> (u8, Option<&'static str>) {
    match error.downcast_ref::<ClientError>() {
        Some(ClientError::Unreachable { reason, .. }) => {
            let advice = match reason.kind() {
                io::ErrorKind::PermissionDenied => {
                    "Only the service's own user may open this socket: run seawall as that user (often root)."
                }
                io::ErrorKind::NotFound => {
                    "There is no such socket: start seawalld, or name its api_socket with --socket or SEAWALL_SOCKET."
                }
                _ => "Is seawalld running? Its log says why if it ended; start it and try again.",
            };
            (UNREACHABLE, Some(advice))
        }
        Some(ClientError::Answer { .. }) => (
            FAILED,
            Some("seawall and seawalld may be of different versions: compare `seawall --version`."),
        ),
        _ => (FAILED, None),
    }
}

async fn run(arguments: &Arguments) -> anyhow::Result<u8> {
    let client = Client::new(&arguments.socket);
    let style = Style::of_stdout();
    let json = arguments.json;
    match &arguments.command {
        Command::Status => {
            let status = client.status().await?;
            print(json, &status, || render::status(&status, style))?;
            Ok(OK)
        }
        Command::Guests => {
            let guests = client.guests().await?;
            print(json, &guests, || render::guests(&guests))?;
            Ok(OK)
        }
        Command::Events { follow, limit } => {
            events(&client, json, *follow, (*limit).into()).await?;
            Ok(OK)
        }
        Command::Scan { file } => {
            let report = scan::scan(&client, file).await?;
            print(json, &report, || render::scan(&report, style))?;
            Ok(match report.verdict {
                Verdict::Clean => OK,
                Verdict::Infected => INFECTED,
                Verdict::Error | Verdict::TimedOut => FAILED,
            })
        }
        Command::Quarantine { command } => quarantine::run(&client, json, style, command).await,
        Command::Reload => {
            let reload = client.reload().await?;
            print(json, &reload, || render::reload(&reload))?;
            Ok(if reload.taken { OK } else { FAILED })
        }
    }
}

/// Prints an answer for programs or for people.
fn print<T>(json: bool, answer: &T, text: impl FnOnce() -> String) -> anyhow::Result<()>
where
    T: serde::Serialize,
{
    let mut out = io::stdout().lock();
    if json {
        serde_json::to_writer_pretty(&mut out, answer).map_err(io::Error::from)?;
        writeln!(out)?;
    } else {
        write!(out, "{}", text())?;
    }
    Ok(out.flush()?)
}

async fn events(client: &Client, json: bool, follow: bool, limit: usize) -> anyhow::Result<()> {
    let mut lines = client.events(limit, follow).await?;
    let mut all = Vec::new();
    while let Some(line) = lines.next().await? {
        if json {
            writeln!(io::stdout(), "{line}")?;
            continue;
        }
        let event: Event = serde_json::from_str(&line).context("an event is not understood")?;
        if follow {
            writeln!(io::stdout(), "{}", render::event_line(&event))?;
        } else {
            all.push(event);
        }
    }
    if !json && !follow {
        write!(io::stdout(), "{}", render::events(&all))?;
    }
    Ok(io::stdout().flush()?)
}
