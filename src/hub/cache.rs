//! The cache layout that all Hugging Face tools share: `{models|datasets}--owner--name/{blobs,refs,snapshots}`.
//!
//! `blobs` holds contents by hash, `refs` the commit of each branch, `snapshots/{commit}` links from names to blobs.

use super::hash::{Hasher, is_hash};
use super::repo::check_path;
use super::source::Source;
use super::{HubError, HubFile, Listing, RepoId, Result};
use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub(super) struct HubCache {
    root: PathBuf,
}

impl HubCache {
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The file `path` of `repo` as the cache has it at its revision.
    pub fn find(&self, repo: &RepoId, path: &str) -> Option<PathBuf> {
        let file = self.snapshot(repo, &self.commit(repo)?).join(path);
        // `metadata` follows the link, so that one to a blob that is gone does not count.
        fs::metadata(&file).is_ok_and(|metadata| metadata.is_file()).then_some(file)
    }

    /// The whole content of `source`, wherever the cache has it.
    pub fn whole_file(&self, source: &Source) -> Option<PathBuf> {
        let blob = self.blob(&source.repo, &source.identity);
        has_size(&blob, source.size).then_some(blob)
    }

    pub fn blob(&self, repo: &RepoId, identity: &str) -> PathBuf {
        self.root.join(repo.folder()).join("blobs").join(identity)
    }

    /// Links `path` at `commit` to its blob and notes the commit of the revision.
    pub fn link(&self, repo: &RepoId, commit: &str, path: &str, blob: &Path) -> Result<PathBuf> {
        let link = self.snapshot(repo, commit).join(path);
        let up = "../".repeat(path.split('/').count() + 1);
        let target = PathBuf::from(format!("{up}blobs")).join(blob.file_name().unwrap_or_default());
        if !fs::read_link(&link).is_ok_and(|old| old == target) || !link.exists() {
            replace_link(blob, &target, &link).map_err(HubError::cache("make the link", &link))?;
        }
        if repo.revision != commit {
            let reference = self.reference(repo);
            if fs::read_to_string(&reference).map(|old| old != commit).unwrap_or(true) {
                write_atomically(&reference, commit).map_err(HubError::cache("write", &reference))?;
            }
        }
        Ok(link)
    }

    /// Waits until no other process or thread fetches the blob `identity`. `part` is what that one writes to: the
    /// wait ends with an error when it has not grown for `patience`.
    pub fn lock(&self, repo: &RepoId, identity: &str, part: &Path, patience: Duration) -> Result<File> {
        // The Python client locks the same file in the same way.
        let path = self.root.join(".locks").join(repo.folder()).join(format!("{identity}.lock"));
        let open = || {
            fs::create_dir_all(path.parent().unwrap_or(&self.root))?;
            File::options().create(true).append(true).open(&path)
        };
        let file = open().map_err(HubError::cache("open", &path))?;
        let size = || fs::metadata(part).map(|metadata| metadata.len()).unwrap_or(0);
        let (mut seen, mut since, mut told) = (size(), Instant::now(), false);
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) => {
                    if !std::mem::replace(&mut told, true) {
                        tracing::warn!("waiting for another process that fetches {}", part.display());
                    }
                    if size() != seen {
                        (seen, since) = (size(), Instant::now());
                    } else if since.elapsed() > patience {
                        let stuck = io::Error::other("another process holds it and makes no progress; end that one");
                        return Err(HubError::cache("lock", &path)(stuck));
                    }
                    std::thread::sleep(Duration::from_millis(100));
                }
                Err(TryLockError::Error(error)) => {
                    tracing::warn!("no locks on {} ({error}): start one process at a time", path.display());
                    return Ok(file);
                }
            }
        }
    }

    /// What the cache holds of `repo`, for a run without a network that has no listing.
    pub fn listing(&self, repo: &RepoId) -> Result<Option<Listing>> {
        let Some(commit_sha) = self.commit(repo) else { return Ok(None) };
        let root = self.snapshot(repo, &commit_sha);
        if !root.is_dir() {
            return Ok(None);
        }
        let mut files = Vec::new();
        let mut folders = vec![root.clone()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).map_err(HubError::cache("list", &folder))? {
                let path = entry.map_err(HubError::cache("list", &folder))?.path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.is_file() {
                    files.push(cached_file(&root, &path).map_err(HubError::cache("read", &path))?);
                }
            }
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(Some(Listing { repo: repo.clone(), commit_sha, files }))
    }

    fn snapshot(&self, repo: &RepoId, commit: &str) -> PathBuf {
        self.root.join(repo.folder()).join("snapshots").join(commit)
    }

    fn reference(&self, repo: &RepoId) -> PathBuf {
        self.root.join(repo.folder()).join("refs").join(&repo.revision)
    }

    /// The commit of the revision, as far as the cache knows.
    fn commit(&self, repo: &RepoId) -> Option<String> {
        if repo.is_pinned() {
            return Some(repo.revision.clone());
        }
        let commit = fs::read_to_string(self.reference(repo)).ok()?.trim().to_string();
        check_path(&commit).is_ok().then_some(commit)
    }
}

