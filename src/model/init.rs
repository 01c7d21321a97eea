//! Initial weights, by GPT-2's rule, which both architectures follow.

use crate::params::Parameter;
use crate::random::{Stream, fill_normal, generator};
use rand_chacha::ChaCha8Rng;

/// Deviation of matrices and embeddings.
const DEVIATION: f64 = 0.02;

/// Gives one parameter after the other, in the layout's order, its initial numbers.
///
/// N(0, 0.02) for matrices and embeddings, 0.02 / sqrt(2 n_layer) for the projections that write to the residual stream
/// (names that end as `residual_projections` say), zeros for biases, ones for norms (Radford et al. 2019; OpenAI's code;
/// llm.c).
pub struct Initializer<'a> {
    generator: ChaCha8Rng,
    residual_deviation: f64,
    residual_projections: &'a [&'a str],
}

impl<'a> Initializer<'a> {
    pub fn new(n_layer: usize, residual_projections: &'a [&'a str], seed: u64) -> Self {
        let residual_deviation = DEVIATION / ((2 * n_layer) as f64).sqrt();
        Self { generator: generator(seed, Stream::Init), residual_deviation, residual_projections }
    }

    pub fn fill(&mut self, parameter: &Parameter, numbers: &mut [f32]) {
        if parameter.shape.len() >= 2 {
            let writes_residual = self.residual_projections.iter().any(|name| parameter.name.ends_with(name));
            let deviation = if writes_residual { self.residual_deviation } else { DEVIATION };
            fill_normal(&mut self.generator, deviation, numbers);
        } else {
            numbers.fill(if parameter.name.ends_with(".weight") { 1.0 } else { 0.0 });
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::model::gpt2::Gpt2Config;
    use crate::model::llama::LlamaConfig;
    use crate::model::{Head, ModelShape};
    use crate::ops::rotary::Scaling;
    use crate::params::Layout;

    /// Root mean square of a new model's parameters, compared with what `expected` says.
    fn check(shape: &ModelShape, expected: &[(&str, f64)]) {
        let layout = Layout::new(shape.parameter_specs());
        let mut weights = vec![f32::NAN; layout.len()];
        shape.initialize(&layout, 1, &mut weights);
        for &(name, expected) in expected {
            let parameter = &layout.parameters()[layout.index_of(name).expect("a name of the model")];
            let numbers = &weights[parameter.range()];
            let square_sum: f64 = numbers.iter().map(|x| f64::from(x * x)).sum();
            let deviation = (square_sum / numbers.len() as f64).sqrt();
            assert!((deviation - expected).abs() <= 0.03 * expected, "{name}: {deviation}");
        }
    }

    #[test]
    fn initial_weights_have_the_deviations_of_gpt2() {
        let gpt2 = Gpt2Config {
            n_layer: 8,
            n_head: 4,
            n_embd: 64,
            n_inner: 256,
            n_positions: 32,
            vocab_size: 300,
            layer_norm_epsilon: 1e-5,
            head: Head::Tied,
        };
        check(
            &ModelShape::Gpt2(gpt2),
            &[
                ("wte.weight", 0.02),
                ("h.3.attn.c_attn.weight", 0.02),
                ("h.3.attn.c_proj.weight", 0.005),
                ("h.0.mlp.c_proj.weight", 0.005),
                ("ln_f.weight", 1.0),
                ("h.1.ln_1.weight", 1.0),
                ("h.1.mlp.c_fc.bias", 0.0),
            ],
        );
    }

    #[test]
    fn a_new_llama_has_the_same_deviations() {
        let llama = LlamaConfig {
            n_layer: 8,
            n_head: 4,
            n_kv_head: 2,
            head_dim: 16,
            n_embd: 64,
            n_inner: 256,
            n_positions: 32,
            vocab_size: 300,
            rms_norm_epsilon: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: Scaling::None,
            head: Head::Untied,
            special_ids: Default::default(),
        };
        check(
            &ModelShape::Llama(llama),
            &[
                ("model.embed_tokens.weight", 0.02),
                ("model.layers.3.self_attn.q_proj.weight", 0.02),
                ("model.layers.3.self_attn.o_proj.weight", 0.005),
                ("model.layers.0.mlp.down_proj.weight", 0.005),
                ("model.layers.7.mlp.gate_proj.weight", 0.02),
                ("model.layers.1.input_layernorm.weight", 1.0),
                ("model.norm.weight", 1.0),
                ("lm_head.weight", 0.02),
            ],
        );
    }
}
