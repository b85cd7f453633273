//! Signature sets: checked, taken, refused, rolled back, watched.

#![allow(clippy::unwrap_used)] // A test says what it expects by unwrapping it.

mod common;

use common::{Engine, Service, Setup, block_on, eicar, seawall, wait_for};
use seawall_client::{
    ApplyRequest, ChangeKind, EventKind, RollbackRequest, SignatureChange, SignatureSet, Verdict,
};
use std::collections::HashSet;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

const WATCH: &str = "[signatures]\nwatch = [\"{dir}/rules\"]\n";

fn setup(more: &str) -> Setup {
    Setup {
        guests: vec!["g1"],
        engine: Engine::Sets,
        more: WATCH.to_owned() + more,
        ..Setup::default()
    }
}

fn start() -> Service {
    Service::start(setup(""))
}

fn eicar_rule() -> String {
    let text = String::from_utf8(eicar()).unwrap().replace('\\', "\\\\");
    format!("rule Eicar {{ strings: $a = \"{text}\" condition: $a }}\n")
}

fn rule(name: &str, text: &str) -> String {
    format!("rule {name} {{ strings: $a = \"zq-{text}\" condition: $a }}\n")
}

/// A folder with these files.
fn folder(service: &Service, name: &str, files: &[(&str, &str)]) -> PathBuf {
    let folder = service.path(name);
    for (name, text) in files {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    folder
}

fn order(service: &Service, folder: &Path, check: bool) -> SignatureChange {
    let wanted = ApplyRequest { folder: folder.display().to_string(), check };
    block_on(service.client().apply_signatures(&wanted)).unwrap()
}

fn apply(service: &Service, folder: &Path) -> SignatureChange {
    order(service, folder, false)
}

fn applied(service: &Service, folder: &Path) -> SignatureChange {
    let change = apply(service, folder);
    assert!(change.taken, "{change:?}");
    change
}

fn roll_back(service: &Service, set: Option<&str>) -> SignatureChange {
    let wanted = RollbackRequest { set: set.map(str::to_owned) };
    block_on(service.client().roll_back_signatures(&wanted)).unwrap()
}

fn sets(service: &Service) -> Vec<SignatureSet> {
    block_on(service.client().signatures()).unwrap()
}

fn history(service: &Service) -> Vec<SignatureChange> {
    block_on(service.client().signature_history()).unwrap()
}

fn in_use(service: &Service) -> String {
    service.status().signatures.set.unwrap()
}

fn verdict(service: &Service, content: &[u8]) -> Verdict {
    service.scan("x", content).verdict
}

fn pid(service: &Service, engine: &str) -> u32 {
    let status = service.status();
    status.engines.iter().find(|one| one.name == engine).unwrap().pid.unwrap()
}

fn why(change: &SignatureChange) -> &str {
    assert!(!change.taken, "{change:?}");
    change.reason.as_deref().unwrap()
}

/// The names of what is kept of sets on the disk.
fn on_disk(service: &Service) -> HashSet<String> {
    let entries = fs::read_dir(service.path("state/signatures/sets")).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// What is not needed goes as soon as its engines have ended.
fn wait_on_disk(service: &Service, sets: &[&str]) {
    let wanted = sets.iter().map(|set| (*set).to_owned()).collect::<HashSet<_>>();
    wait_for("the disk to hold these sets alone", || (on_disk(service) == wanted).then_some(()));
}

#[test]
fn a_set_is_checked_taken_and_rolled_back() {
    let service = start();
    let first = in_use(&service);
    assert_eq!(verdict(&service, &eicar()), Verdict::Infected);
    assert_eq!(verdict(&service, b"a zq-fresh one"), Verdict::Clean);
    let new = folder(
        &service,
        "new",
        &[("eicar.yar", &eicar_rule()), ("sub/fresh.yar", &rule("Fresh", "fresh"))],
    );
    let (yara, hash) = (pid(&service, "yara"), pid(&service, "hash"));

    let checked = order(&service, &new, true);
    assert!(checked.taken && checked.kind == ChangeKind::Check, "{checked:?}");
    assert!(checked.known_bad >= 1 && checked.known_good >= 2, "{checked:?}");
    assert_eq!((in_use(&service), pid(&service, "yara")), (first.clone(), yara));
    assert_eq!(verdict(&service, b"a zq-fresh one"), Verdict::Clean);
    wait_on_disk(&service, &[&first]);

    let change = applied(&service, &new);
    let second = change.set.clone().unwrap();
    assert_eq!((in_use(&service), change.set.clone()), (second.clone(), checked.set));
    assert_eq!(verdict(&service, b"a zq-fresh one"), Verdict::Infected);
    let part = |name: &str| change.engines.iter().find(|part| part.engine == name).unwrap();
    assert_eq!((part("yara").changed, part("yara").rules, part("yara").files), (true, Some(2), 2));
    assert!(!part("hash").changed && part("yara").resident_bytes.is_some(), "{change:?}");
    assert_eq!(pid(&service, "hash"), hash, "whose files are the same goes on");
    assert_ne!(pid(&service, "yara"), yara);
    let event = wait_for("the event", || {
        service.events().into_iter().find(|event| event.kind == EventKind::SignaturesTaken)
    });
    assert!(event.reason.unwrap().contains(&second));
    let kept = sets(&service);
    assert_eq!(
        kept.iter().map(|set| (set.in_use, set.standby)).collect::<Vec<_>>(),
        [(false, true), (true, false)]
    );

    let back = roll_back(&service, None);
    assert!(back.taken && back.set.as_ref() == Some(&first), "{back:?}");
    assert_eq!(pid(&service, "yara"), yara, "its engine was still there");
    assert_eq!(verdict(&service, b"a zq-fresh one"), Verdict::Clean);
    assert!(why(&roll_back(&service, None)).contains("no earlier set"));
    assert!(why(&roll_back(&service, Some("zz"))).contains("no set `zz`"));
    let forth = roll_back(&service, Some(&second[..6]));
    assert!(forth.taken && verdict(&service, b"a zq-fresh one") == Verdict::Infected, "{forth:?}");
    let kinds: Vec<_> =
        history(&service).iter().map(|change| (change.kind, change.taken)).collect();
    assert_eq!(
        kinds,
        [
            (ChangeKind::First, true),
            (ChangeKind::Apply, true),
            (ChangeKind::Rollback, true),
            (ChangeKind::Rollback, false),
            (ChangeKind::Rollback, false),
            (ChangeKind::Rollback, true),
        ]
    );
    assert_eq!(applied(&service, &new).reason.as_deref(), Some("this set is in use already"));
}

#[test]
fn what_was_in_use_is_in_use_after_a_restart_whatever_the_folders_hold_by_then() {
    let mut service = start();
    let new = folder(
        &service,
        "new",
        &[("eicar.yar", &eicar_rule()), ("fresh.yar", &rule("Fresh", "fresh"))],
    );
    applied(&service, &new);
    fs::remove_dir_all(&new).unwrap();
    let set = in_use(&service);
    for signal in ["KILL", "TERM"] {
        service.restart(signal);
        assert_eq!(in_use(&service), set);
        assert_eq!(verdict(&service, b"a zq-fresh one"), Verdict::Infected);
        assert_eq!(sets(&service).len(), 2);
    }
    // An engine that dies comes back with it, too.
    let before = pid(&service, "yara");
    common::kill(before);
    wait_for("the next process", || {
        let status = service.status();
        let engine = status.engines.iter().find(|one| one.name == "yara")?;
        (engine.state == seawall_client::EngineState::Ready && engine.pid? != before).then_some(())
    });
    assert_eq!(verdict(&service, b"another zq-fresh one"), Verdict::Infected);
    assert!(roll_back(&service, None).taken);
    assert_eq!(verdict(&service, b"a zq-fresh one"), Verdict::Clean);
}

#[test]
fn a_set_that_fails_is_refused_with_the_reason() {
    let service = Service::start(setup(
        "known_bad = [\"{dir}/known/bad\"]\nknown_good = [\"{dir}/known/good\"]\n",
    ));
    folder(&service, "known/bad", &[("one", "zq-a bad one")]);
    folder(&service, "known/good", &[("one", "a zq-good one")]);
    let first = in_use(&service);
    let eicar_rule = eicar_rule();
    let bad = rule("Bad", "a bad one");
    let good = [("eicar.yar", eicar_rule.as_str()), ("bad.yar", &bad)];
    let with =
        |name: &str, more: &[(&str, &str)]| folder(&service, name, &[&good[..], more].concat());
    let refused = |at: &Path, words: &[&str]| {
        let change = apply(&service, at);
        for word in words {
            assert!(why(&change).contains(word), "no `{word}`: {change:?}");
        }
        assert_eq!(in_use(&service), first);
        let status = service.status();
        assert!(
            !status.healthy && status.problems.iter().any(|one| one.contains(words[0])),
            "{status:?}"
        );
    };
    let broken =
        with("broken", &[("x/broken.yar", "rule Broken {\n  condition:\n    nothing\n}\n")]);
    let at = format!("{}:3:5", broken.join("x/broken.yar").display());
    refused(&broken, &[&at, "E009"]);
    let output = seawall(&service, &["signatures", "apply", broken.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(4));
    assert!(String::from_utf8_lossy(&output.stdout).contains(&at), "{output:?}");
    refused(&with("list", &[("list.md5", "nonsense\n")]), &["list.md5:1:1"]);
    refused(
        &folder(&service, "blind", &[("bad.yar", &bad)]),
        &["does not find the EICAR test file"],
    );
    refused(
        &folder(&service, "half", &[("eicar.yar", &eicar_rule)]),
        &["does not find", "known/bad/one"],
    );
    let greedy = with("greedy", &[("greedy.yar", &rule("Greedy", "good one"))]);
    refused(&greedy, &["finds Greedy in", "known/good/one", "which is good"]);
    let everything = with("everything", &[("all.yar", "rule All { condition: true }")]);
    refused(&everything, &["finds All in", "/bin/sh"]);
    refused(&folder(&service, "nothing", &[("README.md", "x")]), &["no file that an engine takes"]);
    refused(&service.path("nowhere"), &["there is no such folder"]);
    let crash = with("crash", &[("set.fault", "crash\nload-crash\n")]);
    refused(&crash, &["engine fault", "signal 6"]);
    let memory = with("memory", &[("set.fault", "memory\nload-memory\n")]);
    refused(&memory, &["engine fault", "before it was ready"]);
    wait_on_disk(&service, &[&first]);
    assert_eq!(verdict(&service, &eicar()), Verdict::Infected);
    let change = applied(&service, &with("right", &[]));
    assert_eq!((change.known_bad, change.left_out_count), (2, 0));
    assert!(service.status().healthy, "{:?}", service.status().problems);
    let refusals = history(&service).iter().filter(|change| !change.taken).count();
    assert_eq!(refusals, 11);
}

#[test]
fn an_engine_for_which_there_is_nothing_keeps_what_it_has() {
    let service = start();
    let digest = "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae";
    let list =
        folder(&service, "list", &[("one.sha256", &format!("{digest}  Foo\n")), ("notes.md", "x")]);
    let change = applied(&service, &list);
    assert_eq!((change.left_out.len(), change.left_out_count), (1, 1));
    assert_eq!(verdict(&service, b"foo"), Verdict::Infected);
    assert_eq!(verdict(&service, &eicar()), Verdict::Infected, "by the rules of before");
    // A folder of good content keeps its meaning, and the engine may say so.
    let allow = folder(&service, "allow", &[("good.sha256", &format!("{digest}\n"))]);
    applied(&service, &allow);
    let report = service.scan("x", b"foo");
    assert_eq!(report.verdict, Verdict::Clean);
    assert!(report.engines.len() == 1 && report.engines[0].allowed.is_some(), "{report:?}");
}

/// Ends the threads that look at it.
struct EndOnDrop(Arc<AtomicBool>);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Scans without an end, from the first to the last moment of a change.
#[test]
fn no_scan_is_lost_while_sets_come_and_go() {
    let service = Arc::new(start());
    let (ended, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    // Also when an assertion fails: the threads hold the service.
    let ending = EndOnDrop(Arc::clone(&ended));
    let threads: Vec<_> = (0..3)
        .map(|thread| {
            let (service, ended, count) =
                (Arc::clone(&service), Arc::clone(&ended), Arc::clone(&count));
            std::thread::spawn(move || {
                let mut n = 0_u64;
                while !ended.load(Relaxed) {
                    n += 1;
                    assert_eq!(
                        verdict(&service, format!("{thread} {n}").as_bytes()),
                        Verdict::Clean
                    );
                    let bad = [eicar(), format!("{thread} {n}").into_bytes()].concat();
                    assert_eq!(verdict(&service, &bad), Verdict::Infected);
                    count.fetch_add(2, Relaxed);
                }
            })
        })
        .collect();
    let slow = format!("slow\nload-ms={}\n", 1500);
    let new = folder(&service, "new", &[("eicar.yar", &eicar_rule()), ("set.fault", &slow)]);
    let loading = {
        let service = Arc::clone(&service);
        std::thread::spawn(move || applied(&service, &new))
    };
    wait_for("the load", || service.status().signatures.loading);
    let before = count.load(Relaxed);
    assert_eq!(verdict(&service, b"in the midst of it"), Verdict::Clean);
    let loading = loading.join().unwrap();
    assert!(loading.took_ms >= 1500 && count.load(Relaxed) > before, "{loading:?}");
    for n in 0..4 {
        let rules = [("eicar.yar", eicar_rule()), ("n.yar", rule("N", &format!("number {n}")))];
        let rules: Vec<_> = rules.iter().map(|(name, text)| (*name, text.as_str())).collect();
        let new = folder(&service, &format!("set{n}"), &rules);
        applied(&service, &new);
        if n % 2 == 1 {
            assert!(roll_back(&service, None).taken);
        }
    }
    drop(ending);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let failures: u64 = service.status().engines.iter().map(|engine| engine.failures).sum();
    assert_eq!(failures, 0);
}

/// The engine of before has it in work when the set changes: the one after it is of the set of before, too.
#[test]
fn a_scan_is_judged_by_the_set_that_it_began_with() {
    let service = Arc::new(start());
    let old =
        folder(&service, "old", &[("eicar.yar", &eicar_rule()), ("old.yar", &rule("Old", "old"))]);
    let new = folder(&service, "new", &[("eicar.yar", &eicar_rule())]);
    applied(&service, &old);
    let content = b"SEAWALL-FAULT sleep=2500\nzq-old";
    let scan = {
        let service = Arc::clone(&service);
        std::thread::spawn(move || verdict(&service, content))
    };
    wait_for("the scan", || {
        let status = service.status();
        let fault = status.engines.iter().find(|one| one.name == "fault")?;
        (fault.in_flight > 0).then_some(())
    });
    applied(&service, &new);
    assert_eq!(scan.join().unwrap(), Verdict::Infected);
    assert_eq!(verdict(&service, content), Verdict::Clean, "of the new set nothing is remembered");
}

#[test]
fn two_sets_at_once_are_taken_one_after_the_other() {
    let service = Arc::new(start());
    let one = folder(&service, "one", &[("set.fault", "one\nload-ms=1000\n")]);
    let two = folder(&service, "two", &[("set.fault", "two\n")]);
    let first = {
        let service = Arc::clone(&service);
        std::thread::spawn(move || applied(&service, &one))
    };
    wait_for("the first to load", || service.status().signatures.loading);
    let second = applied(&service, &two);
    let first = first.join().unwrap();
    assert_eq!(in_use(&service), second.set.unwrap());
    let taken: Vec<_> = history(&service).into_iter().filter_map(|change| change.set).collect();
    assert_eq!(taken[1], first.set.unwrap());
}

#[test]
fn what_does_not_load_in_time_is_refused() {
    let service = start();
    let slow = folder(&service, "slow", &[("set.fault", "slow\nload-ms=60000\n")]);
    let change = apply(&service, &slow);
    assert!(why(&change).contains("not ready within 20s"), "{change:?}");
    assert_eq!(verdict(&service, b"harmless"), Verdict::Clean);
}

#[test]
fn a_watched_folder_that_changes_becomes_a_set_once() {
    let mut service = start();
    let first = in_use(&service);
    let taken = |service: &Service| {
        let changes = history(service);
        changes.iter().map(|change| (change.kind, change.taken)).collect::<Vec<_>>()
    };
    fs::write(service.path("rules/fresh.yar"), rule("Fresh", "fresh")).unwrap();
    wait_for("the new set", || (in_use(&service) != first).then_some(()));
    assert_eq!(verdict(&service, b"a zq-fresh one"), Verdict::Infected);
    fs::write(service.path("rules/broken.yar"), "rule Broken {").unwrap();
    wait_for("the refusal", || service.status().signatures.refused);
    std::thread::sleep(Duration::from_secs(8));
    let expected =
        [(ChangeKind::First, true), (ChangeKind::Watch, true), (ChangeKind::Watch, false)];
    assert_eq!(taken(&service), expected, "a refused one is not tried again as it is");
    // Whoever goes back does not want it again at once, nor after a restart.
    fs::remove_file(service.path("rules/broken.yar")).unwrap();
    assert!(roll_back(&service, None).taken);
    service.restart("TERM");
    std::thread::sleep(Duration::from_secs(8));
    assert_eq!(in_use(&service), first);
    // A reload looks at once, and at what is new alone.
    assert!(seawall(&service, &["reload"]).status.success());
    assert_eq!(in_use(&service), first);
    fs::write(service.path("rules/other.yar"), rule("Other", "other")).unwrap();
    assert!(seawall(&service, &["reload"]).status.success());
    assert_eq!(verdict(&service, b"the zq-other one"), Verdict::Infected);
    // What changed while no service ran is taken at its start.
    service.restart_after("KILL", |service| {
        fs::write(service.path("rules/late.yar"), rule("Late", "late")).unwrap();
    });
    wait_for("the late one", || {
        (verdict(&service, b"the zq-late one") == Verdict::Infected).then_some(())
    });
}

#[test]
fn the_first_set_is_used_with_what_loads_of_it() {
    let mut setup = setup("");
    setup.more = "[signatures]\nwatch = [\"{dir}/rules\", \"{dir}/nowhere\"]\n".into();
    let mut service = Service::start(setup);
    service.restart_after("TERM", |service| {
        fs::remove_dir_all(service.path("state/signatures")).unwrap();
        fs::write(service.path("rules/broken.yar"), "rule Broken {").unwrap();
    });
    let status = service.status();
    let yara = status.engines.iter().find(|engine| engine.name == "yara").unwrap();
    assert!(
        yara.diagnostics
            .iter()
            .any(|one| one.file == service.path("rules/broken.yar").display().to_string()),
        "{yara:?}"
    );
    assert_eq!(verdict(&service, &eicar()), Verdict::Infected);
}

#[test]
fn a_service_killed_in_mid_change_goes_on_with_the_set_before() {
    let mut service = start();
    let first = in_use(&service);
    let slow = folder(&service, "slow", &[("set.fault", "slow\nload-ms=5000\n")]);
    let path = slow.display().to_string();
    let socket = service.path("api.sock");
    let asking = std::thread::spawn(move || {
        let client = seawall_client::Client::new(socket);
        block_on(client.apply_signatures(&ApplyRequest { folder: path, check: false })).is_err()
    });
    wait_for("the load", || service.status().signatures.loading);
    assert_eq!(on_disk(&service).len(), 2);
    service.restart("KILL");
    assert!(asking.join().unwrap(), "nobody was told that it was taken");
    assert_eq!(in_use(&service), first);
    assert_eq!(on_disk(&service), HashSet::from([first]));
    assert_eq!(verdict(&service, &eicar()), Verdict::Infected);
}

#[test]
fn a_full_disk_refuses_a_set_and_leaves_the_one_in_use() {
    let service = Service::start(Setup { state_mib: Some(24), ..setup("") });
    let first = in_use(&service);
    let big = folder(&service, "big", &[("eicar.yar", &eicar_rule())]);
    fs::write(big.join("big.sha256"), vec![b'#'; 40 << 20]).unwrap();
    let change = apply(&service, &big);
    assert!(why(&change).contains("the set cannot be kept"), "{change:?}");
    assert_eq!((in_use(&service), verdict(&service, &eicar())), (first, Verdict::Infected));
    fs::write(
        big.join("big.sha256"),
        "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae\n",
    )
    .unwrap();
    applied(&service, &big);
}

/// What lies in a folder must not make the service wait, follow circles or fill its disk.
#[test]
fn odd_files_make_a_set_or_a_reason_and_never_a_wait() {
    let service = start();
    let good = [("eicar.yar", eicar_rule())];
    let good: Vec<_> = good.iter().map(|(name, text)| (*name, text.as_str())).collect();
    let odd = |name: &str, make: &dyn Fn(&Path)| {
        let path = folder(&service, name, &good);
        make(&path);
        apply(&service, &path)
    };
    let fifo = odd("fifo", &|at| {
        nix::unistd::mkfifo(&at.join("x.yar"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    });
    assert!(why(&fifo).contains("not a regular file"), "{fifo:?}");
    let device = odd("device", &|at| symlink("/dev/zero", at.join("x.yar")).unwrap());
    assert!(why(&device).contains("not a regular file"), "{device:?}");
    let circle = odd("circle", &|at| symlink("..", at.join("again")).unwrap());
    assert!(why(&circle).contains("loop"), "{circle:?}");
    let gone = odd("gone", &|at| symlink("nowhere", at.join("x.yar")).unwrap());
    assert!(why(&gone).contains("No such file"), "{gone:?}");
    let twins = odd("twins", &|at| {
        let other = folder(&service, "other", &[("eicar.yar", "")]);
        symlink(other, at.join("sub")).unwrap();
    });
    assert!(twins.taken, "the same name in another folder is another file: {twins:?}");
    let hidden = odd("hidden", &|at| fs::write(at.join(".x.yar"), "rule Broken {").unwrap());
    assert!(hidden.taken, "{hidden:?}");
    let name = std::ffi::OsString::from_vec(b"\xff.yar".to_vec());
    let odd_name = odd("name", &|at| fs::write(at.join(&name), "").unwrap());
    assert!(why(&odd_name).contains("not UTF-8"), "{odd_name:?}");
    let big = odd("big", &|at| {
        fs::File::create(at.join("x.yar")).unwrap().set_len(100 << 20).unwrap();
    });
    assert!(why(&big).contains("x.yar"), "{big:?}");
    assert_eq!(verdict(&service, &eicar()), Verdict::Infected);
}

#[test]
fn the_oldest_sets_go_and_files_are_on_the_disk_once() {
    let service = Service::start(setup("keep = 2\nstandby_minutes = 0\n"));
    // The other engines came with it and have it still.
    let mut names = vec![in_use(&service)];
    for n in 0..3 {
        let rules = [("eicar.yar", eicar_rule()), ("n.yar", rule("N", &format!("number {n}")))];
        let rules: Vec<_> = rules.iter().map(|(name, text)| (*name, text.as_str())).collect();
        names.push(applied(&service, &folder(&service, &format!("set{n}"), &rules)).set.unwrap());
    }
    let gone = names.remove(1);
    wait_on_disk(&service, &[&names[0], &names[1], &names[2]]);
    assert!(!sets(&service).iter().any(|set| set.set == gone || set.set == names[0]));
    let file = |set: &str| {
        let path = service.path("state/signatures/sets").join(set).join("engines/yara/eicar.yar");
        std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap())
    };
    assert_eq!(file(&names[1]), file(&names[2]));
    assert!(sets(&service).iter().all(|set| !set.standby), "nothing stands by");
    let change = roll_back(&service, None);
    assert!(change.taken && change.engines.iter().any(|part| part.load_ms.is_some()), "{change:?}");
    let output = seawall(&service, &["signatures", "list"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("in use") && text.contains(&names[2]), "{text}");
    let output = seawall(&service, &["signatures", "history"]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("rollback"), "{output:?}");
}

/// An engine whose files are the same in all of them still runs with those of the first.
#[test]
fn an_engine_that_dies_long_after_its_set_is_gone_comes_back_with_its_files() {
    let service = Service::start(setup("keep = 1\nstandby_minutes = 0\n"));
    let first = in_use(&service);
    for n in 0..3 {
        let rules = [("eicar.yar", eicar_rule()), ("n.yar", rule("N", &format!("number {n}")))];
        let rules: Vec<_> = rules.iter().map(|(name, text)| (*name, text.as_str())).collect();
        applied(&service, &folder(&service, &format!("set{n}"), &rules));
    }
    assert!(on_disk(&service).contains(&first), "the engine of hash lists has it");
    let before = pid(&service, "hash");
    common::kill(before);
    wait_for("the next process", || {
        let status = service.status();
        let engine = status.engines.iter().find(|one| one.name == "hash")?;
        (engine.state == seawall_client::EngineState::Ready && engine.pid? != before).then_some(())
    });
    assert_eq!(verdict(&service, b"harmless"), Verdict::Clean);
}

#[test]
fn a_damaged_book_or_set_costs_no_signatures() {
    let mut service = start();
    let new = folder(
        &service,
        "new",
        &[("eicar.yar", &eicar_rule()), ("fresh.yar", &rule("Fresh", "fresh"))],
    );
    let set = applied(&service, &new).set.unwrap();
    fs::remove_dir_all(service.path("rules")).unwrap();
    fs::create_dir(service.path("rules")).unwrap();
    service.restart_after("TERM", |service| {
        fs::write(service.path("state/signatures/book.json"), "{ half").unwrap();
    });
    assert_eq!((in_use(&service), sets(&service).len()), (set.clone(), 2));
    assert_eq!(verdict(&service, b"a zq-fresh one"), Verdict::Infected);
    // The manifest of the set in use is gone: the one before is used.
    service.restart_after("TERM", |service| {
        fs::remove_file(service.path("state/signatures/sets").join(&set).join("set.json")).unwrap();
    });
    assert_ne!(in_use(&service), set);
    assert_eq!(verdict(&service, &eicar()), Verdict::Infected);
    // Applied anew it is whole again.
    assert_eq!(applied(&service, &new).set.as_ref(), Some(&set));
    assert_eq!(verdict(&service, b"a zq-fresh one"), Verdict::Infected);
    // So it is if a file is damaged while others are in use, two of them: after one its engines would stand by.
    for name in ["one", "two"] {
        let other = [("eicar.yar", eicar_rule()), ("other.yar", rule(name, name))];
        let other = other.each_ref().map(|(file, text)| (*file, text.as_str()));
        applied(&service, &folder(&service, name, &other));
    }
    let file = service.path("state/signatures/sets").join(&set).join("engines/yara/fresh.yar");
    fs::write(&file, "rule Fresh { condition: false }").unwrap();
    assert_eq!(applied(&service, &new).set.as_ref(), Some(&set));
    assert_eq!(verdict(&service, b"a zq-fresh one"), Verdict::Infected);
}

#[test]
fn an_engine_that_cannot_run_keeps_no_signatures_from_the_others() {
    let mut service = start();
    // It has files that it cannot load, from the first start on.
    let keep = |service: &Service| {
        fs::remove_dir_all(service.path("state/signatures")).unwrap();
        fs::write(service.path("rules/set.fault"), "x\nload-crash\n").unwrap();
    };
    service.setup.more = WATCH.to_owned();
    service.signal("TERM");
    service.wait_end();
    keep(&service);
    service.again_unready();
    wait_for("the failure", || {
        let status = service.try_status()?;
        let state =
            |name: &str| status.engines.iter().find(|one| one.name == name).map(|one| one.state);
        (state("fault")? == seawall_client::EngineState::Failed
            && state("yara")? == seawall_client::EngineState::Ready)
            .then_some(())
    });
    let new = folder(
        &service,
        "new",
        &[("eicar.yar", &eicar_rule()), ("fresh.yar", &rule("Fresh", "fresh"))],
    );
    applied(&service, &new);
    let report = service.scan("x", b"a zq-fresh one");
    assert_eq!(report.verdict, Verdict::Infected);
    // And gets well with files that it can load.
    applied(&service, &folder(&service, "well", &[("set.fault", "well\n")]));
    assert_eq!(verdict(&service, b"harmless"), Verdict::Clean);
}

#[test]
fn going_back_leaves_an_engine_what_it_has_where_the_set_has_nothing_for_it() {
    let mut service = start();
    service.signal("TERM");
    service.wait_end();
    fs::remove_dir_all(service.path("state/signatures")).unwrap();
    fs::remove_file(service.path("rules/bad.md5")).unwrap();
    service.again_unready();
    wait_for("the rules", || {
        let status = service.try_status()?;
        let yara = status.engines.iter().find(|one| one.name == "yara")?;
        (yara.state == seawall_client::EngineState::Ready).then_some(())
    });
    let digest = "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae";
    let list = [
        ("one.sha256", format!("{digest}  Foo\n")),
        ("fresh.yar", rule("Fresh", "fresh")),
        ("eicar.yar", eicar_rule()),
    ];
    let list: Vec<_> = list.iter().map(|(name, text)| (*name, text.as_str())).collect();
    applied(&service, &folder(&service, "both", &list));
    assert!(roll_back(&service, None).taken);
    for _ in 0..2 {
        assert_eq!(verdict(&service, b"foo"), Verdict::Infected, "the lists stay");
        assert_eq!(verdict(&service, b"a zq-fresh one"), Verdict::Clean, "the rule is gone");
        service.restart("KILL");
    }
    assert!(why(&roll_back(&service, None)).contains("no earlier set"), "it is there already");
}

#[test]
fn a_watched_folder_that_is_gone_makes_no_smaller_set() {
    let more = "[signatures]\nwatch = [\"{dir}/rules\", \"{dir}/more\"]\n";
    let service = Service::start(Setup { more: more.into(), ..setup("") });
    folder(&service, "more", &[("fresh.yar", &rule("Fresh", "fresh"))]);
    wait_for("both folders", || {
        (verdict(&service, b"a zq-fresh one") == Verdict::Infected).then_some(())
    });
    let set = in_use(&service);
    fs::rename(service.path("more"), service.path("elsewhere")).unwrap();
    let refused = wait_for("the refusal", || service.status().signatures.refused);
    assert!(refused.contains("more is not there"), "{refused}");
    assert_eq!(in_use(&service), set);
    assert_eq!(history(&service).iter().filter(|change| !change.taken).count(), 1);
}
