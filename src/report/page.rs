//! The page of charts: one HTML file that holds its data, its code and its looks, and asks the network for nothing.

use super::RunReport;
use super::block::block;
use super::thin::thin;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const TEMPLATE: &str = include_str!("page/page.html");
/// uPlot 1.6.32 (MIT, see page/uplot-LICENSE) draws the charts.
const STYLE: &str = concat!(include_str!("page/uplot.css"), include_str!("page/page.css"));
const SCRIPT: &str = concat!(
    include_str!("page/uplot.js"),
    "\n",
    include_str!("page/data.js"),
    include_str!("page/charts.js"),
    include_str!("page/page.js")
);

/// Where the page gets its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// From itself.
    File,
    /// From the server that it came from, as the runs go on.
    Live,
}

/// Rows of all runs together: a page of 10 MB.
const MOST_ROWS: usize = 120_000;
/// However many runs there are, each keeps so many.
const FEWEST_ROWS: usize = 3_000;

/// A run as the page takes it, thinned to its share of the rows.
pub fn run_json(run: &RunReport, runs: usize) -> Value {
    let budget = (MOST_ROWS / runs.max(1)).max(FEWEST_ROWS);
    let rows = thin(&run.rows.clone().with_elapsed(), budget);
    json!({ "info": run.description.to_json(), "block": block(&rows) })
}

/// The page of `runs`; a live one begins without any.
pub fn html(runs: &[RunReport], source: Source) -> String {
    let names: Vec<&str> = runs.iter().map(|run| run.description.name.as_str()).collect();
    let title = match (source, names[..].split_first()) {
        (Source::Live, _) | (_, None) => "vrtrain".to_owned(),
        (Source::File, Some((first, []))) => format!("{first} - vrtrain"),
        (Source::File, Some((first, others))) => format!("{first} and {} more - vrtrain", others.len()),
    };
    let note = match source {
        Source::File => format!("Written by vrtrain {}.", env!("CARGO_PKG_VERSION")),
        Source::Live => "Read-only, live from the run folders.".to_owned(),
    };
    let data: Vec<Value> = runs.iter().map(|run| run_json(run, runs.len())).collect();
    // "<" could end the script element that holds the data.
    let data = json!({ "live": source == Source::Live, "runs": data }).to_string().replace('<', "\\u003c");
    let parts = [
        ("policy", policy(source)),
        ("title", escaped(&title)),
        ("note", note),
        ("data", data),
        ("style", STYLE.to_owned()),
        ("script", SCRIPT.to_owned()),
    ];
    // One pass over the template: what is filled in is never looked through for further places.
    let mut out = String::new();
    let mut rest = TEMPLATE;
    while let Some((before, after)) = rest.split_once("{{") {
        let (name, after) = after.split_once("}}").unwrap_or((after, ""));
        out.push_str(before);
        out.extend(parts.iter().find(|(own, _)| *own == name).map(|(_, text)| text.as_str()));
        rest = after;
    }
    out + rest
}

/// What the page may load: its own script and style, by their hashes, and the events of its server.
pub fn policy(source: Source) -> String {
    let hash = |text: &str| format!("'sha256-{}'", BASE64_STANDARD.encode(Sha256::digest(text.as_bytes())));
    let connect = match source {
        Source::File => "'none'",
        Source::Live => "'self'",
    };
    format!(
        "default-src 'none'; script-src {}; style-src {}; connect-src {connect}; base-uri 'none'; form-action 'none'",
        hash(SCRIPT),
        hash(STYLE)
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::super::{Description, Rows, State};
    use super::*;

    #[test]
    fn names_and_samples_cannot_break_out_of_the_page_and_nothing_is_loaded() {
        let evil = "</script><img src=x onerror=alert(1)>{{script}}";
        let sample = crate::train::Sample { step: 1, prompt: evil.into(), text: evil.into() };
        let description = Description {
            id: evil.into(),
            name: evil.into(),
            state: State::Finished,
            steps: Some(1),
            error: Some(evil.into()),
            config: vec![(evil.into(), evil.into())],
            samples: vec![sample],
        };
        let page = html(&[RunReport { description, rows: Rows::default() }], Source::File);
        assert!(!page.contains("<img"));
        assert_eq!(page.matches("</script>").count(), 2);
        assert!(page.contains("connect-src 'none'"));
        for word in ["{{policy", "{{title", "src=\"http", "href=\"http", "@import", "url("] {
            assert!(!page.contains(word), "{word}");
        }
    }
}
