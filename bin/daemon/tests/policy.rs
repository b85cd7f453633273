//! Policies of groups of guests: who has which, what is refused, what is told.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Engine, Service, Setup, block_on, eicar, seawall};
use seawall_client::{ClientError, ExplainQuery, PolicyCheck};
use seawall_proto::remedy::Remediation;
use seawall_proto::{
    Decision, Exclusion, Facts, FailMode, Mode, Operation, Policy, Rules, Running, ToGuest,
    VerdictKind,
};
use std::fs;
use std::process::Command;

const UUID: &str = "1b4e28ba-2fa1-11d2-883f-0016d3cca427";

fn setup() -> Setup {
    Setup {
        guests: vec!["web", "db", "mail", "other"],
        of_guests: vec![
            ("db", "tags = [\"prod\", \"sql\"]"),
            ("mail", "uuid = \"1B4E28BA-2fa1-11d2-883f-0016d3cca427\""),
        ],
        more: "[policy]\nwhole_file_limit_mib = 100\n[policy.deadline]\nopen_ms = 4000\n".into(),
        ..Setup::default()
    }
}

/// Writes a file of groups.
fn write(service: &Service, name: &str, text: &str) {
    fs::create_dir_all(service.path("policy.d")).unwrap();
    fs::write(service.path("policy.d").join(name), text).unwrap();
}

fn reload(service: &Service) -> seawall_client::Reload {
    block_on(service.client().reload()).unwrap()
}

fn check(service: &Service) -> PolicyCheck {
    block_on(service.client().check_policy()).unwrap()
}

fn deadline(policy: &Policy) -> u32 {
    policy.open_deadline_ms
}

#[test]
fn a_guest_has_the_policy_of_the_first_group_that_names_it() {
    let mut service = Service::start(setup());
    let uuid = format!(
        "[[group]]\nname = \"mail\"\nuuids = [\"{UUID}\"]\n[group.policy.fail_mode]\nopen = \"closed\"\n"
    );
    write(
        &service,
        "20-late.toml",
        "[[group]]\nname = \"late\"\nguests = [\"web\", \"db\"]\npolicy.deadline.open_ms = 1000\n",
    );
    let early = "[[group]]\nname = \"sql\"\ntags = [\"sql\"]\npolicy.deadline.open_ms = 2000\n\
                 policy.exclude.paths = [\"/var/lib/sql/\"]\n";
    write(&service, "10-early.toml", &format!("{early}{uuid}"));
    write(&service, "30-not-read.conf", "this is not read");
    write(&service, ".hidden.toml", "neither is this");
    service.restart("TERM");
    let policy = |guest: &str| service.driver(guest).connection.policy;
    let (web, db, mail, other) = (policy("web"), policy("db"), policy("mail"), policy("other"));
    assert_eq!([&web, &db, &mail, &other].map(deadline), [1000, 2000, 4000, 4000]);
    assert_eq!(db.exclude.paths, [b"/var/lib/sql/".to_vec()]);
    assert!(web.exclude.paths.is_empty());
    let modes = [web, db, mail, other].map(|policy| {
        assert_eq!(policy.whole_file_limit, 100 << 20, "as the configuration has it for all");
        policy.fail_open
    });
    assert_eq!(modes, [FailMode::Open, FailMode::Open, FailMode::Closed, FailMode::Open]);
    let groups = ["web", "db", "mail", "other"].map(|guest| service.guest(guest).group);
    assert_eq!(
        groups.each_ref().map(|group| group.as_deref().unwrap_or("")),
        ["late", "sql", "mail", ""]
    );
}

#[test]
fn a_reload_tells_those_whose_policy_changes_and_nobody_else() {
    let mut service = Service::start(setup());
    let (mut web, mut db) = (service.driver("web"), service.driver("db"));
    write(
        &service,
        "a.toml",
        "[[group]]\nname = \"g\"\nguests = [\"web\"]\npolicy.deadline.open_ms = 900\n",
    );
    assert_eq!(check(&service).changes, ["web"]);
    assert!(reload(&service).taken);
    let policy = web.connection.hear_policy();
    assert_eq!(deadline(policy), 900);
    assert!(check(&service).changes.is_empty(), "it is in use");
    // Another tag is no reason to end a session.
    service.setup.of_guests = vec![("db", "tags = [\"new\"]")];
    write(
        &service,
        "a.toml",
        "[[group]]\nname = \"g\"\ntags = [\"new\"]\npolicy.deadline.open_ms = 800\n",
    );
    service.configure();
    assert!(reload(&service).taken);
    let policy = web.connection.hear_policy();
    assert_eq!(deadline(policy), 4000, "of no group any more");
    let policy = db.connection.hear_policy();
    assert_eq!(deadline(policy), 800, "the first that it hears of");
    assert_eq!(db.scan(b"its session stands").kind, VerdictKind::Clean);
}

