from .evaluation import Evaluation as Evaluation, answer_table as answer_table, evaluate as evaluate, summarise as summarise, summary_table as summary_table
from .judge import Judge as Judge, Verdict as Verdict
from .sweep import single_expert_effects as single_expert_effects
