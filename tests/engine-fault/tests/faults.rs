//! What an engine may do to itself, and what it costs: that scan alone.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::Write;
use std::sync::mpsc;
use std::time::Duration;

use common::{Engine, LONG, alive, config, metadata, order, start};
use seawall_engine::host::{
    EngineConfig, EngineState, Generation, Lane, Outcome, ScanError, ScanReport, SharedContent,
};
use seawall_engine::protocol::INLINE_MAX;

fn fault() -> EngineConfig {
    config(env!("CARGO_BIN_EXE_seawall-engine-fault"), &[])
}

fn ready() -> Engine {
    start(fault()).ready()
}

fn family(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Clean => "clean".into(),
        Outcome::Infected(found) => found[0].family.clone().unwrap_or_default(),
        Outcome::Allowed { name } => format!("allowed by {name}"),
    }
}

#[test]
fn a_report_tells_outcome_and_generation() {
    let engine = ready();
    let report = engine.scan(b"harmless");
    assert_eq!(report.result, Ok(Outcome::Clean));
    assert_eq!(report.generation, engine.handle.generation());
    assert!(report.generation.is_some());
    assert_eq!(engine.scan(b"").result, Ok(Outcome::Clean));
}

#[test]
fn metadata_arrives() {
    let engine = ready();
    let outcome = engine.scan(&order("seen")).result.unwrap();
    assert_eq!(family(&outcome), "/tmp/x g1 1");
}

/// In work at once, so that each has to be right in its own buffer.
#[test]
fn small_content_comes_in_the_message_unless_the_engine_wants_a_descriptor() {
    let program = env!("CARGO_BIN_EXE_seawall-engine-fault");
    for (arguments, small) in [(&[][..], "message"), (&["--by-descriptor"], "descriptor")] {
        let engine = start(EngineConfig { threads: 3, ..config(program, arguments) }).ready();
        let mut replies = Vec::new();
        for length in [100, 4096, INLINE_MAX, INLINE_MAX + 1, 3 << 20].repeat(5) {
            let mut content = order("way ");
            let way = if length > INLINE_MAX { "descriptor" } else { small };
            let expected = format!("{way} {}", length - content.len());
            content.resize(length, b'.');
            replies.push((engine.send(&content, LONG), expected));
        }
        for (reply, expected) in replies {
            let outcome = reply.recv_timeout(LONG).unwrap().result.unwrap();
            assert_eq!(family(&outcome), expected);
        }
        assert_eq!(engine.handle.status().restarts, 0);
    }
}

#[test]
fn what_is_known_to_be_good_is_told_with_its_entry() {
    assert_eq!(
        family(&ready().scan(&order("allow=good.txt")).result.unwrap()),
        "allowed by good.txt"
    );
}

#[test]
fn a_cancelled_scan_ends_where_it_is() {
    let engine = start(EngineConfig { threads: 1, ..fault() }).ready();
    let send = |word: &str| engine.send_named(SharedContent::new(order(word)).unwrap(), LONG);
    let (in_work, ended) = send("until-cancelled");
    // One more waits at the process, and the next here.
    let (_, at_process) = send("seen");
    let (waits, refused) = send("seen");
    engine.wait_in_flight(2);
    engine.handle.cancel(waits.unwrap());
    assert_eq!(refused.recv_timeout(LONG).unwrap().result, Err(ScanError::Cancelled));
    std::thread::sleep(Duration::from_millis(50));
    assert!(ended.try_recv().is_err(), "nobody cancelled it");
    engine.handle.cancel(in_work.unwrap());
    assert_eq!(ended.recv_timeout(LONG).unwrap().result, Err(ScanError::Cancelled));
    assert!(at_process.recv_timeout(LONG).unwrap().result.is_ok());
    assert_eq!(engine.handle.status().restarts, 0);
    engine.handle.cancel(in_work.unwrap());
    assert_eq!(family(&engine.scan(&order("seen")).result.unwrap()), "/tmp/x g1 1");
}

#[test]
fn an_engine_that_gives_up_what_is_wanted_has_failed() {
    let error = ready().scan(&order("gives-up")).result.unwrap_err();
    assert!(matches!(error, ScanError::Failed { .. }), "{error}");
}

