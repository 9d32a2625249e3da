"""A page of a run from the command line: `python -m moe_lens.report --help`."""

from moe_lens.commands.console import run
from moe_lens.report.page import main

run(main)
