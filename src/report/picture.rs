//! Pictures of runs for papers and pull requests: six panels as SVG or PNG.

use super::RunReport;
use anyhow::{Context, Result, anyhow, bail, ensure};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;
use std::ops::Range;
use std::path::Path;
use std::sync::OnceLock;

/// Colours that stay apart for every common kind of colour blindness (after Okabe and Ito), for every picture of ours; the
/// page (page/charts.js) has the same.
pub const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(184, 82, 143),
    RGBColor(168, 121, 0),
    RGBColor(61, 155, 214),
    RGBColor(58, 58, 58),
    RGBColor(122, 75, 30),
];

/// Pixels.
const SIZE: (u32, u32) = (1500, 880);
/// Stretches of a curve of which the extremes are drawn: about one a pixel.
const STRETCHES: usize = 450;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Scale {
    Linear,
    Logarithmic,
}

struct Panel {
    title: &'static str,
    scale: Scale,
    /// Drawn as lines.
    column: &'static str,
    /// Drawn as lines with points.
    points: Option<&'static str>,
}

const fn panel(title: &'static str, scale: Scale, column: &'static str, points: Option<&'static str>) -> Panel {
    Panel { title, scale, column, points }
}

const PANELS: [Panel; 6] = [
    panel("loss (points: validation), nats per token", Scale::Linear, "loss", Some("val_loss")),
    panel("gate: eta / alpha0", Scale::Linear, "gate", None),
    panel("squared velocity ||v||^2", Scale::Logarithmic, "velocity_sq", None),
    panel("gradient norm before the clip", Scale::Logarithmic, "grad_norm", None),
    panel("learning rate eta, after the gate", Scale::Linear, "eta", None),
    panel("tokens per second", Scale::Linear, "tokens_per_s", None),
];

/// The form of a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Svg,
    Png,
}

/// Draws the runs over their steps into a file.
pub fn draw(runs: &[RunReport], form: Form, path: &Path) -> Result<()> {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    let registered = *REGISTERED.get_or_init(|| {
        plotters::style::register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular()).is_ok()
    });
    ensure!(registered, "the embedded font cannot be read");
    if runs.iter().all(|run| run.rows.is_empty()) {
        bail!("there is nothing to draw yet: no step is written down");
    }
    let draw = || match form {
        Form::Svg => on(&SVGBackend::new(path, SIZE).into_drawing_area(), runs),
        Form::Png => on(&BitMapBackend::new(path, SIZE).into_drawing_area(), runs),
    };
    draw().with_context(|| format!("cannot draw {}", path.display()))
}

type Area<B> = DrawingArea<B, Shift>;
type Drawn<B> = Result<(), DrawingAreaErrorKind<<B as DrawingBackend>::ErrorType>>;

/// plotters' errors hold the backend's, which cannot leave this function.
fn on<B: DrawingBackend>(area: &Area<B>, runs: &[RunReport]) -> Result<()> {
    let all = || -> Drawn<B> {
        area.fill(&WHITE)?;
        for (panel, part) in PANELS.iter().zip(area.split_evenly((2, 3))) {
            let mut curves: Vec<Curve> =
                runs.iter().enumerate().flat_map(|(index, run)| curves(panel, run, index)).collect();
            curves.sort_by_key(|curve| curve.stroke != Stroke::Faint);
            draw_panel(&part, panel, &curves)?;
        }
        area.present()
    };
    all().map_err(|error| anyhow!("{error}"))
}

/// How a curve is drawn.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stroke {
    /// Every step's value, behind its running mean.
    Faint,
    /// A running mean.
    Bold,
    /// Few values, each with a point.
    Marked,
}

struct Curve {
    points: Vec<(f64, f64)>,
    colour: RGBColor,
    label: Option<String>,
    stroke: Stroke,
}

fn curves(panel: &Panel, run: &RunReport, index: usize) -> Vec<Curve> {
    let colour = COLOURS[index % COLOURS.len()];
    let steps = run.rows.column("step").unwrap_or(&[]);
    let of = |column: &str| -> Vec<(f64, f64)> {
        let values = run.rows.column(column).unwrap_or(&[]);
        let drawable = |value: f64| value.is_finite() && (panel.scale == Scale::Linear || value > 0.0);
        steps.iter().copied().zip(values.iter().copied()).filter(|(_, value)| drawable(*value)).collect()
    };
    let (all, label) = (of(panel.column), Some(run.description.name.clone()));
    let mut curves = vec![
        Curve { points: extremes(&all), colour, label: None, stroke: Stroke::Faint },
        Curve { points: extremes(&running_mean(&all)), colour, label, stroke: Stroke::Bold },
    ];
    curves.extend(panel.points.map(|column| Curve { points: of(column), colour, label: None, stroke: Stroke::Marked }));
    curves
}

