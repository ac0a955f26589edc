"""The folders of pyro_vae: imports between them run one way, without circles between files.

A new folder needs its arrows and its question here. docs/architecture.md shows them, and the first
line of each file; docs/api.md shows every module:

    python -m tests.test_house      # writes them into these pages
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "pyro_vae"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE
PAGE = ROOT.parent / "docs" / "architecture.md"
API = ROOT.parent / "docs" / "api.md"

# From each folder (or single file) to the folders that its files may import, itself aside.
ARROWS: dict[str, set[str]] = {
    "torch_internals": set(),
    "recording": {"torch_internals"},
    "schedules": set(),
    "arviz_versions": set(),
    "markup": set(),
    "plots": set(),
    "programs": {"recording", "torch_internals"},
    "nets": set(),
    "compiler": {"programs", "recording", "torch_internals"},
    "families": {"programs"},
    "guides": {"families", "programs"},
    "particles": {"compiler", "programs", "recording", "torch_internals"},
    "losses": {"particles", "programs", "recording"},
    "refinement": {"compiler", "families", "guides", "particles", "programs"},
    "training": {
        *("compiler", "guides", "losses", "particles", "programs", "refinement", "schedules"),
        *("diagnostics", "recording", "torch_internals"),
    },
    "diagnostics": {"guides", "losses", "markup", "particles", "plots", "programs"},
    "report": {"diagnostics", "markup", "plots"},
    "sampling": {
        *("arviz_versions", "diagnostics", "export", "guides", "markup", "particles", "programs"),
        "refinement",
    },
    "evaluation": {
        *("diagnostics", "families", "guides", "particles", "plots", "programs", "refinement"),
        *("arviz_versions", "export", "markup", "report", "sampling"),
    },
    "prediction": {"diagnostics", "export", "particles", "programs", "sampling"},
    "missing_data": {"diagnostics", "particles", "plots", "programs", "recording"},
    "export": {"arviz_versions", "diagnostics", "guides", "particles", "programs"},
    "datasets": set(),
    "zoo": {"nets", "programs"},
    "demo": {
        *("arviz_versions", "datasets", "evaluation", "export", "families"),
        *("guides", "nets", "plots", "report", "sampling", "training", "zoo"),
    },
    "cli": {"demo", "evaluation"},
    "testing": {
        *("evaluation", "families", "guides", "losses", "particles", "programs", "training")
    },
}

# What a newcomer asks, by folder, from the top of the house to its bottom.
QUESTIONS = {
    "cli": "the command",
    "demo": "what do I run first?",
    "testing": "does my own class keep the laws?",
    "zoo": "which models can I try?",
    "datasets": "which data can I try?",
    "export": "how do I get to ArviZ?",
    "plots": "how do I get to figures?",
    "prediction": "what does a fitted model say of data?",
    "report": "what does it all say?",
    "missing_data": "my data have holes",
    "evaluation": "how large is log p(x), which guide loses what, and can it be mended?",
    "diagnostics": "is it right?",
    "training": "how is it trained?",
    "sampling": "what is the exact posterior?",
    "refinement": "what is the best guide of a family?",
    "losses": "where is the ELBO?",
    "particles": "how do draws become log weights?",
    "guides": "what approximates the posterior?",
    "families": "of which shape is it?",
    "compiler": "what makes it fast?",
    "programs": "what are a model and a guide?",
    "nets": "networks",
    "schedules": "KL warm-up",
    "recording": "is a graph being recorded?",
    "torch_internals": "private names of PyTorch",
    "arviz_versions": "which ArviZ is installed?",
    "markup": "HTML of results",
}

# Import neither torch nor Pyro, nor anything of the package: tested alone, on each ArviZ.
ARRAYS_ALONE = {
    *("diagnostics.psis", "arviz_versions", "datasets.image_files", "plots.results"),
    "markup",
}
# Have nothing to do with Pyro.
WITHOUT_PYRO = {
    *("torch_internals", "recording", "schedules", "datasets", "diagnostics", "markup", "plots"),
    "report",
}

TESTS = Path(__file__).resolve().parent
# Modules without a test of their own, and why.
TESTED_ELSEWHERE = {
    "programs.types": "names of types alone",
    "compiler.cuda_graph": "test_cuda_graphs, with the steps that it launches",
}
# Tests of laws, of closed forms, of other people's models and of recorded numbers.
OF_MANY = {"laws", "closed_forms", "patterns", "recorded"}
# Tests of pages, scripts and settings.
OF_NO_MODULE = {
    *("test_examples.py", "test_house.py", "test_howto.py", "test_models.py", "test_readme.py"),
    "test_theory.py",
    *("test_report_figure.py", "compiler/test_cuda_graphs.py", "training/test_resume.py"),
    *("training/test_faults.py", "training/test_resume_anywhere.py"),
}

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
    if path.name != "__init__.py"
}


def floors() -> dict[str, int]:
    """From each folder to its floor: one above the highest that it imports."""
    found: dict[str, int] = {}
    for name in TopologicalSorter(ARROWS).static_order():
        found[name] = 1 + max((found[other] for other in ARROWS[name]), default=-1)
    return found


def picture() -> str:
    """The folders floor by floor, each with what it may import."""
    floor = floors()
    width = max(map(len, ARROWS))
    lines = []
    for name in sorted(ARROWS, key=lambda name: (-floor[name], list(QUESTIONS).index(name))):
        below = sorted(ARROWS[name], key=lambda other: (-floor[other], other))
        head = f"{floor[name]}  {name:{width}}"
        lines += textwrap.wrap(
            f"{head}  ──>  {', '.join(below)}" if below else head,
            96,
            subsequent_indent=" " * (width + 10),
        )
    return "\n".join(["```text", *lines, "```"])


def first_line(path: Path) -> str:
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return doc.partition("\n")[0].rstrip(".")


def files() -> str:
    """Each folder with its question, and the first line of each of its files."""
    parts = []
    for name, question in QUESTIONS.items():
        own = {module: path for module, path in MODULES.items() if folder(module) == name}
        if list(own) == [name]:
            parts.append(f"**`{name}.py`** ({question}): {first_line(own[name])}.")
            continue
        rows = [f"| `{m.replace('.', '/')}.py` | {first_line(path)} |" for m, path in own.items()]
        parts.append("\n".join([f"**{name}/**: {question}", "", "| file | |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def internals(page: str) -> str:
    """The modules that the rest of the page does not show, by folder."""
    shown = set(re.findall(r"automodule:: pyro_vae\.([\w.]+)$", page, re.MULTILINE))
    parts = []
    for name in QUESTIONS:
        own = [m for m in MODULES if folder(m) == name and m not in shown]
        if name == "zoo":  # its models are shown as those of the package pyro_vae.zoo
            continue
        blocks = [f"```{{eval-rst}}\n.. automodule:: {PACKAGE}.{m}\n   :members:\n```" for m in own]
        if blocks:
            parts += [f"### {name}", *blocks]
    return "\n\n".join(parts)


def rewritten(page: str, mark: str, content: str) -> str:
    """Return a page with the content between its marks anew."""
    begin, end = f"% {mark}: written by tests/test_house.py\n", f"% end of {mark}\n"
    head, _, rest = page.partition(begin)
    return f"{head}{begin}\n{content}\n\n{end}{rest.partition(end)[2]}"


def without(page: str, mark: str) -> str:
    """Return a page without the content between its marks."""
    head, _, rest = page.partition(f"% {mark}: written by tests/test_house.py\n")
    return head + rest.partition(f"% end of {mark}\n")[2]


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
    """Dotted names that a file imports: `from a import b` gives "a.b", for b may be a module."""
    names: set[str] = set()
    for node in nodes_at_run_time(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def modules_of_ours(source: str) -> set[str]:
    """Files of the package that a file imports; what is no file (a folder, a name) as it stands."""
    found: set[str] = set()
    for name in imported_names(source):
        assert not name.startswith("."), f"a relative import: {name}"
        first, _, rest = name.partition(".")
        if first == PACKAGE:
            parts = rest.split(".")
            heads = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
            found.add(next((head for head in heads if head in MODULES), rest))
    return found


def folder(module: str) -> str:
    return module.partition(".")[0]


def test_the_house_has_no_unknown_room():
    found = {folder(module) for module in MODULES}
    assert found == set(ARROWS), "give each folder its arrows here and in docs/architecture.md"


def test_arrows_have_no_circle():
    TopologicalSorter(ARROWS).prepare()


def test_the_documentation_shows_the_arrows():
    assert set(QUESTIONS) == set(ARROWS)
    assert picture() in PAGE.read_text(encoding="utf-8"), "run python -m tests.test_house"


def test_the_api_has_every_module():
    text = API.read_text(encoding="utf-8")
    found = re.findall(r"automodule:: pyro_vae\.([\w.]+)$", text, re.MULTILINE)
    wanted = {m for m in MODULES if folder(m) != "zoo"} | {"zoo", "zoo.likelihoods"}
    assert sorted(found) == sorted(wanted), "run python -m tests.test_house"


def test_the_documentation_names_no_file_that_is_gone():
    named = set(re.findall(r"`((?:[a-z_]+/)+[a-z0-9_]+\.py)`", PAGE.read_text(encoding="utf-8")))
    roots = (ROOT, ROOT.parent)
    gone = [path for path in named if not any((root / path).is_file() for root in roots)]
    assert not gone, "run python -m tests.test_house, and mend the text"


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_arrows(module: str):
    for other in modules_of_ours(MODULES[module].read_text(encoding="utf-8")):
        allowed = ARROWS[folder(module)] | {folder(module)}
        assert folder(other) in allowed, f"{module} imports {other}; allowed are {sorted(allowed)}"
        whole = other in ARROWS and other not in MODULES
        assert not whole or folder(module) in {"demo", "cli"}, f"{module} imports all of {other}"


def test_every_arrow_is_used():
    used = {
        (folder(module), folder(other))
        for module, path in MODULES.items()
        for other in modules_of_ours(path.read_text(encoding="utf-8"))
    }
    unused = [
        f"{one} -> {other}"
        for one, others in ARROWS.items()
        for other in others
        if (one, other) not in used
    ]
    assert not unused


def test_files_do_not_import_each_other_in_a_circle():
    graph = {
        module: modules_of_ours(path.read_text(encoding="utf-8")) & set(MODULES)
        for module, path in MODULES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"files import each other in a circle: {error.args[1]}")


@pytest.mark.parametrize("module", MODULES)
def test_the_documentation_names_every_file(module: str):
    page = PAGE.read_text(encoding="utf-8")
    path = module.replace(".", "/") + ".py"
    assert f"`{path}`" in page or f"`{path.rpartition('/')[2]}`" in page


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_its_test(module: str):
    """pyro_vae/x/y.py is tested in tests/x/test_y.py, beside laws, closed forms and patterns."""
    *folders, name = module.split(".")
    path = Path(*folders, f"test_{name}.py")
    assert (TESTS / path).is_file() != (module in TESTED_ELSEWHERE), f"no tests/{path}"


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=lambda path: path.stem)
def test_every_test_is_of_a_module_or_of_many(path: Path):
    inside = path.relative_to(TESTS)
    module = ".".join([*inside.parts[:-1], inside.stem.removeprefix("test_")])
    assert module in MODULES or inside.parts[0] in OF_MANY or str(inside) in OF_NO_MODULE


@pytest.mark.parametrize("module", sorted(ARRAYS_ALONE))
def test_arrays_alone(module: str):
    source = MODULES[module].read_text(encoding="utf-8")
    top = {name.partition(".")[0] for name in imported_names(source)}
    assert not top & {"torch", "pyro", PACKAGE}


@pytest.mark.parametrize("module", [m for m in MODULES if folder(m) in WITHOUT_PYRO])
def test_without_pyro(module: str):
    top = {n.partition(".")[0] for n in imported_names(MODULES[module].read_text(encoding="utf-8"))}
    assert "pyro" not in top


@pytest.mark.parametrize("name", sorted({folder(m) for m in MODULES if "." in m}))
def test_a_folder_says_what_lives_there(name: str):
    tree = ast.parse((ROOT / name / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)


# --- the test tests itself: each way to break an arrow is seen --------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "from pyro_vae.training.fit import fit",
        "from pyro_vae.training import fit",
        "import pyro_vae.training.fit",
        "import pyro_vae.training.fit as f",
        "def g():\n    from pyro_vae.training.fit import fit",
        "try:\n    from pyro_vae.training.fit import fit\nexcept ImportError:\n    pass",
        "if TYPE_CHECKING:\n    import os\nelse:\n    from pyro_vae.training.fit import fit",
    ],
)
def test_sees_an_import(source: str):
    assert modules_of_ours(source) == {"training.fit"}


@pytest.mark.parametrize(
    "source",
    [
        "if TYPE_CHECKING:\n    from pyro_vae.training.fit import fit",
        "if typing.TYPE_CHECKING:\n    from pyro_vae.training.fit import fit",
        "import fit",
        "import pyro_vae_other.fit",
    ],
)
def test_leaves_other_imports_alone(source: str):
    assert modules_of_ours(source) == set()


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    text = rewritten(rewritten(text, "arrows", picture()), "files", files())
    PAGE.write_text(text, encoding="utf-8")
    text = API.read_text(encoding="utf-8")
    text = rewritten(text, "internals", internals(without(text, "internals")))
    API.write_text(text, encoding="utf-8")
