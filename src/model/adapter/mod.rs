//! Low-rank adapters beside the matrices of a frozen model's blocks: which there are, what they start as, where they lie.

mod attached;
pub mod merge;
pub mod peft;
#[cfg(test)]
mod tests;

pub use attached::Adapters;

use super::ModelShape;
use crate::params::{Layout, Parameter, ParameterSpec};
use crate::random::{Stream, generator, uniform};

/// The adapters of a run, as its config or a folder of PEFT's tells them.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterSettings {
    pub rank: usize,
    pub alpha: f64,
    /// Names of the layers: the last words of their paths, as PEFT's `target_modules`.
    pub targets: Vec<String>,
    pub scaling: Scaling,
}

/// What an adapter's part is multiplied by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scaling {
    /// alpha / rank
    Rank,
    /// alpha / sqrt(rank) (Kalajdzievski, "A rank stabilization scaling factor for fine-tuning with LoRA", 2023)
    RootOfRank,
}

impl AdapterSettings {
    /// s in y += s * B A x.
    pub fn factor(&self) -> f32 {
        let rank = self.rank as f64;
        let divisor = match self.scaling {
            Scaling::Rank => rank,
            Scaling::RootOfRank => rank.sqrt(),
        };
        (self.alpha / divisor) as f32
    }
}

/// The target that stands for every matrix of the blocks.
pub const ALL_LINEAR: &str = "all-linear";

const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";

/// A matrix of a block: a place for an adapter.
pub struct Module {
    /// The parameter's place in the model's layout.
    pub index: usize,
    /// Its path, as in `h.0.attn.c_attn`.
    pub path: String,
    pub inputs: usize,
    pub outputs: usize,
}

impl Module {
    /// Names of A and of B, as PEFT's files have them.
    fn names(&self, shape: &ModelShape) -> [String; 2] {
        let inside = match shape {
            ModelShape::Gpt2(_) => "base_model.model.transformer.",
            ModelShape::Llama(_) => "base_model.model.",
        };
        [A, B].map(|suffix| format!("{inside}{}{suffix}", self.path))
    }

    /// Whether a target of PEFT's names it: the whole path, or its last words.
    fn is_named(&self, target: &str) -> bool {
        target == ALL_LINEAR
            || self.path.strip_suffix(target).is_some_and(|before| before.is_empty() || before.ends_with('.'))
    }
}

impl ModelShape {
    /// Whether a parameter is a matrix of a block (and neither an embedding nor the head).
    pub fn is_block_matrix(&self, parameter: &Parameter) -> bool {
        let blocks = match self {
            Self::Gpt2(_) => "h.",
            Self::Llama(_) => "model.layers.",
        };
        parameter.shape.len() == 2 && parameter.name.starts_with(blocks)
    }

    /// Every matrix of the blocks, in the order of `layout`, the model's own.
    pub fn modules(&self, layout: &Layout) -> Vec<Module> {
        let matrices = layout.parameters().iter().enumerate().filter(|(_, parameter)| self.is_block_matrix(parameter));
        let module = |(index, parameter): (usize, &Parameter)| {
            let path = parameter.name.strip_suffix(".weight").unwrap_or(&parameter.name).to_owned();
            let (inputs, outputs) = match self {
                Self::Gpt2(_) => (parameter.shape[0], parameter.shape[1]),
                Self::Llama(_) => (parameter.shape[1], parameter.shape[0]),
            };
            Module { index, path, inputs, outputs }
        };
        matrices.map(module).collect()
    }

    /// The names that `targets` may use: the last word of every module's path, without repeats.
    pub fn target_words(&self) -> Vec<String> {
        let mut words: Vec<String> = Vec::new();
        for module in self.modules(&Layout::new(self.parameter_specs())) {
            let word = module.path.rsplit('.').next().unwrap_or_default().to_owned();
            if !words.contains(&word) {
                words.push(word);
            }
        }
        words
    }

    /// The parameters of the adapters: A [rank, inputs] and B [outputs, rank] for every module that a target names.
    ///
    /// # Errors
    /// The target that names no module.
    pub fn adapter_specs(&self, settings: &AdapterSettings) -> Result<Vec<ParameterSpec>, String> {
        let modules = self.modules(&Layout::new(self.parameter_specs()));
        if let Some(stranger) = settings.targets.iter().find(|target| !modules.iter().any(|m| m.is_named(target))) {
            return Err(stranger.clone());
        }
        let named = modules.iter().filter(|module| settings.targets.iter().any(|target| module.is_named(target)));
        let specs = named.flat_map(|module| {
            let [a, b] = module.names(self);
            let spec = |name, shape: [usize; 2]| ParameterSpec { name, shape: shape.to_vec(), decays: true };
            [spec(a, [settings.rank, module.inputs]), spec(b, [module.outputs, settings.rank])]
        });
        Ok(specs.collect())
    }
}

/// Fills `weights` (a flat storage of an adapters' `layout`) with PEFT's initial numbers: A uniform in
/// +-1 / sqrt(inputs) (Kaiming's rule with a slope of sqrt(5)), B zero, so that fresh adapters change nothing.
pub fn initialize(layout: &Layout, seed: u64, weights: &mut [f32]) {
    let mut generator = generator(seed, Stream::Adapter);
    for parameter in layout.parameters() {
        let numbers = &mut weights[parameter.range()];
        if parameter.name.ends_with(B) {
            numbers.fill(0.0);
            continue;
        }
        let bound = 1.0 / (parameter.shape[1] as f32).sqrt();
        numbers.iter_mut().for_each(|x| *x = bound * (2.0 * uniform(&mut generator) - 1.0));
    }
}
