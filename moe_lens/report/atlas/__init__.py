"""The atlas of a model's experts: tables of one model, and of runs with it, as a site that opens from the disk."""

from moe_lens.report.atlas.offline_site import write_atlas
from moe_lens.report.atlas.run_numbers import RunNumbers, read_run, read_runs

__all__ = ["RunNumbers", "read_run", "read_runs", "write_atlas"]
