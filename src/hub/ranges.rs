//! A bounded cache of byte ranges on the disk, shared by any number of processes.
//!
//! One file an entry, named by content and range: `{identity}-{start}-{end}`. It holds a magic number, the sha256 of
//! (name, bytes) and the bytes. An entry is written under another name and renamed; whatever is torn or changed all
//! the same fails its checksum, is removed and fetched again. So no lock and no fsync are needed. A use sets the
//! entry's modification time, and the entries unused for longest go first.

use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

const MAGIC: &[u8; 8] = b"vrRange1";
const HEADER_BYTES: u64 = 8 + 32;
const BLOCK_BYTES: u64 = 4096;
/// Names of entries being written.
const UNFINISHED: &str = ".part-";
/// An unfinished entry this old was left by a process that died.
const ABANDONED: Duration = Duration::from_secs(3600);

pub struct RangeCache {
    folder: PathBuf,
    limit_bytes: u64,
    usage: Mutex<Usage>,
}

/// What this process knows of the disk space in use; others write too, so it looks again from time to time.
#[derive(Default)]
struct Usage {
    /// As of the last look.
    total: Option<u64>,
    written_since: u64,
    warned: bool,
}

impl RangeCache {
    /// A cache in `folder` (made when first needed) of at most `limit_bytes` of disk space.
    pub fn new(folder: PathBuf, limit_bytes: u64) -> Self {
        Self { folder, limit_bytes, usage: Mutex::default() }
    }

    /// The bytes `range` of the content `identity` (a hash), if they are here and whole.
    pub fn get(&self, identity: &str, range: &Range<u64>) -> Option<Vec<u8>> {
        let name = entry_name(identity, range);
        let path = self.folder.join(&name);
        match read_entry(&path, &name, range.end - range.start) {
            Ok(bytes) => Some(bytes),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!("dropping the cached range {}: {error}", path.display());
                if let Err(error) = fs::remove_file(&path) {
                    tracing::warn!("cannot remove {}: {error}", path.display());
                }
                None
            }
        }
    }

    /// Keeps `bytes`. A cache that cannot be written to costs speed, not correctness: it is reported once.
    pub fn put(&self, identity: &str, range: &Range<u64>, bytes: &[u8]) {
        let needed = disk_space(HEADER_BYTES + bytes.len() as u64);
        if needed > self.limit_bytes {
            return;
        }
        let mut usage = self.usage.lock().unwrap_or_else(PoisonError::into_inner);
        let written = self.write(&entry_name(identity, range), bytes).and_then(|()| {
            usage.written_since += needed;
            let unknown = usage.total.is_none_or(|total| total + usage.written_since > self.limit_bytes);
            // Others' entries show at a look only; an eighth of the limit bounds what they can add unseen.
            if unknown || usage.written_since > self.limit_bytes / 8 {
                (usage.total, usage.written_since) = (Some(self.trim()?), 0);
            }
            Ok(())
        });
        if let Err(error) = written
            && !std::mem::replace(&mut usage.warned, true)
        {
            tracing::warn!("ranges are not cached in {}: {error}", self.folder.display());
        }
    }

    fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        let mut file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(&self.folder)?;
        file.write_all(MAGIC)?;
        file.write_all(&checksum(name, bytes))?;
        file.write_all(bytes)?;
        file.as_file().set_modified(SystemTime::now())?;
        file.persist(self.folder.join(name))?;
        Ok(())
    }

    /// Removes the entries unused for longest until the rest fits, and returns what the rest takes.
    fn trim(&self) -> io::Result<u64> {
        let now = SystemTime::now();
        let mut entries = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            // Another process may have removed it since.
            let Ok(metadata) = entry.metadata() else { continue };
            let used = metadata.modified()?;
            let abandoned = now.duration_since(used).is_ok_and(|age| age > ABANDONED);
            if !entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
                entries.push((used, entry.path(), disk_space(metadata.len())));
            } else if abandoned {
                remove(&entry.path())?;
            }
        }
        entries.sort();
        let mut total: u64 = entries.iter().map(|entry| entry.2).sum();
        for (_, path, size) in entries {
            if total <= self.limit_bytes {
                break;
            }
            remove(&path)?;
            total -= size;
        }
        Ok(total)
    }
}

fn entry_name(identity: &str, range: &Range<u64>) -> String {
    format!("{identity}-{}-{}", range.start, range.end)
}

fn checksum(name: &str, bytes: &[u8]) -> [u8; 32] {
    Sha256::new().chain_update(name).chain_update([0]).chain_update(bytes).finalize().into()
}

