//! clamd's protocol: its answers are clamd's own, ClamAV's clients work with it unchanged, and no client
//! hangs, bloats or disturbs the service.

#![allow(clippy::unwrap_used)] // A test says what it expects by unwrapping it.

#[path = "common/clamd.rs"]
mod clamd;
mod common;

use clamd::{Client, ask, in_stream};
use common::{Engine, Service, Setup, block_on, free_port, wait_for};
use seawall_client::Verdict;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

/// What both a real clamd and the fault engine take for infected by `Found`.
const INFECTED: &[u8] = b"SEAWALL-FAULT found=Found and more";

/// A service with a socket for clients, and keys of `[clamd]` besides.
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

/// A folder with files of every kind in a service's folder.
fn samples(folder: &Path) {
    std::fs::create_dir_all(folder.join("deep/deeper")).unwrap();
    std::fs::create_dir(folder.join("clean")).unwrap();
    for name in ["bad", "deep/deeper/bad"] {
        std::fs::write(folder.join(name), INFECTED).unwrap();
    }
    for name in ["good", "deep/good", "clean/one", "clean/two"] {
        std::fs::write(folder.join(name), "harmless").unwrap();
    }
    std::fs::write(folder.join("empty"), "").unwrap();
    std::os::unix::fs::symlink("bad", folder.join("link")).unwrap();
    let mode = rustix::fs::Mode::RWXU;
    rustix::fs::mkfifoat(rustix::fs::CWD, folder.join("fifo"), mode).unwrap();
}

/// Debian's clamd with one signature, until it is dropped.
struct RealClamd {
    child: Child,
    folder: tempfile::TempDir,
}

impl RealClamd {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::create_dir(path("db")).unwrap();
        let hex: String = INFECTED.iter().map(|byte| format!("{byte:02x}")).collect();
        std::fs::write(path("db/one.ndb"), format!("Found:0:0:{hex}\n")).unwrap();
        let dir = folder.path().display();
        let config = format!(
            "LocalSocket {dir}/clamd.sock\nDatabaseDirectory {dir}/db\nTemporaryDirectory {dir}\n\
             Foreground yes\nUser root\nStreamMaxLength 1M\nCommandReadTimeout 2\nReadTimeout 2\n"
        );
        std::fs::write(path("clamd.conf"), config).unwrap();
        let child = Command::new("/usr/sbin/clamd")
            .arg(format!("--config-file={dir}/clamd.conf"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("clamd is installed: cargo xtask setup");
        let real = Self { child, folder };
        wait_for("clamd", || Client::try_connect(&real.socket()).ok());
        real
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("clamd.sock")
    }
}

impl Drop for RealClamd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Without what legitimately differs: names of clamd's own signatures end in UNOFFICIAL, descriptors have
/// their own numbers, and the version is that of its program.
fn comparable(heard: &str) -> String {
    let mut text = heard.replace(".UNOFFICIAL", "");
    if let (Some(start), Some(end)) = (text.find("ClamAV "), text.find(['|', '\0', '\n'])) {
        text.replace_range(start + 7..end.max(start + 7), "VERSION");
    }
    let mut parts = text.split("fd[");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| {
        text + "fd[N" + part.trim_start_matches(|c: char| c.is_ascii_digit())
    })
}

