"""A Mixture-of-Experts model opened, and what is in force in it; only this file imports nnsight."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, Self, cast

import torch
from nnsight import TransformersModel, register
from nnsight.intervention.interleaver import OutOfOrderError
from nnsight.intervention.iterator import Iterations
from torch import nn
from transformers import PreTrainedTokenizerBase

from moe_lens.architecture import MoEArchitecture
from moe_lens.architecture.discovery import pretrained
from moe_lens.architecture.listed import normalize
from moe_lens.architecture.quantized import is_parallel, refuse_quantized_experts
from moe_lens.data import FIGURE_10, Encoded, Example, PromptTemplate, template_named
from moe_lens.errors import MoELensError
from moe_lens.lens.accessors import Accessors
from moe_lens.lens.acting import Acting
from moe_lens.lens.batching import prompt_batches
from moe_lens.lens.delta import apply_delta
from moe_lens.lens.greedy import Greedy
from moe_lens.lens.interventions import Intervention
from moe_lens.lens.loading import load_model, load_skeleton, load_tokenizer
from moe_lens.lens.logit_lens import LogitLens
from moe_lens.lens.many_masks import Resuming
from moe_lens.lens.offloaded import expect_input_in_memory
from moe_lens.lens.parallel import WHOLE, Part
from moe_lens.lens.reader import TraceReader
from moe_lens.lens.resumed import ResumedRunner
from moe_lens.lens.stack import InterventionStack

__all__ = ["OpenedModel", "OutOfOrderError"]

MOVED = "_get_parameter_plan"
"""What nnsight asks transformers for by a name of its own."""


class OpenedModel(Accessors):
    """What a lens is before it runs anything: the model under nnsight, its parts by layer, and what acts on it.

    remote: where its runs go: False for this process, True for NDIF, an address for another such server, "local" for
    nnsight's rehearsal of one, which sends a run as to a server and then does it here.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: PromptTemplate | str | Path = FIGURE_10,
        batch_size: int = 32,
        progress: bool = True,
        remote: bool | str = False,
    ) -> None:
        _expect_tokenizer(tokenizer)
        self.template = template
        self.batch_size, self.progress = batch_size, progress
        expect_input_in_memory(module)
        refuse_quantized_experts(module)
        if is_parallel(module):
            _find_moved_names()
        listed = normalize(module)
        if remote:
            _expect_sendable(listed)
        self.module, self.remote = module, remote
        self.tokenizer = copy.deepcopy(tokenizer)  # nnsight sets its padding side
        # Without a device, wrapping would move a model from the CPU to a free accelerator.
        device = None if getattr(module, "hf_device_map", None) else module.device
        self.model = TransformersModel(module, tokenizer=self.tokenizer, device=device)
        self.name = str(pretrained(module).config.name_or_path or type(module).__name__)
        self._reader = TraceReader(self.model, MoEArchitecture.of(module), bool(remote))
        super().__init__(self._reader)
        self._stack = InterventionStack(self.architecture)
        self._edits: dict[int, Any] = {}  # one for each layer that any block acts on, also a block that is at rest
        greedy = Greedy(module, self.tokenizer)
        self._runner = ResumedRunner(module, self.model, self.tokenizer, self._reader, self._stack, greedy, remote)
        self._resuming = Resuming(self._runner)
        self._logit_lens = LogitLens(module, self.architecture)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | nn.Module,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        *,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
        delta: str | Path | None = None,
        template: PromptTemplate | str | Path = FIGURE_10,
        trust_remote_code: bool = False,
        remote: bool | str = False,
        distributed_config: Any = None,
    ) -> Self:
        """Open a packaged model ("organism", "organism:planted"), a folder, a hub id, or a torch model.

        tokenizer: one, or where to find it; by default beside the model. A torch model needs it.
        dtype, device_map: as in transformers, for a model that is loaded here.
        delta: folder of a delta checkpoint to apply; a given torch model is changed in place. Where it was trained with
            another template, a warning says so.
        template: how examples are asked: one, the name of one, or a .json or .toml file.
        trust_remote_code: run the Python code that some models bring beside their weights.
        remote: as `OpenedModel` says. For a server, a model that is named here is built without its weights.
        distributed_config: a `transformers.distributed.DistributedConfig`, by which all processes hold one model.

        Raises MoELensError for a model that cannot be found, has no MoE layers, or is not the delta's base.
        """
        asked = template if isinstance(template, PromptTemplate) else template_named(template)
        if isinstance(model, nn.Module) and tokenizer is None:
            raise MoELensError("a torch model does not bring its tokenizer; pass tokenizer=")
        if tokenizer is None or isinstance(tokenizer, str | Path):
            found = cast(str | Path, model) if tokenizer is None else tokenizer
            tokenizer = load_tokenizer(found, trust_remote_code=trust_remote_code)
        _expect_tokenizer(tokenizer)
        if isinstance(model, nn.Module):
            module = model
        elif remote not in (False, "local"):
            _expect_nothing_of_weights(device_map=device_map, delta=delta, distributed_config=distributed_config)
            module = load_skeleton(model, dtype=dtype, trust_remote_code=trust_remote_code)
        else:
            module = load_model(
                model,
                dtype=dtype,
                device_map=device_map,
                trust_remote_code=trust_remote_code,
                distributed_config=distributed_config,
            )
        if delta is not None:
            apply_delta(module, delta, template=asked)
        lens = cls(module, tokenizer, template=asked, remote=remote)
        lens.name = lens.name if isinstance(model, nn.Module) else str(model)
        return lens

    def __reduce__(self) -> tuple[type[Accessors], tuple[TraceReader]]:
        """What of it travels to a server that runs the model, which its own traces may read it by."""
        return Accessors, (self._reader,)

    def __deepcopy__(self, memo: object) -> Self:
        """MoELensError: interventions in a copy would act through the first lens, so not at all."""
        raise MoELensError(
            "expected one lens for each model; a MoELens cannot be copied with its model: open the model again with "
            "MoELens.from_pretrained(…), or a copy of it with MoELens(copy.deepcopy(lens.module), lens.tokenizer)"
        )

    def __repr__(self) -> str:
        under = f", under {', '.join(map(repr, self.interventions))}" if self.interventions else ""
        where = f"a server ({self.remote})" if self.remote else self.module.device
        device = f"{str(self.module.dtype).removeprefix('torch.')} on {where}"
        return f"MoELens({self.name}: {self.architecture.in_short()}; {device}{under})"

    @property
    def template(self) -> PromptTemplate:
        """How examples are asked; it may be assigned, also by a template's name or file."""
        return self._template

    @template.setter
    def template(self, template: PromptTemplate | str | Path) -> None:
        self._template = template if isinstance(template, PromptTemplate) else template_named(template)

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """Those in force now, the outermost block's first."""
        return self._stack.interventions

    @contextmanager
    def intervene(self, *interventions: Intervention) -> Iterator[Self]:
        """Inside the block, what runs through this lens or `lens.model` is under the interventions.

        That is prefill and every decoding step of `records`, `generate` and your own traces of `lens.model`;
        not a bare call of `lens.module` or a trace of a part of it. Nested blocks add up, outer ones acting
        first. Leaving restores the model, also after an exception.

        Raises MoELensError for layers or experts that the model lacks, if a reroute leaves too few, or for what cannot
        act on a server.
        """
        for own in interventions if self.remote else ():
            if isinstance(own, Intervention) and own.no_remote:
                raise MoELensError(f"{own!r} cannot act in a model on a server: {own.no_remote}; open the model here")
        with self._stack.adding(interventions), self._edited(self._stack.layers):
            yield self

    @contextmanager
    def at_rest(self) -> Iterator[Self]:
        """Inside the block no intervention acts, though those of blocks around it are in force again after it."""
        with self._stack.at_rest():
            yield self

    def _batches(
        self,
        examples: Iterable[Example | str],
        batch_size: int | None,
        progress: bool | None,
        *,
        with_answer: bool = False,
        continuations: Iterable[str] | None = None,
        part: Part = WHOLE,
    ) -> Iterator[tuple[tuple[int, ...], list[Encoded]]]:
        """This part of the examples as `prompt_batches`, asked by the lens's template, as large and loud as it says."""
        batches = prompt_batches(
            examples,
            self.tokenizer,
            template=self.template,
            batch_size=self.batch_size if batch_size is None else batch_size,
            progress=self.progress if progress is None else progress,
            with_answer=with_answer,
            continuations=continuations,
        )
        number, of = part
        return islice(batches, number, None, of)

    @contextmanager
    def _edited(self, layers: Iterable[int]) -> Iterator[None]:
        """Inside the block every trace of `self.model` applies what is in force in these layers."""
        own = {layer: self._edit(layer) for layer in layers if layer not in self._edits}
        self._edits |= own
        try:
            yield
        finally:
            self._edits = {layer: edit for layer, edit in self._edits.items() if layer not in own}
            # nnsight can only clear all edits at once; the user's own have to stay.
            self.model._edits = [edit for edit in self.model._edits if edit not in own.values()]

    def _edit(self, layer: int) -> Any:
        """Make every trace of `self.model` apply the active interventions at `layer`, at each step."""
        acting, reader = self._stack, self._reader
        with self.model.edit(inplace=True):
            _apply_at_each_step(acting, reader, layer)
        return self.model._edits[-1]


