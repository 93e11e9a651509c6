"""Fuzzes the analysis with random programs: ``python tests/fuzz.py --count 1000 --seed 0``.

Each program is traced, rescaled at random and compared; path norms and Gram diagonals must follow;
the neurons found are counted against all diagonal rescalings that keep the outputs. A failing
program is shrunk and printed with the line that makes it again.
"""

import argparse
import dataclasses
import pathlib
import sys
import time
import traceback
import warnings
from collections import Counter

import jax
import jax.extend.core.primitives
import numpy as np
from fuzzing import checks, evaluation
from fuzzing.dimensions import Dimensions, count_dimensions
from fuzzing.operations import UNUSUAL
from fuzzing.programs import Program, random_recipe
from fuzzing.subject import Subject

import pathcond_jax as pathcond

# Linux allows a process 65530 memory maps, of which each compiled program holds a few.
_MOST_MAPS, _PROGRAMS_BETWEEN = 30_000, 50
_MAX_SHRINKS, _MAX_EXAMPLES = 200, 24


@dataclasses.dataclass(frozen=True)
class Rates:
    """How many of the programs go through the checks that cost more."""

    lifting: float = 0.25
    thorough: float = 0.01
    dimensions: float = 0.25


@dataclasses.dataclass
class Outcome:
    """What became of one program.

    Attributes:
      failure: a ``Failure``, or None.
      dimensions: as counted, or None.
      neurons: how many the spec has.
      steps: the names of the steps that apply.
      primitives: the names of the program's primitives.
      refused: whether ``trace_spec`` explained why it has no spec.
      seconds: spent, by check.
    """

    failure: checks.Failure | None = None
    dimensions: Dimensions | None = None
    neurons: int = 0
    steps: tuple[str, ...] = ()
    primitives: frozenset[str] = frozenset()
    refused: bool = False
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


