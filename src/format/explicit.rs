//! What a file says of where an adapter is, in the file's naming.

use crate::Result;
use crate::adapter::Change;
use crate::model::{Content, Description, Naming, Parameter, PeftConfig, by_path};

use super::names::NameMap;

/// Describes an adapter of these changes, by the paths of their parameters, as a file that calls modules by `names` has to.
///
/// The adapter's own lists and patterns are kept where `names` changes nothing and they are true of the whole model. PEFT applies an
/// expression to every module, not only to linear ones, and stops at the first that it cannot adapt: `.*self_attn.*` matches the
/// attention module itself. Its `"all-linear"` may mean other modules than ours. So what these two chose is listed, as PEFT itself
/// does with the latter on saving.
///
/// # Errors
///
/// [`PeftError::Config`](crate::PeftError::Config) for a module that the map cannot name, and where no file can describe the
/// adapter.
pub(super) fn describe(
    parameters: &[Parameter],
    config: &PeftConfig,
    changes: &[(String, Change)],
    names: &NameMap,
) -> Result<Description> {
    let known = by_path(parameters);
    let mut content = Content::default();
    for (path, change) in changes {
        let parameter = known[path.as_str()];
        let module = match parameter.module() {
            "" => String::new(),
            module => names.to_file(module)?,
        };
        content.add(parameter, &module, change)?;
    }
    let naming = Naming::new(parameters, names.is_empty(), |module| {
        names.to_file(module).ok()
    });
    content.describe(config, &naming)
}
