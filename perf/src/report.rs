//! The results: a table for people, JSON to keep.

use std::collections::BTreeMap;
use std::fmt::Write;

use comfy_table::{Cell, CellAlignment, Table};
use serde::Serialize;
use serde_json::Value;

use crate::engines::rounds::Goal;
use crate::html::{Axis, Line, Plot};
use crate::machine::Machine;
use crate::ours::Memory;
use crate::plan::{Case, Pace, Setup, What, size_name};
use crate::run::Round;
use crate::sample::{Median, PERCENTS, Times};

/// Everything that a run found out.
#[derive(Debug, Serialize)]
pub struct Results {
    /// When it ended (RFC 3339, UTC).
    pub date: String,
    /// Of the source; `+` where it had changes.
    pub revision: Option<String>,
    /// Whether the measured programs were built from that source.
    pub programs_from: &'static str,
    /// Not for figures.
    pub quick: bool,
    pub machine: Machine,
    /// Load average of one minute, before and after.
    pub load: [f64; 2],
    pub file_system: String,
    pub guest_cpu: usize,
    pub host_cpu: usize,
    pub rounds: u32,
    /// What is aimed at, and what became of it.
    pub rows: Vec<Figure>,
    pub cases: Vec<Row>,
    pub memory: Option<Memory>,
    pub plots: Vec<Plot>,
    pub notes: Vec<String>,
    pub failed: Vec<Failure>,
}

/// What could not be measured.
#[derive(Debug, Serialize)]
pub struct Failure {
    pub name: String,
    pub reason: String,
}

/// A figure that has a goal: the most that it may be.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    pub scenario: &'static str,
    pub name: String,
    pub value: f64,
    pub unit: &'static str,
    pub goal: Goal,
    pub met: bool,
    /// Between what the rounds' own values lie.
    pub spread: [f64; 2],
}

impl Figure {
    fn new(name: String, value: Median, unit: &'static str, most: f64) -> Self {
        let (Median { median, spread }, goal) = (value, Goal::AtMost(most));
        let met = goal.is_met(median);
        Self { scenario: "open", name, value: median, unit, goal, met, spread }
    }

    /// What the goals of a case came to.
    pub fn of(case: &Case, row: &Row) -> Vec<Self> {
        let figure = |(against, goal): (Setup, f64)| {
            let name = format!("{}, times {}", row.name, against.name());
            Some(Self::new(name, *row.ratios.get(&against)?, "x", goal))
        };
        case.goals().into_iter().filter_map(figure).collect()
    }

    /// What the same comes to beside other products.
    pub fn of_rivals(case: &Case, rounds: &BTreeMap<Case, Vec<Round>>) -> Vec<Self> {
        let figure = |(rival, most): (Case, f64)| {
            let name = format!("{}, times {}", case.name(), rival.name());
            Some(Self::new(name, ratio(case, &rival, rounds)?, "x", (most * 1e3).round() / 1e3))
        };
        case.rivals().into_iter().filter_map(figure).collect()
    }
}

/// p50 of one case over that of another, round by round; none where one of them failed in a round.
fn ratio(case: &Case, other: &Case, rounds: &BTreeMap<Case, Vec<Round>>) -> Option<Median> {
    let (own, other) = (rounds.get(case)?, rounds.get(other)?);
    if own.len() != other.len() {
        return None;
    }
    let pairs = own.iter().zip(other);
    Median::of(pairs.map(|(own, other)| own.times.p50 / other.times.p50))
}

/// One case. All times in microseconds; each is the median of what the rounds gave.
#[derive(Debug, Serialize)]
pub struct Row {
    pub name: String,
    /// The same as `p50`.
    pub value: f64,
    pub unit: &'static str,
    /// Between what the rounds' own p50 lie.
    pub spread: [f64; 2],
    pub setup: Setup,
    pub what: What,
    pub pace: Pace,
    pub size: u32,
    pub p50: f64,
    pub p95: f64,
    pub p99: f64,
    /// Of the rounds' own ones, at [`PERCENTS`](crate::sample::PERCENTS).
    pub percentiles: Vec<f64>,
    /// p50 over that of other setups in the same round.
    pub ratios: BTreeMap<Setup, Median>,
    /// CPU time for each open, by part.
    pub cpu_us: BTreeMap<&'static str, f64>,
    pub rounds: Vec<Times>,
}

