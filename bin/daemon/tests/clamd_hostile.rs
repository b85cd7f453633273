//! Clients of clamd's protocol that do what none should: nothing of it hangs the service, makes it large,
//! or comes between a guest and its verdict.

#![allow(clippy::unwrap_used)] // A test says what it expects by unwrapping it.

#[path = "common/clamd.rs"]
mod clamd;
mod common;

use clamd::{Client, ask, in_stream, stream};
use common::{PATIENCE, Service, Setup, program, wait_for};
use seawall_client::Verdict;
use seawall_proto::{ScanRequest, ToGuest, ToHost, VerdictKind};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

const INFECTED: &[u8] = b"SEAWALL-FAULT found=Found and more";

fn service(keys: &str) -> Service {
    serve(Setup::default(), keys)
}

fn serve(setup: Setup, keys: &str) -> Service {
    let more = format!("[clamd]\nsocket = \"{{dir}}/clamd.sock\"\n{keys}\n{}", setup.more);
    Service::start(Setup { more, ..setup })
}

fn socket(service: &Service) -> PathBuf {
    service.path("clamd.sock")
}

/// The service answers whoever comes, and is no larger than it may be.
fn is_well(service: &Service) {
    let content = format!("all is well at {:?}", Instant::now());
    assert_eq!(ask(&socket(service), &in_stream(content.as_bytes())), "stream: OK\0");
    let resident = service.status().resources.resident_kib;
    println!("resident: {resident} KiB");
    assert!(resident < 64 * 1024, "{resident} KiB");
}

/// Descriptors for a thousand connections and more.
fn many_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
}

#[test]
fn a_thousand_sessions_are_cheap_and_leave_room_for_others() {
    many_descriptors();
    let service = service("max_sessions = 3000");
    let before = service.status().resources.resident_kib;
    let connect = |n: usize| {
        let mut client = Client::connect(&socket(&service));
        // Some say nothing, some half a command, some are in a session, some in a stream.
        client.say(match n % 4 {
            0 => b"",
            1 => b"zSCAN /half",
            2 => b"zIDSESSION\0zPING\0",
            _ => b"zINSTREAM\0\0\0\x10\0half",
        });
        client
    };
    let mut clients: Vec<_> = (0..1200).map(connect).collect();
    for client in clients.iter_mut().skip(2).step_by(4) {
        assert_eq!(client.answer(0), "1: PONG");
    }
    let resident = service.status().resources.resident_kib;
    println!("{} sessions: {before} KiB, then {resident} KiB", clients.len());
    is_well(&service);
    // One user gets half of the sessions; who is too many is told so by the end of the connection.
    clients.extend((1200..1600).map(connect));
    wait_for("one that is too many", || {
        let told = Client::connect(&socket(&service)).say(b"zPING\0").hear();
        told.is_empty().then_some(())
    });
    drop(clients);
    wait_for("room", || (ask(&socket(&service), b"zPING\0") == "PONG\0").then_some(()));
    is_well(&service);
    service.wait_no_copies();
}

#[test]
fn a_client_that_reads_no_answers_is_left_alone_soon() {
    let service = service("read_timeout_s = 1");
    let mut deaf = Client::connect(&socket(&service));
    deaf.say(b"zIDSESSION\0");
    // Until the service neither takes nor answers any more: it has ended the session.
    let until = Instant::now() + PATIENCE;
    let flood = b"zVERSIONCOMMANDS\0".repeat(1000);
    let ended = loop {
        match std::io::Write::write_all(&mut deaf.0, &flood) {
            Ok(()) => assert!(Instant::now() < until, "it goes on and on"),
            Err(error) => break error,
        }
    };
    // And not the end of this client's own patience.
    let gone = [std::io::ErrorKind::BrokenPipe, std::io::ErrorKind::ConnectionReset];
    assert!(gone.contains(&ended.kind()), "{ended}");
    is_well(&service);
}