/// The exponentially weighted mean whose time constant is one in a hundred points.
fn running_mean(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let decay = (-100.0 / points.len().max(100) as f64).exp();
    let (mut sum, mut weight) = (0.0, 0.0);
    let mean = |(x, y): &(f64, f64)| {
        (sum, weight) = (decay * sum + y, decay * weight + 1.0);
        (*x, sum / weight)
    };
    points.iter().map(mean).collect()
}

/// The least and the greatest point of each stretch, in order: a spike is never lost.
fn extremes(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= 2 * STRETCHES {
        return points.to_vec();
    }
    let mut out = Vec::new();
    for stretch in 0..STRETCHES {
        let part = &points[stretch * points.len() / STRETCHES..(stretch + 1) * points.len() / STRETCHES];
        let by_value = |one: &&(f64, f64), other: &&(f64, f64)| one.1.total_cmp(&other.1);
        let (low, high) = (part.iter().min_by(by_value), part.iter().max_by(by_value));
        let mut pair: Vec<(f64, f64)> = low.into_iter().chain(high).copied().collect();
        pair.sort_by(|one, other| one.0.total_cmp(&other.0));
        out.extend(pair);
    }
    out
}

/// The least and the greatest of some numbers.
fn span(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    (low <= high).then_some((low, high))
}

fn draw_panel<B: DrawingBackend>(area: &Area<B>, panel: &Panel, curves: &[Curve]) -> Drawn<B> {
    let points = || curves.iter().flat_map(|curve| curve.points.iter());
    let Some((first, last)) = span(points().map(|(x, _)| *x)) else { return Ok(()) };
    let Some((low, high)) = span(points().map(|(_, y)| *y)) else { return Ok(()) };
    let x = if first < last { first..last } else { first - 1.0..last + 1.0 };
    match panel.scale {
        Scale::Logarithmic => {
            let margin = (high / low).powf(0.04).max(1.05);
            on_axes(area, panel, curves, x, (low / margin..high * margin).log_scale())
        }
        Scale::Linear => {
            let margin = if low < high { 0.04 * (high - low) } else { 0.1 * low.abs().max(1e-9) };
            on_axes(area, panel, curves, x, low - margin..high + margin)
        }
    }
}

fn on_axes<B, Y>(area: &Area<B>, panel: &Panel, curves: &[Curve], x: Range<f64>, y: Y) -> Drawn<B>
where
    B: DrawingBackend,
    Y: AsRangedCoord<Value = f64, CoordDescType: ValueFormatter<f64>>,
{
    let mut builder = ChartBuilder::on(area);
    builder.margin(12).caption(panel.title, ("sans-serif", 17)).x_label_area_size(34).y_label_area_size(66);
    let mut chart = builder.build_cartesian_2d(x, y)?;
    let mut mesh = chart.configure_mesh();
    mesh.light_line_style(WHITE).bold_line_style(BLACK.mix(0.1)).label_style(("sans-serif", 12));
    mesh.x_labels(6).y_labels(6).x_desc("step").axis_desc_style(("sans-serif", 13));
    mesh.x_label_formatter(&|step| crate::train::short(*step)).y_label_formatter(&|value| number(*value));
    mesh.draw()?;
    let faint = (0.9 / curves.len() as f64).clamp(0.08, 0.35);
    for curve in curves {
        let style = match curve.stroke {
            Stroke::Faint => curve.colour.mix(faint).stroke_width(1),
            Stroke::Bold | Stroke::Marked => curve.colour.stroke_width(2),
        };
        let line = chart.draw_series(LineSeries::new(curve.points.iter().copied(), style))?;
        if let Some(label) = &curve.label {
            line.label(label).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        }
        if curve.stroke == Stroke::Marked {
            chart.draw_series(curve.points.iter().map(|point| Circle::new(*point, 3, curve.colour.filled())))?;
        }
    }
    // The first panel tells which colour is which run.
    if panel.column == "loss" {
        let mut legend = chart.configure_series_labels();
        legend.label_font(("sans-serif", 12)).background_style(WHITE.mix(0.85)).border_style(BLACK.mix(0.2));
        legend.position(SeriesLabelPosition::UpperRight).draw()?;
    }
    Ok(())
}

/// 0.000123 -> "1.2e-4", 12345 -> "12.3k"
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        size if size >= 1e4 => crate::train::short(value),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 1.0 => format!("{value:.2}"),
        size if size >= 0.01 => format!("{value:.3}"),
        _ => format!("{value:.1e}"),
    }
}
