//! Pictures as SVG and PNG: curves with intervals, and differences with intervals.

use super::statistics::Estimate;
use crate::report::COLOURS;
use anyhow::{Context, Result, anyhow, ensure};
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// One curve.
#[derive(Clone, Debug, Default)]
pub struct Series {
    pub label: String,
    pub points: Vec<(f64, f64)>,
    /// (x, low, high): the interval around the curve; empty: none.
    pub band: Vec<(f64, f64, f64)>,
    pub stroke: Stroke,
}

/// How a curve is drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stroke {
    #[default]
    Line,
    /// A grey line: a limit to compare with.
    Limit,
}

/// How an axis counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    Linear,
    Log,
}

/// Curves over one pair of axes.
#[derive(Clone, Debug)]
pub struct Chart {
    pub title: String,
    pub x_label: String,
    pub y_label: String,
    pub x_scale: Scale,
    pub y_scale: Scale,
    pub series: Vec<Series>,
}

/// Estimates with their intervals, one a row, around zero.
#[derive(Clone, Debug)]
pub struct Forest {
    pub title: String,
    pub x_label: String,
    pub rows: Vec<(String, Estimate)>,
}

const SIZE: (u32, u32) = (960, 600);

type Area<'a, B> = DrawingArea<B, plotters::coord::Shift>;

/// The font that pictures are written in, the same on every machine.
fn font() -> Result<()> {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    let registered = *REGISTERED.get_or_init(|| {
        plotters::style::register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular()).is_ok()
    });
    ensure!(registered, "the embedded font cannot be read");
    Ok(())
}

/// Writes `path`.svg and `path`.png and gives both back.
fn write(path: &Path, picture: Picture) -> Result<[PathBuf; 2]> {
    font()?;
    let (svg, png) = (path.with_extension("svg"), path.with_extension("png"));
    let context = |path: &Path| format!("cannot draw {}", path.display());
    picture.on(SVGBackend::new(&svg, SIZE).into_drawing_area()).with_context(|| context(&svg))?;
    picture.on(BitMapBackend::new(&png, SIZE).into_drawing_area()).with_context(|| context(&png))?;
    Ok([svg, png])
}

/// What there is to draw.
#[derive(Clone, Copy)]
enum Picture<'a> {
    Chart(&'a Chart),
    Forest(&'a Forest),
}

impl Picture<'_> {
    fn on<B: DrawingBackend>(self, area: Area<B>) -> Result<()> {
        let drawn = match self {
            Self::Chart(chart) => chart.draw(&area),
            Self::Forest(forest) => forest.draw(&area),
        };
        // plotters' error types hold the backend's, which cannot leave this function.
        drawn.map_err(|error| anyhow!("{error}"))?;
        area.present().map_err(|error| anyhow!("{error}"))
    }
}

impl Chart {
    /// Writes `path`.svg and `path`.png.
    ///
    /// # Errors
    /// When no point can be drawn (none is finite, or on a logarithmic axis none is positive), or the disk refuses.
    pub fn write(&self, path: &Path) -> Result<[PathBuf; 2]> {
        self.range(Axis::X).context("nothing to draw")?;
        write(path, Picture::Chart(self))
    }

    fn drawable(&self, (x, y): (f64, f64)) -> bool {
        let fits = |value: f64, scale| value.is_finite() && (scale == Scale::Linear || value > 0.0);
        fits(x, self.x_scale) && fits(y, self.y_scale)
    }

    /// The least and greatest value along an axis, with a margin.
    fn range(&self, axis: Axis) -> Option<std::ops::Range<f64>> {
        let points = self.series.iter().flat_map(|series| {
            let band = series.band.iter().flat_map(|&(x, low, high)| [(x, low), (x, high)]);
            series.points.iter().copied().chain(band)
        });
        let values = points.filter(|&point| self.drawable(point)).map(|(x, y)| if axis == Axis::X { x } else { y });
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
        if low > high {
            return None;
        }
        let scale = if axis == Axis::X { self.x_scale } else { self.y_scale };
        Some(match (axis, scale) {
            (_, Scale::Log) if low == high => low / 2.0..high * 2.0,
            (Axis::X, Scale::Log) => low..high,
            (Axis::Y, Scale::Log) => low / (high / low).powf(0.04)..high * (high / low).powf(0.04),
            (_, Scale::Linear) if low == high => low - 1.0..high + 1.0,
            (Axis::X, Scale::Linear) => low..high,
            (Axis::Y, Scale::Linear) => low - 0.04 * (high - low)..high + 0.04 * (high - low),
        })
    }

