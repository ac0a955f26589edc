"""Checks by identity: of entries, cells and attributes, however many, and what is missing."""

from __future__ import annotations

import types

from pyro_vae.compiler.places import Place, identity_check


def places(count):
    """Mappings with a key each, a cell and an object; and what lies in them."""
    values = [[i] for i in range(count)]  # equal to one another's copies, and other objects
    holders = [{f"key {i}": value} for i, value in enumerate(values)]
    entries = [Place(holder, f"key {i}") for i, holder in enumerate(holders)]
    cell, slot = types.CellType([-1]), types.SimpleNamespace(name=[-2])
    attributes = [Place(cell, "cell_contents", False), Place(slot, "name", False)]
    check = identity_check([*entries, *attributes])
    return check, [*values, cell.cell_contents, slot.name], holders, cell, slot


def test_all_places_are_looked_at():
    """More than Python nests in one expression."""
    check, expected, holders, cell, slot = places(130)
    assert check(expected)
    for i in (0, 49, 50, 129):
        kept = holders[i][f"key {i}"]
        holders[i][f"key {i}"] = list(kept)
        assert not check(expected)
        holders[i][f"key {i}"] = kept
    assert check(expected)
    cell.cell_contents = [-1]
    assert not check(expected)
    cell.cell_contents = expected[-2]
    slot.name = [-2]
    assert not check(expected)


def test_what_is_gone_is_another_object():
    for gone in ("entry", "cell", "attribute"):
        check, expected, holders, cell, slot = places(2)
        if gone == "entry":
            del holders[1]["key 1"]
        elif gone == "cell":
            del cell.cell_contents
        else:
            del slot.name
        assert not check(expected)


def test_keys_may_be_objects():
    key, value = object(), object()
    check = identity_check([Place({key: value}, key)])
    assert check([value])
    assert not check([object()])


def test_nothing_to_look_at():
    assert identity_check([])([])
