//! Which parameters require gradients, and those of several graphs joined.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Gradients, Tensor};

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

/// Whether any parameter of `module` requires a gradient.
pub(super) fn requires_grad<M: Module>(module: &M) -> bool {
    let mut any = Any(false);
    module.visit(&mut any);
    any.0
}

struct Any(bool);

impl ModuleVisitor for Any {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0 |= param.is_require_grad();
    }
}
