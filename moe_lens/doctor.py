"""What was found in a model, and whether it is read and masked right: `python -m moe_lens.doctor --help`."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated

from typer import Exit, Option

from moe_lens.commands import console, options
from moe_lens.errors import MoELensError


def main(
    opening: options.Opening = options.Opening(""),
    families: Annotated[
        bool, Option("--families", help="Instead of a model, tiny ones of all families of the installed transformers.")
    ] = False,
    checks: Annotated[
        str | None,
        Option(
            help="With commas, of capture, weights_rule, zero, renormalize, reroute, bias, scale, force, top_k, "
            "replay, route_as, patch, generate, attention, expert_outputs, logit_lens; default all."
        ),
    ] = None,
    text: Annotated[
        list[str] | None, Option(help="A text to check on. May be given several times; by default some short texts.")
    ] = None,
    config_only: Annotated[
        bool, Option("--config-only", help="Only say what is found, from the configuration, without weights.")
    ] = False,
    plan: Annotated[
        str | None,
        Option(
            help="Instead of all that, say what a model will take: weights, captures, operations, devices; from its "
            "configuration alone, a folder, a config.json, a hub id, or one of the package's "
            "(moe_lens/architecture/published)."
        ),
    ] = None,
    work: Annotated[str, Option(help="With --plan: EXAMPLESxTOKENSxBATCH that is measured on.")] = "1000x512x8",
    as_json: Annotated[bool, Option("--json", help="Print JSON instead of tables.")] = False,
    markdown: Annotated[Path | None, Option(help="With --families: write the page MODELS.md to this file.")] = None,
) -> None:
    """Say what is found in a model, and check that what is recorded and masked is right.

    Each check compares with the bare model under plain torch hooks or changed weights. For example:

    \b
        python -m moe_lens.doctor --model organism
        python -m moe_lens.doctor --model FOLDER_OR_HUB_ID --config-only
        python -m moe_lens.doctor --families
        python -m moe_lens.doctor --plan FOLDER_OR_HUB_ID --work 1000x512x8

    Before any check it is seen whether the model's numbers are finite, and if not, where they stop being so. The exit
    code is 1 if a check fails, 2 if the model cannot be read or its numbers are not finite. A refusal is no failure:
    it says why something cannot be done exactly with this model.
    """
    if plan is not None:
        from moe_lens.commands.size_plan import parse_work
        from moe_lens.commands.size_plan import plan as show_plan

        if families or opening.model or checks or text or config_only or markdown:
            raise MoELensError("--plan reads a configuration and checks nothing; give it alone, with --work, --dtype")
        remote = opening.trust_remote_code
        show_plan(plan, parse_work(work), dtype=opening.dtype, trust_remote_code=remote, as_json=as_json)
        return
    if families == bool(opening.model):
        raise MoELensError("expected either --model or --families, or --plan alone")
    if markdown and (not families or checks):
        raise MoELensError("--markdown needs --families, with all checks")
    of_a_model = [f"--{field.name.replace('_', '-')}" for field in fields(opening) if getattr(opening, field.name)]
    of_a_model += ["--text"] * bool(text) + ["--config-only"] * config_only
    if families and of_a_model:
        raise MoELensError(f"{', '.join(of_a_model)} needs --model; --families has its own models and texts")

    from moe_lens.checks.suite import PROMPTS, checks_named
    from moe_lens.commands.examining import examine, examine_families

    names = checks_named(None if checks is None else checks.split(","))
    if families:
        table = examine_families(names, as_json=as_json, markdown=markdown)
    else:
        table = examine(opening, tuple(text or PROMPTS), names, config_only=config_only, as_json=as_json)
    if (table["outcome"] == "failed").any():
        raise Exit(1)


if __name__ == "__main__":
    console.run(main)
