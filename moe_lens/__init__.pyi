__version__: str
from .lens.lens import MoELens as MoELens
from .data.ingest import load_examples as load_examples
from .data.example import Example as Example
from .data.prompts import PromptTemplate as PromptTemplate
from .experts import ExpertSet as ExpertSet
from .lens.interventions import Zero as Zero, Renormalize as Renormalize, Reroute as Reroute, Rows as Rows, Intervention as Intervention
from .statistics.usage import ExpertUsage as ExpertUsage
from .statistics.expert_outputs import ExpertSaliency as ExpertSaliency
from .statistics.router_load import RouterLoad as RouterLoad
from .statistics.coactivation import CoActivation as CoActivation
from .statistics.vectors import RoutingVectors as RoutingVectors
from .statistics.attention_mass import AttentionMass as AttentionMass
from .statistics.answer_probability import AnswerProbability as AnswerProbability
from .lens.needs import Statistic as Statistic
from .metrics.gains import attention_gain as attention_gain, answer_probability_gain as answer_probability_gain
from .choosing.scores import SCORES as SCORES
from .lens.record import Record as Record
from .routing import Routing as Routing
from .architecture.discovery import MoEArchitecture as MoEArchitecture
from .lens.attention import attention_rows as attention_rows
from .lens.delta import apply_delta as apply_delta, save_delta as save_delta
from .errors import MoELensError as MoELensError
