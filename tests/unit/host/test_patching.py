import pytest

from moetron.moe.host.patching import Patch, with_constants


class Owner:
    value = 1


def test_patch_and_its_undo_including_absence() -> None:
    undo = [Patch(Owner, "value", 2).apply(), Patch(Owner, "extra", 3).apply()]
    assert (Owner.value, Owner.extra) == (2, 3)  # type: ignore[attr-defined]
    for patch in undo:
        patch.apply()
    assert Owner.value == 1 and not hasattr(Owner, "extra")


def _speaks(word: str) -> tuple[bool, str]:
    def inner() -> str:
        return "cuda"

    return word in ("cuda", "meta"), inner()


def test_constants_in_tuples_and_nested_functions() -> None:
    undo = with_constants(_speaks, {"cuda": "cpu"}).apply()
    assert _speaks("cpu") == (True, "cpu")
    assert _speaks("meta") == (True, "cpu")
    undo.apply()
    assert _speaks("cpu") == (False, "cuda")


def test_a_missing_constant_is_an_error() -> None:
    with pytest.raises(LookupError, match=r"_speaks has no constant \['mps'\]"):
        with_constants(_speaks, {"cuda": "cpu", "mps": "cpu"})