#[test]
fn a_scan_knows_the_time_it_has_left() {
    let used: u64 = family(&ready().scan(&order("left")).result.unwrap()).parse().unwrap();
    assert!((200..10_000).contains(&used), "{used} ms");
}

#[test]
fn a_crash_ends_that_scan_after_a_second_try_and_the_next_scan_is_answered() {
    let engine = ready();
    let report = engine.scan(&order("crash"));
    assert_eq!(report.result, Err(ScanError::KilledTwice));
    assert_eq!(report.generation, None);
    assert_eq!(engine.scan(b"harmless").result, Ok(Outcome::Clean));
    assert_eq!(engine.handle.status().restarts, 2);
}

#[test]
fn those_in_work_beside_a_crash_are_answered() {
    let engine = start(EngineConfig { threads: 4, ..fault() }).ready();
    let innocent: Vec<_> = (0..12).map(|_| engine.send(&order("sleep=100"), LONG)).collect();
    let crash = engine.send(&order("crash"), LONG);
    let more: Vec<_> = (0..12).map(|_| engine.send(&order("sleep=20"), LONG)).collect();
    assert_eq!(crash.recv_timeout(LONG).unwrap().result, Err(ScanError::KilledTwice));
    for reply in innocent.into_iter().chain(more) {
        assert_eq!(reply.recv_timeout(LONG).unwrap().result, Ok(Outcome::Clean));
    }
    assert_eq!(engine.handle.status().restarts, 2);
}

#[test]
fn two_kinds_of_content_that_crash_both_end_and_nothing_else() {
    let engine = start(EngineConfig { threads: 4, ..fault() }).ready();
    let bad: Vec<_> = (0..2).map(|_| engine.send(&order("crash"), LONG)).collect();
    let good: Vec<_> = (0..20).map(|_| engine.send(&order("sleep=30"), LONG)).collect();
    for reply in bad {
        assert_eq!(reply.recv_timeout(LONG).unwrap().result, Err(ScanError::KilledTwice));
    }
    for reply in good {
        assert_eq!(reply.recv_timeout(LONG).unwrap().result, Ok(Outcome::Clean));
    }
}

#[test]
fn one_that_is_tried_again_is_not_blamed_for_another_that_crashes() {
    // One that ends while it is tried alone, and one that takes so long that others are fed beside it.
    for innocent in ["sleep=100", "sleep=500"] {
        let engine = start(EngineConfig { threads: 2, ..fault() }).ready();
        let innocent = engine.send(&order(innocent), LONG);
        let bad: Vec<_> = (0..3).map(|_| engine.send(&order("crash"), LONG)).collect();
        for reply in bad {
            assert_eq!(reply.recv_timeout(LONG).unwrap().result, Err(ScanError::KilledTwice));
        }
        assert_eq!(innocent.recv_timeout(LONG).unwrap().result, Ok(Outcome::Clean));
    }
}

#[test]
fn what_crashes_late_is_found_out_and_holds_nobody_up() {
    let engine = start(EngineConfig { threads: 2, ..fault() }).ready();
    let bad = engine.send(&order("crash-after=400"), LONG);
    let beside: Vec<_> = (0..200).map(|_| engine.send(&order("sleep=10"), LONG)).collect();
    for reply in beside {
        assert_eq!(reply.recv_timeout(LONG).unwrap().result, Ok(Outcome::Clean));
    }
    assert_eq!(bad.recv_timeout(LONG).unwrap().result, Err(ScanError::KilledTwice));
    assert!((2..=4).contains(&engine.handle.status().restarts));
}

#[test]
fn a_long_scan_that_is_tried_again_does_not_hold_others_up() {
    let engine = start(EngineConfig { threads: 2, ..fault() }).ready();
    let slow: Vec<_> = (0..2).map(|_| engine.send(&order("sleep=4000"), LONG)).collect();
    std::thread::sleep(Duration::from_millis(200));
    kill(engine.pid(), "KILL");
    // Both are suspects, and tried one after the other.
    for _ in 0..60 {
        let quick = engine.send(&order("sleep=50"), LONG);
        assert_eq!(quick.recv_timeout(Duration::from_secs(3)).unwrap().result, Ok(Outcome::Clean));
    }
    for reply in slow {
        assert_eq!(reply.recv_timeout(LONG).unwrap().result, Ok(Outcome::Clean));
    }
}