#[test]
fn ten_thousand_commands_in_flight_are_each_answered_once() {
    let service = service("");
    let mut client = Client::connect(&socket(&service));
    let mut writer = Client(client.0.try_clone().unwrap());
    const COMMANDS: usize = 10_000;
    let talk = std::thread::spawn(move || {
        writer.say(b"zIDSESSION\0");
        let infected = in_stream(INFECTED);
        for n in 1..=COMMANDS {
            match n % 5 {
                0 => writer.say(&infected),
                1 => writer.say(b"zPING\0"),
                2 => writer.say(b"zSCAN /none\0"),
                3 => writer.say(&in_stream(&(n / 100).to_le_bytes())),
                _ => writer.say(b"zVERSION\0"),
            };
        }
        writer.say(b"zEND\0");
    });
    let mut answered = vec![false; COMMANDS + 1];
    for answer in client.hear().split_terminator('\0') {
        let (number, told) = answer.split_once(": ").unwrap();
        let number: usize = number.parse().unwrap();
        assert!(!std::mem::replace(&mut answered[number], true), "{number} twice");
        let expected = match number % 5 {
            0 => "stream: Found FOUND",
            1 => "PONG",
            2 => "/none: Access denied. ERROR",
            3 => "stream: OK",
            _ => "ClamAV ",
        };
        assert!(told.starts_with(expected), "{answer}");
    }
    talk.join().unwrap();
    assert!(answered[1..].iter().all(|answered| *answered));
    is_well(&service);
    service.wait_no_copies();
}

#[test]
fn streams_are_bounded_whatever_they_say_of_their_length() {
    let service = service("stream_max_mib = 8\nread_timeout_s = 2");
    let at = socket(&service);
    // 5 GiB, as fast as it takes them, in whole chunks; the answer is there for whoever sends on.
    let mut client = Client::connect(&at);
    let chunk = [&(1_u32 << 20).to_be_bytes()[..], &vec![b'x'; 1 << 20]].concat();
    let mut sender = Client(client.0.try_clone().unwrap());
    let done = Arc::new(AtomicBool::new(false));
    let is_done = Arc::clone(&done);
    let flood = std::thread::spawn(move || {
        sender.say(b"zINSTREAM\0");
        let chunks = 5 * 1024;
        (0..chunks)
            .take_while(|_| {
                sender.say(&chunk);
                !is_done.load(Relaxed)
            })
            .count()
    });
    assert_eq!(client.answer(0), "INSTREAM size limit exceeded. ERROR");
    // It is read on for a while, and others are served meanwhile.
    is_well(&service);
    done.store(true, Relaxed);
    assert!(flood.join().unwrap() >= 8);
    drop(client);
    // Exactly as long as it may be, and a byte more.
    let whole = vec![b'y'; 8 << 20];
    assert_eq!(ask(&at, &in_stream(&whole)), "stream: OK\0");
    let more = [&b"zINSTREAM\0"[..], &stream(&whole)[..whole.len() + 4], &stream(b"z")].concat();
    assert_eq!(ask(&at, &more), "INSTREAM size limit exceeded. ERROR\0");
    // The same content in chunks of one byte.
    let bytes: Vec<u8> = INFECTED.iter().flat_map(|byte| [0, 0, 0, 1, *byte]).collect();
    let told = ask(&at, &[&b"zINSTREAM\0"[..], &bytes, &[0; 4]].concat());
    assert_eq!(told, "stream: Found FOUND\0");
    // More announced than sent: it is waited for; and nobody waits when the client has gone.
    for length in [100_u32, 8 << 20] {
        let half = [&b"zINSTREAM\0"[..], &length.to_be_bytes(), b"half"].concat();
        assert_eq!(ask(&at, &half), "COMMAND READ TIMED OUT\n");
        assert_eq!(Client::connect(&at).say(&half).end().hear(), "");
    }
    // Less announced than sent: what is behind the end is the next command, and none that is known.
    let told = ask(&at, b"zIDSESSION\0zINSTREAM\0\0\0\0\x01x\0\0\0\0zFOO\0");
    assert!(told.contains("2: Command invalid inside IDSESSION. ERROR\0"), "{told}");
    assert!(told.contains("1: stream: OK\0"), "{told}");
    is_well(&service);
    service.wait_no_copies();
}