#[test]
fn what_is_wrong_is_all_told_with_its_place_and_the_running_policy_stays() {
    let service = Service::start(setup());
    write(
        &service,
        "a.toml",
        "[[group]]\nname = \"good\"\nguests = [\"web\"]\npolicy.deadline.open_ms = 900\n",
    );
    assert!(reload(&service).taken);
    let mut web = service.driver("web");
    write(
        &service,
        "b.toml",
        "[[group]]\nname = \"key\"\nguests = [\"db\"]\npolicy.dead_line.open_ms = 900\n",
    );
    write(
        &service,
        "c.toml",
        "[[group]]\nname = \"value\"\nguests = [\"db\"]\npolicy.deadline.open_ms = 9\n",
    );
    write(
        &service,
        "d.toml",
        "[[group]]\nname = \"nobody\"\n\n[[group]]\nname = \"good\"\ntags = [\"sql\"]\n",
    );
    write(&service, "e.toml", "[[group]\n");
    fs::create_dir(service.path("policy.d/f.toml")).unwrap();
    fs::write(service.path("policy.d/g.toml"), b"name = \"\xff\"").unwrap();
    let wanted = [
        "b.toml:4:8: error[E-KEY]: unknown field `dead_line`",
        "c.toml:4:27: error[E-VALUE]: 9 is not from 10 to 600000",
        "d.toml:2:8: error[E-NO-MATCH]: group `nobody` names no guest",
        "d.toml:5:8: error[E-CONFLICT]: group `good` is defined at ",
        "e.toml:1:9: error[E-SYNTAX]: ",
        "f.toml: error[E-READ]: it cannot be read: ",
        "g.toml: error[E-READ]: it cannot be read: ",
    ];
    let told = reload(&service);
    let error = told.config_error.unwrap();
    assert!(!told.taken);
    let checked = seawall(&service, &["policy", "check"]);
    assert_eq!(checked.status.code(), Some(4));
    let start = Command::new(env!("CARGO_BIN_EXE_seawalld"))
        .args(["--check", "--config"])
        .arg(service.path("seawalld.toml"))
        .output()
        .unwrap();
    assert_eq!(start.status.code(), Some(1));
    let texts = [
        error,
        String::from_utf8(checked.stdout).unwrap(),
        String::from_utf8(start.stderr).unwrap(),
    ];
    for text in texts {
        for one in wanted {
            assert!(text.contains(&format!("policy.d/{one}")), "{one}\n--- in\n{text}");
        }
    }
    let findings = check(&service);
    assert_eq!((findings.right, findings.findings.len()), (false, wanted.len()));
    // What was in use stays, also for a session that begins now.
    assert_eq!(web.scan(b"x").kind, VerdictKind::Clean);
    assert_eq!(deadline(&service.driver("web").connection.policy), 900);
    assert_eq!(deadline(&service.driver("db").connection.policy), 4000);
}

#[test]
fn guests_that_are_not_there_and_groups_that_overlap_are_warned_of() {
    let service = Service::start(setup());
    write(
        &service,
        "a.toml",
        "[[group]]\nname = \"one\"\nguests = [\"web\", \"wbe\"]\ntags = [\"none\"]\n\n\
         [[group]]\nname = \"two\"\nguests = [\"web\"]\nuuids = [\"00000000-0000-0000-0000-000000000000\"]\n",
    );
    let wanted = [
        "a.toml:3:18: warning[W-NO-GUEST]: no guest is named `wbe`",
        "a.toml:4:9: warning[W-NO-GUEST]: no guest has the tag `none`",
        "a.toml:9:10: warning[W-NO-GUEST]: no guest has the UUID 00000000-0000-0000-0000-000000000000",
        "a.toml:7:8: warning[W-OVERLAP]: guest `web` belongs to group `one` (",
    ];
    let checked = seawall(&service, &["policy", "check"]);
    let text = String::from_utf8(checked.stdout).unwrap();
    assert_eq!(checked.status.code(), Some(0), "{text}");
    assert!(reload(&service).taken);
    for one in wanted {
        assert!(text.contains(&format!("policy.d/{one}")), "{one}\n--- in\n{text}");
        service.wait_log(one);
    }
    assert!(text.contains("good: `seawall reload` would change no guest's policy."), "{text}");
    assert_eq!(service.guest("web").group.as_deref(), Some("one"));
}

