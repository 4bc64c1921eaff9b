//! How a packed weight looks to whoever reads its parameter: like the dense weight that was packed.
//!
//! Layers of Burn and of others read a weight's shape, dtype and device from its `Param`. A packed weight has no dense tensor to
//! show, so its base is a *view*: one NaN, expanded to the dense shape `[d_in, d_out]`, which takes the memory of one value. It
//! holds NaN because the base is never a part of any result: code that computes with the base instead of `val()` sees it at once.
//!
//! * The view is made on first use, because Burn's NdArray backend has no views and would allocate the dense tensor.
//! * Records hold an empty tensor `[0, 0]` in its place. The parameter's own mappers do that on saving and undo it on loading.
//! * Burn compares the shape of a recorded tensor with that of the parameter *before* it calls the mapper that loads. A mapper of
//!   a whole [`PeftModel`](super::PeftModel) is therefore shown a parameter that says `[0, 0]` until its value is read
//!   ([`shown_to`]).
//! * The mappers that the parameter had before it was packed (those of Burn's column layout) are kept. They serve every dense
//!   value, and are the parameter's own again when the weight becomes dense.

use std::collections::HashMap;

use burn::module::{
    Flag, Module, ModuleMapper, ModuleVisitor, Param, ParamId, ParamMapper, Reparameterization,
};
use burn::tensor::{Bool, DType, Device, FloatDType, Int, Shape, Tensor, TensorData};
use half::{bf16, f16};

use super::traverse::as_matrix;
use super::weight::{PeftWeight, REPARAMETERIZATION, Transfer};

/// What the base of a packed parameter shows.
#[derive(Clone, Debug)]
pub(super) struct DenseLook {
    /// `[d_in, d_out]`.
    pub dims: [usize; 2],
    pub dtype: FloatDType,
    /// The mappers of the dense parameter.
    pub mapper: ParamMapper<Tensor<2>>,
}

impl DenseLook {
    /// The base of the packed parameter `id`: it requires no gradient.
    pub fn param<const D: usize>(&self, id: ParamId, device: Device) -> Param<Tensor<D>> {
        let [d_in, d_out] = self.dims;
        let probe = Tensor::zeros([1, 2], &device);
        // Burn declares an uninitialised parameter of column layout in the shape that it is stored in.
        let declared = match self.mapper.on_load(probe).dims() {
            [2, 1] => [d_out, d_in],
            _ => [d_in, d_out],
        };
        self.declared(id, device, declared)
    }

    /// The same with the shape of what a record holds, until its value is read.
    fn recorded<const D: usize>(&self, id: ParamId, device: Device) -> Param<Tensor<D>> {
        self.declared(id, device, [0, 0])
    }

    fn declared<const D: usize>(
        &self,
        id: ParamId,
        device: Device,
        shape: [usize; 2],
    ) -> Param<Tensor<D>> {
        let (dims, dtype) = (self.dims, self.dtype);
        let [on_save, on_load] = [self.mapper.clone(), self.mapper.clone()];
        let param = Param::uninitialized(
            id,
            move |device, _| view(dims, dtype, device),
            device,
            false,
            Shape::from(shape),
        );
        let param = param
            .save_mapper(move |value| match is_view(&value, dims) {
                true => Tensor::empty([0, 0], (&value.device(), value.dtype())),
                false => on_save.on_save(value),
            })
            .load_mapper(move |value| match value.shape().num_elements() {
                0 => view(dims, float_or(value.dtype(), dtype), &value.device()),
                _ => on_load.on_load(value),
            });
        of_matrix(param)
    }
}

/// The mappers of a matrix, whose value is not asked for.
pub(super) fn mapper_of<const D: usize>(param: &Param<Tensor<D>>) -> ParamMapper<Tensor<2>> {
    let param = as_matrix(param);
    let probe = Tensor::zeros([1, 1], &param.lazy_device());
    let id = param.id;
    let (_, _, mapper) = param.transform_for_load(probe, id).consume();
    mapper
}

