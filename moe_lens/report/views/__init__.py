"""Views of one prompt as interactive pages: which experts each token takes, and where attention goes."""

from moe_lens.report.document import View
from moe_lens.report.views.attention_of_prompt import attention_view
from moe_lens.report.views.routing_of_prompt import routing_view, show
from moe_lens.report.views.tokens import attention_of_tokens, experts_of_tokens, token_texts

__all__ = ["View", "attention_of_tokens", "attention_view", "experts_of_tokens", "routing_view", "show", "token_texts"]
