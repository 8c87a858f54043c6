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
    found: dict[str, object] = {}
    for _, slot, value in _heard(option, text, editing):
        require(slot not in found, option, f"one {slot}", f"{found.get(slot)} and {value}")
        found[slot] = value
    if not editing:
        return {"task": "draw", **found}
    task = "digit" if "digit" in found else "recolour" if "ink" in found else "background"
    require(bool(found), option, f"something to change, in {_known(editing)}", repr(text))
    return {"task": task, **found}


class Tokenizer:
    """The tokens of a prompt with their places in it, as fast tokenizers of transformers give them: one per slot, empty
    where the prompt leaves it open or names the task by the rest of its words."""

    is_fast = True

    def __init__(self, editing: bool) -> None:
        self.editing = editing

    def __call__(self, prompt: str, return_offsets_mapping: bool = True) -> dict[str, list[tuple[int, int]]]:
        from ..lab.scenes import SLOTS

        places = dict.fromkeys(SLOTS, (0, 0))
        for word, slot, _ in _heard("--prompt", prompt, self.editing):
            places[slot] = word.span()
        return {"offset_mapping": list(places.values())}


def _heard(option: str, text: str, editing: bool) -> list[tuple[re.Match, str, object]]:
    """The words of a prompt that name something, each with its slot and value."""
    from ..lab.scenes import COLOURS, TEXTURES

    found = list(re.finditer(r"[^\W\d_]+|\d+|[^\w\s,.:;!?\"'-]+", text))
    words, heard, ground = [match[0].lower() for match in found], [], False
    for match, word, following in zip(found, words, [*words[1:], ""], strict=False):
        ground = ground or word in GROUND
        if word in COLOURS:
            heard.append((match, "ground" if ground or following in GROUND else "ink", word))
        elif word in TEXTURES:
            heard.append((match, "texture", word))
        elif editing and word in TASKS:
            heard.append((match, "task", TASKS[word]))
        elif word in NUMBERS or word in map(str, range(10)):
            heard.append((match, "digit", NUMBERS.index(word) if word in NUMBERS else int(word)))
        else:
            require(word in FILLERS or word in GROUND, option, _known(editing), repr(word))
    return heard


def _known(editing: bool) -> str:
    from ..lab.scenes import COLOURS, TEXTURES

    tasks = f", or {', '.join(sorted(set(TASKS.values())))}" if editing else ""
    return (
        f'words that the tiny model knows: a digit, the colours {", ".join(COLOURS)} (of the ground after "on"), the '
        f"textures {', '.join(TEXTURES)}{tasks}"
    )
