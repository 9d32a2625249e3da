"""What a record says of one prompt, token by token, as tidy tables that views are drawn from."""

from typing import TYPE_CHECKING

import pandas as pd

from moe_lens.errors import MoELensError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moe_lens.lens.record import Record


def experts_of_tokens(record: "Record", tokenizer: "PreTrainedTokenizerBase", *, row: int = 0) -> pd.DataFrame:
    """One row per token, layer and expert it takes, of one prompt of a record.

    Columns: position (from the prompt's first token, pads left out), token (its text), part ("context", "question",
    "answer" inside the context, or ""), layer, n_experts (of that layer), rank (0 for the largest weight), expert,
    weight (the gating weight as the experts used it, after interventions).
    Raises MoELensError for a record without routing.
    """
    if not record.routing:
        raise MoELensError('the record holds no routing; ask for it with capture=("routing",)')
    tokens = _tokens(record, tokenizer, row)
    tables = []
    for layer, routing in record.routing.items():
        weights, order = routing.weights[row].float().sort(-1, descending=True)
        indices = routing.indices[row].gather(-1, order)
        start, k = indices.shape[0] - len(tokens), indices.shape[1]
        table = tokens.loc[tokens.index.repeat(k)].assign(
            layer=layer,
            n_experts=routing.n_experts,
            rank=list(range(k)) * len(tokens),
            expert=indices[start:].flatten().tolist(),
            weight=weights[start:].flatten().tolist(),
        )
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def attention_of_tokens(record: "Record", tokenizer: "PreTrainedTokenizerBase", *, row: int = 0) -> pd.DataFrame:
    """One row per layer and token: how much the prompt's last token attends to it, of one prompt of a record.

    Columns: position, token, part (as in `experts_of_tokens`), layer, attention (mean over heads, Eq. 9).
    Raises MoELensError for a record without attention or without the prompt's last position, and for attention to more
    than positions.
    """
    if not record.attention_rows:
        raise MoELensError('the record holds no attention; ask for it with capture=("attention",)')
    tokens = _tokens(record, tokenizer, row)
    place = int(record.kept_rows((0,))[0][row, 0])
    return pd.concat(
        [
            tokens.assign(layer=layer, attention=rows[row, :, place].float().mean(0)[-len(tokens) :].tolist())
            for layer, rows in record.attention_to_positions().items()
        ],
        ignore_index=True,
    )


def token_texts(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The text of each token as it stands in the whole, spaces included; never empty.

    Of a character that several tokens spell, the last has the character and those before it have the replacement
    character (U+FFFD). A token without text is given by its name.
    """
    texts, start, done = [], 0, 0  # tokens before `done` are spelt out; decoding begins one piece earlier, at `start`
    for place, token in enumerate(ids):
        before, now = (str(tokenizer.decode(ids[start:end])) for end in (done, place + 1))
        if now.endswith("\N{REPLACEMENT CHARACTER}"):
            texts.append("\N{REPLACEMENT CHARACTER}")
            continue
        texts.append(now[len(before) :] or str(tokenizer.convert_ids_to_tokens(token)))
        start, done = done, place + 1
    return texts


def _tokens(record: "Record", tokenizer: "PreTrainedTokenizerBase", row: int) -> pd.DataFrame:
    """The columns position, token and part of one row of the record, without its pads."""
    ids = record.input_ids[row, record.attention_mask[row].bool()].tolist()
    pads = record.input_ids.shape[1] - len(ids)
    parts = [""] * len(ids)
    spans = [("context", record.context_spans[row]), ("question", record.question_spans[row])]
    for part, span in [*spans, *(("answer", span) for span in record.answer_spans[row])]:
        if span is not None:
            for position in range(span.start - pads, span.stop - pads):
                parts[position] = part
    return pd.DataFrame({"position": range(len(ids)), "token": token_texts(ids, tokenizer), "part": parts})
