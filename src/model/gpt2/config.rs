//! GPT-2's shape, and its Hugging Face `config.json`.

use crate::model::weights::HEAD;
use crate::model::{Head, TextMarks};
use crate::params::{Layout, ParameterSpec};
use serde_json::{Value, json};

/// The shape of a GPT-2 (Radford et al. 2019; tanh GELU, learned positions, pre-norm).
#[derive(Clone, Debug, PartialEq)]
pub struct Gpt2Config {
    pub n_layer: usize,
    pub n_head: usize,
    pub n_embd: usize,
    /// Width of the MLP's hidden layer.
    pub n_inner: usize,
    pub n_positions: usize,
    pub vocab_size: usize,
    pub layer_norm_epsilon: f64,
    pub head: Head,
}

/// Places of one block's parameters in the layout.
#[derive(Clone, Copy, Debug)]
pub struct BlockParameters {
    pub norm_1: NormParameters,
    /// [n_embd, 3 n_embd]: query, key and value side by side.
    pub attention_in: LinearParameters,
    /// [n_embd, n_embd]
    pub attention_out: LinearParameters,
    pub norm_2: NormParameters,
    /// [n_embd, n_inner]
    pub mlp_in: LinearParameters,
    /// [n_inner, n_embd]
    pub mlp_out: LinearParameters,
}

/// Places of a linear layer's weight ([inputs, outputs], Conv1D's orientation) and bias.
#[derive(Clone, Copy, Debug)]
pub struct LinearParameters {
    pub weight: usize,
    pub bias: usize,
}

/// Places of a layer norm's weight and bias.
#[derive(Clone, Copy, Debug)]
pub struct NormParameters {
    pub weight: usize,
    pub bias: usize,
}

impl BlockParameters {
    /// All of them, in the order of the fields, each weight before its bias.
    pub fn all(&self) -> [usize; 12] {
        let Self { norm_1, attention_in, attention_out, norm_2, mlp_in, mlp_out } = self;
        let linear = |layer: &LinearParameters| [layer.weight, layer.bias];
        let norm = |norm: &NormParameters| [norm.weight, norm.bias];
        let ([a, b], [c, d], [e, f]) = (norm(norm_1), linear(attention_in), linear(attention_out));
        let ([g, h], [i, j], [k, l]) = (norm(norm_2), linear(mlp_in), linear(mlp_out));
        [a, b, c, d, e, f, g, h, i, j, k, l]
    }
}

/// Places of all parameters in the layout.
#[derive(Clone, Debug)]
pub struct Gpt2Parameters {
    /// [vocab_size, n_embd]
    pub token_embedding: usize,
    /// [n_positions, n_embd]
    pub position_embedding: usize,
    pub blocks: Vec<BlockParameters>,
    pub norm_final: NormParameters,
    /// [vocab_size, n_embd]; the token embedding where tied.
    pub head: usize,
}

impl Gpt2Config {
    pub fn head_dim(&self) -> usize {
        self.n_embd / self.n_head
    }

    /// Every parameter under its Hugging Face name; tensors of two dimensions or more decay.
    pub fn parameter_specs(&self) -> Vec<ParameterSpec> {
        let (embd, inner) = (self.n_embd, self.n_inner);
        let mut specs = Vec::with_capacity(12 * self.n_layer + 5);
        let mut add = |name: String, shape: &[usize]| {
            specs.push(ParameterSpec { name, shape: shape.to_vec(), decays: shape.len() >= 2 });
        };
        add("wte.weight".into(), &[self.vocab_size, embd]);
        add("wpe.weight".into(), &[self.n_positions, embd]);
        for layer in 0..self.n_layer {
            let mut of = |name: &str, shape: &[usize]| add(format!("h.{layer}.{name}"), shape);
            of("ln_1.weight", &[embd]);
            of("ln_1.bias", &[embd]);
            of("attn.c_attn.weight", &[embd, 3 * embd]);
            of("attn.c_attn.bias", &[3 * embd]);
            of("attn.c_proj.weight", &[embd, embd]);
            of("attn.c_proj.bias", &[embd]);
            of("ln_2.weight", &[embd]);
            of("ln_2.bias", &[embd]);
            of("mlp.c_fc.weight", &[embd, inner]);
            of("mlp.c_fc.bias", &[inner]);
            of("mlp.c_proj.weight", &[inner, embd]);
            of("mlp.c_proj.bias", &[embd]);
        }
        add("ln_f.weight".into(), &[embd]);
        add("ln_f.bias".into(), &[embd]);
        if self.head == Head::Untied {
            add(HEAD.into(), &[self.vocab_size, embd]);
        }
        specs
    }

    /// Looks every parameter up in a layout made of [`Self::parameter_specs`].
    ///
    /// # Panics
    /// When the layout is another model's: a defect of the caller.
    pub fn parameters(&self, layout: &Layout) -> Gpt2Parameters {
        let index = |name: &str| layout.index_of(name).unwrap_or_else(|| panic!("no parameter {name} in the layout"));
        let linear = |name: &str| LinearParameters {
            weight: index(&format!("{name}.weight")),
            bias: index(&format!("{name}.bias")),
        };
        let norm = |name: &str| NormParameters {
            weight: index(&format!("{name}.weight")),
            bias: index(&format!("{name}.bias")),
        };
        let blocks = (0..self.n_layer).map(|layer| BlockParameters {
            norm_1: norm(&format!("h.{layer}.ln_1")),
            attention_in: linear(&format!("h.{layer}.attn.c_attn")),
            attention_out: linear(&format!("h.{layer}.attn.c_proj")),
            norm_2: norm(&format!("h.{layer}.ln_2")),
            mlp_in: linear(&format!("h.{layer}.mlp.c_fc")),
            mlp_out: linear(&format!("h.{layer}.mlp.c_proj")),
        });
        let token_embedding = index("wte.weight");
        Gpt2Parameters {
            token_embedding,
            position_embedding: index("wpe.weight"),
            blocks: blocks.collect(),
            norm_final: norm("ln_f"),
            head: if self.head == Head::Untied { index(HEAD) } else { token_embedding },
        }
    }