#[test]
fn many_half_streams_take_no_more_than_a_guest_may() {
    // A quarter of 16 MiB in memory, and 8 times 4 MiB on disk.
    let setup = Setup { more: "[limits]\nprivate_copies_mib = 16\n".into(), ..Setup::default() };
    let service = serve(setup, "stream_max_mib = 4");
    let half = [&b"zINSTREAM\0"[..], &(4_u32 << 20).to_be_bytes(), &vec![b'x'; 3 << 20]].concat();
    let mut clients: Vec<_> = (0..14)
        .map(|_| {
            let mut client = Client::connect(&socket(&service));
            client.say(&half);
            client
        })
        .collect();
    let told = clients.iter_mut().filter_map(|client| {
        client.0.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let mut answer = [0; 64];
        let len = client.0.read(&mut answer).ok()?;
        Some(String::from_utf8_lossy(&answer[..len]).into_owned())
    });
    let told: Vec<_> = told.collect();
    assert!(!told.is_empty(), "there is no room for all of them");
    assert!(told.iter().all(|told| told == "Error writing to temporary file ERROR\0"), "{told:?}");
    let copies = service.status().private_copies;
    assert!(copies.memory_bytes <= 4 << 20, "{copies:?}");
    assert!(copies.spooled_bytes <= 32 << 20, "{copies:?}");
    // A guest has its own part.
    assert_eq!(service.driver("g1").scan(&vec![b'g'; 200_000]).kind, VerdictKind::Clean);
    drop(clients);
    service.wait_no_copies();
    is_well(&service);
}

#[test]
fn rubbish_ends_its_own_session_at_most() {
    let service = service("idle_timeout_s = 1\nread_timeout_s = 1");
    let at = socket(&service);
    assert_eq!(ask(&at, &[b'z'; 6000]), "", "no command is that long");
    assert_eq!(ask(&at, &[&b"zIDSESSION\0"[..], &[b'n'; 6000]].concat()), "");
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    for round in 0..200 {
        let bytes: Vec<u8> = std::iter::repeat_with(|| {
            // xorshift64, the same in every run.
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            (seed >> 32) as u8
        })
        .take(1 + round * 37)
        .collect();
        let begin: &[u8] = [&b""[..], b"z", b"n", b"zIDSESSION\0", b"zINSTREAM\0"][round % 5];
        let told = Client::connect(&at).say(&[begin, &bytes].concat()).end().all();
        assert!(told.len() < 100_000, "{}", told.len());
    }
    is_well(&service);
    service.wait_no_copies();
}