#[test]
fn what_is_explained_is_what_happens() {
    let setup = Setup { engine: Engine::Yara, ..setup() };
    let mut service = Service::start(setup);
    write(
        &service,
        "a.toml",
        "[[group]]\nname = \"sql\"\ntags = [\"sql\"]\n\n[group.policy]\nexclude.paths = [\n  \"/srv/a\",\n  \
         \"/srv/b/\",\n]\naction.infected = \"quarantine\"\n",
    );
    service.restart("TERM");
    let explain = |guest: &str, path: &str, exec| {
        let access = ExplainQuery { path: path.into(), exec, ..ExplainQuery::default() };
        block_on(service.client().explain_policy(guest, &access)).unwrap()
    };
    let steps = |guest: &str, path: &str, exec| {
        let explanation = explain(guest, path, exec);
        let place = |from: seawall_client::PolicyOrigin| {
            let name = from.file.rsplit('/').next().unwrap_or_default().to_owned();
            format!("{name}:{}", from.line)
        };
        let tell = |step: seawall_client::PolicyStep| {
            format!("{} {}", step.setting, step.from.map_or("default".into(), place))
        };
        (explanation.scanned, explanation.steps.into_iter().map(tell).collect::<Vec<_>>())
    };
    // The lines of seawalld.toml: [service] takes three.
    let scanned = |paths: &str, mode: &str, held: &str, action: &str| {
        let all = [
            "mode default".into(),
            format!("exclude {paths}"),
            "whole_file_limit_mib seawalld.toml:5".into(),
            "fail_mode.too_large default".into(),
            held.into(),
            "deadline.per_64_mib_ms default".into(),
            "deadline.most_ms default".into(),
            "fail_mode.timed_out default".into(),
            "fail_mode.changing default".into(),
            format!("{mode} default"),
            "action.running default".into(),
            format!("action.infected {action}"),
        ];
        (true, all.to_vec())
    };
    let open = "deadline.open_ms seawalld.toml:7";
    assert_eq!(
        steps("web", "/srv/a/x", false),
        scanned("default", "fail_mode.open", open, "default")
    );
    assert_eq!(
        steps("db", "/srv/ab", true),
        scanned("a.toml:6", "fail_mode.exec", "deadline.exec_ms default", "a.toml:10")
    );
    let excluded = |line: &str| (false, vec![line.to_owned()]);
    assert_eq!(steps("db", "/srv/a/x", false), excluded("exclude.paths[0] a.toml:7"));
    assert_eq!(steps("db", "/srv/b/x/y", true), excluded("exclude.paths[1] a.toml:8"));

    let paths = "[[group]]\nname = \"w\"\nguests = [\"web\"]\n[group.policy.fail_mode]\nopen = \"closed\"\n\
                 paths = [{ path = \"/up/**/x\", mode = \"open\" }, { path = \"/up\", mode = \"closed\" }]\n";
    write(&service, "b.toml", paths);
    assert!(reload(&service).taken);
    let (_, told) = steps("web", "/up/a/x", true);
    let fails: Vec<_> = told.iter().filter(|step| step.starts_with("fail_mode")).collect();
    assert_eq!(fails, ["fail_mode.paths[0] b.toml:6"]);
    let (_, told) = steps("web", "/up/b", false);
    assert!(told.contains(&"fail_mode.paths[1] b.toml:6".into()), "{told:?}");

    // The driver goes by the same rules, and the service by its action.
    let (mut web, mut db) = (service.driver("web"), service.driver("db"));
    let rules = Rules::from(db.connection.policy.clone());
    let path = |path| Facts { path: Some(path), ..Facts::default() };
    assert_eq!(rules.exclusion(&path(b"/srv/b/x/y")), Some(Exclusion::Path(1)));
    assert_eq!(rules.exclusion(&path(b"/srv/ab")), None);
    let evil = eicar();
    assert_eq!(web.scan(&evil).remediation, Remediation::None);
    assert_eq!(db.scan(&evil).remediation, Remediation::Quarantine);

    let shown = seawall(&service, &["policy", "show", "db"]);
    let text = String::from_utf8(shown.stdout).unwrap();
    let row = |name: &str| {
        let line = text.lines().find(|line| line.trim_start().starts_with(name)).unwrap_or(&text);
        line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    assert!(text.starts_with("Guest db, group sql ("), "{text}");
    assert_eq!(row("action.infected")[1], "quarantine");
    assert!(row("action.infected")[2].ends_with("policy.d/a.toml:10"), "{text}");
    assert_eq!(row("deadline.exec_ms")[1..], ["10000", "default"]);
    assert_eq!(row("deadline.open_ms")[1], "4000");
    let told = seawall(&service, &["policy", "explain", "db", "/srv/a/x", "--exec"]);
    let text = String::from_utf8(told.stdout).unwrap();
    assert!(text.contains("/srv/a/x, when it is executed: not scanned\n"), "{text}");
    assert!(text.contains("`/srv/a` excludes it"), "{text}");
    for (arguments, code) in [
        (["policy", "show", "nobody"].as_slice(), "no guest is named `nobody`"),
        (&["policy", "explain", "nobody", "/x"], "no guest is named `nobody`"),
        (&["policy", "explain", "db", "x"], "the path must be absolute"),
    ] {
        let output = seawall(&service, arguments);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(4), "{text}");
        assert!(text.contains(code), "{text}");
    }
    let refused = block_on(service.client().guest_policy("nobody")).unwrap_err();
    assert!(matches!(refused, ClientError::Refused(fault) if fault.code == "no-such-guest"));
}

