//! What guests open and write, and when: recorded by a driver (`seawall-agent run --record`), or made.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::plan::Random;

/// What is done with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// It is opened for reading, and closed.
    Open,
    /// It is opened, its beginning is written over, and it is closed.
    Write,
}

/// One act.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// When, in microseconds since the beginning of its part.
    pub at_us: u64,
    pub act: Act,
    /// Which of the trace's files.
    pub file: usize,
    /// Acts of one process follow each other.
    pub process: u32,
}

/// What there was before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Before {
    /// Nobody has looked at the file.
    Nothing,
    /// The same, and the host knows its content.
    Known,
    /// It was opened, and has not changed.
    Opened,
    /// The same, and somebody has it open for writing all the time.
    Held,
}

/// A file of a trace.
#[derive(Debug, Clone, Copy)]
pub struct Opened {
    /// In bytes.
    pub size: u64,
    /// Files with the same number and size have the same content.
    pub content: u64,
    pub before: Before,
}

/// A trace, in parts that are replayed one after the other.
#[derive(Debug)]
pub struct Trace {
    pub name: String,
    pub files: Vec<Opened>,
    pub parts: Vec<Vec<Step>>,
    /// Events that its recorder has lost, or of which half a line is there.
    pub lost: u64,
    /// Whether it is longer than what is replayed.
    pub is_longer: bool,
}

/// What a made trace is made of.
#[derive(Debug, Clone, Copy)]
pub struct Busy {
    pub parts: u32,
    pub seconds: f64,
    pub opens_per_second: u32,
    pub writes_per_second: u32,
}

/// Files that were opened before, that somebody holds open, that are written, and contents that the host knows.
const OPENED: usize = 2_000;
const HELD: usize = 100;
const WRITTEN: usize = 300;
const KNOWN_CONTENTS: u64 = 64;
/// Of a hundred thousand opens, so many are of files that are held, of known content, and of new content.
const OF_HELD: u64 = 2_000;
const OF_KNOWN: u64 = 900;
const OF_NEW: u64 = 100;
const PROCESSES: u64 = 16;

/// How long the parts of a recorded trace are, in microseconds, and how many of them are replayed.
pub const PART_US: u64 = 30_000_000;
pub const PARTS_MAX: usize = 5;

impl Trace {
    /// A busy host: nearly all opens are of files that were opened before; two in a hundred of files that somebody writes.
    pub fn busy(busy: &Busy) -> Self {
        let mut random = Random(3);
        let mut pick = |below: u64| random.next() % below;
        let mut files = Vec::new();
        let mut add = |size: u64, content: u64, before: Before| {
            files.push(Opened { size, content, before });
            files.len() - 1
        };
        let size = |n: u64| 4096 << (n % 5);
        for n in 0..OPENED as u64 {
            add(size(n), 1_000_000 + n, Before::Opened);
        }
        for n in 0..HELD as u64 {
            add(size(n), 2_000_000 + n, Before::Held);
        }
        for n in 0..WRITTEN as u64 {
            add(size(n % 3), 3_000_000 + n, Before::Opened);
        }
        let mut new = 4_000_000;
        let mut parts = Vec::new();
        for _ in 0..busy.parts {
            let mut steps = Vec::new();
            let counts = [busy.opens_per_second, busy.writes_per_second];
            let counts = counts.map(|count| (f64::from(count) * busy.seconds) as u64);
            let us = (busy.seconds * 1e6) as u64;
            for _ in 0..counts[0] {
                let file = match pick(100_000) {
                    ..OF_NEW => {
                        new += 1;
                        add(size(new), new, Before::Nothing)
                    }
                    n if n < OF_NEW + OF_KNOWN => {
                        let content = pick(KNOWN_CONTENTS);
                        add(size(content), 5_000_000 + content, Before::Known)
                    }
                    n if n < OF_NEW + OF_KNOWN + OF_HELD => OPENED + pick(HELD as u64) as usize,
                    _ => pick(OPENED as u64) as usize,
                };
                let (at_us, process) = (pick(us), pick(PROCESSES) as u32);
                steps.push(Step { at_us, act: Act::Open, file, process });
            }
            for _ in 0..counts[1] {
                let file = OPENED + HELD + pick(WRITTEN as u64) as usize;
                let (at_us, process) = (pick(us), pick(PROCESSES) as u32);
                steps.push(Step { at_us, act: Act::Write, file, process });
            }
            steps.sort_by_key(|step| step.at_us);
            parts.push(steps);
        }
        let name = format!(
            "a busy host: {} opens and {} writes a second",
            busy.opens_per_second, busy.writes_per_second
        );
        Self { name, files, parts, lost: 0, is_longer: false }
    }

