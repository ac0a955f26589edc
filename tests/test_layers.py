"""The layers of pyro_vae: imports run strictly downward, and only layer 1 touches pyro.poutine.

Docs: docs/architecture.md. A new file needs a place in LAYERS before the suite passes.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "pyro_vae"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

# Files of the design that are not written yet may stand here: the test checks that each file has
# a layer, not that each name has a file.
LAYERS = {
    0: {
        "estimators",
        "results",
        "batches",
        "counts",
        "readers",
        "ranks",
        "checkpoints",
        "lbfgs",
        "arviz_bridge",
        "image_files",
        "imputation_plot",
        "plots",
        "schedules",
        "captured",
        "identity_checks",
        "warned_once",
        "gradient_hooks",
        "varying_numbers",
        "graphs",
        "recurrent_operators",
        "trace_constants",
        "cuda_graphs",
        "graph_nodes",
        "graph_simplification",
        "graph_formulas",
        "recorder",
        "provenance",
    },
    1: {
        "sites",
        "description",
        "traces",
        "kl",
        "families",
        "family",
        "family_guide",
        "running",
        "flows",
        "proposals",
        "supports",
        "preimages",
        "precision",
        "nets",
        "handlers",
        "missing",
        "missing_check",
        "coordinates",
        "guides",
        "row_order",
        "plate_scale",
        "global_latents",
        "elimination",
        "enumeration",
        "enumeration_check",
        "absence_check",
        "independence_check",
        "masks",
        "exact",
        "particles",
        "layouts",
        "spine",
        "logweights",
        "admission",
        "scorer",
        "deterministic",
        "parameters",
        "optimizers",
        "annealing",
        "traced_loss",
        "watched",
        "plain_errors",
    },
    2: {
        "objectives",
        "importance",
        "minibatches",
        "svi",
        "training_step",
        "fit",
        "refine",
        "climbing",
        "starts",
        "certificate",
        "em",
        "e_steps",
        "m_step",
        "bounds",
        "compare",
        "diagnostics",
        "impute",
    },
    3: {"inference_data", "report", "datasets", "zoo", "demo", "cli"},
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}

# The two entry points gather from every layer: `import pyro_vae` and `python -m pyro_vae`.
ENTRY_POINTS = {"__init__", "__main__"}

# The one folder has the layer of its name.
FOLDER = "zoo"

MODULES = {path.stem: path for path in sorted(ROOT.glob("*.py")) if path.stem not in ENTRY_POINTS}
MODULES |= {f"{FOLDER}/{path.stem}": path for path in sorted((ROOT / FOLDER).glob("*.py"))}
LAYER_OF |= {name: LAYER_OF[FOLDER] for name in MODULES if name.startswith(FOLDER)}


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def nodes_at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those below `if TYPE_CHECKING:`, which never run.

    An import inside a function counts like any other: it is the same dependency, only later.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and is_type_checking(node.test):
            for statement in node.orelse:
                yield statement
                yield from nodes_at_run_time(statement)
        else:
            yield node
            yield from nodes_at_run_time(node)


def imported_names(source: str) -> set[str]:
    """Dotted names a file of the package imports, relative imports made absolute.

    `from a import b` gives "a.b": b may be a module.
    """
    names: set[str] = set()
    for node in nodes_at_run_time(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [PACKAGE] if node.level else []
            base += [node.module] if node.module else []
            names.update(".".join([*base, alias.name]) for alias in node.names)
    return names


def siblings(source: str) -> set[str]:
    """Files of the package that a file imports.

    `from pyro_vae import kl` is an import of that file, as `import pyro_vae.kl` is: Python falls
    back on the submodule while the package is being imported. Where f is no file, `from pyro_vae
    import f` needs __init__ and so reaches every layer; it shows as "__init__".
    """
    found: set[str] = set()
    for name in imported_names(source):
        first, _, rest = name.partition(".")
        if first == PACKAGE:
            module = rest.split(".")[0]
            found.add(module if module in LAYER_OF or module in MODULES else "__init__")
    return found


def uses_poutine(source: str) -> bool:
    """Whether a file imports pyro.poutine, or reaches it as an attribute."""
    imported = any("poutine" in name.split(".") for name in imported_names(source))
    return imported or any(
        isinstance(node, ast.Attribute) and node.attr == "poutine"
        for node in nodes_at_run_time(ast.parse(source))
    )


def test_every_file_has_a_layer():
    unknown = sorted(set(MODULES) - set(LAYER_OF))
    assert not unknown, (
        f"no layer for {unknown}: give each a place in LAYERS here and in docs/architecture.md"
    )
    nested = [path for path in ROOT.rglob("*.py") if path.parent not in (ROOT, ROOT / FOLDER)]
    assert not nested, f"the package is flat but for {FOLDER}/, found {nested}"
    named = [name for names in LAYERS.values() for name in names]
    assert len(named) == len(set(named)), "a file in two layers"


@pytest.mark.parametrize("name", MODULES)
def test_the_documentation_names_every_file(name: str):
    page = ROOT.parent / "docs" / "architecture.md"
    assert f"`{name}.py`" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downward(name: str):
    for other in siblings(MODULES[name].read_text(encoding="utf-8")):
        assert other != "__init__", (
            f"{name} imports the package itself; import the file that has it"
        )
        assert LAYER_OF[other] <= LAYER_OF[name], (
            f"{name} (layer {LAYER_OF[name]}) imports {other} (layer {LAYER_OF[other]})"
        )


def test_imports_within_a_layer_have_no_cycle():
    graph = {
        name: {
            other
            for other in siblings(path.read_text(encoding="utf-8"))
            if LAYER_OF.get(other) == LAYER_OF.get(name)
        }
        for name, path in MODULES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"files of one layer import each other in a circle: {error.args[1]}")


@pytest.mark.parametrize("name", MODULES)
def test_only_layer_1_touches_poutine(name: str):
    if LAYER_OF[name] != 1:
        assert not uses_poutine(MODULES[name].read_text(encoding="utf-8")), (
            f"{name} (layer {LAYER_OF[name]}) uses pyro.poutine; that belongs into layer 1"
        )


@pytest.mark.parametrize("name", [name for name in MODULES if LAYER_OF.get(name) == 0])
def test_layer_0_imports_no_pyro(name: str):
    imported = imported_names(MODULES[name].read_text(encoding="utf-8"))
    pyro = sorted(name for name in imported if name.split(".")[0] in {"pyro", "pyroapi"})
    assert not pyro, f"{name} is layer 0 and imports {pyro}"


@pytest.mark.parametrize("name", ["arviz_bridge", "image_files", "imputation_plot", "plots"])
def test_arrays_need_no_torch(name: str):
    source = MODULES[name].read_text(encoding="utf-8")
    assert "torch" not in {imported.split(".")[0] for imported in imported_names(source)}
    assert not siblings(source)


def test_the_command_stands_above_the_demo_and_the_demo_above_the_rest():
    for name, path in MODULES.items():
        found = siblings(path.read_text(encoding="utf-8"))
        assert "cli" not in found, f"{name} imports the command line"
        assert "demo" not in found or name == "cli", f"{name} imports the demo"


# --- the test tests itself: each way to break a layer is seen --------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "from pyro_vae.fit import fit",
        "from .fit import fit",
        "from . import fit",
        "from pyro_vae import fit",
        "import pyro_vae.fit",
        "import pyro_vae.fit as f",
        "def g():\n    from .fit import fit",
        "try:\n    from .fit import fit\nexcept ImportError:\n    pass",
        "if TYPE_CHECKING:\n    import os\nelse:\n    from .fit import fit",
    ],
)
def test_sees_an_import(source: str):
    assert siblings(source) == {"fit"}


@pytest.mark.parametrize(
    "source",
    [
        "if TYPE_CHECKING:\n    from .fit import fit",
        "if typing.TYPE_CHECKING:\n    from .fit import fit",
        "import fit",
        "import pyro_vae_other.fit",
    ],
)
def test_leaves_other_imports_alone(source: str):
    assert siblings(source) == set()


def test_sees_the_files_that_one_statement_imports():
    assert siblings("from pyro_vae import arviz_bridge, datasets") == {"arviz_bridge", "datasets"}


@pytest.mark.parametrize("source", ["import pyro_vae", "from pyro_vae import elbo"])
def test_sees_an_import_of_the_whole_package(source: str):
    assert siblings(source) == {"__init__"}


@pytest.mark.parametrize(
    "source",
    [
        "import pyro.poutine",
        "import pyro.poutine as poutine",
        "from pyro import poutine",
        "from pyro.poutine import trace",
        "from pyro.poutine.messenger import Messenger",
        "import pyro\npyro.poutine.trace(f)",
    ],
)
def test_sees_poutine(source: str):
    assert uses_poutine(source)


def test_poutine_in_a_comment_or_docstring_is_fine():
    assert not uses_poutine('"""Like pyro.poutine."""\n# poutine\n')
