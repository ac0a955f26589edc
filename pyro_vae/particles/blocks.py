"""How much is drawn and scored at once: blocks of data, pieces of particles."""

from __future__ import annotations

from collections.abc import Callable

# Pairs (particle, datum) drawn at once, and data in a block. They decide which
# random numbers a datum gets, so they are constants and not options.
_DRAW_PAIRS = 16384
_DRAW_DATA = 256
# Pairs, and observed numbers, scored at once by default. Larger tensors than these
# leave the processor's cache, and go back to the system after each use.
_CHUNK_PAIRS = 8192
_CHUNK_ELEMENTS = 2**22


def data_blocks(num_data: int, splittable: Callable[[], bool]) -> list[slice]:
    """Return the data in blocks, equal ones, so that they share a graph.

    Args:
        num_data: how many there are.
        splittable: asked where there are many, whether guide and model take some of them.
    """
    if num_data <= _DRAW_DATA or not splittable():
        return [slice(0, num_data)]
    size = equal_step(num_data, _DRAW_DATA)
    return [slice(start, min(start + size, num_data)) for start in range(0, num_data, size)]


def draw_step(num_data: int) -> int:
    """Return how many particles of a block of data are drawn at once."""
    return round_down(max(1, _DRAW_PAIRS // num_data))


def chunk_pairs(num_data: int, observed: int) -> int:
    """Return the pairs (particle, datum) that are scored at once by default.

    Args:
        num_data: N.
        observed: numbers that all of these data's densities are made of.
    """
    return max(1, min(_CHUNK_PAIRS, _CHUNK_ELEMENTS * num_data // max(1, observed)))


def equal_step(count: int, most: int) -> int:
    """Return the size of pieces that a count is cut into, at most ``most``.

    Equal ones where there are: another size is another graph, and costs as much as a full one.
    """
    fewest = -(-count // most)
    pieces = next((n for n in range(fewest, 2 * fewest) if count % n == 0), fewest)
    return -(-count // pieces)


def round_down(number: int) -> int:
    """Return the largest number of the form 1, 2 or 5 times a power of ten up to a number.

    Numbers of particles are round, and pieces of round sizes leave no remainder.
    """
    power = 10 ** (len(str(number)) - 1)
    return max(n for n in (1, 2, 5) if n * power <= number) * power
