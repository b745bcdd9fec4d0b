"""What the chapter ``circuits/preplan-anchor`` keeps: the answers of SmolLM2, and the comparison of credit rules on many seeds.

``python -m attnlab.circuits.preplan_anchor_runs --answers FILE`` generates the answers (a CPU, minutes);
``--record FILE`` trains the small model under every credit rule (a GPU or a CPU).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from attnlab import lab
from attnlab.data import word_problems

SHORTEST, LONGEST, WANTED = 90, 150, 20


def generate(path: Path, command: str, wanted: int = WANTED) -> None:
    """Greedy answers of SmolLM2-135M-Instruct to the problems in their order; the first ``wanted`` of at least 90 tokens are kept."""
    from attnlab.models import smollm2

    model, tokenizer = smollm2.load_model()
    answers: list[dict[str, Any]] = []
    asked = 0
    for problem, result in word_problems.PROBLEMS:
        if len(answers) == wanted:
            break
        asked += 1
        prompt = tokenizer.apply_chat_template(
            word_problems.message(problem), add_generation_prompt=True, return_dict=True
        )["input_ids"]
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            full = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=LONGEST,
                pad_token_id=tokenizer.pad_token_id,
            )
        response = full[0, len(prompt) :].tolist()
        if len(response) >= SHORTEST:
            text = tokenizer.decode(response, skip_special_tokens=True)
            answers.append(
                {"problem": problem, "result": result, "text": text, "prompt": list(prompt), "response": response}
            )
        print(f"{asked}: {len(response)} tokens", flush=True)
    made = {
        "command": command,
        "model": smollm2.NAME,
        "sha256": smollm2.SOURCE.sha256,
        "date": lab.now(),
        "versions": lab.versions(),
        "asked": asked,
        "decoding": f"greedy, {SHORTEST} to {LONGEST} tokens, shorter answers passed over",
    }
    lab.write_json(path, {"made": made, "answers": answers})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=Path, help="file to write the answers of SmolLM2 to")
    chosen = parser.parse_args(arguments)
    command = "python -m attnlab.circuits.preplan_anchor_runs"
    if chosen.answers:
        generate(chosen.answers, f"{command} --answers {chosen.answers.name}")


if __name__ == "__main__":
    main()