#[test]
fn answers_are_those_of_a_real_clamd() {
    let real = RealClamd::start();
    let service = service(
        "scan_paths = [\"{dir}/samples\"]\nstream_max_mib = 1\nidle_timeout_s = 2\nread_timeout_s = 2",
    );
    let samples_at = service.path("samples");
    samples(&samples_at);
    let dir = samples_at.to_str().unwrap();
    let path = |command: &str, name: &str| format!("{command} {dir}{name}").into_bytes();
    let z = |words: &[u8]| [b"z", words, b"\0"].concat();
    let mut said: Vec<Vec<u8>> = [
        &b"zPING\0"[..],
        b"nPING\n",
        b"nPING\r\n",
        b"PING",
        b"PING\n",
        b"PING\r\n",
        b"zPING\n\0",
        b"zping\0",
        b"zPINGPONG\0",
        b"zPING\0zPING\0",
        b"zVERSION\0",
        b"VERSION\n",
        b"VERSIONCOMMANDS\n",
        b"STATS\n",
        b"zRELOAD\0",
        b"RELOAD\n",
        b"zSHUTDOWNx\0",
        b"zFOO\0",
        b"FOO\n",
        b"\n",
        b"z\0",
        b"n\n",
        b"zEND\0",
        b"zSCAN\0",
        b"GET / HTTP/1.1\r\n\r\n",
        b"INSTREAM\n",
        b"IDSESSION\n",
        b"zFILDES\0\0",
        b"zINSTREAM\0\0\0\0\0",
        b"nINSTREAM\n\0\0\0\0",
        b"zINSTREAM\0\x7f\xff\xff\xffxx",
        b"zIDSESSION\0zPING\0zEND\0",
        b"zIDSESSION\0nPING\nzPING\0zEND\0",
        b"zIDSESSION\0zVERSION\0zEND\0",
        b"zIDSESSION\0zFOO\0zPING\0",
        b"zIDSESSION\0zCONTSCAN /\0zPING\0",
        b"zIDSESSION\0zRELOAD\0zPING\0",
        b"zIDSESSION\0zIDSESSION\0",
        b"zIDSESSION\0zPING\0zINSTREAM\0\x7f\xff\xff\xffxx",
        // These are waited for in vain.
        b"",
        b"zPIN",
        b"zIDSESSION\0zPING\0",
        b"zINSTREAM\0\0\0\0\x09half",
    ]
    .map(<[u8]>::to_vec)
    .into();
    for command in ["SCAN", "CONTSCAN", "MULTISCAN", "ALLMATCHSCAN"] {
        for name in ["/bad", "/good", "/empty", "/none", "/clean", "/clean/", "/clean/one"] {
            said.push(z(&path(command, name)));
        }
        said.push(z(&path(command, "/deep")));
        said.push([b"n", &path(command, "/bad")[..], b"\n"].concat());
    }
    said.push([&path("SCAN", "/bad")[..], b"\n"].concat());
    said.push([&path("ALLMATCHSCAN", "/bad")[..], b"\n"].concat());
    for content in [INFECTED, b"harmless"] {
        said.push(in_stream(content));
        said.push(in_stream(content).into_iter().skip(1).collect());
    }
    said.push([b"zIDSESSION\0", &in_stream(INFECTED)[..], &z(b"PING"), b"zEND\0"].concat());
    let told = |at: &Path| {
        let at = at.to_owned();
        let one = move |said: Vec<u8>| {
            let at = at.clone();
            std::thread::spawn(move || comparable(&ask(&at, &said)))
        };
        let all: Vec<_> = said.iter().cloned().map(one).collect();
        all.into_iter().map(|one| one.join().unwrap()).collect::<Vec<_>>()
    };
    let (theirs, ours) = (told(&real.socket()), told(&socket(&service)));
    for ((said, theirs), ours) in said.iter().zip(&theirs).zip(&ours) {
        // Asked many things at once, clamd tells now and then twice that a path is not there.
        let is_told_twice = ours.contains("File path check failure") && *theirs == ours.repeat(2);
        let theirs = if is_told_twice { ours } else { theirs };
        assert_eq!(ours, theirs, "to {}", said.escape_ascii());
    }

    // Descriptors.
    let open = |name: &str| std::fs::File::open(samples_at.join(name)).unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    let (bad, good, empty, folder) = (open("bad"), open("good"), open("empty"), open("."));
    let memory = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::empty()).unwrap();
    rustix::io::write(&memory, INFECTED).unwrap();
    let (one_end, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    use std::os::fd::AsFd;
    for fd in [bad.as_fd(), good.as_fd(), empty.as_fd(), folder.as_fd(), null.as_fd()]
        .into_iter()
        .chain([memory.as_fd(), one_end.as_fd()])
    {
        let told = |at: &Path| {
            let plain = Client::connect(at).fildes(fd).hear();
            let with = Client::connect(at).pass(b"nFILDES\n\0", &[fd]).hear();
            let two = Client::connect(at).say(b"zFILDES\0").pass(b"\0", &[fd, fd]).hear();
            let session = Client::connect(at).say(b"zIDSESSION\0").fildes(fd).say(b"zEND\0").hear();
            let early = Client::connect(at).pass(b"z", &[fd]).hear();
            [plain, with, two, session, early].map(|told| comparable(&told))
        };
        assert_eq!(told(&socket(&service)), told(&real.socket()));
    }
    drop(null);
}

