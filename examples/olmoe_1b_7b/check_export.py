"""Compare an exported model with its run: the loss on all held-out windows.

python examples/olmoe_1b_7b/check_export.py --run RUN --model HF_FOLDER

The loss of the run is in the last line of its validation.jsonl; the loss of transformers is the
mean over the same tokens, nats per token. Exit codes: 0 equal within 1e-4, 1 not.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from moetron.data.stream.open_streams import open_validation
from moetron.data.stream.token_stream import TokenStream
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.tokenizers.load import load_tokenizer

TOLERANCE = 1e-4
BATCH = 16


def held_out(run: Path) -> TokenStream:
    """Return the validation windows of a run."""
    record = checkpoint_folder.read_record(checkpoint_folder.find(run))
    settings = checkpoint_folder.one_rank_settings(record)
    data = settings.data
    assert data.tokenizer_model is not None and data.valid_data_path is not None
    tokenizer = load_tokenizer(data.tokenizer_model)
    return open_validation(data, data.valid_data_path, settings.model.seq_length, tokenizer)


@torch.no_grad()
def mean_loss(model: torch.nn.Module, stream: TokenStream) -> tuple[float, int]:
    """Return (mean loss, number of unmasked tokens) over the stream."""
    total, count = 0.0, 0.0
    for start in range(0, len(stream), BATCH):
        samples = [stream[n] for n in range(start, min(start + BATCH, len(stream)))]
        tokens, labels, mask = (
            torch.stack([torch.as_tensor(sample[name]) for sample in samples])
            for name in ("tokens", "labels", "loss_mask")
        )
        logits_BSV = model(input_ids=tokens, use_cache=False).logits.float()
        losses_BS = torch.nn.functional.cross_entropy(
            logits_BSV.transpose(1, 2), labels, reduction="none"
        )
        total += float((losses_BS * mask).sum(dtype=torch.float64))
        count += float(mask.sum())
    return total / count, int(count)


def main() -> int:
    """Print both losses; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="--save folder of the run")
    parser.add_argument("--model", type=Path, required=True, help="folder written by to-hf")
    options = parser.parse_args()
    lines = (options.run / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    ours = json.loads(lines[-1])
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    loss, tokens = mean_loss(model, held_out(options.run))
    print(
        f"run          {ours['validation_loss']:.6f} nats per token, {ours['tokens_evaluated']:,}"
    )
    print(f"transformers {loss:.6f} nats per token, {tokens:,}")
    equal = abs(loss - ours["validation_loss"]) < TOLERANCE and tokens == ours["tokens_evaluated"]
    print("equal" if equal else f"they differ by more than {TOLERANCE}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
