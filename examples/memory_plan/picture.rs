//! Peaks as stacked bars: all methods to one scale, and those that are dwarfed to another.

use std::error::Error;
use std::path::Path;

use burn_peft::memory::{Budget, Part, Plan};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

/// plotters brings no font of its own, and what fonts a system has differs.
const FONT: &[u8] = include_bytes!("../finetune/font/DejaVuSans-ascii.ttf");
const GB: f64 = 1e9;
const TEXT: (&str, i32) = ("sans-serif", 16);

fn color(part: Part) -> RGBColor {
    match part {
        Part::Weights => RGBColor(60, 100, 170),
        Part::Scales => RGBColor(130, 170, 220),
        Part::Adapters => RGBColor(40, 150, 90),
        Part::Gradients => RGBColor(230, 160, 40),
        Part::Optimizer => RGBColor(200, 80, 50),
        Part::Activations => RGBColor(140, 90, 170),
        Part::Logits => RGBColor(220, 130, 180),
        Part::Transients => RGBColor(150, 150, 150),
    }
}

/// Draws the peak of each plan, by part, into a PNG file.
pub fn draw(plans: &[(String, Plan)], title: &str, path: &Path) -> Result<(), Box<dyn Error>> {
    register_font("sans-serif", FontStyle::Normal, FONT).map_err(|_| "the font is broken")?;
    let root = BitMapBackend::new(path, (1200, 640)).into_drawing_area();
    root.fill(&WHITE)?;
    let root = root.margin(12, 0, 0, 0).titled(
        &format!("Peak memory of a training step: {title}"),
        ("sans-serif", 24),
    )?;
    let (charts, legend) = root.split_horizontally(1010);
    let largest = plans.iter().map(|(_, plan)| peak(plan)).fold(0.0, f64::max);
    let dwarfed: Vec<_> = plans
        .iter()
        .filter(|(_, plan)| peak(plan) < largest / 3.0)
        .cloned()
        .collect();
    if dwarfed.is_empty() {
        bars(&charts, plans)?;
    } else {
        let (left, right) = charts.split_horizontally(560);
        bars(&left, plans)?;
        bars(&right, &dwarfed)?;
    }
    for (index, part) in Part::ALL.into_iter().enumerate() {
        let y = 60 + 30 * index as i32;
        legend.draw(&Rectangle::new(
            [(0, y), (20, y + 16)],
            color(part).filled(),
        ))?;
        legend.draw(&Text::new(part.name(), (28, y), TEXT))?;
    }
    root.present()?;
    Ok(())
}

fn peak(plan: &Plan) -> f64 {
    plan.peak.parts.total() as f64 / GB
}

fn bars(
    area: &DrawingArea<BitMapBackend, Shift>,
    plans: &[(String, Plan)],
) -> Result<(), Box<dyn Error>> {
    let top = 1.12 * plans.iter().map(|(_, plan)| peak(plan)).fold(0.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .margin(16)
        .x_label_area_size(36)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..plans.len() as f64, 0.0..top)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .disable_x_axis()
        .y_desc("GB (10^9 bytes)")
        .axis_desc_style(TEXT)
        .label_style(TEXT)
        .light_line_style(WHITE)
        .draw()?;
    // What is sold as so many GB has as many GiB.
    for device in [Budget::RTX_4090, Budget::A6000, Budget::A100_80] {
        let height = device.bytes as f64 / GB;
        if (0.1 * top..0.97 * top).contains(&height) {
            let line = [(0.0, height), (plans.len() as f64, height)];
            chart.draw_series(DashedLineSeries::new(line, 6, 4, BLACK.mix(0.5).into()))?;
            // Right of the first bar, which is the highest.
            let at = (0.8, height + 0.035 * top);
            chart.draw_series([Text::new(device.name, at, ("sans-serif", 13))])?;
        }
    }
    for (index, (name, plan)) in plans.iter().enumerate() {
        let (left, right) = (index as f64 + 0.25, index as f64 + 0.75);
        let mut bottom = 0.0;
        for part in Part::ALL {
            let height = plan.peak.parts.of(part) as f64 / GB;
            let corners = [(left, bottom), (right, bottom + height)];
            chart.draw_series([Rectangle::new(corners, color(part).filled())])?;
            bottom += height;
        }
        let at = (left, bottom + 0.04 * top);
        chart.draw_series([Text::new(format!("{bottom:.1} GB"), at, TEXT)])?;
        let (x, y) = chart.backend_coord(&(left, 0.0));
        let (origin_x, origin_y) = area.get_base_pixel();
        area.draw(&Text::new(
            name.clone(),
            (x - origin_x, y - origin_y + 10),
            TEXT,
        ))?;
    }
    Ok(())
}
