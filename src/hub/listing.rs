//! Which files a repository holds, with sizes and hashes, and which of them match a pattern.

use super::answer::Subject;
use super::http::unexpected;
use super::repo::check_path;
use super::{Hub, HubError, Mode, RepoId, Result};
use globset::GlobBuilder;
use reqwest::Url;
use reqwest::header::{HeaderMap, LINK};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::Write;
use std::path::PathBuf;

/// A file as the hub lists it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HubFile {
    pub path: String,
    /// Bytes
    pub size: u64,
    /// Of the content; files kept in git itself have none.
    pub sha256: Option<String>,
    /// Git's id of the blob: the content's, or for a large file that of its pointer.
    pub git_oid: String,
}

impl HubFile {
    /// What the content is known by in caches.
    pub fn identity(&self) -> &str {
        self.sha256.as_deref().unwrap_or(&self.git_oid)
    }
}

/// The files of a repository at a revision, sorted by path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listing {
    pub repo: RepoId,
    pub commit_sha: String,
    pub files: Vec<HubFile>,
}

#[derive(Deserialize)]
struct RepoInfo {
    sha: String,
}

#[derive(Deserialize)]
struct TreeEntry {
    #[serde(rename = "type")]
    kind: String,
    oid: String,
    #[serde(default)]
    size: u64,
    path: String,
    lfs: Option<LargeFile>,
}

#[derive(Deserialize)]
struct LargeFile {
    oid: String,
    size: u64,
}

impl Hub {
    /// The files of `repo`. Offline: the listing of the last run online, else the files in the cache.
    pub fn list(&self, repo: &RepoId) -> Result<Listing> {
        let stored = self.stored_listing(repo);
        if self.inner.settings.mode == Mode::Offline {
            let known = match read_listing(&stored, repo) {
                Some(listing) => Some(listing),
                None => self.inner.cache.listing(repo)?,
            };
            let what = || format!("the list of files of {repo}");
            return known.ok_or_else(|| HubError::Offline { what: what(), cache: self.inner.settings.home.clone() });
        }
        let listing = self.fetch_listing(repo)?;
        if let Err(error) = write_listing(&stored, &listing) {
            tracing::warn!("{repo} will not be known offline: cannot write {}: {error}", stored.display());
        }
        Ok(listing)
    }

    fn fetch_listing(&self, repo: &RepoId) -> Result<Listing> {
        let (transport, subject) = (&self.inner.transport, Subject::Repo(repo));
        let (info, _) = transport.json::<RepoInfo>(&repo.api_url(transport.endpoint(), "revision"), subject)?;
        let mut url = repo.api_url(transport.endpoint(), "tree");
        url.query_pairs_mut().append_pair("recursive", "true");
        let mut files = Vec::new();
        loop {
            let (page, headers) = transport.json::<Vec<TreeEntry>>(&url, subject)?;
            for entry in page.into_iter().filter(|entry| entry.kind == "file") {
                check_path(&entry.path)?;
                let (size, sha256) = match entry.lfs {
                    Some(large) => (large.size, Some(large.oid)),
                    None => (entry.size, None),
                };
                files.push(HubFile { path: entry.path, size, sha256, git_oid: entry.oid });
            }
            match next_page(&url, transport.endpoint(), &headers) {
                Some(next) if next == url => return Err(unexpected(&subject, "a page links to itself".into())),
                Some(next) => url = next,
                None => break,
            }
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        files.dedup();
        Ok(Listing { repo: repo.clone(), commit_sha: info.sha, files })
    }

    fn stored_listing(&self, repo: &RepoId) -> PathBuf {
        let name = format!("{}.json", repo.revision.replace('%', "%25").replace('/', "%2F"));
        self.inner.settings.own_folder().join("listings").join(repo.folder()).join(name)
    }
}

impl Listing {
    /// The files that match `pattern`: `*` stays within a folder, `**` crosses folders, also `?`, `[..]`, `{a,b}`.
    /// A name that is there is always taken as it stands.
    pub fn matching(&self, pattern: &str) -> Result<Vec<HubFile>> {
        if let Some(file) = self.files.iter().find(|file| file.path == pattern) {
            return Ok(vec![file.clone()]);
        }
        let glob = GlobBuilder::new(pattern).literal_separator(true).build().map_err(|error| {
            let problem = error.kind().to_string();
            HubError::BadPattern { pattern: pattern.to_string(), problem }
        })?;
        let matcher = glob.compile_matcher();
        let found: Vec<HubFile> = self.files.iter().filter(|file| matcher.is_match(&file.path)).cloned().collect();
        if found.is_empty() {
            let (repo, pattern) = (self.repo.to_string(), pattern.to_string());
            return Err(HubError::NoMatch { near: self.near(&pattern), repo, pattern });
        }
        Ok(found)
    }

