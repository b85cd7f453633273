//! Sessions come and go: reconnects, restarts, alarms, reloads, TCP.

mod common;

use common::{Connection, PATIENCE, Service, Setup, seawall, wait_for};
use seawall_client::{EventKind, GuestState};
use seawall_proto::noise::{HANDSHAKE_LEN, Initiator, Opener, Sealer};
use seawall_proto::{FailMode, Key, Operation, Preface, Refusal, RegionId, ToGuest, VerdictKind};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

#[test]
fn a_new_session_takes_the_place_of_the_old_one() {
    let service = Service::start(Setup::default());
    let mut old = service.driver("g1");
    let mut new = service.driver("g1");
    old.connection.hear_the_end();
    service.wait_log("a new session of the same guest takes its place");
    assert_eq!(new.scan(b"x").kind, VerdictKind::Clean);
    let session = service.guest("g1").session.expect("the new one");
    assert_eq!(session.driver.kernel, r"6.1\x1b[2J", "what a driver says of itself is escaped");
}

#[test]
fn a_driver_comes_back_to_a_restarted_service() {
    let mut service = Service::start(Setup::default());
    for signal in ["TERM", "KILL"] {
        let mut driver = service.driver("g1");
        assert_eq!(driver.scan(b"before").kind, VerdictKind::Clean);
        let header = driver.region.header().unwrap();
        service.restart(signal);
        driver.connection.hear_the_end();
        // With the old key it is told to read the header again.
        let answer = service.connect("g1").attach(&header.key.0, header.region);
        assert!(matches!(answer, ToGuest::Refused(Refusal::Region)), "{answer:?}");
        let mut again = service.driver("g1");
        assert!(again.attached.generation > driver.attached.generation);
        assert_eq!(again.scan(b"before").kind, VerdictKind::Clean);
    }
    let kinds: Vec<_> = service.events().iter().map(|event| event.kind).collect();
    assert_eq!(kinds.iter().filter(|kind| **kind == EventKind::ServiceStarted).count(), 3);
    assert_eq!(kinds.iter().filter(|kind| **kind == EventKind::ServiceStopped).count(), 1);
}

#[test]
fn a_clean_end_leaves_no_engine_and_no_socket() {
    let mut service = Service::start(Setup::default());
    let _driver = service.driver("g1");
    let engine = service.status().engines[0].pid.expect("it runs");
    service.signal("TERM");
    assert!(service.wait_end().success());
    let gone = || !std::path::Path::new(&format!("/proc/{engine}")).exists();
    wait_for("the engine to end", || gone().then_some(()));
    assert!(!service.path("api.sock").exists() && !service.path("g1.sock").exists());
}

#[test]
fn a_new_region_file_gets_a_header_and_the_old_key_is_worth_nothing() {
    let service = Service::start(Setup::default());
    let old = service.region("g1").header().unwrap();
    service.renew_region("g1");
    let answer = service.connect("g1").attach(&old.key.0, old.region);
    assert!(matches!(answer, ToGuest::Refused(Refusal::Region)), "{answer:?}");
    assert_eq!(service.driver("g1").scan(b"x").kind, VerdictKind::Clean);
    // Also without a connection, so that a driver finds one to connect with.
    service.renew_region("g1");
    wait_for("the header", || service.region("g1").header().ok());
}

#[test]
fn a_region_that_is_missing_or_of_a_wrong_size_is_told_and_taken_once_it_is_right() {
    let service = Service::start(Setup::default());
    let path = service.path("g1.region");
    let fault = |what: &str| {
        wait_for(what, || {
            let guest = service.guest("g1");
            guest.region_fault.filter(|fault| fault.contains(what) && guest.session.is_none())
        })
    };
    std::fs::remove_file(&path).unwrap();
    fault("No such file");
    for len in [0, 4096, 3 << 20, (1 << 20) + 1] {
        let new = service.path("new");
        std::fs::File::create(&new).unwrap().set_len(len).unwrap();
        std::fs::rename(new, &path).unwrap();
        fault(&format!("not {len} bytes"));
        assert_eq!(service.driver("g2").scan(b"other guest").kind, VerdictKind::Clean);
    }
    service.renew_region("g1");
    wait_for("the header", || service.region("g1").header().ok());
    assert_eq!(service.driver("g1").scan(b"x").kind, VerdictKind::Clean);
    wait_for("the fault to be over", || service.guest("g1").region_fault.is_none().then_some(()));
}