#[test]
fn a_hang_is_killed_at_its_limit_and_is_not_tried_again() {
    let engine = ready();
    let first = engine.pid();
    let beside = engine.send(&order("sleep=1500"), LONG);
    let report = engine.send(&order("hang"), Duration::from_millis(300));
    let report = report.recv_timeout(LONG).unwrap();
    assert_eq!(report.result, Err(ScanError::TimedOut));
    assert!(report.scanned >= Duration::from_millis(300), "{report:?}");
    assert_eq!(beside.recv_timeout(LONG).unwrap().result, Ok(Outcome::Clean));
    assert_eq!(engine.handle.status().restarts, 1);
    assert!(!alive(first));
}

#[test]
fn the_limit_does_not_run_while_a_scan_waits() {
    let engine = start(EngineConfig { threads: 1, ..fault() }).ready();
    let limit = Duration::from_millis(3500);
    // The second waits at the process for as long as the first takes.
    let all: Vec<_> = (0..3).map(|_| engine.send(&order("sleep=2000"), limit)).collect();
    for reply in all {
        assert_eq!(reply.recv_timeout(LONG).unwrap().result, Ok(Outcome::Clean));
    }
    assert_eq!(engine.handle.status().restarts, 0);
}

#[test]
fn past_the_memory_limit_the_process_dies_and_not_the_machine() {
    let engine = ready();
    assert_eq!(engine.scan(&order("memory")).result, Err(ScanError::KilledTwice));
    assert_eq!(engine.scan(b"harmless").result, Ok(Outcome::Clean));
}

#[test]
fn an_error_and_a_panic_are_reports_and_cost_no_process() {
    let engine = ready();
    let error = engine.scan(&order("error")).result;
    assert_eq!(error, Err(ScanError::Failed { reason: "asked to".into() }));
    let panic = engine.scan(&order("panic")).result.unwrap_err();
    assert!(panic.to_string().contains("the engine panicked: asked to"), "{panic}");
    assert_eq!(engine.scan(b"harmless").result, Ok(Outcome::Clean));
    assert_eq!(engine.handle.status().restarts, 0);
}

#[test]
fn nothing_outside_can_be_reached_from_the_sandbox() {
    let engine = ready();
    let outcome = engine.scan(&order("escape")).result.unwrap();
    assert_eq!(family(&outcome), "clean");
    assert_eq!(engine.handle.status().restarts, 0);
    let status = fs::read_to_string(format!("/proc/{}/status", engine.pid())).unwrap();
    for wanted in ["NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0000000000000000"] {
        assert!(status.contains(wanted), "{wanted} is missing in\n{status}");
    }
    let limits = fs::read_to_string(format!("/proc/{}/limits", engine.pid())).unwrap();
    let limit = |name: &str| {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        line[name.len()..].split_whitespace().next().unwrap().to_owned()
    };
    assert_eq!(limit("Max data size"), (256 << 20).to_string());
    assert_eq!(limit("Max core file size"), "0");
    assert_eq!(limit("Max file size"), "0");
    assert_eq!(limit("Max processes"), "0");
    assert_eq!(limit("Max open files"), "20");
    // Threads and descriptors: the main thread and two workers; streams and the socket.
    assert!(status.contains("Threads:\t3"), "{status}");
    let open = fs::read_dir(format!("/proc/{}/fd", engine.pid())).unwrap().count();
    assert_eq!(open, 4);
    // Of the environment, the socket's number alone.
    let environment = fs::read_to_string(format!("/proc/{}/environ", engine.pid())).unwrap();
    assert!(environment.starts_with("SEAWALL_ENGINE_FD="), "{environment}");
    assert_eq!(environment.matches('=').count(), 1);
}

#[test]
fn killed_from_outside_in_mid_scan_the_scan_is_done_by_the_next_process() {
    let engine = ready();
    let reply = engine.send(&order("sleep=500"), LONG);
    engine.wait_in_flight(1);
    let first = engine.pid();
    std::thread::sleep(Duration::from_millis(100));
    kill(first, "KILL");
    assert_eq!(reply.recv_timeout(LONG).unwrap().result, Ok(Outcome::Clean));
    assert_ne!(engine.pid(), first);
    assert_eq!(engine.handle.status().restarts, 1);
}

