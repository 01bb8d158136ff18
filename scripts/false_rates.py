"""How often the verdicts are wrong: simulated experiments in which the truth is known, judged as real ones are.

    python scripts/false_rates.py [--repeats 4000]

prints the tables of docs/judging.md.
"""

import argparse
from collections import Counter
from collections.abc import Callable

import numpy as np

from provenn.catalog import Experiment, Region
from provenn.evidence import Measurement, Skill, Verdict, decide
from provenn.evidence.claim import ClaimVerdict, Outcome, judge

BETTER = Experiment(id="better", kind="quality", says="A is better than B.", expects=Region(above=0.0))
ON_PAR = Experiment(id="par", kind="quality", says="A and B are on par.", expects=Region(within=(-1.0, 1.0)))
FASTER = Experiment(id="faster", kind="cost", says="A is faster than B.", expects=Region(below=1.0))


def seeds(rng: np.random.Generator, effect: float, count: int, *, guessing: bool = False) -> Measurement:
    """A paired comparison whose differences have a standard deviation of 1 over seeds, of 0.1 where both guess."""
    baseline = rng.normal(0, 2, count)
    difference = rng.normal(effect, 0.1 if guessing else 1, count)
    values, dummy_baseline = (baseline + difference).tolist(), (baseline if guessing else baseline - 20).tolist()
    variants = (("A", values), ("B", baseline.tolist()))
    skills = [
        Skill(variant=variant, values=v, dummy_baseline=dummy_baseline, higher_is_better=True)
        for variant, v in variants
    ]
    return Measurement.paired(values, baseline.tolist(), seeds=range(count), skills=skills)


def clocks(rng: np.random.Generator, ratio: float, rounds: int) -> Measurement:
    """Interleaved rounds; what the machine does meets both alike, and each with a long tail of its own."""
    shared = rng.lognormal(0, 0.1, rounds)
    a, b = (shared * factor * (1 + rng.exponential(0.05, rounds)) for factor in (ratio, 1.0))
    return Measurement.of("clock ratio", a.tolist(), b.tolist())


def rates(experiment: Experiment, draw: Callable[[np.random.Generator], Measurement], repeats: int) -> Counter:
    return Counter(decide(experiment, draw(np.random.default_rng(i)))[0] for i in range(repeats))


def verdicts_of_claims(effects: tuple[float, ...], repeats: int) -> Counter:
    """A claim that several independent experiments decide."""
    counts: Counter = Counter()
    for i in range(repeats):
        rng = np.random.default_rng(i)
        outcomes = [Outcome("quality", decide(BETTER, seeds(rng, effect, 5))[0]) for effect in effects]
        counts[judge("quality", "", outcomes).verdict] += 1
    return counts


def main(repeats: int) -> None:
    print("| the truth | supported | inconclusive | contradicted | not measured |")
    print("| --- | --- | --- | --- | --- |")
    cases = [
        ("A is no better than B, 5 seeds", BETTER, lambda rng: seeds(rng, 0.0, 5)),
        ("A is worse by one standard deviation, 5 seeds", BETTER, lambda rng: seeds(rng, -1.0, 5)),
        ("A is better by one, 5 seeds", BETTER, lambda rng: seeds(rng, 1.0, 5)),
        ("A is better by two, 5 seeds", BETTER, lambda rng: seeds(rng, 2.0, 5)),
        ("A is better by two, 3 seeds", BETTER, lambda rng: seeds(rng, 2.0, 3)),
        (
            "A and B both guess; the experiment is that A is better",
            BETTER,
            lambda rng: seeds(rng, 0.0, 5, guessing=True),
        ),
        (
            "A and B both guess; the experiment is that they are on par",
            ON_PAR,
            lambda rng: seeds(rng, 0, 5, guessing=True),
        ),
        ("A takes as long as B, 11 rounds of a clock", FASTER, lambda rng: clocks(rng, 1.0, 11)),
        ("A takes 0.9 times as long, 11 rounds", FASTER, lambda rng: clocks(rng, 0.9, 11)),
    ]
    columns = (Verdict.SUPPORTED, Verdict.INCONCLUSIVE, Verdict.CONTRADICTED, Verdict.NOT_MEASURED)
    for words, experiment, draw in cases:
        found = rates(experiment, draw, repeats)
        print(f"| {words} | " + " | ".join(f"{100 * found[verdict] / repeats:.1f} %" for verdict in columns) + " |")
    columns = (ClaimVerdict.SUPPORTED, ClaimVerdict.MIXED, ClaimVerdict.INCONCLUSIVE, ClaimVerdict.CONTRADICTED)
    print("\n| a claim with | supported | mixed | inconclusive | contradicted |\n| --- | --- | --- | --- | --- |")
    claims = [
        ("one experiment without an effect", (0.0,)),
        ("three experiments without an effect", (0.0, 0.0, 0.0)),
        ("two experiments with an effect of two, one without", (2.0, 2.0, 0.0)),
        ("three experiments with an effect of two", (2.0, 2.0, 2.0)),
    ]
    for words, effects in claims:
        counts = verdicts_of_claims(effects, repeats)
        print(f"| {words} | " + " | ".join(f"{100 * counts[verdict] / repeats:.1f} %" for verdict in columns) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=4000)
    main(parser.parse_args().repeats)
