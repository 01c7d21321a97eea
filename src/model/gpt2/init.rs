//! GPT-2's initial weights.

use super::Gpt2Config;
use crate::params::Layout;
use crate::random::{Stream, fill_normal, generator};

/// Fills `weights` (a flat storage of `layout`) from `seed`.
///
/// N(0, 0.02) for matrices and embeddings, 0.02 / sqrt(2 n_layer) for the two projections that write to the residual
/// stream, zeros for biases, ones for norms (Radford et al. 2019; OpenAI's code; llm.c).
pub fn initialize(config: &Gpt2Config, layout: &Layout, seed: u64, weights: &mut [f32]) {
    let mut generator = generator(seed, Stream::Init);
    let residual = 0.02 / ((2 * config.n_layer) as f64).sqrt();
    for parameter in layout.parameters() {
        let numbers = &mut weights[parameter.range()];
        if parameter.shape.len() >= 2 {
            let deviation = if parameter.name.ends_with("c_proj.weight") { residual } else { 0.02 };
            fill_normal(&mut generator, deviation, numbers);
        } else {
            numbers.fill(if parameter.name.ends_with(".weight") { 1.0 } else { 0.0 });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Head;
    use super::*;

    #[test]
    fn initial_weights_have_the_deviations_of_gpt2() {
        let config = Gpt2Config {
            n_layer: 8,
            n_head: 4,
            n_embd: 64,
            n_inner: 256,
            n_positions: 32,
            vocab_size: 300,
            layer_norm_epsilon: 1e-5,
            head: Head::Tied,
        };
        let layout = Layout::new(config.parameter_specs());
        let mut weights = vec![f32::NAN; layout.len()];
        initialize(&config, &layout, 1, &mut weights);
        let deviation = |name: &str| {
            let parameter = &layout.parameters()[layout.index_of(name).expect("a name of GPT-2")];
            let numbers = &weights[parameter.range()];
            (numbers.iter().map(|x| f64::from(x * x)).sum::<f64>() / numbers.len() as f64).sqrt()
        };
        for (name, expected) in [
            ("wte.weight", 0.02),
            ("h.3.attn.c_attn.weight", 0.02),
            ("h.3.attn.c_proj.weight", 0.005),
            ("h.0.mlp.c_proj.weight", 0.005),
            ("ln_f.weight", 1.0),
            ("h.1.ln_1.weight", 1.0),
            ("h.1.mlp.c_fc.bias", 0.0),
        ] {
            assert!((deviation(name) - expected).abs() <= 0.03 * expected, "{name}: {}", deviation(name));
        }
    }
}