def examine(recipe, seed, rates=None):
    """Runs all checks on one program."""
    rates = rates or Rates()
    rng = np.random.default_rng(seed)
    outcome = Outcome()
    chosen = rng.random(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, check in (
            ("trace", lambda: _traced(recipe, outcome)),
            ("symmetries", lambda: checks.check_symmetries(outcome.subject, rng)),
            (
                "lifting",
                lambda: (
                    checks.check_lifting(outcome.subject, rng, chosen[1] < rates.thorough)
                    if chosen[0] < rates.lifting
                    else None
                ),
            ),
            (
                "dimensions",
                lambda: _counted(outcome, rng) if chosen[2] < rates.dimensions else None,
            ),
        ):
            start = time.perf_counter()
            try:
                outcome.failure = check()
            except Exception as error:
                outcome.failure = _foreign(name, error)
            outcome.seconds[name] = time.perf_counter() - start
            if outcome.failure is not None or outcome.refused:
                break
    return outcome


def _traced(recipe, outcome):
    program = Program(recipe)
    outcome.subject = None
    outcome.refused = True
    outcome.steps = tuple(program.steps)
    if not program.fits():
        return
    outcome.primitives = frozenset(evaluation.primitives_of(program.jaxpr()))
    try:
        outcome.subject = Subject(program)
    except pathcond.SpecError:
        return
    outcome.refused = False
    outcome.neurons = outcome.subject.spec.num_neurons
    if outcome.subject.warnings:
        first = outcome.subject.warnings[0]
        return checks.Failure(f"rule failed: {first.split()[0]}", first[:300])


def _counted(outcome, rng):
    outcome.dimensions = count_dimensions(outcome.subject, rng)


def _foreign(name, error):
    """An exception that is not the library's own, and where it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if "pathcond_jax" in f.filename]
    place = inside[-1] if inside else frames[-1]
    where = f"{pathlib.Path(place.filename).name}:{place.lineno}"
    kind = "exception" if inside else "fuzzer's exception"
    message = " ".join(str(error).split())[:160]
    return checks.Failure(f"{kind}: {type(error).__name__} in {name} at {where}", message)


def smaller(recipe):
    """The recipes with one step less, inner steps included."""
    steps = recipe.steps
    for k, step in enumerate(steps):
        yield recipe._replace(steps=steps[:k] + steps[k + 1 :])
        for j in range(len(step.inner)):
            inner = step.inner[:j] + step.inner[j + 1 :]
            yield recipe._replace(steps=(*steps[:k], step._replace(inner=inner), *steps[k + 1 :]))
    if recipe.share:
        yield recipe._replace(share=0)
    if recipe.outputs > 1:
        yield recipe._replace(outputs=1)
    for k, step in enumerate(steps):
        if step.back[0]:
            plain = step._replace(back=(0, step.back[1]))
            yield recipe._replace(steps=(*steps[:k], plain, *steps[k + 1 :]))


def shrunk(recipe, still_fails, budget=_MAX_SHRINKS):
    """The recipe after greedily dropping what the failure does not need."""
    progress = True
    while progress and budget > 0:
        progress = False
        for candidate in smaller(recipe):
            budget -= 1
            if budget <= 0:
                break
            if candidate.steps and still_fails(candidate):
                recipe, progress = candidate, True
                break
    return recipe


def fails_alike(kind, seed):
    """Whether a recipe fails in the same check."""

    def still_fails(recipe):
        outcome = examine(recipe, seed, Rates(1.0, float("paths" in kind or "lifted" in kind), 0.0))
        return outcome.failure is not None and outcome.failure.kind == kind

    return still_fails


def misses_alike(seed):
    """Whether a recipe misses neurons."""

    def still_misses(recipe):
        found = examine(recipe, seed, Rates(0.0, 0.0, 1.0)).dimensions
        return found is not None and found.missed > 0

    return still_misses


def listing(recipe, seed):
    """A program as a person reads it, and as it is made again."""
    program = Program(recipe)
    lines = [f"  program {seed}: {' -> '.join(program.steps)}", f"    {recipe!r}"]
    text = str(program.jaxpr().jaxpr)
    lines += [f"    | {line}" for line in text.splitlines()[:40]]
    return "\n".join(lines)


@dataclasses.dataclass
class Report:
    """What a run has found."""

    programs: int = 0
    refused: int = 0
    with_neurons: int = 0
    failures: dict[str, list] = dataclasses.field(default_factory=dict)
    dimensions: list = dataclasses.field(default_factory=list)
    misses: list = dataclasses.field(default_factory=list)
    steps: Counter = dataclasses.field(default_factory=Counter)
    primitives: Counter = dataclasses.field(default_factory=Counter)
    seconds: Counter = dataclasses.field(default_factory=Counter)

    def add(self, seed, recipe, outcome):
        self.programs += 1
        self.refused += outcome.refused
        self.with_neurons += outcome.neurons > 0
        self.steps.update(set(outcome.steps))
        self.primitives.update(outcome.primitives)
        self.seconds.update(outcome.seconds)
        if outcome.failure is not None:
            self.failures.setdefault(outcome.failure.kind, []).append(
                (seed, recipe, outcome.failure.detail)
            )
        if outcome.dimensions is not None:
            self.dimensions.append(outcome.dimensions)
            if outcome.dimensions.missed:
                self.misses.append((seed, recipe, outcome))

    def wrong(self):
        """The failures that change a function or a norm."""
        return {kind: v for kind, v in self.failures.items() if "exception" not in kind}

    def foreign(self):
        """The exceptions."""
        return {kind: v for kind, v in self.failures.items() if "exception" in kind}

    def completeness(self, supported):
        """Mean of found / (found + missed) over programs with something to find.

        Args:
          supported: count only programs of operations that have a rule, or no scale to pass.
        """
        ratios = [
            d.found / (d.found + d.missed)
            for d in self.dimensions
            if d.found + d.missed and (d.supported or not supported)
        ]
        return float(np.mean(ratios)) if ratios else 1.0

    def summary(self, seconds):
        """The figures."""
        total = [sum(column) for column in zip(*(d[:4] for d in self.dimensions), strict=True)]
        total = total or [0] * 4
        blamed = Counter(name for d in self.dimensions for name in d.operations)
        wrong, foreign = (sum(map(len, d.values())) for d in (self.wrong(), self.foreign()))
        parts = ", ".join(f"{name} {spent:.0f} s" for name, spent in self.seconds.items())
        rate, mean = self.programs / seconds, self.completeness(False)
        return "\n".join(
            [
                f"{self.programs} programs, {self.refused} without a spec, {self.with_neurons} "
                f"with neurons; {seconds:.0f} s, {rate:.1f} a second ({parts})",
                f"wrong: {wrong}; exceptions: {foreign}",
                f"dimensions, of {len(self.dimensions)} programs: {total[0]} found, {total[1]} "
                f"one-sided, {total[3]} local only, {total[2]} missed in {len(self.misses)} "
                f"programs; mean found/(found + missed) {mean:.4f}, of "
                f"programs of supported operations {self.completeness(True):.4f}",
                f"misses by pinning operation: {dict(blamed.most_common())}",
            ]
        )


def run(seeds, rates=None, seconds=None, progress=None):
    """Fuzzes with the given seeds."""
    report, start = Report(), time.monotonic()
    for number, seed in enumerate(seeds):
        if seconds is not None and time.monotonic() - start > seconds:
            break
        recipe = random_recipe(seed)
        outcome = examine(recipe, seed, rates)
        report.add(seed, recipe, outcome)
        if progress is not None:
            progress(seed, recipe, outcome)
        if number % _PROGRAMS_BETWEEN == 0 and evaluation.memory_maps() > _MOST_MAPS:
            evaluation.forget_compiled()
    return report


def misses_by_operation(report, most=40):
    """Which steps the programs that miss neurons are left with once they are shrunk."""
    blamed, examples = Counter(), {}
    for seed, recipe, _ in report.misses[:most]:
        small = shrunk(recipe, misses_alike(seed), 60)
        program = Program(small)
        names = [name for name in program.steps if name not in ("dense", "dense_relu", "rectified")]
        key = " + ".join(sorted(set(names))) or "layers"
        blamed[key] += 1
        length = len(program.jaxpr().eqns)
        if key not in examples or length < examples[key][0]:
            examples[key] = length, seed, small
    return blamed, examples


def unseen_primitives(report):
    """Primitives of ``jax.extend.core.primitives`` that no program had."""
    exported = vars(jax.extend.core.primitives)
    names = {getattr(exported[key], "name", "") for key in exported if key.endswith("_p")}
    return sorted(names - set(report.primitives) - {""})


def distinct(kind, found, shrink):
    """Examples of a failure that are left with different steps once they are shrunk."""
    shortest = sorted(found, key=lambda item: len(item[1].steps))
    if not shrink:
        return shortest[:1]
    kept = {}
    for seed, recipe, detail in shortest[:_MAX_EXAMPLES]:
        small = shrunk(recipe, fails_alike(kind, seed))
        unusual = tuple(sorted({step.name for step in small.steps if step.name in UNUSUAL}))
        known = kept.get(unusual)
        if known is None or len(small.steps) < len(known[1].steps):
            kept[unusual] = seed, small, detail
    return list(kept.values())


def print_report(report, seconds, shrink=True):
    """Everything a person needs to mend what was found."""
    print(report.summary(seconds))
    for kind, found in sorted(report.failures.items(), key=lambda item: -len(item[1])):
        print(f"\n{kind}: {len(found)} programs, such as {[seed for seed, *_ in found[:8]]}")
        for seed, recipe, detail in distinct(kind, found, shrink):
            print(f"  {detail}\n{listing(recipe, seed)}")
    if shrink and report.misses:
        blamed, examples = misses_by_operation(report)
        print("\nmisses by operation:")
        for key, count in blamed.most_common():
            print(f"  {count} {key}, such as program {examples[key][1]}")
            print(f"    {examples[key][2]!r}")


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="the first program's")
    parser.add_argument("--seconds", type=float, help="stop after so many")
    parser.add_argument("--lifting", type=float, default=Rates.lifting, help="share of programs")
    parser.add_argument("--thorough", type=float, default=Rates.thorough, help="share of those")
    parser.add_argument("--dimensions", type=float, default=Rates.dimensions, help="share")
    parser.add_argument("--no-shrink", action="store_true")
    parser.add_argument("--coverage", action="store_true", help="list steps and primitives seen")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    # What is compiled is small and runs a few times.
    jax.config.update("jax_disable_most_optimizations", True)
    rates = Rates(arguments.lifting, arguments.thorough, arguments.dimensions)
    start = time.monotonic()
    seeds = range(arguments.seed, arguments.seed + arguments.count)
    report = run(seeds, rates, arguments.seconds)
    print_report(report, time.monotonic() - start, not arguments.no_shrink)
    if arguments.coverage:
        print("\nsteps:", dict(report.steps.most_common()))
        print("\nprimitives:", dict(report.primitives.most_common()))
        print("\nnever seen:", " ".join(unseen_primitives(report)))
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()
