"""Command lines to settings, or to all problems at once."""

import subprocess
import sys
from pathlib import Path

import pytest

from moetron.common.errors import ConfigError
from moetron.moe.config import recipe
from moetron.moe.config.command import STAND_INS as REQUIRED
from moetron.moe.config.command import load
from moetron.moe.config.schema.derived import sequence_parallel, smallest_world_size
from moetron.moe.config.schema.field import flag_name
from moetron.moe.config.schema.parallel import ParallelSettings
from moetron.moe.config.schema.settings import fields

ROOT = Path(__file__).resolve().parents[3]

RECIPE = """\
model: {num_layers: 2, hidden_size: 8, num_attention_heads: 2, seq_length: 16, vocab_size: 100}
moe: {num_experts: 4, moe_z_loss_coeff: 1e-3}
training: {train_iters: 10, micro_batch_size: 1, global_batch_size: 4}
learning_rate: {lr: 1e-3}
data: {mock_data: true}
"""


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def problems(*argv: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load([str(item) for item in argv])
    return caught.value.problems


def test_flags_win_over_the_recipe(path: Path) -> None:
    argv = ["--config", str(path), "--lr", "2e-3", "--bf16", "--moe-z-loss-coeff", "none"]
    argv += ["--eval-interval", "null"]  # as recipes write it
    command = load(argv)
    assert command.config == [path] and not command.dry_run
    assert (command.world_size, command.rank) == (1, 0)
    assert command.settings.learning_rate.lr == 2e-3
    assert command.settings.precision.bf16 is True
    assert command.settings.moe.moe_z_loss_coeff is None
    assert command.settings.validation.eval_interval is None
    assert command.settings.moe.num_experts == 4


def test_no_recipe_is_needed() -> None:
    values = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 16}
    values |= {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 1, "lr": 1}
    values |= {"vocab_size": 9, "num_experts": 2, "adam_beta1": 0}
    argv = [f"{flag_name(name)}={value}" for name, value in values.items()]
    command = load([*argv, "--moe-layer-freq", "0", "1", "--mock-data"])
    assert command.config == []
    assert command.settings.moe.moe_layer_freq == [0, 1]
    assert command.settings.optimizer.adam_beta1 == 0.0


def test_saved_settings_are_a_recipe(path: Path, tmp_path: Path) -> None:
    settings = load(["--config", str(path), "--rampup-batch-size", "2", "1", "8"]).settings
    recipe.write(settings, tmp_path / "settings.yaml")
    assert load(["--config", str(tmp_path / "settings.yaml")]).settings == settings


def test_every_kind_of_problem_in_one_message(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        RECIPE.replace("num_experts: 4", "num_expert: 4, lr: 1, seed: true") + "modle: {}\n"
    )
    found = problems(
        "--config", path, "--foo", "--optimizer", "adm", "--clip-grad", "-1", "--no-rope",
        "--num-workers", "1.5", "--rank", "3", "--moe-layer-freq", "0", "2", "--num-query-groups",
        "3", "--adam-eps", "nan", "--data-path", "x",
    )  # fmt: skip
    expected = [
        "unknown flag --foo",
        "unknown flag --no-rope",
        "--rank needs --dry-run",
        "--rank 3 must be below --world-size 1",
        "unknown key `num_expert` under `moe:`; did you mean num_experts?",
        "key `lr` belongs under `learning_rate:`, not `moe:`",
        "key `seed` belongs under `training:`, not `moe:`",
        "unknown section `modle:`; did you mean model?",
        "--moe-layer-freq 0 2: must be integer > 0 or list of (integer >= 0, <= 1)",
        "--optimizer adm: must be one of adam, sgd, adafactor, muon; did you mean adam?",
        "--adam-eps nan: must be number > 0",
        "--clip-grad -1: must be number >= 0",
        "--num-workers 1.5: must be integer >= 0",
        "--num-attention-heads 2 is not a multiple of --num-query-groups 3",
        "--mock-data and --data-path exclude each other",
    ]
    for line in expected:
        assert sum(problem.startswith(line) for problem in found) == 1, (line, found)