/// Where ours does not say what clamd says, and why.
#[test]
fn what_is_not_scanned_is_never_ok_although_clamd_says_so() {
    let real = RealClamd::start();
    let service = service("scan_paths = [\"{dir}/samples\"]");
    let samples_at = service.path("samples");
    samples(&samples_at);
    let dir = samples_at.to_str().unwrap();
    let both = |said: &str| {
        [real.socket(), socket(&service)].map(|at| comparable(&ask(&at, said.as_bytes())))
    };
    // A FIFO is not supported, and yet OK to clamd.
    let [theirs, ours] = both(&format!("zSCAN {dir}/fifo\0"));
    assert_eq!(ours, format!("{dir}/fifo: Not supported file type ERROR\0"));
    assert_eq!(theirs, format!("{ours}{dir}/fifo: OK\0"));
    // clamd does not look behind a link, which is OK to it. Ours follows one that stays where clients may look.
    let [theirs, ours] = both(&format!("zSCAN {dir}/link\0"));
    assert_eq!(theirs, format!("{dir}/link: OK\0"));
    assert_eq!(ours, format!("{dir}/link: Found FOUND\0"));
    // Ours takes no way back, and nothing outside of what it may; whether it is there or not.
    for path in
        [format!("{dir}/../samples/bad"), "/etc/passwd".into(), "/none".into(), "bad".into()]
    {
        let [theirs, ours] = both(&format!("zSCAN {path}\0"));
        assert_eq!(ours, format!("{path}: Access denied. ERROR\0"));
        assert_ne!(theirs, ours);
    }
    // What cannot be read is OK to clamd.
    use rustix::fs::{Mode, OFlags, open};
    for flags in [OFlags::WRONLY, OFlags::PATH] {
        let bad = open(samples_at.join("bad"), flags, Mode::empty()).unwrap();
        let [theirs, ours] = [real.socket(), socket(&service)]
            .map(|at| comparable(&Client::connect(&at).fildes(&bad).hear()));
        assert_eq!(
            (theirs.as_str(), ours.as_str()),
            ("fd[N]: OK\0", "fd[N]: Can't read file ERROR\0")
        );
    }
    // More descriptors than one: clamd closes the connection on three.
    let bad = std::fs::File::open(samples_at.join("bad")).unwrap();
    use std::os::fd::AsFd;
    let three = [bad.as_fd(); 3];
    let told = Client::connect(&socket(&service)).say(b"zFILDES\0").pass(b"\0", &three).hear();
    assert_eq!(told, "No file descriptor received. ERROR\0");
    // A clamd that may be shut down by anybody is none of ours.
    for command in ["zSHUTDOWN\0", "SHUTDOWN\n", "zQUIT\0"] {
        let told = ask(&socket(&service), command.as_bytes());
        assert_eq!(told.trim_end_matches(['\0', '\n']), "COMMAND UNAVAILABLE");
    }
    assert_eq!(ask(&socket(&service), b"zPING\0"), "PONG\0");
}

#[test]
fn folders_are_walked_as_clamd_does() {
    let service = service("scan_paths = [\"{dir}/samples\"]");
    samples(&service.path("samples"));
    let dir = service.path("samples").display().to_string();
    let ask = |command: &str| {
        let told = ask(&socket(&service), format!("z{command} {dir}\0").as_bytes());
        let mut lines: Vec<_> = told.split_terminator('\0').map(str::to_owned).collect();
        lines.sort();
        lines
    };
    let [one, two] = ["bad", "deep/deeper/bad"].map(|name| format!("{dir}/{name}: Found FOUND"));
    for command in ["CONTSCAN", "MULTISCAN"] {
        assert_eq!(ask(command), [one.clone(), two.clone()], "{command}");
    }
    for command in ["SCAN", "ALLMATCHSCAN"] {
        let first = ask(command);
        assert!(first == [one.clone()] || first == [two.clone()], "{command}: {first:?}");
    }
    // One file that cannot be judged is told, and the folder is not OK.
    std::fs::write(service.path("samples/clean/three"), "SEAWALL-FAULT error").unwrap();
    let told = clamd::ask(&socket(&service), format!("zCONTSCAN {dir}/clean\0").as_bytes());
    assert!(
        told.starts_with(&format!("{dir}/clean/three: engine first,"))
            && told.ends_with(" ERROR\0"),
        "{told}"
    );
    assert_eq!(told.matches('\0').count(), 1, "{told}");
}

