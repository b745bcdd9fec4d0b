"""Tiny random models as bridges, exact to the last bits of float64, for tests against hand-written oracles.

Hugging Face's Llama computes norms and rotary tables in float32 whatever the weights are, and the bridge does the same
to its softmax. The parts that round are replaced here by ones that keep the dtype of the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnlab.models.booting import boot, quiet

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

CONTEXT = 128


def tiny(
    n_layers: int = 2,
    n_heads: int = 6,
    n_kv_heads: int = 2,
    d_model: int = 48,
    vocab: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> TransformerBridge:
    """A random Llama model (RMS norms, rotary positions, gated MLP, grouped queries, untied output matrix) as a bridge.

    Query head h reads key-value head `h // (n_heads // n_kv_heads)`. All arithmetic runs in `dtype`. Token i is the
    word "t{i}" (0 is "<end>", 1 is "<unk>"), words are separated by spaces, and no BOS is added.

    Raises:
        ValueError: a size is too small, the heads do not divide, or a head's width is odd.
    """
    _require_sizes(n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, d_model=d_model, vocab=vocab)
    if n_heads % n_kv_heads:
        raise ValueError(f"n_heads must be a multiple of n_kv_heads, got {n_heads} and {n_kv_heads}")
    if d_model % (2 * n_heads):
        raise ValueError(f"d_model must be a multiple of 2 * n_heads (rotary pairs), got {d_model} for {n_heads} heads")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=d_model,
        intermediate_size=2 * d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=d_model // n_heads,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):  # the constructor draws numbers that we throw away
        model: Any = LlamaForCausalLM(config)
    model.to(dtype)
    model.model.rotary_emb = _Rotary(d_model // n_heads, 10_000.0)
    for layer in model.model.layers:
        layer.input_layernorm = _RMSNorm(d_model, config.rms_norm_eps, dtype)
        layer.post_attention_layernorm = _RMSNorm(d_model, config.rms_norm_eps, dtype)
    model.model.norm = _RMSNorm(d_model, config.rms_norm_eps, dtype)
    bridge = _filled(model, vocab, seed)
    for block in bridge.blocks:
        block.attn._masked_softmax = _softmax
    return bridge


def tiny_gpt2(
    n_layers: int = 2,
    n_heads: int = 4,
    d_model: int = 32,
    vocab: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> TransformerBridge:
    """A random GPT-2 (LayerNorm, learned positions, biases, GELU, tied output matrix) as a bridge; see `tiny`.

    Raises:
        ValueError: a size is too small, or `d_model` is not a multiple of `n_heads`.
    """
    _require_sizes(n_layers=n_layers, n_heads=n_heads, d_model=d_model, vocab=vocab)
    if d_model % n_heads:
        raise ValueError(f"d_model must be a multiple of n_heads, got {d_model} for {n_heads} heads")
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocab,
        n_positions=CONTEXT,
        n_embd=d_model,
        n_layer=n_layers,
        n_head=n_heads,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        model: Any = GPT2LMHeadModel(config)
    return _filled(model.to(dtype), vocab, seed)


class _RMSNorm(nn.Module):
    """RMS norm in the dtype of its input. The bridge tells RMS norms by the name of their class."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


class _Rotary(nn.Module):
    """Tables of cosines and sines [1, T, D] in the dtype of `x`."""

    def __init__(self, head_width: int, theta: float) -> None:
        super().__init__()
        self.head_width, self.theta = head_width, theta

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        exponents = torch.arange(0, self.head_width, 2, dtype=x.dtype, device=x.device) / self.head_width
        angles = position_ids[..., None].to(x.dtype) * self.theta**-exponents  # [1, T, D / 2]
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def _softmax(scores: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Stands in for the bridge's softmax, which asks for float32."""
    return torch.softmax(scores, dim=-1)


def _filled(model: Any, vocab: int, seed: int) -> TransformerBridge:
    """Fill the parameters from the seed and wrap the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 1 and name.endswith("weight"):
                noise = 1 + 0.1 * noise  # a norm's gain
            elif parameter.ndim == 1:
                noise = 0.1 * noise
            else:
                # Large enough that heads attend unevenly and every component moves the logits.
                noise = noise * parameter.shape[-1] ** -0.5
            parameter.copy_(noise)
    with quiet():
        bridge = boot("tiny", model.eval(), _word_tokenizer(vocab))
    bridge.cfg.default_prepend_bos = False
    return bridge


def _word_tokenizer(vocab: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<end>": 0, "<unk>": 1} | {f"t{i}": i for i in range(2, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>", pad_token="<end>")


def _require_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        least = 3 if name == "vocab" else 1  # a word besides "<end>" and "<unk>"
        if size < least:
            raise ValueError(f"{name} must be at least {least}, got {size}")
