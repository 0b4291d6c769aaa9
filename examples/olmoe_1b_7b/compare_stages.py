"""Compare the stages of life.sh on questions that no stage was trained on.

python examples/olmoe_1b_7b/compare_stages.py --stage pretrained=RUN --stage SFT=RUN \
  --stage DPO=RUN --questions DIR --output TABLE.md [--harness DIR]

DIR holds chats.valid.jsonl and pairs.valid.jsonl of tools/collect_chats.py; the folder of
--harness STAGE.json, written by tools/evaluate.py --output. Writes the table, and its values to
TABLE.json. Answers are greedy.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from moetron.common.files import write_text
from moetron.data.chat.chat_rows import Kind, examples
from moetron.data.chat.encode_chat import encode_question, encode_rendered
from moetron.data.chat.templates import OlmoeTemplate
from moetron.data.chat.write_chats import read_json_rows
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.checkpoint.compatibility import tokenizer_fingerprints
from moetron.moe.checkpoint.vocabulary import vocabulary_of
from moetron.moe.config.schema.settings import Settings
from moetron.moe.inference.batch_generation import Request, generate_batch
from moetron.moe.inference.generation import load_model
from moetron.moe.inference.sampling import Sampling
from moetron.moe.inference.scoring import score
from moetron.moe.layers.language_model import LanguageModel
from moetron.moe.monitoring.library_warnings import quieten_libraries
from moetron.moe.training import runtime
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.run_copy import load_run_tokenizer

BATCH = 32
ASKED = 64
"""Held-out questions that are answered."""
LONGEST_ANSWER = 96
"""Tokens; held-out answers have up to 90."""
PREFERRED = re.compile(r" See the (module|manual of) \S+\.$")
"""Form of the answers that the pairs prefer."""
Conversation = list[tuple[list[int], list[int]]]
"""Context and answer of each turn, in tokens."""
ROWS = {
    "answer_loss": "loss of held-out answers, nats per token",
    "stops": "answers that end with the end-of-turn token",
    "in_template": "answers that do, have text, and no marker of a role",
    "names_place": "answers in the preferred form",
    "pair_order": "held-out pairs: preferred answer is the more probable one",
    "accuracy": "held-out pairs: preferred answer gained on the other since the stage before",
}


def conversations(path: Path, kind: Kind, tokenizer: Tokenizer) -> list[Conversation]:
    """Return the conversations of a file, those of a pair in a row."""
    template, found = OlmoeTemplate(tokenizer.end_text), []
    for row in read_json_rows([path]):
        for example in examples(row, kind):
            ids, mask = encode_rendered(template.render(example.messages), tokenizer)
            ends = np.flatnonzero(np.diff(mask.astype(np.int8), append=0)) + 1
            edges = list(zip(ends[::2].tolist(), ends[1::2].tolist(), strict=True))
            found.append(
                [(ids[:first].tolist(), ids[first:last].tolist()) for first, last in edges]
            )
    return found


def answer_log_probs(model: LanguageModel, rows: Sequence[Conversation]) -> np.ndarray:
    """Return the log-probability of each conversation's answers, float64."""
    flat = [(number, turn) for number, turns in enumerate(rows) for turn in turns]
    scores = score(model, [turn for _, turn in flat], BATCH)
    by_row = groupby(zip(flat, scores, strict=True), key=lambda pair: pair[0][0])
    return np.array([sum(found.log_likelihood for _, found in turns) for _, turns in by_row])