def test_missing_required_settings_are_all_named() -> None:
    found = problems()
    for name in ("num-layers", "hidden-size", "seq-length", "train-iters", "lr"):
        assert sum(line.startswith(f"--{name} is missing") for line in found) == 1


def test_a_flag_without_value_is_reported_once(path: Path) -> None:
    path.write_text(path.read_text().replace("lr: 1e-3", ""))
    assert problems("--config", path, "--lr") == ["--lr needs a value"]


def test_a_config_flag_without_value_keeps_other_recipes(path: Path) -> None:
    assert problems("--config", path, "--config") == ["--config needs a value"]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("{data_path: [a], untill_tokens: 5}", "unknown key `untill_tokens`; did you mean until_"),
        ("{until_tokens: 5}", "entry 1 lacks `data_path`"),
        ("{data_path: a, until_tokens: x}", "entry 1, `until_tokens` x: Input should be a valid"),
        (
            "{data_path: a, learning_rate: {rate: 1}}",
            "entry 1.learning_rate has the unknown key `rate`",
        ),
    ],
)
def test_problems_inside_a_stage(path: Path, stage: str, message: str) -> None:
    found = problems("--config", path, "--no-mock-data", "--dry-run", "--stages", stage)
    assert all(line.startswith("--stages: entry 1") for line in found)
    assert sum(message in line for line in found) == 1


def test_a_truth_value_is_not_a_number(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace("num_layers: 2", "num_layers: yes"))
    assert problems("--config", path) == [
        "--num-layers true: must be integer <= 100000, > 0: must not be a truth value"
    ]


def test_no_cross_check_on_the_default_behind_a_faulty_value(path: Path) -> None:
    text = path.read_text().replace("mock_data: true", "mock_data: perhaps")
    path.write_text(text)
    assert problems("--config", path) == ["--mock-data perhaps: must be true or false"]


@pytest.mark.parametrize("name", list(REQUIRED))
@pytest.mark.parametrize("recipe_name", ["olmoe_1b_7b", "deepseek_v3", "openmoe_8b"])
def test_a_faulty_required_value_neither_hides_nor_adds_problems(
    recipe_name: str, name: str
) -> None:
    """The recipes are valid, so no problem may come from a stand-in."""
    path = ROOT / "examples" / recipe_name / "pretrain.yaml"
    parallel = ParallelSettings.model_validate(recipe.read(path).get("parallel", {}))
    ranks = smallest_world_size(parallel)
    argv = ["--config", path, "--dry-run", "--world-size", ranks, "--device", "cuda"]
    (line,) = problems(*argv, flag_name(name), "abc")
    assert line.startswith(f"{flag_name(name)} abc: must be")
    found = problems(*argv, flag_name(name), "abc", "--foo", "--moe-router-topk", "1000")
    assert found[0] == "unknown flag --foo"
    assert any(line.startswith("--moe-router-topk 1000 exceeds --num-experts") for line in found)


def test_every_required_setting_has_two_stand_ins() -> None:
    assert set(REQUIRED) == {name for _, name, field in fields() if field.is_required()}


def test_a_missing_required_value_does_not_hide_missing_data(path: Path) -> None:
    path.write_text(path.read_text().replace("mock_data: true", "").replace("lr: 1e-3", ""))
    missing, data = problems("--config", path)
    assert missing.startswith("--lr is missing") and data.startswith("no data: give --data-path")


def test_sequence_parallelism_on_one_tensor_rank_is_a_note(path: Path) -> None:
    balanced = ["--config", str(path), "--moe-aux-loss-coeff", "0.01"]
    command = load([*balanced, "--sequence-parallel"])
    assert command.notes == [
        "--sequence-parallel has no effect with --tensor-model-parallel-size 1"
    ]
    assert not sequence_parallel(command.settings.parallel)
    two = ["--tensor-model-parallel-size", "2", "--dry-run", "--world-size", "2"]
    assert load([*balanced, "--sequence-parallel", *two]).notes == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], 1),
        (["--moe-router-score-function", "sigmoid"], 1),
        (["--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"], 0),
        (["--moe-aux-loss-coeff", "0.01"], 0),
        (["--moe-router-load-balancing-type", "none"], 0),
        (["--moe-router-load-balancing-type", "sinkhorn", "--moe-router-pre-softmax"], 0),
        (["--moe-router-type", "hash", "--moe-z-loss-coeff", "none"], 0),
        (["--num-experts", "none", "--moe-z-loss-coeff", "none"], 0),
    ],
)
def test_a_router_without_any_balance_is_a_note(
    path: Path, flags: list[str], expected: int
) -> None:
    found = load(["--config", str(path), *flags]).notes
    assert [line.split(":")[0] for line in found] == ["no balance loss"] * expected


