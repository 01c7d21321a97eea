//! What the environment says: endpoint, token, cache folders, offline mode, stall time-out.

use super::{HubError, Result, RetryPolicy};
use reqwest::Url;
use reqwest::header::HeaderValue;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

const ENDPOINT: &str = "https://huggingface.co";
const RANGE_CACHE_BYTES: u64 = 8 << 30;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Online,
    /// Only what the caches hold.
    Offline,
}

/// Everything that a [`super::Hub`] is set up by.
#[derive(Clone, Debug)]
pub struct Settings {
    /// HF_ENDPOINT
    pub endpoint: Url,
    pub(super) token: Option<Token>,
    /// HF_HUB_OFFLINE
    pub mode: Mode,
    /// HF_HOME, else `huggingface` below XDG_CACHE_HOME or ~/.cache.
    pub home: PathBuf,
    /// HF_HUB_CACHE, else `hub` below `home`: whole files, shared with other Hugging Face tools.
    pub cache: PathBuf,
    /// HF_HUB_DOWNLOAD_TIMEOUT in seconds: a connection on which nothing comes for so long is given up.
    pub stall: Duration,
    pub retry: RetryPolicy,
    /// The most bytes that cached ranges take on the disk.
    pub range_cache_bytes: u64,
}

/// An access token. It is sent to the endpoint alone, and printed by nothing.
#[derive(Clone)]
pub(super) struct Token {
    pub header: HeaderValue,
    /// Where it comes from, for messages.
    pub source: String,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Token(from {})", self.source)
    }
}

impl Settings {
    /// Reads HF_ENDPOINT, HF_TOKEN (or the file HF_TOKEN_PATH, by default `token` in HF_HOME), HF_HOME, HF_HUB_CACHE,
    /// HF_HUB_OFFLINE and HF_HUB_DOWNLOAD_TIMEOUT. HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY are read by the
    /// connections themselves.
    pub fn from_env() -> Result<Self> {
        Self::from_variables(&|name| std::env::var(name).ok())
    }

