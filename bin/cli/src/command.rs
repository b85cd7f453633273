//! What the operator may say: help, completions and man pages are all made from this.

use crate::golden::Golden;
use crate::policy::Policy;
use crate::quarantine::Quarantine;
use crate::scans::{Scans, Schedule};
use crate::signatures::Signatures;
use crate::when;
use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use seawall_client::{DEFAULT_SOCKET, EventsQuery};
use std::path::PathBuf;

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
  seawall events --since 7d --verdict infected
  seawall scan download.bin               is this file infected?
  curl -s URL | seawall scan -            the same for what comes through a pipe
  seawall scan web01                      scan all files of this guest
  seawall signatures apply ./new          check new signatures and take them into use
  seawall policy explain web01 /srv/x     what happens to this file there, and which line decides it
  seawall --json guests | jq '.[].state'  for programs: the service's own answer

Exit codes: 0 all went well; 1 `scan` found malware; 2 wrong use; 3 the service cannot be reached;
4 something else went wrong (`scan` came to no verdict, `reload` was refused)."
)]
pub struct Arguments {
    /// The service's socket.
    #[arg(long, global = true, env = "SEAWALL_SOCKET", value_name = "PATH", default_value = DEFAULT_SOCKET)]
    pub socket: PathBuf,
    /// Print the service's answer as JSON; events one object a line.
    #[arg(long, global = true)]
    pub json: bool,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// How the service is: engines, guests, what was done, what it costs.
    #[command(after_help = "\
Examples:
  seawall status
  seawall --json status | jq -e .healthy     fails where something is not as it should be

Exit codes: 0 the service answered, healthy or not; 3 it cannot be reached.")]
    Status,
    /// All configured guests: protected or not and why, their drivers, what is not watched.
    #[command(after_help = "\
Examples:
  seawall guests
  seawall --json guests | jq -r '.[] | select(.state != \"protected\") | .name'")]
    Guests,
    /// What happened: denials, accesses let through unscanned, alarms, engines.
    #[command(after_help = "\
Examples:
  seawall events                                     the last 50
  seawall events --since 2h --guest web01            of one guest in the last two hours
  seawall events --kind guest_unprotected,unscanned  of these kinds
  seawall events --verdict infected --limit 1000
  seawall events --hash 460c1ec9                     of one content
  seawall events --path /srv/upload/                 of files whose path holds this text
  seawall events --follow                            go on with those that come, until Ctrl-C
  seawall --json events --follow --after 1790000000000
                                                     go on where a program left off

All filters that are given must hold. A path is compared as it is shown: with \\n for a line end and
\\\\ for a backslash. docs/events.md tells every kind and every field of --json.")]
    Events(Wanted),
    /// Have a file of this machine scanned, or the files of guests: exit code 1 when something is infected.
    #[command(after_help = "\
Examples:
  seawall scan setup.exe && echo fine       a file of this machine; ./web01 where a guest has the same name
  tar c folder | seawall scan -
  seawall scan web01                        all files that its driver watches; Ctrl-C leaves it going
  seawall scan web01:/srv web01:/home db01  parts of one guest, and another
  seawall scan --group databases --quick    what runs, starts by itself, or changed within seven days
  seawall scan --all --detach; seawall scans

A scan goes on where it was after a restart of the service, the driver or the guest. Accesses go first.

Exit codes: 0 clean; 1 infected; 3 the service cannot be reached; 4 no verdict, the file cannot be read, or
a scan of a guest did not come to its end.")]
    Scan {
        /// A file; `-` for what comes through a pipe; a guest, or GUEST:PATH.
        #[arg(value_name = "FILE|GUEST[:PATH]", required_unless_present_any = ["groups", "all"])]
        targets: Vec<String>,
        /// All guests of this group of policy.d; may be given several times.
        #[arg(long = "group", value_name = "NAME")]
        groups: Vec<String>,
        /// All guests.
        #[arg(long)]
        all: bool,
        /// Of guests only what is being executed, starts by itself, or changed within seven days.
        #[arg(long)]
        quick: bool,
        /// Do not wait for the end.
        #[arg(long)]
        detach: bool,
    },
    /// Scans of guests: how far they are and what they found; pause, resume, cancel.
    #[command(after_help = "\
Examples:
  seawall scans                             all that wait, run, or have ended
  seawall scans show 7
  seawall scans pause 7; seawall scans resume 7
  seawall --json scans show 7 | jq '.found[].path'

Exit codes: 0 done; 3 the service cannot be reached; 4 there is no such scan, or its state does not allow that.")]
    Scans {
        #[command(subcommand)]
        command: Option<Scans>,
    },
    /// Scans of guests at certain times: when, which guests; run one now, or leave a time out.
    #[command(after_help = "\
Schedules stand in the service's configuration, in [[schedule]] sections.

Examples:
  seawall schedule list
  seawall schedule run nightly
  seawall schedule skip nightly             not tonight

Exit codes: 0 done; 3 the service cannot be reached; 4 there is no such schedule.")]
    Schedule {
        #[command(subcommand)]
        command: Schedule,
    },
    /// Infected files that were taken out of their guests: look, give back, delete, approve.
    #[command(after_help = "\
Examples:
  seawall quarantine list
  seawall quarantine show 3f              the first digits of an id are enough
  seawall quarantine restore 3f           asks before it replaces a file
  seawall quarantine approve HASH         a false alarm: let this content pass

Exit codes: 0 done; 3 the service cannot be reached; 4 refused, or nothing was changed.")]
    Quarantine {
        #[command(subcommand)]
        command: Quarantine,
    },
    /// Policies of guests: are the files right, what is in force, and which line decides.
    #[command(after_help = "\
The policy of all guests stands in the configuration file, in [policy]. Files in the folder policy.d beside it
give groups of guests their own: docs/policy.md. `seawall reload` takes changes into use.

Examples:
  seawall policy check && seawall reload
  seawall policy show web01
  seawall policy explain web01 /usr/bin/ls --exec

Exit codes: 0 done; 3 the service cannot be reached; 4 the files are wrong, or there is no such guest.")]
    Policy {
        #[command(subcommand)]
        command: Policy,
    },
    /// Signature sets: what is in use, try a new one, take it into use, go back.
    #[command(after_help = "\
A set is made of a folder with any mix of YARA rules (.yar), ClamAV signatures (.cvd, .ndb, .hdb …) and
hash lists (.sha256, .csv …). Each engine gets the files that it takes; one for which there is none keeps
what it has. The set is loaded beside the one in use and tried: it must find EICAR and what is known to be
bad, and nothing in what is known to be good. Only then it takes over; no scan is lost.

Examples:
  seawall signatures check ./new          what would become of it, file and line of what is wrong
  seawall signatures apply ./new
  seawall signatures rollback             to the set before
  seawall signatures list

Exit codes: 0 done; 3 the service cannot be reached; 4 refused, and what was in use stays.")]
    Signatures {
        #[command(subcommand)]
        command: Signatures,
    },
    /// Golden images: know the files of a template in all its clones, which then send no content for them.
    #[command(after_help = "\
A clone is known by its files' inodes and times, which only root of a guest can make up. So of one in a hundred files the
content is asked for all the same; a guest in which it is another is no clone, and gets an event `golden_distrusted`. Use
clones whose disks are copies of the template's: what is installed anew is scanned as ever.

Examples:
  seawall golden learn template01
  seawall golden list

Exit codes: 0 done; 1 something in the template is infected; 3 the service cannot be reached; 4 refused.")]
    Golden {
        #[command(subcommand)]
        command: Golden,
    },
    /// Have the service read its configuration and the engines' signatures again.
    #[command(after_help = "\
Examples:
  seawall reload && echo 'everything is in use'

Exit codes: 0 everything was taken over; 4 something was refused, and what was in use stays.")]
    Reload,
    /// Print what a shell needs to complete this command's words.
    #[command(after_help = "\
Examples:
  seawall completions bash > /etc/bash_completion.d/seawall
  seawall completions zsh > /usr/share/zsh/site-functions/_seawall
  seawall completions fish > ~/.config/fish/completions/seawall.fish")]
    Completions {
        /// The shell.
        shell: Shell,
    },
    /// Write the man pages into a folder, for packages.
    #[command(hide = true)]
    Man {
        /// The folder; it must be there.
        folder: PathBuf,
    },
}

