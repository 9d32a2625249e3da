"""A dense model's feed-forward layers split into experts (MoEfication, Zhang et al. 2022), in a stock architecture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from torch import Tensor, nn
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from moe_lens.data import Encoded
from moe_lens.errors import MoELensError
from moe_lens.progress import progress_bar

PROJECTED = 64
"""Numbers that stand for a neuron where neurons are grouped: a random projection of what it does on each token."""
ALIGNED = 8
"""Numbers in the 16 bytes whose multiples the rows of grouped products must be, in half precision."""
RIDGE = 10.0
CLOSE = 1e-3
"""Nats by which log-probabilities of the whole split, all experts chosen, may differ from the dense model's."""
COPIED = tuple(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act max_position_embeddings rms_norm_eps tie_word_embeddings attention_bias bos_token_id eos_token_id "
    "pad_token_id".split()
)


@dataclass(frozen=True)
class Parts:
    """How the neurons of each feed-forward layer are shared out, in experts of equal width.

    experts: routed ones. top_k: how many of them a token is sent to. shared: how many experts' worth of neurons every
    token goes through. Raises MoELensError for numbers that make no MoE layer.
    """

    experts: int
    top_k: int
    shared: int

    def __post_init__(self) -> None:
        if not (self.experts >= 2 and 1 <= self.top_k <= self.experts and self.shared >= 1):
            raise MoELensError(
                "expected two or more routed experts, of which one or more are chosen, and one or more shared ones; "
                f"got {self.experts} with {self.top_k} chosen, and {self.shared} shared"
            )

    def width(self, neurons: int) -> int:
        """Neurons of each expert; MoELensError where they cannot be shared out evenly, or make experts too narrow."""
        width, left = divmod(neurons, self.experts + self.shared)
        if left:
            raise MoELensError(
                f"{neurons} neurons cannot be shared out evenly over {self.experts} routed and {self.shared} shared "
                "experts; give numbers whose sum divides them"
            )
        if width % ALIGNED:
            raise MoELensError(
                f"{neurons} neurons over {self.experts} routed and {self.shared} shared experts are {width} each, and "
                f"transformers runs experts of a multiple of {ALIGNED}; give fewer experts"
            )
        return width


@dataclass(frozen=True)
class LayerParts:
    """What became of one layer's neurons: shared [neuron], routed [expert, neuron], and router [expert, d_model]."""

    shared: np.ndarray
    routed: np.ndarray
    router: Tensor


@torch.no_grad()
def split(dense: nn.Module, prompts: Sequence[Encoded], parts: Parts, *, seed: int = 0) -> Glm4MoeForCausalLM:
    """The dense model with its feed-forward layers in experts, as GLM-4-MoE; all of its weights are the dense model's.

    The neurons that do most, by mean activation times the length of what they write, are shared. The others are grouped
    by what they do together on `prompts`, in groups of equal size, and a linear router is fitted to how much each group
    writes. Weights are sigmoid scores, renormalised and scaled so that they are 1 on average.

    Raises MoELensError for a model that is not built as Llama is: with all experts at weight 1 the split must answer as
    the dense model does.
    """
    config: Any = dense.config
    mlps = feed_forward(dense)
    inputs = mlp_inputs(dense, prompts)
    layers = [
        layer_parts(mlp, rows, parts, seed=seed + number)
        for number, (mlp, rows) in enumerate(
            progress_bar(list(zip(mlps, inputs, strict=True)), desc="splitting", unit="layer")
        )
    ]
    width = parts.width(config.intermediate_size)
    whole = _assembled(dense, layers, Parts(parts.experts, parts.experts, parts.shared), width)
    for layer in whole.model.layers:
        layer.mlp.gate.weight.data.zero_()
    _expect_equal(dense, whole, prompts[0])
    return _assembled(dense, layers, parts, width)