    fn draw<B: DrawingBackend>(&self, area: &Area<B>) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
        let (Some(x), Some(y)) = (self.range(Axis::X), self.range(Axis::Y)) else { return Ok(()) };
        match (self.x_scale, self.y_scale) {
            (Scale::Linear, Scale::Linear) => self.draw_on(area, x, y),
            (Scale::Log, Scale::Linear) => self.draw_on(area, x.log_scale(), y),
            (Scale::Linear, Scale::Log) => self.draw_on(area, x, y.log_scale()),
            (Scale::Log, Scale::Log) => self.draw_on(area, x.log_scale(), y.log_scale()),
        }
    }

    fn draw_on<B, X, Y>(&self, area: &Area<B>, x: X, y: Y) -> Result<(), DrawingAreaErrorKind<B::ErrorType>>
    where
        B: DrawingBackend,
        X: AsRangedCoord<Value = f64, CoordDescType: ValueFormatter<f64>>,
        Y: AsRangedCoord<Value = f64, CoordDescType: ValueFormatter<f64>>,
    {
        area.fill(&WHITE)?;
        let mut builder = ChartBuilder::on(area);
        builder.margin(14).caption(&self.title, ("sans-serif", 20)).x_label_area_size(44).y_label_area_size(76);
        let mut chart = builder.build_cartesian_2d(x, y)?;
        let mut mesh = chart.configure_mesh();
        mesh.light_line_style(WHITE).bold_line_style(BLACK.mix(0.12)).axis_desc_style(("sans-serif", 15));
        mesh.label_style(("sans-serif", 13)).x_desc(&self.x_label).y_desc(&self.y_label);
        mesh.x_label_formatter(&|value| number(*value)).y_label_formatter(&|value| number(*value));
        mesh.draw()?;
        let mut colours = COLOURS.iter().cycle();
        for series in &self.series {
            let style = match series.stroke {
                Stroke::Limit => BLACK.mix(0.45).stroke_width(1),
                Stroke::Line => colours.next().unwrap_or(&BLACK).stroke_width(2),
            };
            let colour = style.color;
            // A curve is broken where a value is missing.
            for part in series.band.split(|&(x, low, high)| !self.drawable((x, low)) || !self.drawable((x, high))) {
                let lower = part.iter().map(|&(x, low, _)| (x, low));
                let outline: Vec<_> = lower.chain(part.iter().rev().map(|&(x, _, high)| (x, high))).collect();
                if !outline.is_empty() {
                    chart.draw_series([Polygon::new(outline, colour.mix(0.15).filled())])?;
                }
            }
            for (index, part) in series.points.split(|&point| !self.drawable(point)).enumerate() {
                let line = chart.draw_series(LineSeries::new(part.iter().copied(), style))?;
                if index == 0 {
                    let mark = move |(x, y)| PathElement::new([(x, y), (x + 22, y)], style);
                    line.label(&series.label).legend(mark);
                }
                if part.len() <= 60 && series.stroke == Stroke::Line {
                    chart.draw_series(part.iter().map(|&point| Circle::new(point, 3, colour.filled())))?;
                }
            }
        }
        let mut legend = chart.configure_series_labels();
        legend.label_font(("sans-serif", 14)).background_style(WHITE.mix(0.85)).border_style(BLACK.mix(0.2));
        legend.position(SeriesLabelPosition::UpperRight).draw()
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Axis {
    X,
    Y,
}

impl Forest {
    /// Writes `path`.svg and `path`.png.
    ///
    /// # Errors
    /// When there is no row, or the disk refuses.
    pub fn write(&self, path: &Path) -> Result<[PathBuf; 2]> {
        ensure!(!self.rows.is_empty(), "nothing to draw: no difference could be estimated");
        write(path, Picture::Forest(self))
    }

    fn draw<B: DrawingBackend>(&self, area: &Area<B>) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
        area.fill(&WHITE)?;
        let reach = |(_, e): &(String, Estimate)| e.mean.abs() + e.half_width.unwrap_or(0.0);
        let widest = self.rows.iter().map(reach).fold(0.0, f64::max).max(1e-12) * 1.1;
        let rows = self.rows.len();
        let mut builder = ChartBuilder::on(area);
        builder.margin(14).caption(&self.title, ("sans-serif", 20)).x_label_area_size(44).y_label_area_size(150);
        let mut chart = builder.build_cartesian_2d(-widest..widest, -0.5..rows as f64 - 0.5)?;
        let name = |y: &f64| {
            // Rows count from the top; ticks between rows have no name.
            let row = rows as f64 - 1.0 - y;
            let near = (row - row.round()).abs() < 1e-6 && row >= 0.0;
            near.then(|| self.rows.get(row.round() as usize)).flatten().map_or(String::new(), |(name, _)| name.clone())
        };
        let mut mesh = chart.configure_mesh();
        mesh.light_line_style(WHITE).bold_line_style(BLACK.mix(0.12)).label_style(("sans-serif", 14));
        mesh.axis_desc_style(("sans-serif", 15)).x_desc(&self.x_label).x_label_formatter(&|value| number(*value));
        mesh.y_labels(2 * rows + 1).y_label_formatter(&name).draw()?;
        chart.draw_series(LineSeries::new([(0.0, -0.5), (0.0, rows as f64 - 0.5)], BLACK.mix(0.6)))?;
        for (index, (_, estimate)) in self.rows.iter().enumerate() {
            let (y, style) = ((rows - 1 - index) as f64, COLOURS[index % COLOURS.len()].stroke_width(3));
            if let Some(half) = estimate.half_width {
                let (low, high) = (estimate.mean - half, estimate.mean + half);
                chart.draw_series([PathElement::new([(low, y), (high, y)], style)])?;
            }
            chart.draw_series([Circle::new((estimate.mean, y), 6, style.color.filled())])?;
        }
        Ok(())
    }
}

