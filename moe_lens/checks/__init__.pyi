from .each import CHECKS as CHECKS
from .each import Finding as Finding
from .suite import PROMPTS as PROMPTS
from .suite import run_checks as run_checks
