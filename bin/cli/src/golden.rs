//! `seawall golden`: templates whose files the service knows in their clones.

use crate::progress::Progress;
use crate::render::{self, Style};
use crate::{FAILED, INFECTED, OK, print, scan, scans};
use anyhow::{Context, bail};
use clap::Subcommand;
use rustix::fs::{AtFlags, Mode, OFlags, StatVfsMountFlags, StatxFlags};
use seawall_client::{
    Client, ClientError, GoldenFile, GoldenFiles, GoldenLearnRequest, GuestScanState, Verdict,
};
use std::collections::HashSet;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

#[derive(Debug, Subcommand)]
pub enum Golden {
    /// What was learned, how much it is used, and of which guests it is not.
    List,
    /// Scan a template, and know its clean files in all clones of it.
    #[command(after_help = "\
The template is a guest that runs, or its file system, mounted on this host read-only. A guest that was learned is a
template until its files change: what is changed is asked for by its content as before. Files that others than root may
change are not learned.

Examples:
  seawall golden learn template-debian13
  mount -o ro,noload /dev/nbd0p1 /mnt && seawall golden learn /mnt --name debian13

Exit codes: 0 learned; 1 learned, and something in it is infected; 3 the service cannot be reached; 4 not learned.")]
    Learn {
        /// A guest, or a folder of this machine; ./web01 where a guest has the same name.
        #[arg(value_name = "GUEST|TREE")]
        template: String,
        /// What it is to be called; the guest's or the folder's own name without it.
        #[arg(long)]
        name: Option<String>,
        /// Of a guest: do not wait for the end of its scan.
        #[arg(long)]
        detach: bool,
    },
    /// Forget a golden image.
    Forget {
        /// Its name.
        name: String,
    },
    /// Use golden images again for a guest that did not agree with one.
    Trust {
        /// Its name.
        guest: String,
    },
}

pub async fn run(
    client: &Client,
    json: bool,
    style: Style,
    command: &Golden,
) -> anyhow::Result<u8> {
    let report = match command {
        Golden::Learn { template, name, detach } => {
            return match scans::is_guest(client, template).await? {
                true if !template.contains(':') => {
                    let name = name.as_deref().unwrap_or(template);
                    learn_guest(client, json, style, template, name, *detach).await
                }
                true => bail!("a template is learned as a whole; name the guest alone"),
                false => {
                    anyhow::ensure!(!detach, "{template} is no guest: `--detach` is for guests");
                    learn_tree(client, json, Path::new(template), name.as_deref()).await
                }
            };
        }
        Golden::List => client.golden().await?,
        Golden::Forget { name } => client.forget_golden(name).await?,
        Golden::Trust { guest } => client.trust_golden(guest).await?,
    };
    print(json, &report, || render::golden::report(&report))?;
    Ok(OK)
}

async fn learn_guest(
    client: &Client,
    json: bool,
    style: Style,
    guest: &str,
    name: &str,
    detach: bool,
) -> anyhow::Result<u8> {
    let wanted = GoldenLearnRequest { guest: guest.to_owned() };
    let mut scan = client.learn_golden(name, &wanted).await?;
    if !detach {
        scan = scans::wait(client, &[scan.id]).await?.pop().unwrap_or(scan);
    }
    print(json, &scan, || render::scans::show(&scan, style))?;
    Ok(match scan.state {
        _ if scan.infected > 0 => INFECTED,
        GuestScanState::Done => OK,
        _ if detach => OK,
        _ => FAILED,
    })
}

/// What was not learned of a tree.
#[derive(Debug, Default)]
struct LeftOut {
    infected: Vec<PathBuf>,
    other: Vec<(PathBuf, String)>,
}

