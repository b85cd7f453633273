//! Timing opens, and what to say of many times.

use std::ffi::CString;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::fs::{Mode, OFlags};
use serde::Serialize;

use crate::plan::{Pace, WARM_UP};

/// What is done with an open file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    Nothing,
    /// It is read to its end.
    Read,
}

/// Opens and closes `count` files, beginning again with the first where there are fewer. Gives the
/// times in microseconds, without those of the warm-up.
pub fn time_opens(
    paths: &[CString],
    count: u32,
    pace: Pace,
    with: Use,
) -> anyhow::Result<Vec<f64>> {
    if pace == Pace::FourAtOnce {
        return time_four(paths, count);
    }
    let mut times = Vec::with_capacity(count as usize);
    let mut buffer = vec![0; 64 << 10];
    let begin = Instant::now();
    for (n, path) in (0..count).zip(paths.iter().cycle()) {
        if pace == Pace::OnePerMs {
            let next = begin + Duration::from_millis(n.into());
            thread::sleep(next.saturating_duration_since(Instant::now()));
        }
        let start = Instant::now();
        let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .with_context(|| format!("{path:?} cannot be opened"))?;
        while with == Use::Read && rustix::io::read(&file, &mut buffer)? > 0 {}
        drop(file);
        let took = start.elapsed();
        if n >= WARM_UP {
            times.push(took.as_nanos() as f64 / 1e3);
        }
    }
    Ok(times)
}

/// The same by four threads: one time, that of all by their number.
fn time_four(paths: &[CString], count: u32) -> anyhow::Result<Vec<f64>> {
    let each = count.div_ceil(4) as usize;
    let order: Vec<&CString> = paths.iter().cycle().take(count as usize).collect();
    let begin = Instant::now();
    thread::scope(|scope| {
        let open = |part: &[&CString]| -> anyhow::Result<()> {
            for path in part {
                drop(rustix::fs::open(*path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?);
            }
            Ok(())
        };
        let threads: Vec<_> =
            order.chunks(each.max(1)).map(|part| scope.spawn(move || open(part))).collect();
        threads.into_iter().try_for_each(|thread| {
            thread.join().map_err(|_| anyhow::anyhow!("an opener panicked"))?
        })
    })?;
    Ok(vec![begin.elapsed().as_nanos() as f64 / 1e3 / f64::from(count)])
}

/// What one round of a case took, in microseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Times {
    pub samples: usize,
    pub min: f64,
    pub p50: f64,
    pub p95: f64,
    pub p99: f64,
    pub max: f64,
    /// At [`PERCENTS`].
    pub percentiles: [f64; PERCENTS.len()],
}

/// Where a distribution is looked at.
pub const PERCENTS: [usize; 13] = [1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99];

impl Times {
    /// Nothing of nothing.
    pub fn of(mut samples: Vec<f64>) -> Option<Self> {
        samples.sort_by(f64::total_cmp);
        let (min, max) = (*samples.first()?, *samples.last()?);
        // Nearest rank.
        let at = |percent: usize| samples[(samples.len() * percent).div_ceil(100) - 1];
        let percentiles = PERCENTS.map(at);
        let (p50, p95, p99) = (at(50), at(95), at(99));
        Some(Self { samples: samples.len(), min, p50, p95, p99, max, percentiles })
    }
}

/// A median and between what the single values lie.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Median {
    pub median: f64,
    pub spread: [f64; 2],
}

impl Median {
    /// Nothing of nothing. Of an even number the mean of the two in the middle. Rounded to thousandths.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let spread = [*values.first()?, *values.last()?];
        let middle = (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0;
        let rounded = |value: f64| (value * 1e3).round() / 1e3;
        Some(Self { median: rounded(middle), spread: spread.map(rounded) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let times =
            Times::of((1..=200).rev().map(f64::from).collect()).map(|t| [t.p50, t.p95, t.p99]);
        assert_eq!(times, Some([100.0, 190.0, 198.0]));
        let one = Times::of(vec![3.0]).map(|t| [t.min, t.p50, t.p99, t.max]);
        assert_eq!(one, Some([3.0; 4]));
        assert!(Times::of(Vec::new()).is_none());
    }

    #[test]
    fn a_median_has_its_spread() {
        let of = |values: &[f64]| Median::of(values.iter().copied());
        assert_eq!(of(&[9.0, 1.0, 2.0]), Some(Median { median: 2.0, spread: [1.0, 9.0] }));
        assert_eq!(of(&[4.0, 2.0]), Some(Median { median: 3.0, spread: [2.0, 4.0] }));
        assert_eq!(of(&[]), None);
    }
}
