"""Whether a small program, such as one that an operation runs at each entry, keeps a scale."""

from pathcond_jax._program.graph import Graph
from pathcond_jax._symmetry.equations import Term
from pathcond_jax._symmetry.values import Analysis, Scale


def keeps_scale(analysis: Analysis, program: Graph, scaled: int) -> bool:
    """Whether all results of a program of scalars are multiplied by λ if its inputs are.

    The program is analysed between labels of its own, which are taken back: its first inputs share
    one log-scale, and each result must have exactly this, without anything demanded of it.

    Args:
      analysis: the analysis under way.
      program: takes and returns scalars.
      scaled: how many of its inputs, the first ones, are multiplied; the others stay.
    """
    mark = analysis.mark()
    label = Term(1.0, analysis.equations.new(()))
    before = analysis.equations.mark()
    arguments = [Scale((label,), True)] * scaled
    arguments += [Scale((), True)] * (len(program.inputs) - scaled)
    found = analysis.run(program, arguments)
    kept = analysis.equations.mark() == before and all(
        len(scale.terms) == 1
        and scale.terms[0].coefficient == 1.0
        and scale.terms[0].labels == label.labels
        for scale in found
    )
    analysis.forget(mark)
    return kept
