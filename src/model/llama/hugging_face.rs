//! LLaMA's Hugging Face `config.json`.

use super::{LlamaConfig, SpecialIds};
use crate::model::{Head, TextMarks};
use crate::ops::rotary::Scaling;
use serde_json::{Map, Value, json};

/// transformers' defaults, for what a config.json leaves out.
const DEFAULT_POSITIONS: usize = 2048;
const DEFAULT_EPSILON: f64 = 1e-6;
const DEFAULT_THETA: f64 = 10_000.0;

impl LlamaConfig {
    /// Reads a Hugging Face `config.json`. Its dropout rate is ignored: dropout is the run's choice.
    ///
    /// # Errors
    /// A message naming the entry, when one is missing, malformed, or asks for an arithmetic that LLaMA does not have.
    pub fn from_hugging_face(config: &Value) -> Result<Self, String> {
        let entries = Entries::of(config, "")?;
        entries.must_be("model_type", &[json!("llama")])?;
        entries.must_be("hidden_act", &[json!("silu")])?;
        entries.must_be("attention_bias", &[json!(false)])?;
        entries.must_be("mlp_bias", &[json!(false)])?;
        entries.must_be("quantization_config", &[])?;
        let n_embd = entries.required("hidden_size")?;
        let n_head = entries.required("num_attention_heads")?;
        let n_kv_head = entries.whole("num_key_value_heads")?.unwrap_or(n_head);
        if n_head % n_kv_head != 0 {
            return Err(format!(
                "`num_attention_heads` = {n_head} is no multiple of `num_key_value_heads` = {n_kv_head}"
            ));
        }
        let head_dim = match entries.whole("head_dim")? {
            Some(head_dim) => head_dim,
            None if n_embd % n_head == 0 => n_embd / n_head,
            None => return Err(format!("`hidden_size` = {n_embd} is no multiple of `num_attention_heads` = {n_head}")),
        };
        if head_dim % 2 != 0 {
            return Err(format!("the heads have {head_dim} elements; rotary positions need an even number"));
        }
        let (rope_theta, rope_scaling) = rotary(&entries)?;
        let tied = entries.truth("tie_word_embeddings")?.unwrap_or(false);
        Ok(Self {
            n_layer: entries.required("num_hidden_layers")?,
            n_head,
            n_kv_head,
            head_dim,
            n_embd,
            n_inner: entries.required("intermediate_size")?,
            n_positions: entries.whole("max_position_embeddings")?.unwrap_or(DEFAULT_POSITIONS),
            vocab_size: entries.required("vocab_size")?,
            rms_norm_epsilon: entries.positive("rms_norm_eps")?.unwrap_or(DEFAULT_EPSILON),
            rope_theta,
            rope_scaling,
            head: if tied { Head::Tied } else { Head::Untied },
            special_ids: special_ids(&entries)?,
        })
    }

    /// The `config.json` that transformers reads (4 and 5); `marks` stand in it where the shape's own config.json named
    /// no ids.
    pub fn to_hugging_face(&self, marks: Option<TextMarks>) -> Value {
        let SpecialIds { begin_of_text, end_of_text: ends, padding } = &self.special_ids;
        let end = match &ends[..] {
            [] => json!(marks.map(|marks| marks.end)),
            [only] => json!(only),
            several => json!(several),
        };
        let begin = if ends.is_empty() { begin_of_text.or(marks.map(|marks| marks.begin)) } else { *begin_of_text };
        let scaling = match self.rope_scaling {
            Scaling::None => Value::Null,
            Scaling::Llama3 { factor, low_frequency_factor, high_frequency_factor, original_positions } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_frequency_factor,
                "high_freq_factor": high_frequency_factor,
                "original_max_position_embeddings": original_positions,
            }),
        };
        json!({
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": begin,
            "eos_token_id": end,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.n_embd,
            "initializer_range": 0.02,
            "intermediate_size": self.n_inner,
            "max_position_embeddings": self.n_positions,
            "mlp_bias": false,
            "model_type": "llama",
            "num_attention_heads": self.n_head,
            "num_hidden_layers": self.n_layer,
            "num_key_value_heads": self.n_kv_head,
            "pad_token_id": padding,
            "pretraining_tp": 1,
            "rms_norm_eps": self.rms_norm_epsilon,
            "rope_scaling": scaling,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.head == Head::Tied,
            "torch_dtype": "float32",
            "use_cache": true,
            "vocab_size": self.vocab_size,
        })
    }
}