class Questions:
    """What all stages are asked: held-out chats and pairs, in the tokens of the run."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.chats = conversations(folder / "chats.valid.jsonl", "chats", tokenizer)
        self.pairs = conversations(folder / "pairs.valid.jsonl", "pairs", tokenizer)
        template = OlmoeTemplate(tokenizer.end_text)
        rows = list(read_json_rows([folder / "pairs.valid.jsonl"]))[:ASKED]
        asked = [[{"role": "user", "content": row["prompt"]}] for row in rows]
        self.prompts = [encode_question(messages, template, tokenizer) for messages in asked]


class Stage:
    """A run's latest checkpoint, on one rank."""

    def __init__(self, run: Path) -> None:
        self._run = run
        record = checkpoint_folder.read(run).record
        self.settings: Settings = checkpoint_folder.one_rank_settings(record)
        known = tokenizer_fingerprints(record.stream)
        self.tokenizer = load_run_tokenizer(run, None, self.settings.data.tokenizer_model, known)

    def measure(
        self, questions: Questions, before_N: np.ndarray | None
    ) -> tuple[dict[str, float], np.ndarray]:
        """Return the values of the stage, and by how much it prefers the chosen answers [N].

        Args:
            questions: see `Questions`.
            before_N: preferences of the stage before; None: there is none.
        """
        vocab_size = vocabulary_of(self._run, self.settings, self.tokenizer.vocab_size)
        with runtime.running(self.settings) as ranks:
            model = load_model(self._run, self.settings, vocab_size, ranks)
            tokens = sum(len(answer) for turns in questions.chats for _, answer in turns)
            values = {"answer_loss": -answer_log_probs(model, questions.chats).sum() / tokens}
            values |= answers(model, questions.prompts, self.tokenizer)
            log_probs_N2 = answer_log_probs(model, questions.pairs).reshape(-1, 2)
        preference_N = log_probs_N2[:, 0] - log_probs_N2[:, 1]
        values["pair_order"] = (preference_N > 0).mean()
        if before_N is not None:
            values["accuracy"] = (preference_N > before_N).mean()
        return {name: float(value) for name, value in values.items()}, preference_N


def answers(
    model: LanguageModel, prompts: Sequence[list[int]], tokenizer: Tokenizer
) -> dict[str, float]:
    """Return the shares of greedy answers that stop, keep the template, and name the place."""
    end, texts, stopped = tokenizer.eod, [], []
    for start in range(0, len(prompts), BATCH):
        requests = [Request(ids, seed=0) for ids in prompts[start : start + BATCH]]
        found = generate_batch(
            model,
            requests,
            tokenizer.vocab_size,
            Sampling(temperature=0.0),
            LONGEST_ANSWER,
            lambda _, token: "eos" if token == end else None,
        )
        stopped += [each.tokens[-1] == end for each in found]
        texts += [tokenizer.decode([t for t in each.tokens if t != end]).strip() for each in found]
    clean = [bool(text) and "<|" not in text for text in texts]
    shares = {
        "stops": stopped,
        "in_template": [a and b for a, b in zip(stopped, clean, strict=True)],
        "names_place": [PREFERRED.search(text) is not None for text in texts],
    }
    return {name: sum(found) / len(texts) for name, found in shares.items()}


def harness_results(folder: Path | None, stage: str) -> dict[str, float]:
    """Return the metrics of lm-evaluation-harness for a stage, by task."""
    path = None if folder is None else folder / f"{stage}.json"
    if path is None or not path.is_file():
        return {}
    results: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["results"]
    return {
        f"{task}, {name.removesuffix(',none')}": value
        for task, found in results.items()
        for name, value in found.items()
        if name.endswith(",none") and "stderr" not in name
    }


def table(stages: dict[str, dict[str, float]]) -> str:
    """Return the table in Markdown: a column for each stage."""
    names = dict.fromkeys(name for values in stages.values() for name in values)
    lines = [f"| | {' | '.join(stages)} |", f"|---|{'--:|' * len(stages)}"]
    for name in [*ROWS, *(name for name in names if name not in ROWS)]:
        cells = [f"{values[name]:.3f}" if name in values else "" for values in stages.values()]
        lines.append(f"| {ROWS.get(name, name)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--stage", action="append", required=True, metavar="NAME=RUN", help="in order")
    add("--questions", type=Path, required=True, metavar="DIR", help="of tools/collect_chats.py")
    add("--harness", type=Path, metavar="DIR", help="results of tools/evaluate.py by stage")
    add("--output", type=Path, required=True, metavar="FILE", help="the table; values beside it")
    return parser


def main() -> int:
    """Measure the stages, print and write the table; return the exit code."""
    options = parser().parse_args()
    quieten_libraries()
    stages: dict[str, dict[str, float]] = {}
    questions, preference_N = None, None
    for given in options.stage:
        name, _, run = given.partition("=")
        stage = Stage(Path(run))
        questions = questions or Questions(options.questions, stage.tokenizer)
        stages[name], preference_N = stage.measure(questions, preference_N)
        stages[name] |= harness_results(options.harness, name)
    write_text(options.output, table(stages))
    write_text(options.output.with_suffix(".json"), json.dumps(stages, indent=2) + "\n")
    print(table(stages), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
