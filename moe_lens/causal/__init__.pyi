from .evaluation import Evaluation as Evaluation
from .evaluation import answer_table as answer_table
from .evaluation import evaluate as evaluate
from .evaluation import summarise as summarise
from .evaluation import summary_table as summary_table
from .judge import Judge as Judge
from .judge import Verdict as Verdict
from .sweep import single_expert_effects as single_expert_effects