/// The base and the scaling of the rotation: flat entries (transformers 4) or nested in `rope_parameters` (5).
fn rotary(entries: &Entries) -> Result<(f64, Scaling), String> {
    entries.must_be("partial_rotary_factor", &[json!(1), json!(1.0)])?;
    let flat_theta = entries.positive("rope_theta")?;
    let (nested, theta) = match entries.section("rope_parameters")? {
        Some(nested) => {
            nested.must_be("partial_rotary_factor", &[json!(1), json!(1.0)])?;
            let theta = nested.positive("rope_theta")?;
            (Some(nested), theta.or(flat_theta))
        }
        None => (entries.section("rope_scaling")?, flat_theta),
    };
    let theta = theta.unwrap_or(DEFAULT_THETA);
    let Some(scaling) = nested else { return Ok((theta, Scaling::None)) };
    let kind = scaling.get("rope_type").or_else(|| scaling.get("type"));
    match kind.map(|kind| kind.as_str().unwrap_or_default()) {
        None | Some("default") => Ok((theta, Scaling::None)),
        Some("llama3") => {
            let number = |name: &str| scaling.positive(name)?.ok_or_else(|| scaling.missing(name));
            let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
            if high <= low {
                return Err(format!(
                    "{}: high_freq_factor {high} must be more than low_freq_factor {low}",
                    scaling.path
                ));
            }
            let factor = number("factor")?;
            let original_positions = scaling.required("original_max_position_embeddings")?;
            let (low_frequency_factor, high_frequency_factor) = (low, high);
            Ok((theta, Scaling::Llama3 { factor, low_frequency_factor, high_frequency_factor, original_positions }))
        }
        Some(_) => {
            let kind = kind.unwrap_or(&Value::Null);
            Err(format!(
                "{}rope_type is {kind}, which is not supported (only \"default\" and \"llama3\")",
                scaling.path
            ))
        }
    }
}

fn special_ids(entries: &Entries) -> Result<SpecialIds, String> {
    let id = |name: &str, value: &Value| match value.as_i64() {
        // Some files write -1 for none.
        Some(-1) => Ok(None),
        Some(id) if u32::try_from(id).is_ok() => Ok(Some(id as u32)),
        _ => Err(format!("`{name}` is {value}, expected a token id")),
    };
    let one = |name: &str| entries.get(name).map_or(Ok(None), |value| id(name, value));
    let end_of_text = match entries.get("eos_token_id") {
        Some(Value::Array(list)) => {
            let ids = list.iter().map(|value| id("eos_token_id", value)).collect::<Result<Vec<_>, _>>()?;
            ids.into_iter().flatten().collect()
        }
        _ => one("eos_token_id")?.into_iter().collect(),
    };
    Ok(SpecialIds { begin_of_text: one("bos_token_id")?, end_of_text, padding: one("pad_token_id")? })
}

/// The entries of a JSON object; null counts as absent.
struct Entries<'a> {
    map: &'a Map<String, Value>,
    /// Where the object lies, for error messages: empty, or `rope_scaling.`.
    path: String,
}

impl<'a> Entries<'a> {
    fn of(value: &'a Value, path: &str) -> Result<Self, String> {
        let map = value.as_object().ok_or_else(|| format!("`{path}` is {value}, expected an object"))?;
        Ok(Self { map, path: if path.is_empty() { String::new() } else { format!("{path}.") } })
    }

    fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    fn section(&self, name: &str) -> Result<Option<Self>, String> {
        self.get(name).map(|value| Self::of(value, name)).transpose()
    }

    fn missing(&self, name: &str) -> String {
        format!("`{}{name}` is missing", self.path)
    }

    fn malformed(&self, name: &str, value: &Value, expected: &str) -> String {
        format!("`{}{name}` is {value}, expected {expected}", self.path)
    }