impl Row {
    /// The row of a case; none when no round has measured it.
    pub fn of(case: &Case, rounds: &BTreeMap<Case, Vec<Round>>) -> Option<Self> {
        let own = rounds.get(case)?;
        let times: Vec<Times> = own.iter().map(|round| round.times).collect();
        let median = |of: fn(&Times) -> f64| Median::of(times.iter().map(of));
        let p50 = median(|times| times.p50)?;
        let ratio = |setup: Setup| Some((setup, ratio(case, &case.peer(setup)?, rounds)?));
        let percentiles = (0..PERCENTS.len())
            .map(|at| Some(Median::of(times.iter().map(|times| times.percentiles[at]))?.median));
        let parts = own.iter().flat_map(|round| round.cpu_us.keys().copied());
        let cpu = |part| {
            let each = own.iter().filter_map(|round| round.cpu_us.get(part).copied());
            Some((part, Median::of(each)?.median))
        };
        Some(Self {
            name: case.name(),
            value: p50.median,
            unit: "us",
            spread: p50.spread,
            setup: case.setup,
            what: case.what,
            pace: case.pace,
            size: case.size,
            p50: p50.median,
            p95: median(|times| times.p95)?.median,
            p99: median(|times| times.p99)?.median,
            percentiles: percentiles.collect::<Option<_>>()?,
            ratios: Setup::ALL.into_iter().filter_map(ratio).collect(),
            cpu_us: parts.filter_map(cpu).collect(),
            rounds: times,
        })
    }
}

/// How the times of these cases are distributed; a case that was not measured has no line.
pub fn distribution(title: &str, says: &str, cases: &[Row], of: &[(Case, &str)]) -> Plot {
    let line = |(case, name): &(Case, &str)| {
        let row = cases.iter().find(|row| row.name == case.name())?;
        let points =
            row.percentiles.iter().zip(PERCENTS).map(|(us, percent)| [*us, percent as f64]);
        Some(Line { name: (*name).to_owned(), points: points.collect() })
    };
    Plot {
        title: title.into(),
        says: says.into(),
        x: Axis::log("microseconds"),
        y: Axis::linear("percent of opens that took no longer"),
        lines: of.iter().filter_map(line).collect(),
    }
}

impl Results {
    /// What the file of this run is called.
    pub fn file_name(&self) -> String {
        format!("{}.json", self.date.replace(':', ""))
    }

    pub fn to_json(&self) -> anyhow::Result<String> {
        lines(serde_json::to_value(self)?)
    }

    /// For people.
    pub fn to_text(&self) -> String {
        let mut out = String::new();
        let _infallible = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let Machine { cpu, cpus, memory_mib, kernel } = &self.machine;
        let revision = self.revision.as_deref().unwrap_or("unknown");
        writeln!(out, "open(2) and close(2), in microseconds; {} rounds", self.rounds)?;
        writeln!(out, "machine   {cpus} × {cpu}, {memory_mib} MiB, Linux {kernel}")?;
        writeln!(out, "source    {revision}, programs {}", self.programs_from)?;
        writeln!(out, "files on  {}", self.file_system)?;
        writeln!(
            out,
            "pinned    opener, listeners, driver: CPU {}; service, engine: CPU {}",
            self.guest_cpu, self.host_cpu
        )?;
        writeln!(out, "load      {} before, {} after", self.load[0], self.load[1])?;
        if self.quick {
            writeln!(out, "quick     shows that the benchmark works; no figures to go by")?;
        }
        writeln!(out, "\n{}\n\n{}", table(&self.cases), goals(&self.rows))?;
        if let Some(Memory { service_kib, engine_kib }) = &self.memory {
            writeln!(out, "memory    service {service_kib} KiB, engine {engine_kib} KiB")?;
        }
        for note in &self.notes {
            writeln!(out, "note      {note}")?;
        }
        for Failure { name, reason } in &self.failed {
            writeln!(out, "FAILED    {name}: {reason}")?;
        }
        Ok(())
    }
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    let heads = [
        "SETUP",
        "WHAT",
        "SIZE",
        "PACE",
        "P50",
        "P95",
        "P99",
        "P50 OF ROUNDS",
        "× LISTENER",
        "× MARKS ONLY",
        "× UNPROTECTED",
        "CPU PER OPEN",
    ];
    table.set_header(heads);
    for row in rows {
        let ratio = |setup| row.ratios.get(&setup).map_or(String::new(), |r| number(r.median));
        let text = [row.setup.name(), row.what.name(), &size_name(row.size), row.pace.name()];
        let [low, high] = row.spread;
        let cpu: Vec<String> =
            row.cpu_us.iter().map(|(part, us)| format!("{part} {}", number(*us))).collect();
        let numbers = [
            number(row.p50),
            number(row.p95),
            number(row.p99),
            format!("{}–{}", number(low), number(high)),
            ratio(Setup::Listener),
            ratio(Setup::MarksOnly),
            ratio(Setup::Unprotected),
        ];
        let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
        let cells = text.into_iter().map(Cell::new).chain(numbers.into_iter().map(right));
        table.add_row(cells.chain([Cell::new(cpu.join(", "))]));
    }
    table
}

