//! A small HTTP server for tests that answers as told: breaks bodies off, stalls, refuses, lies.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// A request as it came; header names in lower case.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    pub target: String,
    pub headers: Vec<(String, String)>,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|header| header.0 == name).map(|header| header.1.as_str())
    }

    /// The first and one past the last byte asked for.
    pub fn range(&self) -> Option<(usize, usize)> {
        let (first, last) = self.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse().ok()?, last.parse::<usize>().ok()? + 1))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    /// The connection closes after so many bytes of the body.
    DropAfter(usize),
    /// Nothing more comes after so many bytes, but the connection stays open.
    StallAfter(usize),
}

pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub fault: Fault,
}

impl Reply {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: Vec::new(), body: body.into(), fault: Fault::None }
    }

    pub fn header(mut self, name: &str, value: impl ToString) -> Self {
        self.headers.push((name.to_string(), value.to_string()));
        self
    }

    pub fn fault(mut self, fault: Fault) -> Self {
        self.fault = fault;
        self
    }

    /// The part of `content` that the request asks for, as 206, or all of it as 200.
    pub fn file(seen: &Seen, content: &[u8]) -> Self {
        match seen.range() {
            None => Self::new(200, content),
            Some((start, end)) => Self::new(206, &content[start..end])
                .header("Content-Range", format!("bytes {start}-{}/{}", end - 1, content.len())),
        }
    }
}

type Handler = dyn Fn(&Seen, usize) -> Reply + Send + Sync;

struct Shared {
    handler: Box<Handler>,
    seen: Mutex<Vec<Seen>>,
    stopped: AtomicBool,
    /// Wakes stalled connections when the server goes.
    stop: (Mutex<()>, Condvar),
}

pub struct Server {
    pub address: String,
    shared: Arc<Shared>,
}

impl Server {
    /// `handler` gets each request and how many came before it.
    pub fn start(handler: impl Fn(&Seen, usize) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = format!("http://{}", listener.local_addr().expect("an address"));
        let shared = Arc::new(Shared {
            handler: Box::new(handler),
            seen: Mutex::default(),
            stopped: AtomicBool::new(false),
            stop: Default::default(),
        });
        let server = Self { address, shared: shared.clone() };
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if shared.stopped.load(Ordering::SeqCst) {
                    break;
                }
                let shared = shared.clone();
                std::thread::spawn(move || answer(&shared, stream));
            }
        });
        server
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.shared.seen.lock().expect("the requests").clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        self.shared.stop.1.notify_all();
        // Wakes the listener.
        let _ = TcpStream::connect(self.address.trim_start_matches("http://"));
    }
}

/// One request a connection. A client that goes away is part of the tests, so failures to write are no matter.
fn answer(shared: &Shared, mut stream: TcpStream) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut line = String::new();
    let mut next_line = || {
        line.clear();
        reader.read_line(&mut line).ok()?;
        Some(line.trim_end().to_string())
    };
    let first = next_line()?;
    let mut words = first.split(' ').map(str::to_string);
    let mut seen = Seen { method: words.next()?, target: words.next()?, headers: Vec::new() };
    loop {
        let line = next_line()?;
        let Some((name, value)) = line.split_once(": ") else { break };
        seen.headers.push((name.to_lowercase(), value.to_string()));
    }
    let before = {
        let mut all = shared.seen.lock().ok()?;
        all.push(seen.clone());
        all.len() - 1
    };
    let reply = (shared.handler)(&seen, before);
    let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\n", reply.status);
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    if !head.contains("Content-Length: ") {
        head.push_str(&format!("Content-Length: {}\r\n", reply.body.len()));
    }
    stream.write_all(format!("{head}\r\n").as_bytes()).ok()?;
    if seen.method != "HEAD" {
        let sent = match reply.fault {
            Fault::None => reply.body.len(),
            Fault::DropAfter(bytes) | Fault::StallAfter(bytes) => bytes.min(reply.body.len()),
        };
        stream.write_all(&reply.body[..sent]).ok()?;
        stream.flush().ok()?;
        if let Fault::StallAfter(_) = reply.fault {
            let guard = shared.stop.0.lock().ok()?;
            let _ = shared.stop.1.wait_timeout(guard, Duration::from_secs(20)).ok()?;
        }
    }
    stream.shutdown(Shutdown::Write).ok()?;
    // Closing with unread input would reset the connection and take the answer along.
    let _ = stream.set_read_timeout(Some(Duration::from_secs(2)));
    let _ = reader.read_to_end(&mut Vec::new());
    Some(())
}
