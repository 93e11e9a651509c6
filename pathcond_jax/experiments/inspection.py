"""``pathcond inspect``: a user's own network, what may be rescaled, what conditioning does."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

import pathcond_jax as pathcond
from pathcond_jax import plotting
from pathcond_jax.experiments.doors import Network, UserError, in_their_file, opened


class Findings(NamedTuple):
    """What there is to say of a network.

    Attributes:
      sections: title and text of each.
      figure: the Gram diagonal before and after; None where there is none.
    """

    sections: Sequence[tuple[str, str]]
    figure: Figure | None


def main(
    target: str,
    picture: Path | None = None,
    page: Path | None = None,
    checkpoint: Path | None = None,
    console: Console | None = None,
) -> int:
    """Inspects the network that a user's function returns.

    Args:
      target: ``FILE:FACTORY``, a Python file and a function in it without arguments that returns
        ``apply_fn, params, example_input`` (or more inputs, for ``apply_fn(params, *inputs)``), or
        a Flax, Equinox or Keras module and its inputs.
      picture: where to write the Gram diagonal before and after, as the suffix says.
      page: where to write all of it as one HTML file.
      checkpoint: a folder written by Orbax, whose parameters take the place of those returned.
      console: where to print.

    Returns:
      The exit status: 0, or 1 after an error has been shown.
    """
    console = console or Console()
    try:
        findings = inspect(opened(target, checkpoint))
    except (UserError, pathcond.SpecError) as error:
        message = f"{target}: {error}"
        console.print(message, style="red", highlight=False, markup=False, soft_wrap=True)
        return 1
    except Exception as error:
        console.print(in_their_file(error, target), highlight=False, markup=False, soft_wrap=True)
        return 1
    text = "\n\n".join(text for _, text in findings.sections)
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    if page is not None:
        page.write_text(as_page(target, findings), encoding="utf-8")
    if picture is not None and findings.figure is not None:
        findings.figure.savefig(picture, dpi=150)
    elif picture is not None:
        console.print(f"\nNo {picture}: this network has no Gram diagonal", soft_wrap=True)
    for written in (page, picture if findings.figure is not None else None):
        if written is not None:
            console.print(f"\nWrote {written}", highlight=False, soft_wrap=True)
    return 0


def inspect(found: Network) -> Findings:
    """What may be rescaled in a network, what is dead in it, and what each criterion would do."""
    params, spec = found.params, found.spec
    if not spec.groups:
        nothing = "No neuron can be rescaled: conditioning would do nothing."
        return Findings([("Spec", str(spec)), ("Conditioning", nothing)], None)
    lines = []
    try:
        conditioned, solution = pathcond.condition(params, spec)
    except pathcond.NotPathLiftableError as error:
        lines += [f"{error}", "", "Here is what that would do:"]
        _, solution = pathcond.condition(params, spec, "enorm")
        score, figure = "none: the network is no sum over paths", None
    else:
        before, after = (float(pathcond.conditioning_score(p, spec)) for p in (params, conditioned))
        score = f"{before:.4g} → {after:.4g}   (0: all entries equal)"
        figure = plotting.plot_gram(params, spec, conditioned)
    status = pathcond.Status(int(solution.status))
    change = pathcond.check_spec(spec, params, *found.inputs)
    lines += [
        f"conditioning score      {score}",
        f"solver                  {int(solution.num_steps)} steps, {status.name}",
        f"output under random λ   changes by {change:.1e} of its largest entry",
        "log-scales by group     smallest … largest",
    ]
    width = max(len(group.name) for group in spec.groups)
    for group, z in zip(spec.groups, solution.log_scales, strict=True):
        values = np.asarray(z, np.float64)
        lines.append(f"  {group.name:<{width}}  {values.min():+.3f} … {values.max():+.3f}")
    sections = [
        ("Spec", str(spec)),
        ("Conditioning", "\n".join(lines)),
        ("Dead neurons", dead_neurons(params, spec)),
        ("Criteria side by side", str(pathcond.report(params, spec))),
    ]
    return Findings(sections, figure)


_SIDES = (("incoming", "nothing enters"), ("outgoing", "nothing leaves"))
_MOST_NAMED = 8


def dead_neurons(params: Any, spec: pathcond.ArchSpec) -> str:
    """Names the neurons all of whose incoming, or all of whose outgoing, entries are 0."""
    leaves = zip(spec.leaves, jax.tree.leaves(params), strict=True)
    values = {leaf.path: value for leaf, value in leaves}
    lines = []
    for group in spec.groups:
        for side, words in _SIDES:
            alive = np.zeros(group.size, bool)
            for incidence in getattr(group, side):
                present = np.asarray(values[incidence.path]) != 0
                first = np.moveaxis(present, incidence.axes, range(len(incidence.axes)))
                slices = first.reshape(*incidence.index.shape, -1).any(axis=-1)
                alive[incidence.index[slices & (incidence.index >= 0)]] = True
            dead = np.flatnonzero(~alive)
            if dead.size:
                named = ", ".join(map(str, dead[:_MOST_NAMED]))
                more = ", …" if dead.size > _MOST_NAMED else ""
                lines.append(f"  {group.name}: {words} {dead.size} of {group.size}: {named}{more}")
    return "\n".join(["dead neurons", *lines]) if lines else "dead neurons            none"


def as_page(title: str, findings: Findings) -> str:
    """The findings as one HTML file that needs nothing else."""
    parts = [
        f"<h2>{html.escape(name)}</h2><pre>{html.escape(text)}</pre>"
        for name, text in findings.sections
    ]
    if findings.figure is not None:
        buffer = io.BytesIO()
        findings.figure.savefig(buffer, format="png", dpi=120)
        picture = base64.b64encode(buffer.getvalue()).decode()
        alt = "The Gram diagonal of each parameter, before and after conditioning"
        parts.append(
            f'<h2>Gram diagonal</h2><img alt="{alt}" src="data:image/png;base64,{picture}">'
        )
    return _PAGE.format(title=html.escape(title), body="\n".join(parts))


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font-family: sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; }}
pre {{ background: #f4f4f4; overflow-x: auto; padding: 1em; }}
img {{ background: white; max-width: 100%; }}
@media (prefers-color-scheme: dark) {{
  body {{ background: #1c1c1c; color: #ddd; }}
  pre {{ background: #2a2a2a; }}
}}
</style>
<h1>{title}</h1>
{body}
</html>
"""
