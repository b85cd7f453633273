use super::*;
use jiff::Timestamp;

const KEEP: Retention = Retention { days: 90, most: 64 << 20 };

fn start(path: &Path) -> Events {
    Events::start(path, KEEP, Arc::default()).unwrap()
}

fn all(events: &Events) -> Vec<Event> {
    events.flush(Duration::from_secs(5));
    let reader = events.read(Filter::default()).unwrap();
    let page = reader.page(0, 100_000).unwrap();
    page.iter().map(|(_, line)| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn events_survive_a_restart_and_their_ids_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("events.db");
    let begun = Timestamp::now().as_millisecond().cast_unsigned();
    let events = start(&path);
    events.emit(Event::new(EventKind::ServiceStarted));
    events.emit(Event::new(EventKind::GuestUnprotected).guest("g1").reason("silent"));
    let written = all(&events);
    assert_eq!(written[1].guest.as_deref(), Some("g1"));
    assert!(written[1].time.ends_with('Z') && written[1].time.len() == 24, "{:?}", written[1]);
    let first = written[0].id.unwrap();
    assert!(first >= begun && first < begun + 60_000, "{first}");
    assert_eq!(written[1].id, Some(first + 1));

    let events = start(&path);
    let mut follow = events.follow();
    events.emit(Event::new(EventKind::ServiceStopped));
    let line = follow.blocking_recv().unwrap();
    assert_eq!((line.event.kind, line.id), (EventKind::ServiceStopped, first + 2));
    assert_eq!(all(&events).len(), 3);
    assert_eq!(events.problem(), None);
}

#[test]
fn a_guest_that_causes_too_many_loses_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let events = start(&folder.path().join("events.db"));
    for _ in 0..3000 {
        events.emit(Event::new(EventKind::Unscanned).guest("loud"));
        events.flush(Duration::from_secs(5));
    }
    events.emit(Event::new(EventKind::Unscanned).guest("quiet"));
    events.emit(Event::new(EventKind::Verdict).guest("loud"));
    events.emit(Event::new(EventKind::GuestUnprotected).guest("loud"));
    std::thread::sleep(LOST_EVERY);
    events.report_lost();
    let written = all(&events);
    let of = |guest: &str, kind| {
        let is_it = |event: &&Event| event.guest.as_deref() == Some(guest) && event.kind == kind;
        written.iter().filter(is_it).count()
    };
    assert_eq!(of("quiet", EventKind::Unscanned), 1);
    assert_eq!(of("loud", EventKind::Verdict), 1);
    assert_eq!(of("loud", EventKind::GuestUnprotected), 1);
    let kept = of("loud", EventKind::Unscanned);
    assert!(kept < 2900, "{kept}");
    let told = written.iter().find(|event| event.kind == EventKind::EventsDropped).unwrap();
    assert_eq!(told.count.unwrap() + kept as u64, 3000);
}

#[test]
fn a_damaged_database_is_set_aside_and_told_with_later_ids() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("events.db");
    let events = start(&path);
    events.emit(Event::new(EventKind::ServiceStarted));
    let before = all(&events)[0].id.unwrap();
    drop(events);
    std::thread::sleep(Duration::from_millis(50));
    std::fs::write(&path, b"nonsense".repeat(2000)).unwrap();
    let _ = std::fs::remove_file(folder.path().join("events.db-wal"));
    let events = start(&path);
    events.emit(Event::new(EventKind::ServiceStarted));
    events.flush(Duration::from_secs(5));
    events.flush(Duration::from_secs(5));
    let written = all(&events);
    let told = written.iter().find(|event| event.kind == EventKind::DatabaseSetAside).unwrap();
    assert!(told.reason.as_ref().unwrap().contains("events.db.damaged-2"), "{told:?}");
    assert!(written.iter().all(|event| event.id.unwrap() > before), "{before} {written:?}");
}

#[test]
fn damage_that_shows_while_it_runs_costs_no_new_event() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("events.db");
    let events = start(&path);
    for _ in 0..2000 {
        events.emit(Event::new(EventKind::Verdict).reason("x".repeat(200)));
    }
    events.flush(Duration::from_secs(5));
    // As another process would.
    let other = rusqlite::Connection::open(&path).unwrap();
    other.execute_batch("DROP TABLE events").unwrap();
    events.emit(Event::new(EventKind::ServiceStopped));
    events.flush(Duration::from_secs(5));
    let written = all(&events);
    assert!(written.iter().any(|event| event.kind == EventKind::ServiceStopped), "{written:?}");
}

#[test]
fn a_disk_that_takes_nothing_costs_events_which_are_counted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("not/there/events.db");
    let metrics = Arc::<Metrics>::default();
    let events = Events::start(&path, KEEP, Arc::clone(&metrics)).unwrap();
    let mut follow = events.follow();
    events.emit(Event::new(EventKind::ServiceStarted));
    assert_eq!(follow.blocking_recv().unwrap().event.kind, EventKind::ServiceStarted);
    events.flush(Duration::from_secs(5));
    assert_eq!(metrics.events_dropped.load(Relaxed), 1);
    assert!(events.problem().unwrap().contains("events.db cannot be written"));
    assert!(events.read(Filter::default()).is_err());
}
