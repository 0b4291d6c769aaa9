"""The small models that a GPU trains and compares with the CPU: recipes, and variants of OLMoE."""

from dataclasses import dataclass, replace
from pathlib import Path

from moetron.moe.config.flags import parse
from tests.gpu.samples import CHATS, chat_prefix
from tests.unit.data.chat.chat_cases import TOKENIZER

ROOT = Path(__file__).resolve().parents[2]

STEPS, WARM_STEPS = 5, 10
"""Compared steps, and steps before them that make the common weights (on the CPU)."""


@dataclass(frozen=True)
class Bound:
    """Largest relative differences from the CPU's fp32 run."""

    loss: float
    """At every compared step."""
    first_loss: float
    """At the first step, where all runs have the same weights: a model without its experts differs
    by more than 2e-3."""
    grad_norm: float
    """At the first step."""

    def times(self, factor: float) -> "Bound":
        """Return a bound of ``factor`` times these differences."""
        return Bound(self.loss * factor, self.first_loss * factor, self.grad_norm * factor)


@dataclass(frozen=True)
class Kind:
    """An implementation and precision."""

    flags: tuple[str, ...]
    bound: Bound
    capability: tuple[int, int] = (7, 0)
    """Least compute capability."""

    @property
    def te(self) -> bool:
        """Transformer Engine's layers."""
        return "transformer_engine" in self.flags


_LOCAL, _TE = ("--transformer-impl", "local"), ("--transformer-impl", "transformer_engine")
_BF16, _FP8 = Bound(2e-2, 1e-3, 2e-2), Bound(3e-2, 2e-3, 3e-2)
_FP8_PARAMETERS = Bound(3e-2, 5e-3, 0.1)


def _fp8(
    recipe: str,
    capability: tuple[int, int] = (8, 9),
    layers: tuple[str, ...] = _TE,
    parameters: bool = False,
) -> Kind:
    flags = ("--bf16", "--fp8-format", "hybrid", "--fp8-recipe", recipe, *layers)
    if not parameters:
        return Kind(flags, _FP8, capability)
    more = ("--fp8-param-gather", "--use-distributed-optimizer")
    return Kind((*flags, *more), _FP8_PARAMETERS, capability)


KINDS = {
    "local": Kind(("--fp32", *_LOCAL), Bound(1e-4, 1e-5, 1e-3)),
    "local16": Kind(("--bf16", *_LOCAL), _BF16, (8, 0)),
    "emulated": _fp8("delayed", (8, 0), _LOCAL),
    "scaled": _fp8("tensorwise", (8, 0), _LOCAL),  # on tensor cores from (9, 0) on
    "te32": Kind(("--fp32", *_TE), Bound(5e-3, 5e-4, 1e-2)),
    "te16": Kind(("--bf16", *_TE), _BF16, (8, 0)),
    "delayed": _fp8("delayed"),
    "tensorwise": _fp8("tensorwise"),
    "blockwise": _fp8("blockwise", (9, 0)),
    "scaled_experts": _fp8("tensorwise", (9, 0), (*_TE, "--moe-experts-impl", "grouped_mm")),
    "delayed_params": _fp8("delayed", parameters=True),
    "tensorwise_params": _fp8("tensorwise", parameters=True),
    "blockwise_params": _fp8("blockwise", (9, 0), parameters=True),
}
PLAIN = ("local", "local16", "te32", "te16")
WITH_FP8 = (*PLAIN, "scaled", "delayed", "tensorwise", "blockwise", "scaled_experts")