/// Each kind of exclusion and each mode: what is explained, which line is named, and what the driver gets.
#[test]
fn each_exclusion_and_mode_is_explained() {
    let hash = blake3::hash(b"excluded content").to_string();
    let mut service = Service::start(setup());
    let text = format!(
        "[[group]]\nname = \"g\"\nguests = [\"web\"]\n[group.policy.exclude]\npaths = [\"/srv\", \"/home/*/.cache\"]\n\
         extensions = [\"LOG\"]\nfile_systems = [\"squashfs\"]\nowners = [113]\nprocesses = [\n  {{ path = \
         \"/usr/sbin/backup\" }},\n  {{ path = \"/usr/bin/db\", user = 113 }},\n]\nhashes = [\"{hash}\"]\n\
         detections = [\"PUA.*\"]\n"
    );
    write(&service, "a.toml", &text);
    service.restart("TERM");
    let query = |path: &str| ExplainQuery { path: path.into(), ..ExplainQuery::default() };
    let by = |path: &str, user| ExplainQuery { process: Some(path.into()), user, ..query("/x") };
    let exec = |of: ExplainQuery| ExplainQuery { exec: true, ..of };
    let owned = |owner| ExplainQuery { owner: Some(owner), ..query("/x") };
    let on = |of: &str| ExplainQuery { file_system: Some(of.into()), ..query("/x") };
    let with = |hash: &str| ExplainQuery { hash: Some(hash.into()), ..query("/x") };
    // What decides, and its line; none where the file is scanned.
    let table = [
        (query("/srv/x"), Some(("exclude.paths[0]", 5))),
        (exec(query("/home/a/.cache/b")), Some(("exclude.paths[1]", 5))),
        (query("/home/a/b/.cache"), None),
        (query("/var/x.Log"), Some(("exclude.extensions[0]", 6))),
        (query("/var/x.logs"), None),
        (on("squashfs"), Some(("exclude.file_systems[0]", 7))),
        (on("ext4"), None),
        (owned(113), Some(("exclude.owners[0]", 8))),
        (owned(0), None),
        (by("/usr/sbin/backup", None), Some(("exclude.processes[0]", 10))),
        (by("/usr/sbin/backup", Some(113)), None),
        (by("/usr/bin/db", Some(113)), Some(("exclude.processes[1]", 11))),
        (exec(by("/usr/sbin/backup", None)), None),
        (with(&hash), Some(("exclude.hashes[0]", 13))),
        (with(&"0".repeat(64)), None),
    ];
    let explain =
        |query: &ExplainQuery| block_on(service.client().explain_policy("web", query)).unwrap();
    for (access, decides) in &table {
        let told = explain(access);
        assert_eq!(told.scanned, decides.is_none(), "{access:?}");
        if let Some((setting, line)) = decides {
            let step = &told.steps[0];
            let from = step.from.as_ref().map(|from| from.line);
            assert_eq!((told.steps.len(), step.setting.as_str(), from), (1, *setting, Some(*line)));
        }
    }
    let found = ExplainQuery { detection: Some("PUA.Win.x".into()), ..query("/x") };
    let last = explain(&found).steps.pop().unwrap();
    assert_eq!((last.setting.as_str(), last.from.unwrap().line), ("exclude.detections[0]", 14));
    let bad = ExplainQuery { hash: Some("44d8".into()), ..query("/x") };
    let refused = block_on(service.client().explain_policy("web", &bad)).unwrap_err();
    assert!(matches!(refused, ClientError::Refused(fault) if fault.code == "bad-hash"));

    let told = seawall(
        &service,
        &["policy", "explain", "web", "/x", "--process", "/usr/bin/db", "--user", "113"],
    );
    let text = String::from_utf8(told.stdout).unwrap();
    assert!(text.contains("/x, when it is opened: not scanned\n"), "{text}");
    let got = &service.driver("web").connection.policy.exclude;
    assert_eq!(got.paths, [b"/srv".to_vec(), b"/home/*/.cache".to_vec()]);
    assert_eq!(got.extensions, [b"log".to_vec()]);
    assert_eq!(
        (got.file_systems.as_slice(), got.owners.as_slice()),
        (["squashfs".to_owned()].as_slice(), [113].as_slice())
    );
    assert_eq!(got.processes.iter().map(|one| one.user).collect::<Vec<_>>(), [0, 113]);

    for (mode, open, exec_is_scanned) in [
        (Mode::Smart, true, true),
        (Mode::Open, true, true),
        (Mode::Strict, true, true),
        (Mode::Exec, false, true),
        (Mode::Write, false, false),
        (Mode::Off, false, false),
    ] {
        write(
            &service,
            "a.toml",
            &format!("[[group]]\nname = \"g\"\nguests = [\"web\"]\npolicy.mode = \"{mode}\"\n"),
        );
        assert!(reload(&service).taken);
        let of = |query| {
            let told = block_on(service.client().explain_policy("web", &query)).unwrap();
            assert_eq!(
                (told.steps[0].setting.as_str(), told.steps[0].from.as_ref().unwrap().line),
                ("mode", 4)
            );
            told.scanned
        };
        assert_eq!((of(query("/x")), of(exec(query("/x")))), (open, exec_is_scanned), "{mode}");
        assert_eq!(service.guest("web").mode, mode.to_string());
        assert_eq!(service.driver("web").connection.policy.mode, mode);
    }
    let mut web = service.driver("web");
    web.say(seawall_proto::ToHost::Heartbeat(seawall_proto::Heartbeat::default()));
    common::wait_for("its heartbeat", || {
        (service.guest("web").state == seawall_client::GuestState::Protected).then_some(())
    });
    let guests = String::from_utf8(seawall(&service, &["guests"]).stdout).unwrap();
    assert!(guests.contains("web: its policy has nothing scanned"), "{guests}");
}

