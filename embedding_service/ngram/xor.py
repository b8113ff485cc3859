"""The hash that families qwen4_exp and engram share: tokens times odd multipliers, combined by xor, modulo primes."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, count

import torch
from torch import Tensor

MAX_INT64 = 2**63 - 1


def primes_from(start: int) -> Iterator[int]:
    """Every prime from `start` on, in order."""
    return filter(_is_prime, count(max(start, 2)))


# Miller and Rabin's test with these bases is exact below 2^64 (Sorenson and Webster, 2015: below 3.3 * 10^24).
_BASES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def _is_prime(number: int) -> bool:
    for prime in _BASES:
        if number % prime == 0:
            return number == prime
    odd, halvings = number - 1, 0
    while odd % 2 == 0:
        odd, halvings = odd // 2, halvings + 1
    return all(_passes(pow(base, odd, number), number, halvings) for base in _BASES)


def _passes(power: int, number: int, halvings: int) -> bool:
    if power in (1, number - 1):
        return True
    for _ in range(halvings - 1):
        power = power * power % number
        if power == number - 1:
            return True
    return False


def multiplier_bound(tokens: int) -> int:
    """The bound for x below which (2x + 1) times any of `tokens` tokens stays below 2^63."""
    return max(1, MAX_INT64 // max(tokens, 1) // 2)


class XorHash:
    """L tables of the heads of n-grams of 2..N tokens, the same number K for each n: H = K * (N - 1).

        id = (xor over d < n of gram[d] * multiplier[l][d]) mod rows[l][head] + the rows of the table's heads before

    Products stay below 2^63 (`multiplier_bound`). So int64 neither wraps nor has a sign, and any kind of modulo will
    do.

    Args:
        multipliers: [L][N].
        head_rows: [L][H].
    """

    def __init__(self, multipliers: Sequence[Sequence[int]], head_rows: Sequence[Sequence[int]]) -> None:
        # Always made on the CPU, with any default device around it.
        cpu = torch.device("cpu")
        orders = len(multipliers[0]) - 1
        shape = (len(head_rows), orders, -1)
        offsets = [[0, *accumulate(rows[:-1])] for rows in head_rows]
        self._constants = {
            cpu: (
                torch.tensor(multipliers, device=cpu),
                torch.tensor(head_rows, device=cpu).view(shape),
                torch.tensor(offsets, device=cpu).view(shape),
            )
        }

    def row_ids(self, grams: Tensor) -> Tensor:
        """int64 [B, S, N], the token itself first, then older ones -> int64 [B, S, L, H]."""
        multipliers, rows, offsets = self._constants_on(grams.device)
        mixed = grams.unsqueeze(2) * multipliers
        for older in range(1, multipliers.shape[1]):
            mixed[..., older] ^= mixed[..., older - 1]
        return mixed[..., 1:, None].fmod(rows).add_(offsets).flatten(-2)

    def _constants_on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._constants:
            multipliers, rows, offsets = self._constants[torch.device("cpu")]
            self._constants[device] = (multipliers.to(device), rows.to(device), offsets.to(device))
        return self._constants[device]
