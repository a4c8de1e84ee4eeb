"""``KEY=VALUE,…`` on a command line: the arguments of a model, of a data set, of a method."""

import argparse
import ast
from typing import Any


def key_values(text: str) -> dict[str, Any]:
    """``a=1,b=true,c=x,d=(2,2)`` as a dict: literals of Python or of a recipe, and else strings.

    >>> key_values("depths=(2,(2,6)),class_token=false,global_pool=avg,note='a,b'")
    {'depths': (2, (2, 6)), 'class_token': False, 'global_pool': 'avg', 'note': 'a,b'}
    """
    pairs: dict[str, Any] = {}
    for item in _split_outside_brackets(text):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (equals and key.isidentifier() and value):
            raise argparse.ArgumentTypeError(f"{item!r} is not KEY=VALUE")
        if key in pairs:
            raise argparse.ArgumentTypeError(f"{item!r} gives {key} a second time")
        try:
            pairs[key] = ast.literal_eval(_Words().visit(ast.parse(value, mode="eval")))
        except (ValueError, SyntaxError):
            if value[0] in "([{\"'":
                raise argparse.ArgumentTypeError(f"{item!r} cannot be read; write it as in Python") from None
            pairs[key] = value
    return pairs


def _split_outside_brackets(text: str) -> list[str]:
    """Cut at the commas that are in no brackets and no quotes."""
    items, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        depth += 0 if quote else (character in "([{") - (character in ")]}")
        if character == "," and not quote and depth == 0:
            items.append("")
        else:
            items[-1] += character
    if quote or depth:
        raise argparse.ArgumentTypeError(f"{items[-1]!r} has {'a quote' if quote else 'brackets'} without a partner")
    return [item for item in items if item.strip()]


class _Words(ast.NodeTransformer):
    """Bare words stand for strings, but true and false for what they say."""

    def visit_Name(self, node: ast.Name) -> ast.Constant:
        return ast.Constant({"true": True, "false": False}.get(node.id, node.id))
