//! Byte ranges of a file on the hub.

use super::answer::Subject;
use super::source::Source;
use super::{Hub, HubError, HubFile, Mode, RepoId, Result};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;

/// A file on the hub that is read in ranges, from any number of threads.
pub struct RemoteFile {
    hub: Hub,
    source: Source,
}

impl Hub {
    /// A handle on `file` of a listing of `repo`. Nothing is fetched yet. Keep it: it remembers where the hub redirects
    /// to, which saves a request for each range.
    pub fn open(&self, repo: &RepoId, file: &HubFile) -> RemoteFile {
        let source = Source::new(&self.inner.settings.endpoint, repo, &file.path, file.size, file.identity());
        RemoteFile { hub: self.clone(), source }
    }
}

impl RemoteFile {
    /// The file's size in bytes.
    pub fn len(&self) -> u64 {
        self.source.size
    }

    pub fn is_empty(&self) -> bool {
        self.source.size == 0
    }

    pub fn path(&self) -> &str {
        &self.source.path
    }

    /// What the content is known by: its sha256, or the git blob id of a small file.
    pub fn identity(&self) -> &str {
        &self.source.identity
    }

    /// The bytes `range`: from the whole file where the cache has it, else from the cache of ranges, else fetched
    /// (with all patience) and put there.
    pub fn read(&self, range: Range<u64>) -> Result<Vec<u8>> {
        let what = || self.source.subject().to_string();
        let (start, end, size) = (range.start, range.end, self.len());
        if start > end || end > size {
            return Err(HubError::BadRange { what: what(), start, end, size });
        }
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let hub = &self.hub.inner;
        if let Some(whole) = hub.cache.whole_file(&self.source) {
            return read_range(&whole, &range).map_err(HubError::cache("read", whole));
        }
        if let Some(bytes) = hub.ranges.get(self.identity(), &range) {
            return Ok(bytes);
        }
        if hub.settings.mode == Mode::Offline {
            let what = format!("bytes {start}..{end} of {}", Subject::File(&self.source.repo, self.path()));
            return Err(HubError::Offline { what, cache: hub.settings.home.clone() });
        }
        let mut bytes = Vec::with_capacity((end - start) as usize);
        self.source.fetch(&hub.transport, range.clone(), &mut |part| {
            bytes.extend_from_slice(part);
            Ok(())
        })?;
        hub.ranges.put(self.identity(), &range, &bytes);
        Ok(bytes)
    }
}

fn read_range(path: &Path, range: &Range<u64>) -> std::io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(range.start))?;
    let mut bytes = vec![0; (range.end - range.start) as usize];
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}