    /// The same from any source of variables. A variable that is empty counts as absent.
    pub fn from_variables(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let read = |name: &str| variable(name).map(|v| v.trim().to_string()).filter(|v| !v.is_empty());
        let first = |names: &[&str]| names.iter().find_map(|name| read(name));
        let user = read("HOME").or_else(|| read("USERPROFILE")).map(PathBuf::from);
        let path = |text: String| match (text.strip_prefix("~/"), &user) {
            (Some(rest), Some(user)) => user.join(rest),
            _ => PathBuf::from(text),
        };
        let home = match (read("HF_HOME"), read("XDG_CACHE_HOME"), &user) {
            (Some(home), _, _) => path(home),
            (None, Some(caches), _) => path(caches).join("huggingface"),
            (None, None, Some(user)) => user.join(".cache").join("huggingface"),
            (None, None, None) => {
                return Err(setting("HF_HOME", "neither it nor HOME is set, so there is no place for the cache"));
            }
        };
        let cache = first(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"]).map_or_else(|| home.join("hub"), path);
        let offline = first(&["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"]);
        let mode = if offline.is_some_and(|text| is_true(&text)) { Mode::Offline } else { Mode::Online };
        let stall = match read("HF_HUB_DOWNLOAD_TIMEOUT") {
            None => Duration::from_secs(10),
            Some(text) => match text.parse::<f64>() {
                Ok(seconds) if seconds > 0.0 && seconds < 1e6 => Duration::from_secs_f64(seconds),
                _ => return Err(setting("HF_HUB_DOWNLOAD_TIMEOUT", &format!("`{text}` is not a number of seconds"))),
            },
        };
        let token = match first(&["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"]) {
            Some(text) => Some(Token::new(&text, "HF_TOKEN")?),
            None => token_of_file(&read("HF_TOKEN_PATH").map_or_else(|| home.join("token"), path))?,
        };
        let endpoint = endpoint(&read("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_string()))?;
        let retry = RetryPolicy::default();
        Ok(Self { endpoint, token, mode, home, cache, stall, retry, range_cache_bytes: RANGE_CACHE_BYTES })
    }

    /// Where the token comes from: a variable's name or a file.
    pub fn token_source(&self) -> Option<&str> {
        self.token.as_ref().map(|token| token.source.as_str())
    }

    /// What this program alone keeps: ranges and listings.
    pub(super) fn own_folder(&self) -> PathBuf {
        self.home.join("vrtrain")
    }
}

impl Token {
    fn new(text: &str, source: &str) -> Result<Self> {
        let mut header = HeaderValue::from_str(&format!("Bearer {text}"))
            .map_err(|_| setting(source, "the token has characters that no token has; copy it again"))?;
        header.set_sensitive(true);
        Ok(Self { header, source: source.to_string() })
    }
}

fn token_of_file(path: &Path) -> Result<Option<Token>> {
    match std::fs::read_to_string(path) {
        Ok(text) if text.trim().is_empty() => Ok(None),
        Ok(text) => Token::new(text.trim(), &path.display().to_string()).map(Some),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(HubError::cache("read the token file", path)(error)),
    }
}

fn endpoint(text: &str) -> Result<Url> {
    let bad = |problem: &str| setting("HF_ENDPOINT", &format!("`{text}` {problem}; expected e.g. {ENDPOINT}"));
    let url = Url::parse(text).map_err(|error| bad(&format!("is not a URL ({error})")))?;
    match (url.scheme(), url.host_str()) {
        ("http" | "https", Some(_)) if url.query().is_none() && url.fragment().is_none() => Ok(url),
        _ => Err(bad("is not the address of a hub")),
    }
}

fn setting(name: &str, problem: &str) -> HubError {
    HubError::Setting { name: name.to_string(), problem: problem.to_string() }
}

/// The words that the Python client takes for "yes".
fn is_true(text: &str) -> bool {
    ["1", "on", "yes", "true"].contains(&text.to_ascii_lowercase().as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Result<Settings> {
        Settings::from_variables(&|name| variables.iter().find(|v| v.0 == name).map(|v| v.1.to_string()))
    }

    #[test]
    fn folders_follow_the_order_of_the_python_client() -> Result<()> {
        let cache = |variables: &[(&str, &str)]| settings(variables).map(|s| s.cache);
        let mut variables = vec![("HOME", "/u")];
        for (more, expected) in [
            (("A", ""), "/u/.cache/huggingface/hub"),
            (("XDG_CACHE_HOME", "/x"), "/x/huggingface/hub"),
            (("HF_HOME", "~/h"), "/u/h/hub"),
            (("HUGGINGFACE_HUB_CACHE", "/old"), "/old"),
            (("HF_HUB_CACHE", "/new"), "/new"),
        ] {
            variables.push(more);
            assert_eq!(cache(&variables)?, PathBuf::from(expected));
        }
        assert_eq!(settings(&variables)?.own_folder(), PathBuf::from("/u/h/vrtrain"));
        assert!(matches!(settings(&[]), Err(HubError::Setting { .. })));
        Ok(())
    }

    #[test]
    fn the_token_comes_from_the_variable_before_the_file_and_is_never_printed() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let home = folder.path().to_str().expect("text");
        assert_eq!(settings(&[("HF_HOME", home)])?.token_source(), None);
        let file = folder.path().join("token");
        std::fs::write(&file, "hf_fromfile\n").expect("written");
        let from_file = settings(&[("HF_HOME", home)])?;
        assert_eq!(from_file.token_source(), file.to_str());
        assert_eq!(from_file.token.as_ref().map(|t| t.header.as_bytes()), Some(&b"Bearer hf_fromfile"[..]));
        let both = settings(&[("HF_HOME", home), ("HF_TOKEN", " hf_secret ")])?;
        assert_eq!(both.token.as_ref().map(|t| t.header.as_bytes()), Some(&b"Bearer hf_secret"[..]));
        assert!(!format!("{both:?} {:?}", both.token.as_ref().map(|t| &t.header)).contains("secret"));
        let elsewhere = settings(&[("HF_HOME", "/nowhere"), ("HF_TOKEN_PATH", file.to_str().expect("text"))])?;
        assert_eq!(elsewhere.token_source(), file.to_str());
        let error = settings(&[("HOME", "/u"), ("HF_TOKEN", "hf_se\ncret")]).map(|_| ()).map_err(|e| e.to_string());
        assert!(error.as_ref().is_err_and(|e| e.contains("HF_TOKEN") && !e.contains("cret")), "{error:?}");
        Ok(())
    }

    #[test]
    fn offline_understands_the_usual_words() -> Result<()> {
        for (text, mode) in
            [("1", Mode::Offline), ("True", Mode::Offline), ("YES", Mode::Offline), ("on", Mode::Offline)]
                .into_iter()
                .chain([("0", Mode::Online), ("false", Mode::Online), ("", Mode::Online)])
        {
            assert_eq!(settings(&[("HOME", "/u"), ("HF_HUB_OFFLINE", text)])?.mode, mode, "{text}");
        }
        Ok(())
    }

    #[test]
    fn a_bad_value_is_named() {
        for (name, value) in [
            ("HF_ENDPOINT", "huggingface.co"),
            ("HF_ENDPOINT", "ftp://huggingface.co"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "soon"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "0"),
        ] {
            let error = settings(&[("HOME", "/u"), (name, value)]).map(|_| ()).map_err(|e| e.to_string());
            assert!(error.as_ref().is_err_and(|e| e.contains(name) && e.contains(value)), "{error:?}");
        }
    }
}
