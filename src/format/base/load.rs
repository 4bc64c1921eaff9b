//! From a checkpoint to a model, through one bounded buffer.

use std::collections::HashMap;
use std::path::Path;

use burn::module::Module;
use burn::tensor::{DType, FloatDType, Tensor, TensorData};
use half::{bf16, f16};

use super::checkpoint::BaseCheckpoint;
use super::options::BaseOptions;
use super::plan::{Form, Job, Plan};
use super::progress::Meter;
use super::report::{BaseMismatch, BaseReport};
use super::stream::{self, Source, Stored, Stream};
use crate::Result;
use crate::model::{NewBase, NewRows, PeftModel, Table, replace_bases};
use crate::nf4::{Nf4Scales, Nf4Weight};

impl BaseCheckpoint {
    /// Reads the tensors into the float parameters of `module`, as `options` say. Ids, and whether a parameter requires a
    /// gradient, stay as they are. The output head, which `"all-linear"` does not pack, is found as
    /// [`PeftModel::with_head`] says.
    ///
    /// All names, shapes and element types are checked before the first value is read, and no parameter changes before
    /// the last one was.
    ///
    /// Linear weights that bitsandbytes has packed in NF4 are known by their tensors and taken as they are, in the model's
    /// memory as in the file; they compose to the type in their state, unless another is asked for. Those in FP4 are restored
    /// and stay dense, in the type of their state or the one asked for, unless
    /// [`with_requantized_fp4`](BaseOptions::with_requantized_fp4) packs them. All their tensors are accounted for like any
    /// other, and a `quantization_config` in a `config.json` beside the files must agree with them.
    ///
    /// A matrix of a linear layer is `[d_out, d_in]` in the files, as PyTorch's `Linear` has it. Those of GPT-2's `Conv1D` are the
    /// transpose, which [`with_conv1d`](BaseOptions::with_conv1d) must say: the shape of a square one tells nothing.
    ///
    /// Values are taken as they are. Where a model's code in Python changes them on use, as Gemma's norms multiply by
    /// `weight + 1`, the Burn model must do the same.
    ///
    /// # Memory
    ///
    /// The loaded model, and beside it at most [`MAX_BUFFER_BYTES`](super::MAX_BUFFER_BYTES) in all: the buffer
    /// ([`with_buffer`](BaseOptions::with_buffer)), and with double quantisation the f32 scales of one weight (32 MiB of
    /// 2²⁹ values in blocks of 64), for which the buffer gives way. Parameters that were initialised keep their old values until all new
    /// ones are there; those that were not are never initialised. A device with a memory of its own gets one whole
    /// tensor at a time from the host's. A `Conv1D` to be packed and a table of tokens to be
    /// [resized](BaseOptions::with_resized_vocabulary) are on the host once more, dense, one at a time.
    ///
    /// # Errors
    ///
    /// [`PeftError::BaseMismatch`](crate::PeftError::BaseMismatch) with every tensor and parameter that does not fit; of a
    /// weight in four bits, [`PeftError::Config`](crate::PeftError::Config) for what its JSON says that bitsandbytes does not
    /// write, and for a `quantization_config` that says otherwise, [`PeftError::Malformed`](crate::PeftError::Malformed) for maps of
    /// other values than are computed with, and [`PeftError::NotFinite`](crate::PeftError::NotFinite) for scales;
    /// [`PeftError::NotFinite`](crate::PeftError::NotFinite) for NaN or infinity in a weight to be packed (others are
    /// not looked at), and [`PeftError::Overflow`](crate::PeftError::Overflow) for a finite value that the element type asked for
    /// does not have, in [`PeftError::InFile`](crate::PeftError::InFile); those of
    /// [`read_at`](Self::read_at); [`PeftError::Config`](crate::PeftError::Config) for options out of range;
    /// [`PeftError::AlreadyQuantized`](crate::PeftError::AlreadyQuantized) and
    /// [`PeftError::ForeignReparameterization`](crate::PeftError::ForeignReparameterization) for a model some of whose
    /// weights cannot be replaced; those of the targets. The module has not changed then.
    pub fn load_into<M: Module>(
        &self,
        module: &mut M,
        options: &BaseOptions,
    ) -> Result<BaseReport> {
        load(self, module, None, options)
    }
}

