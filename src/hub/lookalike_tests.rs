//! The client against the hub's look-alike (a Python server with the hub's real schemas) and beside the Python client.
//!
//! VRTRAIN_SHARED names the folder that holds `hub/hubserver.py`; without it these tests say that they skip.

use super::*;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// The look-alike, running; it ends with this value.
struct Lookalike {
    child: Child,
    endpoint: String,
    root: PathBuf,
    home: tempfile::TempDir,
}

impl Lookalike {
    fn start(arguments: &[&str]) -> Option<Self> {
        let Ok(shared) = std::env::var("VRTRAIN_SHARED") else {
            eprintln!("skipped: VRTRAIN_SHARED is not set");
            return None;
        };
        let root = Path::new(&shared).join("hub");
        let child = Command::new("python3")
            .arg(root.join("hubserver.py"))
            .arg(&root)
            .args(["--seconds", "60"])
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("python3 runs");
        let home = tempfile::tempdir().expect("a folder");
        let mut server = Self { child, endpoint: String::new(), root, home };
        let mut line = String::new();
        let stdout = server.child.stdout.take().expect("a pipe");
        BufReader::new(stdout).read_line(&mut line).expect("a line");
        let ready: serde_json::Value = serde_json::from_str(&line).expect("its addresses");
        server.endpoint = ready["endpoint"].as_str().expect("an address").to_string();
        Some(server)
    }

    fn hub(&self, more: &[(&str, &str)]) -> Hub {
        let variable = |name: &str| match name {
            "HF_ENDPOINT" => Some(self.endpoint.clone()),
            "HF_HOME" => self.home.path().to_str().map(str::to_string),
            _ => more.iter().find(|variable| variable.0 == name).map(|variable| variable.1.to_string()),
        };
        let mut settings = Settings::from_variables(&variable).expect("settings");
        settings.retry.first_wait = Duration::from_millis(5);
        Hub::new(settings).expect("a client")
    }

    fn on_disk(&self, repo: &RepoId, path: &str) -> Vec<u8> {
        let kind = if repo.kind == RepoKind::Model { "models" } else { "datasets" };
        let revision = match repo.revision.as_str() {
            "main" => String::new(),
            revision => format!("@{}", revision.replace('/', "---")),
        };
        std::fs::read(self.root.join(kind).join(format!("{}{revision}", repo.id)).join(path)).expect("a file")
    }

    /// Lists `repo`, then reads every file in four ranges and downloads it too: all bytes as on the disk.
    fn assert_serves(&self, hub: &Hub, repo: &RepoId, files: usize) {
        let listing = hub.list(repo).expect("a listing");
        assert_eq!(listing.files.len(), files);
        assert!(listing.files.is_sorted_by(|a, b| a.path < b.path));
        for file in &listing.files {
            let expected = self.on_disk(repo, &file.path);
            let remote = hub.open(repo, file);
            assert_eq!(remote.len(), expected.len() as u64);
            let cuts: Vec<u64> = (0..=4).map(|n| remote.len() * n / 4).collect();
            // The last part first, as a reader of parquet does.
            let parts: Vec<Vec<u8>> =
                cuts.windows(2).rev().map(|cut| remote.read(cut[0]..cut[1]).expect("bytes")).collect();
            assert!(parts.into_iter().rev().flatten().eq(expected.iter().copied()), "{}", file.path);
            let path = hub.download(repo, &file.path).expect("a file");
            assert!(std::fs::read(path).expect("bytes") == expected, "{}", file.path);
        }
    }
}

