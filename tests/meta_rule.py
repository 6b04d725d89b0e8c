"""The position embedding of Meta's DINOv2 at another size, by the rules of Meta and of `transformers`: slow and plain.

Nothing here is shared with the package or calls an interpolation. The weights of every sample are computed one by one.
"""

import math

import torch
from torch import Tensor


def cubic(distance: float, a: float) -> float:
    """Return the value of Keys' cubic kernel."""
    distance = abs(distance)
    if distance < 1:
        return (a + 2) * distance ** 3 - (a + 3) * distance ** 2 + 1
    if distance < 2:
        return a * distance ** 3 - 5 * a * distance ** 2 + 8 * a * distance - 4 * a
    return 0.0


def plain_weights(old: int, new: int, offset: float) -> list[dict[int, float]]:
    """Return, for each new position, the weights of the old ones: four neighbours, with the border repeated.

    The offset is added to the new size in the scale. torch's kernel has a = −0.75 here, and −0.5 with antialiasing.
    """
    step = old / (new + offset)
    rows = []
    for place in range(new):
        centre = (place + 0.5) * step - 0.5
        first = math.floor(centre)
        mix: dict[int, float] = {}
        for neighbour in range(first - 1, first + 3):
            inside = min(max(neighbour, 0), old - 1)
            mix[inside] = mix.get(inside, 0.0) + cubic(centre - neighbour, -0.75)
        rows.append(mix)
    return rows


def antialiased_weights(old: int, new: int) -> list[dict[int, float]]:
    """Return the same for a kernel as wide as a new position, cut at the border and normalised."""
    step = old / new
    width = max(step, 1.0)
    rows = []
    for place in range(new):
        centre = (place + 0.5) * step
        first, end = max(int(centre - 2 * width + 0.5), 0), min(int(centre + 2 * width + 0.5), old)
        mix = {other: cubic((other - centre + 0.5) / width, -0.5) for other in range(first, end)}
        total = sum(mix.values())
        rows.append({other: weight / total for other, weight in mix.items()})
    return rows


def meta_position(position: Tensor, rows: int, columns: int, registers: bool, offset: float = 0.1) -> Tensor:
    """Resize Meta's `pos_embed` (1, 1 + M², C) to a grid of patches: (1, 1 + rows · columns, C)."""
    side = math.isqrt(position.shape[1] - 1)
    if (rows, columns) == (side, side):
        return position
    if registers:
        down, across = antialiased_weights(side, rows), antialiased_weights(side, columns)
    else:
        down, across = plain_weights(side, rows, offset), plain_weights(side, columns, offset)
    grid = position[0, 1:].double().reshape(side, side, -1)
    patches = []
    for row_mix in down:
        line = sum(weight * grid[row] for row, weight in row_mix.items())
        patches += [sum(weight * line[column] for column, weight in mix.items()) for mix in across]
    return torch.cat([position[:, :1], torch.stack(patches)[None].to(position.dtype)], dim=1)