def _apply_at_each_step(acting: Acting, reader: TraceReader, layer: int) -> None:
    """Inside an edit: let what acts in a layer act at each step of a run."""
    past, prompt = 0, None
    try:
        for _ in Iterations():
            width = acting.apply(layer, reader, past=past, prompt=prompt)
            past, prompt = past + width, prompt or width
    except OutOfOrderError:
        return  # the run is over, or was stopped before this layer: nothing is left to act on


def _expect_sendable(listed: Sequence[str]) -> None:
    """MoELensError for a model that is changed to be read; else what is sent to a server brings this package's code."""
    if listed:
        raise MoELensError(
            f"{listed[0]!r} lists its experts one by one, and is made readable by other classes, which the model of a "
            "server has not; open the model here"
        )
    register("moe_lens")


def _expect_nothing_of_weights(**asked: Any) -> None:
    """MoELensError for what is asked of weights by name, which are a server's."""
    given = [name for name, value in asked.items() if value is not None]
    if given:
        raise MoELensError(
            f"a model on a server has its weights there, so {'= and '.join(given)}= would change nothing; leave it out"
        )


def _find_moved_names() -> None:
    """Lets nnsight 0.8 find, of a model that is split over processes, what transformers has moved since 5.19."""
    old, new = (import_module(f"transformers.distributed.{name}") for name in ("tensor_parallel", "parallel_utils"))
    if not hasattr(old, MOVED):
        setattr(old, MOVED, getattr(new, MOVED))


def _expect_tokenizer(tokenizer: object) -> None:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise MoELensError(
            f"expected a tokenizer of transformers, or where to find one; got a {type(tokenizer).__name__}: open it "
            "with AutoTokenizer.from_pretrained(…)"
        )
