"""Views of prompts as interactive pages: which experts each token takes, where attention goes, what answers rest on."""

from moe_lens.report.document import View
from moe_lens.report.views.attention_of_prompt import attention_view
from moe_lens.report.views.citations_of_answer import citations_view
from moe_lens.report.views.routing_of_prompt import routing_view, show
from moe_lens.report.views.tokens import attention_of_tokens, experts_of_tokens, token_texts

__all__ = [
    "View",
    "attention_of_tokens",
    "attention_view",
    "citations_view",
    "experts_of_tokens",
    "routing_view",
    "show",
    "token_texts",
]
