"""No two streams of random numbers begin alike, and all of them are in one list."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

import pyro_vae
from pyro_vae.programs.purposes import Purpose, RefinePurpose, bits_of, seed_of

SOURCES = sorted(Path(pyro_vae.__file__).parent.rglob("*.py"))


def first_numbers(purpose: int, way: str) -> float:
    bits = bits_of(7, purpose)
    seed = bits >> 1 if way == "refine" else bits
    return torch.rand((), generator=torch.Generator().manual_seed(seed)).item()


def test_seeds_are_those_of_numpy():
    """By NumPy's own words, with what each use took before there was one function."""
    flat = np.random.SeedSequence([7, 3, 1])
    low, high = map(int, flat.generate_state(2, np.uint32))
    assert bits_of(7, 3, 1) == high << 32 | low
    assert bits_of(7, 3, 1, count=32) == low == int(flat.generate_state(1, np.uint32)[0])
    tree = np.random.SeedSequence(7, spawn_key=(3, 1))
    assert seed_of(7, 3, 1) == int(tree.generate_state(1, np.uint64)[0] >> np.uint64(1))
    assert seed_of(7, 3) != seed_of(7, 3, 0) and bits_of(7, 3) == bits_of(7, 3, 0)


def test_streams_of_all_purposes_differ():
    """Also of those whose numbers are alike, for refine seeds its generators in another way."""
    found = [first_numbers(purpose, "evaluator") for purpose in Purpose]
    found += [first_numbers(purpose, "refine") for purpose in RefinePurpose]
    assert len(set(found)) == len(Purpose) + len(RefinePurpose)


def test_every_purpose_is_used_and_none_is_written_elsewhere():
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    for each in (*Purpose, *RefinePurpose):
        assert f"{type(each).__name__}.{each.name}" in text
    apart = [
        str(path)
        for path in SOURCES
        if re.search(r"first in the keys? of ", path.read_text("utf-8"), re.IGNORECASE)
    ]
    assert apart == []