/// What the service itself excludes: it answers as if nothing were found, and no driver remembers that as clean.
#[test]
fn excluded_contents_and_detections_are_let_through() {
    let evil = eicar();
    let other = [evil.as_slice(), b" "].concat();
    let service = Service::start(Setup { engine: Engine::Yara, ..setup() });
    let (mut web, mut db) = (service.driver("web"), service.driver("db"));
    let outcome = |driver: &mut common::Driver, content: &[u8]| {
        let verdict = driver.scan(content);
        (verdict.kind, verdict.decision, verdict.remediation)
    };
    let denied = (VerdictKind::Infected, Some(Decision::Deny), Remediation::Quarantine);
    let excluded = (VerdictKind::Excluded, Some(Decision::Allow), Remediation::None);
    let group = |exclude: &str| {
        format!(
            "[[group]]\nname = \"g\"\nguests = [\"web\"]\npolicy.action.infected = \"quarantine\"\n{exclude}\n"
        )
    };
    let hash = blake3::hash(&evil).to_string();
    let change = |exclude: &str| {
        write(&service, "a.toml", &group(exclude));
        assert!(reload(&service).taken);
    };
    change("");
    web.connection.hear_policy();
    let verdict = web.scan(&evil);
    let name = verdict.detail.expect("what it is");
    change(&format!("policy.exclude.hashes = [\"{}\"]", hash.to_uppercase()));
    web.connection.hear_policy();
    assert_eq!(outcome(&mut web, &evil), excluded);
    assert_eq!(outcome(&mut web, &other), denied, "another content");
    let named = web.name(Operation::OnDemand, *blake3::hash(&evil).as_bytes());
    assert_eq!(named.expect("an exclusion needs no content").kind, VerdictKind::Excluded);
    assert_eq!(db.scan(&evil).decision, Some(Decision::Deny), "another guest");
    change(&format!("policy.exclude.detections = [\"{}*\"]", &name[..name.len() - 1]));
    web.connection.hear_policy();
    assert_eq!(outcome(&mut web, &evil), excluded);
    assert_eq!(outcome(&mut web, &other), excluded);
    assert_eq!(web.scan(b"nothing to find").kind, VerdictKind::Clean);
    change("policy.exclude.detections = [\"Another\"]");
    web.connection.hear_policy();
    assert_eq!(outcome(&mut web, &evil), denied);
    assert_eq!(service.status().counters.excluded, 4);
}

