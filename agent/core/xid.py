"""What the driver's critical errors (XIDs) mean, as NVIDIA's document of them says, and what to do about each."""

from typing import NamedTuple


class Xid(NamedTuple):
    """One kind of error. ``passing``: training may be tried again as it is."""

    meaning: str
    advice: str
    passing: bool = False


_PROGRAM = (
    "Mostly a program's error and not the card's: run the job again with CUDA_LAUNCH_BLOCKING=1 in PASS_TO_TRAINER "
    "to see which kernel it was; if other programs meet it too, test the card."
)
_RESET = (
    "Reset the card (nvidia-smi --gpu-reset) or restart the machine; if it comes back, have the card tested."
)
_REPLACE = "Restart the machine; if it comes back, have the card replaced: its memory wears out."

XIDS: dict[int, Xid] = {
    13: Xid("an exception in the graphics engine, such as an access out of bounds", _PROGRAM, True),
    31: Xid(
        "a page fault in the card's memory: a kernel used an address that is not its own", _PROGRAM, True
    ),
    32: Xid("a broken stream of commands to the card", "Check the card's seat and its PCIe riser.", True),
    38: Xid("an error in the driver's firmware", _RESET),
    43: Xid("the card stopped a program that had made an error; the card itself is well", _PROGRAM, True),
    45: Xid("the driver cleaned up after a program that had ended", "Look for the error before it.", True),
    48: Xid("an error of two bits in the card's memory, which cannot be corrected", _RESET),
    61: Xid("a stop of the card's own micro-controller", _RESET),
    62: Xid("a halt of the card's own micro-controller", _RESET),
    63: Xid(
        "a page of the card's memory was retired or a row remapped", "It takes effect at a restart.", True
    ),
    64: Xid("a page of the card's memory could not be retired or a row not remapped", _REPLACE),
    69: Xid("an error of class in the graphics engine", _PROGRAM, True),
    74: Xid("an error of NVLink", "Check the NVLink bridge or switch; then restart the machine."),
    79: Xid(
        "the card has fallen off the bus",
        "Restart the machine; check its power cables, its temperature and its seat.",
    ),
    92: Xid("many corrected errors of one bit in the card's memory", _REPLACE, True),
    94: Xid("an uncorrectable memory error that was contained: it hit this program alone", _RESET, True),
    95: Xid("an uncorrectable memory error that was not contained: every program on the card is hit", _RESET),
    109: Xid("the card did not switch from one program to another in time", _RESET, True),
    119: Xid("the card's system processor (GSP) did not answer in time", _RESET),
    120: Xid("the card's system processor (GSP) met an error", _RESET),
    140: Xid("an uncorrectable memory error", _RESET),
    143: Xid("the card could not be initialised", _RESET),
}
CONSEQUENCES = frozenset({45, 63})
"""They follow from an end, or announce something: no process ended of them."""


def explain(number: int) -> Xid:
    """Return what is known of an XID."""
    unknown = Xid("not in this agent's list; NVIDIA's page of XID errors has it", _RESET)
    return XIDS.get(number, unknown)