#[test]
fn a_stopped_process_is_replaced_when_its_scan_passes_the_limit() {
    let engine = ready();
    let reply = engine.send(&order("sleep=2000"), Duration::from_secs(3));
    engine.wait_in_flight(1);
    std::thread::sleep(Duration::from_millis(100));
    kill(engine.pid(), "STOP");
    assert_eq!(reply.recv_timeout(LONG).unwrap().result, Err(ScanError::TimedOut));
    assert_eq!(engine.scan(b"harmless").result, Ok(Outcome::Clean));
}

/// Nobody asks it for anything: the ping notices.
#[test]
fn a_stopped_idle_process_is_replaced_before_somebody_needs_it() {
    let engine = ready();
    let first = engine.pid();
    kill(first, "STOP");
    engine.wait_state(|_| engine.handle.status().restarts == 1);
    let engine = engine.ready();
    assert_ne!(engine.pid(), first);
    assert_eq!(engine.scan(b"harmless").result, Ok(Outcome::Clean));
}

/// The order of completion, not times: the sleeper ends last.
#[test]
fn one_slow_scan_among_two_hundred_holds_nobody_up() {
    let engine = ready();
    let (tell, ends) = mpsc::channel();
    let handle = &engine.handle;
    std::thread::scope(|scope| {
        for number in 0..200 {
            let tell = tell.clone();
            scope.spawn(move || {
                let mut content = if number == 20 { order("sleep=5000") } else { Vec::new() };
                content.resize(64 * 1024, b'.');
                let content = SharedContent::new(&content[..]).unwrap();
                handle.scan(content, metadata(), Lane::OnAccess, LONG, move |report| {
                    tell.send((number, report.result)).unwrap();
                });
            });
        }
    });
    let ends: Vec<_> = (0..200).map(|_| ends.recv_timeout(LONG).unwrap()).collect();
    assert!(ends.iter().all(|(_, result)| *result == Ok(Outcome::Clean)));
    assert_eq!(ends.last().unwrap().0, 20);
    assert_eq!(engine.handle.status().restarts, 0);
}

#[test]
fn on_access_overtakes_what_waits_on_demand() {
    let engine = start(EngineConfig { threads: 1, ..fault() }).ready();
    let (tell, ends) = mpsc::channel();
    let send = |name: &'static str, lane| {
        let tell = tell.clone();
        let content = SharedContent::new(order("sleep=300")).unwrap();
        engine.handle.scan(content, metadata(), lane, LONG, move |_| tell.send(name).unwrap());
    };
    // One in work and one waiting at the process: those two are past overtaking.
    (0..6).for_each(|_| send("demand", Lane::OnDemand));
    (0..2).for_each(|_| send("access", Lane::OnAccess));
    let order: Vec<_> = (0..8).map(|_| ends.recv_timeout(LONG).unwrap()).collect();
    assert_eq!(order[..2], ["demand"; 2]);
    assert_eq!(order[2..4], ["access"; 2]);
}

#[test]
fn scans_on_demand_leave_a_thread_free_for_accesses() {
    let engine = start(EngineConfig { threads: 2, kept: 1, ..fault() }).ready();
    let (tell, ends) = mpsc::channel();
    let on_demand: Vec<_> = (0..4)
        .map(|number| {
            let tell = tell.clone();
            let content = SharedContent::new(order("until-cancelled")).unwrap();
            let told = move |report: ScanReport| tell.send((number, report.result)).unwrap();
            engine.handle.scan(content, metadata(), Lane::OnDemand, LONG, told).unwrap()
        })
        .collect();
    engine.wait_in_flight(2);
    for _ in 0..20 {
        assert_eq!(engine.scan(b"harmless").result, Ok(Outcome::Clean));
    }
    assert!(ends.try_recv().is_err(), "those on demand are in work");
    // They go on one by one: while accesses come they have half of the threads.
    for (number, id) in on_demand.into_iter().enumerate() {
        engine.handle.cancel(id);
        let end = ends.recv_timeout(LONG).unwrap();
        assert_eq!(end, (number, Err(ScanError::Cancelled)));
        assert_eq!(engine.scan(b"harmless").result, Ok(Outcome::Clean));
        assert!(engine.handle.status().in_flight <= 1);
    }
}

