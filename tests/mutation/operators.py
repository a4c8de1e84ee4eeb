"""Small mistakes, made mechanically: every way in which one place of a piece of code can be changed."""

import ast
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise

import torch

# What an operator, a comparison, a function or a string is mistaken for.
ARITHMETIC: dict[type, tuple[type, ...]] = {
    ast.Add: (ast.Sub, ast.Mult),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div, ast.Add),
    ast.Div: (ast.Mult, ast.FloorDiv),
    ast.FloorDiv: (ast.Div, ast.Mod),
    ast.Mod: (ast.FloorDiv,),
    ast.Pow: (ast.Mult,),
    ast.MatMult: (ast.Mult,),
    ast.BitAnd: (ast.BitOr, ast.BitXor),
    ast.BitOr: (ast.BitAnd, ast.BitXor),
    ast.LShift: (ast.RShift,),
}
ORDERED = (ast.Sub, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.MatMult, ast.LShift)  # a ∘ b is not b ∘ a
COMPARISONS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.Gt, ast.GtE),
    ast.LtE: (ast.Lt, ast.GtE, ast.Gt),
    ast.Gt: (ast.GtE, ast.Lt, ast.LtE),
    ast.GtE: (ast.Gt, ast.LtE, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
}
NAMES = {
    "sin": "cos",
    "cos": "sin",
    "max": "min",
    "amax": "amin",
    "maximum": "minimum",
    "argmax": "argmin",
    "argsort": "sort",
    "sum": "mean",
    "mean": "sum",
    "cumsum": "cumprod",
    "softmax": "log_softmax",
    "sigmoid": "tanh",
    "exp": "exp2",
    "log": "log2",
    "square": "abs",
    "round": "floor",
    "zeros": "ones",
    "new_zeros": "new_ones",
    "zeros_like": "ones_like",
    "scatter_add": "scatter",
    "repeat": "tile",
    "chunk": "tensor_split",
    "LayerNorm": "Identity",
    "BatchNorm2d": "InstanceNorm2d",
    "ReLU": "GELU",
    "int8": "uint8",
    "uint8": "int8",
    "float32": "float16",
}
STRINGS = {"bicubic": ("bilinear", "nearest"), "ij": ("xy",), "-inf": ("inf", "-1e4", "0"), "ieee": ("tf32",)}
STRINGS |= {"T": ("C",)}


@dataclass(frozen=True)
class Mutant:
    """A changed piece of code."""

    operator: str
    source: str


def mutants(source: str, inside: Callable[[ast.AST], bool], seed: int = 0) -> list[Mutant]:
    """Every mutant of `source`, no two alike, in an order that takes the operators in turn and is drawn within each.

    `inside` tells which nodes are to be changed.
    """
    tree = ast.parse(source)
    known = {ast.unparse(tree)}
    found: dict[str, list[str]] = defaultdict(list)
    for operator, changed in _changes(tree, inside):
        if changed not in known:
            known.add(changed)
            found[operator].append(changed)
    rng = random.Random(seed)
    for operator in found:
        rng.shuffle(found[operator])
    rows = max(map(len, found.values()), default=0)
    return [Mutant(operator, texts[i]) for i in range(rows) for operator, texts in found.items() if i < len(texts)]


def _changes(tree: ast.Module, inside: Callable[[ast.AST], bool]) -> Iterator[tuple[str, str]]:
    """The operator and the text of each mutant of the tree, which is left as it was."""
    for parent, name, i, node in _places(tree):
        if not inside(node):
            continue
        scope = _Scope(tree, node)
        before = getattr(parent, name)
        for operator, new in _variants(node, parent, scope):
            if i is not None:
                new = [*before[:i], *(new if isinstance(new, list) else [new]), *before[i + 1 :]]
            yield operator, _text_with(tree, parent, name, new)
    for parent, name, i in _neighbours(tree, inside):
        block = getattr(parent, name)
        exchanged = [*block[:i], block[i + 1], block[i], *block[i + 2 :]]
        yield "statement order", _text_with(tree, parent, name, exchanged)


def _text_with(tree: ast.Module, parent: ast.AST, name: str, value: ast.AST | list) -> str:
    before = getattr(parent, name)
    setattr(parent, name, value)
    text = ast.unparse(ast.fix_missing_locations(tree))
    setattr(parent, name, before)
    return text


