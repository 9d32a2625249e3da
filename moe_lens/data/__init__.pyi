from .encoding import Batch as Batch, Encoded as Encoded, collate as collate, encode as encode
from .example import Example as Example
from .fitting import Fitted as Fitted, fit_length as fit_length
from .ingest import Loaded as Loaded, load_examples as load_examples, read_examples as read_examples
from .prompts import FIGURE_10 as FIGURE_10, TEMPLATES as TEMPLATES, Prompt as Prompt, PromptTemplate as PromptTemplate, template_named as template_named
from .rows import parse_columns as parse_columns
