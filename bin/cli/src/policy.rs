//! `seawall policy`

use crate::render::Style;
use crate::{FAILED, OK, print, render};
use clap::Subcommand;
use seawall_client::{Client, ExplainQuery};

#[derive(Debug, Subcommand)]
pub enum Policy {
    /// Whether the files are right as they are now, and whose policy a reload would change. Takes nothing into use.
    Check,
    /// A guest's policy: each setting, and the file and line that it comes from.
    Show {
        /// The guest.
        guest: String,
    },
    /// What happens when a file is opened in a guest, and which line decides it.
    Explain {
        /// The guest.
        guest: String,
        /// The file's path, as the guest's root sees it.
        path: String,
        /// It is executed, not opened.
        #[arg(long)]
        exec: bool,
        /// The program that opens it.
        #[arg(long, value_name = "PROGRAM", conflicts_with = "exec")]
        process: Option<String>,
        /// The user id that this program runs as [default: 0].
        #[arg(long, value_name = "UID", requires = "process")]
        user: Option<u32>,
        /// The user id of the file's owner.
        #[arg(long, value_name = "UID")]
        owner: Option<u32>,
        /// The type of its file system, like squashfs.
        #[arg(long, value_name = "TYPE")]
        file_system: Option<String>,
        /// Its content, as events and `seawall scan` show it.
        #[arg(long, value_name = "BLAKE3")]
        hash: Option<String>,
        /// What the engines find in it.
        #[arg(long, value_name = "NAME")]
        detection: Option<String>,
        /// How grave that is.
        #[arg(long, value_parser = ["low", "medium", "high", "critical"])]
        severity: Option<String>,
    },
}

pub async fn run(
    client: &Client,
    json: bool,
    style: Style,
    command: &Policy,
) -> anyhow::Result<u8> {
    match command {
        Policy::Check => {
            let check = client.check_policy().await?;
            print(json, &check, || render::policy::check(&check, style))?;
            Ok(if check.right { OK } else { FAILED })
        }
        Policy::Show { guest } => {
            let policy = client.guest_policy(guest).await?;
            print(json, &policy, || render::policy::show(&policy))?;
            Ok(OK)
        }
        Policy::Explain {
            guest,
            path,
            exec,
            process,
            user,
            owner,
            file_system,
            hash,
            detection,
            severity,
        } => {
            let access = ExplainQuery {
                path: path.clone(),
                exec: *exec,
                process: process.clone(),
                user: *user,
                owner: *owner,
                file_system: file_system.clone(),
                hash: hash.clone(),
                detection: detection.clone(),
                severity: severity.clone(),
            };
            let explanation = client.explain_policy(guest, &access).await?;
            print(json, &explanation, || render::policy::explain(&explanation, style))?;
            Ok(OK)
        }
    }
}
