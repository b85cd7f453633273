//! The header is what the source says.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

/// Set, the test writes the header instead of comparing it.
const WRITE: &str = "SEAWALL_WRITE_HEADER";

#[test]
fn the_header_is_that_of_the_source() {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(own.join("cbindgen.toml")).unwrap();
    // The file, not the crate: for that cbindgen would start cargo. It follows `mod` by itself.
    let builder = cbindgen::Builder::new().with_src(own.join("src/lib.rs"));
    let mut made = Vec::new();
    builder.with_config(config).generate().unwrap().write(&mut made);
    let made = String::from_utf8(made).unwrap();
    let path = own.join("include/seawall_engine.h");
    if std::env::var_os(WRITE).is_some() {
        fs::write(&path, &made).unwrap();
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == made,
        "{} is old; write it again: {WRITE}=1 cargo test --release -p seawall-engine-c --test header",
        path.display()
    );
}
