"""Direct logit attribution: what each expert writes straight into the logits of the two answers, past later layers."""

import pandas as pd
import torch
from torch import Tensor

from moe_lens.causal.attributing import Examples, difference_of, first_tokens, names_of
from moe_lens.errors import MoELensError
from moe_lens.lens.lens import MoELens
from moe_lens.statistics.jackknife import GroupedSums


def direct_logit_attribution(
    lens: MoELens, examples: Examples, *, batch_size: int | None = None, progress: bool | None = None
) -> pd.DataFrame:
    """Per expert its direct effect on the logit difference at the last prompt token.

    Columns layer, expert, score, score_low, score_high.
    score: the mean over examples of gating weight times output of the expert (0 where it is not selected), along the
    gradient of the logit of the context answer's first token minus memory's with respect to the last layer's residual
    stream (Elhage et al. 2021). Departure: the final norm's own scale is linearised too, not held fixed, so that any
    norm will do; what a decoder layer multiplies its block's output by is left out, which is one factor of all.
    Raises MoELensError for examples without what memory answers, and where single outputs, or a way of theirs straight
    to the residual stream, cannot be told.
    """
    for site in lens.architecture.moe:
        if site.passed_through:
            raise MoELensError(
                f"the experts' sum of layer {site.layer} goes through {', '.join(site.passed_through)} before the "
                "residual stream, so no expert writes to the logits directly; take attribution instead"
            )
    if len(set(names_of(examples))) < len(examples):
        raise MoELensError("an example's id repeats; give every example an id of its own")
    names, last, sums = names_of(examples), lens.architecture.n_layers - 1, GroupedSums()
    tokens = dict(zip(names, first_tokens(lens, examples), strict=True))
    captures = ("routing", "expert_outputs", "residual")
    for record in lens.records(examples, capture=captures, positions="last", batch_size=batch_size, progress=progress):
        rows, _ = record.kept_rows((0,))
        at = record.kept[rows[:, 0]]  # all prompts end at the last position: they are padded on the left
        every = torch.arange(len(record.ids))
        stream = record.residual[last][every, rows[:, 0]].detach().requires_grad_()
        with torch.enable_grad():
            logits = lens.project_on_vocab(stream)
            differences = difference_of(logits, torch.stack([tokens[name] for name in record.ids]))
        [along] = torch.autograd.grad(differences.sum(), [stream])
        found = {}
        for layer, routing in record.routing.items():
            outputs = record.expert_outputs[layer][every, rows[:, 0]].float()  # [batch, k, d_model]
            scale = lens.architecture.at(layer).scale_after
            weights, indices = routing.weights[every, at].float() * scale, routing.indices[every, at]
            own = weights * torch.einsum("bkd,bd->bk", outputs, along.to(outputs))
            empty: Tensor = torch.zeros(len(every), routing.n_experts)
            found[layer] = empty.scatter_add(-1, indices, own)
        sums.add(record.ids, found)
    return sums.means(names)
