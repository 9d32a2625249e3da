"""AddVector and ProjectOut: directions are added to, or taken out of, the residual stream or what experts put out."""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moe_lens.architecture import MoEArchitecture
from moe_lens.errors import MoELensError
from moe_lens.lens.interventions.layer_values import Site
from moe_lens.lens.interventions.place import Here
from moe_lens.lens.interventions.protocol import Placed


@dataclass(frozen=True, eq=False, repr=False)
class OnActivations(Placed):
    """An intervention on the values of a layer at one of `SITES`.

    what: "residual", "moe_output", "shared_output", "expert_outputs" or "router_input".
    """

    what: str = field(default="residual", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        Site(self.what)

    @property
    def sites(self) -> tuple[Site, ...]:
        return (Site(self.what),)


@dataclass(frozen=True, eq=False, repr=False)
class AddVector(OnActivations):
    """Adds `scale` times a vector [d_model] to the values of one layer; a scale of 0 changes nothing.

    With a difference of means, such as of prompts with and without their context, this is contrastive activation
    addition.
    """

    layer: int
    vector: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.layers not in (None, (self.layer,)):
            raise MoELensError("AddVector names its layer first; leave layers= out")
        if self.vector.ndim != 1 or not self.vector.isfinite().all() or not math.isfinite(self.scale):
            raise MoELensError(
                f"expected a finite vector [d_model] and a finite scale; got {list(self.vector.shape)}, {self.scale}"
            )
        object.__setattr__(self, "layers", (self.layer,))
        object.__setattr__(self, "scale", float(self.scale))
        super().__post_init__()

    def changed(self, site: Site, here: Here, values: Tensor) -> Tensor:
        added = here.once((id(self), "vector"), lambda: (self.scale * self.vector.detach()).to(values))
        return values + added

    def scaled(self, factor: float) -> "AddVector":
        return replace(self, scale=factor * self.scale)

    def check(self, architecture: MoEArchitecture) -> None:
        super().check(architecture)
        expect_width(self.vector, architecture)


@dataclass(frozen=True, eq=False, repr=False)
class ProjectOut(OnActivations):
    """Takes directions [n, d_model], or one [d_model], out of the values: x - sum_j (x . u_j) u_j.

    u_j: an orthonormal basis of the directions.
    """

    directions: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        rows = self.directions if self.directions.ndim == 2 else self.directions[None]
        if rows.ndim != 2 or not rows.isfinite().all() or torch.linalg.matrix_rank(rows.float()) < len(rows):
            raise MoELensError(
                f"expected finite, linearly independent directions [n, d_model]; got {list(self.directions.shape)}"
            )

    def changed(self, site: Site, here: Here, values: Tensor) -> Tensor:
        basis = here.once((id(self), "basis"), lambda: self._basis().to(values))  # [d_model, n]
        return values - (values @ basis) @ basis.T

    def _basis(self) -> Tensor:
        rows = self.directions if self.directions.ndim == 2 else self.directions[None]
        orthonormal: Tensor = torch.linalg.qr(rows.detach().cpu().double().T).Q
        return orthonormal

    def check(self, architecture: MoEArchitecture) -> None:
        super().check(architecture)
        expect_width(self.directions, architecture)


def expect_width(vectors: Tensor, architecture: MoEArchitecture) -> None:
    """MoELensError unless the vectors [..., d_model] are as wide as the model."""
    if vectors.shape[-1] != architecture.d_model:
        raise MoELensError(f"expected vectors of d_model {architecture.d_model}; got {list(vectors.shape)}")
