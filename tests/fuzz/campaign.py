"""A number of mutations of one kind, and what was wrong with their ends."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.cases import in_child
from tests.fuzz.targets import file_cases, recipe_cases


@dataclass(frozen=True)
class Faults:
    """Result of a campaign."""

    kind: str
    codes: Counter[int]
    slowest_s: float
    faults: dict[str, str]
    """Case -> what was wrong."""
    messages: dict[str, str]

    def text(self) -> str:
        """Return all faults and a summary."""
        ends = ", ".join(f"{count} exit code {code}" for code, count in sorted(self.codes.items()))
        lines = [f"{case}\n    {fault}" for case, fault in self.faults.items()]
        lines.append(
            f"{self.kind}s: {ends}; slowest {self.slowest_s:.1f} s; {len(self.faults)} faults"
        )
        return "\n".join(lines)


def campaign(
    kind: str,
    seeds: Path,
    work: Path,
    seed: int,
    count: int,
    thorough: bool = False,
    only: str | None = None,
) -> Faults:
    """Run ``count`` cases of a kind, ``recipe`` or ``file``, in a child process."""
    work.mkdir(parents=True)
    if only is not None:
        count = int(only.split(":")[0].split()[-1]) + 1
    made = (
        recipe_cases(work, seed, count)
        if kind == "recipe"
        else file_cases(seeds, work, seed, count, thorough)
    )
    cases = [case for case in made if only is None or case[0].startswith(f"{seed} {only}:")]
    outcomes = in_child([case for _, case in cases])
    named = list(zip([name for name, _ in cases], outcomes, strict=True))
    return Faults(
        kind,
        Counter(outcome.code for outcome in outcomes),
        max((outcome.seconds for outcome in outcomes), default=0.0),
        {name: outcome.fault for name, outcome in named if outcome.fault is not None},
        {name: outcome.message for name, outcome in named},
    )
