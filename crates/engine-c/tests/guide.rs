//! docs/write-an-engine.md shows the very files that the tests build.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;

use common::{LIBRARIES, own};

/// The one block of this language in the guide.
fn block(language: &str) -> String {
    let guide = fs::read_to_string(own("../../docs/write-an-engine.md")).unwrap();
    let fence = format!("\n```{language}\n");
    let mut blocks = guide.split(&fence).skip(1);
    let text = blocks.next().unwrap().split_inclusive("```\n").next().unwrap().to_owned();
    assert!(blocks.next().is_none(), "more than one block of {language}");
    text.strip_suffix("```\n").unwrap().to_owned()
}

#[test]
fn the_guide_shows_the_examples() {
    for (language, file) in [("rust", "../engine/examples/word.rs"), ("c", "examples/word.c")] {
        let example = fs::read_to_string(own(file)).unwrap();
        assert!(block(language) == example, "the guide's {language} block is not {file}");
        let lines = example.lines().count();
        assert!(lines < 80, "{file} has {lines} lines; a newcomer reads fewer than 80");
    }
}

#[test]
fn the_guide_links_as_the_tests_do() {
    let guide = fs::read_to_string(own("../../docs/write-an-engine.md")).unwrap();
    let libraries = format!("libseawall_engine.a {} -o word", LIBRARIES.join(" "));
    assert!(guide.contains(&libraries), "{libraries}");
    assert!(guide.contains("cc -Wall -Wextra -Werror -std=c11 -O2 -I crates/engine-c/include"));
}
