//! `exclusions`: what it costs to decide whether policy excludes a file.

use std::hint::black_box;
use std::time::Instant;

use anyhow::ensure;
use seawall_proto::{Exclude, ExcludedProcess, Facts, Policy, Rules};

use super::Bench;
use super::rounds::{Case, Goal, Row, measure};

const NAME: &str = "exclusions";
const COUNT: usize = 10_000;
/// Nanoseconds of a decision.
const MOST: f64 = 2000.0;

pub fn run(bench: &mut Bench) -> anyhow::Result<Vec<Row>> {
    let decisions = if bench.quick { 1_000 } else { 200_000 };
    let folders = of_paths(|n| format!("/srv/customers/{n}/data"));
    let patterns = of_paths(|n| format!("/home/*/work{n}/**/*.o"));
    let all = every_kind();
    let ask = |rules: &Rules, path: fn(usize) -> String, excluded: bool| {
        let paths: Vec<_> = (0..1000).map(|n| path(n * 7919 % COUNT).into_bytes()).collect();
        let since = Instant::now();
        for path in paths.iter().cycle().take(decisions) {
            let facts = Facts {
                path: Some(path),
                owner: Some(33),
                file_system: Some("ext4"),
                process: Some((b"/usr/sbin/apache2", 33)),
            };
            let found = rules.exclusion(black_box(&facts));
            ensure!(found.is_some() == excluded, "{}", String::from_utf8_lossy(path));
        }
        Ok(since.elapsed().as_nanos() as f64 / decisions as f64)
    };
    let other = |n| format!("/srv/websites/{n}/htdocs/wp-content/themes/index.php");
    let goal = Goal::AtMost(MOST);
    let cases = vec![
        Case::new("10,000 folders, in one of them", "ns", || {
            ask(&folders, |n| format!("/srv/customers/{n}/data/2026/11/invoice.pdf"), true)
        })
        .goal(goal),
        Case::new("10,000 folders, in none", "ns", || ask(&folders, other, false)).goal(goal),
        Case::new("10,000 patterns, one fits", "ns", || {
            ask(&patterns, |n| format!("/home/ann/work{n}/src/lib/main.o"), true)
        })
        .goal(goal),
        Case::new("10,000 patterns, none fits", "ns", || ask(&patterns, other, false)).goal(goal),
        Case::new("10,000 of every kind, none holds", "ns", || ask(&all, other, false)).goal(goal),
    ];
    let rows = measure(NAME, cases, bench.rounds, !bench.quick)?;
    bench.note(format!("{NAME}: each decision of another path, with owner and program known"));
    Ok(rows)
}

fn rules(exclude: Exclude) -> Rules {
    Policy { exclude, ..Policy::default() }.into()
}

fn of_paths(pattern: fn(usize) -> String) -> Rules {
    let paths = (0..COUNT).map(|n| pattern(n).into_bytes().into()).collect();
    rules(Exclude { paths, ..Exclude::default() })
}

/// A mix as operators of many guests may have it.
fn every_kind() -> Rules {
    let some = |share: usize| 0..COUNT / 100 * share;
    let folders = some(40).map(|n| format!("/srv/customers/{n}/data"));
    let patterns = some(20).map(|n| format!("/home/*/work{n}/**/*.o"));
    let endings = some(10).map(|n| format!("/**/*.made{n}"));
    let program = |n| format!("/usr/lib/programs/{n}/bin/main").into_bytes().into();
    rules(Exclude {
        paths: folders.chain(patterns).chain(endings).map(|it| it.into_bytes().into()).collect(),
        extensions: some(10).map(|n| format!("ext{n}").into_bytes().into()).collect(),
        owners: (100_000..).take(COUNT / 10).collect(),
        processes: some(10).map(|n| ExcludedProcess { path: program(n), user: 0 }).collect(),
        ..Exclude::default()
    })
}
