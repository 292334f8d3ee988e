"""Linear least squares for a handful of unknowns that can't be negative. Pure Python."""

from collections.abc import Sequence


def fit(
    rows: Sequence[Sequence[float]],
    values: Sequence[float],
    scales: Sequence[float] | None = None,
) -> list[float]:
    """The x of no negative number with which `rows @ x` comes nearest to `values`.

    What is least is the sum of squared errors, each in parts of its scale: of the value itself
    if none is given, so that microseconds count as much as seconds. An unknown that would be
    negative is 0: the worst is dropped until none is. Columns that say nothing new get 0.
    """
    lines = [
        [number / scale for number in (*row, value)]
        for row, value, scale in zip(rows, values, scales or values, strict=True)
    ]
    solution = [0.0] * len(rows[0])
    unknowns = list(range(len(rows[0])))
    while unknowns:
        found = _solved([[line[unknown] for unknown in (*unknowns, -1)] for line in lines])
        if min(found) >= 0:
            for unknown, number in zip(unknowns, found, strict=True):
                solution[unknown] = number
            break
        del unknowns[found.index(min(found))]
    return solution


def _solved(lines: Sequence[Sequence[float]]) -> list[float]:
    """The x with which each line's first numbers times x come nearest to its last.

    The normal equations by elimination, of columns scaled to length 1: unknowns may differ by
    many orders of magnitude.
    """
    *columns, values = zip(*lines, strict=True)
    lengths = [_dot(column, column) ** 0.5 or 1.0 for column in columns]
    units = [
        [number / length for number in column]
        for column, length in zip(columns, lengths, strict=True)
    ]
    matrix = [[*(_dot(one, other) for other in units), _dot(one, values)] for one in units]
    size = len(matrix)
    for place in range(size):
        pivot = max(range(place, size), key=lambda row: abs(matrix[row][place]))
        matrix[place], matrix[pivot] = matrix[pivot], matrix[place]
        if abs(matrix[place][place]) < 1e-12:
            matrix[place] = [float(column == place) for column in range(size)] + [0.0]
        for row in range(size):
            if row != place:
                factor = matrix[row][place] / matrix[place][place]
                pairs = zip(matrix[row], matrix[place], strict=True)
                matrix[row] = [number - factor * above for number, above in pairs]
    return [
        matrix[place][size] / matrix[place][place] / length for place, length in enumerate(lengths)
    ]


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(first * second for first, second in zip(one, other, strict=True))
