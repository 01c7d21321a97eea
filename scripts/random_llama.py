"""A small LLaMA with random weights as transformers saves it: sharded, LLaMA 3's scaled rotation, grouped queries.

usage: random_llama.py OUT DTYPE      DTYPE: float32, float16 or bfloat16
Needs torch and transformers (pip install torch transformers).
"""
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

out, dtype = sys.argv[1:3]
torch.manual_seed(3)
scaling = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
config = LlamaConfig(
    vocab_size=300,
    hidden_size=48,
    intermediate_size=100,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    tie_word_embeddings=dtype == "float16",
    initializer_range=0.3,
    rope_scaling={"rope_theta": 500.0, **scaling},
)
model = LlamaForCausalLM(config).to(getattr(torch, dtype))
model.save_pretrained(out, max_shard_size="60KB")
