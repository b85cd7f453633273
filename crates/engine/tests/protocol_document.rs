//! docs/engine-protocol.md says what the code does: its bytes, its numbers and its bounds.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;

use seawall_engine::protocol::{
    Answer, CANCEL_PAGE, HEADER, INLINE_MAX, Limits, MAGIC, MAX_TO_ENGINE, MAX_TO_HOST, Scan,
    Start, ToEngine, ToHost, VERSION, decode_to_engine, decode_to_host, encode_to_engine,
    encode_to_host,
};
use seawall_engine::report::{MAX_DETECTIONS, MAX_MEMBER, MAX_NAME, MAX_PATH, MAX_REASON};
use seawall_engine::{
    ArchiveLimits, Cleaning, Description, Detection, Diagnostic, Generation, Level, Metadata,
    Operation, Outcome, Severity,
};

fn document() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/engine-protocol.md");
    std::fs::read_to_string(path).unwrap()
}

/// Rows of the first table whose head begins so; their cells without backquotes.
fn rows(document: &str, head: &str) -> Vec<Vec<String>> {
    let after = document.lines().skip_while(|line| !line.starts_with(head)).skip(2);
    let rows = after.take_while(|line| line.starts_with('|')).map(|line| {
        let cells = line.trim_matches('|').split('|');
        cells.map(|cell| cell.trim().replace('`', "")).collect()
    });
    rows.collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    let digits: String = text.split_whitespace().collect();
    let pairs = (0..digits.len()).step_by(2).map(|at| &digits[at..at + 2]);
    pairs.map(|pair| u8::from_str_radix(pair, 16).unwrap()).collect()
}

/// No message without an example: a new one does not compile here before it has a name.
fn name_to_engine(message: &ToEngine) -> &'static str {
    match message {
        ToEngine::Start(_) => "Start",
        ToEngine::Scan(_) => "Scan",
        ToEngine::Ping => "Ping",
    }
}

fn name_to_host(message: &ToHost) -> &'static str {
    match message {
        ToHost::Ready(description) if !description.diagnostics.is_empty() => {
            "Ready, with a warning"
        }
        ToHost::Ready(_) => "Ready",
        ToHost::Failed { .. } => "Failed",
        ToHost::Started { .. } => "Started",
        ToHost::Report { answer, .. } => name_of_answer(answer),
        ToHost::Pong => "Pong",
    }
}

fn name_of_answer(answer: &Answer) -> &'static str {
    match answer {
        Answer::Done(Outcome::Clean) => "Report, clean",
        Answer::Done(Outcome::Infected(found)) => match found[0].cleaning {
            None => "Report, infected",
            Some(Cleaning::Cut { .. }) => "Report, infected and to cut",
            Some(Cleaning::Delete) => "Report, infected and to delete",
        },
        Answer::Done(Outcome::Allowed { .. }) => "Report, allowed",
        Answer::Error { .. } => "Report, error",
        Answer::TimedOut { .. } => "Report, timed out",
        Answer::Cancelled => "Report, cancelled",
    }
}

fn to_engine() -> Vec<ToEngine> {
    let metadata = Metadata {
        path: b"/tmp/\xff".to_vec(),
        guest: "g1".into(),
        operation: Operation::Exec,
        size: 69,
        archives: Some(ArchiveLimits {
            depth: 6,
            members: 10_000,
            member: 128 << 20,
            unpacked: 1 << 30,
        }),
    };
    vec![
        ToEngine::Start(Start { threads: 2, limits: Limits { memory: 2 << 30 }, strict: true }),
        ToEngine::Scan(Scan { id: 300, length: 68, limit_ms: 30_000, metadata }),
        ToEngine::Ping,
    ]
}

fn to_host() -> Vec<ToHost> {
    let ready =
        Description::new("word", "1", Generation([7; 32])).with_by_name(true).with_rules(300);
    let warning = Diagnostic {
        level: Level::Warning,
        file: "a.yar".into(),
        line: 3,
        column: 1,
        code: "W1".into(),
        reason: "slow".into(),
    };
    let warned = Description { diagnostics: vec![warning], omitted: 2, ..ready.clone() };
    vec![
        ToHost::Ready(ready),
        ToHost::Ready(warned),
        ToHost::Failed { diagnostics: vec![Diagnostic::error("E1", "x")], omitted: 0 },
        ToHost::Started { id: 300 },
        ToHost::Pong,
    ]
}

