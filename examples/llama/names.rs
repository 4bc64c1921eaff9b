//! How a parameter of the Burn model is called and laid out in a Hugging Face checkpoint.
//!
//! The modules carry Hugging Face's names, so a path is a name, but for two things: Burn's norms call their weight
//! `gamma`, and a linear layer holds `[d_in, d_out]` where PyTorch holds `[d_out, d_in]`.

/// Follows a walk over a module and translates each parameter's path.
#[derive(Default)]
pub struct NameStack {
    path: Vec<String>,
    containers: Vec<String>,
}

impl NameStack {
    /// Call from `enter_module`.
    pub fn enter(&mut self, name: &str, container: &str) {
        self.path.push(name.to_owned());
        self.containers.push(container.to_owned());
    }

    /// Call from `exit_module`.
    pub fn exit(&mut self) {
        self.path.pop();
        self.containers.pop();
    }

    /// The current parameter's name in the checkpoint.
    pub fn name(&self) -> String {
        let path = self.path.join(".");
        match path.strip_suffix(".gamma") {
            Some(norm) if self.is_in("RmsNorm") => format!("{norm}.weight"),
            _ => path,
        }
    }

    /// Whether the current parameter is a matrix that the checkpoint holds transposed.
    pub fn is_transposed(&self) -> bool {
        self.is_in("Linear") && self.path.last().is_some_and(|name| name == "weight")
    }

    fn is_in(&self, module: &str) -> bool {
        self.containers
            .last()
            .and_then(|container| container.strip_prefix("Struct:"))
            == Some(module)
    }
}
