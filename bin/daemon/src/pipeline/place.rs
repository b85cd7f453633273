//! Where verdicts are kept: under which hash, and of what.

use super::Tenant;
use crate::copy::PrivateCopy;
use crate::generation::Generations;
use seawall_engine::Metadata;
use seawall_proto::{ContentHash, Generation};

/// Where a verdict is kept: the content's hash, also together with a tenant or a name, or as that of an archive that was
/// looked into; and the generation.
pub type Key = (ContentHash, Generation);

/// What a content is. Verdicts on an archive with and without its members are kept apart, and neither is where that on
/// any other content is: so a hash alone tells all that was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Archive {
    No,
    /// Nobody looks into it.
    Closed,
    Opened,
}

impl Archive {
    /// What this is, and whether it is looked into.
    pub fn of(copy: &PrivateCopy, is_opened: bool) -> Self {
        match (copy.is_archive(), is_opened) {
            (false, _) => Self::No,
            (true, false) => Self::Closed,
            (true, true) => Self::Opened,
        }
    }

    fn place(self, hash: ContentHash) -> ContentHash {
        let context = match self {
            Self::No => return hash,
            Self::Closed => "seawall 2026 archive without its members",
            Self::Opened => "seawall 2026 archive with its members",
        };
        ContentHash(blake3::derive_key(context, &hash.0))
    }
}

/// The hash of a content that one tenant has.
fn owned(hash: ContentHash, tenant: &str) -> ContentHash {
    let mut hasher = blake3::Hasher::new_derive_key("seawall 2026 content of a tenant");
    hasher.update(&hash.0);
    hasher.update(tenant.as_bytes());
    ContentHash(*hasher.finalize().as_bytes())
}

/// The hash of a content together with what rules may ask of its file.
fn named(hash: ContentHash, meta: &Metadata) -> ContentHash {
    let mut hasher = blake3::Hasher::new_derive_key("seawall 2026 content with path and guest");
    hasher.update(&hash.0);
    for part in [meta.guest.as_bytes(), &meta.path] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    ContentHash(*hasher.finalize().as_bytes())
}

/// Where the verdict on one content is kept.
pub struct Place {
    pub key: Key,
    /// Whether the name is part of it.
    pub by_name: bool,
    /// Where the verdict on an archive is kept into which nobody looked.
    pub closed: ContentHash,
}

impl Place {
    /// That of a content that this tenant calls so, under the generation in use.
    pub fn of(
        generations: &Generations,
        hash: ContentHash,
        archive: Archive,
        meta: &Metadata,
        tenant: &Tenant,
    ) -> Self {
        let generation = generations.current();
        let by_name = generations.is_by_name(generation);
        let hash = tenant.as_deref().map_or(hash, |tenant| owned(hash, tenant));
        let hash = if by_name { named(hash, meta) } else { hash };
        let closed = Archive::Closed.place(hash);
        Self { key: (archive.place(hash), generation), by_name, closed }
    }
}
