"""The check of `hardware.pack_int4`."""

import torch

from vitcourse.course.checks import call, check


@check(
    "hardware.pack_int4",
    reference="vitcourse.hardware.quantize.pack_int4",
    level=2,
    minutes=10,
    why="No computer has a type of four bits: two numbers have to share a byte, or nothing is saved.",
    hints=[
        "`<< 4` moves a number into the upper half of a byte, `& 15` keeps only the lower half.",
        "A negative int8 has ones in its upper half: without a mask they cover the neighbour.",
        "Join with `|`, and `.view(torch.uint8)` reads the same bits as a number without a sign.",
    ],
    gradients=False,
    exempt={
        "smaller": "a row has an even number of codes; the cases have 10, 4 and 6",
        "large": "four bits hold −8 to 7, and the cases have them all",
        "tiny": "four bits hold −8 to 7, and the cases have them all",
    },
)
def pack_int4(rng):
    yield call(rng.integers(-8, 8, (3, 10)).to(torch.int8))
    yield call(rng.integers(-8, 8, (2, 3, 4)).to(torch.int8)).on("three dimensions")
    yield call(rng.integers(0, 8, (1, 6)).to(torch.int8)).on("nothing negative")


pack_int4.mistake(
    "neighbours",
    "neighbours share a byte; here the first half of a row goes to the low halves, and the second half to the high ones",
    lambda q: ((q[..., ::2] & 15) | (q[..., 1::2] << 4)).view(torch.uint8),
)
pack_int4.mistake(
    "high-first",
    "low and high are exchanged: the first half of the row belongs in the lower four bits",
    lambda q: ((q.chunk(2, -1)[1] & 15) | (q.chunk(2, -1)[0] << 4)).view(torch.uint8),
)
pack_int4.mistake(
    "sign-not-masked",
    "a negative number's sign fills the upper half of the byte, and covers the number that should be there",
    lambda q: (q.chunk(2, -1)[0] | (q.chunk(2, -1)[1] << 4)).view(torch.uint8),
)
pack_int4.mistake(
    "borrowed",
    "added up, a negative number below borrows one from the number above: join bits, not values",
    lambda q: (q.chunk(2, -1)[0] + (q.chunk(2, -1)[1] << 4)).view(torch.uint8),
)
pack_int4.mistake(
    "shifted-by-eight",
    "the numbers were moved to 0 … 15 first; here a number keeps its own four bits, sign included",
    lambda q: ((q.chunk(2, -1)[0] + 8) | ((q.chunk(2, -1)[1] + 8) << 4)).view(torch.uint8),
)
pack_int4.mistake(
    "signed-bytes",
    "the bits are right, but the bytes still count as numbers with a sign",
    lambda q: (q.chunk(2, -1)[0] & 15) | (q.chunk(2, -1)[1] << 4),
)
pack_int4.mistake(
    "half-empty", "every number still has a byte to itself, half of it empty", lambda q: (q & 15).view(torch.uint8)
)
