"""Last step of the quick start: collect its metrics in summary.json and print them.

python examples/quickstart/summarize.py --out runs/quickstart --seconds 412
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from moetron.common.files import write_text


def main() -> int:
    """Write and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the quick start")
    parser.add_argument("--seconds", type=int, required=True, help="duration")
    options = parser.parse_args()
    summary = summarize(options.out, options.seconds)
    write_text(options.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(render(summary))
    if summary["validation_loss"] >= summary["bigram_cross_entropy"]:
        print("The model is not better than the bigram on this text; train it longer.")
    return 0


def summarize(out: Path, seconds: int) -> dict[str, Any]:
    """Return losses in nats per token, tokens per second of all ranks, seconds and paths."""
    run = out / "run"
    evaluation = rows(run / "validation.jsonl")[-1]
    metrics = rows(run / "metrics.jsonl")
    ngrams = json.loads((out / "ngrams.json").read_text(encoding="utf-8"))
    if evaluation["tokens_evaluated"] != ngrams["validation_tokens"]:
        raise SystemExit(
            f"the model was evaluated on {evaluation['tokens_evaluated']} tokens, the n-grams on "
            f"{ngrams['validation_tokens']}: raise --eval-iters in the recipe"
        )
    return {
        "validation_loss": evaluation["validation_loss"],
        "unigram_cross_entropy": ngrams["unigram_cross_entropy"],
        "bigram_cross_entropy": ngrams["bigram_cross_entropy"],
        "bigram_model": ngrams["bigram_model"],
        "validation_tokens": evaluation["tokens_evaluated"],
        "training_tokens": metrics[-1]["tokens"],
        "tokens_per_s": statistics.median(row["tokens_per_s"] for row in metrics),
        "seconds": seconds,
        "paths": {
            "checkpoint": str(run / (run / "latest").read_text(encoding="utf-8").strip()),
            "metrics": str(run / "metrics.jsonl"),
            "validation": str(run / "validation.jsonl"),
            "tensorboard": str(run / "tensorboard"),
            "curves": str(out / "curves.png"),
            "sample": str(out / "sample.txt"),
            "tokenizer": str(out / "tokenizer" / "umt5.model"),
            "shards": str(out / "data"),
        },
    }


def rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def render(summary: dict[str, Any]) -> str:
    """Return the summary as text."""
    paths = summary["paths"]
    run = Path(paths["metrics"]).parent
    lines = [
        f"trained on {summary['training_tokens']:,} tokens at {summary['tokens_per_s']:,.0f} "
        f"tokens/s; {summary['seconds']} s in all",
        f"nats per token on {summary['validation_tokens']:,} held-out tokens:",
        f"  unigram model      {summary['unigram_cross_entropy']:.4f}",
        f"  bigram model       {summary['bigram_cross_entropy']:.4f}   ({summary['bigram_model']})",
        f"  this MoE           {summary['validation_loss']:.4f}",
        "files:",
        *(f"  {name:<12} {path}" for name, path in paths.items()),
        "next:",
        f"  {sys.executable} tools/generate.py --load {run} --prompt 'import '",
        f"  {Path(sys.executable).parent / 'tensorboard'} --logdir {paths['tensorboard']}",
        f"  {sys.executable} pretrain_moe.py --config examples/olmoe_1b_7b/pretrain.yaml "
        "--dry-run --world-size 256",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
