//! The live display on the terminal.
//!
//! Between two drawings the cursor rests at the START of the display. When a terminal is resized it moves the cursor with
//! the text around it, so a drawing that begins at the cursor and clears what follows is right after every resize,
//! however the old lines were wrapped.

use super::layout::{Characters, Colours, Frame};
use std::io::Write;
use std::time::{Duration, Instant};

/// The display and what it shows.
pub struct Screen {
    colours: Colours,
    characters: Characters,
    frame: Option<Frame>,
    stage: Option<&'static str>,
    drawn: Option<Instant>,
}

/// Steps are drawn at most this often.
const DRAW_INTERVAL: Duration = Duration::from_millis(100);

impl Screen {
    /// A display with the colours and characters that the environment asks for.
    pub fn from_env() -> Self {
        let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let colours = if set("NO_COLOR").is_some() { Colours::None } else { Colours::Ansi };
        // The first of these that is set decides, as in the C library.
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().find_map(set).unwrap_or_default().to_lowercase();
        let unicode = locale.contains("utf-8") || locale.contains("utf8");
        let characters = if unicode { Characters::Unicode } else { Characters::Ascii };
        Self { colours, characters, frame: None, stage: None, drawn: None }
    }

    /// Shows a step; steps in quick succession are passed over.
    pub fn show(&mut self, frame: Frame) {
        let last = frame.step == frame.total;
        self.frame = Some(frame);
        if last || self.drawn.is_none_or(|drawn| drawn.elapsed() >= DRAW_INTERVAL) {
            self.draw();
        }
    }

    /// Says what goes on besides steps, at once if it is something that lasts.
    pub fn set_stage(&mut self, stage: Option<&'static str>) {
        self.stage = stage;
        if stage.is_some() {
            self.draw();
        }
    }

    /// Prints a line that stays above the display.
    pub fn print_above(&mut self, text: &str) {
        write(&format!("\r\u{1b}[J{text}\n"));
        self.draw();
    }

    /// Takes the display off.
    pub fn clear(&mut self) {
        if self.drawn.take().is_some() {
            write("\r\u{1b}[J");
        }
        self.frame = None;
    }

    fn draw(&mut self) {
        let Some(frame) = &self.frame else { return };
        let (columns, rows) = size();
        // The last column stays free: some terminals wrap as soon as it is written.
        let columns = columns.saturating_sub(1).max(1);
        let lines = frame.lines(columns, self.characters, self.stage);
        let lines = &lines[..lines.len().min(rows.saturating_sub(1).max(1))];
        let text: Vec<String> = lines.iter().map(|line| line.render(columns, self.colours)).collect();
        let back = match lines.len() {
            1 => String::new(),
            count => format!("\u{1b}[{}A", count - 1),
        };
        write(&format!("\r{}\u{1b}[J{back}\r", text.join("\u{1b}[K\r\n")));
        self.drawn = Some(Instant::now());
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // A panic's message must not be written into the display.
        self.clear();
    }
}

/// Columns and rows of the terminal.
fn size() -> (usize, usize) {
    match terminal_size::terminal_size_of(std::io::stderr()) {
        Some((terminal_size::Width(columns), terminal_size::Height(rows))) if columns > 0 && rows > 0 => {
            (columns.into(), rows.into())
        }
        _ => (80, 24),
    }
}

/// One write a drawing, so that nothing flickers. A terminal that is gone must not end a run of days.
fn write(text: &str) {
    let mut stderr = std::io::stderr().lock();
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}
