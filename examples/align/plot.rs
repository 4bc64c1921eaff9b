//! The steps of all runs as a picture: reward, distance to the reference, entropy, length.

use std::error::Error;
use std::path::Path;

use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

use crate::report::Step;

/// plotters brings no font of its own, and systems have different ones.
const FONT: &[u8] = include_bytes!("../finetune/font/DejaVuSans-ascii.ttf");

const COLORS: [RGBColor; 3] = [
    RGBColor(30, 90, 180),
    RGBColor(230, 120, 20),
    RGBColor(120, 120, 120),
];

/// What a panel shows of a step.
type Value = fn(&Step) -> f64;

/// Draws means over the seeds, a line for each run.
pub fn curves(
    steps: &[Step],
    [reward, distance]: [&str; 2],
    path: &Path,
) -> Result<(), Box<dyn Error>> {
    register_font("sans-serif", FontStyle::Normal, FONT).map_err(|_| "the font is broken")?;
    let root = BitMapBackend::new(path, (1200, 800)).into_drawing_area();
    root.fill(&WHITE)?;
    let panels: [(&str, Value); 4] = [
        (reward, |step| step.reward),
        (distance, |step| step.distance),
        ("entropy by token, nats", |step| step.entropy),
        ("tokens of a completion", |step| step.tokens),
    ];
    let mut runs: Vec<&str> = Vec::new();
    for step in steps {
        if !runs.contains(&&*step.run) {
            runs.push(&step.run);
        }
    }
    for (area, (title, value)) in root.split_evenly((2, 2)).iter().zip(panels) {
        let lines: Vec<Vec<(usize, f64)>> =
            runs.iter().map(|run| line(steps, run, value)).collect();
        let all = || lines.iter().flatten();
        let last = all().map(|point| point.0).max().unwrap_or(1);
        let low = all().map(|point| point.1).fold(f64::INFINITY, f64::min);
        let high = all().map(|point| point.1).fold(f64::NEG_INFINITY, f64::max);
        let margin = 0.05 * (high - low).max(1e-3);
        let mut chart = ChartBuilder::on(area)
            .caption(title, ("sans-serif", 22))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(0..last, low - margin..high + margin)?;
        chart
            .configure_mesh()
            .x_desc("step")
            .axis_desc_style(("sans-serif", 16))
            .label_style(("sans-serif", 14))
            .light_line_style(WHITE)
            .draw()?;
        for ((line, run), color) in lines.into_iter().zip(&runs).zip(COLORS.iter().cycle()) {
            let color = *color;
            chart
                .draw_series(LineSeries::new(line, color.stroke_width(2)))?
                .label(*run)
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 24, y)], color.stroke_width(2))
                });
        }
        chart
            .configure_series_labels()
            .label_font(("sans-serif", 16))
            .legend_area_size(32)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .draw()?;
    }
    root.present()?;
    Ok(())
}

/// The mean over the seeds of a run, step by step.
fn line(steps: &[Step], run: &str, value: Value) -> Vec<(usize, f64)> {
    let of_run = || steps.iter().filter(|step| step.run == run);
    let last = of_run().map(|step| step.step).max().unwrap_or(0);
    (1..=last)
        .map(|at| {
            let values: Vec<f64> = of_run().filter(|step| step.step == at).map(value).collect();
            (at, values.iter().sum::<f64>() / values.len() as f64)
        })
        .collect()
}
