"""Well-known spellings of control tokens that end an answer or a part of code.

Files do not always name the tokens that end an answer, or they name a wrong one: a model whose
template ends turns with ``<|im_end|>`` may name only ``<|endoftext|>``. Therefore the well-known
spellings count as well as the tokens that a file names. The spellings are those of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

END_MARKERS = frozenset(
    {
        "</s>",
        "<EOT>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<|end|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|im_end|>",
        "<｜end▁of▁sentence｜>",
        "[EOT]",
    }
)
"""Spellings that end an answer, if they are control tokens."""

CODE_END_MARKERS = frozenset(
    {
        "<fim-pad>",
        "<fim-repo>",
        "<fim_pad>",
        "<reponame>",
        "<|file_sep|>",
        "<|fim_pad|>",
        "<|fim_repo|>",
        "<|repo_name|>",
        "<PAD>",
        "<REPO>",
        "[PAD]",
    }
)
"""Spellings that end fill-in-the-middle: padding, or the next file of a repository."""

CODE_PART_MARKERS = frozenset(
    {
        "<MID>",
        "<PRE>",
        "<SUF>",
        "<fim-middle>",
        "<fim-prefix>",
        "<fim-suffix>",
        "<fim_middle>",
        "<fim_prefix>",
        "<fim_suffix>",
        "<|code_middle|>",
        "<|code_prefix|>",
        "<|code_suffix|>",
        "<|fim_middle|>",
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|middle|>",
        "<|prefix|>",
        "<|suffix|>",
        "<｜fim▁begin｜>",
        "<｜fim▁end｜>",
        "<｜fim▁hole｜>",
        "▁<MID>",
        "▁<PRE>",
        "▁<SUF>",
    }
)
"""Markers of the parts of fill-in-the-middle."""


def end_ids_by_spelling(added: Mapping[str, int], special_ids: AbstractSet[int]) -> frozenset[int]:
    """Returns the tokens that end an answer by their spelling.

    Args:
        added: Tokens that are matched as a whole, by their text.
        special_ids: The control tokens. Markers of code end an answer even if they are not among
            these, since Hugging Face's files list them as text.
    """
    return frozenset(
        i
        for text, i in added.items()
        if (text in END_MARKERS and i in special_ids) or text in CODE_END_MARKERS
    )