#[test]
fn after_a_crash_accesses_are_fed_again_before_scans_on_demand() {
    let engine = start(EngineConfig { threads: 2, kept: 1, ..fault() }).ready();
    let content = SharedContent::new(order("until-cancelled")).unwrap();
    let (tell, end) = mpsc::channel();
    let told = move |report: ScanReport| tell.send(report.result).unwrap();
    let on_demand = engine.handle.scan(content, metadata(), Lane::OnDemand, LONG, told).unwrap();
    engine.wait_in_flight(1);
    let innocent = engine.send(&order("sleep=1000"), LONG);
    engine.wait_in_flight(2);
    std::thread::sleep(Duration::from_millis(200));
    // All three are suspects, and fed one at a time.
    let culprit = engine.send(&order("crash"), LONG);
    assert_eq!(innocent.recv_timeout(LONG).unwrap().result, Ok(Outcome::Clean));
    assert_eq!(culprit.recv_timeout(LONG).unwrap().result, Err(ScanError::KilledTwice));
    assert!(end.try_recv().is_err(), "it is wanted, and in work or waiting");
    engine.wait_in_flight(1);
    engine.handle.cancel(on_demand);
    assert_eq!(end.recv_timeout(LONG).unwrap(), Err(ScanError::Cancelled));
}

#[test]
fn a_full_queue_refuses_at_once() {
    let engine = start(EngineConfig { threads: 1, queue_limit: 3, ..fault() }).ready();
    // Two at the process, three in the queue, the others refused on this thread.
    let replies: Vec<_> = (0..8).map(|_| engine.send(&order("sleep=1000"), LONG)).collect();
    let refused = replies[5..].iter().map(|reply| reply.try_recv().unwrap().result);
    assert!(refused.into_iter().all(|result| result == Err(ScanError::QueueFull)));
    for reply in &replies[..5] {
        assert_eq!(reply.recv_timeout(LONG).unwrap().result, Ok(Outcome::Clean));
    }
}

#[test]
fn a_spool_file_that_is_truncated_meanwhile_is_an_error_and_no_crash() {
    let engine = ready();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&order("read")).unwrap();
    file.write_all(&vec![b'.'; 8 << 20]).unwrap();
    let length = file.metadata().unwrap().len();
    let content = SharedContent::from_spool(file.try_clone().unwrap(), length).unwrap();
    assert_eq!(
        engine.send_fd(content.clone(), LONG).recv_timeout(LONG).unwrap().result,
        Ok(Outcome::Clean)
    );
    let reply = engine.send_fd(content, LONG);
    engine.wait_in_flight(1);
    std::thread::sleep(Duration::from_millis(100));
    file.set_len(4096).unwrap();
    let result = reply.recv_timeout(LONG).unwrap().result;
    let reason = format!("the content ended after 4096 of {length} bytes");
    assert_eq!(result, Err(ScanError::Failed { reason }));
    assert_eq!(engine.handle.status().restarts, 0);
}

/// The engine looks away; its runtime does not.
#[test]
fn what_could_not_be_read_is_never_clean_whatever_the_engine_says() {
    let engine = ready();
    let file = tempfile::tempfile().unwrap();
    (&file).write_all(&order("swallow")).unwrap();
    let content = |length| SharedContent::from_spool(file.try_clone().unwrap(), length).unwrap();
    file.set_len(1 << 20).unwrap();
    let whole = engine.send_fd(content(1 << 20), LONG).recv_timeout(LONG).unwrap();
    assert_eq!(whole.result, Ok(Outcome::Clean));
    let too_long = engine.send_fd(content(2 << 20), LONG).recv_timeout(LONG).unwrap();
    let reason = "the content ended after 1048576 of 2097152 bytes".to_owned();
    assert_eq!(too_long.result, Err(ScanError::Failed { reason }));
    file.set_len(1 << 30).unwrap();
    let too_large = engine.send_fd(content(1 << 30), LONG).recv_timeout(LONG).unwrap();
    let reason = "no memory for 1073741824 bytes of content".to_owned();
    assert_eq!(too_large.result, Err(ScanError::Failed { reason }));
    assert_eq!(engine.handle.status().restarts, 0);
}

#[test]
fn what_took_the_time_is_told() {
    let error = ready().scan(&order("slow=rule_x")).result.unwrap_err();
    assert_eq!(error, ScanError::TimedOutIn { what: "rule_x".into() });
    assert_eq!(error.to_string(), "the scan took longer than its limit: rule_x");
}

