//! `engines-rules`: what many rules cost small files.

use std::cell::RefCell;
use std::time::Instant;

use anyhow::Context;
use seawall_engine::host::SharedContent;

use super::Bench;
use super::api::Api;
use super::made;
use super::rounds::{Case, Row, measure, median_us};
use crate::plan::size_name;

const NAME: &str = "engines-rules";
const SIZES: [u32; 3] = [4 << 10, 64 << 10, 1 << 20];
/// Different contents of a size.
const CONTENTS: u64 = 8;

/// One rule set, in an engine and in this process.
struct Set {
    count: usize,
    api: Api,
    rules: &'static yara_x::Rules,
}

pub fn run(bench: &mut Bench) -> anyhow::Result<Vec<Row>> {
    let counts: &[usize] = if bench.quick { &[10, 200] } else { &[10, 1_000, 10_000] };
    let sets = counts.iter().map(|count| set(bench, *count)).collect::<anyhow::Result<Vec<_>>>()?;
    let mut cases = Vec::new();
    for size in SIZES {
        let contents: Vec<Vec<u8>> =
            (0..CONTENTS).map(|seed| made::content(size as usize, seed)).collect();
        // Leaked, like the rules: they are needed to the end of the process.
        let contents: &'static [Vec<u8>] = contents.leak();
        let samples = match size {
            _ if bench.quick => 8,
            ..=65_536 => 400,
            _ => 64,
        };
        for set in &sets {
            let (count, size) = (set.count, size_name(size));
            let bare = format!("{size}, {count} rules, yara-x in this process");
            let scanner = RefCell::new(scanner(set.rules));
            let in_process = move || {
                let mut scanner = scanner.borrow_mut();
                let mut times = Vec::new();
                for content in contents.iter().cycle().take(samples) {
                    let begin = Instant::now();
                    let found = scanner.scan(content)?.matching_rules().len();
                    times.push(begin.elapsed());
                    std::hint::black_box(found);
                }
                median_us(times)
            };
            let sealed = contents.iter().map(|content| SharedContent::new(&content[..]));
            let sealed = sealed.collect::<Result<Vec<_>, _>>()?;
            let through_api = move || {
                let all = sealed.iter().cycle().take(samples);
                let times = all.map(|content| set.api.scan(content.clone()));
                median_us(times.collect::<anyhow::Result<Vec<_>>>()?)
            };
            cases.push(Case::new(&bare, "us", in_process));
            let name = format!("{size}, {count} rules, through the API");
            cases.push(Case::new(name, "us", through_api).over(&bare));
        }
    }
    let rows = measure(NAME, cases, bench.rounds, !bench.quick)?;
    bench.note(format!(
        "{NAME}: one scan at a time; contents of the size, copied before; the API's time ends when the \
         service has the report"
    ));
    Ok(rows)
}

fn set(bench: &Bench, count: usize) -> anyhow::Result<Set> {
    let folder = bench.folder(&format!("rules-{count}"));
    made::write_rules(&folder, count)?;
    let program = bench.program("seawall-engine-yara")?;
    let command = [program.display().to_string(), "--rules".into(), folder.display().to_string()];
    let api = Api::start(command.to_vec(), 1, 4096)?;
    let mut compiler = yara_x::Compiler::new();
    let source = std::fs::read_to_string(folder.join("made.yar"))?;
    compiler.add_source(source.as_str()).context("the made rules")?;
    Ok(Set { count, api, rules: Box::leak(Box::new(compiler.build())) })
}

/// As the engine makes one.
fn scanner(rules: &'static yara_x::Rules) -> yara_x::Scanner<'static> {
    let mut scanner = yara_x::Scanner::new(rules);
    scanner.fast_scan(true);
    scanner
}
