use super::*;

const EXAMPLE: &str = include_str!("../../../../packaging/seawalld.toml");

fn render(text: &str) -> String {
    match Config::parse(Path::new("seawalld.toml"), text) {
        Ok(config) => panic!("this is no valid configuration: {config:?}"),
        Err(error) => error.to_string(),
    }
}

/// The example with every commented key uncommented. Prose has a blank behind its `#`.
fn uncommented(example: &str) -> String {
    let is_key = |line: &str| line.starts_with('#') && !line.starts_with("# ") && line.len() > 1;
    example
        .lines()
        .map(|line| if is_key(line) { &line[1..] } else { line })
        .fold(String::new(), |text, line| text + line + "\n")
}

#[test]
fn the_example_as_it_is_gives_the_built_in_defaults() {
    let config = Config::parse(Path::new("example"), EXAMPLE).expect("the example is valid");
    assert_eq!(config, Config::default());
}

#[test]
fn each_commented_default_in_the_example_is_the_built_in_one() {
    let mut config = Config::parse(Path::new("example"), &uncommented(EXAMPLE))
        .unwrap_or_else(|error| panic!("{error}"));
    let guests = std::mem::take(&mut config.guests);
    let schedules = std::mem::take(&mut config.schedules);
    assert_eq!(config, Config::default());
    assert_eq!(guests.len(), 1, "the example shows one guest");
    assert_eq!(schedules.len(), 1, "the example shows one schedule");
}

#[test]
fn an_engine_has_threads_as_fits_the_cpus_or_as_it_is_told() {
    let mut engine = Config::default().engines.0.remove(0);
    assert!((2..=4).contains(&engine.threads()));
    engine.threads = 9;
    assert_eq!(engine.threads(), 9);
}

#[test]
fn the_example_of_a_group_is_right() {
    let example = include_str!("../../../../packaging/policy.d/10-example.toml");
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("seawalld.toml");
    std::fs::create_dir(folder.path().join("policy.d")).expect("a folder");
    let write = |text: &str| {
        std::fs::write(folder.path().join("policy.d/10-example.toml"), text).expect("a file");
    };
    std::fs::write(&path, "").expect("a file");
    write(example);
    assert!(Config::load(&path).expect("nothing is set").groups.is_empty());
    write(&uncommented(example));
    let config = Config::load(&path).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(config.groups.len(), 1);
    assert_eq!(config.groups[0].policy.action.infected, Action::Quarantine);
    assert_eq!(config.groups[0].policy.deadline.exec_ms, config.policy.deadline.exec_ms);
}

/// No key that the code knows is missing from the example.
#[test]
fn the_example_shows_every_key() {
    let shown: toml::Table = toml::from_str(&uncommented(EXAMPLE)).expect("the example is TOML");
    let mut known = Config::default();
    known.guests.push(GuestConfig {
        name: Spanned::new(0..0, GuestName("g".into())),
        region: Some(Spanned::new(0..0, AbsolutePath("/r".into()))),
        key_file: Some(Spanned::new(0..0, AbsolutePath("/k".into()))),
        socket: Some(Spanned::new(0..0, AbsolutePath("/s".into()))),
        serial_socket: Some(Spanned::new(0..0, AbsolutePath("/c".into()))),
        vsock_cid: Some(Spanned::new(0..0, 4)),
        uuid: Some(Spanned::new(0..0, GuestUuid("u".into()))),
        tags: vec![Tag("t".into())],
    });
    let schedule = "name = \"s\"\ncron = \"0 0 * * *\"\n";
    known.schedules.push(toml::from_str(schedule).expect("a schedule"));
    let known = toml::Table::try_from(&known).expect("a configuration is TOML");
    assert_eq!(keys(&shown.into()), keys(&known.into()));
}

fn keys(value: &toml::Value) -> Vec<String> {
    match value {
        toml::Value::Table(table) => table
            .iter()
            .flat_map(|(name, value)| {
                let below = keys(value);
                if below.is_empty() {
                    vec![name.clone()]
                } else {
                    below.iter().map(|key| format!("{name}.{key}")).collect()
                }
            })
            .collect(),
        toml::Value::Array(items) => items.iter().flat_map(keys).collect(),
        _ => Vec::new(),
    }
}

#[test]
fn what_is_wrong_is_told_with_its_place() {
    let golden = include_str!("golden.txt");
    let guest = "[[guest]]\nname = \"g1\"\nregion = \"/r\"\nsocket = \"/s\"\n";
    let wrong = [
        "[policy]\nwhole_file_limt_mib = 3\n".to_owned(),
        "[service]\napi_socket = run/api.sock\n".to_owned(),
        "[service]\ntcp_listen = \"7325\"\n".to_owned(),
        "[[guest]]\nregion = \"/r\"\n".to_owned(),
        "[[guest]]\nname = \"g1\"\nsocket = \"/s\"\n".to_owned(),
        "[[guest]]\nname = \"g 1\"\nregion = \"/r\"\n".to_owned(),
        format!("{guest}\n{guest}"),
        "[[guest]]\nname = \"g1\"\nregion = \"/r\"\n".to_owned(),
        "[policy.fail_mode]\nopen = \"closed-if-user-writable\"\n".to_owned(),
        "[policy.deadline]\nopen_ms = -1\n".to_owned(),
        "[policy.exclude]\npaths = [\"/var/cache/\", \"var/../tmp\"]\n".to_owned(),
        "[policy.exclude]\npaths = [\"/srv/{a,b\"]\n".to_owned(),
        "[policy.exclude]\nextensions = [\".log\"]\n".to_owned(),
        "[policy.exclude]\nfile_systems = [\"ext 4\"]\n".to_owned(),
        "[policy.exclude]\nowners = [\"root\"]\n".to_owned(),
        "[policy.exclude]\nprocesses = [{ path = \"backup\" }]\n".to_owned(),
        "[policy.exclude]\nprocesses = [{ path = \"/backup\", uid = 3 }]\n".to_owned(),
        "[policy.exclude]\nhashes = [\"44d88612fea8a8f36de82e1278abb02f\"]\n".to_owned(),
        "[policy.exclude]\ndetections = [\"*\"]\n".to_owned(),
        "[policy]\nmode = \"lazy\"\n".to_owned(),
        "[[schedule]]\nname = \"s\"\ncron = \"0 25 * * *\"\nall = true\n".to_owned(),
        "[[schedule]]\nname = \"s\"\ncron = \"0 2 * * *\"\n".to_owned(),
        "[alarm]\nheartbeat_ms = \"fast\"\n".to_owned(),
        "engine = []\n".to_owned(),
        format!("{guest}\n[alarm]\nheartbeat_ms = 7000\n"),
        "[clamd]\nsocket = \"clamd.sock\"\n".to_owned(),
        "[clamd]\nsocket_mode = \"rw\"\n".to_owned(),
        "[clamd]\nscan_paths = [\"/srv\", \"/srv/../etc\"]\n".to_owned(),
    ];
    let rendered = wrong.map(|text| render(&text)).join("\n\n") + "\n";
    assert_eq!(rendered, golden, "got:\n{rendered}");
}
