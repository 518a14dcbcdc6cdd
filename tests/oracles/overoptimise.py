"""Coefficients and standard errors of the two forms of over-optimisation, by numpy's least squares.

    python tests/oracles/overoptimise.py

The numbers stand in recipe/src/overoptimise/fit.rs.
"""

import numpy as np

points = np.array([(0.3, 0.14), (0.6, 0.2), (0.9, 0.31), (1.2, 0.27), (1.5, 0.3), (1.8, 0.22)])
d, reward = points.T
for bend in (d * d, d * np.log(d)):
    x = np.stack([d, -bend], axis=1)
    coefficients, residuals, _, _ = np.linalg.lstsq(x, reward, rcond=None)
    errors = np.sqrt(np.diag(residuals[0] / (len(d) - 2) * np.linalg.inv(x.T @ x)))
    for value, error in zip(coefficients, errors):
        print(f"{value:.12f}, {error:.12f},")
