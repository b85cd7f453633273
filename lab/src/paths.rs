//! Where the lab keeps things.

use std::path::{Path, PathBuf};

/// Root of the source tree that this library was built from.
pub fn workspace() -> &'static Path {
    let lab = Path::new(env!("CARGO_MANIFEST_DIR"));
    lab.parent().unwrap_or(lab)
}

/// Downloads and built images, kept between labs: `SEAWALL_LAB_CACHE`, or `target/lab-cache`.
pub fn cache_dir() -> PathBuf {
    std::env::var_os("SEAWALL_LAB_CACHE")
        .map_or_else(|| workspace().join("target/lab-cache"), PathBuf::from)
}

/// State folders of all labs of this source tree.
pub fn labs_dir() -> PathBuf {
    workspace().join("target/labs")
}

/// Where cargo puts what it builds.
pub(crate) fn target_dir() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        // Cargo takes a relative one from its working folder, which we set to the workspace.
        Some(path) => workspace().join(path),
        None => workspace().join("target"),
    }
}

/// Folder of one lab's logs, disks, rules and state.
pub(crate) fn state_dir(name: &str) -> PathBuf {
    labs_dir().join(name)
}

/// Folder of one lab's regions and sockets: on a tmpfs, and short, since a socket's path ends at 108 bytes.
pub(crate) fn run_dir(name: &str) -> PathBuf {
    Path::new("/dev/shm").join(format!("seawall-{name}"))
}

/// Name of one lab's network namespace.
pub(crate) fn netns(name: &str) -> String {
    format!("seawall-{name}")
}
