"""Which hidden state and which features of a tower LLaVA takes, checked before anything is loaded; no torch."""

import itertools
import re
from collections.abc import Sequence

from llm2clip_plugin.options.names import unknown

FEATURES = ("patch", "cls_patch")


def option_value(words: Sequence[str], name: str) -> str:
    """The value of an option of LLaVA on a command line, "" without one; as argparse reads it, the last counts.

    >>> option_value(["--mm_vision_select_layer", "-2", "--mm-vision-select-layer=-1"], "--mm_vision_select_layer")
    '-1'
    """
    value = ""
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        given, equals, own = word.partition("=")
        if given.replace("-", "_") == name.replace("-", "_"):
            value = own if equals else following
    return value


def check_selection(words: Sequence[str], num_layers: int) -> None:
    """Raise ValueError if LLaVA's options select a hidden state that a tower does not have, or unknown features."""
    layer, feature = (option_value(words, f"--mm_vision_select_{name}") for name in ("layer", "feature"))
    if re.fullmatch(r"[+-]?\d+", layer):
        blocks_below(int(layer), num_layers)
    if feature:
        check_feature(feature)


def check_feature(feature: str) -> None:
    """Raise ValueError for an unknown ``mm_vision_select_feature``."""
    if feature not in FEATURES:
        raise ValueError(unknown("mm_vision_select_feature", feature, FEATURES))


def blocks_below(select_layer: int, num_layers: int) -> int:
    """Blocks below the selected hidden state: 24 blocks have 25 states, so layer -2 is the state after block 23.

    Raises ValueError if there is no such state.
    """
    states = num_layers + 1
    if not -states <= select_layer < states:
        raise ValueError(
            f"mm_vision_select_layer {select_layer} is out of range: "
            f"a tower of {num_layers} blocks has hidden states {-states} to {states - 1}"
        )
    return select_layer % states
