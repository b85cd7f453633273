//! Results as a page: plots and figures, for somebody who was not there. It needs nothing but itself.

use anyhow::anyhow;
use askama::Template;
use plotters::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::engines::rounds::Goal;
use crate::report::number;

const SIZE: (u32, u32) = (860, 420);
/// Colours that most eyes tell apart (Okabe and Ito, 2008).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
];

/// What is drawn.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plot {
    pub title: String,
    /// What is to be seen in it.
    pub says: String,
    pub x: Axis,
    pub y: Axis,
    pub lines: Vec<Line>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Axis {
    pub name: String,
    /// Equal steps multiply.
    pub log: bool,
}

impl Axis {
    pub fn linear(name: &str) -> Self {
        Self { name: name.into(), log: false }
    }

    pub fn log(name: &str) -> Self {
        Self { name: name.into(), log: true }
    }

    fn place(&self, value: f64) -> f64 {
        if self.log { value.max(1e-9).log10() } else { value }
    }

    fn label(&self, place: f64) -> String {
        let value = if self.log { 10_f64.powf(place) } else { place };
        if value.fract() == 0.0 { format!("{value}") } else { number(value) }
    }

    /// From the least to the most of these, and for a linear axis from 0.
    fn range(&self, values: impl Iterator<Item = f64>) -> std::ops::Range<f64> {
        let (low, high) = values
            .map(|value| self.place(value))
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), place| {
                (low.min(place), high.max(place))
            });
        if low > high {
            return 0.0..1.0;
        }
        let low = if self.log { low } else { low.min(0.0) };
        low..(if high > low { high } else { low + 1.0 })
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Line {
    pub name: String,
    pub points: Vec<[f64; 2]>,
}

#[derive(Template)]
#[template(path = "page.html")]
struct Page {
    date: String,
    quick: bool,
    about: Vec<(&'static str, String)>,
    plots: Vec<Drawn>,
    rows: Vec<Row>,
    notes: Vec<String>,
    failed: Vec<String>,
}

struct Drawn {
    title: String,
    svg: String,
    says: String,
}

struct Row {
    scenario: String,
    name: String,
    value: String,
    unit: String,
    spread: String,
    goal: String,
    met: &'static str,
}

/// The page of a run's results, as they are kept.
pub fn page(results: &Value) -> anyhow::Result<String> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let list = |name: &str| results[name].as_array().cloned().unwrap_or_default();
    let machine = &results["machine"];
    let mut about = vec![
        ("Date", text(&results["date"])),
        (
            "Machine",
            format!(
                "{} × {}, {} MiB, Linux {}",
                machine["cpus"],
                text(&machine["cpu"]),
                machine["memory_mib"],
                text(&machine["kernel"])
            ),
        ),
        ("Source", text(&results["revision"])),
        ("Load", format!("{} before, {} after", results["load"][0], results["load"][1])),
    ];
    if let Some(kind) = results["file_system"].as_str() {
        about.push(("Files on", kind.to_owned()));
    }
    let draw = |plot: Value| -> anyhow::Result<Drawn> {
        let plot: Plot = serde_json::from_value(plot)?;
        Ok(Drawn { svg: plot.draw()?, title: plot.title, says: plot.says })
    };
    let failure = |one: &Value| format!("{}: {}", text(&one["name"]), text(&one["reason"]));
    let page = Page {
        date: text(&results["date"]),
        quick: results["quick"] == true,
        about,
        plots: list("plots").into_iter().map(draw).collect::<anyhow::Result<_>>()?,
        rows: list("rows").iter().map(Row::of).collect::<anyhow::Result<_>>()?,
        notes: list("notes").iter().map(text).collect(),
        failed: list("failed").iter().map(failure).collect(),
    };
    Ok(page.render()?)
}

