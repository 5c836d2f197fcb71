"""Control tokens whose spelling says what they are for: ends of an answer, parts of code.

Files do not always say which tokens end an answer, or say it of the wrong one: a model whose
template ends turns with ``<|im_end|>`` can name ``<|endoftext|>`` alone. What a file names is
therefore a lower bound. The spellings are those that llama.cpp knows.
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
"""Each ends an answer where it is a control token."""

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
"""What follows a middle that was filled in: padding, or the next file of a repository."""

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
"""What stands around the parts of code whose middle is to be filled in."""


def spelled_ends(added: Mapping[str, int], special_ids: AbstractSet[int]) -> frozenset[int]:
    """The tokens that end an answer by their spelling.

    Args:
        added: Tokens that are matched as a whole, by their text.
        special_ids: The control tokens. Files of Hugging Face's list markers of code as text.
    """
    return frozenset(
        i
        for text, i in added.items()
        if (text in END_MARKERS and i in special_ids) or text in CODE_END_MARKERS
    )
