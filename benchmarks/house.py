"""The package counted: what docs/architecture.md says about its size and its habits.

    python benchmarks/house.py

A function is public if neither its own name nor that of its class or module begins with an
underscore. Lines of code are those that hold neither only a comment, nor a docstring, nor nothing.
"""

import ast
import io
import pathlib
import tokenize

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "official_selftrain"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def definitions(node, public=True, depth=0):
    """(definition, whether it is public) of all functions and classes below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FUNCTIONS, ast.ClassDef)):
            # What is defined inside a function is nobody's interface.
            shown = public and not child.name.startswith("_") and depth == 0
            yield child, shown
            yield from definitions(child, shown, depth + isinstance(child, FUNCTIONS))
        else:
            yield from definitions(child, public, depth)


def annotated(function):
    """Whether all arguments and the result have a type."""
    given = function.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    typed = all(a is None or a.annotation or a.arg in ("self", "cls") for a in arguments)
    return typed and function.returns is not None


def comments(text):
    """Comments that are no instruction to a tool."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    found = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return [c for c in found if not c.startswith(("# fmt:", "# noqa", "# ruff:", "# type:"))]


def code_lines(text, tree):
    """Lines that are neither empty, nor only a comment, nor part of a docstring."""
    documented = [node for node, _ in definitions(tree)] + [tree]
    docstrings = set()
    for node in documented:
        if ast.get_docstring(node, clean=False) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(
        1 for n, line in lines if line.strip() and line.strip()[0] != "#" and n not in docstrings
    )


def measure():
    """`{what: number}`."""
    texts = {file: file.read_text(encoding="utf-8") for file in sorted(PACKAGE.rglob("*.py"))}
    trees = {file: ast.parse(text) for file, text in texts.items()}
    found = [pair for tree in trees.values() for pair in definitions(tree)]
    functions = [node for node, _ in found if isinstance(node, FUNCTIONS)]
    shown = [node for node, public in found if public]
    methods = [node for node in shown if isinstance(node, FUNCTIONS)]
    code = sum(code_lines(text, trees[file]) for file, text in texts.items())
    commented = sum(len(comments(text)) for text in texts.values())
    return {
        "modules": len(texts),
        "modules at the root": len(list(PACKAGE.glob("*.py"))),
        "lines of code": code,
        "lines of self_training.py": len(texts[PACKAGE / "self_training.py"].splitlines()),
        "lines of the longest function": max(n.end_lineno - n.lineno + 1 for n in functions),
        "public definitions": len(shown),
        "percent of them with a docstring": percent(map(ast.get_docstring, shown)),
        "public functions": len(methods),
        "percent of them with all types": percent(map(annotated, methods)),
        "comments per 100 lines of code": round(100 * commented / code, 1),
        "calls that make devices, in pipeline/": sum(
            texts[file].count("make_distribution(") for file in (PACKAGE / "pipeline").glob("*.py")
        ),
    }


def percent(values):
    """Percentage of values that are true."""
    values = list(values)
    return round(100 * sum(map(bool, values)) / len(values), 1)


if __name__ == "__main__":
    for name, value in measure().items():
        print(f"{name:<40} {value}")
