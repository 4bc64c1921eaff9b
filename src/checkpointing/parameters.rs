//! What checkpointing asks of the parameters of a block: that they exist, whether they are trained, their gradients.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Gradients, Tensor};

/// Initialises the parameters that are not yet.
pub(super) fn initialize<M: Module>(module: &M) {
    module.visit(&mut Initialize);
}

struct Initialize;

impl ModuleVisitor for Initialize {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if !param.is_initialized() {
            param.base();
        }
    }
}

/// Whether any parameter of `module` requires a gradient.
pub(super) fn requires_grad<M: Module>(module: &M) -> bool {
    let mut any = RequiresGrad(false);
    module.visit(&mut any);
    any.0
}

struct RequiresGrad(bool);

impl ModuleVisitor for RequiresGrad {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0 |= param.is_require_grad();
    }
}

/// Moves the gradients of `module`'s parameters out of `gradients`, onto those that `all` has.
pub(super) fn add_of<M: Module>(module: &M, gradients: &mut Gradients, all: &mut GradientsParams) {
    let part = GradientsParams::from_module(gradients, module);
    module.visit(&mut Add { part, all });
}

struct Add<'a> {
    part: GradientsParams,
    all: &'a mut GradientsParams,
}

impl ModuleVisitor for Add<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(gradient) = self.part.remove::<D>(param.id) else {
            return;
        };
        let sum = match self.all.remove::<D>(param.id) {
            Some(other) => other + gradient,
            None => gradient,
        };
        self.all.register(param.id, sum);
    }
}
