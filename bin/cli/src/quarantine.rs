//! `seawall quarantine`.

use crate::progress::Progress;
use crate::render::{self, Style};
use crate::{FAILED, OK, print};
use anyhow::{Context, bail};
use clap::Subcommand;
use seawall_client::{Approval, Client, ClientError, RestoreRequest};
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub enum Quarantine {
    /// What is in quarantine, newest first.
    List {
        /// Of this guest alone.
        #[arg(long)]
        guest: Option<String>,
    },
    /// All that is known of one entry.
    Show {
        /// The entry's id, or enough of its first digits.
        id: String,
    },
    /// Give a file back to its guest, with owner, mode, ACL, times, extended attributes and holes. Its
    /// content is approved for that guest, so that it is not caught again; `revoke` takes that back.
    #[command(after_help = "\
Examples:
  seawall quarantine restore 3f
  seawall quarantine restore 3f --to web02:/tmp/sample
  seawall quarantine restore 3f --to web02:             same path, another guest
  seawall quarantine restore 3f --to :/tmp/sample       same guest, another path
  seawall quarantine restore 3f --overwrite")]
    Restore {
        /// The entry's id, or enough of its first digits.
        id: String,
        /// Another guest, or another path, or both.
        #[arg(long, value_name = "GUEST:PATH")]
        to: Option<String>,
        /// Replace a file that is there, without asking.
        #[arg(long)]
        overwrite: bool,
    },
    /// Write a content to a file on this host. It is malware: handle it so.
    Export {
        /// The entry's id, or enough of its first digits.
        id: String,
        /// The file to make; one that is there is not touched. `-` is for a pipe.
        file: PathBuf,
    },
    /// Delete an entry for good.
    Delete {
        /// The entry's id, or enough of its first digits.
        id: String,
        /// Do not ask.
        #[arg(long, short)]
        yes: bool,
    },
    /// Let a content pass although it is detected: a false alarm.
    Approve {
        /// BLAKE3 of the content, as `show` tells it.
        hash: String,
        /// In this guest alone; in all without it.
        #[arg(long)]
        guest: Option<String>,
    },
    /// Take an approval back.
    Revoke {
        /// BLAKE3 of the content.
        hash: String,
        /// The one of this guest; all of this content without it.
        #[arg(long)]
        guest: Option<String>,
    },
    /// The contents that pass.
    Approvals,
}

pub async fn run(
    client: &Client,
    json: bool,
    style: Style,
    command: &Quarantine,
) -> anyhow::Result<u8> {
    match command {
        Quarantine::List { guest } => {
            let all = client.quarantine(guest.as_deref()).await?;
            print(json, &all, || render::quarantine(&all))?;
        }
        Quarantine::Show { id } => {
            let entry = client.quarantine_entry(id).await?;
            print(json, &entry, || render::quarantine_entry(&entry, style))?;
        }
        Quarantine::Restore { id, to, overwrite } => {
            let (guest, path) = target(to.as_deref())?;
            let to_guest = guest.clone();
            let wanted = RestoreRequest { guest, path, overwrite: *overwrite };
            let working = Progress::of_work("the guest takes the file back");
            let first = client.restore(id, &wanted).await;
            working.clear();
            let entry = match first {
                Err(ClientError::Refused(fault)) if fault.code == "exists" && may_ask() => {
                    if !ask("There is a file at that path. Replace it?")? {
                        println!("Nothing was changed.");
                        return Ok(FAILED);
                    }
                    let working = Progress::of_work("the guest takes the file back");
                    let wanted = RestoreRequest { overwrite: true, ..wanted };
                    let second = client.restore(id, &wanted).await;
                    working.clear();
                    second?
                }
                answer => answer?,
            };
            print(json, &entry, || {
                let guest = to_guest.as_deref().unwrap_or(&entry.guest);
                let hash = &entry.hash;
                render::quarantine_entry(&entry, style)
                    + &format!(
                        "\nThis content is approved for {guest} now, so that it is not caught again.\n\
                         `seawall quarantine revoke {hash} --guest {guest}` takes that back.\n"
                    )
            })?;
        }
        Quarantine::Export { id, file } => export(client, id, file).await?,
        Quarantine::Delete { id, yes } => {
            let entry = client.quarantine_entry(id).await?;
            if !yes {
                if !may_ask() {
                    bail!("deleting is for good: say --yes where nobody can be asked");
                }
                eprint!("{}", render::quarantine_entry(&entry, style));
                if !ask("Delete it for good?")? {
                    println!("Nothing was changed.");
                    return Ok(FAILED);
                }
            }
            let entry = client.delete_quarantined(&entry.id).await?;
            print(json, &entry, || format!("deleted {}\n", entry.id))?;
        }
        Quarantine::Approve { hash, guest } => {
            let all = client.approve(&approval(hash, guest.as_deref())).await?;
            print(json, &all, || render::approvals(&all))?;
        }
        Quarantine::Revoke { hash, guest } => {
            let all = client.revoke(&approval(hash, guest.as_deref())).await?;
            print(json, &all, || render::approvals(&all))?;
        }
        Quarantine::Approvals => {
            let all = client.approvals().await?;
            print(json, &all, || render::approvals(&all))?;
        }
    }
    Ok(OK)
}

fn approval(hash: &str, guest: Option<&str>) -> Approval {
    Approval { hash: hash.to_owned(), guest: guest.map(str::to_owned), since: String::new() }
}

/// `GUEST:PATH`, `GUEST:` or `:PATH`.
fn target(to: Option<&str>) -> anyhow::Result<(Option<String>, Option<String>)> {
    let Some(to) = to else { return Ok((None, None)) };
    let (guest, path) =
        to.split_once(':').context("--to takes GUEST:PATH, like web02:/tmp/sample")?;
    if !path.is_empty() && !path.starts_with('/') {
        bail!("the path in --to must be absolute: {guest}:/{path}");
    }
    let given = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    Ok((given(guest), given(path)))
}

fn may_ask() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

fn ask(question: &str) -> io::Result<bool> {
    eprint!("{question} [y/N] ");
    io::stderr().flush()?;
    let mut line = String::new();
    io::stdin().read_line(&mut line)?;
    Ok(matches!(line.trim(), "y" | "Y" | "yes"))
}

async fn export(client: &Client, id: &str, file: &std::path::Path) -> anyhow::Result<()> {
    let size = client.quarantine_entry(id).await?.size;
    let mut content = client.quarantined_content(id).await?;
    if file.as_os_str() == "-" {
        if io::stdout().is_terminal() {
            bail!("malware is not written to a terminal; name a file, or pipe it on");
        }
        let mut out = io::stdout().lock();
        while let Some(piece) = content.next().await? {
            out.write_all(&piece)?;
        }
        return Ok(out.flush()?);
    }
    let shown = file.display();
    let mut out = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(file)
        .with_context(|| format!("{shown} cannot be made"))?;
    let progress = Progress::of_bytes(Some(size), "written");
    let mut write = async || -> anyhow::Result<()> {
        while let Some(piece) = content.next().await? {
            progress.add(piece.len());
            out.write_all(&piece).with_context(|| format!("{shown} cannot be written"))?;
        }
        out.sync_all().with_context(|| format!("{shown} cannot be written"))
    };
    let written = write().await;
    progress.clear();
    if let Err(error) = written {
        // Half a content is worth nothing, and may look like a whole one.
        let _ = std::fs::remove_file(file);
        return Err(error);
    }
    eprintln!("{shown} holds malware: handle it so");
    Ok(())
}
