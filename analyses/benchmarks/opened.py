"""A random OLMoE of any depth, opened: what is done with it, each thing beside the plain model doing the same."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from turns import Row, in_words

from moe_lens import (
    AnswerProbability,
    AttentionMass,
    CoActivation,
    Example,
    ExpertSaliency,
    ExpertSet,
    ExpertUsage,
    Intervention,
    MoELens,
    MoELensError,
    Reroute,
    RouterLoad,
    RoutingVectors,
    Zero,
)
from moe_lens.architecture.paper_models import OLMOE
from moe_lens.causal import single_expert_effects
from moe_lens.checks.suite import CRASHES
from moe_lens.data import collate, encode
from moe_lens.lens.greedy import Greedy
from moe_lens.lens.loading import load_tokenizer

Way = Callable[[], object]
TINY = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 8192}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 2}
TINY |= {"eos_token_id": None, "pad_token_id": None}
MID = TINY | {"hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8}
MID |= {"num_key_value_heads": 8, "num_experts": 64, "num_experts_per_tok": 8}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "olmoe": OLMOE.settings,
    "mid": OLMOE.settings | MID,
    "tiny": OLMOE.settings | TINY,
}
"""Of the configuration, by size: the model's own, one for minutes on a CPU, and one to try the scripts with."""
LONGEST = 16384


def random_lens(size: str, *, layers: int | None, device: str, dtype: torch.dtype = torch.bfloat16) -> MoELens:
    """A model of a size with random weights, opened. layers: None for all."""
    if size not in SETTINGS:
        raise MoELensError(f"--size must be one of {', '.join(SETTINGS)}; got {size!r}")
    depth = {} if layers is None else {"num_hidden_layers": layers}
    torch.manual_seed(0)
    settings = {**SETTINGS[size], **depth, "max_position_embeddings": LONGEST}
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(CONFIG_MAPPING[OLMOE.model_type](**settings), dtype=dtype).eval()
    lens = MoELens.from_pretrained(module, load_tokenizer("organism"))
    with torch.no_grad():  # a logit of 0 is never the highest of so many: every run makes all new tokens
        module.get_output_embeddings().weight[list(Greedy(module, lens.tokenizer).ends)] = 0
    return lens


def layers_of(size: str) -> int:
    """How many layers a whole model of a size has."""
    return int(SETTINGS[size]["num_hidden_layers"])


def parameters_of(size: str, layers: int) -> int:
    """How many parameters a model of a size has with so many layers."""
    config = CONFIG_MAPPING[OLMOE.model_type](**{**SETTINGS[size], "num_hidden_layers": layers})
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


def examples_of(lens: MoELens, count: int, tokens: int) -> list[Example]:
    """Examples whose prompts have `tokens` tokens each, or some more, of random words."""
    words = [
        word.removeprefix("Ġ") for word in lens.tokenizer.get_vocab() if word.startswith("Ġ") and word[1:].isalpha()
    ]
    draw = torch.Generator().manual_seed(0)
    found = []
    for place in range(count):
        chosen = [words[i] for i in torch.randint(len(words), (tokens,), generator=draw)]
        example = Example(str(place), " ".join(chosen), f"What is {chosen[0]}?", (chosen[1],))
        spare = len(encode(example, lens.tokenizer).input_ids) - tokens
        found.append(Example(example.id, " ".join(chosen[: max(2, tokens - spare)]), example.question, example.answers))
    return found


def inputs_of(lens: MoELens, examples: list[Example], *, with_answer: bool = False) -> dict[str, torch.Tensor]:
    """What the bare model takes for these examples, as one left-padded batch [batch, pos]."""
    batch = collate([encode(example, lens.tokenizer, with_answer=with_answer) for example in examples], 0)
    mask = batch.attention_mask.to(lens.module.device)
    ids = batch.input_ids.to(lens.module.device)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def bare(lens: MoELens, inputs: Mapping[str, torch.Tensor], *, maps: bool = False) -> torch.Tensor:
    """The bare model's logits at the last position, [batch, 1, vocab]. maps: it keeps all attention maps, too."""
    with torch.no_grad():
        return lens.module(**inputs, use_cache=False, logits_to_keep=1, output_attentions=maps).logits


def interventions_of(lens: MoELens, examples: list[Example]) -> dict[str, Intervention]:
    """Each kind of intervention, on two experts of every layer that these use, by what it is called in the table."""
    [record] = lens.records(examples[:1], progress=False)
    experts = ExpertSet.of({layer: routing.indices[0, -1, :2].tolist() for layer, routing in record.routing.items()})
    return {"Zero": Zero(experts), "Reroute": Reroute(experts)}


def checked(lens: MoELens, examples: list[Example]) -> Iterator[Row]:
    """That capture leaves the logits as they are, and that masked experts have no weight; a row for each."""
    for way, check in {"captured, its logits": captured_as_plain, "Zero, its weights": masked_away}.items():
        try:
            yield {"way": way, "outcome": check(lens, examples)}
        except CRASHES as crash:
            yield {"way": way, "error": in_words(crash)}


