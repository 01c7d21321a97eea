//! The live display as lines of text that fit a terminal's width.

use super::sparkline::{History, Scale};

/// What a piece of text is; its colour follows from that. No meaning hangs on a colour alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tone {
    Plain,
    Label,
    Strong,
    /// The curve of the loss, and the bar.
    Loss,
    /// The curve of the gate.
    Gate,
}

/// One line of pieces; each character takes one column.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Line(Vec<(Tone, String)>);

impl Line {
    pub fn put(mut self, tone: Tone, text: &str) -> Self {
        self.0.push((tone, text.to_owned()));
        self
    }

    /// Columns that the line takes.
    pub fn width(&self) -> usize {
        self.0.iter().map(|(_, text)| text.chars().count()).sum()
    }

    /// The text, cut after `columns`, with escape sequences where there are colours.
    pub fn render(&self, columns: usize, colours: Colours) -> String {
        let mut left = columns;
        let mut out = String::new();
        for (tone, text) in &self.0 {
            let cut: String = text.chars().take(left).collect();
            left -= cut.chars().count();
            // Cyan and magenta stay apart for every common kind of colour blindness, on dark and on light ground.
            let code = match (colours, tone) {
                (Colours::None, _) | (_, Tone::Plain) => None,
                (_, Tone::Label) => Some("2"),
                (_, Tone::Strong) => Some("1"),
                (_, Tone::Loss) => Some("36"),
                (_, Tone::Gate) => Some("35"),
            };
            match code {
                Some(code) if !cut.is_empty() => out.push_str(&format!("\u{1b}[{code}m{cut}\u{1b}[0m")),
                _ => out.push_str(&cut),
            }
        }
        out
    }
}

/// Whether escape sequences for colours are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colours {
    Ansi,
    None,
}

/// The characters that a terminal can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Characters {
    Unicode,
    Ascii,
}

impl Characters {
    fn marks(self) -> &'static [char] {
        match self {
            Self::Unicode => &['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'],
            Self::Ascii => &['_', '.', '-', '=', '+', '*', '#'],
        }
    }

    /// Done, not done.
    fn bar(self) -> (&'static str, &'static str) {
        match self {
            Self::Unicode => ("━", "─"),
            Self::Ascii => ("#", "-"),
        }
    }
}

/// What the live display shows of a step.
#[derive(Clone, Debug)]
pub struct Frame {
    pub step: u64,
    pub total: u64,
    pub left: String,
    /// Numbers, and the curve beside them.
    pub curves: Vec<(Line, Tone, History, Scale)>,
    /// Pieces that flow over as many lines as they need.
    pub parts: Vec<String>,
}

/// A curve or bar is not longer, however wide the terminal.
const LONGEST_CURVE: usize = 60;
/// A bar that is shorter tells nothing.
const SHORTEST_BAR: usize = 6;

impl Frame {
    /// The lines of a display of `columns`; `stage` says what goes on besides steps.
    pub fn lines(&self, columns: usize, characters: Characters, stage: Option<&str>) -> Vec<Line> {
        let mut lines = vec![self.first_line(columns, characters, stage)];
        for (numbers, tone, history, scale) in &self.curves {
            let room = columns.saturating_sub(numbers.width() + 2).min(LONGEST_CURVE);
            let curve = history.draw(room, *scale, characters.marks());
            lines.push(numbers.clone().put(Tone::Plain, "  ").put(*tone, &curve));
        }
        let mut flowing = Line::default();
        for part in &self.parts {
            if flowing.width() > 0 && flowing.width() + 3 + part.chars().count() > columns {
                lines.push(std::mem::take(&mut flowing));
            }
            if flowing.width() > 0 {
                flowing = flowing.put(Tone::Label, " | ");
            }
            flowing = flowing.put(Tone::Plain, part);
        }
        lines.push(flowing);
        lines
    }

    fn first_line(&self, columns: usize, characters: Characters, stage: Option<&str>) -> Line {
        let share = self.step as f64 / self.total.max(1) as f64;
        let head = format!("step {}/{} {:.1}% ", self.step, self.total, 100.0 * share);
        let tail = stage.map_or(format!(" {} left", self.left), |stage| format!(" {stage} ..."));
        let room = columns.saturating_sub(head.len() + tail.len()).min(LONGEST_CURVE);
        let line = Line::default().put(Tone::Strong, &head);
        if room < SHORTEST_BAR {
            return line.put(Tone::Plain, tail.trim_start());
        }
        let done = ((share * room as f64) as usize).min(room);
        let (full, empty) = characters.bar();
        let line = line.put(Tone::Loss, &full.repeat(done)).put(Tone::Label, &empty.repeat(room - done));
        line.put(Tone::Plain, &tail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame() -> Frame {
        let mut history = History::default();
        (0..300).for_each(|step| history.push(3.0 - f64::from(step) / 100.0));
        let numbers = Line::default().put(Tone::Label, "loss ").put(Tone::Strong, "0.8430");
        Frame {
            step: 12_345,
            total: 100_000,
            left: "01:02:03".into(),
            curves: vec![(numbers, Tone::Loss, history, Scale::Own)],
            parts: ["norm 0.862", "50 ms", "29.9k tok/s", "31% MFU", "1.20 GiB"].map(str::to_owned).to_vec(),
        }
    }

    #[test]
    fn no_line_is_wider_than_the_terminal_and_nothing_is_lost_at_usual_widths() {
        for columns in [1, 12, 20, 39, 59, 79, 199] {
            for stage in [None, Some("validating")] {
                let lines = frame().lines(columns, Characters::Unicode, stage);
                for line in &lines {
                    assert!(line.render(columns, Colours::None).chars().count() <= columns, "{columns}: {line:?}");
                    if columns >= 59 {
                        assert!(line.width() <= columns, "{columns}: {line:?}");
                    }
                }
                let text: Vec<String> = lines.iter().map(|line| line.render(columns, Colours::None)).collect();
                if columns >= 20 {
                    for part in frame().parts {
                        assert!(text.iter().any(|line| line.contains(&part)), "{columns}: {part}");
                    }
                }
            }
        }
    }

    #[test]
    fn without_colours_there_are_no_escape_sequences_and_without_unicode_only_ascii() {
        for line in frame().lines(79, Characters::Ascii, None) {
            assert!(line.render(79, Colours::None).is_ascii());
            assert!(!line.render(79, Colours::None).contains('\u{1b}'));
            assert!(line.render(79, Colours::Ansi).contains('\u{1b}') || line.width() == 0);
        }
    }
}
