"""Table 8: accuracy by a judge beside EM and F1, of full fine-tuning, ESFT and CEFT.

    MOE_LENS_JUDGE=http://HOST:PORT/v1 MOE_LENS_JUDGE_MODEL=NAME python analyses/table8_judge.py --out runs/paper

The judge is any server that speaks the OpenAI chat protocol (the paper asks Qwen3-32B); its key, if it wants one, is
OPENAI_API_KEY. Its verdicts are kept in OUT/table8/judge.
"""

import os

import pandas as pd
from table9_summaries import ceft, scores

from moe_lens.causal.judge import Judge
from moe_lens.choosing.scores import SCORES
from moe_lens.choosing.selection import Top
from moe_lens.errors import MoELensError
from moe_lens.paper.recipes import FFT, experts
from moe_lens.paper.script import run
from moe_lens.paper.study import Study

URL, NAME = (os.environ.get(name) for name in ("MOE_LENS_JUDGE", "MOE_LENS_JUDGE_MODEL"))


def compute(study: Study) -> pd.DataFrame:
    """The columns of `table9_summaries.scores`; missing counts the answers that got no verdict."""
    if not (URL and NAME):
        raise MoELensError("table 8 asks a judge: set MOE_LENS_JUDGE (a URL with its /v1) and MOE_LENS_JUDGE_MODEL")
    judge = Judge(NAME, URL, cache=study.out / "table8" / "judge")
    esft = experts("ESFT", Top(SCORES["esft-gate"], study.architecture.top_k))
    return scores(study, (FFT, esft, ceft(study)), ["acc_llm", "em", "f1"], judge=judge)


if __name__ == "__main__":
    facts = {"judge": NAME}
    run(compute, item="table8", table="metrics", tasks="swap", facts=facts, about=__doc__)
