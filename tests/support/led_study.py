"""Run by torchrun, or alone: a study whose experts are chosen by a score of tuned routers, trained and answering."""

import sys
from pathlib import Path

from moe_lens.choosing.selection import parse_one
from moe_lens.commands.options import BaseOpening, Reading
from moe_lens.lens.parallel import lead
from moe_lens.paper.recipes import experts
from moe_lens.paper.script import RATES
from moe_lens.paper.study import Study
from moe_lens.tuning import Schedule

STUDY = Study(
    opening=BaseOpening("organism"),
    reading=Reading(),
    tasks=("swap",),
    out=Path(sys.argv[1]) / "led",
    limit=5,
    test_limit=None,
    schedule=Schedule(epochs=1),
    rates=dict.fromkeys(RATES, (1e-2,)),
    more_seeds=(),
    max_new_tokens=4,
    batch_size=2,
)

if __name__ == "__main__":
    lead(lambda: STUDY.answers("swap", STUDY.trained("swap", experts("CEFT", parse_one("ce:2")))))