/// Two engines that look at everything, by what they find and how grave it is.
#[test]
fn severity_and_agreement_decide_what_is_done() {
    let more = "[scan]\nearly_exit = false\n[policy.action]\ninfected = \"deny\"\nlow = \"allow\"\ncritical = \"quarantine\"\nagreeing_engines = 2\nagreed = \"quarantine\"\nrunning = \"stop\"\n";
    let service = Service::start(Setup {
        engine: Engine::Three,
        more: more.into(),
        guests: vec!["web"],
        ..Setup::default()
    });
    let mut web = service.driver("web");
    let mut scan = |text: &str| {
        let verdict = web.scan(format!("SEAWALL-FAULT {text}").as_bytes());
        assert_eq!(verdict.kind, VerdictKind::Infected);
        let running = match verdict.decision {
            Some(Decision::Deny) => Running::Stop,
            _ => Running::Leave,
        };
        assert_eq!(verdict.running, running, "{text}");
        (verdict.decision, verdict.remediation)
    };
    let allowed = (Some(Decision::Allow), Remediation::None);
    let denied = (Some(Decision::Deny), Remediation::None);
    let gone = (Some(Decision::Deny), Remediation::Quarantine);
    for (text, expected) in [
        ("two:found=A/low", allowed),
        ("two:found=A/medium", denied),
        ("two:found=A/high", denied),
        ("two:found=A/critical", gone),
        ("two:found=A/low,three:found=B/low", gone),
        ("one:found=A/low,two:found=B/medium,three:found=C/low", gone),
    ] {
        assert_eq!(scan(text), expected, "{text}");
    }
    let query = |severity: &str| {
        let severity = Some(severity.to_owned());
        ExplainQuery { path: "/x".into(), severity, ..ExplainQuery::default() }
    };
    for (severity, setting, line) in [
        ("low", "action.low", Some(8)),
        ("medium", "action.infected", Some(7)),
        ("critical", "action.critical", Some(9)),
    ] {
        let told = block_on(service.client().explain_policy("web", &query(severity))).unwrap();
        let last = told.steps.last().unwrap();
        assert_eq!(
            (last.setting.as_str(), last.from.as_ref().map(|from| from.line)),
            (setting, line)
        );
    }
    // What goes on is told, once for each content.
    assert_eq!(scan("two:found=A/low"), allowed);
    let told = || {
        let events = service.events();
        events
            .into_iter()
            .filter(|event| event.decision.as_deref() == Some("allow"))
            .collect::<Vec<_>>()
    };
    let told = common::wait_for("the event", || Some(told()).filter(|told| !told.is_empty()));
    assert_eq!(told.len(), 1);
    assert!(told[0].reason.as_deref().unwrap().contains("policy lets it through (action.low)"));
}

/// An excluded detection is no verdict of those that had none.
#[test]
fn an_engine_that_fails_beside_an_excluded_detection_is_a_failure() {
    let more = "[scan]\nearly_exit = false\n[policy.exclude]\ndetections = [\"Fine*\"]\n";
    let setup =
        Setup { engine: Engine::Three, more: more.into(), guests: vec!["web"], ..Setup::default() };
    let service = Service::start(setup);
    let mut web = service.driver("web");
    let mut scan = |text: &str| {
        let verdict = web.scan(format!("SEAWALL-FAULT {text}").as_bytes());
        (verdict.kind, verdict.decision)
    };
    let excluded = (VerdictKind::Excluded, Some(Decision::Allow));
    for _ in 0..2 {
        assert_eq!(scan("two:found=Fine"), excluded);
        assert_eq!(
            scan("two:found=Fine,three:found=Evil"),
            (VerdictKind::Infected, Some(Decision::Deny))
        );
        assert_eq!(scan("two:found=Fine,three:error=no"), (VerdictKind::Error, None));
    }
}

