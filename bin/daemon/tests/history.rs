//! What lasts: events, verdicts, and which guests were seen, over restarts, damage and full disks.

mod common;

use common::{Driver, Engine, Service, Setup, block_on, eicar, on_terminal, seawall, wait_for};
use seawall_client::{ClientError, Event, EventKind, EventsQuery, GuestState};
use seawall_proto::{
    Decision, ExposureReason, FileMetadata, Heartbeat, Mapper, MapperEnd, Notice, Operation,
    Process, ToHost, VerdictKind,
};
use std::path::Path;
use std::time::{Duration, Instant};

fn yara() -> Service {
    Service::start(Setup { engine: Engine::Yara, ..Setup::default() })
}

/// Has the guest cause an event about a file of that name.
fn cause(driver: &mut Driver, path: &[u8]) {
    let file = FileMetadata {
        path: serde_bytes::ByteBuf::from(path.to_vec()),
        path_is_true: true,
        inode: (1, 2),
        size: 3,
        pid: 4,
    };
    driver.say(ToHost::Notice(Notice::Unscanned {
        file,
        operation: Operation::Open,
        reason: ExposureReason::Deadline,
        decision: Decision::Allow,
        process: Process { name: serde_bytes::ByteBuf::from(b"c\nat".to_vec()), uid: Some(1000) },
        waited_ms: 5_000,
        age_ms: 90_000,
    }));
}

fn ask(service: &Service, query: &EventsQuery) -> Result<Vec<Event>, ClientError> {
    block_on(async {
        let mut lines = service.client().events(query).await?;
        let mut events = Vec::new();
        while let Some(line) = lines.next().await? {
            events.push(serde_json::from_str(&line).expect("an event"));
        }
        Ok(events)
    })
}

fn of_kind(kind: &str) -> EventsQuery {
    EventsQuery { kind: Some(kind.into()), limit: Some(100_000), ..EventsQuery::default() }
}

fn count(service: &Service, kind: &str) -> usize {
    ask(service, &of_kind(kind)).expect("events").len()
}

fn ids(events: &[Event]) -> Vec<u64> {
    events.iter().map(|event| event.id.expect("it is kept")).collect()
}

fn recalled(service: &Service) -> u64 {
    wait_for("verdicts from before", || {
        Some(service.status().cached_verdicts).filter(|count| *count > 0)
    })
}

#[test]
fn a_restart_keeps_verdicts_and_events() {
    let mut service = yara();
    let mut driver = service.driver("g1");
    assert_eq!(driver.scan(b"clean").kind, VerdictKind::Clean);
    assert_eq!(driver.scan(&eicar()).kind, VerdictKind::Infected);
    service.wait_event(EventKind::Verdict, "g1");
    let before = service.events();
    for signal in ["TERM", "KILL"] {
        // Verdicts are written within a moment; an end in good order writes the rest.
        if signal == "KILL" {
            std::thread::sleep(Duration::from_millis(500));
        }
        service.restart(signal);
        if signal == "TERM" {
            let ended = service.wait_event(EventKind::SessionEnded, "g1");
            assert_eq!(ended.reason.as_deref(), Some("the service stops"));
        }
        assert_eq!(recalled(&service), 2, "after {signal}");
        let mut driver = service.driver("g2");
        let infected = driver.scan(&eicar());
        assert_eq!(
            (infected.kind, infected.detail.as_deref()),
            (VerdictKind::Infected, Some("Eicar"))
        );
        assert_eq!(infected.generation, driver.attached.generation);
        assert_eq!(driver.scan(b"clean").kind, VerdictKind::Clean);
        let counters = service.status().counters;
        assert_eq!((counters.scans, counters.cache_hits), (0, 2), "after {signal}");
    }
    let after = service.events();
    assert_eq!(after[..before.len()], before[..]);
    assert!(ids(&after).is_sorted_by(|a, b| a < b), "{:?}", ids(&after));

    // With other signatures nothing is taken from before.
    let rules = service.path("rules/more.yar");
    service.restart_after("TERM", |_| {
        std::fs::write(rules, "rule More { strings: $a = \"clean\" condition: $a }\n").unwrap();
    });
    assert_eq!(service.driver("g1").scan(b"clean").kind, VerdictKind::Infected);
    assert_eq!(service.status().counters.scans, 1);
}

