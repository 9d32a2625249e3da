from .page import build_report as build_report
from .views.attention_of_prompt import attention_view as attention_view
from .views.citations_of_answer import citations_view as citations_view
from .views.routing_of_prompt import routing_view as routing_view
from .views.routing_of_prompt import show as show
from .views.tokens import attention_of_tokens as attention_of_tokens
from .views.tokens import experts_of_tokens as experts_of_tokens
