"""Plain words for the trained tiny models, whose prompts have five slots: task, digit, ink, ground and texture."""

from __future__ import annotations

import re

from ..checks import require

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GROUND = ("on", "background", "ground")  # a colour after one of these, or right before one, is the ground's
TASKS = {"recolour": "recolour", "recolor": "recolour", "keep": "keep", "blend": "blend"}
FILLERS = {"a", "an", "and", "as", "change", "colour", "color", "digit", "draw", "in", "into", "is", "it", "its",
           "make", "number", "of", "paint", "picture", "the", "to", "turn", "with"}  # fmt: skip


def understand(option: str, text: str, editing: bool) -> dict[str, object]:
    """The slots that a prompt names: "make it a red 7 on blue" has task "digit", digit 7, ink "red", ground "blue".

    Args:
        option: where the prompt comes from, for errors.
        editing: whether it says what to change, or what to draw.

    Raises:
        ValueError: a word that the models do not know, two words for one slot, nothing to change.
    """
    from ..lab.scenes import COLOURS, TEXTURES

    known = (
        f'words that the tiny model knows: a digit, the colours {", ".join(COLOURS)} (of the ground after "on"), the '
        f"textures {', '.join(TEXTURES)}{', or ' + ', '.join(sorted(set(TASKS.values()))) if editing else ''}"
    )
    heard, found, ground = re.findall(r"[^\W\d_]+|\d+|[^\w\s,.:;!?\"'-]+", text.lower()), {}, False
    for word, following in zip(heard, [*heard[1:], ""], strict=False):
        ground = ground or word in GROUND
        if word in COLOURS:
            slot, value = "ground" if ground or following in GROUND else "ink", word
        elif word in TEXTURES:
            slot, value = "texture", word
        elif editing and word in TASKS:
            slot, value = "task", TASKS[word]
        elif word in NUMBERS or word in map(str, range(10)):
            slot, value = "digit", NUMBERS.index(word) if word in NUMBERS else int(word)
        else:
            require(word in FILLERS or word in GROUND, option, known, repr(word))
            continue
        require(slot not in found, option, f"one {slot}", f"{found.get(slot)} and {value}")
        found[slot] = value
    if not editing:
        return {"task": "draw", **found}
    task = "digit" if "digit" in found else "recolour" if "ink" in found else "background"
    require(bool(found), option, f"something to change, in {known}", repr(text))
    return {"task": task, **found}
