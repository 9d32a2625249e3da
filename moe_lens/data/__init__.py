"""From files and data sets to examples, and from examples to tokens with context and answer spans."""

from moe_lens.data.encoding import Batch, Encoded, collate, encode
from moe_lens.data.example import Example
from moe_lens.data.fitting import Fitted, fit
from moe_lens.data.ingest import Loaded, load_examples, read_examples
from moe_lens.data.prompts import FIGURE_10, TEMPLATES, Prompt, PromptTemplate, template_named
from moe_lens.data.rows import parse_columns

__all__ = [
    "FIGURE_10",
    "TEMPLATES",
    "Batch",
    "Encoded",
    "Example",
    "Fitted",
    "Loaded",
    "Prompt",
    "PromptTemplate",
    "collate",
    "encode",
    "fit",
    "load_examples",
    "parse_columns",
    "read_examples",
    "template_named",
]