/// An engine's failure is asked again.
#[test]
fn no_failure_is_remembered() {
    let mut service = Service::start(Setup::default());
    assert_eq!(service.scan("x", b"SEAWALL-FAULT error").verdict, seawall_client::Verdict::Error);
    service.scan("x", b"clean");
    service.restart("TERM");
    assert_eq!(recalled(&service), 1);
}

#[test]
fn a_kill_in_the_midst_of_writing_damages_nothing() {
    let mut service = Service::start(Setup::default());
    let mut written = 0;
    for round in 0..4_u64 {
        let mut driver = service.driver("g1");
        for n in 0..300 {
            let path = [format!("/{round}/{n}/").as_bytes(), &[b'x'; 4000]].concat();
            cause(&mut driver, &path);
            if n % 30 == 0 {
                service.scan("x", format!("{round} {n}").as_bytes());
            }
        }
        std::thread::sleep(Duration::from_millis(round * 3));
        service.restart("KILL");
        written = count(&service, "unscanned");
        println!("{written} of {} events were written before the ends", (round + 1) * 300);
    }
    assert!(written > 0);
    let events = service.events();
    assert!(ids(&events).is_sorted_by(|a, b| a < b));
    assert!(events.iter().all(|event| event.kind != EventKind::DatabaseSetAside));
    let again =
        ids(&ask(&service, &EventsQuery { limit: Some(100_000), ..EventsQuery::default() })
            .unwrap());
    assert_eq!(again, ids(&events));
}

/// Makes a database unusable.
type Spoil = fn(&Path);

fn set_aside(service: &Service, name: &str) -> usize {
    let entries = std::fs::read_dir(service.path("state")).expect("a folder").flatten();
    let is_it = |entry: &std::fs::DirEntry| {
        let name_of = entry.file_name().to_string_lossy().into_owned();
        name_of.starts_with(&format!("{name}.damaged-")) && !name_of.ends_with("-wal")
    };
    entries.filter(is_it).count()
}

#[test]
fn damaged_and_foreign_databases_are_set_aside_with_a_warning() {
    let mut service = Service::start(Setup::default());
    service.driver("g1").scan(b"clean");
    let spoil: [(&str, Spoil); 2] = [
        ("damaged", |path| {
            std::fs::write(path, b"nonsense".repeat(2000)).unwrap();
            // Its log would mend it.
            std::fs::remove_file(format!("{}-wal", path.display())).unwrap();
        }),
        ("foreign", |path| {
            let database = rusqlite::Connection::open(path).unwrap();
            database.pragma_update(None, "user_version", 99).unwrap();
        }),
    ];
    for (round, (what, spoil)) in spoil.iter().enumerate() {
        service.restart_after("TERM", |service| {
            for name in ["events.db", "state.db"] {
                spoil(&service.path("state").join(name));
            }
            // Names end with the second.
            std::thread::sleep(Duration::from_millis(1100));
        });
        assert_eq!(service.driver("g1").scan(b"clean").kind, VerdictKind::Clean, "{what}");
        wait_for("the warnings", || (count(&service, "database_set_aside") == 2).then_some(()));
        for name in ["events.db", "state.db"] {
            assert_eq!(set_aside(&service, name), round + 1, "{what} {name}");
        }
        service.wait_log("set aside and a new one is begun");
        assert!(service.status().healthy, "{:?}", service.status().problems);
    }
    service.restart("TERM");
    assert_eq!(recalled(&service), 1, "the new one is in use");
}

