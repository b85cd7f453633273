//! What a run of the engines' scenarios found out.

use std::fmt::Write;

use comfy_table::{Cell, CellAlignment, Table};
use serde::Serialize;

use super::rounds::{Compared, How, Row};
use crate::html::Plot;
use crate::machine::{self, Machine};
use crate::report::{Failure, number};

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
    pub rows: Vec<Row>,
    pub plots: Vec<Plot>,
    /// What was compared with what, and how it was counted.
    pub notes: Vec<String>,
    pub failed: Vec<Failure>,
}

impl Results {
    /// Of a run that ends now; `load` is the load average at its beginning.
    pub fn new(
        quick: bool,
        load: f64,
        rows: Vec<Row>,
        plots: Vec<Plot>,
        notes: Vec<String>,
        failed: Vec<Failure>,
    ) -> Self {
        Self {
            date: jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            revision: machine::revision(),
            programs_from: std::env::var("SEAWALL_BIN_DIR").map_or("built here", |_| "elsewhere"),
            quick,
            machine: Machine::describe(),
            load: [load, machine::load()],
            rows,
            plots,
            notes,
            failed,
        }
    }

    /// What the file of this run is called.
    pub fn file_name(&self) -> String {
        format!("{}-engines.json", self.date.replace(':', ""))
    }

    pub fn to_json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
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
        writeln!(out, "machine   {cpus} × {cpu}, {memory_mib} MiB, Linux {kernel}")?;
        writeln!(out, "source    {revision}, programs {}", self.programs_from)?;
        writeln!(out, "load      {} before, {} after", self.load[0], self.load[1])?;
        if self.quick {
            writeln!(out, "quick     shows that the benchmark works; no figures to go by")?;
        }
        if !self.rows.is_empty() {
            writeln!(out, "\n{}", table(&self.rows))?;
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
    table.set_header(["SCENARIO", "WHAT", "MEDIAN", "", "ROUNDS", "COMPARED", "GOAL"]);
    for row in rows {
        let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
        let spread = |[low, high]: [f64; 2]| format!("{}–{}", number(low), number(high));
        let compared = row.against.as_ref().map_or(String::new(), |compared| {
            let Compared { how, to, median } = compared;
            let (middle, rounds) = (number(median.median), spread(median.spread));
            match how {
                How::Ratio => format!("{middle} ({rounds}) × {to}"),
                How::Difference => format!("{middle} ({rounds}) above {to}"),
            }
        });
        let met = match row.met {
            Some(true) => ", met",
            Some(false) => ", missed",
            None => "",
        };
        table.add_row([
            Cell::new(row.scenario),
            Cell::new(&row.name),
            right(number(row.value)),
            Cell::new(row.unit),
            right(if row.rounds.len() > 1 { spread(row.spread) } else { String::new() }),
            Cell::new(compared),
            Cell::new(row.goal.map_or(String::new(), |goal| goal.name() + met)),
        ]);
    }
    table
}
