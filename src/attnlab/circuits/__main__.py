"""Find a circuit for one's own pairs of prompts: ``python -m attnlab.circuits pairs.csv --out circuit.json``.

The pairs stand in a table with the columns clean, corrupt, answer and foil (CSV or JSON; --example prints one). All of it is
checked before anything runs. An interrupted run leaves a checkpoint beside the result; --resume goes on from it to the same bits.

exit codes: 0 done, 1 the work failed, 2 the arguments or the pairs cannot be used, 130 interrupted (the checkpoint is kept).
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

from attnlab import lab
from attnlab.circuits import checkpoint, pair_files, report
from attnlab.circuits.checkpoint import CheckpointError
from attnlab.circuits.metrics import METRICS
from attnlab.circuits.model import HookedLM
from attnlab.circuits.pair_files import PairFileError
from attnlab.circuits.pairs import Pairs
from attnlab.circuits.ungroup import ungrouped
from attnlab.circuits.work import SMOOTH, EdgeWork, EvaluationWork, HeadWork, Work

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
EDGE_METHODS, HEAD_METHODS = ("eap", "eap-ig"), ("attribution", "patch")
TINY = "tiny-random"


class UsageError(ValueError):
    """Arguments that do not go together."""


class Interrupted(Exception):
    """Somebody asked to stop."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(arguments)
    if options.example:
        sys.stdout.write(pair_files.EXAMPLE)
        return OK
    try:
        run(options)
    except (UsageError, PairFileError, CheckpointError) as error:
        return _say(error, BAD_INPUT)
    except (Interrupted, KeyboardInterrupt):
        kept = checkpoint.beside(options.out) if options.out else None
        where = f"; {kept} is kept, --resume goes on from it" if kept and kept.exists() else ""
        return _say(f"interrupted{where}", INTERRUPTED)
    except (ValueError, RuntimeError, OSError) as error:
        if options.debug:
            raise
        return _say(error, FAILED)
    return OK


