//! The loss curve as a picture.

use std::error::Error;
use std::path::Path;

use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

use crate::train::Curve;

/// plotters brings no font of its own, and what fonts a system has differs.
const FONT: &[u8] = include_bytes!("font/DejaVuSans-ascii.ttf");

/// Draws the training loss, smoothed over a few steps, and the held-out loss over the steps into a PNG file.
pub fn loss_curve(curve: &Curve, title: &str, path: &Path) -> Result<(), Box<dyn Error>> {
    register_font("sans-serif", FontStyle::Normal, FONT).map_err(|_| "the font is broken")?;
    let window = (curve.train.len() / 40).max(1);
    let smooth = curve.train.windows(window).map(|losses| {
        let mean = losses.iter().map(|(_, loss)| loss).sum::<f64>() / losses.len() as f64;
        (losses[losses.len() - 1].0, mean)
    });
    let smooth: Vec<(usize, f64)> = smooth.collect();
    let losses = smooth.iter().chain(&curve.heldout).map(|(_, loss)| *loss);
    let (low, high) = losses.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), loss| {
        (low.min(loss), high.max(loss))
    });
    let margin = 0.05 * (high - low).max(1e-3);
    let steps = curve.train.last().map_or(1, |(step, _)| *step);

    let root = BitMapBackend::new(path, (960, 600)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 24))
        .margin(16)
        .x_label_area_size(48)
        .y_label_area_size(64)
        .build_cartesian_2d(0..steps, (low - margin).max(0.0)..high + margin)?;
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc("loss, nats per response token")
        .axis_desc_style(("sans-serif", 18))
        .label_style(("sans-serif", 16))
        .light_line_style(WHITE)
        .draw()?;
    let (orange, blue) = (RGBColor(230, 120, 20), RGBColor(30, 90, 180));
    chart
        .draw_series(LineSeries::new(smooth, orange.stroke_width(2)))?
        .label(match window {
            1 => "training".into(),
            _ => format!("training, mean of {window} steps"),
        })
        .legend(move |(x, y)| PathElement::new([(x, y), (x + 24, y)], orange.stroke_width(2)));
    chart
        .draw_series(
            LineSeries::new(curve.heldout.iter().copied(), blue.stroke_width(2)).point_size(4),
        )?
        .label("held out")
        .legend(move |(x, y)| PathElement::new([(x, y), (x + 24, y)], blue.stroke_width(2)));
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .label_font(("sans-serif", 18))
        .legend_area_size(32)
        .background_style(WHITE.filled())
        .border_style(BLACK.mix(0.3))
        .draw()?;
    root.present()?;
    Ok(())
}
