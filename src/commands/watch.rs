//! `vrtrain watch`: the page of charts, live.

use super::Ending;
use crate::config::ConfigError;
use crate::report::find;
use crate::report::server::{Hosts, serve};
use anyhow::{Context, Result};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;

/// What the command line asked for.
#[derive(Clone, Debug)]
pub struct Options {
    pub runs: Vec<PathBuf>,
    /// The address to listen on; left out: 127.0.0.1, and requests by a loopback name alone.
    pub host: Option<IpAddr>,
    /// Left out: 7077, or any free port where that one is taken.
    pub port: Option<u16>,
}

const PORT: u16 = 7077;

/// Serves until Ctrl-C.
pub fn run(options: &Options) -> Result<Ending> {
    // A folder without runs is fine: they may come.
    find(&options.runs).map_err(|error| ConfigError::flag("RUN", format!("{error:#}")))?;
    let host = options.host.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    let hosts = if host.is_loopback() { Hosts::Loopback } else { Hosts::Any };
    let port = match options.port {
        Some(port) => port,
        None if TcpListener::bind((host, PORT)).is_ok() => PORT,
        None => 0,
    };
    if hosts == Hosts::Any {
        eprintln!("anyone who reaches {host} can read these runs");
    }
    serve(options.runs.clone(), SocketAddr::new(host, port), hosts, |address| {
        // Whoever started this may have closed stdout; the page is served all the same.
        let _ = writeln!(std::io::stdout(), "http://{address}/");
        eprintln!("open this address in a browser; Ctrl-C ends");
    })
    .context("cannot serve the page")?;
    Ok(Ending::Done)
}