#[test]
fn what_a_group_does_not_set_is_as_the_configuration_has_it() {
    let more = "[policy.exclude]\npaths = [\"/a\", \"/b\"]\nextensions = [\"log\"]\n[policy.fail_mode]\nchanging = \"closed\"\n";
    let mut service = Service::start(Setup { more: more.into(), ..setup() });
    let group = "[[group]]\nname = \"g\"\nguests = [\"web\"]\n[group.policy]\nexclude.paths = [\"/c\"]\nfail_mode.timed_out = \"closed\"\n";
    write(&service, "a.toml", group);
    service.restart("TERM");
    let (web, db) = (service.driver("web"), service.driver("db"));
    let (web, db) = (&web.connection.policy, &db.connection.policy);
    assert_eq!(web.exclude.paths, [b"/c".to_vec()], "a list takes the place of the whole list");
    assert_eq!(db.exclude.paths, [b"/a".to_vec(), b"/b".to_vec()]);
    let closed = Some(FailMode::Closed);
    for policy in [web, db] {
        assert_eq!(policy.exclude.extensions, [b"log".to_vec()]);
        assert_eq!((policy.fail_changing, policy.fail_too_large), (closed, Some(FailMode::Open)));
    }
    assert_eq!((web.fail_timed_out, db.fail_timed_out), (closed, None));
}

#[test]
fn what_a_policy_does_not_stop_and_what_makes_it_slow_is_warned_of() {
    let service = Service::start(setup());
    let patterns: Vec<_> = (0..300).map(|n| format!("\"/home/u{n}*\"")).collect();
    write(
        &service,
        "a.toml",
        &format!(
            "[[group]]\nname = \"one\"\nguests = [\"web\"]\npolicy.mode = \"exec\"\npolicy.exclude.paths = [{}]\n\n\
             [[group]]\nname = \"two\"\nguests = [\"db\"]\npolicy.mode = \"off\"\n",
            patterns.join(", ")
        ),
    );
    let text = String::from_utf8(seawall(&service, &["policy", "check"]).stdout).unwrap();
    for wanted in [
        "a.toml:4:8: warning[W-EXEC-ONLY]: programs are scanned when they are executed, and nothing else: not a script",
        "a.toml:5:16: warning[W-SLOW]: up to 300 patterns are compared with one path",
        "a.toml:10:8: warning[W-OFF]: nothing is scanned in these guests",
    ] {
        assert!(text.contains(wanted), "{wanted}\n--- in\n{text}");
    }
    assert!(reload(&service).taken);
    // What ends the scan must not be excluded.
    write(
        &service,
        "a.toml",
        "[[group]]\nname = \"one\"\nguests = [\"web\"]\npolicy.exclude.detections = [\"A\"]\n",
    );
    assert!(check(&service).right, "one engine");
    let three = Service::start(Setup { engine: Engine::Three, ..setup() });
    write(
        &three,
        "a.toml",
        "[[group]]\nname = \"one\"\nguests = [\"web\"]\npolicy.exclude.detections = [\"A\"]\n",
    );
    let found = check(&three);
    assert!(!found.right && found.findings[0].code == "E-CONFLICT", "{found:?}");
    // Too much for a driver, of whatever kind.
    let owners: Vec<_> = (0..300_000).map(|n| (4_000_000_000_u32 + n).to_string()).collect();
    let group = "[[group]]\nname = \"one\"\nguests = [\"web\"]\npolicy.exclude.owners = ";
    write(&service, "a.toml", &format!("{group}[{}]\n", owners.join(",")));
    let found = check(&service);
    assert!(
        !found.right && found.findings[0].message.contains("drivers take at most"),
        "{found:?}"
    );
    let long: Vec<_> = (0..6000).map(|n| format!("\"/{}{n}\"", "x".repeat(200))).collect();
    let group = "[[group]]\nname = \"one\"\nguests = [\"web\"]\npolicy.exclude.paths = ";
    write(&service, "a.toml", &format!("{group}[{}]\n", long.join(",\n")));
    let found = check(&service);
    assert!(
        !found.right && found.findings[0].message.contains("drivers take at most 1048576"),
        "{found:?}"
    );
    // Nobody writes this one.
    fs::remove_file(service.path("policy.d/a.toml")).unwrap();
    let fifo = Command::new("mkfifo").arg(service.path("policy.d/a.toml")).status().unwrap();
    assert!(fifo.success());
    let found = check(&service);
    assert!(!found.right && found.findings[0].code == "E-READ", "{found:?}");
}

