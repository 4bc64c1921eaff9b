//! The model that attacks are made on.

use std::path::Path;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use burn_peft::PeftError;
use burn_peft::format::{LoadOptions, LoadReport};
use burn_peft::model::PeftModel;

use super::{ALLOCATOR, adapter};

#[derive(Module, Debug)]
pub struct Block {
    query: Linear,
    value: Linear,
}

/// A model of four small layers.
#[derive(Module, Debug)]
pub struct Net {
    blocks: Vec<Block>,
}

impl Net {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let attend = |x: Tensor<2>, block: &Block| {
            x.clone() + block.query.forward(x.clone()) * block.value.forward(x)
        };
        self.blocks.iter().fold(x, attend)
    }
}

/// Whoever measures holds it alone; whoever allocates much meanwhile in another thread shares it.
static QUIET: RwLock<()> = RwLock::new(());

/// Keeps measurements from happening until it is dropped.
pub fn noise() -> RwLockReadGuard<'static, ()> {
    QUIET.read().unwrap_or_else(PoisonError::into_inner)
}

/// What loading may take besides a multiple of the files: paths, the error, and what any compiled pattern needs.
const ALLOWANCE: usize = 256 << 10;
/// The header's text, its parsed form, and an error that lists its names.
const MULTIPLE: usize = 6;
/// No attack may take long; the slowest here takes 0.3 s on a quiet machine.
const LIMIT: Duration = Duration::from_secs(10);

/// How often what seems to take too much is tried again.
const TRIES: usize = 30;

/// A model with one adapter, `kept`, in use.
pub struct Victim {
    pub model: PeftModel<Net>,
    x: Tensor<2>,
}

/// All that loading could change.
#[derive(Debug)]
struct State {
    params: Vec<(ParamId, Option<TensorData>)>,
    adapters: Vec<String>,
    active: Option<String>,
    report: String,
    output: TensorData,
}

impl Victim {
    pub fn new() -> Self {
        let device = Device::default();
        let linear = || LinearConfig::new(6, 6).init(&device);
        let block = || Block {
            query: linear(),
            value: linear(),
        };
        let mut model = PeftModel::new(Net {
            blocks: vec![block(), block()],
        });
        adapter(0.25)
            .attach(&mut model, "kept", &LoadOptions::default())
            .unwrap();
        let x = (0..12).map(|i| i as f32 / 12.0).collect::<Vec<_>>();
        let x = Tensor::from_data(TensorData::new(x, [2, 6]), &device);
        let victim = Self { model, x };
        // Burn makes weights, and what it keeps of them, when they are first used.
        victim.output();
        victim
    }

    fn state(&self) -> State {
        let mut params = Params(Vec::new());
        self.model.visit(&mut params);
        // Base and adapter: both layers' weights and biases, and the factors.
        assert!(params.0.len() >= 12, "{}", params.0.len());
        State {
            params: params.0,
            adapters: self.model.adapters().map(str::to_owned).collect(),
            active: self.model.active_adapter().map(str::to_owned),
            report: self.model.report().to_string(),
            output: self.output(),
        }
    }

    /// What the model gives for a fixed input.
    pub fn output(&self) -> TensorData {
        self.model.forward(self.x.clone()).into_data()
    }

    pub fn load(&mut self, dir: &Path) -> Result<LoadReport, PeftError> {
        self.model
            .load_adapter("other", dir, &LoadOptions::default())
    }

    /// The error of loading the adapter in `dir`.
    pub fn refuses(&mut self, dir: &Path) -> PeftError {
        let options = LoadOptions::default();
        self.fails(size(dir), |model| {
            model.load_adapter("other", dir, &options)
        })
    }

    /// The error of an operation on files of so many bytes, which changes nothing, and takes neither memory nor time.
    ///
    /// It is repeated while it seems to take too much: the allocator counts for the whole process, and other tests may
    /// have allocated meanwhile.
    pub fn fails<T>(
        &mut self,
        bytes: usize,
        operation: impl Fn(&mut PeftModel<Net>) -> Result<T, PeftError>,
    ) -> PeftError {
        let before = self.state();
        let most = MULTIPLE * bytes + ALLOWANCE;
        let mut tries = 0..TRIES;
        let (error, peak, elapsed) = loop {
            let quiet = QUIET.write().unwrap_or_else(PoisonError::into_inner);
            let used = ALLOCATOR.current_usage();
            ALLOCATOR.reset_peak_usage();
            let start = Instant::now();
            let result = operation(&mut self.model);
            let elapsed = start.elapsed();
            let peak = ALLOCATOR.peak_usage().saturating_sub(used);
            drop(quiet);
            let Err(error) = result else {
                panic!("it was not refused")
            };
            if (peak <= most && elapsed <= LIMIT) || tries.next().is_none() {
                break (error, peak, elapsed);
            }
        };
        let after = self.state();
        for (what, same) in [
            ("parameters", after.params == before.params),
            ("adapters", after.adapters == before.adapters),
            ("active adapter", after.active == before.active),
            ("report", after.report == before.report),
            ("outputs", after.output == before.output),
        ] {
            assert!(
                same,
                "the model's {what}: {before:?} and now {after:?}: {error}"
            );
        }
        assert!(peak <= most, "{peak} bytes for files of {bytes}: {error}");
        assert!(elapsed <= LIMIT, "{elapsed:?}: {error}");
        let text = error.to_string();
        assert!(!text.contains(char::is_control), "{text:?}");
        assert!(
            text.len() <= 4096 + bytes.min(16 << 10),
            "{} bytes of text",
            text.len()
        );
        error
    }
}

/// Bytes of the regular files in a directory.
fn size(dir: &Path) -> usize {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let metadata = entries.filter_map(|entry| entry.metadata().ok());
    let files = metadata.filter(|metadata| metadata.is_file());
    // What a sparse file claims to weigh is no excuse.
    #[cfg(unix)]
    return files
        .map(|file| {
            std::os::unix::fs::MetadataExt::blocks(&file)
                .saturating_mul(512)
                .min(file.len())
        })
        .sum::<u64>() as usize;
    #[cfg(not(unix))]
    return files.map(|file| file.len()).sum::<u64>() as usize;
}

/// Ids and values of all parameters.
struct Params(Vec<(ParamId, Option<TensorData>)>);

impl ModuleVisitor for Params {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0.push((param.id, Some(param.val().into_data())));
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.0.push((param.id, Some(param.val().into_data())));
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.0.push((param.id, Some(param.val().into_data())));
    }
}
