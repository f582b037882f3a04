"""Checkpoints that `infini_attn.hf` converts and saves, with the logits that it computes for them.

    pip install "./python[test]"
    python candle/tests/golden/make.py

Files that are there are compared by `cargo test -p infini-attn-candle checkpoint`; they need not be made
again unless another model is added.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from infini_attn import hf

SMALL = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=8)
SCALED = dict(rope_theta=5e3, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
MODELS = {
    "llama": dict(attention_bias=True, rope_parameters=SCALED),
    "mistral": dict(sliding_window=None),
    "qwen2": dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)),
    "qwen3": dict(tie_word_embeddings=True),
}
TOKENS = 45

torch.manual_seed(1)
for name, options in MODELS.items():
    folder = Path(__file__).parent / name
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SMALL, **options)).eval()
    hf.convert(model, segment_len=8, update="linear" if name == "mistral" else "delta",
               empty_memory="gate" if name == "qwen2" else "bypass")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokens = torch.randint(0, SMALL["vocab_size"], (1, TOKENS))
    with torch.no_grad():
        logits = model(tokens).logits
    save_file({"tokens": tokens[0].to(torch.uint32), "logits": logits[0]}, folder / "expected.safetensors")
