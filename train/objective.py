"""What a step learns from: cross-entropy, the selection loss, distillation from the base with its full cache, and how
much of the cache it keeps.

Distillation has a teacher, the base model itself: adapter off, nothing dropped, no gradient, no second copy of weights.

Shapes: B batch, T tokens, R trained tokens of a batch, C hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lrsa import LRSAConfig
from lrsa.hf import compressed_layers, config_of, set_config
from train.selection_loss import SelectionSupervision
from train.settings.errors import Problem
from train.settings.schema import ObjectiveSettings

LOGITS = 2**26  # logits held at once


class Objective:
    """The loss of one micro-batch beyond cross-entropy; one object per batch.

    Args:
        settings: the `objective` section.
        lrsa: the compression that is trained for.
        model: the PEFT model, its attention set with `apply_lrsa`.
        inputs: the batch as the trainer hands it to the model, with `labels`, or `shift_labels` where a process has a
            slice of every row; `predicting` then says for whole rows, bool, which tokens come before a trained one.
        share: of this micro-batch in its step, by which the supervision is weighted.
        tokens: what sums over the batch's trained tokens are divided by; `None` means their number.
    """

    def __init__(self, settings, lrsa: LRSAConfig, model, inputs: dict, share: float = 1.0, tokens=None):
        self.settings, self.model, self.inputs = settings, model, inputs
        self.share, self.tokens = share, tokens
        predicting = self.inputs.pop("predicting", None)
        following = (
            inputs["shift_labels"] if "shift_labels" in inputs else F.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
        )
        self.trained = following != -100  # of the token behind each
        self.supervision = None
        if settings.selection:
            layers, chosen = compressed_layers(model, lrsa), settings.selection_layers
            self.supervision = SelectionSupervision(
                lrsa,
                self.trained if predicting is None else predicting,  # the token before a trained one predicts it
                layers if chosen is None else [layer for layer in layers if layer in chosen],
                weight=settings.selection * share,
                temperature=settings.selection_temperature,
                queries=settings.selection_queries,
            )
        self._teacher_states = None
        self._student_states: list[torch.Tensor] = []

    def teach(self, wrapped_model) -> None:
        """Run the teacher, if there is one."""
        if not self.settings.distillation:
            return
        config = config_of(self.model)
        set_config(self.model, config.full())
        try:
            with torch.no_grad(), self.model.disable_adapter(), _hidden_states(self.model) as states:
                inputs = {name: x for name, x in self.inputs.items() if name not in ("labels", "shift_labels")}
                wrapped_model(**inputs, use_cache=False, logits_to_keep=1)
        finally:
            set_config(self.model, config)
        self._teacher_states = states[0][self.trained]

    def model_inputs(self) -> dict:
        """The batch, and with it the supervision that every layer's attention will find."""
        return self.inputs | {"use_cache": False} | ({"lrsa_supervision": self.supervision} if self.supervision else {})

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it the student's forward records what distillation needs."""
        with _hidden_states(self.model) as states:
            yield
        self._student_states = states

    def total(self, cross_entropy: torch.Tensor) -> torch.Tensor:
        """The whole loss, whose backward also drives the supervision; `cross_entropy` is the trainer's."""
        loss = self.settings.cross_entropy * cross_entropy
        self.cross_entropy = cross_entropy.detach() * (self.trained.sum() if self.tokens is None else self.tokens)
        self.distillation = None
        if self.settings.distillation:
            states = self._student_states[0][self.trained]
            divergence = self._divergence(states)
            self.distillation = divergence.detach()  # a sum over tokens
            divergence = divergence / (max(len(states), 1) if self.tokens is None else self.tokens)
            loss = loss + self.settings.distillation * divergence
        if self.supervision:
            if missing := sorted(set(self.supervision.layers) - self.supervision.reached):
                raise RuntimeError(f"the selection loss did not reach layers {missing}: the model passes no arguments.")
            self.supervision.scale_with(loss)
        return loss

    def parts(self, config: LRSAConfig) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """What the loss was made of, as name -> (sum, count) of this process, the same names on every one; in nats.

        Cross-entropy by the step's compression, `config`: one curve for all keep ratios would jump between them.
        """
        count = self.trained.sum()
        parts = {f"loss_keep_{config.keep_ratio:g}": (self.cross_entropy, count)}
        if self.settings.distillation:
            parts["distillation"] = (self.distillation, count)
        if self.settings.selection:
            losses = list(self.supervision.losses.values())
            parts["selection"] = (sum(losses, start=count * 0.0), count.new_tensor(len(losses)))
        return parts

    def _divergence(self, states: torch.Tensor) -> torch.Tensor:
        """Sum over trained tokens of KL(teacher || student) in nats, times the temperature squared."""
        model = self.model.get_base_model()
        head, config = model.get_output_embeddings(), model.config.get_text_config()
        cap, heat = getattr(config, "final_logit_softcapping", None), self.settings.distillation_temperature

        base_head = getattr(head, "original_module", head)  # of a head in lora.modules_to_save

        def log_probabilities(rows: torch.Tensor, head=head) -> torch.Tensor:
            logits = head(rows)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            return (logits / heat).log_softmax(-1)

        def part(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                target = log_probabilities(teacher, base_head)
            return F.kl_div(log_probabilities(student), target, log_target=True, reduction="sum")

        chunks = _most_of_any_process(math.ceil(len(states) / max(LOGITS // config.vocab_size, 1)), states.device)
        # Reentrant: the other kind compares saved tensors, and under ZeRO-3 the head's weights are gathered between.
        sums = [
            checkpoint(part, *pair, use_reentrant=True)
            for pair in zip(states.tensor_split(chunks), self._teacher_states.tensor_split(chunks), strict=True)
        ]
        return heat**2 * torch.stack(sums).sum()


def _most_of_any_process(number: int, device: torch.device) -> int:
    """The largest `number` of all processes, at least 1. Under ZeRO-3 every use of a layer is a meeting of all."""
    most = torch.tensor(max(number, 1), device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return int(most)


def config_of_step(settings: ObjectiveSettings, lrsa: LRSAConfig, step: int, steps: int, seed: int) -> LRSAConfig:
    """The compression of one step, the same on every rank and after a resume.

    Args:
        step, steps: the step from 0 on, and how many the run has.
        seed: of the run.
    """
    if not settings.keep_ratios:
        return lrsa
    configs = [lrsa if ratio == lrsa.keep_ratio else lrsa.with_keep_ratio(ratio) for ratio in settings.keep_ratios]
    if settings.schedule == "shrink":
        return configs[min(step * len(configs) // max(steps, 1), len(configs) - 1)]
    block, place = divmod(step, len(configs))
    return random.Random(f"{seed} {block}").sample(configs, len(configs))[place]  # each once before any comes again


def objective_problems(settings: ObjectiveSettings, lrsa: LRSAConfig, model) -> list[Problem]:
    """What of the objective this model cannot do."""
    config, problems = model.config.get_text_config(), []
    scales = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
    scaled = [name for name in scales if getattr(config, name, None) not in (None, 1, 1.0)]
    if settings.distillation and scaled:
        text = (
            f"{settings.distillation:g} cannot be used: the model scales its logits ({', '.join(scaled)}); set it to 0"
        )
        problems.append(Problem("", "objective.distillation", text))
    layers = compressed_layers(model, lrsa)
    other = [layer for layer in settings.selection_layers or () if layer not in layers]
    if other:
        text = f"must name layers that LRSA compresses, which are {layers}, got {other}"
        problems.append(Problem("", "objective.selection_layers", text))
    if settings.selection and not layers:
        text = f"{settings.selection:g} cannot be used: LRSA compresses no layer of this model; set it to 0"
        problems.append(Problem("", "objective.selection", text))
    return problems


@contextmanager
def _hidden_states(model) -> Iterator[list[torch.Tensor]]:
    """The last hidden states `[B, T, C]` of every forward within, before the head."""
    states = []
    backbone = model.get_base_model().base_model
    handle = backbone.register_forward_hook(lambda module, inputs, output: states.append(output.last_hidden_state))
    try:
        yield states
    finally:
        handle.remove()