#[test]
fn nothing_is_read_by_path_unless_the_configuration_says_so() {
    let service = service("");
    samples(&service.path("samples"));
    let dir = service.path("samples").display().to_string();
    for command in ["SCAN", "CONTSCAN", "MULTISCAN", "ALLMATCHSCAN"] {
        for name in ["", "/bad", "/fifo", "/none"] {
            let told = ask(&socket(&service), format!("z{command} {dir}{name}\0").as_bytes());
            assert_eq!(told, format!("{dir}{name}: Access denied. ERROR\0"));
        }
    }
}

#[test]
fn verdicts_are_shared_and_a_failure_is_never_ok() {
    let service = service("");
    let at = socket(&service);
    assert_eq!(ask(&at, &in_stream(INFECTED)), "stream: Found FOUND\0");
    assert!(service.scan("x", INFECTED).cached, "one cache for all");
    assert_eq!(service.status().counters.scans, 1);
    let told = ask(&at, &in_stream(b"SEAWALL-FAULT error"));
    assert!(told.starts_with("stream: engine first,") && told.ends_with(" ERROR\0"), "{told}");
    let told = ask(&at, &in_stream(b"SEAWALL-FAULT hang"));
    assert!(told.starts_with("stream: engine first,") && told.ends_with(" ERROR\0"), "{told}");
    let told = ask(&at, &in_stream(b"SEAWALL-FAULT found=a\x1b[2J\x07b\x01"));
    assert!(told.starts_with("stream: a"), "{told:?}");
    assert!(told.ends_with("\0") && !told[..told.len() - 1].contains(|c: char| c.is_control()));
    let told = ask(&at, &in_stream(b"all is well again"));
    assert_eq!(told, "stream: OK\0");
    service.wait_no_copies();
}

#[test]
fn every_match_is_told_to_who_asks_for_all() {
    let more = "\n[scan]\nearly_exit = false\n";
    let setup = Setup { engine: Engine::Three, more: more.into(), ..Setup::default() };
    let service = serve(setup, "scan_paths = [\"{dir}/x\"]");
    let file = service.path("x");
    std::fs::write(&file, "SEAWALL-FAULT one:found=One,three:found=Three").unwrap();
    let name = file.display();
    let one = ask(&socket(&service), format!("zSCAN {name}\0").as_bytes());
    assert_eq!(one, format!("{name}: One FOUND\0"));
    let all = ask(&socket(&service), format!("zALLMATCHSCAN {name}\0").as_bytes());
    assert_eq!(all, format!("{name}: One FOUND\0{name}: Three FOUND\0"));
}

#[test]
fn a_version_is_one_that_clients_take_apart_and_new_signatures_have_another() {
    let service = serve(Setup { engine: Engine::Yara, ..Setup::default() }, "");
    let version = || {
        let told = ask(&socket(&service), b"zVERSION\0");
        let parts: Vec<_> = told.trim_end_matches('\0').split('/').map(str::to_owned).collect();
        let [program, number, time] = &parts[..] else { panic!("{told}") };
        let name = program.strip_prefix("ClamAV ").unwrap();
        let is_version = |part: &str| !part.is_empty() && part.bytes().all(|c| c.is_ascii_digit());
        assert!(name.split('-').next().unwrap().split('.').all(is_version), "{name}");
        assert!(name.contains("-seawall-"), "{name}");
        // `Fri Nov 27 01:15:48 2026`, as asctime(3) has it.
        let [day, _, date, clock, year] = time.split_whitespace().collect::<Vec<_>>()[..] else {
            panic!("{time}")
        };
        assert!(time.len() == 24 && day.len() == 3 && clock.split(':').count() == 3, "{time}");
        assert!(date.parse::<u8>().is_ok() && year.parse::<u16>().is_ok(), "{time}");
        number.parse::<u32>().unwrap()
    };
    let before = version();
    assert!(before > 200_000_000);
    // The number is a second.
    std::thread::sleep(std::time::Duration::from_millis(1100));
    assert_eq!(version(), before);
    std::fs::write(service.path("rules/more.yar"), "rule More { condition: filesize == 1 }")
        .unwrap();
    block_on(service.client().reload()).unwrap();
    assert!(version() > before);
    let told = ask(&socket(&service), b"zVERSIONCOMMANDS\0");
    let (_, commands) = told.trim_end_matches('\0').split_once("| COMMANDS: ").unwrap();
    assert!(commands.split(' ').any(|command| command == "INSTREAM"), "{commands}");
    let told = ask(&socket(&service), b"zSTATS\0");
    assert!(told.starts_with("POOLS: 1\n\nSTATE: VALID PRIMARY\nTHREADS: live 0 "), "{told}");
    assert!(told.ends_with("\nEND\0"), "{told}");
}