async fn learn_tree(
    client: &Client,
    json: bool,
    tree: &Path,
    name: Option<&str>,
) -> anyhow::Result<u8> {
    let whole = tree
        .canonicalize()
        .with_context(|| format!("{} is neither a guest nor a folder here", tree.display()))?;
    let name = match (name, whole.file_name().and_then(|name| name.to_str())) {
        (Some(name), _) | (None, Some(name)) => name,
        (None, None) => bail!("give the golden image a name with --name"),
    };
    let flags = rustix::fs::statvfs(&whole)?.f_flag;
    anyhow::ensure!(
        flags.contains(StatVfsMountFlags::RDONLY),
        "{} may change while it is learned: mount it read-only (`mount -o remount,ro`)",
        whole.display()
    );
    let mut left_out = LeftOut::default();
    let files = files_of(client, &whole, &mut left_out).await?;
    let wanted = GoldenFiles { tree: whole.display().to_string(), files };
    let list = client.put_golden(name, &wanted).await?;
    print(json, &list, || {
        let mut text = render::golden::learned(&list);
        text.push_str(&render::golden::left_out(&left_out.infected, &left_out.other));
        text
    })?;
    Ok(if left_out.infected.is_empty() { OK } else { INFECTED })
}

/// All clean files of a tree on its own file system, each of which is scanned.
async fn files_of(
    client: &Client,
    tree: &Path,
    left_out: &mut LeftOut,
) -> anyhow::Result<Vec<GoldenFile>> {
    let progress = Progress::of_work("the tree is being scanned");
    let (mut files, mut seen) = (Vec::new(), HashSet::new());
    let all = walkdir::WalkDir::new(tree).same_file_system(true).into_iter();
    for entry in all {
        let entry = match entry {
            Ok(entry) if entry.file_type().is_file() => entry,
            Ok(_) => continue,
            Err(error) => {
                let path = error.path().unwrap_or(tree).to_owned();
                left_out.other.push((path, error.to_string()));
                continue;
            }
        };
        match learn_file(client, entry.path(), &mut seen).await {
            Ok(Learned::File(file)) => files.push(file),
            Ok(Learned::Nothing) => (),
            Ok(Learned::Infected) => left_out.infected.push(entry.into_path()),
            // A file may be too long or vanish; a service that is not there is the end of it.
            Err(error) if is_of_file(&error) => {
                left_out.other.push((entry.into_path(), format!("{error:#}")));
            }
            Err(error) => {
                progress.clear();
                return Err(error);
            }
        }
        progress.say(&format!("{{spinner}} {} files learned, {{elapsed}}", files.len()));
    }
    progress.clear();
    Ok(files)
}

fn is_of_file(error: &anyhow::Error) -> bool {
    match error.downcast_ref::<ClientError>() {
        Some(ClientError::Refused(fault)) => fault.code == "too-long",
        Some(_) => false,
        None => true,
    }
}

enum Learned {
    File(GoldenFile),
    /// It has no content, is known by another name, or others than root may change it.
    Nothing,
    Infected,
}

async fn learn_file(
    client: &Client,
    path: &Path,
    seen: &mut HashSet<u64>,
) -> anyhow::Result<Learned> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOFOLLOW;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    // What others than root may change a driver does not name either.
    let metadata = file.metadata()?;
    if metadata.uid() != 0 || metadata.mode() & 0o022 != 0 {
        return Ok(Learned::Nothing);
    }
    let before = look(&file)?;
    if before.size == 0 || !seen.insert(before.inode) {
        return Ok(Learned::Nothing);
    }
    let report = scan::scan_quietly(client, path, &file).await?;
    match report.verdict {
        Verdict::Clean => (),
        Verdict::Infected => return Ok(Learned::Infected),
        Verdict::Error | Verdict::TimedOut => bail!(report.reason.unwrap_or_default()),
    }
    anyhow::ensure!(look(&file)? == before, "it was changed meanwhile");
    Ok(Learned::File(GoldenFile { hash: report.hash, ..before }))
}

/// As the file system shows it, without a hash.
fn look(file: &File) -> anyhow::Result<GoldenFile> {
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    let found = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, wanted)?;
    anyhow::ensure!(
        found.stx_mask & StatxFlags::BTIME.bits() != 0,
        "its file system does not keep when files were made"
    );
    let fs_type = rustix::fs::fstatfs(file.as_fd())?.f_type;
    let time = |time: rustix::fs::StatxTimestamp| (time.tv_sec, time.tv_nsec);
    Ok(GoldenFile {
        fs_type: fs_type as u64,
        fs_id: rustix::fs::fstatvfs(file.as_fd())?.f_fsid,
        inode: found.stx_ino,
        size: found.stx_size,
        modified: time(found.stx_mtime),
        changed: time(found.stx_ctime),
        born: time(found.stx_btime),
        hash: String::new(),
    })
}