def _places(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Every node with its parent, and the field of it, and the place in that."""
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if isinstance(value, ast.AST):
                yield parent, name, None, value
            elif isinstance(value, list):
                yield from ((parent, name, i, node) for i, node in enumerate(value) if isinstance(node, ast.AST))


def _neighbours(tree: ast.AST, inside: Callable[[ast.AST], bool]) -> Iterator[tuple[ast.AST, str, int]]:
    for parent in ast.walk(tree):
        for name in ("body", "orelse"):
            block = getattr(parent, name, None)
            if isinstance(block, list):
                pairs = enumerate(pairwise(block))
                yield from ((parent, name, i) for i, pair in pairs if all(map(inside, pair)))


class _Scope:
    """The names that could stand in the place of another: variables of the function, attributes of the same object."""

    def __init__(self, tree: ast.AST, node: ast.AST) -> None:
        function = next((f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and node in ast.walk(f)), tree)
        arguments = [arg.arg for arg in ast.walk(function) if isinstance(arg, ast.arg) and arg.arg != "self"]
        stored = [n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        self.method = getattr(function, "name", "")
        self.variables = list(dict.fromkeys([*arguments, *stored]))
        self.attributes: dict[str, list[str]] = defaultdict(list)
        for attribute in ast.walk(tree):
            if isinstance(attribute, ast.Attribute) and isinstance(attribute.value, ast.Name):
                names = self.attributes[attribute.value.id]
                if attribute.attr not in names and attribute.value.id in (*self.variables, "self"):
                    names.append(attribute.attr)

    def others(self, name: str) -> list[str]:
        """The two variables that come after this one."""
        if name not in self.variables:
            return []
        i = self.variables.index(name)
        return [other for other in (self.variables[i + 1 :] + self.variables[:i])[:2] if other != name]


Variants = Iterator[tuple[str, ast.AST | list]]


def _variants(node: ast.AST, parent: ast.AST, scope: _Scope) -> Variants:
    make = _MAKERS.get(type(node))
    if make is not None:
        yield from make(node, parent, scope)
    if isinstance(node, ast.stmt) and not isinstance(node, ast.FunctionDef):
        yield "statement dropped", ast.Pass()


def _binary(node: ast.BinOp, *_: object) -> Variants:
    left, op, right = node.left, node.op, node.right
    for other in ARITHMETIC.get(type(op), ()):
        yield "operator", ast.BinOp(left, other(), right)
    if isinstance(op, ORDERED):
        yield "operand order", ast.BinOp(right, op, left)
    yield "operand dropped", left
    yield "operand dropped", right
    if isinstance(op, ast.FloorDiv):  # an even size hides what an odd one shows
        for step in (ast.Add(), ast.Sub()):
            yield "off by one", ast.BinOp(ast.BinOp(left, step, ast.Constant(1)), op, right)


def _unary(node: ast.UnaryOp, *_: object) -> Variants:
    yield "sign dropped", node.operand


def _comparison(node: ast.Compare, *_: object) -> Variants:
    for other in COMPARISONS.get(type(node.ops[0]), ()):
        yield "comparison", ast.Compare(node.left, [other(), *node.ops[1:]], node.comparators)


def _boolean(node: ast.BoolOp, *_: object) -> Variants:
    yield "operator", ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    yield from (("operand dropped", value) for value in node.values)


def _constant(node: ast.Constant, parent: ast.AST, _: object) -> Variants:
    value = node.value
    if isinstance(value, bool):
        yield "constant", ast.Constant(not value)
    elif isinstance(value, int):
        yield from (("off by one", _number(value + step)) for step in (1, -1))
        if value:
            yield "constant", _number(-value)
            yield "constant", _number(2 * value)
    elif isinstance(value, float):
        yield from (("constant", _number(other)) for other in (2 * value, value / 2, -value, 1.0) if other != value)
    elif isinstance(value, str) and "->" in value:
        yield from (("pattern", ast.Constant(other)) for other in patterns(value))
    elif isinstance(value, str) and not isinstance(parent, ast.Expr):
        yield from (("string", ast.Constant(other)) for other in STRINGS.get(value, ()))


def _number(value: float) -> ast.expr:
    return ast.Constant(value) if value >= 0 else ast.UnaryOp(ast.USub(), ast.Constant(-value))


def patterns(pattern: str) -> Iterator[str]:
    """Patterns of einops in which two axes have changed places, or two neighbouring groups.

    >>> list(patterns("b (h p) -> h (b p)"))
    ['b (p h) -> h (b p)', '(h p) b -> h (b p)', 'b (h p) -> b (h p)', 'b (h p) -> p (b h)', 'b (h p) -> h (p b)', \
'b (h p) -> (b p) h']
    """
    sides = pattern.split(" -> ")
    for i, side in enumerate(sides):
        changed = [_exchanged(side, a, b) for a, b in combinations(re.findall(r"\w+", side), 2)]
        if i == 0:  # exchanging names on the left is exchanging them on the right: one of the two will do
            changed = [other for other, (a, b) in zip(changed, combinations(re.findall(r"\w+", side), 2), strict=True)
                       if _grouped(side, a, b)]  # fmt: skip
        groups = re.findall(r"\([^)]*\)|\S+", side)
        for j in range(len(groups) - 1):
            changed.append(" ".join([*groups[:j], groups[j + 1], groups[j], *groups[j + 2 :]]))
        for other in dict.fromkeys(changed):
            if other != side:
                yield " -> ".join([*sides[:i], other, *sides[i + 1 :]])


def _exchanged(side: str, a: str, b: str) -> str:
    return re.sub(r"\w+", lambda word: {a: b, b: a}.get(word[0], word[0]), side)


def _grouped(side: str, a: str, b: str) -> bool:
    return any({a, b} <= set(re.findall(r"\w+", group)) for group in re.findall(r"\([^)]*\)", side))


def _name(node: ast.Name, parent: ast.AST, scope: _Scope) -> Variants:
    if isinstance(node.ctx, ast.Load):
        yield from (("name", ast.Name(other, ast.Load())) for other in scope.others(node.id))
        used_as_object = isinstance(parent, ast.Attribute | ast.Subscript) and parent.value is node
        if node.id in scope.variables and not used_as_object:
            yield from _hard_coded()


def _attribute(node: ast.Attribute, parent: ast.AST, scope: _Scope) -> Variants:
    called = isinstance(parent, ast.Call) and parent.func is node
    if other := NAMES.get(node.attr):
        yield "function", ast.Attribute(node.value, other, node.ctx)
    if called and hasattr(torch.Tensor, f"{node.attr}_") and node.attr != "apply":
        yield "in place", ast.Attribute(node.value, f"{node.attr}_", node.ctx)
    if isinstance(node.value, ast.Name):
        others = [name for name in scope.attributes[node.value.id] if name != node.attr]
        yield from (("name", ast.Attribute(node.value, other, node.ctx)) for other in others[:3])
        if node.value.id == "self" and not called:
            yield from _hard_coded()


def _hard_coded() -> Variants:
    """The sizes that examples have."""
    yield from (("hard-coded", ast.Constant(size)) for size in (1, 2, 3))


def _call(node: ast.Call, parent: ast.AST, scope: _Scope) -> Variants:
    def call(args: list, keywords: list) -> ast.Call:
        return ast.Call(node.func, args, keywords)

    for i in range(len(node.args) - 1):
        swapped = [*node.args[:i], node.args[i + 1], node.args[i], *node.args[i + 2 :]]
        yield "argument order", call(swapped, node.keywords)
    if node.args:
        yield "argument dropped", call(node.args[:-1], node.keywords)
        if not isinstance(node.args[0], ast.Starred):
            yield "call dropped", node.args[0]
    for i in range(len(node.keywords)):
        yield "keyword dropped", call(node.args, [*node.keywords[:i], *node.keywords[i + 1 :]])
    for i, j in combinations(range(len(node.keywords)), 2):
        keywords = list(node.keywords)
        keywords[i] = ast.keyword(keywords[i].arg, node.keywords[j].value)
        keywords[j] = ast.keyword(keywords[j].arg, node.keywords[i].value)
        yield "argument order", call(node.args, keywords)
    if isinstance(node.func, ast.Attribute) and not isinstance(parent, ast.Expr):
        yield "call dropped", node.func.value


def _sequence(node: ast.Tuple | ast.List, *_: object) -> Variants:
    items = node.elts
    for i in range(len(items) - 1):
        yield "order", type(node)([*items[:i], items[i + 1], items[i], *items[i + 2 :]], node.ctx)
    if isinstance(node.ctx, ast.Load):
        yield from (("item dropped", type(node)([*items[:i], *items[i + 1 :]], node.ctx)) for i in range(len(items)))


def _subscript(node: ast.Subscript, *_: object) -> Variants:
    if isinstance(node.ctx, ast.Load):
        yield "index dropped", node.value


def _slice(node: ast.Slice, *_: object) -> Variants:
    if node.lower is not None or node.upper is not None:
        yield "slice", ast.Slice(node.upper, node.lower, node.step)
        yield "slice", ast.Slice(None, None, node.step)
    for bound in ("lower", "upper"):
        if (value := getattr(node, bound)) is not None:
            moved = ast.BinOp(value, ast.Add(), ast.Constant(1))
            yield "off by one", ast.Slice(**{"lower": node.lower, "upper": node.upper, bound: moved}, step=node.step)


def _choice(node: ast.IfExp, *_: object) -> Variants:
    yield "condition", node.body
    yield "condition", node.orelse
    yield "condition", ast.IfExp(node.test, node.orelse, node.body)


def _if(node: ast.If, *_: object) -> Variants:
    yield "condition", ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    yield "condition", list(node.body)


def _for(node: ast.For, *_: object) -> Variants:
    items = ast.Call(ast.Name("list", ast.Load()), [node.iter], [])
    for start, stop in ((1, None), (None, -1), (None, 2)):
        bounds = ast.Slice(*(None if bound is None else _number(bound) for bound in (start, stop)))
        yield "off by one", ast.For(node.target, ast.Subscript(items, bounds, ast.Load()), node.body, node.orelse)
    yield "loop", ast.For(node.target, node.iter, [*node.body, ast.Break()], node.orelse)


def _while(node: ast.While, *_: object) -> Variants:
    yield "loop", ast.If(node.test, node.body, [])


def _assignment(node: ast.Assign, parent: ast.AST, scope: _Scope) -> Variants:
    target, value = node.targets[0], node.value
    if scope.method == "forward":
        yield "kept from the first call", ast.Assign(node.targets, _kept(value))
        yield "another in training", ast.Assign(node.targets, _other_in_training(value))
    if isinstance(value, ast.BinOp) and ast.unparse(value.left) == ast.unparse(target):
        yield "in place", ast.AugAssign(target, value.op, value.right)
    if isinstance(target, ast.Name):
        yield "detached", ast.Assign(node.targets, _detached(value))


def _augmented(node: ast.AugAssign, *_: object) -> Variants:
    for other in ARITHMETIC.get(type(node.op), ()):
        yield "operator", ast.AugAssign(node.target, other(), node.value)
    yield "operand dropped", ast.Assign([node.target], node.value)


def _return(node: ast.Return, parent: ast.AST, scope: _Scope) -> Variants:
    if node.value is not None and scope.method == "forward":
        yield "another in training", ast.Return(_other_in_training(node.value))
    if node.value is not None and not isinstance(node.value, ast.Tuple):
        yield "detached", ast.Return(_detached(node.value))


def _kept(value: ast.expr) -> ast.expr:
    """What a module computes once and remembers."""
    store = ast.parse("self.__dict__.setdefault").body[0].value
    return ast.Call(store, [ast.Constant(f"kept {ast.unparse(value)}"), value], [])


def _other_in_training(value: ast.expr) -> ast.expr:
    """Half of it: what a dropout that nobody asked for does on average."""
    training = ast.Attribute(ast.Name("self", ast.Load()), "training", ast.Load())
    return ast.IfExp(training, ast.BinOp(value, ast.Div(), ast.Constant(2)), value)


def _detached(value: ast.expr) -> ast.expr:
    return ast.Call(ast.Attribute(value, "detach", ast.Load()), [], [])


_MAKERS: dict[type, Callable[..., Variants]] = {
    ast.BinOp: _binary,
    ast.UnaryOp: _unary,
    ast.Compare: _comparison,
    ast.BoolOp: _boolean,
    ast.Constant: _constant,
    ast.Name: _name,
    ast.Attribute: _attribute,
    ast.Call: _call,
    ast.Tuple: _sequence,
    ast.List: _sequence,
    ast.Subscript: _subscript,
    ast.Slice: _slice,
    ast.IfExp: _choice,
    ast.If: _if,
    ast.For: _for,
    ast.While: _while,
    ast.Assign: _assignment,
    ast.AugAssign: _augmented,
    ast.Return: _return,
}