impl Row {
    fn of(row: &Value) -> anyhow::Result<Self> {
        let text = |name: &str| row[name].as_str().unwrap_or_default().to_owned();
        let float = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
        let goal: Option<Goal> = serde_json::from_value(row["goal"].clone())?;
        let spread = row["spread"].as_array().filter(|spread| spread[0] != spread[1]);
        Ok(Self {
            scenario: text("scenario"),
            name: text("name"),
            value: number(float(&row["value"])),
            unit: text("unit"),
            spread: spread.map_or(String::new(), |spread| {
                format!("{}–{}", number(float(&spread[0])), number(float(&spread[1])))
            }),
            goal: goal.map_or(String::new(), Goal::name),
            met: match row["met"].as_bool() {
                Some(true) => "yes",
                Some(false) => "no",
                None => "",
            },
        })
    }
}

impl Plot {
    fn draw(&self) -> anyhow::Result<String> {
        let mut svg = String::new();
        self.draw_into(&mut svg).map_err(|error| anyhow!("{}: {error}", self.title))?;
        Ok(svg)
    }

    fn draw_into(&self, svg: &mut String) -> Result<(), Box<dyn std::error::Error + '_>> {
        let all = || self.lines.iter().flat_map(|line| &line.points);
        let x_range = self.x.range(all().map(|point| point[0]));
        // Room for the names beside the lines.
        let x_range = x_range.start..x_range.end + 0.4 * (x_range.end - x_range.start);
        let y_range = self.y.range(all().map(|point| point[1]));
        let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(64)
            .build_cartesian_2d(x_range, y_range)?;
        chart
            .configure_mesh()
            .x_desc(&self.x.name)
            .y_desc(&self.y.name)
            .x_label_formatter(&|place| self.x.label(*place))
            .y_label_formatter(&|place| self.y.label(*place))
            .light_line_style(WHITE)
            .draw()?;
        for (line, colour) in self.lines.iter().zip(COLOURS.into_iter().cycle()) {
            let points = line.points.iter().map(|[x, y]| (self.x.place(*x), self.y.place(*y)));
            let style = colour.stroke_width(2);
            chart
                .draw_series(LineSeries::new(points, style))?
                .label(&line.name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.3))
            .draw()?;
        area.present()?;
        drop(chart);
        drop(area);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn results() -> Value {
        let line = |name: &str| json!({ "name": name, "points": [[1.0, 2.0], [100.0, 50.0]] });
        let axis = |name: &str, log: bool| json!({ "name": name, "log": log });
        json!({
            "date": "2026-11-29T10:00:00Z",
            "quick": false,
            "machine": { "cpus": 2, "cpu": "<b>CPU</b>", "memory_mib": 1000, "kernel": "6.1" },
            "load": [0.5, 1.0],
            "rows": [
                { "name": "a & b", "value": 1.5, "unit": "x", "spread": [1.0, 2.0],
                  "goal": { "at_most": 2.0 }, "met": true },
                { "name": "plain", "value": 3.0, "unit": "us", "spread": [3.0, 3.0] },
            ],
            "plots": [
                { "title": "Two", "says": "they differ", "x": axis("µs", true), "y": axis("%", false),
                  "lines": [line("one"), line("<two>")] },
                { "title": "None", "says": "", "x": axis("x", false), "y": axis("y", true), "lines": [] },
            ],
            "notes": ["<script>"],
            "failed": [{ "name": "this", "reason": "that" }],
        })
    }

    #[test]
    fn a_page_has_all_that_was_found_and_nothing_of_it_is_markup() {
        let page = page(&results()).unwrap();
        for part in ["a &#38; b", "1.00–2.00", "≤ 2", "this: that", "they differ", "<svg", "µs"]
        {
            assert!(page.contains(part), "{part}\n{page}");
        }
        for part in ["<script>", "<b>", "<two>", "NaN"] {
            assert!(!page.contains(part), "{part}\n{page}");
        }
        assert_eq!(page.matches("<svg").count(), 2);
    }

    #[test]
    fn results_without_plots_are_a_page_too() {
        let mut results = results();
        results.as_object_mut().unwrap().remove("plots");
        assert!(!page(&results).unwrap().contains("<svg"));
    }
}
