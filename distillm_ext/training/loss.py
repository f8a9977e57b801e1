"""The loss of one micro-batch: teacher, student and objective in one forward pass of the wrapped student."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distillm_ext.models.logit_reader import StudentOutput, TokenBatch
from distillm_ext.models.router_loss import ModelLoss, mean_term
from distillm_ext.training.objectives import LossParts, cross_entropy
from distillm_ext.training.run import Run


def micro_batch_loss(
    run: Run, wrapped: nn.Module, inputs: Mapping[str, Any], count: Tensor | int, *, step: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the losses at the targets of a micro-batch / `count` × processes, and its detached parts by name.

    The teacher comes first. Then the student's backbone runs, and its head, in whose forward the objective takes the
    place of the logits (`StudentForward`).

    Args:
        run: objectives, teacher source, student and meters.
        wrapped: the student as wrapped for training.
        inputs: a micro-batch of `Run.step_batches`, or of the collator.
        count: targets of the step on all processes.
        step: number of the optimizer step (0-based).
    """
    clock, processes = run.meters.clock, run.accelerator.num_processes
    objective, text = run.objectives.at(step), inputs.get("plain_text")
    batches = [TokenBatch.from_inputs(part) for part in (inputs, text) if part is not None]
    with clock.section("teacher") if objective.needs_teacher else contextlib.nullcontext():
        teacher = run.teaching.targets(inputs) if objective.needs_teacher else None
    found, own = LossParts(torch.zeros(())), list[ModelLoss]()

    def consume(outputs: list[StudentOutput]) -> Tensor:
        nonlocal found
        with clock.section("loss"):
            truth = inputs.get("ground_truth", True)
            found = objective(outputs[0], teacher, inputs["targets"], num_items=count, ground_truth=truth)
            if text is not None:
                lm = cross_entropy(outputs[1], text["targets"], inputs["plain_text_items"])
                found = LossParts(found.total + run.args.lm_weight * lm, {**found.parts, "lm": lm.detach()})
            if own:
                found = found.plus(mean_term(own, inputs.get("micro_batches", 1), processes))
            # DDP and FSDP average gradients over processes, and the count is over all of them.
            return found.total * processes

    loss = run.student(wrapped, batches, consume, fused=True, model_losses=own)
    parts = {name: part * processes for name, part in found.parts.items()}
    run.meters.add_losses(step, {**parts, "total": found.total.detach() * processes})
    return loss, parts
