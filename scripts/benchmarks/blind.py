"""Does ``llm2clip compare --blind`` find which questions a gain comes from? Simulated models whose
gain is planted in the questions that can be solved without the picture, or in the others.

    python -m scripts.benchmarks.blind

Four in ten questions can be solved blind, by models that know the answer. A model sees, or knows,
what it answers right, and guesses the rest; both sides share most of what they see and know.
``visual``, ``blind``: how often a difference is shown (adjusted p below .05) in the questions that
need eyes, and in those that are solved blind.
"""

import argparse
import zlib
from dataclasses import dataclass

import numpy as np

from llava_integration.evaluator.compare.blind import (
    RIGHT,
    Part,
    adjusted_parts,
    part_of,
    part_weights,
)

Rng = np.random.Generator
LEVEL = 0.95
SOLVABLE = 0.4  # of the questions
SHARED = 0.6  # of what a side sees or knows


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Two models, and whose answers without pictures there are."""

    questions: int = 1000
    options: int = 4  # 0: free text, which nobody guesses
    knows: tuple[float, float] = (0.6, 0.6)  # of the solvable questions: base, new
    sees: tuple[float, float] = (0.4, 0.4)  # of the others
    # blind logs: of "another" model, which solves ``caught`` of the solvable questions, of "two
    # others", or of "both" sides, which solve what they know, and guess as with the picture
    logs: str = "another"
    caught: float = 1.0
    # of yes-or-no questions: how often base, new and the blind model say yes where they guess
    says_yes: tuple[float, float, float] | None = None

    @property
    def name(self) -> str:
        """What is planted."""
        planted = "no gain"
        gains = {
            "blind": self.knows[1] - self.knows[0],
            "visual": self.sees[1] - self.sees[0],
        }
        listed = [f"{kind} {gain:+.0%}" for kind, gain in gains.items() if gain > 0]
        if listed:
            planted = " and ".join(listed)
        options = f"{self.options} options" if self.options else "free text"
        logs = {
            "another": "log of another model",
            "two others": "logs of two others",
            "both": "logs of both sides",
        }[self.logs]
        if self.caught < 1:
            logs += f" that miss{'es' if self.logs == 'another' else ''} {1 - self.caught:.0%}"
        if self.says_yes:
            base, new, blind = self.says_yes
            options = (
                f"yes or no, guessed yes by {base:.0%} and {new:.0%}, blind {blind:.0%}"
            )
        return f"{self.questions} questions, {options}, {planted}; {logs}"


def draw(
    setting: Setting, rng: Rng
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """(N,) scores of base and of new, (J, N) of the blind logs, and (N,) which questions have the
    answer yes, of yes-or-no questions."""
    count = setting.questions
    is_yes_N = rng.random(count) < 0.5 if setting.says_yes else None

    def guesses(side: int) -> np.ndarray:
        """(N,) whether a guess of base, new or the blind model is right."""
        if setting.says_yes is None or is_yes_N is None:
            chance = 1 / setting.options if setting.options else 0.0
            return rng.random(count) < chance
        return (rng.random(count) < setting.says_yes[side]) == is_yes_N

    solvable_N = rng.random(count) < SOLVABLE
    difficulty_N = rng.random(count)
    sides = []
    blind_logs = []
    for side, (knows, sees) in enumerate(zip(setting.knows, setting.sees, strict=True)):
        luck_N = np.where(rng.random(count) < SHARED, difficulty_N, rng.random(count))
        known_N = solvable_N & (luck_N < knows)
        seen_N = ~solvable_N & (luck_N < sees)
        guessed_N = guesses(side)
        sides.append((known_N | seen_N | guessed_N).astype(float))
        blind_logs.append((known_N | guessed_N).astype(float))
    if setting.logs != "both":
        blind_logs = []
        for _ in range(1 if setting.logs == "another" else 2):
            known_N = solvable_N & (rng.random(count) < setting.caught)
            guessed_N = ~solvable_N & guesses(2)
            blind_logs.append((known_N | guessed_N).astype(float))
    return sides[0], sides[1], np.array(blind_logs), is_yes_N


def parts_of(setting: Setting, rng: Rng) -> list[Part]:
    """Both parts of one simulated comparison."""
    base_N, new_N, blind_JN, is_yes_N = draw(setting, rng)
    chance = 1 / setting.options if setting.options else 0.0
    chance_N = np.full(len(base_N), chance)
    solved_N = np.any(blind_JN >= RIGHT, axis=0)
    clusters = [str(number) for number in range(len(base_N))]
    parts = []
    weights_of = part_weights(solved_N, chance_N, len(blind_JN), is_yes_N)
    for name, weights in weights_of.items():
        part = part_of(name, base_N[None], new_N[None], clusters, weights, level=LEVEL)
        parts.append(part)
    return adjusted_parts(parts)


def simulate(setting: Setting, simulations: int) -> tuple[float, float]:
    """How often a difference is shown in the questions that need eyes, and in those solved
    blind."""
    rng = np.random.default_rng(zlib.crc32(setting.name.encode()))
    visual = 0
    blind = 0
    for _ in range(simulations):
        solved, eyes = parts_of(setting, rng)
        visual += eyes.verdict in ("better", "worse")
        blind += solved.verdict in ("better", "worse")
    return visual / simulations, blind / simulations


MORE_KNOWN = (0.6, 0.8)
MORE_SEEN = (0.4, 0.6)


def settings() -> list[Setting]:
    """The settings of the table."""
    listed = []
    for logs, caught in (("another", 1.0), ("another", 0.8), ("both", 1.0)):
        for options in (4, 2, 0):
            about = {"logs": logs, "caught": caught, "options": options}
            listed.append(Setting(knows=MORE_KNOWN, **about))
            listed.append(Setting(sees=MORE_SEEN, **about))
    listed += [
        Setting(knows=MORE_KNOWN, logs="two others", caught=0.8),
        Setting(sees=MORE_SEEN, logs="two others", caught=0.8),
        Setting(knows=MORE_KNOWN, sees=MORE_SEEN),
        Setting(),
        Setting(logs="both"),
        Setting(options=2, says_yes=(0.5, 0.8, 0.8)),
        Setting(options=2, says_yes=(0.3, 0.6, 0.3), questions=3000),
        Setting(sees=MORE_SEEN, options=2, says_yes=(0.5, 0.5, 0.7), questions=3000),
        Setting(knows=MORE_KNOWN, questions=100),
        Setting(knows=MORE_KNOWN, questions=5000, caught=0.8),
        Setting(knows=MORE_KNOWN, questions=5000, logs="both"),
    ]
    return listed


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--simulations", type=int, default=1000)
    args = parser.parse_args()
    print("| setting | visual | blind |")
    print("|---|--:|--:|")
    for setting in settings():
        visual, blind = simulate(setting, args.simulations)
        print(f"| {setting.name} | {visual:.1%} | {blind:.1%} |", flush=True)


if __name__ == "__main__":
    main()
