"""What a dense model or a split one answers, in sentences, without a lens: the same for both."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from moe_lens.data import Example, collate, encode
from moe_lens.lens.taken import pad_id
from moe_lens.metrics import metrics_named
from moe_lens.progress import progress_bar

METRICS = ("em", "f1", "contains")


@torch.no_grad()
def plain_answers(
    model: Any, tokenizer: Any, examples: Sequence[Example], *, max_new_tokens: int, batch_size: int
) -> pd.DataFrame:
    """One row per example: id, prediction, and METRICS; `model` is one of transformers', dense or not."""
    rows, pad = [], pad_id(model, tokenizer)
    for start in progress_bar(range(0, len(examples), batch_size), desc="answering", unit="batch"):
        asked = examples[start : start + batch_size]
        batch = collate([encode(example, tokenizer) for example in asked], pad)
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "pad_token_id": pad}
        said = model.generate(**given, do_sample=False, max_new_tokens=max_new_tokens)[:, batch.input_ids.shape[1] :]
        texts = tokenizer.batch_decode(said, skip_special_tokens=True)
        rows += [{"id": example.id, "prediction": text.strip()} for example, text in zip(asked, texts, strict=True)]
    told = [[metric.score(row["prediction"], example) for metric in metrics_named(METRICS)]
            for row, example in zip(rows, examples, strict=True)]  # fmt: skip
    return pd.concat([pd.DataFrame(rows), pd.DataFrame(told, columns=list(METRICS))], axis=1)
