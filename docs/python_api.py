"""Use every function of moetron.api on a model of 0.3 M parameters, in ten seconds on one core.

    python docs/python_api.py [FOLDER]

FOLDER (default: a temporary one) gets two shards and a run.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from moetron import api

SENTENCE = "The router sends each token to four of sixteen experts. "
FUNCTION = "def route(token, experts):\n    return max(experts, key=token.score)\n\n"


def prepare(folder: Path) -> dict[str, str]:
    """Write two texts and turn each into a shard of bytes; return their prefixes by name."""
    for name, text in {"prose": SENTENCE, "code": FUNCTION}.items():
        (folder / f"{name}.txt").write_text(text * 300, encoding="utf-8")
        words = ["--tokenizer", "bytes", "--output-prefix", folder / name, "--workers", "1"]
        command = [sys.executable, "-m", "moetron", "prepare", "--input", folder / f"{name}.txt"]
        subprocess.run([*command, *words], check=True)
    return {name: str(folder / name) for name in ("prose", "code")}


def main(folder: Path) -> None:
    """Prepare, inspect, build, train, load, generate, analyze."""
    shards = prepare(folder)

    # Settings: a shipped recipe, overridden by setting name.
    settings = api.load_settings(
        "olmoe_1b_7b/tiny",
        seq_length=64,
        train_iters=20,
        lr_warmup_iters=2,
        mock_data=False,
        data_path=list(shards.values()),
        tokenizer_model="bytes",
        eval_iters=0,
        save=folder / "run",
        tensorboard=False,
    )
    try:
        api.load_settings("olmoe_1b_7b/tiny", num_layer=2, lr=-1)
    except api.UserError as error:
        print(error)  # both problems at once

    # A shard: memory-mapped tokens.
    shard = api.open_shard(shards["code"])
    print(f"{len(shard)} document, {len(shard.tokens)} tokens of {shard.tokens.dtype}")

    # A stream: sample n is the same on every rank, in every layout.
    sample = api.open_stream(settings)[0]
    print("sample 0:", {name: getattr(value, "shape", value) for name, value in sample.items()})

    # A model with fresh weights: logits of one window.
    with api.build_model(settings) as model:
        import torch

        ids = torch.from_numpy(sample["tokens"])[None]
        logits = model(ids, torch.arange(ids.shape[1])[None], None)
        print("logits:", tuple(logits.shape))

    # Training: one row of metrics for each step.
    rows = api.train(settings)
    print(f"loss {rows[0]['lm_loss']:.3f} -> {rows[-1]['lm_loss']:.3f} nats a token")

    # The run: its latest checkpoint, of any layout.
    with api.load_run(folder / "run") as run:
        print(f"step {run.step}, tokenizer {run.tokenizer.name}")
        print(api.generate(run, ["The router", "def "], max_new_tokens=20, temperature=0))
        found = api.analyze_routing(run, shards, tokens_per_class=4096)
        for layer, load in zip(found["layers"], found["load"], strict=True):
            print(f"layer {layer}: fullest expert {max(load):.2f}x the mean")


if __name__ == "__main__":
    if sys.argv[1:]:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as name:
            main(Path(name))