    /// Names that may have been meant.
    fn near(&self, pattern: &str) -> String {
        let mut scored: Vec<(f64, &str)> = self
            .files
            .iter()
            .map(|file| (strsim::normalized_damerau_levenshtein(pattern, &file.path), file.path.as_str()))
            .collect();
        scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
        let names: Vec<&str> = scored.iter().take(5).map(|scored| scored.1).collect();
        match names.len() {
            0 => "it holds no files".to_string(),
            _ => format!("of its {} files the nearest are {}", self.files.len(), names.join(", ")),
        }
    }
}

/// The page that `Link: <...>; rel="next"` names, always asked of the endpoint: a mirror may pass on the hub's links.
fn next_page(url: &Url, endpoint: &Url, headers: &HeaderMap) -> Option<Url> {
    let links = headers.get_all(LINK).iter().filter_map(|value| value.to_str().ok());
    let next = links.flat_map(|value| value.split(",")).find(|link| link.contains("rel=\"next\""))?;
    let target = next.split_once('<')?.1.split_once('>')?.0;
    let next = url.join(target).ok()?;
    if next.origin() == endpoint.origin() {
        return Some(next);
    }
    let mut page = url.clone();
    page.set_query(next.query());
    Some(page)
}

fn read_listing(path: &PathBuf, repo: &RepoId) -> Option<Listing> {
    let text = fs::read(path).ok()?;
    match serde_json::from_slice::<Listing>(&text) {
        Ok(listing) if listing.repo == *repo => Some(listing),
        _ => {
            tracing::warn!("{} is not a listing of {repo}; going by the files in the cache", path.display());
            None
        }
    }
}

fn write_listing(path: &PathBuf, listing: &Listing) -> std::io::Result<()> {
    let folder = path.parent().ok_or(std::io::ErrorKind::InvalidInput)?;
    fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(&serde_json::to_vec(listing)?)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::RepoKind;
    use super::*;

    fn listing(paths: &[&str]) -> Listing {
        let file = |path: &&str| HubFile { path: path.to_string(), size: 1, sha256: None, git_oid: "00".into() };
        let repo = RepoId::parse(RepoKind::Dataset, "o/n").expect("an id");
        Listing { repo, commit_sha: "0".repeat(40), files: paths.iter().map(file).collect() }
    }

    #[test]
    fn patterns_select_as_in_the_shell() -> Result<()> {
        let listing = listing(&["README.md", "a[1].txt", "sample/100BT/0.parquet", "sample/10BT/0.parquet"]);
        for (pattern, expected) in [
            ("sample/10BT/*.parquet", &["sample/10BT/0.parquet"][..]),
            ("**/*.parquet", &["sample/100BT/0.parquet", "sample/10BT/0.parquet"]),
            ("*.md", &["README.md"]),
            ("**/*.md", &["README.md"]),
            ("sample/{10BT,350BT}/?.parquet", &["sample/10BT/0.parquet"]),
            ("a[1].txt", &["a[1].txt"]),
        ] {
            let found: Vec<String> = listing.matching(pattern)?.into_iter().map(|file| file.path).collect();
            assert_eq!(found, expected, "{pattern}");
        }
        Ok(())
    }

    #[test]
    fn a_pattern_without_a_match_names_what_is_near() {
        let listing = listing(&["README.md", "sample/10BT/000_00000.parquet", "z"]);
        let error = listing.matching("sample/10B/*.parquet").map_err(|error| error.to_string());
        assert!(error.as_ref().is_err_and(|e| e.contains("nearest are sample/10BT/000_00000.parquet")), "{error:?}");
        assert!(matches!(listing.matching("a[b"), Err(HubError::BadPattern { .. })));
    }

    #[test]
    fn the_next_page_is_asked_of_the_endpoint_whatever_host_the_link_names() {
        let endpoint = Url::parse("https://mirror.example").expect("a URL");
        let url = endpoint.join("/api/models/o/n/tree/main?recursive=true").expect("a URL");
        let next = |link: &str| {
            let headers = HeaderMap::from_iter([(LINK, link.parse().expect("a header"))]);
            next_page(&url, &endpoint, &headers).map(|url| url.to_string())
        };
        let page = Some("https://mirror.example/api/models/o/n/tree/main?recursive=true&cursor=A%3D".to_string());
        assert_eq!(
            next("<https://mirror.example/api/models/o/n/tree/main?recursive=true&cursor=A%3D>; rel=\"next\""),
            page
        );
        assert_eq!(
            next("<https://hub.example/api/models/o/n/tree/main?recursive=true&cursor=A%3D>; rel=\"next\""),
            page
        );
        assert_eq!(next("<?recursive=true&cursor=A%3D>; rel=\"next\""), page);
        assert_eq!(next("<https://mirror.example/first>; rel=\"first\""), None);
    }
}
