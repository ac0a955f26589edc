"""The scripts of examples/ run, on their own, without a warning, and say what they should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MAX_LINES = 80


def run(name: str) -> str:
    """Return what an example prints; warnings are errors there too."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / name)],
        capture_output=True,
        text=True,
        # Networks this small gain nothing from threads, and lose where others use the cores.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def number(label: str, text: str) -> float:
    found = re.search(rf"^{re.escape(label)}\s+(-?[0-9.]+)", text, re.MULTILINE)
    assert found, f"no line {label!r} in:\n{text}"
    return float(found[1])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_fits_on_two_screens(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < MAX_LINES


def test_every_example_is_run():
    source = Path(__file__).read_text(encoding="utf-8")
    assert EXAMPLES
    for path in EXAMPLES:
        assert f'run("{path.name}")' in source, f"no test runs {path.name}"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lightning") is None, reason="Lightning is not installed")
def test_lightning_module():
    printed = run("lightning_module.py")
    before, after = (number(f"ELBO of test digits {w}, nats", printed) for w in ("before", "after"))
    assert after > before + 100


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lightning") is not None, reason="Lightning is installed")
def test_lightning_module_says_what_it_needs():
    with pytest.raises(AssertionError, match="this example needs Lightning: pip install lightning"):
        run("lightning_module.py")


@pytest.mark.slow
def test_exact_check():
    printed = run("exact_check.py")
    exact = number("exact log p(x)", printed)
    assert number("ELBO + both gaps", printed) == pytest.approx(exact, abs=0.015)
    kl = number("exact KL of the best mean field", printed)
    assert number("approximation gap", printed) == pytest.approx(kl, abs=0.02)


@pytest.mark.slow
def test_custom_model():
    printed = run("custom_model.py")
    assert "data plate: 'trials'" in printed
    rows = dict(re.findall(r"^(encoder|mean-field) +\| +(-[0-9.]+) ±", printed, re.MULTILINE))
    assert float(rows["encoder"]) < float(rows["mean-field"])
    assert "'draw': 200" in printed


@pytest.mark.slow
def test_handwritten_pair():
    printed = run("handwritten_pair.py")
    assert "{'z': 'analytic: closed form between Normal and Normal'}" in printed
    rows = dict(re.findall(r"^(by hand|Normal per datum) +\| +(-[0-9.]+) ±", printed, re.MULTILINE))
    assert float(rows["by hand"]) < float(rows["Normal per datum"])


@pytest.mark.slow
def test_compiled_svi():
    printed = run("compiled_svi.py")
    assert "steps of CompiledSVI are replayed" in printed
    assert number("ratio, median of the turns", printed) > 1
    found = re.search(r"^losses differ at most by the fraction (.+)$", printed, re.MULTILINE)
    assert found
    assert float(found[1]) < 1e-4  # rounding, grown over 220 steps; 2e-7 was seen


@pytest.mark.slow
def test_unused_latents():
    printed = run("unused_latents.py")
    assert "2 of 6 units of the latents are active" in printed
    assert "collapsed, the posterior is the prior (4)" in printed
    assert number("rate", printed) + number("distortion", printed) == pytest.approx(
        number("code length", printed), abs=2e-4
    )
    active = re.findall(r"^z\[\d\] +([0-9.]+) +[0-9.]+ +(True|False)", printed, re.MULTILINE)
    assert sorted(value for _, value in active) == ["False"] * 4 + ["True"] * 2
    assert all((float(share) > 0.8) == (value == "True") for share, value in active)
    assert "none of 6 units differs by itself" in printed


@pytest.mark.slow
def test_saw_series():
    printed = run("saw_series.py")
    gaps = dict(re.findall(r"^(sees \S+) +\|(?:[^|]+\|){3} +(-?[0-9.]+) ±", printed, re.MULTILINE))
    assert float(gaps["sees both"]) < 0.01
    by_algebra = number("gap by algebra, these teeth", printed)
    assert float(gaps["sees x_{n+1}"]) == pytest.approx(by_algebra, abs=0.02)
    # Half the square of a standard normal number, over 200 teeth.
    assert by_algebra == pytest.approx(0.5, abs=4 * 0.05)


@pytest.mark.slow
def test_factor_analysis():
    printed = run("factor_analysis.py")
    elbo, exact = number("ELBO", printed), number("exact log p(x)", printed)
    assert exact - 0.02 < elbo < exact
    best = number("best log p(x) of all models", printed)
    assert best - 0.02 < exact < best


@pytest.mark.slow
def test_topic_model():
    printed = run("topic_model.py")
    assert "topics matched           4 of 4" in printed
    assert number("overlap before training", printed) < 0.5
    assert number("overlap after", printed) > 0.9


@pytest.mark.slow
def test_single_cell_counts():
    printed = run("single_cell_counts.py")
    assert number("cells nearest to their type's mean", printed) > 0.95
    assert number("correlation of log sizes", printed) > 0.9
    assert number("correlation of log dispersions", printed) > 0.9


@pytest.mark.slow
def test_deep_markov_model():
    printed = run("deep_markov_model.py")
    assert number("noise, learned", printed) == pytest.approx(0.1, abs=0.05)
    predicted, repeated = (
        number(f"error of the {what}", printed) for what in ("prediction", "last step")
    )
    assert predicted < 0.4 * repeated


@pytest.mark.slow
def test_item_response():
    printed = run("item_response.py")
    assert number("mean error of difficulty", printed) < 0.15
    assert number("correlation of discrimination", printed) > 0.9


@pytest.mark.slow
def test_eye_colour():
    printed = run("eye_colour.py")
    assert number("exact log p(x)", printed) == number("mean of the log weights", printed)
    assert "blue   Finland 0.852, Italy 0.136, Japan 0.011" in printed
    found = re.search(r"^largest error of a share ([0-9.e-]+)$", printed, re.MULTILINE)
    assert found
    assert float(found[1]) < 1e-6


@pytest.mark.slow
def test_gaussian_vae():
    printed = run("gaussian_vae.py")
    sigma = number("sigma of the data", printed)
    assert number("learned sigma", printed) == pytest.approx(sigma, rel=0.2)
    learned, fixed = (number(f"log p(x), {s}", printed) for s in ("learned sigma", "sigma of one"))
    assert learned > fixed + 7


@pytest.mark.slow
def test_categorical_vae():
    printed = run("categorical_vae.py")
    assert number("gain in nats per person", printed) > 0.8


@pytest.mark.slow
def test_conv_vae():
    printed = run("conv_vae.py")
    assert "one seed, one number: True" in printed
    independent = number("log p(x), independent pixels", printed)
    assert number("log p(x), convolutional VAE", printed) > independent + 125


@pytest.mark.slow
def test_two_layers():
    printed = run("two_layers.py")
    assert number("gain of the second", printed) > 0.1
    assert number("log p(x), two layers", printed) > -24.5


@pytest.mark.slow
def test_conditional_vae():
    printed = run("conditional_vae.py")
    assert number("accuracy of p(y | x)", printed) > 0.88
    median = number("log p(x | y), the median one", printed)
    assert number("log p(x | y), right class", printed) > median + 50


@pytest.mark.slow
def test_mixture_vae():
    printed = run("mixture_vae.py")
    assert "discrete ['c']: summed out where no guide proposes them" in printed
    assert number("purity of the components", printed) > 0.9


@pytest.mark.slow
def test_missing_data():
    printed = run("missing_data.py")
    assert number("log p(lower half)", printed) > 2
    assert "3200 of 6400 values missing, in 100 of 100 data" in printed
    mean_image = number("mean image, RMSE", printed)
    assert number("imputed upper half, RMSE", printed) < 0.85 * mean_image
    assert Path(printed.split("figure: ")[1].strip()).stat().st_size > 10_000
