"""Pipeline splits, against megatron-core's, for all ways to specify them."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from moetron.moe.config.schema.pipeline_split import (
    chunk_sizes,
    expand,
    megatron_layout,
    stage_chunks,
    virtual_pipeline_size,
)
from tests.unit.config.config_cases import found, make

LETTERS = {LayerType.embedding: "E", LayerType.decoder: "t", LayerType.loss: "L"}
PP2 = {"world_size": 2, "pipeline_model_parallel_size": 2}
FIRST, LAST = "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"
EMBEDDING, LOSS = (
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
LAYOUT = "pipeline_model_parallel_layout"


@pytest.mark.parametrize(
    "layout", ["EttL", "Et*3|(tt|)*2,ttL", "E|(t|)*12L", "Et|(t|t|)*3tL", "E,t*10|t*2,L"]
)
def test_a_written_layout_is_read_as_megatron_reads_it(layout: str) -> None:
    theirs = PipelineParallelLayerLayout.parse_str_to_list(layout)
    assert expand(layout) == ["".join(LETTERS[kind] for kind in chunk) for chunk in theirs]


ways = st.one_of(
    st.fixed_dictionaries({}, optional={FIRST: st.integers(1, 6), LAST: st.integers(1, 6)}),
    st.fixed_dictionaries(
        {EMBEDDING: st.booleans(), LOSS: st.booleans()},
        optional={"num_layers_per_virtual_pipeline_stage": st.integers(1, 3)},
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 16), st.integers(2, 4), ways)
def test_stages_match_megatrons(layers: int, stages: int, way: dict[str, Any]) -> None:
    chosen = {"num_layers": layers, "pipeline_model_parallel_size": stages, **way}
    assume(not found(world_size=stages, global_batch_size=24, **chosen))
    ours = make(**chosen)
    theirs = TransformerConfig(
        num_layers=layers,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=virtual_pipeline_size(ours),
        pipeline_dtype=torch.float32,
        num_layers_in_first_pipeline_stage=way.get(FIRST),
        num_layers_in_last_pipeline_stage=way.get(LAST),
        account_for_embedding_in_pipeline_split=way.get(EMBEDDING, False),
        account_for_loss_in_pipeline_split=way.get(LOSS, False),
    )
    for stage in range(stages):
        for vp_stage, held in enumerate(stage_chunks(ours, stage)):
            place = (theirs, None if virtual_pipeline_size(ours) is None else vp_stage, stage)
            assert len(held) == get_num_layers_to_build(*place)
            if held:
                assert held.start == get_transformer_layer_offset(*place)
    handed = megatron_layout(ours)
    assert handed is not None
    PipelineParallelLayerLayout(handed, stages).validate_layer_layout(layers, 0)


def test_a_written_layout_by_hand() -> None:
    chosen = make(num_layers=7, pipeline_model_parallel_size=2, **{LAYOUT: "Et*3|t|tt|tL"})
    assert chunk_sizes(chosen) == [3, 1, 2, 1]
    assert virtual_pipeline_size(chosen) == 2
    assert stage_chunks(chosen, 0) == [range(3), range(4, 6)]
    assert stage_chunks(chosen, 1) == [range(3, 4), range(6, 7)]
    assert megatron_layout(make()) is None


def test_a_virtual_stage_as_long_as_a_stage_does_not_interleave() -> None:
    chosen = make(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=2)
    assert virtual_pipeline_size(chosen) is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({**PP2, FIRST: 1, EMBEDDING: True}, "are different ways to split stages: use one"),
        ({**PP2, LAYOUT: "Ett|ttL", LAST: 2}, "are different ways to split stages: use one"),
        ({FIRST: 4}, "--decoder-first-pipeline-num-layers 4 needs --pipeline-model-parallel-size"),
        ({EMBEDDING: True}, "needs --pipeline-model-parallel-size above 1"),
        ({**PP2, FIRST: 1, LAST: 2}, "must add up to --num-layers 4 with two stages"),
        ({**PP2, FIRST: 4}, "leave 0 of --num-layers 4 for 1 other stage(s)"),
        (
            {
                "world_size": 4,
                "pipeline_model_parallel_size": 4,
                "num_layers": 8,
                FIRST: 1,
            },
            "leave 7 of --num-layers 8 for 3 other stage(s), which need equal numbers, 1 or "
            "more each: use --num-layers 7 or 10",
        ),
        (
            {**PP2, EMBEDDING: True},
            "--num-layers 4 + 1 for --account-for-embedding-in-pipeline-split is not a multiple of "
            "--pipeline-model-parallel-size 2: use --num-layers 3 or 5",
        ),
        ({**PP2, LAYOUT: "Ett|txL"}, "x is unknown; write E (embedding)"),
        ({LAYOUT: "Ett|ttL"}, "2 stages need --pipeline-model-parallel-size above 1"),
        ({**PP2, LAYOUT: "Et|t|ttL"}, "3 stages are not a multiple of"),
        ({**PP2, LAYOUT: "ttE|ttL"}, "the first stage must begin with the only E"),
        ({**PP2, LAYOUT: "Ett|tt"}, "the last one end with the only L"),
        ({**PP2, LAYOUT: "Ett|tttL"}, "it has 5 layers t, but --num-layers 4"),
        ({**PP2, LAYOUT: "Ettt||t|L"}, "stage 1 is empty"),
        (
            {**PP2, LAYOUT: "Et|t|t|tL", "global_batch_size": 6},
            "takes its 3 micro-batches in groups of --pipeline-model-parallel-size 2",
        ),
        (
            {
                **PP2,
                LAYOUT: "Ettt|tL",
                "recompute_granularity": "full",
                "recompute_method": "block",
                "recompute_num_layers": 4,
            },
            "--recompute-num-layers 4 exceeds the 3 layers of a stage: use at most 3",
        ),
        (
            {
                **PP2,
                LAYOUT: "Ettttt|tttL",
                "num_layers": 8,
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 3,
            },
            "--recompute-num-layers 3 with --recompute-method uniform does not divide the layers "
            "of every (virtual) stage: use 1",
        ),
    ],
)
def test_rule(changes: dict[str, Any], expected: str) -> None:
    (line,) = found(**changes)
    assert expected in line