@dataclass(frozen=True)
class Case:
    """A model, its optimizer and its batches."""

    name: str
    flags: tuple[str, ...]
    kinds: tuple[str, ...]
    is_noisy: bool = False
    """Has dropout, whose numbers come from the device's generator (routers draw on the host)."""
    samples: str = "mock"
    """Name in `tests.gpu.samples.STREAMS`."""
    noise: float = 1.0
    """Factor of the bounds of 16 and 8 bits, for losses of a few hundred tokens: FP8 emulated on a
    CPU is up to 0.017 off in the losses of `sft`, and 0.078 in the gradient of `kto`."""
    like: str = ""
    """Case whose reference it has, since ``extra`` does not change the mathematics."""
    extra: tuple[str, ...] = ()
    """Further flags of the compared run."""

    def argv(self, kind: str) -> list[str]:
        """Return the flags of a run of ``kind``."""
        return [*self._common(), *self.extra, *KINDS[kind].flags]

    def reference_argv(self) -> list[str]:
        """Return the flags of the reference."""
        return [*self._common(), *KINDS["local"].flags]

    def _common(self) -> list[str]:
        common = ("--eval-iters", "0", "--lr-warmup-iters", "2")
        return [*self.flags, *self._data(), *common, "--train-iters", str(STEPS + WARM_STEPS)]

    def _data(self) -> tuple[str, ...]:
        for kind in CHATS:
            if kind == self.samples:
                vocabulary = (
                    "--tokenizer-model",
                    "bytes",
                    "--vocab-size",
                    str(TOKENIZER.vocab_size),
                )
                return ("--no-mock-data", "--data-path", chat_prefix(kind), "--sft", *vocabulary)
        return ("--mock-data",)

    def unknown_flags(self) -> list[str]:
        """Return problems of flags that this version does not have."""
        given = [*self.flags, *self.extra]
        return [problem for problem in parse(given).problems if "unknown" in problem]


def _tiny(recipe: str) -> tuple[str, str]:
    return ("--config", str(ROOT / "examples" / recipe / "tiny.yaml"))


OLMOE = _tiny("olmoe_1b_7b")
"""Flags of the model that variants change."""


def _recipes() -> list[Case]:
    found = []
    for path in sorted((ROOT / "examples").glob("*/tiny.yaml")):
        name, text = path.parent.name, path.read_text(encoding="utf-8")
        decay = ("--lr-wsd-decay-iters", "2") if "WSD" in text else ()
        in_fp8 = name in ("olmoe_1b_7b", "deepseek_v2_lite", "mixtral_8x7b")
        kinds = tuple(kind for kind in KINDS if in_fp8 or not kind.endswith("params"))
        if "num_experts" not in text:
            kinds = tuple(kind for kind in kinds if kind != "scaled_experts")
        refused = ("double_gated", "multiplicative_bias: true", "encoder_num_layers")
        if any(words in text for words in refused):  # with FP8
            kinds = PLAIN
        flags = ("--config", str(path), *decay)
        if "multi_latent_attention: true" in text:  # its joint projection is too narrow for FP8
            wide = tuple(kind for kind in kinds if KINDS[kind].te and kind not in PLAIN)
            found.append(Case(f"{name}_wide", (*flags, "--qk-pos-emb-head-dim", "16"), wide))
            kinds = tuple(kind for kind in kinds if kind not in wide)
        found.append(Case(name, flags, kinds))
    return found


_NO_SOFTMAX = "--no-moe-router-pre-softmax"
_NO_BALANCE = ("--moe-aux-loss-coeff", "0")
_CAPACITY = ("--moe-expert-capacity-factor", "1.0")
_RECOMPUTE = "--recompute-granularity"