/// A parameter of `D` axes, which are two, as that of a matrix.
pub(super) fn into_matrix<const D: usize>(param: Param<Tensor<D>>) -> Param<Tensor<2>> {
    let param: Box<dyn std::any::Any> = Box::new(param);
    *param
        .downcast()
        .expect("only matrices are packed, so D is 2")
}

/// A matrix as a parameter of `D` axes, which are two.
pub(super) fn of_matrix<const D: usize>(param: Param<Tensor<2>>) -> Param<Tensor<D>> {
    let param: Box<dyn std::any::Any> = Box::new(param);
    *param
        .downcast()
        .expect("only matrices are packed, so D is 2")
}

/// The dtype of a float tensor that is not quantised, else another one.
pub(super) fn float_or(dtype: DType, other: FloatDType) -> FloatDType {
    match dtype {
        DType::F64 | DType::F32 | DType::Flex32 | DType::F16 | DType::BF16 => dtype.into(),
        _ => other,
    }
}

/// One NaN in the shape of the dense weight.
fn view(dims: [usize; 2], dtype: FloatDType, device: &Device) -> Tensor<2> {
    let dtype = DType::from(dtype);
    let nan = match marker(dtype) {
        Some(data) => data,
        None => TensorData::new(vec![f32::NAN], [1]),
    };
    let nan = device.memory_persistent_allocations(nan, |nan| {
        Tensor::<1>::from_data(nan, (device, dtype)).reshape([1, 1])
    });
    match dims.contains(&0) {
        true => Tensor::empty(dims, (device, dtype)),
        false => nan.expand(dims),
    }
}

/// A NaN whose payload tells it from any that is computed. Casts between these dtypes keep the payload.
fn marker(dtype: DType) -> Option<TensorData> {
    Some(match dtype {
        DType::F64 => TensorData::new(vec![f64::from_bits(0x7FFD_6000_0000_0000)], [1]),
        DType::F32 | DType::Flex32 => TensorData::new(vec![f32::from_bits(0x7FEB_0000)], [1]),
        DType::F16 => TensorData::new(vec![f16::from_bits(0x7F58)], [1]),
        DType::BF16 => TensorData::new(vec![bf16::from_bits(0x7FEB)], [1]),
        _ => return None,
    })
}

/// Whether a value is what [`view`] made, also after a cast or a move.
fn is_view(value: &Tensor<2>, dims: [usize; 2]) -> bool {
    if value.dims() != dims || dims.contains(&0) {
        return false;
    }
    let Some(marker) = marker(value.dtype()) else {
        return false;
    };
    let first = value.clone().without_autodiff().slice([0..1, 0..1]);
    let first = first.try_into_data();
    first.is_ok_and(|first| first.as_bytes() == marker.as_bytes())
}

/// What the packed parameters of `module` show, by their ids.
pub(super) fn looks<M: Module>(module: &M) -> HashMap<ParamId, DenseLook> {
    let _idle = Transfer::idle_afterwards();
    let mut looks = Looks::default();
    module.visit(&mut looks);
    looks.found
}

#[derive(Default)]
struct Looks {
    found: HashMap<ParamId, DenseLook>,
    /// The last parameter outside of reparameterizations.
    last: Option<ParamId>,
    /// How deep in reparameterizations.
    depth: usize,
}

impl ModuleVisitor for Looks {
    fn enter_module(&mut self, name: &str, container: &str) {
        if container == REPARAMETERIZATION {
            if self.depth == 0 && name == PeftWeight::NAME {
                Transfer::Look.swap();
            }
            self.depth += 1;
        }
    }

    fn exit_module(&mut self, _name: &str, container: &str) {
        if container == REPARAMETERIZATION {
            self.depth -= 1;
            if let (Transfer::Looked(look), Some(id)) = (Transfer::Idle.swap(), self.last) {
                self.found.insert(id, look);
            }
        }
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.depth == 0 {
            self.last = Some(param.id);
        }
    }
}

