"""The router that docs/routers.md adds works as it stands there."""

import re
from pathlib import Path

import torch

from moetron.moe.routing import router_types

PAGE = Path(__file__).parents[3] / "docs" / "routers.md"


def test_the_documented_router_chooses() -> None:
    (source,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names = dict(vars(router_types))
    exec(source, names)
    router = names["ThresholdRouter"].__new__(names["ThresholdRouter"])
    torch.nn.Module.__init__(router)
    router.topk = 2
    weights_TE, chosen_TE = router.choose(torch.tensor([[0.0, 3.0, 2.0, 1.9], [9.0, 0, 0, 0]]), 1)
    assert chosen_TE.tolist() == [[False, True, True, False], [True, False, False, False]]
    assert (weights_TE > 0).equal(chosen_TE)