#[test]
fn a_memfd_that_changes_during_its_scan_has_one_verdict_and_poisons_nothing() {
    let service = service("");
    let memory = rustix::fs::memfd_create("m", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = std::fs::File::from(memory);
    let clean = vec![b'c'; INFECTED.len()];
    file.write_all_at(&clean, 0).unwrap();
    let (done, changing) = (Arc::new(AtomicBool::new(false)), file.try_clone().unwrap());
    let is_done = Arc::clone(&done);
    let other = clean.clone();
    let changer = std::thread::spawn(move || {
        while !is_done.load(Relaxed) {
            changing.write_all_at(INFECTED, 0).unwrap();
            changing.write_all_at(&other, 0).unwrap();
            // Shorter and longer, too.
            changing.set_len(3).unwrap();
            changing.set_len(1 << 20).unwrap();
        }
    });
    let mut seen = [0; 2];
    let until = Instant::now() + PATIENCE;
    while seen.contains(&0) || seen[0] + seen[1] < 200 {
        assert!(Instant::now() < until, "{seen:?}");
        let told = Client::connect(&socket(&service)).fildes(&file).hear();
        match told.split_once("]: ") {
            Some((_, "OK\0")) => seen[0] += 1,
            Some((_, "Found FOUND\0")) => seen[1] += 1,
            _ => panic!("{told}"),
        }
    }
    done.store(true, Relaxed);
    changer.join().unwrap();
    assert_eq!(service.scan("clean", &clean).verdict, Verdict::Clean);
    assert_eq!(service.scan("infected", INFECTED).verdict, Verdict::Infected);
    service.wait_no_copies();
}

#[test]
fn descriptors_that_nobody_asked_for_do_not_stay() {
    let service = service("");
    let count =
        || std::fs::read_dir(format!("/proc/{}/fd", service.pid())).map_or(0, Iterator::count);
    let one = std::fs::File::open("/dev/null").unwrap();
    let fds = [one.as_fd(); 8];
    is_well(&service);
    let before = count();
    for n in 0..300 {
        let mut client = Client::connect(&socket(&service));
        match n % 4 {
            0 => client.pass(b"zPING\0", &fds[..1]),
            1 => client.say(b"zFILDES\0").pass(b"\0", &fds),
            2 => client.say(b"zINSTREAM\0").pass(b"\0\0\0\x09xx", &fds),
            _ => client.pass(b"zIDSE", &fds).pass(b"SSION\0", &fds),
        };
        // Its end may come before what it was to hear.
        let _ = client.end().all();
    }
    wait_for("all to be closed", || (count() <= before + 2).then_some(()));
}

/// Ends with the test, before the service: that could not end while it waits for this.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn who_waits_for_a_file_that_never_opens_holds_up_nobody_else() {
    let setup = Setup { state_mib: Some(64), ..Setup::default() };
    let service = serve(setup, "scan_paths = [\"{dir}/stuck\", \"{dir}/files\"]");
    for folder in ["stuck", "files"] {
        std::fs::create_dir(service.path(folder)).unwrap();
    }
    std::fs::write(service.path("files/bad"), INFECTED).unwrap();
    // In the service's mount namespace, which ends with it.
    let server = Command::new("nsenter")
        .arg(format!("--mount=/proc/{}/ns/mnt", service.pid()))
        .args(["--", program("seawall-opener").to_str().unwrap(), "fuse"])
        .arg(service.path("stuck"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut server = Killed(server);
    let mut told = [0; 8];
    server.0.stdout.as_mut().unwrap().read_exact(&mut told).unwrap();
    assert_eq!(&told, b"mounted\n");
    let stuck = format!("zSCAN {}\0", service.path("stuck/file").display());
    let mut waiting: Vec<_> = (0..100)
        .map(|_| {
            let mut client = Client::connect(&socket(&service));
            client.say(stuck.as_bytes());
            client
        })
        .collect();
    // Those who do not wait for it: guests, the operator, and who sends a stream.
    assert_eq!(service.driver("g1").scan(b"from a guest").kind, VerdictKind::Clean);
    assert_eq!(service.scan("x", b"by the operator").verdict, Verdict::Clean);
    is_well(&service);
    assert_eq!(ask(&socket(&service), b"zPING\0"), "PONG\0");
    // Some give up; the rest is told when the file system has gone.
    waiting.truncate(20);
    drop(server);
    for client in &mut waiting {
        let told = client.hear();
        assert!(told.ends_with(" ERROR\0"), "{told}");
    }
    let bad = format!("zSCAN {}\0", service.path("files/bad").display());
    let told = ask(&socket(&service), bad.as_bytes());
    assert!(told.ends_with(": Found FOUND\0"), "{told}");
}

#[test]
fn a_guest_that_waits_goes_before_all_clients() {
    let service = service("");
    let mut driver = service.driver("g1");
    // The engine has two threads: ten seconds of work and more.
    let clients: Vec<_> = (0..60)
        .map(|n| {
            let mut client = Client::connect(&socket(&service));
            client.say(&in_stream(format!("SEAWALL-FAULT sleep=400 {n}").as_bytes()));
            client
        })
        .collect();
    wait_for("the engine to be busy", || (service.status().engines[0].queued > 0).then_some(()));
    // No more than its bound is with the engine: the rest waits at the door.
    let engine = service.status().engines.remove(0);
    assert!(engine.queued + engine.in_flight <= 32, "{engine:?}");
    let (slots, refs) = driver.fill(b"SEAWALL-FAULT sleep=1 held");
    let request = ScanRequest { ..driver.request(refs, true) };
    let id = request.id;
    driver.say(ToHost::ScanRequest(request));
    assert_eq!(driver.verdict(id).kind, VerdictKind::Clean);
    assert!(!driver.said.iter().any(|said| matches!(said, ToGuest::Verdict(_))));
    drop(slots);
    // Most of them were before it, and are answered after it.
    let waiting = clients.iter().filter(|client| {
        client.0.set_nonblocking(true).unwrap();
        (&client.0).read(&mut [0; 64]).is_err()
    });
    let waiting = waiting.count();
    assert!(waiting > 30, "{waiting} of 60 still wait");
    // Nobody wants the rest any more, and the engine is told.
    drop(clients);
    wait_for("the engine to be free", || {
        let engine = service.status().engines.remove(0);
        (engine.queued + engine.in_flight == 0).then_some(())
    });
    service.wait_no_copies();
}
