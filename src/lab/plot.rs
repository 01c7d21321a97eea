//! Pictures as SVG and PNG: curves with intervals, and differences with intervals.

use super::statistics::Estimate;
use crate::report::COLOURS;
use anyhow::{Context, Result, anyhow, ensure};
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::element::DashedPathElement;
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
    /// And the pen of each of its rows.
    Forest(&'a Forest, &'a [usize]),
}

/// (dash, gap) in pixels of the first round of colours, the second and the third; `None`: no gap.
const DASHES: [Option<(u32, u32)>; 3] = [None, Some((9, 5)), Some((2, 4))];

/// How the curve at a place among others is drawn: colours, then colours with dashes, then with dots. Only beyond
/// 24 curves do two look alike.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Pen {
    style: ShapeStyle,
    round: usize,
}

impl Pen {
    fn new(place: usize, width: u32) -> Self {
        let round = place / COLOURS.len() % DASHES.len();
        Self { style: COLOURS[place % COLOURS.len()].stroke_width(width), round }
    }

    /// A grey line.
    fn of_a_limit() -> Self {
        Self { style: BLACK.mix(0.45).stroke_width(1), round: 0 }
    }

    fn line<B: DrawingBackend, C: Clone + 'static>(self, points: Vec<C>) -> DynElement<'static, B, C> {
        match DASHES[self.round] {
            None => PathElement::new(points, self.style).into_dyn(),
            Some((dash, gap)) => DashedPathElement::new(points, dash, gap, self.style).into_dyn(),
        }
    }

    fn mark<B: DrawingBackend, C: Clone + 'static>(self, point: C, size: i32) -> DynElement<'static, B, C> {
        match self.round {
            0 => Circle::new(point, size, self.style.filled()).into_dyn(),
            1 => TriangleMarker::new(point, size + 1, self.style.filled()).into_dyn(),
            _ => Cross::new(point, size, self.style).into_dyn(),
        }
    }
}

/// `text` in `size` pixels, cut in its middle where it is wider than `width`.
fn fitted<B: DrawingBackend>(
    area: &Area<B>,
    text: &str,
    size: u32,
    width: u32,
) -> Result<String, DrawingAreaErrorKind<B::ErrorType>> {
    let (wide, _) = area.estimate_text_size(text, &TextStyle::from(("sans-serif", size)))?;
    let letters: Vec<char> = text.chars().collect();
    // Letters differ in width: a little less than their share.
    let most = (letters.len() as f64 * 0.95 * f64::from(width) / f64::from(wide.max(1))) as usize;
    if wide <= width || most < 3 {
        return Ok(text.to_owned());
    }
    let (begin, end) = (most / 2, most - 1 - most / 2);
    Ok(letters[..begin].iter().chain(&['\u{2026}']).chain(&letters[letters.len() - end..]).collect())
}

/// The largest size in which `text` is no wider than `width`, and the text, cut where even the smallest is too wide.
fn sized<B: DrawingBackend>(
    area: &Area<B>,
    text: &str,
    sizes: [u32; 3],
    width: u32,
) -> Result<(String, u32), DrawingAreaErrorKind<B::ErrorType>> {
    for size in sizes {
        if area.estimate_text_size(text, &TextStyle::from(("sans-serif", size)))?.0 <= width {
            return Ok((text.to_owned(), size));
        }
    }
    Ok((fitted(area, text, sizes[2], width)?, sizes[2]))
}

const TITLE_SIZES: [u32; 3] = [20, 17, 14];
const LABEL_SIZES: [u32; 3] = [15, 13, 11];
const MARGIN: u32 = 14;