pub(super) fn has_size(path: &Path, size: u64) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.len() == size)
}

fn write_atomically(path: &Path, text: &str) -> io::Result<()> {
    let folder = path.parent().ok_or(ErrorKind::InvalidInput)?;
    fs::create_dir_all(folder)?;
    let file = tempfile::NamedTempFile::new_in(folder)?;
    fs::write(file.path(), text)?;
    file.persist(path)?;
    Ok(())
}

/// Puts a link to `target` (relative to the link's folder) in place of whatever is at `link`.
fn replace_link(blob: &Path, target: &Path, link: &Path) -> io::Result<()> {
    let folder = link.parent().ok_or(ErrorKind::InvalidInput)?;
    fs::create_dir_all(folder)?;
    let made = tempfile::Builder::new().prefix(".link-").make_in(folder, |new| link_to(blob, target, new))?;
    made.into_temp_path().persist(link)?;
    Ok(())
}

#[cfg(unix)]
fn link_to(_: &Path, target: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

/// Links need rights on other systems.
#[cfg(not(unix))]
fn link_to(blob: &Path, _: &Path, link: &Path) -> io::Result<()> {
    fs::copy(blob, link).map(|_| ())
}

/// A file of a snapshot as the hub would list it. The link's target is named by the content's hash.
fn cached_file(root: &Path, file: &Path) -> io::Result<HubFile> {
    let parts = file.strip_prefix(root).unwrap_or(file).components();
    let path = parts.map(|part| part.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("/");
    let size = fs::metadata(file)?.len();
    let target = fs::read_link(file).ok().and_then(|target| Some(target.file_name()?.to_str()?.to_string()));
    let (sha256, git_oid) = match target {
        Some(name) if is_hash(&name) && name.len() == 64 => (Some(name.clone()), pointer_oid(&name, size)),
        Some(name) if is_hash(&name) => (None, name),
        // A copy, where links are not to be had.
        _ => (None, git_oid(file, size)?),
    };
    Ok(HubFile { path, size, sha256, git_oid })
}

/// Git's id of the pointer file that stands for a large file (its text is fixed by Git LFS's specification).
fn pointer_oid(sha256: &str, size: u64) -> String {
    let pointer = format!("version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n");
    let mut hasher = Hasher::git_blob(pointer.len() as u64);
    hasher.update(pointer.as_bytes());
    hasher.finish()
}

fn git_oid(file: &Path, size: u64) -> io::Result<String> {
    let mut hasher = Hasher::git_blob(size);
    hasher.update_from(&mut File::open(file)?)?;
    Ok(hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::super::RepoKind;
    use super::*;

    #[test]
    fn a_linked_file_is_found_by_name_and_listed_with_its_hash() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = HubCache::new(folder.path().to_path_buf());
        let repo = RepoId::parse(RepoKind::Dataset, "o/n")?;
        let (commit, identity) = ("c".repeat(40), "a".repeat(64));
        let blob = cache.blob(&repo, &identity);
        fs::create_dir_all(blob.parent().expect("a parent")).expect("made");
        fs::write(&blob, "text").expect("written");
        let link = cache.link(&repo, &commit, "x/y z/f.txt", &blob)?;
        assert_eq!(link, folder.path().join("datasets--o--n/snapshots").join(&commit).join("x/y z/f.txt"));
        assert_eq!(fs::read_link(&link).expect("a link"), Path::new("../../../../blobs").join(&identity));
        assert_eq!(fs::read_to_string(folder.path().join("datasets--o--n/refs/main")).expect("a ref"), commit);
        assert_eq!(cache.find(&repo, "x/y z/f.txt"), Some(link));
        assert_eq!(cache.find(&repo, "x"), None);
        let listing = cache.listing(&repo)?.expect("a listing");
        assert_eq!((listing.commit_sha, listing.files.len()), (commit, 1));
        assert_eq!(
            (listing.files[0].path.as_str(), listing.files[0].sha256.as_ref()),
            ("x/y z/f.txt", Some(&identity))
        );
        fs::remove_file(blob).expect("removed");
        assert_eq!(cache.find(&repo, "x/y z/f.txt"), None);
        Ok(())
    }

    #[test]
    fn a_lock_that_another_holds_without_progress_ends_in_an_error() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = HubCache::new(folder.path().to_path_buf());
        let repo = RepoId::parse(RepoKind::Model, "o/n")?;
        let part = folder.path().join("part");
        let wait = Duration::from_millis(50);
        let held = cache.lock(&repo, "id", &part, wait)?;
        assert!(matches!(cache.lock(&repo, "id", &part, wait), Err(HubError::Cache { action: "lock", .. })));
        drop(held);
        cache.lock(&repo, "id", &part, wait)?;
        Ok(())
    }
}