/// The mappers that packed parameters of `module` had as dense ones, by the ids of the parameters.
pub(super) fn mappers<M: Module>(module: &M) -> HashMap<ParamId, ParamMapper<Tensor<2>>> {
    let looks = looks(module).into_iter();
    looks.map(|(id, look)| (id, look.mapper)).collect()
}

/// Gives parameters that became dense the mappers of [`mappers`] again.
pub(super) fn restore_mappers<M: Module>(
    module: M,
    mappers: HashMap<ParamId, ParamMapper<Tensor<2>>>,
) -> M {
    struct Restore(HashMap<ParamId, ParamMapper<Tensor<2>>>);

    impl ModuleMapper for Restore {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let Some(mapper) = self.0.get(&param.id) else {
                return param;
            };
            let (id, value, _) = into_matrix(param).consume();
            of_matrix(Param::from_mapped_value(id, value, mapper.clone()))
        }
    }

    match mappers.is_empty() {
        true => module,
        false => module.map(&mut Restore(mappers)),
    }
}

/// Maps `module` by `mapper`, which is shown packed parameters as they are recorded, and keeps their look.
///
/// A cast of a packed parameter changes the dtype of the dense weight that it composes to, as it would that of a dense one. Other
/// values that the mapper returns are dropped: the weight is the packed one.
pub(super) fn map_packed<M: Module, F: ModuleMapper>(module: M, mapper: &mut F) -> M {
    let looks = looks(&module);
    if looks.is_empty() {
        return module.map(mapper);
    }
    let _idle = Transfer::idle_afterwards();
    module.map(&mut ShownTo { mapper, looks })
}

struct ShownTo<'a, F> {
    mapper: &'a mut F,
    looks: HashMap<ParamId, DenseLook>,
}

impl<F: ModuleMapper> ModuleMapper for ShownTo<'_, F> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.mapper.enter_module(name, container);
    }

    fn exit_module(&mut self, name: &str, container: &str) {
        self.mapper.exit_module(name, container);
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(look) = self.looks.get(&param.id) else {
            return self.mapper.map_float(param);
        };
        let mut look = look.clone();
        let shown = look.recorded(param.id, param.lazy_device());
        let mapped = self.mapper.map_float::<D>(shown);
        if mapped.is_initialized() {
            let dtype = float_or(mapped.base().dtype(), look.dtype);
            if dtype != look.dtype {
                look.dtype = dtype;
                // The state is mapped next.
                Transfer::Cast(dtype).swap();
            }
        }
        look.param(mapped.id, mapped.lazy_device())
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        self.mapper.map_int(param)
    }

    fn map_bool<const D: usize>(
        &mut self,
        param: Param<Tensor<D, Bool>>,
    ) -> Param<Tensor<D, Bool>> {
        self.mapper.map_bool(param)
    }

    fn map_flag(&mut self, flag: Param<Flag>) -> Param<Flag> {
        self.mapper.map_flag(flag)
    }
}

/// Does `change` to `module`, which moves or converts every parameter, while packed ones have an empty base: nothing dense is
/// copied from device to device.
pub(super) fn without_bases<M: Module>(module: M, change: impl FnOnce(M) -> M) -> M {
    let looks = looks(&module);
    if looks.is_empty() {
        return change(module);
    }
    let module = change(module.map(&mut Bases {
        looks: &looks,
        shown: false,
    }));
    module.map(&mut Bases {
        looks: &looks,
        shown: true,
    })
}

/// Takes the bases of packed parameters away, or shows them again.
struct Bases<'a> {
    looks: &'a HashMap<ParamId, DenseLook>,
    shown: bool,
}

impl ModuleMapper for Bases<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (id, device) = (param.id, param.lazy_device());
        match self.looks.get(&id) {
            None => param,
            Some(look) if self.shown => look.param(id, device),
            Some(look) => {
                let dtype = DType::from(look.dtype);
                Param::initialized(id, Tensor::empty([0; D], (&device, dtype)))
            }
        }
    }
}
