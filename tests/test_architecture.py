"""The house rules that a command can see: imports go one way, modules stay small, every module has its test."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import bitloft

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "bitloft"
MODULES = sorted(SRC.rglob("*.py"))

# A module imports from lines above its own, and from its own package. Siblings on one line do not import each other.
LAYERS = (
    ("errors",),
    ("formats",),
    ("patterns",),
    ("options",),
    ("rules",),
    ("packed",),
    ("kernels",),
    ("solvers", "checkpoint"),
    ("shards", "journal"),
    ("slots", "float8"),
    ("folder",),
    ("adapter_config",),
    ("adapter_table",),
    ("adapter_files",),
    ("adapters",),
    ("factors", "packing"),
    ("modules",),
    ("integrations",),
    ("stream",),
    ("fanout",),
    ("tasks", "report", "card", "roofline", "traffic"),
    ("calibrate", "sensitivity"),
    ("ground",),
    ("train", "compress", "evaluate", "inspection", "generate", "starts", "rebase"),
    ("widths", "bulk"),
    ("quantize_report",),
    ("quantize",),
    ("footprint",),
    ("machine",),
    ("merge", "convert", "plan"),
    ("regimes",),
    ("sweep_report",),
    ("tune", "sweep"),
    ("judge",),
    ("serve",),
    ("terminal",),
    ("console",),
    ("console_adapter", "console_convert", "console_plan", "console_serve", "console_tasks"),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# What knows transformers and peft: their integrations, and what builds on those.
KNOWS_TRANSFORMERS = (
    *(
        "integrations",
        "tasks",
        "quantize",
        "train",
        "evaluate",
        "rebase",
        "sensitivity",
        "merge",
        "convert",
        "footprint",
        "generate",
        "regimes",
        "tune",
    ),
    "serve",
)
TORCH_FREE = ("errors", "formats", "patterns", "options", "rules", "cli")
MODULE_LINES, FUNCTION_LINES = 350, 60


def unit(module: Path) -> str:
    """The name that LAYERS knows: the first path component below bitloft/; __init__ for the package's own file."""
    return module.relative_to(SRC).parts[0].removesuffix(".py")


def tree(module: Path) -> ast.Module:
    return ast.parse(module.read_text(encoding="utf-8"), filename=str(module))


