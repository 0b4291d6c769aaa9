"""Parser of Megatron's --moe-layer-freq expressions, such as ``([0]*3+[1]*23)*1``."""

import ast

MOST_LAYERS = 10_000


def layer_pattern(text: str) -> list[int]:
    """Return the list of an expression of integers in brackets, ``+``, ``*`` and parentheses.

    Megatron-LM evaluates it as Python (``moe_freq_type`` in megatron/training/arguments.py).

    Raises:
        ValueError: the expression holds anything else, or the list exceeds ``MOST_LAYERS``.
    """
    try:
        made = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        made = None
    if not isinstance(made, list):
        raise ValueError("not an expression like ([0]*3+[1]*23)*1")
    return made


def _value(node: ast.expr) -> int | list[int] | None:
    """Return the integer or list of a node, or None for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if type(node.value) is int else None
    if isinstance(node, ast.List):
        items = [_value(item) for item in node.elts]
        integers = [item for item in items if isinstance(item, int)]
        return integers if len(integers) == len(items) else None
    if not isinstance(node, ast.BinOp):
        return None
    left, right = _value(node.left), _value(node.right)
    if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
        return left + right
    if isinstance(node.op, ast.Mult) and isinstance(left, int):
        left, right = right, left
    if isinstance(node.op, ast.Mult) and isinstance(left, list) and isinstance(right, int):
        if len(left) * right > MOST_LAYERS:
            raise ValueError(f"more than {MOST_LAYERS:,} layers")
        return left * right
    return None
