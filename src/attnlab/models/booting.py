"""Wrap a Hugging Face model as a TransformerBridge, silently and with the tokenizer as it is."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def boot(name: str, model: nn.Module, tokenizer: Any) -> TransformerBridge:
    """A bridge in evaluation mode around a model that lies on its device in its dtype."""
    from transformer_lens.model_bridge import TransformerBridge

    # The boot replaces a tokenizer that adds no BOS by one that does, reloaded from its name. Claiming that this has
    # been done already leaves ours alone; what it really does is then found out by encoding a letter.
    given = dict(tokenizer.init_kwargs)
    tokenizer.init_kwargs = {"name_or_path": name} | given | {"add_bos_token": True}
    try:
        parameter = next(model.parameters())
        with torch.random.fork_rng(devices=[]):  # splitting GPT-2's joint projection draws numbers nobody uses
            bridge = TransformerBridge.boot_transformers(
                name, hf_model=model, tokenizer=tokenizer, device=str(parameter.device), dtype=parameter.dtype
            )
    finally:
        tokenizer.init_kwargs = given
    return bridge.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars, log lines and warnings of the libraries while a model loads; everything is put back."""
    from transformers.utils import logging as hf_logging

    bars = hf_logging.is_progress_bar_enabled()
    level = logging.root.manager.disable
    hf_logging.disable_progress_bar()
    logging.disable(logging.WARNING)  # above all the loggers: transformer_lens logs through the root logger
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        if bars:
            hf_logging.enable_progress_bar()