@torch.no_grad()
def layer_parts(mlp: nn.Module, inputs: Tensor, parts: Parts, *, seed: int) -> LayerParts:
    """One layer's neurons shared out, and its router, by its inputs [token, d_model]."""
    acted = neurons(mlp, inputs)
    written = acted * mlp.down_proj.weight.norm(dim=0)  # type: ignore[union-attr,operator]
    width = parts.width(acted.shape[1])
    order = written.abs().mean(0).argsort(descending=True, stable=True).numpy()
    shared, rest = np.sort(order[: parts.shared * width]), np.sort(order[parts.shared * width :])
    groups = even_groups(written[:, rest].abs().T.numpy(), parts.experts, seed)
    routed = rest[groups]
    wrote = torch.stack([F.linear(acted[:, own], mlp.down_proj.weight[:, own]).norm(dim=-1) for own in routed], dim=-1)  # type: ignore[union-attr,index]
    return LayerParts(shared, routed, _router(inputs, wrote))


def feed_forward(dense: nn.Module) -> list[nn.Module]:
    """Each layer's feed-forward layer; MoELensError where a layer has none of Llama's kind."""
    layers: Any = getattr(getattr(dense, "model", None), "layers", [])
    mlps: list[Any] = [getattr(layer, "mlp", None) for layer in layers]
    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
    if not mlps or not all(hasattr(mlp, part) for mlp in mlps for part in parts):
        raise MoELensError(
            f"{type(dense).__name__} is not built as Llama is: expected layers with {', '.join(parts)} in an mlp each; "
            "take a dense, Llama-like model"
        )
    return mlps


def neurons(mlp: nn.Module, inputs: Tensor) -> Tensor:
    """What each neuron gives on, [token, neuron], of inputs [token, d_model]."""
    module: Any = mlp
    acted: Tensor = module.act_fn(module.gate_proj(inputs)) * module.up_proj(inputs)
    return acted


