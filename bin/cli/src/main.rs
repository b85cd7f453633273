//! seawall, the operator's command. It asks the host service over its REST interface and nothing
//! else; [`render`] makes the answers fit for people.

mod command;
mod golden;
mod pages;
mod policy;
mod progress;
mod quarantine;
mod render;
mod scan;
mod scans;
mod signatures;
mod when;

use anyhow::Context;
use clap::Parser;
use command::{Arguments, Command, Wanted};
use render::Style;
use seawall_client::{Client, ClientError, Event, Verdict};
use std::io::{self, Write};
use std::process::ExitCode;

/// What went well.
const OK: u8 = 0;
/// `scan` found malware.
const INFECTED: u8 = 1;
/// The service does not understand what was asked; clap uses the same.
const WRONG_USE: u8 = 2;
/// Nobody answers at the service's socket.
const UNREACHABLE: u8 = 3;
/// Anything else that went wrong.
const FAILED: u8 = 4;

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
        // The service says what is wrong with a filter and what would be right.
        Some(ClientError::Refused(fault)) if fault.code == "wrong-filter" => {
            (WRONG_USE, Some("See `seawall events --help`."))
        }
        Some(ClientError::Broken(_)) => (
            FAILED,
            Some(
                "The service may have ended: its log says why. Try again, or look with `seawall status`.",
            ),
        ),
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
        Command::Events(wanted) => {
            events(&client, json, wanted, style).await?;
            Ok(OK)
        }
        Command::Scan { targets, groups, all, quick, detach } => {
            let guests =
                scans::Guests { targets, groups, all: *all, quick: *quick, detach: *detach };
            let is_file = match targets.as_slice() {
                [one] => !all && groups.is_empty() && !scans::is_guest(&client, one).await?,
                _ => false,
            };
            let [file] = targets.as_slice() else {
                return scans::scan(&client, json, style, &guests).await;
            };
            if !is_file {
                return scans::scan(&client, json, style, &guests).await;
            }
            anyhow::ensure!(
                !quick && !detach,
                "{file} is no guest: `--quick` and `--detach` are for scans of guests"
            );
            let report = scan::scan(&client, std::path::Path::new(file)).await?;
            print(json, &report, || render::scan(&report, style))?;
            Ok(match report.verdict {
                Verdict::Clean => OK,
                Verdict::Infected => INFECTED,
                Verdict::Error | Verdict::TimedOut => FAILED,
            })
        }
        Command::Quarantine { command } => quarantine::run(&client, json, style, command).await,
        Command::Scans { command } => scans::run(&client, json, style, command.as_ref()).await,
        Command::Schedule { command } => scans::schedule(&client, json, style, command).await,
        Command::Policy { command } => policy::run(&client, json, style, command).await,
        Command::Signatures { command } => signatures::run(&client, json, style, command).await,
        Command::Golden { command } => golden::run(&client, json, style, command).await,
        Command::Reload => {
            let reload = client.reload().await?;
            print(json, &reload, || render::reload(&reload))?;
            Ok(if reload.taken { OK } else { FAILED })
        }
        Command::Completions { shell } => {
            pages::completions(*shell)?;
            Ok(OK)
        }
        Command::Man { folder } => {
            pages::man(folder)?;
            Ok(OK)
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

async fn events(client: &Client, json: bool, wanted: &Wanted, style: Style) -> anyhow::Result<()> {
    let follow = wanted.follow;
    let mut lines = client.events(&wanted.query()).await?;
    let mut all = Vec::new();
    while let Some(line) = lines.next().await? {
        if json {
            writeln!(io::stdout(), "{line}")?;
            continue;
        }
        let event: Event = serde_json::from_str(&line).context("an event is not understood")?;
        if follow {
            writeln!(io::stdout(), "{}", render::event_line(&event, style))?;
        } else {
            all.push(event);
        }
    }
    if !json && !follow {
        write!(io::stdout(), "{}", render::events(&all))?;
    }
    Ok(io::stdout().flush()?)
}
