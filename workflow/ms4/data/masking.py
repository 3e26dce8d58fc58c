"""Which tokens of a conversation are trained.

A turn of the assistant is what stands outside all pairs of brackets, <s> aside: its thinking, its
text, its tool calls and its </s>. What a generation prompt supplies ends with the closing bracket
before the turn, so it is never trained; the end token of a trained turn always is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
Uint8s = npt.NDArray[np.uint8]

_BRACKETS = (
    ("[INST]", "[/INST]"),
    ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    ("[MODEL_SETTINGS]", "[/MODEL_SETTINGS]"),
    ("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)
"""What encloses everything that the assistant does not write."""


@dataclass(frozen=True)
class Masking:
    """What of the assistant's turns is trained."""

    turns: Literal["all", "last"] = "all"
    """Every turn, or the last one only."""
    thinking: bool = True
    """Thinking, its brackets included."""
    tool_calls: bool = True
    """Tool calls, from the first [TOOL_CALLS] to the turn's end token."""
    earlier_thinking: bool = True
    """The thinking of other turns than the last."""


class Masks:
    """Finds the trained tokens by their ids alone."""

    def __init__(self, special: dict[str, int], specials: int) -> None:
        """Note the ids that matter.

        Args:
            special: ids of the control tokens by name.
            specials: ids below this are control tokens.
        """
        self._specials = specials
        self._bos, self._eos = special["<s>"], special["</s>"]
        self._think, self._end_think = special["[THINK]"], special["[/THINK]"]
        self._tool_calls = special["[TOOL_CALLS]"]
        # Step of the bracket depth at each special id; the last entry stands for all text.
        self._step = np.zeros(specials + 1, dtype=np.int8)
        for opening, closing in _BRACKETS:
            self._step[special[opening]] = 1
            self._step[special[closing]] = -1

    def find(
        self, tokens: Int32s, masking: Masking, weights: list[int] | None
    ) -> tuple[Uint8s, Int64s]:
        """The trained tokens and the ends of the assistant's turns.

        Args:
            tokens: of a whole conversation.
            masking: what of the turns is trained.
            weights: of each turn, 0 or 1; None: all 1.

        Returns:
            trained: uint8 [N], 1 where the token is a target of the loss.
            turn_ends: int64 [turns], the position after each turn's </s>.
        """
        step = self._step[np.minimum(tokens, self._specials)]
        trained = np.cumsum(step, dtype=np.int32) == 0
        trained &= step == 0
        trained[0] = False  # <s>
        turn_ends = np.flatnonzero(tokens == self._eos) + 1
        if masking != Masking() or weights is not None:
            self._narrow(tokens, trained, turn_ends, masking, weights or [1] * len(turn_ends))
        return trained.view(np.uint8), turn_ends

    def _narrow(
        self,
        tokens: Int32s,
        trained: npt.NDArray[np.bool_],
        turn_ends: Int64s,
        masking: Masking,
        weights: list[int],
    ) -> None:
        """Take out what `masking` and `weights` exclude."""
        last = len(turn_ends) - 1
        begin = 0
        for turn, (end, weight) in enumerate(zip(turn_ends.tolist(), weights, strict=True)):
            # Before the turn, and after the turn before it, stands at least one closing bracket.
            begin += int(np.flatnonzero(~trained[begin:end])[-1]) + 1
            part, mask = tokens[begin:end], trained[begin:end]
            if weight == 0 or (masking.turns == "last" and turn != last):
                mask[:] = False
            if not masking.thinking or (not masking.earlier_thinking and turn != last):
                depth = np.cumsum((part == self._think).astype(np.int8)) - np.cumsum(
                    (part == self._end_think).astype(np.int8)
                )
                mask[:-1] &= ((depth == 0) & (part != self._end_think))[:-1]
            if not masking.tool_calls:
                calls = np.flatnonzero(part == self._tool_calls)
                if calls.size:
                    mask[calls[0] : -1] = False
            if not mask[:-1].any():
                mask[-1] = False  # an end token alone would teach to say nothing
            begin = end