#[test]
fn a_reload_is_that_of_the_command_line_and_none_for_the_network() {
    let port = free_port();
    let service = service(&format!("tcp_listen = \"127.0.0.1:{port}\""));
    let network = |said: &[u8]| {
        use std::io::{Read, Write};
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.write_all(said).unwrap();
        let mut told = String::new();
        stream.read_to_string(&mut told).unwrap();
        told
    };
    assert_eq!(network(b"zRELOAD\0"), "COMMAND UNAVAILABLE\0");
    assert_eq!(network(b"zSHUTDOWN\0"), "COMMAND UNAVAILABLE\0");
    assert_eq!(network(&in_stream(INFECTED)), "stream: Found FOUND\0");
    assert_eq!(network(b"zFILDES\0\0"), "No file descriptor received. ERROR\0");
    assert!(!service.log().contains("the configuration was read again"));
    for _ in 0..50 {
        assert_eq!(ask(&socket(&service), b"zRELOAD\0"), "RELOADING\0");
    }
    service.wait_log("the configuration was read again");
    assert!(service.log().matches("asked for a reload").count() <= 2, "many are one");
}

#[test]
fn its_socket_is_for_whom_the_configuration_says_and_goes_with_the_service() {
    let mut service = service("socket_mode = \"0620\"\nsocket_group = \"mail\"");
    let found = std::fs::metadata(socket(&service)).unwrap();
    let groups = std::fs::read_to_string("/etc/group").unwrap();
    let mail = groups.lines().find(|line| line.starts_with("mail:")).unwrap();
    assert_eq!(found.gid().to_string(), mail.split(':').nth(2).unwrap());
    assert_eq!(found.permissions().mode() & 0o777, 0o620);
    // What it says of clients is fixed at its start, and that is told.
    service.setup.more = "[clamd]\nsocket = \"{dir}/clamd.sock\"\nmax_sessions = 5\n".into();
    service.configure();
    let reload = block_on(service.client().reload()).unwrap();
    assert_eq!(reload.restart_needed, ["[clamd]"]);
    // What a killed one left is replaced.
    service.restart("KILL");
    assert_eq!(ask(&socket(&service), b"PING"), "PONG\n");
    service.signal("TERM");
    service.wait_end();
    assert!(!socket(&service).exists());
    // What is another program's is not.
    let other = UnixListener::bind(socket(&service)).unwrap();
    let config = service.path("seawalld.toml");
    let start = || {
        let mut seawalld = Command::new(env!("CARGO_BIN_EXE_seawalld"));
        let output = seawalld.arg("--config").arg(&config).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let told = start();
    assert!(told.contains("another program serves"), "{told}");
    drop(other);
    std::fs::remove_file(socket(&service)).unwrap();
    std::fs::write(socket(&service), "a file").unwrap();
    let told = start();
    assert!(told.contains("is there and no socket"), "{told}");
    assert_eq!(std::fs::read(socket(&service)).unwrap(), b"a file");
}

fn clamdscan(
    config: &str,
    folder: &Path,
    arguments: &[&str],
    target: &Path,
) -> (Option<i32>, String) {
    let path = folder.join("client.conf");
    std::fs::write(&path, config).unwrap();
    let output = Command::new("/usr/bin/clamdscan")
        .arg(format!("--config-file={}", path.display()))
        .args(arguments)
        .arg(target)
        .output()
        .expect("clamdscan is installed: cargo xtask setup");
    let Output { status, stdout, stderr } = output;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (status.code(), text(stdout) + &text(stderr))
}

#[test]
fn debians_clamdscan_works_unchanged() {
    let port = free_port();
    let service =
        service(&format!("scan_paths = [\"{{dir}}/samples\"]\ntcp_listen = \"127.0.0.1:{port}\""));
    let samples_at = service.path("samples");
    samples(&samples_at);
    std::fs::remove_file(samples_at.join("fifo")).unwrap();
    // Longer than what a connection takes at once.
    std::fs::write(samples_at.join("clean/long"), vec![b'x'; 3 << 20]).unwrap();
    let dir = samples_at.display();
    let local = format!("LocalSocket {}\n", socket(&service).display());
    let network = format!("TCPSocket {port}\nTCPAddr 127.0.0.1\n");
    let run = |config: &str, arguments: &[&str], name: &str| {
        clamdscan(config, service.folder.path(), arguments, &samples_at.join(name))
    };
    let modes: [(&str, &[&str]); 8] = [
        (&local, &[]),
        (&local, &["--multiscan"]),
        (&local, &["--allmatch"]),
        (&local, &["--fdpass"]),
        (&local, &["--fdpass", "--multiscan"]),
        (&local, &["--stream"]),
        (&local, &["--stream", "--multiscan"]),
        (&network, &["--stream"]),
    ];
    for (config, arguments) in modes {
        let (code, told) = run(config, arguments, "bad");
        assert_eq!(code, Some(1), "{arguments:?}: {told}");
        assert!(told.contains(&format!("{dir}/bad: Found FOUND")), "{arguments:?}: {told}");
        let (code, told) = run(config, arguments, "clean");
        assert_eq!(code, Some(0), "{arguments:?}: {told}");
        assert!(told.contains("Infected files: 0"), "{arguments:?}: {told}");
        let (code, told) = run(config, arguments, "");
        assert_eq!(code, Some(1), "{arguments:?}: {told}");
        assert_eq!(told.matches("Found FOUND").count(), 2, "{arguments:?}: {told}");
    }
    std::fs::write(samples_at.join("clean/zero"), "SEAWALL-FAULT error").unwrap();
    for (config, arguments) in modes {
        let (code, told) = run(config, arguments, "clean");
        assert_eq!(code, Some(2), "{arguments:?}: {told}");
        assert!(told.contains("ERROR") && !told.contains("clean: OK"), "{arguments:?}: {told}");
    }
    let (code, told) = run(&local, &["--ping", "1"], "");
    assert!(code == Some(0) && told.contains("PONG"), "{told}");
    let (code, told) = run(&local, &["--version"], "");
    assert!(code == Some(0) && told.starts_with("ClamAV 1.4.0-seawall-"), "{told}");
    let (code, told) = run(&local, &["--reload"], "");
    assert_eq!(code, Some(0), "{told}");
    service.wait_log("the configuration was read again");
    service.wait_no_copies();
}

#[test]
fn clamonacc_denies_what_is_infected() {
    let service = service("");
    let watched = service.path("watched");
    std::fs::create_dir(&watched).unwrap();
    let config = format!(
        "LocalSocket {}\nOnAccessIncludePath {}\nOnAccessPrevention yes\n\
         OnAccessExcludeUname clamav\nOnAccessDenyOnError yes\n",
        socket(&service).display(),
        watched.display()
    );
    std::fs::write(service.path("onacc.conf"), config).unwrap();
    for mode in ["--fdpass", "--stream"] {
        // The file system is mounted for this alone, in a mount namespace that ends with it.
        let script = r#"
            mount -t tmpfs none "$1" || exit 9
            printf '%s' "$3" > "$1/bad"; echo harmless > "$1/good"
            clamonacc --foreground "$4" --config-file="$2" > "$5" 2>&1 &
            onacc=$!
            for n in $(seq 100); do grep -q "watching '$1'" "$5" && break; sleep 0.1; done
            cat "$1/good"
            # The watch is there a moment after it is told.
            for n in $(seq 100); do cat "$1/bad" > /dev/null 2>&1 || { echo denied; break; }; sleep 0.1; done
            cat "$1/good"
            kill $onacc; wait $onacc; cat "$5"
        "#;
        let output = Command::new("timeout")
            .args(["--kill-after=5", "60", "unshare", "--mount", "sh", "-c", script, "sh"])
            .arg(&watched)
            .arg(service.path("onacc.conf"))
            .arg(String::from_utf8_lossy(INFECTED).as_ref())
            .arg(mode)
            .arg(service.path("onacc.log"))
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(told.starts_with("harmless\ndenied\nharmless\n"), "{mode}: {output:?}");
        assert!(told.contains("bad: Found FOUND"), "{mode}: {told}");
        std::fs::remove_file(service.path("onacc.log")).unwrap();
    }
    assert_eq!(service.scan("x", INFECTED).verdict, Verdict::Infected);
}
