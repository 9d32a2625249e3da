from .answer_probability import AnswerProbability as AnswerProbability
from .attention_mass import AttentionMass as AttentionMass, average_heads as average_heads
from .coactivation import CoActivation as CoActivation
from .expert_outputs import ExpertSaliency as ExpertSaliency, ExpertVocabulary as ExpertVocabulary, OutputSimilarity as OutputSimilarity
from .router_load import RouterLoad as RouterLoad
from .selected_experts import SelectedExperts as SelectedExperts
from .usage import ExpertUsage as ExpertUsage
from .vectors import RoutingVectors as RoutingVectors
from .vocabulary import VocabularySpecialisation as VocabularySpecialisation
from .weights import weight_similarity as weight_similarity
