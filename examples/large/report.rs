//! The plan beside what was measured.

use std::error::Error;

use burn_peft::memory::{Part, Plan, plan};

use crate::args::Args;
use crate::factors::Moved;
use crate::meter::{Meter, process_peak};
use crate::train::Step;

/// How far the peak may be from the plan's.
const TOLERANCE: f64 = 0.05;

/// Bytes of a part as planned and as measured.
struct Row {
    part: &'static str,
    planned: f64,
    measured: f64,
    /// What of it does not grow with the number of blocks; none for the peak, which is made of the others.
    fixed: Option<f64>,
}

/// Prints everything; whether it is as it should be.
pub fn print(
    args: &Args,
    plan: &Plan,
    meter: &Meter,
    steps: &[Step],
    moved: &Moved,
) -> Result<bool, Box<dyn Error>> {
    let [first, .., last] = steps else {
        return Err("fewer than two steps".into());
    };
    let rows = rows(plan, meter, first, last);
    println!(
        "{:<22} {:>12} {:>12} {:>8}",
        "GB (10⁹ bytes)", "planned", "measured", "ratio"
    );
    for Row {
        part,
        planned,
        measured,
        ..
    } in &rows
    {
        let ratio = measured / planned;
        println!(
            "{part:<22} {:>12.4} {:>12.4} {ratio:>8.4}",
            planned / 1e9,
            measured / 1e9
        );
    }
    let peak = rows.last().expect("the peak is a row");
    println!(
        "peak planned in {}, measured in {}",
        plan.peak.moment, last.peak_phase
    );

    let tokens = (args.batch * args.seq) as f64;
    println!(
        "a step takes {:.1} s: {:.2} tokens/s; loss {:.4} to {:.4}",
        last.seconds,
        tokens / last.seconds,
        first.loss,
        last.loss
    );
    let build = meter
        .phases
        .iter()
        .map(|phase| phase.peak)
        .max()
        .unwrap_or(0);
    println!(
        "most at any time, building included: {:.3} GB = {:.3} GiB",
        build as f64 / 1e9,
        gib(build as f64)
    );
    if let Some(process) = process_peak() {
        println!(
            "most of the whole process, as the system counts: {:.3} GiB",
            gib(process as f64)
        );
    }
    println!(
        "{} of {} factors of the first and the last block moved",
        moved.all - moved.stuck.len(),
        moved.all
    );
    moved
        .stuck
        .iter()
        .for_each(|path| println!("did not move: {path}"));
    if args.layers.is_some() {
        extrapolate(args, plan, &rows)?;
    }

    let off = peak.measured / peak.planned - 1.0;
    let planned_well = off.abs() <= TOLERANCE;
    let verdict = if planned_well { "within" } else { "NOT within" };
    println!(
        "peak {:.3} GiB, {:+.2} % of the plan: {verdict} {} %",
        gib(peak.measured),
        100.0 * off,
        100.0 * TOLERANCE
    );
    Ok(planned_well && moved.all > 0 && moved.stuck.is_empty())
}

fn rows(plan: &Plan, meter: &Meter, first: &Step, last: &Step) -> [Row; 6] {
    let live = |name: &str| {
        let phase = meter.phases.iter().find(|phase| phase.name == name);
        phase.map_or(0, |phase| phase.live)
    };
    let base = live("checksum of the packed weights");
    let row = |part, planned: u128, measured: usize, fixed: u128| Row {
        part,
        planned: planned as f64,
        measured: measured as f64,
        fixed: Some(fixed as f64),
    };
    let weights = plan.weights + plan.scales;
    let ends = ends(plan);
    [
        row("weights and scales", weights, base, ends),
        row("adapters", plan.adapters, live("adapters") - base, 0),
        row(
            "optimiser state",
            plan.optimizer,
            last.before - first.before,
            0,
        ),
        row("gradients", plan.gradients, last.gradients, 0),
        row("kept for backward", plan.activations, last.kept, 0),
        Row {
            part: "peak",
            planned: plan.peak.parts.total() as f64,
            measured: last.peak as f64,
            fixed: None,
        },
    ]
}

/// Bytes of embedding, head and last norm, which do not grow with the number of blocks.
fn ends(plan: &Plan) -> u128 {
    let of = |layers| {
        let shape = plan.shape.clone().with_layers(layers);
        let plan = burn_peft::memory::plan(&shape, &plan.setup);
        plan.map_or(0, |plan| plan.weights + plan.scales)
    };
    2 * of(1) - of(2)
}

/// What all blocks of the shape would take, from what some took.
fn extrapolate(args: &Args, planned: &Plan, rows: &[Row]) -> Result<(), Box<dyn Error>> {
    let Some(shape) = args.shape else {
        return Ok(());
    };
    let all = crate::args::shape(&shape.config(None));
    let (some, layers) = (planned.shape.layers as f64, all.layers as f64);
    let full = plan(&all, &planned.setup)?;
    // What a block adds to the peak is what it adds to a part, by the share of it that is live then.
    let share = |row: &Row| {
        let parts = &full.peak.parts;
        match row.part {
            "gradients" => ratio(parts.of(Part::Gradients), full.gradients),
            "kept for backward" => ratio(parts.of(Part::Activations), full.activations),
            _ => 1.0,
        }
    };
    let grows = |row: &Row| {
        row.fixed
            .map(|fixed| share(row) * (row.measured - fixed) / some)
    };
    let more: f64 = rows.iter().filter_map(grows).sum();
    let peak = rows.last().expect("the peak is a row");
    let found = peak.measured + (layers - some) * more;
    let expected = full.peak.parts.total() as f64;
    println!(
        "\nwith all {layers} blocks: {:.3} GB from what {some} took ({:.4} GB a block), planned {:.3} GB: ratio {:.4}",
        found / 1e9,
        more / 1e9,
        expected / 1e9,
        found / expected
    );
    println!("the whole plan:\n{full}\n");
    Ok(())
}

fn ratio(part: u128, all: u128) -> f64 {
    part as f64 / all.max(1) as f64
}

fn gib(bytes: f64) -> f64 {
    bytes / f64::from(1 << 30)
}
