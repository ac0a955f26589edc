"""What random numbers are for, and the seed of each stream of them.

The purpose is the first number in the key of a stream, after the user's seed. Streams whose keys
begin alike hold the same numbers, so that what is made of them would depend on one another. No two
purposes are alike.
"""

from __future__ import annotations

from enum import IntEnum, unique

import numpy as np


@unique
class Purpose(IntEnum):
    """The purposes, by the files that draw for them."""

    # particles: draws of a guide, checks of a pair, single runs of a guide
    DRAWS = 0
    CHECKS = 1
    RUNS = 2
    # export
    EXPORTED_PREDICTIVE = 3
    EXPORTED_PRIOR = 4
    EXPORTED_CHOICE = 5
    EXPORTED_SUMMED_OUT = 6
    EXPORTED_MARGINAL = 7
    # missing_data
    IMPUTED_MOMENTS = 8
    IMPUTED_DRAWS = 9
    IMPUTED_CHOICE = 10
    IMPUTED_SUMMED_OUT = 13
    # sampling: the width of a base density, its kind; chains
    BASE_SCALE = 11
    BASE_KIND = 12
    CHAIN_STARTS = 21
    CHAIN_WARM_UP = 22
    CHAIN_DRAWS = 23
    CHAIN_SUMMED_OUT = 24
    # sampling: annealed chains
    ANNEALED_STARTS = 31
    ANNEALED_PILOT = 32
    ANNEALED_FORWARD = 33
    ANNEALED_BACKWARD = 34
    ANNEALED_WIDTH = 35
    # diagnostics
    RATES_MODE = 30
    UNITS_PRIOR = 36
    AGGREGATE_GUIDE = 37
    AGGREGATE_PRIOR = 38
    AGGREGATE_SWAPS = 39
    OUTLIER_SUMMED_OUT = 44
    OUTLIER_REPLICAS = 45
    # sampling: draws that are weighed, and what modes are looked for from
    WEIGHED = 41
    FAR_MODES = 42
    WEIGHED_FAR = 43
    # training: posteriors of several runs
    MANY_FITS = 90
    # evaluation: of a rung of a repair
    RUNG_CHOICE = 51
    RUNG_SUMMED_OUT = 52
    # sampling: data that a model makes
    SIMULATED = 61
    SIMULATED_ABSENT = 62
    # evaluation: calibration
    CALIBRATED_EACH = 71
    CALIBRATED_TIES = 72
    CALIBRATED_CHOICE = 73
    CALIBRATED_WHOLE = 74
    CALIBRATED_OTHERS = 75
    CALIBRATED_DIRECTION = 81
    # prediction
    PREDICTED_DRAWS = 101
    PREDICTED_CHOICE = 102
    PREDICTED_SUMMED_OUT = 103
    GENERATED = 104
    # evaluation: a guide beside chains
    CHECKED_DRAWS = 91


@unique
class RefinePurpose(IntEnum):
    """Those of refine, whose generators are seeded from a key in a way of their own."""

    STEPS = 1
    GAINS = 2
    STARTS = 4
    SLOPES = 5


def seed_of(*key: int) -> int:
    """Return a seed of 63 bits that a key alone decides: the user's seed, then what it is for.

    Zeros at the end of the key count.
    """
    sequence = np.random.SeedSequence(key[0], spawn_key=key[1:])
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


def bits_of(*key: int, count: int = 64) -> int:
    """Return the lowest bits of a number that a key alone decides, but for zeros at its end.

    Draws of guides, updates of EM, ``refine`` and marginal likelihoods are seeded so: keys of one
    use have the same length.
    """
    number = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return number & ((1 << count) - 1)