impl<M: Module> PeftModel<M> {
    /// Reads the base model at `path`, a file or a directory as for [`BaseCheckpoint::open`], into this one, as
    /// [`BaseCheckpoint::load_into`] does. Adapters stay as they are.
    ///
    /// # Errors
    ///
    /// Those of [`BaseCheckpoint::open`] and [`BaseCheckpoint::load_into`]. The model has not changed then.
    pub fn load_base(
        &mut self,
        path: impl AsRef<Path>,
        options: &BaseOptions,
    ) -> Result<BaseReport> {
        let checkpoint = BaseCheckpoint::open_with(path, options)?;
        let head = self.named_head().map(str::to_owned);
        load(&checkpoint, self.module_mut(), head.as_deref(), options)
    }
}

fn load<M: Module>(
    checkpoint: &BaseCheckpoint,
    module: &mut M,
    head: Option<&str>,
    options: &BaseOptions,
) -> Result<BaseReport> {
    let plan = Plan::new(checkpoint, module, head, options)?;
    let total = plan.num_bytes(checkpoint);
    let meter = Meter::new(options.progress.as_ref(), plan.jobs.len(), total);
    let mut buffer = stream::buffer(options.buffer_bytes(plan.largest_scales()));
    let mut report = plan.report;
    check_copies(checkpoint, &plan.copies, &meter, &mut buffer)?;
    report.equal = plan.copies.into_iter().map(|(copy, _)| copy).collect();
    let mut bases = HashMap::with_capacity(plan.jobs.len());
    for job in plan.jobs {
        let source = Source {
            checkpoint,
            meter: &meter,
            tensor: &job.tensor,
            fp4: job.fp4(checkpoint),
            wide: job.stored == DType::F64,
            allow_overflow: options.allow_overflow,
        };
        let buffer = &mut buffer;
        let stream = Stream { source, buffer };
        let base = match job.stored {
            DType::BF16 => job.read::<bf16>(stream),
            DType::F16 => job.read::<f16>(stream),
            _ => job.read::<f32>(stream),
        }?;
        if job.fp4(checkpoint).is_some() {
            meter.add_bytes(job.num_bytes());
        }
        match &base {
            NewBase::Dense(values, _) => {
                let bytes = values.dims()[0] * values.dtype().size();
                report.dense_bytes += bytes as u64;
            }
            NewBase::Packed(weight, _) => {
                report.packed += 1;
                report.packed_bytes += weight.num_bytes() as u64;
            }
        }
        bases.insert(job.parameter.path, base);
        meter.add_tensor();
    }
    let progress = meter.progress();
    (report.read_bytes, report.elapsed) = (progress.bytes, progress.elapsed);
    // Handles are cloned, not tensors.
    *module = replace_bases(module.clone(), bases);
    Ok(report)
}

/// Checks that tensors without a parameter are what they are said to be copies of.
fn check_copies(
    checkpoint: &BaseCheckpoint,
    copies: &[(String, String)],
    meter: &Meter,
    buffer: &mut [u64],
) -> Result<()> {
    let mut mismatch = BaseMismatch {
        fitting: copies.len(),
        ..BaseMismatch::default()
    };
    for (copy, original) in copies {
        let bytes = checkpoint.tensor(copy).map_or(0, |tensor| tensor.num_bytes);
        let source = Source {
            checkpoint,
            meter,
            tensor: copy,
            fp4: None,
            wide: false,
            allow_overflow: false,
        };
        let buffer = &mut *buffer;
        let stream = Stream { source, buffer };
        if !stream.equals(original, bytes)? {
            mismatch.fitting -= 1;
            mismatch.unequal.push((copy.clone(), original.clone()));
        }
    }
    match mismatch.unequal.is_empty() {
        true => Ok(()),
        false => mismatch.check(checkpoint),
    }
}

