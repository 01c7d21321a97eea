//! Whole files: resumed from the part that is there, compared with size and hash, and only then given their name.

use super::answer::Subject;
use super::cache::has_size;
use super::hash::{Hasher, is_hash};
use super::http::{FileFacts, Follow, Request, unexpected};
use super::repo::check_path;
use super::source::Source;
use super::{Hub, HubError, Mode, RepoId, Result};
use reqwest::Method;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const REPORT_EVERY: Duration = Duration::from_secs(10);

/// What the hub says about a file before its body is fetched.
struct FileInfo {
    commit: String,
    identity: String,
    size: u64,
}

impl Hub {
    /// The file `path` of `repo` on this machine: from the cache if it is there and current, else fetched into it.
    pub fn download(&self, repo: &RepoId, path: &str) -> Result<PathBuf> {
        check_path(path)?;
        let (cache, offline) = (&self.inner.cache, self.inner.settings.mode == Mode::Offline);
        if offline || repo.is_pinned() {
            match cache.find(repo, path) {
                Some(found) => return Ok(found),
                None if offline => {
                    let what = Subject::File(repo, path).to_string();
                    return Err(HubError::Offline { what, cache: cache.root().to_path_buf() });
                }
                None => {}
            }
        }
        let info = self.file_info(repo, path)?;
        let blob = cache.blob(repo, &info.identity);
        if !has_size(&blob, info.size) {
            let part = blob.with_file_name(format!("{}.incomplete", info.identity));
            let patience = self.inner.settings.retry.patience;
            let _lock = cache.lock(repo, &info.identity, &part, patience)?;
            // Another process may have fetched it while we waited.
            if !has_size(&blob, info.size) {
                self.fetch_file(repo, path, &info, &part)?;
                std::fs::rename(&part, &blob).map_err(HubError::cache("rename the finished download to", &blob))?;
            }
        }
        cache.link(repo, &info.commit, path, &blob)
    }

    fn file_info(&self, repo: &RepoId, path: &str) -> Result<FileInfo> {
        let (transport, subject) = (&self.inner.transport, Subject::File(repo, path));
        let url = repo.resolve_url(transport.endpoint(), path);
        let request = Request { method: Method::HEAD, url: &url, range: None, follow: Follow::EndpointOnly, subject };
        let FileFacts { commit, etag, size } = transport.send_with_retries(&request)?.facts;
        let lacks = |what: &str| unexpected(&subject, format!("the hub names no {what}"));
        let commit = commit.filter(|commit| check_path(commit).is_ok()).ok_or_else(|| lacks("commit"))?;
        let identity = etag.filter(|etag| is_hash(etag)).ok_or_else(|| lacks("hash of the file"))?;
        Ok(FileInfo { commit, identity, size: size.ok_or_else(|| lacks("size of the file"))? })
    }

    /// Fills `part`. What a former run left there is continued; if the whole is then wrong, it is fetched from the
    /// start once more.
    fn fetch_file(&self, repo: &RepoId, path: &str, info: &FileInfo, part: &Path) -> Result<()> {
        let source = Source::new(&self.inner.settings.endpoint, repo, path, info.size, &info.identity);
        loop {
            let mut file = Part::open(part, info)?;
            let resumed = file.len;
            tracing::info!("fetching {} ({} of {} bytes are here)", source.subject(), resumed, info.size);
            let mut reported = Instant::now();
            source.fetch(&self.inner.transport, resumed..info.size, &mut |bytes| {
                file.append(bytes)?;
                if reported.elapsed() > REPORT_EVERY {
                    reported = Instant::now();
                    tracing::info!("fetching {}: {} of {} bytes", source.subject(), file.len, info.size);
                }
                Ok(())
            })?;
            let hash = file.finish()?;
            if hash == info.identity {
                return Ok(());
            }
            std::fs::remove_file(part).map_err(HubError::cache("remove", part))?;
            let problem = format!("its hash is {hash}, not {}", info.identity);
            if resumed == 0 {
                return Err(HubError::Corrupt { what: source.subject().to_string(), problem });
            }
            tracing::warn!("{}: {problem}; fetching it from the start", source.subject());
        }
    }
}

/// A download in progress, hashed as it grows.
struct Part<'a> {
    path: &'a Path,
    file: File,
    len: u64,
    hasher: Hasher,
}

impl<'a> Part<'a> {
    /// Continues `path`, or begins it.
    fn open(path: &'a Path, info: &FileInfo) -> Result<Self> {
        let open = || {
            std::fs::create_dir_all(path.parent().unwrap_or(path))?;
            File::options().create(true).read(true).append(true).open(path)
        };
        let mut file = open().map_err(HubError::cache("write to", path))?;
        let mut hasher = Hasher::like(&info.identity, info.size);
        let mut len = hasher.update_from(&mut file).map_err(HubError::cache("read", path))?;
        if len > info.size {
            file.set_len(0).map_err(HubError::cache("truncate", path))?;
            (hasher, len) = (Hasher::like(&info.identity, info.size), 0);
        }
        Ok(Self { path, file, len, hasher })
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(HubError::cache("write to", self.path))?;
        self.hasher.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Makes it last, and returns its hash.
    fn finish(self) -> Result<String> {
        self.file.sync_all().map_err(HubError::cache("write to", self.path))?;
        Ok(self.hasher.finish())
    }
}
