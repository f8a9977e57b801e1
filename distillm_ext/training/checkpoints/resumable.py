"""A `transformers.Trainer` whose checkpoints carry more state and are known to be whole: it outlives any kill."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import Trainer

from distillm_ext.paths import expand_path
from distillm_ext.training.checkpoints.folders import (
    is_complete,
    list_checkpoints,
    load_state,
    mark_complete,
    newest_complete_checkpoint,
    remove_checkpoint,
    rotate,
    save_state,
)

logger = logging.getLogger(__name__)


class Resumable(Protocol):
    """What a checkpoint carries beside transformers' own files."""

    def state(self) -> dict[str, Any]:
        """JSON-serialisable state that is equal on all ranks."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of this rank."""
        ...

    def reset(self) -> None:
        """Goes back to the state before step 0."""
        ...

    def restore(self, state: Mapping[str, Any], tensors: Sequence[Mapping[str, Tensor]]) -> None:
        """Restores `state` and, from those of every rank that saved, `tensors`."""
        ...


class ResumableTrainer(Trainer):
    """Adds a completion marker (see `checkpoints.folders`) and what `run` holds. A subclass sets `run`."""

    run: Resumable

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Trains, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint folder; or True for the newest complete one in `output_dir`, not
                one that a killed run did not finish.
            trial, ignore_keys_for_eval: as in `transformers.Trainer.train`.

        Raises:
            ValueError: the checkpoint is not complete, or there is none; or the model has nothing to train.
        """
        if not any(parameter.requires_grad for parameter in self.model.parameters()):  # type: ignore[union-attr]
            raise ValueError(
                "model: no parameter is trainable; load an adapter with is_trainable=True, or call requires_grad_ on "
                "what is to be trained"
            )
        path = self._resolve_checkpoint(resume_from_checkpoint)
        self.run.reset()
        if path is not None:
            self.run.restore(*load_state(Path(path)))
        return super().train(resume_from_checkpoint=path, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval)

    def _resolve_checkpoint(self, wanted: str | bool | None) -> str | None:
        if wanted is None or wanted is False:
            return None
        if wanted is True:
            output_dir = str(self.args.output_dir)
            newest = newest_complete_checkpoint(output_dir)
            if newest is None:
                unfinished = ", ".join(path.name for path in list_checkpoints(output_dir)) or "none"
                raise ValueError(
                    f"resume_from_checkpoint=True: no complete checkpoint in {output_dir} (unfinished: {unfinished}); "
                    "start without it"
                )
            logger.info("resuming from %s", newest)
            return newest
        wanted = expand_path(wanted, "resume_from_checkpoint")
        if not is_complete(wanted, resumable=True):
            raise ValueError(
                f"resume_from_checkpoint: {wanted} is not a complete checkpoint of this trainer (no marker, or saved "
                "with save_only_model); pass True for the newest complete one"
            )
        return wanted

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The parent's files; beside an adapter also the generation config, which PEFT leaves out: it says what ends a
        response."""
        super()._save(output_dir, state_dict)
        adapted: Any = self.model
        base = adapted.get_base_model() if hasattr(adapted, "get_base_model") else None
        settings = getattr(base, "generation_config", None)
        if settings is not None:
            settings.save_pretrained(output_dir if output_dir is not None else self.args.output_dir)

    def _load_best_model(self) -> None:
        """As in the parent, which looks for every adapter where PEFT saves the one that is called "default"."""
        adapted: Any = self.model
        active = getattr(adapted, "active_adapter", None)
        folder = Path(str(self.state.best_model_checkpoint)) / str(active)
        if active == "default" or not (folder / "adapter_config.json").is_file():
            return super()._load_best_model()
        logger.info("loading the best adapter from %s (score: %s)", folder, self.state.best_metric)
        adapted.load_adapter(str(folder), active, is_trainable=True)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.is_dir():
            remove_checkpoint(folder)  # left by a run that was killed, or by one that took another course from here
        self.accelerator.wait_for_everyone()
        self._save_transformers_files(model, trial)
        save_state(
            folder,
            state=self.run.state() if self.args.should_save else None,
            tensors=self.run.tensors(),
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder, step=self.state.global_step, resumable=not self.args.save_only_model)
            rotate(run_dir, limit=self.args.save_total_limit, keep=(folder, self.state.best_model_checkpoint))
        self.accelerator.wait_for_everyone()

    def _save_transformers_files(self, model: Any, trial: Any) -> None:
        """The parent's files, without its rotation: that would delete the last complete checkpoint while this one is
        still without its marker."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