def captured_as_plain(lens: MoELens, examples: list[Example]) -> str:
    """How far a captured pass is from a plain one; MoELensError if by more than ten times what two plain ones are."""
    inputs = inputs_of(lens, examples)
    plain, again = bare(lens, inputs), bare(lens, inputs)
    [record] = lens.records(examples, capture=("routing", "logits"), batch_size=len(examples), progress=False)
    order = [int(place) for place in record.ids]
    apart, between = (float((a - plain[b]).abs().max()) for a, b in ((record.logits, order), (again, slice(None))))
    if not apart <= 10 * between:
        raise MoELensError(f"expected the logits of a plain pass, of which two are {between} apart; got {apart} off")
    return "as plain, bit for bit" if apart == 0 else f"{apart:.2g} off plain, two plain passes by {between:.2g}"


def masked_away(lens: MoELens, examples: list[Example]) -> str:
    """That masked experts were chosen in every layer, and have a weight of 0; MoELensError otherwise."""
    zero = interventions_of(lens, examples)["Zero"]
    with lens.intervene(zero):
        [record] = lens.records(examples, batch_size=len(examples), progress=False)
    for layer, routing in record.routing.items():
        hit = torch.isin(routing.indices, routing.indices.new_tensor(zero.experts[layer]))
        if not hit.any() or routing.weights[hit].any():
            raise MoELensError(f"expected experts that are chosen, with a weight of 0, in layer {layer}")
    return "0 where masked"


def passes(lens: MoELens, examples: list[Example]) -> dict[str, Way]:
    """A forward pass over one batch: plain, captured, and under each intervention."""
    inputs, texts = inputs_of(lens, examples), list(examples)

    def recorded(*capture: str) -> None:
        for _ in lens.records(texts, capture=capture, batch_size=len(texts), progress=False):
            pass

    def masked(intervention: Intervention) -> None:
        with lens.intervene(intervention):
            recorded("routing")

    return {
        "plain": lambda: bare(lens, inputs),
        "routing captured": lambda: recorded("routing"),
        "routing, residual and MoE output captured": lambda: recorded("routing", "residual", "moe_output"),
        **{f"{name}, routing captured": partial(masked, it) for name, it in interventions_of(lens, examples).items()},
    }


def generation(lens: MoELens, examples: list[Example], new_tokens: int) -> dict[str, Way]:
    """Greedy generation after one batch of prompts: transformers' own, the lens's, and under each intervention."""
    inputs = inputs_of(lens, examples)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    masks = interventions_of(lens, examples)

    def generated(*interventions: Intervention) -> None:
        with lens.intervene(*interventions):
            lens.generate(examples, max_new_tokens=new_tokens, batch_size=len(examples), progress=False)

    return {
        "plain": lambda: lens.module.generate(ids, attention_mask=mask, **options),
        "lens.generate": generated,
        **{f"lens.generate under {name}": partial(generated, it) for name, it in masks.items()},
    }


def attention(lens: MoELens, tokens: int, *, all_rows: bool) -> dict[str, Way]:
    """Attention of one long prompt. all_rows: of all its positions too, beside all maps of eager attention."""
    examples = examples_of(lens, 1, tokens)
    inputs = inputs_of(lens, examples)

    def rows(positions: str) -> None:
        for _ in lens.records(examples, capture=("attention",), positions=positions, progress=False):
            pass

    def eager_maps() -> None:
        with eager(lens):
            bare(lens, inputs, maps=True)

    ways: dict[str, Way] = {"plain": lambda: bare(lens, inputs), "rows of the last position": lambda: rows("last")}
    return ways | ({"rows of all positions": lambda: rows("all"), "plain, eager maps": eager_maps} if all_rows else {})


@contextmanager
def eager(lens: MoELens) -> Iterator[None]:
    """Inside the block the model attends by the implementation that gives maps."""
    before = lens.module.config._attn_implementation
    lens.module.set_attn_implementation("eager")
    try:
        yield
    finally:
        lens.module.set_attn_implementation(before)


def statistics(lens: MoELens, examples: list[Example], batch_size: int) -> dict[str, Way]:
    """Each statistic over the examples, beside plain passes over the same batches."""
    batches = [inputs_of(lens, examples[start : start + batch_size]) for start in range(0, len(examples), batch_size)]
    kinds = (ExpertUsage, RouterLoad, CoActivation, RoutingVectors, AttentionMass, ExpertSaliency)
    made = {kind.__name__: kind for kind in kinds}
    made["AnswerProbability"] = lambda: AnswerProbability(lens.project_on_vocab)

    def measured(make: Callable[[], object]) -> None:
        [statistic] = lens.measure(examples, make(), batch_size=batch_size, progress=False)
        statistic.table()

    return {
        "plain": lambda: [bare(lens, inputs) for inputs in batches],
        **{name: partial(measured, make) for name, make in made.items()},
    }


def sweep(lens: MoELens, examples: list[Example]) -> dict[str, Way]:
    """Every expert's own effect, beside as many plain passes over the same batch."""
    inputs = inputs_of(lens, examples, with_answer=True)
    count = 1 + len(lens.architecture.moe_layers) * lens.architecture.n_experts
    return {
        f"plain, {count} passes": lambda: [bare(lens, inputs) for _ in range(count)],
        "single_expert_effects": lambda: single_expert_effects(
            lens, examples, batch_size=len(examples), progress=False
        ),
    }
