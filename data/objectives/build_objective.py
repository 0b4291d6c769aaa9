"""Build an objective by name for a tokenizer."""

from typing import Literal, Protocol

from moetron.common.errors import UserError
from moetron.data.objectives.causal import Causal
from moetron.data.objectives.fim import FillInTheMiddle, FimOptions
from moetron.data.objectives.objective import Objective
from moetron.data.objectives.prefix_lm import PrefixLM
from moetron.data.objectives.span_corruption import SpanCorruption
from moetron.data.objectives.split_text import SplitText
from moetron.data.objectives.ul2 import UL2
from moetron.tokenizers.interface import Tokenizer

ObjectiveName = Literal["causal", "prefix_lm", "ul2", "fim", "span_corruption"]
MAX_EXAMPLES = 64
"""Maximum number of texts in one UL2 sample."""


class ObjectivePlan(Protocol):
    """Objective settings; see ``--help``."""

    bidirectional_prefix: bool
    fim_rate: float
    fim_spm_rate: float
    fim_prefix_token: str
    fim_middle_token: str
    fim_suffix_token: str
    encoder_seq_length: int | None
    examples_per_sample: int
    noise_density: float
    mean_noise_span_length: float


def build_objective(
    name: ObjectiveName, seq_length: int, tokenizer: Tokenizer, plan: ObjectivePlan
) -> Objective:
    """Return the named objective for samples of ``seq_length`` tokens.

    Raises:
        UserError: the objective does not fit the tokenizer or the length.
    """
    if name == "causal":
        return Causal(seq_length)
    if name == "prefix_lm" and plan.encoder_seq_length is not None:
        return SplitText(seq_length, plan.encoder_seq_length, tokenizer.eod, tokenizer.pad)
    if name == "prefix_lm":
        return PrefixLM(seq_length)
    if name == "fim":
        return FillInTheMiddle(seq_length, tokenizer.eod, _fim_options(tokenizer, plan))
    if name == "span_corruption":
        return _span_corruption(seq_length, tokenizer, plan)
    return _ul2(seq_length, tokenizer, plan.bidirectional_prefix)


def _span_corruption(seq_length: int, tokenizer: Tokenizer, plan: ObjectivePlan) -> SpanCorruption:
    """Return T5's objective for an encoder-decoder."""
    assert plan.encoder_seq_length is not None, "checks refuse encoder-decoders without it"
    return SpanCorruption(
        seq_length,
        plan.encoder_seq_length,
        tokenizer.sentinels,
        tokenizer.eod,
        tokenizer.pad,
        plan.noise_density,
        plan.mean_noise_span_length,
        plan.examples_per_sample,
    )


def _fim_options(tokenizer: Tokenizer, plan: ObjectivePlan) -> FimOptions:
    """Return the rates and the marker ids."""
    named = {
        "--fim-prefix-token": plan.fim_prefix_token,
        "--fim-middle-token": plan.fim_middle_token,
        "--fim-suffix-token": plan.fim_suffix_token,
    }
    ids = {flag: i for flag, token in named.items() if (i := tokenizer.id_of(token)) is not None}
    if absent := [f"{flag} {token}" for flag, token in named.items() if flag not in ids]:
        raise UserError(
            f"fim: the tokenizer {tokenizer.name} has no token for {', '.join(absent)}; "
            "give tokens of its vocabulary, such as <extra_id_0>"
        )
    if len(set(ids.values())) < len(ids):
        raise UserError(f"{', '.join(ids)}: give three different tokens")
    return FimOptions(plan.fim_rate, plan.fim_spm_rate, *ids.values())


def _ul2(seq_length: int, tokenizer: Tokenizer, bidirectional_prefix: bool) -> UL2:
    """Return UL2 with the fewest texts per sample for which the sentinels suffice."""
    if not tokenizer.sentinels:
        raise UserError(
            f"--objective ul2: the tokenizer {tokenizer.name} has no sentinels (tokens named "
            "<extra_id_0>, <extra_id_1>, ...); tools/train_tokenizer.py makes one that has 100"
        )
    first: UserError | None = None
    examples = 1
    while examples <= MAX_EXAMPLES and seq_length % examples == 0:
        try:
            made = UL2(
                seq_length,
                tokenizer.encode,
                tokenizer.sentinels,
                tokenizer.eod,
                tokenizer.pad,
                examples=examples,
            )
        except UserError as error:
            first, examples = first or error, 2 * examples
            continue
        if bidirectional_prefix and examples > 1:
            raise UserError(
                f"--bidirectional-prefix: a UL2 sample of {seq_length} tokens holds {examples} "
                f"texts for lack of sentinels ({first}); use a shorter --seq-length"
            )
        return made
    assert first is not None
    raise first
