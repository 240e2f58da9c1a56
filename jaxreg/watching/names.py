"""Long names made short, so that each can still be told from the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

CUT = "…"


def shortened(names: Sequence[str], longest: int = 32) -> list[str]:
    """The names, those that are longer cut where they are like others: in the middle if that keeps them
    apart, else around the part that no other has.

    Two names are told apart where no other name fits what is left of one. Names that nothing of this length
    can tell apart are numbered.

    Args:
      names: different from one another.
      longest: characters that a name may have.

    Example:
      >>> shortened(["kl_of_policy_from_reference_a", "kl_of_policy_from_reference_b", "l2"], 15)
      ['kl_of_po…ence_a', 'kl_of_po…ence_b', 'l2']
      >>> shortened(["the_weight_of_layer_01_after_warmup", "the_weight_of_layer_02_after_warmup"], 15)
      ['the…ayer_01…mup', 'the…ayer_02…mup']
    """
    short = [name if len(name) <= longest else _cut(name, names, longest) for name in names]
    for i, name in enumerate(short):
        if not name or name in short[:i]:
            number = f"{CUT} ({i + 1})"
            short[i] = names[i][: longest - len(number)] + number
    return short


def _cut(name: str, names: Sequence[str], longest: int) -> str:
    """The first way to cut that no other name fits; "" where there is none."""
    others = [other for other in names if other != name]
    for parts in _ways(name, longest):
        if not any(_fits(other, parts) for other in others):
            return CUT.join(parts)
    return ""


def _ways(name: str, longest: int) -> Iterator[tuple[str, ...]]:
    """Ways to keep so much of a name, the best first: its two ends, or a window in the middle, too."""
    kept = longest - len(CUT)
    half = (kept + 1) // 2 + kept // 14  # a little more of the beginning: that is where one begins to read
    for head in sorted(range(2, kept - 1), key=lambda head: abs(head - half)):
        yield name[:head], name[head - kept :]
    end = max(1, (longest - 2 * len(CUT)) // 4)
    window = longest - 2 * len(CUT) - 2 * end
    places = range(end, len(name) - end - window + 1)
    for start in sorted(places, key=lambda start: abs(start + window // 2 - len(name) // 2)):
        yield name[:end], name[start : start + window], name[-end:]


def _fits(name: str, parts: tuple[str, ...]) -> bool:
    """Whether the name has these parts, in this order, the first in front and the last at the end."""
    at = 0
    for part in parts[:-1]:
        found = name.find(part, at) if at else (0 if name.startswith(part) else -1)
        if found < 0:
            return False
        at = found + len(part)
    return name.endswith(parts[-1]) and len(name) >= at + len(parts[-1])