impl Drop for Lookalike {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn dataset(text: &str) -> RepoId {
    RepoId::parse(RepoKind::Dataset, text).expect("an id")
}

fn model(text: &str) -> RepoId {
    RepoId::parse(RepoKind::Model, text).expect("an id")
}

#[test]
fn listings_in_pages_odd_names_empty_files_and_other_revisions_arrive_as_on_disk() {
    let Some(server) = Lookalike::start(&["--page-size", "2"]) else { return };
    let hub = server.hub(&[]);
    server.assert_serves(&hub, &dataset("HuggingFaceFW/fineweb-edu"), 5);
    server.assert_serves(&hub, &dataset("vrtrain-test/edge"), 3);
    server.assert_serves(&hub, &dataset("openai/gsm8k@refs/convert/parquet"), 2);
    server.assert_serves(&hub, &model("openai-community/gpt2"), 5);
    let found = hub.list(&dataset("HuggingFaceFW/fineweb-edu")).and_then(|l| l.matching("sample/10BT/*.parquet"));
    assert_eq!(found.expect("files").len(), 4);
}

#[test]
fn bytes_are_the_same_through_every_fault() {
    let faults: [&[&str]; 6] = [
        &["--drop-after", "100000", "--drop-every", "1"],
        &["--fail-first", "2"],
        &["--cdn-fail-first", "4", "--cdn-fail-status", "403"],
        &["--cdn-fail-first", "4", "--cdn-fail-status", "503"],
        &["--cdn-fail-first", "4", "--cdn-fail-status", "429"],
        &["--no-cdn", "--drop-after", "65536", "--drop-every", "3"],
    ];
    std::thread::scope(|scope| {
        for fault in faults {
            scope.spawn(move || {
                let Some(server) = Lookalike::start(fault) else { return };
                server.assert_serves(&server.hub(&[]), &dataset("HuggingFaceFW/fineweb-edu"), 5);
            });
        }
    });
}

#[test]
fn tokens_and_renamed_repositories_are_handled() {
    let Some(server) = Lookalike::start(&["--token", "hf_right", "--alias", "gpt2=openai-community/gpt2"]) else {
        return;
    };
    let right = server.hub(&[("HF_TOKEN", "hf_right")]);
    let listing = right.list(&model("gpt2")).expect("a listing");
    assert_eq!(listing.files.len(), 5);
    let config = right.download(&model("gpt2"), "config.json").expect("a file");
    assert!(config.ends_with(Path::new("snapshots").join(&listing.commit_sha).join("config.json")));
    server.assert_serves(&right, &model("vrtrain-test/stories260K"), 3);

    let repo = model("vrtrain-test/stories260K");
    assert!(matches!(server.hub(&[]).list(&repo), Err(HubError::Gated { .. })));
    assert!(matches!(server.hub(&[("HF_TOKEN", "hf_wrong")]).list(&repo), Err(HubError::Unauthorized { .. })));
    assert!(matches!(right.list(&model("o/missing")), Err(HubError::RepoNotFound { .. })));
    assert!(matches!(right.list(&model("openai-community/gpt2@v9")), Err(HubError::RevisionNotFound { .. })));
    assert!(matches!(right.download(&repo, "missing.json"), Err(HubError::FileMissing { .. })));
}

#[test]
fn what_was_fetched_once_is_there_offline() {
    let Some(server) = Lookalike::start(&[]) else { return };
    let repo = dataset("HuggingFaceFW/fineweb-edu");
    let online = server.hub(&[]);
    let listing = online.list(&repo).expect("a listing");
    let shard = &listing.files[2];
    let bytes = online.open(&repo, shard).read(1000..500_000).expect("bytes");
    let readme = online.download(&repo, "README.md").expect("a file");
    let offline = server.hub(&[("HF_HUB_OFFLINE", "1")]);
    assert_eq!(offline.list(&repo).expect("a listing"), listing);
    assert!(offline.open(&repo, shard).read(1000..500_000).expect("bytes") == bytes);
    assert_eq!(offline.download(&repo, "README.md").expect("a file"), readme);
    assert!(matches!(offline.download(&repo, &shard.path), Err(HubError::Offline { .. })));
    assert!(matches!(offline.list(&model("openai-community/gpt2")), Err(HubError::Offline { .. })));
    // Without the stored listing, what the cache holds is listed.
    std::fs::remove_dir_all(server.home.path().join("vrtrain/listings")).expect("removed");
    let held = offline.list(&repo).expect("a listing");
    assert_eq!((held.commit_sha, held.files), (listing.commit_sha.clone(), vec![listing.files[0].clone()]));
}

/// Runs a script with the Python client; None where that is not installed.
fn python(server: &Lookalike, script: &str) -> Option<String> {
    let program = std::env::var("VRTRAIN_PYTHON").unwrap_or_else(|_| "python3".into());
    let output = Command::new(program)
        .args(["-c", script])
        .env("HF_ENDPOINT", &server.endpoint)
        .env("HF_HOME", server.home.path())
        .env("HF_HUB_DISABLE_TELEMETRY", "1")
        .output()
        .ok()?;
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if stderr.contains("No module named 'huggingface_hub'") {
        eprintln!("skipped: the Python package huggingface_hub is not installed (VRTRAIN_PYTHON names another Python)");
        return None;
    }
    assert!(output.status.success(), "{stderr}");
    Some(stdout.trim().to_string())
}

#[test]
fn the_cache_is_shared_with_the_python_client_both_ways() {
    let Some(server) = Lookalike::start(&[]) else { return };
    let repo = model("vrtrain-test/stories260K");
    let fetch = |file: &str, options: &str| {
        let call = format!("hf_hub_download('vrtrain-test/stories260K', '{file}'{options})");
        python(&server, &format!("from huggingface_hub import hf_hub_download; print({call})"))
    };
    let Some(theirs) = fetch("model.safetensors", "") else { return };
    let offline = server.hub(&[("HF_HUB_OFFLINE", "1")]);
    assert_eq!(offline.download(&repo, "model.safetensors").expect("their file"), Path::new(&theirs));
    let file = &offline.list(&repo).expect("their files").files[0];
    assert_eq!(offline.open(&repo, file).read(0..8).expect("bytes"), &std::fs::read(&theirs).expect("bytes")[..8]);
    let ours = server.hub(&[]).download(&repo, "tokenizer.json").expect("our file");
    assert_eq!(fetch("tokenizer.json", ", local_files_only=True").as_deref(), ours.to_str());
}
