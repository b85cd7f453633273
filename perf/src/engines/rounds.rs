//! Measuring in rounds: every case runs once in each, in a new order, and is compared within the round.

use std::collections::BTreeMap;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::plan::Random;
use crate::sample::Median;
use crate::watchdog::step;

/// Something that is measured again and again.
pub struct Case<'a> {
    pub name: String,
    pub unit: &'static str,
    pub against: Option<Against>,
    /// Of what it is compared to, or of the value itself.
    pub goal: Option<Goal>,
    pub measure: Box<dyn FnMut() -> anyhow::Result<f64> + 'a>,
}

impl<'a> Case<'a> {
    pub fn new(
        name: impl Into<String>,
        unit: &'static str,
        measure: impl FnMut() -> anyhow::Result<f64> + 'a,
    ) -> Self {
        Self { name: name.into(), unit, against: None, goal: None, measure: Box::new(measure) }
    }

    /// Divided by what another case gave in the same round.
    pub fn over(self, peer: &str) -> Self {
        Self { against: Some(Against { how: How::Ratio, peer: peer.to_owned() }), ..self }
    }

    /// Less what another case gave in the same round.
    pub fn above(self, peer: &str) -> Self {
        Self { against: Some(Against { how: How::Difference, peer: peer.to_owned() }), ..self }
    }

    pub fn goal(self, goal: Goal) -> Self {
        Self { goal: Some(goal), ..self }
    }
}

/// What a case is compared with.
#[derive(Debug, Clone)]
pub struct Against {
    how: How,
    peer: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    Ratio,
    Difference,
}

/// What is aimed at. Whether it is met is told and never asserted.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    AtLeast(f64),
    AtMost(f64),
}

impl Goal {
    /// Whether a value meets it.
    pub fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(least) => value >= least,
            Self::AtMost(most) => value <= most,
        }
    }

    /// For people.
    pub fn name(self) -> String {
        match self {
            Self::AtLeast(least) => format!("≥ {least}"),
            Self::AtMost(most) => format!("≤ {most}"),
        }
    }
}

/// One line of the report: the median of what the rounds gave.
#[derive(Debug, Serialize)]
pub struct Row {
    pub scenario: &'static str,
    pub name: String,
    pub value: f64,
    pub unit: &'static str,
    pub spread: [f64; 2],
    pub against: Option<Compared>,
    pub goal: Option<Goal>,
    pub met: Option<bool>,
    pub rounds: Vec<f64>,
}

/// A case beside another one, round by round.
#[derive(Debug, Serialize)]
pub struct Compared {
    pub how: How,
    pub to: String,
    #[serde(flatten)]
    pub median: Median,
}

impl Row {
    /// Of what was measured once.
    pub fn single(
        scenario: &'static str,
        name: impl Into<String>,
        unit: &'static str,
        value: f64,
    ) -> Self {
        let rounds = vec![value];
        let (name, spread) = (name.into(), [value; 2]);
        Self { scenario, name, value, unit, spread, against: None, goal: None, met: None, rounds }
    }

    /// The median of what rounds gave; none of none.
    pub fn of_rounds(
        scenario: &'static str,
        name: impl Into<String>,
        unit: &'static str,
        rounds: Vec<f64>,
    ) -> Option<Self> {
        let Median { median, spread } = Median::of(rounds.iter().copied())?;
        Some(Self { rounds, spread, ..Self::single(scenario, name, unit, median) })
    }

    /// With what is aimed at.
    pub fn aim(self, goal: Goal) -> Self {
        Self { met: Some(goal.is_met(self.value)), goal: Some(goal), ..self }
    }

    fn of(
        scenario: &'static str,
        case: &Case<'_>,
        all: &BTreeMap<String, Vec<f64>>,
    ) -> Option<Self> {
        let rounds = all.get(&case.name)?.clone();
        let own = Median::of(rounds.iter().copied())?;
        let against = case.against.as_ref().and_then(|Against { how, peer }| {
            let pairs = rounds.iter().zip(all.get(peer)?);
            let compared = pairs.map(|(own, other)| match how {
                How::Ratio => own / other,
                How::Difference => own - other,
            });
            Some(Compared { how: *how, to: peer.clone(), median: Median::of(compared)? })
        });
        let judged = against.as_ref().map_or(own.median, |compared| compared.median.median);
        Some(Self {
            scenario,
            name: case.name.clone(),
            value: own.median,
            unit: case.unit,
            spread: own.spread,
            met: case.goal.map(|goal| goal.is_met(judged)),
            goal: case.goal,
            against,
            rounds,
        })
    }
}

/// Measures all cases in `rounds` rounds. With `warm_up` a round before them does not count.
pub fn measure(
    scenario: &'static str,
    mut cases: Vec<Case<'_>>,
    rounds: u32,
    warm_up: bool,
) -> anyhow::Result<Vec<Row>> {
    let mut random = Random(u64::from(std::process::id()));
    let mut all: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let before = u32::from(warm_up);
    for round in 0..rounds + before {
        let mut order: Vec<usize> = (0..cases.len()).collect();
        random.shuffle(&mut order);
        for at in order {
            let case = &mut cases[at];
            step(format!("{scenario}, round {} of {rounds}: {}", round + 1, case.name));
            let value = (case.measure)().with_context(|| case.name.clone())?;
            if round >= before {
                all.entry(case.name.clone()).or_default().push(value);
            }
        }
    }
    Ok(cases.iter().filter_map(|case| Row::of(scenario, case, &all)).collect())
}

/// The middle one of many times, in microseconds.
pub fn median_us(times: impl IntoIterator<Item = std::time::Duration>) -> anyhow::Result<f64> {
    let times = times.into_iter().map(|time| time.as_nanos() as f64 / 1e3);
    Ok(Median::of(times).context("nothing was measured")?.median)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_compared_within_their_round() {
        let (mut slow, mut fast) = ([20.0, 60.0, 90.0].iter(), [10.0, 20.0, 20.0].iter());
        let next = |values: &mut std::slice::Iter<'_, f64>| {
            values.next().copied().context("more rounds than there are")
        };
        let cases = vec![
            Case::new("ours", "us", || next(&mut slow)).over("bare").goal(Goal::AtMost(2.5)),
            Case::new("bare", "us", || next(&mut fast)),
        ];
        let rows = measure("test", cases, 3, false).unwrap_or_default();
        let found: Vec<_> =
            rows.iter().map(|row| (row.name.as_str(), row.value, row.met)).collect();
        assert_eq!(found, [("ours", 60.0, Some(false)), ("bare", 20.0, None)]);
        let ratio = rows[0].against.as_ref().map(|compared| compared.median);
        assert_eq!(ratio, Some(Median { median: 3.0, spread: [2.0, 4.5] }));
    }
}
