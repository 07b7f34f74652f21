"""HDR colours on an SDR screen: one table for all colours, made with numpy.

Light is taken as BT.2100 defines it. Up to ``KNEE`` of SDR white, which BT.2408 puts at 203 cd/m2, it stays what it is;
brighter light, up to the 1000 cd/m2 that nearly all HDR is mastered for, is compressed into the rest by its largest
component, so that hues stay. Colours beyond BT.709 are cut off.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

HALD_LEVEL = 8
"""Of FFmpeg's haldclut: its cube is the edge of a table of 64 levels per colour, which is a picture of 512 x 512."""
SDR_WHITE, PEAK = 203.0, 1000.0
"""cd/m2."""
KNEE = 0.7
"""Of SDR white."""
SDR_GAMMA = 2.4
"""BT.1886."""
BT709_OF_BT2020 = np.array(
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]]
)
"""Linear BT.709 of linear BT.2020 (BT.2087)."""
LUMINANCE = np.array([0.2627, 0.6780, 0.0593])
"""Of linear BT.2020."""


def pq_light(signal: np.ndarray) -> np.ndarray:
    """cd/m2 of signals from 0 to 1 (SMPTE ST 2084)."""
    root = signal ** (1 / 78.84375)
    return 10000 * (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)


def hlg_light(signal: np.ndarray) -> np.ndarray:
    """cd/m2 on a screen of ``PEAK``, of signals (..., 3) from 0 to 1 (BT.2100)."""
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    return PEAK * (scene @ LUMINANCE)[..., None] ** 0.2 * scene


HDR_TRANSFERS: dict[int, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    16: ("PQ", pq_light),
    18: ("HLG", hlg_light),
}
"""Number of the transfer function in H.273 -> its name, and the light of a signal (..., 3)."""


def hald_table(light_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """(512, 512, 3) uint16: SDR's signal for every colour of HDR, in the order of FFmpeg's haldclut (red fastest)."""
    levels = np.linspace(0, 1, HALD_LEVEL**2)
    blue, green, red = np.meshgrid(levels, levels, levels, indexing="ij")
    light = light_of(np.stack([red, green, blue], axis=-1).reshape(-1, 3)) / SDR_WHITE
    light = np.maximum(light @ BT709_OF_BT2020.T, 0)
    brightest = np.maximum(light.max(axis=-1, keepdims=True), 1e-9)
    signal = (light * _compressed(brightest) / brightest) ** (1 / SDR_GAMMA)
    side = HALD_LEVEL**3
    return np.rint(65535 * np.clip(signal, 0, 1)).astype(np.uint16).reshape(side, side, 3)


def _compressed(light: np.ndarray) -> np.ndarray:
    """From 0 to ``PEAK`` into 0 to 1: the same up to the knee, then a curve that leaves it without a corner."""
    above, end = (np.maximum(light - KNEE, 0) / (1 - KNEE), (PEAK / SDR_WHITE - KNEE) / (1 - KNEE))
    return np.minimum(light, KNEE) + (1 - KNEE) * np.minimum(above * (1 + above / end**2) / (1 + above), 1)