fn goals(figures: &[Figure]) -> Table {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(["FIGURE", "GOAL", "IS", "ROUNDS", "MET"]);
    for figure in figures {
        let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
        let [low, high] = figure.spread;
        table.add_row([
            Cell::new(&figure.name),
            right(format!("{} {}", figure.goal.name(), figure.unit)),
            right(number(figure.value)),
            right(format!("{}–{}", number(low), number(high))),
            Cell::new(if figure.met { "yes" } else { "no" }),
        ]);
    }
    table
}

/// What several runs found out, as one. What is told of one scenario alone is that of the first that tells it.
pub fn together(runs: Vec<Value>) -> Option<Value> {
    let mut runs = runs.into_iter();
    let mut all = runs.next()?;
    for run in runs {
        // One that could not be measured names none.
        if !run["revision"].is_null() && run["revision"] != all["revision"] {
            all["revision"] = Value::Null;
        }
        let fields = run.as_object().cloned().unwrap_or_default();
        for (name, value) in fields {
            match (name.as_str(), &mut all[&name], value) {
                (_, Value::Array(list), Value::Array(more)) if name != "load" => list.extend(more),
                ("date", date, value) => *date = value,
                ("load", load, value) => load[1] = value[1].clone(),
                (_, field @ Value::Null, value) if name != "revision" => *field = value,
                _ => (),
            }
        }
    }
    Some(all)
}

/// Writes results with one line for each row, so that two runs can be compared by eye.
pub fn lines(mut value: Value) -> anyhow::Result<String> {
    let lists = ["rows", "cases"].map(|name| {
        let list = value.get_mut(name).map(Value::take);
        let lines = list.iter().flat_map(|list| list.as_array()).flatten().map(Value::to_string);
        let lines: Vec<String> = lines.collect();
        (name, format!("\"{name}\": [\n    {}\n  ]", lines.join(",\n    ")))
    });
    let mut text = serde_json::to_string_pretty(&value)?;
    for (name, list) in lists {
        text = text.replacen(&format!("\"{name}\": null"), &list, 1);
    }
    Ok(text + "\n")
}

/// With three digits that mean something.
pub fn number(value: f64) -> String {
    match value {
        value if value < 10.0 => format!("{value:.2}"),
        value if value < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(p50: f64) -> Round {
        let times = Times {
            samples: 1,
            min: p50,
            p50,
            p95: p50,
            p99: p50,
            max: p50,
            percentiles: [p50; 13],
        };
        Round { times, cpu_us: BTreeMap::from([("driver", p50)]) }
    }

    #[test]
    fn what_several_runs_found_out_is_one_result() {
        let files = serde_json::json!({"date": "1", "revision": "a", "load": [1, 2], "rows": [1], "failed": []});
        let open = serde_json::json!({
            "date": "2", "revision": "a", "load": [3, 4], "rows": [2], "cases": [5], "file_system": "ext4",
            "failed": [6]
        });
        let all = together(vec![files, open.clone()]).unwrap_or_default();
        let expected = serde_json::json!({
            "date": "2", "revision": "a", "load": [1, 4], "rows": [1, 2], "cases": [5], "file_system": "ext4",
            "failed": [6]
        });
        assert_eq!(all, expected);
        let failed = serde_json::json!({ "failed": [7] });
        let all = together(vec![all, failed]).unwrap_or_default();
        assert!(all["revision"] == "a" && all["failed"] == serde_json::json!([6, 7]), "{all}");
        let mut other = open;
        other["revision"] = "b".into();
        let all = together(vec![all, other]).unwrap_or_default();
        assert!(all["revision"].is_null() && all["rows"] == serde_json::json!([1, 2, 2]));
        assert_eq!(together(Vec::new()), None);
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        let ours = Case {
            setup: Setup::Ours,
            what: What::KnownContent,
            pace: Pace::OnePerMs,
            size: crate::plan::SIZES[0],
        };
        let mut rounds = BTreeMap::from([(ours, vec![round(20.0), round(60.0), round(90.0)])]);
        assert!(Row::of(&ours, &rounds).is_some_and(|row| row.ratios.is_empty()));
        if let Some(listener) = ours.peer(Setup::Listener) {
            rounds.insert(listener, vec![round(10.0), round(20.0), round(20.0)]);
        }
        let row = Row::of(&ours, &rounds);
        let ratio = row.as_ref().and_then(|row| row.ratios.get(&Setup::Listener));
        assert_eq!(ratio, Some(&Median { median: 3.0, spread: [2.0, 4.5] }));
        assert_eq!(row.map(|row| (row.p50, row.spread)), Some((60.0, [20.0, 90.0])));
    }
}
