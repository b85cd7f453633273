use super::*;
use crate::database::Database;
use seawall_client::{EventKind, Verdict};
use std::sync::Arc;

fn line(id: u64, at: i64, change: impl FnOnce(&mut Event)) -> Arc<Line> {
    let mut event = Event::new(EventKind::Verdict);
    event.id = Some(id);
    change(&mut event);
    let text = serde_json::to_string(&event).unwrap();
    Arc::new(Line { id, at, event, text })
}

struct Files {
    folder: tempfile::TempDir,
    database: Database,
}

impl Files {
    fn with(lines: &[Arc<Line>]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut database = Database::new(folder.path().join("e.db"), &FORMAT);
        database.write(|transaction| append(transaction, lines)).unwrap();
        Self { folder, database }
    }

    fn reader(&self, filter: Filter) -> Reader {
        Reader::open(&self.folder.path().join("e.db"), filter).unwrap()
    }

    fn ids(&self, filter: Filter) -> Vec<u64> {
        self.reader(filter).page(0, 100_000).unwrap().iter().map(|(id, _)| *id).collect()
    }

    fn trim(&mut self, keep: Retention, now: i64) -> bool {
        self.database.write(|transaction| trim(transaction, keep, Some(now))).unwrap()
    }
}

#[test]
fn a_filter_says_the_same_to_the_table_and_to_what_comes_live() {
    let lines = [
        line(1, 100, |event| event.guest = Some("g1".into())),
        line(2, 200, |event| {
            event.guest = Some("g2".into());
            event.path = Some(r"/tmp/a\n\x1b[2J%_*'x".into());
            event.verdict = Some(Verdict::Infected);
            event.hash = Some("ab12cd".into());
        }),
        line(3, 150, |event| {
            event.kind = EventKind::Unscanned;
            event.path = Some("/TMP/b".into());
            event.hash = Some("ab13".into());
        }),
        line(4, 400, |event| event.kind = EventKind::GuestProtected),
    ];
    let files = Files::with(&lines);
    let none = Filter::default;
    let cases: Vec<(Filter, &[u64])> = vec![
        (none(), &[1, 2, 3, 4]),
        (Filter { guest: Some("g2".into()), ..none() }, &[2]),
        (Filter { guest: Some("g".into()), ..none() }, &[]),
        (
            Filter { kinds: vec![EventKind::Unscanned, EventKind::GuestProtected], ..none() },
            &[3, 4],
        ),
        (Filter { since: Some(150), ..none() }, &[2, 3, 4]),
        (Filter { since: Some(101), until: Some(200), ..none() }, &[3]),
        (Filter { hash: Some("ab1".into()), ..none() }, &[2, 3]),
        (Filter { hash: Some("ab12cd".into()), ..none() }, &[2]),
        (Filter { path: Some(r"a\n\x1b[2J%_*'x".into()), ..none() }, &[2]),
        (Filter { path: Some("/tmp/".into()), ..none() }, &[2]),
        (Filter { path: Some("*".into()), ..none() }, &[2]),
        (Filter { verdict: Some(Verdict::Infected), ..none() }, &[2]),
        (
            Filter {
                kinds: vec![EventKind::Unscanned],
                verdict: Some(Verdict::Infected),
                ..none()
            },
            &[],
        ),
    ];
    for (filter, expected) in cases {
        assert_eq!(files.ids(filter.clone()), expected, "{filter:?}");
        let live = lines.iter().filter(|line| filter.fits(&line.event, line.at));
        assert_eq!(live.map(|line| line.id).collect::<Vec<_>>(), expected, "{filter:?}");
    }
}

#[test]
fn pages_go_on_after_an_id_and_the_newest_are_found() {
    let lines: Vec<_> = (1..=10).map(|id| line(id * 3, 0, |_| ())).collect();
    let files = Files::with(&lines);
    let reader = files.reader(Filter::default());
    assert_eq!(reader.newest(2).unwrap(), 27);
    assert_eq!(reader.newest(100).unwrap(), 3);
    assert_eq!(reader.newest(0).unwrap(), 31, "one past the last");
    let ids = |from, count| {
        reader.page(from, count).unwrap().iter().map(|(id, _)| *id).collect::<Vec<_>>()
    };
    assert_eq!(ids(4, 3), [6, 9, 12]);
    assert_eq!(ids(13, 100).len(), 6);
    let nobody = files.reader(Filter { guest: Some("x".into()), ..Filter::default() });
    assert_eq!(nobody.newest(5).unwrap(), 31);
}

#[test]
fn old_events_go_by_age_and_the_clock_may_jump() {
    const NOW: i64 = 1_000 * DAY_MS;
    let day = |n: i64| NOW - n * DAY_MS;
    let lines = [
        line(1, day(100), |_| ()),
        line(2, day(89), |_| ()),
        // Written while the clock was ahead, and then behind.
        line(3, day(-400), |_| ()),
        line(4, day(500), |_| ()),
    ];
    let mut files = Files::with(&lines);
    assert!(!files.trim(Retention { days: 90, most: 1 << 30 }, NOW));
    assert_eq!(files.ids(Filter::default()), [2, 3]);
    // The clock is back a hundred days: nothing goes, and nothing fails.
    files.trim(Retention { days: 90, most: 1 << 30 }, day(100));
    assert_eq!(files.ids(Filter::default()), [2, 3]);
    files.trim(Retention { days: 1, most: 1 << 30 }, day(-900));
    let last = files.database.write(last_id).unwrap();
    assert_eq!((files.ids(Filter::default()).len(), last), (0, Some(4)), "no id is used again");
}

#[test]
fn the_oldest_go_when_there_are_too_many_and_the_file_stays_bounded() {
    let keep = Retention { days: 90, most: 1 << 20 };
    let mut files = Files::with(&[]);
    let (mut id, path) = (1, files.folder.path().join("e.db"));
    for _ in 0..40 {
        let lines: Vec<_> = (id..id + 512)
            .map(|id| line(id, 0, |event| event.reason = Some("x".repeat(300))))
            .collect();
        id += 512;
        files.database.write(|transaction| append(transaction, &lines)).unwrap();
        while files.trim(keep, 0) {}
    }
    let left = files.ids(Filter::default());
    assert_eq!(left.last(), Some(&(id - 1)), "the newest are there");
    assert!(left.len() > 1000, "{}", left.len());
    let size = std::fs::metadata(&path).unwrap().len();
    println!("{} events of {id} in {size} bytes", left.len());
    assert!(size < 3 << 20, "{size}");

    // Less is kept from now on: the file shrinks.
    let keep = Retention { days: 90, most: 16 << 20 };
    let lines: Vec<_> = (id..id + 60_000)
        .map(|id| line(id, 0, |event| event.reason = Some("x".repeat(300))))
        .collect();
    files.database.write(|transaction| append(transaction, &lines)).unwrap();
    while files.trim(keep, 0) {}
    while files.trim(Retention { most: 1 << 20, ..keep }, 0) {}
    for _ in 0..10 {
        files.trim(Retention { most: 1 << 20, ..keep }, 0);
    }
    drop(files.database);
    let size = std::fs::metadata(&path).unwrap().len();
    assert!(size < 8 << 20, "{size}");
}