/// Which events.
#[derive(Debug, Args)]
pub struct Wanted {
    /// Of this guest.
    #[arg(long, value_name = "NAME")]
    guest: Option<String>,
    /// Of these kinds; may be given several times.
    #[arg(long, value_name = "KIND", value_delimiter = ',')]
    kind: Vec<String>,
    /// Not older: how long ago (30m, 2h, 7d) or a time (2026-11-23T10:00:00Z).
    #[arg(long, value_name = "TIME", value_parser = when::parse)]
    since: Option<String>,
    /// Older: how long ago or a time.
    #[arg(long, value_name = "TIME", value_parser = when::parse, conflicts_with = "follow")]
    until: Option<String>,
    /// Of the content whose BLAKE3 begins with these hexadecimal digits, at least 4.
    #[arg(long, value_name = "HEX")]
    hash: Option<String>,
    /// Of files whose path, as it is shown, holds this text.
    #[arg(long, value_name = "TEXT")]
    path: Option<String>,
    /// With this verdict: infected, error or timed_out.
    #[arg(long, value_name = "VERDICT")]
    verdict: Option<String>,
    /// Only after the event with this id, the oldest first.
    #[arg(long, value_name = "ID")]
    after: Option<u64>,
    /// At most so many of the last ones, up to 100000.
    #[arg(long, short = 'n', value_name = "COUNT", default_value_t = 50,
          value_parser = clap::value_parser!(u32).range(0..=100_000))]
    limit: u32,
    /// Go on with those that come.
    #[arg(long, short)]
    pub follow: bool,
}

impl Wanted {
    /// As the service is asked.
    pub fn query(&self) -> EventsQuery {
        EventsQuery {
            guest: self.guest.clone(),
            kind: (!self.kind.is_empty()).then(|| self.kind.join(",")),
            since: self.since.clone(),
            until: self.until.clone(),
            hash: self.hash.clone(),
            path: self.path.clone(),
            verdict: self.verdict.clone(),
            after: self.after,
            limit: Some(self.limit),
            follow: self.follow,
        }
    }
}
