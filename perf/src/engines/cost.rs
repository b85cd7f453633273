//! `engines-cost`: what the security API itself costs.

use seawall_engine::host::{ContentWriter, SharedContent};
use seawall_lab::Process;

use super::Bench;
use super::api::Api;
use super::made;
use super::null::Echo;
use super::rounds::{Case, Goal, Row, measure, median_us};
use crate::cpu::{self, Cpus};

const NAME: &str = "engines-cost";
const SIZE: usize = 16 << 10;
/// Too long for a message: it comes as a descriptor, and is mapped.
const LONGER: usize = 256 << 10;
/// Microseconds above a bare round trip.
const ABOVE: f64 = 30.0;
const BARE: &str = "bare SEQPACKET round trip, 64 bytes, two processes";

pub fn run(bench: &mut Bench) -> anyhow::Result<Vec<Row>> {
    let samples = if bench.quick { 20 } else { 2000 };
    let cpus = Cpus::choose()?;
    // The supervisor's thread and the engine's process begin where this thread is.
    cpu::pin_self(cpus.guest)?;
    let own = std::env::current_exe()?.display().to_string();
    let api = Api::start(vec![own, "null-engine".into()], 1, 256)?;
    cpu::pin_tree(&api.process()?, cpus.host)?;
    let echo = Echo::start()?;
    let process = Process::from_pid(echo.pid());
    cpu::pin_tree(&process.ok_or_else(|| anyhow::anyhow!("the echo is gone"))?, cpus.host)?;
    let bytes = made::content(SIZE, 1);
    let ready = SharedContent::new(&bytes[..])?;
    let sealed = {
        let mut writer = ContentWriter::new(LONGER as u64)?;
        writer.append(&made::content(LONGER, 1))?;
        writer.seal()?
    };

    let bare =
        || median_us((0..samples).map(|_| echo.round_trip()).collect::<Result<Vec<_>, _>>()?);
    let scan = || {
        let times = (0..samples).map(|_| api.scan(ready.clone()));
        median_us(times.collect::<Result<Vec<_>, _>>()?)
    };
    let longer = || {
        let times = (0..samples).map(|_| api.scan(sealed.clone()));
        median_us(times.collect::<Result<Vec<_>, _>>()?)
    };
    let both = || {
        let times = (0..samples).map(|_| api.copy_and_scan(&bytes));
        median_us(times.collect::<Result<Vec<_>, _>>()?)
    };
    let goal = Goal::AtMost(ABOVE);
    let cases = vec![
        Case::new(BARE, "us", bare),
        Case::new("scan of 16 KiB, copied before", "us", scan).above(BARE).goal(goal),
        Case::new("copy and scan of 16 KiB", "us", both).above(BARE).goal(goal),
        Case::new("scan of 256 KiB, sealed before", "us", longer).above(BARE),
    ];
    let rows = measure(NAME, cases, bench.rounds, !bench.quick);
    cpu::unpin_self()?;
    bench.note(format!(
        "{NAME}: an engine that reads one byte of each page; its process and the echo on one CPU, the \
         service's side on another; medians of {samples}; a report counts when the service has it"
    ));
    rows
}
