"""From an attention matrix to edges, by the words of the method, sections 3 and 3.1."""

from collections.abc import Sequence
from fractions import Fraction

ZERO = Fraction(0)

ROWS = ("emission", "emission_all", "literal")
SELF_ATTENTION = ("drop", "renormalize")
FIRST_TOKEN = ("exclude", "keep")


def without(row: Sequence[Fraction], column: int) -> list[Fraction]:
    """The row with one entry set to zero."""
    return [ZERO if s == column else weight for s, weight in enumerate(row)]


def rescaled(row: Sequence[Fraction], mass: Fraction) -> list[Fraction]:
    """The row times mass/sum(row), so that it sums to `mass`; a row of zeros stays one."""
    whole = sum(row, ZERO)
    return [weight * mass / whole for weight in row] if whole > 0 else list(row)


def read_by_row(A: Sequence[Sequence[Fraction | float]], k: int, first_token: str) -> list[Fraction]:
    """What row k reads from tokens 0..k, after the choice about the first token."""
    row = [Fraction(weight) for weight in A[k][: k + 1]]
    return rescaled(without(row, 0), Fraction(1)) if first_token == "exclude" else row


def own_row_edges(row: Sequence[Fraction], k: int, self_attention: str) -> list[Fraction]:
    """Row k as incoming edges of token k: the self-attention A[k,k] is not an edge."""
    others = without(row, k)
    return rescaled(others, sum(row, ZERO)) if self_attention == "renormalize" else others


def uses_row_before(k: int, generated: Sequence[bool], rows: str) -> bool:
    """Whether the incoming edges of token k are the row that emitted it, k-1, and not row k."""
    return k >= 1 and (rows == "emission_all" or (rows == "emission" and generated[k]))


def edges_from_attention(
    A: Sequence[Sequence[Fraction | float]],
    generated: Sequence[bool],
    rows: str = "emission",
    self_attention: str = "drop",
    first_token: str = "exclude",
) -> dict[tuple[int, int], Fraction]:
    """c(s,t) for every pair s < t with a positive capacity.

    In this order: the first token (excluded: column 0 is zero and each row is scaled to sum 1), the row of each
    token (its own, or the row before it, whose self-attention becomes the edge k-1 -> k), and, for own
    rows only, the self-attention (dropped, or the rest of the row scaled up to the row's sum).
    """
    for name, value, allowed in (
        ("rows", rows, ROWS),
        ("self_attention", self_attention, SELF_ATTENTION),
        ("first_token", first_token, FIRST_TOKEN),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    edges = {}
    for k in range(len(A)):
        if uses_row_before(k, generated, rows):
            incoming = read_by_row(A, k - 1, first_token)
        else:
            incoming = own_row_edges(read_by_row(A, k, first_token), k, self_attention)
        edges.update({(s, k): weight for s, weight in enumerate(incoming) if weight > 0})
    return edges