#[test]
fn an_engine_without_a_scanner_says_why() {
    let engine = start(config(env!("CARGO_BIN_EXE_seawall-engine-fault"), &["--scannerless"]));
    let state = engine.wait_state(|state| matches!(state, EngineState::Failed { .. }));
    let EngineState::Failed { diagnostics } = state else { panic!() };
    let told: Vec<_> = diagnostics.iter().map(ToString::to_string).collect();
    assert_eq!(told, ["error[fault-scanner]: asked to have none"]);
}

#[test]
fn a_spool_file_that_is_truncated_after_it_was_read_makes_no_difference() {
    let engine = ready();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&order("keep")).unwrap();
    file.write_all(&vec![b'.'; 8 << 20]).unwrap();
    let length = file.metadata().unwrap().len();
    let content = SharedContent::from_spool(file.try_clone().unwrap(), length).unwrap();
    let reply = engine.send_fd(content, LONG);
    engine.wait_in_flight(1);
    std::thread::sleep(Duration::from_millis(700));
    file.set_len(0).unwrap();
    let outcome = reply.recv_timeout(LONG).unwrap().result.unwrap();
    assert_eq!(family(&outcome), (8 << 20).to_string());
    assert_eq!(engine.handle.status().restarts, 0);
}

#[test]
fn a_spool_file_larger_than_the_memory_limit_is_an_error_and_no_crash() {
    let engine = ready();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&order("read")).unwrap();
    file.set_len(1 << 30).unwrap();
    let content = SharedContent::from_spool(file, 1 << 30).unwrap();
    let result = engine.send_fd(content, LONG).recv_timeout(LONG).unwrap().result;
    assert!(result.unwrap_err().to_string().contains("no memory for 1073741824 bytes"));
    assert_eq!(engine.handle.status().restarts, 0);
}

/// In place: 512 MiB of content under a limit of 256 MiB.
#[test]
fn sealed_content_does_not_count_as_the_engines_memory() {
    let engine = ready();
    let mut content = order("read");
    content.resize(512 << 20, b'.');
    assert_eq!(engine.scan(&content).result, Ok(Outcome::Clean));
}

struct Rules {
    folder: tempfile::TempDir,
}

impl Rules {
    fn new(text: &str) -> Self {
        let rules = Self { folder: tempfile::tempdir().unwrap() };
        rules.write(text);
        rules
    }

    fn path(&self) -> String {
        self.folder.path().join("rules").display().to_string()
    }

    fn write(&self, text: &str) {
        fs::write(self.path(), text).unwrap();
    }

    fn config(&self) -> EngineConfig {
        config(env!("CARGO_BIN_EXE_seawall-engine-fault"), &["--rules", &self.path()])
    }
}

fn generation(text: &str) -> Generation {
    let mut bytes = [0; 32];
    bytes[..text.len()].copy_from_slice(text.as_bytes());
    Generation(bytes)
}

/// New signatures are another handle beside the one in use.
#[test]
fn a_strict_start_refuses_a_broken_set_and_names_the_place() {
    let rules = Rules::new("two\nbroken");
    let engine = start(EngineConfig { strict: true, ..rules.config() });
    assert!(engine.handle.wait_loaded(LONG));
    let EngineState::Failed { diagnostics } = engine.handle.state() else { panic!("not refused") };
    assert_eq!((diagnostics[0].line, diagnostics[0].code.as_str()), (2, "fault-broken"));
    let result = engine.scan(b"harmless").result;
    assert!(matches!(result, Err(ScanError::Unavailable { .. })), "{result:?}");
}

#[test]
fn after_a_strict_start_a_restart_uses_what_loads() {
    let rules = Rules::new("one");
    let engine = start(EngineConfig { strict: true, ..rules.config() }).ready();
    rules.write("two\nbroken");
    let died = engine.scan(&order("crash")).result;
    assert_eq!(died, Err(ScanError::KilledTwice));
    let engine = engine.ready();
    assert_eq!(engine.scan(b"harmless").result, Ok(Outcome::Clean));
}