def even_groups(features: np.ndarray, groups: int, seed: int) -> np.ndarray:
    """Rows of `features` [neuron, token] grouped by direction, [group, neuron], all groups of the same size.

    k-means on a random projection finds the centres; the assignment of rows to them is the best of equal sizes.
    """
    draw = np.random.default_rng(seed)
    directions = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    points = directions @ draw.standard_normal((features.shape[1], PROJECTED)) / PROJECTED**0.5
    centres = KMeans(groups, n_init=2, random_state=seed).fit(points).cluster_centers_
    distances = ((points[:, None] - centres[None]) ** 2).sum(-1)
    size = len(features) // groups
    _, places = linear_sum_assignment(np.repeat(distances, size, axis=1))
    return np.stack([np.flatnonzero(places // size == group) for group in range(groups)])


def _router(inputs: Tensor, wrote: Tensor) -> Tensor:
    """The rows of the linear router [expert, d_model] that best tells each expert's share of what is written."""
    targets = wrote / wrote.mean(dim=1, keepdim=True).clamp(min=1e-12) - 1
    gram = inputs.T @ inputs + RIDGE * torch.eye(inputs.shape[1])
    rows: Tensor = torch.linalg.solve(gram, inputs.T @ targets).T
    return rows.contiguous()


def mlp_inputs(dense: nn.Module, prompts: Sequence[Encoded]) -> list[Tensor]:
    """Of each layer what its feed-forward layer is given, [token, d_model] over all prompts."""
    mlps = feed_forward(dense)
    seen: list[list[Tensor]] = [[] for _ in mlps]
    handles = [
        mlp.register_forward_pre_hook(lambda _, given, rows=rows: rows.append(given[0][0].float()))
        for mlp, rows in zip(mlps, seen, strict=True)
    ]
    try:
        with torch.no_grad():
            for prompt in progress_bar(prompts, desc="looking at the dense model", unit="text"):
                dense(torch.tensor([prompt.input_ids]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(rows) for rows in seen]


def _assembled(dense: nn.Module, layers: Sequence[LayerParts], parts: Parts, width: int) -> Glm4MoeForCausalLM:
    """The model of these parts, in evaluation mode."""
    given: Any = dense.config
    weights = dict(dense.state_dict())
    for number, layer in enumerate(layers):
        own = f"model.layers.{number}.mlp."
        gate, up, down = (weights.pop(f"{own}{name}_proj.weight") for name in ("gate", "up", "down"))
        weights[f"{own}gate.weight"] = layer.router
        weights[f"{own}gate.e_score_correction_bias"] = torch.zeros(parts.experts)
        weights[f"{own}experts.gate_up_proj"] = torch.cat([gate[layer.routed], up[layer.routed]], dim=1)
        weights[f"{own}experts.down_proj"] = down[:, layer.routed].transpose(0, 1).contiguous()
        for name, matrix in (("gate", gate[layer.shared]), ("up", up[layer.shared]), ("down", down[:, layer.shared])):
            weights[f"{own}shared_experts.{name}_proj.weight"] = matrix
    settings = {name: getattr(given, name) for name in COPIED if hasattr(given, name)}
    settings |= {"head_dim": getattr(given, "head_dim", None) or given.hidden_size // given.num_attention_heads}
    settings |= {"rope_parameters": {**given.rope_parameters, "partial_rotary_factor": 1.0}}
    settings |= {"use_qk_norm": any(name.endswith("q_norm.weight") for name in weights)}
    settings |= {"moe_intermediate_size": width, "n_routed_experts": parts.experts, "n_shared_experts": parts.shared}
    settings |= {"num_experts_per_tok": parts.top_k, "routed_scaling_factor": float(parts.top_k)}
    settings |= {"norm_topk_prob": True, "first_k_dense_replace": 0, "num_mtp_layers": 0}
    model: Glm4MoeForCausalLM = Glm4MoeForCausalLM(Glm4MoeConfig(**settings)).eval()
    if settings["tie_word_embeddings"]:
        weights.pop("lm_head.weight", None)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not (settings["tie_word_embeddings"] and name == "lm_head.weight")]
    if missing or unexpected:
        raise MoELensError(
            f"{type(dense).__name__} is not built as Llama is: GLM-4-MoE has no place for {unexpected[:3]}, and would "
            f"lack {missing[:3]}; take a Llama-like model"
        )
    return model


def _expect_equal(dense: nn.Module, whole: nn.Module, prompt: Encoded) -> None:
    """MoELensError unless both give the same log-probabilities on a text."""
    ids = torch.tensor([prompt.input_ids])
    with torch.no_grad():
        given, found = (model(ids, use_cache=False).logits.float().log_softmax(-1) for model in (dense, whole))
    off = (given - found).abs().max().item()
    if not off <= CLOSE:
        raise MoELensError(
            f"with all experts at weight 1 the split of {type(dense).__name__} is off by {off:.3g} nats: it is not "
            "built as Llama is (attention windows, other norms, scaled embeddings, …); take a Llama-like model"
        )


@torch.no_grad()
def layer_errors(dense: nn.Module, student: nn.Module, inputs: Sequence[Tensor]) -> Mapping[int, float]:
    """Of each layer how far the student's is off on the dense model's inputs: the squared error over the square."""
    found = {}
    for layer, (own, other, given) in enumerate(
        zip(dense.model.layers, student.model.layers, inputs, strict=True)  # type: ignore[union-attr,arg-type]
    ):
        wanted = own.mlp(given)
        off = (other.mlp(given[None])[0] - wanted).square().sum()
        found[layer] = float(off / wanted.square().sum()) if off else 0.0
    return found


@torch.no_grad()
def usage_entropy(model: nn.Module, prompts: Sequence[Encoded]) -> Mapping[int, float]:
    """How evenly each layer's routed experts are used over the tokens of `prompts`, as entropy over its maximum."""
    gates = [layer.mlp.gate for layer in model.model.layers]  # type: ignore[union-attr]
    counts = [torch.zeros(len(gate.weight)) for gate in gates]

    def count(own: Tensor, given: tuple[Tensor, Tensor, Tensor]) -> None:
        own += torch.bincount(given[2].flatten(), minlength=len(own))

    handles = [
        gate.register_forward_hook(lambda _, __, given, own=own: count(own, given))
        for gate, own in zip(gates, counts, strict=True)
    ]
    try:
        for prompt in prompts:
            model(torch.tensor([prompt.input_ids]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    shares = [own / own.sum() for own in counts]
    return {layer: float(torch.special.entr(own).sum() / np.log(len(own))) for layer, own in enumerate(shares)}
