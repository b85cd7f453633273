//! What a new set must show before it takes over: it finds the known bad, and nothing in the known good.
//!
//! The files go the way of every content, through a pipeline of their own in which the new engines stand in the
//! place of the old ones. Nothing of it is remembered.

use super::Failure;
use super::set::{files_of, open_file};
use crate::config::Config;
use crate::copy::{Budget, CopyError, PrivateCopy};
use crate::pipeline::{Answer, Finding, Pipeline, Request};
use seawall_engine::host::Lane;
use seawall_engine::{Metadata, Operation};
use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// So long no probe is answered: then engines are too busy, or worse.
const PATIENCE: Duration = Duration::from_secs(600);
/// Probes under way at once.
const AT_ONCE: usize = 4;
/// Failed probes that are named.
const MOST_NAMED: usize = 5;
/// What is known to be good wherever the service runs.
const ALWAYS_GOOD: [&str; 2] = ["/bin/sh", "/etc/services"];

/// How many files were tried.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tried {
    pub known_bad: u64,
    pub known_good: u64,
}

/// What is to be found in a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Something,
    Nothing,
}

/// One file to be tried.
struct Probe {
    name: String,
    content: Source,
    wanted: Wanted,
}

enum Source {
    Bytes(Vec<u8>),
    File(PathBuf),
}

/// Tries a set.
///
/// # Errors
/// Why it must not take over.
pub fn run(
    pipeline: &Arc<Pipeline>,
    budget: &Arc<Budget>,
    config: &Config,
) -> Result<Tried, Failure> {
    let probes = probes(config).map_err(Failure::Circumstances)?;
    let count = |wanted| probes.iter().filter(|probe| probe.wanted == wanted).count() as u64;
    let tried = Tried { known_bad: count(Wanted::Something), known_good: count(Wanted::Nothing) };
    // `passes`: something was not the set's fault, and may be otherwise the next time.
    let (mut wrong, mut passes) = (Vec::new(), false);
    let (tell, answers) = channel::<(usize, Answer)>();
    let (mut next, mut under_way) = (0, 0);
    while next < probes.len() || under_way > 0 {
        if next < probes.len() && under_way < AT_ONCE {
            match copy(&probes[next], budget, config) {
                Ok(content) => {
                    let (tell, number) = (tell.clone(), next);
                    scan(pipeline, content, move |answer| drop(tell.send((number, answer))));
                    under_way += 1;
                }
                Err(error) => {
                    passes = true;
                    wrong.push(format!("{}: {error}", probes[next].name));
                }
            }
            next += 1;
            continue;
        }
        let answer = answers.recv_timeout(PATIENCE);
        let (number, answer) = answer.map_err(|_| {
            Failure::Circumstances("the engines are too busy to try the set".to_owned())
        })?;
        under_way -= 1;
        passes |= matches!(answer.finding, Finding::Error(_) | Finding::TimedOut(_));
        wrong.extend(judge(&probes[number], &answer));
    }
    if wrong.is_empty() {
        return Ok(tried);
    }
    let more = wrong.len().saturating_sub(MOST_NAMED);
    wrong.truncate(MOST_NAMED);
    let more = if more > 0 { format!("; and {more} more") } else { String::new() };
    let why = wrong.join("; ") + &more;
    Err(if passes { Failure::Circumstances(why) } else { Failure::Set(why) })
}

/// What is wrong with what was found.
fn judge(probe: &Probe, answer: &Answer) -> Option<String> {
    let name = &probe.name;
    match (&answer.finding, probe.wanted) {
        (Finding::Infected(_), Wanted::Something) | (Finding::Clean, Wanted::Nothing) => None,
        (Finding::Clean, Wanted::Something) => Some(format!("it does not find {name}")),
        (Finding::Infected(found), Wanted::Nothing) => {
            let found = found.first().map_or("something", |one| one.name.as_str());
            Some(format!("it finds {found} in {name}, which is good"))
        }
        (Finding::Error(why) | Finding::TimedOut(why), _) => {
            Some(format!("{name} could not be scanned: {why}"))
        }
    }
}

fn probes(config: &Config) -> Result<Vec<Probe>, String> {
    let signatures = &config.signatures;
    let mut probes = Vec::new();
    if signatures.require_eicar {
        let (name, content) = ("the EICAR test file".to_owned(), Source::Bytes(eicar()));
        probes.push(Probe { name, content, wanted: Wanted::Something });
    }
    let mut add = |path: PathBuf, wanted| {
        probes.push(Probe {
            name: path.display().to_string(),
            content: Source::File(path),
            wanted,
        });
    };
    for path in ALWAYS_GOOD.map(PathBuf::from).into_iter().chain(std::env::current_exe().ok()) {
        if path.is_file() {
            add(path, Wanted::Nothing);
        }
    }
    let known =
        [(&signatures.known_bad, Wanted::Something), (&signatures.known_good, Wanted::Nothing)];
    for (folders, wanted) in known {
        for folder in folders {
            for path in files_of(folder.as_path()).map_err(|error| error.to_string())? {
                add(path, wanted);
            }
        }
    }
    Ok(probes)
}

fn copy(probe: &Probe, budget: &Arc<Budget>, config: &Config) -> Result<PrivateCopy, CopyError> {
    let limit = config.policy.whole_file_limit();
    let mut copy = PrivateCopy::new(budget.whole(), limit, limit, Vec::new());
    let mut scratch = Vec::new();
    let mut append = |piece: &[u8]| {
        copy.append(piece.len(), &mut scratch, |to| {
            to.copy_from_slice(piece);
            Ok::<_, CopyError>(())
        })
    };
    match &probe.content {
        Source::Bytes(bytes) => append(bytes)?,
        Source::File(path) => {
            let mut file: File = open_file(path).map_err(CopyError::Store)?;
            let mut piece = vec![0; 256 * 1024];
            loop {
                match file.read(&mut piece) {
                    Ok(0) => break,
                    Ok(read) => append(&piece[..read])?,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(CopyError::Store(error)),
                }
            }
        }
    }
    Ok(copy)
}

fn scan(pipeline: &Arc<Pipeline>, copy: PrivateCopy, reply: impl FnOnce(Answer) + Send + 'static) {
    let meta = Metadata {
        path: Vec::new(),
        guest: String::new(),
        operation: Operation::OnDemand,
        size: copy.len(),
        archives: None,
    };
    pipeline.scan(Request {
        hash: copy.hash(),
        copy,
        meta,
        tenant: None,
        // Few at a time; behind all accesses of busy guests they might never have their turn.
        lane: Lane::OnAccess,
        until: Instant::now() + PATIENCE,
        reply: Box::new(reply),
    });
}

/// The EICAR test file. It stands here backwards, so that no engine finds it in this program.
fn eicar() -> Vec<u8> {
    let backwards = "*H+H$!ELIF-TSET-SURIVITNA-DRADNATS-RACIE$}7)CC7)^P(45XZP\\4[PA@%P!O5X";
    backwards.bytes().rev().collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn eicar_is_what_it_is() {
        let eicar = super::eicar();
        assert_eq!(eicar.len(), 68);
        assert!(eicar.starts_with(b"X5O!P%@AP[4"));
    }
}