#[test]
fn a_full_disk_costs_events_and_no_verdict() {
    let setup = Setup { state_mib: Some(2), engine: Engine::Yara, ..Setup::default() };
    let service = Service::start(setup);
    let mut driver = service.driver("g1");
    let state = format!("/proc/{}/root{}", service.pid(), service.path("state").display());
    let filler = Path::new(&state).join("filler");
    // As full as it gets.
    let fill = || drop(std::fs::write(&filler, vec![1; 4 << 20]));
    fill();
    assert_eq!(std::fs::metadata(&filler).unwrap().len() % 4096, 0);
    let dropped = || service.status().counters.events_dropped;
    wait_for("a lost event", || {
        cause(&mut driver, &[b'x'; 4000]);
        fill();
        driver.heartbeat();
        (dropped() > 0).then_some(())
    });
    let status = service.status();
    assert!(
        status.problems.iter().any(|why| why.contains("events.db cannot be written")),
        "{status:?}"
    );
    let begin = Instant::now();
    assert_eq!(driver.scan(&eicar()).kind, VerdictKind::Infected);
    for n in 0..100_u32 {
        assert_eq!(driver.scan(&n.to_le_bytes()).kind, VerdictKind::Clean);
    }
    println!("101 verdicts in {:?} with a full disk", begin.elapsed());
    assert!(begin.elapsed() < Duration::from_secs(5));
    service.wait_log("it cannot be written");
    let lost = dropped();

    std::fs::remove_file(&filler).unwrap();
    let told =
        wait_for("the loss to be told", || ask(&service, &of_kind("events_dropped")).ok()?.pop());
    assert!(told.count.unwrap() >= lost, "{told:?}");
    assert!(service.status().problems.is_empty(), "{:?}", service.status());
}

#[test]
fn a_disk_that_is_full_at_the_start_keeps_nobody_from_being_protected() {
    let mut service = Service::start(Setup::default());
    // A folder is where the file should be.
    service.restart_after("TERM", |service| {
        for name in ["events.db", "state.db"] {
            for end in ["", "-wal", "-shm"] {
                let _ = std::fs::remove_file(service.path("state").join(format!("{name}{end}")));
            }
            std::fs::create_dir(service.path("state").join(name)).unwrap();
        }
    });
    assert_eq!(service.driver("g1").scan(b"clean").kind, VerdictKind::Clean);
    let status = service.status();
    assert_eq!(status.problems.len(), 2, "{status:?}");
    let ClientError::Refused(fault) = ask(&service, &EventsQuery::default()).unwrap_err() else {
        panic!()
    };
    assert_eq!(fault.code, "no-events");
}

#[test]
fn the_oldest_events_go_and_the_newest_stay() {
    let more = "[events]\nmost_mib = 1\n".into();
    let mut service = Service::start(Setup { more, ..Setup::default() });
    let mut driver = service.driver("g1");
    for n in 0..400 {
        let name = [format!("/{n}/").as_bytes(), &[0xff; 4000]].concat();
        cause(&mut driver, &name);
    }
    let newest = || {
        let last = ask(&service, &of_kind("unscanned")).unwrap();
        last.last()
            .is_some_and(|event| event.path.as_ref().unwrap().starts_with("/399/"))
            .then_some(last.len())
    };
    let left = wait_for("the newest", newest);
    let size = || std::fs::metadata(service.path("state/events.db")).unwrap().len();
    wait_for("the file to be small", || {
        cause(&mut driver, b"/more");
        (size() < 3 << 20 && count(&service, "service_started") == 0).then_some(())
    });
    println!("{left} of 400 long events at first, {} bytes", size());
    // As it looks to a service whose clock is wrong when it starts: all is old, and nothing goes for that.
    let before = count(&service, "unscanned");
    service.restart_after("TERM", |service| {
        let database = rusqlite::Connection::open(service.path("state/events.db")).unwrap();
        database.execute("UPDATE events SET at_ms = 1000 WHERE kind = 'unscanned'", ()).unwrap();
    });
    wait_for("its start", || (count(&service, "service_started") == 1).then_some(()));
    std::thread::sleep(Duration::from_secs(1));
    let after = count(&service, "unscanned");
    assert!(after > before / 2, "{before}, {after}: none but what found no room");
}