def _say(message: object, code: int) -> int:
    print(f"error: {message}" if code != INTERRUPTED else message, file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where help is, without the long usage line."""
        print(f"error: {message}; --help lists all arguments", file=sys.stderr)
        raise SystemExit(BAD_INPUT)


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = _Parser(
        prog="python -m attnlab.circuits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("pairs", type=Path, nargs="?", help="CSV or JSON with the columns clean, corrupt, answer, foil")
    add("--out", type=Path, help="where the circuit goes")
    add("--format", choices=report.FORMATS, help="by the suffix of --out if left out, else json")
    add("--example", action="store_true", help="print a table of pairs to start from, and do nothing else")
    add(
        "--model", default="smollm2-135m-instruct", help=f"a name or a Hugging Face id; {TINY} is one to try things out"
    )
    add("--device", default="auto", help="auto takes a GPU if there is one; cpu, cuda, cuda:1, ...")
    how = made.add_argument_group("how the circuit is found")
    how.add_argument(
        "--method",
        default="eap-ig",
        choices=EDGE_METHODS + HEAD_METHODS,
        help="eap-ig and eap score edges, attribution and patch (exact) score heads; default eap-ig",
    )
    how.add_argument("--metric", default="logit_diff", choices=[n for n in METRICS if n != "choice_accuracy"])
    how.add_argument("--steps", type=_count, help="gradient points of eap-ig; default 5")
    how.add_argument("--direction", default="noise", choices=("noise", "denoise"))
    how.add_argument(
        "--positions", choices=("END", "all"), help="of heads: all for attribution, END for patch by default"
    )
    how.add_argument("--batch-size", type=_count, default=8, help="pairs at once; changes memory and time; default 8")
    size = made.add_argument_group("how large the circuit is").add_mutually_exclusive_group()
    size.add_argument("--top-n", type=_count, help="strongest edges (default 200) or heads (default 20)")
    size.add_argument("--threshold", type=_threshold, help="all edges or heads whose absolute score is at least this")
    worth = made.add_argument_group("what the circuit is worth")
    worth.add_argument(
        "--evaluate",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="PAIRS",
        help="faithfulness, completeness and the curve over sizes, on other pairs (fairer) or, without a file, on the same",
    )
    worth.add_argument("--ablation", default="resample", choices=("resample", "mean", "zero"))
    files = made.add_argument_group("files")
    files.add_argument("--resume", action="store_true", help="go on from the checkpoint, if there is one")
    files.add_argument("--force", action="store_true", help="replace --out, and start over if there is a checkpoint")
    files.add_argument(
        "--every", type=_seconds, default=5.0, metavar="S", help="seconds between checkpoints; default 5"
    )
    files.add_argument("--debug", action="store_true", help="show where an error comes from")
    return made


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _threshold(text: str) -> float:
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return value


def _seconds(text: str) -> float:
    value = _number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def run(options: argparse.Namespace) -> None:
    """Check everything, score, evaluate, write.

    Raises:
        UsageError, PairFileError, CheckpointError: before anything was run.
        Interrupted: after the checkpoint was written.
    """
    _check_options(options)
    text, kind = pair_files.read(options.pairs)
    held_out = pair_files.read(options.evaluate) if options.evaluate not in (None, Path()) else None
    rows, problems = pair_files.parse(text, kind)
    if problems and not rows:  # nothing that a tokenizer could say more about
        raise PairFileError(str(options.pairs), problems)
    model = load_model(options.model, options.device)
    pairs = _pairs(options.pairs, text, kind, model)
    judges = pairs if held_out is None else _pairs(options.evaluate, *held_out, model)
    model = ungrouped(model)
    settings = _settings(options, model, pairs, judges)
    saved = _resumed(options, settings)
    keeper = Keeper(checkpoint.beside(options.out), settings, saved.states, options.every)
    with stoppable() as asked:
        work = scoring(options, model, pairs)
        scores = keeper.complete("scores", work, asked)
        circuit = report.choose(model, scores, options.top_n, options.threshold)
        evaluation = None
        if options.evaluate is not None:
            metric = METRICS[options.metric]
            judge = EvaluationWork(
                model, circuit, scores, judges, metric=metric, ablation=options.ablation, batch_size=options.batch_size
            )
            evaluation = keeper.complete("evaluation", judge, asked)
    made = report.Report(model, pairs, scores, circuit, evaluation, judges, settings["scores"])
    report.write(options.out, made.text(options.format or report.format_of(options.out)))
    keeper.path.unlink(missing_ok=True)
    print(made.summary(options.out))


def _check_options(options: argparse.Namespace) -> None:
    if options.pairs is None:
        raise UsageError("no pairs are given; name a CSV or JSON file, --example prints one to start from")
    if options.out is None:
        raise UsageError("--out is missing; say where the circuit goes, such as --out circuit.json")
    if options.out.is_dir():
        raise UsageError(f"--out {options.out} is a folder; name a file in it")
    if not options.out.absolute().parent.is_dir():
        raise UsageError(f"--out {options.out}: its folder does not exist; make it first")
    if options.out.exists() and not options.force:
        raise UsageError(f"--out {options.out} exists; name another file, or replace it with --force")
    if options.steps is not None and options.method != "eap-ig":
        raise UsageError(f"--steps belongs to --method eap-ig, not to {options.method}; leave it out")
    if options.positions is not None and options.method not in HEAD_METHODS:
        raise UsageError(f"--positions belongs to heads; --method {options.method} always takes all positions")
    if options.metric not in SMOOTH and options.method != "patch":
        raise UsageError(
            f"--metric {options.metric} has no gradient; use --method patch, or one of {', '.join(SMOOTH)}"
        )
    kept = checkpoint.beside(options.out)
    if kept.exists() and not (options.resume or options.force):
        raise UsageError(f"{kept} is left from an interrupted run; go on with --resume, or start over with --force")


def load_model(name: str, device: str) -> HookedLM:
    """The model on its device.

    Raises:
        UsageError: if there is no such model or device.
    """
    import torch

    from attnlab.models import pretrained

    lab._set_threads()
    chosen = str(lab.device()) if device == "auto" else device
    try:
        where = torch.device(chosen)
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device} cannot be used ({str(error).splitlines()[0]}); use auto or cpu") from error
    if name == TINY:
        with redirect_stdout(sys.stderr):  # the bridge tells where it goes
            return HookedLM(pretrained.tiny().to(where))
    try:
        return HookedLM(pretrained.load(name, device=where))
    except ValueError as error:
        raise UsageError(f"--model: {error}") from error


def _pairs(path: Path, text: str, kind: Any, model: HookedLM) -> Pairs:
    context = getattr(model.bridge.cfg, "n_ctx", None)
    return pair_files.from_text(text, model.tokenizer, path.stem, kind=kind, context=context, source=str(path))


def scoring(options: argparse.Namespace, model: HookedLM, pairs: Pairs) -> Work:
    """The work that scores edges or heads."""
    how: dict[str, Any] = {
        "metric": METRICS[options.metric],
        "direction": options.direction,
        "batch_size": options.batch_size,
    }
    if options.method in EDGE_METHODS:
        return EdgeWork(model, pairs, steps=options.steps or 5 if options.method == "eap-ig" else 1, **how)
    return HeadWork(model, pairs, options.method, positions=options.positions, **how)


def _settings(options: argparse.Namespace, model: HookedLM, pairs: Pairs, judges: Pairs) -> dict[str, dict[str, Any]]:
    """What the bits of each stage depend on."""
    from attnlab.circuits.export import model_hash

    first = {
        "model": options.model,
        "model_hash": model_hash(model),
        "pairs": pairs.digest,
        "method": options.method,
        "metric": options.metric,
        "steps": options.steps or 5 if options.method == "eap-ig" else None,
        "direction": options.direction,
        "positions": options.positions,
        "batch_size": options.batch_size,
        "device": model.device.type,
    }
    size = {"top_n": options.top_n, "threshold": options.threshold}
    return {"scores": first, "evaluation": first | size | {"on": judges.digest, "ablation": options.ablation}}


def _resumed(options: argparse.Namespace, settings: dict[str, dict[str, Any]]) -> checkpoint.Checkpoint:
    """The states of an earlier run that fit this one."""
    path = checkpoint.beside(options.out)
    if not options.resume or not path.exists():
        if options.resume:
            print("there is no checkpoint; starting from the beginning", file=sys.stderr)
        return checkpoint.Checkpoint({}, {})
    found = checkpoint.load(path)
    if differ := checkpoint.differences(found.settings.get("scores", {}), settings["scores"]):
        raise CheckpointError(
            f"{path} is of another run ({'; '.join(differ)}); ask for the same, or start over with --force alone"
        )
    if checkpoint.differences(found.settings.get("evaluation", {}), settings["evaluation"]):
        found.states.pop("evaluation", None)  # another size or ablation: the scores still count
    return found


class Keeper:
    """Takes work through its steps, shows how far it is, and keeps its state in the checkpoint."""

    def __init__(self, path: Path, settings: dict[str, Any], states: dict[str, Any], every: float) -> None:
        self.path, self.settings, self.states, self.every = path, settings, dict(states), every

    def complete(self, stage: str, work: Work, asked: list[int]) -> Any:
        """Do all steps of a stage that are left and return its result.

        Raises:
            Interrupted: if a signal came; the state is kept.
        """
        from tqdm import tqdm

        if stage in self.states:
            work.restore(self.states[stage])
        saved = time.monotonic()
        with tqdm(total=work.total, desc=work.name, initial=work.done, unit="step", file=sys.stderr) as bar:
            for done in work.steps():
                bar.update(done - bar.n)
                if asked or time.monotonic() - saved >= self.every:
                    self._keep(stage, work)
                    saved = time.monotonic()
                if asked:
                    raise Interrupted
        self._keep(stage, work)
        return work.result()

    def _keep(self, stage: str, work: Work) -> None:
        self.states[stage] = work.state()
        checkpoint.save(self.path, self.settings, self.states)


@contextmanager
def stoppable() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM instead of dying in the middle of a step; the second Ctrl-C does not wait."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("\nstopping after this step (again: at once)", file=sys.stderr)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
