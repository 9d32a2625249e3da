from .masking import Masked as Masked, mask as mask, random_controls as random_controls, write_masked as write_masked
from .measuring import Models as Models, score_tables as score_tables
from .planted import has_planted as has_planted, planted_experts as planted_experts
from .scores import SCORES as SCORES, Score as Score
from .selection import Choice as Choice, Given as Given, Ground as Ground, Planted as Planted, Random as Random, Selection as Selection, Share as Share, Top as Top, choices as choices, parse as parse