ROUTERS: dict[str, tuple[str, ...]] = {
    "expert_choice": (*_CAPACITY, *_NO_BALANCE),
    "base": (
        *("--moe-router-topk", "1", "--moe-router-score-function", "sigmoid"),
        *(_NO_SOFTMAX, *_NO_BALANCE),
    ),
    "random_second": ("--moe-router-topk", "2", _NO_SOFTMAX, *_CAPACITY),
    "noisy_topk": (),
    "straight_through": (),
    "gumbel": (),
    "relaxed_topk": (),
    "reinforce": (_NO_SOFTMAX,),
    "hash": (_NO_SOFTMAX, *_NO_BALANCE, "--moe-z-loss-coeff", "0"),
}
BALANCE: dict[str, tuple[str, ...]] = {
    "seq_aux_loss": (),
    "global_aux_loss": (),
    "none": _NO_BALANCE,
    "sinkhorn": _NO_BALANCE,
}
CAPACITY: dict[str, tuple[str, ...]] = {
    **{
        policy: ("--moe-token-drop-policy", policy)
        for policy in ("probs", "position", "choice", "batch_prioritized")
    },
    "padded": ("--moe-pad-expert-input-to-capacity",),
    "sequence": ("--moe-capacity-scope", "sequence"),
    "rank": ("--moe-capacity-scope", "rank"),
}
OTHERS: dict[str, tuple[str, ...]] = {
    "noisy_load": (
        *("--moe-router-type", "noisy_topk"),
        *("--moe-router-load-balancing-type", "noisy_load"),
    ),
    "previous_counts": (
        *("--moe-router-load-balancing-type", "global_aux_loss"),
        *("--moe-global-aux-loss-counts", "previous_step"),
    ),
    "expert_bias": (
        *("--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"),
        *(_NO_SOFTMAX, "--moe-router-load-balancing-type", "none", *_NO_BALANCE),
    ),
    "jitter": ("--moe-input-jitter-eps", "0.01"),
    "router_fp64": ("--moe-router-dtype", "fp64"),
    "router_params": ("--moe-router-dtype", "params"),
    "adafactor": ("--optimizer", "adafactor"),
    "muon": ("--optimizer", "muon"),
    "sgd": ("--optimizer", "sgd"),
    "distributed": ("--use-distributed-optimizer",),
    "overlapped": (
        *("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
        *("--ddp-bucket-size", "50000"),
    ),
    "micro_batch_means": ("--no-calculate-per-token-loss",),
    "unfused_attention": ("--attention-backend", "unfused"),
    "sequential_experts": ("--no-moe-grouped-gemm",),
    "allgather": ("--moe-token-dispatcher-type", "allgather"),
    "tied_embeddings": ("--no-untie-embeddings-and-output-weights",),
    "geglu": ("--ffn-type", "geglu"),
    "relu": ("--ffn-type", "relu"),
    "output_z_loss": ("--output-z-loss-coeff", "1e-4"),
    "dense_first": ("--first-k-dense-replace", "1"),
    "shared_expert": ("--moe-shared-expert-intermediate-size", "32", "--moe-shared-expert-gate"),
    "recompute_norms": (_RECOMPUTE, "selective", "--recompute-modules", "layernorm"),
    "recompute_experts": (_RECOMPUTE, "selective", "--recompute-modules", "moe"),
}
IN_FP8_TOO: dict[str, tuple[str, ...]] = {
    "recompute_full": (
        *(_RECOMPUTE, "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"),
    ),
    "recompute_attention": (_RECOMPUTE, "selective"),
    "prediction": ("--mtp-num-layers", "1"),
    "query_groups": ("--num-query-groups", "2"),
    "idle_experts": (
        *("--num-experts", "64", "--moe-router-topk", "1", "--seq-length", "16"),
        *("--micro-batch-size", "1", "--global-batch-size", "16"),
    ),
}
_DOCUMENTS = ("--reset-attention-mask", "--reset-position-ids", "--eod-mask-loss")
_GROUPS = ("--num-query-groups", "2")
_ROW = ("--micro-batch-size", "1")  # as layers of Transformer Engine need it
_OURS = ("local", "local16", "scaled")
OTHER_SAMPLES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "documents": ("packed", (*_DOCUMENTS, *_ROW), WITH_FP8),
    "documents_groups": ("packed", (*_DOCUMENTS, *_ROW, *_GROUPS), PLAIN),
    "documents_recompute": ("packed", (*_DOCUMENTS, *_ROW, _RECOMPUTE, "selective"), PLAIN),
    "documents_rows": ("packed", _DOCUMENTS, _OURS),
    "sft": ("chats", _ROW, WITH_FP8),
    "dpo": ("pairs", ("--preference-loss", "dpo", *_ROW), WITH_FP8),
    "dpo_norm": ("pairs", ("--preference-loss", "dpo_norm", *_ROW), PLAIN),
    "kto": ("labelled", ("--preference-loss", "kto", *_ROW), WITH_FP8),
    "kto_rows": ("labelled", ("--preference-loss", "kto"), _OURS),
}
"""Names of samples, flags and kinds of cases that read other samples than mock ones."""
NOISY: dict[str, tuple[str, ...]] = {
    "hidden_dropout": ("--hidden-dropout", "0.1"),
    "attention_dropout": ("--attention-dropout", "0.1"),
    "expert_dropout": ("--moe-expert-dropout", "0.1"),
}
_ON_TE, _ON_FP8 = ("te32", "te16", "delayed"), ("delayed", "tensorwise", "blockwise")
_FUSED = ("--moe-permute-fusion", "--moe-router-fusion")
_CROSS_ENTROPY = ("--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl")
_OFFLOAD = (
    *("--optimizer-cpu-offload", "--use-precision-aware-optimizer"),
    "--use-distributed-optimizer",
)
SAME_MATHEMATICS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "experts_grouped_mm": (("--moe-experts-impl", "grouped_mm"), PLAIN),
    "experts_te": (("--moe-experts-impl", "te"), _ON_TE),
    "recompute_activation": (
        (_RECOMPUTE, "selective", "--recompute-modules", "moe_act"),
        _ON_TE[:2],
    ),
    "unfused": (
        (
            *("--no-bias-swiglu-fusion", "--no-bias-dropout-fusion", "--no-rope-fusion"),
            "--no-gradient-accumulation-fusion",
        ),
        _ON_TE,
    ),
    "permute_fusion": (("--moe-permute-fusion",), (*PLAIN, "delayed")),
    "router_fusion": (("--moe-router-fusion",), (*PLAIN, "delayed")),
    "cross_entropy_native": ((*_CROSS_ENTROPY, "native"), ("local16", "te16")),
    "cross_entropy_te": ((*_CROSS_ENTROPY, "te"), PLAIN),
    "all_fused": ((*_FUSED, *_CROSS_ENTROPY, "te"), _ON_TE),
    "quantization_padding": (("--moe-router-padding-for-quantization",), _ON_FP8),
    "precision_aware": (
        ("--use-precision-aware-optimizer", "--use-distributed-optimizer"),
        ("te16", "delayed"),
    ),
    "narrow_moments": (
        (
            *("--use-precision-aware-optimizer", "--use-distributed-optimizer"),
            *("--exp-avg-dtype", "bf16", "--exp-avg-sq-dtype", "bf16"),
        ),
        ("te16",),
    ),
    "offload": ((*_OFFLOAD,), ("te16", "delayed")),
    "offload_half": ((*_OFFLOAD, "--optimizer-offload-fraction", "0.5"), ("te16",)),
    "graphs_attention": (
        ("--cuda-graph-impl", "transformer_engine", "--cuda-graph-warmup-steps", "2"),
        ("te16",),
    ),
}
"""Further flags and kinds of cases that are compared with the unchanged OLMoE."""