    /// A whole number from 1.
    fn whole(&self, name: &str) -> Result<Option<usize>, String> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let number = value.as_u64().filter(|number| (1..=1 << 40).contains(number));
        number.map(|number| Some(number as usize)).ok_or_else(|| self.malformed(name, value, "a whole number from 1"))
    }

    fn required(&self, name: &str) -> Result<usize, String> {
        self.whole(name)?.ok_or_else(|| self.missing(name))
    }

    /// A number above 0.
    fn positive(&self, name: &str) -> Result<Option<f64>, String> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let number = value.as_f64().filter(|number| *number > 0.0);
        number.map(Some).ok_or_else(|| self.malformed(name, value, "a number above 0"))
    }

    fn truth(&self, name: &str) -> Result<Option<bool>, String> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.malformed(name, value, "true or false"))
    }

    /// Refuses an entry that is neither absent nor one of `allowed`.
    fn must_be(&self, name: &str, allowed: &[Value]) -> Result<(), String> {
        match (self.get(name), allowed) {
            (Some(value), [first, ..]) if !allowed.contains(value) => {
                Err(format!("`{}{name}` is {value}, which is not supported (only {first})", self.path))
            }
            (Some(_), []) => Err(format!("`{}{name}` is not supported", self.path)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// LLaMA 3.2 1B's published entries.
    fn llama_3_2_1b() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
            "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
            "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
            "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32,
            "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3"
            },
            "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "use_cache": true,
            "vocab_size": 128256
        })
    }

    fn count(config: &LlamaConfig) -> usize {
        crate::params::Layout::new(config.parameter_specs()).count()
    }

    #[test]
    fn published_configs_have_the_published_numbers_of_parameters() -> Result<(), String> {
        let config = LlamaConfig::from_hugging_face(&llama_3_2_1b())?;
        assert_eq!(count(&config), 1_235_814_400);
        // LLaMA 2 7B leaves most to the defaults, and has as many heads of keys as of queries.
        let llama_2 = LlamaConfig::from_hugging_face(&json!({
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
            "num_hidden_layers": 32, "rms_norm_eps": 1e-05, "vocab_size": 32000, "rope_scaling": null
        }))?;
        assert_eq!(count(&llama_2), 6_738_415_616);
        assert_eq!((llama_2.n_kv_head, llama_2.head_dim, llama_2.head), (32, 128, Head::Untied));
        assert_eq!((llama_2.rope_theta, llama_2.rope_scaling), (10_000.0, Scaling::None));
        Ok(())
    }

    #[test]
    fn rotary_entries_flat_or_nested_mean_the_same_and_survive_the_way_through_json() -> Result<(), String> {
        let flat = LlamaConfig::from_hugging_face(&llama_3_2_1b())?;
        let mut nested = llama_3_2_1b();
        let scaling = nested["rope_scaling"].take();
        nested["rope_parameters"] = scaling;
        nested["rope_parameters"]["rope_theta"] = nested["rope_theta"].take();
        assert_eq!(LlamaConfig::from_hugging_face(&nested)?, flat);
        assert_eq!(flat.special_ids.end_of_text, [128_001, 128_008, 128_009]);
        assert_eq!(LlamaConfig::from_hugging_face(&flat.to_hugging_face(Some(TextMarks { begin: 4, end: 3 })))?, flat);
        let mut without_ids = flat;
        without_ids.special_ids = SpecialIds::default();
        let written = without_ids.to_hugging_face(Some(TextMarks { begin: 4, end: 3 }));
        assert_eq!((&written["bos_token_id"], &written["eos_token_id"]), (&json!(4), &json!(3)));
        Ok(())
    }

    #[test]
    fn what_the_block_does_not_compute_is_refused_by_name() {
        for (name, value, word) in [
            ("hidden_act", json!("gelu"), "hidden_act"),
            ("attention_bias", json!(true), "attention_bias"),
            ("mlp_bias", json!(true), "mlp_bias"),
            ("rope_scaling", json!({"rope_type": "yarn", "factor": 4.0}), "yarn"),
            ("rope_scaling", json!({"type": "linear", "factor": 2.0}), "linear"),
            ("rope_scaling", json!({"rope_type": "llama3", "factor": 4.0}), "rope_scaling.low_freq_factor"),
            ("rope_parameters", json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
            ("num_key_value_heads", json!(5), "no multiple"),
            ("head_dim", json!(63), "even"),
            ("hidden_size", Value::Null, "`hidden_size` is missing"),
            ("vocab_size", json!("many"), "vocab_size"),
            ("quantization_config", json!({"bits": 4}), "quantization_config"),
            ("model_type", json!("gemma"), "gemma"),
        ] {
            let mut config = llama_3_2_1b();
            config[name] = value;
            let error = LlamaConfig::from_hugging_face(&config).expect_err(name);
            assert!(error.contains(word), "{name}: {error}");
        }
    }
}
