"""Small decoders over a vocabulary of words: trained in seconds, saved as safetensors, taken apart like the large ones.

A chapter trains one with :func:`~attnlab.models.training.fit`, which sees a module from tokens to logits, and then asks for its
:meth:`~WordModel.bridge`: from there on every tool that works on a pretrained model works on this one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from attnlab.models.booting import boot, quiet
from attnlab.models.training import seeded

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: token 0 ends and pads; prompts never hold it
END = "<end>"


class WordModel(nn.Module):
    """GPT-2 (LayerNorm, learned positions, GELU, tied output matrix) over words: tokens ``[B, T]`` to logits ``[B, T, V]``.

    Args:
        words: the vocabulary after ``<end>``; word ``i`` of it is token ``i + 1``. No word holds a space.
        n_layers: blocks.
        n_heads: heads of a block; they divide ``d_model``.
        d_model: width of the residual stream.
        d_mlp: hidden width of an MLP; 0 makes an attention-only model, whose MLPs are there and write nothing.
        context: the longest sequence.
        init_std: standard deviation of the first weights. GPT-2's 0.02 suits a width of hundreds; a width below 100 learns
            arithmetic several times faster from ``d_model ** -0.5``.
        seed: of the weights.

    Raises:
        ValueError: a size below 1, a deviation that is not positive, heads that do not divide the width, an empty, repeated
            or spaced word.
    """

    def __init__(
        self,
        words: Sequence[str],
        *,
        n_layers: int = 2,
        n_heads: int = 4,
        d_model: int = 64,
        d_mlp: int = 128,
        context: int = 64,
        init_std: float = 0.02,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "words": list(words),
            "n_layers": n_layers,
            "n_heads": n_heads,
            "d_model": d_model,
            "d_mlp": d_mlp,
            "context": context,
            "init_std": init_std,
        }
        _check(self.settings)
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=len(words) + 1,
            n_positions=context,
            n_embd=d_model,
            n_layer=n_layers,
            n_head=n_heads,
            n_inner=d_mlp or 1,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            initializer_range=init_std,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
        network: Any = seeded(lambda: GPT2LMHeadModel._from_config(config, attn_implementation="eager"), seed)
        self.network = network
        if not d_mlp:
            for block in network.transformer.h:
                for parameter in block.mlp.parameters():
                    nn.init.zeros_(parameter).requires_grad_(False)
        self.tokenizer = _word_tokenizer(words)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> logits [B, T, V]"""
        return self.network(input_ids=tokens, use_cache=False).logits

    def bridge(self, name: str = "words") -> TransformerBridge:
        """The same weights as a TransformerBridge, for :class:`attnlab.circuits.HookedLM`; a copy, which training leaves alone."""
        copied = WordModel(**self.settings).to(next(self.parameters()).device)
        copied.load_state_dict(self.state_dict())
        with quiet():
            bridge = boot(name, copied.network.eval(), self.tokenizer)
        bridge.cfg.default_prepend_bos = False
        return bridge

    def save(self, path: str | Path) -> None:
        """Write weights and settings to one safetensors file."""
        from safetensors.torch import save_file

        state = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items() if key != _TIED}
        save_file(state, str(path), metadata={"word_model": json.dumps(self.settings)})

    @classmethod
    def load(cls, path: str | Path) -> WordModel:
        """Read what :meth:`save` wrote; nothing in the file is executed.

        Raises:
            ValueError: a file that is missing, damaged, or holds another kind of model.
        """
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import load_file

        try:
            with safe_open(str(path), framework="pt") as file:
                settings = json.loads((file.metadata() or {})["word_model"])
            model, state = cls(**settings), load_file(str(path))
            state[_TIED] = state[_EMBEDDING]
            model.load_state_dict(state)
        except (OSError, SafetensorError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
            raise ValueError(f"path: {path} is no saved WordModel ({error}); write one with WordModel.save") from error
        return model.eval()


_TIED, _EMBEDDING = "network.lm_head.weight", "network.transformer.wte.weight"


def _word_tokenizer(words: Sequence[str]) -> Any:
    """Words separated by spaces; an unknown word is an error of the pairs, not a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    numbers = {END: 0} | {word: i for i, word in enumerate(words, start=1)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def _check(settings: dict[str, Any]) -> None:
    words = settings["words"]
    if not words or len(set(words)) != len(words) or any(not w or w == END or len(w.split()) != 1 for w in words):
        raise ValueError(f"words must be distinct, not empty, without spaces and without {END!r}, got {words!r}")
    for name, least in {"n_layers": 1, "n_heads": 1, "d_model": 1, "d_mlp": 0, "context": 1}.items():
        if settings[name] < least:
            raise ValueError(f"{name} must be at least {least}, got {settings[name]}")
    if not 0 < settings["init_std"] < float("inf"):
        raise ValueError(f"init_std must be a positive number, got {settings['init_std']}")
    if settings["d_model"] % settings["n_heads"]:
        raise ValueError(
            f"d_model must be a multiple of n_heads, got {settings['d_model']} for {settings['n_heads']} heads"
        )