/// More than one message holds, and the session goes on.
#[test]
fn ten_thousand_exclusions_arrive() {
    let service = Service::start(setup());
    let mut web = service.driver("web");
    let paths: Vec<_> = (0..10_000).map(|n| format!("\"/srv/customers/{n}/data\"")).collect();
    let group = "[[group]]\nname = \"g\"\nguests = [\"web\"]\npolicy.exclude.paths = ";
    write(&service, "a.toml", &format!("{group}[\n{}\n]\n", paths.join(",\n")));
    assert!(reload(&service).taken);
    assert_eq!(web.connection.hear_policy().exclude.paths.len(), 10_000);
    assert_eq!(web.scan(b"x").kind, VerdictKind::Clean);
    let access =
        ExplainQuery { path: "/srv/customers/7000/data/x".into(), ..ExplainQuery::default() };
    let told = block_on(service.client().explain_policy("web", &access)).unwrap();
    assert_eq!(told.steps[0].setting, "exclude.paths[7000]");
    assert_eq!(told.steps[0].from.as_ref().unwrap().line, 7005);
    assert_eq!(
        service.driver("web").connection.policy.exclude.paths.len(),
        10_000,
        "at its start too"
    );
}

/// What counts is the policy when the verdict is there.
#[test]
fn a_policy_that_changes_during_a_scan_counts_for_it() {
    let service = Service::start(Setup { engine: Engine::Three, ..setup() });
    let mut web = service.driver("web");
    let (slots, refs) = web.fill(b"SEAWALL-FAULT one:sleep=2000,two:found=Evil");
    let request = web.request(refs, true);
    web.say(seawall_proto::ToHost::ScanRequest(request));
    common::wait_for("the scan", || {
        let one = service.status().engines.into_iter().find(|engine| engine.name == "one")?;
        (one.in_flight > 0).then_some(())
    });
    write(
        &service,
        "a.toml",
        "[[group]]\nname = \"g\"\nguests = [\"web\"]\npolicy.action.infected = \"quarantine\"\n",
    );
    assert!(reload(&service).taken);
    let verdict = loop {
        match web.connection.hear().expect("a verdict") {
            ToGuest::Verdict(verdict) => break verdict,
            _ => continue,
        }
    };
    assert_eq!(
        (verdict.kind, verdict.remediation),
        (VerdictKind::Infected, Remediation::Quarantine)
    );
    drop(slots);
}

/// A guest of one tenant does not learn by its time what guests of another have had.
#[test]
fn verdicts_are_shared_within_a_tenant() {
    let service = Service::start(Setup {
        guests: vec!["a1", "a2", "b", "none", "other"],
        ..Setup::default()
    });
    let groups = "[[group]]\nname = \"a\"\nguests = [\"a1\", \"a2\"]\npolicy.tenant = \"a\"\n\
                  [[group]]\nname = \"b\"\nguests = [\"b\"]\npolicy.tenant = \"b\"\n";
    write(&service, "tenants.toml", groups);
    assert!(reload(&service).taken);
    let all = [("SEAWALL-FAULT found=X", VerdictKind::Infected), ("clean", VerdictKind::Clean)];
    for (content, expected) in all {
        let before = service.status().counters.scans;
        // Whoever is the first of its tenant has it scanned.
        for (guest, scans) in [("a1", 1), ("a2", 1), ("b", 2), ("none", 3), ("other", 3), ("a1", 3)]
        {
            assert_eq!(service.driver(guest).scan(content.as_bytes()).kind, expected, "{guest}");
            assert_eq!(service.status().counters.scans, before + scans, "{guest}");
        }
    }
    // Nor by naming what they may have.
    service.driver("a1").scan(b"of one tenant alone");
    let hash = *blake3::hash(b"of one tenant alone").as_bytes();
    for (guest, is_known) in [("a2", true), ("b", false), ("none", false)] {
        let known = service.driver(guest).name(Operation::OnDemand, hash);
        assert_eq!(known.is_some(), is_known, "{guest}");
    }
    write(
        &service,
        "tenants.toml",
        "[[group]]\nname = \"a\"\nguests = [\"a1\"]\npolicy.tenant = \"a b\"\n",
    );
    let refused = reload(&service);
    assert!(!refused.taken);
    let what = format!("{refused:?}");
    assert!(what.contains("a tenant's name must be 1 to 64 letters"), "{what}");
}