impl Job {
    /// The values, stored as `S`, in the form they are to have.
    fn read<S: Stored>(&self, stream: Stream) -> Result<NewBase> {
        match self.dtype {
            FloatDType::BF16 => self.read_as::<S, bf16>(stream),
            FloatDType::F16 => self.read_as::<S, f16>(stream),
            _ => self.read_as::<S, f32>(stream),
        }
    }

    fn read_as<S: Stored, T: Stored>(&self, stream: Stream) -> Result<NewBase> {
        let (device, dtype, source) = (&self.parameter.device, self.dtype, stream.source);
        let packed = |weight: Nf4Weight| Ok(NewBase::Packed(weight, dtype));
        let values: Vec<T> = match (self.form, self.resize, &self.shape[..]) {
            (Form::AlreadyPacked, ..) => {
                let weight = self.four_bit(source.checkpoint);
                let weight = weight.map(|weight| weight.nf4(device, source.meter));
                let weight = weight.expect("a job of this form has a state")?;
                check_scales(&weight, dtype, &source)?;
                return packed(weight);
            }
            (Form::Packed(config), None, &[d_out, d_in]) => {
                return packed(stream.packed::<S>([d_out, d_in], &config, dtype, device)?);
            }
            (Form::PackedTransposed(config), _, &[d_in, d_out]) => {
                let values = stream.transposed::<S, S>([d_in, d_out])?;
                let shape = [d_out, d_in];
                return packed(source.packed_values(&values, shape, &config, dtype, device)?);
            }
            (Form::Packed(config), Some(resize), &[d_out, d_in]) => {
                let values = stream.in_order::<S, S>(self.num_read())?;
                let values = self.resized(values, resize);
                let shape = [d_out, d_in];
                return packed(source.packed_values(&values, shape, &config, dtype, device)?);
            }
            (Form::Transposed, None, &[rows, columns]) => {
                stream.transposed::<S, T>([rows, columns])?
            }
            (form, Some(resize), shape) => {
                let values = stream.in_order::<S, T>(self.num_read())?;
                let values = self.resized(values, resize);
                match (form, shape) {
                    (Form::Transposed, &[rows, columns]) => {
                        stream::transposed_values(&values, [rows, columns])
                    }
                    _ => values,
                }
            }
            _ => stream.in_order::<S, T>(self.num_values())?,
        };
        let n = values.len();
        // They live as long as the model: keep them out of the pools of transient tensors.
        let tensor = device.memory_persistent_allocations(values, |values| {
            Tensor::from_data(
                TensorData::new(values, [n]),
                (device, DType::from(self.dtype)),
            )
        });
        Ok(NewBase::Dense(tensor, self.loaded_shape()))
    }

    /// The rows of a table of the file, as many of them as there are in both, and new ones for the others.
    fn resized<T: Stored>(&self, mut values: Vec<T>, (rows, new_rows): (usize, NewRows)) -> Vec<T> {
        let columns: usize = self.shape[1..].iter().product();
        let added = self.shape[0].saturating_sub(rows);
        if added > 0 {
            let table = Table {
                name: &self.tensor,
                rows,
                columns,
                row: &|index, out| {
                    let row = &values[index * columns..][..columns];
                    for (out, &value) in out.iter_mut().zip(row) {
                        *out = value.into();
                    }
                },
                is_bias: self.shape.len() == 1,
            };
            let new = new_rows.draw(&table, added);
            values.extend(new.into_iter().map(T::round));
        }
        values
    }
}

/// Checks that the values of a packed weight are finite in f16, if it is to be restored to that.
fn check_scales(weight: &Nf4Weight, dtype: FloatDType, source: &Source) -> Result<()> {
    if dtype != FloatDType::F16 {
        return Ok(());
    }
    let scales = match weight.scales_to_data() {
        Nf4Scales::Plain(scales) => scales,
        Nf4Scales::Double(double) => double.dequantize(),
    };
    // The largest value of a block is its scale.
    let tensor = &format!("{}.absmax", source.tensor);
    let source = Source { tensor, ..*source };
    let checked = source.check_overflow(0, &scales, dtype.into());
    checked.map_err(|error| source.in_file(error))
}
