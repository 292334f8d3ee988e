"""Linear least squares for a handful of unknowns that can't be negative. Pure Python."""

from collections.abc import Sequence


def fit(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """The x of no negative number with which `rows @ x` comes nearest to positive values.

    What is least is the sum of squared relative errors, so that microseconds count as much as
    seconds. An unknown that would be negative is 0: the worst is dropped until none is.
    """
    unknowns = list(range(len(rows[0])))
    scaled = [[number / value for number in row] for row, value in zip(rows, values, strict=True)]
    while True:
        found = _solved([[row[i] for i in unknowns] for row in scaled]) if unknowns else []
        worst = min(found, default=0.0)
        if worst >= 0:
            solution = [0.0] * len(rows[0])
            for unknown, number in zip(unknowns, found, strict=True):
                solution[unknown] = number
            return solution
        del unknowns[found.index(worst)]


def _solved(rows: Sequence[Sequence[float]]) -> list[float]:
    """The x with which `rows @ x` comes nearest to 1 in every row, by the normal equations.

    Columns are scaled to length 1 first: unknowns may differ by many orders of magnitude. Columns
    that say nothing new get 0.
    """
    columns = list(zip(*rows, strict=True))
    lengths = [sum(number * number for number in column) ** 0.5 or 1.0 for column in columns]
    columns = [
        tuple(number / length for number in column)
        for column, length in zip(columns, lengths, strict=True)
    ]
    matrix = [[*(_dot(one, other) for other in columns), sum(one)] for one in columns]
    size = len(matrix)
    for place in range(size):
        pivot = max(range(place, size), key=lambda row: abs(matrix[row][place]))
        matrix[place], matrix[pivot] = matrix[pivot], matrix[place]
        if abs(matrix[place][place]) < 1e-12:
            matrix[place] = [float(column == place) for column in range(size)] + [0.0]
        for row in range(size):
            if row != place:
                factor = matrix[row][place] / matrix[place][place]
                matrix[row] = [
                    number - factor * above
                    for number, above in zip(matrix[row], matrix[place], strict=True)
                ]
    return [
        matrix[place][size] / matrix[place][place] / length for place, length in enumerate(lengths)
    ]


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(first * second for first, second in zip(one, other, strict=True))