/// A tick's number, short.
fn number(value: f64) -> String {
    let size = value.abs();
    if value != 0.0 && !(1e-3..1e5).contains(&size) {
        return format!("{value:.0e}");
    }
    let text = format!("{value:.4}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: Vec<(f64, f64)>) -> Chart {
        let band = points.iter().map(|&(x, y)| (x, y - 0.1, y + 0.1)).collect();
        let series = vec![Series { label: "one".into(), points, band, stroke: Stroke::Line }];
        let (x_label, y_label) = ("step".into(), "loss".into());
        Chart { title: "T".into(), x_label, y_label, x_scale: Scale::Linear, y_scale: Scale::Log, series }
    }

    #[test]
    fn a_chart_is_written_as_svg_with_its_words_and_as_png_that_decodes() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let [svg, png] =
            chart(vec![(1.0, 5.0), (2.0, f64::NAN), (3.0, 2.0), (4.0, 1.0)]).write(&folder.path().join("a"))?;
        let text = std::fs::read_to_string(svg)?;
        assert!(text.contains("<svg") && text.contains("one") && text.contains("loss"), "{text}");
        let bytes = std::fs::read(png)?;
        assert_eq!(bytes[..8], *b"\x89PNG\r\n\x1a\n");
        let [width, height] =
            [16, 20].map(|at| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]));
        assert_eq!((width, height), SIZE);
        Ok(())
    }

    #[test]
    fn nothing_finite_is_an_error_and_not_an_empty_picture() {
        let folder = std::env::temp_dir();
        assert!(chart(vec![(1.0, f64::NAN), (2.0, -1.0)]).write(&folder.join("never")).is_err());
        assert!(!folder.join("never.svg").exists());
    }

    #[test]
    fn a_forest_names_its_rows() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let estimate = Estimate { mean: -0.2, half_width: Some(0.1), count: 3 };
        let rows = vec![
            ("vradam".to_owned(), estimate),
            ("lion".to_owned(), Estimate { mean: 0.3, half_width: None, count: 1 }),
        ];
        let forest = Forest { title: "D".into(), x_label: "difference".into(), rows };
        let [svg, _] = forest.write(&folder.path().join("f"))?;
        let text = std::fs::read_to_string(svg)?;
        assert!(text.contains("vradam") && text.contains("lion"), "{text}");
        Ok(())
    }

    #[test]
    fn ticks_are_short() {
        assert_eq!([0.0, 1.5, 0.05, 1e-5, 123456.0].map(number), ["0", "1.5", "0.05", "1e-5", "1e5"]);
    }
}
