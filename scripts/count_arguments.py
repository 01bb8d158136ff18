"""Counts the functions that take more than eight arguments, in all and without those that declare a user's options.

    python scripts/count_arguments.py

Those that declare options are constructors of layers and systems, presets, verbs of the command line, what `--set` and
`provenn bench` fill in by name (a task's `load`, `held_out` and `predict`, a bench's sweep), and Triton's kernels,
whose arguments are pointers and strides. Two functions have the signature that torch and transformers call. All others
hand a typed object on.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "provenn"
MOST = 8
DICTATED = {"core/cost.py:_convolution_backward_flops", "huggingface/conversion.py:_attend"}


def long_functions(package: Path = PACKAGE) -> Iterator[tuple[str, int, bool]]:
    """Place, number of arguments and whether they are a user's options, of each function with more than `MOST`."""
    for file in sorted(package.rglob("*.py")):
        name = str(file.relative_to(package))
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = _count(node.args)
                if count > MOST:
                    place = f"{name}:{node.name}"
                    yield place, count, place in DICTATED or _declares_options(name, node)


def _count(arguments: ast.arguments) -> int:
    named = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in named if name not in ("self", "cls")]) + sum(
        each is not None for each in (arguments.vararg, arguments.kwarg)
    )


def _declares_options(file: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    part, stem = file.split("/")[0], file.rpartition("/")[2].removesuffix(".py")
    decorators = " ".join(ast.unparse(each) for each in node.decorator_list)
    if node.name == "__init__" or ".jit" in decorators or ".command" in decorators:
        return True
    preset = part == "papers" and node.returns is not None and "forward" not in node.name
    built = preset and isinstance(node.returns, ast.Name) and node.returns.id[0].isupper()
    filled_in = node.name in ("load", "held_out", "predict") and ("tasks/" in file or stem == "task")
    return built or filled_in or (stem == "bench" and node.name in ("sweep", "bench"))


if __name__ == "__main__":
    found = sorted(long_functions(), key=lambda each: -each[1])
    for place, count, options in found:
        print(f"{count:3d}  {'options' if options else '       '}  {place}")
    others = sum(not options for _, _, options in found)
    print(f"{len(found)} functions take more than {MOST} arguments; {others} of them declare no options")