    /// What a driver has recorded, from its beginning on.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let name = || path.display().to_string();
        let mut lines = BufReader::new(File::open(path).with_context(name)?).lines();
        let head = lines.next().transpose().with_context(name)?.unwrap_or_default();
        let head: Value = serde_json::from_str(&head).unwrap_or_default();
        ensure!(head["seawall_trace"] == 1, "{}: this is no trace of a driver", name());
        let (mut files, mut steps, mut lost) = (Vec::new(), Vec::new(), 0);
        let (mut known, mut begin) = (HashMap::new(), None);
        for line in lines {
            let parsed = serde_json::from_str::<(u64, String, u64, u64, u32)>(&line?).ok();
            let act = match parsed.as_ref().map(|(_, act, ..)| act.as_str()) {
                Some("open") => Some(Act::Open),
                Some("write") => Some(Act::Write),
                _ => None,
            };
            let (Some((at_us, _, file, size, process)), Some(act)) = (parsed, act) else {
                lost += 1;
                continue;
            };
            let at_us = at_us.saturating_sub(*begin.get_or_insert(at_us));
            let file = *known.entry(file).or_insert_with(|| {
                let content = files.len() as u64;
                files.push(Opened { size, content, before: Before::Nothing });
                files.len() - 1
            });
            // What is made while it is recorded is empty at first.
            let opened: &mut Opened = &mut files[file];
            opened.size = opened.size.max(size);
            steps.push(Step { at_us, act, file, process });
        }
        ensure!(!steps.is_empty(), "{}: nothing was opened", name());
        // Two threads may have been told in another order.
        steps.sort_by_key(|step| step.at_us);
        let mut parts: Vec<Vec<Step>> = Vec::new();
        parts.resize_with(PARTS_MAX, Vec::new);
        let mut is_longer = false;
        for step in steps {
            let part = usize::try_from(step.at_us / PART_US)?;
            match parts.get_mut(part) {
                Some(part) => part.push(Step { at_us: step.at_us % PART_US, ..step }),
                None => is_longer = true,
            }
        }
        parts.retain(|part| !part.is_empty());
        // Where it is on this machine is nobody's business.
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { name, files, parts, lost, is_longer })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_busy_host_is_as_it_is_told() {
        let busy =
            Busy { parts: 2, seconds: 5.0, opens_per_second: 16_000, writes_per_second: 300 };
        let trace = Trace::busy(&busy);
        assert_eq!(trace.parts.len(), 2);
        let steps: Vec<&Step> = trace.parts.iter().flatten().collect();
        let share = |of: &dyn Fn(&Step) -> bool| {
            steps.iter().filter(|step| of(step)).count() as f64 / 160_000.0
        };
        let before = |step: &Step| (step.act == Act::Open).then(|| trace.files[step.file].before);
        for (wanted, expected) in [
            (Before::Opened, 0.97),
            (Before::Held, 0.02),
            (Before::Known, 0.009),
            (Before::Nothing, 0.001),
        ] {
            let found = share(&|step| before(step) == Some(wanted));
            assert!((found / expected - 1.0).abs() < 0.15, "{wanted:?}: {found}");
        }
        assert_eq!(steps.iter().filter(|step| step.act == Act::Write).count(), 3_000);
        assert!(trace.parts.iter().all(|part| part.is_sorted_by_key(|step| step.at_us)));
    }

    #[test]
    fn a_trace_is_read_and_what_was_torn_is_counted() -> anyhow::Result<()> {
        let read = |text: &str| {
            let mut file = tempfile::NamedTempFile::new()?;
            file.write_all(text.as_bytes())?;
            Trace::read(file.path())
        };
        let head = "{\"seawall_trace\":1,\"began\":7}\n";
        let lines = "[100,\"open\",77,10,4]\n[130,\"write\",88,20,5]\n[140,\"lost\",0,0,0]\n\
                     [190,\"open\",77,30,5]\n";
        let trace = read(&format!("{head}{lines}[200,\"op"))?;
        let steps: Vec<_> =
            trace.parts[0].iter().map(|s| (s.at_us, s.act, s.file, s.process)).collect();
        let expected = [(0, Act::Open, 0, 4), (30, Act::Write, 1, 5), (90, Act::Open, 0, 5)];
        assert_eq!((steps, trace.lost, trace.is_longer), (expected.to_vec(), 2, false));
        assert_eq!(trace.files.iter().map(|file| file.size).collect::<Vec<_>>(), [30, 20]);
        let late = |us: u64| format!("[{},\"open\",99,1,5]\n", 100 + us);
        let long = [0, PART_US + 7, 3 * PART_US, PART_US * PARTS_MAX as u64].map(late).concat();
        let trace = read(&format!("{head}{long}"))?;
        let times = trace.parts.iter().map(|part| part[0].at_us).collect::<Vec<_>>();
        assert_eq!((times, trace.is_longer), (vec![0, 7, 0], true));
        for (text, why) in [(lines.to_owned(), "no trace"), (head.to_owned(), "nothing was opened")]
        {
            let error = read(&text).map(drop).map_err(|error| format!("{error:#}"));
            assert!(error.as_ref().is_err_and(|error| error.contains(why)), "{why}: {error:?}");
        }
        Ok(())
    }
}
