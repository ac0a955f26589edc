"""The README's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_code_of_the_readme_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code.count("\n") <= 40
    namespace: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), namespace)
    told = capsys.readouterr().out
    assert "data plate: 'cells'" in told
    assert "approximation gap" in told
    assert namespace["posterior"]["posterior"]["z"].shape == (1, 200, 100, 3)


def test_the_readmes_commands_and_files_exist():
    text = (ROOT / "README.md").read_text()
    targets = re.findall(r"^make (\w+)", text, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", text):
        assert (ROOT / path).exists(), path
