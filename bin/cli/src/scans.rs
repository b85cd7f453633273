//! `seawall scan GUEST…` and `seawall scans`: scans of guests' files.

use crate::progress::Progress;
use crate::render::Style;
use crate::{FAILED, INFECTED, OK, print, render};
use anyhow::bail;
use clap::Subcommand;
use seawall_client::{Client, GuestScan, GuestScanState, ScanTarget, ScansRequest};
use std::time::Duration;

/// How often it is asked how far they are.
const ASK: Duration = Duration::from_millis(500);

#[derive(Debug, Subcommand)]
pub enum Scans {
    /// One scan: how far it is, what it found, what it left out.
    Show {
        /// Its number.
        id: u64,
    },
    /// Has a scan stop; it goes on where it was with `resume`.
    Pause {
        /// Its number.
        id: u64,
    },
    /// Has a paused scan go on.
    Resume {
        /// Its number.
        id: u64,
    },
    /// Ends a scan.
    Cancel {
        /// Its number.
        id: u64,
    },
}

#[derive(Debug, Subcommand)]
pub enum Schedule {
    /// All schedules: when each ran last, and when it runs next.
    List,
    /// Has one run now, all its guests at once.
    Run {
        /// Its name.
        name: String,
    },
    /// Has its next time left out.
    Skip {
        /// Its name.
        name: String,
    },
}

/// Which guests, and what of them.
#[derive(Debug, Default)]
pub struct Guests<'a> {
    pub targets: &'a [String],
    pub groups: &'a [String],
    pub all: bool,
    pub quick: bool,
    pub detach: bool,
}

/// `GUEST` or `GUEST:PATH`, if the service has a guest of that name.
pub async fn is_guest(client: &Client, target: &str) -> anyhow::Result<bool> {
    let name = target.split_once(':').map_or(target, |(name, _)| name);
    if name.is_empty() || name.contains('/') || name == "-" {
        return Ok(false);
    }
    Ok(client.guests().await?.iter().any(|guest| guest.name == name))
}

/// Has guests scanned, and waits for the end.
pub async fn scan(
    client: &Client,
    json: bool,
    style: Style,
    wanted: &Guests<'_>,
) -> anyhow::Result<u8> {
    let mut targets: Vec<ScanTarget> = Vec::new();
    for target in wanted.targets {
        let (guest, path) = match target.split_once(':') {
            Some((guest, path)) => (guest, Some(path.to_owned())),
            None => (target.as_str(), None),
        };
        match (targets.iter_mut().find(|one| one.guest == guest), path) {
            (Some(one), Some(path)) if !one.paths.is_empty() => one.paths.push(path),
            (Some(_), _) => bail!("{guest} is named as a whole and in parts; name it once"),
            (None, path) => targets
                .push(ScanTarget { guest: guest.to_owned(), paths: path.into_iter().collect() }),
        }
    }
    let request = ScansRequest {
        targets,
        groups: wanted.groups.to_vec(),
        all: wanted.all,
        quick: wanted.quick,
    };
    let mut scans = client.scan_guests(&request).await?;
    if !wanted.detach {
        let numbers: Vec<_> = scans.iter().map(|scan| scan.id).collect();
        scans = wait(client, &numbers).await?;
    }
    print(json, &scans, || {
        if wanted.detach {
            render::scans::list(&scans, style)
        } else {
            scans.iter().map(|scan| render::scans::show(scan, style)).collect::<Vec<_>>().join("\n")
        }
    })?;
    let ended = |state| scans.iter().all(|scan| scan.state == state);
    Ok(match () {
        () if scans.iter().any(|scan| scan.infected > 0) => INFECTED,
        () if wanted.detach || ended(GuestScanState::Done) => OK,
        () => FAILED,
    })
}

/// Until all have ended, or the operator paused them.
pub async fn wait(client: &Client, numbers: &[u64]) -> anyhow::Result<Vec<GuestScan>> {
    let progress = Progress::of_work("being scanned");
    loop {
        let mut all = Vec::new();
        for id in numbers {
            all.push(client.guest_scan(*id).await?);
        }
        let goes_on =
            |scan: &GuestScan| !scan.state.has_ended() && scan.state != GuestScanState::Paused;
        if !all.iter().any(goes_on) {
            progress.clear();
            return Ok(all);
        }
        progress.say(&format!("{{spinner}} {}", render::scans::line(&all)));
        tokio::time::sleep(ASK).await;
    }
}

/// `seawall scans`
pub async fn run(
    client: &Client,
    json: bool,
    style: Style,
    command: Option<&Scans>,
) -> anyhow::Result<u8> {
    let (id, order) = match command {
        None => {
            let scans = client.scans().await?;
            print(json, &scans, || render::scans::list(&scans, style))?;
            return Ok(OK);
        }
        Some(Scans::Show { id }) => (id, None),
        Some(Scans::Pause { id }) => (id, Some("pause")),
        Some(Scans::Resume { id }) => (id, Some("resume")),
        Some(Scans::Cancel { id }) => (id, Some("cancel")),
    };
    let scan = match order {
        None => client.guest_scan(*id).await?,
        Some(order) => client.order_scan(*id, order).await?,
    };
    print(json, &scan, || render::scans::show(&scan, style))?;
    Ok(OK)
}

/// `seawall schedule`
pub async fn schedule(
    client: &Client,
    json: bool,
    style: Style,
    command: &Schedule,
) -> anyhow::Result<u8> {
    match command {
        Schedule::List => {
            let schedules = client.schedules().await?;
            print(json, &schedules, || render::scans::schedules(&schedules))?;
        }
        Schedule::Run { name } => {
            let scans = client.run_schedule(name).await?;
            print(json, &scans, || render::scans::list(&scans, style))?;
        }
        Schedule::Skip { name } => {
            let schedule = client.skip_schedule(name).await?;
            print(json, &schedule, || render::scans::schedules(std::slice::from_ref(&schedule)))?;
        }
    }
    Ok(OK)
}