impl Picture<'_> {
    fn on<B: DrawingBackend>(self, area: Area<B>) -> Result<()> {
        let drawn = match self {
            Self::Chart(chart) => chart.draw(&area),
            Self::Forest(forest, places) => forest.draw(&area, places),
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
        let left = 76;
        let (title, title_size) = sized(area, &self.title, TITLE_SIZES, SIZE.0 - 2 * MARGIN)?;
        let mut builder = ChartBuilder::on(area);
        builder.margin(MARGIN).caption(title, ("sans-serif", title_size)).x_label_area_size(44).y_label_area_size(left);
        let mut chart = builder.build_cartesian_2d(x, y)?;
        let (x_label, x_size) = sized(area, &self.x_label, LABEL_SIZES, SIZE.0 - left - 2 * MARGIN)?;
        let (y_label, y_size) = sized(area, &self.y_label, LABEL_SIZES, SIZE.1 - 44 - 4 * MARGIN)?;
        let reach = |axis| self.range(axis).map_or(0.0, |range| range.start.abs().max(range.end.abs()));
        let (across, up) = (reach(Axis::X), reach(Axis::Y));
        let mut mesh = chart.configure_mesh();
        mesh.light_line_style(WHITE).bold_line_style(BLACK.mix(0.12));
        mesh.axis_desc_style(("sans-serif", x_size.min(y_size))).label_style(("sans-serif", 13));
        mesh.x_desc(x_label).y_desc(y_label);
        let tick = |value: f64, scale, reach| if scale == Scale::Log { number(value) } else { tick(value, reach) };
        let (x_tick, y_tick) = (|x: &f64| tick(*x, self.x_scale, across), |y: &f64| tick(*y, self.y_scale, up));
        mesh.x_label_formatter(&x_tick).y_label_formatter(&y_tick).draw()?;
        let mut places = 0..;
        for series in &self.series {
            let pen = match series.stroke {
                Stroke::Limit => Pen::of_a_limit(),
                Stroke::Line => Pen::new(places.next().unwrap_or(0), 2),
            };
            let colour = pen.style.color;
            // A curve is broken where a value is missing.
            for part in series.band.split(|&(x, low, high)| !self.drawable((x, low)) || !self.drawable((x, high))) {
                let lower = part.iter().map(|&(x, low, _)| (x, low));
                let outline: Vec<_> = lower.chain(part.iter().rev().map(|&(x, _, high)| (x, high))).collect();
                if !outline.is_empty() {
                    chart.draw_series([Polygon::new(outline, colour.mix(0.15).filled())])?;
                }
            }
            for (index, part) in series.points.split(|&point| !self.drawable(point)).enumerate() {
                let line = chart.draw_series((!part.is_empty()).then(|| pen.line(part.to_vec())))?;
                if index == 0 {
                    let label = fitted(area, &series.label, 14, SIZE.0 / 2)?;
                    line.label(label).legend(move |(x, y)| pen.line(vec![(x, y), (x + 24, y)]));
                }
                if part.len() <= 60 && series.stroke == Stroke::Line {
                    chart.draw_series(part.iter().map(|&point| pen.mark(point, 3)))?;
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
        write(path, Picture::Forest(self, &(0..self.rows.len()).collect::<Vec<_>>()))
    }

    /// As [`Self::write`], each row in the colour of the curve of the same name in `chart`.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_beside(&self, path: &Path, chart: &Chart) -> Result<[PathBuf; 2]> {
        ensure!(!self.rows.is_empty(), "nothing to draw: no difference could be estimated");
        write(path, Picture::Forest(self, &self.places_in(chart)))
    }

    /// The place of each row's name among the curves of `chart`; names that it has not come after them.
    fn places_in(&self, chart: &Chart) -> Vec<usize> {
        let curves: Vec<&str> =
            chart.series.iter().filter(|s| s.stroke == Stroke::Line).map(|s| s.label.as_str()).collect();
        let place = |(row, (name, _)): (usize, &(String, Estimate))| {
            curves.iter().position(|curve| curve == name).unwrap_or(curves.len() + row)
        };
        self.rows.iter().enumerate().map(place).collect()
    }

    fn draw<B: DrawingBackend>(
        &self,
        area: &Area<B>,
        places: &[usize],
    ) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
        area.fill(&WHITE)?;
        let reach = |(_, e): &(String, Estimate)| e.mean.abs() + e.half_width.unwrap_or(0.0);
        let widest = self.rows.iter().map(reach).fold(0.0, f64::max).max(1e-12) * 1.1;
        let rows = self.rows.len();
        let mut left = 150;
        for (name, _) in &self.rows {
            left = left.max(area.estimate_text_size(name, &TextStyle::from(("sans-serif", 14)))?.0 + 20).min(380);
        }
        let names: Vec<String> =
            self.rows.iter().map(|(name, _)| fitted(area, name, 14, left - 20)).collect::<Result<_, _>>()?;
        let (title, title_size) = sized(area, &self.title, TITLE_SIZES, SIZE.0 - 2 * MARGIN)?;
        let (x_label, x_size) = sized(area, &self.x_label, LABEL_SIZES, SIZE.0 - left - 2 * MARGIN)?;
        let mut builder = ChartBuilder::on(area);
        builder.margin(MARGIN).caption(title, ("sans-serif", title_size)).x_label_area_size(44).y_label_area_size(left);
        let mut chart = builder.build_cartesian_2d(-widest..widest, -0.5..rows as f64 - 0.5)?;
        let name = |y: &f64| {
            // Rows count from the top; ticks between rows have no name.
            let row = rows as f64 - 1.0 - y;
            let near = (row - row.round()).abs() < 1e-6 && row >= 0.0;
            near.then(|| names.get(row.round() as usize)).flatten().cloned().unwrap_or_default()
        };
        let mut mesh = chart.configure_mesh();
        mesh.light_line_style(WHITE).bold_line_style(BLACK.mix(0.12)).label_style(("sans-serif", 14));
        let x_tick = |value: &f64| tick(*value, widest);
        mesh.axis_desc_style(("sans-serif", x_size)).x_desc(x_label).x_label_formatter(&x_tick);
        mesh.y_labels(2 * rows + 1).y_label_formatter(&name).draw()?;
        chart.draw_series(LineSeries::new([(0.0, -0.5), (0.0, rows as f64 - 0.5)], BLACK.mix(0.6)))?;
        for (index, (_, estimate)) in self.rows.iter().enumerate() {
            let (y, pen) = ((rows - 1 - index) as f64, Pen::new(places[index], 3));
            if let Some(half) = estimate.half_width {
                let (low, high) = (estimate.mean - half, estimate.mean + half);
                chart.draw_series([pen.line(vec![(low, y), (high, y)])])?;
            }
            chart.draw_series([pen.mark((estimate.mean, y), 6)])?;
        }
        Ok(())
    }
}

/// The number of a tick on a linear axis that reaches to `reach`: what rounding leaves of 0 is 0.
fn tick(value: f64, reach: f64) -> String {
    number(if value.abs() < 1e-9 * reach { 0.0 } else { value })
}

/// A tick's number, short.
fn number(value: f64) -> String {
    let size = value.abs();
    if value != 0.0 && !(1e-3..1e5).contains(&size) {
        // Neighbours such as 120,000 and 140,000 must not read alike.
        let text = format!("{value:.2e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        return format!("{}e{exponent}", digits.trim_end_matches('0').trim_end_matches('.'));
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
        assert_eq!([0.0, 1.5, 0.05, 1e-5, 123456.0].map(number), ["0", "1.5", "0.05", "1e-5", "1.23e5"]);
        assert_eq!([-1.4e-17, 0.2, -0.2, 1e-9].map(|value| tick(value, 0.4)), ["0", "0.2", "-0.2", "1e-9"]);
    }

    #[test]
    fn two_dozen_curves_look_different_and_a_row_looks_like_its_curve() -> Result<()> {
        let pens: Vec<Pen> = (0..24).map(|place| Pen::new(place, 2)).collect();
        assert!((0..24).all(|one| (0..one).all(|other| pens[one] != pens[other])));
        let folder = tempfile::tempdir()?;
        let mut curves = chart(vec![(1.0, 5.0), (2.0, 4.0)]);
        curves.series = (0..18)
            .map(|line| {
                let points =
                    (1..90).map(|step| (f64::from(step), f64::from(line + 1) + 9.0 / f64::from(step))).collect();
                Series { label: format!("config-{line}"), points, ..Series::default() }
            })
            .collect();
        let [svg, _] = curves.write(&folder.path().join("many"))?;
        assert!(std::fs::read_to_string(svg)?.contains("config-17"));
        let estimate = Estimate { mean: 0.1, half_width: Some(0.2), count: 3 };
        let rows = ["config-11", "config-2", "unheard-of"].map(|name| (name.to_owned(), estimate)).to_vec();
        let forest = Forest { title: "D".into(), x_label: "difference".into(), rows };
        assert_eq!(forest.places_in(&curves), [11, 2, 20]);
        let long = "a-config-whose-name-says-everything-about-it-".repeat(4);
        let rows = vec![("short".to_owned(), estimate), (long.clone(), estimate)];
        let x_label = format!("validation loss minus {long}'s, paired by seed, 95% interval");
        let [svg, _] = Forest { title: long.clone(), x_label, rows }.write(&folder.path().join("long"))?;
        let text = std::fs::read_to_string(svg)?;
        assert!(!text.contains(&long) && text.contains("95% interval") && text.contains('\u{2026}'), "{text}");
        Ok(())
    }
}