@pytest.mark.parametrize("line", ["0.3 a 0.7 b.bin", "[0.3, a.idx, 0.7, b]"])
def test_a_data_path_is_one_text_or_a_list_and_may_name_files(path: Path, line: str) -> None:
    path.write_text(path.read_text().replace("mock_data: true", f"data_path: {line}"))
    settings = load(["--config", str(path), "--dry-run"]).settings
    assert settings.data.data_path == ["0.3", "a", "0.7", "b"]


def test_both_files_of_a_shard_are_one_prefix(path: Path) -> None:
    argv = ["--config", str(path), "--no-mock-data", "--dry-run", "--data-path"]
    words = ["a.bin", "a.idx", "b.idx", "b.bin", "c"]
    assert load([*argv, *words]).settings.data.data_path == ["a", "b", "c"]


def test_other_lists_are_one_text_too(path: Path) -> None:
    parallel = "{recompute_modules: core_attn moe, recompute_granularity: selective}"
    batch = "global_batch_size: 4"
    text = path.read_text().replace(batch, f"{batch}, rampup_batch_size: 2 1 8")
    path.write_text(f"{text}parallel: {parallel}\n")
    settings = load(["--config", str(path)]).settings
    assert settings.parallel.recompute_modules == ["core_attn", "moe"]
    assert settings.training.rampup_batch_size == (2, 1, 8)


def test_a_recipe_without_sections_is_refused_with_the_sections(tmp_path: Path) -> None:
    (tmp_path / "flat.yaml").write_text("num_layers: 2\nnum_hidden_layers: 2\ntrain_iter: 3\n")
    ends = [line.split("flat.yaml: ")[1] for line in problems("--config", tmp_path / "flat.yaml")]
    assert ends == [
        "key `num_layers` belongs under `model:`, indented",
        "unknown section `num_hidden_layers:`: use `num_layers` under `model:`",
        "unknown section `train_iter:`; did you mean train_iters?",
    ]


def test_torchrun_sets_the_ranks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    command = load(["--config", str(path)])
    assert (command.world_size, command.rank) == (4, 3)
    simulated = load(["--config", str(path), "--dry-run", "--world-size", "2"])
    assert simulated.world_size == 2


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_bad_world_size(path: Path, value: str) -> None:
    (problem,) = problems("--config", path, "--dry-run", f"--world-size={value}")
    assert problem == f"--world-size {value}: must be an integer >= 1"


def test_a_dry_run_needs_no_inputs(path: Path) -> None:
    argv = ["--config", str(path), "--no-mock-data", "--save-interval", "5", "--load", "/nowhere"]
    assert load([*argv, "--dry-run"]).dry_run
    found = "\n".join(problems(*argv))
    assert "no data" in found and "needs --save FOLDER" in found and "--load /nowhere" in found


def test_a_missing_recipe_does_not_hide_flag_problems(tmp_path: Path) -> None:
    found = problems("--config", tmp_path / "none.yaml", "--foo")
    assert found[0] == "unknown flag --foo" and "No such file" in found[1]


def test_broken_settings_are_reported_without_torch() -> None:
    program = (
        "import sys\nfrom moetron.moe.config.command import load\n"
        "try: load(['--foo'])\nexcept ValueError: pass\nprint('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "False"


def test_problems_of_stand_ins_are_not_reported(path: Path) -> None:
    """The rule on shared key heads names channels, which depend on the hidden size."""
    three = ["--tensor-model-parallel-size", 3, "--dry-run", "--world-size", 3]
    heads = ["--num-attention-heads", 3, "--num-query-groups", 1, "--seq-length", 15]
    (line,) = problems("--config", path, *three, *heads, "--hidden-size", "abc")
    assert line == "--hidden-size abc: must be integer > 0"