#[test]
fn a_spare_process_takes_over_at_once() {
    let rules = Rules::new("one");
    let engine = start(EngineConfig { spare: true, threads: 2, ..rules.config() }).ready();
    let first = engine.pid();
    let deadline = std::time::Instant::now() + LONG;
    while engine.handle.status().spare_pid.is_none() {
        assert!(std::time::Instant::now() < deadline, "no spare process");
        std::thread::sleep(Duration::from_millis(5));
    }
    let second = engine.handle.status().spare_pid.unwrap();
    assert_ne!(first, second);
    rules.write("late");
    let innocent = engine.send(&order("sleep=300"), LONG);
    engine.wait_in_flight(1);
    kill(first, "KILL");
    assert_eq!(innocent.recv_timeout(LONG).unwrap().result, Ok(Outcome::Clean));
    assert_eq!(engine.pid(), second);
    assert_eq!(engine.handle.status().restarts, 1);
    assert_eq!(engine.handle.generation(), Some(generation("one")), "what it had loaded before");
    let deadline = std::time::Instant::now() + LONG;
    while engine.handle.status().spare_pid.is_none_or(|pid| pid == second) {
        assert!(std::time::Instant::now() < deadline, "no spare process after the first");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_spare_process_that_dies_is_replaced_and_costs_no_scan() {
    let rules = Rules::new("one");
    let engine = start(EngineConfig { spare: true, ..rules.config() }).ready();
    let wait_spare = |but: Option<u32>| {
        let deadline = std::time::Instant::now() + LONG;
        loop {
            let spare = engine.handle.status().spare_pid.filter(|pid| Some(*pid) != but);
            if let Some(spare) = spare {
                return spare;
            }
            assert!(std::time::Instant::now() < deadline, "no spare process");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    let spare = wait_spare(None);
    let first = engine.pid();
    kill(spare, "KILL");
    wait_spare(Some(spare));
    assert_eq!((engine.pid(), engine.handle.status().restarts), (first, 0));
    assert_eq!(engine.scan(b"harmless").result, Ok(Outcome::Clean));
}

#[test]
fn a_first_start_takes_what_loads_and_names_the_rest() {
    let rules = Rules::new("one\nbroken");
    let engine = start(rules.config()).ready();
    let EngineState::Ready { description } = engine.handle.state() else { panic!("not ready") };
    assert_eq!(description.diagnostics[0].code, "fault-broken");
    assert_eq!(engine.scan(b"harmless").result, Ok(Outcome::Clean));
}

#[test]
fn an_engine_that_cannot_load_fails_and_comes_back_when_it_can() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rules");
    let program = env!("CARGO_BIN_EXE_seawall-engine-fault");
    let engine = start(config(program, &["--rules", path.to_str().unwrap()]));
    let early = engine.send(b"harmless", LONG);
    let state = engine.wait_state(|state| matches!(state, EngineState::Failed { .. }));
    let EngineState::Failed { diagnostics } = state else { panic!("another state") };
    assert_eq!(diagnostics[0].code, "fault-read");
    let early = early.recv_timeout(LONG).unwrap().result;
    assert!(matches!(early, Err(ScanError::Unavailable { .. })), "{early:?}");
    let result = engine.scan(b"harmless").result;
    assert!(matches!(result, Err(ScanError::Unavailable { .. })), "{result:?}");
    fs::write(&path, "one").unwrap();
    let engine = engine.ready();
    assert_eq!(engine.scan(b"harmless").result, Ok(Outcome::Clean));
}

#[test]
fn a_program_that_is_not_there_is_named() {
    let engine = start(config("seawall-no-such-engine", &[]));
    let state = engine.wait_state(|state| matches!(state, EngineState::Failed { .. }));
    assert!(format!("{state:?}").contains("seawall-no-such-engine"), "{state:?}");
}

#[test]
fn stopping_answers_what_waits_and_leaves_no_process() {
    let engine = ready();
    let pid = engine.pid();
    let replies: Vec<_> = (0..10).map(|_| engine.send(&order("hang"), LONG)).collect();
    engine.wait_in_flight(4);
    engine.handle.stop();
    for reply in replies {
        assert_eq!(reply.recv_timeout(LONG).unwrap().result, Err(ScanError::Stopped));
    }
    assert!(!alive(pid));
}

/// A signal to a process that this test's own handle started.
fn kill(pid: u32, signal: &str) {
    let status = std::process::Command::new("kill")
        .args([&format!("-{signal}"), &pid.to_string()])
        .status()
        .unwrap();
    assert!(status.success());
}
