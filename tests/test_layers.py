"""Imports go one way: actors, tuning, clusters -> fedpipe_ray. Looks inside functions too, and finds cycles."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {"fedpipe_ray", "actors", "tuning", "clusters"}
ONLY_IN = {"ray": "actors", "optuna": "tuning"}


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file, for every module of the four packages; a package goes by its folder's name."""
    files = [file for package in sorted(PACKAGES) for file in sorted((root / package).rglob("*.py"))]
    return {".".join(f.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def top_level(tree: ast.AST) -> Iterator[ast.AST]:
    """What runs on import: no function bodies, nothing under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from top_level(node)


def imports(nodes: Iterator[ast.AST], package: str) -> Iterator[str]:
    """Dotted names imported, each `from a import b` as a.b; import_module("a") and __import__("a") count."""
    for node in nodes:
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = resolve_name("." * level + (module or ""), package)
                yield from (f"{base}.{alias.name}" for alias in names)
            case ast.Call(func=ast.Name(id=call) | ast.Attribute(attr=call), args=[ast.Constant(value=str(name)), *_]):
                if call in {"import_module", "__import__"}:
                    yield resolve_name(name, package)


def violations(root: Path) -> list[str]:
    found, graph, known = [], {}, modules(root)
    for name, file in known.items():
        tree, top = ast.parse(file.read_text(encoding="utf-8")), name.partition(".")[0]
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        for target in imports(ast.walk(tree), package):
            other = target.partition(".")[0]
            upward = other in PACKAGES - {top, "fedpipe_ray"} and name != "fedpipe_ray.__main__"
            if upward or ONLY_IN.get(other, top) != top:
                found.append(f"{name} imports {target}")
        targets = {t if t in known else t.rpartition(".")[0] for t in imports(top_level(tree), package)}
        graph[name] = targets & known.keys() - {name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append("cycle: " + " <- ".join(error.args[1]))
    return found


def test_imports_go_one_way() -> None:
    assert {name.partition(".")[0] for name in modules(ROOT)} == PACKAGES
    assert violations(ROOT) == []


def test_the_checker_can_fail(tmp_path: Path) -> None:
    files = {
        "fedpipe_ray/__init__.py": "",
        "fedpipe_ray/__main__.py": "import actors.fleet\nfrom tuning import study",  # allowed here, and only here
        "fedpipe_ray/loop.py": "def f():\n    from ray.util import state\n    import clusters",
        "fedpipe_ray/a.py": "from . import b\nfrom .c import f",
        "fedpipe_ray/b.py": "import fedpipe_ray.a",
        "fedpipe_ray/c.py": "def f():\n    from . import a",  # inside a function: no cycle
        "actors/fleet.py": "import ray, fedpipe_ray.loop\nimport rayon\nimportlib.import_module('optuna')",
        "tuning/study.py": "import optuna\nfrom actors.fleet import Fleet",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    *layers, cycle = violations(tmp_path)
    assert sorted(layers) == [
        "actors.fleet imports optuna",
        "fedpipe_ray.loop imports clusters",
        "fedpipe_ray.loop imports ray.util.state",
        "tuning.study imports actors.fleet.Fleet",
    ]
    assert cycle.startswith("cycle: ")
    assert {"fedpipe_ray.a", "fedpipe_ray.b"} == set(cycle.removeprefix("cycle: ").split(" <- "))
