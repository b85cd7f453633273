use super::*;
use crate::config::ScanOrder;
use crate::events::store::Retention;
use crate::generation::{Generations, Loaded};
use crate::pipeline::Archive;
use seawall_client::{Detection, EventKind};
use seawall_engine::{Generation as Signatures, Metadata, Operation};

const MOST: u64 = 10_000;

/// One run of a service that has one engine.
struct Run {
    state: State,
    pipeline: Arc<Pipeline>,
    events: Events,
}

impl Run {
    fn of(folder: &Path, most: u64) -> Self {
        let keep = Retention { days: 9, most: 9 << 20 };
        let events = Events::start(&folder.join("events.db"), keep, Arc::default()).unwrap();
        let (state, keeper) = State::open(&folder.join("state.db"), most, events.clone());
        static STARTS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
        let start = STARTS.fetch_add(1000, std::sync::atomic::Ordering::Relaxed);
        let generations = Generations::new(start, vec![false]);
        let pipeline =
            Pipeline::new(generations, MOST, ScanOrder::default(), state.clone(), Arc::default());
        let of_keeper = Arc::clone(&pipeline);
        std::thread::spawn(move || keeper.run(&of_keeper));
        Self { state, pipeline, events }
    }

    fn with(folder: &Path, signatures: u8) -> Self {
        let run = Self::of(folder, MOST);
        run.engine_has(signatures);
        run
    }

    fn engine_has(&self, signatures: u8) {
        let signatures = Signatures([signatures; 32]);
        self.pipeline.engine_has(0, Loaded { signatures, by_name: false });
        self.flush();
    }

    fn flush(&self) {
        self.state.flush(Duration::from_secs(10));
    }

    fn keep(&self, n: u64, known: Known) {
        let set = self.pipeline.generations.set_of(self.pipeline.generations.current()).unwrap();
        self.state.keep(set, hash(n), known);
    }

    fn knows(&self, n: u64) -> Option<seawall_client::Verdict> {
        self.pipeline
            .lookup(hash(n), Archive::No, &nameless(), &None)
            .map(|answer| answer.finding.verdict())
    }
}

fn nameless() -> Metadata {
    let (path, guest) = Default::default();
    Metadata { path, guest, operation: Operation::Open, size: 0, archives: None }
}

fn hash(n: u64) -> ContentHash {
    ContentHash(*blake3::hash(&n.to_le_bytes()).as_bytes())
}

fn infected() -> Known {
    Some(Arc::new(vec![Detection {
        name: "Bad".into(),
        severity: "high".into(),
        family: None,
        cleaning: None,
        member: None,
        engine: "first".into(),
    }]))
}

fn rows(folder: &Path) -> i64 {
    let connection = crate::database::read(&folder.join("state.db"), &FORMAT).unwrap();
    connection.query_row("SELECT count(*) FROM verdicts", (), |row| row.get(0)).unwrap()
}

#[test]
fn verdicts_of_the_same_signatures_are_known_after_a_restart_and_no_others() {
    use seawall_client::Verdict::{Clean, Infected};
    let folder = tempfile::tempdir().unwrap();
    let run = Run::with(folder.path(), 1);
    run.keep(1, None);
    run.keep(2, infected());
    run.flush();

    let run = Run::with(folder.path(), 1);
    assert_eq!((run.knows(1), run.knows(2), run.knows(3)), (Some(Clean), Some(Infected), None));
    let answer = run.pipeline.lookup(hash(2), Archive::No, &nameless(), &None).unwrap();
    assert_eq!(answer.generation, run.pipeline.generations.current());
    let run = Run::with(folder.path(), 2);
    assert_eq!((run.knows(1), run.pipeline.cached_verdicts()), (None, 0));
    // The same set comes back, in the same run.
    run.engine_has(1);
    assert_eq!((run.knows(1), run.knows(2)), (Some(Clean), Some(Infected)));
}

#[test]
fn a_row_that_went_bad_is_not_believed() {
    let folder = tempfile::tempdir().unwrap();
    let run = Run::with(folder.path(), 1);
    (1..=4).for_each(|n| run.keep(n, infected()));
    run.flush();
    let other = rusqlite::Connection::open(folder.path().join("state.db")).unwrap();
    let change = |sql: &str, n: u64| assert_eq!(other.execute(sql, [hash(n).0]).unwrap(), 1);
    change("UPDATE verdicts SET detections = NULL WHERE hash = ?1", 1);
    change("UPDATE verdicts SET detections = '[]' WHERE hash = ?1", 2);
    change("UPDATE verdicts SET hash = zeroblob(31) WHERE hash = ?1", 3);
    let run = Run::with(folder.path(), 1);
    assert_eq!([1, 2, 3].map(|n| run.knows(n)), [None; 3]);
    assert!(run.knows(4).is_some());
}

#[test]
fn the_last_sets_and_as_many_verdicts_as_the_cache_holds_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    for set in 1..=6 {
        let run = Run::with(folder.path(), set);
        (0..10).for_each(|n| run.keep(n, None));
        run.flush();
    }
    let run = Run::with(folder.path(), 6);
    run.flush();
    assert_eq!(rows(folder.path()), i64::from(SETS_KEPT) * 10);
    assert_eq!(run.knows(0), Some(seawall_client::Verdict::Clean));
    let run = Run::of(folder.path(), 25);
    run.engine_has(5);
    run.flush();
    assert_eq!(rows(folder.path()), 25);
    let run = Run::with(folder.path(), 5);
    assert_eq!(run.pipeline.cached_verdicts(), 10, "those of other sets go first");
}

#[test]
fn guests_that_were_seen_are_known_after_a_restart_until_they_are_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let run = Run::of(folder.path(), MOST);
    assert_eq!(run.state.sighting("g1"), None);
    run.state.seen("g1");
    run.state.seen("g2");
    let seen = run.state.sighting("g1").unwrap();
    run.flush();
    let run = Run::of(folder.path(), MOST);
    let again = run.state.sighting("g1").unwrap();
    assert_eq!(again.first.as_millisecond(), seen.first.as_millisecond());
    run.state.seen("g1");
    assert!(run.state.sighting("g1").unwrap().last > seen.last);
    run.state.keep_guests(|name| name == "g1");
    run.flush();
    let run = Run::of(folder.path(), MOST);
    assert_eq!(
        run.state.sighting("g1").unwrap().first.as_millisecond(),
        seen.first.as_millisecond()
    );
    assert_eq!(run.state.sighting("g2"), None);
}

#[test]
fn a_damaged_or_foreign_file_is_told_of_and_begun_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.db");
    let foreign = || {
        let connection = rusqlite::Connection::open(&path).unwrap();
        connection.execute_batch("CREATE TABLE x (y); PRAGMA user_version = 9").unwrap();
    };
    let damaged = || std::fs::write(&path, b"nonsense".repeat(999)).unwrap();
    for (count, spoil) in [&damaged as &dyn Fn(), &foreign].iter().enumerate() {
        let _ = std::fs::remove_file(&path);
        let _ = std::fs::remove_file(folder.path().join("state.db-wal"));
        spoil();
        let run = Run::with(folder.path(), 1);
        run.keep(1, None);
        run.flush();
        run.events.flush(Duration::from_secs(5));
        let told = run.events.read(events::filter::Filter {
            kinds: vec![EventKind::DatabaseSetAside],
            ..Default::default()
        });
        assert_eq!(told.unwrap().page(0, 9).unwrap().len(), count + 1);
        assert_eq!(rows(folder.path()), 1);
        assert_eq!(run.state.problem(), None);
    }
}