    /// Reads a Hugging Face `config.json`. Its dropout rates are ignored: dropout is the run's choice.
    ///
    /// # Errors
    /// A message naming the entry, when one is missing, malformed, or asks for an arithmetic that GPT-2 does not have.
    pub fn from_hugging_face(config: &Value) -> Result<Self, String> {
        if let Some(model_type) = config.get("model_type")
            && model_type != "gpt2"
        {
            return Err(format!("`model_type` is {model_type}, expected \"gpt2\""));
        }
        let whole = |names: &[&str]| -> Result<usize, String> {
            let found = names.iter().find_map(|name| config.get(name).filter(|value| !value.is_null()));
            let value = found.ok_or_else(|| format!("`{}` is missing", names[0]))?;
            value.as_u64().filter(|n| *n > 0).map(|n| n as usize).ok_or_else(|| format!("`{}` is {value}", names[0]))
        };
        let must_be = |name: &str, allowed: &[Value]| match config.get(name) {
            Some(value) if !value.is_null() && !allowed.contains(value) => {
                Err(format!("`{name}` is {value}, which is not supported (only {})", allowed[0]))
            }
            _ => Ok(()),
        };
        must_be("activation_function", &[json!("gelu_new"), json!("gelu_pytorch_tanh")])?;
        must_be("scale_attn_weights", &[json!(true)])?;
        must_be("scale_attn_by_inverse_layer_idx", &[json!(false)])?;
        must_be("add_cross_attention", &[json!(false)])?;
        let n_embd = whole(&["n_embd", "hidden_size"])?;
        let n_head = whole(&["n_head", "num_attention_heads"])?;
        if n_embd % n_head != 0 {
            return Err(format!("`n_embd` = {n_embd} is not a multiple of `n_head` = {n_head}"));
        }
        let inner_given = config.get("n_inner").is_some_and(|value| !value.is_null());
        let tied = config.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(true);
        Ok(Self {
            n_layer: whole(&["n_layer", "num_hidden_layers"])?,
            n_head,
            n_embd,
            n_inner: if inner_given { whole(&["n_inner"])? } else { 4 * n_embd },
            n_positions: whole(&["n_positions", "n_ctx", "max_position_embeddings"])?,
            vocab_size: whole(&["vocab_size"])?,
            layer_norm_epsilon: config.get("layer_norm_epsilon").and_then(Value::as_f64).unwrap_or(1e-5),
            head: if tied { Head::Tied } else { Head::Untied },
        })
    }

    /// The `config.json` that transformers reads; `marks` are the tokenizer's, if there is one.
    pub fn to_hugging_face(&self, marks: Option<TextMarks>) -> Value {
        json!({
            "activation_function": "gelu_new",
            "architectures": ["GPT2LMHeadModel"],
            "attn_pdrop": 0.0,
            "bos_token_id": marks.map(|marks| marks.begin),
            "embd_pdrop": 0.0,
            "eos_token_id": marks.map(|marks| marks.end),
            "initializer_range": 0.02,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "model_type": "gpt2",
            "n_ctx": self.n_positions,
            "n_embd": self.n_embd,
            "n_head": self.n_head,
            "n_inner": self.n_inner,
            "n_layer": self.n_layer,
            "n_positions": self.n_positions,
            "resid_pdrop": 0.0,
            "scale_attn_weights": true,
            "tie_word_embeddings": self.head == Head::Tied,
            "torch_dtype": "float32",
            "use_cache": true,
            "vocab_size": self.vocab_size,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub fn gpt2_124m() -> Gpt2Config {
        Gpt2Config {
            n_layer: 12,
            n_head: 12,
            n_embd: 768,
            n_inner: 3072,
            n_positions: 1024,
            vocab_size: 50257,
            layer_norm_epsilon: 1e-5,
            head: Head::Tied,
        }
    }

    #[test]
    fn gpt2_124m_has_the_published_numbers_of_parameters() {
        let layout = Layout::new(gpt2_124m().parameter_specs());
        let of = |decays: bool| layout.parameters().iter().filter(move |p| p.decays == decays);
        assert_eq!(layout.count(), 124_439_808);
        assert_eq!((of(true).count(), of(true).map(|p| p.len).sum::<usize>()), (50, 124_318_464));
        assert_eq!((of(false).count(), of(false).map(|p| p.len).sum::<usize>()), (98, 121_344));
    }

    #[test]
    fn a_config_survives_the_way_through_hugging_face_json() -> Result<(), String> {
        let config = gpt2_124m();
        assert_eq!(
            Gpt2Config::from_hugging_face(&config.to_hugging_face(Some(TextMarks { begin: 50256, end: 50256 })))?,
            config
        );
        let mut other = config.to_hugging_face(None);
        other["activation_function"] = json!("relu");
        assert!(Gpt2Config::from_hugging_face(&other).is_err_and(|e| e.contains("activation_function")));
        other = json!({"model_type": "llama"});
        assert!(Gpt2Config::from_hugging_face(&other).is_err());
        Ok(())
    }
}