def cases() -> list[Case]:
    """Return all cases; those with the weights of another come after it."""
    variants = {
        **{f"router_{name}": ("--moe-router-type", name, *more) for name, more in ROUTERS.items()},
        **{
            f"balance_{name}": ("--moe-router-load-balancing-type", name, *more)
            for name, more in BALANCE.items()
        },
        **{f"capacity_{name}": (*_CAPACITY, *more) for name, more in CAPACITY.items()},
        **OTHERS,
    }
    found = _recipes()
    found += [Case(name, (*OLMOE, *flags), PLAIN) for name, flags in variants.items()]
    found += [Case(name, (*OLMOE, *flags), WITH_FP8) for name, flags in IN_FP8_TOO.items()]
    clipped = (*_tiny("mixtral_8x7b"), "--qk-clip", "--qk-clip-threshold", "0.5")
    found.append(Case("qk_clip", clipped, PLAIN))
    found.append(Case("qk_clip_muon", (*clipped, "--optimizer", "muon"), PLAIN))
    prefix = (*OLMOE, "--bidirectional-prefix")
    found.append(Case("prefix_mask", prefix, WITH_FP8, samples="prefixes"))
    found += [
        Case(name, (*OLMOE, *flags), kinds, samples=samples, noise=3 if samples in CHATS else 1)
        for name, (samples, flags, kinds) in OTHER_SAMPLES.items()
    ]
    latent = (*_tiny("deepseek_v2_lite"), "--lr-wsd-decay-iters", "2", *_DOCUMENTS, *_ROW)
    found.append(Case("documents_latent", latent, ("local", "local16"), samples="packed"))
    found += [Case(name, (*OLMOE, *flags), PLAIN, is_noisy=True) for name, flags in NOISY.items()]
    found += [
        Case(name, OLMOE, kinds, like="olmoe_1b_7b", extra=extra)
        for name, (extra, kinds) in SAME_MATHEMATICS.items()
    ]
    graphs = ("--cuda-graph-scope", "attn", "mlp", *SAME_MATHEMATICS["graphs_attention"][0])
    dense = (*OLMOE, *OTHERS["dense_first"])
    found.append(Case("graphs_ffn", dense, ("te16",), like="dense_first", extra=graphs))
    for name, kinds in (("deepseek_v3", _ON_TE[:2]), ("deepseek_v3_wide", _ON_FP8[:1])):
        like = next(case for case in found if case.name == name)
        fused = replace(like, name=f"{name}_fused", kinds=kinds, like=name, extra=_FUSED)
        found.append(fused)
    return found
