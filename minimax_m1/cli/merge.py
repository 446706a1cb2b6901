"""`minimax-m1 merge`: a checkpoint from a base model and what LoRA has added to it."""

from __future__ import annotations

from minimax_m1.settings import MergeSettings
from minimax_m1.training.export import merge_adapter


def merge(settings: MergeSettings) -> None:
    """Write the merged checkpoint with its tokenizer, and print where it is and what it was made of.

    Raises:
        UserError: folders that cannot be used, or an adapter of another model.
    """
    base = merge_adapter(settings.adapter, settings.model, settings.output, settings.dtype)
    print(f"{settings.output}: {base} with the additions of {settings.adapter}")
