"""Special tokens in the configuration of the trained model, which is saved with it."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from distillm_ext.models.vocabulary import embedding_size


class KeepPadding(TrainerCallback):
    """Takes back a padding token that the model has no embedding for.

    transformers writes the tokenizer's padding token into the model's configuration when training starts. Padding is
    masked, so a run does not mind an id without embedding, but a saved model with such a configuration does not load.

    Args:
        model: the student, before training.
    """

    def __init__(self, model: Any) -> None:
        self.before = model.config.get_text_config().pad_token_id

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Runs behind transformers' own alignment of special tokens."""
        config = model.config.get_text_config()
        if config.pad_token_id is None or config.pad_token_id < embedding_size(model):
            return
        config.pad_token_id = self.before
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.pad_token_id = self.before
