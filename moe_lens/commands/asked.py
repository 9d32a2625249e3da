"""What a training command asks for: which options go together, and the method and experts that they name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_lens.choosing.selection import check_experts, choose_experts, score_of
from moe_lens.commands.stage import Stage
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.organism import planted_experts
from moe_lens.tuning.low_rank import TuneLowRank, check_low_rank
from moe_lens.tuning.methods import Method, TuneAll, TuneExperts, TuneRouters

METHODS = ("router", "ceft", "esft", "fft")
ESFT_DEFAULT = "esft-token:p=0.2"


@dataclass(frozen=True)
class Asked:
    """What is to be trained, as the options say it; MoELensError for those that do not go together."""

    method: str
    experts: str | None
    layers: tuple[int, ...] | None
    router_delta: Path | None
    router_rate: str | None
    lora_rank: int | None
    lora_alpha: float | None
    seed: int

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise MoELensError(f"--method must be one of {', '.join(METHODS)}; got {self.method!r}")
        if self.method not in ("ceft", "esft"):
            if any(given is not None for given in (self.experts, self.router_delta, self.router_rate)):
                raise MoELensError(
                    f"--experts, --router-delta and --router-rate are for ceft and esft; --method is {self.method}"
                )
        elif self.router_delta is not None or self.router_rate is not None:
            self._check_routers()
        if self.layers is not None and self.method == "fft":
            raise MoELensError("--layers is for router, ceft and esft; fft trains everything")
        if self.lora_rank is not None and self.method == "fft":
            raise MoELensError("--lora-rank is for router, ceft and esft, which say what it is put on; --method is fft")
        if self.lora_alpha is not None and self.lora_rank is None:
            raise MoELensError("--lora-alpha scales the product of --lora-rank; give that too")
        if self.lora_rank is not None:
            check_low_rank(self.lora_rank, self.lora_alpha)

    def _check_routers(self) -> None:
        """Options for tuned routers need experts that are chosen with such, and one of them leaves the other no use."""
        named = self.experts or ("ce" if self.method == "ceft" else ESFT_DEFAULT)
        score = score_of(named)
        if score is None or not score.needs_tuned:
            raise MoELensError(
                f"{named} needs no tuned routers; leave --router-delta and --router-rate out, or name experts by a "
                "score of the tuned model, such as --experts ce:4"
            )
        if self.router_delta is not None and self.router_rate is not None:
            raise MoELensError(
                f"{self.router_delta} has the routers tuned; leave --router-rate out, or --router-delta to tune them"
            )

    def of(self, stage: Stage, out: Path, router_rates: Sequence[float]) -> Method:
        """The method, once its experts are chosen; routers are tuned for that, at these rates, where a score asks."""
        if self.method == "router":
            method: Method = TuneRouters(self.layers)
        elif self.method == "fft":
            method = TuneAll()
        else:
            method = TuneExperts(self._chosen(stage, out, router_rates), name=self.method)
        return method if self.lora_rank is None else TuneLowRank(method, self.lora_rank, self.lora_alpha, self.seed)

    def _chosen(self, stage: Stage, out: Path, router_rates: Sequence[float]) -> ExpertSet:
        architecture = stage.lens.architecture
        named = self.experts or (f"ce:{architecture.top_k}" if self.method == "ceft" else ESFT_DEFAULT)
        check_experts(named, n_experts=architecture.n_experts)
        for layer in self.layers or ():
            architecture.at(layer)
        score = score_of(named)
        return choose_experts(
            named,
            table=None if score is None else stage.scores(score, out, router_rates, self.router_delta),
            planted=lambda: planted_experts(stage.model),
            moe_layers=architecture.moe_layers,
            n_experts=architecture.n_experts,
            seed=self.seed,
            layers=self.layers,
        )
