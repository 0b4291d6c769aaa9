"""Time of attention inside documents against full causal attention, as a Markdown table.

    python tests/bench/bench_documents.py [--seq-length 4096] [--document 256] [--repeats 5]

One sequence, OLMoE's 16 heads of 128 channels, fp32, one thread: forward and backward passes of the
core attention, the median CPU time of --repeats. The last row is a dense mask of the documents.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from moetron.moe.host.adapt import adapt_host
from moetron.moe.layers.attention import SdpaAttention

HEADS, WIDTH = 16, 128


def seconds(step: Callable[[], None], repeats: int) -> float:
    """Return the median CPU time of a step, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    return statistics.median(times[1:])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--document", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    adapt_host()
    length, document = options.seq_length, options.document
    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, attention_dropout=0.0
    )
    attention = SdpaAttention(config, 1, AttnMaskType.causal, "self")
    qkv = [torch.randn(length, 1, HEADS, WIDTH, requires_grad=True) for _ in range(3)]
    gradient = torch.randn(length, 1, HEADS * WIDTH)
    ends = torch.arange(0, length + 1, document, dtype=torch.int32)
    number = torch.arange(length) // document
    dense = ~((number[:, None] == number) & torch.ones(length, length).tril().bool())[None, None]

    def step(mask: torch.Tensor | None) -> None:
        torch.autograd.grad(attention(*qkv, mask), qkv, gradient)

    print("| attention | CPU s | of full causal |\n|---|--:|--:|")
    full = seconds(lambda: step(None), options.repeats)
    named = {"full causal": None, f"documents of {document}": ends, "the same, dense mask": dense}
    for name, mask in named.items():
        taken = full if mask is None else seconds(lambda m=mask: step(m), options.repeats)
        print(f"| {name} | {taken:.3f} | {taken / full:.2f} |")


if __name__ == "__main__":
    main()
