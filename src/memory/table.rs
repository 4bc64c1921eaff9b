//! Plans as text: one, or several side by side.

use std::fmt;

use super::budget::{Budget, GB, GIB};
use super::ledger::Part;
use super::plan::{Plan, plan};
use super::setup::{Head, Loss, Method, Recompute, Setup};
use super::shape::ModelShape;
use crate::Result;

/// Several plans side by side. `Display` prints them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Headings, each with its plan.
    pub columns: Vec<(String, Plan)>,
    /// What is asked for each plan whether it fits.
    pub devices: Vec<Budget>,
}

/// Full fine-tuning, LoRA and QLoRA of a model in this setup, side by side, against all known devices.
///
/// Where the setup's head is in NF4, the other two have it dense, in the embedding's dtype.
///
/// # Errors
///
/// As [`plan`].
pub fn table(shape: &ModelShape, setup: &Setup) -> Result<Table> {
    let column = |method: Method| {
        let mut setup = setup.clone().with_method(method);
        if method != Method::QLora && setup.head == Head::Nf4 {
            setup.head = Head::Dense(setup.embedding);
        }
        Ok((method.name().to_owned(), plan(shape, &setup)?))
    };
    let columns = Method::ALL.into_iter().map(column);
    Ok(side_by_side(columns.collect::<Result<Vec<_>>>()?))
}

/// These plans, under these headings, against all known devices.
pub fn side_by_side(columns: Vec<(String, Plan)>) -> Table {
    Table {
        columns,
        devices: Budget::KNOWN.into(),
    }
}

/// Bytes in the unit that suits them, of powers of ten.
fn bytes(n: u128) -> String {
    let n = n as f64;
    match n {
        _ if n >= 1e9 => format!("{:.2} GB", n / 1e9),
        _ if n >= 1e6 => format!("{:.1} MB", n / 1e6),
        _ if n >= 1e3 => format!("{:.1} kB", n / 1e3),
        _ => format!("{n} B"),
    }
}