def imported(node: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import below ``node``; ``from a import b`` gives a.b."""
    for item in ast.walk(node):
        if isinstance(item, ast.Import):
            yield from ((item.lineno, alias.name) for alias in item.names)
        elif isinstance(item, ast.ImportFrom):
            yield from ((item.lineno, f"{item.module}.{alias.name}") for alias in item.names)


def own_imports(module: Path) -> Iterator[tuple[int, str]]:
    """(line, unit) of every import of another part of bitloft, those inside functions included."""
    for line, name in imported(tree(module)):
        parts = name.split(".")
        if parts[0] == "bitloft" and len(parts) > 1 and parts[1] != "__version__" and parts[1] != unit(module):
            yield line, parts[1]


def where(module: Path, line: int) -> str:
    return f"{module.relative_to(ROOT)}:{line}"


def test_every_module_has_a_layer() -> None:
    units = {unit(module) for module in MODULES} - {"__init__"}
    assert units <= set(LEVEL), f"add {sorted(units - set(LEVEL))} to LAYERS"


def test_imports_go_one_way() -> None:
    wrong = [
        f"{where(module, line)} imports {name}"
        for module in MODULES
        if unit(module) != "__init__"
        for line, name in own_imports(module)
        if LEVEL[name] >= LEVEL[unit(module)]
    ]
    assert not wrong, wrong


def test_no_module_is_in_a_circle() -> None:
    """Inside a package siblings may import each other, but not in a circle, nor in one that an import in a function
    hides. The package's own file is left out: it loads its public names on first use."""
    names = {dotted(module): module for module in MODULES if module != SRC / "__init__.py"}
    graph = {name: sorted(set(loads(module)) & set(names) - {name}) for name, module in names.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in graph[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def dotted(module: Path) -> str:
    """bitloft.a.b of a/b.py, bitloft.a of a/__init__.py."""
    parts = module.with_suffix("").relative_to(SRC.parent).parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def loads(module: Path) -> Iterator[str]:
    """Dotted names that a module imports, in functions too: both a and a.b of ``from a import b``."""
    for _, name in imported(tree(module)):
        yield name
        yield name.rpartition(".")[0]


def test_only_the_upper_layers_know_transformers_and_peft() -> None:
    wrong = [
        f"{where(module, line)} imports {name}"
        for module in MODULES
        if unit(module) not in KNOWS_TRANSFORMERS
        for line, name in imported(tree(module))
        if name.split(".")[0] in ("transformers", "peft", "accelerate")
    ]
    assert not wrong, wrong


def test_torch_free_modules_do_not_import_torch() -> None:
    wrong = [
        f"{where(module, line)} imports {name}"
        for module in MODULES
        if unit(module) in TORCH_FREE
        for line, name in imported(ast.Module(tree(module).body, []))
        if name.split(".")[0] in ("torch", "jaxtyping", "numpy", "safetensors")
    ]
    assert not wrong, wrong


def loaded_after(code: str) -> set[str]:
    """Top-level modules in a fresh process after ``code``."""
    report = f"import sys\ntry:\n    {code}\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
    report += "print('LOADED', *{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", report, "--help"], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("LOADED")[2].split())


def test_importing_bitloft_loads_neither_torch_nor_transformers() -> None:
    loaded = loaded_after("import bitloft; bitloft.Format")
    assert "bitloft" in loaded
    assert not loaded & {"torch", "transformers", "peft", "numpy", "typer"}


def test_help_loads_neither_torch_nor_transformers() -> None:
    loaded = loaded_after("from bitloft.cli import main; main()")
    assert {"bitloft", "typer"} <= loaded
    assert not loaded & {"torch", "transformers", "peft", "numpy"}


def test_every_public_name_resolves_to_itself_not_to_its_module() -> None:
    """Twice: resolving ``bitloft.quantize`` imports the module of that name, which must not take the name over."""
    for _ in range(2):
        for name in bitloft.__all__:
            assert getattr(bitloft, name).__name__ == name
            assert callable(getattr(bitloft, name))


def test_modules_and_functions_stay_small() -> None:
    lines = {module: len(module.read_text(encoding="utf-8").splitlines()) for module in MODULES}
    large = [f"{where(module, 1)}: {count} lines" for module, count in lines.items() if count > MODULE_LINES]
    for module in MODULES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = (node.end_lineno or node.lineno) - node.lineno + 1
                if count > FUNCTION_LINES:
                    large.append(f"{where(module, node.lineno)} {node.name}: {count} lines")
    assert not large, large


def test_no_drawers() -> None:
    drawers = {"utils", "util", "common", "misc", "helpers"}
    assert not [module for module in MODULES if module.stem in drawers]


def test_every_module_has_a_test_file() -> None:
    """tests/test_<module>.py, or test_<package>_<module>.py; a package's own file only where it defines something."""
    tests = {file.stem for file in (ROOT / "tests").rglob("test_*.py")}
    missing = []
    for module in MODULES:
        parts = module.relative_to(SRC).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
            if not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree(module).body):
                continue
        if parts and not {f"test_{parts[-1]}", f"test_{'_'.join(parts)}"} & tests:
            missing.append("/".join(parts))
    assert not missing, missing


def test_source_keeps_the_house_rules() -> None:
    """No assert (python -O drops it), no print outside the CLI, no pickle, no unfinished marks."""
    forbidden = ({"print", "torch.load", "pickle.load"}, {"torch.load", "pickle.load"})
    wrong = []
    for module in MODULES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.Assert):
                wrong.append(f"{where(module, node.lineno)}: assert")
            if isinstance(node, ast.Call) and ast.unparse(node.func) in forbidden[unit(module) == "cli"]:
                wrong.append(f"{where(module, node.lineno)}: {ast.unparse(node.func)}")
            if isinstance(node, ast.Name) and node.id == "NotImplementedError":
                wrong.append(f"{where(module, node.lineno)}: NotImplementedError")
        for line, text in enumerate(module.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(r"\b(TODO|FIXME|XXX)\b", text):
                wrong.append(f"{where(module, line)}: {text.strip()}")
    assert not wrong, wrong


def test_every_module_says_what_it_is() -> None:
    assert not [module for module in MODULES if not ast.get_docstring(tree(module))]


def test_version_is_the_newest_changelog_entry() -> None:
    entries = re.findall(r"(?m)^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    assert next(entry for entry in entries if entry != "Unreleased") == bitloft.__version__


def test_constraints_pin_every_requirement() -> None:
    """What pyproject.toml asks for, constraints.txt names at one version (but not the extra gpu)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *extras["serve"],
        *extras["demo"],
        *extras["docs"],
        *extras["ray"],
        *extras["tasks"],
        *extras["eval"],
        *extras["dev"],
    ]
    names = {_same(re.split(r"[\[<>=]", requirement)[0]) for requirement in wanted} - {"bitloft"}
    pins = {_same(line.partition("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert not names - pins


def _same(package: str) -> str:
    """Names that differ in case or in - and _ are one to pip."""
    return package.lower().replace("_", "-")
