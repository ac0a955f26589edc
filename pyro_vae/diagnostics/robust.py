"""Middle and covariance of data of which some are strange, and distances from the middle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_SHARE = 0.75  # of the data that the covariance is of: a quarter may lie anywhere
_STEPS = 50
_POINT = 1e-16  # the variance, in units of the scale, of data that are one point
_MAD = 1.4826  # of a Gaussian, the standard deviation in units of the median absolute deviation


@dataclass(frozen=True, slots=True)
class RobustMoments:
    """The moments of the three quarters of some data that lie closest together.

    Attributes:
        middle: [F].
        scale: of each coordinate, [F].
        precision: [F, F], of coordinates in units of their scale.
    """

    middle: Array
    scale: Array
    precision: Array

    @classmethod
    def of(cls, x: Array) -> RobustMoments:
        r"""Return the moments of data [N, F] by concentration steps.

        From the data closest to the coordinates' medians, in units of their median absolute
        deviations, mean and covariance are of the h = 3/4 N data at the smallest Mahalanobis
        distance by the last ones, until these are the same: the minimum covariance determinant
        (Rousseeuw & Van Driessen 1999) from one start, as in its deterministic form (Hubert,
        Rousseeuw & Verdonck 2012). The covariance is shrunk toward a multiple of the identity with
        weight F / (F + h), so that it has an inverse for any N (Boudt et al. 2020).

        References:
            Rousseeuw & Van Driessen (1999). A fast algorithm for the minimum covariance determinant
            estimator. Technometrics 41(3).
            Hubert, Rousseeuw & Verdonck (2012). A deterministic algorithm for robust location and
            scatter. Journal of Computational and Graphical Statistics 21(3).
            Boudt, Rousseeuw, Vanduffel & Verdonck (2020). The minimum regularized covariance
            determinant estimator. Statistics and Computing 30.
        """
        num_data, size = x.shape
        most = max(1, int(np.ceil(_SHARE * num_data)))
        median = np.median(x, 0)
        scale = _MAD * np.median(np.abs(x - median), 0)
        # More than half of a coordinate may be one value: zeros of a rectified unit.
        scale = np.where(scale > 0, scale, x.std(0))
        scale = np.where(scale > 0, scale, scale[scale > 0].mean() if (scale > 0).any() else 1.0)
        u = (x - median) / scale
        shrink = size / (size + most)
        chosen = np.sort(np.argsort(np.square(u).sum(1), kind="stable")[:most])
        for _ in range(_STEPS):
            mean = u[chosen].mean(0)
            covariance = (u[chosen] - mean).T @ (u[chosen] - mean) / most
            target = max(float(np.trace(covariance)) / size, _POINT)
            covariance = (1 - shrink) * covariance + shrink * target * np.eye(size)
            precision = np.linalg.inv(covariance)
            squared = np.einsum("nf,fg,ng->n", u - mean, precision, u - mean)
            closest = np.sort(np.argsort(squared, kind="stable")[:most])
            if np.array_equal(closest, chosen):
                break
            chosen = closest
        return cls(median + mean * scale, scale, precision)

    def distance(self, x: Array) -> Array:
        """Return the Mahalanobis distance of data [N, F] from the middle, [N]."""
        u = (x - self.middle) / self.scale
        return np.asarray(np.sqrt(np.einsum("nf,fg,ng->n", u, self.precision, u).clip(0.0)))