/// Digits in groups of three.
fn grouped(n: u128) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// One row: its heading, and what a plan has there.
type Row = (&'static str, fn(&Plan) -> String);

const ROWS: [Row; 14] = [
    ("parameters", |plan| grouped(plan.parameters)),
    ("trainable", |plan| grouped(plan.trainable)),
    ("weights", |plan| bytes(plan.weights)),
    ("scales", |plan| bytes(plan.scales)),
    ("adapters", |plan| bytes(plan.adapters)),
    ("gradients", |plan| bytes(plan.gradients)),
    ("optimiser state", |plan| bytes(plan.optimizer)),
    ("activations kept", |plan| bytes(plan.activations)),
    ("logits, with gradient", |plan| bytes(plan.logits)),
    ("largest transient", |plan| bytes(plan.largest_transient)),
    ("peak", |plan| bytes(plan.peak.parts.total())),
    ("peak in GiB", |plan| {
        format!("{:.2}", plan.peak.parts.total() as f64 / GIB as f64)
    }),
    ("peak at", |plan| plan.peak.moment.to_string()),
    ("devices of 80 GB", |plan| {
        let devices = plan.devices_of(80 * GB);
        devices.expect("of more than no bytes").to_string()
    }),
];

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let mut rows = vec![vec![String::new()]];
        rows[0].extend(self.columns.iter().map(|(name, _)| name.clone()));
        for (name, cell) in ROWS {
            let mut row = vec![name.to_owned()];
            row.extend(self.columns.iter().map(|(_, plan)| cell(plan)));
            rows.push(row);
        }
        for &device in &self.devices {
            let mut row = vec![format!("fits {}", device.name)];
            let fits = |plan: &Plan| match plan.fits(&[device]).is_empty() {
                true => "no".to_owned(),
                false => "yes".to_owned(),
            };
            row.extend(self.columns.iter().map(|(_, plan)| fits(plan)));
            rows.push(row);
        }
        let width = |column: usize| {
            let cells = rows.iter().map(|row| row[column].chars().count());
            cells.max().unwrap_or(0)
        };
        let widths: Vec<_> = (0..rows[0].len()).map(width).collect();
        for row in &rows {
            write!(f, "{:<width$}", row[0], width = widths[0])?;
            for (cell, width) in row.iter().zip(&widths).skip(1) {
                write!(f, "  {cell:>width$}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

impl fmt::Display for Setup {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}", self.method.name())?;
        if self.method != Method::Full {
            write!(f, ", rank {} in {}", self.rank, self.adapter.name())?;
        }
        if self.method == Method::QLora {
            let block = self.nf4.block_size.get();
            let double = if self.nf4.double_quant {
                ", doubly quantised"
            } else {
                ""
            };
            write!(f, ", NF4 in blocks of {block}{double}")?;
        }
        let head = match self.head {
            Head::Dense(dtype) => dtype.name(),
            Head::Nf4 => "NF4",
        };
        let (base, embedding) = (self.base.name(), self.embedding.name());
        write!(f, "; base {base}, embedding {embedding}, head {head}; ")?;
        write!(
            f,
            "{}; {} x {} tokens; ",
            self.optimizer.name(),
            self.batch,
            self.seq
        )?;
        match self.recompute {
            Recompute::Never => f.write_str("no checkpointing; ")?,
            Recompute::Segments(1) => f.write_str("checkpointing by block; ")?,
            Recompute::Segments(blocks) => {
                write!(f, "checkpointing by {blocks} blocks; ")?;
            }
        }
        match self.loss {
            Loss::Logits => f.write_str("loss of all logits"),
            Loss::Chunked { tokens, vocab } => {
                write!(f, "loss in chunks of {tokens} tokens by {vocab} logits")
            }
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "{}", self.setup)?;
        let columns = vec![(String::new(), self.clone())];
        let table = side_by_side(columns).to_string();
        // Without headings.
        f.write_str(table.split_once('\n').map_or("", |(_, rows)| rows))?;
        write!(f, "at the peak:")?;
        for part in Part::ALL {
            let n = self.peak.parts.of(part);
            if n > 0 {
                write!(f, " {} {};", part.name(), bytes(n))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::setup::Float;
    use super::*;

    #[test]
    fn numbers_are_readable() {
        let all = [0, 999, 1000, 8_030_261_248].map(grouped);
        assert_eq!(all, ["0", "999", "1 000", "8 030 261 248"]);
        let all = [0, 999, 1500, 2_345_678, 16_060_522_496].map(bytes);
        assert_eq!(all, ["0 B", "999 B", "1.5 kB", "2.3 MB", "16.06 GB"]);
    }

    #[test]
    fn methods_stand_side_by_side() {
        let shape = ModelShape::llama3_8b();
        let setup = Setup::new(Method::QLora, Float::Bf16).with_head(Head::Nf4);
        let table = table(&shape, &setup).unwrap();
        let text = table.to_string();
        let lines: Vec<_> = text.lines().collect();
        let of = |name: &str| lines.iter().find(|line| line.starts_with(name)).unwrap();
        assert!(lines[0].trim_start().starts_with("full"));
        assert!(of("parameters").matches("8 030 261 248").count() == 3);
        assert!(of("trainable").contains("20 971 520"));
        // 12 bytes a parameter are more than one device of 80 GB has.
        assert!(
            of("fits A100")
                .split_whitespace()
                .skip(4)
                .eq(["no", "yes", "yes"])
        );
        let width = lines[0].chars().count();
        assert!(
            lines.iter().all(|line| line.chars().count() == width),
            "{text}"
        );
        assert_eq!(table.columns[2].1.setup.head, Head::Nf4);
        assert_eq!(table.columns[1].1.setup.head, Head::Dense(Float::Bf16));
    }

    #[test]
    fn a_plan_says_its_setup_and_what_the_peak_is_made_of() {
        let setup = Setup::new(Method::QLora, Float::Bf16);
        let text = plan(&ModelShape::llama3_8b(), &setup).unwrap().to_string();
        for part in [
            "QLoRA, rank 8 in f32, NF4 in blocks of 64, doubly quantised; base bf16",
            "peak at",
            "at the peak: weights",
            "scales",
            "optimiser state",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
}