#[test]
fn filters_hold_together_and_wrong_ones_are_told() {
    let service = yara();
    let mut driver = service.driver("g1");
    drop(service.driver("g2"));
    for path in ["/srv/a", "/srv/b", "/tmp/c"] {
        cause(&mut driver, path.as_bytes());
    }
    driver.scan(&eicar());
    let verdict = service.wait_event(EventKind::Verdict, "g1");
    let ask = |query: &EventsQuery| ask(&service, query).unwrap();
    let paths = |query: &EventsQuery| {
        ask(query).iter().filter_map(|event| event.path.clone()).collect::<Vec<_>>()
    };
    let some = |text: &str| Some(text.to_owned());
    let query = EventsQuery { path: some("/srv/"), guest: some("g1"), ..EventsQuery::default() };
    assert_eq!(paths(&query), ["/srv/a", "/srv/b"]);
    assert_eq!(paths(&EventsQuery { guest: some("g2"), ..query.clone() }), Vec::<String>::new());
    assert_eq!(paths(&EventsQuery { limit: Some(1), ..query.clone() }), ["/srv/b"], "the newest");
    assert_eq!(paths(&EventsQuery { kind: some("verdict,outcome"), ..query }).len(), 0);
    let by_hash =
        EventsQuery { hash: Some(verdict.hash.clone().unwrap()), ..EventsQuery::default() };
    assert_eq!(ask(&by_hash), std::slice::from_ref(&verdict));
    let infected = EventsQuery { verdict: some("infected"), ..EventsQuery::default() };
    assert_eq!(ask(&infected), std::slice::from_ref(&verdict));
    let since = EventsQuery { since: Some(verdict.time.clone()), ..EventsQuery::default() };
    assert!(ask(&since).contains(&verdict));
    let until = EventsQuery { until: Some(verdict.time.clone()), ..EventsQuery::default() };
    let before = ask(&until);
    assert!(!before.contains(&verdict) && before.len() > 3, "{before:?}");
    // Page after page is the whole.
    let all = ask(&EventsQuery { limit: Some(1000), ..EventsQuery::default() });
    let (mut paged, mut after) = (Vec::new(), 0);
    loop {
        let query = EventsQuery { after: Some(after), limit: Some(2), ..EventsQuery::default() };
        let page = ask(&query);
        let Some(last) = page.last() else { break };
        after = last.id.unwrap();
        paged.extend(page);
    }
    assert_eq!(paged[..all.len()], all[..]);

    for (query, what) in [
        (EventsQuery { kind: some("verdicts"), ..EventsQuery::default() }, "`verdicts` is no kind"),
        (EventsQuery { verdict: some("bad"), ..EventsQuery::default() }, "one of clean, infected"),
        (EventsQuery { hash: some("xyz!"), ..EventsQuery::default() }, "hexadecimal"),
        (EventsQuery { since: some("2h"), ..EventsQuery::default() }, "RFC 3339"),
    ] {
        let error = self::ask(&service, &query).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
}

#[test]
fn a_follower_goes_on_where_it_was() {
    let mut service = Service::start(Setup::default());
    let mut driver = service.driver("g1");
    cause(&mut driver, b"/1");
    let seen = service.wait_event(EventKind::Unscanned, "g1").id;
    // While it is away: a restart, and more than one page.
    service.restart("KILL");
    let mut driver = service.driver("g1");
    for n in 2..=500 {
        cause(&mut driver, format!("/{n}").as_bytes());
    }
    block_on(async {
        let kind = Some("unscanned".into());
        let query = EventsQuery {
            kind,
            after: seen,
            follow: true,
            limit: Some(1),
            ..EventsQuery::default()
        };
        let mut lines = service.client().events(&query).await.unwrap();
        for n in 2..=600 {
            if n > 500 {
                cause(&mut driver, format!("/{n}").as_bytes());
            }
            let line = lines.next().await.unwrap().unwrap();
            let event: Event = serde_json::from_str(&line).unwrap();
            assert_eq!(event.path, Some(format!("/{n}")));
        }
    });
}

#[test]
fn a_clock_that_went_back_repeats_no_id_and_loses_no_event() {
    let mut service = Service::start(Setup::default());
    // As it looks when the clock was a year ahead.
    let ahead = 31_536_000_000_i64;
    let mut before = 0;
    service.restart_after("TERM", |service| {
        let database = rusqlite::Connection::open(service.path("state/events.db")).unwrap();
        let sql = "UPDATE events SET id = id + ?1, at_ms = at_ms + ?1";
        database.execute(sql, [ahead]).unwrap();
        let sql = "UPDATE sqlite_sequence SET seq = seq + ?1";
        database.execute(sql, [ahead]).unwrap();
        let sql = "SELECT max(id) FROM events";
        before = database.query_row(sql, (), |row| row.get::<_, i64>(0)).unwrap();
    });
    cause(&mut service.driver("g1"), b"/now");
    let now = service.wait_event(EventKind::Unscanned, "g1");
    let all = ask(&service, &EventsQuery { limit: Some(1000), ..EventsQuery::default() }).unwrap();
    assert!(all.len() > 4, "{all:?}");
    assert!(now.id.unwrap() > before.cast_unsigned(), "{before} {now:?}");
    let until = Some(jiff::Timestamp::now() + jiff::SignedDuration::from_secs(60));
    let recent =
        EventsQuery { until: until.map(|time| time.to_string()), ..EventsQuery::default() };
    let recent = ask(&service, &recent).unwrap();
    assert!(recent.contains(&now) && recent.len() < all.len(), "{recent:?}");
}

#[test]
fn a_guest_whose_driver_died_with_the_service_is_missed() {
    let more = "[alarm]\nheartbeat_ms = 100\nunprotected_after_ms = 1000\n";
    let mut service = Service::start(Setup { more: more.into(), ..Setup::default() });
    drop(service.driver("g1"));
    wait_for("the sighting", || service.guest("g1").first_seen);
    std::thread::sleep(Duration::from_millis(600));
    let alarms = |service: &Service| count(service, "guest_unprotected");
    let before = alarms(&service);
    service.restart("KILL");
    let begin = Instant::now();
    wait_for("the alarm", || (alarms(&service) > before).then_some(()));
    assert!(begin.elapsed() < Duration::from_secs(5));
    assert_eq!(service.guest("g1").state, GuestState::Unprotected);
    assert_eq!(service.guest("g2").state, GuestState::NeverSeen);
    assert_eq!(service.guest("g2").first_seen, None);

    // Who gets the name of a guest that was taken out of the configuration is new.
    service.setup.guests = vec!["g2"];
    service.restart("TERM");
    service.setup.guests = vec!["g1", "g2"];
    service.restart("TERM");
    assert_eq!(service.guest("g1").state, GuestState::NeverSeen);
}

#[test]
fn hostile_names_are_harmless_wherever_they_are_shown() {
    let service = Service::start(Setup::default());
    let mut driver = service.driver("g1");
    let names: [Vec<u8>; 4] = [
        b"/a\n2026-11-23T10:00:00.000Z  g1  guest protected\r\x1b[2J\x1b]0;x\x07".to_vec(),
        b"/b\xff\xfe\xc3(\\n".to_vec(),
        "/c\u{202e}gpj.exe\u{2028}\u{9b}31m".into(),
        [b"/d".as_slice(), &[0x1b; 4094]].concat(),
    ];
    for name in &names {
        cause(&mut driver, name);
    }
    wait_for("all four", || (count(&service, "unscanned") == 4).then_some(()));
    for arguments in [
        &["events"][..],
        &["--json", "events"],
        &["events", "--path", r"\x1b", "--limit", "100000"],
    ] {
        let output = seawall(&service, arguments);
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        let is_bad = |c: char| c != '\n' && seawall_client::text::is_hostile(c);
        assert!(!text.contains(is_bad), "{arguments:?}");
        assert!(text.lines().all(|line| !line.starts_with("2026-11-23")), "{text}");
    }
    let found = |path: &str| {
        let output = seawall(&service, &["--json", "events", "--path", path]);
        String::from_utf8(output.stdout).unwrap().lines().count()
    };
    assert_eq!(found(r"/a\n2026"), 1, "a path is looked for as it is shown");
    assert_eq!(found(r"\xff\xfe"), 1);
    assert_eq!(found("%"), 0, "no character is special");
    let long = ask(&service, &EventsQuery { path: Some("/d".into()), ..EventsQuery::default() });
    assert_eq!(long.unwrap()[0].path.as_ref().unwrap().len(), 2 + 4094 * 4, "whole, and escaped");
}

#[test]
fn what_cannot_be_scanned_later_is_told() {
    let service = Service::start(Setup::default());
    let mut driver = service.driver("g1");
    let path = serde_bytes::ByteBuf::from(b"/tmp/x\xff".to_vec());
    let reason = ExposureReason::LinkDown;
    driver.say(ToHost::Notice(Notice::ExposureGone { path, reason }));
    let event = service.wait_event(EventKind::ExposureGone, "g1");
    assert_eq!((event.path.as_deref(), event.path_hex.is_some()), (Some(r"/tmp/x\xff"), true));
    assert_eq!(event.reason.as_deref(), Some("no session with the host"));
    for (mount_point, shown) in [(&b"/srv"[..], "/srv"), (b"", "/")] {
        let mount_point = serde_bytes::ByteBuf::from(mount_point.to_vec());
        driver.say(ToHost::Notice(Notice::MountExposed { mount_point }));
        wait_for("the mount in the events", || {
            let events = ask(&service, &of_kind("mount_exposed")).unwrap();
            events.iter().any(|event| event.path.as_deref() == Some(shown)).then_some(())
        });
    }
    let ends = [MapperEnd::Killed, MapperEnd::Failed { errno: 1 }];
    let mappers = ends.map(|end| {
        let process =
            Process { name: serde_bytes::ByteBuf::from(b"ev\x1bil".to_vec()), uid: Some(7) };
        Mapper { pid: 70, process, end }
    });
    let path = serde_bytes::ByteBuf::from(b"/srv/evil".to_vec());
    driver.say(ToHost::Notice(Notice::Mapped {
        path,
        path_is_true: true,
        mappers: mappers.into(),
        more: 3,
    }));
    let told = wait_for("both processes in the events", || {
        let events = ask(&service, &of_kind("mapped")).unwrap();
        (events.len() == 2).then_some(events)
    });
    let told = told.iter().map(|event| {
        let shown = (event.path.as_deref(), event.process.as_deref(), event.pid, event.uid);
        assert_eq!(shown, (Some("/srv/evil"), Some(r"ev\x1bil"), Some(70), Some(7)));
        (event.reason.clone().unwrap(), event.count)
    });
    let refused = "it runs on: Operation not permitted (os error 1)";
    let expected = [("it was killed".to_owned(), None), (refused.to_owned(), Some(3))];
    assert_eq!(told.collect::<std::collections::HashSet<_>>(), expected.into());
    let beat =
        Heartbeat { exposed: 3, held_by_writer: 1, mounts_exposed: 1, ..Heartbeat::default() };
    driver.say(ToHost::Heartbeat(beat));
    wait_for("the table of guests", || {
        let output = seawall(&service, &["guests"]);
        let text = String::from_utf8(output.stdout).unwrap();
        (text.contains("EXPOSED") && text.contains(" 3+ ")).then_some(())
    });
}

#[test]
fn colours_and_progress_are_for_terminals_alone() {
    let service = yara();
    let mut driver = service.driver("g1");
    driver.scan(&eicar());
    cause(&mut driver, b"/x");
    service.wait_event(EventKind::Unscanned, "g1");
    driver.heartbeat();
    wait_for("g1", || (service.guest("g1").state == GuestState::Protected).then_some(()));
    let colour = "\x1b[";
    for arguments in ["--json events", "events", "status", "guests"] {
        let words: Vec<_> = arguments.split(' ').collect();
        let output = seawall(&service, &words);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(!text.contains(colour) && output.stderr.is_empty(), "{arguments}: {output:?}");
        let (_, text) = on_terminal(&service, arguments, "");
        let is_json = arguments.contains("json");
        assert_eq!(text.contains(colour), !is_json, "{arguments}: {text:?}");
        // Nothing is broken in the midst of a word.
        let heads = text.lines().filter(|line| line.contains("GUEST") && line.contains("STATE"));
        assert_eq!(heads.count(), usize::from(arguments == "guests"), "{text}");
    }
    let large = service.path("large");
    std::fs::File::create(&large).unwrap().set_len(256 << 20).unwrap();
    let large = large.to_str().unwrap();
    let output = seawall(&service, &["scan", large]);
    assert!(output.stderr.is_empty(), "{output:?}");
    let (code, text) = on_terminal(&service, &format!("scan {large}"), "");
    assert!(code == Some(0) && text.contains(" sent"), "{code:?} {text:?}");
}

#[test]
fn the_command_line_has_the_same_filters() {
    let service = Service::start(Setup::default());
    let mut driver = service.driver("g1");
    cause(&mut driver, b"/x");
    let event = service.wait_event(EventKind::Unscanned, "g1");
    assert_eq!(
        (event.process.as_deref(), event.pid, event.uid),
        (Some(r"c\nat"), Some(4), Some(1000))
    );
    assert_eq!(event.duration_us, Some(5_000_000));
    let time = |text: &str| text.parse::<jiff::Timestamp>().unwrap();
    let ago = time(&event.time) - time(event.occurred.as_deref().unwrap());
    assert!((89..=91).contains(&ago.as_secs()), "a report waits for its session: {ago}");
    let status = String::from_utf8(seawall(&service, &["status"]).stdout).unwrap();
    for line in [
        "Policy where no group says otherwise: mode smart; infected files: deny; without a verdict: open open, \
         exec closed-if-user-writable; files up to 256.0 MiB on access; 0 exclusions",
        "Quarantine: 0 B of 10.0 GiB",
    ] {
        assert!(status.contains(line), "{status}");
    }
    let shown = seawall(&service, &["events", "--kind", "unscanned"]);
    let shown = String::from_utf8(shown.stdout).unwrap();
    let told = format!("(pid 4, user 1000) after 5.0 s at {}", event.occurred.as_ref().unwrap());
    assert!(shown.contains(&told), "{shown}");
    let lines = |arguments: &[&str]| {
        let output = seawall(&service, &[&["--json", "events"], arguments].concat());
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<Event>>()
    };
    let one = [event.clone()];
    assert_eq!(lines(&["--kind", "unscanned,verdict", "--since", "2h", "--guest", "g1"]), one);
    assert_eq!(lines(&["--kind", "unscanned", "--kind", "outcome", "--until", "2h"]), []);
    let before = (event.id.unwrap() - 1).to_string();
    assert_eq!(lines(&["--after", &before, "--limit", "1"]), one);
    assert_eq!(lines(&["--verdict", "infected"]), []);

    for (arguments, what) in [
        (&["events", "--kind", "x"][..], "`x` is no kind of event; docs/events.md lists them"),
        (&["events", "--guest", "nobody"], "no guest of this name is configured"),
        (&["events", "--verdict", "x"], "it is one of clean, infected, error, timed_out"),
        (&["events", "--since", "1h", "--until", "2h"], "`since` is not before `until`"),
    ] {
        let output = seawall(&service, arguments);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains(what) && said.contains("seawall events --help"), "{said}");
    }
}

/// docs/events.md is what programs are written by.
#[test]
fn every_kind_and_field_of_an_event_is_documented() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let document = std::fs::read_to_string(root.join("docs/openapi.json")).unwrap();
    let document: serde_json::Value = serde_json::from_str(&document).unwrap();
    let told = std::fs::read_to_string(root.join("docs/events.md")).unwrap();
    let schemas = &document["components"]["schemas"];
    let fields = schemas["Event"]["properties"].as_object().expect("an object").keys().cloned();
    let text = serde_json::to_string(&schemas["EventKind"]).unwrap();
    let kinds = text.split('"').filter(|word| told_names(word)).map(str::to_owned);
    let all: Vec<_> = fields.chain(kinds).collect();
    assert!(all.len() > 35, "{all:?}");
    for name in all.iter().filter(|name| *name != "unknown") {
        assert!(told.contains(&format!("| `{name}` |")), "{name} is not in docs/events.md");
    }
}

/// Whether a word of the schema is a kind's name.
fn told_names(word: &str) -> bool {
    let kind = serde_json::from_value::<EventKind>(word.into());
    kind.is_ok_and(|kind| kind != EventKind::Unknown)
}
