"""The places of a source file where one small fault can be put in, and the file with that fault.

A place is identified by its function's name, the text of the expression and its number among equal ones there, so that
it is found again after a file has moved or been reformatted.
"""

import ast
import copy
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
}
KINDS = ("operator", "constant", "dropped call", "swapped arguments")
# Without these calls there is still a value of the same type; most others would leave one that fails at once.
NUMERIC_MODULES = {"math", "np", "torch"}
SAME_TYPE = {
    *("abs", "astype", "clamp", "clone", "contiguous", "copy", "cpu", "cumsum", "detach", "double", "exp", "flatten"),
    *("float", "log", "max", "mean", "min", "mul_", "permute", "resolve", "round", "sqrt", "square", "sum", "to"),
    *("transpose", "view"),
}
# Functions of two numbers or arrays whose value is the same, bit for bit, when these change places.
SYMMETRIC = {"min", "max", "math.gcd", "np.minimum", "np.maximum", "np.multiply", "torch.mul"}
# Flags that say only how fast it goes, and on a CPU nothing: a copy to it is never asynchronous.
SPEED_FLAGS = {"non_blocking", "pin_memory"}


class Place(NamedTuple):
    """One fault: `original`, of which this is the `number`-th in `function` (from 0), becomes `mutated`."""

    function: str
    kind: str
    original: str
    mutated: str
    number: int


class _Fault(NamedTuple):
    place: Place
    node: ast.expr
    equivalent: str | None  # why no test can notice it


def places(source: str) -> list[Place]:
    """Every place inside the functions of a file, in their order there; none in docstrings, messages and defaults."""
    return [fault.place for fault in _faults(source)]


def equivalent_places(source: str) -> dict[Place, str]:
    """The places whose fault changes nothing that a test could see, by their form alone, with the reason."""
    return {fault.place: fault.equivalent for fault in _faults(source) if fault.equivalent}


def in_random_order(found: list[Place], rng: random.Random) -> list[Place]:
    """All places, the four kinds by turns as far as they reach, and at random within each kind."""
    turns = []
    for kind in KINDS:
        of_kind = [place for place in found if place.kind == kind]
        rng.shuffle(of_kind)
        turns += [(turn, KINDS.index(kind), place) for turn, place in enumerate(of_kind)]
    return [place for _, _, place in sorted(turns)]


def mutated_source(source: str, place: Place) -> tuple[str, int] | None:
    """The file with the fault, and the fault's line; None where the place is not in this file."""
    for fault in _faults(source):
        if fault.place == place:
            node: Any = fault.node
            lines = source.encode().splitlines(keepends=True)  # ast counts columns in bytes
            start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
            end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
            data = source.encode()
            # parentheses, since what is around may bind more tightly
            mutant = (data[:start] + f"({place.mutated})".encode() + data[end:]).decode()
            ast.parse(mutant)
            return mutant, node.lineno
    return None


# ---- where they are ------------------------------------------------------------------------------------------------


def _faults(source: str) -> Iterator[_Fault]:
    for name, function in _functions(ast.parse(source), ""):
        seen: Counter[tuple[str, str, str]] = Counter()
        for node, parent in _expressions(function):
            original = ast.unparse(node)
            for kind, mutated in _mutations(node, isinstance(parent, ast.Expr)):
                if mutated != original:
                    place = Place(name, kind, original, mutated, seen[kind, original, mutated])
                    yield _Fault(place, node, _equivalent(kind, node, parent))
                    seen[kind, original, mutated] += 1


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield prefix + child.name, child
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.stmt):
            yield from _functions(child, prefix)


def _expressions(function: ast.FunctionDef) -> Iterator[tuple[ast.expr, ast.AST]]:
    """Each expression of a function but for messages, annotations and functions inside, and what it is a part of."""

    def walk(node: ast.AST) -> Iterator[tuple[ast.expr, ast.AST]]:
        if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.FunctionDef | ast.ClassDef):
            return
        if isinstance(node, ast.Expr) and ast.unparse(node).startswith(("logger.", "warnings.")):
            return
        for name, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.expr) and name != "annotation" and not isinstance(child, ast.JoinedStr):
                    yield child, node
                if isinstance(child, ast.AST) and name != "annotation":
                    yield from walk(child)

    for statement in function.body:
        yield from walk(statement)


# ---- what they become ----------------------------------------------------------------------------------------------


def _mutations(node: ast.expr, is_statement: bool) -> Iterator[tuple[str, str]]:
    """(kind, text) of every fault that this expression can have."""
    mutant: Any = copy.deepcopy(node)
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            mutant.ops[i] = OPERATORS[type(operator)]()
            yield "operator", ast.unparse(mutant)
            mutant.ops[i] = operator
    elif isinstance(node, ast.BoolOp | ast.BinOp) and type(node.op) in OPERATORS and not _joins_text(node):
        mutant.op = OPERATORS[type(node.op)]()
        yield "operator", ast.unparse(mutant)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        yield "constant", repr(_other(node.value))
    elif isinstance(node, ast.Call):
        without = "None" if is_statement else _without_call(node)
        if without is not None:
            yield "dropped call", without
        first = node.args[:2]
        if len(first) == 2 and not any(isinstance(argument, ast.Starred) or _is_text(argument) for argument in first):
            if ast.unparse(node.func) != "isinstance":
                mutant.args[:2] = mutant.args[1::-1]
                yield "swapped arguments", ast.unparse(mutant)


def _equivalent(kind: str, node: ast.expr, parent: ast.AST) -> str | None:
    """Why this kind of fault at this node changes nothing, where its form says so."""
    if kind == "swapped arguments" and isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in SYMMETRIC:
        return f"{name} of two is the same in either order" if len(node.args) == 2 else None
    if kind == "constant" and isinstance(parent, ast.keyword) and parent.arg in SPEED_FLAGS:
        return f"{parent.arg} says only how fast it goes"
    return None


def _without_call(call: ast.Call) -> str | None:
    """np.f(x) becomes x, and x.f(…) becomes x."""
    function = call.func
    if not isinstance(function, ast.Attribute):
        return None
    if ast.unparse(function.value) in NUMERIC_MODULES:
        return ast.unparse(call.args[0]) if len(call.args) == 1 and not call.keywords else None
    return ast.unparse(function.value) if function.attr in SAME_TYPE else None


def _joins_text(node: ast.BoolOp | ast.BinOp) -> bool:
    """Whether + or / joins strings or paths, which no other operator would do."""
    return isinstance(node, ast.BinOp) and (_is_text(node.left) or _is_text(node.right))


def _is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
        return True
    return ast.unparse(node) in ("MANIFEST", "STATE", "name", "path", "path.name")


def _other(value: bool | int | float) -> bool | int | float:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return value * 1.01 if value else 1.0