fn disk_space(bytes: u64) -> u64 {
    bytes.next_multiple_of(BLOCK_BYTES)
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn read_entry(path: &Path, name: &str, len: u64) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let actual = file.metadata()?.len();
    if actual != HEADER_BYTES + len {
        return Err(io::Error::other(format!("it has {actual} bytes, not {}", HEADER_BYTES + len)));
    }
    let mut header = [0; HEADER_BYTES as usize];
    file.read_exact(&mut header)?;
    let mut bytes = Vec::with_capacity(len as usize);
    file.read_to_end(&mut bytes)?;
    if header[..8] != *MAGIC || header[8..] != checksum(name, &bytes) {
        return Err(io::Error::other("its checksum is wrong"));
    }
    // Fails where the cache is not ours to change: the order of removal is then not ours either.
    let _ = file.set_modified(SystemTime::now());
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";

    fn cache(limit_blocks: u64) -> (tempfile::TempDir, RangeCache) {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = RangeCache::new(folder.path().join("ranges"), limit_blocks * BLOCK_BYTES);
        (folder, cache)
    }

    #[test]
    fn what_is_put_is_got_by_content_and_exact_range() {
        let (_folder, cache) = cache(100);
        cache.put(KEY, &(10..15), b"hello");
        assert_eq!(cache.get(KEY, &(10..15)).as_deref(), Some(&b"hello"[..]));
        assert_eq!(cache.get(KEY, &(10..14)), None);
        assert_eq!(cache.get("other", &(10..15)), None);
    }

    #[test]
    fn a_torn_changed_or_misplaced_entry_is_dropped() {
        let (_folder, cache) = cache(100);
        let path = cache.folder.join(entry_name(KEY, &(0..5)));
        type Damage<'a> = &'a dyn Fn(&mut Vec<u8>);
        let damage: [Damage; 5] = [
            &|entry| entry.truncate(20),
            &|entry| entry.push(0),
            &|entry| entry[44] ^= 1,
            &|entry| entry[20] ^= 1,
            &|entry| entry[0] ^= 1,
        ];
        for (index, damage) in damage.iter().enumerate() {
            cache.put(KEY, &(0..5), b"hello");
            let mut entry = fs::read(&path).expect("an entry");
            damage(&mut entry);
            fs::write(&path, entry).expect("written");
            assert_eq!(cache.get(KEY, &(0..5)), None, "damage {index}");
            assert!(!path.exists(), "damage {index}");
        }
        cache.put(KEY, &(0..5), b"hello");
        fs::rename(&path, cache.folder.join(entry_name(KEY, &(5..10)))).expect("renamed");
        assert_eq!(cache.get(KEY, &(5..10)), None);
    }

    #[test]
    fn the_entries_unused_for_longest_go_first_and_the_limit_holds() {
        let (_folder, cache) = cache(4);
        for start in 0..4 {
            cache.put(KEY, &(start..start + 3), b"abc");
        }
        assert!(cache.get(KEY, &(0..3)).is_some());
        cache.put(KEY, &(4..7), b"abc");
        cache.put(KEY, &(5..8), b"abc");
        let kept: Vec<u64> = (0..6).filter(|start| cache.get(KEY, &(*start..start + 3)).is_some()).collect();
        assert_eq!(kept, [0, 3, 4, 5]);
        cache.put(KEY, &(0..20_000), &[1; 20_000]);
        assert_eq!(cache.get(KEY, &(0..20_000)), None, "larger than the limit");
    }

    #[test]
    fn two_caches_on_one_folder_see_each_other_and_keep_the_limit_together() {
        let (folder, first) = cache(64);
        let second = RangeCache::new(folder.path().join("ranges"), 64 * BLOCK_BYTES);
        std::thread::scope(|scope| {
            for (cache, offset) in [(&first, 0), (&second, 1)] {
                scope.spawn(move || {
                    for start in (0..400u64).map(|n| 2 * n + offset) {
                        cache.put(KEY, &(start..start + 8), &start.to_le_bytes());
                        for near in start.saturating_sub(8)..start + 8 {
                            let got = cache.get(KEY, &(near..near + 8));
                            assert!(got.is_none_or(|bytes| bytes == near.to_le_bytes()));
                        }
                    }
                });
            }
        });
        // Of the entries made meanwhile those of the cache that ended first may all be gone.
        for (one, other, start) in [(&first, &second, 900), (&second, &first, 901)] {
            one.put(KEY, &(start..start + 8), b"seen yet");
            assert_eq!(other.get(KEY, &(start..start + 8)).as_deref(), Some(&b"seen yet"[..]));
        }
        let entries = fs::read_dir(&first.folder).expect("a folder").count();
        assert!((40..=64 + 8).contains(&entries), "{entries}");
    }

    #[test]
    fn a_folder_that_cannot_be_made_costs_the_cache_only() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("file");
        fs::write(&file, "").expect("written");
        let cache = RangeCache::new(file.join("ranges"), 1 << 20);
        cache.put(KEY, &(0..5), b"hello");
        assert_eq!(cache.get(KEY, &(0..5)), None);
    }
}