#[test]
fn what_needs_a_restart_is_told_until_there_is_one() {
    let mut service = Service::start(Setup::default());
    let reload = |service: &Service| {
        service.configure();
        common::block_on(service.client().reload()).unwrap().restart_needed
    };
    let before =
        std::mem::replace(&mut service.setup.more, "[limits]\nprivate_copies_mib = 9\n".into());
    assert_eq!(reload(&service), ["[limits]"]);
    assert_eq!(reload(&service), ["[limits]"], "it still is");
    service.setup.more = before;
    assert!(reload(&service).is_empty(), "as at the start");
}

#[test]
fn a_lost_heartbeat_is_an_alarm_and_the_next_one_its_end() {
    let more = "[alarm]\nheartbeat_ms = 100\nunprotected_after_ms = 800\n";
    let service = Service::start(Setup { more: more.into(), ..Setup::default() });
    assert_eq!(service.guest("g1").state, GuestState::NeverSeen);
    let mut driver = service.driver("g1");
    assert_eq!(driver.attached.heartbeat_ms, 100);
    let state = || service.guest("g1").state;
    let until = Instant::now() + Duration::from_millis(1500);
    while Instant::now() < until {
        driver.heartbeat();
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(state(), GuestState::Protected);
    assert!(service.events().iter().all(|event| event.kind != EventKind::GuestUnprotected));
    let row = || {
        let output = seawall(&service, &["guests"]);
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().find(|line| line.starts_with(" g1 ")).expect("its row").to_owned()
    };
    assert!(row().contains("unix"), "{}", row());

    let begin = Instant::now();
    let event = service.wait_event(EventKind::GuestUnprotected, "g1");
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
    assert!(event.reason.unwrap().contains("sends no heartbeat"));
    service.wait_log("ERROR");
    assert_eq!(state(), GuestState::Unprotected);
    assert!(!service.status().healthy);
    assert!(!row().contains("unix"), "what it said before is not how things are: {}", row());
    driver.heartbeat();
    service.wait_event(EventKind::GuestProtected, "g1");

    // The same when the connection is gone.
    drop(driver);
    wait_for("the second alarm", || {
        let alarms = |event: &seawall_client::Event| event.kind == EventKind::GuestUnprotected;
        let alarms: Vec<_> = service.events().into_iter().filter(alarms).collect();
        alarms.get(1)?.reason.as_ref()?.contains("not connected").then_some(())
    });
    let of_other = |event: &seawall_client::Event| event.guest.as_deref() == Some("g2");
    assert!(!service.events().iter().any(of_other), "a guest never seen raises no alarm");
}

#[test]
fn a_socket_that_vanished_is_made_again() {
    let service = Service::start(Setup::default());
    std::fs::remove_file(service.path("g1.sock")).unwrap();
    assert_eq!(service.driver("g1").scan(b"x").kind, VerdictKind::Clean);
}

#[test]
fn a_reload_takes_over_guests_and_policy_and_refuses_what_is_wrong() {
    let mut service = Service::start(Setup::default());
    let mut driver = service.driver("g1");
    let mut second = service.driver("g2");
    assert_eq!(driver.connection.policy, seawall_proto::Policy::default());

    service.setup.more =
        "[policy]\nexclude.paths = [\"/var/cache/\"]\nfail_mode.open = \"closed\"\n".into();
    service.setup.guests = vec!["g1", "g3"];
    std::fs::File::create(service.path("g3.region")).unwrap().set_len(1 << 20).unwrap();
    service.configure();
    service.signal("HUP");
    let policy = driver.connection.hear_policy().clone();
    assert_eq!(policy.fail_open, FailMode::Closed);
    assert_eq!(policy.exclude.paths, vec![serde_bytes::ByteBuf::from(b"/var/cache/".to_vec())]);
    second.connection.hear_the_end();
    service.wait_log("the guest is no longer configured");
    assert_eq!(service.driver("g3").connection.policy, policy);
    assert_eq!(driver.scan(b"the session of g1 stands").kind, VerdictKind::Clean);

    std::fs::write(service.path("seawalld.toml"), "[policy]\nfail_mode.open = \"ajar\"\n").unwrap();
    let reload = common::block_on(service.client().reload()).unwrap();
    assert!(!reload.taken);
    let error = reload.config_error.unwrap();
    assert!(
        error.contains("seawalld.toml:2:18: error[E-VALUE]: unknown variant `ajar`"),
        "{error}"
    );
    assert_eq!(driver.scan(b"and still").kind, VerdictKind::Clean);
    std::fs::write(service.path("seawalld.toml"), "").unwrap();
    let error = common::block_on(service.client().reload()).unwrap().config_error.unwrap();
    assert!(error.contains("names no guest, and 2 are protected now"), "{error}");
    assert_eq!(driver.scan(b"nobody is let down").kind, VerdictKind::Clean);
    service.wait_log("the configuration cannot be read again, the running one stays");
}

#[test]
fn a_second_instance_is_refused() {
    let service = Service::start(Setup::default());
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_seawalld"))
        .arg("--config")
        .arg(service.path("seawalld.toml"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("another seawalld serves"), "{said}");
    assert_eq!(service.driver("g1").scan(b"x").kind, VerdictKind::Clean);
}

/// Promised: at most 64 MiB resident without engines and private copies.
#[test]
fn the_service_is_small() {
    let guests = vec!["g1", "g2", "g3", "g4"];
    let service = Service::start(Setup { guests: guests.clone(), ..Setup::default() });
    let mut drivers: Vec<_> = guests.iter().map(|guest| service.driver(guest)).collect();
    for n in 0..2000_u32 {
        for driver in &mut drivers {
            let mut content = vec![0; 30_000];
            content[..4].copy_from_slice(&(n / 2).to_le_bytes());
            assert_eq!(driver.scan(&content).kind, VerdictKind::Clean);
        }
    }
    let resident = service.status().resources.resident_kib;
    println!("resident: {resident} KiB after {} requests", 2000 * drivers.len());
    assert!(resident < 64 * 1024, "{resident} KiB");
}

/// The driver's end of an encrypted TCP link.
struct Sealed {
    stream: TcpStream,
    sealer: Sealer,
    opener: Opener,
    plain: Vec<u8>,
}

impl Read for Sealed {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let mut bytes = [0; 4096];
        while self.plain.is_empty() {
            let len = self.stream.read(&mut bytes)?;
            if len == 0 {
                return Ok(0);
            }
            let plain = &mut self.plain;
            self.opener
                .open(&bytes[..len], |piece| plain.extend_from_slice(piece))
                .map_err(io::Error::other)?;
        }
        let len = to.len().min(self.plain.len());
        to[..len].copy_from_slice(&self.plain[..len]);
        self.plain.drain(..len);
        Ok(len)
    }
}

impl Write for Sealed {
    fn write(&mut self, plain: &[u8]) -> io::Result<usize> {
        let mut wire = Vec::new();
        self.sealer.seal(plain, &mut wire).map_err(io::Error::other)?;
        self.stream.write_all(&wire)?;
        Ok(plain.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `None` when the service ends the connection in the handshake.
fn connect_tcp(service: &Service, region: RegionId, key: &Key) -> Option<Connection> {
    let mut stream = TcpStream::connect(("127.0.0.1", service.port)).expect("it listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("it is open");
    let (initiator, message) = Initiator::new(key).expect("a key");
    stream.write_all(&Preface { region }.to_bytes()).expect("it is open");
    stream.write_all(&message).expect("it is open");
    let mut reply = [0; HANDSHAKE_LEN];
    match stream.read_exact(&mut reply) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => panic!("no end: {error}"),
        Err(_) => return None,
    }
    let (sealer, opener) = initiator.finish(&reply).expect("the service has the key");
    let sealed = Sealed { stream, sealer, opener, plain: Vec::new() };
    Some(Connection::new(sealed))
}

#[test]
fn tcp_is_for_those_who_hold_the_regions_key() {
    let service = Service::start(Setup { tcp: true, ..Setup::default() });
    let (one, two) =
        (service.region("g1").header().unwrap(), service.region("g2").header().unwrap());
    assert!(connect_tcp(&service, one.region, &two.key).is_none(), "another guest's key");
    service.wait_log("does not hold this region's key");
    assert!(connect_tcp(&service, RegionId([9; 16]), &one.key).is_none(), "no such region");

    let mut connection = connect_tcp(&service, one.region, &one.key).expect("the right key");
    let answer = connection.attach(&one.key.0, one.region);
    let ToGuest::Attached(attached) = answer else { panic!("{answer:?}") };
    assert_eq!(attached.guest, "g1");
    let mut driver = common::Driver {
        connection,
        region: service.region("g1"),
        attached,
        next_id: 1,
        copied: Vec::new(),
        said: Vec::new(),
    };
    assert_eq!(driver.scan(b"over tcp").kind, VerdictKind::Clean);
    assert_eq!(driver.scan(&[7; 900_000]).kind, VerdictKind::Clean);
    let session = service.guest("g1").session.expect("it stands");
    assert_eq!(session.link, seawall_client::LinkKind::Tcp);

    // Connections that say nothing keep nobody out.
    let idle: Vec<_> =
        (0..40).map(|_| TcpStream::connect(("127.0.0.1", service.port)).unwrap()).collect();
    assert!(connect_tcp(&service, two.region, &two.key).is_some());
    assert_eq!(driver.scan(b"it stands").kind, VerdictKind::Clean);
    drop(idle);
}

/// As many verdicts as a service may be told to keep, from the state that an earlier one left.
#[test]
fn a_million_verdicts_fit() {
    const MILLION: u64 = 1_000_000;
    let more = format!("[limits]\nverdict_cache_entries = {MILLION}\n");
    let mut service = Service::start(Setup { more, ..Setup::default() });
    assert_eq!(service.driver("g1").scan(b"makes the set known").kind, VerdictKind::Clean);
    service.restart_after("TERM", |service| {
        let mut state = rusqlite::Connection::open(service.path("state/state.db")).unwrap();
        let transaction = state.transaction().unwrap();
        let set: (i64, Vec<u8>) = transaction
            .query_row("SELECT id, digest FROM sets", (), |row| Ok((row.get(0)?, row.get(1)?)))
            .unwrap();
        let sql = "INSERT INTO verdicts (set_id, hash, seal) VALUES (?1, ?2, ?3)";
        let mut insert = transaction.prepare(sql).unwrap();
        for n in 0..MILLION {
            let hash = *blake3::hash(&n.to_le_bytes()).as_bytes();
            let seal = blake3::Hasher::new().update(&set.1).update(&hash).finalize();
            insert.execute((set.0, hash, &seal.as_bytes()[..8])).unwrap();
        }
        drop(insert);
        transaction.commit().unwrap();
    });
    let until = Instant::now() + 6 * PATIENCE;
    while service.status().cached_verdicts < MILLION * 98 / 100 {
        assert!(Instant::now() < until, "{} are remembered", service.status().cached_verdicts);
        std::thread::sleep(Duration::from_millis(100));
    }
    let resident = service.status().resources.resident_kib;
    println!("resident: {resident} KiB with {} verdicts", service.status().cached_verdicts);
    assert!(resident < 170 * 1024, "{resident} KiB");
    let newest = *blake3::hash(&(MILLION - 1).to_le_bytes()).as_bytes();
    let verdict = service.driver("g1").name(Operation::Open, newest);
    assert_eq!(verdict.map(|verdict| verdict.kind), Some(VerdictKind::Clean));
}