fn reports() -> Vec<ToHost> {
    let report = |id, answer| ToHost::Report { id, answer, next: None };
    let infected = |id, one| report(id, Answer::Done(Outcome::Infected(vec![one])));
    let cut = Detection {
        severity: Severity::Critical,
        family: Some("f".into()),
        cleaning: Some(Cleaning::Cut { offset: 4, length: 5 }),
        ..Detection::new("W")
    };
    let delete = Detection {
        severity: Severity::Low,
        cleaning: Some(Cleaning::Delete),
        ..Detection::new("W")
    };
    vec![
        ToHost::Report { id: 300, answer: Answer::Done(Outcome::Clean), next: Some(301) },
        infected(
            300,
            Detection { offset: Some(300), member: Some("m".into()), ..Detection::new("Word") },
        ),
        infected(1, cut),
        infected(1, delete),
        report(1, Answer::Done(Outcome::Allowed { name: "l:3".into() })),
        report(1, Answer::Error { reason: "no".into() }),
        report(1, Answer::TimedOut { what: "r1".into() }),
        report(1, Answer::Cancelled),
    ]
}

#[test]
fn the_documented_bytes_are_those_of_the_code() {
    let examples = rows(&document(), "| message | what it says |");
    let mut left: BTreeMap<String, Vec<u8>> =
        examples.into_iter().map(|row| (row[0].clone(), unhex(&row[2]))).collect();
    let mut take =
        |name: &str| left.remove(name).unwrap_or_else(|| panic!("{name} has no example"));
    for message in to_engine() {
        let name = name_to_engine(&message);
        let bytes = take(name);
        let encoded = encode_to_engine(message.clone()).unwrap();
        assert_eq!(hex(&encoded[HEADER..]), hex(&bytes), "{name}");
        assert_eq!(decode_to_engine(&encoded, true), Ok((message, &[][..])));
    }
    for message in to_host().into_iter().chain(reports()) {
        let name = name_to_host(&message);
        let bytes = take(name);
        let encoded = encode_to_host(message.clone()).unwrap();
        assert_eq!(hex(&encoded[HEADER..]), hex(&bytes), "{name}");
        assert_eq!(decode_to_host(&encoded), Ok(message));
    }
    assert!(left.is_empty(), "an example of no message: {left:?}");
}

#[test]
fn the_documented_header_is_that_of_the_code() {
    let document = document();
    let told = document.split("each message begins with `").nth(1).unwrap();
    let told = unhex(told.split('`').next().unwrap());
    assert_eq!(told, encode_to_engine(ToEngine::Ping).unwrap()[..HEADER]);
    let magic = format!("magic, the bytes `{}`", str::from_utf8(&MAGIC).unwrap());
    for part in [magic, format!("version, little endian: {VERSION}")] {
        assert!(document.contains(&part), "{part}");
    }
}

#[test]
fn the_documented_bounds_are_those_of_the_code() {
    let told: Vec<(String, usize)> = rows(&document(), "| constant | value |")
        .into_iter()
        .map(|row| (row[0].clone(), row[1].parse().unwrap()))
        .collect();
    let real = [
        ("MAX_TO_ENGINE", MAX_TO_ENGINE),
        ("INLINE_MAX", INLINE_MAX),
        ("MAX_TO_HOST", MAX_TO_HOST),
        ("MAX_NAME", MAX_NAME),
        ("MAX_MEMBER", MAX_MEMBER),
        ("MAX_REASON", MAX_REASON),
        ("MAX_PATH", MAX_PATH),
        ("MAX_DETECTIONS", MAX_DETECTIONS),
        ("CANCEL_PAGE", CANCEL_PAGE),
    ];
    assert_eq!(told, real.map(|(name, value)| (name.to_owned(), value)));
}

#[test]
fn the_documented_numbers_are_those_of_the_code() {
    let document = document();
    let to_engine = to_engine().into_iter().map(|message| {
        let name = name_to_engine(&message).to_owned();
        (name, encode_to_engine(message).unwrap()[HEADER])
    });
    let to_host = to_host().into_iter().chain(reports()).map(|message| {
        let name = name_to_host(&message).split(',').next().unwrap().to_owned();
        (name, encode_to_host(message).unwrap()[HEADER])
    });
    for (heading, real) in [
        ("## Messages to the engine", to_engine.collect::<BTreeMap<_, _>>()),
        ("## Messages to the service", to_host.collect()),
    ] {
        let told = rows(&document[document.find(heading).unwrap()..], "| number |");
        let told = told.into_iter().map(|row| (row[1].clone(), row[0].parse().unwrap()));
        assert_eq!(told.collect::<BTreeMap<String, u8>>(), real, "{heading}");
    }
}
