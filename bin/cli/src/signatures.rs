//! `seawall signatures`.

use crate::progress::Progress;
use crate::render::{self, Style};
use crate::{FAILED, OK, print};
use anyhow::Context;
use clap::Subcommand;
use seawall_client::{ApplyRequest, Client, RollbackRequest, SignatureChange};
use std::path::{Path, PathBuf};

#[derive(Debug, Subcommand)]
pub enum Signatures {
    /// The sets that are kept, the newest last: what each engine has of it, and which is in use.
    List,
    /// Load a folder's signatures and try them, and leave everything as it is.
    Check {
        /// The folder, on the service's host.
        folder: PathBuf,
    },
    /// Take a folder's signatures into use, if they are right. It goes on when this command is ended.
    Apply {
        /// The folder, on the service's host.
        folder: PathBuf,
    },
    /// Go back to the set that was in use before, or to any that is kept. For a while after a change this
    /// takes no time: the engines of the set before are still loaded.
    Rollback {
        /// The set's name, or enough of its first digits; the one before without it.
        set: Option<String>,
    },
    /// All changes, and what was refused and why, the newest last.
    History,
}

pub async fn run(
    client: &Client,
    json: bool,
    style: Style,
    command: &Signatures,
) -> anyhow::Result<u8> {
    match command {
        Signatures::List => {
            let sets = client.signatures().await?;
            print(json, &sets, || render::signatures::list(&sets, style))?;
            Ok(OK)
        }
        Signatures::History => {
            let history = client.signature_history().await?;
            print(json, &history, || render::signatures::history(&history, style))?;
            Ok(OK)
        }
        Signatures::Check { folder } => {
            let wanted = ApplyRequest { folder: absolute(folder)?, check: true };
            let working = Progress::of_work("the engines load the new signatures");
            let change = client.apply_signatures(&wanted).await;
            working.clear();
            told(json, style, &change?)
        }
        Signatures::Apply { folder } => {
            let wanted = ApplyRequest { folder: absolute(folder)?, check: false };
            let working = Progress::of_work("the engines load the new signatures");
            let change = client.apply_signatures(&wanted).await;
            working.clear();
            told(json, style, &change?)
        }
        Signatures::Rollback { set } => {
            let working = Progress::of_work("the engines go back");
            let change = client.roll_back_signatures(&RollbackRequest { set: set.clone() }).await;
            working.clear();
            told(json, style, &change?)
        }
    }
}

fn told(json: bool, style: Style, change: &SignatureChange) -> anyhow::Result<u8> {
    print(json, change, || render::signatures::change(change, style))?;
    Ok(if change.taken { OK } else { FAILED })
}

fn absolute(folder: &Path) -> anyhow::Result<String> {
    let path = std::path::absolute(folder).with_context(|| folder.display().to_string())?;
    let path =
        path.to_str().with_context(|| format!("{}: the name is not UTF-8", path.display()))?;
    Ok(path.to_owned())
}
